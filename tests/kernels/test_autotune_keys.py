"""What a choice of a configuration is remembered for: a few images' best is not taken for many."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton.backends.nvidia", exc_type=ImportError)

from benchmarks.gpu_model import launches
from benchmarks.jobs import JOBS, parts
from fastvit import ops

TRAINED = ("masked_attention", "class_attention", "head_mixed_attention")
"""Operators whose backward pass has configurations; the others with any are kernels at inference alone."""

CALLS = [
    job for job in JOBS if job.op in TRAINED or (job.op != "token_depthwise_conv" and not job.name.endswith("training"))
]


def keys_of(job, batch: int) -> list[tuple]:
    """(kernel, key) of every choice in a call of the job, forward and backward."""
    found = []

    def choose(kernel, key, configurations, run, on_cpu=False):
        found.append((kernel, key))
        return configurations[0]

    tensors = job.tensors(batch, torch.float16, "cpu", small=True)
    leaves = job.leaves(tensors) if job.op in TRAINED else {}
    with launches.recording(), mock.patch("fastvit.autotune.choose", choose), torch.set_grad_enabled(bool(leaves)):
        outputs = parts(job.call(ops, {**tensors, **leaves}, backend="triton"))
        if leaves:
            torch.autograd.grad(outputs, list(leaves.values()), outputs, allow_unused=True)
    return found


@pytest.mark.parametrize("job", CALLS, ids=lambda job: job.name)
def test_every_key_tells_few_images_from_many(job):
    few, many, about_as_many = (keys_of(job, batch) for batch in (2, 64, 62))
    assert few
    assert [kernel for kernel, _ in few] == [kernel for kernel, _ in many]
    for (kernel, key), (_, other) in zip(few, many, strict=True):
        assert key != other, kernel
    assert many == about_as_many
