"""How the kernels of head-mixed attention are cut, by what they have to hold at once.

Every entry compiles without spills within the shared memory it is listed for, for every mask and mix its load allows,
for 16 or 32 slots: ``tests/kernels/test_head_mixed_attention_compiled.py`` holds it to that. What was found on the way:
a program that holds all heads has few registers to give, so tiles are small; what a loop could keep (q, the mixing
matrices) is read anew where it would spill; a tile of 8 queries (or keys) leaves half a tensor core's product unused,
and is for what fits no other way.
"""

from __future__ import annotations

from typing import NamedTuple

AMD_SHARED = 64 * 1024
SMALLEST_SHARED = 99 * 1024
"""sm_86 and sm_89, the smallest of the NVIDIA chips meant; sm_80 has 163 kB, sm_90 227."""

LIGHT, NORMED, HEAVY = 0, 1, 2
"""What a kernel carries: mixes and at most a key padding mask; a LayerNorm too, no mix before it; anything."""


class Config(NamedTuple):
    """How one launch is cut; the names are those of :class:`fastvit.kernels._head_maps.Plan`."""

    block_m: int
    block_n: int
    depth: int
    block_out: int
    num_warps: int
    num_stages: int = 1
    resident: bool = True


def load_of(*, pre_mix: bool, layer_norm: bool, full_mask: bool) -> int:
    """Which of the three loads a call is."""
    if full_mask or (pre_mix and layer_norm):
        return HEAVY
    return NORMED if layer_norm else LIGHT


def configurations(
    kernel: str, heads: int, head_dim: int, product: str, load: int, shared_limit: int
) -> tuple[Config, ...]:
    if kernel == "row_statistics" and heads == 1:
        return (Config(32, 32, 16, 16, 4),)
    if kernel == "key_gradients":
        return (Config(16, 8, 16, 16, 8, resident=False),)
    return (Config(8, 16, 16, 16, 8, resident=False),)
