"""Makes ``fastvit/proven.py`` from the results of ``benchmarks.first_contact``: ``python -m benchmarks.proven``.

An operator's kernels are proven on a chip where a file ``results/*-first-contact-*.jsonl`` has every parity test of all
its jobs with that backend, none of which failed, and was made with the kernels as they are now.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.first_contact.summary import pair_of, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "fastvit" / "proven.py"
SOURCES = {"triton": ("kernels/*.py",), "cuda": ("csrc/*/cuda*",)}
"""By backend, the files of its kernels."""

Rows = Iterable[Mapping[str, Any]]


def digest(backend: str) -> str:
    """Of the kernels' sources."""
    files = sorted(path for pattern in SOURCES[backend] for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def proven_by(rows: Rows) -> Iterator[tuple[str, str]]:
    """What the rows of a run prove: "operator backend" and the chip."""
    from benchmarks.jobs import JOBS  # imports torch, which the command that records does not

    rows = list(rows)
    about = next((row for row in rows if "chip" in row), None)
    planned = next((row["counts"] for row in rows if row["step"] == "parity" and "counts" in row), {})
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        pair = pair_of(row["test"]) if row["step"] == "parity" and "test" in row else None
        if pair is not None:
            outcomes[" ".join(pair)][row["outcome"]] += 1
    for op in dict.fromkeys(job.op for job in JOBS):
        for backend in SOURCES:
            pairs = [f"{job.name} {backend}" for job in JOBS if job.op == op]
            found = sum((outcomes[pair] for pair in pairs), Counter[str]())
            whole = all(planned.get(pair) and outcomes[pair].total() == planned[pair] for pair in pairs)
            passed = whole and found["passed"] and found["passed"] + found["skipped"] == found.total()
            if about is not None and about["sources"][backend] == digest(backend) and passed:
                yield f"{op} {backend}", about["chip"]


def table(runs: Iterable[Rows]) -> dict[str, tuple[str, ...]]:
    """The chips by "operator backend" that any of the runs proves."""
    chips = defaultdict(set)
    for rows in runs:
        for name, chip in proven_by(rows):
            chips[name].add(chip)
    return {name: tuple(sorted(found)) for name, found in sorted(chips.items())}


def text(found: Mapping[str, tuple[str, ...]]) -> str:
    """The module that holds a table."""
    head, _, tail = TABLE.read_text(encoding="utf-8").partition("PROVEN: dict[str, tuple[str, ...]] = {")
    lines = "".join(
        f"    {json.dumps(name)}: ({', '.join(map(json.dumps, chips))},),\n" for name, chips in found.items()
    )
    _, _, tail = tail.partition("}\n")
    return f"{head}PROVEN: dict[str, tuple[str, ...]] = {{{chr(10) + lines if lines else ''}}}\n{tail}"


def main() -> int:
    found = table(read(path) for path in sorted(RESULTS.glob("*-first-contact-*.jsonl")))
    TABLE.write_text(text(found), encoding="utf-8")
    print("\n".join(f"{name}: {', '.join(chips)}" for name, chips in found.items()) or "nothing is proven")
    return 0


if __name__ == "__main__":
    sys.exit(main())
