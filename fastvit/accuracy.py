"""The accuracy rule that every fused result is held to, in tests, in ``patch(verify=...)`` and in benchmarks.

With err(a) the largest absolute error of a result over its elements, against the plain form run in float64,

    err(fused) <= FACTOR * err(plain) + ULPS * eps * size

where ``plain`` is the plain form in the same dtype as ``fused``, eps that dtype's machine epsilon, and size the
magnitude of the exact element, or the tensor's root mean square where the element is smaller: a sum that cancels has no
digits of its own. Infinities and NaN must stand where, and only where, the plain form has them; where it has some that
the exact result has not, as torch's GELU of infinity with AVX-512, the exact result will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
ULPS = 4.0


class Deviation(NamedTuple):
    """How far a fused and a plain tensor are from the exact one."""

    fused: float
    """Largest error of the fused result, relative to the largest exact value."""
    plain: float
    """The same of the plain one."""
    excess: float
    """The largest error of the fused result less its allowance of ``ULPS`` units in the last place; absolute."""
    plain_error: float
    """Largest error of the plain result; absolute."""
    special: int
    """Number of elements whose infinity or NaN is neither the plain result's nor the exact one's, or that are NaN where
    those are finite."""
    worst: int
    """Index of the element of the largest excess, in the flattened tensor."""

    @property
    def is_accurate(self) -> bool:
        """Whether the rule holds."""
        return self.special == 0 and self.excess <= FACTOR * self.plain_error

    def pooled(self, other: Deviation) -> Deviation:
        """Both as if they were parts of one tensor; ``worst`` is the index in the part of the larger excess."""
        return Deviation(
            max(self.fused, other.fused),
            max(self.plain, other.plain),
            max(self.excess, other.excess),
            max(self.plain_error, other.plain_error),
            self.special + other.special,
            self.worst if self.excess >= other.excess else other.worst,
        )


NONE = Deviation(0.0, 0.0, float("-inf"), 0.0, 0, 0)
"""Of a tensor without elements; neutral under ``pooled``."""


def deviation(fused: Tensor, plain: Tensor | Sequence[Tensor], exact: Tensor, *, ulps: float = ULPS) -> Deviation:
    """Measure ``fused`` and ``plain`` against ``exact``.

    Args:
        fused: the result to judge, of any floating dtype and shape.
        plain: the plain form's result in that dtype, same shape; or several of them, computed in other orders or with
            other numbers of threads, of which the worst error counts.
        exact: the plain form's result in float64, same shape.
        ulps: allowance in units in the last place. More than the default where ``fused`` is float64 itself, whose
            oracle is no more accurate than what it judges.

    Raises:
        ValueError: the shapes differ, or ``plain`` is an empty sequence.
    """
    plains = [plain] if isinstance(plain, Tensor) else list(plain)
    if not plains:
        raise ValueError("plain: expected a tensor or several of them, got an empty sequence")
    for name, tensor in (("fused", fused), *(("plain", tensor) for tensor in plains)):
        if tensor.shape != exact.shape:
            raise ValueError(f"{name}: expected the shape of exact, {tuple(exact.shape)}, got {tuple(tensor.shape)}")
    if exact.numel() == 0:
        return NONE
    limits = torch.finfo(fused.dtype)
    fused, exact, *plains = (tensor.detach().double() for tensor in (fused, exact, *plains))
    finite = exact.isfinite()
    for tensor in plains:
        finite = finite & tensor.isfinite()
    matches = (fused == exact) | (fused.isnan() & exact.isnan())
    matches |= exact.isfinite() & ((fused - exact).abs() <= ulps * limits.eps * exact.abs())
    for tensor in plains:
        matches |= (fused == tensor) | (fused.isnan() & tensor.isnan())
    special = int((~matches & ~finite).sum()) + int((fused.isnan() & finite).sum())
    if not finite.any():
        return NONE._replace(special=special)
    exact = exact.where(finite, 0.0)
    plain_error = torch.stack([(tensor - exact).abs().where(finite, 0.0).max() for tensor in plains]).max()
    error = (fused - exact).abs().where(finite, 0.0).nan_to_num(torch.inf, posinf=torch.inf)
    size = exact.abs().clamp_min((exact.square().sum() / finite.sum()).sqrt())
    excess = (error - ulps * limits.eps * size).where(finite, -torch.inf).flatten()
    worst = int(excess.argmax())
    largest = exact.abs().max().clamp_min(limits.tiny)
    return Deviation(
        float(error.max() / largest),
        float(plain_error / largest),
        float(excess[worst]),
        float(plain_error),
        special,
        worst,
    )


def is_accurate(fused: Tensor, plain: Tensor | Sequence[Tensor], exact: Tensor) -> bool:
    """Whether ``fused`` keeps the rule; arguments and errors are those of :func:`deviation`."""
    return deviation(fused, plain, exact).is_accurate
