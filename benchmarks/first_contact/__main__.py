"""The command: which steps there are, how the time is divided, and where rows go. It imports no torch."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks import first_contact
from benchmarks.first_contact.processes import Options, Step, run_step
from benchmarks.first_contact.summary import brief, has_failed, read, summarise
from benchmarks.first_contact.tools import CACHES

MEASURED, TOOLS = "benchmarks.first_contact.measured", "benchmarks.first_contact.tools"
_FIRST = (Step("device", MEASURED, 4, 45), Step("extension", TOOLS, 8))
PARTS = {
    "one": (
        *_FIRST,
        Step("small", MEASURED, 4, 25),
        Step("parity", TOOLS, 7),
        Step("goals", MEASURED, 7, 40),
        Step("counters", TOOLS, 3, 25),
        Step("tuned", MEASURED, 4, 60),
        Step("caches", TOOLS, 1, 30),
        Step("others", MEASURED, 1, 30),
    ),
    "two": (
        *_FIRST,
        Step("compiled", MEASURED, 12, 45),
        Step("sanitizers", TOOLS, 5, 60),
        Step("memory", MEASURED, 2, 40),
        Step("models", MEASURED, 4, 45),
        Step("caches", TOOLS, 1, 30),
    ),
}
RESERVED = 8.0
"""Seconds kept for the summary."""


class Results:
    """Rows, each on the disk before the next is asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.rows, self.begin = file, list[dict[str, Any]](), time.monotonic()

    def write(self, step: str, row: dict[str, Any]) -> None:
        full = {**row, "step": step, "at_second": round(time.monotonic() - self.begin, 1)}
        self.file.write(json.dumps(full, default=str).encode() + b"\n")
        os.fsync(self.file)
        self.rows.append(full)
        if text := brief(full):
            print(text, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_contact",
        description=first_contact.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of results")
    parser.add_argument("--seconds", type=float, required=True, help="of all steps together, the summary included")
    parser.add_argument("--part", choices=PARTS, default="one")
    names = list(dict.fromkeys(step.name for steps in PARTS.values() for step in steps))
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the command, on small shapes"
    )
    return parser.parse_args(arguments)


def _terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(
    arguments: Sequence[str] | None = None, parts: dict[str, Sequence[Step]] | None = None, caches: Path = CACHES
) -> int:
    """Run a part; 1 where something failed.

    Args:
        parts: the steps by part. caches: where compilers keep their results.
    """
    options = _parse(arguments)
    until = time.monotonic() + options.seconds - RESERVED
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "FASTVIT_UNPROVEN": "1",
        "FASTVIT_CACHE_DIR": str(caches / "fastvit"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "PYTHONUNBUFFERED": "1",
    }
    signal.signal(signal.SIGTERM, _terminated)
    left = [step for step in (parts or PARTS)[options.part] if step.name in (options.only or [step.name])]
    given = Options(str(out), options.device, small=options.device == "cpu")
    path = out / f"part-{options.part}.jsonl"
    others = [row for other in sorted(out.glob("part-*.jsonl")) if other != path for row in read(other)]
    with path.open("ab", buffering=0) as file, path.with_suffix(".log").open("ab+", buffering=0) as log:
        results = Results(file)
        results.write("start", {"date": datetime.datetime.now().isoformat(), "options": vars(options)})
        try:
            _run(left, given, until, results, log)
        except (KeyboardInterrupt, SystemExit) as stopped:
            results.write(
                "end", {"failed": f"{type(stopped).__name__} {stopped}", "not_reached": [s.name for s in left]}
            )
    text = summarise(results.rows, others)
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(text, flush=True)
    return int(any(map(has_failed, results.rows)))


def _run(left: list[Step], options: Options, until: float, results: Results, log: IO[bytes]) -> None:
    """Run the steps that are left, until the time is over; those that are done are taken off the list."""
    while left:
        step, seconds = left[0], until - time.monotonic()
        if seconds <= 0:
            results.write("end", {"not_reached": [each.name for each in left]})
            return
        share = seconds * step.weight / sum(each.weight for each in left)
        begin = time.monotonic()
        log.write(f"== {step.name}, at most {share:.0f} s\n".encode())
        try:
            run_step(step, options, share, functools.partial(results.write, step.name), log)
        except Exception as error:  # no process can be started, say
            results.write(step.name, {"failed": f"{type(error).__name__}: {error}"})
        results.write(step.name, {"took": round(time.monotonic() - begin, 1), "of": round(share, 1)})
        left.pop(0)


if __name__ == "__main__":
    sys.exit(main())
