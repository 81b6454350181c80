"""The choice of launch configurations, on a machine that pretends to have a GPU and a stopwatch."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import _tuning as tuning
from triton.runtime.errors import OutOfResources


class Config(NamedTuple):
    block: int
    one_pass: bool = False


CONFIGS = (Config(64), Config(32), Config(16, True))
KEY = (torch.float16, 12, 64, 256)


class Machine:
    """Notes which candidates ran; ``seconds`` is what the stopwatch says by block, ``too_large`` what does not fit."""

    def __init__(self) -> None:
        self.seconds = {64: 3.0, 32: 1.0, 16: 2.0}
        self.too_large: set[int] = set()
        self.device = "GPU 1"
        self.capturing = False
        self.ran: list[Config] = []

    def run(self, config: Config) -> None:
        self.ran.append(config)
        if config.block in self.too_large:
            raise OutOfResources(1, 0, "shared memory")

    def time(self, calls) -> list[float]:
        return [self.seconds[call.args[0].block] for call in calls]

    def choose(self, key=KEY, configs=CONFIGS, kernel="kernel"):
        return tuning.choose(kernel, key, configs, self.run)

    def forget(self) -> None:
        """As a new process would."""
        tuning._chosen.clear()
        self.ran.clear()


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    machine = Machine()
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_has_device", lambda: True)
    monkeypatch.setattr(tuning, "_device_index", lambda: 0)
    monkeypatch.setattr(tuning, "_device_name", lambda: machine.device)
    monkeypatch.setattr(tuning, "_capturing", lambda: machine.capturing)
    monkeypatch.setattr(tuning, "_time", machine.time)
    return machine


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*"))


def test_fastest_is_chosen_measured_once_and_kept_on_disk(machine, tmp_path):
    assert machine.choose() == Config(32)
    assert machine.ran == list(CONFIGS)
    assert machine.choose() == Config(32)
    assert len(machine.ran) == 3
    assert [path.suffix for path in files(tmp_path)] == ["", ".json"]
    machine.forget()
    machine.seconds[32] = 9.0
    assert machine.choose() == Config(32), "the file says so"
    assert machine.ran == []


@pytest.mark.parametrize("change", ["dtype", "heads", "kernel", "device", "triton"])
def test_other_keys_are_measured_on_their_own(machine, change, monkeypatch):
    machine.choose()
    machine.forget()
    machine.seconds[16] = 0.5
    if change == "device":
        machine.device = "GPU 2"
    elif change == "triton":
        monkeypatch.setattr(tuning.triton, "__version__", "0.0")
    key = {"dtype": (torch.bfloat16, *KEY[1:]), "heads": (KEY[0], 6, *KEY[2:])}.get(change, KEY)
    assert machine.choose(key, kernel="other" if change == "kernel" else "kernel") == Config(16, True)


def test_pinned_deterministic_or_traced_calls_take_the_first(machine, monkeypatch, tmp_path):
    assert machine.choose() == Config(32)
    machine.ran.clear()
    monkeypatch.setattr(tuning, "ENABLED", False)
    assert machine.choose() == Config(64)
    monkeypatch.setattr(tuning, "ENABLED", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert machine.choose() == Config(64)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert machine.choose() == Config(64)
    assert machine.ran == []


def test_nothing_is_measured_while_a_graph_is_captured(machine, tmp_path):
    machine.capturing = True
    assert machine.choose() == Config(64)
    assert machine.ran == []
    assert files(tmp_path) == []
    machine.capturing = False
    assert machine.choose() == Config(32), "the capture has decided nothing for later"
    machine.capturing = True
    assert machine.choose() == Config(32), "what is known is used in a capture, too"
    machine.forget()
    assert machine.choose() == Config(32), "from the disk likewise"


def test_without_a_gpu_the_first_is_taken(machine, monkeypatch):
    monkeypatch.setattr(tuning, "_has_device", lambda: False)
    assert machine.choose() == Config(64)
    assert machine.ran == []


def test_one_candidate_is_not_measured(machine):
    assert machine.choose(configs=CONFIGS[2:]) == CONFIGS[2]
    assert machine.ran == []


def test_candidates_that_do_not_fit_are_left_out(machine):
    machine.too_large = {32, 64}
    assert machine.choose() == Config(16, True)
    machine.forget()
    machine.too_large = {16, 32, 64}
    assert machine.choose(KEY[:2]) == Config(64), "its launch will say what is missing"


def test_too_little_memory_to_measure_decides_nothing(machine, tmp_path):
    plain, machine.run = machine.run, lambda config: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    assert machine.choose() == Config(64)
    assert files(tmp_path) == []
    machine.run = plain
    assert machine.choose() == Config(32)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\0", '{"identity": {}}', '{"configuration": [32, false]}', "changed"],
)
def test_damaged_and_outdated_files_are_measured_again(machine, tmp_path, content):
    machine.choose()
    path = files(tmp_path)[-1]
    if content == "changed":
        content = json.dumps(json.loads(path.read_text()) | {"configuration": [48, False]})
    path.write_text(content)
    machine.forget()
    assert machine.choose() == Config(32)
    assert len(machine.ran) == 3
    assert json.loads(path.read_text())["configuration"] == [32, False]


def test_a_directory_that_cannot_be_written_is_no_error(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "file"))
    assert machine.choose() == Config(32)


def _write_often(folder: str) -> None:
    import os

    os.environ["FASTVIT_CACHE_DIR"] = folder
    tuning._device_name = lambda: "GPU"
    for block in range(200):
        tuning._write(tuning._record("kernel", (1,)), Config(block))


def test_processes_that_write_at_the_same_time_leave_whole_files(machine, tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(str(tmp_path / "cache"),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    machine.device = "GPU"
    record = tuning._record("kernel", (1,))
    every = [Config(block) for block in range(200)]
    while any(writer.is_alive() for writer in writers):
        assert not record[0].exists() or tuning._read(record, every) is not None
    assert all(writer.exitcode == 0 for writer in writers)
    assert files(tmp_path)[1:] == [record[0]], "no temporary file is left"


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (197, 256), (256, 256), (577, 1024)]
)
def test_token_buckets(tokens, bucket):
    assert tuning.token_bucket(tokens) == bucket


def test_cache_directory_of_the_user(monkeypatch):
    monkeypatch.delenv("FASTVIT_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.cache_directory() == Path("/somewhere/fastvit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_directory() == Path.home() / ".cache" / "fastvit"


@pytest.mark.parametrize(("value", "enabled"), [("", True), ("1", True), ("0", False)])
def test_environment_switch(value, enabled):
    assert tuning._enabled(value) is enabled


def test_a_switch_that_is_none_is_refused():
    with pytest.raises(ValueError, match="FASTVIT_AUTOTUNE: got 'off'"):
        tuning._enabled("off")
