"""The first contact with a GPU, whose steps are stand-ins that fail in every way: the rest still arrives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.first_contact import tools
from benchmarks.first_contact.__main__ import PARTS, main
from benchmarks.first_contact.processes import ROOT, Options
from benchmarks.first_contact.summary import brief, read, summarise
from benchmarks.gpu_goals import GOALS
from tests.benchmarks.contact_steps import HANGS_IN, dying_items, mixed_items, step
from tests.helpers import HANG_GUARD

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the GPUs' processes are ended as on Linux")


@contextlib.contextmanager
def restored() -> Iterator[pytest.MonkeyPatch]:
    """What the command sets for its processes does not reach other tests."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FASTVIT_UNPROVEN", "FASTVIT_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            patch.setenv(name, "")
        patch.setenv("PYTHONUNBUFFERED", "1")
        yield patch
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def environment():
    with restored():
        yield


def run(tmp_path, *steps, seconds: float = 600.0) -> tuple[int, list[dict], str]:
    """Exit status, rows and summary of a run with these steps."""
    arguments = ["--out", str(tmp_path), "--seconds", str(seconds), "--device", "cpu"]
    status = main(arguments, {"one": steps}, tmp_path / "caches")
    return status, read(tmp_path / "part-one.jsonl"), (tmp_path / "part-one.txt").read_text()


class Clock:
    """Goes on by a hang guard at each look while an item hangs: a slow machine is not taken for one that does."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.ahead = folder, 0.0
        folder.mkdir()
        patch.setenv(HANGS_IN, str(folder))
        patch.setattr("benchmarks.first_contact.processes.time", self)

    def monotonic(self) -> float:
        self.ahead += HANG_GUARD * sum(is_alive(int(path.name)) for path in self.folder.iterdir())
        return time.monotonic() + self.ahead


LONG = 100.0 * HANG_GUARD


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[int, list[dict], str]:
    folder = tmp_path_factory.mktemp("mixed")
    with restored() as patch:
        patch.setattr("benchmarks.first_contact.processes.STARTS", 6)
        Clock(patch, folder / "hangs")
        return run(folder, step("mixed", item_seconds=HANG_GUARD), step("noted"), seconds=LONG)


def of(rows: list[dict], item: str) -> list[dict]:
    """An item's rows without what all have."""
    return [
        {key: value for key, value in row.items() if key not in ("step", "item", "at_second")}
        for row in rows
        if row.get("item") == item and row["step"] == "mixed"
    ]


def test_every_item_that_works_arrives_whatever_the_others_do(mixed):
    status, rows, _ = mixed
    assert status == 1
    for item in set(mixed_items(None)) - {"out of resources", "candidates"}:
        assert {"value": len(item), "without": []} in of(rows, item)
    assert len([row for row in rows if row["step"] == "noted" and "pid" in row]) == 1000
    assert not any("not_reached" in row for row in rows)


@pytest.mark.parametrize(
    ("item", "failure"),
    [
        ("out of resources", "OutOfResources: shared memory, Required: 300000, Hardware limit: 232448"),
        ("raises later", "MemoryError: no message"),
        ("aborts", "its process ended by SIGABRT"),
        ("segfaults", "its process ended by SIGSEGV"),
        ("hangs", "stopped after "),
        ("exits", "its process ended with status 7: goodbye"),
        ("garbage", "no row: "),
    ],
)
def test_a_failure_is_a_row_with_its_reason_and_is_summed_up(mixed, item, failure):
    _, rows, text = mixed
    assert any(row.get("failed", "").startswith(failure) for row in of(rows, item))
    assert f"  mixed {item}: {failure}" in text.partition("\ngoals:")[0]


def test_what_programs_print_is_no_row_and_garbage_is_told(mixed):
    _, rows, _ = mixed
    assert len(of(rows, "prints")) == 1
    told = [row["failed"] for row in of(rows, "garbage") if "failed" in row]
    assert len(told) == 3 and all(text.startswith("no row: ") for text in told)
    assert any(row.get("value") != row.get("value") for row in of(rows, "garbage")), "NaN, and the run went on"


def test_an_item_is_tried_again_without_the_candidates_that_end_its_process(mixed):
    failed = [(row["at"], row["failed"]) for row in of(mixed[1], "candidates") if "failed" in row]
    assert [at for at, _ in failed] == ["bad", "worse"]
    assert all(why.startswith("its process ended with status 3") for _, why in failed)
    tries = [row["without"] for row in of(mixed[1], "candidates") if "without" in row]
    assert tries == [[], ["bad"], ["bad", "worse"]]
    assert of(mixed[1], "candidates")[-1] == {"measured": "all but those that crash"}


def test_a_device_on_which_everything_dies_ends_its_step_alone(tmp_path):
    _, rows, text = run(tmp_path, step("dying"), step("noted"))
    died = [row["item"] for row in rows if row["step"] == "dying" and "failed" in row]
    assert died == dying_items(None)[: len(died)] and len(died) < len(dying_items(None))
    (left,) = [row["not_reached"] for row in rows if "not_reached" in row]
    assert died + left == dying_items(None)
    assert sum(row["step"] == "noted" and "pid" in row for row in rows) == 1000
    assert f"NOT REACHED: dying: {', '.join(left)}" in text


def test_a_process_that_floods_its_pipe_is_ended(tmp_path):
    _, rows, _ = run(tmp_path, step("flooding"))
    assert {"it writes no rows"} <= {row.get("failed") for row in rows}
    assert any(row.get("item") == "after" and row.get("value") == 1 for row in rows)


def test_an_item_that_writes_without_an_end_is_stopped_by_the_clock(tmp_path, monkeypatch):
    Clock(monkeypatch, tmp_path / "hangs")
    _, rows, _ = run(tmp_path, step("busy", item_seconds=HANG_GUARD), seconds=LONG)
    assert any(row.get("item") == "endless" and row.get("failed", "").startswith("stopped after") for row in rows)
    assert any(row.get("item") == "after" and row.get("value") == 2 for row in rows)


def test_a_step_that_cannot_even_list_its_items_is_a_row(tmp_path):
    _, rows, _ = run(tmp_path, step("unlisted"), step("noted"))
    (failed,) = [row["failed"] for row in rows if row["step"] == "unlisted" and "failed" in row]
    assert failed == "its process ended with status 1: RuntimeError: CUDA driver initialization failed"
    assert sum("pid" in row for row in rows) == 1000


def test_steps_for_which_there_is_no_time_are_named(tmp_path):
    status, rows, text = run(tmp_path, step("noted"), step("dying"), seconds=1.0)
    assert status == 0
    assert rows[-1]["not_reached"] == ["noted", "dying"]
    assert "FAILED: nothing" in text


SCRIPT = """
import pathlib, sys
from benchmarks.first_contact.__main__ import main
from tests.benchmarks.contact_steps import step
main(["--out", sys.argv[1], "--seconds", "3600", "--device", "cpu"], {"one": [step("noted"), step("busy")]},
     pathlib.Path(sys.argv[1], "caches"))
"""


def stop(tmp_path, number: int) -> tuple[list[dict], int]:
    """Start a run, end it by a signal once it has written some rows; what lies there, and the lines of the file."""
    path = tmp_path / "part-one.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + HANG_GUARD
    while not path.exists() or path.stat().st_size < 120_000:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=HANG_GUARD)
    return read(path), len(path.read_bytes().splitlines())


def test_a_kill_of_the_whole_run_loses_one_row_at_most_and_leaves_no_process(tmp_path):
    rows, lines = stop(tmp_path, signal.SIGKILL)
    assert lines - len(rows) <= 1
    assert [row["item"] for row in rows if row["step"] == "noted" and "pid" in row] == list(map(str, range(1000)))
    pids = {row["pid"] for row in rows if "pid" in row}
    until = time.monotonic() + HANG_GUARD
    while any(map(is_alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still have an entry that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_is_told_to_end_still_sums_up(tmp_path):
    rows, _ = stop(tmp_path, signal.SIGTERM)
    assert rows[-1]["not_reached"] == ["busy"]
    assert "NOT REACHED: end: busy" in (tmp_path / "part-one.txt").read_text()


# --- The real steps -------------------------------------------------------------------------------------------------


def test_every_step_exists_with_its_items():
    names = [each for steps in PARTS.values() for each in steps]
    assert {each.name for each in names} >= {"device", "extension", "small", "parity", "goals", "counters", "others"}
    options = Options("", "cpu", small=True)
    for each in names:
        module = pytest.importorskip(each.module)
        items = getattr(module, f"{each.name}_items")(options)
        assert items and len(set(items)) == len(items), each.name
        assert callable(getattr(module, each.name))
    measured = pytest.importorskip("benchmarks.first_contact.measured")
    assert {(*item.split()[:2],) for item in measured.goals_items(options)} == {(goal.job, goal.mode) for goal in GOALS}


def test_the_command_itself_imports_no_torch():
    program = "import sys, benchmarks.first_contact.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


class Rows:
    """In the place of the pipe."""

    rows = 2

    def at(self, candidate: str) -> None:
        pass


CPU = Options("", "cpu", small=True, seconds=HANG_GUARD)


def test_a_part_runs_on_a_cpu_with_the_real_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.first_contact.tools.CACHES", tmp_path / "caches")
    steps = {each.name: each for part in PARTS.values() for each in part}
    chosen = [steps[name]._replace(item_seconds=HANG_GUARD) for name in ("device", "memory", "caches")]
    status, rows, text = run(tmp_path, *chosen, seconds=HANG_GUARD)
    assert status == 0, text
    assert any(row.get("device") == "cpu" and "machine" in row for row in rows)
    assert any("copy_terabytes_a_second" in row for row in rows)
    (memory,) = [row for row in rows if "first_loss" in row]
    assert memory["model"] == "deepvit_s"
    assert any("packed" in row for row in rows)
    assert "goals: 0 of" in text
    assert "deepvit_s              2 step" in text
    assert (tmp_path / "caches.tar.gz").exists()


def test_rows_of_the_wrong_kind_cost_their_section_alone(tmp_path):
    rows = [{"step": "goals", "at_second": 1.0, "job": 3, "milliseconds": "no times", "failed": ["x"]}]
    text = summarise([*rows, {"step": "parity", "test": "one", "outcome": "passed"}])
    assert "FAILED: 1" in text and "tests of parity: 1 passed, of 0" in text and "_rows broke off" in text
    assert brief(rows[0]).endswith("FAILED: ['x']")


def test_a_goals_row_is_judged_and_set_beside_its_prediction():
    times = {name: {"median": milliseconds} for name, milliseconds in (("fused", 0.02), ("triton", 0.02))}
    row = {"step": "goals", "job": "vit_b_padding", "mode": "inference", "batch": 64, "dtype": "bfloat16"}
    row |= {
        "milliseconds": {**times, "sdpa": {"median": 0.04}},
        "refused": {},
        "bytes": 1,
        "operations": 1,
        "tuned": False,
    }
    text = summarise([row])
    assert "met    vit_b_padding inference over sdpa: 2.00, at least 1.30" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  vit_b_padding ") and "|" in line]
    predicted, measured = line.split("|")
    assert measured.split() == ["20.0", "none"]
    (row,) = (row for row in tools.predictions() if row["name"] == "vit_b_padding")
    assert predicted.split() == ["vit_b_padding", f"{row['first']:.1f}", f"{row['best']:.1f}"]


CSV = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","whole_rows_kernel","GPU Speed Of Light Throughput","Duration","us","150.2"
"0","1","whole_rows_kernel","Launch Statistics","Registers Per Thread","register/thread","192"
"0","1","whole_rows_kernel","Launch Statistics","","",""
==PROF== Disconnected
"""


@pytest.mark.parametrize(
    ("status", "output", "key", "value"),
    [
        (0, CSV, "counted", {"Duration [us]": "150.2", "Registers Per Thread [register/thread]": "192"}),
        (1, "==ERROR== ERR_NVGPUCTRPERM - no permission", "absent", "profiling is not permitted here"),
        (1, "==ERROR== something else", "failed", "1: ==ERROR== something else"),
    ],
)
def test_counters_are_read_or_their_absence_told(monkeypatch, status, output, key, value):
    monkeypatch.setattr(tools, "stream", lambda *_: (status, output))
    monkeypatch.setattr(tools, "_tool", lambda name: f"/bin/{name}")
    (row,) = tools.counters("deepvit_s", CPU, Rows())
    assert row[key] == value
    assert row["predicted"]["kernel"] == row["kernel"] == "whole_rows_kernel"
    assert "counted" in summarise([{"step": "counters", "item": "deepvit_s", **row}])


def test_rows_that_are_counted_have_predictions():
    for name in tools.COUNTED:
        assert tools.slowest_predicted(name)["microseconds"] > 0


def test_missing_tools_are_told(monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    assert list(tools.sanitizers(next(iter(tools.SANITIZED)), CPU, Rows())) == [
        {"absent": "compute-sanitizer was not found"}
    ]
    assert list(tools.counters("deepvit_s", CPU, Rows())) == [{"absent": "ncu was not found"}]


def test_the_sanitizer_runs_the_extension_and_triton_and_its_finding_fails(monkeypatch):
    commands = []

    def stream(command, seconds, tell, environment):
        commands.append(command)
        assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return 9 if "racecheck" in command else 0, "========= Error: race\n1 passed"

    monkeypatch.setattr(tools, "_tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(tools, "stream", stream)
    found = [row for item in tools.SANITIZED for row in tools.sanitizers(item, CPU, Rows())]
    assert ["failed" in row for row in found] == [False, True, False]
    assert found[1]["errors"] == ["========= Error: race"]
    assert all(command[0] == "/bin/compute-sanitizer" and "-k" in command for command in commands)


def test_an_extension_that_runs_is_not_built_and_one_that_does_not_is(monkeypatch):
    commands, answers = [], iter(["", "built for sm_80", "", "built for sm_80", "still not"])

    def stream(command, seconds, tell, environment=()):
        if "find_spec" in command[-1]:
            return 0, ""
        commands.append((command, environment))
        return 0, (next(answers) if "-c" in command else "compiled")

    monkeypatch.setattr(tools, "stream", stream)
    monkeypatch.setattr(tools, "_capability", lambda: "9.0")
    assert list(tools.extension("build", CPU, Rows())) == [{"extension": "as it is here"}]
    (row,) = tools.extension("build", CPU, Rows())
    assert (row["extension"], row["because"], "failed" in row) == ("built", "built for sm_80", False)
    command, environment = commands[2]
    assert command[1:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
    assert environment["FASTVIT_CUDA_ARCH_LIST"] == "9.0" and environment["MAX_JOBS"]
    (row,) = tools.extension("build", CPU, Rows())
    assert row["failed"] == "still not"


def test_a_checkout_that_was_not_installed_finds_its_kernels(monkeypatch, tmp_path):
    (tmp_path / "fastvit").mkdir()
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(tools, "ROOT", tmp_path)
    monkeypatch.setattr(tools, "stream", lambda command, *_: (int("find_spec" in command[-1]), ""))
    assert next(iter(tools.extension("build", CPU, Rows()))) == {"linked": "fastvit/kernels"}
    assert (tmp_path / "fastvit" / "kernels").resolve() == tmp_path / "kernels"


def test_caches_are_packed_with_what_was_measured_first_and_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "CACHES", tmp_path / "caches")
    monkeypatch.setattr(tools, "MOST_CACHED", 40_000)
    for name, size in (("inductor/a", 30_000), ("fastvit/autotune/b.json", 100), ("triton/c", 30_000)):
        path = tmp_path / "caches" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(size))
    (row,) = tools.caches("pack", CPU._replace(out=str(tmp_path)), Rows())
    with tarfile.open(tmp_path / "caches.tar.gz") as archive:
        assert archive.getnames() == ["fastvit/autotune/b.json", "triton/c"]
    assert (row["packed"], row["left_out"]) == (2, 1)


SUITE = """
import os, time, pytest, torch
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize(("job", "backend"), [("vit_b", "triton")])
def test_right(job, backend): pass
def test_wrong(): assert 1 == 2, "planted"
def test_skipped(): pytest.skip("no reason")
def test_poisons():
    torch.cuda.is_initialized = lambda: True
    def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = synchronize
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): assert not torch.cuda.is_initialized()
def test_aborts(): os.abort()
def test_last(): pass
"""


def run_suite(folder: Path, seconds: float, **patched: object) -> list[dict]:
    """The rows of the parity step."""
    with (folder / "rows").open("w+") as file, pytest.MonkeyPatch.context() as patch:
        tell = Rows()
        tell.rows = file.fileno()
        for name, value in patched.items():
            patch.setattr(tools, name, value)
        ends = list(tools.parity("suite", CPU._replace(seconds=seconds), tell))
        file.seek(0)
        return [json.loads(line)["row"] for line in file] + ends


def planted(folder: Path, source: str, seconds: float = HANG_GUARD) -> list[dict]:
    """The rows of a suite of these tests."""
    path = folder / "test_planted.py"
    path.write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: stands for the real one\n")
    return run_suite(folder, seconds, SUITE=["-c", str(folder / "pytest.ini"), str(path)], WORKERS=1)


def test_the_suite_tells_each_outcome_and_replaces_poisoned_and_dead_workers(tmp_path):
    pytest.importorskip("xdist")
    rows = planted(tmp_path, SUITE)
    assert rows[0] == {"tests": 7, "counts": {"vit_b triton": 1}}
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows if "test" in row}
    assert outcomes == {
        "test_right[vit_b-triton]": "passed",
        "test_wrong": "failed",
        "test_skipped": "skipped",
        "test_poisons": "failed",
        "test_after": "passed",
        "test_aborts": "failed",
        "test_last": "passed",
    }
    (wrong,) = [row["text"] for row in rows if row.get("test", "").endswith("test_wrong")]
    assert "planted" in wrong
    assert rows[-1]["status"] == 1 and "failed" not in rows[-1]


HANGING = """
import time, pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_hangs(): time.sleep(3600)
"""


def test_a_suite_that_is_cut_off_leaves_what_it_had_done(tmp_path, monkeypatch):
    class Impatient(subprocess.Popen):
        """Whose time is up when the first test is told."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and self.poll() is None:
                if "test_right" in (tmp_path / "rows").read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Impatient)
    rows = planted(tmp_path, HANGING)
    assert [row["outcome"] for row in rows if "test" in row] == ["passed"]
    assert rows[-1]["failed"] == "stopped by its time limit"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs the whole suite")
def test_the_parity_suite_is_skipped_without_a_gpu_and_compiles_nothing(tmp_path):
    rows = run_suite(tmp_path, HANG_GUARD, WORKERS=0)
    assert rows[-1]["status"] == 0, rows[-1]
    tests = [row for row in rows if "test" in row]
    assert len(tests) == rows[0]["tests"] > 0
    assert {row["outcome"] for row in tests} == {"skipped"}
    assert not any("compiled" in row["test"] for row in tests)
    assert rows[0]["counts"].keys() >= {"deepvit_s triton", "cpvt_s_peg cuda"}
