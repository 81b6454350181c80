"""``bench``: a model plain and patched, timed in turn; the speed of an inaccurate patched model is not reported."""

from __future__ import annotations

import argparse
import copy
import functools
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from fastvit.cli.models import batch_of, load, to
from fastvit.cli.show import print_json, table, working
from fastvit.cli.verify import Verdict, judge, over_budget
from fastvit.patching import unpatch
from fastvit.patching.plan import PATCHED
from fastvit.patching.timing import Times, interleaved
from fastvit.patching.verification import END_TO_END, as_call

GATE_BATCH = 2  # float64 is slow, and two images show an error as well as eight


def bench(arguments: argparse.Namespace, console: Console) -> int:
    """Time a model plain and patched, in turn, once the patched one has proved accurate."""
    candidate = load(arguments.model, size=arguments.size, seed=arguments.seed)
    plain = unpatch(candidate.model).to(arguments.device, arguments.dtype)
    patched = copy.deepcopy(plain)
    few, example = (
        to(candidate.inputs(batch), arguments.device, arguments.dtype)
        for batch in (min(GATE_BATCH, arguments.batch), arguments.batch)
    )
    with working(console, arguments, f"verifying {candidate.name}"):
        verdict = judge(patched, few)
    outcome = _outcome(arguments, candidate.name, verdict, batch_of(example))
    if verdict.accurate:
        with working(console, arguments, f"timing {candidate.name}"):
            outcome.update(_speed(plain, patched, example, arguments))
    if arguments.json:
        print_json(outcome)
    else:
        console.print(_shown(outcome))
        if not verdict.accurate:
            console.print(Text("not timed: " + over_budget(verdict), "red"))
    return 0 if verdict.accurate else 1


def _outcome(arguments: argparse.Namespace, name: str, verdict: Verdict, batch: int) -> dict[str, Any]:
    rows = [row for row in verdict.report.rows if row.status == PATCHED]
    error = verdict.errors[END_TO_END]
    return {
        "model": name,
        "batch": batch,
        "dtype": str(arguments.dtype).removeprefix("torch."),
        "device": str(arguments.device),
        "threads": torch.get_num_threads(),
        "compile": arguments.compile,
        "replaced": dict(Counter(f"{row.op} ({row.backend})" for row in rows)),
        "accurate": verdict.accurate,
        "error": error.fused,
        "plain_error": error.plain,
    }


def _speed(plain: Any, patched: Any, example: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both, and the speed-up: median and quartiles of the rounds."""
    if arguments.compile:
        plain, patched = torch.compile(plain), torch.compile(patched)
    args, kwargs = as_call(example)
    calls = [functools.partial(model, *args, **kwargs) for model in (patched, plain)]
    with torch.inference_mode():
        times = Times.of(*interleaved(calls, arguments.device, rounds=arguments.rounds))
    high, median, low = (1 / ratio for ratio in times.ratios)
    batch = batch_of(example)
    return {
        "images_per_s": {"plain": batch / times.plain, "patched": batch / times.fused},
        "speedup": {"median": median, "low": low, "high": high},
        "rounds": arguments.rounds,
    }


def _shown(outcome: dict[str, Any]) -> Any:
    compiled = ", torch.compile" if outcome["compile"] else ""
    threads = f", {outcome['threads']} threads" if outcome["device"] == "cpu" else ""
    title = (
        f"{outcome['model']}, batch {outcome['batch']}, {outcome['dtype']} on {outcome['device']}{threads}{compiled}"
    )
    columns = ("plain images/s", "patched images/s", "speed-up (quartiles)", ">error", ">plain error", "replaced")
    rows = table(*columns, title=title)
    speed, speedup = outcome.get("images_per_s"), outcome.get("speedup")
    rows.add_row(
        f"{speed['plain']:.1f}" if speed else "",
        f"{speed['patched']:.1f}" if speed else "",
        f"{speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})" if speedup else "",
        f"{outcome['error']:.2g}",
        f"{outcome['plain_error']:.2g}",
        "\n".join(f"{count} {what}" for what, count in outcome["replaced"].items()),
    )
    return rows
