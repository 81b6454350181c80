"""What the operators are compared with on a GPU: the library's implementations, and floors.

A floor is less work than any implementation of the operator has to do. Its name starts with ``floor``, and its result,
which is not the operator's, is not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.jobs import Job, Result, Tensors, parts

Call = Callable[[Tensors], Result]

FLOOR = "floor"
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa(t: Tensors) -> Tensor:
    mask, bias = t.get("mask"), t.get("bias")
    allowed = bias if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], allowed)


def _sdpa_by(backend: SDPBackend) -> Call:
    def call(t: Tensors) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(t)

    return call


class _LibraryConvolutions:
    """A namespace whose depthwise convolution is the library's, on NCHW with both transposes as copies."""

    @staticmethod
    def token_depthwise_conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        grid: tuple[int, int],
        stride: int = 1,
        pre_norm: Any = None,
        pre_activation: str | None = None,
        norm: Any = None,
        activation: str | None = None,
        residual: bool = False,
    ) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, grid).contiguous()
        inner = image if pre_norm is None else pre_norm(image)
        inner = F.gelu(inner) if pre_activation else inner
        out = F.conv2d(inner, weight, bias, stride, weight.shape[-1] // 2, groups=weight.shape[0])
        out = out if norm is None else norm(out)
        out = F.gelu(out) if activation else out
        out = out + image if residual else out
        return out.flatten(2).transpose(1, 2).contiguous()


def library_peers(job: Job) -> dict[str, Call]:
    """The library's implementations of a job by name, other than the plain code."""
    if job.op in ("masked_attention", "class_attention"):
        return {"sdpa": _sdpa} | {f"sdpa_{name}": _sdpa_by(backend) for name, backend in SDPA_BACKENDS.items()}
    if job.op == "token_depthwise_conv":
        return {"cudnn_nchw": lambda t: job.call(_LibraryConvolutions, t)}
    return {}


def traffic(tensors: Tensors, out: Result, training: bool) -> int:
    """The least number of bytes read and written, in training by both passes.

    The backward pass reads the gradient of the output and every input again, and writes the gradient of each input.
    """
    read = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    written = sum(tensor.numel() * tensor.element_size() for tensor in parts(out))
    return 3 * read + 2 * written if training else read + written


def floors(job: Job, tensors: Tensors, out: Result, training: bool) -> dict[str, Callable[[], Tensor]]:
    """By name: for a convolution a copy of the bytes it moves, for head mixing attention without the mixing."""
    if job.op == "token_depthwise_conv":
        # A copy moves each byte twice.
        source = torch.empty(traffic(tensors, out, training) // 2, dtype=torch.uint8, device=tensors["x"].device)
        target = torch.empty_like(source)
        return {f"{FLOOR}_copy": lambda: target.copy_(source)}
    if job.op == "head_mixed_attention" and not training:

        def unmixed() -> Tensor:
            with torch.no_grad():
                return _sdpa({name: tensors[name] for name in "qkv"})

        return {f"{FLOOR}_sdpa_unmixed": unmixed}
    return {}
