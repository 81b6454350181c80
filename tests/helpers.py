"""What several test files need: the accuracy rule every fused operator is held to, and poisoned allocations."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def assert_as_accurate(
    fused: Tensor,
    reference: Tensor,
    oracle: Tensor,
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    name: str = "output",
) -> None:
    """Hold ``fused`` to err(fused) <= factor * err(reference) + a few ulp, both measured against a float64 oracle.

    err is the largest absolute error over the tensor. The allowance is per element: ``ulps`` units in the last place
    of fused's dtype at the element's size, or at the tensor's root mean square where the element is smaller (a sum
    that cancels has no digits of its own). NaN and infinities must stand where, and only where, the reference has
    them.

    Args:
        fused: what is tested, any floating dtype.
        reference: the reference in the same dtype, same shape.
        oracle: the reference in float64, same shape.
    """
    assert fused.shape == reference.shape == oracle.shape, (
        f"{name}: shapes differ: fused {tuple(fused.shape)}, reference {tuple(reference.shape)}, "
        f"oracle {tuple(oracle.shape)}"
    )
    assert fused.dtype == reference.dtype, f"{name}: dtype {fused.dtype}, the reference gives {reference.dtype}"
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    if fused.numel() == 0:
        return
    got, plain, exact = (t.detach().to("cpu", torch.float64) for t in (fused, reference, oracle))
    assert torch.equal(got.isnan(), plain.isnan()), f"{name}: {_where(got.isnan() != plain.isnan())} NaN differ"
    finite = exact.isfinite() & plain.isfinite()
    special = ~finite & ~plain.isnan() & (got != plain)
    assert not special.any(), f"{name}: {_where(special)} differ where the reference is infinite"
    if not finite.any():
        return
    zero = torch.zeros((), dtype=torch.float64)
    got_error = torch.where(finite, (got - exact).abs(), zero)
    plain_error = torch.where(finite, (plain - exact).abs(), zero).max()
    size = torch.where(finite, exact, zero).abs()
    scale = size.clamp_min(size.square().mean().sqrt())
    allowed = factor * plain_error + ulps * torch.finfo(fused.dtype).eps * scale
    wrong = ~(got_error <= allowed)  # so that an infinite or NaN error counts as wrong
    if wrong.any():
        worst = int((got_error - allowed).nan_to_num(torch.inf).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
        raise AssertionError(
            f"{name}: {_where(wrong)} too far off; at {index}: fused {got.flatten()[worst]:.9g}, "
            f"exact {exact.flatten()[worst]:.9g}, error {got_error.flatten()[worst]:.3g}, "
            f"allowed {allowed.flatten()[worst]:.3g} (largest error of the reference {plain_error:.3g})"
        )


def on_most_draws(check: Callable[[], None], more: int = 2) -> None:
    """Run ``check``, which draws its own inputs; where it fails, ``more`` draws must all pass.

    At an ill-conditioned draw the reference may be close to the oracle by luck. A wrong kernel fails at each.
    """
    try:
        check()
    except AssertionError as error:
        try:
            for _ in range(more):
                check()
        except AssertionError:
            raise error from None


def _where(wrong: Tensor) -> str:
    return f"{int(wrong.sum())} of {wrong.numel()} elements"


_M_PERTURB = -6  # mallopt parameter of glibc: fill what malloc hands out with a byte


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, uninitialised memory holds NaN (bytes 0xff), so that an output element nobody wrote shows.

    Covers ``torch.empty`` and its kin on every device, and on glibc every CPU allocation, those of the C++ extension
    included (glibc fills with the complement of the low byte it is given, and takes 0 for "off", hence 0x100).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if mallopt is not None:
        mallopt(_M_PERTURB, 0x100)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_PERTURB, 0)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
