"""What a model computes, told without changing it: all runs as it is written, and chains are followed beside it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvit import autotune
from fastvit.ops import _operator
from fastvit.recognise.chain import BreaksOff, break_off
from fastvit.recognise.deferred import (
    ENDS,
    KINDS,
    OF_GRADIENTS,
    advance,
    advance_both,
    begun,
    name_of,
    ordinary,
    steps_of,
    transformed,
)
from fastvit.recognise.hidden import Parts
from fastvit.recognise.maps import METADATA, Ambient, saves_through_hooks
from fastvit.recognise.mutation import asks_in_place
from fastvit.recognise.places import modules_running, user_line
from fastvit.recognise.products import flat_einsum
from fastvit.recognise.vocabulary import IN_PLACE, SAME

__all__ = ["Observing", "Seen"]


class Seen(NamedTuple):
    """A chain that ended.

    Attributes:
        module: the innermost module in whose forward it began and ended; None outside of any.
        told: its operations.
        operator, backend: that would take it; None where it broke off.
        reason: why it broke off.
        line: "file.py:12" of the operation at which it ended, in the user's code.
        hooked: whether saved tensors went through hooks, as those of a checkpoint do.
    """

    module: nn.Module | None
    told: tuple[str, ...]
    operator: str | None
    backend: str | None
    reason: str
    line: str
    hooked: bool


class _Followed(NamedTuple):
    chain: Any
    ambient: Ambient
    modules: tuple[nn.Module, ...]
    goes_on: bool = False
    """Whether a chain was made of the value. A product or linear layer of which none is, is no map."""


class Observing(TorchFunctionMode):
    """Tells of each chain of a kind (one of ``deferred.KINDS``) in the code that runs within it.

    Attributes:
        kept: whether the gradient of a map was asked for, or a map stood in what :meth:`keeps` was shown.
    """

    def __init__(self, tell: Callable[[Seen], None], backend: str = "auto", kind: str = "all") -> None:
        super().__init__()
        self.tell, self.backend = tell, backend
        self.starts, self.wholes = KINDS[kind]
        self.followed: dict[int, tuple[weakref.ref[Tensor], _Followed]] = {}
        self.kept = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.einsum:
            args = flat_einsum(args)
        out = func(*args, **kwargs)
        if not transformed() and func not in METADATA:
            with contextlib.suppress(BreaksOff):
                self._look(func, args, kwargs, out)
        return out

    def keeps(self, value: Any) -> bool:
        """Whether a map stands in a value: an output, or the attributes of a module."""
        if isinstance(value, Tensor):
            followed = self._of(value)
            return followed is not None and (len(followed.chain.told) > 1 or followed.goes_on)
        if isinstance(value, dict):
            return any(map(self.keeps, value.values()))
        return isinstance(value, (tuple, list)) and any(map(self.keeps, value))

    def _of(self, value: Any) -> _Followed | None:
        found = self.followed.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def _look(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        found = {place: self._of(value) for place, value in enumerate(args) if self.followed}
        places = steps_of(func, {place: each.chain for place, each in found.items() if each is not None})
        if places and self._look_on(func, places, args, kwargs, out):
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given or not ordinary(given, given[0].device):
            return
        if func in self.wholes:
            self._look_at_whole(func, args, kwargs)
        chain = begun(self.starts, func, args, kwargs) if func in self.starts else None
        if chain is not None:
            self._follow(out, _Followed(chain, Ambient.now(chain.device.type), modules_running()))

    def _follow(self, out: Any, followed: _Followed) -> None:
        if isinstance(out, Tensor) and tuple(out.shape) == followed.chain.shape and out.dtype == followed.chain.dtype:
            key = id(out)
            self.followed[key] = (weakref.ref(out, lambda _: self.followed.pop(key, None)), followed)

    def _look_on(self, func: Any, places: list[int], args: Any, kwargs: Any, out: Any) -> bool:
        """Whether the chain goes on, or ends with an operator, in a call on a map."""
        place = places[0]
        followed = self._of(args[place])
        assert followed is not None
        chain = followed.chain
        if name_of(func) in OF_GRADIENTS:
            self.kept = True
        try:
            others = [value for position, value in enumerate((*args, *kwargs.values())) if position != place]
            if len(places) > 2 or not ordinary(others, chain.device):
                break_off("its other tensors are maps too, or not ordinary ones of one device")
            if Ambient.now(chain.device.type) != followed.ambient:
                break_off("gradients or autocast were switched since the map began")
            if len(places) == 1:
                read = advance(chain, func, place, args, kwargs)
            else:
                read = advance_both(chain, self._of(args[places[1]]).chain, func)  # type: ignore[union-attr]
        except BreaksOff as reason:
            self._ended(followed, chain.told, None, str(reason))
            self.followed.pop(id(args[place]), None)
            return False
        for at in places:
            self._goes_on(args[at])
        if isinstance(read, ENDS):
            return self._look_at_end(followed, read)
        if isinstance(read, Parts):
            for each, of_piece in zip(out, read.chains, strict=True):
                self._follow(each, followed._replace(chain=of_piece))
        elif read is not SAME:
            if func in IN_PLACE or asks_in_place(func, args, kwargs):
                self.followed.pop(id(args[place]), None)
            self._follow(out, followed._replace(chain=read))
        return True

    def _goes_on(self, value: Tensor) -> None:
        reference, followed = self.followed[id(value)]
        self.followed[id(value)] = reference, followed._replace(goes_on=True)

    def _look_at_end(self, followed: _Followed, end: Any) -> bool:
        """Whether an operator takes the chain."""
        chain = followed.chain.meeting(end, followed.ambient.autocast)
        told = (*chain.told, end.name)
        try:
            backend = chosen(lambda: chain.finished(end, self.backend))
            if backend == _operator.REFERENCE and self.backend == _operator.AUTO:
                break_off(f"no kernel of {chain.operator()} takes it here")
        except BreaksOff as reason:
            self._ended(followed, told, None, str(reason))
            return False
        self._ended(followed, told, chain.operator(), "", backend)
        return True

    def _look_at_whole(self, func: Any, args: Any, kwargs: Any) -> None:
        here = _Followed(None, None, modules_running())  # type: ignore[arg-type]
        told = (name_of(func),)
        try:
            taken = self.wholes[func](args, kwargs)
            if taken is None:
                return
            operator, run = taken
            backend = chosen(lambda: run(self.backend))
            if backend == _operator.REFERENCE and self.backend == _operator.AUTO:
                break_off(f"no kernel of {operator} takes it here")
            self._ended(here, told, operator, "", backend)
        except BreaksOff as reason:
            self._ended(here, told, None, str(reason))

    def _ended(
        self, followed: _Followed, told: tuple[str, ...], operator: str | None, reason: str, backend: str | None = None
    ) -> None:
        """Tell of it; a product of which nothing more was made was no map, and a linear layer no MLP."""
        if operator is None and not set(told) - _SHAPING:
            return
        common = [one for one, other in zip(followed.modules, modules_running(), strict=False) if one is other]
        module = common[-1] if common else None
        self.tell(Seen(module, told, operator, backend, reason, user_line(), saves_through_hooks()))


_SHAPING = frozenset({"q@k^T", "permute", "reshape", "linear", "conv2d 1x1"})


class _Chosen(Exception):  # noqa: N818 (no error: it ends the call where the choice is made)
    pass


def chosen(call: Callable[[], Any]) -> str:
    """The backend that an operator's call gets, which is not computed."""
    found: list[str] = []

    def stop(selection: _operator.Selection) -> None:
        found.append(selection.backend)
        raise _Chosen

    with torch.no_grad(), autotune.unmeasured(), _operator.recording(stop), contextlib.suppress(_Chosen):
        call()
    return found[0] if found else _operator.REFERENCE
