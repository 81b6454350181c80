"""What the kernels of masked and class attention share: the tile of masked logits, and the operands of a launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import (
    FULL_MASK,
    KEY_MASK,
    LOG2_E,
    NO_MASK,
    has_aligned_rows,
    load_key_mask,
    load_tile,
    with_small_strides,
)
from torch import Tensor

NOT_SPECIALIZED = ["H", "num_queries", "num_keys", "stride_mb", "stride_mh", "stride_biasb", "stride_biash"]
"""Token and head counts vary from call to call, and kernels gain nothing from being specialised on them."""


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
    ALL_VISIBLE: tl.constexpr = False,
):
    """Logits [QUERIES, KEYS], -inf where a key is masked or out of bounds.

    TRANSPOSED: as [KEYS, QUERIES]. ALL_VISIBLE: it is known that no key is.
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
    if ALL_VISIBLE:
        return logits
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
def to_base_2(factor, HAS_BIAS: tl.constexpr):
    """A scale or a shift for :func:`exponentials`.

    With a bias logits are in base e: times LOG2_E the lowest number, a usual mask, would overflow.
    """
    return factor if HAS_BIAS else factor * LOG2_E


@triton.jit
def exponentials(logits, shift, HAS_BIAS: tl.constexpr):
    """exp(logits - shift), both in base 2 without a bias."""
    return tl.exp2((logits - shift) * LOG2_E if HAS_BIAS else logits - shift)


@triton.jit
def load_row_values(values, first_row, num_rows, ROWS: tl.constexpr):
    """ROWS elements of a vector with one number per row, from first_row on; zeros out of bounds."""
    places = first_row + tl.arange(0, ROWS)
    return tl.load(values + places, mask=places < num_rows, other=0.0)


@triton.jit
def store_row_values(values, tile, first_row, num_rows, ROWS: tl.constexpr):
    """The inverse of :func:`load_row_values`."""
    places = first_row + tl.arange(0, ROWS)
    tl.store(values + places, tile, mask=places < num_rows)


def padded_head_dim(head_dim: int) -> int:
    """The head dimension padded to a power of two, at least 32, as in the tables of configurations."""
    return max(32, triton.next_power_of_2(head_dim))


def token_rows(tensor: Tensor) -> Tensor:
    """A (B, H, N, D) tensor for the kernels, which take any strides but 1 for the last axis; copied where it is not."""
    return with_small_strides(tensor if tensor.stride(3) == 1 else tensor.contiguous())


def named_strides(letter: str, tensor: Tensor | None, axes: str = "bhn") -> dict[str, int]:
    """A tensor's strides by the names of the kernels' arguments; zeros for None."""
    return {f"stride_{letter}{axis}": 0 if tensor is None else tensor.stride(i) for i, axis in enumerate(axes)}


class Operands(NamedTuple):
    """The inputs of one call, read through their strides: a broadcast mask or bias is never materialised."""

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
        return KEY_MASK if self.mask.stride(2) == 0 or self.mask.shape[2] == 1 else FULL_MASK

    @property
    def regular(self) -> bool:
        """Whether q, k and v are read in aligned 16-byte vectors, and no tile of a mask or bias is read."""
        return self.bias is None and self.mask_kind != FULL_MASK and has_aligned_rows(self.q, self.k, self.v)

    def arguments(self, scale: float) -> dict[str, Any]:
        """The arguments that every kernel takes: the tensors and their strides, the sizes and the scale."""
        _, heads, num_queries, head_dim = self.q.shape
        return {
            **self._asdict(),
            **named_strides("q", self.q),
            **named_strides("k", self.k),
            **named_strides("v", self.v),
            **named_strides("m", self.mask, "bhqk"),
            **named_strides("bias", self.bias, "bhqk"),
            "scale": float(scale),  # Triton would specialise the kernel on an int 1
            "H": heads,
            "num_queries": num_queries,
            "num_keys": self.k.shape[2],
            "D": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
        }
