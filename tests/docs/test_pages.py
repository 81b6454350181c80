"""What the pages say of the code is so: messages, operators and their pictures."""

from __future__ import annotations

import ast
import functools
import inspect
import pkgutil
import re
import runpy

import pytest

import fastvit
from fastvit import ops
from tests.docs.pages import DOCS, blocks, sources

MESSAGES = [block.text.strip() for block in blocks(DOCS / "troubleshooting.md") if block.language == "text"]
HOLE = "\0"


@functools.cache
def texts() -> str:
    """Every string of the package and its build, a hole for each value that is put in, apart from each other."""
    found = []
    for path in sources("fastvit", "setup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


def is_said(message: str) -> bool:
    """Whether some string has the message's words, with a hole where the message has an ellipsis."""
    anything = f"[^\n]*{HOLE}[^\n]*"
    return re.search(anything.join(re.escape(part) for part in re.split(r"…", message)), texts()) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_in_the_code(message):
    assert is_said(message)


def test_a_message_that_nobody_says_is_found():
    assert len(MESSAGES) > 25
    assert is_said("fastvit: … of the blocks found run as they did before: …")
    assert not is_said("fastvit: … of the blocks found run as before: …")
    assert not is_said("attention … is not implemented")  # there is no hole


def test_every_operator_has_a_section_and_its_picture():
    page = (DOCS / "operators.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == sorted(ops.OPERATORS)
    assert sorted(re.findall(r"^!\[(\w+)\]\(pictures/\1\.svg\)$", page, re.MULTILINE)) == sorted(ops.OPERATORS)


def test_pictures_are_those_that_are_drawn():
    drawing = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    assert sorted(drawing["PICTURES"]) == sorted(ops.OPERATORS)
    for name, picture in drawing["PICTURES"].items():
        assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == drawing["draw"](picture), name


def test_the_api_has_every_public_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = [pkgutil.resolve_name(path) for path in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    public = [getattr(module, name) for module in (fastvit, ops) for name in module.__all__]
    public = [value for value in public if inspect.isfunction(value) or inspect.isclass(value)]
    assert [value for value in public if value not in shown] == []
