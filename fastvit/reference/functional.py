"""The plain functions the reference models call: the executable specification of every operator.

Each function here has a fused twin of the same name and signature in ``fastvit.ops``. These versions are written to be
read and to be differentiated by autograd in any floating dtype (float64 included); they may write N x N maps.

Shapes: B batch, H heads, Nq queries, Nk keys, D head dimension, C channels, (h, w) the token grid, P prefix tokens
(class, distillation) that precede the h*w grid tokens.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _AcceleratorSyncBatchNorm

from fastvit.reference.overrides import must_call

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "LEFF_FORMS",
    "BatchNorm",
    "LayerNorm",
    "Projection",
    "activate",
    "attention_probabilities",
    "class_attention",
    "conv_batch_norm",
    "conv_projection",
    "depthwise_separable_conv",
    "glu_mlp",
    "head_mixed_attention",
    "leff",
    "linear",
    "masked_attention",
    "mlp",
    "re_attention",
    "recomputing",
    "talking_heads_attention",
    "token_depthwise_conv",
]


class _Recomputation(threading.local):
    active = False


_recomputation = _Recomputation()


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """For the recomputation of a checkpointed block: BatchNorm must not count the same batch a second time."""
    before, _recomputation.active = _recomputation.active, True
    try:
        yield
    finally:
        _recomputation.active = before


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNorm(NamedTuple):
    """The tensors and settings of a BatchNorm over channels (or heads), as ``F.batch_norm`` takes them.

    ``weight`` and ``bias`` are None without affine parameters; ``running_mean`` and ``running_var`` are None with
    ``track_running_stats=False``. ``use_batch_stats`` is True if the layer normalises by the statistics of its input.
    ``layer``, if set, is called instead, because its tensors alone do not define what it does. ``process_group`` is set
    if that layer is an ``nn.SyncBatchNorm`` that reduces its statistics over several processes, which
    :func:`synchronised_batch_norm` computes, on the CPU too; an implementation that does this reduction itself uses
    :meth:`opened`.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    use_batch_stats: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    layer: nn.Module | None = None
    process_group: Any = None

    @classmethod
    def of(cls, module: nn.Module) -> BatchNorm:
        """Read an ``nn.BatchNorm*`` layer for one forward pass.

        In training mode this counts the batch in ``num_batches_tracked``, as the layer's own forward does, so call it
        exactly once per forward. Within :func:`recomputing` it counts nothing and leaves the statistics alone.

        A layer of another class (frozen, replaced by Identity), or one that is hooked or replaced in other ways, is
        called. A training SyncBatchNorm counts its batch when it is called or :meth:`opened`.
        """
        if must_call(module, *_BATCH_NORMS):
            return cls(None, None, None, None, use_batch_stats=True, layer=module)
        group = _synchronised_over(module)
        if group is not None:
            return cls(None, None, module.weight, module.bias, True, 0.0, module.eps, module, group)
        return cls._read(module)

    def opened(self) -> BatchNorm:
        """A synchronised layer's tensors instead of the layer, for code that reduces over ``process_group`` itself.

        Counts the batch, as :meth:`of` does for other layers: call this once, and never the layer.
        """
        if self.layer is None or self.process_group is None:
            return self
        return self._read(self.layer)._replace(process_group=self.process_group)

    @classmethod
    def _read(cls, module: Any) -> BatchNorm:
        use_batch_stats = module.training or module.running_mean is None
        momentum = 0.0 if module.momentum is None else module.momentum
        if not torch.compiler.is_compiling() and _recomputation.active:
            momentum = 0.0  # the running statistics are passed, so that the same tensors are saved, but do not move
        elif module.training and module.track_running_stats and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:  # cumulative moving average
                momentum = 1.0 / float(module.num_batches_tracked)
        tracking = not module.training or module.track_running_stats
        return cls(
            module.running_mean if tracking else None,
            module.running_var if tracking else None,
            module.weight,
            module.bias,
            use_batch_stats,
            momentum,
            module.eps,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...) over every axis but the second; updates the running statistics when training."""
        if self.process_group is not None:
            return synchronised_batch_norm(x, self.opened())
        if self.layer is not None:
            return self.layer(x)
        if isinstance(x, Tensor) and x.shape[1] == 0:  # for which torch has an IndexError
            return x
        weight = None if self.weight is None else self.weight.contiguous()
        bias = None if self.bias is None else self.bias.contiguous()
        mean, var = self.running_mean, self.running_var
        if not self.use_batch_stats and mean is not None and var is not None:
            mean, var = mean.contiguous(), var.contiguous()
        # A fault of torch (2.10 to 2.13, CPU), in the backward pass only. Its contiguity test for channels-last ignores
        # the strides of axes of size 1, its choice of a memory format does not. At batch 1 (or height or width 1) the
        # views that token layouts make have such strides: input and gradient then count as laid out alike when one is
        # channels-last and the other is not, and the kernel reads one in the order of the other. With three axes there
        # is one format only. The channels-last kernel also reads the per-channel tensors by pointer, without strides.
        ambiguous = torch.is_grad_enabled() and isinstance(x, Tensor) and x.dim() > 3 and 1 in x.shape
        flat = x.flatten(2) if ambiguous else x
        out = F.batch_norm(flat, mean, var, weight, bias, self.use_batch_stats, self.momentum, self.eps)
        return out.reshape(x.shape) if ambiguous else out


def _synchronised_over(module: nn.Module) -> Any:
    """The process group over which a layer reduces its statistics, or None if they are local."""
    if not isinstance(module, nn.SyncBatchNorm) or not module.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if module.process_group is None else module.process_group
    return group if dist.get_world_size(group) > 1 else None


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x), where an ``nn.SyncBatchNorm`` sums over processes on the CPU too, which torch's refuses."""
    return BatchNorm.of(norm)(x) if isinstance(norm, nn.SyncBatchNorm) else norm(x)


def synchronised_batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """Normalise x (B, C, ...) by the statistics of all of the group's processes; moves the running ones.

    On accelerators by torch's kernels. On the CPU, where torch has none, count, mean and squares of each channel are
    summed in float64. Processes may have unequal batches, or an empty one.

    Args:
        norm: with ``process_group``, opened.

    Raises:
        ValueError: one value per channel in all processes together.
        RuntimeError: a second derivative is asked for.
    """
    if x.device.type == "cpu":
        return _untraced(x, norm)
    mean, var, weight, bias, _, momentum, eps, _, group = norm
    size = dist.get_world_size(group)
    return _AcceleratorSyncBatchNorm.apply(x, weight, bias, mean, var, eps, momentum, group, size)


def _untraced(x: Tensor, norm: BatchNorm) -> Tensor:
    if "torch._dynamo" not in sys.modules:
        return _synchronised_on_cpu(x, norm)
    if not _disabled:  # at the first call, as it imports the compiler
        reason = "a norm that sums over processes is not traced"
        _disabled.append(torch.compiler.disable(_synchronised_on_cpu, reason=reason))
    return _disabled[0](x, norm)


_disabled: list[Callable[[Tensor, BatchNorm], Tensor]] = []


def _synchronised_on_cpu(x: Tensor, norm: BatchNorm) -> Tensor:
    mean, var, weight, bias, _, momentum, eps, _, group = norm
    out, batch_mean, batch_var, count = _SynchronisedBatchNorm.apply(x, weight, bias, eps, group)
    if mean is not None and var is not None:
        with torch.no_grad():
            for running, new in ((mean, batch_mean), (var, batch_var * (count / (count - 1.0)))):
                running.copy_(torch.lerp(running.double(), new, momentum))
    return out


class _SynchronisedBatchNorm(torch.autograd.Function):
    """(out, mean (C,), biased variance (C,), count (1,)) of x (B, C, ...); the statistics in float64."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = x.numel() // max(x.shape[1], 1)
        mean = _sum_of_channels(wide) / max(own, 1)
        squares = _sum_of_channels((wide - _per_channel(mean, wide)).square())
        count, sums, squares = sums_over_processes(
            group, mean.new_full((1,), own), own * mean, squares + own * mean.square()
        )
        if float(count) <= 1.0:
            raise ValueError(f"Expected more than 1 value per channel when training, got {int(count)} in all processes")
        mean = sums / count
        variance = (squares / count - mean.square()).clamp(min=0.0)
        inverse = (variance + eps).rsqrt()
        factor = inverse if weight is None else inverse * weight
        shift = -mean * factor if bias is None else bias - mean * factor
        ctx.save_for_backward(x, weight, bias, mean, inverse, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        out = wide * _per_channel(factor, wide) + _per_channel(shift, wide)
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("norm: double backward through statistics of several processes is not implemented")
        x, weight, bias, mean, inverse, count = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        standard = (wide - _per_channel(mean, wide)) * _per_channel(inverse, wide)
        grad = grad.to(wide.dtype)
        for_bias, for_weight = _sum_of_channels(grad), _sum_of_channels(grad * standard)
        dx = None
        if ctx.needs_input_grad[0]:  # every process's result depends on every one's values
            shared = sums_over_processes(ctx.group, for_bias, for_weight)
            by_bias, by_weight = (_per_channel(each / count, wide) for each in shared)
            factor = inverse if weight is None else inverse * weight
            dx = (_per_channel(factor, wide) * (grad - by_bias - standard * by_weight)).to(x.dtype)
        return (
            dx,
            None if weight is None else for_weight.to(weight.dtype),
            None if bias is None else for_bias.to(bias.dtype),
            None,
            None,
        )


def _sum_of_channels(x: Tensor) -> Tensor:
    """(C,) in float64: each channel's sum over the other axes of (B, C, ...)."""
    return x.sum([axis for axis in range(x.dim()) if axis != 1], dtype=torch.float64)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) as it broadcasts with x (B, C, ...), in its dtype."""
    return vector.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def sums_over_processes(group: Any, *parts: Tensor) -> tuple[Tensor, ...]:
    """Each part summed over a group's processes, in one exchange; None: as they are."""
    if group is None:
        return parts
    total = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(total, group=group)
    pieces = total.split([part.numel() for part in parts])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


class LayerNorm(NamedTuple):
    """The tensors and settings of a LayerNorm over one axis: heads in a map, or the channels of tokens."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.LayerNorm) -> LayerNorm:
        """Read an ``nn.LayerNorm`` over one axis; ValueError for another module or more axes."""
        if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
            raise ValueError(f"module: expected an nn.LayerNorm over one axis, got {module!r}")
        return cls(module.weight, module.bias, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x (B, H, ...) over its second axis."""
        return self.over_last(x.movedim(1, -1)).movedim(-1, 1)

    def over_last(self, x: Tensor) -> Tensor:
        """Normalise x (..., C) over its last axis."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): OpenAI CLIP's and CvT's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activation by name; ``"gelu"`` is the exact (erf) form, ``"gelu_tanh"`` its authors' approximation by a tanh."""

GATES = ACTIVATIONS | {"sigmoid": torch.sigmoid}
"""Activation of a gate by name."""


def activate(
    x: Tensor, activation: str | None, functions: dict[str | None, Callable[[Tensor], Tensor]] = ACTIVATIONS
) -> Tensor:
    """Apply the activation of that name; ValueError lists the valid names."""
    if activation not in functions:
        raise ValueError(f"activation: expected one of {sorted(map(str, functions))}, got {activation!r}")
    return functions[activation](x)


def conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: str | None = None,
) -> Tensor:
    """activation(norm(conv(x) + bias)) of an image: a layer of a convolutional stem, or a patch embedding.

    Args:
        x: (B, C, H, W). weight: (O, C, k, l), cross-correlation as in ``nn.Conv2d``. bias: (O,).
        norm: BatchNorm over channels, or None. activation: a name of :data:`ACTIVATIONS`.
        stride, padding: of the convolution.

    Returns:
        (B, O, H', W').

    Source: Yuan et al. 2021 (CeiT), section 3.1.
    """
    out = F.conv2d(x, weight, bias, stride, padding)
    return activate(out if norm is None else norm(out), activation)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    norm: LayerNorm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * activation(norm(x) weight^T + bias).

    Args:
        x: (..., K). weight: (N, K). bias: (N,).
        activation: a name of :data:`ACTIVATIONS`.
        norm: over K. scale: (N,), a LayerScale. residual: (..., N).

    Returns:
        (..., N).

    Source: Dosovitskiy et al. 2021 (ViT), equations 2 and 3; Touvron et al. 2021 (CaiT), equation 4 (LayerScale).
    """
    x = x if norm is None else norm.over_last(x)
    return add_scaled(activate(F.linear(x, weight, bias), activation), scale, residual)


def add_scaled(out: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + scale * out, of which either may be absent."""
    out = out if scale is None else scale * out
    return out if residual is None else residual + out


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "gelu",
    *,
    norm: LayerNorm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * (activation(norm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias).

    Args:
        x: (..., K). fc1_weight: (M, K). fc1_bias: (M,). fc2_weight: (N, M). fc2_bias: (N,).
        activation: a name of :data:`ACTIVATIONS`.
        norm: over K. scale: (N,), a LayerScale. residual: (..., N).

    Returns:
        (..., N).

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1.
    """
    hidden = linear(x, fc1_weight, fc1_bias, activation, norm=norm)
    return add_scaled(F.linear(hidden, fc2_weight, fc2_bias), scale, residual)


def glu_mlp(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "silu",
    *,
    norm: LayerNorm | None = None,
    hidden_norm: LayerNorm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """An MLP whose hidden values are gated: SwiGLU ("silu"), GEGLU ("gelu"), GLU ("sigmoid").

    With x' = norm(x): h = activation(x' gate_weight^T + gate_bias) * (x' value_weight^T + value_bias);
    residual + scale * (hidden_norm(h) fc2_weight^T + fc2_bias).

    Args:
        x: (..., K). gate_weight, value_weight: (M, K), which a packed layer has as ``weight.chunk(2)``.
        gate_bias, value_bias: (M,). fc2_weight: (N, M). fc2_bias: (N,).
        activation: a name of :data:`GATES`.
        norm: over K. hidden_norm: over M. scale: (N,), a LayerScale. residual: (..., N).

    Returns:
        (..., N).

    Source: Shazeer 2020 (GLU Variants Improve Transformer), equation 6; Fang et al. 2023 (EVA-02), section 2.1
    (hidden_norm).
    """
    x = x if norm is None else norm.over_last(x)
    hidden = activate(F.linear(x, gate_weight, gate_bias), activation, GATES) * F.linear(x, value_weight, value_bias)
    hidden = hidden if hidden_norm is None else hidden_norm.over_last(hidden)
    return add_scaled(F.linear(hidden, fc2_weight, fc2_bias), scale, residual)


def _expand_mask(mask: Tensor | None) -> Tensor | None:
    """A mask with four axes: (B, Nk) key padding as (B, 1, 1, Nk), leading axes of size 1 for any other shape."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None, None, :] if mask.dim() == 2 else mask[(None,) * (4 - mask.dim())]


# A masked key is absent: NaN or infinity in it, or in its value, reaches neither the output nor a gradient. A weight of
# zero is not enough for that, 0 * NaN being NaN. Whole rows that no unmasked pair uses are zeroed by selection. Where
# the mask varies by query, a row hidden from one query may be visible to another, so the products are taken over finite
# numbers, and what is not finite is put in only where the query sees it. A visible key that is infinite makes the
# gradient of the query that sees it NaN even at a logit of -inf, as without a mask: zero times infinity.


def _finite(x: Tensor) -> Tensor:
    """x with zeros for NaN and infinities, whose gradient is zero there (and NaN for a NaN gradient)."""
    return torch.nan_to_num(x, 0.0, 0.0, 0.0)


def _has_one_row(mask: Tensor) -> bool:
    """Whether one row serves every query; not asked of a proxy of ``torch.fx``."""
    return isinstance(mask, Tensor) and mask.shape[-2] == 1


def _logits(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """q k^T (B, H, Nq, Nk); its entries at masked pairs have no meaning."""
    if mask is not None:
        q = torch.where(mask.any(-1, keepdim=True), q, 0.0)
        k = torch.where(mask.any(-2, keepdim=True).transpose(-2, -1), k, 0.0)
    logits = q @ k.transpose(-2, -1)
    if mask is None or _has_one_row(mask):
        return logits
    special = torch.where(mask & ~logits.isfinite(), logits, 0.0).detach()
    finite_q, finite_k = _finite(q), _finite(k)
    if isinstance(logits, Tensor) and logits.requires_grad:
        sees = mask.expand(logits.shape).to(q.dtype)
        finite_q = _spoiled(finite_q, sees @ (~k.isfinite()).to(q.dtype) > 0)
        finite_k = _spoiled(finite_k, sees.transpose(-2, -1) @ (~q.isfinite()).to(q.dtype) > 0)
    return finite_q @ finite_k.transpose(-2, -1) + special


def _spoiled(x: Tensor, where: Tensor) -> Tensor:
    """x, whose gradient is not finite in some places: the slope of a square root at zero is infinite."""
    return x + torch.where(where, torch.where(where, x - x.detach(), 1.0).sqrt(), 0.0)


def _weighted_sum(maps: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """maps v (B, H, Nq, D) for maps (B, H, Nq, Nk) that are zero at masked pairs."""
    if mask is not None:
        v = torch.where(mask.any(-2, keepdim=True).transpose(-2, -1), v, 0.0)
    if mask is None or _has_one_row(mask):
        return maps @ v
    sees_special = mask.expand(maps.shape).to(v.dtype) @ (~v.isfinite()).to(v.dtype) > 0
    return torch.where(sees_special, maps @ v, maps @ _finite(v))


def attention_probabilities(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis of (B, H, Nq, Nk) logits; masked keys get 0, a row with no key left is all zeros."""
    if mask is None:
        return logits.softmax(-1)
    # A row of -inf alone would give NaN, in the gradient too: such rows are filled with a finite number.
    empty = ~mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0)
    return logits.softmax(-1).masked_fill(~mask, 0.0)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, restricted to the keys that ``mask`` allows.

    Args:
        q: (B, H, Nq, D).
        k, v: (B, H, Nk, D).
        mask: bool, True = attend; (B, Nk), or broadcastable to (B, H, Nq, Nk). A row with no key left gives zeros.
            A masked key is absent: what it and its value hold, NaN and infinities included, changes neither the result
            nor a gradient, and its own gradient is zero.
        bias: additive, broadcastable to (B, H, Nq, Nk); -inf masks as False does.
        scale: D ** -0.5 by default.
        dropout_p: probability of dropping an attention weight; pass 0 outside training.

    Returns:
        (B, H, Nq, D).

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    drop = functools.partial(F.dropout, p=dropout_p)
    return attention_by_parts(q, k, v, mask, bias=bias, scale=scale, drop=drop)


def attention_by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    drop: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
    scale: float | None = None,
    pre_mix: Callable[[Tensor], Tensor] | None = None,
    post_mix: Callable[[Tensor], Tensor] | None = None,
    norm: BatchNorm | LayerNorm | None = None,
    output_scale: float = 1.0,
    drop_last: bool = False,
) -> Tensor:
    """:func:`head_mixed_attention` and :func:`masked_attention`, each step on the maps (B, H, Nq, Nk) a callable.

    Args:
        drop: the dropout; on the softmaxed maps, or on the finished ones with ``drop_last``.
        pre_mix, post_mix: of the logits and of the softmaxed maps across heads. norm: behind ``post_mix``.

    Other arguments as in those two.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = _expand_mask(mask)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        visible = bias != float("-inf")
        mask = visible if mask is None else mask & visible
    if pre_mix is None:
        maps = _logits(q * scale, k, mask)
    else:  # a head's logits count where any head attends
        maps = pre_mix(_logits(q * scale, k, mask if mask is None else mask.any(1, keepdim=True)))
    maps = attention_probabilities(maps if bias is None else maps + bias, mask)
    if not drop_last:
        maps = drop(maps)
    if post_mix is not None:
        maps = post_mix(maps)
    if norm is not None:
        maps = norm(maps)
    if output_scale != 1.0:
        maps = maps * output_scale
    if mask is not None and not (post_mix is None and norm is None):
        maps = maps.masked_fill(~mask, 0.0)
    if drop_last:
        maps = drop(maps)
    return _weighted_sum(maps, v, mask)


def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of a few queries, usually class tokens, to all tokens: :func:`masked_attention` for 1 to 4 queries.

    A separate operator because a fused kernel partitions this work differently. Source: Touvron et al. 2021 (CaiT),
    section 3; Yuan et al. 2021 (CeiT), section 3.3.
    """
    return masked_attention(q, k, v, mask, bias, scale, dropout_p)


def _mix_heads(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out[:, h] = sum_g weight[h, g] maps[:, g] + bias[h] for maps (B, H, Nq, Nk): a 1x1 convolution over heads."""
    return F.conv2d(maps, weight[:, :, None, None], bias)


def head_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    norm: BatchNorm | LayerNorm | None = None,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_after_mix: bool = False,
) -> Tensor:
    """Attention whose maps are mixed linearly across heads before and/or after the softmax.

    S_g = scale * q_g k_g^T;  S'_h = sum_g pre_weight[h, g] S_g + pre_bias[h];  P_h = softmax(S'_h);
    M_h = output_scale * norm(sum_g post_weight[h, g] P_g + post_bias[h]);  out_h = M_h v_h.

    Args:
        q: (B, H, Nq, D); k, v: (B, H, Nk, D).
        pre_weight, post_weight: (H, H), row h makes output head h; None skips that mix. pre_bias, post_bias: (H,).
        norm: BatchNorm or LayerNorm over heads on the mixed map, or None.
        mask: as in :func:`masked_attention`. Applied to the mixed logits; the finished map is zero at masked positions
            too, since the mix's bias and the norm's shift would give them a weight again. The norm's batch statistics
            are those ``nn.BatchNorm2d`` would see, masked positions included.
        dropout_p: on the softmaxed maps, or on the finished map with ``dropout_after_mix``.

    Returns:
        (B, H, Nq, D).

    Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT); Shazeer et al. 2020 (talking heads).
    """
    return attention_by_parts(
        q,
        k,
        v,
        mask,
        drop=functools.partial(F.dropout, p=dropout_p),
        scale=scale,
        pre_mix=None if pre_weight is None else functools.partial(_mix_heads, weight=pre_weight, bias=pre_bias),
        post_mix=None if post_weight is None else functools.partial(_mix_heads, weight=post_weight, bias=post_bias),
        norm=norm,
        output_scale=output_scale,
        drop_last=dropout_after_mix,
    )


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor | None,
    post_weight: Tensor,
    post_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """CaiT's talking heads: heads mixed before and after the softmax, dropout on the finished map.

    Arguments as in :func:`head_mixed_attention`. Source: facebookresearch/deit ``cait_models.py``.
    """
    return head_mixed_attention(
        q,
        k,
        v,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
        post_weight=post_weight,
        post_bias=post_bias,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_after_mix=True,
    )


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | LayerNorm | None,
    *,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """DeepViT's re-attention: softmax, dropout, linear mix across heads, norm over heads, output scale.

    Arguments as in :func:`head_mixed_attention`; ``weight`` (H, H) is the 1x1 convolution's. Source: Zhou et al. 2021,
    equation 3, and zhoudaquan/dvit_repo ``layers.py``; with a LayerNorm and no bias it is lucidrains/vit-pytorch's.
    """
    return head_mixed_attention(
        q,
        k,
        v,
        post_weight=weight,
        post_bias=bias,
        norm=norm,
        output_scale=output_scale,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
    )


def token_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    prefix_tokens: int = 0,
    pre_norm: BatchNorm | None = None,
    pre_activation: str | None = None,
    norm: BatchNorm | None = None,
    activation: str | None = None,
    residual: bool = False,
) -> Tensor:
    """Depthwise k x k convolution of tokens (B, P + h*w, C), with the operations that surround it in the models.

    t = pre_activation(pre_norm(x)) on the grid tokens; y = activation(norm(conv(t) + bias)); y += x with ``residual``.
    Prefix tokens pass through unchanged.

    Args:
        x: (B, P + h*w, C), row-major grid tokens after P prefix tokens.
        weight: (C, 1, k, k), cross-correlation as in ``nn.Conv2d``; bias: (C,).
        grid: (h, w). stride: of the convolution. padding: k // 2 zeros on each side by default (zeros of t, not of x).
        norm, pre_norm: BatchNorm over channels. activation, pre_activation: a name of :data:`ACTIVATIONS`.
        residual: adds the grid tokens of x; needs a convolution that keeps the grid size.

    Returns:
        (B, P + h'*w', C) with h' = (h + 2 * padding - k) // stride + 1, likewise w'.

    Source: Chu et al. 2021 (CPVT), algorithm 1; Yuan et al. 2021 (CeiT), section 3.2; Wu et al. 2021 (CvT), 3.2.
    """
    padding = weight.shape[-1] // 2 if padding is None else padding
    settings = {"stride": stride, "padding": padding, "groups": weight.shape[0]}
    return convolve_tokens(
        x,
        functools.partial(F.conv2d, weight=weight, bias=bias, **settings),
        grid=grid,
        prefix_tokens=prefix_tokens,
        pre_norm=pre_norm,
        pre_activation=pre_activation,
        norm=norm,
        activation=activation,
        residual=residual,
    )


def convolve_tokens(
    x: Tensor,
    convolution: Callable[[Tensor], Tensor],
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
    pre_norm: BatchNorm | None = None,
    pre_activation: str | None = None,
    norm: BatchNorm | None = None,
    activation: str | None = None,
    residual: bool = False,
) -> Tensor:
    """:func:`token_depthwise_conv` by a callable convolution of maps (B, C, h, w); other arguments as there."""
    h, w = grid
    prefix, tokens = x[:, :prefix_tokens], x[:, prefix_tokens:]
    if isinstance(x, Tensor) and tokens.shape[1] != h * w:  # not asked of a proxy of torch.fx
        raise ValueError(
            f"grid: {grid} has {h * w} tokens, x has {tokens.shape[1]} after {prefix_tokens} prefix tokens"
        )
    image = tokens.transpose(1, 2).reshape(x.shape[0], x.shape[2], h, w)
    inner = pre_norm(image) if pre_norm is not None else image
    inner = activate(inner, pre_activation)
    out = convolution(inner)
    if norm is not None:
        out = norm(out)
    out = activate(out, activation)
    if residual:
        out = out + image
    return (
        torch.cat((prefix, out.flatten(2).transpose(1, 2)), dim=1) if prefix_tokens else out.flatten(2).transpose(1, 2)
    )


def depthwise_separable_conv(
    x: Tensor,
    dw_weight: Tensor,
    norm: BatchNorm | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    prefix_tokens: int = 0,
    dw_bias: Tensor | None = None,
) -> Tensor:
    """Depthwise k x k convolution of tokens, BatchNorm, then a linear layer: one of CvT's projections.

    Prefix tokens skip the convolution and the norm, and join at the linear layer.

    Args:
        x: (B, P + h*w, C). dw_weight: (C, 1, k, k), dw_bias: (C,). pw_weight: (O, C), pw_bias: (O,).
        norm: BatchNorm over channels, between the two. grid, stride, padding: as in :func:`token_depthwise_conv`.

    Returns:
        (B, P + h'*w', O).

    Source: Wu et al. 2021 (CvT), section 3.2.
    """
    tokens = token_depthwise_conv(
        x, dw_weight, dw_bias, grid=grid, stride=stride, padding=padding, prefix_tokens=prefix_tokens, norm=norm
    )
    return F.linear(tokens, pw_weight, pw_bias)


class Projection(NamedTuple):
    """The parameters of one :func:`depthwise_separable_conv`: its arguments of the same names."""

    dw_weight: Tensor
    norm: BatchNorm | None
    pw_weight: Tensor
    pw_bias: Tensor | None = None
    stride: int = 1
    padding: int | None = None
    dw_bias: Tensor | None = None


def conv_projection(
    x: Tensor, q: Projection, k: Projection, v: Projection, *, grid: tuple[int, int], prefix_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """CvT's queries, keys and values: three :func:`depthwise_separable_conv` of the same tokens (B, P + h*w, C).

    Source: Wu et al. 2021 (CvT), section 3.2; microsoft/CvT ``cls_cvt.py``.
    """
    q_out, k_out, v_out = (
        depthwise_separable_conv(x, **part._asdict(), grid=grid, prefix_tokens=prefix_tokens) for part in (q, k, v)
    )
    return q_out, k_out, v_out


LEFF_FORMS = ("official", "paper")


def leff(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    up_norm: BatchNorm | None = None,
    dw_norm: BatchNorm | None = None,
    down_norm: BatchNorm | None = None,
    prefix_tokens: int = 1,
    form: str = "official",
    norm: LayerNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """CeiT's locally-enhanced feed-forward, as what a residual adds to its input; with that, and a norm in front.

    On grid tokens: linear, norm, GELU, depthwise k x k convolution, norm, GELU, linear, norm. Prefix tokens bypass it.

    Args:
        x: (B, P + h*w, C), row-major grid tokens after P prefix tokens.
        up_weight: (E, C), dw_weight: (E, 1, k, k) with k odd, down_weight: (O, E); O = C where there are prefix tokens.
        up_norm, dw_norm, down_norm: BatchNorm over channels after each.
        form: "official" returns prefix tokens unchanged, so that the residual doubles them, and ends without a GELU;
            "paper" returns zeros for them, so that the residual keeps them, and ends with a GELU after the last norm.
        norm: over C, of all tokens, in front. residual: (B, P + h*w, O), added at the end.

    Returns:
        (B, P + h*w, O).

    Source: Yuan et al. 2021 (CeiT), section 3.2; coeusguo/ceit ``LocallyEnhancedFeedForward``.
    """
    x = x if norm is None else norm.over_last(x)
    prefix, tokens = x[:, :prefix_tokens], x[:, prefix_tokens:]
    hidden = token_depthwise_conv(
        F.linear(tokens, up_weight, up_bias),
        dw_weight,
        dw_bias,
        grid=grid,
        pre_norm=up_norm,
        pre_activation="gelu",
        norm=dw_norm,
        activation="gelu",
    )
    out = F.linear(hidden, down_weight, down_bias)
    if down_norm is not None:
        out = down_norm(out.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    if form == "paper":
        out, prefix = F.gelu(out), torch.zeros_like(prefix)
    return add_scaled(torch.cat((prefix, out), dim=1) if prefix_tokens else out, None, residual)
