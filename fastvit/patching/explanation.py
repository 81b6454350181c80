"""Which backend each fused block takes for a given input, and why not the others."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastvit.ops import _operator
from fastvit.patching import tables
from fastvit.patching.fusion import Fused, plain_class
from fastvit.patching.plan import check_model
from fastvit.patching.verification import as_call


@dataclass(frozen=True)
class Choice:
    """One call of an operator: the module that made it, the backend that ran, and each refused one's reasons."""

    name: str
    op: str
    backend: str
    turned_down: dict[str, list[str]]


@dataclass(frozen=True)
class Explanation:
    """The choices in the order in which they were made."""

    model: str
    rows: tuple[Choice, ...]

    def to_json(self) -> str:
        """``{"model", "rows": [{"name", "op", "backend", "turned_down": {backend: [reason]}}]}``."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return tables.render(*self._parts())

    def _repr_html_(self) -> str:
        return tables.render_html(*self._parts())

    def _parts(self) -> tuple[str, Sequence[str], Sequence[Sequence[str]], str]:
        cells = [[row.name, row.op, row.backend, _told(row.turned_down)] for row in self.rows]
        foot = f"{len(self.rows)} calls of fused operators" if self.rows else "no fused operator was called"
        return self.model, ["module", "operator", "backend", "not"], cells, foot


def _told(turned_down: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in turned_down.items())


def explain(model: nn.Module, example: Any) -> Explanation:
    """Run a patched model once and tell which backend each fused block took, and why each other one was turned down.

    The model runs as it is (training or eval mode) without gradients.

    Args:
        example: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``example`` is none of the above.
    """
    check_model(model)
    args, kwargs = as_call(example)
    running: list[str] = []
    rows: list[Choice] = []
    with contextlib.ExitStack() as stack:
        names = {module: name for name, module in model.named_modules() if isinstance(module, Fused)}
        # For all modules there are, since blocks call parts that have hooks of their own where they else need not.
        enter = register_module_forward_pre_hook(functools.partial(_enter, running, names))
        leave = register_module_forward_hook(functools.partial(_leave, running, names), always_call=True)
        stack.callback(enter.remove)
        stack.callback(leave.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code makes its choices as it is traced
        stack.enter_context(_operator.recording(lambda choice: rows.append(Choice(running[-1], *choice))))
        model(*args, **kwargs)
    return Explanation(plain_class(model).__name__, tuple(rows))


def _enter(running: list[str], names: dict[nn.Module, str], module: nn.Module, *_: object) -> None:
    if module in names:
        running.append(names[module])


def _leave(running: list[str], names: dict[nn.Module, str], module: nn.Module, *_: object) -> None:
    if module in names:
        running.pop()
