"""CUDA graphs of a model at inference: at small batches a GPU waits for Python and for launches, a graph for none.

A graph reads and writes the memory that it saw at its capture. So a call copies its inputs in and its outputs out, and
what the graph cannot see is compared at each call, while the GPU computes: a module exchanged, hooked, patched or put
into training, a forward or a parameter replaced. Then, and for inputs of other shapes, the model is called.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.patching.verification import as_call

__all__ = ["Captured", "capture"]

WARM_UP = 3
"""Calls in front of a capture, in which kernels are compiled and chosen."""


class Graph:
    """A call recorded on a CUDA device.

    Attributes:
        outputs: what the call gave; its tensors are overwritten by each replay.
    """

    device_type = "cuda"

    def __init__(self, run: Callable[[], Any], device: torch.device, pool: Any) -> None:
        self._device = device
        current, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        beside.wait_stream(current)
        with torch.cuda.device(device), torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                run()
        current.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, stream=beside):
            self.outputs = run()
        self._replayed = torch.cuda.Event()
        self._replayed.record(current)

    @staticmethod
    def new_pool() -> Any:
        """Memory that graphs share."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def capturing() -> bool:
        """Whether somebody captures now."""
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within it this stream has the graph's memory; another that used it is waited for."""
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device):
            stream.wait_event(self._replayed)
            yield
            self._replayed.record(stream)

    def replay(self) -> None:
        """The call again, on what its inputs hold now."""
        self._graph.replay()


class _Call(NamedTuple):
    graph: Graph
    inputs: list[Tensor]
    state: list[Any]
    tensors: list[Tensor]
    """The model's, kept alive as long as a graph may read them."""


class Captured:
    """A model beside graphs of its calls, called as the model is.

    Attributes:
        model: it itself, which stays what it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._calls: dict[Any, _Call] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    @property
    def shapes(self) -> list[tuple[torch.Size, ...]]:
        """Of the tensors of each call that is captured."""
        return [tuple(each.shape for each in call.inputs) for call in self._calls.values()]

    def add(self, example: Any) -> Captured:
        """Capture the call of one more example, or one of known shapes anew; ``capture`` says what is raised."""
        args, kwargs = as_call(example)
        key, tensors = _key(args, kwargs)
        if key is None:
            raise ValueError("example: expected tensors, and other arguments that can be hashed")
        devices = {each.device for each in (*tensors, *self.model.parameters(), *self.model.buffers())}
        if len(devices) != 1 or (device := next(iter(devices))).type != Graph.device_type:
            told = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"example: expected it and the model on one {Graph.device_type.upper()} device, got {told}"
            )
        if self.model.training or _state(self.model) is None:
            raise ValueError("model: expected one in eval mode, with no hooks in it or in front of all modules")
        leaves, structure = pytree.tree_flatten((args, kwargs))
        inputs = [each.detach().clone() for each in tensors]
        given = iter(inputs)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run() -> Any:
            mine, named = pytree.tree_unflatten(leaves, structure)
            return self.model(*mine, **named)

        with self._lock, torch.no_grad(), _no_cached_casts():
            self._pool = self._pool or Graph.new_pool()
            graph = Graph(run, device, self._pool)
            if not all(leaf is None or isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(graph.outputs)):
                raise TypeError("model: expected outputs of tensors alone; others would stay those of the capture")
            state = _state(self.model)  # behind the first call, which may have decided what is fused
            if state is None:
                raise ValueError("model: a hook was added by its own forward")
            self._calls[key] = _Call(graph, inputs, state, [*self.model.parameters(), *self.model.buffers()])
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs; from a graph at inference, where there is one for such inputs."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._calls or Graph.capturing():
            return self.model(*args, **kwargs)
        key, tensors = _key(args, kwargs)
        call = None if key is None else self._calls.get(key)
        if call is None:
            return self.model(*args, **kwargs)
        with self._lock, call.graph.alone():
            for mine, given in zip(call.inputs, tensors, strict=True):
                mine.copy_(given)
            call.graph.replay()
            if _state(self.model) == call.state:
                return pytree.tree_map_only(Tensor, torch.clone, call.graph.outputs)
        return self.model(*args, **kwargs)

    def release(self) -> None:
        """Give up all graphs and their memory; calls are the model's from then on."""
        with self._lock:
            self._calls.clear()
            self._pool = None


def capture(model: nn.Module, example: Any, *examples: Any) -> Captured:
    """CUDA graphs of a model's inference, one for the shapes of each example.

    The result is called as the model is, under ``torch.no_grad`` or ``inference_mode``. Calls with other shapes, dtypes
    or arguments than those of an example run the model, as do those behind which the model has changed: a module
    exchanged, hooked, patched or put into training, a forward or a parameter replaced. Weights that change in place
    are seen. What else a forward reads (numbers in attributes, global state) is as it was at the capture.

    Args:
        model: in eval mode, on one CUDA device; its forward must not wait for the GPU, as ``.item()`` does.
        example: a tensor, a tuple of arguments or a dict of keyword arguments, as for ``patch``; autocast counts as
            it is now.
        examples: further ones, of other shapes.

    Raises:
        TypeError: an example of another kind, or outputs that are no tensors.
        ValueError: not on one CUDA device, in training, or hooked.
        RuntimeError: torch's, where the forward cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    captured = Captured(model)
    for each in (example, *examples):
        captured.add(each)
    return captured


def _key(args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
    """What two calls must share to have one graph, None for a call that cannot have one; and its tensors."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(type(each) is not Tensor or each.layout != torch.strided for each in tensors):
        return None, []
    kinds = [
        (each.shape, each.dtype, each.device) if isinstance(each, Tensor) else (type(each), each) for each in leaves
    ]
    device = tensors[0].device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if casts else None
    key = (structure, autocast, *kinds)
    try:
        hash(key)
    except TypeError:
        return None, []
    return key, tensors


def _state(model: nn.Module) -> list[Any] | None:
    """What decides what a call of the model runs, in as few steps as can be; None where a hook would be skipped."""
    if nn.modules.module._has_any_global_hook():
        return None
    found: list[Any] = []
    left: list[Any] = [model]
    while left:
        module = left.pop()
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None
        found += module.__class__, own["training"], own.get("forward"), own.get("_compiled_call_impl")
        found += map(_address, own["_parameters"].values())
        found += map(_address, own["_buffers"].values())
        left += [each for each in own["_modules"].values() if each is not None]
    return found


def _address(tensor: Any) -> Any:
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


@contextlib.contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Within it autocast casts weights anew: one that it kept would not be made in a replay."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
