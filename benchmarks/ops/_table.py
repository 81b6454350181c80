"""What the benchmarks of convolutions share as commands: their options, the table they print, the JSON they write."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.ops._timing import Measured
from fastvit import backends

Row = dict[str, Any]
Times = Mapping[str, Measured]
TIMES = ("ms", "backward_ms")
"""Where a row keeps milliseconds by candidate, fastvit's in front."""

NAME = 42
"""Characters of a row's name."""


class Table(NamedTuple):
    """The heads of the columns of times and of ratios; by name, what measures a row, of batch, dtype and rounds."""

    columns: Sequence[str]
    ratios: Sequence[str]
    rows: Mapping[str, Callable[[int, torch.dtype, int], Row]]


def make_row(facts: Mapping[str, Any], batch: int, dtype: torch.dtype, accurate: bool, **times: Times) -> Row:
    """What is written of one row; ``times`` under the names of :data:`TIMES`."""
    row = {"shape": dict(facts), "batch": batch, "dtype": str(dtype).removeprefix("torch."), "accurate": accurate}
    return row | {
        key: {name: measured._asdict() for name, measured in candidates.items()} for key, candidates in times.items()
    }


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set of the C++ kernels; the CPU's best by default")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, as they are wanted from here on, and the machine they are in force on, which is printed."""
    options = parser.parse_args(argv)
    if reasons := backends.cpp_reasons():
        parser.error("; ".join(reasons))
    from fastvit import _C

    if options.isa:
        _C._set_cpu_capability(options.isa)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    machine |= {"isa": _C.cpu_info()["in_use"], "cpu": backends.describe()["devices"][0]["name"]}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    return options, machine


def fill(table: Table, options: argparse.Namespace) -> list[Row]:
    """Measure the rows that are asked for, each in every dtype and batch, and print them."""
    print("median milliseconds | the peer's time over fastvit's")
    print(f"{'':<{NAME}}" + _heads(table.columns) + " |" + _heads(table.ratios))
    rows = []
    for dtype in options.dtype:
        for batch in options.batch:
            for name, measure in table.rows.items():
                if options.only not in name:
                    continue
                torch.manual_seed(0)
                rows.append(measure(batch, getattr(torch, dtype), options.rounds))
                print(f"{f'{name}, batch {batch}, {dtype}':<{NAME}}" + _cells(rows[-1]), flush=True)
    return rows


def _heads(names: Sequence[str]) -> str:
    return "".join(f"{name[:8]:>9}" for name in names)


def _cells(row: Row) -> str:
    """The times of a row and, if its result is right, how many times fastvit's each of the others is."""
    columns, ratios = "", ""
    for times in (row[key] for key in TIMES if key in row):
        first, *peers = medians = [measured["median"] for measured in times.values()]
        columns += "".join(f"{median:9.3f}" for median in medians)
        ratios += "".join(f"{peer / first:8.2f}x" if row["accurate"] else "   wrong" for peer in peers)
    return f"{columns} |{ratios}"


def write(path: Path | None, **found: Any) -> None:
    """Write what was found where a file was asked for."""
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
