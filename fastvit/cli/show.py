"""Output of the commands: tables and JSON on standard output, errors on standard error."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text

TITLE = "bold"
NARROW = 76
"""Columns of a terminal below which the rows of a table stand one under the other."""


def make_console(**options: Any) -> Console:
    """A console; where NO_COLOR asks for that without any style, bold ones included."""
    if os.environ.get("NO_COLOR"):
        options["color_system"] = None
    return Console(**options)


class _Rows(Table):
    """A table, or on a narrow terminal a block of lines for each of its rows."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= NARROW:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.from_markup(str(self.title), style=TITLE)
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for position, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                value = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
                if value.plain:
                    label = f"{column.header}: " if column.header else ""
                    yield Text("  " if position else "") + Text(label, TITLE if position == 0 else "") + value


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns whose name starts with ">" are aligned to the right."""
    made = _Rows(title=title, title_style=TITLE, title_justify="left", header_style=TITLE)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """A value as indented JSON, alone on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def working(console: Console, arguments: argparse.Namespace, text: str) -> Status:
    """A spinner for a ``with`` block; silent with ``--json`` and without a terminal."""
    return make_console(stderr=True, quiet=arguments.json or not console.is_terminal).status(escape(text))
