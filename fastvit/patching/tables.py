"""A table as text (coloured in a terminal) or HTML, for reports."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Sequence

_COLOURS = {"patched": "green", "skipped": "yellow", "unsupported": "red", "unrecognised": "red"}
_WIDTH_OF_A_FILE = 400  # wide enough for a row of a report, so that grep finds whole lines


def render(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], foot: str) -> str:
    """Text; fitted and coloured where standard output is a terminal, plain and unwrapped elsewhere."""
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
    console = Console(file=out, force_terminal=terminal, width=None if terminal else _WIDTH_OF_A_FILE)
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
