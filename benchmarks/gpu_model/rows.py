"""The calls that are predicted, each with what it is compared with: in microseconds, on an H200, bfloat16, batch 64."""

from __future__ import annotations

from typing import NamedTuple

BATCH = 64


class Row(NamedTuple):
    """A call of a job of ``benchmarks.jobs``.

    Attributes:
        keys: the mean number of visible keys, where that is data: a loop over tiles of keys goes that far.
        floor: what no implementation can do without. peer: an estimate of the fastest library's path. goal: the
            prediction is to be at most this.
    """

    name: str
    job: str
    floor: float
    peer: str
    goal: float
    training: bool = False
    backend: str = "triton"
    keys: int = 0


ROWS = (
    Row("deepvit_s", "deepvit_s", 25, "280-400", 90),
    Row("deepvit_s_step", "deepvit_s_training", 120, "1000-1300", 500, training=True),
    Row("cait_s24", "cait_s24", 20, "220-280", 70),
    Row("cait_s24_step", "cait_s24", 100, "900", 400, training=True),
    Row("vit_b_padding", "vit_b_padding", 19, "30-40 (cuDNN)", 32, keys=148),
    Row("vit_s", "vit_s", 10, "15-18 (cuDNN)", 15),
    Row("cait_s_class", "cait_s_class", 5, "8-12 (SDPA)", 7),
    Row("ceit_s_leff", "ceit_s_leff", 50, "200-280", 110),
    Row("ceit_s_leff_cuda", "ceit_s_leff", 50, "200-280", 110, backend="cuda"),
    Row("cpvt_s_peg", "cpvt_s_peg", 5, "30-40", 6.5),
    Row("cpvt_s_peg_cuda", "cpvt_s_peg", 5, "30-40", 6.5, backend="cuda"),
    Row("cvt13_stage1_projection", "cvt13_stage1_projection", 16, "55-70 (composition)", 45),
    Row("cvt13_stage1_projection_cuda", "cvt13_stage1_projection", 16, "55-70 (composition)", 45, backend="cuda"),
    Row("cvt13_stage3_projection", "cvt13_stage3_projection", 12, "40 (composition)", 30),
    Row("cvt13_stage3_projection_cuda", "cvt13_stage3_projection", 12, "40 (composition)", 30, backend="cuda"),
)
"""Floors and peers are estimates until a GPU has measured them."""
