"""What came home, in a page: failures first, then the goals, predictions beside measurements, and every row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_contact.tools import predictions
from benchmarks.gpu_goals import BATCH, describe_goal, judge

Row = Mapping[str, Any]

TOLD = ("Duration", "Registers Per Thread", "Achieved Occupancy", "Executed Ipc Active", "Memory Throughput")
"""Of ncu's counters, those in the summary."""


def has_failed(row: Row) -> bool:
    return "failed" in row or row.get("outcome") == "failed"


def _what(row: Row) -> str:
    words = (row["step"], row.get("item"), f"at {row['at']}" if row.get("at") else "", row.get("test"))
    return " ".join(str(word) for word in words if word)


def brief(row: Row) -> str:
    """A row as it is printed when it comes; "" for tests that passed."""
    if row.get("outcome") in ("passed", "skipped"):
        return ""
    start = f"{row['at_second']:6.1f} s  {_what(row)}"
    if has_failed(row):
        return f"{start}: FAILED: {_why(row)}"
    rest = {key: value for key, value in row.items() if key not in ("step", "item", "at_second")}
    return f"{start}: {json.dumps(rest, default=str)[:300]}"


def _why(row: Row) -> str:
    text = row.get("failed") or (row.get("text", "").strip().splitlines() or ["no reason"])[-1]
    return str(text)[:300]


def pair_of(test: str) -> tuple[str, str] | None:
    """The job and the backend in a test's id, "...[small-torch.float16-vit_b-triton]"; None if it has none."""
    words = test.rpartition("[")[2].rstrip("]").split("-")
    return (words[-2], words[-1]) if len(words) >= 2 and words[-1] in ("triton", "cuda") else None


def counted(tests: Sequence[str]) -> dict[str, int]:
    """How many tests there are of each job and backend, by "job backend"."""
    return Counter(" ".join(pair) for pair in map(pair_of, tests) if pair is not None)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a line that was cut off is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def summarise(rows: Sequence[Row], others: Sequence[Row] = ()) -> str:
    """The page of a part. ``others`` are rows of the other part, by which goals may be judged as well."""
    every = [*rows, *others]
    sections = (_failures, rows), (_tests, rows), (_goals, every), (_predicted, every), (_rows, rows)
    return "\n".join(line for section, given in sections for line in _lines(section, given)) + "\n"


def _lines(section: Callable[[Sequence[Row]], Iterator[str]], rows: Sequence[Row]) -> Iterator[str]:
    """A section, as far as its rows are what they should be."""
    try:
        yield from section(rows)
    except Exception as error:
        yield f"{section.__name__} broke off: {type(error).__name__}: {error}"


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    failed = [row for row in rows if has_failed(row)]
    yield f"FAILED: {len(failed) or 'nothing'}"
    yield from (f"  {_what(row)}: {_why(row)}" for row in failed)
    yield from (f"NOT REACHED: {row['step']}: {', '.join(row['not_reached'])}" for row in rows if "not_reached" in row)
    yield from (f"ABSENT: {_what(row)}: {row['absent']}" for row in rows if "absent" in row)


def _tests(rows: Sequence[Row]) -> Iterator[str]:
    for step in dict.fromkeys(row["step"] for row in rows if "tests" in row or "test" in row):
        found = Counter(row["outcome"] for row in rows if row["step"] == step and "test" in row)
        planned = sum(row["tests"] for row in rows if row["step"] == step and "tests" in row)
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(found.items()))
        yield f"tests of {step}: {outcomes or 'none'}, of {planned}"


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    steps = [row for row in rows if "first_loss" in row]
    judged = judge([row for row in rows if "milliseconds" in row and "job" in row], steps)
    yield f"goals: {sum(goal['met'] for goal in judged)} of {len(judged)} met"
    yield from (f"  {describe_goal(goal)}" for goal in judged)


def _predicted(rows: Sequence[Row]) -> Iterator[str]:
    yield "microseconds: predicted by benchmarks.gpu_model, first configuration and best | measured here, the same"
    for row in predictions():
        of = (row["job"], "training" if row["training"] else "inference", BATCH)
        times: dict[bool, float] = {}
        for each in rows:
            known = each.get("milliseconds", {})
            if (each.get("job"), each.get("mode"), each.get("batch")) == of and row["backend"] in known:
                times.setdefault(each["tuned"], 1e3 * known[row["backend"]]["median"])
        told = (f"{time:7.1f}" if time else "   none" for time in (row.get("first"), row.get("best")))
        here = (f"{times[tuned]:7.1f}" if tuned in times else "   none" for tuned in (False, True))
        yield f"  {row['name']:<24} {' '.join(told)} | {' '.join(here)}"
    for row in rows:
        if "counted" in row:
            told = (f"{name} {value}" for name, value in row["counted"].items() if name.startswith(TOLD))
            model = row["predicted"]
            predicted = f"{model['microseconds']:.1f} us, {model['limiter']}, {model['registers']} registers"
            yield f"  {row['item']}: {row['kernel']}: predicted {predicted} | counted {', '.join(told) or 'nothing'}"


def _rows(rows: Sequence[Row]) -> Iterator[str]:
    yield "rows: the fused time, and the others as multiples of it"
    yield from (f"  {describe_row(row)}" for row in rows if "milliseconds" in row and "job" in row)
    yield from (f"  {describe_steps(row)}" for row in rows if "first_loss" in row)
    for row in rows:
        if "inference" in row:
            times = "  ".join(f"{name} {each['median']:.3f} ms" for name, each in row["inference"].items())
            yield f"  {row['model']:<20} {row['batch']:>3} inference {times}"


def describe_row(row: Row) -> str:
    """A job's row in a line: the fused time, and the others as multiples of it."""
    start = f"{row['job']:<20} {row['batch']:>3} {row['dtype']:<8} {row['mode']:<9}"
    times = {name: measured["median"] for name, measured in row["milliseconds"].items()}
    if "fused" not in times:
        return f"{start} no fused time: {row['refused'].get('fused', 'inaccurate')}"
    fused = times.pop("fused")
    others = "  ".join(f"{name} {time / fused:.2f}x" for name, time in times.items())
    rates = f"{row['bytes'] / fused / 1e6:.0f} GB/s {row['operations'] / fused / 1e9:.1f} TFLOP/s"
    return f"{start} {fused:8.3f} ms  {others}  {rates}"


def describe_steps(row: Row) -> str:
    """A model's training step in a line."""
    times, peaks = row["milliseconds"], row["peak_mebibytes"]
    memory = ""
    if peaks["fused"] is not None:
        memory = f"  peak {peaks['fused']['peak']:.0f} MiB of plain's {peaks['plain']['peak']:.0f}"
    faster = times["plain"] / times["fused"]
    return f"{row['model']:<20} {row['batch']:>3} step      {times['fused']:8.3f} ms  plain {faster:.2f}x{memory}"
