"""The CUDA kernels of token depthwise convolution: run on the host thread by thread, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops import token_depthwise_conv
from fastvit.ops._checks import out_size
from fastvit.ops.token_depthwise_conv import Convolution, Kernels, _runner
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, on_pooled_draws, poisoned_empty
from tests.ops.test_token_depthwise_conv import ACTIVATIONS, CASES, LEFF, Case, check, make_arguments, to

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = shutil.which("c++") or shutil.which("g++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_SHARED = 96 << 10

# --- On the host ----------------------------------------------------------------------------------------------------

NUMBERS = (
    *("element", "parameter_element", "statistics_element", "batch", "channels", "prefix", "height", "width"),
    *("out_height", "out_width", "kernel", "stride", "padding", "x_batch_stride", "x_token_stride"),
    *("pre_activation", "activation", "residual"),
)


class Arguments(ctypes.Structure):
    """cuda_host.h's struct of that name."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p * 10),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("pre_eps", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def describe(
    x: Tensor, weight: Tensor, bias: Tensor | None, pre_norm: tuple, norm: tuple, geometry: tuple
) -> tuple[Arguments, list[int]]:
    """The struct for low-level arguments (a norm: weight, bias, mean, var, eps, activation), and the output's shape."""
    height, width, stride, padding, prefix, residual = geometry
    kernel = weight.shape[-1]
    sizes = [out_size(size, kernel, stride, padding) for size in (height, width)]
    statistics = [tensor for tensor in (pre_norm[2], norm[2]) if tensor is not None]
    arguments = Arguments(x=pointer(x), pre_eps=pre_norm[4], eps=norm[4])
    arguments.parameters[:] = [pointer(tensor) for tensor in (weight, bias, *pre_norm[:4], *norm[:4])]
    elements = [ELEMENTS[tensor.dtype] for tensor in (x, weight, *statistics[:1])]
    numbers = [*elements[:2], elements[-1], x.shape[0], x.shape[2], prefix, height, width, *sizes, kernel, stride]
    numbers += [padding, x.stride(0), x.stride(1), pre_norm[5], norm[5], int(residual)]
    for name, number in zip(NUMBERS, numbers, strict=True):
        setattr(arguments, name, number)
    return arguments, [x.shape[0], prefix + sizes[0] * sizes[1], x.shape[2]]


class Host:
    """The low-level operators, computed by the CUDA kernels' functions in a loop over blocks and threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("forward_host", "training_host", "backward_host"):
            getattr(library, name).restype = ctypes.c_int64

    def call(self, name: str, *arguments: Any) -> None:
        shared = getattr(self.library, name)(*arguments)
        assert shared <= MAX_SHARED, f"{shared} bytes of shared memory"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        arguments, shape = describe(x, weight, bias, rest[:6], rest[6:12], rest[12:])
        out = torch.empty(shape, dtype=x.dtype)
        self.call("forward_host", ctypes.byref(arguments), ctypes.c_void_p(out.data_ptr()))
        return out

    def training(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        pre_norm, pre_batch, norm, batch = (*rest[:5], rest[6]), rest[5], (*rest[7:12], rest[13]), rest[12]
        arguments, shape = describe(x, weight, bias, pre_norm, norm, rest[14:])
        out = torch.empty(shape, dtype=x.dtype)
        conv = torch.empty_like(out) if norm[2] is not None or batch or norm[5] else x.new_empty(0)
        flags = (pre_batch, pre_batch, batch, batch)
        statistics = [torch.empty(x.shape[2] * used, dtype=torch.float32) for used in flags]
        places = (ctypes.c_void_p * 4)(*map(pointer, statistics))
        results = [ctypes.c_void_p(pointer(tensor)) for tensor in (out, conv)]
        self.call("training_host", ctypes.byref(arguments), *results, places)
        return out, conv, *statistics

    def backward(
        self, grad: Tensor, x: Tensor, conv: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        pre_norm, norm = (*rest[:5], rest[6]), (*rest[7:12], rest[13])
        *geometry, x_grad, parameter_grads = rest[14:]
        arguments, _ = describe(x, weight, bias, pre_norm, norm, tuple(geometry))
        dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype)
        parameters = (weight, bias, *pre_norm[:2], *norm[:2])
        gradients = [
            torch.empty(p.shape if parameter_grads and p is not None else (0,), dtype=torch.float32) for p in parameters
        ]
        self.call(
            "backward_host",
            ctypes.byref(arguments),
            ctypes.c_void_p(pointer(grad)),
            *map(ctypes.c_int64, grad.stride()[:2]),
            ctypes.c_void_p(pointer(conv)),
            *map(ctypes.c_int, (rest[5], rest[12])),
            ctypes.c_void_p(pointer(dx)),
            (ctypes.c_void_p * 6)(*map(pointer, gradients)),
        )
        return dx, *gradients


def built(name: str, folder: Path) -> ctypes.CDLL:
    """A file beside this one as a library; the test is skipped where there is no compiler."""
    if CXX is None:
        pytest.skip("no C++ compiler on PATH")
    path, source = folder / "host.so", Path(__file__).with_name(name)
    command = [CXX, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    command += ["-DFASTVIT_BLOCKS=12"]  # several tiles a block, several partial results
    subprocess.run([*command, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """token_depthwise_conv by the CUDA kernels' functions on the host, with gradients and batch statistics."""
    computed = Host(built("token_depthwise_conv_host.cpp", tmp_path_factory.mktemp("host")))
    by_host = _runner(Kernels(computed.forward, computed.forward, computed.training, computed.backward))
    return lambda **arguments: by_host(Convolution(**arguments))


def on_lanes(case: Case, dtype: torch.dtype, vectors: bool) -> Case:
    """The case with channels that vectors of 16 bytes divide, or do not."""
    lanes = 16 // dtype.itemsize
    whole = -(-case.channels // lanes) * lanes
    return case._replace(channels=whole if vectors else whole - 1)


def named(case: Case, run: Callable[[], None]) -> None:
    try:
        run()
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


# Vectors or scalars, and every how manyth case; the host's float16 is slow.
FORMS = pytest.mark.parametrize(
    ("dtype", "vectors", "every"),
    [(torch.float32, True, 1), (torch.float32, False, 2), (torch.bfloat16, True, 2), (torch.float16, True, 5)],
    ids=str,
)


@FORMS
def test_forward_on_the_host(host: Callable[..., Tensor], dtype: torch.dtype, vectors: bool, every: int) -> None:
    for case in (case for case in CASES[::every] if case.size == 1.0 or dtype != torch.float16):
        arguments = make_arguments(on_lanes(case, dtype, vectors), dtype)
        named(case, lambda arguments=arguments: check(host, arguments))


NORMS = {"pre_norm": True, "norm": True}
TRAINED = ("x", "weight", "bias")

TRAINING_CASES = [
    *(
        Case((15, 15), 33, kernel=kernel, stride=stride, prefix=prefix, norm=norm)
        for kernel, stride, prefix, norm in (
            *((3, 1, 0, False), (3, 2, 1, True), (5, 1, 2, True), (5, 2, 0, False), (7, 1, 1, True), (7, 2, 2, False)),
        )
    ),
    *(Case((6, 7), pre_activation=activation, activation=activation, **NORMS) for activation in ACTIVATIONS),
    Case((6, 7), pre_activation="gelu", activation="silu"),
    Case((7, 5), prefix=1, residual=True),
    Case((7, 5), prefix=2, residual=True, **LEFF),
    Case((7, 5), residual=True, pre_norm=True, activation="silu", bias=False, affine=False),
    Case((14, 14), 96, 3, **LEFF),
    Case((1, 1), 17, 3, prefix=1, residual=True, **NORMS),
    Case((2, 1), 5, kernel=7, norm=True),
    Case((8, 10), 48, stride=2, norm=True, bias=False),
    Case((56, 56), 8, 1, prefix=1, **LEFF),
    Case((3, 70), 40, norm=True),
    Case((30, 17), 24, 2, prefix=1, residual=True),
    Case((8, 9), padding=0, **LEFF),
    Case((5, 5), padding=3, stride=2, **NORMS),
    Case((5, 6), kernel=3, padding=4, activation="gelu"),
    Case((5, 6), kernel=3, padding=6, stride=2, activation="gelu"),
    Case((5, 6), kernel=4, padding=1, norm=True),
    Case((5, 6), kernel=4, padding=5, activation="gelu"),
    Case((9, 9), stride=3, padding=2, pre_activation="relu", **NORMS),
    Case((4, 4), kernel=1, activation="gelu"),
    Case((4, 3), 8, kernel=11, **LEFF),
    Case((4, 4), 400, 1, **LEFF),
]


def differentiable(case: Case, dtype: torch.dtype) -> bool:
    """Whether rounding to the dtype leaves derivatives about what they are: ReLU's jumps where a sign changes."""
    return dtype == torch.float32 or case.activation != "relu"


def with_statistics(arguments: dict[str, Any], batch: bool) -> dict[str, Any]:
    changed = {
        name: arguments[name]._replace(use_batch_stats=batch, momentum=0.3)
        for name in ("pre_norm", "norm")
        if arguments[name] is not None
    }
    return arguments | changed


def step(run: Callable[..., Tensor], arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """A training step on copies in that dtype: the result, every gradient, and the running statistics."""

    def copy(value: Any) -> Any:
        if isinstance(value, BatchNorm):
            return BatchNorm(*map(copy, value))
        return value.to(dtype, copy=True) if isinstance(value, Tensor) else value

    copies = {name: copy(value) for name, value in arguments.items()}
    trained = {name: copies[name] for name in TRAINED if copies[name] is not None}
    tracked = {}
    for name in ("pre_norm", "norm"):
        norm = copies[name]
        if norm is not None:
            tracked |= {f"{name} mean": norm.running_mean, f"{name} var": norm.running_var}
            affine = {f"{name} weight": norm.weight, f"{name} bias": norm.bias}
            trained |= {key: tensor for key, tensor in affine.items() if tensor is not None}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    out = run(**copies)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(arguments["x"].dtype)
    gradients = torch.autograd.grad(out, list(trained.values()), grad.to(out))
    return {"output": out.detach(), **dict(zip(trained, gradients, strict=True)), **tracked}


def check_step(run: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    """Hold a training step to the reference's in the same dtype and in float64."""
    with poisoned_empty():
        got = step(run, arguments, arguments["x"].dtype)
    plain = step(functional.token_depthwise_conv, arguments, arguments["x"].dtype)
    exact = step(functional.token_depthwise_conv, arguments, torch.float64)
    assert got.keys() == plain.keys()
    for name in got:
        assert_as_accurate(got[name], plain[name], exact[name], name=name)


def check_training(run: Callable[..., Tensor], case: Case, dtype: torch.dtype, batch: bool) -> None:
    """A training step of the case, with batch statistics or running ones."""
    # Of a gradient over 8 channels the largest error is that of the one whose sum cancels: about one number.
    on_pooled_draws(lambda: check_step(run, with_statistics(make_arguments(case, dtype), batch)), draws=16)


@FORMS
def test_training_on_the_host(host: Callable[..., Tensor], dtype: torch.dtype, vectors: bool, every: int) -> None:
    for case in TRAINING_CASES[::every]:
        if not differentiable(case, dtype):
            continue
        named(case, partial(check_training, host, on_lanes(case, dtype, vectors), dtype, True))


def check_bias_of_batch_statistics(run: Callable[..., Tensor]) -> None:
    """A bias takes no digits of much smaller results: where rounding to bfloat16 steps it would make steps of them.

    Half of the channels are where rounding to the nearest does, half where Triton's interpreter does, which truncates.
    And a bias that is not finite makes its channel so.
    """
    x, weight = 1e-4 * torch.randn(4, 64, 24), torch.randn(24, 1, 3, 3).bfloat16().float()
    bias = torch.full((24,), 1.0 + 2.0**-8)
    bias[12:] = 1.0 + 2.0**-7

    def call(run: Callable[..., Tensor], dtype: torch.dtype, bias: Tensor) -> list[Tensor]:
        statistics = torch.zeros(24, dtype=bias.dtype), torch.ones(24, dtype=bias.dtype)
        norm = BatchNorm(*statistics, None, None, use_batch_stats=True, momentum=1.0)
        given = Convolution(x.to(dtype), weight.to(bias.dtype), bias, (8, 8), norm=norm)._asdict()
        out = run(**given)
        return [out, *(each.to(torch.promote_types(dtype, torch.float32)) for each in statistics)]

    got = call(run, torch.bfloat16, bias)
    plain = call(functional.token_depthwise_conv, torch.bfloat16, bias.bfloat16())
    exact = call(functional.token_depthwise_conv, torch.float64, bias.double())
    for name, *three in zip(("out", "running_mean", "running_var"), got, plain, exact, strict=True):
        assert_as_accurate(*three, name=name)
    bias[3], bias[4] = torch.inf, torch.nan
    got, plain = (call(form, torch.float32, bias) for form in (run, functional.token_depthwise_conv))
    for ours, theirs in zip(got, plain, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_a_bias_in_front_of_batch_statistics_on_the_host(host: Callable[..., Tensor]) -> None:
    check_bias_of_batch_statistics(host)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_training_with_running_statistics_on_the_host(host: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for case in (case for case in TRAINING_CASES[::2] if case.norm or case.pre_norm):
        named(case, partial(check_training, host, on_lanes(case, dtype, True), dtype, False))


def test_strided_tensors_on_the_host(host: Callable[..., Tensor]) -> None:
    arguments = make_arguments(Case((9, 20), 24, prefix=1, residual=True), torch.float32)
    arguments["x"] = torch.randn(3, 200, 64)[:2, 7:188, 8:32]
    check(host, arguments)
    x = arguments["x"].detach().requires_grad_()
    grad = torch.randn(2, 200, 40)[:, 19:, 16:]
    got = torch.autograd.grad(host(**arguments | {"x": x}), x, grad)[0]
    plain = torch.autograd.grad(functional.token_depthwise_conv(**arguments | {"x": x}), x, grad)[0]
    wide = {name: to(value, torch.float64) for name, value in arguments.items()}
    wide["x"] = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(functional.token_depthwise_conv(**wide), wide["x"], grad.double())[0]
    assert_as_accurate(got, plain, exact)


@pytest.mark.parametrize("wanted", ["x", "weight", "pre_norm weight"])
def test_only_the_gradients_asked_for_on_the_host(host: Callable[..., Tensor], wanted: str) -> None:
    arguments = with_statistics(make_arguments(Case((7, 5), 24, prefix=1, **LEFF), torch.float32), True)
    tensor = arguments["pre_norm"].weight if wanted == "pre_norm weight" else arguments[wanted]
    tensor.requires_grad_()
    grad = torch.randn(2, 36, 24)
    got, plain = (
        torch.autograd.grad(run(**arguments), tensor, grad)[0] for run in (host, functional.token_depthwise_conv)
    )
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


def test_float32_parameters_beside_bfloat16_tokens_on_the_host(host: Callable[..., Tensor]) -> None:
    arguments = make_arguments(Case((7, 5), prefix=1, **LEFF), torch.bfloat16, torch.float32)
    check(host, arguments)


def test_empty_batch_on_the_host(host: Callable[..., Tensor]) -> None:
    arguments = make_arguments(Case((4, 4), 16, batch=0, **LEFF), torch.float32)
    trained = [arguments[name].requires_grad_() for name in TRAINED] + [arguments["norm"].weight.requires_grad_()]
    with poisoned_empty():
        gradients = torch.autograd.grad(host(**arguments).sum(), trained)
    assert gradients[0].shape == (0, 16, 16)
    assert all(gradient.eq(0).all() for gradient in gradients[1:])


# --- On a GPU -------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(backends.cuda_reasons()), reason="no GPU, or no CUDA kernels in fastvit._C"
)


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    return BatchNorm(*map(on_gpu, value)) if isinstance(value, BatchNorm) else value


def run_cuda(**arguments: Any) -> Tensor:
    return token_depthwise_conv(**arguments, backend="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_on_a_gpu(dtype: torch.dtype) -> None:
    for case in (case for case in CASES if case.size == 1.0):
        arguments = {name: on_gpu(value) for name, value in make_arguments(case, dtype).items()}
        named(case, lambda arguments=arguments: check(run_cuda, arguments))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_on_a_gpu(dtype: torch.dtype) -> None:
    for case in (case for case in TRAINING_CASES if differentiable(case, dtype)):
        arguments = {name: on_gpu(value) for name, value in make_arguments(case, dtype).items()}
        named(case, lambda arguments=arguments: check_step(run_cuda, with_statistics(arguments, True)))


@pytest.mark.gpu
@needs_gpu
def test_gradients_on_a_gpu_are_the_same_every_time() -> None:
    arguments = {name: on_gpu(v) for name, v in make_arguments(Case((14, 14), 384, 64, **LEFF), torch.bfloat16).items()}
    first, second = (step(run_cuda, with_statistics(arguments, True), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
