"""What was fused in a model, what was not, and why: as a table, as JSON, in a notebook.

The rows are read off the model each time. Only what ``patch`` alone knew (why it left a block alone, the errors
``verify`` measured) is remembered, beside the model and not on it, so that copies and checkpoints carry no residue.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from fastvit.patching import tables
from fastvit.patching.coverage import estimate_share, share_of_flops
from fastvit.patching.deferral import AT_THE_FIRST_CALL, Verdict, has_fused_class
from fastvit.patching.fusion import Fused, plain_class
from fastvit.patching.images import Shape
from fastvit.patching.matching import ATTENTION, CONVOLUTION, LINEAR, MLP
from fastvit.patching.plan import (
    PATCHED,
    PLAIN,
    SKIPPED,
    UNRECOGNISED,
    Finding,
    check_model,
    device_of,
    dtype_of,
    holders,
    survey,
)
from fastvit.patching.preference import backend_for, backends_by_dtype, nothing_faster
from fastvit.patching.timing import Times, readable
from fastvit.patching.verification import END_TO_END, Error


@dataclass(frozen=True)
class ReportRow:
    """One module.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        cls: the plain class.
        kind: "attention", "convolution" (a depthwise one, or a stem), "mlp" or "linear".
        op: the operator of ``fastvit.ops`` that replaces its slow part, None where the class is not known.
        status: "patched", "plain" (it would be, but nothing faster runs here), "skipped", "unsupported" or
            "unrecognised".
        backend: the one that inference in the module's dtype, on its device, gets (what a given input gets,
            :func:`fastvit.explain` tells); None where not patched, or where the one asked for takes no such tensors.
        reasons: why it is not patched, or plain.
        backends: the same for float32, bfloat16 and float16, by the dtype's name.
        error, plain_error: largest errors against float64, relative to the largest exact value, of the fused and the
            plain module; None unless ``patch(verify=...)`` measured them.
        seconds, plain_seconds: median times of the fused and the plain module; None unless ``patch(benchmark=...)``
            measured them.
    """

    name: str
    cls: str
    kind: str
    op: str | None
    status: str
    backend: str | None
    reasons: tuple[str, ...]
    backends: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None
    plain_error: float | None = None
    seconds: float | None = None
    plain_seconds: float | None = None

    def to_dict(self) -> dict[str, object]:
        """The row with JSON's names and types."""
        values = asdict(self)
        values["class"] = values.pop("cls")
        values["reasons"] = list(self.reasons)
        return values


@dataclass(frozen=True)
class Report:
    """Rows in the model's order; ``str()`` is a table with equal rows of a numbered run as one, ``to_json()`` has all.

    Attributes:
        error, plain_error, seconds, plain_seconds: end to end, as in the rows.
        flops_share: the part of the model's FLOPs that the fused operators stand for; None where it was not given an
            example and none could be thought of.
        flops_image: (channels, height, width) of the image that ``flops_share`` was estimated for; None where it was
            counted on the example given.
        library_convolutions: names of convolutions that are no depthwise ones and in no fused block: the library's are
            fast, and there is no operator for them.
        dry_run: the rows say what ``patch`` would do, and nothing was changed.
    """

    model: str
    rows: tuple[ReportRow, ...]
    error: float | None = None
    plain_error: float | None = None
    seconds: float | None = None
    plain_seconds: float | None = None
    flops_share: float | None = None
    flops_image: Shape | None = None
    library_convolutions: tuple[str, ...] = ()
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
                "seconds": self.seconds,
                "plain_seconds": self.plain_seconds,
                "flops_share": self.flops_share,
                "flops_image": self.flops_image,
                "library_convolutions": self.library_convolutions,
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
            "backend": [_by_backend(row.backends) for row in self.rows],
            "error": [_scientific(row.error) for row in self.rows],
            "plain error": [_scientific(row.plain_error) for row in self.rows],
            "time": [_time(row.seconds) for row in self.rows],
            "plain time": [_time(row.plain_seconds) for row in self.rows],
            "reasons": ["; ".join(row.reasons) for row in self.rows],
        }
        filled = {name: cells for name, cells in columns.items() if any(cells)}
        return list(filled), tables.fold(list(zip(*filled.values(), strict=True)))

    def _foot(self) -> str:
        known = Counter(row.kind for row in self.rows)
        done = Counter(row.kind for row in self.rows if row.status == PATCHED)
        blocks = ", ".join(f"{done[kind]} of {known[kind]} {words}" for kind, words in _KINDS.items() if known[kind])
        parts = [f"{blocks} patched"] if blocks else ["no attention, depthwise convolution or MLP found"]
        plain = sum(row.status == PLAIN for row in self.rows)
        if plain:
            parts.append(f"{plain} run plain, since nothing faster runs here")
        if self._unrecognised():
            parts.append(f"{self._unrecognised()} unrecognised")
        if self.flops_share is not None:
            of = "" if self.flops_image is None else f" (one {' x '.join(map(str, self.flops_image))} image)"
            parts.append(f"est. share of FLOPs covered: {self.flops_share:.1%}{of}")
        if self.error is not None:
            parts.append(f"end to end: relative error {self.error:.3g}, plain {_scientific(self.plain_error)}")
        if self.seconds is not None and self.plain_seconds is not None:
            parts.append(f"end to end: {readable(self.seconds)}, plain {readable(self.plain_seconds)}")
        if self.library_convolutions:
            parts.append(f"ordinary convolutions, left to the library: {_listed(self.library_convolutions)}")
        return "; ".join(parts)


_KINDS = {
    ATTENTION: "attention blocks",
    CONVOLUTION: "convolutions",
    MLP: "MLPs",
    LINEAR: "linear layers and blocks",
}
"""What rows count as at the foot."""


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = [name or "(the model itself)" for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _by_backend(backends: Mapping[str, str]) -> str:
    """The cell of a row: "sdpa" where every dtype gets it, else "cpp: float32, bfloat16; reference: float16"."""
    if len(set(backends.values())) == 1 and len(backends) > 1:
        return next(iter(backends.values()))
    dtypes: dict[str, list[str]] = {}
    for dtype, backend in backends.items():
        dtypes.setdefault(backend, []).append(dtype)
    return "; ".join(f"{backend}: {', '.join(names)}" for backend, names in dtypes.items())


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else readable(seconds)


class Measured(NamedTuple):
    """What ``patch`` measured, by module name and end to end."""

    errors: Mapping[str | None, Error]
    times: Mapping[str | None, Times]


class Memory(NamedTuple):
    """What only ``patch`` knew: status and reasons of what it left alone, by module name, and what it measured."""

    left_alone: Mapping[str, tuple[str, tuple[str, ...]]]
    measured: Measured
    planned: Report | None


_memories: weakref.WeakKeyDictionary[nn.Module, Memory] = weakref.WeakKeyDictionary()
_NOTHING = Memory({}, Measured({}, {}), None)


def report(model: nn.Module, example: Any = None) -> Report:
    """Every attention, depthwise convolution and MLP of a model: patched, or left alone and why.

    After ``patch(..., dry_run=True)`` it says what would be done.

    Args:
        example: an input (a tensor, a tuple of arguments or a dict of keyword arguments) to run the model on, in eval
            mode and without gradients, to count which share of its FLOPs the fused operators stand for. Without one it
            is estimated for an image of the size that the model takes, where that can be told; the model is not run.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx); ``example`` is none of these.
    """
    check_model(model)
    share, image = _flops(model, example)
    memory = _memories.get(model, _NOTHING)
    told = memory.planned
    if told is None:
        told = _assemble(model, [_row_of_module(finding, memory) for finding in survey(model)], memory.measured)
    return replace(told, flops_share=share, flops_image=image)


def _flops(model: nn.Module, example: Any) -> tuple[float | None, Shape | None]:
    """The share on the example, or estimated for an image."""
    if example is not None:
        return share_of_flops(model, example), None
    estimate = estimate_share(model) if any(isinstance(module, Fused) for module in model.modules()) else None
    return estimate or (None, None)


def _library_convolutions(model: nn.Module, rows: Sequence[ReportRow]) -> tuple[str, ...]:
    """Names of the convolutions that no row stands for."""
    told = {row.name for row in rows}
    names = (name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd))
    return tuple(name for name in names if told.isdisjoint((name, *holders(name))))


def memory_of(
    model: nn.Module, findings: Sequence[Finding], measured: Measured, *, planned_for: str | None = None
) -> Memory:
    """What is to be remembered of what ``patch`` found out; ``planned_for`` is the backend of a dry run."""
    planned = None
    if planned_for is not None:
        rows = [_row(finding, finding.status, planned_for, finding.reasons, measured) for finding in findings]
        planned = _assemble(model, rows, measured, dry_run=True)
    left_alone = {finding.name: (finding.status, finding.reasons) for finding in findings if finding.fused is None}
    return Memory(left_alone, measured, planned)


def decided(model: nn.Module, verdicts: Mapping[str, Verdict]) -> None:
    """What a model's first call showed takes the place of what was remembered about attention of no known class."""
    memory = _memories.get(model, _NOTHING)

    def told(name: str, status: str, reasons: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        if AT_THE_FIRST_CALL not in reasons:
            return status, reasons
        verdict = verdicts.get(name)
        return status, (verdict.reason if verdict is not None else "no attention was computed in its own forward",)

    left_alone = {
        name: told(name, *why)
        for name, why in memory.left_alone.items()
        if name not in verdicts or verdicts[name].op is None
    }
    _memories[model] = memory._replace(left_alone=left_alone)


def recall(model: nn.Module) -> Memory | None:
    """What is remembered of a model."""
    return _memories.get(model)


def remember(model: nn.Module, memory: Memory | None) -> None:
    """Keep this for as long as the model lives; None forgets."""
    if memory is None:
        _memories.pop(model, None)
    else:
        _memories[model] = memory


def _assemble(model: nn.Module, rows: Sequence[ReportRow], measured: Measured, dry_run: bool = False) -> Report:
    whole, time = measured.errors.get(END_TO_END), measured.times.get(END_TO_END)
    return Report(
        plain_class(model).__name__,
        tuple(rows),
        error=whole and whole.fused,
        plain_error=whole and whole.plain,
        seconds=time and time.fused,
        plain_seconds=time and time.plain,
        library_convolutions=_library_convolutions(model, rows),
        dry_run=dry_run,
    )


def _row_of_module(finding: Finding, memory: Memory) -> ReportRow:
    """A row by what the module is now; a block that is plain says why, if patch has told."""
    module = finding.module
    if has_fused_class(module):
        return _row(finding, PATCHED, type(module).fastvit_backend, (), memory.measured)
    could_be = (SKIPPED, ("plain; fastvit.patch(model) would fuse it",))
    found = could_be if finding.status == PATCHED else (finding.status, finding.reasons)
    status, reasons = memory.left_alone.get(finding.name, found)
    measured = memory.measured if finding.name in memory.left_alone else _NOTHING.measured
    return _row(finding, status, None, reasons, measured)


def _row(
    finding: Finding, status: str, asked_for: str | None, reasons: tuple[str, ...], measured: Measured
) -> ReportRow:
    error, time = measured.errors.get(finding.name), measured.times.get(finding.name)
    backend, backends = None, {}
    if status == PATCHED and finding.op is not None and asked_for is not None:
        device, dtype = device_of(finding.module), dtype_of(finding.module)
        backend = backend_for(finding.op, asked_for, dtype, device)
        backends = backends_by_dtype(finding.op, asked_for, device)
        plain = nothing_faster(finding.op, asked_for, dtype, device)
        if plain is not None:
            status, reasons = PLAIN, (plain,)
    return ReportRow(
        finding.name,
        plain_class(finding.module).__name__,
        finding.kind,
        finding.op,
        status,
        backend,
        reasons,
        backends,
        error=error and error.fused,
        plain_error=error and error.plain,
        seconds=time and time.fused,
        plain_seconds=time and time.plain,
    )
