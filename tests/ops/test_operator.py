"""The one call path: choice, refusals, errors, the environment's restriction, recording, logging, tracing."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fastvit import autotune, backends, ops
from fastvit.ops import _operator
from fastvit.ops._operator import Implementation, Operator, Selection, gradients_needed, recording
from fastvit.patching import preference
from fastvit.reference.functional import BatchNorm
from tests.ops.calls import CALLS, WRONG

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

# --- With implementations that multiply -----------------------------------------------------------------------------


class Call(NamedTuple):
    x: Tensor


def check(call: Call) -> None:
    if call.x.dim() != 1:
        raise ValueError(f"x: expected one axis, got {call.x.dim()}")


def cuda_reasons(call: Call, named: bool) -> Iterator[str]:
    yield "not on a GPU"
    yield "too old"


def cpp_reasons(call: Call, named: bool) -> Iterator[str]:
    if call.x.shape[0] > 4:
        yield "takes up to 4 rows"
    if gradients_needed(call.x):
        yield "no backward"


def sdpa_reasons(call: Call, named: bool) -> Iterator[str]:
    if gradients_needed(call.x):
        yield "no backward"
    if not named and call.x.shape[0] == 3:
        yield "slow for 3 rows"


def times(factor: float) -> Callable[[Call], Tensor]:
    return lambda call: call.x * factor


DOUBLE = Operator(
    "double",
    (
        Implementation("cuda", times(100), cuda_reasons),
        Implementation("cpp", times(2), cpp_reasons, validates=True),
        Implementation("sdpa", times(3), sdpa_reasons),
        Implementation("reference", times(4)),
    ),
    check,
)
SMALL, LARGE = torch.ones(4), torch.ones(5)


def run(x: Tensor, backend: str = "auto") -> Tensor:
    return DOUBLE(Call(x), backend)


def name(x: Tensor, backend: str = "auto") -> str:
    return {2.0: "cpp", 3.0: "sdpa", 4.0: "reference"}[run(x, backend)[0].item()]


def test_auto_takes_the_first_without_reasons():
    assert name(SMALL) == "cpp"
    assert name(LARGE) == "sdpa"
    assert name(LARGE.clone().requires_grad_()) == "reference"


def test_a_named_backend_never_falls_back():
    assert name(SMALL, "sdpa") == "sdpa"
    with pytest.raises(RuntimeError, match=r"double: backend 'cuda' cannot run this call: not on a GPU; too old"):
        name(SMALL, "cuda")
    with pytest.raises(RuntimeError, match="takes up to 4 rows; no backward"):
        name(LARGE.clone().requires_grad_(), "cpp")


def test_a_named_backend_runs_where_another_would_only_be_faster():
    assert name(torch.ones(3), "sdpa") == "sdpa"


def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"backend: expected one of \['auto', 'cuda', 'cpp', 'sdpa', 'reference'\] for "
    ):
        name(SMALL, "fast")


def test_the_environment_restricts_the_automatic_choice_only(monkeypatch):
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"sdpa"}))
    assert name(SMALL) == "sdpa"
    assert name(SMALL, "cpp") == "cpp"
    cpp = DOUBLE.implementations[1]
    assert DOUBLE.turned_down(Call(LARGE), cpp) == ["disabled by FASTVIT_BACKEND for double", "takes up to 4 rows"]
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"reference"}))
    assert name(SMALL) == "reference"


def test_gradients_are_needed_where_autograd_will_ask():
    leaf = torch.ones(1, requires_grad=True)
    assert gradients_needed(None, SMALL, leaf)
    assert gradients_needed(leaf * 2)
    assert not gradients_needed(None, SMALL)
    with torch.no_grad():
        assert not gradients_needed(leaf)
    with torch.inference_mode():
        assert not gradients_needed(leaf)


def test_turned_down_gives_every_reason():
    found = {each.name: DOUBLE.turned_down(Call(LARGE), each) for each in DOUBLE.implementations}
    assert found == {"cuda": ["not on a GPU", "too old"], "cpp": ["takes up to 4 rows"], "sdpa": [], "reference": []}


def test_recording_sees_choices_of_its_block_only():
    seen: list[Selection] = []
    name(SMALL)
    with recording(seen.append):
        name(LARGE)
    name(SMALL)
    assert [(choice.op, choice.backend) for choice in seen] == [("double", "sdpa")]
    assert seen[0].turned_down == {"cuda": ["not on a GPU", "too old"], "cpp": ["takes up to 4 rows"]}


def test_a_recorder_may_wrap_the_run():
    def around(run: Callable[[Call], Tensor], call: Call) -> Tensor:
        return run(call) + 1.0

    with recording(lambda selection: around if selection.backend == "sdpa" else None):
        assert torch.equal(run(LARGE), LARGE * 3 + 1)
        assert torch.equal(run(SMALL), SMALL * 2)


def test_the_log_tells_each_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(_operator, "_logged", set())
    with caplog.at_level(logging.DEBUG, "fastvit"):
        for _ in range(3):
            name(LARGE)
        name(SMALL)
    assert [record.message for record in caplog.records] == [
        "double: sdpa; not cuda: not on a GPU, too old; not cpp: takes up to 4 rows",
        "double: cpp; not cuda: not on a GPU, too old",
    ]


def test_the_log_is_silent_where_only_the_root_logger_has_the_level(caplog, monkeypatch):
    monkeypatch.setattr(_operator, "_logged", set())
    with caplog.at_level(logging.DEBUG):
        name(SMALL)
    assert not caplog.records


def test_fastvit_log_gives_the_logger_a_handler(capsys, monkeypatch):
    monkeypatch.setattr(_operator, "_logged", set())
    level, handlers = _operator.log.level, list(_operator.log.handlers)
    try:
        _operator.configure_log("debug")
        name(SMALL)
    finally:
        _operator.log.setLevel(level)
        _operator.log.handlers[:] = handlers
    assert capsys.readouterr().err == "fastvit: double: cpp; not cuda: not on a GPU, too old\n"
    with pytest.raises(ValueError, match="FASTVIT_LOG: expected 'debug', 'info', 'warning' or 'error', got 'shout'"):
        _operator.configure_log("shout")


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for x in (SMALL, LARGE, LARGE.clone().requires_grad_()):
        assert torch.equal(compiled(x), run(x))
    torch._dynamo.reset()


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return run(x, "cpp")


def test_export_trace_and_transforms_take_the_reference():
    exported = torch.export.export(Doubling(), (SMALL,)).module()
    assert torch.equal(exported(SMALL), SMALL * 4)
    assert torch.equal(torch.jit.trace(Doubling(), SMALL, check_trace=False)(SMALL), SMALL * 4)
    assert torch.equal(torch.fx.symbolic_trace(Doubling())(SMALL), SMALL * 4)
    assert torch.equal(torch.func.vmap(run)(torch.ones(2, 3)), torch.full((2, 3), 4.0))
    assert torch.equal(torch.func.grad(lambda x: run(x).sum())(SMALL), torch.full((4,), 4.0))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(run(SMALL), SMALL * 4)
    assert torch.equal(run(SMALL), SMALL * 2)


# --- Of every operator: the same results and errors whatever observes the call --------------------------------------

WAYS = ("default", "recorded", "logged", "requested", "named")
"""Where nothing observes; under a recorder; with a log; restricted by FASTVIT_BACKEND; with a named backend."""


def operator(op: str) -> Operator:
    return ops.OPERATORS.get(op, ops.OPERATORS["head_mixed_attention"])


def converted(arguments: dict[str, Any], dtype: torch.dtype, gradients: bool = False) -> dict[str, Any]:
    """A copy in this dtype; every tensor but running statistics needs its gradient, where gradients are wanted."""

    def convert(path: pytree.KeyPath, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(dtype, copy=True).requires_grad_(gradients and "running" not in pytree.keystr(path))

    return pytree.tree_map_with_path(convert, arguments)


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


def call(op: str, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    return pytree.tree_leaves(getattr(ops, op)(**arguments, **options))


def step(op: str, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """Results, gradients, and what became of every argument."""
    outputs, tensors = call(op, arguments, **options), tensors_of(arguments)
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    loss = torch.stack([output.float().sin().sum() for output in outputs]).sum()
    return [*outputs, *(torch.autograd.grad(loss, trained) if trained else ()), *tensors]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """``way(backend)``: a context in which calls are observed in the way that is the parameter."""

    def observed(backend: str) -> Any:
        if request.param == "recorded":
            return recording(lambda selection: None)
        if request.param == "logged":
            monkeypatch.setattr(_operator.log, "level", logging.DEBUG)
        elif request.param == "requested":
            monkeypatch.setattr(backends, "REQUESTED", frozenset({backend}))
        return nullcontext()

    return observed


@pytest.fixture(autouse=True)
def _own_products(monkeypatch):
    """Linear layers by the C++ kernel on every machine, few rows or not."""
    linear = sys.modules["fastvit.ops.linear"]
    for changed in ("CPP_MIN_ROWS", "CPP_MIN_COLUMNS"):
        monkeypatch.setattr(linear, changed, 1)


def chosen(op: str, arguments: dict[str, Any]) -> str:
    seen: list[Selection] = []
    with recording(seen.append):
        call(op, arguments)
    return seen[0].backend


@pytest.mark.usefixtures("kernels_first")
@needs_cpp
@pytest.mark.parametrize("way", WAYS[1:], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_results_are_bitwise_the_same_whatever_observes(op, dtype, way, request):
    for batch, gradients in ((False, False), (False, True), (True, False), (True, True)):
        arguments = converted(CALLS[op](batch), dtype, gradients)
        plain_way, backend = step(op, copy.deepcopy(arguments)), chosen(op, copy.deepcopy(arguments))
        assert backend == "cpp" or op == "conv_batch_norm"
        with way(backend):
            options = {"backend": backend} if request.node.callspec.params["way"] == "named" else {}
            found = step(op, copy.deepcopy(arguments), **options)
        for one, other in zip(plain_way, found, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()


class KernelError(RuntimeError):
    """What a kernel raises of itself."""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """``broken(op, backend)``: every implementation of the operator notes its name; that one raises."""

    def replace(op: str, backend: str) -> list[str]:
        ran: list[str] = []

        def replaced(each: Implementation) -> Implementation:
            def run(call: Any) -> Any:
                ran.append(each.name)
                if each.name == backend:
                    raise KernelError("out of registers")
                return torch.zeros(())

            return each._replace(run=run)

        record = operator(op)
        monkeypatch.setattr(record, "implementations", tuple(map(replaced, record.implementations)))
        return ran

    return replace


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("op", CALLS)
def test_the_error_of_a_kernel_arrives_and_nothing_falls_back(op, way, broken, request):
    options = {}
    backend = chosen(op, CALLS[op](False))
    ran = broken(op, backend)
    if request.node.callspec.params["way"] == "named":
        options["backend"] = backend
    for gradients in (False, True):
        arguments = converted(CALLS[op](False), torch.float32, gradients)
        if op == "conv_batch_norm" and gradients:
            continue
        with way(backend), pytest.raises(KernelError, match="^out of registers$"):
            call(op, arguments, **options)
        assert ran == [backend]
        ran.clear()


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("op", CALLS)
def test_an_argument_that_is_wrong_is_named_in_place_of_the_kernels_error(op, way, broken, request):
    options = {}
    backend = chosen(op, CALLS[op](False))
    ran = broken(op, backend)
    if request.node.callspec.params["way"] == "named":
        options["backend"] = backend
    wrong, value = WRONG[op]
    with way(backend), pytest.raises(ValueError, match=f"^{wrong}: expected ") as error:
        call(op, CALLS[op](False) | {wrong: value}, **options)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert set(ran) <= {backend}


@needs_cpp
def test_the_error_of_a_registered_operator_arrives():
    """Through autograd's function and the composition around it."""

    def fail(*_: Any) -> Tensor:
        raise KernelError("out of registers")

    module = sys.modules["fastvit.ops.token_depthwise_conv"]
    kernels = module.NATIVE._replace(forward=fail, eager=fail, training=fail)
    for gradients in (False, True):
        arguments = converted(CALLS["token_depthwise_conv"](gradients), torch.float32, gradients)
        with pytest.raises(KernelError, match="out of registers"):
            module._runner(kernels)(module.Convolution(**arguments))


def test_a_norm_over_the_batch_counts_it_once_and_moves_its_statistics():
    layer = nn.BatchNorm2d(6)
    with torch.no_grad():
        call("token_depthwise_conv", CALLS["token_depthwise_conv"](False) | {"norm": BatchNorm.of(layer)})
    assert layer.num_batches_tracked == 1
    assert not torch.equal(layer.running_mean, torch.zeros(6))


@pytest.mark.parametrize("wrong", ["pre_norm", "norm"])
def test_running_statistics_stay_where_a_call_is_refused(wrong):
    """Those of the other norm are right, and would be moved."""
    arguments = CALLS["token_depthwise_conv"](True)
    arguments[wrong] = arguments[wrong]._replace(running_mean=torch.zeros(7))
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    with pytest.raises(ValueError, match=f"{wrong}.running_mean"):
        call("token_depthwise_conv", arguments)
    assert all(map(torch.equal, tensors_of(arguments), before))


# --- Of every operator: graphs --------------------------------------------------------------------------------------


class Module(nn.Module):
    """A call of an operator as a function of its first argument."""

    def __init__(self, op: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.arguments = op, dict(arguments)
        self.first = next(iter(arguments))
        self.example = self.arguments.pop(self.first)

    def forward(self, x: Tensor) -> Any:
        return getattr(ops, self.op)(**{self.first: x}, **self.arguments)


def is_ours(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and ("fastvit" in str(node.target) or "scaled_dot" in str(node.target))


def plain(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    return call(op, arguments, backend="reference")


@pytest.mark.parametrize("op", CALLS)
def test_symbolic_trace_takes_the_plain_path(op):
    arguments = CALLS[op](False)
    model = Module(op, arguments)
    traced = torch.fx.symbolic_trace(model)
    assert not any(map(is_ours, traced.graph.nodes))
    for one, other in zip(pytree.tree_leaves(traced(model.example)), plain(op, arguments), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("op", CALLS)
def test_export_takes_the_plain_path(op):
    arguments = CALLS[op](False)
    model = Module(op, arguments)
    program = torch.export.export(model, (model.example,))
    assert not any(map(is_ours, program.graph.nodes))
    for one, other in zip(pytree.tree_leaves(program.module()(model.example)), plain(op, arguments), strict=True):
        torch.testing.assert_close(one, other)


def batched(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Those with an axis of images."""
    names = ("x", "q", "k", "v", "mask", "residual")
    return {name: arguments[name] for name in names if isinstance(arguments.get(name), Tensor)}


def batches(op: str, batch_statistics: bool, size: int) -> dict[str, Any]:
    """The call's arguments with that many images."""
    arguments = CALLS[op](batch_statistics)
    return arguments | {name: torch.cat([tensor] * size)[:size].clone() for name, tensor in batched(arguments).items()}


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_compiles_whole_for_any_batch(op, training):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend=counter)

    def trained(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
        arguments = converted(arguments, torch.float32, training)
        for tensor in batched(arguments).values():
            torch._dynamo.mark_dynamic(tensor, 0)
        outputs, tensors = pytree.tree_leaves(function(**arguments)), tensors_of(arguments)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        loss = torch.stack([output.sin().sum() for output in outputs]).sum()
        return [*outputs, *(torch.autograd.grad(loss, wanted) if wanted else ()), *tensors]

    for size in (2, 3):
        arguments = batches(op, training, size)
        for one, other in zip(trained(compiled, arguments), trained(getattr(ops, op), arguments), strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.usefixtures("kernels_first")
@pytest.mark.parametrize("op", CALLS)
def test_compiles_whole_for_the_sizes_it_sees(op):
    torch._dynamo.reset()
    arguments = CALLS[op](False)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        for one, other in zip(pytree.tree_leaves(compiled(**arguments)), call(op, arguments), strict=True):
            assert torch.equal(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("op", [op for op in CALLS if "attention" in op])
def test_one_tensor_as_queries_keys_and_values_compiles_with_its_gradient(op):
    torch._dynamo.reset()
    arguments = CALLS[op](False)
    for each in ("mask", "bias"):
        if each in arguments and op != "re_attention":
            arguments.pop(each)

    def loss(x: Tensor) -> Tensor:
        return getattr(ops, op)(**arguments | {"q": x, "k": x, "v": x, "mask": None}).sin().sum()

    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,), (expected,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("op", CALLS)
def test_fake_tensors_are_checked_and_give_the_sizes(op):
    wrong, value = WRONG[op]
    with FakeTensorMode() as mode:
        arguments = pytree.tree_map_only(Tensor, mode.from_tensor, CALLS[op](False))
        value = mode.from_tensor(value) if isinstance(value, Tensor) else value
        found = call(op, arguments)
        with pytest.raises(ValueError, match=f"^{wrong}: expected "):
            call(op, arguments | {wrong: value})
    assert [(out.shape, out.dtype) for out in found] == [(out.shape, out.dtype) for out in plain(op, CALLS[op](False))]


# --- Kernels that no GPU has proven ----------------------------------------------------------------------------------

OPT_IN = Operator(
    "double",
    tuple(Implementation(name, times(place)) for place, name in enumerate(("cuda", "triton", "sdpa", "reference"))),
    check,
)


def chosen_on_a_gpu(backend: str = "auto") -> Selection:
    """The choice for a tensor on a GPU, which has no contents."""
    seen: list[Selection] = []
    with FakeTensorMode(), recording(seen.append), autotune.unmeasured():
        OPT_IN(Call(torch.empty(4, device="cuda")), backend)
    return seen[0]


@pytest.fixture
def nothing_proven(monkeypatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(backends, "UNPROVEN", False)
    monkeypatch.setattr(backends, "PROVEN", {})
    monkeypatch.setattr(backends, "chip_of", lambda device: "sm_90")
    return monkeypatch


def test_unproven_kernels_are_not_taken_unasked_and_it_is_told(nothing_proven):
    choice = chosen_on_a_gpu()
    assert choice.backend == "sdpa"
    why = ["it has not been proven on this kind of GPU yet: FASTVIT_UNPROVEN=1 or its name takes it"]
    assert choice.turned_down == {"cuda": why, "triton": why}
    assert len(why[0]) < 120
    with recording(lambda choice: None):
        assert OPT_IN(Call(torch.ones(4)))[0] == 0.0, "the first, on a CPU"


def test_unproven_kernels_are_taken_by_name_by_request_or_where_allowed(nothing_proven):
    assert chosen_on_a_gpu("triton").backend == "triton"
    nothing_proven.setattr(backends, "REQUESTED", frozenset({"triton"}))
    assert chosen_on_a_gpu().backend == "triton"
    nothing_proven.setattr(backends, "REQUESTED", None)
    nothing_proven.setattr(backends, "UNPROVEN", True)
    assert chosen_on_a_gpu().backend == "cuda"


def test_a_kernel_is_taken_on_the_chip_that_proved_it_for_the_operator_alone(nothing_proven):
    for table, backend in (
        ({"double triton": ("sm_80", "sm_90")}, "triton"),
        ({"double triton": ("sm_80",)}, "sdpa"),
        ({"other triton": ("sm_90",)}, "sdpa"),
    ):
        nothing_proven.setattr(backends, "PROVEN", table)
        assert chosen_on_a_gpu().backend == backend


def test_what_is_proven_can_be_traced(nothing_proven):
    nothing_proven.undo()
    nothing_proven.setattr(backends, "UNPROVEN", False)
    nothing_proven.setattr(backends, "PROVEN", {"double triton": ("sm_90",)})
    nothing_proven.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def count(x: Tensor) -> Tensor:
        gpu = torch.device("cuda")
        return x * (1 + len(backends.unproven_reasons("double", "cuda", gpu))) + len(
            backends.unproven_reasons("double", "triton", gpu)
        )

    torch._dynamo.reset()
    assert torch.compile(count, fullgraph=True, backend="eager")(torch.ones(1)) == 2.0
    torch._dynamo.reset()


@pytest.mark.parametrize("op", ["head_mixed_attention", "token_depthwise_conv"])
def test_a_block_whose_kernels_are_unproven_is_told_to_run_plain(op, nothing_proven):
    pytest.importorskip("triton")

    def why() -> str | None:
        with FakeTensorMode():
            return preference._runs_plain.__wrapped__(op, torch.float16, torch.device("cuda", 0))

    assert why().startswith("nothing faster here: it has not been proven")
    nothing_proven.setattr(backends, "PROVEN", {f"{op} triton": ("sm_90",)})
    assert why() is None


def test_info_says_what_is_proven_in_a_sentence(nothing_proven):
    assert backends._proven_here(None) is None
    gpu = torch.device("cuda")
    assert backends._proven_here(gpu) == (
        "Kernels proven on sm_90: none; all other Triton and CUDA kernels are taken by name, or with "
        "FASTVIT_UNPROVEN=1."
    )
    nothing_proven.setattr(backends, "PROVEN", {"leff triton": ("sm_90",), "leff cuda": ("sm_80",)})
    nothing_proven.setattr(backends, "UNPROVEN", True)
    assert backends._proven_here(gpu).startswith("Kernels proven on sm_90: leff triton; all other")
