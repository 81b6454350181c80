"""What a choice of a configuration is remembered for: a few images' best is not taken for many."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton.backends.nvidia", exc_type=ImportError)

from benchmarks.gpu_model import launches
from benchmarks.jobs import JOBS, parts
from fastvit import ops

CALLS = [job for job in JOBS if job.op in ("masked_attention", "class_attention", "head_mixed_attention")]
"""Of the operators whose kernels have configurations."""


def keys_of(job, batch: int) -> list[tuple]:
    """(kernel, key) of every choice in a call of the job, forward and backward.

    In float16, or in float32 where float16 has a kernel of one configuration.
    """
    return _keys_of(job, batch, torch.float16) or _keys_of(job, batch, torch.float32)


def _keys_of(job, batch: int, dtype: torch.dtype) -> list[tuple]:
    found = []

    def choose(kernel, key, configurations, run, on_cpu=False):
        found.append((kernel, key))
        return configurations[0]

    tensors = job.tensors(batch, dtype, "cpu", small=True)
    leaves = job.leaves(tensors)
    with launches.recording(), mock.patch("fastvit.autotune.choose", choose):
        outputs = parts(job.call(ops, {**tensors, **leaves}, backend="triton"))
        torch.autograd.grad(outputs, list(leaves.values()), outputs, allow_unused=True)
    return found


@pytest.mark.parametrize("job", CALLS, ids=lambda job: job.name)
def test_every_key_tells_few_images_from_many(job):
    few, many, about_as_many = (keys_of(job, batch) for batch in (2, 64, 62))
    assert few and many
    assert not set(few) & set(many)  # class attention of many images takes another kernel, too
    assert many == about_as_many
