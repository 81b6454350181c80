"""What ``patch`` would do with each module of a model, decided before anything is touched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from fastvit import backends, ops
from fastvit.patching.deferral import AT_THE_FIRST_CALL, Verdict, recognised_class
from fastvit.patching.fusion import for_backend, give, plain_class
from fastvit.patching.matching import ATTENTION, LINEAR, MLP, Match, kind_of, looks_like, operators, recognise
from fastvit.reference.base import check_module

FilterFn = Callable[[nn.Module, str], bool]

PATCHED, PLAIN, SKIPPED, UNSUPPORTED, UNRECOGNISED = "patched", "plain", "skipped", "unsupported", "unrecognised"
"""PLAIN: fused, but nothing faster than the plain form runs here."""


class Finding(NamedTuple):
    """The verdict on one module: its name, the class to give it (None: leave it alone), and why.

    ``kind`` is what it is, or seems to be (:func:`recognise.looks_like`). ``wanted`` is True where the caller asked to
    leave it alone (``ops``, ``filter_fn``).
    """

    name: str
    module: nn.Module
    kind: str
    op: str | None
    status: str
    fused: type[nn.Module] | None = None
    reasons: tuple[str, ...] = ()
    wanted: bool = False


def is_slow(finding: Finding) -> bool:
    """Whether it is attention or a depthwise convolution; ``strict`` lets others be plain: the library's are fast."""
    return finding.kind not in (MLP, LINEAR) and finding.op != "conv_batch_norm"


def check_model(model: object) -> None:
    """TypeError where ``model`` is not an ``nn.Module`` whose Python methods run."""
    check_module(model)
    assert isinstance(model, nn.Module)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                "model: it is, or holds, a TorchScript module, whose code is compiled already; patch the eager model"
            )
        if isinstance(module, torch.fx.GraphModule):
            raise TypeError(
                "model: it is, or holds, a torch.fx.GraphModule (traced or exported), whose blocks are dissolved into "
                "a graph; patch the eager model before tracing"
            )


def check_ops(chosen: str | Iterable[str] | None) -> frozenset[str]:
    """The operators to fuse; ValueError lists the valid names."""
    valid = operators()
    if chosen is None:
        return frozenset(valid)
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    unknown = [name for name in chosen if name not in valid]
    if unknown:
        raise ValueError(f"ops: expected some of {valid}, got {unknown}")
    return frozenset(chosen)


def check_backend(backend: str, model: nn.Module) -> None:
    """ValueError for an unknown backend name, RuntimeError with all reasons where this machine cannot run it."""
    valid = ["auto", *sorted({name for op in operators() for name in backend_names(op)})]
    if backend not in valid:
        raise ValueError(f"backend: expected one of {valid}, got {backend!r}")
    reasons = machine_reasons(backend, device_of(model))
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))


def backend_names(op: str) -> list[str]:
    """Names of the implementations an operator has, in order of preference."""
    return [implementation.name for implementation in ops.OPERATORS[op].implementations]


def machine_reasons(backend: str, device: torch.device) -> list[str]:
    """Why a backend cannot run on this machine, or on the device, at all."""
    if backend == "cpp" and device.type != "cpu":
        return [*backends.cpp_reasons(), f"the C++ kernels take tensors on the CPU, not on {device.type}"]
    known: dict[str, Callable[[], list[str]]] = {
        "cpp": backends.cpp_reasons,
        "cuda": functools.partial(backends.cuda_reasons, device),
        "triton": functools.partial(backends.triton_reasons, device),
    }
    return known[backend]() if backend in known else []


def device_of(model: nn.Module) -> torch.device:
    """Where a module's tensors lie; the CPU where it has none."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first floating parameter or buffer; torch's default where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def survey(
    model: nn.Module,
    chosen_ops: Collection[str] | None = None,
    backend: str = "auto",
    filter_fn: FilterFn | None = None,
) -> list[Finding]:
    """A finding for every module that is known, and for those that look as if they should be; changes nothing.

    Modules that are fused already are judged as they were before.
    """
    chosen_ops = operators() if chosen_ops is None else chosen_ops
    findings: list[Finding] = []
    covered: set[tuple[str, nn.Module]] = set()
    for name, module in model.named_modules():
        match = recognise(module)
        if match is not None and not (match.row.override.fastvit_yields and (kind_of(match.row.op), module) in covered):
            finding = _judge(name, module, match, chosen_ops, backend, filter_fn)
            findings.append(finding)
            if finding.fused is not None and not match.row.override.fastvit_yields:
                covered |= {(finding.kind, part) for part in module.modules() if part is not module}
            continue
        kind = looks_like(module)
        if kind is not None:
            reason = f"{plain_class(module).__name__} is not known"
            findings.append(Finding(name, module, kind, None, UNRECOGNISED, reasons=(reason,)))
    return without_empty_blocks(_without_parts_and_wrappers(findings))


def is_open(model: nn.Module, findings: Collection[Finding]) -> bool:
    """Whether only a call would show what is in the model: a block is of no known class, or no attention is known."""
    if any(finding.status == UNRECOGNISED for finding in findings):
        return True
    if any(finding.kind == ATTENTION for finding in findings):
        return False
    forwards = (plain_class(module).forward for module in model.modules())
    return any(not str(getattr(forward, "__module__", "")).startswith("torch.nn.") for forward in forwards)


def with_open_question(findings: Iterable[Finding]) -> list[Finding]:
    """The findings; those of no known class say when they are decided."""
    return [
        finding._replace(reasons=(*finding.reasons, AT_THE_FIRST_CALL)) if finding.status == UNRECOGNISED else finding
        for finding in findings
    ]


def with_verdicts(model: nn.Module, findings: Iterable[Finding], verdicts: Mapping[str, Verdict]) -> list[Finding]:
    """The findings, in the model's order, with what an example showed."""
    merged = {finding.name: finding for finding in findings}
    for name, (module, op, reason, _) in verdicts.items():
        before = merged.get(name)
        if op is not None:
            fused = recognised_class(verdicts[name])
            merged[name] = Finding(name, module, kind_of(op), op, PATCHED, fused)
        elif before is not None and before.status == UNRECOGNISED:
            merged[name] = before._replace(reasons=(reason,))
    ordered = [merged[name] for name, _ in model.named_modules() if name in merged]
    return _without_parts_and_wrappers(ordered)


def without_empty_blocks(findings: Iterable[Finding]) -> list[Finding]:
    """The findings; blocks that would only call their parts, since one they need is plain, are left alone as well."""
    findings = list(findings)
    fused = {finding.module for finding in findings if finding.fused is not None}

    def judged(finding: Finding) -> Finding:
        plain = [name for name, part in parts_needed(finding) if part not in fused]
        if not plain:
            return finding
        reasons = tuple(f"{name} is not fused" for name in plain)
        return finding._replace(status=SKIPPED, fused=None, reasons=reasons)

    return [judged(finding) for finding in findings]


def parts_needed(finding: Finding) -> list[tuple[str, object]]:
    """Names and modules of the parts without which the fused class would only call them all."""
    return [(name, getattr(finding.module, name, None)) for name in getattr(finding.fused, "fastvit_needs", ())]


def _judge(
    name: str, module: nn.Module, match: Match, chosen_ops: Collection[str], backend: str, filter_fn: FilterFn | None
) -> Finding:
    op = match.row.op
    verdict = functools.partial(Finding, name, module, kind_of(op), op)
    if op not in chosen_ops:
        return verdict(SKIPPED, reasons=(f"ops leaves {op} out",), wanted=True)
    if filter_fn is not None and not filter_fn(module, name):
        return verdict(SKIPPED, reasons=("filter_fn leaves it out",), wanted=True)
    if match.reasons:
        return verdict(SKIPPED, reasons=tuple(match.reasons))
    if backend != "auto" and backend not in backend_names(op):
        return verdict(UNSUPPORTED, reasons=(f"{op} has no backend {backend!r}, only {backend_names(op)}",))
    return verdict(PATCHED, fused=match.fused)


def _without_parts_and_wrappers(findings: list[Finding]) -> list[Finding]:
    """Leaves out unknown modules that are part of a known block of their kind, or merely hold their like."""
    known = {(finding.kind, finding.name) for finding in findings if finding.status != UNRECOGNISED}
    holding = {(finding.kind, outer) for finding in findings for outer in holders(finding.name)}

    def stays(finding: Finding) -> bool:
        if finding.status != UNRECOGNISED:
            return True
        inside = any((finding.kind, outer) in known for outer in holders(finding.name))
        return not inside and (finding.kind, finding.name) not in holding

    return [finding for finding in findings if stays(finding)]


def holders(name: str) -> Iterator[str]:
    """The names of the modules that one of this name is a part of, from the model itself ("") inwards."""
    parts = name.split(".") if name else []
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def apply(findings: Iterable[Finding], backend: str) -> None:
    """Fuse what the findings say can be fused."""
    for finding in findings:
        if finding.fused is not None:
            give(finding.module, finding.fused, backend)


def targets(model: nn.Module, findings: Iterable[Finding], backend: str) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules of a model whose class these findings change, and their new classes; what is not found gets plain."""
    fused = {each.module: for_backend(each.fused, backend) for each in findings if each.fused is not None}
    wanted = ((module, fused.get(module, plain_class(module))) for module in model.modules())
    return [(module, cls) for module, cls in wanted if type(module) is not cls]


def explain_failure(findings: Iterable[Finding]) -> list[str]:
    """A line for each module that was left alone without the caller having asked for it."""
    return [
        f"{finding.name or '(the model itself)'} ({plain_class(finding.module).__name__}): {', '.join(finding.reasons)}"
        for finding in findings
        if finding.status != PATCHED and not finding.wanted and is_slow(finding)
    ]
