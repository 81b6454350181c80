"""What every test runs under: a known number of threads, a known seed, and peer libraries that can be imported."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

os.environ.setdefault("FASTVIT_AUTOTUNE", "0")  # what runs must not depend on a timer

import torch

from tests.helpers import cores

SEED = 2010_11929


def declare_torchvision_nms() -> None:
    """Let torchvision be imported where its binary was built for another torch than the one installed.

    timm, transformers and torchvision's models only need torchvision's Python code, which fails at import when its
    binary has not declared ``torchvision::nms``. No test calls that operator, so declaring it is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported


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
