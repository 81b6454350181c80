"""Autoautotune with a simulated GPU and timer: launch configurations of kernels, and implementations of operators."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastvit import autotune
from fastvit.ops._operator import Operator
from fastvit.patching import preference
from fastvit.reference.functional import BatchNorm


class Config(NamedTuple):
    block: int
    one_pass: bool = False


CONFIGS = (Config(64), Config(32), Config(16, True))
KEY = (torch.float16, 12, 64, 256)


class OutOfResourcesError(Exception):
    """Stands in for Triton's, so that these tests run without Triton."""


class Machine:
    """Records which candidates ran; ``seconds`` are the times by block, ``too_large`` the blocks that do not fit."""

    def __init__(self) -> None:
        self.seconds = {64: 3.0, 32: 1.0, 16: 2.0}
        self.too_large: set[int] = set()
        self.device = "GPU 1"
        self.capturing = False
        self.ran: list[Config] = []

    def run(self, config: Config) -> None:
        self.ran.append(config)
        if config.block in self.too_large:
            raise OutOfResourcesError

    def time(self, calls) -> list[float]:
        return [self.seconds[call.args[0].block] for call in calls]

    def choose(self, key=KEY, configs=CONFIGS, kernel="kernel"):
        return autotune.choose(kernel, key, configs, self.run)

    def restart(self) -> None:
        """Forget everything in memory, as a new process would."""
        autotune._chosen.clear()
        self.ran.clear()


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    machine = Machine()
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_has_device", lambda: True)
    monkeypatch.setattr(autotune, "_device_index", lambda: 0)
    monkeypatch.setattr(autotune, "_device_name", lambda: machine.device)
    monkeypatch.setattr(autotune, "_capturing", lambda: machine.capturing)
    monkeypatch.setattr(autotune, "_time", machine.time)
    monkeypatch.setattr(autotune, "_resource_errors", lambda: (OutOfResourcesError,))
    return machine


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*"))


def test_fastest_is_chosen_measured_once_and_kept_on_disk(machine, tmp_path):
    assert machine.choose() == Config(32)
    assert machine.ran == list(CONFIGS)
    assert machine.choose() == Config(32)
    assert len(machine.ran) == 3
    assert [path.suffix for path in files(tmp_path)] == ["", ".json"]
    machine.restart()
    machine.seconds[32] = 9.0
    assert machine.choose() == Config(32), "read from the file"
    assert machine.ran == []


@pytest.mark.parametrize("change", ["dtype", "heads", "kernel", "device", "triton"])
def test_other_keys_are_measured_separately(machine, change, monkeypatch):
    machine.choose()
    machine.restart()
    machine.seconds[16] = 0.5
    if change == "device":
        machine.device = "GPU 2"
    elif change == "triton":
        monkeypatch.setattr(autotune.backends, "TRITON_VERSION", "0.0")
    key = {"dtype": (torch.bfloat16, *KEY[1:]), "heads": (KEY[0], 6, *KEY[2:])}.get(change, KEY)
    assert machine.choose(key, kernel="other" if change == "kernel" else "kernel") == Config(16, True)


def test_pinned_deterministic_or_traced_calls_take_the_first(machine, monkeypatch, tmp_path):
    assert machine.choose() == Config(32)
    machine.ran.clear()
    monkeypatch.setattr(autotune, "ENABLED", False)
    assert machine.choose() == Config(64)
    monkeypatch.setattr(autotune, "ENABLED", True)
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
    assert machine.choose() == Config(32), "the capture decided nothing for later calls"
    machine.capturing = True
    assert machine.choose() == Config(32), "a known result is used while capturing, too"
    machine.restart()
    assert machine.choose() == Config(32), "and so is one on disk"


def test_without_a_gpu_the_first_is_taken(machine, monkeypatch):
    monkeypatch.setattr(autotune, "_has_device", lambda: False)
    assert machine.choose() == Config(64)
    assert machine.ran == []


def test_one_candidate_is_not_measured(machine):
    assert machine.choose(configs=CONFIGS[2:]) == CONFIGS[2]
    assert machine.ran == []


def test_candidates_that_do_not_fit_are_skipped(machine):
    machine.too_large = {32, 64}
    assert machine.choose() == Config(16, True)
    machine.restart()
    machine.too_large = {16, 32, 64}
    assert machine.choose(KEY[:2]) == Config(64), "its launch will raise the error"


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
    machine.restart()
    assert machine.choose() == Config(32)
    assert len(machine.ran) == 3
    assert json.loads(path.read_text())["configuration"] == [32, False]


def test_a_directory_that_cannot_be_written_to_is_no_error(machine, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "autotune").write_text("")
    assert machine.choose() == Config(32)


def _write_often(folder: str) -> None:
    os.environ["FASTVIT_CACHE_DIR"] = folder
    for block in range(200):
        autotune._write(autotune._record("kernel", (1,), "GPU"), Config(block))


def test_processes_that_write_at_the_same_time_leave_whole_files(machine, tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(str(tmp_path / "cache"),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    machine.device = "GPU"
    record = autotune._record("kernel", (1,), "GPU")
    every = [Config(block) for block in range(200)]
    while any(writer.is_alive() for writer in writers):
        assert not record[0].exists() or autotune._read(record, every) is not None
    assert all(writer.exitcode == 0 for writer in writers)
    assert files(tmp_path)[1:] == [record[0]], "no temporary file is left"


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (197, 256), (256, 256), (577, 1024)]
)
def test_token_buckets(tokens, bucket):
    assert autotune.token_bucket(tokens) == bucket


def test_cache_directory_of_the_user(monkeypatch):
    monkeypatch.delenv("FASTVIT_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert autotune.cache_directory() == Path("/somewhere/fastvit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert autotune.cache_directory() == Path.home() / ".cache" / "fastvit"


def test_cache_directory_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "new"))
    assert autotune.cache_directory() == tmp_path / "new"
    monkeypatch.setenv("FASTVIT_CACHE_DIR", "~/here")
    assert autotune.cache_directory() == Path.home() / "here"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="FASTVIT_CACHE_DIR: expected a directory, got '.*file'"):
        autotune.cache_directory()


@pytest.mark.parametrize(("value", "enabled"), [("", True), ("1", True), ("0", False)])
def test_environment_switch(value, enabled):
    assert autotune._enabled(value) is enabled


def test_other_values_of_the_switch_are_errors():
    with pytest.raises(ValueError, match="FASTVIT_AUTOTUNE: expected '0' or '1', got 'off'"):
        autotune._enabled("off")


# --- Implementations ------------------------------------------------------------------------------------------------


class OnGPU(Tensor):
    """A tensor that reports a CUDA device."""

    @property
    def device(self):
        return torch.device("cuda", 0)


class Inner(NamedTuple):
    weight: Tensor
    norm: BatchNorm | None
    stride: int


class Call(NamedTuple):
    x: Tensor
    inner: Inner
    layers: tuple[tuple[Tensor, BatchNorm | None], ...]
    grid: tuple[int, int]
    form: str


class Implementation(NamedTuple):
    name: str
    run: Any


def make(
    tokens: int = 20, norm: BatchNorm | None = None, form: str = "a", stride: int = 1, dtype=torch.float32
) -> Call:
    x = torch.randn(2, tokens, 8, dtype=dtype).as_subclass(OnGPU)
    return Call(x, Inner(torch.randn(8, 1, 3, 3), norm, stride), ((torch.randn(4, 8), None),), (tokens, 1), form)


@pytest.fixture
def fastest(machine, monkeypatch):
    """``autotune.fastest`` among these names, as the chosen name; ``ran`` holds the names that ran, and the calls."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: torch.no_grad())
    monkeypatch.setattr(autotune, "_time", lambda calls: [{"cuda": 2.0, "triton": 1.0}[c.args[0][0]] for c in calls])

    def fastest(call: Call, *names: str) -> str:
        every = [Implementation(name, lambda call, name=name: fastest.ran.append((name, call))) for name in names]
        return autotune.fastest("op", every, call).name

    fastest.ran = []
    return fastest


BOTH = ("cuda", "triton", "reference")


def test_the_faster_implementation_is_measured_once(fastest):
    call = make()
    assert fastest(call, *BOTH) == "triton"
    assert [name for name, _ in fastest.ran] == ["cuda", "triton"]
    assert all(received is call for _, received in fastest.ran)
    assert fastest(make(), *BOTH) == "triton"
    assert len(fastest.ran) == 2


def test_the_first_runs_where_there_is_nothing_to_compare(fastest):
    assert fastest(make(), "cuda", "reference") == fastest(make(), "cuda") == "cuda"
    assert fastest(make(), "sdpa", "cpp", "triton", "reference") == "sdpa"
    assert fastest(make()._replace(x=torch.randn(2, 20, 8)), *BOTH) == "cuda", "not on a GPU"
    assert fastest(make(tokens=0), *BOTH) == "cuda", "nothing to compute"
    assert fastest.ran == []


@pytest.mark.parametrize("owner", ["compiler.is_compiling", "compiler.is_exporting", "jit.is_tracing"])
def test_nothing_is_measured_while_tracing_or_exporting(fastest, monkeypatch, owner):
    module, name = owner.split(".")
    monkeypatch.setattr(getattr(torch, module), name, lambda: True)
    assert fastest(make(), *BOTH) == "cuda"
    assert fastest.ran == []


def test_nothing_is_measured_where_it_is_unwanted(fastest, machine, monkeypatch):
    with autotune.unmeasured():
        assert fastest(make(), *BOTH) == "cuda"
    machine.capturing = True
    assert fastest(make(), *BOTH) == "cuda"
    machine.capturing = False
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest(make(), *BOTH) == "cuda"
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "ENABLED", False)
        assert fastest(make(), *BOTH) == "cuda"
    assert fastest.ran == []
    assert fastest(make(), *BOTH) == "triton"


def test_nothing_is_measured_in_training(fastest):
    vector = torch.ones(8)
    batch = BatchNorm(vector, vector, vector, vector, use_batch_stats=True)
    assert fastest(make(norm=batch), *BOTH) == "cuda"
    norm = make(norm=BatchNorm(vector, vector, vector.clone().requires_grad_(), vector))
    weight, layer, x = make(), make(), make()
    weight.inner.weight.requires_grad_()
    layer.layers[0][0].requires_grad_()
    x.x.requires_grad_()
    for call in (norm, weight, layer, x):
        assert fastest(call, *BOTH) == "cuda"
    assert fastest.ran == []
    with torch.no_grad():
        assert fastest(norm, *BOTH) == fastest(weight, *BOTH) == "triton"
        assert fastest(make(norm=batch), *BOTH) == "cuda", "a run would move running statistics"


def test_a_key_holds_dtype_sizes_settings_and_the_token_bucket(fastest):
    vector = torch.ones(8)
    calls = [make(), make(form="b"), make(stride=2), make(norm=BatchNorm(*[vector] * 4)), make(tokens=70)]
    calls.append(make(dtype=torch.bfloat16))
    for number, call in enumerate(calls, 1):
        fastest(call, *BOTH)
        assert len(fastest.ran) == 2 * number
    fastest(make(tokens=21), *BOTH)
    assert len(fastest.ran) == 2 * len(calls), "another grid of as many tokens, about"


def test_queries_of_the_choice_measure_nothing(monkeypatch):
    unmeasured = []
    call = Operator.__call__

    def record(self: Operator, *arguments: Any, **options: Any) -> Any:
        unmeasured.append(autotune._unmeasured.get())
        return call(self, *arguments, **options)

    monkeypatch.setattr(Operator, "__call__", record)
    for op in preference.CALLS:
        preference.backend_for(op, "auto", torch.float32, torch.device("cpu"))
    assert len(unmeasured) >= len(preference.CALLS)
    assert all(unmeasured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_nothing_runs():
    def run(candidate: tuple[str]) -> None:
        raise AssertionError(f"ran {candidate}")

    assert autotune.choose("leff", (torch.float16, "16", 16), [("cuda",), ("triton",)], run) == ("cuda",)


def test_it_is_imported_without_triton():
    program = "import sys; sys.modules['triton'] = None; from fastvit import autotune; autotune._resource_errors()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    without = "import fastvit.backends as b; b.TRITON_VERSION = None; "
    subprocess.run([sys.executable, "-c", without + program], env=environment, check=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], Callable[[], None]]:
    """Makes a call whose n-th run takes as many seconds as a function says."""
    now = 0.0
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)

    def taking(seconds: Callable[[int], float]) -> Callable[[], None]:
        runs = iter(range(1000))

        def run() -> None:
            nonlocal now
            now += seconds(next(runs))
            run.count = getattr(run, "count", 0) + 1

        return run

    return taking


def test_on_the_cpu_what_is_clearly_slower_is_timed_no_further(clock):
    calls = [clock(lambda _: 1.0), clock(lambda _: 0.95), clock(lambda _: 2.0), clock(lambda turn: 100.0 - turn)]
    seconds = autotune._time_on_cpu(autotune.PREFERENCE, calls)
    assert min(seconds) == seconds[0] == 0.9, "another has to take a tenth less"
    assert [call.count for call in calls] == [autotune.ROUNDS + 1, autotune.ROUNDS + 1, 3, 3]


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 2.0), 0), ((2.0, 1.0), 1), ((1.0, 1.0), 0)])
def test_a_race_takes_turns_and_the_shortest_lap_counts(seconds, faster):
    race, ways, result = autotune.Race(), [], None
    while result is None:
        ways.append(race.turn())
        disturbed = 50.0 if len(ways) < 5 else 0.0
        result = race.went(ways[-1], seconds[ways[-1]] + disturbed)
    assert ways == [0, 1] * race.LAPS
    assert result == faster


def test_on_the_cpu_the_first_gets_a_second_chance(clock):
    disturbed = clock(lambda turn: 1.2 if turn <= autotune.ROUNDS else 1.0)
    seconds = autotune._time_on_cpu(autotune.PREFERENCE, [disturbed, clock(lambda _: 1.0)])
    assert seconds[0] < seconds[1]
    seconds = autotune._time_on_cpu(autotune.PREFERENCE, [clock(lambda _: 1.2), clock(lambda _: 1.0)])
    assert seconds[1] < seconds[0]


class Device:
    """A GPU's clock beside the host's: a call takes the host long, and the device as long as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captures: bool = True) -> None:
        self.now, self.captured, self.capturing = 0.0, 0.0, False
        device = self

        class Graph:
            def replay(self) -> None:
                device.now += self.seconds

        class Capture:
            def __init__(self, graph: Graph, capture_error_mode: str) -> None:
                self.graph = graph
                assert capture_error_mode == "thread_local"

            def __enter__(self) -> None:
                if not captures:
                    raise RuntimeError("operation not permitted when stream is capturing")
                device.capturing, device.captured = True, 0.0

            def __exit__(self, *_: object) -> None:
                device.capturing, self.graph.seconds = False, device.captured

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        for name, stand_in in (("CUDAGraph", Graph), ("graph", Capture), ("Event", Event)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, device_seconds: float, host_seconds: float) -> Callable[[], None]:
        def run() -> None:
            if self.capturing:
                self.captured += device_seconds
            else:  # with an empty queue the device waits for the host
                self.now += max(device_seconds, host_seconds)

        return run


def test_on_a_gpu_replays_are_timed_and_the_hosts_time_is_not(monkeypatch):
    device = Device(monkeypatch)
    seconds = autotune._time([device.call(3.0, 50.0), device.call(1.0, 80.0)])
    assert seconds == [3.0 * autotune.CALLS_A_GRAPH, 1.0 * autotune.CALLS_A_GRAPH]


def test_on_a_gpu_what_cannot_be_captured_is_timed_as_it_is_called(monkeypatch):
    device = Device(monkeypatch, captures=False)
    assert autotune._time([device.call(3.0, 50.0)]) == [50.0 * autotune.CALLS_A_GRAPH]


def test_a_result_of_other_kernel_sources_does_not_count(machine, monkeypatch):
    assert len(autotune._kernel_sources()) == 20
    machine.choose()
    machine.restart()
    assert machine.choose() == Config(32) and not machine.ran
    machine.restart()
    monkeypatch.setattr(autotune, "_kernel_sources", lambda: "edited")
    assert machine.choose() == Config(32) and machine.ran
