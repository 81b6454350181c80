"""How much of a model's arithmetic do the fused operators do? Counted on an example, or on a shape alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit.ops import _operator
from fastvit.patching.copies import shared_copy
from fastvit.patching.fusion import Fused, give, plain_class
from fastvit.patching.images import Shape, likely_shapes
from fastvit.patching.plan import device_of
from fastvit.patching.verification import as_call, undisturbed, whole_blocks


def share_of_flops(model: nn.Module, example: Any) -> float | None:
    """The part of a model's FLOPs (matrix products and convolutions) that fused operators do, from 0 to 1.

    It is what the plain model spends and the patched one does not spend outside of operators; an operator that runs its
    reference counts as not fused. Projections around an attention stay outside. None where the model has no such FLOPs.

    Args:
        example: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: ``example`` is none of these.
    """
    args, kwargs = as_call(example)
    fused = {module for module in model.modules() if isinstance(module, Fused)}
    with undisturbed(model), whole_blocks(model), _whole_products():
        with FlopCounter() as outside, _operator.recording(outside.leave_out):
            model(*args, **kwargs)
        with _plain(fused), FlopCounter() as whole:
            model(*args, **kwargs)
    return 1.0 - outside.flops / whole.flops if whole.flops else None


class Estimate(NamedTuple):
    """A share of FLOPs, and the image (channels, height, width) it is for."""

    share: float
    image: Shape


def estimate_share(model: nn.Module) -> Estimate | None:
    """The share for one image of the size that the model was made for, or else of a usual one.

    Nothing is computed: the code of a copy, which shares the model's tensors and has none of its hooks, runs on tensors
    without contents. None where the model takes no such image, or its code cannot run so.
    """
    try:
        hollow = shared_copy(model, hooks=False)
        dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    except Exception:  # somebody's module that cannot be copied
        return None
    for shape in likely_shapes(model):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _silent(_FAKE_LOG), _silent(_operator.log):
                share = share_of_flops(hollow, torch.empty(1, *shape, dtype=dtype, device=device_of(model)))
        except Exception:  # somebody's forward, which takes something else
            continue
        return None if share is None else Estimate(share, shape)
    return None


_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")
"""Tells of every operator that does not take its tensors."""


@contextlib.contextmanager
def _silent(log: logging.Logger) -> Iterator[None]:
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs by torch's own formulas.

    torch's ``FlopCounterMode`` follows modules by hooks on gradients too, which it cannot put on all that models pass.
    """

    counts_operators = True

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # here, since it imports Triton

        super().__init__()
        self.flops = 0
        self.formulas = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # tensors without contents are asked for their device in this way
            return NotImplemented
        formula = self.formulas.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def leave_out(self, selection: _operator.Selection) -> Callable[..., Any] | None:
        """For ``_operator.recording``: what an operator spends is not counted."""
        return None if selection.backend == _operator.REFERENCE else self._uncounted

    def _uncounted(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self.flops
        try:
            return run(*args, **kwargs)
        finally:
            self.flops = before


@contextlib.contextmanager
def _plain(fused: set[nn.Module]) -> Iterator[None]:
    """The modules have their plain classes in the block."""
    before = [(module, type(module)) for module in fused]
    try:
        for module in fused:
            give(module, plain_class(module))
        yield
    finally:
        for module, cls in before:
            give(module, cls)


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """torch's own fused attentions, which its counter does not know on the CPU, run as the products they consist of."""
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
