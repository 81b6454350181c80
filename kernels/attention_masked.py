"""Masked attention, forward; the backward is in ``attention_masked_backward.py``.

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
float32; everything between them is float32. The maximum is taken off before the logits are brought to the units of
exp2, the one exponential GPUs have an instruction for, so that large logits keep their differences.

Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiling).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import LARGEST_TILE, load_tile, store_rows, visible_range
from fastvit.kernels.attention_tiles import (
    NOT_SPECIALIZED,
    Operands,
    empty_rows,
    finite_maximum,
    inverse_of_sum,
    logits_tile,
    padded_head_dim,
    product_kind,
)
from torch import Tensor

from fastvit import autotune


class Config(NamedTuple):
    """How one launch is cut: tile sizes, warps, loop stages, and whether BLOCK_N holds every key of a head."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    one_pass: bool = False

    def options(self) -> dict[str, int]:
        """What every kernel that is cut so is launched with."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


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
    ("ieee", 128): (Config(16, 16, 8),),
}
"""Rows of 16 aligned elements, and at most a key padding mask."""

IRREGULAR: dict[tuple[str, int], tuple[Config, ...]] = {
    ("half", 32): (_one_pass(64, 64, 4), _one_pass(32, 128, 4), Config(64, 16, 4)),
    ("half", 64): (_one_pass(32, 64, 4), _one_pass(32, 128, 4), _one_pass(32, 256, 8), Config(32, 32, 8)),
    ("half", 128): (_one_pass(64, 64, 8), _one_pass(32, 128, 8), Config(32, 16, 4)),
    ("tf32", 32): (_one_pass(32, 64, 4), _one_pass(32, 128, 4), Config(32, 32, 4)),
    ("tf32", 64): (_one_pass(32, 64, 4), _one_pass(32, 128, 8), Config(32, 32, 8)),
    ("tf32", 128): (_one_pass(32, 64, 8), Config(32, 16, 4)),
    ("ieee", 32): (Config(32, 32, 4),),
    ("ieee", 64): (Config(16, 32, 8, 2),),
    ("ieee", 128): (Config(16, 32, 8),),
}
"""Everything else: rows read element by element, a mask of (queries, keys), a bias. One address per element takes
registers, so tiles are smaller."""

AMD_ONE_PASS_KEYS = 128
"""Larger one-pass tiles spill on gfx942, whose matrix instructions want 16 rows per warp."""


def choose_configs(
    product: str, head_dim: int, num_keys: int, *, regular: bool, amd: bool = False
) -> tuple[Config, ...]:
    """The configurations for a call, the one to take first: the smallest one-pass tile that holds all keys, streaming.

    Keyed by what is multiplied, the padded head dimension, the token bucket, and how regularly memory is read.
    """
    table = (REGULAR if regular else IRREGULAR)[product, padded_head_dim(head_dim)]
    largest = AMD_ONE_PASS_KEYS if amd else LARGEST_TILE
    fitting = [config for config in table if config.one_pass and num_keys <= config.block_n <= largest]
    return (*fitting[:1], *(config for config in table if not config.one_pass))


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
    PRECISION: tl.constexpr,
):
    """One block of BLOCK_M queries of one head."""
    scale = tl.cast(scale, tl.float32)  # a Python float may arrive as float64

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
        logits = logits_tile(
            q_tile, k_tile, scale, mask, bias, first_query, 0, num_queries, num_keys,
            stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION,
        )  # fmt: skip
        row_max = tl.max(logits, 1)
        p = tl.exp(logits - finite_maximum(row_max)[:, None])
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
            logits = logits_tile(
                q_tile, k_tile, scale, mask, bias, first_query, start, num_queries, num_keys,
                stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            finite_max = finite_maximum(new_max)
            p = tl.exp(logits - finite_max[:, None])
            rescale = tl.exp(row_max - finite_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v_tile = load_tile(v, start, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
            row_max = new_max

    # A row that has seen no key has sum 0 and accumulator 0.
    acc = acc * inverse_of_sum(row_sum)[:, None]
    store_rows(out, acc, first_query, num_queries, H * D, D, BLOCK_M, BLOCK_D)
    if WRITE_LSE:
        rows = first_query + tl.arange(0, BLOCK_M)
        row_lse = row_max + tl.log(row_sum)  # -inf + -inf without a key
        tl.store(lse + head.to(tl.int64) * num_queries + rows, row_lse, mask=rows < num_queries)


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
        q: (B, H, Nq, D), k, v: (B, H, Nk, D); float32, float16 or bfloat16, all the same, D up to 128. Any strides:
            copied only where the last axis is not adjacent.
        mask: bool, True = attend, broadcastable to (B, H, Nq, Nk). bias: floating, likewise.
        scale: multiplies q k^T.
        config: in place of what is chosen by measuring.

    Returns:
        The output, (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D); and with need_lse the natural
        logarithm of each row's sum of exponentials, (B, H, Nq) float32, -inf for a row without keys, else empty (0,).
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    out = empty_rows(q, num_queries)
    lse = q.new_empty((batch, heads, num_queries) if need_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    operands = Operands.of(q, k, v, mask, bias)
    product = product_kind(q.dtype)

    def launch(config: Config, out: Tensor) -> None:
        masked_attention_kernel[(triton.cdiv(num_queries, config.block_m) * batch * heads,)](
            **operands._asdict(),
            out=out,
            lse=lse if need_lse else None,
            scale=float(scale),  # an int would be made a constant, 1 among others
            **operands.strides(),
            H=heads,
            num_queries=num_queries,
            num_keys=num_keys,
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            ONE_PASS=config.one_pass,
            MASK_KIND=operands.mask_kind,
            HAS_BIAS=bias is not None,
            WRITE_LSE=need_lse,
            PRECISION="tf32" if product == "tf32" else "ieee",
            **config.options(),
        )

    with torch.cuda.device_of(q):
        if config is None:
            regular = operands.regular
            candidates = choose_configs(product, head_dim, num_keys, regular=regular, amd=torch.version.hip is not None)
            key = (product, q.dtype, heads, head_dim, autotune.token_bucket(num_keys), operands.mask_kind, regular)
            config = autotune.choose(
                "masked_attention", key, candidates, lambda config: launch(config, torch.empty_like(out))
            )
        launch(config, out)
    return out, lse
