"""The command line of ``benchmarks.models`` and ``benchmarks.ops``: options, the progress bar, what is written."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import report
from benchmarks.runner import BASELINE, Race, Settings, interrupts
from benchmarks.worker import DTYPES, MODES, Case

LIBRARIES = ("torch", "fastvit", "numpy", "onnxruntime", "openvino", "timm", "transformers", "vit-pytorch", "triton")
QUICK_SECONDS = 270.0
QUICK_ROUNDS = 5
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class Suite:
    """What a command measures."""

    name: str
    module: str
    description: str
    names: Callable[[], Sequence[str]]
    """The names of the rows."""
    providers: Mapping[str, str]
    absence: Callable[[str, Case], str | None]
    others: Callable[[str], bool] = lambda text: False
    """Whether a text that is no part of a name is a name nevertheless."""
    pythons: Mapping[str, str] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    image_size: bool = True


def parse(suite: Suite, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options; argparse reports an error and exits with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{suite.name}",
        description=suite.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="providers:\n" + "\n".join(f"  {name:<22} {about}" for name, about in suite.providers.items()),
    )
    add = parser.add_argument
    add("--only", nargs="+", metavar="TEXT", help=f"rows whose name contains one of: {', '.join(suite.names())}")
    add("--mode", nargs="+", choices=MODES, help="forward, backward alone, or both (default fwd)")
    add("--dtype", nargs="+", choices=DTYPES, help="default: float32 bfloat16")
    add("--batch", nargs="+", type=int, help="default: 8 1")
    if suite.image_size:
        add("--image-size", nargs="+", type=int, help="pixels; the model's own by default")
    add("--providers", nargs="+", metavar="NAME", help="see below; all by default")
    add("--baseline", default=BASELINE, metavar="NAME", help=f"what ratios are relative to (default {BASELINE})")
    add("--allocator", nargs="+", default=["default"], metavar="WHICH")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; a GPU by default where there is one")
    add("--threads", type=int, help="of each contender; torch's own number by default")
    add("--rounds", type=int, help="timed slots of each contender (default 15)")
    add("--json", type=Path, metavar="FILE", help="all rows; default benchmarks/out/NAME.json")
    add("--csv", type=Path, metavar="FILE", help="the rows without their slots")
    add("--plot", type=Path, metavar="FILE", help="a chart of the ratios, .png or .svg")
    add("--quick", action="store_true", help="a sample, in less than 5 minutes")
    options = parser.parse_args(arguments)
    defaults = {"mode": ["fwd"], "dtype": ["float32", "bfloat16"], "batch": [8, 1], "providers": list(suite.providers)}
    defaults |= {"rounds": 15, **({"rounds": QUICK_ROUNDS, **suite.quick} if options.quick else {})}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    _check(parser, suite, options)
    return options


def _check(parser: argparse.ArgumentParser, suite: Suite, options: argparse.Namespace) -> None:
    options.names = list(suite.names())
    if options.only:
        found = {text: [name for name in options.names if text in name] for text in options.only}
        found = {text: [text] if text in names or suite.others(text) else names for text, names in found.items()}
        for text, names in found.items():
            if not names:
                parser.error(f"--only: no row has {text!r} in its name; there are {', '.join(options.names)}")
        options.names = list(dict.fromkeys(itertools.chain.from_iterable(found.values())))
    for option, names in (("--providers", options.providers), ("--baseline", [options.baseline])):
        for name in names:
            if name not in suite.providers:
                parser.error(f"{option}: expected some of {', '.join(suite.providers)}, got {name!r}")
    if options.baseline not in options.providers:
        options.providers = [options.baseline, *options.providers]
    numbers = {"batch": options.batch, "image-size": getattr(options, "image_size", None) or []}
    numbers |= {"threads": [options.threads or 1], "rounds": [options.rounds]}
    if options.threads is not None:
        numbers["threads"] = [options.threads]
    for option, values in numbers.items():
        for value in values:
            if value < 1:
                parser.error(f"--{option}: expected a positive number, got {value}")
    for which in options.allocator:
        if which not in ("default", "raised") and not Path(which).is_file():
            parser.error(f"--allocator: expected default, raised or the file of a library, got {which!r}")
    for option in ("json", "csv", "plot"):
        path = getattr(options, option)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"--{option}: there is no folder {path.absolute().parent}")
    if options.plot and options.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot: expected a name that ends in .png or .svg, got {str(options.plot)!r}")
    options.device = checked_device(parser, options.device)


def checked_device(parser: argparse.ArgumentParser, device: str | None) -> str:
    """The device that was asked for, or the best there is."""
    import torch

    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if found.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: {device} was asked for, but torch sees no GPU")
    if found.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {device!r}")
    return str(found)


def cases(suite: Suite, options: argparse.Namespace) -> list[Case]:
    sizes = getattr(options, "image_size", None) or [None]
    axes = itertools.product(options.mode, options.dtype, options.batch, sizes, options.names)
    return [
        Case(suite.module, name, mode, dtype, batch, size, options.device, options.threads)
        for mode, dtype, batch, size, name in axes
    ]


def machine() -> dict[str, Any]:
    """What the numbers depend on: CPU, its flags, memory, libraries and settings."""
    from fastvit import backends

    found = {key: value for key, value in backends.describe().items() if key != "location"}
    versions = dict(found.pop("versions", {}))
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions.setdefault(library, None)
    found |= {"versions": versions, "cpus": os.cpu_count(), "kernel": platform.release()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        found |= {"cpu_flags": facts.get("flags", "").split()}
        found |= {
            name.replace(" ", "_"): facts.get(name) for name in ("model name", "cpu family", "model", "cache size")
        }
    return found


def head_of(name: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What stands above the rows of a result: the suite, the command, the day and the machine."""
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "suite": name,
        "command": " ".join([f"python -m benchmarks.{name}", *given]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }


def write(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**head, "rows": "ROWS"}, indent=1, default=str)
    lines = ",\n  ".join(json.dumps(row) for row in rows)  # a line a row, so that a diff shows which changed
    path.write_text(text.replace('"ROWS"', f"[\n  {lines}\n ]") + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = []
    for row in rows:
        made = {
            key: value for key, value in row.items() if key != "slots" and not isinstance(value, (dict, type(None)))
        }
        for key in ("ms", "ratio"):
            made |= {f"{key}_{which}": value for which, value in (row.get(key) or {}).items()}
        flat.append(made)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)


def races(
    suite: Suite, options: argparse.Namespace, settings: Settings, step: Callable[[str, int], None]
) -> list[Race]:
    """Every case with every allocator."""
    return [
        Race(
            case,
            {name: suite.absence(name, case) for name in options.providers},
            settings,
            baseline=options.baseline,
            allocator=allocator,
            pythons=suite.pythons,
            step=step,
        )
        for case in cases(suite, options)
        for allocator in options.allocator
    ]


def progress_bar(console: Console) -> Progress:
    """A bar that is drawn between slots alone: a thread that draws would disturb what is timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False)


def run(
    all_races: Sequence[Race],
    console: Console,
    bar: Progress,
    finished: Callable[[Race, str], None] = lambda race, title: None,
) -> bool:
    """Run the races under a progress bar; False if Ctrl-C ended it. ``finished`` is told of each, and what it is."""
    total, done = sum(race.steps() for race in all_races), 0
    task = bar.add_task("", total=total)

    def step(what: str, steps: int) -> None:
        bar.update(task, advance=steps, description=f"{title}: {what}" if what else None)
        bar.refresh()

    try:
        with bar, interrupts():
            for race in all_races:
                case = race.case
                title = f"{case.name}, {case.mode}, {case.dtype}, batch {case.batch}"
                title += f", {Path(race.allocator).name}" if race.allocator != "default" else ""
                race.step = step
                planned = race.steps()
                race.run()
                done += planned
                bar.update(task, completed=done)
                finished(race, title)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted: what was measured is kept[/]")
        return False
    return True


def main(suite: Suite, arguments: Sequence[str] | None = None) -> int:
    """Measure a suite; the exit status is 0, 1 if fastvit was inaccurate or failed, 130 after Ctrl-C."""
    options = parse(suite, arguments)
    deadline = time.monotonic() + QUICK_SECONDS if options.quick else float("inf")
    settings = Settings(rounds=options.rounds, deadline=deadline, slot_seconds=0.15 if options.quick else 0.3)
    console = report.console_of_a_command()
    out = options.json or Path(__file__).parent / "out" / f"{suite.name}.json"
    head = head_of(suite.name, arguments)
    all_races = races(suite, options, settings, lambda what, steps: None)

    def rows() -> list[dict[str, Any]]:
        return [row for race in all_races for row in race.rows()]

    def finished(race: Race, title: str) -> None:
        write(out, head, rows())
        console.print(report.console_table(race.rows(), title))

    complete = run(all_races, console, progress_bar(console), finished)
    head["complete"] = complete and all(row["status"] != "skipped" for row in rows())
    write(out, head, rows())
    if options.csv:
        write_csv(options.csv, rows())
    if options.plot:
        report.plot(rows(), options.plot)
    console.print(report.console_absent(rows()))
    console.print("written:", str(out), soft_wrap=True)
    if not complete:
        return INTERRUPTED
    return int(
        any(row["status"] in ("failed", "inaccurate") for row in rows() if row["provider"].startswith("fastvit"))
    )
