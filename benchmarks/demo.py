"""The seven families on photographs, before and after ``fastvit.patch``: speed, and the error of the logits.

    python -m benchmarks.demo [--models NAME ...] [--batch N] [--dtype float32] [--device cpu] [--image PATH ...]

For every model the plain and the patched copy are timed in turn in one run, each round on a differently ordered batch.
No speed-up is printed for a model whose patched logits deviate from float64 by more than the accuracy rule allows.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

import fastvit  # noqa: E402
from benchmarks.photos import bundled_photographs, open_photograph, photo_batch  # noqa: E402
from benchmarks.randomize import randomize_like_trained  # noqa: E402
from benchmarks.timing import on_inputs  # noqa: E402
from fastvit.accuracy import deviation  # noqa: E402

MODELS = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deepvit_16b",
    "cait_xxs24_224",
    "cpvt_tiny_peg5",
    "cvt_13",
    "ceit_tiny",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH_OF_A_LOG = 130
ORACLE_BATCH = 2  # float64 on a CPU is slow; two photographs show an error as well as eight


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


def replaced_blocks(model: nn.Module) -> dict[str, int]:
    """How many blocks of a patched model run on which operator and backend."""
    rows = fastvit.report(model).rows
    return dict(Counter(f"{row.op} ({row.backend})" for row in rows if row.status == "patched"))


def measure(
    name: str, photos: Sequence[Path], *, batch: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> Outcome:
    """Build one model twice (plain and patched), compare both with float64, and time them in turn."""
    torch.manual_seed(0)
    plain = fastvit.create_model(name, fused=False)
    images = photo_batch(photos, batch, plain.default_cfg)
    randomize_like_trained(plain, images)
    plain = plain.eval().to(device)
    few = images[:ORACLE_BATCH].to(device)
    with torch.inference_mode():
        oracle = copy.deepcopy(plain).double()(few.double())
        plain = plain.to(dtype)
        patched = fastvit.patch(copy.deepcopy(plain))
        found = deviation(patched(few.to(dtype)), plain(few.to(dtype)), oracle)
        batches = [images.roll(i, 0).to(device, dtype) for i in range(min(rounds, batch))]
        before, after = on_inputs([plain, patched], batches, rounds=rounds, device=device)
    ratios = [b / a for b, a in zip(before, after, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Outcome(
        model=name,
        images_per_s_before=batch / statistics.median(before),
        images_per_s_after=batch / statistics.median(after),
        speedup=statistics.median(ratios),
        speedup_low=low,
        speedup_high=high,
        error_before=found.plain,
        error_after=found.fused,
        accurate=found.is_accurate,
        replaced=replaced_blocks(patched),
    )


def result_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """The table for the terminal."""
    caption = "speed-up: median of the paired rounds (quartiles); error: largest deviation of the logits from float64"
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
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of each model (default 11)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder of chart and JSON")
    settings = parser.parse_args(arguments)
    try:
        settings.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    settings.dtype = settings.dtype or ("bfloat16" if settings.device.type == "cuda" else "float32")
    known = fastvit.list_models()
    for name in settings.models:
        if name not in known:
            parser.error(f"--models: unknown model {name!r}; python -m fastvit list names all {len(known)}")
    for option in ("batch", "rounds"):
        if getattr(settings, option) < 1:
            parser.error(f"--{option}: expected a positive number, got {getattr(settings, option)}")
    if settings.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: {settings.device} was asked for, but torch sees no GPU")
    for path in settings.image or ():
        if not path.is_file():
            parser.error(f"--image: there is no file {path}")
        try:
            open_photograph(path)
        except ValueError as error:
            parser.error(str(error))
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 if every patched model is accurate, else 1."""
    settings = parse_arguments(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_LOG
    photos = settings.image or bundled_photographs()
    where = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else "CPU"
    title = f"fastvit {fastvit.__version__} on {where}, {settings.dtype}, batch {settings.batch}"
    if settings.device.type == "cpu":
        title += f", {torch.get_num_threads()} threads"
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(settings.models))
        for name in settings.models:
            progress.update(task, description=name)
            outcomes.append(
                measure(
                    name,
                    photos,
                    batch=settings.batch,
                    dtype=DTYPES[settings.dtype],
                    device=settings.device,
                    rounds=settings.rounds,
                )
            )
            progress.advance(task)
    console.print(result_table(outcomes, title))
    settings.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": " ".join(["python -m benchmarks.demo", *(sys.argv[1:] if arguments is None else arguments)]),
        "title": title,
        "date": datetime.date.today().isoformat(),
        "machine": {key: value for key, value in fastvit.backends.describe().items() if key != "location"},
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    (settings.out / "demo.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    console.print("chart:", str(bar_chart(outcomes, title, settings.out / "demo.png")), soft_wrap=True)
    inaccurate = [o.model for o in outcomes if not o.accurate]
    if inaccurate:
        console.print(f"[red]Less accurate than the rule allows:[/] {', '.join(inaccurate)}")
    return 1 if inaccurate else 0


if __name__ == "__main__":
    sys.exit(main())
