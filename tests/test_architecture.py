"""Where ARCHITECTURE.md says that an operator stands, each stands, and one that no model calls stands nowhere else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from fastvit import ops

ROOT = Path(__file__).parents[1]
PUBLIC = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
UNCALLED = "glu_mlp"


def places(kind: str, stem: str) -> list[str]:
    """The paths that one of the list's items names for an operator of this stem, from the repository's root."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Where to add")[2]
    (item,) = re.findall(rf"^- \*\*{kind}\*\*:(.*?)(?=^- |^#)", text, re.MULTILINE | re.DOTALL)
    found = []
    for path in re.findall(r"`([\w<>*./]+(?:/|\.py|\.md))`", item):
        path = path.replace("<stem>", stem)
        found.append(path if (ROOT / path.partition("/")[0]).exists() else f"fastvit/{path}")
    assert found
    return found


def mentions(path: Path, *names: str) -> bool:
    return re.search(rf"\b({'|'.join(names)})\b", path.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("op", PUBLIC)
def test_an_operator_is_in_every_file_that_is_named(op: str) -> None:
    stem = getattr(ops, op).__module__.rpartition(".")[2]
    # Two forms of head mixing are calls of the operator that its record has the name of.
    record = op if op in ops.OPERATORS else "head_mixed_attention"
    for path in places("an operator", stem):
        files = list(ROOT.glob(path.replace(".py", "*.py")))
        assert any(mentions(file, op, record) for file in files), f"{op} is not in {path}"


def test_an_operator_is_in_no_other_file() -> None:
    """But where libraries' modules are recognised."""
    stem = getattr(ops, UNCALLED).__module__.rpartition(".")[2]
    named = [*places("an operator", stem), *places("an implementation", stem), "fastvit/patching/", "tests/patching/"]
    named += ["fastvit/recognise/", "tests/recognise/"]
    own = Path(__file__).relative_to(ROOT).as_posix()
    for folder in ("fastvit", "csrc", "kernels", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.*"):
            path = file.relative_to(ROOT).as_posix()
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".inc") and mentions(file, UNCALLED):
                assert path == own or any(path == each or path.startswith(each.rstrip("*")) for each in named), path
