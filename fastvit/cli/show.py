"""Output of the commands: tables and JSON on standard output, errors on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

TITLE = "bold"


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns whose name starts with ">" are aligned to the right."""
    made = Table(title=title, title_style=TITLE, title_justify="left", header_style=TITLE)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """A value as indented JSON, alone on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def working(console: Console, arguments: argparse.Namespace, text: str) -> Status:
    """A spinner for a ``with`` block; silent with ``--json`` and without a terminal."""
    return Console(stderr=True, quiet=arguments.json or not console.is_terminal).status(escape(text))
