"""CeiT's feed-forward against its plain twin: both forms, with and without norms, inference and training."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit import backends
from fastvit.ops import leff
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm
from tests.helpers import CallCounter, assert_as_accurate
from tests.ops.composed import Arguments, check_inference, check_training, converted, random_norm

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
DTYPES = (torch.float32, torch.bfloat16)
DTYPES_AT_INFERENCE = (*DTYPES, torch.float16)


def make(
    grid: tuple[int, int] = (7, 5), prefix: int = 1, form: str = "official", channels: int = 24, batch: int = 2,
    kernel: int = 3, norms: bool = True, batch_statistics: bool = False, **changes: Any
) -> Arguments:  # fmt: skip
    hidden = 2 * channels + 4

    def norm(size: int) -> BatchNorm | None:
        return random_norm(size, batch_statistics) if norms else None

    return {
        "x": torch.randn(batch, prefix + grid[0] * grid[1], channels),
        "up_weight": torch.randn(hidden, channels) / channels**0.5,
        "up_bias": torch.randn(hidden),
        "dw_weight": torch.randn(hidden, 1, kernel, kernel) / kernel,
        "dw_bias": torch.randn(hidden),
        "down_weight": torch.randn(channels, hidden) / hidden**0.5,
        "down_bias": torch.randn(channels),
        "up_norm": norm(hidden),
        "dw_norm": norm(hidden),
        "down_norm": norm(channels),
        "grid": grid,
        "prefix_tokens": prefix,
        "form": form,
    } | changes


def random_layer_norm(channels: int) -> LayerNorm:
    return LayerNorm(torch.randn(channels), torch.randn(channels), 1e-6)


CASES = {
    "official": make(),
    "paper": make(form="paper"),
    "without norms": make(norms=False),
    "paper without norms": make(norms=False, form="paper"),
    "no prefix": make(prefix=0),
    "two prefix tokens": make(prefix=2, form="paper"),
    "one token": make((1, 1), batch=32),  # of few numbers the errors would be luck
    "odd": make((15, 15), channels=20, batch=1),
    "kernel 5": make((9, 8), kernel=5),
    "kernel 1": make((3, 3), kernel=1),
    "no biases": make(up_bias=None, dw_bias=None, down_bias=None),
    "no image": make(batch=0),
    "other width": make(prefix=0, down_weight=torch.randn(7, 52), down_bias=None, down_norm=None),
    "norm": make(norm=random_layer_norm(24)),
    "paper with norm": make(form="paper", norm=random_layer_norm(24)),
    "norm without weights": make(norm=LayerNorm(None, None, 1e-3)),
    "residual": make(residual=torch.randn(2, 36, 24)),
    "norm and residual": make(prefix=2, norm=random_layer_norm(24), residual=torch.randn(2, 37, 24)),
    "paper with norm and residual": make(
        form="paper", norm=random_layer_norm(24), residual=torch.randn(36, 2, 24).transpose(0, 1)
    ),
    "residual of another width": make(
        prefix=0, down_weight=torch.randn(7, 52), down_bias=None, down_norm=None, residual=torch.randn(2, 35, 7)
    ),
    "a norm of zeros": make(down_norm=random_norm(24)._replace(weight=torch.zeros(24))),
    "columns of several panels": make((4, 4), channels=72, norm=random_layer_norm(72)),
}


@pytest.fixture(params=["whole", "composed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether ``cpp`` computes all of it in one call."""
    monkeypatch.setattr(sys.modules["fastvit.ops.leff"], "takes_mlp", lambda call: request.param == "whole")
    return request.param


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_inference(case: str, dtype: torch.dtype, way: str, isa: str) -> None:
    check_inference(leff, functional.leff, converted(CASES[case], dtype), backend="cpp")


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
def test_large_sums_and_a_mean_far_from_zero(dtype: torch.dtype) -> None:
    case = make((14, 14), channels=96, batch=1, norm=random_layer_norm(96), residual=torch.randn(1, 197, 96))
    far = case["down_norm"]._replace(running_mean=torch.full((96,), 100.0))
    case = converted(case | {"down_norm": far, "down_bias": torch.full((96,), 100.0)}, dtype)
    check_inference(leff, functional.leff, case, backend="cpp")


@needs_cpp
def test_one_call_at_inference(way: str) -> None:
    case = make(norm=random_layer_norm(24), residual=torch.randn(2, 36, 24))
    counter = CallCounter()
    with torch.no_grad():
        leff(**case, backend="cpp")
        with counter:
            leff(**case, backend="cpp")
    assert (counter.names == ["fastvit.packed_leff.default"]) is (way == "whole"), counter.names
    case["down_weight"].requires_grad_()
    assert leff(**case).requires_grad
    case["down_weight"] = case["down_weight"].detach().bfloat16()  # which products of float32 do not take
    with torch.no_grad():
        got, expected = leff(**case), functional.leff(**case | {"down_weight": case["down_weight"].float()})
    torch.testing.assert_close(got, expected)


@needs_cpp
@pytest.mark.parametrize("paper", [False, True])
def test_opcheck(paper: bool) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    around, grid = (True, torch.randn(6), None, 1e-5), (torch.randn(2, 13, 6), 3, 4, 1, paper)
    up, down = (torch.randn(12, 6), torch.randn(12)), (torch.randn(6, 12), None)
    norms = [(torch.randn(size), None, torch.randn(size), torch.rand(size), 1e-5) for size in (12, 12, 6)]
    x, convolution = torch.randn(2, 13, 6), (torch.randn(12, 1, 3, 3), None, *norms[0], *norms[1])
    run = torch.ops.fastvit
    arguments = (x, *around, *up, *convolution, *down, *norms[2], *grid)
    torch.library.opcheck(run.leff.default, arguments, test_utils=tests)
    arguments = (x, *around, *up, None, *convolution, *down, None, *norms[2], *grid)
    torch.library.opcheck(run.packed_leff.default, arguments, test_utils=tests)


@needs_cpp
def test_changed_parameters_are_seen(way: str) -> None:
    case = make(norm=random_layer_norm(24))
    with torch.no_grad():
        for name in ("up_weight", "down_weight", "dw_weight", "down_bias"):
            leff(**case, backend="cpp")
            case[name].mul_(1.5)
            torch.testing.assert_close(leff(**case, backend="cpp"), functional.leff(**case), rtol=1e-4, atol=1e-4)
        for tensor in (*case["down_norm"][:4], *case["norm"][:2]):
            tensor.mul_(1.5)
            torch.testing.assert_close(leff(**case, backend="cpp"), functional.leff(**case), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_training(batch_statistics: bool, form: str, dtype: torch.dtype) -> None:
    case = make((5, 4), 1, form, channels=12, batch_statistics=batch_statistics)
    check_training(leff, functional.leff, converted(case, dtype))


def test_training_with_norm_and_residual() -> None:
    around = {"norm": random_layer_norm(12), "residual": torch.randn(2, 21, 12)}
    check_training(leff, functional.leff, make((5, 4), channels=12, **around))


def test_training_without_norms_and_prefix() -> None:
    check_training(leff, functional.leff, make((5, 4), 0, channels=12, norms=False))


def test_batch_statistics_without_gradients_leave_prefix_tokens_out() -> None:
    got = make(batch_statistics=True)
    expected = converted(got, torch.float32)
    got["x"][:, 0] = 1e6
    expected["x"][:, 0] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(leff(**got)[:, 1:], functional.leff(**expected)[:, 1:])
    for name in ("up_norm", "dw_norm", "down_norm"):
        torch.testing.assert_close(got[name].running_mean, expected[name].running_mean)
        torch.testing.assert_close(got[name].running_var, expected[name].running_var)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_prefix_tokens_pass_by(backend: str) -> None:
    official, paper = make(prefix=2), make(prefix=2, form="paper")
    official["x"][0, 1, 3] = float("nan")
    with torch.no_grad():
        got = leff(**official, backend=backend)
        assert torch.equal(got[:, :2].nan_to_num(9.0), official["x"][:, :2].nan_to_num(9.0))
        assert got[:, 2:].isfinite().all()
        assert leff(**paper, backend=backend)[:, :2].eq(0).all()


def test_the_argument_is_left_as_it_was() -> None:
    for form in functional.LEFF_FORMS:
        case = make(form=form, norms=False)
        before = case["x"].clone()
        with torch.no_grad():
            leff(**case)
        assert torch.equal(case["x"], before)


class Chain(nn.Module):
    """The feed-forward as a chain of layers on the map, for patch tokens alone."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.up, self.down = nn.Conv2d(6, 12, 1), nn.Conv2d(12, 6, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (12, 12, 6))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x.transpose(1, 2).unflatten(2, grid)
        x = torch.nn.functional.gelu(self.norms[0](self.up(x)))
        x = torch.nn.functional.gelu(self.norms[1](self.depthwise(x)))
        x = self.norms[2](self.down(x))
        return (torch.nn.functional.gelu(x) if self.form == "paper" else x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_the_twin_is_the_chain_of_layers(form: str) -> None:
    chain = Chain(form).double()
    x = torch.randn(2, 1 + 35, 6, dtype=torch.float64)
    expected = chain(x[:, 1:], (5, 7))
    for norm in chain.norms:
        norm.reset_running_stats()
    up, down = (conv.weight.flatten(1) for conv in (chain.up, chain.down))
    norms = dict(zip(("up_norm", "dw_norm", "down_norm"), map(BatchNorm.of, chain.norms), strict=True))
    got = functional.leff(
        x, up, chain.up.bias, chain.depthwise.weight, chain.depthwise.bias, down, chain.down.bias,
        grid=(5, 7), form=form, **norms,
    )  # fmt: skip
    torch.testing.assert_close(got[:, 1:], expected)


def test_gradcheck_of_the_twin() -> None:
    case = converted(make((2, 3), channels=3, batch=1), torch.float64)
    names = ("x", "up_weight", "dw_weight", "down_weight", "down_bias")
    tensors = [case[name].requires_grad_() for name in names]

    def run(*values: Tensor) -> Tensor:
        return functional.leff(**case | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("name", ["up_norm", "dw_norm", "down_norm"])
def test_a_norm_to_be_called_takes_the_plain_path(name: str) -> None:
    case = make()
    layer = nn.BatchNorm2d(case[name].running_mean.numel())
    case[name] = BatchNorm(None, None, None, None, True, layer=layer)
    with pytest.raises(RuntimeError, match="is a BatchNorm2d, which has to be called"):
        leff(**case, backend="cpp" if not backends.cpp_reasons() else "cuda")
    with torch.no_grad():
        leff(**case)
    assert layer.num_batches_tracked == 1


def test_other_dtypes_take_the_plain_path() -> None:
    for dtype in (torch.float16, torch.float64):
        got = leff(**converted(make(), dtype))
        assert got.dtype == dtype
    case = converted(make(), torch.float64)
    assert torch.equal(leff(**case), functional.leff(**case))
    mixed = converted(make(), torch.bfloat16, torch.float32)
    assert leff(**mixed).dtype == leff(**mixed, backend="reference").dtype == torch.bfloat16


@needs_cpp
@pytest.mark.parametrize("name", ["x", "up_weight", "dw_weight", "down_bias"])
def test_no_gradients_in_float16(name: str) -> None:
    case = converted(make(), torch.float16)
    case[name].requires_grad_()
    with pytest.raises(RuntimeError, match="it takes neither gradients nor statistics of a batch in float16"):
        leff(**case, backend="cpp")
    leff(**case).float().sum().backward()
    assert case[name].grad is not None


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("form", ["official", "paper"])
def test_autocast(form: str, prefix: int) -> None:
    case = make(prefix=prefix, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            got, plain = leff(**case), functional.leff(**case)
        assert got.dtype == plain.dtype
        torch.testing.assert_close(got, plain, atol=0.1, rtol=0.05)
        case["up_weight"].requires_grad_()
        leff(**case).sum().backward()
    assert case["up_weight"].grad is not None
    assert case["up_weight"].grad.dtype == torch.float32


@needs_cpp
def test_a_gradient_that_batch_statistics_cancel_in_bfloat16() -> None:
    """That of a bias in front of them, of which rounding alone is left."""
    x, grad = torch.randn(2, 2, 24, 40).bfloat16()
    weights = torch.randn(20, 40), None, torch.randn(20, 1, 3, 3), None, torch.randn(40, 20)
    bias, gamma, beta = torch.randn(3, 40).bfloat16()

    def gradient(form: Any, dtype: torch.dtype, **more: Any) -> Tensor:
        layers = [tensor if tensor is None else tensor.bfloat16().to(dtype) for tensor in weights]
        leaf = bias.to(dtype).requires_grad_()
        norm = BatchNorm(None, None, gamma.to(dtype), beta.to(dtype), use_batch_stats=True)
        out = form(x.to(dtype), *layers, leaf, grid=(4, 6), down_norm=norm, prefix_tokens=0, **more)
        return torch.autograd.grad(out, leaf, grad.to(dtype))[0]

    exact, plain = (gradient(functional.leff, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_as_accurate(gradient(leff, torch.bfloat16, backend="cpp"), plain, exact)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_channels(backend: str) -> None:
    """torch's batch norm has an IndexError for them, which came when the statistics in front had moved."""
    hidden, none = (BatchNorm(torch.zeros(n), torch.ones(n), torch.ones(n), None, n > 0) for n in (8, 0))
    weights = torch.randn(8, 0), None, torch.randn(8, 1, 3, 3), None, torch.randn(0, 8), None
    norms = {"dw_norm": hidden, "down_norm": none}
    out = leff(torch.randn(2, 14, 0), *weights, grid=(4, 3), **norms, prefix_tokens=2, backend=backend)
    assert out.shape == (2, 14, 0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_batch_statistics_take_the_biases_in_front_of_them_away(backend: str) -> None:
    """Their gradients are exactly zero where the bias is left out; running means move with them all the same."""
    case = converted(make(batch_statistics=True), torch.float32)
    expected = {name: case[name].running_mean.clone() for name in ("up_norm", "down_norm")}
    biases = [case[name].mul_(100.0).requires_grad_() for name in ("up_bias", "down_bias")]
    leff(**case, backend=backend).square().sum().backward()
    twin = converted(case, torch.float64)
    for name in expected:
        twin[name] = twin[name]._replace(running_mean=expected[name].double())
    functional.leff(**twin)
    for name in expected:
        torch.testing.assert_close(case[name].running_mean, twin[name].running_mean.float(), rtol=1e-5, atol=1e-4)
    if backend == "auto" and not backends.cpp_reasons():
        assert all(bias.grad.count_nonzero() == 0 for bias in biases)


def test_a_bias_of_nan_in_front_of_batch_statistics_is_seen() -> None:
    case = converted(make(batch_statistics=True), torch.float32)
    case["down_bias"][3] = float("nan")
    out = leff(**case)
    assert out[:, 1:, 3].isnan().all() and not out[:, :, :3].isnan().any()
    assert case["down_norm"].running_mean.isnan().nonzero().tolist() == [[3]]
