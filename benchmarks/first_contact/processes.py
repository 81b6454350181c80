"""A step's items in processes of their own: a crash, a hang or a poisoned GPU costs one item, or one candidate of it.

A process runs the items of a step one after the other and tells of everything at once, a JSON object a line on a pipe
of its own, whatever it and what it starts print. Where it ends, or an item takes too long, the item in hand is written
down as failed and another process goes on with those that are left. An item that had told which candidate it was at is
tried again without that candidate.

Neither this module nor the command imports torch, so that a broken installation is a row, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[dict[str, Any]], None]

LONGEST_LINE = 1 << 22
"""Bytes of a row. What writes more without an end is no row."""
STARTS = 5
"""Processes one after the other that may end without having finished an item."""
GARBAGE = 20
"""Lines that are no messages, after which a process is ended."""


class Options(NamedTuple):
    """What every item is given.

    Attributes:
        out: the folder of results. device: "cuda", or "cpu" to try the command itself. small: small shapes.
        seconds: the item has at most.
        without: candidates that ended a process before.
    """

    out: str
    device: str
    small: bool
    seconds: float = 0.0
    without: tuple[str, ...] = ()


class Tell(Protocol):
    """What an item tells: ``at`` the name of the candidate that comes next, ``rows`` the pipe for those it starts."""

    rows: int

    def at(self, candidate: str) -> None: ...


Items = Callable[[Options], Sequence[str]]
Run = Callable[[str, Options, Tell], Iterator[dict[str, Any]]]


class Step(NamedTuple):
    """A step: ``run(item, options, tell)`` of the module yields the rows of an item, ``items(options)`` lists them.

    Attributes:
        module: where ``<name>_items`` and ``<name>`` stand, which only the step's processes import.
        weight: its share of the time that is left is this among its own and those of the steps behind it.
        item_seconds: the most that an item may take, starting a process included.
    """

    name: str
    module: str
    weight: float
    item_seconds: float = float("inf")


# --- The command's side ---------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """What is known of a step's items."""

    todo: list[str] | None = None
    item: str | None = None
    at: str = ""
    finished: int = 0
    without: dict[str, list[str]] = field(default_factory=dict)


def run_step(step: Step, options: Options, seconds: float, write: Write, log: IO[bytes]) -> None:
    """Run a step's items for at most so many seconds; every row, failures among them, goes to ``write``."""
    until = time.monotonic() + seconds
    known, starts = _Progress(), 0
    while known.todo is None or known.todo:
        before = known.finished
        known.item, known.at = None, ""
        failure = _process(step, options, until, known, write, log)
        starts = 0 if known.finished > before else starts + 1
        if failure:
            write({"item": known.item, "at": known.at, "failed": failure})
        if known.todo is None:
            return  # it ended before it knew its items
        if failure and known.item is not None:
            refused = known.without.setdefault(known.item, [])
            if known.at and known.at not in refused:
                refused.append(known.at)
            else:
                known.todo.remove(known.item)
        if known.todo and (time.monotonic() >= until or starts >= STARTS):
            write({"not_reached": known.todo})
            return


def _process(step: Step, options: Options, until: float, known: _Progress, write: Write, log: IO[bytes]) -> str:
    """Run items in one process until it has ended; why it did too early, or ""."""
    receiving, sending = os.pipe()
    task = {
        "module": step.module,
        "name": step.name,
        "options": options._asdict(),
        "todo": known.todo,
        "without": known.without,
        "until": until,
        "item_seconds": step.item_seconds,
    }
    start = log.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.first_contact.processes", str(sending), json.dumps(task)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(sending,),
        start_new_session=True,
    )
    os.close(sending)
    began = time.monotonic()
    garbage = 0
    lines = _Lines(receiving, process, min(until, began + step.item_seconds))
    try:
        for line in lines:
            message = _parsed(line)
            if message is None:
                garbage += 1
                write({"item": known.item, "failed": f"no row: {line[:200].decode(errors='replace')}"})
                if garbage == GARBAGE:
                    return "it writes no rows"
                continue
            if "item" in message or "end" in message:
                lines.limit = min(until, time.monotonic() + step.item_seconds)
            known.todo = message.get("items", known.todo)
            known.item, known.at = message.get("item", known.item), message.get("at", known.at)
            if "row" in message:
                write({"item": known.item, **message["row"]})
            if "end" in message:
                known.finished += 1
                if known.todo is not None and message["end"] in known.todo:
                    known.todo.remove(message["end"])
                known.item, known.at = None, ""
            if known.todo == []:
                return ""  # what it does at its end may hang, and is not waited for
    except TimeoutError:
        return f"stopped after {time.monotonic() - began:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
        process.wait()
        os.close(receiving)
    return _end(process.returncode, log, start)


class _Lines:
    """The lines of a pipe until its process has ended and it is empty.

    TimeoutError where ``limit``, a time of ``time.monotonic`` that may be changed, passes before.
    """

    def __init__(self, pipe: int, process: subprocess.Popen, limit: float) -> None:
        self.pipe, self.process, self.limit = pipe, process, limit

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.pipe, selectors.EVENT_READ)
            while True:
                ended = self.process.poll() is not None  # asked first: what it wrote before is in the pipe by then
                left = self.limit - time.monotonic()
                if left <= 0 and not ended:
                    raise TimeoutError
                if selector.select(0.0 if ended else min(0.2, left)):
                    piece = os.read(self.pipe, 1 << 16)
                    if not piece:
                        break
                    *lines, rest = (rest + piece).split(b"\n")
                    yield from lines
                    rest = b"" if len(rest) > LONGEST_LINE else rest
                elif ended:
                    break
        if rest:
            yield rest


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A message; None if it is none."""
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict) and isinstance(message.get("row", {}), dict):
            return message
    return None


def _end(status: int, log: IO[bytes], start: int) -> str:
    """How a process ended, with the last thing that it printed."""
    try:
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    except ValueError:
        how = f"ended by signal {-status}"
    log.seek(start)
    printed = log.read()[-4000:].decode(errors="replace").strip().splitlines()
    return f"its process {how}: {printed[-1][:300]}" if printed else f"its process {how}"


# --- The process's side ---------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def stream(command: Sequence[str], seconds: float, tell: Tell, environment: Mapping[str, str] = {}) -> tuple[int, str]:
    """Run a command that may send rows itself, to the pipe named by FASTVIT_CONTACT_ROWS; its status and output.

    The status is -1 where it did not end in time; what it had printed by then is given, too.
    """
    # Else a pytest within a worker of another takes itself for one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, "FASTVIT_CONTACT_ROWS": str(tell.rows), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(tell.rows,),
            preexec_fn=die_with_parent,
        ) as process:
            try:
                status = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                status = -1
        output.seek(0)
        text = output.read().decode(errors="replace")
    sys.stdout.write(text[-20000:])  # into the log
    sys.stdout.flush()
    return status, text


class _Pipe:
    """Tells the command, in lines of one write each, since pytest's plugin may write to the same pipe."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def send(self, **message: Any) -> None:
        send(self.rows, message)

    def at(self, candidate: str) -> None:
        self.send(at=candidate)


def send(pipe: int, message: Mapping[str, Any]) -> None:
    """Write one line."""
    line = memoryview(json.dumps(message, default=str).encode() + b"\n")
    while line:
        line = line[os.write(pipe, line) :]


def main(arguments: Sequence[str]) -> None:
    """Run the items of a task, as :func:`_process` starts it."""
    die_with_parent()
    pipe, task = _Pipe(int(arguments[0])), json.loads(arguments[1])
    module = importlib.import_module(task["module"])
    run: Run = getattr(module, task["name"])
    todo = task["todo"]
    options = Options(**task["options"])
    if todo is None:
        todo = list(getattr(module, f"{task['name']}_items")(options))
        pipe.send(items=todo)
    for item in todo:
        left = min(task["until"] - time.monotonic(), task["item_seconds"])
        given = options._replace(seconds=left, without=tuple(task["without"].get(item, ())))
        pipe.send(item=item)
        try:
            for row in run(item, given, pipe):
                pipe.send(row=row)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            pipe.send(row={"failed": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]})
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises what an illegal access left: this process can do nothing more
        pipe.send(end=item)


if __name__ == "__main__":
    main(sys.argv[1:])
