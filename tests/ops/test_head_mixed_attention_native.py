"""The C++ operators of head-mixed attention as they are, layer norm and gradients included, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import backends
from fastvit.reference.functional import attention_probabilities
from tests.helpers import assert_as_accurate, poisoned_empty

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
pytestmark = needs_cpp

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("post", "talking", "pre", "layer norm", "bare layer norm")


class Mix(NamedTuple):
    """The parameters of a head-mixed attention, in the order the operators take them."""

    pre_weight: Tensor | None = None
    pre_bias: Tensor | None = None
    post_weight: Tensor | None = None
    post_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float = 0.0
    layer_norm: bool = False
    output_scale: float = 1.0

    def to(self, dtype: torch.dtype) -> Mix:
        return Mix(*(field.to(dtype) if isinstance(field, Tensor) else field for field in self))


def make_mix(kind: str, heads: int) -> Mix:
    weights = [torch.eye(heads) + 0.2 * torch.randn(heads, heads) for _ in range(2)]
    biases = [0.1 * torch.randn(heads) for _ in range(2)]
    norm = {"norm_weight": 0.5 + torch.rand(heads), "norm_bias": 0.1 * torch.randn(heads), "norm_eps": 1e-5}
    return {
        "post": Mix(post_weight=weights[1], post_bias=biases[1], output_scale=-1.5),
        "talking": Mix(weights[0], biases[0], weights[1], biases[1]),
        "pre": Mix(weights[0], output_scale=0.5),
        "layer norm": Mix(post_weight=weights[1], layer_norm=True, output_scale=0.5, **norm),
        "bare layer norm": Mix(norm_eps=1e-3, layer_norm=True),
    }[kind]


def make_qkv(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one packed (B, N, 3, H, D), as the models' projection gives them."""
    packed = (size * torch.randn(batch, max(queries, keys), 3, heads, dim)).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def plain_maps(q: Tensor, k: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> Tensor:
    """The maps behind the softmax."""
    maps = (q * scale) @ k.transpose(-2, -1)
    if mix.pre_weight is not None:
        maps = F.conv2d(maps, mix.pre_weight[:, :, None, None], mix.pre_bias)
    return attention_probabilities(maps, mask)


def plain(q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> Tensor:
    mix = mix.to(q.dtype)
    maps = plain_maps(q, k, mix, mask, scale)
    if mix.post_weight is not None:
        maps = F.conv2d(maps, mix.post_weight[:, :, None, None], mix.post_bias)
    if mix.layer_norm:
        normed = F.layer_norm(maps.movedim(1, -1), (maps.shape[1],), mix.norm_weight, mix.norm_bias, mix.norm_eps)
        maps = normed.movedim(-1, 1)
    maps = maps * mix.output_scale
    if mask is not None:
        maps = maps.masked_fill(~mask, 0.0)
    return maps @ v


def forward(q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> Tensor:
    statistics = (None, None)
    with poisoned_empty():
        return torch.ops.fastvit.head_mixed_attention(q, k, v, *mix[:6], *statistics, *mix[6:], mask, scale)


def check_forward(q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None = None, scale: float = 0.3) -> None:
    exact = plain(q.double(), k.double(), v.double(), mix, mask, scale)
    assert_as_accurate(forward(q, k, v, mix, mask, scale), plain(q, k, v, mix, mask, scale), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer norm", "bare layer norm"])
def test_layer_norm_forward(isa: str, kind: str, dtype: torch.dtype) -> None:
    for heads, queries, keys in ((1, 5, 7), (4, 37, 53), (12, 17, 20), (16, 33, 9), (32, 3, 4)):
        check_forward(*make_qkv(2, heads, queries, keys, 18, dtype), make_mix(kind, heads))
    q, k, v = make_qkv(2, 6, 20, 30, 16, dtype)
    for shape in ((2, 1, 1, 30), (2, 6, 20, 30), (1, 1, 20, 30)):
        check_forward(q, k, v, make_mix(kind, 6), torch.rand(shape) < 0.6)
    check_forward(10 * q, k, v, make_mix(kind, 6))


def test_a_layer_norm_takes_no_statistics() -> None:
    q, k, v = make_qkv(1, 4, 9, 9, 8, torch.float32)
    zeros = torch.zeros(4)
    mix = make_mix("layer norm", 4)
    with pytest.raises(RuntimeError, match="a layer norm takes no norm_mean"):
        torch.ops.fastvit.head_mixed_attention(q, k, v, *mix[:6], zeros, zeros, *mix[6:], None, 1.0)
