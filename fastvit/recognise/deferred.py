"""Eager front end: within :class:`Deferring`, maps are not computed but recorded, until an operator takes the whole.

A product that may be an attention map gives a :class:`DeferredMap`: a tensor with its shape and dtype and no contents.
What follows is read as a step of its chain (``vocabulary.py``) and recorded beside it as it was called. At the product
with the values the operator computes the result; at anything else the calls recorded are made, once, and the plain code
goes on with their result. So nothing is guessed: what is not understood runs as it is written.

What makes that exact:

- The calls run under the gradient mode, inference mode and autocast that held as they were recorded; a call under
  others ends the chain.
- Whoever changes a tensor in place, or lays its memory open, has first every map computed that shares memory with it.
  A map is changed in place by a step only while nothing else was made of it.
- A map that is alive as the forward ends (it was returned or stored) is computed there.
- A map that reaches code which torch does not let us see (``autograd.Function``, C++) is computed below autograd; where
  it needs a gradient it is the output of a node that differentiates the calls recorded.
- A call that draws random numbers is never recorded; running statistics move once, in order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastvit.recognise.chain import BreaksOff, Chain, break_off
from fastvit.recognise.maps import METADATA, Ambient, DeferredMap, Node, computed, make, plainly
from fastvit.recognise.mutation import may_change, storages
from fastvit.recognise.products import STARTS, Product, flat_einsum
from fastvit.recognise.transitions import follow
from fastvit.recognise.vocabulary import IN_PLACE, READERS, SAME
from fastvit.recognise.whole import WHOLE
from fastvit.reference.functional import BatchNorm

__all__ = ["Deferring", "Event", "advance", "finished", "ordinary"]

_ORDINARY = (Tensor, torch.nn.Parameter)
_OF_INTEREST = frozenset((*STARTS, *WHOLE))
_einsum = torch.einsum
_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_mode = torch._C._get_dispatch_stack_at


class Event(NamedTuple):
    """A chain that ended: with ``operator``, or for ``reason``."""

    told: tuple[str, ...]
    operator: str | None
    reason: str


def advance(chain: Chain, func: Callable[..., Any], place: int, args: Any, kwargs: Any) -> Any:
    """SAME, a Product, or the chain after a call in which the map is ``args[place]``; BreaksOff says why none."""
    reader = READERS.get(func)
    if reader is None:
        break_off(f"{name_of(func)} is none of the operations of attention")
    try:
        read = reader(chain, place, args, kwargs)
        if not isinstance(read, tuple) or isinstance(read, Product):
            return read
        for step in read:
            chain = follow(chain, step)
        return chain
    except BreaksOff:
        raise
    except Exception as error:  # a call with wrong arguments, for which torch has its own error
        raise BreaksOff(f"{name_of(func)}: {error}") from None


def finished(chain: Chain, product: Product, backend: str) -> Tensor:
    """The product of the whole chain with the values; BreaksOff unless it is attention."""
    chain.check_values(product.values)
    out = chain.attend(product.values, backend)
    return out if product.places is None else out.permute(product.places)


def ordinary(args: Iterable[Any], device: torch.device, classes: tuple[type, ...] = _ORDINARY) -> bool:
    """Whether all tensors among arguments are of exactly torch's own classes, with memory, on this device."""
    for value in args:
        if isinstance(value, Tensor):
            if type(value) not in classes or value.device != device or value.layout != torch.strided:
                return False
        elif isinstance(value, (tuple, list)) and not ordinary(value, device, classes):
            return False
    return True


def transformed() -> bool:
    """Whether vmap, jvp, forward AD, FakeTensor or the like see every operation, and more than count them."""
    if _transformed() or forward_ad._current_level >= 0:
        return True
    count = _dispatch_modes()
    return count > 0 and any(not hasattr(_dispatch_mode(place), COUNTS_OPERATORS) for place in range(count))


COUNTS_OPERATORS = "counts_operators"
"""The attribute of a dispatch mode to which an operator means as much as what it stands for."""


def name_of(func: Callable[..., Any]) -> str:
    """What a user calls a function of torch."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return owner if name in ("__get__", "__set__") and owner else name


class Deferring(TorchFunctionMode):
    """Within it maps are deferred; :meth:`finish` has the last word on what the code in it returned.

    Args:
        backend: of the operators.
        wanted: the operators that may take a chain.
        tell: called with each Event.

    Attributes:
        fused: how many chains operators took.
        left: how many maps were returned or stored. kept: whether one of them needs a gradient.
    """

    def __init__(
        self, backend: str, wanted: frozenset[str] | None = None, tell: Callable[[Event], None] | None = None
    ) -> None:
        super().__init__()
        self.backend, self.wanted, self.tell = backend, wanted, tell
        self.maps: list[weakref.ref[DeferredMap]] = []
        self.effects: list[Node] = []
        self.fused = self.left = 0
        self.kept = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        takes_map = DeferredMap in types
        if not (takes_map or self.maps or func in _OF_INTEREST):
            return func(*args, **kwargs)
        if func is _einsum:  # torch does not tell of the types in a list
            args = flat_einsum(args)
            takes_map = any(type(each) is DeferredMap for each in args)
        if self.effects:
            self._settle_effects(storages((args, kwargs)))
        if takes_map:
            return self._go_on(func, args, kwargs)
        if self.maps and may_change(func, args, kwargs):
            self._settle(storages((args, kwargs)))
        start = STARTS.get(func)
        if start is not None and not transformed():
            begun = self._begun(start, func, args, kwargs)
            if begun is not None:
                return begun
        read = WHOLE.get(func)
        if read is not None and not transformed():
            return self._whole(read, func, args, kwargs)
        return func(*args, **kwargs)

    def _begun(self, start: Any, func: Any, args: Any, kwargs: Any) -> DeferredMap | None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given or not ordinary(given, given[0].device):
            return None
        try:
            chain = start(args, kwargs)
        except BreaksOff:
            return None
        if chain is None:
            return None
        ambient = Ambient.now(chain.q.device.type)
        return self._map(Node(None, func, args, kwargs, chain, ambient, tuple(given)))

    def _map(self, node: Node) -> DeferredMap:
        made = make(node)
        self.maps.append(weakref.ref(made))
        return made

    def _whole(self, read: Any, func: Any, args: Any, kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        told = (name_of(func),)
        try:
            if not ordinary(given, given[0].device):
                break_off("its tensors are not ordinary ones of one device")
            operator, run = read(args, kwargs)
            self._check_wanted(operator)
        except BreaksOff as reason:
            self._tell(told, None, str(reason))
            return func(*args, **kwargs)
        self.fused += 1
        self._tell(told, operator, "")
        return run(self.backend)

    def _check_wanted(self, operator: str) -> None:
        if self.wanted is not None and operator not in self.wanted:
            break_off(f"ops leaves {operator} out")

    def _tell(self, told: tuple[str, ...], operator: str | None, reason: str) -> None:
        if self.tell is not None:
            self.tell(Event(told, operator, reason))

    def _go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if not args and type(kwargs.get("input")) is DeferredMap:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        place = -1
        others = []
        for at, value in enumerate(args):
            if place < 0 and type(value) is DeferredMap:
                place = at
            else:
                others.append(value)
        if place < 0 or args[place].cell[0].value is not None:
            return plainly(func, args, kwargs)
        others.extend(kwargs.values())
        node = args[place].cell[0]
        try:
            return self._next(node, func, place, args, kwargs, others)
        except BreaksOff as reason:
            self._tell(node.chain.told, None, str(reason))
            if func in IN_PLACE:
                for each in node.family():
                    each.compute()
            return plainly(func, args, kwargs)

    def _next(self, node: Node, func: Any, place: int, args: Any, kwargs: Any, others: list[Any]) -> Any:
        map_, chain = args[place], node.chain
        if not ordinary(others, chain.q.device):
            break_off("its other tensors are other maps, or not ordinary ones of one device")
        if transformed() or not node.ambient.holds():
            break_off("gradients, autocast or a transform were switched since the map began")
        before = node.parent
        while before is not None:
            if before.value is not None:
                break_off("a map it was made of has been computed")
            before = before.parent
        read = advance(chain, func, place, args, kwargs)
        if read is SAME:
            return map_
        if isinstance(read, Product):
            return self._finish_chain(node, read)
        tensors = tuple([value for value in others if isinstance(value, Tensor)])
        if func in IN_PLACE:
            if node.is_view or any(node.living()):
                break_off("a map that other tensors were made of is changed in place")
            if node.ambient.gradients and any(tensor.requires_grad for tensor in tensors):
                break_off("a map is changed in place by a tensor that needs a gradient")
        following = Node(node, func, args, kwargs, read, node.ambient, node.tensors + tensors, map_)
        if func in IN_PLACE:
            map_.cell[0] = following
            return map_
        if following.effect is not node.effect:
            self.effects.append(following)
        return self._map(following)

    def _finish_chain(self, node: Node, product: Product) -> Tensor:
        chain: Chain = node.chain
        if chain.dtype != product.values.dtype == chain.q.dtype and node.ambient.autocast is not None:
            chain = chain._replace(dtype=product.values.dtype)  # as autocast brings the map to it
        operator = chain.operator()
        self._check_wanted(operator)
        if node.effect is not None and node.effect.done and isinstance(chain.norm, BatchNorm):
            chain = chain._replace(norm=chain.norm._replace(momentum=0.0))
        out = finished(chain, product, self.backend)
        if node.effect is not None:
            node.effect.done = True
        self.fused += 1
        self._tell((*chain.told, product.name), operator, "")
        return out

    def _living(self) -> Iterator[DeferredMap]:
        for reference in self.maps:
            map_ = reference()
            if map_ is not None and map_.node.value is None:
                yield map_

    def _settle(self, touched: set[int]) -> None:
        """Compute the maps made of tensors that share memory with one that is about to change."""
        for map_ in list(self._living()):
            if map_.node.shares(touched):
                map_.node.compute()

    def _settle_effects(self, touched: set[int]) -> None:
        """Move running statistics that are about to be read."""
        for node in self.effects:
            if node.effect is not None and not node.effect.done and not node.effect.memory.isdisjoint(touched):
                node.compute()

    def finish(self, output: Any) -> Any:
        """What the code returned, with maps computed; so are those that it stored, and effects not yet had."""
        for map_ in self._living():
            self.left += 1
            self.kept = self.kept or map_.node.needs_gradient
            map_.node.compute()
        for node in self.effects:
            if node.effect is not None and not node.effect.done:
                node.compute()
        if isinstance(output, Tensor):
            return computed(output)
        return pytree.tree_map_only(DeferredMap, computed, output)
