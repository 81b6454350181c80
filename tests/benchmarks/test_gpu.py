"""The one command for a GPU, tried out on a CPU: its table of jobs, and one small run from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu
from benchmarks.jobs import JOBS, widened
from fastvit import ops
from fastvit.reference import functional
from tests.helpers import assert_as_accurate


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_runs_by_the_operator_and_by_its_plain_twin(job):
    tensors = job.tensors(2, torch.float32, "cpu", small=True)
    assert job.op in ops.IMPLEMENTATIONS
    with torch.no_grad():
        fused, plain, exact = (
            job.call(ops, tensors), job.call(functional, tensors), job.call(functional, widened(tensors)),
        )  # fmt: skip
    assert_as_accurate(fused, plain, exact)
    leaves = job.leaves(tensors)
    gradients = torch.autograd.grad(job.call(functional, {**tensors, **leaves}).square().sum(), list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert {"running_mean", "running_var", "mask"}.isdisjoint(leaves)


def test_one_small_run_writes_what_it_found(tmp_path, capsys):
    arguments = ["--device", "cpu", "--small", "--rounds", "1", "--batch", "2", "--dtype", "float32", "--compiled"]
    arguments += [
        "--jobs",
        "vit_b_padding",
        "deepvit_s_training",
        "--skip",
        "suite",
        "sanitizer",
        "--out",
        str(tmp_path),
    ]
    assert gpu.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == f"{result['date']}-gpu-cpu.json"
    assert [(row["job"], row["mode"]) for row in result["rows"]] == [
        (job, mode) for job in ("vit_b_padding", "deepvit_s_training") for mode in ("inference", "training")
    ]
    for row in result["rows"]:
        assert {"fused", "plain"} <= set(row["milliseconds"])
        assert "triton" in row["refused"] or row["job"] != "vit_b_padding"
        assert row["inaccurate"] == []
    assert "vit_b_padding" in capsys.readouterr().out


def test_an_inaccurate_result_gets_no_time_and_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "is_accurate", lambda *_: False)
    arguments = ["--device", "cpu", "--small", "--rounds", "1", "--batch", "1", "--compiled", "--jobs", "vit_b"]
    assert gpu.main([*arguments, "--skip", "suite", "sanitizer", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert all("fused" in row["inaccurate"] and not row["milliseconds"] for row in json.loads(path.read_text())["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_sanitizer_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitize(1.0) == {"status": None, "summary": "compute-sanitizer was not found"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run the whole suite")
def test_the_suite_is_skipped_with_its_reason_without_a_gpu():
    outcome = gpu.run_suite([], 300.0)
    assert outcome["status"] == 0, outcome
    assert "skipped" in outcome["summary"]
    assert any("torch sees no CUDA device" in line for line in outcome["tail"])
