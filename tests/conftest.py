"""What every test runs under: a known number of threads, a known seed, and peer libraries that can be imported."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

os.environ.setdefault("FASTVIT_AUTOTUNE", "0")  # what runs must not depend on a timer
os.environ.setdefault("FASTVIT_UNPROVEN", "1")  # these tests are what proves kernels

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


LONGEST = ("test_build.py", "test_sanitizers.py", "test_head_mixed_attention_kernel.py")
"""Files of few tests that compile or interpret for minutes."""


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws as it is imported depends on no module in front of it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a process of several runs files whole, and one begun last leaves the others without work."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -tests[item.path]))


declare_torchvision_nms()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch before each test, so that a test gives the same numbers alone and in a full run."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def gradient_mode_stays() -> Iterator[None]:
    """A test that left it off would change what those after it on the same worker try."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on, "the test left gradients switched off"


@pytest.fixture
def kernels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is measured our own products are taken, as on CPUs with vectors, on others too."""
    for name in ("linear", "conv_batch_norm"):
        module = sys.modules[f"fastvit.ops.{name}"]
        monkeypatch.setattr(module, "HAS_VECTORS", True)
        monkeypatch.setattr(module, "_FASTER", {})
