"""The one call path of every operator: choose an implementation, run it, and name the argument that is wrong.

An operator is one record: its name, its implementations in order of preference (the plain one last), and a check of its
arguments. :meth:`Operator.__call__` takes the first implementation that has no reason against the call. A kernel that
validates its own arguments (C++, CUDA) runs unchecked; only if it raises does ``check`` look for the argument to name.
All others are checked first, as is everything while a compiler traces. An implementation asked for by name never falls
back.

``FASTVIT_BACKEND`` (read once, see :mod:`fastvit.backends`) restricts the automatic choice; without it, kernels that
were not proven on this kind of GPU are left out, unless ``FASTVIT_UNPROVEN`` allows them. Each choice is logged, once
per distinct message, where the logger "fastvit" itself has the level DEBUG, as ``FASTVIT_LOG=debug`` gives it.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvit import autotune, backends
from fastvit.reference.functional import BatchNorm

__all__ = [
    "AUTO",
    "REFERENCE",
    "FusedExport",
    "Implementation",
    "Operator",
    "Selection",
    "any_autocast",
    "compute_dtype",
    "differentiable_backward",
    "distinct",
    "exports_plain",
    "gradients_needed",
    "is_dynamo_compiling",
    "is_grad_enabled",
    "log",
    "recording",
]

AUTO = "auto"
REFERENCE = "reference"

log = logging.getLogger("fastvit")

# Bound once: each is asked on every call.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
any_autocast = torch._C._is_any_autocast_enabled  # a quarter of the time of is_autocast_enabled("cpu")
_tracing_state = torch._C._get_tracing_state  # which Dynamo knows, unlike torch._C._is_tracing
_is_transformed = torch._C._are_functorch_transforms_active
_Proxy = torch.fx.Proxy


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
        name: of the backend.
        run: computes the call.
        reasons: ``reasons(call, named)`` yields, lazily, why it cannot take the call and, unless it was asked for by
            name, why another one is faster. The first that is yielded turns it down. None: it takes every call.
        validates: whether the kernel refuses wrong arguments itself, before anything is changed.
        traced: computes the call while Dynamo traces; ``run`` where None.
    """

    name: str
    run: Callable[[Any], Any]
    reasons: Callable[..., Iterable[str]] | None = None
    validates: bool = False
    traced: Callable[[Any], Any] | None = None


class Selection(NamedTuple):
    """A choice that was made: the operator, the implementation that ran, and the reasons against the others.

    An implementation that could have run but comes after the chosen one has no reasons and is not listed.
    """

    op: str
    backend: str
    turned_down: dict[str, list[str]]


class Operator:
    """An operator: checks, chooses and runs.

    Args:
        name: as in ``fastvit.ops``.
        implementations: in order of preference; the last is the plain one and takes everything.
        check: raises a ValueError that names the argument which is wrong.
    """

    def __init__(self, name: str, implementations: Sequence[Implementation], check: Callable[[Any], None]) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        self.check = check

    def __call__(self, call: Any, backend: str = AUTO) -> Any:
        """Compute a call, a NamedTuple of the public function's arguments whose first field is a tensor.

        While exporting, tracing, or under a ``torch.func`` transform the plain implementation runs whatever ``backend``
        says; within ``fastvit.exporting(fused=True)`` an export keeps the C++ one, or is refused.

        Args:
            backend: "auto", or the name of an implementation.

        Raises:
            ValueError: an argument is wrong, or no implementation is named ``backend``.
            RuntimeError: the implementation asked for, or that an export is to keep, cannot take the call; lists every
                reason.
        """
        compiling, x = is_dynamo_compiling(), call[0]
        plain = type(x) is Tensor
        if (not plain and isinstance(x, _Proxy)) or _tracing_state() is not None:
            # Sizes are nodes of a graph: there is nothing to check.
            return self.implementations[-1].run(call)
        try:
            if torch.compiler._is_exporting_flag and FusedExport.wanted:
                chosen = self._kept_by_export(call, backend)
            elif torch.compiler._is_exporting_flag or _is_transformed() or forward_ad._current_level >= 0:
                chosen = self.implementations[-1]
            else:
                named, requested = backend != AUTO, backends.REQUESTED
                for chosen in self.implementations:
                    if named:
                        if chosen.name != backend:
                            continue
                    elif requested is not None:
                        if chosen.name not in requested and chosen.name != REFERENCE:
                            continue
                    elif x.is_cuda and backends.unproven_reasons(self.name, chosen.name, x.device):
                        continue
                    if chosen.reasons is None:
                        break
                    for _ in chosen.reasons(call, named):
                        break
                    else:
                        break
                else:
                    self.check(call)
                    self._refuse(call, backend)
                if x.is_cuda and not (named or compiling):
                    chosen = self._fastest(call, chosen)
            if compiling or not chosen.validates or not plain:
                self.check(call)
            if not compiling and (_recorder.get() is not None or 0 < log.level <= logging.DEBUG):
                return self._observed(call, chosen)
            return chosen.traced(call) if compiling and chosen.traced is not None else chosen.run(call)
        except Exception:
            self._blame(call)
            raise

    def _blame(self, call: Any) -> None:
        """Raise what ``check`` says of a call that failed, without the failure behind it."""
        try:
            self.check(call)
        except ValueError as error:
            raise error from None

    def _refuse(self, call: Any, backend: str) -> None:
        for implementation in self.implementations:
            if implementation.name == backend and implementation.reasons is not None:
                reasons = "; ".join(dict.fromkeys(implementation.reasons(call, True)))
                raise RuntimeError(f"{self.name}: backend {backend!r} cannot run this call: {reasons}")
        names = [AUTO, *(implementation.name for implementation in self.implementations)]
        raise ValueError(f"backend: expected one of {names} for {self.name}, got {backend!r}")

    def _kept_by_export(self, call: Any, backend: str) -> Implementation:
        """The C++ implementation, whose operators a process without Python has, too."""
        reasons: list[str] = []
        if backend not in (AUTO, "cpp"):
            reasons.append(f"the backend asked for is {backend!r}")
        if backends.REQUESTED is not None and "cpp" not in backends.REQUESTED:
            reasons.append("FASTVIT_BACKEND disables it")
        if _takes_batch_statistics(call):
            reasons.append("a norm takes the statistics of the batch, which is training: call model.eval()")
        for chosen in self.implementations:
            if chosen.name == "cpp" and chosen.reasons is not None:
                reasons += chosen.reasons(call, True)
                if not reasons:
                    return chosen
        told = "; ".join(dict.fromkeys(reasons))
        raise RuntimeError(
            f"{self.name}: fastvit.exporting(fused=True) keeps operators of backend 'cpp', which cannot run this call: "
            f"{told}"
        )

    def _fastest(self, call: Any, first: Implementation) -> Implementation:
        """Of the implementations from ``first`` on that take the call, the fastest on this GPU."""
        following = self.implementations[self.implementations.index(first) :]
        able = [each for each in following if not self.turned_down(call, each)]
        return autotune.fastest(self.name, able, call)

    def turned_down(self, call: Any, implementation: Implementation) -> list[str]:
        """Every reason of one implementation against an automatic choice of it."""
        requested, name = backends.REQUESTED, implementation.name
        reasons = () if implementation.reasons is None else dict.fromkeys(implementation.reasons(call, False))
        if requested is None:
            return [*backends.unproven_reasons(self.name, name, call[0].device), *reasons]
        disabled = name not in requested and name != REFERENCE
        return [f"disabled by FASTVIT_BACKEND for {self.name}", *reasons] if disabled else list(reasons)

    def _observed(self, call: Any, chosen: Implementation) -> Any:
        """Tell the recorder and the log of the choice, and run it as the recorder wants."""
        found = {each.name: self.turned_down(call, each) for each in self.implementations if each is not chosen}
        selection = Selection(self.name, chosen.name, {name: reasons for name, reasons in found.items() if reasons})
        record = _recorder.get()
        around = None if record is None else record(selection)
        if 0 < log.level <= logging.DEBUG:
            others = "".join(f"; not {name}: {', '.join(reasons)}" for name, reasons in selection.turned_down.items())
            message = f"{selection.op}: {selection.backend}{others}"
            if message not in _logged:  # one line for twelve equal blocks, not twelve per forward
                _logged.add(message)
                log.debug(message)
        return chosen.run(call) if around is None else around(chosen.run, call)


# --- Observing ------------------------------------------------------------------------------------------------------

Around = Callable[..., Any]
Record = Callable[[Selection], Around | None]

_recorder: contextvars.ContextVar[Record | None] = contextvars.ContextVar("recorder", default=None)
_logged: set[str] = set()


@contextlib.contextmanager
def recording(record: Record) -> Iterator[None]:
    """Call ``record(selection)`` for each choice made in the block by this thread; traced calls are not seen.

    Where it returns a function, that one is called with the implementation's ``run`` and its arguments instead.
    """
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)


def configure_log(level: str | None) -> None:
    """Give the ``fastvit`` logger a level and a handler of its own when FASTVIT_LOG asks for them."""
    if not level:
        return
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ValueError(f"FASTVIT_LOG: expected 'debug', 'info', 'warning' or 'error', got {level!r}")
    log.setLevel(number)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.addHandler(handler)


configure_log(os.environ.get("FASTVIT_LOG"))


# --- Exporting -------------------------------------------------------------------------------------------------------


class FusedExport:
    """Whether torch.export is to keep the operators, and how many calls of them were traced since.

    Of the process, as is torch's flag that something is exported.
    """

    wanted = False
    calls = 0


def _takes_batch_statistics(call: Any) -> bool:
    """Whether a BatchNorm of a call, or of one within it, does."""
    if isinstance(call, BatchNorm):
        return call.use_batch_stats
    return isinstance(call, tuple) and any(_takes_batch_statistics(each) for each in call)


def exports_plain() -> bool:
    """Whether torch.export traces, and ``fastvit.exporting(fused=True)`` is not around it."""
    return torch.compiler._is_exporting_flag and not FusedExport.wanted


# --- What implementations ask ---------------------------------------------------------------------------------------


def gradients_needed(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these tensors; None is skipped."""
    return is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def distinct(*tensors: Any) -> list[Any]:
    """The tensors, with a view for one that comes again: Dynamo wants the inputs of an autograd function different."""
    found: list[Any] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is each for each in found)
        found.append(tensor.view_as(tensor) if again and tensor is not None else tensor)
    return found


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed: autocast's where it is on and x is not float64."""
    if any_autocast() and x.dtype != torch.float64:
        device = x.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return x.dtype


def differentiable_backward(
    plain: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Tensor | Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated themselves: those of the plain form, recorded anew.

    For ``backward`` of an autograd function whose kernels have no second derivative, where ``create_graph`` asks for it
    (gradient mode is then on in ``backward``).

    Args:
        plain: computes the outputs from ``tensors`` by differentiable operations.
        tensors: the inputs; None where absent.
        needed: which of them need a gradient.
        grads: of the outputs.

    Returns:
        A gradient per input, None where none is needed.
    """
    # Views, so that a tensor which is two of the inputs has a gradient for each.
    tensors = [tensor if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    outputs = plain(*tensors)
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]
    pairs = [(outputs, grads)] if isinstance(outputs, Tensor) else zip(outputs, grads, strict=True)
    used, given = zip(*((output, grad) for output, grad in pairs if grad is not None), strict=True)
    found = iter(torch.autograd.grad(used, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(tensors, needed, strict=True)]
