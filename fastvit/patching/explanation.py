"""Which backend each fused block takes for a given input, why not the others, and what unknown classes compute."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from fastvit.ops import _operator
from fastvit.patching import tables
from fastvit.patching.deferral import has_fused_class, listening, still_undecided
from fastvit.patching.fusion import Fused, plain_class
from fastvit.patching.plan import check_model
from fastvit.patching.verification import as_call, whole_blocks
from fastvit.recognise.deferred import Event
from fastvit.recognise.observing import Observing, Seen
from fastvit.recognise.places import user_line


@dataclass(frozen=True)
class Choice:
    """One call of an operator: the module that made it, the backend that ran, and each refused one's reasons."""

    name: str
    op: str
    backend: str
    turned_down: dict[str, list[str]]


@dataclass(frozen=True)
class Computed:
    """Attention, an MLP or a convolution as it was seen: a chain of operations in a module that no row knows.

    Attributes:
        name: of the innermost module in whose forward it ended.
        chain: "q@k^T, *c, softmax, @v"; "" where nothing was looked for.
        op: the operator that took it; None where it broke off.
        reason, line: why it broke off, and "file.py:12", the line of the user's code at which it did; "" else.
    """

    name: str
    chain: str
    op: str | None
    reason: str
    line: str

    def __str__(self) -> str:
        name = self.name or "(the model itself)"
        if not self.chain:
            return f"{name}: left plain: {self.reason}"
        return f"{name}: {self.chain} -> {self.op or f'broken off: {self.reason} ({self.line})'}"


@dataclass(frozen=True)
class Explanation:
    """The choices in the order in which they were made, and the chains in the order in which they ended."""

    model: str
    rows: tuple[Choice, ...]
    chains: tuple[Computed, ...] = ()

    def to_json(self) -> str:
        """``{"model", "rows": [{"name", "op", "backend", "turned_down"}], "chains": [{"name", "chain", ...}]}``."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return tables.render(*self._parts(), width=120)

    def _repr_html_(self) -> str:
        return tables.render_html(*self._parts())

    def _parts(self) -> tuple[str, Sequence[str], Sequence[Sequence[str]], str]:
        cells = [[row.name, row.op, row.backend, _told(row.turned_down)] for row in self.rows]
        foot = f"{len(self.rows)} calls of fused operators" if self.rows else "no fused operator was called"
        if self.chains:
            told = "\n".join(map(str, self.chains))
            foot = f"{foot}\nrecognised by what is computed:\n{told}"
        return self.model, ["module", "operator", "backend", "not"], tables.fold(cells), foot


def _told(turned_down: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in turned_down.items())


def explain(model: nn.Module, example: Any) -> Explanation:
    """Run a patched model once and tell which backend each fused block took, and why each other one was turned down.

    Of what no row knows it tells the chain of operations seen, and the operator that took it or the operation at which
    it broke off. A model that its first call is to decide about is left as it is.

    The model runs as it is (training or eval mode) without gradients; a last block that would compute only the tokens
    that the head reads is run whole, as the others are.

    Args:
        example: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``example`` is none of the above.
    """
    check_model(model)
    args, kwargs = as_call(example)
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, Fused)}
    every = {module: name for name, module in model.named_modules()}
    rows: list[Choice] = []
    chains: list[Computed] = []

    def observed(seen: Seen) -> None:
        if seen.module is None or has_fused_class(seen.module):  # a fused block's plain path is no news
            return
        reason = seen.reason or f"{seen.operator} would take it; patch with an example, or call the model once"
        chains.append(Computed(every.get(seen.module, ""), ", ".join(seen.told), None, reason, seen.line))

    def deferred(event: Event) -> None:
        line = "" if event.operator is not None or not event.told else user_line()
        chains.append(Computed(_running(names), ", ".join(event.told), event.operator, event.reason, line))

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(whole_blocks(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code makes its choices as it is traced
        stack.enter_context(_operator.recording(lambda choice: rows.append(Choice(_running(names), *choice))))
        stack.enter_context(listening(deferred))
        stack.enter_context(Observing(observed))
        with still_undecided(model):
            model(*args, **kwargs)
    return Explanation(plain_class(model).__name__, tuple(rows), tuple(chains))


def _running(names: Mapping[int, str]) -> str:
    """The name of the innermost of these modules of which a method runs.

    It is read off the stack: a hook would have a block call the parts that it need not call without one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            return name
        frame = frame.f_back
    return ""
