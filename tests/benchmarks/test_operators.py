"""The benchmarks of single operators: a small run of each command, and that it judges results."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.ops import _composed, attention, conv_batch_norm, head_mixed_attention, linear
from fastvit import backends

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

SMALL = {
    attention: attention.Shape("small", 2, 9, 11, 16),
    head_mixed_attention: head_mixed_attention.Shape("small", 2, 9, 16, "batch"),
    linear: linear.Shape("small", 9, 16, 16, 32),
}


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("accurate", [True, False], ids=["accurate", "inaccurate"])
def test_a_row_has_a_time_if_it_is_accurate(module: ModuleType, accurate: bool, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SHAPES", (SMALL[module],))
    if not accurate:
        monkeypatch.setattr(module, "is_accurate", lambda *_: False)
    path = tmp_path / "rows.json"
    module.main(["--dtype", "float32", "--batch", "1", "--rounds", "1", "--threads", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        assert row.get("accurate", not row.get("inaccurate")) is accurate
        assert line.startswith("small")
        assert ("WRONG" in line) is not accurate


@pytest.mark.parametrize("accurate", [True, False], ids=["accurate", "inaccurate"])
def test_stems_are_compared_with_the_librarys_convolutions(accurate: bool, monkeypatch, capsys):
    if not accurate:
        monkeypatch.setattr(_composed, "is_accurate", lambda *_: False)
    options = ["--only", "ceit", "--batch", "1", "--dtype", "float32", "--rounds", "1"]
    _composed.main(conv_batch_norm.__doc__, conv_batch_norm.TABLE, options)
    *_, heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["fastvit", "eager", "nchw", "channels", "|", "eager", "nchw", "channels"]
    ratios = row.partition("|")[2].split()
    assert len(ratios) == 3
    assert ("wrong" in ratios) is not accurate
