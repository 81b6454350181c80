"""Which Triton and CUDA kernels have passed their tests on which GPU; made by ``python -m benchmarks.proven``."""

from __future__ import annotations

PROVEN: dict[str, tuple[str, ...]] = {}
"""By "operator backend", such as "masked_attention triton", the chips, such as "sm_90"."""
