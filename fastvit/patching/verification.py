"""Is a fused model as accurate as the plain one? Measured on an example, per module and end to end.

The rule: against a float64 run of the plain model, the fused error is at most twice the plain model's own error in the
same dtype, plus a few units in the last place.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.patching.fusion import give
from fastvit.patching.plan import Finding, apply
from fastvit.reference.layers import WATCHES

FACTOR = 2.0
ULPS = 4.0
END_TO_END = None


class Error(NamedTuple):
    """Largest errors against float64, relative to the largest exact value, and whether the rule holds."""

    fused: float
    plain: float
    within_budget: bool


def measure(model: nn.Module, example: Any, findings: Sequence[Finding], backend: str) -> dict[str | None, Error]:
    """Errors of each finding with a fused class, by module name, and of the whole model, under ``END_TO_END``.

    Call it with the model plain; it is left fused. Runs in eval mode without gradients, so
    running statistics stay; the state of the random generators is restored.
    """
    args, kwargs = as_call(example)
    with undisturbed(model):
        exact = _in_float64(model, args, kwargs)
        errors: dict[str | None, Error] = {}
        hooks = {
            finding.module: _measuring(finding.name, finding.fused, backend, errors)
            for finding in findings
            if finding.fused is not None
        }
        with watching(hooks):
            plain = model(*args, **kwargs)
        apply(findings, backend)
        errors[END_TO_END] = compare(model(*args, **kwargs), plain, exact)
    return errors


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


def as_call(example: Any) -> tuple[tuple, dict[str, Any]]:
    """An example input as (args, kwargs): a dict holds keyword arguments, a tuple or list positional ones."""
    if isinstance(example, dict):
        return (), example
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise TypeError(
        f"example: got {type(example).__name__}, accepted are a tensor, a tuple of arguments or a dict of keyword ones"
    )


def compare(fused: Any, plain: Any, exact: Any) -> Error:
    """Compare the floating-point tensors of three outputs of the same structure; the worst of them counts.

    Where the fused output is None, as the attention map beside transformers' attention is, nothing is compared.
    """
    outputs = [pytree.tree_leaves(output) for output in (fused, plain, exact)]
    if len(outputs[0]) == len(outputs[1]) == len(outputs[2]):
        given = [leaf is not None for leaf in outputs[0]]
        outputs = [list(itertools.compress(output, given)) for output in outputs]
    leaves = [_floating(output) for output in outputs]
    shapes = [[tensor.shape for tensor in output] for output in leaves]
    if not shapes[0] == shapes[1] == shapes[2]:
        return Error(float("inf"), 0.0, False)
    errors = [_compare(*tensors) for tensors in zip(*leaves, strict=True) if tensors[0].numel()]
    return Error(
        max((error.fused for error in errors), default=0.0),
        max((error.plain for error in errors), default=0.0),
        all(error.within_budget for error in errors),
    )


def _compare(fused: Tensor, plain: Tensor, exact: Tensor) -> Error:
    dtype = fused.dtype
    fused, plain, exact = fused.double(), plain.double(), exact.double()
    finite = exact.isfinite() & plain.isfinite()
    same = (fused == plain) | (fused.isnan() & plain.isnan())
    same_elsewhere = bool(same[~finite].all())
    fused, plain, exact = fused[finite], plain[finite], exact[finite]
    if exact.numel() == 0:
        return Error(0.0, 0.0, same_elsewhere)
    fused_error, plain_error = (fused - exact).abs(), (plain - exact).abs().max()
    # An element far smaller than its neighbours is a sum that cancelled: it has no digits of its own.
    size = exact.abs().clamp_min(exact.square().mean().sqrt())
    allowed = FACTOR * plain_error + ULPS * torch.finfo(dtype).eps * size
    within = same_elsewhere and bool((fused_error <= allowed).all())
    largest = exact.abs().max().clamp_min(torch.finfo(dtype).tiny)
    return Error(float(fused_error.max() / largest), float(plain_error / largest), within)


def _floating(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _measuring(
    name: str, fused_class: type[nn.Module], backend: str, errors: dict[str | None, Error]
) -> Callable[..., None]:
    """A forward hook, the module's first, that runs the fused class and the plain one in float64 on the same input."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        plain_class = type(module)
        exact = _in_float64(module, args, kwargs)
        give(module, fused_class, backend)
        try:
            fused = module.forward(*args, **kwargs)
        finally:
            give(module, plain_class)
        error = compare(fused, output, exact)
        worst = errors.get(name, error)  # a module may be called several times in one forward
        errors[name] = Error(
            max(worst.fused, error.fused), max(worst.plain, error.plain), worst.within_budget and error.within_budget
        )

    return hook


def _in_float64(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The plain forward of a float64 copy, autocast off and without the module's own hooks."""
    double = copy.deepcopy(module).double()
    args, kwargs = pytree.tree_map_only(Tensor, _to_float64, (args, kwargs))
    devices = {leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        return double.forward(*args, **kwargs)


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What runs in the block leaves nothing on the model: eval mode, no gradients, no compiling, random state kept."""
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)), _evaluating(model):
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
