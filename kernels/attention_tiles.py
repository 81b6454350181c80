"""What the attention kernels share: the tile of masked logits, and how operands are prepared for a launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import load_key_mask, load_tile, with_small_strides
from torch import Tensor

NO_MASK, KEY_MASK, FULL_MASK = 0, 1, 2
"""How a mask is read: not at all, one row for all queries of a head, or a tile of (queries, keys)."""

NOT_SPECIALIZED = ["H", "num_queries", "num_keys", "stride_mb", "stride_mh", "stride_biasb", "stride_biash"]
"""Token counts and head counts vary from call to call and gain nothing from a kernel of their own."""


@triton.jit
def logits_tile(
    q_tile,
    k_tile,
    scale,
    mask,
    bias,
    first_query,
    first_key,
    num_queries,
    num_keys,
    stride_mq,
    stride_mk,
    stride_biasq,
    stride_biask,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Logits [QUERIES, KEYS], -inf where a key is masked or lies behind the last one.

    TRANSPOSED: the same as [KEYS, QUERIES].
    """
    if TRANSPOSED:
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
    else:
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    if HAS_BIAS:
        if TRANSPOSED:
            tile = load_tile(
                bias, first_key, first_query, num_keys, num_queries, stride_biask, stride_biasq, KEYS, QUERIES
            )
        else:
            tile = load_tile(
                bias, first_query, first_key, num_queries, num_keys, stride_biasq, stride_biask, QUERIES, KEYS
            )
        logits += tile.to(tl.float32)
    if MASK_KIND == 2:
        if TRANSPOSED:
            tile = load_tile(mask, first_key, first_query, num_keys, num_queries, stride_mk, stride_mq, KEYS, QUERIES)
        else:
            tile = load_tile(mask, first_query, first_key, num_queries, num_keys, stride_mq, stride_mk, QUERIES, KEYS)
        visible = tile != 0
    else:
        if MASK_KIND == 1:
            keys = load_key_mask(mask, first_key, num_keys, stride_mk, KEYS)
        else:
            keys = first_key + tl.arange(0, KEYS) < num_keys
        visible = keys[:, None] if TRANSPOSED else keys[None, :]
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def load_row_values(values, first_row, num_rows, ROWS: tl.constexpr):
    """Of one number per row of a head those from first_row on, [ROWS], zeros behind the last one."""
    places = first_row + tl.arange(0, ROWS)
    return tl.load(values + places, mask=places < num_rows, other=0.0)


@triton.jit
def store_row_values(values, tile, first_row, num_rows, ROWS: tl.constexpr):
    """Write what :func:`load_row_values` loads."""
    places = first_row + tl.arange(0, ROWS)
    tl.store(values + places, tile, mask=places < num_rows)


@triton.jit
def finite_maximum(row_max):
    """The row maximum, 0 for a row that has seen no key: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def inverse_of_sum(row_sum):
    """1 / row_sum, 0 for a row that has seen no key."""
    return tl.where(row_sum == 0.0, 0.0, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))


def product_kind(dtype: torch.dtype) -> str:
    """Which product a dtype takes: "half", or for float32 "tf32" where PyTorch's CUDA setting allows it, else "ieee".

    ``fp32_precision`` can be read whichever of its ways PyTorch was told by; ``allow_tf32`` raises after the new one.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded_head_dim(head_dim: int) -> int:
    """The head dimension padded to a power of two the tables of configurations have."""
    return max(32, triton.next_power_of_2(head_dim))


def token_rows(tensor: Tensor) -> Tensor:
    """A (B, H, N, D) tensor as the kernels read it: any strides, but adjacent elements in the last axis."""
    return with_small_strides(tensor if tensor.stride(3) == 1 else tensor.contiguous())


def empty_rows(like: Tensor, num_tokens: int) -> Tensor:
    """An uninitialised (B, H, num_tokens, D) in the memory order of (B, num_tokens, H, D)."""
    batch, heads, _, head_dim = like.shape
    return torch.empty((batch, num_tokens, heads, head_dim), dtype=like.dtype, device=like.device).transpose(1, 2)


def named_strides(letter: str, tensor: Tensor | None, axes: str = "bhn") -> dict[str, int]:
    """A tensor's strides by the names that kernels give them, zeros without a tensor."""
    return {f"stride_{letter}{axis}": 0 if tensor is None else tensor.stride(i) for i, axis in enumerate(axes)}


def _has_aligned_rows(tensor: Tensor) -> bool:
    """Whether Triton can see that every row starts on 16 bytes and so reads it in pieces of that size."""
    return tensor.shape[3] % 16 == 0 and tensor.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in tensor.stride()[:3])


class Operands(NamedTuple):
    """The inputs of one attention, read by their strides: mask and bias stay broadcast, nothing is written out."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Operands:
        full = (*q.shape[:3], k.shape[2])
        return cls(
            *map(token_rows, (q, k, v)),
            None if mask is None else with_small_strides(mask.view(torch.uint8).expand(full)),
            None if bias is None else with_small_strides(bias.expand(full)),
        )

    @property
    def mask_kind(self) -> int:
        if self.mask is None:
            return NO_MASK
        return KEY_MASK if self.mask.stride(2) == 0 else FULL_MASK

    @property
    def regular(self) -> bool:
        """Whether memory is read in whole aligned rows, and no tile of a mask or bias beside it."""
        return (
            self.bias is None and self.mask_kind != FULL_MASK and all(map(_has_aligned_rows, (self.q, self.k, self.v)))
        )

    def strides(self) -> dict[str, int]:
        """The strides by the names the kernels give them."""
        tokens = {**named_strides("q", self.q), **named_strides("k", self.k), **named_strides("v", self.v)}
        return {**tokens, **named_strides("m", self.mask, "bhqk"), **named_strides("bias", self.bias, "bhqk")}
