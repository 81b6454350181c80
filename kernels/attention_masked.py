"""Masked attention, forward. The backward is in ``attention_masked_backward.py``.

    out[b, h] = softmax(q[b, h] k[b, h]^T * scale + bias, over the keys that mask allows) v[b, h]

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D), any strides with stride 1 in the last axis, so the three views of a
packed qkv projection are read in place. mask and bias are read through the strides of their broadcast to
(B, H, Nq, Nk), which is never materialised. The result is (B, H, Nq, D) with the strides of a contiguous
(B, Nq, H, D), so that merging the heads is a view. A query without visible keys gives zeros.

Tiling: one program computes BLOCK_M rows of the output of one head. Programs of the same head are adjacent, so its K
and V come from the cache. The program keeps Q [BLOCK_M, BLOCK_D] (BLOCK_D is D padded to a power of two), and

- ONE_PASS, where all keys of the head fit one tile: S = Q K^T [BLOCK_M, BLOCK_N], its row maximum, P = exp(S - max),
  out = P V / sum(P). Nothing is rescaled. Vision transformers usually have so few tokens.
- streaming otherwise: the same for one tile of BLOCK_N keys after another, with a running row maximum m, a running sum
  l and an accumulator; where a tile raises m, the sum and the accumulator are multiplied by exp(m_old - m_new).
  With a key padding mask the tiles begin at the first visible key and end at the last. Where all keys between are
  visible too, no mask is looked at again, and the loads of a tile are on their way while others are attended to;
  otherwise each tile reads its part of the mask, and values behind it are replaced by zeros.

Matrix products take the input dtype (float32 as true float32, or TF32 where PyTorch's setting allows it) and accumulate
in float32; everything between them is float32.

Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiling).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import (
    LOG2_E,
    MAX_TILE_SIDE,
    empty_heads_last,
    finite_maximum,
    input_precision,
    inverse_of_sum,
    load_key_mask,
    load_tile,
    product_kind,
    store_rows,
    visible_range,
)
from fastvit.kernels.attention_tiles import NOT_SPECIALIZED, Operands, exponentials, logits_tile, padded_head_dim
from torch import Tensor

from fastvit import autotune


class Config(NamedTuple):
    """A launch configuration: tile sizes, warps, pipeline stages, and whether all keys of a head fit BLOCK_N.

    ``registers``: the most a thread of the forward may have, on chips from Hopper on; products need more before.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    one_pass: bool = False
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """The launch options of every kernel with this tiling."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def one_pass(block_m: int, block_n: int, num_warps: int) -> Config:
    """A configuration for at most ``block_n`` keys."""
    return Config(block_m, block_n, num_warps, one_pass=True)


HOPPER = 9
"""Its major compute capability."""

FEW_QUERIES = 16
"""Up to so many, 16-bit products take tiles of one row of the tensor cores' instructions."""

# By kind of product (see product_kind; "few": "half" of few queries) and BLOCK_D; the one-pass tiles first, by size,
# then the streaming ones. Every entry compiles without spills and within 99 kB of shared memory (the limit of sm_86 and
# sm_89; 64 kB on gfx942) for the inputs of its table: tests/kernels checks that.
REGULAR: dict[tuple[str, int], tuple[Config, ...]] = {
    ("half", 32): (one_pass(64, 64, 4), one_pass(64, 128, 4), Config(128, 64, 4, 3)),
    # With 96 registers five blocks fit a multiprocessor.
    ("half", 64): (
        *(one_pass(64, 64, 4), one_pass(64, 128, 4)),
        *(Config(64, 32, 4, 3, registers=96), Config(128, 64, 8)),
    ),
    ("half", 128): (one_pass(64, 64, 4), one_pass(64, 128, 8), Config(64, 32, 4, 2)),
    ("few", 32): (Config(16, 64, 2, 3),),
    ("few", 64): (Config(16, 64, 2, 3),),
    ("few", 128): (Config(16, 32, 2, 3),),
    ("tf32", 32): (one_pass(64, 64, 4), one_pass(32, 128, 4), Config(64, 64, 4, 2)),
    ("tf32", 64): (one_pass(64, 64, 4), one_pass(32, 128, 4), Config(64, 32, 4, 2)),
    ("tf32", 128): (one_pass(32, 64, 4), Config(32, 16, 4, 2)),
    ("ieee", 32): (Config(64, 32, 4),),
    ("ieee", 64): (Config(32, 32, 8),),
    ("ieee", 128): (Config(16, 16, 8),),
}
"""For aligned rows of whole 16-byte vectors, and at most a key padding mask."""

IRREGULAR: dict[tuple[str, int], tuple[Config, ...]] = {
    ("half", 32): (one_pass(64, 64, 4), one_pass(32, 128, 4), Config(64, 16, 4)),
    ("half", 64): (one_pass(32, 64, 4), one_pass(32, 128, 4), Config(32, 32, 8)),
    ("half", 128): (one_pass(64, 64, 8), one_pass(32, 128, 8), Config(32, 16, 4)),
    ("tf32", 32): (one_pass(32, 64, 4), one_pass(32, 128, 4), Config(32, 32, 4)),
    ("tf32", 64): (one_pass(32, 64, 4), one_pass(32, 128, 8), Config(32, 32, 8)),
    ("tf32", 128): (one_pass(32, 64, 8), Config(32, 16, 4)),
    ("ieee", 32): (Config(32, 32, 4),),
    ("ieee", 64): (Config(16, 16, 8),),
    ("ieee", 128): (Config(16, 32, 8),),
}
"""For everything else: rows loaded element by element, a mask of (queries, keys), a bias. One address per element costs
registers, so tiles are smaller."""

SMALLEST_SCALE = tl.constexpr(1e-30)
"""In the place of a scale of 0: no logit is told from 0 by it, and -inf times it is -inf."""

MASK_BLOCK = tl.constexpr(256)
"""Keys whose mask is looked at in one go."""

AMD_ONE_PASS_KEYS = 128
"""Larger one-pass tiles spill on gfx942, whose matrix instructions take 16 rows per warp."""


def choose_configs(
    product: str, head_dim: int, num_queries: int, num_keys: int, *, regular: bool, amd: bool = False
) -> tuple[Config, ...]:
    """The candidates for a call: the smallest one-pass tile that holds all keys, then the streaming one.

    Args:
        product: the kind of product.
        regular: whether :attr:`Operands.regular` is true.
        amd: whether the GPU is AMD's.
    """
    kind = "few" if regular and product == "half" and num_queries <= FEW_QUERIES else product
    table = (REGULAR if regular else IRREGULAR)[kind, padded_head_dim(head_dim)]
    largest = AMD_ONE_PASS_KEYS if amd else MAX_TILE_SIDE
    fitting = [config for config in table if config.one_pass and num_keys <= config.block_n <= largest]
    return (*fitting[:1], *(config for config in table if not config.one_pass))


@triton.jit
def attend_tile(
    row_max,
    row_sum,
    acc,
    q_tile,
    k,
    v,
    mask,
    bias,
    scale,
    unit,
    first_query,
    start,
    num_queries,
    num_keys,
    stride_kn,
    stride_vn,
    stride_mq,
    stride_mk,
    stride_biasq,
    stride_biask,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):
    """The running maximum, sum and accumulator behind one more tile of keys.

    ALL_VISIBLE: all keys in front of ``num_keys`` are.
    """
    k_tile = load_tile(k, start, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, BLOCK_D == D)
    logits = logits_tile(
        q_tile, k_tile, scale, mask, bias, first_query, start, num_queries, num_keys, stride_mq, stride_mk,
        stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION, False, ALL_VISIBLE,
    )  # fmt: skip
    if ALL_VISIBLE:  # noqa: SIM102 - it is known when compiled
        if start + BLOCK_N > num_keys:
            logits = tl.where((start + tl.arange(0, BLOCK_N) < num_keys)[None, :], logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    finite_max = finite_maximum(new_max)
    if HAS_BIAS:
        p = exponentials(logits, finite_max[:, None], True)
        rescale = exponentials(row_max, finite_max, True)
    else:
        shift = finite_max * unit
        p = tl.exp2(logits * unit - shift[:, None])
        rescale = tl.exp2(row_max * unit - shift)
    wanted = None
    if MASK_KIND == 1 and not ALL_VISIBLE:  # 0 times NaN is NaN
        wanted = load_key_mask(mask, start, num_keys, stride_mk, BLOCK_N)
    v_tile = load_tile(v, start, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, BLOCK_D == D, wanted)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return new_max, row_sum * rescale + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def masked_attention_kernel(
    q,
    k,
    v,
    mask,
    bias,
    out,
    lse,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_biasb,
    stride_biash,
    stride_biasq,
    stride_biask,
    H,
    num_queries,
    num_keys,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_PASS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of BLOCK_M queries of one head."""
    scale = tl.cast(scale, tl.float32)  # a Python float may arrive as float64

    # Adjacent programs share the head. A division takes as long as loading a tile, so there is but one.
    blocks = tl.cdiv(num_queries, BLOCK_M)
    image = tl.program_id(0) // blocks
    b, h = image.to(tl.int64), tl.program_id(1).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    out += (b * num_queries * H + h) * D
    if MASK_KIND != 0:
        mask += b * stride_mb + h * stride_mh
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash
    if WRITE_LSE:
        lse += (b * H + h) * num_queries

    first_query = (tl.program_id(0) - image * blocks) * BLOCK_M
    EXACT_D: tl.constexpr = BLOCK_D == D
    if MASK_KIND == 1 and not ONE_PASS:
        visible = load_key_mask(mask, 0, num_keys, stride_mk, MASK_BLOCK)
    q_tile = load_tile(q, first_query, 0, num_queries, D, stride_qn, 1, BLOCK_M, BLOCK_D, EXACT_D)

    first, end, solid_end = 0, num_keys, num_keys  # up to solid_end all keys are visible
    if MASK_KIND == 1 and not ONE_PASS:  # before the queries are waited for
        first, end, count = visible_range(mask, num_keys, stride_mk, MASK_BLOCK, visible)
        solid_end = tl.where(count == end - first, end, first)

    # Without a bias the maximum is taken of the products alone, and scaling, subtracting the maximum and the change to
    # base 2 are one multiply-add a logit. So the scale has to be positive.
    unit = scale
    if not HAS_BIAS:
        if NEGATIVE:
            q_tile = -q_tile
        unit = tl.maximum(tl.abs(scale), SMALLEST_SCALE) * LOG2_E
        scale = 1.0

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if ONE_PASS:
        row_max, row_sum, acc = attend_tile(
            row_max, row_sum, acc, q_tile, k, v, mask, bias, scale, unit, first_query, 0, num_queries, num_keys,
            stride_kn, stride_vn, stride_mq, stride_mk, stride_biasq, stride_biask, D, BLOCK_M, BLOCK_N, BLOCK_D,
            MASK_KIND, HAS_BIAS, PRECISION, False,
        )  # fmt: skip
    else:
        if MASK_KIND != 2:
            for start in range(first, solid_end, BLOCK_N):
                row_max, row_sum, acc = attend_tile(
                    row_max, row_sum, acc, q_tile, k, v, mask, bias, scale, unit, first_query, start, num_queries,
                    solid_end, stride_kn, stride_vn, stride_mq, stride_mk, stride_biasq, stride_biask, D, BLOCK_M,
                    BLOCK_N, BLOCK_D, MASK_KIND, HAS_BIAS, PRECISION, True,
                )  # fmt: skip
            first = tl.maximum(first, solid_end)
        if MASK_KIND != 0:
            for start in tl.range(first, end, BLOCK_N, num_stages=1 if MASK_KIND == 1 else None):
                row_max, row_sum, acc = attend_tile(
                    row_max, row_sum, acc, q_tile, k, v, mask, bias, scale, unit, first_query, start, num_queries,
                    num_keys, stride_kn, stride_vn, stride_mq, stride_mk, stride_biasq, stride_biask, D, BLOCK_M,
                    BLOCK_N, BLOCK_D, MASK_KIND, HAS_BIAS, PRECISION, False,
                )  # fmt: skip

    # A row without visible keys has sum 0 and accumulator 0.
    acc = acc * inverse_of_sum(row_sum)[:, None]
    store_rows(out, acc, first_query, num_queries, H * D, D, BLOCK_M, BLOCK_D)
    if WRITE_LSE:
        rows = first_query + tl.arange(0, BLOCK_M)
        # -inf + -inf without a key
        row_lse = row_max * (1.0 if HAS_BIAS else unit / LOG2_E) + tl.log(row_sum)
        tl.store(lse + rows, row_lse, mask=rows < num_queries)


@functools.cache
def chip(device: torch.device) -> int:
    """The major compute capability of one of NVIDIA's GPUs; 0 for any other device."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if is_nvidia else 0


def masked_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    need_lse: bool = False,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        q: (B, H, Nq, D), k, v: (B, H, Nk, D); float32, float16 or bfloat16, all the same, D up to 128. Any strides;
            copied where that of the last axis is not 1.
        mask: bool, True = attend, broadcastable to (B, H, Nq, Nk). bias: floating, likewise.
        scale: multiplies q k^T.
        config: instead of the autotuned one.

    Returns:
        out (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D); and with need_lse each row's log-sum-exp of
        the logits, (B, H, Nq) float32, -inf for a row without visible keys, else an empty (0,).
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    out = empty_heads_last(q, num_queries)
    lse = q.new_empty((batch, heads, num_queries) if need_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    operands = Operands.of(q, k, v, mask, bias)
    product = product_kind(q.dtype)

    def launch(config: Config, out: Tensor) -> None:
        masked_attention_kernel[triton.cdiv(num_queries, config.block_m) * batch, heads](
            **operands.arguments(scale),
            out=out,
            lse=lse if need_lse else None,
            ONE_PASS=config.one_pass,
            MASK_KIND=operands.mask_kind,
            HAS_BIAS=bias is not None,
            WRITE_LSE=need_lse,
            NEGATIVE=scale < 0,
            PRECISION=input_precision(product),
            **config.options(),
            **({"maxnreg": config.registers} if config.registers and chip(q.device) >= HOPPER else {}),
        )

    with torch.cuda.device_of(q):
        if config is None:
            regular = operands.regular
            sizes, amd = (head_dim, num_queries, num_keys), torch.version.hip is not None
            candidates = choose_configs(product, *sizes, regular=regular, amd=amd)
            buckets = map(autotune.token_bucket, (num_keys, batch * num_queries))
            key = (product, q.dtype, heads, head_dim, *buckets, operands.mask_kind, regular)
            config = autotune.choose(
                "masked_attention", key, candidates, lambda config: launch(config, torch.empty_like(out))
            )
        launch(config, out)
    return out, lse
