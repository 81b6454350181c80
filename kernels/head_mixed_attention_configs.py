"""Launch configurations of head-mixed attention, by register pressure.

A program that holds all heads has few registers to spare, so tiles are small. As the pressure grows, configurations
give up in turn: columns of the result per program (each block of columns recomputes the maps); loop-invariant operands
in registers (q and the mixing matrices are reloaded in each iteration); half of a tensor core instruction's rows (tiles
of 8 queries or keys); at last the tensor cores, as true float32 products take tiles of any size.

``tests/kernels/test_head_mixed_attention_compiled.py`` compiles every entry for the calls it is listed for.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

AMD_SHARED = 64 * 1024
LARGE_SHARED = 227 * 1024
"""Shared memory of sm_90 and later."""

SMALLEST_SHARED = 99 * 1024
"""Shared memory of sm_86 and sm_89, the least of the supported NVIDIA GPUs; sm_80 has 163 kB, sm_90 has 227."""

LIGHT, NORMED, HEAVY = 0, 1, 2
"""Register pressure of a call: mixes and at most a key padding mask; a LayerNorm too, but no pre-mix; anything else."""

ONE_HEAD, FEW_HEADS, MANY_HEADS = 1, 16, 32
"""The numbers of slots per program that tables are keyed by."""


class Config(NamedTuple):
    """A launch configuration; fields are those of :class:`fastvit.kernels.head_mixed_attention_maps.Plan`."""

    block_m: int
    block_n: int
    block_out: int
    num_warps: int = 8
    num_stages: int = 1
    resident: bool = True
    exact: bool = False
    block_rest: int = 0
    """Columns that a program of query_gradients or key_gradients takes beyond block_out, where these are the last."""


def _resident(
    block_m: int, block_n: int, block_out: int = 16, num_warps: int = 8, num_stages: int = 1, block_rest: int = 0
) -> Config:
    return Config(block_m, block_n, block_out, num_warps, num_stages, block_rest=block_rest)


def _reloading(block_m: int, block_n: int, block_out: int = 16, num_warps: int = 8) -> Config:
    return Config(block_m, block_n, block_out, num_warps, resident=False)


def _exact(block_m: int, block_n: int) -> Config:
    return Config(block_m, block_n, 16, resident=False, exact=True)


ByPressure = tuple[Config, Config, Config]
"""The configurations for LIGHT, NORMED and HEAVY."""

# Half precision, head dimensions up to 64, 16 slots: the published models.
COMMON: dict[str, ByPressure] = {
    "head_mixed_attention": (_resident(16, 16, 64), _resident(16, 16, 64), _resident(16, 16, 32)),
    "row_gradients": (_resident(16, 16), _resident(16, 8), _resident(16, 8)),
    "query_gradients": (_resident(16, 16, 32, block_rest=16), _resident(16, 16, 32), _reloading(4, 16)),
    "key_gradients": (_resident(16, 16, 32, block_rest=16), _resident(16, 16), _reloading(16, 8)),
    "value_gradients": (_resident(16, 16, 64), _resident(16, 16, 64), _resident(16, 16, 32)),
    "head_map_moments": (_resident(16, 32), _resident(16, 32), _resident(16, 32)),
    "row_statistics": (_resident(16, 32), _resident(16, 32), _resident(16, 32)),
}

# Everything else on NVIDIA GPUs, by kind of product and slots; for head dimensions up to 128.
GENERAL: dict[tuple[str, int], dict[str, ByPressure]] = {
    ("half", FEW_HEADS): {
        "head_mixed_attention": (_reloading(16, 16, 32), _reloading(16, 16, 32), _reloading(8, 16, 32)),
        "row_gradients": (_reloading(8, 16), _exact(4, 16), _exact(4, 16)),
        "query_gradients": (_reloading(8, 16), _reloading(8, 16), _exact(4, 16)),
        "key_gradients": (_reloading(16, 8, 32), _reloading(16, 8), _reloading(16, 4)),
        "value_gradients": (_reloading(16, 16, 32), _reloading(16, 16, 32), _reloading(16, 8, 32)),
        "head_map_moments": (_reloading(16, 16), _reloading(16, 16), _reloading(8, 16)),
        "row_statistics": (_reloading(16, 16), _reloading(16, 16), _reloading(8, 16)),
    },
    ("ieee", FEW_HEADS): {
        "head_mixed_attention": (_reloading(8, 16, 32), _reloading(16, 16, 32), _reloading(8, 16, 32)),
        "row_gradients": (_reloading(4, 16), _reloading(8, 16), _reloading(4, 16)),
        "query_gradients": (_reloading(4, 16), _reloading(8, 16, 32), _reloading(4, 16)),
        "key_gradients": (_reloading(16, 8, 32), _reloading(16, 8, 32), _reloading(16, 8, 32)),
        "value_gradients": (_reloading(16, 16, 32), _reloading(16, 16, 32), _reloading(16, 8, 32)),
        "head_map_moments": (_reloading(16, 16), _reloading(16, 16), _reloading(8, 16)),
        "row_statistics": (_reloading(16, 16), _reloading(16, 16), _reloading(8, 16)),
    },
    ("half", MANY_HEADS): {
        "head_mixed_attention": (_reloading(8, 16, 32), _reloading(8, 16), _reloading(8, 16)),
        "row_gradients": (_reloading(4, 16), _exact(2, 16), _exact(2, 16)),
        "query_gradients": (_reloading(2, 16, 8), _exact(2, 16), _exact(2, 16)),
        "key_gradients": (_reloading(16, 4, 8), _reloading(16, 2), _exact(16, 2)),
        "value_gradients": (_reloading(16, 8, 32), _reloading(16, 8, 32), _reloading(16, 8)),
        "head_map_moments": (_reloading(8, 16), _reloading(8, 16), _reloading(8, 16)),
        "row_statistics": (_reloading(8, 16), _reloading(8, 16), _reloading(8, 16)),
    },
    ("ieee", MANY_HEADS): {
        "head_mixed_attention": (_reloading(2, 16), _reloading(8, 16), _reloading(2, 16)),
        "row_gradients": (_reloading(1, 16), _reloading(2, 16), _reloading(2, 16)),
        "query_gradients": (_reloading(1, 16, 8), _reloading(2, 16), _reloading(1, 16)),
        "key_gradients": (_reloading(16, 1, 8), _reloading(16, 2), _reloading(16, 2)),
        "value_gradients": (_reloading(16, 4), _reloading(16, 8), _reloading(16, 2)),
        "head_map_moments": (_reloading(8, 16), _reloading(8, 16), _reloading(8, 16)),
        "row_statistics": (_reloading(4, 16), _reloading(8, 16), _reloading(8, 16)),
    },
}

# AMD GPUs, with 64 kB of shared memory: often programs of 256 threads, which have up to 512 registers each, where 512
# threads would spill. For head dimensions up to 128.
AMD: dict[tuple[str, int], dict[str, ByPressure]] = {
    ("half", FEW_HEADS): {
        "head_mixed_attention": (_resident(16, 16, 64), _resident(16, 16, 64, 4), _reloading(4, 16, 64, 4)),
        "row_gradients": (_resident(16, 16), _reloading(16, 16, 16, 4), _reloading(4, 16, 16, 4)),
        "query_gradients": (_reloading(16, 16, 64, 4), _reloading(16, 16, 32, 4), _reloading(2, 16, 64, 4)),
        "key_gradients": (_reloading(16, 16, 64, 4), _reloading(16, 16, 64, 4), _reloading(16, 4, 32, 4)),
        "value_gradients": (_resident(16, 16, 64), _resident(16, 16, 64, 4), _reloading(16, 16, 32, 4)),
        "head_map_moments": (_resident(16, 16), _resident(16, 16), _resident(16, 16)),
        "row_statistics": (_resident(16, 16), _resident(16, 16), _resident(16, 16)),
    },
    ("ieee", FEW_HEADS): {
        "head_mixed_attention": (_reloading(16, 16, 64), _reloading(16, 16, 64, 4), _reloading(4, 16, 64, 4)),
        "row_gradients": (_reloading(16, 16), _reloading(8, 16, 16, 4), _reloading(4, 16, 16, 4)),
        "query_gradients": (_reloading(16, 16, 64, 4), _reloading(4, 16, 64, 4), _reloading(2, 16, 64, 4)),
        "key_gradients": (_reloading(16, 16, 64, 4), _reloading(16, 16, 64, 4), _reloading(16, 2, 64, 4)),
        "value_gradients": (_resident(16, 16, 64, 4), _resident(16, 16, 64, 4), _reloading(16, 8, 64, 4)),
        "head_map_moments": (_resident(16, 16), _resident(16, 16), _resident(16, 16)),
        "row_statistics": (_resident(16, 16), _resident(16, 16), _resident(16, 16)),
    },
    ("half", MANY_HEADS): {
        "head_mixed_attention": (_reloading(16, 16, 16, 4), _reloading(8, 16, 32, 4), _reloading(4, 16, 32, 4)),
        "row_gradients": (_reloading(16, 16), _reloading(4, 16, 16, 4), _reloading(2, 16, 16, 4)),
        "query_gradients": (_reloading(4, 16, 32, 4), _reloading(4, 16, 32, 4), _reloading(2, 16, 32, 4)),
        "key_gradients": (_reloading(16, 8, 32, 4), _reloading(16, 4, 32, 4), _reloading(16, 2, 32, 4)),
        "value_gradients": (_reloading(16, 16, 16, 4), _reloading(16, 8, 32, 4), _reloading(16, 8, 16, 4)),
        "head_map_moments": (_reloading(16, 16, 16, 4), _reloading(16, 16, 16, 4), _reloading(16, 16, 16, 4)),
        "row_statistics": (_resident(16, 16), _resident(16, 16), _resident(16, 16)),
    },
    ("ieee", MANY_HEADS): {
        "head_mixed_attention": (_reloading(8, 16, 32, 4), _reloading(8, 16, 32, 4), _reloading(4, 16, 32, 4)),
        "row_gradients": (_reloading(16, 16, 16, 4), _reloading(4, 16, 16, 4), _reloading(2, 16, 16, 4)),
        "query_gradients": (_reloading(4, 16, 32, 4), _reloading(4, 16, 32, 4), _reloading(2, 16, 32, 4)),
        "key_gradients": (_reloading(16, 4, 32, 4), _reloading(16, 4, 32, 4), _reloading(16, 2, 32, 4)),
        "value_gradients": (_reloading(16, 8, 32, 4), _reloading(16, 8, 32, 4), _reloading(16, 8, 16, 4)),
        "head_map_moments": (_reloading(8, 16, 16, 4), _reloading(8, 16, 16, 4), _reloading(8, 16, 16, 4)),
        "row_statistics": (_resident(16, 16, 16, 4), _resident(16, 16, 16, 4), _reloading(16, 16)),
    },
}

# Row statistics of single heads, without a pre-mix. One warp on tensor cores: Triton has all warps compute the same of
# a product with a batch of 1.
SINGLE_HEAD = {
    "half": _resident(32, 32, 16, 1, 2),
    "tf32": _reloading(32, 32, 16, 1),
    "ieee": _reloading(32, 32, 16, 4),
}


def pressure_of(*, pre_mix: bool, layer_norm: bool, full_mask: bool) -> int:
    """The register pressure of a call."""
    if full_mask or (pre_mix and layer_norm):
        return HEAVY
    return NORMED if layer_norm else LIGHT


def configurations(
    kernel: str, heads: int, head_dim: int, product: str, pressure: int, shared_limit: int
) -> tuple[Config, ...]:
    """The candidates for a launch; the first is valid everywhere.

    Args:
        kernel: "head_mixed_attention", "row_gradients", "query_gradients", "key_gradients", "value_gradients",
            "head_map_moments" or "row_statistics".
        heads: heads per program; 1 for the row statistics of single heads.
        product: "half", "tf32" or "ieee", see :func:`fastvit.kernels._primitives.product_kind`.
        pressure: LIGHT, NORMED or HEAVY.
        shared_limit: bytes of shared memory per program.
    """
    if heads == ONE_HEAD and kernel == "row_statistics":
        return (SINGLE_HEAD[product],)
    slots = FEW_HEADS if triton.next_power_of_2(heads) <= FEW_HEADS else MANY_HEADS
    if product == "half" and slots == FEW_HEADS and head_dim <= 64 and shared_limit >= SMALLEST_SHARED:
        common = COMMON[kernel][pressure]
        if shared_limit >= LARGE_SHARED and pressure == LIGHT:
            return common._replace(num_stages=2), common  # the next tile's loads run beside this one's products
        return (common,)
    table = AMD if shared_limit < SMALLEST_SHARED else GENERAL
    if product == "tf32":
        return (table["ieee", slots][kernel][pressure]._replace(exact=True),)
    return (table[product, slots][kernel][pressure],)
