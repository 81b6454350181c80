"""Compares contenders on a case: a process each, parity before speed, rounds in random order.

A contender has its memory, its allocator and its threads to itself. While one is timed the others are stopped
(SIGSTOP), since threads that wait for work spin. A slot during which other processes used the CPU is thrown away and
tried again; on a machine that never gets quiet the slot is kept, and marked. Every round also measures what the machine
reaches in a large product and in a copy, so that each row can say its share of the limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.worker import Case, as_json

ROOT = Path(__file__).resolve().parents[1]
PROC = Path("/proc")
BASELINE, OURS = "eager", "fastvit"
PREPARING = 5
"""Steps of the progress bar for preparing one contender; a slot is one."""

RAISED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""glibc keeps what is freed, whereas by default it gives big tensors back to the kernel at every operation."""


@dataclass(frozen=True)
class Settings:
    """How contenders are timed."""

    rounds: int = 15
    slot_seconds: float = 0.3
    prepare_seconds: float = 1200.0
    deadline: float = float("inf")
    """On the clock of :func:`time.monotonic`; what has not been measured by then is skipped."""
    tolerated: float = 0.05
    """Share of the CPUs that other processes may use during a slot."""
    tries: int = 3
    """How often a disturbed slot is measured."""

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())


class Failed(Exception):  # noqa: N818
    """A contender's process ended, or took too long."""


class Usage(NamedTuple):
    """Seconds of CPU time since the machine and the process started."""

    machine: float
    process: float

    @classmethod
    def now(cls, pid: int) -> Usage | None:
        """None where there is no /proc."""
        tick = os.sysconf("SC_CLK_TCK")
        try:
            fields = PROC.joinpath("stat").read_text().split("\n", 1)[0].split()[1:]
            own = PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
        return cls((user + nice + system + irq + softirq + steal) / tick, (int(own[11]) + int(own[12])) / tick)


def others_share(before: Usage | None, after: Usage | None, seconds: float, cpus: int) -> float:
    """The share of the CPUs that all other processes used; less than two ticks of the clock count as nothing."""
    if before is None or after is None or seconds <= 0:
        return 0.0
    others = (after.machine - before.machine) - (after.process - before.process)
    return others / (seconds * cpus) if others > 2 / os.sysconf("SC_CLK_TCK") else 0.0


def environment_of(allocator: str) -> dict[str, str]:
    """The variables that give a process an allocator: "default", "raised", or a library to load first."""
    if allocator == "default":
        return {}
    return dict(RAISED) if allocator == "raised" else {"LD_PRELOAD": allocator}


class Worker:
    """A process of ``benchmarks.worker``, in a process group of its own."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        inherited = {name: value for name, value in os.environ.items() if name not in RAISED}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env={**inherited, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            Failed: there is none within ``seconds``, or the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        until, answer = time.monotonic() + seconds, b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise Failed(f"{do} took more than {seconds:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise Failed(f"its process ended {self._end()}")
            answer += piece
        return json.loads(answer)

    def _end(self) -> str:
        status = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"{how}: {lines[-1][:300]}" if lines else how

    def pause(self) -> None:
        """Stop the process, and wait until it has stopped."""
        self._signal(signal.SIGSTOP)
        until = time.monotonic() + 5.0
        while time.monotonic() < until and not self._has_stopped():
            time.sleep(1e-4)

    def _has_stopped(self) -> bool:
        """Whether it has stopped since this was last asked, or ended, which is left to Popen to see."""
        if not hasattr(os, "waitid"):
            return True
        with contextlib.suppress(ChildProcessError):
            state = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if state is not None and state.si_code == os.CLD_STOPPED:
                os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
            return state is not None
        return True

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def peak_mib(self) -> float | None:
        """The most memory it has had resident since :meth:`forget_peak`."""
        with contextlib.suppress(OSError, StopIteration):
            lines = PROC.joinpath(str(self.process.pid), "status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
        return None

    def forget_peak(self) -> None:
        with contextlib.suppress(OSError):
            PROC.joinpath(str(self.process.pid), "clear_refs").write_text("5")

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                file.close()


class Slot(NamedTuple):
    """Milliseconds of a call in one round, and the share of the CPUs that others had meanwhile."""

    round: int
    ms: float
    others: float


@dataclass
class Entry:
    """A contender of a race, and what was found."""

    provider: str
    python: str = sys.executable
    status: str = "measured"
    reason: str = ""
    worker: Worker | None = None
    calls: int = 1
    slots: list[Slot] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.close()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


class Race:
    """All contenders of one case with one allocator. :meth:`rows` may be asked for at any time, of a part as well."""

    def __init__(
        self,
        case: Case,
        providers: Mapping[str, str | None],
        settings: Settings,
        *,
        baseline: str = BASELINE,
        allocator: str = "default",
        pythons: Mapping[str, str] = {},
        step: Callable[[str, int], None] = lambda what, steps: None,
    ) -> None:
        """``providers`` are the contenders, each with the reason why it is absent, or None.

        ``pythons`` are other interpreters, by provider, or for the "reference"; ``step`` is told what comes next and
        how many steps of :meth:`steps` were made.
        """
        self.case, self.settings, self.baseline, self.allocator = case, settings, baseline, allocator
        self.pythons, self.step = pythons, step
        self.entries = [Entry(name, pythons.get(name, sys.executable)) for name in providers]
        for entry, reason in zip(self.entries, providers.values(), strict=True):
            if reason is not None:
                entry.drop("absent", reason)
        self.reference: Worker | None = None
        self.least: dict[str, float] = {}
        self.rates: list[dict[str, float]] = []
        self.retries = 0
        self.draws = random.Random(0)

    def steps(self) -> int:
        """Steps of the progress bar, the reference's among them."""
        return (PREPARING + self.settings.rounds) * len(self.live()) + PREPARING

    def live(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "measured"]

    def run(self) -> None:
        """Prepare, judge and time every contender. Its processes have ended afterwards, whatever happens."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._prepare(Path(folder))
                for number in range(self.settings.rounds):
                    self._round(number)
        finally:
            for entry in self.entries:
                entry.close()
            if self.reference is not None:
                self.reference.close()

    def _prepare(self, folder: Path) -> None:
        path, case = str(folder / "reference.pt"), as_json(self.case)
        if not self.live() or not self.settings.left():
            return
        # Of what time there is, some is kept for the rounds of those that are ready by then.
        keep = 0.0 if self.settings.deadline == float("inf") else self.settings.left() / 3
        self.reference = Worker(self.pythons.get("reference", sys.executable), environment_of(self.allocator))
        try:
            answer = self.reference.ask("reference", self._limit(keep), case=case, path=path)
            if "failed" in answer:
                raise Failed(answer["failed"])
        except Failed as failure:
            for entry in self.live():
                self._drop(entry, keep, f"no reference: {failure}")
            return
        self.least = answer
        self.reference.pause()
        self.step("", PREPARING)
        first = (self.baseline, OURS)  # where time is short, these two
        for entry in sorted(self.live(), key=lambda entry: entry.provider not in first):
            self.step(f"preparing {entry.provider}", 0)
            if not self._limit(keep):
                self._drop(entry, keep, "")
                continue
            # A cache of its own, so that what compiling takes is seen.
            own = {"TORCHINDUCTOR_CACHE_DIR": str(folder / entry.provider), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            entry.worker = Worker(entry.python, {**environment_of(self.allocator), **own})
            self._judge(entry, keep, case=case, path=path)
            self.step("", PREPARING)

    def _limit(self, keep: float) -> float:
        """The seconds that a preparation may take."""
        return max(0.0, min(self.settings.prepare_seconds, self.settings.left() - keep))

    def _drop(self, entry: Entry, keep: float, reason: str) -> None:
        """Drop a contender, because the time is over if it is."""
        entry.drop(*(("failed", reason) if self._limit(keep) else ("skipped", "the time limit was reached")))

    def _judge(self, entry: Entry, keep: float, **arguments: Any) -> None:
        """Prepare one contender, hold its results to the reference, and see how many calls fill a slot."""
        worker = entry.worker
        assert worker is not None
        try:
            answer = worker.ask("prepare", self._limit(keep), provider=entry.provider, **arguments)
            if answer.keys() & {"absent", "failed"}:
                return entry.drop(*next(iter(answer.items())))
            entry.facts = {"prepare_s": answer["seconds"], "floor": answer["floor"], **answer["notes"]}
            if not answer["floor"]:
                checked = worker.ask("check", self._limit(keep))
                if "failed" in checked:
                    return entry.drop("failed", checked["failed"])
                entry.facts |= {"error": checked["error"], "plain_error": checked["plain_error"]}
                if not checked["accurate"]:
                    return entry.drop("inaccurate", "less accurate than the rule allows")
            worker.forget_peak()
            one = worker.ask("slot", self._limit(keep), calls=2)["seconds"] / 2
            entry.calls = max(1, min(10_000, round(self.settings.slot_seconds / max(one, 1e-7))))
            worker.pause()
        except Failed as failure:
            self._drop(entry, keep, str(failure))
        return None

    def _round(self, number: int) -> None:
        live = self.live()
        self.step(f"round {number + 1} of {self.settings.rounds}", 0)
        for entry in self.draws.sample(live, len(live)):
            if self.settings.left():
                self._slot(entry, number)
            self.step("", 1)
        if self.reference is not None and live and self.settings.left():
            self.reference.resume()
            with contextlib.suppress(Failed):
                answer = self.reference.ask("rates", 60.0)
                if "product" in answer:
                    self.rates.append(answer)
            self.reference.pause()

    def _slot(self, entry: Entry, number: int) -> None:
        """One slot; a disturbed one is tried again, in all as often as there are slots without retries."""
        worker, best = entry.worker, None
        assert worker is not None
        for attempt in range(self.settings.tries):
            try:
                slot = self._timed(worker, entry.calls, number)
            except Failed as failure:
                return entry.drop("failed", str(failure))
            best = slot if best is None or slot.others < best.others else best
            spent = self.retries >= self.settings.rounds * len(self.entries)
            if best.others <= self.settings.tolerated or attempt + 1 == self.settings.tries or spent:
                break
            self.retries += 1
        if best is not None:
            entry.slots.append(best)
        entry.facts["peak_mib"] = worker.peak_mib()
        return None

    def _timed(self, worker: Worker, calls: int, number: int) -> Slot:
        worker.resume()
        before, begin = Usage.now(worker.process.pid), time.perf_counter()
        answer = worker.ask("slot", 600.0, calls=calls)
        after, seconds = Usage.now(worker.process.pid), time.perf_counter() - begin
        worker.pause()
        if "failed" in answer:
            raise Failed(answer["failed"])
        return Slot(number, 1e3 * answer["seconds"] / calls, others_share(before, after, seconds, os.cpu_count() or 1))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each contender."""
        baseline = next((entry.slots for entry in self.entries if entry.provider == self.baseline), [])
        return [self._row(entry, baseline) for entry in self.entries]

    def _row(self, entry: Entry, baseline: Sequence[Slot]) -> dict[str, Any]:
        case = {name: value for name, value in as_json(self.case).items() if name not in ("photos",)}
        row = {**case, "allocator": self.allocator, "provider": entry.provider, "baseline": self.baseline}
        row |= {"status": entry.status, "reason": entry.reason, **entry.facts}
        if entry.status != "measured":
            return row
        if not entry.slots:
            return row | {"status": "skipped", "reason": "the run ended before it was timed"}
        slots = undisturbed(entry.slots, self.settings.tolerated)
        ms = spread([slot.ms for slot in slots])
        row |= {"ms": ms, "disturbed": sum(slot.others > self.settings.tolerated for slot in slots) / len(slots)}
        row |= {"ratio": ratio(baseline, entry.slots, self.settings.tolerated), "slots": [list(s) for s in entry.slots]}
        if self.rates:
            product, copy = (statistics.median(rate[name] for rate in self.rates) for name in ("product", "copy"))
            limit = 1e3 * max(self.least["flops"] / product, self.least["bytes"] / copy)
            row |= {"limit_ms": limit, "share": limit / ms["median"], "gflops": product / 1e9, "copy_gb_s": copy / 1e9}
        return row


def undisturbed(slots: Sequence[Slot], tolerated: float) -> list[Slot]:
    """The slots that count: those that no other process disturbed; if these are fewer than three, all."""
    quiet = [slot for slot in slots if slot.others <= tolerated]
    return quiet if len(quiet) >= min(3, len(slots)) else list(slots)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": median, "low": low, "high": high}


def ratio(baseline: Sequence[Slot], ours: Sequence[Slot], tolerated: float) -> dict[str, float] | None:
    """How many times as fast as the baseline: the median over rounds, and its bootstrap interval (95%).

    Rounds count in which both were measured, undisturbed as in :func:`undisturbed`. None if there are none.
    """
    times = {slot.round: slot for slot in ours}
    pairs = [
        Slot(b.round, b.ms / times[b.round].ms, max(b.others, times[b.round].others))
        for b in baseline
        if b.round in times
    ]
    if not pairs:
        return None
    ratios = np.array([pair.ms for pair in undisturbed(pairs, tolerated)])
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Within it a request to terminate is an interrupt from the keyboard, so that processes are ended and rows kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
