"""The operators at the sizes of published models, for the tests and benchmarks on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastvit.reference.functional import BatchNorm, Projection

Tensors = dict[str, Tensor]
Result = Tensor | tuple[Tensor, ...]

BATCHED = frozenset({"q", "k", "v", "mask", "x"})
"""The tensors whose first axis counts images."""


@dataclass(frozen=True)
class Job:
    """One call of an operator.

    ``make(batch, small)`` gives its tensors in float32 on the CPU, of the published size or a small one of the same
    kind; ``call(namespace, tensors, **backend)`` runs it from ``fastvit.ops`` or from ``fastvit.reference.functional``.
    Every floating tensor gets a gradient, except running statistics.
    """

    name: str
    op: str
    make: Callable[[int, bool], Tensors]
    call: Callable[..., Result]

    def tensors(self, batch: int, dtype: torch.dtype, device: torch.device | str, *, small: bool = False) -> Tensors:
        """Its tensors on a device; the floating ones, norms' included, in this dtype."""
        return {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in self.make(batch, small).items()
        }

    def leaves(self, tensors: Tensors) -> Tensors:
        """The tensors that get a gradient, as new leaves."""
        return {
            name: tensor.detach().requires_grad_()
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not is_statistic(name)
        }


def is_statistic(name: str) -> bool:
    """Whether a tensor of that name holds running statistics."""
    return name.endswith(("running_mean", "running_var"))


def parts(result: Result) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else list(result)


def images(tensors: Mapping[str, Tensor], number: int) -> Tensors:
    """The same call on the first ``number`` images."""
    return {name: tensor[:number] if name in BATCHED else tensor for name, tensor in tensors.items()}


def widened(tensors: Mapping[str, Tensor]) -> Tensors:
    """The same numbers in float64."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _attention(heads: int, queries: int, keys: int, dim: int, **others: Callable[[int, int, int], Tensor]) -> Any:
    """q, k and v as views of packed projections; ``others`` make further tensors from (batch, queries, keys)."""

    def make(batch: int, small: bool) -> Tensors:
        n, m = (min(queries, 37), min(keys, 45)) if small else (queries, keys)
        q = torch.randn(batch, n, heads, dim).transpose(1, 2)
        k, v = torch.randn(batch, m, 2, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        return {"q": q, "k": k, "v": v, **{name: other(batch, n, m) for name, other in others.items()}}

    return make


def _padding(batch: int, queries: int, keys: int) -> Tensor:
    """A mask for images of different sizes, from half of the keys to all; the last of several images has none."""
    lengths = torch.linspace(1.0, 0.5, batch).mul(keys).long()
    if batch > 1:
        lengths[-1] = 0
    return torch.arange(keys) < lengths[:, None]


def _attend(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
    return namespace.masked_attention(t["q"], t["k"], t["v"], t.get("mask"), t.get("bias"), **backend)


MEAN = "running_mean"


def _mixing(heads: int, tokens: int, dim: int, *names: str) -> Any:
    shapes = {"weight": (heads, heads), "bias": (heads,)}

    def tensor_of(name: str) -> Callable[[int, int, int], Tensor]:
        shape = shapes["weight" if name.endswith("weight") and not name.startswith("norm") else "bias"]

        def make(*_: int) -> Tensor:
            if name == "bias":  # small, as maps are: beside 1 they would keep few of their digits in 16 bits
                return torch.randn(shape) * 0.02
            if name == "running_var":
                return torch.rand(shape) * 1e-4 + 1e-5
            return torch.eye(heads) + 0.2 * torch.randn(shape) if len(shape) == 2 else torch.randn(shape) * 0.5 + 1.0

        return make

    tensors = _attention(heads, tokens, tokens, dim, **{name: tensor_of(name) for name in names if name != MEAN})

    def make(batch: int, small: bool) -> Tensors:
        made = tensors(batch, small)
        if MEAN in names:  # that of maps whose rows sum to 1: without them, nothing but the norm's bias is left
            made[MEAN] = made["weight"].sum(1) / made["k"].shape[2] + made["bias"]
        return made

    return make


def _attend_few(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
    return namespace.class_attention(t["q"], t["k"], t["v"], **backend)


def _talking_heads(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
    mixes = (t["pre_weight"], t["pre_bias"], t["post_weight"], t["post_bias"])
    return namespace.talking_heads_attention(t["q"], t["k"], t["v"], *mixes, **backend)


def _re_attention(training: bool) -> Callable[..., Tensor]:
    def call(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
        statistics = [t["running_mean"], t["running_var"]]
        if training:  # so that every candidate starts from the same ones
            statistics = [tensor.clone() for tensor in statistics]
        norm = BatchNorm(*statistics, t["norm_weight"], t["norm_bias"], use_batch_stats=training)
        return namespace.re_attention(t["q"], t["k"], t["v"], t["weight"], t["bias"], norm, **backend)

    return call


_RE_ATTENTION = ("weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var")


def _norm(name: str, channels: int) -> Tensors:
    """The tensors of a BatchNorm, far from the identity."""
    return {
        f"{name}_running_mean": 0.2 * torch.randn(channels),
        f"{name}_running_var": 0.5 + torch.rand(channels),
        f"{name}_weight": 0.5 + torch.rand(channels),
        f"{name}_bias": torch.randn(channels),
    }


def _norm_of(t: Tensors, name: str, training: bool = False) -> BatchNorm:
    """That BatchNorm; in training it updates copies of the running statistics."""
    statistics = [t[f"{name}_{which}"] for which in ("running_mean", "running_var")]
    if training:
        statistics = [tensor.clone() for tensor in statistics]
    return BatchNorm(*statistics, t[f"{name}_weight"], t[f"{name}_bias"], use_batch_stats=training)


def _side(tokens: int) -> int:
    return round(tokens**0.5)


def _convolution(channels: int, side: int, norms: tuple[str, ...] = ()) -> Callable[[int, bool], Tensors]:
    def make(batch: int, small: bool) -> Tensors:
        wide, high = (16, 5) if small else (channels, side)
        made = {"x": torch.randn(batch, high * high, wide), "weight": torch.randn(wide, 1, 3, 3) / 3}
        made["bias"] = torch.randn(wide)
        return made | {key: tensor for name in norms for key, tensor in _norm(name, wide).items()}

    return make


def _convolve(norms: tuple[str, ...] = (), **options: Any) -> Callable[..., Tensor]:
    def call(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
        side = _side(t["x"].shape[1])
        around = {name: _norm_of(t, name) for name in norms}
        return namespace.token_depthwise_conv(
            t["x"], t["weight"], t["bias"], grid=(side, side), **around, **options, **backend
        )

    return call


_LEFF_LAYERS = ("up", "dw", "down")


def _leff(channels: int) -> Callable[[int, bool], Tensors]:
    def make(batch: int, small: bool) -> Tensors:
        wide, high = (16, 5) if small else (channels, 14)
        hidden = 4 * wide
        made = {
            "x": torch.randn(batch, 1 + high * high, wide),
            "up": torch.randn(hidden, wide) / wide**0.5,
            "up_bias": torch.randn(hidden),
            "dw": torch.randn(hidden, 1, 3, 3) / 3,
            "dw_bias": torch.randn(hidden),
            "down": torch.randn(wide, hidden) / hidden**0.5,
            "down_bias": torch.randn(wide),
        }
        for layer in _LEFF_LAYERS:
            made |= _norm(f"{layer}_norm", made[layer].shape[0])
        return made

    return make


def _feed_forward(training: bool) -> Callable[..., Tensor]:
    def call(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
        side = _side(t["x"].shape[1] - 1)
        layers = [t[name] for layer in _LEFF_LAYERS for name in (layer, f"{layer}_bias")]
        norms = {f"{layer}_norm": _norm_of(t, f"{layer}_norm", training) for layer in _LEFF_LAYERS}
        return namespace.leff(t["x"], *layers, grid=(side, side), **norms, **backend)

    return call


def _projections(
    channels: int, side: int, prefix: int, names: Sequence[str] = ("query", "key", "value")
) -> Callable[[int, bool], Tensors]:
    def make(batch: int, small: bool) -> Tensors:
        wide, high = (16, 6) if small else (channels, side)
        made = {"x": torch.randn(batch, prefix + high * high, wide)}
        for name in names:
            made |= {f"{name}_dw": torch.randn(wide, 1, 3, 3) / 3, f"{name}_pw": torch.randn(wide, wide) / wide**0.5}
            made |= {f"{name}_pw_bias": torch.randn(wide), **_norm(f"{name}_norm", wide)}
        return made

    return make


def _project(prefix: int, training: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    def call(namespace: ModuleType, t: Tensors, **backend: str) -> tuple[Tensor, ...]:
        side = _side(t["x"].shape[1] - prefix)
        three = [
            Projection(t[f"{n}_dw"], _norm_of(t, f"{n}_norm", training), t[f"{n}_pw"], t[f"{n}_pw_bias"], stride)
            for n, stride in (("query", 1), ("key", 2), ("value", 2))
        ]
        return namespace.conv_projection(t["x"], *three, grid=(side, side), prefix_tokens=prefix, **backend)

    return call


def _project_keys(namespace: ModuleType, t: Tensors, **backend: str) -> Tensor:
    side, weights = _side(t["x"].shape[1]), (t["key_pw"], t["key_pw_bias"])
    norm = _norm_of(t, "key_norm")
    return namespace.depthwise_separable_conv(
        t["x"], t["key_dw"], norm, *weights, grid=(side, side), stride=2, **backend
    )


_GELUS = {"pre_activation": "gelu", "activation": "gelu"}

JOBS = (
    Job("vit_b", "masked_attention", _attention(12, 197, 197, 64), _attend),
    Job("vit_s", "masked_attention", _attention(6, 197, 197, 64), _attend),
    Job("vit_b_padding", "masked_attention", _attention(12, 197, 197, 64, mask=_padding), _attend),
    Job("vit_b_512_padding", "masked_attention", _attention(12, 1025, 1025, 64, mask=_padding), _attend),
    Job(
        "vit_b_relative_bias",
        "masked_attention",
        _attention(12, 197, 197, 64, bias=lambda batch, n, m: torch.randn(1, 12, n, m)),
        _attend,
    ),
    Job("deepvit_head_dim", "masked_attention", _attention(12, 197, 197, 33), _attend),
    Job("cait_s_class", "class_attention", _attention(8, 1, 197, 48), _attend_few),
    Job(
        "cait_s24",
        "head_mixed_attention",
        _mixing(8, 196, 48, "pre_weight", "pre_bias", "post_weight", "post_bias"),
        _talking_heads,
    ),
    Job("deepvit_16b", "head_mixed_attention", _mixing(12, 197, 32, *_RE_ATTENTION), _re_attention(False)),
    Job("deepvit_s", "head_mixed_attention", _mixing(12, 197, 33, *_RE_ATTENTION), _re_attention(False)),
    Job("deepvit_s_training", "head_mixed_attention", _mixing(12, 197, 33, *_RE_ATTENTION), _re_attention(True)),
    Job("cpvt_s_peg", "token_depthwise_conv", _convolution(384, 14), _convolve(residual=True)),
    Job("cvt13_stage1_q", "token_depthwise_conv", _convolution(64, 56, ("norm",)), _convolve(("norm",))),
    Job("cvt13_stage1_kv", "token_depthwise_conv", _convolution(64, 56), _convolve(stride=2)),
    Job(
        "ceit_s_leff_middle",
        "token_depthwise_conv",
        _convolution(1536, 14, ("pre_norm", "norm")),
        _convolve(("pre_norm", "norm"), **_GELUS),
    ),
    Job("ceit_s_leff", "leff", _leff(384), _feed_forward(False)),
    Job("ceit_s_leff_training", "leff", _leff(384), _feed_forward(True)),
    Job("cvt13_stage2_key", "depthwise_separable_conv", _projections(192, 28, 0, ["key"]), _project_keys),
    Job("cvt13_stage1_projection", "conv_projection", _projections(64, 56, 0), _project(0)),
    Job("cvt13_stage3_projection", "conv_projection", _projections(384, 14, 1), _project(1)),
    Job("cvt13_stage3_training", "conv_projection", _projections(384, 14, 1), _project(1, True)),
)
