"""Two linear layers with an activation between them. Who computes them is said in ``_products.py``."""

from __future__ import annotations

from torch import Tensor

from fastvit.ops import _at_once
from fastvit.ops._dispatch import select
from fastvit.ops._products import IMPLEMENTATIONS, NAMED_IMPLEMENTATIONS, Call, check_input, check_layer

__all__ = ["mlp"]


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "gelu",
    backend: str = "auto",
) -> Tensor:
    """activation(x fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias.

    Args:
        x: (..., K), floating.
        fc1_weight, fc2_weight: (M, K) and (N, M), dtype and device of x (under autocast dtypes may differ).
        fc1_bias, fc2_bias: (M,) and (N,), likewise.
        activation: as for :func:`fastvit.ops.linear`.
        backend: "auto", "cpp" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1. The plain form is ``fastvit.reference.functional.mlp``.
    """
    layers = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    found = _at_once.tried(backend, _at_once.two_products, x, *layers, activation)
    if found is not None:
        return found
    check_input(x, activation)
    first = check_layer(("fc1_weight", "fc1_bias"), fc1_weight, fc1_bias, x, x.shape[-1])
    second = check_layer(("fc2_weight", "fc2_bias"), fc2_weight, fc2_bias, x, fc1_weight.shape[0])
    call = Call(x, (first, second), activation)
    order = IMPLEMENTATIONS if backend == "auto" else NAMED_IMPLEMENTATIONS
    return select("mlp", order, backend, (call,), {}).run(call)
