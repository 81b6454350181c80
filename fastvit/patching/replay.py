"""Modules at inference on the CPU by the operators that they called before, without the Python that chose them.

A fused block asks at each call what may hang on each of its parts, gathers their tensors and chooses kernels, which a
batch of one waits for. Here it is done once. While a module runs, a dispatch mode makes a program
(``csrc/program.h``) of the operators that it calls, whose arguments are its input, its own parameters, earlier results
and constants. As long as nothing in the module has changed (``fastvit._C.Snapshot`` compares every attribute, class,
parameter and hook of every part by identity, the program the layout of the parameters and samples of the weights that
it has packed) and the call is of the same kind, the program runs. Blocks are replayed so, and models of our families
up to the head.

A program holds parameters and packed weights until its module is called again with others, or is deleted, unpatched or
frozen, or ``fastvit.release_memory()`` is called.
"""

from __future__ import annotations

import importlib
import logging
import struct
import sys
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
from fastvit.ops._packing import PackedWeight, on_release, owner_of
from fastvit.reference.overrides import HOOKS_FOR_ALL, is_fx_tracing, is_plain

_C: Any = None if backends.cpp_reasons() else importlib.import_module("fastvit._C")
_DICTIONARIES = (
    *("_parameters", "_buffers", "_modules"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
MOST_KINDS = 16
"""Of calls that a block keeps records of, and how often it is recorded at most."""

Run = Callable[..., "Tensor | None"]
_LIBRARIES = {"torch", "fastvit", "timm", "torchvision", "transformers", "vit_pytorch", "einops"}
_CONSTANTS = {type(None), bool, int, float, str, tuple}


class Replay(NamedTuple):
    """What a module called, its parameters as they were, and the weights whose packed copies were used."""

    snapshot: Any
    program: Any
    weights: list[tuple[weakref.ref[Tensor], int]]
    """Each with its version."""

    def holds(self) -> bool:
        """Whether nothing was changed since."""
        if not (self.snapshot.holds() and self.program.holds()):
            return False
        for weight, version in self.weights:
            owner = weight()
            if owner is None or owner._version != version:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return _run(x, self.program.id)


torch.library.define("fastvit::_program_hold", "(Tensor tensor, int program, bool fixed) -> ()")
torch.library.define("fastvit::_program_run", "(Tensor x, int program) -> Tensor")
_hold = torch.ops.fastvit._program_hold.default._op
_run = torch.ops.fastvit._program_run.default._op


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


def forget() -> None:
    """Give up all records, and what they hold."""
    _blocks.clear()


on_release.append(forget)


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
    kind = run, x.shape, x.stride(), x.dtype, args, inference, threads, backends.REQUESTED
    kept = _blocks.get(id(block))
    if kept is None or kept.block() is not block:
        key = id(block)
        kept = _blocks[key] = _Of(weakref.ref(block, lambda _: _blocks.pop(key, None)))
    if kind not in kept.replays:  # weights are packed, products measured
        if len(kept.replays) < MOST_KINDS:
            kept.replays[kind] = None
        return run(block, x, *args)
    replay = kept.replays[kind]
    if replay is not None and not replay.holds():
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
        _C is None
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
        or torch._C._autograd._profiler_enabled()
    )


# --- Recording ------------------------------------------------------------------------------------------------------


_PACK = torch.ops.fastvit.pack_weight.default  # what it gives is held, and the weight watched
_WITHOUT_FACTORS = {torch.ops.aten.add.Tensor: "add", torch.ops.aten.addmm.default: "addmm"}
_WORDS = {"int", "bool", "float", "SymInt"}


class _Recorder(TorchDispatchMode):
    """Makes a program of the operators that are called; ``failed`` as soon as one cannot be called again.

    ``places`` has the index of each tensor in the program, by identity.
    """

    def __init__(self, x: Tensor, parameters: list[Tensor]) -> None:
        super().__init__()
        self.program = _C.Program()
        self.failed = False
        self.kept: list[Any] = [x]  # so that no identity is used again
        self.places = {id(x): 0}
        self.held = self.results = 0
        self.parameters: dict[int, Tensor] = {}
        """By their places, and those of views of them."""
        self.weights: list[Tensor] = []
        for each in parameters:
            frozen = type(each) is PackedWeight
            self.hold(each.stand_in if frozen else each, fixed=True)
            if not frozen:
                self.parameters[-self.held] = each

    def hold(self, tensor: Tensor, fixed: bool = False) -> int:
        """The place of a tensor that the program is to hold."""
        _hold(tensor, self.program.id, fixed)
        self.kept.append(tensor)
        self.held += 1
        self.places[id(tensor)] = -self.held
        return -self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.failed and func is not _PACK:
            self.failed = bool(kwargs) or not self.adds(func, args, result)
        return result

    def adds(self, func: Any, args: Any, result: Any) -> bool:
        """Whether a call could be added."""
        schema = func._schema
        results = result if isinstance(result, (tuple, list)) else (result,)
        if schema.is_mutable or not all(type(each) is Tensor for each in results):
            return False
        self.kept += results
        source = args[0] if args else None
        if isinstance(source, Tensor) and _is_view(source, results[0]):
            return all(id(each) in self.places or self.adds_view(source, each) for each in results)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if func in (torch.ops.aten.cat.default, torch.ops.aten.stack.default):
            return self.adds_joined(func is torch.ops.aten.stack.default, *args, result=result)
        if func in _WITHOUT_FACTORS:  # which come by name
            return self.adds_call(_WITHOUT_FACTORS[func], args, results)
        return self.adds_call(func.name().partition(".")[0], args, results, schema)

    def adds_call(self, name: str, args: Any, results: Any, schema: Any = None) -> bool:
        """Whether a call of an operator could be added; without a schema its arguments are tensors and numbers."""
        words: list[int] = []
        lists, tensors = [], []
        arguments = args if schema is None else schema.arguments
        for place, argument in enumerate(arguments):
            value = args[place] if place < len(args) else argument.default_value
            kind, called = ("", "") if schema is None else (str(argument.type), argument.name)
            words.append(0)
            if isinstance(value, Tensor):
                index = self.place_of(value, args[place - 2] if called.endswith("packed") else None)
                if index is None:
                    return False
                tensors.append((place, index, kind.startswith("Optional")))
            elif kind in _WORDS:
                words[-1] = _word(float(value) if kind == "float" else value)
            elif kind in ("List[int]", "List[SymInt]"):
                lists.append((place, list(value)))
            elif value is not None:
                return False
        self.program.add_call(name, schema.overload_name if schema else "", words, lists, tensors, len(results))
        for each in results:
            self.results += 1
            self.places[id(each)] = self.results
        return True

    def adds_joined(self, along_new: bool, parts: Any, axis: int = 0, *, result: Tensor) -> bool:
        """Whether a concatenation could be added, two parts at a time; ``along_new``: along an axis that is new."""
        if len(parts) < 2 or not all(id(each) in self.places for each in parts):
            return False
        if along_new:
            views = [each.unsqueeze(axis) for each in parts]
            self.kept += views
            for part, view in zip(parts, views, strict=True):
                self.adds_view(part, view)
            parts = views
        joined = self.places[id(parts[0])]
        for each in parts[1:]:
            tensors = [(0, joined, False), (1, self.places[id(each)], False)]
            self.program.add_call("cat", "", [0, 0, _word(axis)], [], tensors, 1)
            self.results += 1
            joined = self.results
        self.places[id(result)] = joined
        return True

    def adds_view(self, source: Tensor, view: Tensor) -> bool:
        """Whether a view could be added; of what is held it is held as well."""
        place = self.places.get(id(source))
        if place is None:
            return False
        if place < 0:
            parameter = self.parameters.get(place)
            place = self.hold(view)
            if parameter is not None:
                self.parameters[place] = parameter
            return True
        self.program.add_view(place, view.shape, view.stride(), view.storage_offset() - source.storage_offset())
        self.results += 1
        self.places[id(view)] = self.results
        return True

    def place_of(self, value: Tensor, before: Tensor | None) -> int | None:
        """That of an argument; it may be a packed copy, of the weight two places before it where that was given up."""
        index = self.places.get(id(value))
        if index is not None:
            return index
        if id(value) in _permanent or (before is not None and before.untyped_storage().nbytes() == 0):
            return self.hold(value)
        owner = owner_of(value)
        parameter = None if owner is None else self.parameters.get(self.places.get(id(owner), 0))
        if parameter is None or not (parameter.dim() == 2 or parameter.is_contiguous()):
            return None
        self.program.watch(self.places[id(parameter)])
        self.weights.append(parameter)
        return self.hold(value)


def _is_view(source: Tensor, result: Tensor) -> bool:
    return result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() != 0


def _word(value: float) -> int:
    """A number as an operator is given it in a program."""
    if isinstance(value, float):
        return int.from_bytes(struct.pack("=d", value), sys.byteorder)
    return int(value) % 2**64


def _record(block: nn.Module, run: Run, x: Tensor, args: tuple[Any, ...]) -> Replay | None:
    """What a block calls; its result is not used, since within a mode torch may take other kernels."""
    modules = list(block.modules())
    if any(part.training for part in modules) or not all(map(_does_no_more, modules[1:])):
        return None
    snapshot = _C.Snapshot(modules, _DICTIONARIES)
    try:
        with _Recorder(x, [tensor for part in modules for tensor in _tensors_of(part)]) as recorder:
            out = run(block, x, *args)
    except Exception:  # whose cause the call without a record tells
        return None
    result = recorder.places.get(id(out))
    if recorder.failed or out is None or result is None or result <= 0 or not snapshot.holds():
        return None
    recorder.program.finish(result)
    return Replay(snapshot, recorder.program, [(weakref.ref(each), each._version) for each in recorder.weights])


def _does_no_more(part: nn.Module) -> bool:
    """Whether a part is of a known library, and nothing hangs on it that would have to be called each time."""
    cls = type(part)
    return cls.__module__.partition(".")[0] in _LIBRARIES and is_plain(part, cls)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]
