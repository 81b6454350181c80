"""Linear layers and MLPs: parity, gradients, choice of implementation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backends, ops
from fastvit.ops._operator import recording
from fastvit.ops._packing import PackedWeight
from fastvit.reference import functional
from fastvit.reference.functional import LayerNorm
from tests.helpers import assert_as_accurate, poisoned_empty

MODULE = importlib.import_module("fastvit.ops.linear")
needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
DTYPES = (torch.float32, torch.bfloat16)
FORWARD_DTYPES = (*DTYPES, torch.float16)
ACTIVATIONS = (None, "gelu", "quick_gelu", "silu", "relu", "gelu_tanh")
# rows, depth, columns: one of each, odd ones, more than a tile, a panel, a block of the depth, a group
SHAPES = ((1, 1, 1), (3, 5, 7), (15, 33, 31), (29, 64, 48), (197, 130, 100), (40, 1100, 65), (300, 48, 800))


def _layer(rows: int, depth: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(columns, depth, generator=generator) / depth**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(columns, generator=generator).to(dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_the_library(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = _layer(*shape, dtype)
    for given in (bias, None):
        with poisoned_empty():
            got = ops.linear(x, weight, given, backend="cpp")
        exact = functional.linear(x.double(), weight.double(), None if given is None else given.double())
        assert_as_accurate(got, functional.linear(x, weight, given), exact)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str | None, dtype: torch.dtype) -> None:
    x, weight, bias = _layer(31, 48, 40, dtype)
    got = ops.linear(3 * x, weight, bias, activation, backend="cpp")
    exact = functional.linear(3 * x.double(), weight.double(), bias.double(), activation)
    assert_as_accurate(got, functional.linear(3 * x, weight, bias, activation), exact)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("turned", [False, True])
def test_sums_so_long_that_they_are_worked_out_in_slices(isa: str, turned: bool, dtype: torch.dtype) -> None:
    x, weight, bias = _layer(17, 6501, 37, dtype)
    weight = weight.t().contiguous().t() if turned else weight
    with poisoned_empty():
        got = ops.linear(x, weight, bias, "gelu", backend="cpp")
    exact = functional.linear(x.double(), weight.double(), bias.double(), "gelu")
    assert_as_accurate(got, functional.linear(x, weight, bias, "gelu"), exact)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (193, 6501, 40)])
def test_rows_that_are_columns_of_a_matrix(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """As those of a weight's gradient are."""
    x, weight, bias = _layer(*shape, dtype)
    within = torch.full((x.shape[1] + 1, len(x) + 3), torch.nan, dtype=dtype)
    within[:-1, :-3] = x.t()
    for rows in (x.t().contiguous().t(), within[:-1, :-3].t()):
        with poisoned_empty():
            got = ops.linear(rows, weight, bias, "gelu", backend="cpp")
        exact = functional.linear(x.double(), weight.double(), bias.double(), "gelu")
        assert_as_accurate(got, functional.linear(x, weight, bias, "gelu"), exact)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("rows", [7, 50, 197, 1000])
def test_the_same_bits_however_the_work_is_divided(isa: str, rows: int, dtype: torch.dtype) -> None:
    x, *up = _layer(rows, 192, 500, dtype)
    _, *down = _layer(1, 500, 192, dtype, seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with poisoned_empty():
                hidden = ops.linear(x, *up, "gelu", backend="cpp")
                results.append(
                    (hidden, ops.linear(hidden, *down, backend="cpp"), ops.mlp(x, *up, *down, backend="cpp"))
                )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    if dtype == torch.float32:  # hidden values are not rounded
        assert torch.equal(results[0][1], results[0][2])


def _around(columns: int, depth: int, rows: int, dtype: torch.dtype, **parts: bool) -> dict[str, Any]:
    """A norm, a scale and a residual, with strides, as the names in ``parts`` ask for."""
    generator = torch.Generator().manual_seed(3)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    around: dict[str, Any] = {}
    if parts.get("norm"):
        around["norm"] = LayerNorm(draw(depth), draw(depth), 1e-6)
    if parts.get("bare_norm"):
        around["norm"] = LayerNorm(None, None, 1e-3)
    if parts.get("scale"):
        around["scale"] = draw(columns)
    if parts.get("residual"):
        around["residual"] = draw(rows, columns + 3)[:, :columns]
    if parts.get("turned_residual"):
        around["residual"] = draw(columns, rows).t()
    return around


def _double(value: Any) -> Any:
    if isinstance(value, LayerNorm):
        return LayerNorm(*map(_double, value))
    return value.double() if isinstance(value, Tensor) else value


AROUND = (
    {"norm": True},
    {"bare_norm": True},
    {"scale": True},
    {"residual": True},
    {"turned_residual": True},
    {"norm": True, "scale": True, "residual": True},
)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("parts", AROUND, ids=lambda parts: "-".join(parts))
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_what_stands_around_a_product(isa: str, shape: tuple[int, int, int], parts: dict, dtype: torch.dtype) -> None:
    rows, depth, columns = shape
    x, weight, bias = _layer(*shape, dtype)
    x = 3 * x + 1  # a mean beside the deviation
    around = _around(columns, depth, rows, dtype, **parts)
    exact = {name: _double(value) for name, value in around.items()}
    for activation in (None, "gelu"):
        with poisoned_empty():
            got = ops.linear(x, weight, bias, activation, **around, backend="cpp")
        plain = functional.linear(x, weight, bias, activation, **around)
        oracle = functional.linear(x.double(), weight.double(), bias.double(), activation, **exact)
        assert_as_accurate(got, plain, oracle)


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
@pytest.mark.parametrize("parts", [{}, *AROUND], ids=lambda parts: "-".join(parts) or "alone")
@pytest.mark.parametrize("shape", [(3, 5, 7), (29, 64, 48), (197, 96, 401), (300, 24, 1100)])
def test_mlp(isa: str, shape: tuple[int, int, int], parts: dict, dtype: torch.dtype) -> None:
    rows, depth, hidden = shape
    x, *up = _layer(*shape, dtype)
    _, *down = _layer(1, hidden, depth, dtype, seed=1)
    around = _around(depth, depth, rows, dtype, **parts)
    exact = {name: _double(value) for name, value in around.items()}
    for activation in ("gelu", "silu"):
        with poisoned_empty():
            got = ops.mlp(x, *up, *down, activation, **around, backend="cpp")
        plain = functional.mlp(x, *up, *down, activation, **around)
        oracle = functional.mlp(*map(_double, (x, *up, *down)), activation, **exact)
        assert_as_accurate(got, plain, oracle)


GATED_SHAPES = [(1, 1, 1), (3, 5, 7), (29, 64, 48), (197, 96, 401), (300, 24, 1100)]
GATED_PARTS = [*({}, *AROUND), {"hidden_norm": True}, {"norm": True, "hidden_norm": True, "residual": True}]


def _gated(rows: int, depth: int, hidden: int, dtype: torch.dtype, parts: dict) -> tuple[list[Tensor], dict[str, Any]]:
    """x and the three layers, and what stands around them."""
    x, gate_weight, gate_bias = _layer(rows, depth, hidden, dtype)
    _, value_weight, value_bias = _layer(1, depth, hidden, dtype, seed=1)
    _, fc2_weight, fc2_bias = _layer(1, hidden, depth, dtype, seed=2)
    around = _around(depth, depth, rows, dtype, **{name: on for name, on in parts.items() if name != "hidden_norm"})
    if parts.get("hidden_norm"):
        around["hidden_norm"] = _around(depth, hidden, rows, dtype, norm=True)["norm"]
    return [x, gate_weight, gate_bias, value_weight, value_bias, fc2_weight, fc2_bias], around


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", GATED_PARTS, ids=lambda parts: "-".join(parts) or "alone")
@pytest.mark.parametrize("shape", GATED_SHAPES)
def test_gated_mlp(isa: str, shape: tuple[int, int, int], parts: dict, dtype: torch.dtype) -> None:
    tensors, around = _gated(*shape, dtype, parts)
    exact = {name: _double(value) for name, value in around.items()}
    activations = functional.GATES if parts == {"hidden_norm": True} else ("silu",)
    for activation in activations:
        with poisoned_empty():
            got = ops.glu_mlp(*tensors, activation, **around, backend="cpp")
        plain = functional.glu_mlp(*tensors, activation, **around)
        assert_as_accurate(got, plain, functional.glu_mlp(*map(_double, tensors), activation, **exact))


@needs_cpp
def test_gated_mlp_of_a_packed_layer() -> None:
    """The halves of one weight are packed apart, and packed anew when it changes."""
    (x, gate, _, values, _, *down), _ = _gated(40, 24, 64, torch.float32, {})
    whole = torch.cat((gate, values)).requires_grad_()

    def run() -> Tensor:
        first, second = whole.chunk(2)
        with torch.no_grad():
            return ops.glu_mlp(x, first, None, second, None, *down, backend="cpp")

    assert torch.equal(run(), ops.glu_mlp(x, gate, None, values, None, *down, backend="cpp"))
    with torch.no_grad():
        whole[70] += 1
    exact = functional.glu_mlp(*map(_double, (x, whole[:64], None, whole[64:], None, *down)))
    assert_as_accurate(run(), functional.glu_mlp(x, whole[:64], None, whole[64:], None, *down).detach(), exact.detach())


@needs_cpp
@torch.no_grad()
def test_gated_mlp_of_weights_of_which_the_packed_copy_alone_is_kept() -> None:
    tensors, _ = _gated(40, 24, 64, torch.float32, {})
    frozen = [
        PackedWeight(torch.ops.fastvit.pack_weight(tensor), tensor, False) if i in (1, 3, 5) else tensor
        for i, tensor in enumerate(tensors)
    ]
    assert torch.equal(ops.glu_mlp(*frozen, backend="cpp"), ops.glu_mlp(*tensors, backend="cpp"))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [7, 197, 1000])
def test_a_gated_mlp_has_the_same_bits_however_the_work_is_divided(isa: str, rows: int, dtype: torch.dtype) -> None:
    tensors, around = _gated(rows, 192, 500, dtype, {"hidden_norm": True})
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with poisoned_empty():
                results.append(ops.glu_mlp(*tensors, **around, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_gated_mlp(dtype: torch.dtype) -> None:
    tensors, around = _gated(34, 40, 36, dtype, {"norm": True, "hidden_norm": True, "scale": True, "residual": True})
    norms = [tensor for name in ("norm", "hidden_norm") for tensor in around[name][:2]]
    values = [*tensors, *norms, around["scale"], around["residual"]]
    grad = torch.randn(34, 40, generator=torch.Generator().manual_seed(2))

    def gradients(run: Callable, dtype: torch.dtype, **options: str) -> list[Tensor]:
        leaves = [value.detach().to(dtype, copy=True).requires_grad_() for value in values]
        *layers, w, b, hidden_w, hidden_b, scale, residual = leaves
        norms = {"norm": LayerNorm(w, b, 1e-6), "hidden_norm": LayerNorm(hidden_w, hidden_b, 1e-6)}
        out = run(*layers, **norms, scale=scale, residual=residual, **options)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    fused = gradients(ops.glu_mlp, dtype, backend="cpp")
    plain, exact = gradients(functional.glu_mlp, dtype), gradients(functional.glu_mlp, torch.float64)
    for place, (got, reference, oracle) in enumerate(zip(fused, plain, exact, strict=True)):
        assert_as_accurate(got, reference, oracle, name=str(place))


def test_a_gated_mlp_is_timms_and_dinov2s() -> None:
    """Packed with the gate first or last, and of separate weights with a norm between."""
    layers = pytest.importorskip("timm.layers")
    x = torch.randn(2, 20, 16)
    packed, last = layers.SwiGLUPacked(16, 48, bias=True), layers.GluMlp(16, 48, bias=True)
    for module, activation, gate in ((packed, "silu", 0), (last, "sigmoid", 1)):
        weights, biases = module.fc1.weight.chunk(2), module.fc1.bias.chunk(2)
        first = (weights[gate], biases[gate], weights[1 - gate], biases[1 - gate])
        arguments = (x, *first, module.fc2.weight, module.fc2.bias, activation)
        torch.testing.assert_close(ops.glu_mlp(*arguments), module(x))
    eva = layers.SwiGLU(16, 24, norm_layer=torch.nn.LayerNorm)
    first = (eva.fc1_g.weight, eva.fc1_g.bias, eva.fc1_x.weight, eva.fc1_x.bias)
    out = ops.glu_mlp(x, *first, eva.fc2.weight, eva.fc2.bias, hidden_norm=LayerNorm.of(eva.norm))
    torch.testing.assert_close(out, eva(x))


@needs_cpp
def test_a_gated_mlp_compiles_whole_with_dynamic_rows() -> None:
    tensors, around = _gated(40, 24, 32, torch.float32, {"hidden_norm": True, "residual": True})
    x, *layers = tensors
    residual = around.pop("residual")

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return ops.glu_mlp(x, *layers, residual=residual, **around, backend="cpp")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 33):
        assert torch.equal(compiled(x[:rows], residual[:rows]), run(x[:rows], residual[:rows]))


@needs_cpp
def test_opcheck_of_a_gated_mlp() -> None:
    (x, *layers), _ = _gated(20, 8, 16, torch.float32, {})
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    norms = (True, torch.randn(8), None, 1e-5, True, torch.randn(16), torch.randn(16), 1e-5)
    behind = (5, torch.randn(8), torch.randn(20, 8))
    run = torch.ops.fastvit
    torch.library.opcheck(run.glu_mlp.default, (x, *layers, *norms, *behind), test_utils=tests)
    with_packed = [part for i in (0, 2, 4) for part in (*layers[i : i + 2], None)]
    torch.library.opcheck(run.packed_glu_mlp.default, (x, *with_packed, *norms, *behind), test_utils=tests)


@needs_cpp
def test_infinities_of_a_hidden_value_stay_in_their_rows() -> None:
    """Also where the last panel of hidden values is padded."""
    x, *up = _layer(40, 16, 37, torch.float32)
    _, *down = _layer(1, 37, 16, torch.float32, seed=1)
    x[3, 2], x[17, 5] = float("nan"), float("inf")
    got = ops.mlp(x, *up, *down, "relu", backend="cpp")
    assert torch.equal(got.isfinite().all(1), x.isfinite().all(1))


@needs_cpp
def test_float16_overflows_where_the_plain_form_does(isa: str) -> None:
    """Each step is rounded to float16: what is beyond its range is infinite before anything makes it smaller."""
    x, *up = _layer(40, 16, 37, torch.float16)
    _, *down = _layer(1, 37, 16, torch.float16, seed=1)
    x[3] = 6e4 * up[0][0].sign()
    for scale in (None, torch.full((37,), 0.1).half()):
        for activation in ACTIVATIONS:
            got = ops.linear(x, *up, activation, scale=scale, residual=x[:, :1].expand(-1, 37), backend="cpp")
            plain = functional.linear(x, *up, activation, scale=scale, residual=x[:, :1].expand(-1, 37))
            assert plain[3].isfinite().logical_not().any() and plain[4:].isfinite().all()
            assert torch.equal(got.isfinite(), plain.isfinite()), activation
    got, plain = ops.mlp(x, *up, *down, "relu", backend="cpp"), functional.mlp(x, *up, *down, "relu")
    assert not plain[3].isfinite().any()
    assert torch.equal(got.isfinite(), plain.isfinite())


@needs_cpp
def test_float16_has_no_backward() -> None:
    x, weight, bias = _layer(40, 24, 32, torch.float16)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="linear: backend 'cpp' cannot run this call: it has no backward in float16"):
        ops.linear(x, weight, bias, backend="cpp")
    with pytest.raises(RuntimeError, match="mlp: backend 'cpp' cannot run this call: it has no backward in float16"):
        ops.mlp(x, weight, bias, weight.t(), None, backend="cpp")
    out = ops.linear(x, weight, bias)  # the library's
    out.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert_as_accurate(
            ops.linear(x, weight, bias, backend="cpp"),
            out.detach(),
            functional.linear(x.double(), weight.double(), bias.double()),
        )


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_what_stands_around(dtype: torch.dtype) -> None:
    values = (*_layer(34, 40, 36, dtype), *_layer(1, 36, 40, dtype, seed=1)[1:])
    around = _around(40, 40, 34, dtype, norm=True, scale=True, residual=True)
    values += (around["norm"].weight, around["norm"].bias, around["scale"], around["residual"])
    grad = torch.randn(34, 40, generator=torch.Generator().manual_seed(2))

    def gradients(run, dtype: torch.dtype, **options: str) -> list[Tensor]:
        leaves = [value.detach().to(dtype, copy=True).requires_grad_() for value in values]
        *layers, gamma, beta, scale, residual = leaves
        norm = LayerNorm(gamma, beta, 1e-6)
        out = run(*layers, "gelu", norm=norm, scale=scale, residual=residual, **options)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    fused = gradients(ops.mlp, dtype, backend="cpp")
    plain, exact = gradients(functional.mlp, dtype), gradients(functional.mlp, torch.float64)
    for place, (got, reference, oracle) in enumerate(zip(fused, plain, exact, strict=True)):
        assert_as_accurate(got, reference, oracle, name=str(place))


@needs_cpp
@pytest.mark.parametrize("dtype", FORWARD_DTYPES)
def test_long_sums(isa: str, dtype: torch.dtype) -> None:
    """Terms of one sign, where rounding errors of long sums grow fastest."""
    x, weight, bias = _layer(20, 3072, 32, dtype)
    x, weight = x.abs(), weight.abs()
    exact = functional.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate(ops.linear(x, weight, bias, backend="cpp"), functional.linear(x, weight, bias), exact)


@needs_cpp
@pytest.mark.parametrize("depth", [28, 384])
def test_deviations_from_a_mean_far_away_sum_to_nothing(isa: str, depth: int) -> None:
    """A mean's rounding error is in every deviation, and ones for a weight sum them; ours are without it."""
    x, weight = _layer(200, depth, 16, torch.float32)[0] + 100, torch.ones(16, depth)
    norm = LayerNorm(None, None, 1e-6)
    exact = functional.linear(x.double(), weight.double(), norm=norm)
    plain = functional.linear(x, weight, norm=norm)
    got = ops.linear(x, weight, norm=norm, backend="cpp")
    assert (got - exact).abs().max() < 0.1 * (plain - exact).abs().max()


@needs_cpp
def test_leading_axes_and_strides() -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3, 9, 24, generator=generator)
    weight = torch.randn(17, 12, generator=generator)
    for x in (whole[..., :12], whole[:, 0, :12], whole.transpose(0, 1)[..., 12:], whole[0, 0, :12], whole[:0, :, :12]):
        got = ops.linear(x, weight, backend="cpp")
        assert_as_accurate(got, functional.linear(x, weight), functional.linear(x.double(), weight.double()))


@needs_cpp
def test_infinities_and_nan_stay_in_their_rows() -> None:
    x, weight, bias = _layer(30, 16, 40, torch.float32)
    x[3, 2], x[17, 5] = float("nan"), float("inf")
    got = ops.linear(x, weight, bias, backend="cpp")
    assert torch.equal(got.isfinite().all(1), x.isfinite().all(1))
    assert got[3].isnan().all()


@needs_cpp
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, bias = _layer(200, 300, 500, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            hidden = ops.linear(x, weight, bias, "gelu", backend="cpp")
            mlp = ops.mlp(x, weight, bias, weight.t(), None, "gelu", backend="cpp")
            results.append(torch.cat((hidden, mlp, ops.linear(hidden, weight.t(), None, backend="cpp")), 1))
            # The hidden values that stay in the cache are those of two calls.
            assert torch.equal(results[-1][:, 500:800], results[-1][:, 800:])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients(dtype: torch.dtype, activation: str | None) -> None:
    values = (*_layer(34, 40, 36, dtype), *_layer(1, 36, 24, dtype, seed=1)[1:])
    grad = torch.randn(34, 24, generator=torch.Generator().manual_seed(2))

    def gradients(run, dtype: torch.dtype, **options: str) -> list[Tensor]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
        out = run(*leaves, activation, **options)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    fused = gradients(ops.mlp, dtype, backend="cpp")
    plain, exact = gradients(functional.mlp, dtype), gradients(functional.mlp, torch.float64)
    names = ("out", "x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    for name, got, reference, oracle in zip(names, fused, plain, exact, strict=True):
        assert_as_accurate(got, reference, oracle, name=name)


@needs_cpp
def test_only_the_gradients_asked_for() -> None:
    x, weight, bias = _layer(20, 8, 16, torch.float32)
    weight.requires_grad_()
    ops.linear(x, weight, bias, backend="cpp").sum().backward()
    assert weight.grad is not None
    assert_as_accurate(weight.grad, x.sum(0).expand(16, 8), x.double().sum(0).expand(16, 8))


@needs_cpp
def test_compiles_whole_with_dynamic_rows() -> None:
    x, weight, bias = _layer(40, 24, 32, torch.float32)
    weight.requires_grad_()
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias, "gelu", backend="cpp"), fullgraph=True, dynamic=True)
    for rows in (40, 33):
        part = x[:rows].clone().requires_grad_()
        out = compiled(part)
        assert_as_accurate(
            out,
            ops.linear(part, weight, bias, "gelu"),
            functional.linear(part.double(), weight.double(), bias.double(), "gelu"),
        )
        out.sum().backward()
        assert part.grad is not None


@needs_cpp
@pytest.mark.parametrize("activation", [0, 1])
def test_opcheck(activation: int) -> None:
    x, weight, bias = _layer(20, 8, 16, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    norm = (True, torch.randn(8), None, 1e-5)
    behind = (activation, torch.randn(16), torch.randn(20, 16))
    run = torch.ops.fastvit
    torch.library.opcheck(run.linear.default, (x, weight, bias, *norm, *behind), test_utils=tests)
    torch.library.opcheck(run.packed_linear.default, (x, weight, bias, None, *norm, *behind), test_utils=tests)
    back = (weight.t().contiguous(), None)
    behind = (activation, torch.randn(8), torch.randn(20, 8))
    torch.library.opcheck(run.mlp.default, (x, weight, bias, *back, *norm, *behind), test_utils=tests)
    torch.library.opcheck(
        run.packed_mlp.default, (x, weight, bias, None, *back, None, *norm, *behind), test_utils=tests
    )


# --- Libraries that pack the weight -------------------------------------------------------------------------------


LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reasons), reason="; ".join(reasons)))
    for name, reasons in (
        ("mkl", backends.cpp_reasons() + backends.mkl_reasons()),
        ("onednn", backends.cpp_reasons() + backends.onednn_reasons()),
    )
]


def _in_sequence(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product that sums its terms one by one, as oneDNN's does and torch's may."""
    total = torch.zeros(*x.shape[:-1], weight.shape[0]) if bias is None else bias.expand(*x.shape[:-1], -1)
    for k in range(x.shape[-1]):
        total = torch.addcmul(total, x[..., k : k + 1], weight[:, k])
    return total


@pytest.mark.parametrize("parts", [{}, *AROUND], ids=lambda parts: "-".join(parts) or "alone")
@pytest.mark.parametrize("library", LIBRARIES)
def test_products_of_a_library(library: str, parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(form: str, *args: Any, **around: Any) -> None:
        with poisoned_empty():
            got = getattr(ops, form)(*args, **around, backend=library)
        plain = getattr(functional, form)
        exact = plain(*map(_double, args), **{name: _double(value) for name, value in around.items()})
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", _in_sequence)
            plains = [plain(*args, **around)]
        assert_as_accurate(got, [*plains, plain(*args, **around)], exact)

    for rows, depth, columns in SHAPES:
        x, weight, bias = _layer(rows, depth, columns, torch.float32)
        around = _around(columns, depth, rows, torch.float32, **parts)
        for given in (bias, None):
            judge("linear", x, weight, given, "gelu", **around)
        _, *back = _layer(1, columns, columns, torch.float32, seed=1)
        judge("mlp", x, weight, bias, *back, "silu", **around)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_faster_is_taken(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(name: str, key: tuple, candidates: list, run: Callable, **settings: Any) -> tuple[str]:
        assert all(run(candidate).shape == run(candidates[0]).shape for candidate in candidates)
        return (library,) if (library,) in candidates else candidates[-1]

    monkeypatch.setattr(MODULE.autotune, "choose", choose)
    monkeypatch.setattr(MODULE, "_FASTER", {})
    monkeypatch.setattr(MODULE, "_WINNERS", set())
    x, weight, bias = _layer(64, 24, 32, torch.float32)
    assert _chosen(x, weight, bias) == library
    expected = ops.linear(x, weight, bias, backend=library)
    assert torch.equal(MODULE.multiply(x, weight, bias), expected)
    for within in (x[:0], x.t()[:24, :20].t(), x.reshape(2, 4, 8, 24)):
        torch.testing.assert_close(ops.linear(within, weight, bias), functional.linear(within, weight, bias))
    # Neither trains, and a compiler chooses for itself.
    weight.requires_grad_()
    assert _chosen(x, weight, bias) == "reference"
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_refuses_by_name(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = _layer(20, 8, 16, torch.float32)
    for args, reason in (
        ((x.double(), weight.double(), bias.double()), "dtype torch.float64 is not one of float32"),
        ((x, weight.clone().requires_grad_(), bias), "it has no gradients"),
        ((x[:0], weight, bias), "it takes no empty tensors"),
    ):
        with pytest.raises(RuntimeError, match=f"backend '{library}' cannot run this call: {reason}"):
            ops.linear(*args, backend=library)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="a weight made in inference mode"):
        ops.linear(x, weight.clone(), bias, backend=library)
    monkeypatch.setattr(MODULE._packing, "ENABLED", False)
    with pytest.raises(RuntimeError, match="FASTVIT_PACK=0 keeps no packed weights"):
        ops.linear(x, weight, bias, backend=library)


def _chosen(*args: Tensor) -> str:
    seen: list[str] = []
    with recording(lambda selection: seen.append(selection.backend)):
        ops.linear(*args)
    return seen[0]


@pytest.mark.usefixtures("kernels_first")
@needs_cpp
def test_the_library_does_what_it_does_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def choose(name: str, key: tuple, candidates: list, run: Callable, **settings: Any) -> tuple[str]:
        assert settings == {"on_cpu": True, "preference": MODULE.autotune.PREFERENCE}
        asked.append(key)
        outputs = [run(candidate) for candidate in candidates]
        assert outputs[0].shape == outputs[1].shape
        return candidates[-1] if len(asked) > 2 else candidates[0]

    monkeypatch.setattr(MODULE.autotune, "choose", choose)
    monkeypatch.setattr(MODULE, "_FASTER", {})
    monkeypatch.setattr(MODULE, "_WINNERS", set())
    x, weight, bias = _layer(64, 24, 32, torch.float32)
    assert _chosen(x, weight, bias) == "cpp"
    assert _chosen(x[:60], weight, bias) == "cpp"  # of one bucket
    assert len(asked) == 1
    low = [tensor.bfloat16() for tensor in (x, weight, bias)]
    assert _chosen(*low) == "cpp"
    assert len(asked) == 2
    assert _chosen(x[:30], weight, bias) == "reference"
    assert len(set(asked)) == len(asked) == 3


@pytest.mark.usefixtures("kernels_first")
@needs_cpp
@pytest.mark.parametrize("faster", ["cpp", "reference"])
def test_the_products_of_gradients_are_chosen_by_their_own_times(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    products = {
        name: lambda x, weight, name=name, product=product: ran.append(name) or product(x, weight)
        for name, product in MODULE._GRADIENT_PRODUCTS.items()
    }
    asked: list[tuple] = []

    def choose(name: str, key: tuple, candidates: list, run: Callable, **settings: Any) -> tuple[str]:
        ran.clear()
        run(candidates[0])
        assert settings == {"on_cpu": True, "preference": 1.0}
        if key[0] == "gradient":
            asked.append(key)
            assert ran == [candidates[0][0]]
            return (faster,)
        assert len(ran) == 2  # a step of training is measured: the gradients of x and weight
        return candidates[0]

    monkeypatch.setattr(MODULE.autotune, "choose", choose)
    monkeypatch.setattr(MODULE, "_GRADIENT_PRODUCTS", products)
    monkeypatch.setattr(MODULE, "_FASTER", {})
    x, weight, bias = (tensor.requires_grad_() for tensor in _layer(64, 24, 32, torch.float32))
    for rows in (64, 60):  # of one bucket
        out = ops.linear(x[:rows], weight, bias)
        ran.clear()
        torch.autograd.grad(out.square().sum(), (x, weight, bias))
        assert ran == [faster, faster]
    assert [key[1] for key in asked] == [False, True] and len(set(asked)) == 2


@needs_cpp
def test_the_library_does_what_is_small_or_of_another_dtype() -> None:
    x, weight, bias = _layer(64, 24, 32, torch.float32)
    assert _chosen(x[:4], weight, bias) == "cpp"  # which wait for the weight
    assert _chosen(x[:4], weight.clone().requires_grad_(), bias) == "reference"
    with torch.inference_mode():
        assert _chosen(x[:4], weight.clone(), bias) == "reference"  # a weight that would be packed at each call
    assert _chosen(x, weight[:3], bias[:3]) == "reference"
    assert _chosen(x.double(), weight.double(), bias.double()) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert _chosen(x, weight, bias) == "reference"


def test_a_backend_that_cannot_run_says_why() -> None:
    x, weight, bias = _layer(20, 8, 16, torch.float32)
    with pytest.raises(RuntimeError, match="float64"):
        ops.linear(x.double(), weight.double(), bias.double(), backend="cpp")
    with pytest.raises(ValueError, match="backend: .*'magic'"):
        ops.linear(x, weight, bias, backend="magic")
