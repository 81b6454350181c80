"""The command line of the benchmarks of convolutions: options, the printed table, JSON."""

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
"""Keys under which a row has milliseconds by candidate, fastvit's first."""

NAME = 42
"""Width of a row's name."""


class Table(NamedTuple):
    """Headings of the columns of times and of ratios; by name, the function (batch, dtype, rounds) of each row."""

    columns: Sequence[str]
    ratios: Sequence[str]
    rows: Mapping[str, Callable[[int, torch.dtype, int], Row]]


def make_row(facts: Mapping[str, Any], batch: int, dtype: torch.dtype, accurate: bool, **times: Times) -> Row:
    """One row; ``times`` are named as in :data:`TIMES`."""
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
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the options and apply those of the whole process; also describe the machine, which is printed."""
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
    """Measure and print the selected rows, each in every dtype and batch size."""
    print("median milliseconds | the peer's time over fastvit's")
    print(f"{'':<{NAME}}" + _headings(table.columns) + " |" + _headings(table.ratios))
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


def _headings(names: Sequence[str]) -> str:
    return "".join(f"{name[:8]:>9}" for name in names)


def _cells(row: Row) -> str:
    """The times of a row and, if its result is accurate, the others as multiples of fastvit's."""
    columns, ratios = "", ""
    for times in (row[key] for key in TIMES if key in row):
        first, *peers = medians = [measured["median"] for measured in times.values()]
        columns += "".join(f"{median:9.3f}" for median in medians)
        ratios += "".join(f"{peer / first:8.2f}x" if row["accurate"] else "   wrong" for peer in peers)
    return f"{columns} |{ratios}"


def write(path: Path | None, **found: Any) -> None:
    """Write the measurements, if a file was named."""
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
