"""A table as text (coloured in a terminal) or HTML, for reports."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = {"patched": "green", "plain": "yellow", "skipped": "yellow", "unsupported": "red", "unrecognised": "red"}
_WIDTH_OF_A_FILE = 400  # wide enough for a row of a report, so that grep finds whole lines


SHORT = 60
"""Letters of a cell that may be repeated."""


def fold(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows that begin with a module's name, equal ones of a numbered run as one: "blocks.0 to 23 .attn".

    A long last cell (reasons) is spelled out once; further rows refer to the first.
    """
    runs: dict[tuple[str, ...], list[_Run]] = {}
    order: list[_Run] = []
    for name, *cells in rows:
        run = _Run.of(name, cells)
        alike = runs.setdefault((run.before, run.after, *cells), [])
        following = next((each for each in alike if each.last is not None and each.last + 1 == run.first), None)
        if following is not None:
            following.last = run.first
        else:
            alike.append(run)
            order.append(run)
    told: dict[str, _Run] = {}
    for run in order:
        reasons = run.cells[-1] if run.cells else ""
        if len(reasons) > SHORT and told.setdefault(reasons, run) is not run:
            run.cells[-1] = f"as {told[reasons]}"
    return [[str(run), *run.cells] for run in order]


@dataclass
class _Run:
    """Names that differ in their last number, if they have one, and the cells of all their rows."""

    before: str
    first: int | None
    last: int | None
    after: str
    cells: list[str]

    @classmethod
    def of(cls, name: str, cells: list[str]) -> _Run:
        parts = name.split(".")
        place = max((place for place, part in enumerate(parts) if part.isdecimal()), default=None)
        if place is None:
            return cls(name, None, None, "", cells)
        before = "".join(f"{part}." for part in parts[:place])
        after = "".join(f".{part}" for part in parts[place + 1 :])
        return cls(before, int(parts[place]), int(parts[place]), after, cells)

    def __str__(self) -> str:
        if self.first == self.last:
            return f"{self.before}{'' if self.first is None else self.first}{self.after}"
        return f"{self.before}{self.first} to {self.last} {self.after}".rstrip()


def render(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], foot: str, width: int = _WIDTH_OF_A_FILE
) -> str:
    """Text; fitted and coloured where standard output is a terminal, plain and at most so wide elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if terminal else box.ASCII2)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=None if terminal else width)
    console.print(table)
    console.print(Text(foot))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def render_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], foot: str) -> str:
    """An HTML table for notebooks."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><p>{html.escape(foot)}</p>"
    )
