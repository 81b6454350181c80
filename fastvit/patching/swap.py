"""``patch`` and ``unpatch``: swap the classes of a model's blocks, all or none, and back."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from fastvit.ops._packing import release_memory
from fastvit.patching import benchmarking, reporting, timing, verification
from fastvit.patching.folding import unfold
from fastvit.patching.freezing import unfreeze
from fastvit.patching.fusion import BACKEND_ATTRIBUTE, Fused, give, plain_class, undo
from fastvit.patching.plan import (
    NOT_INSISTED_ON,
    PATCHED,
    UNRECOGNISED,
    FilterFn,
    Finding,
    apply,
    check_backend,
    check_model,
    check_ops,
    explain_failure,
    survey,
)
from fastvit.patching.recognise import supported

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    ops: str | Iterable[str] | None = None,
    backend: str = "auto",
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    verify: Any = None,
    benchmark: Any = None,
    dry_run: bool = False,
) -> Model:
    """Fuse the slow blocks of a vision transformer in place; outputs, ``state_dict`` and hooks stay as they are.

    A model that is patched already is patched anew with these arguments. Whatever fails, the model is left as it was.

    Args:
        model: any ``nn.Module`` that holds blocks of the families fastvit knows.
        ops: names of the operators to fuse ("masked_attention", "class_attention", "head_mixed_attention",
            "token_depthwise_conv", ...); all by default.
        backend: "auto" chooses per call; a name ("cpp", "triton", "sdpa", ...) insists on one, and a call that it
            cannot take raises.
        filter_fn: called with (module, qualified name) of every block that could be fused; False leaves it alone.
        strict: raise unless every attention and convolution block found can be fused.
        verify: an example input (a tensor, a tuple of arguments or a dict of keyword arguments). The model is run
            plain and fused, in eval mode and without gradients, and held to the accuracy of the plain one: the error
            against float64 may be twice the plain model's own, plus a few ulp. Errors go into the report.
        benchmark: an example input, as for ``verify``. Each block is timed plain and fused on the input it gets, in
            eval mode and without gradients, and left plain where the fused one is slower. Times go into the report.
        dry_run: change nothing, only fill the report with what would be done.

    Returns:
        The same object.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx).
        ValueError: an operator or backend name that does not exist.
        RuntimeError: the backend cannot run on this machine; ``strict`` and a block was left alone; ``verify`` found
            the fused model less accurate than its budget; a class was put over a fused one since an earlier patch.

    Warns:
        UserWarning: nothing could be fused, or none of the attention and convolution blocks that are there, its MLPs at
            most; names the classes looked at, or why each was left alone.
    """
    check_model(model)
    chosen = check_ops(ops)
    check_backend(backend, model)
    findings = survey(model, chosen, backend, filter_fn)
    if strict:
        _insist(model, findings)
    errors: dict[str | None, verification.Error] = {}
    times: dict[str | None, timing.Times] = {}
    with _restored(model, only_on_error=not dry_run):
        undo(model)
        if benchmark is not None:
            findings, times = benchmarking.choose(model, benchmark, findings, backend)
            undo(model)
        if verify is not None:
            errors = verification.measure(model, verify, findings, backend)
            verification.insist(errors)
        apply(findings, backend)
    reporting.remember(model, findings, reporting.Measured(errors, times), planned_for=backend if dry_run else None)
    if _is_in_vain(findings):
        warnings.warn(_nothing_to_do(model, findings), UserWarning, stacklevel=2)
    return model


def unpatch(model: Model) -> Model:
    """Give every fused block of a model its own class back; nothing of fastvit is left on it. Returns the model.

    What :func:`fold_normalization` did is undone as well, and a frozen model is unfrozen. Packed copies of weights are
    given up, those of other models too, which pack theirs anew.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx).
        RuntimeError: a class was put over a fused one since ``patch`` (FSDP does so).
    """
    check_model(model)
    undo(model)
    unfold(model)
    unfreeze(model)
    reporting.forget(model)
    release_memory()
    return model


@contextlib.contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """Patch for the length of a ``with`` block, with the arguments of :func:`patch`.

    Afterwards the model is what it was before, an earlier patch included.
    """
    check_model(model)
    with _restored(model, only_on_error=False), reporting.kept(model):
        yield patch(model, **options)


def is_patched(model: nn.Module) -> bool:
    """Whether any module of the model is fused."""
    return any(isinstance(module, Fused) for module in model.modules())


@contextlib.contextmanager
def _restored(model: nn.Module, only_on_error: bool) -> Iterator[None]:
    """Gives every module its class and backend back at the end, or only if the block raises."""
    before = [(module, type(module), getattr(module, BACKEND_ATTRIBUTE, "auto")) for module in model.modules()]
    try:
        yield
    except BaseException:
        _restore(before)
        raise
    if not only_on_error:
        _restore(before)


def _restore(states: Iterable[tuple[nn.Module, type[nn.Module], str]]) -> None:
    for module, cls, backend in states:
        if type(module) is not cls or getattr(module, BACKEND_ATTRIBUTE, "auto") != backend:
            give(module, cls, backend)


def _insist(model: nn.Module, findings: list[Finding]) -> None:
    failures = explain_failure(findings)
    if failures:
        raise RuntimeError("strict: not every block can be fused:\n  " + "\n  ".join(failures))
    if not any(finding.status == PATCHED for finding in findings):
        raise RuntimeError(f"strict: {_nothing_to_do(model, findings)}")


def _is_in_vain(findings: list[Finding]) -> bool:
    """Whether nothing is fused, or of what was meant to be nothing but linear layers and MLPs."""
    slow = [finding for finding in findings if finding.kind not in NOT_INSISTED_ON]
    if any(finding.fused for finding in slow) or any(finding.wanted for finding in slow):
        return not any(finding.fused for finding in findings)
    return bool(slow) or not any(finding.fused for finding in findings)


def _nothing_to_do(model: nn.Module, findings: list[Finding]) -> str:
    """Why nothing is fused: the reasons, or the classes looked at and the nearest known where none is."""
    name = plain_class(model).__name__
    but_mlps = any(finding.fused for finding in findings)
    findings = [finding for finding in findings if finding.fused is None]
    lines = [f"{finding.name or '(the model itself)'}: {', '.join(finding.reasons)}" for finding in findings]
    told = lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])
    modules = [finding.module for finding in findings] or model.modules()
    classes = sorted({plain_class(module).__name__ for module in modules})
    if not findings:
        told = [f"no attention, depthwise convolution or MLP among its classes: {', '.join(classes)}"]
    if all(finding.status == UNRECOGNISED for finding in findings):
        nearest = ", ".join(_nearest_supported(classes))
        told.append(f"the nearest supported are: {nearest}; fastvit.register teaches your own")
    what = "nothing but MLPs" if but_mlps else "nothing"
    return f"fastvit: {what} to fuse in {name}:\n  " + "\n  ".join(told)


def _nearest_supported(names: Iterable[str]) -> list[str]:
    """The known classes whose names are most like one of these."""

    def likeness(path: str) -> float:
        known = path.rpartition(".")[2].lower()
        return max(difflib.SequenceMatcher(None, known, name.lower()).ratio() for name in names)

    return sorted(supported(), key=likeness, reverse=True)[:5]
