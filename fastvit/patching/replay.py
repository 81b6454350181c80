"""Blocks at inference on the CPU by the operators that they called before, without the Python that chose them.

A fused block asks at each call what may hang on each of its parts, gathers their tensors and chooses kernels, which a
batch of one waits for. Here it is done once. While a block runs, a dispatch mode records the
operators that it calls, whose arguments are its input, its own parameters, earlier results and constants. As long as
nothing in the block has changed (``fastvit._C.Snapshot`` compares every attribute, class, parameter and hook of every
part by identity) and the call is of the same kind, the operators are called again in the same order.

What was recorded keeps no tensor alive: parameters are found by weak references, packed weights are asked for anew.
"""

from __future__ import annotations

import importlib
import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import backends
from fastvit.ops import _operator
from fastvit.ops._operator import any_autocast, is_dynamo_compiling, is_grad_enabled, log
from fastvit.ops._packing import PackedWeight, packed
from fastvit.reference.overrides import HOOKS_FOR_ALL, is_fx_tracing, is_plain

_Snapshot: Any = None if backends.cpp_reasons() else importlib.import_module("fastvit._C").Snapshot
_DICTIONARIES = (
    *("_parameters", "_buffers", "_modules"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
MOST_KINDS = 16
"""Of calls that a block keeps records of, and how often it is recorded at most."""

Run = Callable[..., "Tensor | None"]
_LIBRARIES = {"torch", "fastvit", "timm", "torchvision", "transformers", "vit_pytorch", "einops"}
_CONSTANTS = {type(None), bool, int, float, str, tuple}


class Step(NamedTuple):
    """A call of an operator: its arguments are ``constants`` but for those from earlier tensors, and packed weights."""

    operator: Callable[..., Any]
    constants: list[Any]
    tensors: list[tuple[int, int]]
    """Place of the argument, index of the tensor."""
    packed: list[tuple[int, int]]
    """The same, of packed copies of that weight."""
    several: bool
    """Whether it gives a tuple."""


class Replay(NamedTuple):
    """What a block called. Tensors are counted: the input, its parameters, and the results of the steps in turn."""

    snapshot: Any
    parameters: list[weakref.ref[Tensor]]
    steps: list[Step]
    result: int

    def __call__(self, x: Tensor) -> Tensor:
        tensors: list[Any] = [x, *[parameter() for parameter in self.parameters]]
        for operator, constants, from_tensors, from_weights, several in self.steps:
            arguments = constants.copy()
            for place, index in from_tensors:
                arguments[place] = tensors[index]
            for place, index in from_weights:
                weight = tensors[index]
                arguments[place] = packed(weight)
                if type(weight) is PackedWeight:
                    arguments[place - 2] = weight.stand_in
            result = operator(*arguments)
            if several:
                tensors += result
            else:
                tensors.append(result)
        return tensors[self.result]


@dataclass
class _Of:
    """What is kept of a block: a record for each kind of call, None before its second one, and how many were tried."""

    block: weakref.ref[nn.Module]
    replays: dict[Hashable, Replay | None] = field(default_factory=dict)
    recorded: int = 0


_blocks: dict[int, _Of] = {}
"""By identity."""
_permanent: dict[int, Tensor] = {}
"""By identity."""


def permanent(tensor: Tensor) -> Tensor:
    """A tensor that never changes, which a record may hold; it is kept for good."""
    return _permanent.setdefault(id(tensor), tensor)


def replayed(block: nn.Module, run: Run, x: Any, *args: Any) -> Tensor | None:
    """run(block, x, *args), which gives None where the block is not to run so; where nothing changed, by the record.

    Args:
        run: of all that it reads only ``x``, ``args`` and the attributes of ``block`` and its parts change; those of
            an object that hangs on a part, such as a configuration, it does not read.
        args: None, numbers, strings and tuples of them, or the call is not replayed.
    """
    if not (_is_usual(x) and all(type(each) in _CONSTANTS for each in args)):
        return run(block, x, *args)
    inference, threads = torch.is_inference_mode_enabled(), torch.get_num_threads()
    kind = run, x.shape, x.stride(), x.storage_offset(), x.dtype, args, inference, threads, backends.REQUESTED
    kept = _blocks.get(id(block))
    if kept is None or kept.block() is not block:
        key = id(block)
        kept = _blocks[key] = _Of(weakref.ref(block, lambda _: _blocks.pop(key, None)))
    if kind not in kept.replays:  # weights are packed, products measured
        if len(kept.replays) < MOST_KINDS:
            kept.replays[kind] = None
        return run(block, x, *args)
    replay = kept.replays[kind]
    if replay is not None and not replay.snapshot.holds():
        replay = None
    if replay is None and kept.recorded < MOST_KINDS:
        replay = kept.replays[kind] = _record(block, run, x, args)
        kept.recorded += 1 if replay is not None else 4  # which most likely fails again
    if replay is not None:
        try:
            return replay(x)
        except Exception:  # of a parameter that was changed in its dtype, say: the block itself tells which
            kept.replays[kind] = None
    return run(block, x, *args)


def _is_usual(x: Any) -> bool:
    """Whether a call is an ordinary one at inference, that nobody watches or transforms."""
    return not (
        _Snapshot is None
        or is_dynamo_compiling()
        or type(x) is not Tensor
        or is_grad_enabled()
        or not x.is_cpu
        or any_autocast()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag
        or torch.compiler._is_compiling_flag
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(HOOKS_FOR_ALL)
        or is_fx_tracing()
        or _operator._recorder.get() is not None
        or 0 < log.level <= logging.DEBUG
    )


# --- Recording ------------------------------------------------------------------------------------------------------


_PACK = torch.ops.fastvit.pack_weight.default  # what it gives is asked for anew, not made anew


class _Recorder(TorchDispatchMode):
    """The steps of a block; None as soon as one cannot be called again."""

    def __init__(self, x: Tensor, parameters: list[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] | None = []
        self.kept: list[Any] = [x, *parameters]
        self.index = {id(tensor): index for index, tensor in enumerate(self.kept)}
        for index, weight in enumerate(parameters, 1):
            if type(weight) is PackedWeight:
                self.index[id(weight.stand_in)] = index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps is not None:
            step = None if kwargs else self.step(func, args, result)
            self.steps = None if step is None else [*self.steps, step]
        return result

    def step(self, func: Any, args: Any, result: Any) -> Step | None:
        """The call, with its results counted."""
        schema, random = func._schema, torch.Tag.nondeterministic_seeded in func.tags
        results = result if isinstance(result, tuple) else (result,)
        if func is _PACK or schema.is_mutable or random or not all(type(each) is Tensor for each in results):
            return None
        constants, tensors, weights = list(args), [], []
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                if id(value) in _permanent:
                    continue
                index = self.index.get(id(value))
                if index is not None:
                    tensors.append((place, index))
                elif schema.arguments[place].name.endswith("packed") and self.is_packed(args, place):
                    weights.append((place, self.index[id(args[place - 2])]))
                else:
                    return None
                constants[place] = None
            elif isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
                return None
        for each in results:
            self.index[id(each)] = len(self.kept)
            self.kept.append(each)
        operator = Tensor.as_strided if func is torch.ops.aten.as_strided.default else func._op
        return Step(operator, constants, tensors, weights, isinstance(result, tuple))

    def is_packed(self, args: Any, place: int) -> bool:
        """Whether an argument is the packed copy of the weight that stands two places before it."""
        index = self.index.get(id(args[place - 2]))
        return index is not None and packed(self.kept[index]) is args[place]


def _record(block: nn.Module, run: Run, x: Tensor, args: tuple[Any, ...]) -> Replay | None:
    """What a block calls; its result is not used, since within a mode torch may take other kernels."""
    modules = list(block.modules())
    if not all(map(_does_no_more, modules[1:])):
        return None
    snapshot = _Snapshot(modules, _DICTIONARIES)
    parameters = [tensor for part in modules for tensor in _tensors_of(part)]
    with _Recorder(x, parameters) as recorder:
        out = run(block, x, *args)
    result = recorder.index.get(id(out))
    if out is None or result is None or recorder.steps is None or not snapshot.holds():
        return None
    return Replay(snapshot, [weakref.ref(each) for each in parameters], recorder.steps, result)


def _does_no_more(part: nn.Module) -> bool:
    """Whether a part is of a known library, and nothing hangs on it that would have to be called each time."""
    cls = type(part)
    return cls.__module__.partition(".")[0] in _LIBRARIES and is_plain(part, cls)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]
