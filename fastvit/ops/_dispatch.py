"""Which implementation of an operator runs, and why not the others.

Every ``ops/<op>.py`` lists its implementations in order of preference, the plain reference last. Each one answers for
a given call why it cannot take it; the first without reasons runs. An implementation asked for by name never falls
back silently.

``FASTVIT_BACKEND`` (read once, see :mod:`fastvit.backends`) narrows the automatic choice; ``FASTVIT_LOG=debug`` tells
each choice, once per distinct message, through ``logging.getLogger("fastvit")``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvit import backends

__all__ = [
    "Implementation",
    "Selection",
    "automatic",
    "gradients_needed",
    "is_observed",
    "left_out",
    "must_be_plain",
    "recording",
    "select",
    "turned_down",
]

AUTO = "auto"
REFERENCE = "reference"

log = logging.getLogger("fastvit")


class Implementation(NamedTuple):
    """One way to compute an operator.

    ``reasons(*args, **kwargs)`` says why it cannot take these arguments (an empty list: it can); ``run(*args,
    **kwargs)`` computes. Both take the arguments of the public function, without ``backend``.
    """

    name: str
    reasons: Callable[..., list[str]]
    run: Callable[..., Any]


class Selection(NamedTuple):
    """A choice that was made: the operator, the implementation that ran, and the reasons of each other one.

    An implementation that could have run but stands behind the chosen one has no reasons and is not listed.
    """

    op: str
    backend: str
    turned_down: dict[str, list[str]]


def gradients_needed(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these tensors; None is skipped."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def must_be_plain() -> bool:
    """Whether the call is recorded for another runtime (export, ONNX, TorchScript) or transformed.

    Transformed: by ``torch.func``, or by forward-mode automatic differentiation. All know torch's own operators only.
    """
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def left_out(name: str) -> bool:
    """Whether FASTVIT_BACKEND keeps the automatic choice from the implementation of this name."""
    requested = backends.REQUESTED
    return requested is not None and name != REFERENCE and name not in requested


def automatic(implementations: Sequence[Implementation], args: tuple, kwargs: dict) -> Implementation:
    """The first that can take the arguments. Nobody is told: for an operator within another."""
    for implementation in implementations:
        if not left_out(implementation.name) and not implementation.reasons(*args, **kwargs):
            return implementation
    return implementations[-1]


def _named(
    op: str, implementations: Sequence[Implementation], backend: str, args: tuple, kwargs: dict
) -> Implementation:
    for implementation in implementations:
        if implementation.name == backend:
            reasons = implementation.reasons(*args, **kwargs)
            if reasons:
                raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: " + "; ".join(reasons))
            return implementation
    names = [AUTO, *(implementation.name for implementation in implementations)]
    raise ValueError(f"backend: {op} has none named {backend!r}, accepted are {names}")


def select(
    op: str, implementations: Sequence[Implementation], backend: str, args: tuple, kwargs: dict
) -> Implementation:
    """The implementation that is to run ``op`` on these arguments.

    While exporting, tracing, or under a ``torch.func`` transform, the last one (the reference) is taken whatever
    ``backend`` says.

    Args:
        op: the operator's name, for messages.
        implementations: in order of preference; the last is the reference and takes everything.
        backend: "auto", or the name of an implementation.
        args, kwargs: of the public function.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: the implementation asked for cannot take the call; lists every reason.
    """
    if must_be_plain():
        return implementations[-1]
    if backend == AUTO:
        chosen = automatic(implementations, args, kwargs)
    else:
        chosen = _named(op, implementations, backend, args, kwargs)
    if not torch.compiler.is_compiling() and is_observed():
        around = _tell(Selection(op, chosen.name, turned_down(op, implementations, args, kwargs)))
        if around is not None:
            return chosen._replace(run=functools.partial(around, chosen.run))
    return chosen


def turned_down(op: str, implementations: Sequence[Implementation], args: tuple, kwargs: dict) -> dict[str, list[str]]:
    """The reasons of every implementation of ``op`` that cannot take these arguments, by its name."""
    found = {}
    for implementation in implementations:
        reasons = implementation.reasons(*args, **kwargs)
        if left_out(implementation.name):
            reasons = [f"FASTVIT_BACKEND leaves it out of the choice for {op}", *reasons]
        if reasons:
            found[implementation.name] = reasons
    return found


def is_observed() -> bool:
    """Whether somebody is to be told of choices: a recorder of this thread, or the log."""
    return _recorder.get() is not None or log.isEnabledFor(logging.DEBUG)


Around = Callable[..., Any]
Record = Callable[[Selection], Around | None]

_recorder: contextvars.ContextVar[Record | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(record: Record) -> Iterator[None]:
    """Calls ``record(selection)`` for each choice made in the block by this thread; traced calls are not seen.

    Where it returns a function, that one is called with the implementation's ``run`` and its arguments in its place.
    """
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)


_told: set[str] = set()


def _tell(selection: Selection) -> Around | None:
    """Hand a choice to the recorder and to the log; what the recorder returns."""
    record = _recorder.get()
    around = None if record is None else record(selection)
    if log.isEnabledFor(logging.DEBUG):
        others = "".join(f"; not {name}: {', '.join(reasons)}" for name, reasons in selection.turned_down.items())
        message = f"{selection.op}: {selection.backend}{others}"
        if message not in _told:  # one line for twelve equal blocks, not twelve per forward
            _told.add(message)
            log.debug(message)
    return around


def configure_log(level: str | None) -> None:
    """Give the ``fastvit`` logger a level and a handler of its own when FASTVIT_LOG asks for them."""
    if not level:
        return
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ValueError(f"FASTVIT_LOG: got {level!r}, accepted are 'debug', 'info', 'warning' and 'error'")
    log.setLevel(number)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.addHandler(handler)


configure_log(os.environ.get("FASTVIT_LOG"))
