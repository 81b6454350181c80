"""docs/environment.md names every environment variable that is read, and none that is not."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS, sources

OURS, THEIRS = (DOCS / "environment.md").read_text(encoding="utf-8").split("Variables of others")
FIRST_CELL = re.compile(r"^\| (`[^|]*) \|", re.MULTILINE)


def listed(table: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", " ".join(FIRST_CELL.findall(table))))


def mentioned(*places: str) -> set[str]:
    """All names that begin as ours do, but for macros: what csrc/ defines or asks for, and the build passes to it."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources(*places, "csrc", "setup.py"))
    macros = set(re.findall(r"#\s*(?:define|ifdef|ifndef)\s+(FASTVIT_\w+)", text))
    macros |= set(re.findall(r'(?:-D|macro\(")(FASTVIT_\w+)', text))
    found = set(re.findall(r"\bFASTVIT_[A-Z0-9_]+\b", text))
    assert {"FASTVIT_INLINE", "FASTVIT_VERSION", "FASTVIT_ISA"} <= macros & found
    return found - macros


def test_every_variable_of_ours_is_in_the_table():
    found = mentioned("fastvit", "kernels", "benchmarks")
    assert {"FASTVIT_BACKEND", "FASTVIT_SANITIZE"} <= found
    assert found <= listed(OURS)


def test_every_variable_in_the_table_is_in_the_code():
    for_tests = {name for name in listed(OURS) if name.startswith("FASTVIT_TEST_")}
    assert listed(OURS) - for_tests <= mentioned("fastvit", "kernels", "benchmarks")
    tests = [path for path in sources("tests") if path.parent.name != "docs"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in tests)
    assert {name for name in for_tests if f'"{name}"' in text} == for_tests


def test_variables_of_others_that_are_read_are_named():
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources("fastvit", "setup.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\[)["']([A-Z_]+)["']""", text))
    assert {"TRITON_INTERPRET", "MAX_JOBS"} <= read
    assert {name for name in read if not name.startswith("FASTVIT_")} <= listed(THEIRS)
    assert all(name in text for name in listed(THEIRS))
