"""``verify``: is a patched model as accurate as the plain one, block by block, and is patching undone exactly?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.cli.models import load, to
from fastvit.cli.show import print_json, table, working
from fastvit.patching import Report, reporting, unpatch
from fastvit.patching.plan import PATCHED, apply, survey
from fastvit.patching.verification import END_TO_END, Error, as_call, measure, undisturbed


class Verdict(NamedTuple):
    """The result of verifying a model: the report, and the errors by module name, end to end under None."""

    report: Report
    errors: Mapping[str | None, Error]

    @property
    def accurate(self) -> bool:
        """Whether something was patched and every part of it, and the whole, keeps to its budget."""
        return self.patched and all(error.within_budget for error in self.errors.values())

    @property
    def patched(self) -> bool:
        """Whether anything was patched."""
        return any(row.status == PATCHED for row in self.report.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it, each row with "within_budget" (None where it is not patched)."""
        report = json.loads(self.report.to_json())
        for row in report["rows"]:
            row["within_budget"] = self.errors[row["name"]].within_budget if row["name"] in self.errors else None
        return {**report, "accurate": self.accurate}


def judge(model: nn.Module, example: Any) -> Verdict:
    """Patch a plain model and measure it against float64; it is left patched, however that turns out."""
    findings = survey(model)
    errors = measure(model, example, findings, "auto")
    apply(findings, "auto")
    reporting.remember(model, reporting.memory_of(model, findings, reporting.Measured(errors, {})))
    return Verdict(reporting.report(model), errors)


def verify(arguments: argparse.Namespace, console: Console) -> int:
    """Hold a patched model to the accuracy of the plain one, block by block; fails where one is over its budget."""
    candidate = load(arguments.model, size=arguments.size, seed=arguments.seed)
    model = unpatch(candidate.model).to(arguments.device, arguments.dtype)
    example = to(candidate.inputs(arguments.batch), arguments.device, arguments.dtype)
    before = _outputs(model, example)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with working(console, arguments, f"verifying {candidate.name}"):
        verdict = judge(model, example)
        undone = _equal(before, _outputs(unpatch(model), example)) and _equal(state, model.state_dict())
    setting = f"{_name(arguments.dtype)} on {arguments.device}"
    if arguments.json:
        result = {**verdict.to_dict(), "dtype": _name(arguments.dtype), "device": str(arguments.device)}
        print_json({**result, "model": candidate.name, "undone_exactly": undone})
    else:
        console.print(*_shown(verdict, f"{candidate.name}, {setting}"), sep="\n", highlight=False)
        console.print(Text("unpatch restores the plain model bit by bit: " + ("yes" if undone else "no")))
    return 0 if verdict.accurate and undone else 1


def _outputs(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_call(example)
    with undisturbed(model):
        return model(*args, **kwargs)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(verdict: Verdict, title: str) -> list[Any]:
    """The table of blocks, the reasons of those left alone, and the verdict."""
    rows = table("module", "class", "operator", "backend", ">error", ">plain error", "", title=title)
    for row in verdict.report.rows:
        error = verdict.errors.get(row.name)
        if row.status != PATCHED or error is None:
            reasons = "; ".join(row.reasons) or "not called with this input"
            rows.add_row(row.name, row.cls, row.op, row.status, "", "", Text(reasons, "yellow"))
        else:
            rows.add_row(row.name, row.cls, row.op, row.backend, *_errors(error))
    rows.add_section()
    rows.add_row("the whole model", verdict.report.model, "", "", *_errors(verdict.errors[END_TO_END]))
    if not verdict.accurate:
        return [rows, Text(over_budget(verdict), "red")]
    return [rows, Text("accurate: at most twice the plain error against float64, and a few ulp", "green")]


def over_budget(verdict: Verdict) -> str:
    """Which modules are over their budget, or that nothing was patched."""
    if not verdict.patched:
        return "nothing was patched"
    names = [name or "the whole model" for name, error in verdict.errors.items() if not error.within_budget]
    return f"less accurate than the plain model's own error allows: {', '.join(names)}"


def _errors(error: Error) -> tuple[str, str, Text]:
    mark = Text("ok", "green") if error.within_budget else Text("over budget", "red")
    return f"{error.fused:.2g}", f"{error.plain:.2g}", mark
