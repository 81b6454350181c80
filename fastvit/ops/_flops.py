"""FLOPs of every registered operator, for ``torch.utils.flop_counter``.

A formula counts what torch counts for the plain form: 2 FLOPs a multiply-add, of matrix products and convolutions
alone, so that a patched model has the FLOPs of the plain one. What a backward pass computes anew in place of keeping it
is not counted, nor are the moments of a map, which are its norm's statistics.

torch itself counts nothing for ``scaled_dot_product_attention`` on the CPU, outside of ``sdpa_kernel(MATH)``.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import out_size
from fastvit.ops._schema import REGISTERED

__all__ = ["register_when_imported"]

_COUNTER = "torch.utils.flop_counter"


def _attention(a: Any) -> int:
    return 4 * a.q.numel() * a.k.shape[2]


def _mixes(a: Any) -> int:
    """A product of H numbers for each number of a map, for each mix there is."""
    maps = a.q.numel() // max(a.q.shape[3], 1) * a.k.shape[2]
    return 2 * maps * a.q.shape[1] * sum(weight is not None for weight in (a.pre_weight, a.post_weight))


def _images(a: Any, weight: Tensor, stride: int, padding: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a convolution's input and output as images."""
    batch, _, channels = a.x.shape
    sizes = (out_size(size, weight.shape[3], stride, padding) for size in (a.height, a.width))
    return (batch, channels, a.height, a.width), (batch, channels, *sizes)


def _convolution(a: Any, weight: Tensor, stride: int, padding: int) -> int:
    batch, _, rows, columns = _images(a, weight, stride, padding)[1]
    return 2 * batch * rows * columns * weight.numel()


def _depthwise(a: Any) -> int:
    return _convolution(a, a.weight, a.stride, a.padding)


def _depthwise_backward(a: Any) -> int:
    """By torch's own formula, which takes the gradient of the weight for one of all pairs of channels."""
    from torch.utils.flop_counter import conv_backward_flop

    image, out = _images(a, a.weight, a.stride, a.padding)
    ignored = (None,) * 3  # bias, stride, padding
    wanted = (a.x_grad, a.parameter_grads)
    return conv_backward_flop(
        out, image, tuple(a.weight.shape), *ignored, 1, False, 0, 1, wanted, out_val=(image, tuple(a.weight.shape))
    )


def _projections(a: Any) -> int:
    parts = ([getattr(a, f"{name}_{field}") for field in ("weight", "stride", "padding")] for name in "qkv")
    return sum(_convolution(a, *part) for part in parts)


def _leff(a: Any) -> int:
    tokens = a.x.shape[0] * a.height * a.width
    return 2 * tokens * (a.up_weight.numel() + a.dw_weight.numel() + a.down_weight.numel())


def _windows(a: Any) -> int:
    sides = ((a.x.shape[2], "height"), (a.x.shape[3], "width"))
    rows, columns = (
        out_size(size, *(getattr(a, f"{name}_{side}") for name in ("kernel", "stride", "padding")))
        for size, side in sides
    )
    return 2 * a.x.shape[0] * rows * columns * a.weight.numel()


def _products(a: Any, *weights: Tensor) -> int:
    rows = a.x.numel() // max(a.x.shape[-1], 1)
    return 2 * rows * sum(weight.numel() for weight in weights)


def _nothing(a: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[[Any], int]] = {
    "class_attention": _attention,
    "class_attention_backward": lambda a: 2 * _attention(a),
    "conv_batch_norm": _windows,
    "conv_projection": _projections,
    "glu_mlp": lambda a: _products(a, a.gate_weight, a.value_weight, a.fc2_weight),
    "head_map_moments": _nothing,
    "head_map_moments_backward": _nothing,
    "head_mixed_attention": lambda a: _attention(a) + _mixes(a),
    "head_mixed_attention_backward": lambda a: 2 * (_attention(a) + _mixes(a)),
    "head_mixed_attention_training": lambda a: _attention(a) + _mixes(a),
    "head_mixed_attention_training_backward": lambda a: 2 * (_attention(a) + _mixes(a)),
    "leff": _leff,
    "linear": lambda a: _products(a, a.weight),
    "masked_attention": _attention,
    "masked_attention_backward": lambda a: 2 * _attention(a),
    "mlp": lambda a: _products(a, a.fc1_weight, a.fc2_weight),
    "pack_constant": _nothing,
    "pack_weight": _nothing,
    "unpack_weight": _nothing,
    "token_depthwise_conv": _depthwise,
    "token_depthwise_conv_backward": _depthwise_backward,
    "token_depthwise_conv_training": _depthwise,
}
"""By operator, whatever kernels compute it; a formula takes the operator's arguments by name."""


def _formula(name: str) -> Callable[..., int]:
    """As torch calls it: with the operator's arguments, and its result as ``out_val``."""
    op = name.replace("_cpp", "").replace("_triton", "").replace("packed_", "")
    formula, record = FORMULAS[op], REGISTERED[name].Arguments
    return lambda *args, out_val=None, **kwargs: formula(record(*args, **kwargs))


def _library_products() -> list[Any]:
    """The products of libraries with packed weights, where this torch has them."""
    products = []
    if not backends.mkl_reasons():
        products.append(torch.ops.mkl._mkl_linear)
    if not backends.onednn_reasons():
        products.append(torch.ops.mkldnn._linear_pointwise)
    return products


def _library_product(x: Tensor, *rest: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * x.numel() * out_val.shape[-1]


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name in REGISTERED:
        register_flop_formula(getattr(torch.ops.fastvit, name), get_raw=True)(_formula(name))
    for library in _library_products():  # which torch does not count
        if library not in flop_registry:
            register_flop_formula(library, get_raw=True)(_library_product)


class _Hook(importlib.abc.MetaPathFinder):
    """Registers the formulas at the first import of torch's counter, and removes itself."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the formulas now if torch's counter is imported, or else when it is: it imports Triton."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Hook())
