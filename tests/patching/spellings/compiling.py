"""What the tests of compiled models share: a backend that shows what Inductor would get, without its minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._inductor.compile_fx import _recursive_pre_grad_passes

from fastvit import ops

_NAMES = {getattr(ops, name): name for name in ops.OPERATORS}


class Passed:
    """A backend: Inductor's passes on the traced graph, then autograd, and what is left run as it stands."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        with enable_python_dispatcher():
            graph = _recursive_pre_grad_passes(graph, inputs)
            self.graphs.append(graph)
            return aot_autograd(fw_compiler=boxed_nop)(graph, inputs)

    def operators(self) -> list[str]:
        """Those called in the graphs, subgraphs included."""
        modules = [part for graph in self.graphs for part in graph.modules() if isinstance(part, fx.GraphModule)]
        targets = [node.target for module in modules for node in module.graph.nodes if node.op == "call_function"]
        return [_NAMES[target] for target in targets if target in _NAMES]


def compiled(module: torch.nn.Module, **options: Any) -> tuple[Callable[..., Any], Passed]:
    """The module compiled whole, and its backend."""
    passed = Passed()
    return torch.compile(module, **{"fullgraph": True, "backend": passed, **options}), passed
