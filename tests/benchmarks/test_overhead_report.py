"""The table of call overheads."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.overhead.report import read, table


def saved(path: Path, **seconds: float) -> Path:
    """A file of pytest-benchmark's with the fastest rounds of an inference call of ``linear``."""
    benchmarks = [
        {"extra_info": {"op": "linear", "mode": "inference", "way": way}, "stats": {"min": fastest}}
        for way, fastest in seconds.items()
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


def test_overhead_is_what_the_default_call_takes_longer_than_its_kernels(tmp_path: Path):
    times = read(saved(tmp_path / "one.json", default=5e-6, kernels=3e-6))
    assert round(times["inference", "linear", "overhead"], 6) == 2.0


def test_figures_of_several_files_stand_side_by_side(tmp_path: Path):
    files = [saved(tmp_path / f"{i}.json", default=i * 1e-6, named=8e-6) for i in (3, 4)]
    heading, row, *rest = table([read(file) for file in files]).splitlines()
    assert heading.split()[:4] == ["inference,", "us", "default", "named"]
    assert row.split() == ["linear", "3.0/4.0", "8.0/8.0", *["nan/nan"] * 5]
    assert rest == [f"{'training, us':<26}" + heading[26:]]
