"""A deferred map: the tensor that stands for it, and the calls that would make it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fastvit.recognise.chain import Chain
from fastvit.recognise.hidden import Hidden
from fastvit.recognise.mutation import ANY, may_change, storages
from fastvit.recognise.vocabulary import VIEWS
from fastvit.reference.functional import BatchNorm

__all__ = ["METADATA", "Ambient", "DeferredMap", "Node", "computed", "make", "part", "plainly", "saves_through_hooks"]

_hooks_of_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks


def saves_through_hooks() -> bool:
    """Whether tensors saved for the backward pass go through hooks, as in a checkpoint that recomputes them."""
    return bool(_hooks_of_saved_tensors(True))


@contextlib.contextmanager
def _saving_directly() -> Iterator[None]:
    """Within it tensors saved for the backward pass go through no hooks."""
    taken = []
    while (hooks := _hooks_of_saved_tensors(True)) is not None:
        taken.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


class Ambient(NamedTuple):
    """What a call's result depends on beside its arguments; ``autocast`` is None where it is off.

    ``hooked`` is whether gradients are recorded, and tensors are saved for them through hooks.
    """

    gradients: bool
    inference: bool
    autocast: torch.dtype | None
    device: str
    hooked: bool

    @classmethod
    def now(cls, device: str) -> Ambient:
        """As it is for tensors on this type of device."""
        dtype = None
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        gradients = torch.is_grad_enabled()
        hooked = gradients and saves_through_hooks()
        return cls(gradients, torch.is_inference_mode_enabled(), dtype, device, hooked)

    def holds(self) -> bool:
        """Whether it is so now."""
        return (
            torch.is_grad_enabled() is self.gradients
            and torch.is_inference_mode_enabled() is self.inference
            and (not self.gradients or saves_through_hooks() is self.hooked)
            and (Ambient.now(self.device) == self if torch._C._is_any_autocast_enabled() else self.autocast is None)
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within it everything is as it was."""
        if self.holds():
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            if not self.hooked:
                stack.enter_context(_saving_directly())
            if torch.amp.is_autocast_available(self.device):
                on = self.autocast is not None
                stack.enter_context(torch.autocast(self.device, dtype=self.autocast, enabled=on))
            yield


class Effect:
    """Running statistics that a recorded call moves: whether it has, and their memory."""

    def __init__(self, memory: set[int]) -> None:
        self.done = False
        self.memory = memory


_HERE = object()
"""Stands for the parent's map among the arguments."""


def part(map_: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Tensor:
    """One of the pieces into which func(map_, *args) cuts a map."""
    return func(map_, *args, **kwargs)[index]


class Node:
    """One recorded call.

    Attributes:
        parent: whose map the call takes; None for the first. other: that of a second map it takes.
        chain: what has been applied up to here.
        tensors: every tensor that the map is made of.
        value: the map, once it was computed.
        effect: of this call or one before it.
        taken: whether an operator computed something of the map.
    """

    __slots__ = (
        *("parent", "other", "func", "args", "kwargs", "chain", "ambient", "tensors"),
        *("value", "needs_gradient", "children", "effect", "taken", "__weakref__"),
    )

    def __init__(
        self,
        parent: Node | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        chain: Chain | Hidden,
        ambient: Ambient,
        tensors: tuple[Tensor, ...],
        map_: Tensor | None = None,
        other: Node | None = None,
    ) -> None:
        self.parent, self.func, self.chain, self.ambient, self.tensors = parent, func, chain, ambient, tensors
        self.other = other
        if other is not None:
            mine = set(map(id, tensors))
            self.tensors += tuple([tensor for tensor in other.tensors if id(tensor) not in mine])
            other.children.append(weakref.ref(self))
        self.args = args if map_ is None else tuple([_HERE if value is map_ else value for value in args])
        self.kwargs = kwargs
        self.value: Tensor | None = None
        self.taken = False
        self.needs_gradient = ambient.gradients and any(tensor.requires_grad for tensor in self.tensors)
        self.children: list[weakref.ref[Node]] = []
        self.effect: Effect | None = None if parent is None else parent.effect
        if parent is not None:
            parent.children.append(weakref.ref(self))
            if func is F.batch_norm and isinstance(chain.norm, BatchNorm) and chain.norm.use_batch_stats:
                self.effect = Effect(storages(chain.norm[:2]))

    @property
    def is_view(self) -> bool:
        """Whether the map shares its parent's memory."""
        return self.func in VIEWS or self.func is part

    def is_stale(self) -> bool:
        """Whether a map that it is made of has been computed, and may have been changed since."""
        return any(node.value is not None for node in self.ancestors())

    def ancestors(self) -> Iterator[Node]:
        """All that it is made of, each once."""
        seen: set[Node] = set()
        left = [self.parent, self.other]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += node.parent, node.other
                yield node

    def living(self) -> Iterator[Node]:
        """The nodes made of this one that somebody still holds."""
        for reference in self.children:
            child = reference()
            if child is not None:
                yield child

    def family(self) -> list[Node]:
        """All living nodes of the same first calls."""
        found = [node for node in (self, *self.ancestors()) if node.parent is None]
        for node in found:
            found.extend(child for child in node.living() if child not in found)
        return found

    def shares(self, memory: set[int]) -> bool:
        """Whether the map, not yet computed, is made of tensors in this memory."""
        values = [each.value for each in self.ancestors() if each.value is not None]
        return ANY in memory or not memory.isdisjoint(storages([*self.tensors, *values]))

    def compute(self) -> Tensor:
        """The map, by the calls recorded, made once."""
        if self.value is None:
            before = None if self.parent is None else self.parent.compute()
            with torch._C.DisableTorchFunction(), self.ambient.restored():
                self.value = self._call(before, None)
            if self.effect is not None:
                self.effect.done = True
            if self.is_view and self.parent is not None:  # may be changed through this one from now on
                for each in self.parent.living():
                    each.compute()
            if not self.needs_gradient:  # else a gradient may yet be asked of the calls
                self.parent, self.other, self.args, self.kwargs, self.tensors = None, None, (), {}, ()
        return self.value

    def again(self, instead: dict[int, Tensor]) -> Tensor:
        """The map anew, with other tensors in place of some, by id; those of nodes are added."""
        if id(self) not in instead:
            instead[id(self)] = self._call(None if self.parent is None else self.parent.again(instead), instead)
        return instead[id(self)]

    def _call(self, before: Tensor | None, instead: dict[int, Tensor] | None) -> Tensor:
        def given(value: Any) -> Any:
            if type(value) is DeferredMap:
                return value.node.compute() if instead is None else value.node.again(instead)
            return before if value is _HERE else (instead or {}).get(id(value), value)

        args, kwargs = pytree.tree_map(given, (self.args, self.kwargs)) if instead else (self.args, self.kwargs)
        args = tuple(map(given, args))
        if self.func is F.batch_norm and self.effect is not None and self.effect.done:
            args, kwargs = args[:6], {**kwargs, "momentum": 0.0, "eps": self.chain.norm.eps}  # type: ignore[union-attr]
        return self.func(*args, **kwargs)


class DeferredMap(Tensor):
    """A map that is computed when somebody looks at it; ``node`` tells how."""

    cell: list[Node]
    """Its node, shared with the autograd node that made it: a step in place gives the map another."""
    history: Any = None
    """The autograd node that made it."""

    @classmethod
    def of(cls, cell: list[Node]) -> DeferredMap:
        """The map of a node."""
        chain = cell[0].chain
        shape = chain.shape
        made = Tensor._make_wrapper_subclass(
            cls, shape, _strides(shape, chain.order), dtype=chain.dtype, device=chain.device
        )
        made.cell = cell
        return made

    @property
    def node(self) -> Node:
        """The call that makes the map as it is now."""
        return self.cell[0]

    @property
    def shape(self) -> torch.Size:
        """As of any tensor; by Python, so that no mode is asked."""
        node = self.cell[0]
        return torch.Size(node.chain.shape) if node.value is None else node.value.shape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Outside of the mode that made it every use is one of the map computed."""
        if func in METADATA:
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return plainly(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below autograd, where code came to it that torch does not let us see."""
        args, kwargs = pytree.tree_map_only(DeferredMap, _without_history, (args, kwargs or {}))
        return func(*args, **kwargs)


@functools.lru_cache(256)
def _strides(shape: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """Of a map whose axis at place i is the ``order[i]``-th in memory."""
    strides, step = [0] * len(shape), 1
    for place in sorted(range(len(shape)), key=order.__getitem__, reverse=True):
        strides[place] = step
        step *= shape[place]
    return strides


_T = Tensor
METADATA = frozenset(
    (
        *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.is_floating_point, _T.is_complex),
        *(torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel, _T.get_device, _T.__hash__),
        *(
            getattr(_T, name).__get__
            for name in (
                *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "itemsize", "names", "is_cuda"),
                *("is_cpu", "is_mps", "is_sparse", "is_quantized", "is_nested", "is_meta", "is_xpu", "is_mkldnn"),
            )
            if hasattr(_T, name)
        ),
    )
)
"""What a map answers without being computed."""


def _without_history(map_: DeferredMap) -> Tensor:
    """The map's numbers: its history is that of the autograd node which made ``map_``."""
    node = map_.node
    if node.value is not None:
        return node.value.detach()
    if not node.needs_gradient:
        return node.compute()
    with torch._C.DisableTorchFunction(), torch.no_grad(), node.ambient.restored():
        return node.again({})


class _Recorded(torch.autograd.Function):
    """Makes a map that needs a gradient; differentiates the calls recorded where its gradient is asked."""

    @staticmethod
    def forward(ctx: Any, cell: list[Node], *tensors: Tensor) -> DeferredMap:
        ctx.cell, ctx.tensors = cell, tensors
        return DeferredMap.of(cell)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        node, further = ctx.cell[0], torch.is_grad_enabled()
        with torch._C.DisableTorchFunction(), torch.enable_grad(), node.ambient.restored():
            inputs = [tensor.view_as(tensor) if further else tensor.detach() for tensor in ctx.tensors]
            inputs = [
                each.requires_grad_(tensor.requires_grad) if not further else each
                for each, tensor in zip(inputs, ctx.tensors, strict=True)
            ]
            out = node.again({id(tensor): each for tensor, each in zip(ctx.tensors, inputs, strict=True)})
        wanted = [each for each in inputs if each.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=further, allow_unused=True))
        return None, *(next(found) if each.requires_grad else None for each in inputs)


def make(node: Node) -> DeferredMap:
    """The map of a node."""
    if not node.needs_gradient:
        return DeferredMap.of([node])
    distinct = {id(tensor): tensor for tensor in node.tensors if tensor.requires_grad}
    made = _Recorded.apply([node], *distinct.values())
    made.history = _history(made)
    return made


def _history(map_: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return map_.grad_fn


class _Shown(torch.autograd.Function):
    """A map's numbers behind a node that autograd put behind it since, as one that changed it in place does."""

    @staticmethod
    def forward(ctx: Any, map_: DeferredMap) -> Tensor:
        return map_.node.compute().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def computed(value: Any) -> Any:
    """A map computed; anything else as it is."""
    if type(value) is not DeferredMap:
        return value
    if value.history is not None and _history(value) is not value.history:
        return _Shown.apply(value)
    return value.node.compute()


def plainly(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A call with all maps computed."""
    if may_change(func, args, kwargs):  # what else was made of them is computed from what they were
        for leaf in pytree.tree_leaves((args, kwargs)):
            if type(leaf) is DeferredMap:
                for node in leaf.node.family():
                    node.compute()
    args, kwargs = pytree.tree_map_only(DeferredMap, computed, (tuple(args), kwargs))
    return func(*args, **kwargs)
