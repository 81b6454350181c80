"""What was fused in a model, what was not, and why: as a table, as JSON, in a notebook.

The rows are read off the model each time. Only what ``patch`` alone knew (why it left a block alone, the errors
``verify`` measured) is remembered, beside the model and not on it, so that copies and checkpoints carry no residue.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import nn

from fastvit.patching import tables
from fastvit.patching.fusion import Fused, plain_class
from fastvit.patching.plan import PATCHED, SKIPPED, UNRECOGNISED, Finding, check_model, device_of, survey, usual_backend
from fastvit.patching.verification import END_TO_END, Error


@dataclass(frozen=True)
class ReportRow:
    """One module.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        cls: the plain class.
        op: the operator of ``fastvit.ops`` that replaces its slow part, None where the class is not known.
        status: "patched", "skipped", "unsupported" or "unrecognised".
        backend: the one asked for, or the one that "auto" prefers on the module's device (what a given input gets,
            :func:`fastvit.explain` tells); None where not patched.
        reasons: why it is not patched.
        error, plain_error: largest errors against float64, relative to the largest exact value, of the fused and the
            plain module; None unless ``patch(verify=...)`` measured them.
    """

    name: str
    cls: str
    op: str | None
    status: str
    backend: str | None
    reasons: tuple[str, ...]
    error: float | None = None
    plain_error: float | None = None

    def to_dict(self) -> dict[str, object]:
        """The row with JSON's names and types."""
        values = asdict(self)
        values["class"] = values.pop("cls")
        values["reasons"] = list(self.reasons)
        return values


@dataclass(frozen=True)
class Report:
    """Rows in the model's order; ``str()`` is a table, ``to_json()`` the same for programs.

    Attributes:
        error, plain_error: end to end, as in the rows.
        dry_run: the rows say what ``patch`` would do, and nothing was changed.
    """

    model: str
    rows: tuple[ReportRow, ...]
    error: float | None = None
    plain_error: float | None = None
    dry_run: bool = False

    def totals(self) -> dict[str, tuple[int, int]]:
        """By operator, how many modules are patched, of how many known."""
        known = Counter(row.op for row in self.rows if row.op is not None)
        done = Counter(row.op for row in self.rows if row.status == PATCHED)
        return {op: (done[op], known[op]) for op in sorted(known)}

    def to_json(self) -> str:
        """``{"model", "rows": [{"name", "class", "op", "status", "backend", "reasons", ...}], "totals", ...}``."""
        return json.dumps(
            {
                "model": self.model,
                "rows": [row.to_dict() for row in self.rows],
                "totals": {op: {"patched": done, "known": known} for op, (done, known) in self.totals().items()},
                "unrecognised": self._unrecognised(),
                "error": self.error,
                "plain_error": self.plain_error,
                "dry_run": self.dry_run,
            },
            indent=2,
        )

    def __str__(self) -> str:
        return tables.render(self._title(), *self._cells(), self._foot())

    def _repr_html_(self) -> str:
        return tables.render_html(self._title(), *self._cells(), self._foot())

    def _unrecognised(self) -> int:
        return sum(row.status == UNRECOGNISED for row in self.rows)

    def _title(self) -> str:
        return f"{self.model}: what patch would do (dry run)" if self.dry_run else self.model

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows; columns in which no row says anything are left out."""
        columns = {
            "module": [row.name or "(the model itself)" for row in self.rows],
            "class": [row.cls for row in self.rows],
            "operator": [row.op or "" for row in self.rows],
            "status": [row.status for row in self.rows],
            "backend": [row.backend or "" for row in self.rows],
            "error": [_scientific(row.error) for row in self.rows],
            "plain error": [_scientific(row.plain_error) for row in self.rows],
            "reasons": ["; ".join(row.reasons) for row in self.rows],
        }
        filled = {name: cells for name, cells in columns.items() if any(cells)}
        return list(filled), [list(cells) for cells in zip(*filled.values(), strict=True)]

    def _foot(self) -> str:
        parts = [f"{op}: {done} of {known} patched" for op, (done, known) in self.totals().items()]
        if self._unrecognised():
            parts.append(f"{self._unrecognised()} unrecognised")
        if self.error is not None:
            parts.append(f"end to end: relative error {self.error:.3g}, plain {_scientific(self.plain_error)}")
        return "; ".join(parts) or "no attention or depthwise convolution found"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


class _Memory(NamedTuple):
    """What only ``patch`` knew: status and reasons of what it left alone, and the errors measured, by module name."""

    left_alone: dict[str, tuple[str, tuple[str, ...]]]
    errors: dict[str | None, Error]
    planned: Report | None


_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()
_NOTHING = _Memory({}, {}, None)


def report(model: nn.Module) -> Report:
    """Every attention and depthwise-convolution block of a model: patched, or left alone and why.

    After ``patch(..., dry_run=True)`` it says what would be done.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx).
    """
    check_model(model)
    memory = _memories.get(model, _NOTHING)
    if memory.planned is not None:
        return memory.planned
    return _assemble(model, [_row_of_module(finding, memory) for finding in survey(model)], memory.errors)


def remember(
    model: nn.Module,
    findings: Sequence[Finding],
    backend: str,
    errors: dict[str | None, Error],
    dry_run: bool,
) -> None:
    """Keep what ``patch`` found out about a model, for as long as the model lives."""
    planned = None
    if dry_run:
        rows = [_row(finding, finding.status, backend, finding.reasons, errors) for finding in findings]
        planned = _assemble(model, rows, errors, dry_run=True)
    left_alone = {finding.name: (finding.status, finding.reasons) for finding in findings if finding.fused is None}
    _memories[model] = _Memory(left_alone, errors, planned)


def forget(model: nn.Module) -> None:
    """Drop what was remembered about a model."""
    _memories.pop(model, None)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """What was remembered before the block is remembered again after it."""
    before = _memories.get(model)
    try:
        yield
    finally:
        forget(model)
        if before is not None:
            _memories[model] = before


def _assemble(
    model: nn.Module, rows: Sequence[ReportRow], errors: dict[str | None, Error], dry_run: bool = False
) -> Report:
    whole = errors.get(END_TO_END)
    name = plain_class(model).__name__
    return Report(name, tuple(rows), whole and whole.fused, whole and whole.plain, dry_run)


def _row_of_module(finding: Finding, memory: _Memory) -> ReportRow:
    """A row by what the module is now; a block that is plain says why, if patch has told."""
    module = finding.module
    if isinstance(module, Fused):
        return _row(finding, PATCHED, module.fastvit_backend, (), memory.errors)
    could_be = (SKIPPED, ("plain; fastvit.patch(model) would fuse it",))
    found = could_be if finding.status == PATCHED else (finding.status, finding.reasons)
    status, reasons = memory.left_alone.get(finding.name, found)
    return _row(finding, status, None, reasons, {})


def _row(
    finding: Finding, status: str, backend: str | None, reasons: tuple[str, ...], errors: dict[str | None, Error]
) -> ReportRow:
    error = errors.get(finding.name)
    if backend == "auto" and finding.op is not None:
        backend = usual_backend(finding.op, device_of(finding.module))
    return ReportRow(
        finding.name,
        plain_class(finding.module).__name__,
        finding.op,
        status,
        backend if status == PATCHED else None,
        reasons,
        error and error.fused,
        error and error.plain,
    )
