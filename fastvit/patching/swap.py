"""``patch`` and ``unpatch``: swap the classes of a model's blocks, all or none, and back."""

from __future__ import annotations

import contextlib
import difflib
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from fastvit import backends
from fastvit.ops._packing import release_memory
from fastvit.patching import benchmarking, preference, reporting, timing, verification
from fastvit.patching.copies import plain_copy
from fastvit.patching.deferral import (
    AT_THE_FIRST_CALL,
    EVERY_OPERATOR,
    Options,
    has_fused_class,
    judge,
    undecided_class,
)
from fastvit.patching.folding import unfold
from fastvit.patching.freezing import unfreeze
from fastvit.patching.fusion import Fused, check_uncovered, give, is_ours, plain_class, plain_of
from fastvit.patching.matching import supported
from fastvit.patching.plan import (
    PATCHED,
    UNRECOGNISED,
    FilterFn,
    Finding,
    check_backend,
    check_model,
    check_ops,
    device_of,
    dtype_of,
    explain_failure,
    is_open,
    is_slow,
    survey,
    targets,
    with_open_question,
    with_verdicts,
)
from fastvit.recognise.observing import Observing, Seen

Model = TypeVar("Model", bound=nn.Module)
States = list[tuple[nn.Module, type[nn.Module]]]
"""Modules, and the class that each is to have, or had."""

_lock = threading.RLock()
"""Held from the survey of a model until its classes are changed. Calls that other threads make meanwhile are not held
up: each finds, in each block, the class of before or the one of after."""


def patch(
    model: Model,
    *,
    ops: str | Iterable[str] | None = None,
    backend: str = "auto",
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    example: Any = None,
    verify: Any = None,
    benchmark: Any = None,
    dry_run: bool = False,
) -> Model:
    """Fuse the slow blocks of a vision transformer in place; outputs, ``state_dict`` and hooks stay as they are.

    Attention, MLPs and depthwise convolutions of tokens in classes that fastvit does not know are recognised by what
    they compute: in the call of ``example``, or else in the model's first call, which runs as it is written.

    A model that is patched already is patched anew with these arguments. Whatever fails, the model is left as it was.

    Examples:
        >>> import fastvit, torch
        >>> model = fastvit.create_model("deit_tiny_patch16_224", depth=1, fused=False).eval()
        >>> fastvit.patch(model, ops="masked_attention", verify=torch.randn(2, 3, 224, 224)) is model
        True
        >>> [row.name for row in fastvit.report(model).rows if row.status == "patched"]
        ['blocks.0.attn']

    Args:
        model: any ``nn.Module`` that holds blocks of the families fastvit knows.
        ops: names of the operators to fuse ("masked_attention", "class_attention", "head_mixed_attention",
            "token_depthwise_conv", ...); all by default.
        backend: "auto" chooses per call; a name ("cpp", "triton", "sdpa", ...) insists on one, and a call that it
            cannot take raises.
        filter_fn: called with (module, qualified name) of every block that could be fused; False leaves it alone.
        strict: raise unless every attention and convolution block found can be fused. Those of no known class
            need an example.
        example: an input, as for ``verify``, on which the model is run once, in eval mode and without gradients, to see
            what it computes; that of ``verify`` or ``benchmark`` where it is not given.
        verify: an example input (a tensor, a tuple of arguments or a dict of keyword arguments). The model is run
            plain and fused, in eval mode and without gradients, and held to the accuracy of the plain one: the error
            against float64 may be twice the plain model's own, plus a few ulp. Errors go into the report.
        benchmark: an example input, as for ``verify``. Each block is timed plain and fused on the input it gets, in
            eval mode and without gradients, and left plain where the fused one is slower. Times go into the report.
        dry_run: change nothing, only fill the report with what would be done; without an example it does not tell of
            blocks of no known class.

    Returns:
        The same object.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx).
        ValueError: an operator or backend name that does not exist.
        RuntimeError: the backend cannot run on this machine; ``strict`` and a block was left alone; ``verify`` found
            the fused model less accurate than its budget; a class was put over a fused one since an earlier patch.

    Warns:
        UserWarning: blocks run plain since nothing faster is there for them, as without the native part; or nothing
            could be fused, or none of the attention and convolution blocks that are there, its MLPs at
            most; names the classes looked at, or why each was left alone. Where the first call is to decide, it is that
            call which warns.
    """
    check_model(model)
    chosen = check_ops(ops)
    check_backend(backend, model)
    for name, value in (("example", example), ("verify", verify), ("benchmark", benchmark)):
        if value is not None:
            verification.as_call(value, name)
    options = Options(EVERY_OPERATOR if ops is None else chosen, filter_fn, decided=reporting.decided)
    given = next((each for each in (example, verify, benchmark) if each is not None), None)
    with _lock:
        check_uncovered(model)
        findings = survey(model, chosen, backend, filter_fn)
        unknown = is_open(model, findings)
        undecided = unknown and given is None
        if undecided:
            findings = with_open_question(findings)
        elif unknown or example is not None:
            findings = _recognised(model, given, findings, options, backend)
        slow = _plain_for_lack_of_kernels(findings, backend)
        if strict:
            _insist(model, findings, slow)
        errors: dict[str | None, verification.Error] = {}
        times: dict[str | None, timing.Times] = {}
        if benchmark is not None:
            findings, times = benchmarking.choose(model, benchmark, findings, backend)
        if verify is not None:
            errors = verification.measure(model, verify, findings, backend)
            verification.insist(errors)
        measured = reporting.Measured(errors, times)
        memory = reporting.memory_of(model, findings, measured, planned_for=backend if dry_run else None)
        waits = undecided and not dry_run and _is_in_vain(findings) and _says_nothing_yet(findings)
        warning = _nothing_to_do(model, findings) if _is_in_vain(findings) and not waits else _lacking(slow)
        states = [] if dry_run else targets(model, findings, backend)
        if undecided and not dry_run and not any(finding.module is model and finding.fused for finding in findings):
            states.append((model, undecided_class(model, options._replace(warns=waits), backend)))
        _commit(model, states, memory, "\n".join(filter(None, (_namesake(model), warning))) or None)
    return model


def _recognised(
    model: nn.Module, example: Any, findings: list[Finding], options: Options, backend: str
) -> list[Finding]:
    """The findings, and what the example shows of blocks that no row stands for."""
    args, kwargs = verification.as_call(example)
    twin = plain_copy(model, hooks=False)
    seen: list[Seen] = []
    with verification.undisturbed(twin), Observing(seen.append, backend):
        twin(*args, **kwargs)
    names = {module: name for name, module in twin.named_modules()}
    seen = [each._replace(module=model.get_submodule(names[each.module])) for each in seen if each.module in names]
    known = {part for each in findings if each.fused is not None for part in each.module.modules()}
    return with_verdicts(model, findings, judge(model, seen, options, backend, known))


def unpatch(model: Model) -> Model:
    """Give every fused block of a model its own class back; nothing of fastvit is left on it. Returns the model.

    What :func:`fold_normalization` did is undone as well, and a frozen model is unfrozen. Packed copies of weights are
    given up, those of other models too, which pack theirs anew.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx).
        RuntimeError: a class was put over a fused one since ``patch`` (FSDP does so).
    """
    check_model(model)
    with _lock:
        check_uncovered(model)
        unfold(model)
        unfreeze(model)
        _commit(model, targets(model, [], "auto"), None)
    release_memory()
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    *,
    ops: str | Iterable[str] | None = None,
    backend: str = "auto",
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    example: Any = None,
    verify: Any = None,
    benchmark: Any = None,
    dry_run: bool = False,
) -> Iterator[Model]:
    """Patch for the length of a ``with`` block, with the arguments of :func:`patch`.

    Examples:
        >>> import fastvit
        >>> model = fastvit.create_model("deit_tiny_patch16_224", depth=1, fused=False)
        >>> with fastvit.patched(model, backend="sdpa"):
        ...     fastvit.is_patched(model)
        True
        >>> fastvit.is_patched(model)
        False

    Afterwards each module that this changed has the class it had before, that of an earlier patch included; where a
    class of one's own was put on it within the block, that class stays.

    Raises:
        RuntimeError: within the block a class was put over a fused one (FSDP does so), which stays; all others are put
            back.
    """
    check_model(model)
    before = [(module, type(module)) for module in model.modules()]
    remembered = reporting.recall(model)
    after: list[type[nn.Module]] | None = None
    try:
        patch(
            model,
            ops=ops,
            backend=backend,
            filter_fn=filter_fn,
            strict=strict,
            example=example,
            verify=verify,
            benchmark=benchmark,
            dry_run=dry_run,
        )
        after = [type(module) for module, _ in before]
        yield model
    finally:
        with _lock:
            changed = [state for i, state in enumerate(before) if after is None or after[i] is not state[1]]
            _give_all([(module, cls) for module, cls in changed if _is_swappable(module, cls)])
            reporting.remember(model, remembered)
        check_uncovered(model)


def _is_swappable(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module has another class, which fastvit gave it: nobody has put one of his own on it since."""
    now = type(module)
    return now is not cls and plain_of(now) is plain_of(cls) and (is_ours(now) or not issubclass(now, Fused))


def is_patched(model: nn.Module) -> bool:
    """Whether any module of the model is fused; one that its first call is to decide about is not."""
    return any(has_fused_class(module) for module in model.modules())


def _commit(model: nn.Module, states: States, memory: reporting.Memory | None, warning: str | None = None) -> None:
    """Give these modules these classes and remember what the report is to say; on any exception, all is as before."""
    before = [(module, type(module)) for module, _ in states]
    remembered = reporting.recall(model)
    try:
        for module, cls in states:
            give(module, cls)
        reporting.remember(model, memory)
        if warning is not None:
            warnings.warn(warning, UserWarning, stacklevel=3)
    except BaseException:
        _give_all(before)
        reporting.remember(model, remembered)
        raise


def _give_all(states: States) -> None:
    """To the end, though the user interrupts it."""
    try:
        for module, cls in states:
            give(module, cls)
    except BaseException:
        for module, cls in states:
            give(module, cls)
        raise


def _plain_for_lack_of_kernels(findings: list[Finding], backend: str) -> dict[str, str]:
    """By name, the modules that would run plain, and why."""
    found: dict[str, str] = {}
    for name, module, _, op, _, fused, *_ in findings:
        if fused is not None and op is not None:
            reason = preference.nothing_faster(op, backend, dtype_of(module), device_of(module))
            if reason is not None:
                found[name] = reason
    return found


def _namesake(model: nn.Module) -> str | None:
    """A warning for timm's ``fastvit_*``, which who patches them may take for ours."""
    if f"{plain_class(model).__module__}.{plain_class(model).__name__}" != "timm.models.fastvit.FastVit":
        return None
    return (
        "fastvit: FastVit is Apple's FastViT, a model that shares no more than its name with this package; what it has "
        "of attention, MLPs and depthwise convolutions of tokens is fused as in any other (fastvit.report tells)"
    )


def _lacking(slow: dict[str, str]) -> str | None:
    """A warning of what is lost without the native part or another kernel."""
    if not slow:
        return None
    cure = "; with a C++ compiler there, install fastvit anew" if backends.cpp_reasons() else ""
    reasons = [part for each in slow.values() for part in each.removeprefix(preference.NOTHING_FASTER).split("; ")]
    told = preference.NOTHING_FASTER + "; ".join(dict.fromkeys(reasons))  # those that two operators share once
    return f"fastvit: {len(slow)} of the blocks found run as they did before: {told}{cure} (python -m fastvit info)"


def _insist(model: nn.Module, findings: list[Finding], slow: dict[str, str]) -> None:
    failures = explain_failure(findings)
    insisted = {finding.name for finding in findings if is_slow(finding)}
    failures += [f"{name or '(the model itself)'}: {reason}" for name, reason in slow.items() if name in insisted]
    if failures:
        raise RuntimeError("strict: not every block can be fused:\n  " + "\n  ".join(failures))
    if not any(finding.status == PATCHED for finding in findings):
        raise RuntimeError(f"strict: {_nothing_to_do(model, findings)}")


def _is_in_vain(findings: list[Finding]) -> bool:
    """Whether nothing is fused, or of what was meant to be nothing but linear layers and MLPs."""
    slow = [finding for finding in findings if is_slow(finding)]
    if any(finding.fused for finding in slow) or any(finding.wanted for finding in slow):
        return not any(finding.fused for finding in findings)
    return bool(slow) or not any(finding.fused for finding in findings)


def _says_nothing_yet(findings: list[Finding]) -> bool:
    """Whether it is for the first call to say that nothing is fused: nothing is known, or a block is undecided."""
    return not findings or any(AT_THE_FIRST_CALL in finding.reasons for finding in findings)


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
        return f"fastvit: nothing to fuse in {name}: it holds no attention, depthwise convolution of tokens or MLP"
    if all(finding.status == UNRECOGNISED for finding in findings):
        nearest = ", ".join(_nearest_supported(classes))
        told.append(f"the nearest supported are: {nearest}; fastvit.register teaches your own")
    what = "nothing but MLPs and products" if but_mlps else "nothing"
    return f"fastvit: {what} to fuse in {name}:\n  " + "\n  ".join(told)


def _nearest_supported(names: Iterable[str]) -> list[str]:
    """The known classes whose names are most like one of these."""

    def likeness(path: str) -> float:
        known = path.rpartition(".")[2].lower()
        return max(difflib.SequenceMatcher(None, known, name.lower()).ratio() for name in names)

    return sorted(supported(), key=likeness, reverse=True)[:5]
