"""Masked attention, forward.

    out[b, h] = softmax(q[b, h] k[b, h]^T * scale + bias, over the keys that mask allows) v[b, h]

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D), any strides as long as the last axis is adjacent, so the three views of
a packed qkv projection are read where they lie. mask and bias are read through the strides of their broadcast to
(B, H, Nq, Nk), never written out in full. The result is (B, H, Nq, D) in the memory order of (B, Nq, H, D): merging the
heads behind it is a view. A query that may see no key gives zeros.

Tile plan: one program makes BLOCK_M rows of the output of one head; programs that share a head are neighbours, so its K
and V come from the cache. The program holds Q [BLOCK_M, BLOCK_D] (BLOCK_D is D padded to a power of two) and

- ONE_PASS, all keys of the head fit one tile: S = Q K^T [BLOCK_M, BLOCK_N], its row maximum, P = exp(S - max),
  out = P V / sum(P). Nothing is rescaled. This is the form for the token counts of vision transformers.
- streaming otherwise: the same for tiles of BLOCK_N keys in turn, with running row maximum m, running sum l and
  accumulator acc; when a tile raises m, what was gathered so far is multiplied by exp(m_old - m_new).
  A key padding mask confines the loop to the tiles between the first and the last visible key.

Products take the input dtype (float32 as true float32, or TF32 where PyTorch's setting allows it) and accumulate in
float32; everything between them is float32. Logits are kept in units of log2 so that exp is a single exp2.

Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiling).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import (
    LARGEST_TILE,
    LOG2_E,
    load_key_mask,
    load_tile,
    product_kind,
    store_rows,
    visible_range,
    with_small_strides,
)
from torch import Tensor

NO_MASK, KEY_MASK, FULL_MASK = 0, 1, 2
"""How a mask is read: not at all, one row for all queries of a head, or a tile of (queries, keys)."""


class Config(NamedTuple):
    """How one launch is cut: tile sizes, warps, loop stages, and whether BLOCK_N holds every key of a head."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    one_pass: bool = False


def _one_pass(block_m: int, block_n: int, num_warps: int) -> Config:
    return Config(block_m, block_n, num_warps, one_pass=True)


# Per product ("half": float16 and bfloat16 on tensor cores, "tf32": float32 on tensor cores, "ieee": float32 on the
# plain units) and BLOCK_D; the one-pass tiles first, by size, then the streaming one. Every entry compiles without
# spills and within 99 kB of shared memory (sm_86 and sm_89, so sm_80 and sm_90 as well; 64 kB on gfx942) for what its
# table is for: tests/kernels holds it to that.
REGULAR: dict[tuple[str, int], tuple[Config, ...]] = {
    ("half", 32): (_one_pass(64, 64, 4), _one_pass(64, 128, 4), Config(128, 64, 4, 3)),
    ("half", 64): (_one_pass(64, 64, 4), _one_pass(64, 128, 4), _one_pass(32, 256, 8), Config(64, 64, 4, 2)),
    ("half", 128): (_one_pass(64, 64, 4), _one_pass(64, 128, 8), Config(64, 32, 4, 2)),
    ("tf32", 32): (_one_pass(64, 64, 4), _one_pass(32, 128, 4), Config(64, 64, 4, 2)),
    ("tf32", 64): (_one_pass(64, 64, 4), _one_pass(32, 128, 4), Config(64, 32, 4, 2)),
    ("tf32", 128): (_one_pass(32, 64, 4), Config(32, 32, 4, 2)),
    ("ieee", 32): (Config(64, 32, 4),),
    ("ieee", 64): (Config(32, 32, 8),),
    ("ieee", 128): (Config(16, 32, 8),),
}
"""Rows of 16 aligned elements, and at most a key padding mask."""

IRREGULAR: dict[tuple[str, int], tuple[Config, ...]] = {
    ("half", 32): (_one_pass(64, 64, 4), _one_pass(32, 128, 4), Config(64, 16, 4)),
    ("half", 64): (_one_pass(64, 64, 4), _one_pass(32, 128, 4), _one_pass(32, 256, 8), Config(32, 32, 8)),
    ("half", 128): (_one_pass(64, 64, 8), _one_pass(32, 128, 8), Config(32, 16, 4)),
    ("tf32", 32): (_one_pass(32, 64, 4), _one_pass(32, 128, 4), Config(32, 32, 4)),
    ("tf32", 64): (_one_pass(32, 64, 4), _one_pass(32, 128, 8), Config(32, 32, 8)),
    ("tf32", 128): (_one_pass(32, 64, 8), Config(32, 16, 4)),
    ("ieee", 32): (Config(32, 32, 4),),
    ("ieee", 64): (Config(16, 32, 8),),
    ("ieee", 128): (Config(16, 32, 8),),
}
"""Everything else: rows read element by element, a mask of (queries, keys), a bias. One address per element takes
registers, so tiles are smaller."""

AMD_ONE_PASS_KEYS = 128
"""Larger one-pass tiles spill on gfx942, whose matrix instructions want 16 rows per warp."""


def block_d(head_dim: int) -> int:
    """The head dimension padded to a power of two the tables have."""
    return max(32, triton.next_power_of_2(head_dim))


def choose_configs(
    product: str, head_dim: int, num_keys: int, *, regular: bool, amd: bool = False
) -> tuple[Config, ...]:
    """The configurations for a call, the one to take first: the smallest one-pass tile that holds all keys, streaming.

    Keyed by what is multiplied, the padded head dimension, the token bucket, and how regularly memory is read.
    """
    table = (REGULAR if regular else IRREGULAR)[product, block_d(head_dim)]
    largest = AMD_ONE_PASS_KEYS if amd else LARGEST_TILE
    fitting = [config for config in table if config.one_pass and num_keys <= config.block_n <= largest]
    return (*fitting[:1], *(config for config in table if not config.one_pass))


@triton.jit
def _logits(
    q_tile,
    k_tile,
    qk_scale,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits [BLOCK_M, BLOCK_N] in units of log2, -inf where a key is masked or lies behind the last one."""
    logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * qk_scale
    if HAS_BIAS:
        tile = load_tile(
            bias, first_query, first_key, num_queries, num_keys, stride_biasq, stride_biask, BLOCK_M, BLOCK_N
        )
        logits += tile.to(tl.float32) * LOG2_E
    if MASK_KIND == 0:
        visible = (first_key + tl.arange(0, BLOCK_N) < num_keys)[None, :]
    elif MASK_KIND == 1:
        visible = load_key_mask(mask, first_key, num_keys, stride_mk, BLOCK_N)[None, :]
    else:
        tile = load_tile(mask, first_query, first_key, num_queries, num_keys, stride_mq, stride_mk, BLOCK_M, BLOCK_N)
        visible = tile != 0
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _finite_maximum(row_max):
    """The row maximum, 0 for a row that has seen no key: exp2(-inf - 0) is 0 where exp2(-inf - -inf) is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


# Token counts and head counts vary from call to call and gain nothing from a kernel of their own.
@triton.jit(
    do_not_specialize=["H", "num_queries", "num_keys", "stride_mb", "stride_mh", "stride_biasb", "stride_biash"]
)
def masked_attention_kernel(
    q,
    k,
    v,
    mask,
    bias,
    out,
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
    PRECISION: tl.constexpr,
):
    """One block of BLOCK_M queries of one head."""
    qk_scale = tl.cast(scale, tl.float32) * LOG2_E  # a Python float may arrive as float64

    # Which block: neighbours in program_id share the head.
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    head = program // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    out += (b * num_queries * H + h) * D
    if MASK_KIND != 0:
        mask += b * stride_mb + h * stride_mh
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash

    first_query = (program % blocks) * BLOCK_M
    EXACT_D: tl.constexpr = BLOCK_D == D
    q_tile = load_tile(q, first_query, 0, num_queries, D, stride_qn, 1, BLOCK_M, BLOCK_D, EXACT_D)

    if ONE_PASS:
        k_tile = load_tile(k, 0, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D)
        logits = _logits(
            q_tile, k_tile, qk_scale, mask, bias, first_query, 0, num_queries, num_keys,
            stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION,
        )  # fmt: skip
        p = tl.exp2(logits - _finite_maximum(tl.max(logits, 1))[:, None])
        row_sum = tl.sum(p, 1)
        v_tile = load_tile(v, 0, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    else:
        if MASK_KIND == 1:
            first, end = visible_range(mask, num_keys, stride_mk, 1024)
            first = first // BLOCK_N * BLOCK_N
        else:
            first, end = 0, num_keys
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(first, end, BLOCK_N):
            k_tile = load_tile(k, start, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D)
            logits = _logits(
                q_tile, k_tile, qk_scale, mask, bias, first_query, start, num_queries, num_keys,
                stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            finite_max = _finite_maximum(new_max)
            p = tl.exp2(logits - finite_max[:, None])
            rescale = tl.exp2(row_max - finite_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v_tile = load_tile(v, start, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
            row_max = new_max

    # A row that has seen no key has sum 0 and accumulator 0.
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    store_rows(out, acc, first_query, num_queries, H * D, D, BLOCK_M, BLOCK_D)


def _has_aligned_rows(tensor: Tensor) -> bool:
    """Whether Triton can see that every row starts on 16 bytes and so reads it in pieces of that size."""
    return tensor.shape[3] % 16 == 0 and tensor.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in tensor.stride()[:3])


def masked_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    config: Config | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        q: (B, H, Nq, D), k, v: (B, H, Nk, D); float32, float16 or bfloat16, all the same, D up to 128. Any strides:
            copied only where the last axis is not adjacent.
        mask: bool, True = attend, broadcastable to (B, H, Nq, Nk). bias: floating, likewise.
        scale: multiplies q k^T.
        config: in place of the first of :func:`choose_configs`.

    Returns:
        (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D).
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    out = torch.empty((batch, num_queries, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    if num_keys == 0:
        return out.zero_()
    q, k, v = (with_small_strides(t if t.stride(3) == 1 else t.contiguous()) for t in (q, k, v))
    full = (batch, heads, num_queries, num_keys)
    mask = None if mask is None else with_small_strides(mask.view(torch.uint8).expand(full))
    bias = None if bias is None else with_small_strides(bias.expand(full))
    mask_kind = NO_MASK if mask is None else KEY_MASK if mask.stride(2) == 0 else FULL_MASK
    product = product_kind(q.dtype)
    if config is None:
        regular = mask_kind != FULL_MASK and bias is None and all(map(_has_aligned_rows, (q, k, v)))
        amd = torch.version.hip is not None
        config = choose_configs(product, head_dim, num_keys, regular=regular, amd=amd)[0]
    no_strides = (0, 0, 0, 0)
    with torch.cuda.device_of(q):
        masked_attention_kernel[(triton.cdiv(num_queries, config.block_m) * batch * heads,)](
            q,
            k,
            v,
            mask,
            bias,
            out,
            float(scale),  # an int would be made a constant, 1 among others
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *(mask.stride() if mask is not None else no_strides),
            *(bias.stride() if bias is not None else no_strides),
            heads,
            num_queries,
            num_keys,
            D=head_dim,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d(head_dim),
            ONE_PASS=config.one_pass,
            MASK_KIND=mask_kind,
            HAS_BIAS=bias is not None,
            PRECISION="tf32" if product == "tf32" else "ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
