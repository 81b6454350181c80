"""What is fused in every model class that can be built here: ``python -m benchmarks.coverage [--only swin]``.

A small model of each class, with random weights, runs plain and patched on the same input. Counted is which of its
attention computations run on our kernels, on torch's fused ones, or plain, and how many of its MLPs and depthwise
convolutions are fused; the results are held to the accuracy rule. Models run in processes of their own: one that
crashes or hangs loses its own row alone. Ctrl-C keeps what is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.command import INTERRUPTED, head_of, progress_bar, write, write_csv
from benchmarks.coverage import models
from benchmarks.runner import ROOT, interrupts

SECONDS = 120.0
START_SECONDS = 600.0
"""For the import of a library, which takes most of a minute where the machine is busy."""
NAME = "coverage"
JUDGING = [sys.executable, "-m", "benchmarks.coverage.judging"]


class Judge:
    """A process that judges models, started anew after one that ended or was too slow."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None
        self.library = ""
        self.answers: queue.Queue[str] = queue.Queue()

    def row(self, each: models.Class) -> dict[str, Any]:
        """The row of a class."""
        library = each.name.partition("/")[0]
        if library != self.library:
            self.close()
        answer = reason = ""
        try:
            process = self.process or self._started(library)
            assert process.stdin is not None
            process.stdin.write(f"{each.name}\n")
            process.stdin.flush()
            answer = self.answers.get(timeout=self.seconds)
            reason = f"its process ended with status {process.wait()}" if not answer else ""
        except queue.Empty:
            reason = f"it took more than {self.seconds:g} seconds"
        except BrokenPipeError:
            reason = "its process ended"
        if answer:
            return json.loads(answer)
        self.close()
        return {"name": each.name, "class": each.cls, "status": "failed", "reason": reason}

    def _started(self, library: str) -> subprocess.Popen[str]:
        # One thread, and kernels chosen by rule: what is counted must not hang on what was faster just now.
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "FASTVIT_AUTOTUNE": "0", "PYTHONWARNINGS": "ignore"}
        self.process = process = subprocess.Popen(
            [*JUDGING, library],
            cwd=ROOT,
            env=settings,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.answers = answers = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()
        self.library = library
        answers.get(timeout=START_SECONDS)
        return process

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def judge_all(
    rows: Sequence[models.Class], options: argparse.Namespace, console: Console, finished: Callable[[list[Any]], None]
) -> list[Any]:
    """Rows in the order of the classes, without those that Ctrl-C left out; ``finished`` is told of all there are."""
    waiting: queue.SimpleQueue[tuple[int, models.Class]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    for place in enumerate(rows):
        waiting.put(place)
    judges = [Judge(options.timeout) for _ in range(options.jobs)]

    def work(judge: Judge) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                place, each = waiting.get_nowait()
                done.put((place, judge.row(each)))

    found: dict[int, dict[str, Any]] = {}
    bar = progress_bar(console)
    task = bar.add_task("starting", total=len(rows))
    try:
        with bar, interrupts():
            for judge in judges:
                threading.Thread(target=work, args=(judge,), daemon=True).start()
            while len(found) < len(rows):
                place, row = done.get()
                found[place] = row
                finished([found[place] for place in sorted(found)])
                bar.update(task, advance=1, description=f"{row['name']}: {row['status']}")
                bar.refresh()
    except KeyboardInterrupt:
        console.print("[yellow]interrupted: what was judged is kept[/]")
    finally:
        with contextlib.suppress(queue.Empty):  # so that no thread starts another
            while True:
                waiting.get_nowait()
        for judge in judges:
            judge.close()
    return [found[place] for place in sorted(found)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options; argparse reports an error and exits with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--library", nargs="+", choices=models.LIBRARIES, default=list(models.LIBRARIES), help="all by default")
    add("--only", nargs="+", metavar="TEXT", help="classes whose row's name contains one of these")
    add("--jobs", type=int, default=1, help="processes at once, of one thread each (default 1)")
    add("--timeout", type=float, default=SECONDS, metavar="SECONDS", help=f"for a class (default {SECONDS:g})")
    add("--json", type=Path, metavar="FILE", help=f"all rows; default benchmarks/out/{NAME}.json")
    add("--resume", action="store_true", help="keep the rows that are in that file, but for failed and wrong ones")
    add("--csv", type=Path, metavar="FILE", help="the same")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected a positive number, got {options.jobs}")
    if not options.timeout > 0.0:
        parser.error(f"--timeout: expected a positive number, got {options.timeout}")
    for option in ("json", "csv"):
        path = getattr(options, option)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"--{option}: there is no folder {path.absolute().parent}")
    options.rows = []
    for library in options.library:
        try:
            options.rows += models.classes(library)
        except ImportError as error:
            parser.error(f"--library: {library} cannot be imported: {error}")
    chosen = models.selected(options.rows, options.only)
    for text in options.only or ():
        if not models.selected(chosen, [text]):
            parser.error(f"--only: no row of {', '.join(options.library)} has {text!r} in its name")
    options.chosen = chosen
    return options


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """Those of an earlier run, if there was one."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge; the exit status is 0, 1 if a patched model was wrong or failed, 130 after Ctrl-C."""
    options = parse(arguments)
    console = report.console_of_a_command()
    head = head_of(NAME, arguments)
    out = options.json or ROOT / "benchmarks" / "out" / f"{NAME}.json"
    names = [each.name for each in options.rows]
    before = {row["name"]: row for row in (_rows_of(out) if options.resume else ())}
    head["asked"] = Counter(name.partition("/")[0] for name in names)

    def together(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        known = {**before, **{row["name"]: row for row in rows}}
        return [known[name] for name in dict.fromkeys([*names, *known]) if name in known]

    def finished(rows: Sequence[dict[str, Any]]) -> None:
        write(out, {**head, "complete": False}, together(rows))

    done = {name for name, row in before.items() if row["status"] not in ("failed", "wrong")}
    missing = [each for each in options.chosen if each.name not in done]
    found = judge_all(missing, options, console, finished)
    rows = together(found)
    head["complete"] = len(rows) >= len(names) and set(options.library) == set(models.LIBRARIES)
    write(out, head, rows)
    if options.csv:
        write_csv(options.csv, rows)
    for row in rows:
        if row["status"] in ("wrong", "failed", "partly", "not"):
            console.print(f"{row['name']}: {row['status']}; {row['reason']}", markup=False, soft_wrap=True)
    console.print(report.coverage_table(rows))
    console.print("written:", str(out), soft_wrap=True)
    if len(found) < len(missing):
        return INTERRUPTED
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
