"""The runner: what becomes of contenders that are absent, crash, are wrong or are interrupted, and what rows say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import runner
from benchmarks.runner import Failed, Race, Settings, Slot, Usage, Worker, others_share, ratio, spread, undisturbed
from benchmarks.worker import Case, Passes, _pooled
from tests.benchmarks import fakes
from tests.helpers import HANG_GUARD

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the runner reads /proc")

SUITE = "tests.benchmarks.fakes"
STUB = str(Path(__file__).with_name("stub.py"))
FEW = Settings(rounds=3, slot_seconds=0.005, prepare_seconds=HANG_GUARD, tolerated=100.0)


def race(*providers: str, settings: Settings = FEW, kind: type[Race] = Race, mode: str = "fwd") -> Race:
    """A race whose contenders are real processes, of the suite in ``fakes``."""
    absent = {"missing": "no such package"}
    case = Case(SUITE, "tiny", mode, batch=2, threads=1)
    return kind(case, {name: absent.get(name) for name in providers}, settings)


def stubs(*providers: str, settings: Settings = FEW, kind: type[Race] = Race) -> Race:
    """A race whose processes are those of ``stub``."""
    names = {*providers, "reference"}
    return kind(Case(SUITE, "tiny"), dict.fromkeys(providers), settings, pythons=dict.fromkeys(names, STUB))


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch) -> Path:
    """The folder in which stubs leave their process ids."""
    monkeypatch.setenv("FASTVIT_STUB", str(tmp_path))
    return tmp_path


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def finished() -> dict[str, dict]:
    """The rows of a race with contenders of all kinds."""
    ran = race("eager", "fast", "missing", "absent", "broken", "wrong", "floor")
    ran.run()
    return {row["provider"]: row for row in ran.rows()}


@pytest.mark.parametrize(
    ("provider", "status", "reason"),
    [
        ("missing", "absent", "no such package"),
        ("absent", "absent", "it is not there"),
        ("broken", "failed", "RuntimeError: cannot be built"),
        ("wrong", "inaccurate", "less accurate than the rule allows"),
    ],
)
def test_who_cannot_take_part_is_listed_with_the_reason_and_without_a_time(finished, provider, status, reason):
    row = finished[provider]
    assert (row["status"], row["reason"]) == (status, reason)
    assert "ms" not in row


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("killed", "its process ended by SIGKILL"),
        ("exits", "its process ended with status 3: goodbye"),
        ("exits later", "its process ended with status 3: goodbye"),
        ("hangs", "prepare took more than 1 s"),
    ],
)
def test_a_contender_that_ends_or_hangs_is_dropped_alone(provider, reason):
    class Impatient(Race):
        """With the one that hangs alone: what the others take depends on the machine."""

        def _judge(self, entry, keep, **arguments):
            self.settings = replace(FEW, prepare_seconds=1.0 if entry.provider == "hangs" else HANG_GUARD)
            super()._judge(entry, keep, **arguments)

    ran = stubs("eager", provider, kind=Impatient)
    ran.run()
    eager, other = ran.rows()
    assert (eager["status"], len(eager["slots"])) == ("measured", 3)
    assert (other["status"], other["reason"]) == ("failed", reason)


def test_the_others_are_measured_nevertheless(finished):
    for name in ("eager", "fast", "floor"):
        row = finished[name]
        assert row["status"] == "measured"
        assert [slot[0] for slot in row["slots"]] == [0, 1, 2]
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["share"] > 0
        assert row["peak_mib"] > 1
        assert row["prepare_s"] > 0
    assert finished["eager"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(finished)


def test_a_contender_is_judged_before_it_is_timed(finished):
    assert finished["fast"]["error"] <= 2 * finished["fast"]["plain_error"]
    assert finished["wrong"]["error"] > 1e-4
    assert "error" not in finished["floor"]


def test_training_is_judged_by_its_gradients_as_well():
    ran = race("eager", "wrong gradient", mode="bwd")
    ran.run()
    assert [row["status"] for row in ran.rows()] == ["measured", "inaccurate"]


def test_a_gradient_that_is_zero_but_for_rounding_hides_no_error_of_another():
    exact = [torch.randn(64, dtype=torch.float64), 1e-17 * torch.randn(8, dtype=torch.float64)]
    plain = [exact[0].float(), exact[1].float() + 1e-9 * torch.randn(8)]
    ours = [exact[0].float(), exact[1].float() + 1e-9 * torch.randn(8)]
    assert _pooled(ours, [plain], exact, None).is_accurate
    assert _pooled(ours, [plain], exact, None).fused < 1e-6
    assert not _pooled([ours[0] + 1e-4, ours[1]], [plain], exact, None).is_accurate
    assert not _pooled([ours[0], ours[1] + 1e-4], [plain], exact, None).is_accurate


def test_results_of_a_training_step_are_outputs_and_the_gradients_of_inputs_and_parameters():
    case = Case(SUITE, "tiny", "fwd_bwd", batch=2)
    workload = fakes.open_case(case)
    workload.load(workload.state())
    out, gradients = Passes(workload.form("fast", ()), case, workload.input_gradients).results(workload.inputs(0))
    assert [tuple(each.shape) for each in out] == [(2, 8)]
    assert [tuple(each.shape) for each in gradients] == [(2, 8), (8, 8)]
    assert all(each.dtype == torch.float32 for each in gradients)


def test_all_but_the_one_that_is_timed_are_stopped():
    seen = []

    class Watched(Race):
        def _timed(self, worker, calls, number):
            workers = [*(entry.worker for entry in self.live()), self.reference]
            seen.append([state_of(each.process.pid) for each in workers])
            slot = super()._timed(worker, calls, number)
            seen.append([state_of(each.process.pid) for each in workers])
            return slot

    stubs("eager", "fast", kind=Watched).run()
    assert len(seen) == 12
    assert {state for states in seen for state in states} == {"T"}


def test_what_was_measured_before_ctrl_c_is_kept_and_no_process_is_left(notes):
    class Interrupted(Race):
        def _round(self, number):
            if number == 2:
                raise KeyboardInterrupt
            super()._round(number)

    ran = stubs("eager", "fast", kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran.run()
    rows = ran.rows()
    assert [len(row["slots"]) for row in rows] == [2, 2]
    assert all(row["ms"]["median"] > 0 for row in rows)
    pids = [path.name for path in notes.iterdir()]
    assert len(pids) == 3
    assert not any(Path("/proc", pid).exists() for pid in pids)


def test_a_stopped_contender_does_not_outlive_a_killed_runner(tmp_path):
    code = (
        "from benchmarks.runner import Worker; import sys, time; w = Worker(sys.executable, {});"
        "w.ask('rates', 3600); w.pause(); print(w.process.pid, flush=True); time.sleep(600)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=runner.ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    with killed.stdout:
        pid = int(killed.stdout.readline())
        killed.kill()
        killed.wait()
    for _ in range(36_000):
        if not Path("/proc", str(pid)).exists() or state_of(pid) == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_after_the_time_limit_the_rest_is_skipped():
    ran = stubs("eager", "fast", settings=Settings(deadline=time.monotonic() - 1))
    ran.run()
    assert {row["status"] for row in ran.rows()} == {"skipped"}


def test_where_time_is_short_some_is_left_for_timing_and_ours_comes_first():
    class Late(Race):
        """When the one that hangs is prepared, the time for preparing is over in a second."""

        def _judge(self, entry, keep, **arguments):
            if entry.provider == "hangs":
                self.settings = replace(self.settings, deadline=time.monotonic() + keep + 1.0)
            super()._judge(entry, keep, **arguments)

    settings = Settings(rounds=2, tolerated=100.0, deadline=time.monotonic() + HANG_GUARD)
    ran = stubs("other", "hangs", "eager", "fastvit", settings=settings, kind=Late)
    ran.run()
    rows = {row["provider"]: row for row in ran.rows()}
    assert (rows["hangs"]["status"], rows["hangs"]["reason"]) == ("skipped", "the time limit was reached")
    assert [len(rows[name].get("slots", ())) for name in ("eager", "fastvit")] == [2, 2]


def fake_slots(monkeypatch, ran: Race, others: list[float]) -> None:
    """Slots that take 1 ms, during which others use these shares of the CPUs, one after another."""
    shares = iter(others)
    monkeypatch.setattr(ran, "_timed", lambda worker, calls, number: Slot(number, 1.0, next(shares)))
    for entry in ran.entries:
        entry.worker = type("Stub", (), {"peak_mib": lambda self: 1.0})()


def test_a_disturbed_slot_is_measured_again(monkeypatch):
    ran = stubs("eager", settings=Settings(rounds=3))
    fake_slots(monkeypatch, ran, [0.5, 0.01, 0.02, 0.9, 0.8, 0.7])
    for number in range(3):
        ran._slot(ran.entries[0], number)
    assert [slot.others for slot in ran.entries[0].slots] == [0.01, 0.02, 0.7]
    row = ran.rows()[0]
    assert row["disturbed"] == pytest.approx(1 / 3)


def test_where_it_never_gets_quiet_trying_again_ends(monkeypatch):
    ran = stubs("eager", settings=Settings(rounds=10))
    fake_slots(monkeypatch, ran, [0.5] * 20)
    for number in range(10):
        ran._slot(ran.entries[0], number)
    assert len(ran.entries[0].slots) == 10
    assert ran.retries == 10
    assert ran.rows()[0]["disturbed"] == 1.0


def test_disturbed_slots_do_not_count_while_enough_others_do():
    slots = [Slot(0, 1.0, 0.0), Slot(1, 1.1, 0.01), Slot(2, 9.0, 0.9), Slot(3, 1.2, 0.0)]
    assert [slot.ms for slot in undisturbed(slots, 0.05)] == [1.0, 1.1, 1.2]
    assert undisturbed(slots[1:3], 0.05) == slots[1:3]


def test_ratios_are_paired_by_round_and_have_an_interval():
    baseline = [Slot(i, 10.0 * (1 + i % 2), 0.0) for i in range(20)]  # a machine of two speeds
    ours = [Slot(i, 5.0 * (1 + i % 2), 0.0) for i in range(1, 20)]
    assert ratio(baseline, ours, 0.05) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ratio(baseline, [], 0.05) is None
    uneven = ratio(baseline, [Slot(i, 5.0 + i % 3, 0.0) for i in range(20)], 0.05)
    assert uneven is not None
    assert uneven["low"] < uneven["median"] < uneven["high"]


def test_spread_is_median_and_quartiles():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_what_others_used_is_all_that_was_used_less_the_contenders_own():
    before, after = Usage(100.0, 10.0), Usage(103.0, 12.0)
    assert others_share(before, after, 2.0, 2) == pytest.approx(0.25)
    assert others_share(before, Usage(102.01, 12.0), 2.0, 2) == 0.0  # a tick of the clock
    assert others_share(None, after, 2.0, 2) == 0.0


def test_usage_is_read_from_proc(tmp_path, monkeypatch):
    tick = os.sysconf("SC_CLK_TCK")
    (tmp_path / "7").mkdir()
    (tmp_path / "stat").write_text("cpu  100 10 20 900 30 4 5 1 0 0\ncpu0 1 1 1 1\n")
    (tmp_path / "7" / "stat").write_text("7 (a b) c) S 1 7 7 0 -1 0 0 0 0 0 40 2 0 0\n")
    monkeypatch.setattr(runner, "PROC", tmp_path)
    assert Usage.now(7) == Usage(140 / tick, 42 / tick)
    assert Usage.now(8) is None


def test_an_allocator_is_given_by_the_environment():
    assert runner.environment_of("default") == {}
    assert runner.environment_of("raised")["MALLOC_TRIM_THRESHOLD_"] == str(2**31 - 1)
    assert runner.environment_of("/lib/libjemalloc.so") == {"LD_PRELOAD": "/lib/libjemalloc.so"}


def test_the_allocators_variables_reach_the_contenders_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    for allocator, expected in (("default", None), ("raised", "0")):
        worker = Worker(STUB, runner.environment_of(allocator))
        try:
            worker.ask("rates", HANG_GUARD)  # it runs its program by then
            variables = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
        finally:
            worker.close()
        found = [each.partition(b"=")[2].decode() for each in variables if each.startswith(b"MALLOC_MMAP_MAX_=")]
        assert found == ([] if expected is None else [expected])


def test_a_process_that_cannot_start_says_why():
    worker = Worker(sys.executable, {"PYTHONHOME": "/nowhere"})
    try:
        with pytest.raises(Failed, match="its process ended with status 1: "):
            worker.ask("rates", HANG_GUARD)
    finally:
        worker.close()


def test_rates_of_the_machine_are_measured_by_the_reference():
    worker = Worker(sys.executable, {})
    try:
        assert "failed" in worker.ask("rates", HANG_GUARD)  # before a case is there
        case = {**runner.as_json(Case(SUITE, "tiny")), "dtype": "float32"}
        answer = worker.ask("reference", HANG_GUARD, case=case, path=os.devnull)
        assert answer["flops"] == 2 * 8 * 8
        rates = worker.ask("rates", HANG_GUARD)
    finally:
        worker.close()
    assert rates["product"] > 1e8
    assert rates["copy"] > 1e7


def test_terminating_is_an_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runner.interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
