"""The seven families on photographs, before and after ``fastvit.patch``: speed, and the error of the logits.

    python -m benchmarks.demo [--models NAME ...] [--batch N] [--dtype float32] [--device cpu] [--image PATH ...]

The plain and the patched model of a family have a process each, and are timed in turn by ``benchmarks.runner``, each
call on a differently ordered batch. No speed-up is printed for a model whose patched logits deviate from float64 by
more than the accuracy rule allows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import fastvit  # noqa: E402
from benchmarks.command import INTERRUPTED, checked_device, progress_bar, run  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402
from benchmarks.photos import bundled_photographs, open_photograph  # noqa: E402
from benchmarks.runner import Race, Settings  # noqa: E402
from benchmarks.worker import DTYPES, Case  # noqa: E402

WIDTH_OF_A_LOG = 130


@dataclass
class Outcome:
    """One row of the table."""

    model: str
    images_per_s_before: float
    images_per_s_after: float
    speedup: float
    speedup_low: float
    speedup_high: float
    error_before: float
    error_after: float
    accurate: bool
    replaced: dict[str, int]


def outcome_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> Outcome | None:
    """The row of a model from those of its two contenders; None if one was not measured."""
    if before["status"] != "measured" or "error" not in after:
        return None
    timed = after["status"] == "measured"
    speedup = after["ratio"] if timed else {"median": 0.0, "low": 0.0, "high": 0.0}
    return Outcome(
        model=before["name"],
        images_per_s_before=1e3 * before["batch"] / before["ms"]["median"],
        images_per_s_after=1e3 * before["batch"] / after["ms"]["median"] if timed else 0.0,
        speedup=speedup["median"],
        speedup_low=speedup["low"],
        speedup_high=speedup["high"],
        error_before=after["plain_error"],
        error_after=after["error"],
        accurate=after["status"] != "inaccurate",
        replaced=after.get("replaced", {}),
    )


def result_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """The table for the terminal."""
    caption = "speed-up: median of the paired rounds (95% bootstrap interval); error: largest deviation of the logits"
    caption += " from float64"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for heading, justify in (
        ("model", "left"),
        ("images/s\nbefore", "right"),
        ("images/s\nafter", "right"),
        ("speed-up", "left"),
        ("error\nbefore", "right"),
        ("error\nafter", "right"),
        ("replaced", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")
    for o in outcomes:
        speedup = f"[bold]{o.speedup:.2f}x[/] ({o.speedup_low:.2f} to {o.speedup_high:.2f})"
        table.add_row(
            o.model,
            f"{o.images_per_s_before:.1f}",
            f"{o.images_per_s_after:.1f}",
            speedup if o.accurate else "[red]inaccurate[/]",
            f"{o.error_before:.1e}",
            f"{o.error_after:.1e}",
            "\n".join(f"{count} {what}" for what, count in o.replaced.items()),
        )
    return table


def bar_chart(outcomes: Sequence[Outcome], title: str, path: Path) -> Path:
    """Images per second before and after as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    places = range(len(outcomes))
    axes.bar([p - 0.2 for p in places], [o.images_per_s_before for o in outcomes], 0.4, label="before", color="#9aa5b1")
    after = axes.bar(
        [p + 0.2 for p in places], [o.images_per_s_after for o in outcomes], 0.4, label="after", color="#2f6fde"
    )
    axes.bar_label(after, [f"{o.speedup:.2f}x" if o.accurate else "inaccurate" for o in outcomes], padding=3)
    axes.set_xticks(list(places), [o.model for o in outcomes], rotation=20, ha="right")
    axes.set_ylabel("images per second")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; argparse reports an error and exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), metavar="NAME", help="names of fastvit.list_models()"
    )
    parser.add_argument("--batch", type=int, default=8, help="photographs in a batch (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="float32, or bfloat16 where there is a GPU")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; a GPU by default where there is one")
    parser.add_argument("--image", nargs="+", type=Path, metavar="PATH", help="your own pictures instead")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each model (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder of chart and JSON")
    settings = parser.parse_args(arguments)
    settings.device = checked_device(parser, settings.device)
    settings.dtype = settings.dtype or ("float32" if settings.device == "cpu" else "bfloat16")
    known = fastvit.list_models()
    for name in settings.models:
        if name not in known:
            parser.error(f"--models: unknown model {name!r}; python -m fastvit list names all {len(known)}")
    for option in ("batch", "rounds"):
        if getattr(settings, option) < 1:
            parser.error(f"--{option}: expected a positive number, got {getattr(settings, option)}")
    for path in settings.image or ():
        if not path.is_file():
            parser.error(f"--image: there is no file {path}")
        try:
            open_photograph(path)
        except ValueError as error:
            parser.error(str(error))
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 if every patched model is accurate, else 1; 130 after Ctrl-C."""
    settings = parse_arguments(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_LOG
    photos = tuple(os.fspath(path.absolute()) for path in settings.image or bundled_photographs())
    device = torch.device(settings.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    title = f"fastvit {fastvit.__version__} on {where}, {settings.dtype}, batch {settings.batch}"
    if device.type == "cpu":
        title += f", {torch.get_num_threads()} threads"
    races = [
        Race(
            Case(
                "benchmarks.models", name, "fwd", settings.dtype, settings.batch, device=settings.device, photos=photos
            ),
            {"eager": None, "fastvit": None},
            Settings(rounds=settings.rounds, slot_seconds=0.1),
        )
        for name in settings.models
    ]
    complete = run(races, console, progress_bar(console))
    rows = [race.rows() for race in races]
    outcomes = [outcome for outcome in (outcome_of(*pair) for pair in rows) if outcome is not None]
    console.print(result_table(outcomes, title))
    settings.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": " ".join(["python -m benchmarks.demo", *(sys.argv[1:] if arguments is None else arguments)]),
        "title": title,
        "date": datetime.date.today().isoformat(),
        "machine": {key: value for key, value in fastvit.backends.describe().items() if key != "location"},
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "rows": [row for pair in rows for row in pair],
    }
    (settings.out / "demo.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    console.print("chart:", str(bar_chart(outcomes, title, settings.out / "demo.png")), soft_wrap=True)
    failed = {row["name"]: row["reason"] for pair in rows for row in pair if row["status"] == "failed"}
    for name, reason in failed.items():
        console.print(f"[red]{name} failed:[/]", reason, soft_wrap=True, markup=True)
    inaccurate = [o.model for o in outcomes if not o.accurate]
    if inaccurate:
        console.print(f"[red]Less accurate than the rule allows:[/] {', '.join(inaccurate)}")
    if not complete:
        return INTERRUPTED
    return 1 if inaccurate or failed else 0


if __name__ == "__main__":
    sys.exit(main())
