"""What is measured on a GPU, tried on a CPU: the jobs, their peers, rows, models and goals."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_peers, gpu_rows, gpu_timing
from benchmarks.gpu_goals import GOALS, MEMORY_GOALS, judge
from benchmarks.gpu_model.rows import ROWS
from benchmarks.gpu_models import MODELS, measure_inference
from benchmarks.gpu_rows import JOB
from benchmarks.jobs import JOBS, images, parts, widened
from fastvit import ops
from fastvit.accuracy import is_accurate
from fastvit.reference import functional
from tests.helpers import assert_as_accurate


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_runs_with_the_operator_and_with_its_plain_form(job):
    tensors = job.tensors(2, torch.float32, "cpu", small=True)
    assert job.op in ops.OPERATORS
    with torch.no_grad():
        fused, plain, exact = (
            parts(job.call(ops, tensors)),
            parts(job.call(functional, tensors)),
            parts(job.call(functional, widened(tensors))),
        )
        assert all(map(torch.equal, parts(job.call(functional, images(tensors, 2))), plain))
    for each in zip(fused, plain, exact, strict=True):
        assert_as_accurate(*each)
    leaves = job.leaves(tensors)
    outputs = parts(job.call(functional, {**tensors, **leaves}))
    gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert "mask" not in leaves
    assert not any("running" in name for name in leaves)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_runs_in_bfloat16_with_its_plain_form(job):
    """The command's default; batch normalisation needs all of its parameters in one dtype."""
    tensors = job.tensors(2, torch.bfloat16, "cpu", small=True)
    leaves = job.leaves(tensors)
    outputs = parts(job.call(functional, {**tensors, **leaves}))
    torch.autograd.grad(sum(out.sum() for out in outputs), list(leaves.values()))
    assert all(out.dtype == torch.bfloat16 for out in outputs)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_peers_of_every_job_compute_the_same(job):
    tensors = job.tensors(2, torch.float32, "cpu", small=True)
    with torch.no_grad():
        plain = parts(job.call(functional, tensors))
        for name, peer in gpu_peers.library_peers(job).items():
            if name in ("sdpa", "cudnn_nchw"):  # the others need a GPU
                for got, expected in zip(parts(peer(tensors)), plain, strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        out = job.call(functional, tensors)
        for training in (False, True):
            for floor in gpu_peers.floors(job, tensors, out, training).values():
                assert floor().numel() > 0


def row_of(job: str, training: bool = False, batch: int = 1, **options) -> dict:
    """A row on the CPU, of small shapes."""
    settings = {"training": training, "small": True, "rounds": 1, **options}
    return gpu_rows.measure(job, batch, torch.bfloat16, torch.device("cpu"), **settings)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("job", ["cait_s_class", "cvt13_stage1_q", "cvt13_stage3_projection"])
def test_a_row_has_every_candidate_or_why_it_has_not(job, training):
    told: list[str] = []
    row = row_of(job, training, batch=64, at=told.append)
    assert {"fused", "plain"} <= set(row["milliseconds"])
    assert "triton" in row["refused"]
    assert "fused" not in row["inaccurate"]
    assert row["bytes"] > 0 and row["operations"] > 0 and row["kernels_microseconds"]
    assert told[:-1] == [*gpu_rows.candidates(JOB[job], [])] and told[-1] == ""
    if job == "cvt13_stage1_q":
        assert {"floor_copy", "cudnn_nchw"} <= set(row["milliseconds"])
        if training:
            assert row["bytes"] > 2 * row_of(job, batch=64)["bytes"]
        goals = judge([row], [])
        reached = {goal["mode"] for goal in goals if "job" in goal and goal["reached"] is not None}
        assert reached == {"training" if training else "inference"}


@pytest.mark.parametrize("name", ["deepvit_s", "vit_small_patch16_224", "cpvt_small"])
def test_a_models_fused_and_plain_form_are_the_same_model(name):
    """Without torch.compile, of which each model takes minutes."""
    without = ("plain_compiled", "fused_compiled")
    row = measure_inference(name, 2, torch.device("cpu"), rounds=1, small=True, without=without)
    assert set(row["inference"]) == {"plain", "fused"}
    assert row["refused"] == {} and row["inaccurate"] == []


def test_goals_name_jobs_and_candidates_that_exist():
    jobs = {job.name: job for job in JOBS}
    for goal in GOALS:
        tensors = jobs[goal.job].tensors(1, torch.float32, "cpu", small=True)
        out = jobs[goal.job].call(functional, tensors)
        names = {*gpu_rows.candidates(jobs[goal.job], []), *gpu_rows.COMPILED}
        names |= set(gpu_peers.floors(jobs[goal.job], tensors, out, goal.mode == "training"))
        assert any(name.startswith(goal.over) for name in names), goal
    assert {goal.model for goal in MEMORY_GOALS} <= set(MODELS)
    predicted = {(row.job, "training" if row.training else "inference") for row in ROWS}
    assert predicted <= {(goal.job, goal.mode) for goal in GOALS}, "what is predicted is measured first"


def test_a_goal_is_met_by_its_own_measurement_alone():
    goal, memory = GOALS[0], MEMORY_GOALS[0]

    def judged(fused: float, peak: float) -> tuple[dict, dict]:
        times = {"fused": {"median": fused}, goal.over: {"median": 1.0}}
        row = {"job": goal.job, "mode": goal.mode, "batch": 64, "dtype": "bfloat16", "milliseconds": times}
        step = {"model": memory.model, "batch": 64, "peak_mebibytes": {"fused": {"peak": peak}, "plain": {"peak": 3.0}}}
        found = judge([row], [step])
        assert not any(each["met"] for each in found[1:-1])
        return found[0], found[-1]

    speed, share = judged(0.25, 1.0)
    assert (speed["reached"], speed["met"]) == (4.0, True)
    assert (share["reached"], share["met"]) == (pytest.approx(1 / 3), True)
    assert [each["met"] for each in judged(0.26, 1.1)] == [False, False]


def test_an_inaccurate_result_has_no_time(monkeypatch):
    monkeypatch.setattr(gpu_rows, "is_accurate", lambda *_: False)
    row = row_of("vit_b")
    assert "fused" in row["inaccurate"]
    assert "fused" not in row["milliseconds"] and "plain" in row["milliseconds"]


class CompilationError(Exception):
    """Like Triton's: neither a RuntimeError nor a ValueError."""


def test_a_candidate_that_raises_anything_is_refused_and_the_others_are_timed(monkeypatch):
    def fail(t):
        raise CompilationError("at 1:2\nmore")

    monkeypatch.setattr(gpu_rows, "library_peers", lambda job: {"broken": fail, "barred": fail})
    row = row_of("vit_b", without=["barred"])
    assert row["refused"]["broken"] == "CompilationError: at 1:2"
    assert "barred" not in row["refused"]
    assert {"fused", "plain"} <= set(row["milliseconds"])


def test_a_candidate_that_loses_the_gpu_ends_the_row(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_timing.refusal(ValueError("first"), torch.device("cuda"))
    assert gpu_timing.refusal(ValueError("first\nsecond"), torch.device("cpu")) == "ValueError: first"


@pytest.mark.parametrize("name", ["deepvit_s", "deepvit_16b"])
def test_uniform_maps_are_told_from_right_ones_in_bfloat16(name):
    (job,) = (job for job in JOBS if job.name == name)
    tensors = job.tensors(2, torch.bfloat16, "cpu")
    plain, exact = (parts(job.call(functional, each))[0] for each in (tensors, widened(tensors)))
    uniform = parts(job.call(functional, {**tensors, "q": torch.zeros_like(tensors["q"])}))[0]
    assert is_accurate(plain, plain, exact)
    assert not is_accurate(uniform, plain, exact)
