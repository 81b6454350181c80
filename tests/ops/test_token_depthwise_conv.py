"""Depthwise convolution of tokens against its plain twin in float64: every instruction set, epilogue and odd size."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops import token_depthwise_conv
from fastvit.ops._schema import ACTIVATION_CODES, unpack
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, poisoned_empty

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc")
DTYPES = (torch.float32, torch.bfloat16)
DTYPES_AT_INFERENCE = (*DTYPES, torch.float16)
ACTIVATIONS = (None, "gelu", "quick_gelu", "silu", "relu", "gelu_tanh")


class Case(NamedTuple):
    """A shape of the operator and what surrounds the convolution."""

    grid: tuple[int, int]
    channels: int = 40
    batch: int = 2
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    prefix: int = 0
    bias: bool = True
    pre_norm: bool = False
    pre_activation: str | None = None
    norm: bool = False
    activation: str | None = None
    residual: bool = False
    affine: bool = True
    size: float = 1.0

    def __str__(self) -> str:
        changed = (
            f"{name}={value}" for name, value in self._asdict().items() if value != self._field_defaults.get(name)
        )
        return ",".join(changed).replace(" ", "")


LEFF: dict[str, Any] = {"pre_norm": True, "pre_activation": "gelu", "norm": True, "activation": "gelu"}

CASES = [
    # Kernels and strides, with prefix tokens and channels that end within a vector.
    *(
        Case((15, 15), 33, kernel=kernel, stride=stride, prefix=prefix)
        for kernel, stride, prefix in ((3, 1, 0), (3, 2, 1), (5, 1, 2), (5, 2, 0), (7, 1, 1), (7, 2, 2))
    ),
    # Epilogues.
    *(Case((6, 7), pre_activation=activation, activation=activation) for activation in ACTIVATIONS),
    Case((7, 5), prefix=1, **LEFF),
    Case((14, 14), 96, norm=True, activation="quick_gelu", pre_norm=True, affine=False, bias=False),
    Case((14, 14), 192, 1, residual=True),
    Case((9, 4), prefix=2, residual=True, **LEFF),
    Case((7, 5), residual=True, activation="silu"),
    Case((7, 5), residual=True, pre_norm=True),
    Case((6, 6), 20, kernel=5, residual=True, norm=True),
    # Grids: smaller than the kernel, odd, even, wide.
    Case((1, 1), 17, prefix=1, residual=True),
    Case((1, 1), 16, stride=2),
    Case((2, 1), 5, kernel=7),
    Case((1, 9), 64, stride=2, norm=True),
    Case((8, 10), 48, stride=2, norm=True, bias=False),
    Case((9, 7), 48, stride=2),
    Case((56, 56), 64, 1, prefix=1, **LEFF),
    Case((3, 70), 130, 1, norm=True),
    # Other geometry than the models'.
    Case((8, 9), padding=0),
    Case((5, 5), padding=3, stride=2),
    Case((5, 6), kernel=4, padding=1),
    Case((9, 9), stride=3, padding=2, pre_activation="relu", pre_norm=True),
    Case((4, 4), kernel=1),
    Case((4, 3), 8, kernel=11),
    # Sizes.
    Case((4, 4), batch=0),
    Case((5, 5), channels=1),
    Case((14, 14), 400, 1, **LEFF),
    Case((5, 5), size=1e4, **LEFF),
    Case((5, 5), size=1e-4, pre_activation="gelu", activation="gelu"),
    Case((5, 5), size=1e18, pre_activation="quick_gelu", activation="relu"),
]


def make_norm(channels: int, dtype: torch.dtype, affine: bool) -> BatchNorm:
    mean, var, bias = torch.randn(channels), 0.5 + torch.rand(channels), torch.randn(channels)
    weight = 0.5 + torch.rand(channels)
    return BatchNorm(
        mean.to(dtype),
        var.to(dtype),
        weight.to(dtype) if affine else None,
        bias.to(dtype) if affine else None,
        eps=1e-5,
    )


def make_arguments(case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None) -> dict[str, Any]:
    of = parameter_dtype or dtype
    tokens = case.prefix + case.grid[0] * case.grid[1]
    return {
        "x": (case.size * torch.randn(case.batch, tokens, case.channels)).to(dtype),
        "weight": torch.randn(case.channels, 1, case.kernel, case.kernel).to(of),
        "bias": torch.randn(case.channels).to(of) if case.bias else None,
        "grid": case.grid,
        "stride": case.stride,
        "padding": case.padding,
        "prefix_tokens": case.prefix,
        "pre_norm": make_norm(case.channels, of, case.affine) if case.pre_norm else None,
        "pre_activation": case.pre_activation,
        "norm": make_norm(case.channels, of, case.affine) if case.norm else None,
        "activation": case.activation,
        "residual": case.residual,
    }


def to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return BatchNorm(*(to(item, dtype) for item in value)) if isinstance(value, BatchNorm) else value


def check(run: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    """Hold run(**arguments) to the reference in the same dtype and in float64."""
    with torch.no_grad():
        with poisoned_empty():
            got = run(**arguments)
        same = {name: to(value, arguments["x"].dtype) for name, value in arguments.items()}
        oracle = {name: to(value, torch.float64) for name, value in arguments.items()}
        plain, exact = functional.token_depthwise_conv(**same), functional.token_depthwise_conv(**oracle)
    assert_as_accurate(got, plain, exact)
    prefix = arguments["prefix_tokens"]
    assert torch.equal(got[:, :prefix], arguments["x"][:, :prefix])


def run_cpp(**arguments: Any) -> Tensor:
    return token_depthwise_conv(**arguments, backend="cpp")


# --- The C++ kernels ------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(run_cpp, make_arguments(case, dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
@pytest.mark.parametrize(("stride", "residual"), [(1, False), (1, True), (2, False)])
def test_every_edge_of_the_tiles(stride: int, residual: bool, dtype: torch.dtype, isa: str) -> None:
    """Maps of every small size: rows in pairs and alone, columns in fours, twos and alone, each with its padding;
    vectors of channels that are whole, overlap, or lie in several blocks of them.
    """
    for (height, width), channels in itertools.product(itertools.product(range(1, 6), range(1, 10)), (16, 40, 290)):
        case = Case((height, width), channels, 2, stride=stride, residual=residual, norm=True, prefix=1)
        check(run_cpp, make_arguments(case, dtype))


@needs_cpp
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_of_rows_give_what_whole_maps_do(stride: int, isa: str) -> None:
    arguments = make_arguments(Case((59, 60), 80, 1, stride=stride, norm=True), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run_cpp(**arguments)
        torch.set_num_threads(3)
        assert torch.equal(run_cpp(**arguments), whole)
    finally:
        torch.set_num_threads(threads)


LARGE = (
    Case((64, 64), 64, 3, prefix=1, residual=True),
    Case((96, 96), 48, 5, stride=2, norm=True),
    Case((64, 64), 64, 3, prefix=2, **LEFF),
    Case((64, 64), 64, 3, kernel=5, activation="relu"),
)
"""Maps so large together that their results and gradients go past the caches, which those of one alone do not."""


@needs_cpp
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_results_are_those_of_each_map(case: Case, trains: bool, isa: str) -> None:
    arguments = make_arguments(case, torch.float32)
    grad = torch.randn_like(functional.token_depthwise_conv(**arguments))

    def run(maps: slice) -> tuple[Tensor, ...]:
        x = arguments["x"][maps].clone().requires_grad_(trains)
        with poisoned_empty():
            out = run_cpp(**arguments | {"x": x})
        return (out.detach(), *(torch.autograd.grad(out, x, grad[maps]) if trains else ()))

    whole = run(slice(None))
    for i in range(case.batch):
        each = run(slice(i, i + 1))
        assert all(torch.equal(one, of[i : i + 1]) for one, of in zip(each, whole, strict=True))


@needs_cpp
@pytest.mark.parametrize("seed", range(3))
def test_other_numbers(seed: int, isa: str) -> None:
    torch.manual_seed(seed)
    check(run_cpp, make_arguments(Case((11, 6), 72, prefix=1, **LEFF), torch.float32))


@needs_cpp
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_value_of_gelu(activation: str, isa: str) -> None:
    """A 1x1 kernel of ones: the activation alone, over the whole range where it is neither 0 nor x."""
    x = torch.linspace(-12, 12, 40000).reshape(1, 1000, 40)
    check(run_cpp, make_arguments(Case((25, 40), kernel=1, bias=False), torch.float32) | {
        "x": x, "weight": torch.ones(40, 1, 1, 1), "activation": activation,
    })  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu", "relu", "gelu_tanh"])
def test_activations_keep_nan_and_saturate(activation: str, isa: str) -> None:
    x = torch.tensor([float("nan"), 1e30, -1e30, 3e38, -100.0, 0.0, float("inf")]).expand(1, 1, 7)
    got = run_cpp(x=x.contiguous(), weight=torch.ones(7, 1, 1, 1), grid=(1, 1), activation=activation).flatten()
    assert got[0].isnan()
    assert got[1:].tolist() == [1.0000000150474662e30, 0.0, pytest.approx(3e38), 0.0, 0.0, float("inf")]


@needs_cpp
def test_infinite_inputs_stay_in_their_window(isa: str) -> None:
    x = torch.zeros(1, 49, 24)
    x[0, 24] = float("inf")
    got = run_cpp(x=x, weight=torch.ones(24, 1, 3, 3), grid=(7, 7))
    window = torch.zeros(7, 7, dtype=torch.bool)
    window[2:5, 2:5] = True
    assert torch.equal(got[0, :, 0].isinf(), window.flatten())
    assert torch.equal(got[0, :, 0][~window.flatten()], torch.zeros(40))


@needs_cpp
def test_float32_parameters_beside_bfloat16_tokens(isa: str) -> None:
    arguments = make_arguments(Case((7, 5), prefix=1, **LEFF), torch.bfloat16, torch.float32)
    check(run_cpp, arguments)
    auto = token_depthwise_conv(**arguments)
    assert torch.equal(auto, run_cpp(**arguments))
    plain = token_depthwise_conv(**arguments, backend="reference")
    torch.testing.assert_close(auto, plain, atol=0.1, rtol=0.05)


@needs_cpp
@pytest.mark.parametrize("layout", ["rows", "batch", "expanded", "channels", "reversed tokens"])
def test_x_with_other_strides(layout: str, isa: str) -> None:
    arguments = make_arguments(Case((6, 5), 24, prefix=1, residual=True), torch.float32)
    x = torch.randn(4, 62, 48)
    arguments["x"] = {
        "rows": x[:2, 3:34, 8:32],
        "batch": x[::2, :31, :24],
        "expanded": x[:1, :31, :24].expand(2, -1, -1),
        "channels": x[:2, :31, ::2],
        "reversed tokens": x.transpose(1, 2)[:2, :31, :24],
    }[layout]
    check(run_cpp, arguments)


@needs_cpp
def test_weight_of_a_channels_last_model() -> None:
    arguments = make_arguments(Case((6, 5)), torch.float32)
    arguments["weight"] = arguments["weight"].to(memory_format=torch.channels_last)
    arguments["bias"] = torch.randn(80)[::2]
    check(run_cpp, arguments)


@needs_cpp
def test_same_result_whatever_the_threads() -> None:
    arguments = make_arguments(Case((48, 40), 96, 1, prefix=1, **LEFF), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_cpp(**arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- The operator ---------------------------------------------------------------------------------------------------


def low_level_arguments(arguments: dict[str, Any]) -> tuple[Any, ...]:
    before, after = unpack(arguments["pre_norm"]), unpack(arguments["norm"])
    kernel = arguments["weight"].shape[-1]
    return (
        *(arguments[name] for name in ("x", "weight", "bias")),
        *(*before, ACTIVATION_CODES[arguments["pre_activation"]]),
        *(*after, ACTIVATION_CODES[arguments["activation"]], *arguments["grid"]),
        arguments["stride"],
        kernel // 2 if arguments["padding"] is None else arguments["padding"],
        *(arguments["prefix_tokens"], arguments["residual"]),
    )


@needs_cpp
@pytest.mark.parametrize("case", [Case((5, 4), prefix=1, **LEFF), Case((6, 5), 8, stride=2)], ids=str)
def test_opcheck(case: Case) -> None:
    arguments = make_arguments(case, torch.float32)
    wide = torch.randn(case.batch, arguments["x"].shape[1], case.channels + 8)
    for x in (arguments["x"], wide[:, :, : case.channels]):
        flat = low_level_arguments(arguments | {"x": x})
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.fastvit.token_depthwise_conv.default, flat, test_utils=tests)


@needs_cpp
@pytest.mark.parametrize("change", [{"norm": True}, {"prefix": 1}, {"residual": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast_the_dtype_is_the_references(change: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = make_arguments(Case((4, 4), **change), dtype, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = run_cpp(**arguments), functional.token_depthwise_conv(**arguments)
    assert got.dtype == plain.dtype
    torch.testing.assert_close(got, plain, atol=0.1, rtol=0.05)


def test_reference_takes_what_the_kernels_do_not() -> None:
    case = Case((5, 4), **LEFF)
    arguments = make_arguments(case, torch.float64)
    assert torch.equal(token_depthwise_conv(**arguments), functional.token_depthwise_conv(**arguments))


@needs_cpp
def test_float16_is_for_inference() -> None:
    arguments = make_arguments(Case((5, 4), **LEFF), torch.float16)
    batch = arguments | {"norm": arguments["norm"]._replace(use_batch_stats=True)}
    grows = arguments | {"x": arguments["x"].requires_grad_()}
    for each, why in (
        (batch, "it takes no statistics of a batch in float16"),
        (grows, "it has no backward in float16"),
    ):
        with pytest.raises(RuntimeError, match=why):
            run_cpp(**each)
        assert torch.equal(token_depthwise_conv(**each), functional.token_depthwise_conv(**each))
    with torch.no_grad():
        run_cpp(**grows)
    ops = torch.ops.fastvit
    inference, training = (
        [argument.name for argument in op.default._schema.arguments]
        for op in (ops.token_depthwise_conv, ops.token_depthwise_conv_training)
    )
    given = dict(zip(inference, low_level_arguments(arguments | {"x": arguments["x"].detach()}), strict=True))
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16 on the CPU, got float16"):
        ops.token_depthwise_conv_training(*(given.get(name, False) for name in training))


# --- Refusals -------------------------------------------------------------------------------------------------------

GOOD = make_arguments(Case((5, 4), 8, prefix=1), torch.float32)


def test_backend_asked_for_gives_every_reason() -> None:
    arguments = make_arguments(Case((5, 4), norm=True), torch.float64)
    arguments["norm"] = arguments["norm"]._replace(layer=torch.nn.Identity())
    with pytest.raises(RuntimeError) as error:
        run_cpp(**arguments)
    for reason in ("dtype torch.float64 is not one of", "a norm is a Identity, which has to be called"):
        assert reason in str(error.value)


@needs_cpp
def test_the_kernel_itself_checks() -> None:
    """What reaches the operator without the public function must not read beyond a tensor."""
    run = torch.ops.fastvit.token_depthwise_conv
    names = [argument.name for argument in run.default._schema.arguments]
    good = dict(zip(names, low_level_arguments(GOOD), strict=False))
    run(**good)
    bad = {
        "x must be float32, bfloat16 or float16 on the CPU, got float64": {"x": GOOD["x"].double()},
        "weight must be float32 or of x's dtype": {"weight": GOOD["weight"].bool()},
        "weight must be (C, 1, k, k)": {"weight": torch.zeros(8, 1, 3, 5)},
        "bias must be contiguous with 8 elements": {"bias": torch.zeros(7)},
        "norm_mean and norm_var must be given together": {"norm_mean": torch.zeros(8)},
        "x has 21 tokens, expected 1 + 5 * 5": {"width": 5},
        "activation must be a code from 0 to 5, got 6": {"activation": 6},
        "stride must be at least 1, got 0": {"stride": 0},
        "weight: a kernel of 7 does not fit into the padded grid": {"weight": torch.zeros(8, 1, 7, 7), "padding": 0},
        "residual needs a convolution that keeps the grid": {"residual": True, "stride": 2},
    }
    for message, change in bad.items():
        with pytest.raises(RuntimeError, match=re.escape(f"token_depthwise_conv: {message}")):
            run(**good | change)


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
def test_the_kernel_takes_any_strides_and_any_floating_parameters(training: bool) -> None:
    """As the plain form does; parameters are exact in half precision here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 21, 8, generator=generator)
    sizes = {"weight": (8, 1, 3, 3), "bias": (8,), "gamma": (8,), "beta": (8,), "mean": (8,)}
    dense = {name: torch.randn(size, generator=generator).half().float() for name, size in sizes.items()}
    results = []
    for dtype, strided in (
        (torch.float32, False),
        (torch.float32, True),
        (torch.float16, False),
        (torch.float64, True),
    ):
        of = {name: tensor.to(dtype, copy=True) for name, tensor in dense.items()}
        inputs = x.clone()
        if strided:
            inputs = inputs.mT.contiguous().mT
            of = {name: torch.stack((tensor, tensor), -1)[..., 0] for name, tensor in of.items()}
        leaves = [inputs, *of.values()]
        for leaf in leaves:
            leaf.requires_grad_(training and leaf is not of["mean"])
        norm = BatchNorm(of["mean"], torch.ones(8, dtype=dtype), of["gamma"], of["beta"])
        out = token_depthwise_conv(
            inputs, of["weight"], of["bias"], grid=(5, 4), prefix_tokens=1, norm=norm, backend="cpp"
        )
        results.append([out.detach()])
        if training:
            out.square().sum().backward()
            results[-1] += [leaf.grad.float() for leaf in leaves if leaf.requires_grad]
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            # A gradient is rounded to its parameter's dtype.
            torch.testing.assert_close(got, expected, rtol=2**-11 if training else 0, atol=0)
