"""benchmarks/results/README.md lists every result with its command, and the GPU code that has not run on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = (RESULTS / "README.md").read_text(encoding="utf-8")
GPU_CODE = sorted(
    str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0]))
    for pattern in ("kernels/*.py", "csrc/*/*.cu", "csrc/*/*.cuh")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("name", GPU_CODE)
def test_all_gpu_code_is_named(name):
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("path", [path.name for path in RESULTS.glob("*.json")])
def test_every_result_has_its_command_and_machine(path):
    assert f"`{path}`" in TEXT
