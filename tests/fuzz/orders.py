"""The plain form's sums in other orders, of which torch's own kernels take now one and now another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
_batch_norm = torch.nn.functional.batch_norm


class Reordered(TorchDispatchMode):
    """Products sum their terms in a random order, the softmax's gradient in that of the keys."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            *rest, a, b = args
            order = torch.randperm(a.shape[-1], generator=self._generator)
            args = *rest, a.index_select(-1, order), b.index_select(-2, order)
        elif func.overloadpacket is aten._softmax_backward_data and args[0].numel():
            grad, out, dim, dtype = args
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = sum((grad.to(wide) * out.to(wide)).unbind(dim)).unsqueeze(dim)
            return ((grad.to(wide) - total) * out.to(wide)).to(dtype)
        return func(*args, **(kwargs or {}))


def _channels_last(x: Tensor) -> Tensor:
    """With the strides of that format on axes of one element, too, by which torch chooses."""
    return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last).copy_(x)


def batch_norm_of_tokens(x: Tensor, *rest: Any) -> Tensor:
    """``F.batch_norm`` by torch's kernel for channels that are adjacent, whose sums are not of double."""
    out = _batch_norm(_channels_last(x.flatten(2)[..., None]), *rest)
    if out.requires_grad:
        out.register_hook(_channels_last)
    return out.reshape(x.shape)
