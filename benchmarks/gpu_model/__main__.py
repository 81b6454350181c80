"""``python -m benchmarks.gpu_model``: predict rows, print them, write them."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import gpu_model, jobs
from benchmarks.gpu_model import launches
from benchmarks.gpu_model.execution import Warp, trace
from benchmarks.gpu_model.launch import Launch
from benchmarks.gpu_model.multiprocessor import BANDWIDTH, LEAST, PRODUCTS, predict
from benchmarks.gpu_model.rows import BATCH, ROWS, Row
from fastvit import ops


def launches_of(row: Row, configuration: int) -> list[Launch]:
    """What a row launches, with one configuration of every kernel, or the last where there are fewer.

    RuntimeError where it cannot be compiled here.
    """
    torch.manual_seed(0)
    job = {job.name: job for job in jobs.JOBS}[row.job]
    tensors = job.tensors(BATCH, torch.bfloat16, "cpu")
    if not row.training:
        with torch.no_grad(), launches.recording(configuration) as found:
            job.call(ops, tensors, backend=row.backend)
        return found
    leaves = job.leaves(tensors)
    with launches.recording(configuration) as found:
        out = jobs.parts(job.call(ops, {**tensors, **leaves}, backend=row.backend))
        torch.autograd.grad(out, list(leaves.values()), out, allow_unused=True)
    return found


def predict_launch(launch: Launch, keys: int = 0) -> dict[str, Any]:
    """One launch's microseconds and what limits them; ``keys`` as in a row."""
    facts = {"kernel": launch.kernel, "limiter": "launch", "microseconds": 1e6 * LEAST}
    if launch.build is None:
        limits = {"memory": launch.traffic / BANDWIDTH, "tensor cores": launch.flops / PRODUCTS, "launch": LEAST}
        limiter = max(limits, key=limits.__getitem__)
        return {**facts, "limiter": limiter, "microseconds": 1e6 * limits[limiter]}
    binary, shared = launch.build()
    trips = (-(-keys // launch.block), 0) if keys else (1,)
    ran = trace(binary.instructions, Warp(launch.parameters, 32 * launch.warps, launch.grid, trips, launch.thread))
    found = predict(ran, binary.registers, shared, launch.warps, math.prod(launch.grid), launch.traffic)
    return facts | {
        "limiter": found.limiter,
        "microseconds": 1e6 * found.seconds,
        "grid": launch.grid,
        "warps": launch.warps,
        "registers": binary.registers,
        "spilled": binary.stack,
        "shared": shared,
        "blocks_a_multiprocessor": found.blocks,
        "waves": found.waves,
        "instructions_a_warp": found.instructions,
        "loops": [len(loop.ends) for loop in ran.loops],
        "assumed_loops": ran.unknown,
        "busy": found.busy,
    }


def predict_launches(found: Sequence[Launch], keys: int) -> dict[str, Any]:
    """A call's launches, each sort once with how often it is made, the slowest first."""
    times = collections.Counter(launch.key for launch in found)
    each = {launch.key: launch for launch in found}
    kernels = [{"times": times[key], **predict_launch(launch, keys)} for key, launch in each.items()]
    kernels.sort(key=lambda kernel: -kernel["times"] * kernel["microseconds"])
    total = sum(kernel["times"] * kernel["microseconds"] for kernel in kernels)
    return {"launches": len(found), "microseconds": total, "kernels": kernels}


def predict_row(row: Row) -> dict[str, Any]:
    """A row with each of its configurations; the first is what is taken where nothing may be measured."""
    facts: dict[str, Any] = {"predicted": True, **row._asdict()}
    configurations: list[dict[str, Any]] = []
    known: list[str] = []
    while True:
        try:
            found = launches_of(row, len(configurations))
        except RuntimeError as error:
            return facts | {"skipped": str(error)}
        if (keys := [launch.key for launch in found]) == known:
            break
        known = keys
        configurations.append(predict_launches(found, row.keys))
    best = min(each["microseconds"] for each in configurations)
    return facts | {"first": configurations[0]["microseconds"], "best": best, "configurations": configurations}


def describe(facts: dict[str, Any]) -> str:
    """A line of the table, and one for each of the slowest kernels of every configuration."""
    start = f"{facts['name']:<24}"
    if "skipped" in facts:
        return f"{start} skipped: {facts['skipped']}"
    lines = [
        f"{start} predicted {facts['best']:.1f} us (the first configuration {facts['first']:.1f}); floor "
        f"{facts['floor']:g}, peer (estimate) {facts['peer']}, goal {facts['goal']:g}"
    ]
    for number, configuration in enumerate(facts["configurations"]):
        lines.append(
            f"  configuration {number}: {configuration['microseconds']:.1f} us, {configuration['launches']} launches"
        )
        for kernel in configuration["kernels"][:4]:
            held = (
                f"; {kernel['blocks_a_multiprocessor']} blocks, {kernel['registers']} registers"
                if "grid" in kernel
                else ""
            )
            name = f"{kernel['times']:3} x {kernel['kernel']:<34}"
            lines.append(f"    {name} {kernel['microseconds']:7.1f} us  {kernel['limiter']}{held}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=gpu_model.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(names):
        parser.error(f"row: expected some of {names}, got {sorted(unknown)}")
    rows = []
    for row in ROWS:
        if not options.rows or row.name in options.rows:
            rows.append(predict_row(row))
            print(describe(rows[-1]), flush=True)
    if options.json:
        about = {
            "what": "predicted by benchmarks.gpu_model for an H200, bfloat16, batch 64; nothing here was measured",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
