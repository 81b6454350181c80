"""What every test runs under: a known number of threads, a known seed, and peer libraries that can be imported."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("FASTVIT_AUTOTUNE", "0")  # what runs must not depend on a timer

import torch

from benchmarks.libraries import declare_torchvision_nms
from tests.helpers import cores

SEED = 2010_11929


def threads() -> int:
    """FASTVIT_TEST_THREADS, or two; one where there are no two cores: threads that wait for a core spin."""
    asked = os.environ.get("FASTVIT_TEST_THREADS")
    if asked is not None:
        if not (asked.isdecimal() and int(asked)):
            raise pytest.UsageError(f"FASTVIT_TEST_THREADS: expected a positive number of threads, got {asked!r}")
        return int(asked)
    return min(2, cores())


def pytest_configure() -> None:
    torch.set_num_threads(threads())


declare_torchvision_nms()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch before each test, so that a test gives the same numbers alone and in a full run."""
    torch.manual_seed(SEED)
    return SEED
