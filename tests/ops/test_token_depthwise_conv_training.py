"""Token depthwise convolution in training: every gradient and running statistics against the plain twin in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.ops import token_depthwise_conv
from fastvit.ops.token_depthwise_conv import NATIVE, Convolution, _runner
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, recomputing
from tests.helpers import assert_as_accurate, on_thread_counts, poisoned_empty
from tests.ops.test_token_depthwise_conv import ACTIVATIONS, DTYPES, LEFF, Case, make_arguments, needs_cpp, to

pytestmark = needs_cpp

TRAINED = ("x", "weight", "bias", "pre_norm.weight", "pre_norm.bias", "norm.weight", "norm.bias")
TRACKED = ("pre_norm.running_mean", "pre_norm.running_var", "norm.running_mean", "norm.running_var")
NORMS = {"pre_norm": True, "norm": True}

CASES = [
    *(
        Case((15, 15), 33, kernel=kernel, stride=stride, prefix=prefix, norm=norm)
        for kernel, stride, prefix, norm in (
            *((3, 1, 0, False), (3, 2, 1, True), (5, 1, 2, True), (5, 2, 0, False), (7, 1, 1, True), (7, 2, 2, False)),
        )
    ),
    *(Case((6, 7), pre_activation=activation, activation=activation, **NORMS) for activation in ACTIVATIONS),
    Case((7, 5), prefix=1, residual=True),
    Case((7, 5), prefix=2, residual=True, **LEFF),
    Case((7, 5), residual=True, pre_norm=True, activation="silu", bias=False, affine=False),
    Case((14, 14), 64, 3, **LEFF),
    Case((1, 1), 17, 3, prefix=1, residual=True, **NORMS),
    Case((2, 1), 5, kernel=7, norm=True),
    Case((8, 10), 48, stride=2, norm=True, bias=False),
    Case((56, 56), 16, 1, prefix=1, **LEFF),
    Case((3, 70), 40, norm=True),
    Case((8, 9), padding=0, **LEFF),
    Case((5, 5), padding=3, stride=2, **NORMS),
    Case((5, 6), kernel=4, padding=1, norm=True),
    Case((5, 6), kernel=4, padding=5, activation="gelu"),
    Case((9, 9), stride=3, padding=2, pre_activation="relu", **NORMS),
    Case((4, 4), kernel=1, activation="gelu"),
    Case((4, 3), 8, kernel=11, **LEFF),
    Case((4, 4), 400, 1, **LEFF),
    Case((9, 9), batch=4, size=100.0, **LEFF),
]


def with_statistics(arguments: dict[str, Any], batch_stats: bool) -> dict[str, Any]:
    norms = {
        name: arguments[name]._replace(use_batch_stats=batch_stats, momentum=0.3)
        for name in ("pre_norm", "norm")
        if arguments[name] is not None
    }
    return arguments | norms


def flatten(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of these (dotted) names that there are."""
    found = {}
    for name in names:
        value = arguments
        for part in name.split("."):
            value = None if value is None else value[part] if isinstance(value, dict) else getattr(value, part)
        if value is not None:
            found[name] = value
    return found


def train(run: Callable[..., Tensor], arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The result of a step on copies of the arguments, the gradient of every tensor, and the running statistics."""
    copies = {name: to(to(value, torch.float64), dtype) for name, value in arguments.items()}
    copies = {
        name: BatchNorm(*(item.clone() if isinstance(item, Tensor) else item for item in value))
        if isinstance(value, BatchNorm)
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for name, value in copies.items()
    }
    trained = flatten(copies, TRAINED)
    for tensor in trained.values():
        tensor.requires_grad_(True)
    out = run(**copies)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(arguments["x"].dtype)
    gradients = torch.autograd.grad(out, list(trained.values()), grad.to(dtype))
    results = {"output": out.detach()} | {f"d {name}": g for name, g in zip(trained, gradients, strict=True)}
    return results | flatten(copies, TRACKED)


def run_cpp(**arguments: Any) -> Tensor:
    return token_depthwise_conv(**arguments, backend="cpp")


def check(arguments: dict[str, Any]) -> None:
    """Hold a training step of the kernels to the reference's in the same dtype and in float64."""
    dtype = arguments["x"].dtype
    with poisoned_empty():
        got = train(run_cpp, arguments, dtype)
    plains = on_thread_counts(lambda: train(functional.token_depthwise_conv, arguments, dtype))
    exact = train(functional.token_depthwise_conv, arguments, torch.float64)
    assert got.keys() == plains[0].keys()
    for name in got:
        assert_as_accurate(got[name], [plain[name] for plain in plains], exact[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_batch_statistics(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(with_statistics(make_arguments(case, dtype), True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.norm or case.pre_norm][::3], ids=str)
def test_with_running_statistics(case: Case, dtype: torch.dtype) -> None:
    check(with_statistics(make_arguments(case, dtype), False))


@pytest.mark.parametrize("batch_stats", [False, True])
def test_autocast_and_float32_parameters_beside_bfloat16_tokens(batch_stats: bool) -> None:
    arguments = with_statistics(make_arguments(Case((7, 5), **LEFF), torch.bfloat16, torch.float32), batch_stats)
    for name, norm in (("pre_norm", arguments["pre_norm"]), ("norm", arguments["norm"])):
        arguments[name] = norm._replace(weight=norm.weight.requires_grad_(), bias=norm.bias.requires_grad_())
    trained = flatten(arguments | {"weight": arguments["weight"].requires_grad_()}, TRAINED[1:])
    trained.pop("bias")
    got, plain = [], []
    for run, results in ((run_cpp, got), (functional.token_depthwise_conv, plain)):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(**arguments)
        assert out.dtype == torch.bfloat16
        results += torch.autograd.grad(out.float().square().sum(), list(trained.values()))
    for name, mine, theirs in zip(trained, got, plain, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.999, name


@pytest.mark.parametrize("case", [Case((9, 15), 33, kernel=5, norm=True), Case((6, 7), norm=True, prefix=1)], ids=str)
def test_no_gradient_passes_batch_statistics_that_is_the_same_for_every_token(case: Case, isa: str) -> None:
    """As that of a mean over tokens: the norm takes its mean away, to the last digit."""
    arguments = with_statistics(make_arguments(case, torch.float32), True)
    leaves = {name: tensor.requires_grad_() for name, tensor in flatten(arguments, TRAINED).items()}
    out = run_cpp(**arguments)[:, case.prefix :]
    grad = torch.randn(1, 1, out.shape[2]).expand_as(out)
    got = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    for name in ("x", "weight", "bias", "norm.weight"):
        assert not got[name].any(), name


@pytest.mark.parametrize("layout", ["rows", "expanded", "channels", "reversed tokens"])
def test_x_and_gradient_with_other_strides(layout: str) -> None:
    arguments = with_statistics(make_arguments(Case((6, 5), 24, prefix=1, residual=True, **NORMS), torch.float32), True)
    x, grad = torch.randn(4, 62, 48), torch.randn(4, 62, 48)

    def laid_out(tensor: Tensor) -> Tensor:
        return {
            "rows": tensor[:2, 3:34, 8:32],
            "expanded": tensor[:1, :31, :24].expand(2, -1, -1),
            "channels": tensor[:2, :31, ::2],
            "reversed tokens": tensor.transpose(1, 2)[:2, :31, :24],
        }[layout]

    arguments["x"] = laid_out(x).detach().requires_grad_()
    got = torch.autograd.grad(run_cpp(**arguments), arguments["x"], laid_out(grad))[0]
    dense = arguments | {"x": arguments["x"].detach().contiguous().requires_grad_()}
    assert torch.equal(got, torch.autograd.grad(run_cpp(**dense), dense["x"], laid_out(grad).contiguous())[0])


@pytest.mark.parametrize("names", [("x",), ("weight",), ("pre_norm.weight",), ("norm.bias", "x")], ids=str)
@pytest.mark.parametrize("batch_stats", [False, True])
def test_only_the_gradients_asked_for(names: tuple[str, ...], batch_stats: bool) -> None:
    arguments = with_statistics(make_arguments(Case((6, 5), 24, prefix=1, **LEFF), torch.float32), batch_stats)
    every = flatten(arguments, TRAINED)
    grads = []
    for trained in (every, {name: every[name] for name in names}):
        for tensor in every.values():
            tensor.requires_grad_(any(tensor is other for other in trained.values()))
        run_cpp(**arguments).square().sum().backward()
        grads.append({name: tensor.grad for name, tensor in every.items()})
        for tensor in every.values():
            tensor.grad = None
    for name in every:
        assert grads[1][name] is None if name not in names else torch.equal(grads[0][name], grads[1][name])


def test_same_gradients_whatever_the_threads() -> None:
    arguments = with_statistics(make_arguments(Case((20, 9), 48, 3, prefix=1, **LEFF), torch.float32), True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(train(run_cpp, arguments, torch.float32))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name


@pytest.mark.parametrize("batch_stats", [False, True])
def test_empty_batch(batch_stats: bool) -> None:
    arguments = with_statistics(make_arguments(Case((4, 4), batch=0, **LEFF), torch.float32), batch_stats)
    run = token_depthwise_conv if batch_stats else run_cpp
    for value in train(lambda **kwargs: run(**kwargs), arguments, torch.float32).values():
        assert value.isfinite().all()


@pytest.mark.parametrize(("case", "maps"), [(LEFF, 2), ({}, 1)], ids=["finished", "plain"])
def test_of_maps_only_x_is_kept_and_the_result_where_something_follows(case: dict[str, Any], maps: int) -> None:
    arguments = with_statistics(make_arguments(Case((8, 8), 64, 4, **case), torch.float32), True)
    arguments["weight"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run_cpp(**arguments)
    assert sum(tensor.numel() >= arguments["x"].numel() for tensor in kept) == maps


class _PassesNothingBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_a_result_whose_user_passes_nothing_back() -> None:
    arguments = make_arguments(Case((5, 4), norm=True), torch.float32)
    x = arguments["x"].requires_grad_()
    (_PassesNothingBack.apply(token_depthwise_conv(**arguments)).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# --- Running statistics ---------------------------------------------------------------------------------------------


def layer(**options: Any) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    return norm


def steps(run: Callable[..., Tensor], norms: list[nn.BatchNorm2d], count: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    weight, tracked = torch.randn(24, 1, 3, 3), {}
    for _ in range(count):
        first, second = (BatchNorm.of(norm) for norm in norms)
        out = run(x=torch.randn(2, 30, 24), weight=weight, grid=(6, 5), pre_norm=first, norm=second)
    for i, norm in enumerate(norms):
        tracked |= {f"{i}.{name}": buffer.clone() for name, buffer in norm.named_buffers()}
    return tracked | {"output": out.detach()}


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"track_running_stats": False}, {"affine": False}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_statistics_move_as_the_layers_own(options: dict[str, Any], training: bool, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        got, plain = (
            steps(run, [layer(**options).train(training) for _ in range(2)])
            for run in (run_cpp, functional.token_depthwise_conv)
        )
    assert got.keys() == plain.keys()
    for name in got:
        torch.testing.assert_close(got[name], plain[name], atol=1e-5, rtol=1e-5)


def test_recomputation_counts_no_batch_twice() -> None:
    norms = [layer(), layer()]
    before = [buffer.clone() for norm in norms for buffer in norm.buffers()]
    with recomputing():
        steps(run_cpp, norms)
    assert all(torch.equal(*pair) for pair in zip(before, [b for norm in norms for b in norm.buffers()], strict=True))


def test_reasons_of_norms() -> None:
    arguments = make_arguments(Case((1, 1), 8, batch=1, norm=True), torch.float32)
    one_value = with_statistics(arguments, True)
    other_layer = arguments | {"norm": BatchNorm.of(nn.Identity())}
    tracked = arguments["norm"]._replace(running_mean=torch.zeros(8, requires_grad=True))
    for message, bad in (
        ("a norm is a Identity, which has to be called", other_layer),
        ("running statistics need gradients", arguments | {"norm": tracked}),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_cpp(**bad)
    for run in (run_cpp, token_depthwise_conv):  # no backend takes that
        with pytest.raises(ValueError, match="norm: Expected more than 1 value per channel when training"):
            run(**one_value)


# --- torch.compile and the operators ----------------------------------------------------------------------------------


def step(weight: Tensor, norm_weight: Tensor, arguments: dict[str, Any]) -> Tensor:
    norm = arguments["norm"]._replace(weight=norm_weight)
    return token_depthwise_conv(**arguments | {"weight": weight, "norm": norm}, backend="cpp").square().sum()


@pytest.mark.parametrize("batch_stats", [False, True])
def test_compiles_forward_and_backward_in_one_graph(batch_stats: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        arguments = with_statistics(
            make_arguments(Case((5, 4), 24, batch=batch, prefix=1, **LEFF), torch.float32), batch_stats
        )
        results = []
        for run in (step, compiled):
            norm = arguments["norm"]
            own = arguments["norm"]._replace(
                running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone()
            )
            weight, norm_weight = arguments["weight"].clone().requires_grad_(), norm.weight.clone().requires_grad_()
            loss = run(weight, norm_weight, arguments | {"norm": own})
            loss.backward()
            results.append((loss.detach(), weight.grad, norm_weight.grad, own.running_mean, own.running_var))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batch_stats", [False, True])
def test_opcheck(batch_stats: bool) -> None:
    arguments = with_statistics(make_arguments(Case((5, 4), 24, prefix=1, **LEFF), torch.float32), batch_stats)
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    def spying(operator: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append((operator, args))
            return operator(*args)

        return call

    spies = NATIVE._replace(training=spying(NATIVE.training), backward=spying(NATIVE.backward))
    arguments["x"].requires_grad_()
    _runner(spies)(Convolution(**arguments)).sum().backward()
    assert [operator for operator, _ in seen] == [NATIVE.training, NATIVE.backward]
    for operator, args in seen:
        plain = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, plain, test_utils=tests)


def test_the_kernels_themselves_check() -> None:
    arguments = with_statistics(make_arguments(Case((5, 4), 8, prefix=1, **LEFF), torch.float32), True)
    x, norm = arguments["x"], (None, None, None, None, 1e-5)
    given = (None, None, torch.zeros(8), torch.ones(8), 1e-5)
    geometry = (5, 4, 1, 1, 1, False)
    training, backward = NATIVE.training, NATIVE.backward

    def go(grad: Tensor, conv: Tensor, with_norm: tuple[Any, ...] = given) -> None:
        backward(grad, x, conv, arguments["weight"], None, *norm, False, 0, *with_norm, True, 0, *geometry, True, True)

    bad: dict[str, Callable[[], Any]] = {
        "statistics are either given or the batch's, got both": lambda: training(
            x, arguments["weight"], None, *norm, False, 0, *given, True, 0, *geometry
        ),
        "grad must be (2, 21, 8)": lambda: go(torch.zeros(2, 20, 8), x.new_empty(0)),
        "conv must be what": lambda: go(torch.zeros(2, 21, 8), torch.zeros(5)),
        "the statistics of the forward pass are missing": lambda: go(torch.zeros(2, 21, 8), x.new_empty(0), norm),
    }
    for message, run in bad.items():
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run()
