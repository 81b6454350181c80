"""Each GPU test fails for the fault it is there for: planted here on a CPU, with stand-ins for kernels and the device.

The tests are called as functions. A stand-in kernel is the plain code, right or with a fault; streams, graphs and the
autotuner's device are simulated as far as a test can see them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.jobs import JOBS, Job, is_statistic, parts
from fastvit import autotune
from fastvit.reference import functional
from tests.compat import test_running, test_state
from tests.kernels import test_on_gpu as gpu
from tests.ops import test_token_depthwise_conv_cuda as conv

Kernel = Callable[[Job, dict[str, Tensor], str], list[Tensor]]


def small(name: str) -> Job:
    """A job whose published size is small."""
    (job,) = (job for job in JOBS if job.name == name)
    return dataclasses.replace(job, make=lambda batch, _: job.make(batch, True))


FEW = small("cait_s_class")
CAUGHT = (AssertionError, pytest.fail.Exception)


def right(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    return parts(job.call(functional, tensors))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "run", right)


@contextlib.contextmanager
def caught(because: str = "") -> Iterator[None]:
    """A test of ours fails within, for this reason."""
    with pytest.raises(CAUGHT, match=because or None):
        yield


def unless(right: bool, because: str = "") -> contextlib.AbstractContextManager[None]:
    """A test of ours fails within, for this reason, unless all is right."""
    return contextlib.nullcontext() if right else caught(because)


# --- Accuracy -------------------------------------------------------------------------------------------------------


def without(name: str) -> Kernel:
    """A kernel that reads other numbers in the place of one input: a mask's opposite, or those of the next channel."""

    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        was = tensors[name]
        instead = ~was if was.dtype == torch.bool else was.roll(1, -1) + 0.1 * was.abs().mean()
        return right(job, {**tensors, name: instead.abs() if name.endswith("var") else instead}, backend)

    return run


def unwritten(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    """A kernel that leaves out the last element of its last result."""
    *outs, last = right(job, tensors, backend)
    poisoned = torch.empty_like(last)
    return [*outs, torch.where(torch.arange(last.numel()).view_as(last) < last.numel() - 1, last, poisoned)]


INPUTS = [(job, name) for job in JOBS for name in job.tensors(1, torch.float32, "cpu", small=True)]


def moves(job: Job, name: str) -> bool:
    """Whether the result depends on an input. The same number in all logits of a row does not move their softmax; with
    batch statistics neither the running ones do nor a bias in front of the norm."""
    before_norm = name in ("up_bias", "dw_bias", "down_bias", "bias")
    return name != "pre_bias" and not ("training" in job.name and (is_statistic(name) or before_norm))


@pytest.mark.parametrize(
    ("job", "name"), [each for each in INPUTS if moves(*each)], ids=lambda value: getattr(value, "name", value)
)
def test_an_input_that_a_kernel_does_not_read_is_missed(job, name, monkeypatch):
    monkeypatch.setattr(gpu, "run", without(name))
    with caught("accurate|special|error"):
        gpu.test_forward_is_as_accurate_as_the_reference(job, "triton", torch.bfloat16, True)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_right_kernels_pass_and_an_unwritten_element_is_missed(job, monkeypatch):
    gpu.test_forward_is_as_accurate_as_the_reference(job, "triton", torch.bfloat16, True)
    monkeypatch.setattr(gpu, "run", unwritten)
    with caught():
        gpu.test_forward_is_as_accurate_as_the_reference(job, "triton", torch.bfloat16, True)


class Backward(torch.autograd.Function):
    """Identity, with a backward that is off by a factor, or leaves zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def wrong_gradient(name: str, factor: float) -> Kernel:
    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        return right(job, {**tensors, name: Backward.apply(tensors[name], factor)}, backend)

    return run


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_gradient_of_every_input_is_looked_at(job, monkeypatch):
    gpu.test_gradients_are_as_accurate_as_the_references(job, "triton", torch.float32, True)
    for name in job.leaves(job.tensors(1, torch.float32, "cpu", small=True)):
        if moves(job, name):  # else the gradient is zero
            monkeypatch.setattr(gpu, "run", wrong_gradient(name, 1.01))
            with caught(f"gradient of {name}"):
                gpu.test_gradients_are_as_accurate_as_the_references(job, "triton", torch.float32, True)


def test_a_wrong_candidate_of_the_autotuner_is_missed(monkeypatch):
    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        chosen = autotune.choose("kernel", (1,), [(0,), (1,), (2,)], lambda configuration: None)
        return [out * (1.0 if chosen != (1,) else 1.05) for out in right(job, tensors, backend)]

    monkeypatch.setattr(gpu, "run", run)
    for place in (0, 2):
        with pytest.MonkeyPatch.context() as patch:
            gpu.test_every_autotune_candidate_is_as_accurate(FEW, "triton", place, patch)
    with pytest.MonkeyPatch.context() as patch, caught():
        gpu.test_every_autotune_candidate_is_as_accurate(FEW, "triton", 1, patch)


def test_results_that_differ_in_a_bit_are_missed(monkeypatch):
    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        return [out + 2**-20 * torch.rand(()) * out.detach() for out in right(job, tensors, backend)]

    gpu.test_results_repeat_to_the_bit_in_deterministic_mode(FEW, "triton", torch.float32)
    monkeypatch.setattr(gpu, "run", run)
    with caught("output 0|gradient"):
        gpu.test_results_repeat_to_the_bit_in_deterministic_mode(FEW, "triton", torch.float32)


def test_a_compiled_call_that_is_wrong_or_wrong_in_its_gradient_is_missed(monkeypatch):
    def compiles_to(factor: float, backward: float) -> None:
        def compiled(function, fullgraph):
            assert fullgraph
            return lambda t: Backward.apply(right(FEW, t, "")[0] * factor, backward)

        monkeypatch.setattr(torch, "compile", compiled)

    compiles_to(1.0, 1.0)
    gpu.test_compiled_in_one_graph_with_gradients(FEW, "triton")
    for factors in ((1.01, 1.0), (1.0, 1.01)):
        compiles_to(*factors)
        with caught():
            gpu.test_compiled_in_one_graph_with_gradients(FEW, "triton")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_wrong_class_attention_kernels_are_missed(which, monkeypatch):
    forward = pytest.importorskip("fastvit.kernels.attention_class", exc_type=ImportError)
    backward = pytest.importorskip("fastvit.kernels.attention_class_backward", exc_type=ImportError)

    def gradients(grad, q, k, v, mask, bias, scale, bias_gradient):
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, bias)]
        out = functional.masked_attention(*leaves[:3], mask, leaves[3], scale)
        found = torch.autograd.grad(out, leaves, grad)
        return (*found[:3], found[3] * (1.1 if which == 2 else 1.0))

    def attend(q, k, v, mask, bias, scale):
        return functional.masked_attention(q, k, v, mask, bias if which != 1 else bias[:, :1], scale)

    monkeypatch.setattr(forward, "class_attention_forward", attend)
    monkeypatch.setattr(backward, "class_attention_backward", gradients)
    with unless(which == 0, ("", "output", "dbias")[which]):
        gpu.test_class_attention_kernels(torch.float32)


# --- Kernels with a fault -------------------------------------------------------------------------------------------

THROUGH_OUR_KERNELS = gpu.run

STEP_FAULTS = [
    ("deepvit_s_training", "tiles.map_products", None, "output 0"),
    ("deepvit_s_training", "tiles.weighted_rows", None, "output 0"),
    ("deepvit_s_training", "tiles.row_sums", 0, "gradient of q"),
    ("deepvit_s_training", "tiles.row_sums", 1, "gradient of q"),
    ("deepvit_s_training", "tiles.row_sums", 2, "gradient of q"),
    ("deepvit_s_training", "tiles.query_gradients", 0, "gradient of q"),
    ("deepvit_s_training", "tiles.key_gradients", 0, "gradient of k"),
    ("deepvit_s_training", "tiles.key_gradients", 1, "gradient of v"),
    ("cait_s24", "whole.whole_rows", None, "output 0"),
    ("cait_s24", "tiles.query_gradients", 1, "gradient of pre_weight"),
]
"""A job; the function of a kernel of its step, and which of its results is wrong; what is to tell of that."""


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "function", "place", "tells"), [("deepvit_s_training", "", None, ""), *STEP_FAULTS])
def test_a_kernel_of_a_step_that_is_off_is_missed(name, function, place, tells, monkeypatch):
    """The kernels themselves, in the interpreter, of which one gives a tenth too much."""
    names = ("", "_backward", "_training", "_tiles", "_whole")
    forward, backward, training, tiles, whole = (
        pytest.importorskip(f"fastvit.kernels.head_mixed_attention{part}", exc_type=ImportError) for part in names
    )
    for module in (forward, backward, training):
        monkeypatch.setattr(module, "gluon_runs", lambda _: True)
        monkeypatch.setattr(module, "shared_limit", lambda _: 227 * 1024)
    called = []

    if function:
        module_name, attribute = function.split(".")
        module = {"tiles": tiles, "whole": whole}[module_name]
        kernel = getattr(module, attribute)

        def wrong(*arguments, **options):
            called.append(function)
            found = kernel(*arguments, **options)
            if place is None:
                return found * 1.1
            return tuple(each * 1.1 if i == place else each for i, each in enumerate(found))

        monkeypatch.setattr(module, attribute, wrong)
    monkeypatch.setattr(gpu, "run", THROUGH_OUR_KERNELS)
    monkeypatch.setattr(gpu, "BATCH", 1)
    with unless(not function, tells):
        gpu.test_gradients_are_as_accurate_as_the_references(small(name), "triton", torch.float16, True)
    assert bool(called) is bool(function)


# --- Streams and graphs ---------------------------------------------------------------------------------------------


class Graph:
    """What a capture records: functions that compute anew what the captured kernels wrote."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.kernels: list[Callable[[], None]] = []

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()


class Device:
    """Stands in for ``torch.cuda``'s streams and graphs."""

    side = False

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        Graph.recording = graph
        try:
            yield
        finally:
            Graph.recording = None

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.side = True
        try:
            yield
        finally:
            self.side = False


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    for name, value in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    return device


def recorded(baked_in: bool = False, written: bool = True) -> Kernel:
    """A kernel as graphs see it; with a fault it keeps the inputs of its capture, or writes elsewhere on a replay."""

    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        outs = right(job, tensors, backend)
        if Graph.recording is not None:
            seen = {name: tensor.clone() for name, tensor in tensors.items()} if baked_in else tensors

            def kernel() -> None:
                for out, new in zip(outs, right(job, seen, backend), strict=True):
                    if written:
                        out.copy_(new)

            for out in outs:
                out.fill_(torch.nan)  # a capture runs nothing
            Graph.recording.kernels.append(kernel)
        return outs

    return run


@pytest.mark.usefixtures("device")
def test_a_graph_that_keeps_its_inputs_or_writes_elsewhere_is_missed(monkeypatch):
    monkeypatch.setattr(gpu, "run", recorded())
    gpu.test_a_graph_captures_the_forward_and_replays_it_on_other_inputs(FEW, "triton")
    for fault in ({"baked_in": True}, {"written": False}):
        monkeypatch.setattr(gpu, "run", recorded(**fault))
        with caught():
            gpu.test_a_graph_captures_the_forward_and_replays_it_on_other_inputs(FEW, "triton")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("fault", ["none", "measures", "writes elsewhere"])
def test_a_first_call_that_measures_or_fails_under_capture_is_missed(fault, monkeypatch, tmp_path):
    simulate_device(monkeypatch)
    kernel = recorded(written=fault != "writes elsewhere")

    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        capturing = Graph.recording is not None and fault != "measures"
        monkeypatch.setattr(autotune, "_capturing", lambda: capturing)
        autotune.choose("kernel", (1,), [(0,), (1,)], lambda configuration: None)
        return kernel(job, tensors, backend)

    monkeypatch.setattr(gpu, "run", run)
    expected = {"none": None, "measures": "measured while captured", "writes elsewhere": ""}[fault]
    with pytest.MonkeyPatch.context() as patch, unless(expected is None, expected or ""):
        gpu.test_a_first_call_may_be_captured(FEW, "triton", patch, tmp_path)


def test_work_on_the_default_stream_is_missed(device, monkeypatch):
    def on_stream(of_its_own: bool) -> Kernel:
        def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
            early = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
            return right(job, early if device.side and of_its_own else tensors, backend)

        return run

    monkeypatch.setattr(gpu, "BUSY", 8)
    monkeypatch.setattr(gpu, "run", on_stream(False))
    gpu.test_another_stream_is_used_where_it_is_current(FEW, "triton")
    monkeypatch.setattr(gpu, "run", on_stream(True))
    with caught():
        gpu.test_another_stream_is_used_where_it_is_current(FEW, "triton")


# --- Tuning ---------------------------------------------------------------------------------------------------------


def simulate_device(monkeypatch) -> None:
    """A device on which the autotuner may measure."""
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_has_device", lambda: True)
    monkeypatch.setattr(autotune, "_device_index", lambda: 0)
    monkeypatch.setattr(autotune, "_device_name", lambda: "a GPU")
    monkeypatch.setattr(autotune, "_capturing", lambda: False)
    monkeypatch.setattr(autotune, "_time", lambda calls: [1.0] * len(calls))


@pytest.mark.parametrize("fault", ["none", "forgets", "never measures", "in training too"])
def test_a_choice_of_kernels_that_is_not_made_just_once_is_missed(fault, monkeypatch, tmp_path):
    simulate_device(monkeypatch)

    def run(job: Job, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        if backend == "auto" and fault != "never measures" and ("training" not in job.name or "training" in fault):
            candidates = [("cuda",), ("triton",)]
            autotune.choose(job.op, ("key",), candidates, lambda configuration: None)
            if fault == "forgets":
                autotune._fastest(candidates, lambda configuration: None, autotune._time)
        return right(job, tensors, backend)

    monkeypatch.setattr(gpu, "run", run)
    job = small("cvt13_stage3_training" if fault == "in training too" else "cvt13_stage2_key")
    because = "measured again" if fault == "forgets" else ""
    with pytest.MonkeyPatch.context() as patch, unless(fault == "none", because):
        gpu.test_the_faster_of_two_kernels_is_measured_once(job, patch, tmp_path)


@pytest.mark.parametrize(
    ("texts", "kept"),
    [(["[1]\n", "[1]\n"], True), (["[]\n", "[]\n"], True), (["[1]\n", "[2]\n"], True), (["[1]\n", "[1]\n"], False)],
    ids=["right", "measures nothing", "measures anew", "keeps no file"],
)
def test_measurements_that_another_process_does_not_find_are_missed(texts, kept, monkeypatch, tmp_path):
    answers = iter(texts)

    def run(command, *, env, check, **options):
        assert check and env["FASTVIT_AUTOTUNE"] == "1"
        if kept:
            Path(env["FASTVIT_CACHE_DIR"], "one.json").touch()
        return subprocess.CompletedProcess(command, 0, next(answers), "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    with unless(texts == ["[1]\n", "[1]\n"] and kept):
        gpu.test_measured_configurations_are_found_again_by_another_process(tmp_path)


# --- The tests of other files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["none", "forward", "not the same"])
def test_wrong_cuda_convolutions_are_missed(fault, monkeypatch):
    def run(**arguments) -> Tensor:
        out = functional.token_depthwise_conv(**arguments)
        return out * {"none": 1.0, "forward": 1.05, "not the same": 1.0 + 0.05 * torch.rand(())}[fault]

    monkeypatch.setattr(conv, "run_cuda", run)
    monkeypatch.setattr(conv, "on_gpu", lambda value: value)
    monkeypatch.setattr(conv, "CASES", conv.CASES[:1])
    monkeypatch.setattr(conv, "TRAINING_CASES", conv.TRAINING_CASES[:1])
    case = conv.Case
    monkeypatch.setattr(conv, "Case", lambda *sizes, **options: case((5, 5), 8, 2, **options))
    with unless(fault == "none"):
        conv.test_forward_on_a_gpu(torch.float32)
    with unless(fault == "none"):
        conv.test_training_on_a_gpu(torch.float32)
    with unless(fault != "not the same"):
        conv.test_gradients_on_a_gpu_are_the_same_every_time()


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_a_patched_model_that_is_wrong_on_the_device_is_missed(wrong, monkeypatch):
    def patch(model):
        model.register_forward_hook(lambda module, args, out: out * 1.5 if wrong and module.moved else out)
        model.moved = False
        return model

    def cuda(model):
        model.moved = True
        return model

    def cpu(model):
        model.moved = False
        return model

    monkeypatch.setattr(torch.nn.Module, "cuda", cuda)
    monkeypatch.setattr(torch.nn.Module, "cpu", cpu)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(test_state, "patch", patch)
    with unless(not wrong):
        test_state.test_other_devices_after_patch(test_state.EVERY[0])
    monkeypatch.setattr(test_running, "patch", lambda model: cuda(patch(model)))
    with unless(not wrong):
        test_running.test_autocast(test_running.EVERY[0], "cpu")


def test_no_test_on_a_gpu_is_left_out():
    source = Path(__file__).read_text()
    marked = {"conv": conv, "test_state": test_state, "test_running": test_running}
    names = [f"gpu.{name}" for name in vars(gpu) if name.startswith("test_")]
    for module_name, module in marked.items():
        for name, value in vars(module).items():
            marks = getattr(value, "pytestmark", [])
            parameters = [each for mark in marks if mark.name == "parametrize" for each in mark.args[1]]
            inner = [mark for each in parameters for mark in getattr(each, "marks", ())]
            if any(mark.name == "gpu" for mark in (*marks, *inner)):
                names.append(f"{module_name}.{name}")
    assert len(names) >= 16
    assert [name for name in names if f"{name}(" not in source] == []
