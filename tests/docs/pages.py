"""README.md and the pages of docs/, and what is fenced in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page before its first."""

    language: str
    text: str
    line: int


def text_of(page: Path) -> str:
    """Its Markdown, or that of the file which the page includes."""
    text = page.read_text(encoding="utf-8")
    included = re.fullmatch(r'--8<-- "(.+)"\n', text)
    return text_of(ROOT / included[1]) if included else text


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(each[1], each[2], text.count("\n", 0, each.start(2))) for each in FENCE.finditer(text)]


def prose(page: Path) -> str:
    """The page without what is fenced or set as code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def sources(*places: str) -> Iterator[Path]:
    """Python, C++ and CUDA files of these folders, and these files."""
    for place in places:
        path = ROOT / place
        files = [path] if path.is_file() else path.rglob("*.*")
        yield from (each for each in files if each.suffix in (".py", ".cpp", ".h", ".inc", ".cu", ".cuh"))
