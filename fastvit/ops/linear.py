"""A linear layer with its activation. Who computes it is said in ``_products.py``."""

from __future__ import annotations

from torch import Tensor

from fastvit.ops import _at_once
from fastvit.ops._dispatch import select
from fastvit.ops._products import IMPLEMENTATIONS, NAMED_IMPLEMENTATIONS, Call, check_input, check_layer

__all__ = ["linear"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(x weight^T + bias).

    Args:
        x: (..., K), floating.
        weight: (N, K), dtype and device of x (under autocast dtypes may differ).
        bias: (N,), likewise.
        activation: None, "gelu" (erf), "quick_gelu", "silu" or "relu".
        backend: "auto", "cpp" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    The plain form is ``fastvit.reference.functional.linear``.
    """
    found = _at_once.tried(backend, _at_once.product, x, weight, bias, activation)
    if found is not None:
        return found
    check_input(x, activation)
    layer = check_layer(("weight", "bias"), weight, bias, x, x.shape[-1])
    call = Call(x, (layer,), activation)
    order = IMPLEMENTATIONS if backend == "auto" else NAMED_IMPLEMENTATIONS
    return select("linear", order, backend, (call,), {}).run(call)
