"""Modules of no known class whose own forward holds attention, an MLP or a depthwise convolution of tokens: found by
what they compute, then run deferred.

``patch`` gives the model the class of :class:`Undecided` where no row knows its blocks. Its first call runs as it is
written, watched; the smallest modules that hold a whole chain then get a class of :class:`Recognised`, and the model
its own back. An example given to ``patch`` is that first call.

A recognised class defers its forward (``fastvit.recognise.deferred``) where nothing else wants to see its operations:
not while compiling, exporting or tracing, under a transform or somebody's mode, nor while a part has hooks. Where
Dynamo traces it, or a model not yet decided, it is a region of the graph instead (``fastvit.recognise.regions``). What
it found out by calls stands beside the module, by the kind of call: whether a chain came off, and, where gradients are
wanted, whether the map is kept. A map that is kept may be asked for its gradient, which only the plain code gives; so
the first call of a kind with gradients is watched, too. Where tensors are saved through hooks, as a checkpoint does, a
kind of call takes the same way from its first to its last, since the recomputation must do as the forward did.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily
from torch.utils._device import DeviceContext

from fastvit import autotune, backends, ops
from fastvit.ops._operator import exports_plain
from fastvit.patching.fusion import Fused, fused_class, give, plain_class, plain_of
from fastvit.recognise.deferred import Deferring, Event, transformed
from fastvit.recognise.maps import saves_through_hooks
from fastvit.recognise.observing import Observing, Seen
from fastvit.recognise.regions import Region, region
from fastvit.reference.overrides import WATCHES, calls_everything, symbolically_traced

FilterFn = Callable[[nn.Module, str], bool]


_listener: contextvars.ContextVar[Callable[[Event], None] | None] = contextvars.ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(to: Callable[[Event], None]) -> Iterator[None]:
    """Within it, ``to`` is called with what becomes of each chain that this thread defers."""
    token = _listener.set(to)
    try:
        yield
    finally:
        _listener.reset(token)


_lock = threading.RLock()
_tracing_state = torch._C._get_tracing_state
_modes = torch._C._len_torch_function_stack


def _seen_by_others() -> bool:
    """Whether a compiler, a tracer, a transform or somebody's mode sees every operation.

    One of ours in which nothing is deferred at the moment does not count: it is that of a module around.
    """
    if _tracing_state() is not None or symbolically_traced() or transformed():
        return True
    top = _modes() - 1
    return any(
        not isinstance(mode, (DeviceContext, Observing))
        and not (place == top and isinstance(mode, Deferring) and mode.is_idle())
        for place, mode in ((place, _mode(place)) for place in range(top + 1))
    )


def _mode(place: int) -> Any:
    return torch._C._get_function_stack_at(place)


def _untouched(module: nn.Module) -> bool:
    """Whether no part has a hook, but for one that watches, or is compiled."""
    for part in module._modules.values():
        if part is None:
            continue
        if part._backward_hooks or part._backward_pre_hooks or part._compiled_call_impl is not None:
            return False
        if part._forward_hooks or part._forward_pre_hooks:
            hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            if not all(getattr(hook, WATCHES, False) for hook in hooks):
                return False
        if type(part).__name__ == "OptimizedModule" or (part._modules and not _untouched(part)):
            return False
    return True


class _Wrapping(Fused):
    """An override whose forward is made for each plain class, so that it has that one's signature."""

    fastvit_region: ClassVar[Region | None] = None
    """What the plain forward runs in where Dynamo traces it."""

    def __init_subclass__(cls) -> None:
        if "fastvit_plain" in vars(cls):
            cls.forward = cls.fastvit_wrapped(cls.fastvit_plain.forward)  # type: ignore[attr-defined]
            cls.fastvit_region = None if issubclass(cls, UndecidedAsAsked) else region(cls.fastvit_backend)

    @classmethod
    def fastvit_wrapped(cls, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that stands in front of the plain one."""
        raise NotImplementedError


def _as_written(fused: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The plain forward; where Dynamo traces it, in a region of the graph that Inductor's pass searches for chains."""
    plain = plain_of(fused).forward
    if torch.compiler.is_exporting() and not exports_plain():
        raise RuntimeError(
            f"fastvit.exporting(fused=True): what {plain_of(fused).__name__} computes is found as it runs, which "
            "torch.export does not do; leave it out by patch(model, filter_fn=...), or export the plain model"
        )
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not calls_everything():
        entered = getattr(fused, "fastvit_region", None)
        if entered is not None:
            return entered(plain, module, args, kwargs)
    return plain(module, *args, **kwargs)


class Recognised(_Wrapping):
    """Runs the plain forward deferred."""

    fastvit_yields = True
    fastvit_looks_for: ClassVar[str] = "attention"
    """One of ``recognise.deferred.KINDS``."""

    @classmethod
    def fastvit_wrapped(cls, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            fused = type(self)  # asked once: another thread may unpatch
            if torch.compiler.is_compiling() or not issubclass(fused, Recognised) or not _may_defer(self):
                return _as_written(fused, self, args, kwargs)
            return _defer(fused, self, args, kwargs)

        return forward


class RecognisedMasked(Recognised):
    fastvit_op = "masked_attention"


class RecognisedClass(Recognised):
    fastvit_op = "class_attention"


class RecognisedMixed(Recognised):
    fastvit_op = "head_mixed_attention"


class RecognisedMlp(Recognised):
    fastvit_op, fastvit_looks_for = "mlp", "mlp"


class RecognisedGluMlp(Recognised):
    fastvit_op, fastvit_looks_for = "glu_mlp", "mlp"


class RecognisedConvolution(Recognised):
    fastvit_op, fastvit_looks_for = "token_depthwise_conv", "convolution"


_decisions: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool | int | str | autotune.Race]] = (
    weakref.WeakKeyDictionary()
)


def decisions(module: nn.Module) -> dict[Any, bool | int | str | autotune.Race]:
    """By kind of call, whether to defer it; SLOWER, or a race, says whether that is faster; a number: after so many
    plain calls it is tried again.

    Of each module its own: of two instances of a class one may keep its map, and one Sequential is not like another.
    """
    found = _decisions.get(module)
    return _decisions.setdefault(module, {}) if found is None else found


TRIED_AGAIN_AFTER = 64
"""Plain calls of a kind in which nothing was gained: what broke its chains may have been switched off since."""

SLOWER = "the plain code is faster at this size"

OVERRIDES: dict[str, type[Recognised]] = {
    "masked_attention": RecognisedMasked,
    "class_attention": RecognisedClass,
    "head_mixed_attention": RecognisedMixed,
    "mlp": RecognisedMlp,
    "glu_mlp": RecognisedGluMlp,
    "token_depthwise_conv": RecognisedConvolution,
}
OVERRIDES_OF_SEVERAL: dict[str, type[Recognised]] = {
    op: type(f"{each.__name__}AndMore", (each,), {"fastvit_looks_for": "all"}) for op, each in OVERRIDES.items()
}
"""For modules in whose own forward chains of several kinds stand; by the operator of the first kind here."""


def _plain_alone() -> bool:
    """Whether FASTVIT_BACKEND asks for the reference and nothing else."""
    requested = backends.REQUESTED
    return requested == {"reference"}


def _may_defer(module: nn.Module) -> bool:
    if calls_everything() or _plain_alone():
        return False
    return not _seen_by_others() and _untouched(module)


@functools.cache
def _taking(backend: str) -> frozenset[str] | None:
    """The operators that have this backend; None: all."""
    if backend == "auto":
        return None
    have = ((name, {each.name for each in operator.implementations}) for name, operator in ops.OPERATORS.items())
    return frozenset(name for name, names in have if backend in names)


def _kind(fused: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What of a call may decide which way the forward takes."""
    gradients = torch.is_grad_enabled()
    return (
        gradients,
        gradients and saves_through_hooks(),
        fused,
        torch._C._is_any_autocast_enabled(),
        tuple([value for value in vars(module).values() if value is True or value is False]),
        tuple([_kind_of(value) for value in args]),
        tuple([(name, _kind_of(value)) for name, value in kwargs.items()]) if kwargs else (),
    )


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.numel().bit_length(), value.is_cpu
    return value if value is None or isinstance(value, (bool, str)) else type(value)


def _defer(fused: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain, kinds = fused.fastvit_plain.forward, decisions(module)
    kind = _kind(fused, module, args, kwargs)
    gradients, hooked = kind[:2]
    decided = kinds.get(kind)
    if isinstance(decided, autotune.Race):
        if _is_observed():
            return _deferred(fused, module, args, kwargs)[0]
        way, begin = decided.turn(), time.perf_counter()
        out = _deferred(fused, module, args, kwargs)[0] if way == 0 else plain(module, *args, **kwargs)
        faster = decided.went(way, time.perf_counter() - begin)
        if faster is not None:
            kinds[kind] = True if faster == 0 else SLOWER
        return out
    if decided is not None and decided is not True:
        if type(decided) is int:
            kinds[kind] = decided - 1 if decided > 1 else True
        elif decided is SLOWER and (tell := _listener.get()) is not None:
            tell(Event((), None, SLOWER))
        return plain(module, *args, **kwargs)
    if decided is None and gradients and not hooked:
        return _watched(fused, module, args, kwargs, kind)
    if hooked:
        kinds[kind] = True
    out, mode = _deferred(fused, module, args, kwargs)
    if not hooked:
        gains = mode.fused > mode.left
        races = decided is None and gains and not gradients and _may_race(fused, args, kwargs)
        kinds[kind] = not mode.kept and (autotune.Race() if races else gains or TRIED_AGAIN_AFTER)
    return out


def _is_observed() -> bool:
    """Whether somebody wants to know what is fused, or counts operators: no lap, whose way is an accident."""
    return _listener.get() is not None or torch._C._len_torch_dispatch_stack() > 0


def _may_race(fused: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a timer may decide between deferred and plain calls."""
    if fused.fastvit_backend != "auto" or backends.REQUESTED is not None or not autotune.may_measure():
        return False
    return all(value.is_cpu for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _deferred(fused: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Deferring]:
    backend = fused.fastvit_backend
    mode = Deferring(backend, _taking(backend), _listener.get(), fused.fastvit_looks_for)
    with _without_the_mode_around(), mode:
        out = fused.fastvit_plain.forward(module, *args, **kwargs)
    return mode.finish(out), mode


def _without_the_mode_around() -> contextlib.AbstractContextManager[Any]:
    """Within it the mode of a module around, which defers nothing now, sees no operation."""
    top = _modes() - 1
    within = top >= 0 and isinstance(_mode(top), Deferring)
    return _pop_mode_temporarily() if within else contextlib.nullcontext()


def _watched(fused: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Any) -> Any:
    """The plain forward; decides about its kind of call."""
    seen: list[Seen] = []
    observing = Observing(seen.append, fused.fastvit_backend, fused.fastvit_looks_for)
    with _without_the_mode_around(), observing as mode:
        out = fused.fastvit_plain.forward(module, *args, **kwargs)
    held = mode.kept or mode.keeps(out) or any(mode.keeps(vars(part)) for part in module.modules())
    gains = any(each.operator is not None for each in seen)
    decisions(module)[kind] = not held and (gains or TRIED_AGAIN_AFTER)
    return out


# --- Finding them ---------------------------------------------------------------------------------------------------

AT_THE_FIRST_CALL = "decided at the first call; give patch an example to have it decided at once"


EVERY_OPERATOR = frozenset(ops.OPERATORS)


class Options(NamedTuple):
    """What ``patch`` was asked for; ``decided`` is called with the model and the verdicts.

    ``warns`` is whether the first call warns where it shows nothing to fuse.
    """

    ops: frozenset[str]
    filter_fn: FilterFn | None = None
    warns: bool = False
    decided: Callable[[nn.Module, dict[str, Verdict]], None] | None = None


class Verdict(NamedTuple):
    """On a module in whose forward a chain ended: the operator that takes it, or why none does.

    ``several`` is whether others take other kinds of chains in it.
    """

    module: nn.Module
    op: str | None
    reason: str
    several: bool = False

    def beside(self, other: Verdict, allowed: bool) -> Verdict:
        """The verdict of two on one module; ``allowed``: whether it may look for several kinds."""
        if self.op is None or other.op is None:
            return self if other.op is None else other
        if OVERRIDES[self.op].fastvit_looks_for == OVERRIDES[other.op].fastvit_looks_for:
            return self
        order = list(OVERRIDES)
        return min(self, other, key=lambda each: order.index(str(each.op)))._replace(several=allowed)


_asked: weakref.WeakKeyDictionary[nn.Module, Options] = weakref.WeakKeyDictionary()


class Undecided(_Wrapping):
    """Watches its first call, which decides what is recognised within it."""

    @classmethod
    def fastvit_wrapped(cls, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            fused = type(self)
            compiling = torch.compiler.is_compiling()
            if compiling or not issubclass(fused, Undecided) or not _may_decide(self, args, kwargs):
                return _as_written(fused, self, args, kwargs)
            return _first_call(fused, self, args, kwargs)

        return forward


class UndecidedAsAsked(Undecided):
    """With options that are lost where it is copied: a copy stays plain."""


def has_fused_class(module: nn.Module) -> bool:
    """Whether a module has a fused class, which :class:`Undecided` is not."""
    return isinstance(module, Fused) and not isinstance(module, Undecided)


def undecided_class(model: nn.Module, options: Options, backend: str) -> type[nn.Module]:
    """The class to give a model whose first call is to decide."""
    asked = options.filter_fn is not None or options.ops != EVERY_OPERATOR
    _asked[model] = options
    return fused_class(UndecidedAsAsked if asked else Undecided, plain_class(model), backend)


@contextlib.contextmanager
def still_undecided(model: nn.Module) -> Iterator[None]:
    """Within it, a call of an undecided model decides nothing."""
    undecided, cls = isinstance(model, Undecided), type(model)
    if undecided:
        give(model, plain_class(model))
    try:
        yield
    finally:
        if undecided:
            give(model, cls)


def _may_decide(model: nn.Module, args: Any, kwargs: Any) -> bool:
    if getattr(model, "_is_replica", False) or _plain_alone() or _seen_by_others():
        return False
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in (*args, *kwargs.values()))
    return not (on_gpu and torch.cuda.is_current_stream_capturing())


def _first_call(fused: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    backend = fused.fastvit_backend
    seen: list[Seen] = []
    with Observing(seen.append, backend):
        out = fused.fastvit_plain.forward(model, *args, **kwargs)
    if any(each.hooked for each in seen):
        return out  # a checkpoint will recompute it the same way
    with _lock:
        if type(model) is not fused:
            return out
        options = _asked.pop(model, None)
        if options is None and issubclass(fused, UndecidedAsAsked):
            give(model, plain_class(model))
            return out
        options = options or Options(EVERY_OPERATOR)
        give(model, plain_class(model))
        known = {part for each in model.modules() if has_fused_class(each) for part in each.modules()}
        verdicts = judge(model, seen, options, backend, known)
        for verdict in verdicts.values():
            if verdict.op is not None:
                give(verdict.module, recognised_class(verdict), backend)
    if options.decided is not None:
        options.decided(model, verdicts)
    if options.warns and not any(verdict.op for verdict in verdicts.values()):
        told = [f"{name or '(the model itself)'}: {verdict.reason}" for name, verdict in verdicts.items()]
        what = "\n  ".join(told[:8]) or "no attention, MLP or depthwise convolution of tokens was computed in this call"
        warnings.warn(f"fastvit: nothing to fuse in {type(model).__name__}:\n  {what}", UserWarning, stacklevel=3)
    return out


def recognised_class(verdict: Verdict) -> type[nn.Module]:
    """The class to give the module."""
    assert verdict.op is not None
    overrides = OVERRIDES_OF_SEVERAL if verdict.several else OVERRIDES
    return fused_class(overrides[verdict.op], plain_class(verdict.module))


def judge(
    model: nn.Module, seen: Iterable[Seen], options: Options, backend: str, known: Collection[nn.Module] = ()
) -> dict[str, Verdict]:
    """By qualified name, a verdict on each module of the model in whose forward a chain ended.

    Args:
        seen: in the model's forward.
        backend: for the operators.
        known: modules that a row stands for, or that are part of one.
    """
    names = {module: name for name, module in model.named_modules()}
    taking = _taking(backend)
    verdicts: dict[str, Verdict] = {}
    for each in seen:
        module = each.module
        if module is None or module not in names or isinstance(module, Fused) or module in known:
            continue
        name, op, reason = names[module], each.operator, f"{', '.join(each.told)}; then {each.reason} ({each.line})"
        if op is not None:
            reason = ""
            if op not in options.ops:
                op, reason = None, f"ops leaves {op} out"
            elif taking is not None and op not in taking:
                op, reason = None, f"{op} has no backend {backend!r}"
            elif "forward" in vars(module):
                op, reason = None, "forward was replaced on the instance"
            elif options.filter_fn is not None and not options.filter_fn(module, name):
                op, reason = None, "filter_fn leaves it out"
        verdict = Verdict(module, op, reason)
        everything = options.ops == EVERY_OPERATOR  # else it might find what ops leaves out
        verdicts[name] = verdicts[name].beside(verdict, everything) if name in verdicts else verdict
    return verdicts
