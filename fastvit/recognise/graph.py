"""Front end of ``torch.compile``: the chains of a traced graph, replaced by the operators that take them.

:class:`Fusing` is Inductor's custom pass on the graph as Dynamo traced it, in front of decomposition and autograd. Each
node is a function or method of torch's still, so the vocabulary is that of the eager front end. A node's tensors are
the fake ones that Dynamo noted for it; on them a chain is followed by the same code, with shapes that may be symbols.
What that code computes of them is noted call by call (:class:`_Notes`), and written into the graph in the place of the
product with the values.

A graph shows every use of a map. A chain is replaced only where nothing else uses a map of it, and where nothing from
its first node to its last changes an operand, or reads running statistics that it moves. All else is left as written.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import grad_mode
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fastvit import autotune, backends, ops
from fastvit.ops import _operator
from fastvit.recognise.chain import BreaksOff, break_off
from fastvit.recognise.deferred import ENDS, KINDS, advance, advance_both, begun, name_of, ordinary, steps_of
from fastvit.recognise.hidden import Parts
from fastvit.recognise.maps import Ambient
from fastvit.recognise.mutation import asks_in_place, may_change
from fastvit.recognise.products import flat_einsum
from fastvit.recognise.regions import Region
from fastvit.recognise.vocabulary import IN_PLACE, SAME
from fastvit.reference.functional import BatchNorm

__all__ = ["Fusing", "fuse"]


class Fusing(CustomGraphPass):
    """The passes that the user has, then :func:`fuse`.

    Args:
        users: what stood in ``torch._inductor.config.pre_grad_custom_pass``: a pass, several, or None.

    Attributes:
        regions: how many were traced in this compilation.
    """

    def __init__(self, users: Any) -> None:
        self.users = users
        self.regions = 0

    def _theirs(self) -> tuple[Any, ...]:
        if isinstance(self.users, (list, tuple)):
            return tuple(self.users)
        return () if self.users is None else (self.users,)

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph."""
        for each in self._theirs():
            each(graph)
        fuse(graph)

    def uuid(self) -> Any | None:
        """What Inductor's caches know it by: its code, what it chooses among, and the user's passes."""
        theirs = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self._theirs()]
        if None in theirs:
            return None
        package = Path(__file__).parent.parent
        files = sorted(map(str, (*package.glob("recognise/*.py"), *package.glob("ops/*.py"))))
        machine = sorted(backends.REQUESTED or ()), backends.cpp_reasons(), backends.UNPROVEN
        return get_hash_for_files(tuple(files), repr((machine, self.regions, theirs)))


# --- Reading a graph ------------------------------------------------------------------------------------------------

_METHODS: dict[Any, Callable[..., Any]] = {
    getattr(operator, name): getattr(Tensor, f"__{name}__")
    for name in dir(operator)
    if not name.startswith("_") and hasattr(Tensor, f"__{name}__")
}
"""By operator, the method it calls, which is what a mode of torch functions sees."""

_ENTER = (torch.amp.autocast_mode._enter_autocast, grad_mode._enter_inference_mode)
_EXIT = (torch.amp.autocast_mode._exit_autocast, grad_mode._exit_inference_mode)
_STARTS, _WHOLE = KINDS["all"]
_PURE = ("torch", "_operator", "builtins", "math", "einops")
"""Packages whose functions change their arguments only where ``may_change`` says so."""


class _Read(NamedTuple):
    """A node as a call on the tensors that Dynamo noted."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nodes: tuple[Any, ...]
    """As ``args``, with nodes in place of tensors."""

    @classmethod
    def of(cls, node: fx.Node) -> _Read:
        func: Any = node.target if node.op == "call_function" else getattr(Tensor, str(node.target), None)
        nodes, kwargs = node.args, node.kwargs
        if func is getattr and len(nodes) == 2:
            func, nodes = getattr(Tensor, nodes[1]).__get__, nodes[:1]
        elif func is torch.einsum:
            nodes = tuple(flat_einsum(nodes))
        elif not nodes and "input" in kwargs:
            nodes, kwargs = (kwargs["input"],), {name: kwargs[name] for name in kwargs if name != "input"}
        func = _METHODS.get(func, func) if callable(func) else func
        return cls(func, map_arg(nodes, _value), map_arg(kwargs, _value), nodes)

    def tensors(self) -> list[Tensor]:
        """Those among the arguments, in lists, too."""
        found: list[Tensor] = []
        map_aggregate(
            (self.args, self.kwargs), lambda value: found.append(value) if isinstance(value, Tensor) else None
        )
        return found

    def may_change(self) -> bool:
        """Whether it may change the memory of a tensor among its arguments."""
        package = (getattr(self.func, "__module__", None) or "torch").partition(".")[0]
        opaque = package not in _PURE or isinstance(self.func, torch._ops.HigherOrderOperator)
        return opaque or may_change(self.func, self.args, self.kwargs)


def _value(node: fx.Node) -> Any:
    """What Dynamo noted of a node."""
    if "example_value" not in node.meta:
        break_off(f"nothing is known of {node.name}")
    return node.meta["example_value"]


def _region_of(node: fx.Node) -> type[Region] | None:
    """The innermost region in which an operation ran."""
    for _, cls in reversed((node.meta.get("nn_module_stack") or {}).values()):
        if isinstance(cls, type) and issubclass(cls, Region):
            return cls
    return None


def _memory(tensors: Iterable[Tensor | None]) -> set[int]:
    found: set[int] = set()
    for tensor in tensors:
        if tensor is not None:
            if tensor.layout != torch.strided:
                break_off(f"memory of a tensor in layout {tensor.layout} may be shared")
            found.add(tensor.untyped_storage()._cdata)
    return found


# --- Writing into a graph -------------------------------------------------------------------------------------------


class _Call:
    """A call that was made on fake tensors, and its node once it has one."""

    def __init__(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out
        self.node: fx.Node | None = None


class _Notes(TorchFunctionMode):
    """Notes how tensors are made of those that stand in the graph, and writes it there where one is wanted."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.nodes: dict[int, fx.Node] = {}
        self.calls: dict[int, tuple[_Call, int | None]] = {}
        self.symbols: dict[Any, fx.Proxy] = {}
        for node in graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                self.nodes.setdefault(id(value), node)
            elif isinstance(value, torch.SymInt) and node.op == "placeholder":
                self.symbols[value.node.expr] = fx.Proxy(node)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out, func, args, kwargs or {})
        return out

    def note(self, out: Any, func: Any, args: Any, kwargs: Any) -> None:
        """That a call gave ``out``."""
        call, several = _Call(func, args, kwargs, out), isinstance(out, (tuple, list))
        for place, each in enumerate(out if several else (out,)):
            if isinstance(each, Tensor) and id(each) not in self.nodes:
                self.calls.setdefault(id(each), (call, place if several else None))

    def write(self, tensor: Tensor, like: fx.Node) -> fx.Node:
        """The node of a tensor, in front of ``like``, whose place in the user's code it has; BreaksOff leaves none."""
        before = len(self.graph.nodes)
        with self.graph.inserting_before(like):
            try:
                return self._node(tensor, like)
            except KeyError as missing:
                written = set()
                for _ in range(len(self.graph.nodes) - before):
                    written.add(like.prev)
                    self.graph.erase_node(like.prev)
                self.nodes = {key: node for key, node in self.nodes.items() if node not in written}
                for call, _ in self.calls.values():
                    call.node = None if call.node in written else call.node
                raise BreaksOff(f"{missing} does not stand in the graph") from None

    def _node(self, tensor: Tensor, like: fx.Node) -> fx.Node:
        node = self.nodes.get(id(tensor))
        if node is None:
            call, place = self.calls[id(tensor)]
            if call.node is None:
                call.node = self._written(call, like)
            node = call.node if place is None else self.graph.call_function(operator.getitem, (call.node, place))
            node.meta |= {name: like.meta[name] for name in ("stack_trace", "nn_module_stack") if name in like.meta}
            node.meta["example_value"] = tensor
            self.nodes[id(tensor)] = node
        return node

    def _written(self, call: _Call, like: fx.Node) -> fx.Node:
        def given(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._node(value, like)
            if not isinstance(value, torch.SymInt):
                return value
            number = value.node.maybe_as_int()
            if number is not None:
                return number
            return sympy_interp(PythonReferenceAnalysis, self.symbols, value.node.expr).node

        args, kwargs = map_aggregate(tuple(call.args), given), map_aggregate(call.kwargs, given)
        name = getattr(call.func, "__name__", "")
        if name == "__getitem__":
            return self.graph.call_function(operator.getitem, args)
        if name == "__get__":
            return self.graph.call_function(getattr, (*args, name_of(call.func)))
        if getattr(Tensor, name, None) == call.func:
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(call.func, args, kwargs)


# --- The walk -------------------------------------------------------------------------------------------------------


class _Map(NamedTuple):
    """A map that a node gives.

    Attributes:
        chain: what has been applied to it; Parts where the node gives a tuple.
        nodes: those that made it, the first product in front.
        ambient: of all of them.
        region: of all of them.
    """

    chain: Any
    nodes: tuple[fx.Node, ...]
    ambient: Ambient
    region: type[Region]


def fuse(graph: fx.Graph) -> None:
    """Replace the chains in a graph's regions by operators; all else stays.

    Args:
        graph: as Dynamo traced it, with "example_value" and "nn_module_stack" in the metadata of its nodes.
    """
    values = (node.meta.get("example_value") for node in graph.nodes if _region_of(node) is not None)
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is not None:
        with enable_python_dispatcher(), mode, _Notes(graph) as notes, _as_it_was():
            _Walk(graph, notes).walk()


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Whether gradients are recorded, behind it as in front."""
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


class _Walk:
    def __init__(self, graph: fx.Graph, notes: _Notes) -> None:
        self.graph, self.notes = graph, notes
        self.all = tuple(graph.nodes)
        self.order = {node: place for place, node in enumerate(self.all)}
        self.maps: dict[Any, _Map] = {}

    def walk(self) -> None:
        """Once, from the first node to the last; what switches gradients or autocast is switched."""
        entered: dict[Any, Any] = {}
        try:
            for node in self.all:
                if node.target is torch._C._set_grad_enabled:
                    torch._C._set_grad_enabled(*node.args)
                elif node.target in _ENTER:
                    entered[node] = node.target(*node.args)
                elif node.target in _EXIT:
                    node.target(entered.pop(node.args[0]))
                elif node.op in ("call_function", "call_method"):
                    self._visit(node)
        finally:
            for node in reversed(entered):
                _EXIT[_ENTER.index(node.target)](entered[node])

    def _visit(self, node: fx.Node) -> None:
        region = _region_of(node)
        if region is None:
            return
        told: tuple[str, ...] = ()
        try:
            call = _Read.of(node)
            found = {place: self.maps.get(each) for place, each in enumerate(call.nodes) if isinstance(each, fx.Node)}
            places = steps_of(call.func, {place: each.chain for place, each in found.items() if each is not None})
            if places and self._goes_on(node, call, self.maps[call.nodes[places[0]]], places, region):
                return
            if call.func in _STARTS:
                self._begin(node, call, region)
            if call.func in _WHOLE:
                told = (name_of(call.func),)
                _check_ordinary(call)
                taken = _WHOLE[call.func](call.args, call.kwargs)
                if taken is None:
                    return
                _check_taken(taken[0], region.backend)
                self._replace(node, (), lambda: taken[1](region.backend))
        except BreaksOff as reason:
            _log(told, reason)

    def _goes_on(self, node: fx.Node, call: _Read, map_: _Map, places: list[int], region: type[Region]) -> bool:
        """Whether a call on a map is a step of its chain, or its end."""
        if isinstance(map_.chain, Parts):
            return self._pick(node, map_)
        try:
            self._go_on(node, call, map_, places, region)
        except BreaksOff as reason:
            _log(map_.chain.told, reason)
            return False
        return True

    def _begin(self, node: fx.Node, call: _Read, region: type[Region]) -> None:
        _check_ordinary(call)
        chain = begun(_STARTS, call.func, call.args, call.kwargs)
        if chain is not None:
            self.maps[node] = _Map(chain, (node,), Ambient.now(chain.device.type), region)

    def _pick(self, node: fx.Node, map_: _Map) -> bool:
        """One of the pieces of a map."""
        index = node.args[1]
        if node.target is operator.getitem and isinstance(index, int):
            self.maps[node] = map_._replace(nodes=(*map_.nodes, node), chain=map_.chain.chains[index])
        return node in self.maps

    def _go_on(self, node: fx.Node, call: _Read, map_: _Map, places: list[int], region: type[Region]) -> None:
        chain = map_.chain
        _check_ordinary(call)
        if Ambient.now(chain.device.type) != map_.ambient or region is not map_.region:
            break_off("gradients or autocast were switched, or the module left, since the map began")
        if len(places) == 1:
            read = advance(chain, call.func, places[0], call.args, call.kwargs)
        else:
            map_, read = self._both(call, map_, places)
        if isinstance(read, ENDS):
            chain = chain.meeting(read, map_.ambient.autocast)
            _check_taken(chain.operator(), region.backend)
            self._check_alone(node, map_)
            self._replace(node, map_.nodes, lambda: chain.finished(read, region.backend))
            return
        made = map_._replace(nodes=(*map_.nodes, node), chain=chain if read is SAME else read)
        self.maps[node] = made
        if call.func in IN_PLACE or asks_in_place(call.func, call.args, call.kwargs):
            self.maps[call.nodes[places[0]]] = made

    def _both(self, call: _Read, map_: _Map, places: list[int]) -> tuple[_Map, Any]:
        """A map with the nodes of two, in their order, and the chain behind a call on both."""
        other = self.maps[call.nodes[places[1]]]
        if len(places) > 2 or isinstance(other.chain, Parts) or other[2:] != map_[2:]:
            break_off(f"{name_of(call.func)} takes several maps")
        nodes = sorted({*map_.nodes, *other.nodes}, key=self.order.__getitem__)
        return map_._replace(nodes=tuple(nodes)), advance_both(map_.chain, other.chain, call.func)

    def _check_alone(self, node: fx.Node, map_: _Map) -> None:
        """BreaksOff where something beside the chain uses its maps, changes its operands, or reads what it moves."""
        inside = {*map_.nodes, node}
        if any(user not in inside for each in map_.nodes for user in each.users):
            break_off("a map is used elsewhere, too")
        operands = _memory(tensor for each in map_.nodes for tensor in _Read.of(each).tensors())
        norm = map_.chain.norm
        moved = _memory(norm[:2]) if isinstance(norm, BatchNorm) and norm.use_batch_stats else set()
        for between in self.all[self.order[map_.nodes[0]] : self.order[node]]:
            if between in inside or between.op not in ("call_function", "call_method"):
                continue
            call = _Read.of(between)
            memory = _memory(call.tensors())
            if not memory.isdisjoint(moved) or (call.may_change() and not memory.isdisjoint(operands)):
                break_off(f"{between.name} may change what the map is made of")

    def _replace(self, node: fx.Node, maps: tuple[fx.Node, ...], compute: Callable[[], Any]) -> None:
        """Put what ``compute`` gives of fake tensors in the place of a node, and of the maps in front of it."""
        expected = _value(node)
        replaced = [node]
        if isinstance(expected, (tuple, list)):  # multi_head_attention_forward's second output is None
            expected, replaced = expected[0], list(node.users)
            if any(user.target is not operator.getitem or user.args[1] != 0 for user in replaced):
                break_off("its map is used")
        with _operator.recording(self._chosen), autotune.unmeasured():
            out = compute()
        out = out[0] if isinstance(out, tuple) else out
        if out.shape != expected.shape or out.dtype != expected.dtype:
            break_off(f"it gives {out.dtype} {tuple(out.shape)} for {expected.dtype} {tuple(expected.shape)}")
        if out.stride() != expected.stride() and not self._runs_on(dict.fromkeys(replaced, out)):
            out = out.contiguous()
            if out.stride() != expected.stride():
                break_off("what follows needs the strides that the product would have")
        new = self.notes.write(out, node)
        for each in replaced:
            each.replace_all_uses_with(new)
        for each in dict.fromkeys((*replaced, node, *reversed(maps))):
            self.graph.erase_node(each)

    def _chosen(self, selection: _operator.Selection) -> Callable[..., Any]:
        """Has the operator's call noted, with the backend that it gets."""
        if selection.backend == _operator.REFERENCE:
            break_off(f"no kernel of {selection.op} takes it here")
        function = getattr(ops, selection.op)
        parameters = inspect.signature(function).parameters

        def run(run: Callable[..., Any], call: Any) -> Any:
            out = run(call)
            given = {name: value for name, value in call._asdict().items() if name in parameters}
            kwargs = {name: value for name, value in given.items() if value is not parameters[name].default}
            self.notes.calls[id(out)] = _Call(function, (), {**kwargs, "backend": selection.backend}, out), None
            return out

        return run

    def _runs_on(self, changed: dict[fx.Node, Any]) -> bool:
        """Whether what follows runs with tensors of other strides, as a view may not."""
        for node in self.all[min(map(self.order.__getitem__, changed)) :]:
            if node.op not in ("call_function", "call_method") or changed.keys().isdisjoint(node.all_input_nodes):
                continue
            try:
                if _Read.of(node).may_change():
                    return False
                args, kwargs = map_arg(
                    (node.args, node.kwargs), lambda each: changed[each] if each in changed else _value(each)
                )
                function = node.target if callable(node.target) else getattr(Tensor, str(node.target))
                out = function(*args, **kwargs)
                if _strides(out) != _strides(_value(node)):
                    changed[node] = out
            except Exception:  # torch's own, for the user's operation
                return False
        return True


def _strides(value: Any) -> Any:
    return map_aggregate(value, lambda each: each.stride() if isinstance(each, Tensor) else None)


def _log(told: tuple[str, ...], reason: BreaksOff) -> None:
    if told:
        _operator.log.debug("left plain in a compiled graph: %s; %s", ", ".join(told), reason)


def _check_taken(operator: str, backend: str) -> None:
    if backend != _operator.AUTO and backend not in {each.name for each in ops.OPERATORS[operator].implementations}:
        break_off(f"{operator} has no backend {backend!r}")


def _check_ordinary(call: _Read) -> None:
    """BreaksOff unless all tensors of a call are torch's own, on one device."""
    tensors = call.tensors()
    if not tensors or not ordinary(tensors, tensors[0].device, (FakeTensor,)):
        break_off("its tensors are not ordinary ones of one device")
