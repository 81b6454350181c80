"""Attention of few queries (class tokens) over all tokens, forward and backward.

    out[b, h, i] = softmax(q[b, h, i] k[b, h]^T * scale + bias, over the keys that mask allows) v[b, h]

Shapes: q (B, H, Nq, D) with few queries, k and v (B, H, Nk, D), any strides as long as the last axis is adjacent; mask
and bias are read through the strides of their broadcast to (B, H, Nq, Nk). Results have the memory order of
(B, N, H, D). A query that may see no key gives zeros, in both directions.

With so few queries nothing is multiplied twice: reading K and V once is all the time it can take. So there are no
matrix products, and to have every multiprocessor read, even for one image, the keys of a head are split:

1. parts: a program takes one query and a run of keys, in tiles [BLOCK_N, BLOCK_D] with running maximum m, sum l and
   accumulator. Programs that share keys are neighbours, so that the second one finds them in the cache.
2. combine: a program adds the parts of one query, in order: out = sum(acc exp(m - M)) / sum(l exp(m - M)), M = max(m).

Backward, with g the gradient of out and dP = g v^T, dS = P * (dP - delta), delta = rowsum(P * dP):

1. rows: the parts of the forward without V's product, m and l, and with it the part of delta, by split.
2. tokens: a program takes one tile of keys, and for each query adds up the parts to P and delta. dk = dS^T q scale and
   dv = P^T g are then complete; dq = dS k * scale and the gradient of the logits are written by tile, and the first
   summed over tiles, the second over bias's broadcast axes, afterwards.

Every number is float32 between input and output, and every sum has one order: there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels import _tuning
from fastvit.kernels._attention import (
    Operands,
    empty_rows,
    finite_maximum,
    inverse_of_sum,
    padded_head_dim,
    token_rows,
)
from fastvit.kernels._primitives import load_key_mask, load_tile, store_rows
from torch import Tensor

LARGEST_SPLIT = 64
"""Parts a query has at most: what one program of the second step takes in."""

COMBINE_WARPS = 4


class Config(NamedTuple):
    """Keys in a tile, and the warps that share it."""

    block_n: int
    num_warps: int


CONFIGS: dict[int, tuple[Config, ...]] = {
    32: (Config(32, 4), Config(64, 4)),
    64: (Config(32, 4), Config(64, 8)),
    128: (Config(16, 4), Config(32, 8)),
}
"""The candidates by padded head dimension."""

NOT_SPECIALIZED = ["H", "num_queries", "num_keys", "keys_per_part", "parts", "stride_mb", "stride_mh"]


@triton.jit
def _load_row(row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The D adjacent elements at row as float32, zeros behind them."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(row + columns, mask=columns < D, other=0).to(tl.float32)


@triton.jit
def _logits(
    q_row,
    k_tile,
    scale,
    mask,
    bias,
    first_key,
    num_keys,
    stride_mk,
    stride_biask,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Logits [BLOCK_N] of one query, -inf where a key is masked or lies behind the last one."""
    logits = tl.sum(k_tile * q_row[None, :], 1) * scale
    keys = tl.arange(0, BLOCK_N)
    inside = first_key + keys < num_keys
    if HAS_BIAS:
        place = bias + tl.cast(first_key, tl.int64) * stride_biask
        logits += tl.load(place + keys * stride_biask, mask=inside, other=0).to(tl.float32)
    if HAS_MASK:
        inside = load_key_mask(mask, first_key, num_keys, stride_mk, BLOCK_N)
    return tl.where(inside, logits, float("-inf"))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_attention_parts_kernel(
    q,
    k,
    v,
    mask,
    bias,
    grad,
    part_max,
    part_sum,
    part_acc,
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
    stride_gb,
    stride_gh,
    stride_gn,
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
    keys_per_part,
    parts,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One part of one query: maximum and sum, and what they weigh: of v (D), or in the backward of dP (one number).

    part_max and part_sum are (B, H, Nq, parts), part_acc (B, H, Nq, parts, D), or without D in the backward.
    """
    scale = tl.cast(scale, tl.float32)  # a Python float may arrive as float64

    program = tl.program_id(0)
    query = program % num_queries
    program = program // num_queries
    part = program % parts
    head = (program // parts).to(tl.int64)
    b = head // H
    h = head % H
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    if HAS_MASK:
        mask += b * stride_mb + h * stride_mh + query.to(tl.int64) * stride_mq
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash + query.to(tl.int64) * stride_biasq
    EXACT_D: tl.constexpr = BLOCK_D == D
    q_row = _load_row(q + (b * stride_qb + h * stride_qh + query.to(tl.int64) * stride_qn), D, BLOCK_D)
    if BACKWARD:
        g_row = _load_row(grad + (b * stride_gb + h * stride_gh + query.to(tl.int64) * stride_gn), D, BLOCK_D)
        acc = tl.zeros([1], tl.float32)
    else:
        acc = tl.zeros([BLOCK_D], tl.float32)

    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    first = part * keys_per_part
    for start in range(first, tl.minimum(first + keys_per_part, num_keys), BLOCK_N):
        k_tile = load_tile(k, start, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
        logits = _logits(
            q_row, k_tile, scale, mask, bias, start, num_keys, stride_mk, stride_biask, BLOCK_N, HAS_MASK, HAS_BIAS
        )
        new_max = tl.maximum(row_max, tl.max(logits, 0))
        finite_max = finite_maximum(new_max)
        p = tl.exp(logits - finite_max)
        rescale = tl.exp(row_max - finite_max)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        v_tile = load_tile(v, start, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
        if BACKWARD:
            acc = acc * rescale + tl.sum(p * tl.sum(v_tile * g_row[None, :], 1), 0)
        else:
            acc = acc * rescale + tl.sum(p[:, None] * v_tile, 0)
        row_max = new_max

    place = (head * num_queries + query) * parts + part
    one = tl.arange(0, 1)
    tl.store(part_max + place + one, row_max)
    tl.store(part_sum + place + one, row_sum)
    if BACKWARD:
        tl.store(part_acc + place + one, acc)
    else:
        columns = tl.arange(0, BLOCK_D)
        tl.store(part_acc + place * D + columns, acc, mask=columns < D)


@triton.jit
def _weights_of_parts(part_max, part_sum, row, parts, PARTS: tl.constexpr):
    """What the parts of a row weigh, [PARTS], with the row's maximum (0 without a key) and the inverse of its sum."""
    index = tl.arange(0, PARTS)
    maxima = tl.load(part_max + row * parts + index, mask=index < parts, other=float("-inf"))
    row_max = finite_maximum(tl.max(maxima, 0))
    weights = tl.exp(maxima - row_max)
    sums = tl.load(part_sum + row * parts + index, mask=index < parts, other=0.0)
    return weights, row_max, inverse_of_sum(tl.sum(sums * weights, 0))


@triton.jit(do_not_specialize=["H", "num_queries", "parts"])
def class_attention_combine_kernel(
    part_max,
    part_sum,
    part_acc,
    out,
    H,
    num_queries,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The output of one query from its parts."""
    row = tl.program_id(0).to(tl.int64)
    query = row % num_queries
    head = row // num_queries
    weights, _, inverse = _weights_of_parts(part_max, part_sum, row, parts, PARTS)
    acc = load_tile(part_acc + row * parts * D, 0, 0, parts, D, D, 1, PARTS, BLOCK_D)
    result = tl.sum(acc * weights[:, None], 0) * inverse
    columns = tl.arange(0, BLOCK_D)
    place = ((head // H * num_queries + query) * H + head % H) * D
    tl.store(out + place + columns, result.to(out.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_attention_tokens_kernel(
    q,
    k,
    v,
    mask,
    bias,
    grad,
    part_max,
    part_sum,
    part_acc,
    dq,
    dk,
    dv,
    dlogits,
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
    stride_gb,
    stride_gh,
    stride_gn,
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
    parts,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_DLOGITS: tl.constexpr,
):
    """dk and dv of one tile of keys, and its share of dq, which is (B, H, tiles, Nq, D); dlogits is (B, H, Nq, Nk)."""
    scale = tl.cast(scale, tl.float32)

    tiles = tl.cdiv(num_keys, BLOCK_N)
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles).to(tl.int64)
    b = head // H
    h = head % H
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad += b * stride_gb + h * stride_gh
    dq += (head * tiles + tile) * num_queries * D
    dk += (b * num_keys * H + h) * D
    dv += (b * num_keys * H + h) * D
    if HAS_MASK:
        mask += b * stride_mb + h * stride_mh
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash

    first_key = tile * BLOCK_N
    EXACT_D: tl.constexpr = BLOCK_D == D
    k_tile = load_tile(k, first_key, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
    v_tile = load_tile(v, first_key, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    columns = tl.arange(0, BLOCK_D)
    keys = first_key + tl.arange(0, BLOCK_N)
    for query in range(num_queries):
        row = head * num_queries + query
        weights, row_max, inverse = _weights_of_parts(part_max, part_sum, row, parts, PARTS)
        index = tl.arange(0, PARTS)
        part_delta = tl.load(part_acc + row * parts + index, mask=index < parts, other=0.0)
        delta = tl.sum(part_delta * weights, 0) * inverse
        at = tl.cast(query, tl.int64)
        q_row = _load_row(q + at * stride_qn, D, BLOCK_D)
        g_row = _load_row(grad + at * stride_gn, D, BLOCK_D)
        mask_row = mask
        if HAS_MASK:
            mask_row = mask + at * stride_mq
        bias_row = bias
        if HAS_BIAS:
            bias_row = bias + at * stride_biasq
        logits = _logits(
            q_row, k_tile, scale, mask_row, bias_row, first_key, num_keys, stride_mk, stride_biask,
            BLOCK_N, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        p = tl.exp(logits - row_max) * inverse
        ds = p * (tl.sum(v_tile * g_row[None, :], 1) - delta)
        dv_tile += p[:, None] * g_row[None, :]
        dk_tile += ds[:, None] * q_row[None, :]
        tl.store(dq + at * D + columns, tl.sum(ds[:, None] * k_tile, 0) * scale, mask=columns < D)
        if WRITE_DLOGITS:
            tl.store(dlogits + row * num_keys + keys, ds, mask=keys < num_keys)

    store_rows(dk, dk_tile * scale, first_key, num_keys, H * D, D, BLOCK_N, BLOCK_D)
    store_rows(dv, dv_tile, first_key, num_keys, H * D, D, BLOCK_N, BLOCK_D)


def _parts(q: Tensor, num_keys: int, block_n: int) -> tuple[int, int]:
    """(parts, keys per part): as many as fill the device twice, each of whole tiles."""
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    tiles = triton.cdiv(num_keys, block_n)
    wanted = min(tiles, LARGEST_SPLIT, triton.cdiv(2 * _tuning.multiprocessors(q.device), rows))
    tiles_per_part = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_per_part), tiles_per_part * block_n


class _Launches:
    """The launches of one call; ``grad`` is None in the forward."""

    def __init__(self, operands: Operands, grad: Tensor | None, scale: float) -> None:
        q, k = operands.q, operands.k
        self.q = q
        self.num_keys = k.shape[2]
        self.backward = grad is not None
        self.arguments = {
            **operands._asdict(),
            **operands.strides(),
            **{f"stride_g{axis}": 0 if grad is None else grad.stride(place) for place, axis in enumerate("bhn")},
            "grad": grad,
            "scale": float(scale),  # an int would be made a constant, 1 among others
            "H": q.shape[1],
            "num_queries": q.shape[2],
            "num_keys": self.num_keys,
            "D": q.shape[3],
            "BLOCK_D": padded_head_dim(q.shape[3]),
            "HAS_MASK": operands.mask is not None,
            "HAS_BIAS": operands.bias is not None,
        }
        self.key = (q.dtype, *q.shape[1:], operands.mask is not None, operands.bias is not None)

    def parts(self, config: Config) -> dict[str, Tensor | int]:
        """The parts of every query."""
        q = self.q
        parts, keys_per_part = _parts(q, self.num_keys, config.block_n)
        rows = q.shape[:3]
        part_max, part_sum = torch.empty((2, *rows, parts), dtype=torch.float32, device=q.device)
        part_acc = torch.empty(
            (*rows, parts) if self.backward else (*rows, parts, q.shape[3]), dtype=torch.float32, device=q.device
        )
        found: dict[str, Tensor | int] = {
            "part_max": part_max, "part_sum": part_sum, "part_acc": part_acc, "parts": parts,
        }  # fmt: skip
        class_attention_parts_kernel[(rows.numel() * parts,)](
            **self.arguments,
            **found,
            keys_per_part=keys_per_part,
            BLOCK_N=config.block_n,
            BACKWARD=self.backward,
            num_warps=config.num_warps,
        )
        return found

    def combine(self, config: Config, out: Tensor) -> None:
        """The output of every query."""
        found = self.parts(config)
        names = ("H", "num_queries", "D", "BLOCK_D")
        class_attention_combine_kernel[(self.q.shape[:3].numel(),)](
            **found,
            **{name: self.arguments[name] for name in names},
            out=out,
            PARTS=triton.next_power_of_2(found["parts"]),
            num_warps=COMBINE_WARPS,
        )

    def tokens(self, config: Config, dk: Tensor, dv: Tensor, dlogits: Tensor | None) -> Tensor:
        """Writes dk, dv and, if it is one, dlogits; returns dq in float32."""
        q = self.q
        found = self.parts(config)
        tiles = triton.cdiv(self.num_keys, config.block_n)
        dq = torch.empty((*q.shape[:2], tiles, *q.shape[2:]), dtype=torch.float32, device=q.device)
        class_attention_tokens_kernel[(q.shape[0] * q.shape[1] * tiles,)](
            **self.arguments,
            **found,
            dq=dq,
            dk=dk,
            dv=dv,
            dlogits=dlogits,
            BLOCK_N=config.block_n,
            PARTS=triton.next_power_of_2(found["parts"]),
            WRITE_DLOGITS=dlogits is not None,
            num_warps=config.num_warps,
        )
        return dq.sum(2)

    def choose(self, name: str, run: object) -> Config:
        candidates = CONFIGS[self.arguments["BLOCK_D"]]
        return _tuning.choose(name, (*self.key, _tuning.token_bucket(self.num_keys)), candidates, run)


def class_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    config: Config | None = None,
) -> Tensor:
    """Launch the forward.

    Args:
        q: (B, H, Nq, D) with few queries, k, v: (B, H, Nk, D); float32, float16 or bfloat16, all the same, D up to 128.
            Any strides: copied only where the last axis is not adjacent.
        mask: bool, True = attend, broadcastable to (B, H, Nq, Nk). bias: floating, likewise.
        scale: multiplies q k^T.
        config: in place of what is chosen by measuring.

    Returns:
        (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D).
    """
    out = empty_rows(q, q.shape[2])
    if 0 in (*q.shape, k.shape[2]):
        return out.zero_()
    with torch.cuda.device_of(q):
        launches = _Launches(Operands.of(q, k, v, mask, bias), None, scale)
        if config is None:
            config = launches.choose("class_attention", lambda config: launches.combine(config, torch.empty_like(out)))
        launches.combine(config, out)
    return out


def class_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    bias_grad: bool = False,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; nothing of the forward but its arguments is needed.

    Args:
        grad: gradient of the output, (B, H, Nq, D) in q's dtype, any strides.
        q, k, v, mask, bias, scale: what the forward was given.
        bias_grad: whether the gradient of bias is wanted.
        config: in place of what is chosen by measuring.

    Returns:
        The gradients of q, k and v with the strides of a contiguous (B, N, H, D); that of bias in its shape and dtype,
        or an empty (0,).
    """
    wants_bias = bias_grad and bias is not None
    dq, dk, dv = empty_rows(q, q.shape[2]), empty_rows(q, k.shape[2]), empty_rows(q, k.shape[2])
    if 0 in (*q.shape, k.shape[2]):
        dbias = torch.zeros_like(bias) if wants_bias else q.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    dlogits = None
    if wants_bias:
        dlogits = torch.empty((*q.shape[:3], k.shape[2]), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        launches = _Launches(Operands.of(q, k, v, mask, bias), token_rows(grad), scale)
        if config is None:
            config = launches.choose(
                "class_attention_backward",
                lambda config: launches.tokens(
                    config,
                    torch.empty_like(dk),
                    torch.empty_like(dv),
                    None if dlogits is None else torch.empty_like(dlogits),
                ),
            )
        dq.copy_(launches.tokens(config, dk, dv, dlogits))
    if dlogits is None:
        return dq, dk, dv, q.new_empty(0)
    if bias.shape[3] == 1:  # a softmax does not change with what all its keys have in common
        return dq, dk, dv, torch.zeros_like(bias)
    return dq, dk, dv, dlogits.sum_to_size(bias.shape).to(bias.dtype)
