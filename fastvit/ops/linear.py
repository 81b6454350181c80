"""Linear layers and MLPs, gated ones too, with what stands around them: norm, activation, LayerScale, residual.

- ``cpp``: ``csrc/linear``, float32 and bfloat16, gradients too, and float16 without. At inference all of it is one
  call, an MLP's hidden values stay in the cache, and weights are packed once (:mod:`fastvit.ops._packing`).
- ``mkl``, ``onednn``: the products of those libraries with weights packed by them, through torch's own operators, at
  inference; the rest around them.
- ``reference``: ``torch.nn.functional.linear``, the library's product, and the rest around it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from fastvit import autotune, backends
from fastvit.ops import _packing
from fastvit.ops._checks import check_activation, check_linear, check_number, check_parameter, fail
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    any_autocast,
    differentiable_backward,
    gradients_needed,
    is_dynamo_compiling,
    is_grad_enabled,
)
from fastvit.ops._packing import PackedWeight, pack_constant, packed
from fastvit.ops._schema import ACTIVATION_CODES, GATE_CODES, Registered, define
from fastvit.reference import functional
from fastvit.reference.functional import GATES, LayerNorm

__all__ = ["glu_mlp", "linear", "mlp"]

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPP_MIN_ROWS = 16
CPP_MIN_COLUMNS = 16
_CPP_REASONS = tuple(backends.cpp_reasons())
HAS_VECTORS = not _CPP_REASONS and importlib.import_module("fastvit._C").cpu_info()["in_use"] != "portable"
_PLAIN = (Tensor, torch.nn.Parameter)


class Linear(NamedTuple):
    """The arguments of :func:`linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None = None
    norm: LayerNorm | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None


class Mlp(NamedTuple):
    """The arguments of :func:`mlp`."""

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    activation: str | None = "gelu"
    norm: LayerNorm | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None


class GluMlp(NamedTuple):
    """The arguments of :func:`glu_mlp`."""

    x: Tensor
    gate_weight: Tensor
    gate_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    activation: str | None = "silu"
    norm: LayerNorm | None = None
    hidden_norm: LayerNorm | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None


Call = Linear | Mlp | GluMlp


def _check_layer(names: tuple[str, str], x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int) -> int:
    """The number of outputs."""
    outputs = check_linear(names[0], weight, inputs, x)
    check_parameter(names[1], bias, (outputs,), x)
    _check_dtype(names[0], weight, x)
    _check_dtype(names[1], bias, x)
    return outputs


def _check_dtype(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        fail(name, f"x's dtype {x.dtype}", tensor)


def _check_x(call: Call) -> None:
    x = call.x
    if not isinstance(x, Tensor) or x.dim() < 1 or not x.is_floating_point():
        fail("x", "a floating tensor (..., K)", x)
    check_activation("activation", call.activation, GATES if isinstance(call, GluMlp) else functional.ACTIVATIONS)
    check_norm("norm", call.norm, x.shape[-1], x)


def check_norm(name: str, norm: LayerNorm | None, features: int, x: Tensor) -> None:
    """A LayerNorm beside a product."""
    if norm is None:
        return
    if not isinstance(norm, LayerNorm):
        fail(name, "LayerNorm.of(module) or None", norm)
    for part, tensor in ((f"{name}.weight", norm.weight), (f"{name}.bias", norm.bias)):
        check_parameter(part, tensor, (features,), x)
        if tensor is None or tensor.dtype != torch.float32:
            _check_dtype(part, tensor, x)
    check_number(f"{name}.eps", norm.eps)


def _check_added(call: Call, outputs: int) -> None:
    check_parameter("scale", call.scale, (outputs,), call.x)
    _check_dtype("scale", call.scale, call.x)
    check_residual(call.residual, call.x, outputs)


def check_residual(residual: Tensor | None, x: Tensor, outputs: int) -> None:
    """What is added behind a product of so many outputs."""
    if residual is not None:
        expected = (*x.shape[:-1], outputs)
        if not isinstance(residual, Tensor) or residual.shape != expected or not residual.is_floating_point():
            fail("residual", f"a floating tensor {expected}", residual)
        if residual.device != x.device:
            fail("residual", f"a tensor on {x.device}", residual)
        _check_dtype("residual", residual, x)


def _check_linear(call: Linear) -> None:
    _check_x(call)
    _check_added(call, _check_layer(("weight", "bias"), call.x, call.weight, call.bias, call.x.shape[-1]))


def _check_mlp(call: Mlp) -> None:
    _check_x(call)
    hidden = _check_layer(("fc1_weight", "fc1_bias"), call.x, call.fc1_weight, call.fc1_bias, call.x.shape[-1])
    _check_added(call, _check_layer(("fc2_weight", "fc2_bias"), call.x, call.fc2_weight, call.fc2_bias, hidden))


def _check_glu_mlp(call: GluMlp) -> None:
    x = call.x
    _check_x(call)
    hidden = _check_layer(("gate_weight", "gate_bias"), x, call.gate_weight, call.gate_bias, x.shape[-1])
    if check_linear("value_weight", call.value_weight, x.shape[-1], x) != hidden:
        fail("value_weight", f"gate_weight's shape {(hidden, x.shape[-1])}", call.value_weight)
    _check_layer(("value_weight", "value_bias"), x, call.value_weight, call.value_bias, x.shape[-1])
    check_norm("hidden_norm", call.hidden_norm, hidden, x)
    _check_added(call, _check_layer(("fc2_weight", "fc2_bias"), x, call.fc2_weight, call.fc2_bias, hidden))


# --- Registered operators -------------------------------------------------------------------------------------------

_LAYER = "Tensor {0}weight, Tensor? {0}bias"
_PACKED_LAYER = _LAYER + ", Tensor? {0}packed"
_NORM = "bool has_{0}, Tensor? {0}_weight, Tensor? {0}_bias, float {0}_eps"
_BEHIND = "int activation, Tensor? scale, Tensor? residual"
_AROUND = f"{_NORM.format('norm')}, {_BEHIND}"
NO_NORM = (False, None, None, 0.0)
"""For the arguments of a norm that is absent."""


def _define_linear(name: str, layer: str) -> Registered:
    def fake(a: Any) -> Tensor:
        return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]))

    return define(name, f"Tensor x, {layer.format('')}, {_AROUND}", "Tensor", fake)


def _fake_mlp(a: Any) -> Tensor:
    return a.x.new_empty((*a.x.shape[:-1], a.fc2_weight.shape[0]))


def _define_mlp(name: str, layer: str) -> Registered:
    return define(name, f"Tensor x, {layer.format('fc1_')}, {layer.format('fc2_')}, {_AROUND}", "Tensor", _fake_mlp)


def _define_glu_mlp(name: str, layer: str) -> Registered:
    layers = ", ".join(layer.format(f"{each}_") for each in ("gate", "value", "fc2"))
    norms = f"{_NORM.format('norm')}, {_NORM.format('hidden_norm')}"
    return define(name, f"Tensor x, {layers}, {norms}, {_BEHIND}", "Tensor", _fake_mlp)


PACKED_LINEAR = _define_linear("packed_linear", _PACKED_LAYER)
PACKED_MLP = _define_mlp("packed_mlp", _PACKED_LAYER)
PACKED_GLU_MLP = _define_glu_mlp("packed_glu_mlp", _PACKED_LAYER)
_packed_linear, _packed_mlp, _packed_glu_mlp = PACKED_LINEAR.eager, PACKED_MLP.eager, PACKED_GLU_MLP.eager
# For the graphs of torch.compile, which cannot hold a packed weight.
_linear = _define_linear("linear", _LAYER).call
_mlp = _define_mlp("mlp", _LAYER).call
_glu_mlp = _define_glu_mlp("glu_mlp", _LAYER).call


@torch.library.impl("fastvit::linear", "cpu")
def _run_compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *around: Any) -> Tensor:
    return _packed_linear(x, weight, bias, packed(weight), *around)


@torch.library.impl("fastvit::mlp", "cpu")
def _run_compiled_mlp(x: Tensor, *layers_and_around: Any) -> Tensor:
    layers, around = layers_and_around[:4], layers_and_around[4:]
    return _packed_mlp(x, *_with_packed(layers), *around)


@torch.library.impl("fastvit::glu_mlp", "cpu")
def _run_compiled_glu_mlp(x: Tensor, *layers_and_around: Any) -> Tensor:
    layers, around = layers_and_around[:6], layers_and_around[6:]
    return _packed_glu_mlp(x, *_with_packed(layers), *around)


def _with_packed(layers: Sequence[Any]) -> list[Any]:
    """Weight, bias and packed weight of layers, from weights and biases in turn."""
    found: list[Any] = []
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        found += (weight.stand_in if type(weight) is PackedWeight else weight, bias, packed(weight))
    return found


def packed_in_graph(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The arguments of a layer in an exported graph, where the packed weight is made of the weight."""
    return weight, bias, pack_constant(weight)


# --- By the C++ kernels ---------------------------------------------------------------------------------------------

_ALONE = (*NO_NORM, 0, None, None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in a step of training, whose weight no later call will see."""
    if torch.compiler.is_compiling():
        return _linear(x, weight, bias, *_ALONE)
    return _packed_linear(x, weight, bias, None, *_ALONE)


_GRADIENT_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cpp": partial(_product, bias=None),
    REFERENCE: F.linear,
}


def _gradient(x: Tensor, weight: Tensor, tokens_deep: bool) -> Tensor:
    """x weight^T in a backward pass, by whichever product is faster: its operands lie otherwise than the forward's.

    Tokens are the rows, or with ``tokens_deep`` the depth: of all sizes the one that changes with the images.
    """
    if torch.compiler.is_compiling():
        return _product(x, weight, None)
    (columns, depth), rows = weight.shape, x.numel() // max(x.shape[-1], 1)
    tokens = autotune.token_bucket(min(depth if tokens_deep else rows, MOST_TOKENS))
    sizes = (columns, tokens, rows) if tokens_deep else (columns, depth, tokens)
    key = ("gradient", tokens_deep, *sizes, torch.get_num_threads(), x.dtype)
    return _GRADIENT_PRODUCTS[_FASTER.get(key) or _measure_gradient(x, weight, key)](x, weight)


class _Linear(torch.autograd.Function):
    """A linear layer by our product; those of its gradients are ours or the library's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            return tuple(differentiable_backward(functional.linear, (x, weight, bias), ctx.needs_input_grad, grad))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = _gradient(grad, weight.t(), False)
        if needs_weight or needs_bias:
            rows = grad.flatten(0, -2)
            if needs_weight:
                of_weight = _gradient(rows.t(), x.flatten(0, -2).t(), True)
            if needs_bias:
                of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def _run_linear_cpp(call: Linear, traced: bool = False) -> Tensor:
    x, weight, bias, activation, norm, scale, residual = call
    if is_grad_enabled() and gradients_needed(x, weight, bias, scale, residual, *(norm or ())[:2]):
        _check_linear(call)
        x = x if norm is None else norm.over_last(x)
        out = _Linear.apply(x if x.dim() > 1 else x[None], weight, bias)
        return functional.add_scaled(functional.activate(out if x.dim() > 1 else out[0], activation), scale, residual)
    norm_arguments = NO_NORM if norm is None else (True, *norm)
    behind = (ACTIVATION_CODES[activation], scale, residual)
    if torch.compiler._is_exporting_flag:
        return PACKED_LINEAR.call(x, *packed_in_graph(weight, bias), *norm_arguments, *behind)
    if traced or torch.compiler._is_compiling_flag:
        return _linear(x, weight, bias, *norm_arguments, *behind)
    packing = packed(weight)
    if type(weight) is PackedWeight:
        weight = weight.stand_in
    return _packed_linear(x, weight, bias, packing, *norm_arguments, *behind)


def _run_mlp_cpp(call: Mlp, traced: bool = False) -> Tensor:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, norm, scale, residual = call
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, *(norm or ())[:2])
    if is_grad_enabled() and gradients_needed(x, residual, *parameters):
        hidden = _run_linear_cpp(Linear(x, fc1_weight, fc1_bias, activation, norm), traced)
        return _run_linear_cpp(Linear(hidden, fc2_weight, fc2_bias, None, None, scale, residual), traced)
    norm_arguments = NO_NORM if norm is None else (True, *norm)
    behind = (ACTIVATION_CODES[activation], scale, residual)
    if torch.compiler._is_exporting_flag:
        layers = (*packed_in_graph(fc1_weight, fc1_bias), *packed_in_graph(fc2_weight, fc2_bias))
        return PACKED_MLP.call(x, *layers, *norm_arguments, *behind)
    if traced or torch.compiler._is_compiling_flag:
        return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *norm_arguments, *behind)
    return _packed_mlp(x, *_with_packed((fc1_weight, fc1_bias, fc2_weight, fc2_bias)), *norm_arguments, *behind)


def _run_glu_mlp_cpp(call: GluMlp, traced: bool = False) -> Tensor:
    x, *layers, activation, norm, hidden_norm, scale, residual = call
    if is_grad_enabled() and gradients_needed(x, *layers, scale, residual, *(norm or ())[:2], *(hidden_norm or ())[:2]):
        return _run_glu_mlp_by_layers(call, partial(_run_linear_cpp, traced=traced))
    norms = (*(NO_NORM if norm is None else (True, *norm)), *(NO_NORM if hidden_norm is None else (True, *hidden_norm)))
    behind = (GATE_CODES[activation], scale, residual)
    if torch.compiler._is_exporting_flag:
        pairs = zip(layers[::2], layers[1::2], strict=True)
        return PACKED_GLU_MLP.call(x, *(each for pair in pairs for each in packed_in_graph(*pair)), *norms, *behind)
    if traced or torch.compiler._is_compiling_flag:
        return _glu_mlp(x, *layers, *norms, *behind)
    return _packed_glu_mlp(x, *_with_packed(layers), *norms, *behind)


def _run_glu_mlp_by_layers(call: GluMlp, run: Callable[[Linear], Tensor]) -> Tensor:
    """Its products by ``run`` of a linear layer."""
    _check_glu_mlp(call)
    x, gate_weight, gate_bias, value_weight, value_bias, fc2_weight, fc2_bias, activation, norm, *_ = call
    x = x if norm is None else norm.over_last(x)
    gate, values = run(Linear(x, gate_weight, gate_bias)), run(Linear(x, value_weight, value_bias))
    hidden = functional.activate(gate, activation, GATES) * values
    hidden = hidden if call.hidden_norm is None else call.hidden_norm.over_last(hidden)
    return run(Linear(hidden, fc2_weight, fc2_bias, None, None, call.scale, call.residual))


# --- Implementations ------------------------------------------------------------------------------------------------


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _run_linear_by(call: Linear, product: Product) -> Tensor:
    """By the library's product, and the rest around it."""
    x, weight, bias, activation, norm, scale, residual = call
    # torch would broadcast a bias, add one of another dtype, and answer meta parameters with an empty result; a proxy
    # of torch.fx has no shape.
    if not isinstance(x, torch.fx.Proxy) and (
        norm is not None
        or scale is not None
        or residual is not None
        or weight.is_meta is not x.is_meta
        or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.is_meta))
    ):
        _check_linear(call)
    x = x if norm is None else norm.over_last(x)
    out = product(x, weight, bias)
    if activation is None and scale is None and residual is None:
        return out
    return functional.add_scaled(functional.activate(out, activation), scale, residual)


def _run_mlp_by(call: Mlp, product: Product) -> Tensor:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, norm, scale, residual = call
    hidden = _run_linear_by(Linear(x, fc1_weight, fc1_bias, activation, norm), product)
    return _run_linear_by(Linear(hidden, fc2_weight, fc2_bias, None, None, scale, residual), product)


def _run_glu_mlp_by(call: GluMlp, product: Product) -> Tensor:
    if isinstance(call.x, torch.fx.Proxy):  # which nothing can be checked of
        return functional.glu_mlp(**call._asdict())
    return _run_glu_mlp_by_layers(call, partial(_run_linear_by, product=product))


def _by_mkl(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    packing = packed(weight, "mkl", rows)
    if packing is None:  # fake tensors are made
        return F.linear(x, weight, bias)
    return torch.ops.mkl._mkl_linear(x, packing, weight, bias, rows)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packing = packed(weight, "onednn", x.numel() // x.shape[-1])
    if packing is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packing, bias, "none", [], "")


def _reasons(
    name: str,
    missing: Sequence[str],
    dtypes: Sequence[torch.dtype],
    call: Call,
    named: bool,
    traced: bool | None = None,
) -> Iterator[str]:
    """Against products with packed weights: our own ("cpp"), MKL's or oneDNN's.

    Args:
        missing: why they cannot run here at all.
        dtypes: those they take.
        traced: whether Dynamo traces, where the caller knows.
    """
    yield from missing
    x, ours = call.x, name == "cpp"
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    if isinstance(call, Linear):
        weights, biases = (call.weight,), (call.bias,)
    elif isinstance(call, Mlp):
        weights, biases = (call.fc1_weight, call.fc2_weight), (call.fc1_bias, call.fc2_bias)
    else:
        weights = call.gate_weight, call.value_weight, call.fc2_weight
        biases = call.gate_bias, call.value_bias, call.fc2_bias
    if not x.is_cpu:
        yield f"it takes tensors on the CPU, x is on {x.device}"
    if x.dtype not in dtypes:
        yield f"dtype {x.dtype} is not one of {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    if x.dtype == torch.float16 and gradients_needed(
        x, *weights, *biases, call.scale, call.residual, *(call.norm or ())[:2]
    ):
        yield "it has no backward in float16"
    if any_autocast() and torch.is_autocast_enabled("cpu"):
        yield "autocast is on, whose cast weights the library keeps"
    for tensor in (*weights, *biases):
        if tensor is not None and type(tensor) not in _PLAIN and (not ours or is_traceable_wrapper_subclass(tensor)):
            yield f"a parameter is a {type(tensor).__name__}"
    if not ours:
        yield from _untaken(x, weights, biases)
    if named or (ours and type(weights[0]) is PackedWeight):
        return
    for weight in weights:
        if weight.shape[0] < CPP_MIN_COLUMNS:
            yield f"fewer than {CPP_MIN_COLUMNS} columns leave the vectors empty"
    if is_dynamo_compiling() or torch.compiler._is_compiling_flag if traced is None else traced:
        if is_grad_enabled() and gradients_needed(x, *weights):
            yield "the compiler differentiates the library's products"
        return  # what is asked of x would be a guard on the batch size
    rows = x.numel() // max(x.shape[-1], 1)
    trains = is_grad_enabled() and gradients_needed(x, *weights, *biases)
    if rows < CPP_MIN_ROWS and (trains or not _packing.ENABLED or any(weight.is_inference() for weight in weights)):
        yield f"fewer than {CPP_MIN_ROWS} rows are not worth packing a weight at each call"
        return
    if rows < CPP_MIN_ROWS:  # they wait for the weight, which a measurement would find in a cache
        if not (ours and HAS_VECTORS):
            yield f"fewer than {CPP_MIN_ROWS} rows wait for the weight, which ours reads by all threads"
        return
    # What the times depend on; within a bucket of rows they are taken to be in proportion.
    bucket = min((rows - 1).bit_length(), MOST_ROWS.bit_length())
    mode = "fwd_bwd" if trains else "fwd"
    sizes = (bucket, *weights[0].shape, weights[-1].shape[0], torch.get_num_threads(), x.dtype, mode)
    around = (call.activation is not None, call.norm is not None, call.scale is not None, call.residual is not None)
    key = (type(call).__name__, *sizes, *around)
    if isinstance(call, GluMlp):
        key = (*key, call.hidden_norm is not None)
    faster = _FASTER.get(key) or _measure(call, 1 << bucket, weights[-1].shape[0], key)
    if faster != name:
        yield f"the products of {'the library' if faster == REFERENCE else faster} are faster on this machine"


def _untaken(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Iterator[str]:
    """What MKL and oneDNN do not take, and our own products do."""
    if type(x) not in _PLAIN:
        yield f"x is a {type(x).__name__}"
    if is_dynamo_compiling() or torch.compiler._is_compiling_flag:
        yield "the compiler chooses the library's products itself"
    if is_grad_enabled() and gradients_needed(x, *weights, *biases):
        yield "it has no gradients"
    if not x.numel() or not all(weight.numel() for weight in weights):
        yield "it takes no empty tensors"
    if not _packing.ENABLED:
        yield "FASTVIT_PACK=0 keeps no packed weights"
    if any(weight.is_inference() for weight in weights):
        yield "a weight made in inference mode does not tell when it changes"


def _library_reasons(
    name: str,
    missing: Sequence[str],
    dtypes: Sequence[torch.dtype],
    call: Call,
    named: bool,
    traced: bool | None = None,
) -> Iterable[str]:
    """Against MKL's or oneDNN's products: of :func:`_reasons` one alone where they have never been the fastest."""
    if not named and name not in _WINNERS:
        return ("it has not been the fastest on this machine",)
    return _reasons(name, missing, dtypes, call, named, traced)


_FASTER: dict[tuple[Any, ...], str] = {}
"""The fastest implementation, by what the times depend on."""
_WINNERS: set[str] = set()
"""The implementations that were the fastest for any call."""
MOST_ROWS = 512
"""That are measured."""
MOST_TOKENS = 2048
"""In a product of a backward pass: its time grows otherwise where they are the depth."""


def _measure(call: Call, rows: int, columns: int, key: tuple[Any, ...]) -> str:
    """The fastest implementation for calls like this one, by :mod:`fastvit.autotune`; with ones for all values."""

    def ones(value: Any) -> Any:
        return torch.ones_like(value).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    twin = type(call)(*map(ones, call))
    twin = twin._replace(
        x=ones(call.x.new_empty(rows, call.x.shape[-1]).requires_grad_(call.x.requires_grad)),
        norm=None if call.norm is None else LayerNorm(*map(ones, call.norm)),
        residual=None if call.residual is None else ones(call.x.new_empty(rows, columns)),
    )
    if isinstance(twin, GluMlp) and twin.hidden_norm is not None:
        twin = twin._replace(hidden_norm=LayerNorm(*map(ones, twin.hidden_norm)))
    runs: dict[tuple[str], Callable[[Any], Any]] = {}
    operators = {Linear: LINEAR, Mlp: MLP, GluMlp: GLU_MLP}
    for each in operators[type(call)].implementations:
        # Named, so that nobody asks for what is measured here.
        if each.reasons is None or not any(each.reasons(twin, True)):
            runs[(each.name,)] = each.run
    wanted = [each for each in pytree.tree_leaves(tuple(twin)) if isinstance(each, Tensor) and each.requires_grad]

    def run(name: tuple[str]) -> Tensor:
        out = runs[name](twin)
        if out.requires_grad:
            torch.autograd.grad(out, wanted, torch.ones_like(out))
        return out

    return _choose(key, list(runs), run, call.x, 1.0 if wanted else autotune.PREFERENCE)


def _measure_gradient(x: Tensor, weight: Tensor, key: tuple[Any, ...]) -> str:
    """The fastest product for gradients like this one, with ones for all values, lying as these do."""
    _, tokens_deep, columns, depth, rows, *_ = key
    if tokens_deep:
        twins = x.new_ones(depth, rows).t(), x.new_ones(depth, columns).t()
    else:
        twins = x.new_ones(rows, depth), torch.ones_like(weight)
    names = [(name,) for name in _GRADIENT_PRODUCTS]
    return _choose(key, names, lambda name: _GRADIENT_PRODUCTS[name[0]](*twins), x, 1.0)


def _choose(
    key: tuple[Any, ...],
    names: list[tuple[str]],
    run: Callable[[tuple[str]], object],
    x: Tensor,
    preference: float,
) -> str:
    """The fastest of the products by ``run``, kept in ``_FASTER``, for calls like one with this x."""
    # What is first is taken where nothing is measured.
    names = names if HAS_VECTORS else names[::-1]
    hollow = type(x) not in _PLAIN  # a tensor without contents, which takes no time
    with _disable_current_modes(), autotune.unmeasured() if hollow else contextlib.nullcontext():
        (found,) = autotune.choose("products", key, names, run, on_cpu=True, preference=preference)
    if not hollow:
        _FASTER[key] = found
        _WINNERS.add(found)
    return found


_NOT_SEEN = ["without its native part fastvit does not see that a packed weight has changed"] if _CPP_REASONS else []
_MKL_REASONS = backends.mkl_reasons() + _NOT_SEEN
_ONEDNN_REASONS = backends.onednn_reasons() + _NOT_SEEN
_HAS_BFLOAT16 = not backends.onednn_reasons() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN_DTYPES = CPP_DTYPES[:2] if _HAS_BFLOAT16 else CPP_DTYPES[:1]


def _implementations(run_cpp: Callable[..., Tensor], run_by: Callable[..., Tensor]) -> tuple[Implementation, ...]:
    cpp, mkl, onednn = (
        partial(_reasons, "cpp", _CPP_REASONS, CPP_DTYPES),
        partial(_library_reasons, "mkl", _MKL_REASONS, CPP_DTYPES[:1]),
        partial(_library_reasons, "onednn", _ONEDNN_REASONS, _ONEDNN_DTYPES),
    )
    return (
        Implementation("cpp", run_cpp, cpp, True, partial(run_cpp, traced=True)),
        Implementation("mkl", partial(run_by, product=_by_mkl), mkl),
        Implementation("onednn", partial(run_by, product=_by_onednn), onednn),
        Implementation(REFERENCE, partial(run_by, product=F.linear), validates=True),
    )


LINEAR = Operator("linear", _implementations(_run_linear_cpp, _run_linear_by), _check_linear)
MLP = Operator("mlp", _implementations(_run_mlp_cpp, _run_mlp_by), _check_mlp)
GLU_MLP = Operator("glu_mlp", _implementations(_run_glu_mlp_cpp, _run_glu_mlp_by), _check_glu_mlp)


# --- For operators with linear layers in them -----------------------------------------------------------------------


def cast_like(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters in x's dtype, as a plain convolution or linear layer wants them; autocast sees to that by itself."""
    for tensor in parameters:
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError("parameters: expected floating tensors")
    if not isinstance(x, Tensor):  # a proxy of torch.fx
        return list(parameters)
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return list(parameters)
    return [tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype) for tensor in parameters]


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer gives for x."""
    device = x.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer within another operator, with parameters of any floating dtype, by whichever product is faster."""
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        weight, bias = cast_like(x, weight, bias)
    traced = is_dynamo_compiling() or torch.compiler._is_exporting_flag
    call, requested = Linear(x, weight, bias), backends.REQUESTED
    asks = not traced and type(weight) is not PackedWeight  # first, as small calls are short; a guard while tracing
    few = weight.shape[0] < CPP_MIN_COLUMNS or (is_grad_enabled() and x.numel() < CPP_MIN_ROWS * x.shape[-1])
    if asks and few:
        return LINEAR.implementations[-1].run(call)
    for each in LINEAR.implementations:
        if requested is not None and each.name not in requested and each.name != REFERENCE:
            continue
        for _ in each.reasons(call, False, traced) if each.reasons is not None else ():
            break
        else:
            break
    return each.traced(call) if traced and each.traced is not None else each.run(call)


def takes_mlp(call: Mlp) -> bool:
    """Whether ``cpp`` would run this MLP, whose layers another operator has with something in between."""
    if backends.REQUESTED is not None and "cpp" not in backends.REQUESTED:
        return False
    reasons = MLP.implementations[0].reasons
    for _ in () if reasons is None else reasons(call, False):
        return False
    return True


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    norm: LayerNorm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """residual + scale * activation(norm(x) weight^T + bias).

    Args:
        x: (..., K), floating.
        weight: (N, K), dtype and device of x (under autocast dtypes may differ).
        bias: (N,), likewise.
        activation: None, "gelu" (erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        norm: LayerNorm over K, in front, in x's dtype or float32. scale: (N,), a LayerScale. residual: (..., N).
        backend: "auto", "cpp", "mkl", "onednn" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Dosovitskiy et al. 2021 (ViT), equations 2 and 3; Touvron et al. 2021 (CaiT), equation 4 (LayerScale). The
    plain form is ``fastvit.reference.functional.linear``.
    """
    return LINEAR(Linear(x, weight, bias, activation, norm, scale, residual), backend)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "gelu",
    *,
    norm: LayerNorm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """residual + scale * (activation(norm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias).

    Args:
        x: (..., K), floating.
        fc1_weight, fc2_weight: (M, K) and (N, M), dtype and device of x (under autocast dtypes may differ).
        fc1_bias, fc2_bias: (M,) and (N,), likewise.
        activation, norm, scale, residual: as for :func:`linear`.
        backend: "auto", "cpp", "mkl", "onednn" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1. The plain form is ``fastvit.reference.functional.mlp``.
    """
    return MLP(Mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, norm, scale, residual), backend)


def glu_mlp(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "silu",
    *,
    norm: LayerNorm | None = None,
    hidden_norm: LayerNorm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """An MLP whose hidden values are gated: SwiGLU ("silu"), GEGLU ("gelu"), GLU ("sigmoid").

    With x' = norm(x): h = activation(x' gate_weight^T + gate_bias) * (x' value_weight^T + value_bias);
    residual + scale * (hidden_norm(h) fc2_weight^T + fc2_bias).

    Args:
        x: (..., K), floating.
        gate_weight, value_weight: (M, K), dtype and device of x (under autocast dtypes may differ). Of one packed layer
            they are ``weight.chunk(2)``: timm's SwiGLUPacked and DINOv2 have the gate first, timm's GluMlp has it last.
        fc2_weight: (N, M), likewise. gate_bias, value_bias: (M,), fc2_bias: (N,), likewise.
        activation: of the gate: "sigmoid", or as for :func:`linear`.
        hidden_norm: LayerNorm over M, in x's dtype or float32, as EVA-02 has it.
        norm, scale, residual: as for :func:`linear`.
        backend: "auto", "cpp", "mkl", "onednn" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Shazeer 2020 (GLU Variants Improve Transformer), equation 6; Fang et al. 2023 (EVA-02), section 2.1
    (hidden_norm). The plain form is ``fastvit.reference.functional.glu_mlp``.
    """
    # fmt: off
    call = GluMlp(
        x, gate_weight, gate_bias, value_weight, value_bias, fc2_weight, fc2_bias, activation, norm, hidden_norm, scale,
        residual,
    )
    # fmt: on
    return GLU_MLP(call, backend)
