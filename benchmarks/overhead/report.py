"""The table of ``make overhead``: ``python -m benchmarks.overhead.report FILE ...``.

Microseconds of the fastest round; for several files, such as one before and one after a change, side by side. Columns:
    default     the call as models make it
    named       with ``backend="cpp"`` (``conv_batch_norm`` in training: "reference")
    requested   with FASTVIT_BACKEND set to that
    logged      with the log at DEBUG
    float16     which on a CPU falls back to the plain form
    kernels     the bare kernels of the named call, one after another
    overhead    default less kernels: Python, checks, dispatch and autograd
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MODES = ("inference", "training")
WAYS = ("default", "named", "requested", "logged", "float16", "kernels")
COLUMNS = (*WAYS, "overhead")

Times = Mapping[tuple[str, str, str], float]
"""Microseconds by mode, operator and way."""


def read(path: Path) -> Times:
    """The fastest round of every benchmark in a JSON file of pytest-benchmark."""
    times = {}
    for each in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        info = each["extra_info"]
        times[info["mode"], info["op"], info["way"]] = 1e6 * each["stats"]["min"]
    for mode, op, _ in list(times):
        default, kernels = (times.get((mode, op, way), math.nan) for way in ("default", "kernels"))
        times[mode, op, "overhead"] = default - kernels
    return times


def table(files: Sequence[Times]) -> str:
    """One row for each operator and mode; each cell has the figures of all files."""
    width = 8 * len(files) + 2
    lines = []
    for mode in MODES:
        lines.append(f"{mode + ', us':<26}" + "".join(f"{column:>{width}}" for column in COLUMNS))
        for op in dict.fromkeys(op for found, op, _ in files[0] if found == mode):
            cells = (
                "/".join(f"{times.get((mode, op, column), math.nan):.1f}" for times in files) for column in COLUMNS
            )
            lines.append(f"{op:<26}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([read(Path(path)) for path in sys.argv[1:]]))
