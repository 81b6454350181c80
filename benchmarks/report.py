"""Tables and plots of results: ``python -m benchmarks.report [FILE ...]``.

With files: their rows as tables. Without: rewrites the parts of README.md and docs/ between ``<!-- report: NAME -->``
and ``<!-- end of report -->`` from the complete results in ``benchmarks/results`` (of models and operators from all of
them, each of another machine or kind of call) and the package's own tables, and draws the pictures they show. A test
holds them to what this would write.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.runner import Settings, Slot, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("benchmarks.md", "training.md", "deployment.md", "patched.md")),
)
WIDTH_OF_A_LOG = 150
OURS = "fastvit"
BLOCK = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end of report -->)", re.DOTALL)
TRAINING = ("fwd_bwd", "bwd")
AXES = ("name", "mode", "dtype", "batch", "image_size", "allocator")

Row = Mapping[str, Any]


def races(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case with each allocator."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[axis] for axis in AXES), []).append(row)
    return list(found.values())


def measured(row: Row | None) -> bool:
    return row is not None and row["status"] == "measured"


def of(race: Sequence[Row], provider: str) -> Row | None:
    """The row of a provider, if it was measured."""
    return next((row for row in race if row["provider"] == provider and measured(row)), None)


def fastest_other(race: Sequence[Row]) -> Row | None:
    """The fastest contender that is neither ours nor a floor."""
    others = [row for row in race if measured(row) and not row["provider"].startswith(OURS) and not row.get("floor")]
    return min(others, key=lambda row: row["ms"]["median"], default=None)


def over(race: Sequence[Row], provider: str) -> float | None:
    """How many times as fast as a provider fastvit is."""
    ours, other = of(race, OURS), of(race, provider)
    return other["ms"]["median"] / ours["ms"]["median"] if ours and other else None


def slots(row: Row) -> list[Slot]:
    """The measured rounds of a row."""
    return [Slot(*each) for each in row["slots"]]


def over_the_fastest(race: Sequence[Row]) -> dict[str, float] | None:
    """How many times as fast as the fastest other contender fastvit is, by rounds, with its interval."""
    ours, other = of(race, OURS), fastest_other(race)
    return ratio(slots(other), slots(ours), Settings.tolerated) if ours and other else None


def _interval(found: Mapping[str, float] | None) -> str:
    return f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})" if found else ""


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def console_of_a_command() -> Console:
    """The terminal, or a log wide enough for the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_LOG
    return console


def console_table(rows: Sequence[Row], title: str) -> Table:
    """Every contender of a case, the reasons of those that were not measured among them."""
    caption = (
        "ms: median (quartiles); ratio: over the baseline, median of the rounds (95% bootstrap interval); limit: share"
    )
    caption += " of what the machine's product and copy rates allow; ~ other processes used the CPU meanwhile"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for heading, justify in (
        ("provider", "left"),
        ("ms", "left"),
        ("ratio", "left"),
        ("limit", "right"),
        ("MiB", "right"),
        ("prepared in", "right"),
        ("error (plain)", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")
    for row in sorted(rows, key=lambda row: row["ms"]["median"] if "ms" in row else float("inf")):
        if row["status"] == "absent":
            continue
        name, error = row["provider"] + (" (floor)" if row.get("floor") else ""), ""
        if row.get("error") is not None:
            error = f"{row['error']:.1e} ({row['plain_error']:.1e})"
        if not measured(row):
            table.add_row(name, f"[red]{row['status']}[/]: {escape(row['reason'])}", "", "", "", "", error)
            continue
        ms = row["ms"]
        table.add_row(
            name,
            f"{_ms(ms['median'])} ({_ms(ms['low'])} to {_ms(ms['high'])}){' ~' if row['disturbed'] else ''}",
            _interval(row["ratio"]),
            f"{row['share']:.0%}" if "share" in row else "",
            f"{row['peak_mib']:.0f}" if row.get("peak_mib") else "",
            f"{row['prepare_s']:.1f} s",
            error,
        )
    return table


def console_absent(rows: Sequence[Row]) -> Table:
    """Who was absent, and why; once for every reason."""
    table = Table("absent", "why", box=box.SIMPLE_HEAD)
    for provider, reason in dict.fromkeys(
        (row["provider"], row["reason"]) for row in rows if row["status"] == "absent"
    ):
        table.add_row(provider, escape(reason))
    return table


def _where(result: Mapping[str, Any]) -> str:
    """The sentence under a table: command, machine, date."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    cpu = about.get("model_name") or about["devices"][0]["name"]
    threads = about["devices"][0].get("threads")
    disturbed = sum(bool(row.get("disturbed")) for row in result["rows"])
    noise = f" Other processes disturbed {disturbed} rows." if disturbed else ""
    return f"`{result['command']}`, {result['date']}, {cpu}, {threads} threads; {versions}.{noise}"


def _of_modes(result: Mapping[str, Any], *modes: str) -> list[list[Row]]:
    return [race for race in races(result["rows"]) if race[0]["mode"] in modes]


def _has_peers(found: Sequence[Sequence[Row]]) -> bool:
    """Whether anybody was measured beside eager and ours."""
    names = {row["provider"] for row in itertools.chain.from_iterable(found) if measured(row)}
    return any(name != "eager" and not name.startswith(OURS) for name in names)


def models_block(result: Mapping[str, Any]) -> str:
    """A line for each case of inference: fastvit beside the baseline and beside the fastest of all others."""
    lines = [
        "| model | mode | dtype | batch | allocator | baseline, ms | fastvit, ms | over the baseline (95%) "
        "| fastest other | over it (95%) | of the limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for race in _of_modes(result, "fwd"):
        case, ours = race[0], of(race, OURS)
        base, other = of(race, case["baseline"]), fastest_other(race)
        why = next((row for row in race if row["provider"] == OURS), None)
        cells = [case["name"], case["mode"], case["dtype"], case["batch"], Path(case["allocator"]).name]
        cells += [
            _ms(base["ms"]["median"]) if base else "",
            _ms(ours["ms"]["median"]) if ours else why and why["status"],
        ]
        cells += [_interval(ours["ratio"]) if ours else "", other["provider"] if other else ""]
        cells += [_interval(over_the_fastest(race))]
        cells += [f"{ours['share']:.0%}" if ours and "share" in ours else ""]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", _where(result)])


def training_block(result: Mapping[str, Any]) -> str:
    """A line for each case of training: plain and patched, where both were measured."""
    lines = ["| model | mode | dtype | batch | plain, ms | patched, ms | speed-up (95%) | of the limit |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for race in _of_modes(result, *TRAINING):
        plain, ours = of(race, race[0]["baseline"]), of(race, OURS)
        why = next((row for row in race if row["provider"] == OURS), None)
        cells = [race[0][axis] for axis in AXES[:4]]
        cells += [_ms(plain["ms"]["median"]) if plain else "", _ms(ours["ms"]["median"]) if ours else ""]
        cells += [_interval(ours["ratio"]) if ours else why and why["status"]]
        cells += [f"{ours['share']:.0%}" if ours and "share" in ours else ""]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", _where(result)])


def _aotinductors(result: Mapping[str, Any]) -> list[tuple[Row, Row, list[Row]]]:
    """What AOTInductor made of the plain and of the patched model, of each case with both."""
    found = []
    for race in races(result["rows"]):
        if (plain := of(race, "aotinductor")) and (ours := of(race, "fastvit-aotinductor")):
            found.append((plain, ours, race))
    return found


def deployment_block(result: Mapping[str, Any]) -> str:
    """A line for each of those cases."""
    lines = ["| model | dtype | batch | plain, ms | with the operators, ms | speed-up (95%) | patched, in Python, ms |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for plain, ours, race in _aotinductors(result):
        cells = [ours[axis] for axis in ("name", "dtype", "batch")]
        cells += [_ms(plain["ms"]["median"]), _ms(ours["ms"]["median"])]
        cells += [_interval(ratio(slots(plain), slots(ours), Settings.tolerated))]
        python = of(race, OURS)
        lines.append("| " + " | ".join(map(str, [*cells, _ms(python["ms"]["median"]) if python else ""])) + " |")
    return "\n".join([*lines, "", _where(result)])


def steps_line(found: Sequence[Mapping[str, Any]]) -> str:
    """README's sentence on steps of training: of the newest result, and of others of its machine, the ranges."""
    newest = found[0]
    told: dict[tuple[str, int], list[float]] = {}
    for result in found:
        if _machine(result) == _machine(newest):
            for race in _of_modes(result, "fwd_bwd"):
                if (ours := of(race, OURS)) and ours["ratio"]:
                    told.setdefault((race[0]["dtype"], race[0]["batch"]), []).append(ours["ratio"]["median"])
    cases = sorted(told.items(), key=lambda each: (each[0][0] != "float32", each[0]))
    ranges = [f"{_range(speeds)} in {dtype} at batch {batch}" for (dtype, batch), speeds in cases]
    return (
        f"A step of training, forward and backward, is {', '.join(ranges)} as fast as eager PyTorch's, patched beside "
        f"plain ({_measured_where(newest)}): [model by model, with memory and accuracy](docs/training.md#measured)."
    )


def eager_block(found: Sequence[Mapping[str, Any]]) -> str:
    """Of every CPU, dtype and batch size: the range of inference beside eager, and the lowest bound of an interval."""
    told: dict[tuple[str, str, int], list[tuple[str, Mapping[str, float]]]] = {}
    for result in found:
        for race in _of_modes(result, "fwd"):
            if race[0]["baseline"] == "eager" and (ours := of(race, OURS)) and ours["ratio"]:
                key = (_machine(result), race[0]["dtype"], race[0]["batch"])
                told.setdefault(key, []).append((race[0]["name"], ours["ratio"]))
    lines = ["| CPU | dtype | batch | models | over eager | lowest bound |", "|---|---|---|---|---|---|"]
    for key, rows in sorted(told.items(), key=lambda each: (each[0][0], each[0][1] != "float32", each[0])):
        name, lowest = min(rows, key=lambda row: row[1]["low"])
        cells = [*key, len(rows), _range([ratio["median"] for _, ratio in rows]), f"{lowest['low']:.2f}x ({name})"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    files = ", ".join(f"`{result['command']}` ({result['date']})" for result in found)
    return "\n".join([*lines, "", files])


def ops_block(result: Mapping[str, Any]) -> str:
    """For each operator, mode and dtype: the range of its rows over plain code and the fastest other; the losses."""
    lines = [
        "| operator | mode | dtype | batch | over eager | over the fastest other | losses |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[list[Row]]] = {}
    for race in races(result["rows"]):
        key = (race[0]["name"].partition(": ")[0], *(race[0][axis] for axis in ("mode", "dtype", "batch")))
        groups.setdefault(key, []).append(race)
    for key, found in groups.items():
        eager, best, losses = [], [], []
        for race in found:
            other, plain = fastest_other(race), over(race, "eager")
            eager += [plain] if plain else []
            ahead = over(race, other["provider"]) if other else None
            if ahead is not None and other is not None:
                best.append(ahead)
                if ahead < 1.0:
                    losses.append(f"{race[0]['name'].partition(': ')[2]} {ahead:.2f} ({other['provider']})")
        lines.append("| " + " | ".join([*map(str, key), _range(eager), _range(best), ", ".join(losses)]) + " |")
    return "\n".join([*lines, "", _where(result)])


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}x to {max(values):.2f}x" if values else ""


COVERAGE = ("fused", "with torch", "partly", "not", "wrong", "no attention", "failed", "not run")
"""What becomes of a model in ``benchmarks.coverage``, in the order of the columns."""


def coverage_counts(rows: Sequence[Row], asked: Mapping[str, int]) -> list[list[Any]]:
    """For each library: rows asked for, those that ran, and how many came to each of ``COVERAGE``."""
    counts: list[list[Any]] = []
    for library in dict.fromkeys(row["name"].partition("/")[0] for row in rows):
        found = Counter(row["status"] for row in rows if row["name"].startswith(f"{library}/"))
        ran = found.total() - found["not run"] - found["failed"]
        counts.append([library, asked.get(library, found.total()), ran, *(found[status] for status in COVERAGE)])
    return counts


def coverage_table(rows: Sequence[Row]) -> Table:
    """A line for each library."""
    table = Table("library", "models", "ran", *COVERAGE, box=box.SIMPLE_HEAD)
    for line in coverage_counts(rows, {}):
        table.add_row(*map(str, line))
    return table


def coverage_block(result: Mapping[str, Any]) -> str:
    """The same, with what was counted in all of them."""
    lines = [
        f"| library | models | ran | {' | '.join(COVERAGE)} | attention: ours, torch's, plain | MLPs | depthwise |"
    ]
    lines.append("|---" * (len(COVERAGE) + 6) + "|")
    for line in coverage_counts(result["rows"], result.get("asked", {})):
        total: Counter[str] = Counter()
        for row in result["rows"]:
            if row["name"].startswith(f"{line[0]}/"):
                total.update({key: value for key, value in row.items() if isinstance(value, int)})
        cells = [*line, f"{total['fused']}, {total['by_torch']}, {total['plain']}"]
        cells += [f"{total[f'{kind}_fused']} of {total[kind]}" for kind in ("mlps", "depthwise")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", _where(result)])


LEFT = ("partly", "with torch", "not", "failed")


def left_block(result: Mapping[str, Any]) -> str:
    """Other libraries' models in which some attention is not computed by our kernels, and why."""
    lines = ["| model | attention: ours, torch's, plain | why |", "|---|---|---|"]
    for row in result["rows"]:
        if row["status"] in LEFT:
            counted = ", ".join(str(row.get(key, "")) for key in ("fused", "by_torch", "plain"))
            told = dict.fromkeys(re.sub(r" \([\w.]+:\d+\)", "", row["reason"]).split(" | "))
            why = [re.sub(r"([|*])", r"\\\1", each) for each in told if not each.startswith(("mlp:", "conv2d;"))]
            lines.append(f"| `{row['name']}` | {counted if 'fused' in row else row['status']} | {'; '.join(why[:2])} |")
    return "\n".join([*lines, "", _where(result)])


def classes_block() -> str:
    """Every class that a table of the package knows, with the operators it may run on."""
    from fastvit.patching.rows import TABLES

    found: dict[str, dict[str | None, None]] = {}
    for row in itertools.chain.from_iterable(TABLES):
        found.setdefault(row.path, {})[row.op] = None
    lines = [f"| `{path}` | {', '.join(f'`{op}`' for op in names)} |" for path, names in found.items()]
    return "\n".join(["| class | operator |", "|---|---|", *lines])


def _machine(result: Mapping[str, Any]) -> str:
    about = result["machine"]
    device = about["devices"][0]
    cpu = f"{about.get('model_name') or device['name']} ({device['in_use']})" if "in_use" in device else device["name"]
    return f"{cpu}, {device['threads']} threads"


def _measured_where(result: Mapping[str, Any]) -> str:
    """The CPU, the day and torch, for the picture and beneath it."""
    return f"{_machine(result)}, {result['date']}, torch {result['machine']['versions']['torch']}"


def speed_block(result: Mapping[str, Any]) -> str:
    """README's picture, what it shows, and where another is faster."""
    shown = _shown(result)
    behind = []
    for race in shown:
        other, ahead = fastest_other(race), over_the_fastest(race)
        if other and ahead and ahead["median"] < 0.995:
            case, speed = race[0], f"{ahead['median']:.2f} of {other['provider']}'s speed"
            behind.append(f"{case['name']} at batch {case['batch']} ({speed})")
    told = f"Times as fast as eager PyTorch at inference in float32: {_measured_where(result)}. "
    told += f"In {len(behind)} of {len(shown)} rows another is faster: {', '.join(behind)}." if behind else ""
    return f"![Speed beside others](docs/pictures/speed.svg)\n\n{told.strip()}"


def _shown(result: Mapping[str, Any]) -> list[list[Row]]:
    """What README's picture shows: inference in float32, with one allocator."""
    found = races(result["rows"])
    axes = ("fwd", "float32", found[0][0]["allocator"])
    return [race for race in found if tuple(race[0][axis] for axis in ("mode", "dtype", "allocator")) == axes]


BLOCKS: dict[str, tuple[str, Callable[[Any], str], Callable[[Mapping[str, Any]], Any]]] = {
    "speed": ("models", speed_block, _shown),
    "steps": ("models", steps_line, lambda result: _of_modes(result, "fwd_bwd")),
    "models": ("models", models_block, lambda result: _has_peers(_of_modes(result, "fwd"))),
    "eager": ("models", eager_block, lambda result: _of_modes(result, "fwd")),
    "ops": ("ops", ops_block, bool),
    "coverage": ("coverage", coverage_block, bool),
    "training": ("models", training_block, lambda result: _of_modes(result, *TRAINING)),
    "deployment": ("models", deployment_block, _aotinductors),
    "left": ("coverage", left_block, bool),
}
"""By name, the suite of whose results a block is made, how, and whether a result has anything for it."""
OPTIONS = dict.fromkeys(("steps", "training"), " --mode fwd_bwd")
OPTIONS["deployment"] = " --providers aotinductor fastvit-aotinductor fastvit"
"""By name, what makes the suite give results for a block."""
EVERY = ("models", "ops", "training")
"""Blocks of all results, each with its plot; those of SUMMARIES read all, the others are of the newest."""
SUMMARIES = ("steps", "eager")


def results(suite: str, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The complete results of a suite, or those that tell how much was asked for, the newest first."""
    every = [
        (path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"), reverse=True)
    ]
    return [
        (path, found)
        for path, found in every
        if found.get("suite") == suite and (found.get("complete") or "asked" in found)
    ]


def block(name: str, folder: Path) -> str:
    """What stands between the marks of that name."""
    if name == "classes":
        return classes_block()
    suite, written, fits = BLOCKS[name]
    found = [(path, result) for path, result in results(suite, folder) if fits(result)]
    if not found:
        return f"No result of `python -m benchmarks.{suite}{OPTIONS.get(name, '')}` is in `benchmarks/results/` yet."
    if name in EVERY:
        return "\n\n".join(f"{written(each)}\n\n![{name}](pictures/{path.stem}.svg)" for path, each in found)
    return written([each for _, each in found] if name in SUMMARIES else found[0][1])


def has_plot(result: Mapping[str, Any]) -> bool:
    """Whether a page shows a plot of it."""
    return any(BLOCKS[name][0] == result.get("suite") and BLOCKS[name][2](result) for name in EVERY)


def render(text: str, folder: Path = RESULTS) -> str:
    """A page with its blocks renewed."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(match[2], folder)}\n{match[3]}", text)


def _pyplot() -> Any:
    """matplotlib without a screen, whose SVG is the same each time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastvit"
    return importlib.import_module("matplotlib.pyplot")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    _pyplot().close(figure)
    return path


def _bars(row: Sequence[Row]) -> tuple[list[float], list[list[float]]]:
    """Heights of bars and what their intervals reach below and above."""
    ratios = [each["ratio"] for each in row]
    below = [each["median"] - each["low"] for each in ratios]
    return [each["median"] for each in ratios], [below, [each["high"] - each["median"] for each in ratios]]


def picture(result: Mapping[str, Any], path: Path) -> Path:
    """README's picture: every model and contender, a panel for each batch."""
    plt = _pyplot()
    shown = _shown(result)
    batches = sorted({race[0]["batch"] for race in shown})
    figure, panels = plt.subplots(1, len(batches), figsize=(9.5, 3.4), sharey=True, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row["provider"] for race in shown for row in race if measured(row)))
    names = [name for name in names if name != shown[0][0]["baseline"]]
    width = 0.8 / max(1, len(names))
    for axes, batch in zip(panels[0], batches, strict=True):
        group = [race for race in shown if race[0]["batch"] == batch]
        for i, name in enumerate(names):
            found = [(at, row) for at, race in enumerate(group) if (row := of(race, name)) and row["ratio"]]
            heights, spread = _bars([row for _, row in found])
            places = [at + (i - (len(names) - 1) / 2) * width for at, _ in found]
            color = "#2f6fde" if name == OURS else plt.colormaps["Greys"](0.3 + 0.4 * i / len(names))
            axes.bar(places, heights, width, yerr=spread, label=name, color=color, error_kw={"elinewidth": 0.8})
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(group)), [race[0]["name"] for race in group], rotation=25, ha="right", fontsize=8)
        axes.set_title(f"batch {batch}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"times as fast as {shown[0][0]['baseline']}")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{_measured_where(result)}; lines: 95% intervals", fontsize=9)
    return _save(figure, path)


def plot(rows: Sequence[Row], path: Path) -> Path:
    """A chart of the ratios with their intervals: a group of bars for each case."""
    plt = _pyplot()
    groups = [[row for row in race if measured(row) and row["ratio"]] for race in races(rows)]
    groups = [race for race in groups if race]
    names = list(dict.fromkeys(row["provider"] for row in itertools.chain.from_iterable(groups)))
    height = 0.8 / max(1, len(names))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.16 * len(names) * max(1, len(groups))), layout="constrained")
    for i, name in enumerate(names):
        shown = [(g, row) for g, race in enumerate(groups) for row in race if row["provider"] == name]
        lengths, spread = _bars([row for _, row in shown])
        axes.barh(
            [g + (i - (len(names) - 1) / 2) * height for g, _ in shown],
            lengths,
            height,
            xerr=spread,
            label=name,
            color="#2f6fde" if name == OURS else plt.colormaps["tab20"](i % 20),
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [", ".join(str(race[0][axis]) for axis in AXES[:4]) for race in groups])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the baseline")
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(frameon=False, fontsize="small")
    return _save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    console = console_of_a_command()
    for path in options.files:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"FILE: {path} is no result of benchmarks.models or benchmarks.ops ({error})")
        for race in races(rows):
            console.print(console_table(race, ", ".join(str(race[0][axis]) for axis in AXES)))
        console.print(console_absent(rows))
    if not options.files:
        for page in PAGES:
            page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
        suites = dict.fromkeys(BLOCKS[name][0] for name in EVERY)
        for path, found in itertools.chain.from_iterable(results(suite, RESULTS) for suite in suites):
            if has_plot(found):
                plot(found["rows"], PICTURES / f"{path.stem}.svg")
        shown = next((found for _, found in results("models", RESULTS) if _shown(found)), None)
        if shown is not None:
            picture(shown, PICTURES / "speed.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
