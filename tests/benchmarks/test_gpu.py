"""The command for a GPU, run on a CPU: its jobs, and small runs from end to end."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_goals import GOALS, MEMORY_GOALS, judge
from benchmarks.gpu_models import MODELS
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
        for name, peer in gpu.library_peers(job).items():
            if name in ("sdpa", "cudnn_nchw"):  # the others need a GPU
                for got, expected in zip(parts(peer(tensors)), plain, strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        out = job.call(functional, tensors)
        for training in (False, True):
            for floor in gpu.floors(job, tensors, out, training).values():
                assert floor().numel() > 0


def run_small(tmp_path, *arguments: str) -> tuple[int, dict]:
    """The exit status and the JSON of a small run on the CPU."""
    options = ["--device", "cpu", "--small", "--rounds", "1", "--compiled", "--out", str(tmp_path)]
    status = gpu.main([*options, *arguments])
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == f"{result['date']}-gpu-cpu.json"
    return status, result


def test_a_small_run_writes_its_measurements(tmp_path, capsys):
    jobs = ("cait_s_class", "cvt13_stage1_q", "cvt13_stage3_projection")
    arguments = ["--batch", "64", "--dtype", "bfloat16", "--skip", "suite", "sanitizer", "models"]
    status, result = run_small(tmp_path, *arguments, "--jobs", *jobs)
    assert status == 0
    assert result["machine"]["versions"]["torch"] == str(torch.__version__)
    modes = [(row["job"], row["mode"]) for row in result["rows"]]
    assert modes == [(job, mode) for job in jobs for mode in ("inference", "training")]
    for row in result["rows"]:
        assert {"fused", "plain"} <= set(row["milliseconds"])
        assert "triton" in row["refused"]
        assert "fused" not in row["inaccurate"]
        assert row["bytes"] > 0
        assert row["kernels_microseconds"]
        assert row["operations"] > 0
    assert {"floor_copy", "cudnn_nchw"} <= set(result["rows"][2]["milliseconds"])
    assert result["rows"][3]["bytes"] > result["rows"][2]["bytes"]
    assert result["steps"] == []
    reached = {(goal.get("job"), goal.get("over")) for goal in result["goals"] if goal["reached"] is not None}
    assert ("cvt13_stage1_q", "floor_copy") in reached
    assert ("vit_b_padding", "sdpa") not in reached
    printed = capsys.readouterr().out
    assert "cait_s_class" in printed
    assert "not measured" in printed


def test_the_fused_and_the_plain_model_take_the_same_training_step(tmp_path):
    arguments = ["--batch", "2", "--models", "deepvit_s", "--skip", "suite", "sanitizer", "benchmarks"]
    status, result = run_small(tmp_path, *arguments)
    (step,) = result["steps"]
    assert status == 0
    assert (step["model"], step["batch"]) == ("deepvit_s", 2)
    assert step["first_loss"]["fused"] == pytest.approx(step["first_loss"]["plain"], rel=0.05)
    assert set(step["milliseconds"]) == {"fused", "plain"}
    assert step["peak_mebibytes"] == {"fused": None, "plain": None}


def test_goals_name_jobs_and_candidates_that_exist():
    jobs = {job.name: job for job in JOBS}
    for goal in GOALS:
        tensors = jobs[goal.job].tensors(1, torch.float32, "cpu", small=True)
        out = jobs[goal.job].call(functional, tensors)
        names = {*gpu.candidates(jobs[goal.job], []), *gpu.COMPILED}
        names |= set(gpu.floors(jobs[goal.job], tensors, out, goal.mode == "training"))
        assert any(name.startswith(goal.over) for name in names), goal
    assert {goal.model for goal in MEMORY_GOALS} <= set(MODELS)


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


def here(function, *arguments, timeout):
    """In the place of ``gpu.apart``: in this process, where names are patched."""
    return function(*arguments)


ROW = ["--batch", "1", "--jobs", "vit_b", "--skip", "suite", "sanitizer", "models"]


def test_an_inaccurate_result_has_no_time_and_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "apart", here)
    monkeypatch.setattr(gpu, "is_accurate", lambda *_: False)
    status, result = run_small(tmp_path, *ROW)
    assert status == 1
    for row in result["rows"]:
        assert "fused" in row["inaccurate"]
        assert "fused" not in row["milliseconds"]


class CompilationError(Exception):
    """Like Triton's: neither a RuntimeError nor a ValueError."""


def test_a_candidate_that_raises_anything_is_refused_and_the_others_are_timed(tmp_path, monkeypatch):
    def fail(t):
        raise CompilationError("at 1:2")

    monkeypatch.setattr(gpu, "apart", here)
    monkeypatch.setattr(gpu, "library_peers", lambda job: {"broken": fail})
    status, result = run_small(tmp_path, *ROW)
    assert status == 0
    for row in result["rows"]:
        assert row["refused"]["broken"] == "CompilationError: at 1:2"
        assert {"fused", "plain"} <= set(row["milliseconds"])


def crash():
    os._exit(7)


def hang():
    time.sleep(600)


@pytest.mark.parametrize(
    ("function", "arguments", "timeout", "outcome"),
    [
        (dict, ([("a", 1)],), 600, {"a": 1}),
        (int, ("x",), 600, {"failed": "ValueError: invalid literal for int() with base 10: 'x'"}),
        (crash, (), 600, {"failed": "its process ended with 7"}),
        (hang, (), 3, {"failed": "stopped after 3 s"}),
    ],
    ids=["returns", "raises", "crashes", "hangs"],
)
def test_a_step_in_a_process_of_its_own(function, arguments, timeout, outcome):
    assert gpu.apart(function, *arguments, timeout=timeout) == outcome


def test_a_row_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    def sometimes(function, *arguments, timeout):
        return (
            {"failed": "its process ended with -6"} if arguments[-1] is True else here(function, *arguments, timeout=0)
        )

    monkeypatch.setattr(gpu, "apart", sometimes)
    status, result = run_small(tmp_path, *ROW)
    assert status == 1
    assert ["failed" in row for row in result["rows"]] == [False, True]
    assert "FAILED: its process ended with -6" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_missing_sanitizer_is_reported(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitize(1.0) == {"status": None, "summary": "compute-sanitizer was not found"}


def test_a_suite_that_takes_too_long_tells_how_far_it_came(monkeypatch):
    def run(command, *, timeout, **options):
        raise gpu.subprocess.TimeoutExpired(command, timeout, output=b"one\n")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    outcome = gpu.run_suite(["tool"], 3.0)
    assert outcome["status"] is None
    assert outcome["summary"] == "stopped after 3 s"
    assert outcome["tail"] == ["one"]


def test_the_sanitizer_runs_the_extension_and_triton(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return gpu.subprocess.CompletedProcess(command, 9 if "racecheck" in command else 0, "output", "")

    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu.subprocess, "run", run)
    outcome = gpu.sanitize(1.0)
    assert outcome["status"] == 9
    assert [run["status"] for run in outcome["runs"].values()] == [0, 9, 0]
    assert all(command[0] == "/bin/compute-sanitizer" and "-k" in command for command in commands)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs the whole suite")
def test_the_suite_is_skipped_with_its_reason_without_a_gpu():
    outcome = gpu.run_suite([], 3600.0)
    assert outcome["status"] == 0, outcome
    assert "skipped" in outcome["summary"]
    assert any("torch sees no CUDA device" in line for line in outcome["tail"])


@pytest.mark.parametrize("name", ["deepvit_s", "deepvit_16b"])
def test_uniform_maps_are_told_from_right_ones_in_bfloat16(name):
    (job,) = (job for job in JOBS if job.name == name)
    tensors = job.tensors(2, torch.bfloat16, "cpu")
    plain, exact = (parts(job.call(functional, each))[0] for each in (tensors, widened(tensors)))
    uniform = parts(job.call(functional, {**tensors, "q": torch.zeros_like(tensors["q"])}))[0]
    assert is_accurate(plain, plain, exact)
    assert not is_accurate(uniform, plain, exact)
