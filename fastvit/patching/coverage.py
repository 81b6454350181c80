"""How much of a model's arithmetic do the fused operators stand for? Counted, on an example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit.patching.fusion import Fused, give, plain_class
from fastvit.patching.verification import as_call, undisturbed


def share_of_flops(model: nn.Module, example: Any) -> float | None:
    """The part of a model's FLOPs (matrix products and convolutions) that fused operators compute, from 0 to 1.

    The plain model is counted, sub-module by sub-module. Covered is what a fused block does itself, and what those of
    its parts do that it no longer calls: its projections stay outside. None where the model has no such FLOPs.

    Args:
        example: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: ``example`` is none of these.
    """
    args, kwargs = as_call(example)
    fused = {module for module in model.modules() if isinstance(module, Fused)}
    with undisturbed(model):
        called: dict[nn.Module, int] = {}
        with _counting(called, None):
            model(*args, **kwargs)
        own: dict[nn.Module, int] = {}
        with _plain(fused), _whole_products(), _Counter() as counter, _counting(own, counter):
            model(*args, **kwargs)
    replaced = {part for block in fused for part in block.modules() if part not in called} | fused
    covered = sum(flops for module, flops in own.items() if module in replaced)
    return covered / counter.flops if counter.flops else None


class _Counter(TorchDispatchMode):
    """Adds up FLOPs by torch's own formulas.

    torch's ``FlopCounterMode`` follows modules by hooks on gradients too, which it cannot put on all that models pass.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # here, since it imports Triton

        super().__init__()
        self.flops = 0
        self.formulas = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=out)
        return out


@contextlib.contextmanager
def _counting(own: dict[nn.Module, int], counter: _Counter | None) -> Iterator[None]:
    """Collects, by module called in the block, the FLOPs it spends outside of its sub-modules."""
    spent_inside: list[int] = []  # by the sub-modules of each running module
    begun: list[int] = []

    def now() -> int:
        return 0 if counter is None else counter.flops

    def enter(*_: object) -> None:
        begun.append(now())
        spent_inside.append(0)

    def leave(module: nn.Module, *_: object) -> None:
        spent = now() - begun.pop()
        own[module] = own.get(module, 0) + spent - spent_inside.pop()
        if spent_inside:
            spent_inside[-1] += spent

    # Hooks on the modules themselves would keep fused blocks from reading them.
    with contextlib.ExitStack() as hooks:
        hooks.callback(register_module_forward_pre_hook(enter).remove)
        hooks.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield


@contextlib.contextmanager
def _plain(fused: set[nn.Module]) -> Iterator[None]:
    """The modules have their plain classes in the block."""
    before = [(module, type(module), module.fastvit_backend) for module in fused]
    try:
        for module in fused:
            give(module, plain_class(module))
        yield
    finally:
        for module, cls, backend in before:
            give(module, cls, backend)


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """torch's own fused attentions, which its counter does not know on the CPU, run as the products they consist of."""
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
