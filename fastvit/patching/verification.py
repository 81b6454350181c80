"""Is a fused model as accurate as the plain one? Measured on an example, per module and end to end.

The rule is that of ``fastvit.accuracy``, with a float64 copy of the plain model as the oracle. The plain model's error
on few numbers, such as two logits, can be small by luck: what breaks the rule on the example is judged anew on the
example and some that differ a little from it, as if they were one batch. What is wrong breaks it there too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.accuracy import FACTOR, NONE, ULPS, Deviation, deviation
from fastvit.patching.copies import float64_copy, plain_copy
from fastvit.patching.deferral import listening
from fastvit.patching.fusion import give, plain_class
from fastvit.patching.plan import Finding, apply
from fastvit.patching.rows.ends import all_tokens
from fastvit.reference.base import VisionModel
from fastvit.reference.overrides import WATCHES

MORE_DRAWS = 3
JITTER = 2.0**-6
"""Relative; every rounding falls differently, and the model sees what it saw."""
END_TO_END = None


class Error(NamedTuple):
    """Largest errors against float64, relative to the largest exact value, and whether the rule holds."""

    fused: float
    plain: float
    within_budget: bool


_Call = tuple[str | None, int]
"""A module by name, or the whole model, and how many of its calls in this forward were before."""


def measure(model: nn.Module, example: Any, findings: Sequence[Finding], backend: str) -> dict[str | None, Error]:
    """Errors of each finding with a fused class, by module name, and of the whole model, under ``END_TO_END``.

    Copies that share its tensors are run in its place, in eval mode without gradients, so that modes, classes and
    running statistics stay; the state of the random generators is restored. The model's hooks are called by three of
    them (plain, fused, float64), once a forward, and not where single modules are compared.
    """
    args, kwargs = as_call(example)
    whole, bare = plain_copy(model), plain_copy(model, hooks=False)
    fused = _within_copy(findings, bare)
    with undisturbed(whole), undisturbed(bare):
        found = _draw(whole, bare, args, kwargs, fused, fused, backend)
        suspects = {name for (name, _), deviations in found.items() if not _within(deviations)}
        looked_at = [finding for finding in fused if finding.name in suspects]
        for _ in range(MORE_DRAWS if suspects else 0):
            more_args, more_kwargs = pytree.tree_map_only(Tensor, _jittered, (args, kwargs))
            again = _draw(whole, bare, more_args, more_kwargs, fused, looked_at, backend)
            for call, deviations in again.items():
                if call[0] in suspects and len(deviations) == len(found.get(call, [])):
                    found[call] = [one.pooled(other) for one, other in zip(found[call], deviations, strict=True)]
    errors: dict[str | None, Error] = {}
    for (name, _), deviations in found.items():
        error, worst = _summary(deviations), errors.get(name, Error(0.0, 0.0, True))
        within = worst.within_budget and error.within_budget
        errors[name] = Error(max(worst.fused, error.fused), max(worst.plain, error.plain), within)
    return errors


def _within_copy(findings: Sequence[Finding], twin: nn.Module) -> list[Finding]:
    """The findings that can be fused, of a copy's modules."""
    return [each._replace(module=twin.get_submodule(each.name)) for each in findings if each.fused is not None]


def _draw(
    whole: nn.Module,
    bare: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    fused: Sequence[Finding],
    looked_at: Sequence[Finding],
    backend: str,
) -> dict[_Call, list[Deviation]]:
    """Deviations of the modules looked at, in a copy without hooks, and of the whole model; both are left plain."""
    found: dict[_Call, list[Deviation]] = {}
    busy: list[str] = []
    with watching({each.module: _measuring(each, fused, backend, found, busy) for each in looked_at}):
        bare(*args, **kwargs)
    exact = _in_float64(whole, args, kwargs)
    plain = whole(*args, **kwargs)
    within = _within_copy(fused, whole)
    apply(within, backend)
    found[END_TO_END, 0] = _deviations(whole(*args, **kwargs), plain, exact)
    _undo(within)
    return found


def _jittered(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return (tensor * (1.0 + JITTER * torch.randn_like(tensor))).to(tensor.dtype)


def _undo(findings: Sequence[Finding]) -> None:
    for finding in findings:
        give(finding.module, plain_class(finding.module))


@contextlib.contextmanager
def watching(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    """Calls hook(module, args, kwargs, output) behind each forward of these modules, before hooks of their own.

    The hooks are marked: blocks that call a part which has hooks, where they else need not, are not to mind these.
    """
    with contextlib.ExitStack() as stack:
        for module, hook in hooks.items():
            setattr(hook, WATCHES, True)
            stack.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def whole_blocks(model: nn.Module) -> Iterator[None]:
    """Within it, last blocks compute every token, though the head may read few; a hook watches those of our models."""
    ours = (part for part in model.modules() if isinstance(part, VisionModel) and not part.needs_patches())
    with all_tokens(), watching({part.last_block: lambda *_: None for part in ours if part.last_block is not None}):
        yield


def insist(errors: dict[str | None, Error]) -> None:
    """RuntimeError that lists every module over its budget."""
    wrong = [
        f"{name or 'the whole model'}: relative error {error.fused:.3g}, the plain one's is {error.plain:.3g}"
        for name, error in errors.items()
        if not error.within_budget
    ]
    if wrong:
        raise RuntimeError(
            f"verify: less accurate than {FACTOR:g} x the plain model's own error against float64 plus {ULPS:g} ulp; "
            "the model is left as it was:\n  " + "\n  ".join(wrong)
        )


def as_call(example: Any, name: str = "example") -> tuple[tuple, dict[str, Any]]:
    """An example input as (args, kwargs): a dict holds keyword arguments, a tuple or list positional ones."""
    if isinstance(example, dict):
        return (), example
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    hint = ": torch.from_numpy(...) makes a tensor of it" if type(example).__name__ == "ndarray" else ""
    raise TypeError(
        f"{name}: expected a tensor, a tuple of arguments or a dict of keyword ones, got {type(example).__name__}{hint}"
    )


def compare(fused: Any, plain: Any, exact: Any) -> Error:
    """Compare the floating-point tensors of three outputs of the same structure; the worst of them counts.

    Where the fused output is None, as the attention map beside transformers' attention is, nothing is compared.
    """
    return _summary(_deviations(fused, plain, exact))


def _summary(deviations: Sequence[Deviation]) -> Error:
    fused = max((each.fused for each in deviations), default=0.0)
    plain = max((each.plain for each in deviations), default=0.0)
    return Error(fused, plain, _within(deviations))


def _within(deviations: Sequence[Deviation]) -> bool:
    return all(each.is_accurate for each in deviations)


def _deviations(fused: Any, plain: Any, exact: Any) -> list[Deviation]:
    outputs = [pytree.tree_leaves(output) for output in (fused, plain, exact)]
    if len(outputs[0]) == len(outputs[1]) == len(outputs[2]):
        given = [leaf is not None for leaf in outputs[0]]
        outputs = [list(itertools.compress(output, given)) for output in outputs]
    leaves = [_floating(output) for output in outputs]
    shapes = [[tensor.shape for tensor in output] for output in leaves]
    if not shapes[0] == shapes[1] == shapes[2]:
        return [NONE._replace(fused=float("inf"), excess=float("inf"))]
    return [deviation(*tensors) for tensors in zip(*leaves, strict=True)]


def _floating(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _measuring(
    finding: Finding, fused: Sequence[Finding], backend: str, found: dict[_Call, list[Deviation]], busy: list[str]
) -> Callable[..., None]:
    """A forward hook, the module's first, that runs the fused class and the plain one in float64 on the same input.

    What can be fused inside the module is, since a block may run whole only then. While one is ``busy``, those of the
    modules inside its own have nothing to see: they were measured before.
    """
    calls = itertools.count()
    parts = set(finding.module.modules())
    inside = [each for each in fused if each.module in parts]

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if busy:
            return
        busy.append(finding.name)
        try:
            exact = _in_float64(module, args, kwargs, hooks=False)
            apply(inside, backend)
            got = module.forward(*args, **kwargs)
        finally:
            _undo(inside)
            busy.pop()
        found[finding.name, next(calls)] = _deviations(got, output, exact)

    return hook


def _in_float64(module: nn.Module, args: tuple, kwargs: dict[str, Any], hooks: bool = True) -> Any:
    """What a plain module gives in float64, autocast off."""
    double = float64_copy(module, hooks)
    args, kwargs = pytree.tree_map_only(Tensor, _to_float64, (args, kwargs))
    devices = {leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            return double(*args, **kwargs)
        except RuntimeError as error:
            name = type(module).__name__
            raise RuntimeError(
                f"verify: {name} has to run in float64 for the comparison, which failed: {error}"
            ) from error


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What runs in the block leaves nothing on the model: eval mode, no gradients, no compiling, random state kept."""
    eager = torch.compiler.set_stance("force_eager")
    fused = listening(lambda _: None)  # what is deferred is, whose turn it may be
    with eager, fused, torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)), _evaluating(model):
        yield


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every module gets its own mode back, mixed ones included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _cuda_devices(model: nn.Module) -> list[int]:
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return sorted(device.index for device in devices)
