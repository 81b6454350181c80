"""Eager front end: within :class:`Deferring`, maps are not computed but recorded, until an operator takes the whole.

A product that may be an attention map, or the hidden values of an MLP, gives a :class:`DeferredMap`: a tensor with its
shape and dtype and no contents. What follows is read as a step of its chain (``vocabulary.py``, ``hidden.py``) and
recorded beside it as it was called. At the product with the values, or the second linear layer, the operator computes
the result; at anything else the calls recorded are made, once, and the plain code goes on with their result. So nothing
is guessed: what is not understood runs as it is written.

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

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastvit.recognise.chain import BreaksOff, Product, break_off
from fastvit.recognise.curves import ARITHMETIC
from fastvit.recognise.hidden import HIDDEN_READERS, LAYERS, Hidden, Parts, Second, both
from fastvit.recognise.maps import (
    METADATA,
    Ambient,
    DeferredMap,
    Node,
    computed,
    make,
    part,
    plainly,
    saves_through_hooks,
)
from fastvit.recognise.mutation import asks_in_place, may_change, storages
from fastvit.recognise.products import STARTS, flat_einsum
from fastvit.recognise.transitions import follow
from fastvit.recognise.vocabulary import IN_PLACE, READERS, SAME, UNCHANGED
from fastvit.recognise.whole import CONVOLUTIONS, WHOLE
from fastvit.reference.functional import BatchNorm

__all__ = [
    "ENDS",
    "KINDS",
    "OF_GRADIENTS",
    "Deferring",
    "Event",
    "advance",
    "advance_both",
    "begun",
    "ordinary",
    "steps_of",
]

_ORDINARY = (Tensor, torch.nn.Parameter)
ENDS = (Product, Second)
"""What a reader gives where an operator computes the whole."""

KINDS: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {
    "attention": (STARTS, WHOLE),
    "mlp": (LAYERS, {}),
    "convolution": ({}, CONVOLUTIONS),
    "all": ({**STARTS, **LAYERS}, {**WHOLE, **CONVOLUTIONS}),
}
"""By what is looked for: the readers of calls that may begin a chain, and of those that are one by themselves."""
_einsum = torch.einsum
_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_mode = torch._C._get_dispatch_stack_at


class Event(NamedTuple):
    """A chain that ended: with ``operator``, or for ``reason``."""

    told: tuple[str, ...]
    operator: str | None
    reason: str


def begun(readers: dict[Any, Any], func: Any, args: Any, kwargs: Any) -> Any:
    """The chain that a call begins, or None."""
    try:
        return readers[func](args, kwargs)
    except Exception:  # BreaksOff, or the call's own error, which it raises itself
        return None


def advance(chain: Any, func: Callable[..., Any], place: int, args: Any, kwargs: Any) -> Any:
    """What a call makes of a chain whose map is ``args[place]``; BreaksOff says why nothing.

    Returns:
        SAME, one of ENDS, Parts, or the chain behind the call.
    """
    if type(chain) is Hidden:
        reader: Any = HIDDEN_READERS.get(func) or UNCHANGED.get(func)
    else:
        reader = READERS.get(func)
    if reader is None:
        break_off(f"{name_of(func)} is none of the operations of {'an MLP' if type(chain) is Hidden else 'attention'}")
    try:
        read = reader(chain, place, args, kwargs)
        if type(read) is not tuple:
            return read
        if read and type(chain) is Hidden:
            break_off("hidden values are brought to another dtype")
        for step in read:
            chain = follow(chain, step)
        return chain
    except BreaksOff:
        raise
    except Exception as error:  # a call with wrong arguments, for which torch has its own error
        raise BreaksOff(f"{name_of(func)}: {error}") from None


def advance_both(chain: Any, other: Any, func: Callable[..., Any]) -> Hidden:
    """The chain behind a call on two maps."""
    if not (type(chain) is type(other) is Hidden and func in ARITHMETIC):
        break_off(f"{name_of(func)} takes two maps")
    return both(chain, other, func)


def steps_of(func: Callable[..., Any], chains: dict[int, Any]) -> list[int]:
    """Of chains by their place among a call's arguments, the places of those of which the call may be a step.

    A linear layer's output that meets an attention map is queries, keys, values or a bias, and not an MLP's.
    """
    maps = [place for place, chain in chains.items() if type(chain) is not Hidden]
    return maps or list(chains)


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


OF_GRADIENTS = frozenset({"register_hook", "retain_grad", "grad", "register_post_accumulate_grad_hook"})
"""What asks for the gradient of a tensor, by name."""
_TAKEN = (
    "fastvit: the gradient of a tensor is asked for behind the operator that computed without it, and is lost in this "
    "call; calls like it run as they are written from now on. Ask for it in front of the tensor's last use"
)


COUNTS_OPERATORS = "counts_operators"
"""The attribute of a dispatch mode to which an operator means as much as what it stands for."""


def name_of(func: Callable[..., Any]) -> str:
    """What a user calls a function of torch."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return owner if name in ("__get__", "__set__") and owner else name


def _computed_hidden(value: Any) -> Any:
    """A linear layer's output that meets an attention map is none of an MLP."""
    return computed(value) if type(value) is DeferredMap and type(value.cell[0].chain) is Hidden else value


class Deferring(TorchFunctionMode):
    """Within it maps are deferred; :meth:`finish` has the last word on what the code in it returned.

    Args:
        backend: of the operators.
        wanted: the operators that may take a chain.
        tell: called with each Event.
        kind: what is looked for, one of KINDS.

    Attributes:
        fused: how many chains operators took.
        left: how many maps were returned or stored. kept: whether one of them needs a gradient.
    """

    def __init__(
        self,
        backend: str,
        wanted: frozenset[str] | None = None,
        tell: Callable[[Event], None] | None = None,
        kind: str = "attention",
    ) -> None:
        super().__init__()
        self.backend, self.wanted, self.tell = backend, wanted, tell
        self.starts, self.wholes = KINDS[kind]
        self.of_all_kinds = kind == "all"
        self.maps: list[weakref.ref[DeferredMap]] = []
        self.effects: list[Node] = []
        self.fused = self.left = 0
        self.kept = False
        self.hooked = saves_through_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        takes_map = DeferredMap in types
        if not (takes_map or self.maps or func in self.starts or func in self.wholes):
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
        return self._start(func, args, kwargs)

    def _start(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call without maps: the map that it begins, what an operator makes of the whole, or what it gives."""
        if self.hooked is not saves_through_hooks():
            return func(*args, **kwargs)
        if func in self.starts and not transformed():
            made = self._begin(func, args, kwargs)
            if made is not None:
                return made
        read = self.wholes.get(func)
        if read is not None and not transformed():
            return self._whole(read, func, args, kwargs)
        return func(*args, **kwargs)

    def _begin(self, func: Any, args: Any, kwargs: Any) -> DeferredMap | None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given or not ordinary(given, given[0].device):
            return None
        chain = begun(self.starts, func, args, kwargs)
        if chain is None:
            return None
        return self._map(Node(None, func, args, kwargs, chain, Ambient.now(chain.device.type), tuple(given)))

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
            taken = read(args, kwargs)
            if taken is None:
                return func(*args, **kwargs)
            operator, run = taken
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
        if self.of_all_kinds and len({type(each.cell[0].chain) for each in args if type(each) is DeferredMap}) > 1:
            args = tuple(map(_computed_hidden, args))
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
        if node.taken and node.needs_gradient and name_of(func) in OF_GRADIENTS:
            self.kept = True
            warnings.warn(_TAKEN, UserWarning, stacklevel=3)
        try:
            return self._next(node, func, place, args, kwargs, others)
        except BreaksOff as reason:
            self._tell(node.chain.told, None, str(reason))
            if func not in self.starts:
                return plainly(func, args, kwargs)
            return self._start(func, *pytree.tree_map_only(DeferredMap, computed, (tuple(args), kwargs)))

    def _next(self, node: Node, func: Any, place: int, args: Any, kwargs: Any, others: list[Any]) -> Any:
        map_, chain = args[place], node.chain
        other: Node | None = None
        if DeferredMap in map(type, others):
            other = self._other(node, others)
        if not ordinary(others, chain.device):
            break_off("its other tensors are other maps, or not ordinary ones of one device")
        if transformed() or not node.ambient.holds():
            break_off("gradients, autocast, hooks of saved tensors or a transform were switched since the map began")
        if node.is_stale() or (other is not None and other.is_stale()):
            break_off("a map it was made of has been computed")
        read = advance(chain, func, place, args, kwargs) if other is None else advance_both(chain, other.chain, func)
        if read is SAME:
            return map_
        if isinstance(read, ENDS):
            return self._finish_chain(node, read)
        tensors = tuple([value for value in others if isinstance(value, Tensor)])
        if isinstance(read, Parts):
            calls = enumerate(read.chains)
            nodes = (
                Node(node, part, (map_, func, args[1:], kwargs, at), {}, each, node.ambient, node.tensors, map_)
                for at, each in calls
            )
            return tuple(map(self._map, nodes))
        in_place = func in IN_PLACE or asks_in_place(func, args, kwargs)
        if in_place:
            if node.is_view or any(node.living()):
                break_off("a map that other tensors were made of is changed in place")
            if node.ambient.gradients and any(tensor.requires_grad for tensor in tensors):
                break_off("a map is changed in place by a tensor that needs a gradient")
        following = Node(node, func, args, kwargs, read, node.ambient, node.tensors + tensors, map_, other)
        if in_place:
            map_.cell[0] = following
            return map_
        if following.effect is not node.effect:
            self.effects.append(following)
        return self._map(following)

    @staticmethod
    def _other(node: Node, others: list[Any]) -> Node:
        """The node of the second map among a call's arguments, which is taken from ``others``."""
        maps = [value for value in others if type(value) is DeferredMap]
        others[:] = [value for value in others if type(value) is not DeferredMap]
        other = maps[0].cell[0]
        if len(maps) > 1 or other.value is not None or other.ambient != node.ambient:
            break_off("its other maps were computed, or made under other settings")
        return other

    def _finish_chain(self, node: Node, end: Any) -> Tensor:
        chain = node.chain.meeting(end, node.ambient.autocast)
        operator = chain.operator()
        self._check_wanted(operator)
        if node.effect is not None and node.effect.done and isinstance(chain.norm, BatchNorm):
            chain = chain._replace(norm=chain.norm._replace(momentum=0.0))
        out = chain.finished(end, self.backend)
        for each in (node, *node.ancestors()):
            each.taken = True
        if node.effect is not None:
            node.effect.done = True
        self.fused += 1
        self._tell((*chain.told, end.name), operator, "")
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

    def is_idle(self) -> bool:
        """Whether nothing is deferred now."""
        return not any(True for _ in self._living()) and not any(
            node.effect is not None and not node.effect.done for node in self.effects
        )

    def finish(self, output: Any) -> Any:
        """What the code returned, with maps computed; so are those that it stored, and effects not yet had."""
        for map_ in self._living():
            node = map_.node
            if node.parent is not None or node.children:  # else it is a product that was no map
                self.left += 1
                self.kept = self.kept or node.needs_gradient
            node.compute()
        for node in self.effects:
            if node.effect is not None and not node.effect.done:
                node.compute()
        if isinstance(output, Tensor):
            return computed(output)
        return pytree.tree_map_only(DeferredMap, computed, output)
