"""Cases in processes of their own: one that dies is a finding, and the cases behind it go on in the next."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.fuzz.cases import draw
from tests.fuzz.judge import Finding, judge
from tests.helpers import HANG_GUARD
from tests.standalone.program import TARGETS, Program

Task = tuple[str, int]
"""An operator and a seed."""

MEMORY = 16 << 30
"""Address space of a worker in bytes: what asks for far more is refused instead of filling the machine."""


def supported_isas() -> list[str]:
    """The instruction sets that this CPU has; one entry that changes nothing where there is no extension.

    A name of TARGETS that is none of them stands for a program that computes in place of the extension.
    """
    from fastvit import backends

    if backends.cpp_reasons():
        return ["none"]
    from fastvit import _C

    return list(_C.cpu_info()["supported"])


def _work(tasks: Sequence[Task], isa: str, results: Connection, trace: str) -> None:
    """Sends each task as it begins, then its finding or None."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(trace).open("w") as file:
        faulthandler.enable(file)
        with contextlib.ExitStack() as stack:
            if isa in TARGETS and isa not in supported_isas():
                stack.enter_context(Program(isa).in_place_of_the_extension())
            elif isa != "none":
                from fastvit import _C

                _C._set_cpu_capability(isa)
            for op, seed in tasks:
                results.send((op, seed))
                results.send(judge(op, seed, isa))


class _Worker:
    """A process, the tasks it has left, and the one it is at."""

    def __init__(self, tasks: Sequence[Task], isa: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._inductor", "tests.fuzz.judge"])
        self.tasks, self.isa, self.since = list(tasks), isa, time.monotonic()
        self.trace = tempfile.NamedTemporaryFile(suffix=".trace")  # noqa: SIM115
        self.results, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(self.tasks, isa, sender, self.trace.name), daemon=True)
        self.process.start()
        sender.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.results.close()
        self.trace.close()

    def death(self, kind: str) -> Finding:
        """Of the task that it was at."""
        self.process.join()
        op, seed = self.tasks[0]
        code = self.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        frames = Path(self.trace.name).read_text().splitlines()
        own = [line.strip() for line in frames if "fastvit/" in line or "tests/fuzz/judge" in line][:3]
        case = draw(op, seed)
        return Finding(op, seed, self.isa, kind, f"{name} {' < '.join(own)}", str(case), case.size)


def hunt(
    tasks: Sequence[Task], isa: str, jobs: int = 1, on_finding: Callable[[Finding], None] | None = None
) -> Iterator[Finding | None]:
    """The finding of every task, or None, as they come."""
    workers = [_Worker(tasks[job::jobs], isa) for job in range(jobs) if tasks[job::jobs]]
    try:
        while workers:
            ready = wait([worker.results for worker in workers], timeout=1.0)
            for worker in list(workers):
                finding: Finding | None = None
                if worker.results in ready:
                    try:
                        message = worker.results.recv()
                    except (EOFError, ConnectionResetError):
                        finding = worker.death("crash")
                    else:
                        worker.since = time.monotonic()
                        if isinstance(message, tuple) and not isinstance(message, Finding):
                            continue
                        finding = message
                        worker.tasks.pop(0)
                        yield finding
                        if not worker.tasks:
                            workers.remove(worker)
                            worker.stop()
                        continue
                elif time.monotonic() - worker.since > HANG_GUARD:
                    worker.process.kill()
                    finding = worker.death("hang")
                else:
                    continue
                yield finding
                workers.remove(worker)
                worker.stop()
                if worker.tasks[1:]:
                    workers.append(_Worker(worker.tasks[1:], isa))
    finally:
        for worker in workers:
            worker.stop()
