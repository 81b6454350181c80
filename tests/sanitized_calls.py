"""Calls every operator the extension has for the CPU, in small odd shapes, on each instruction set it was built for.

Run by ``test_sanitizers.py`` in a process whose extension is built with sanitizers, which end it at the first error.
The last line lists the operators that ran.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import _C, ops
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection

Call = tuple[Callable[..., Any], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """Remembers fastvit's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvit":
            self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def norm(channels: int, batch_stats: bool) -> BatchNorm:
    mean, var, weight, bias = (torch.rand(channels) + 0.5 for _ in range(4))
    return BatchNorm(mean, var, weight, bias, use_batch_stats=batch_stats)


def convolutions() -> Iterable[Call]:
    geometries = (
        ((1, 1), 3, 1, None),
        ((7, 5), 3, 2, None),
        ((6, 7), 5, 1, None),
        ((5, 6), 4, 3, 5),
        ((2, 9), 7, 1, None),
    )
    for (grid, kernel, stride, padding), channels, batch_stats in itertools.product(geometries, (5, 33), (False, True)):
        tokens = 2 + grid[0] * grid[1]
        x = torch.randn(3, tokens + 1, channels + 3)[:, 1:, 1 : channels + 1]  # rows of a larger tensor
        keeps_grid = stride == 1 and kernel % 2 == 1
        yield (
            ops.token_depthwise_conv,
            {
                "x": x,
                "weight": torch.randn(channels, 1, kernel, kernel),
                "bias": torch.randn(channels),
                "grid": grid,
                "stride": stride,
                "padding": padding,
                "prefix_tokens": 2,
                "residual": keeps_grid,
                "pre_norm": norm(channels, batch_stats),
                "pre_activation": "gelu",
                "norm": norm(channels, batch_stats),
                "activation": "gelu",
            },
        )
    for channels, stride, grid in itertools.product((16, 37, 48), (1, 2), ((7, 5), (4, 6))):  # without a ring of rows
        weight, x = torch.randn(channels, 1, 3, 3), torch.randn(2, grid[0] * grid[1], channels)
        for behind in (None, norm(channels, True)):
            call = {"x": x, "weight": weight, "grid": grid, "stride": stride, "norm": behind}
            yield ops.token_depthwise_conv, call
    weight, square = torch.randn(24, 1, 3, 3), torch.randn(24, 24)
    q, k, v = (Projection(weight, norm(24, False), square, torch.randn(24), stride) for stride in (1, 2, 2))
    yield ops.conv_projection, {"x": torch.randn(2, 36, 24), "q": q, "k": k, "v": v, "grid": (5, 7), "prefix_tokens": 1}


def attentions() -> Iterable[Call]:
    for heads, queries, keys, width in ((1, 1, 1, 8), (3, 5, 17, 16), (4, 65, 70, 33)):
        q = torch.randn(2, queries, heads, width).transpose(1, 2)
        k, v = torch.randn(2, 2, heads, keys, width)
        mask = torch.rand(2, keys) < 0.7
        yield ops.masked_attention, {"q": q, "k": k, "v": v}
        yield ops.masked_attention, {"q": q, "k": k, "v": v, "mask": mask, "bias": torch.randn(heads, queries, keys)}
        square, bias = torch.randn(2, heads, heads), torch.randn(heads)
        yield ops.head_mixed_attention, {"q": q, "k": k, "v": v, "pre_weight": square[0], "pre_bias": bias}
        for batch_stats in (False, True):
            mixed = {"post_weight": square[1], "post_bias": bias, "norm": norm(heads, batch_stats), "mask": mask}
            yield ops.head_mixed_attention, {"q": q, "k": k, "v": v, **mixed}


def products() -> Iterable[Call]:
    for rows, inner, columns in ((17, 16, 16), (33, 40, 19), (70, 24, 100), (15, 1100, 40)):
        x, weight = torch.randn(1, rows, inner), torch.randn(columns, inner)
        for each in (x, x[0].t().contiguous().t()):
            yield ops.linear, {"x": each, "weight": weight, "bias": torch.randn(columns), "activation": "gelu"}
        around = {"norm": LayerNorm(torch.ones(inner), torch.zeros(inner)), "residual": torch.randn(1, rows, inner)}
        layers = {"fc1_weight": weight, "fc1_bias": None, "fc2_weight": torch.randn(inner, columns), "fc2_bias": None}
        yield ops.mlp, {"x": x, **layers, "scale": torch.randn(inner), **around}
        gate = {"gate_weight": layers.pop("fc1_weight"), "gate_bias": layers.pop("fc1_bias")}
        gate |= {"value_weight": gate["gate_weight"].clone(), "value_bias": torch.randn(columns)}
        yield ops.glu_mlp, {"x": x, **gate, **layers, "hidden_norm": LayerNorm(None, None), **around}


def windows() -> Iterable[Call]:
    for channels, kernel, stride, padding in ((3, (7, 7), 4, 2), (18, (3, 2), (2, 1), 3), (65, (8, 8), 8, 0)):
        x, weight = torch.randn(2, channels, 17, 16), torch.randn(19, channels, *kernel)
        arguments = {"weight": weight, "bias": torch.randn(19), "stride": stride, "padding": padding}
        yield ops.conv_batch_norm, {"x": x, **arguments, "norm": norm(19, False), "activation": "relu"}
        yield ops.conv_batch_norm, {"x": x.contiguous(memory_format=torch.channels_last), **arguments, "norm": None}


def feed_forwards() -> Iterable[Call]:
    for height, width, channels, hidden in ((1, 1, 3, 5), (4, 5, 16, 24), (7, 9, 33, 70)):
        x = torch.randn(2, 1 + height * width, channels)
        up, down = torch.randn(hidden, channels), torch.randn(channels, hidden)
        layers = (up, torch.randn(hidden), torch.randn(hidden, 1, 3, 3), None, down, torch.randn(channels))
        names = ("up_weight", "up_bias", "dw_weight", "dw_bias", "down_weight", "down_bias")
        around = {"norm": LayerNorm(torch.ones(channels), torch.zeros(channels)), "residual": torch.randn(x.shape)}
        norms = {"up_norm": norm(hidden, False), "dw_norm": norm(hidden, False), "down_norm": norm(channels, False)}
        arguments = {"x": x, **dict(zip(names, layers, strict=True)), "grid": (height, width), "prefix_tokens": 1}
        yield ops.leff, arguments
        yield ops.leff, arguments | norms | around


def lower(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, (BatchNorm, LayerNorm, Projection)):
        return type(value)(*map(lower, value))
    return tuple(map(lower, value)) if isinstance(value, tuple) else value


def try_cpp(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of the kernels; nothing where they do not take the call."""
    try:
        out = function(**arguments, backend="cpp")
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        return ()
    return out if isinstance(out, tuple) else (out,)


def run(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Without gradients, then with."""
    with torch.no_grad():
        try_cpp(function, arguments)
    trained = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if outs := try_cpp(function, arguments | trained):
        torch.autograd.grad([out.float().sum() for out in outs], list(trained.values()), allow_unused=True)


def run_program() -> None:
    """A view, a call of ours, one by torch's dispatcher, and the three that it cannot pass on; a weight is watched."""
    program, weight = _C.Program(), torch.randn(16, 8)
    torch.ops.fastvit._program_hold(weight, program.id, True)
    torch.ops.fastvit._program_hold(torch.ops.fastvit.pack_weight(weight), program.id, False)
    torch.ops.fastvit._program_hold(torch.randn(16), program.id, False)
    torch.ops.fastvit._program_hold(torch.randn(3, 3), program.id, False)
    program.watch(-1)
    program.add_view(0, [3, 8], [16, 1], 8)  # 1: of rows of 16
    zeros = torch.ops.fastvit.packed_linear.default._schema.arguments
    program.add_call("fastvit::packed_linear", "", [0] * len(zeros), [], [(0, 1, False), (1, -1, False)], 1)
    program.add_call("add", "", [0, 0], [], [(0, 2, False), (1, -3, False)], 1)
    program.add_view(2, [16, 3], [1, 16], 0)  # 4: transposed
    program.add_call("addmm", "", [0, 0, 0], [], [(0, 4, False), (1, 4, False), (2, -4, False)], 1)
    program.add_call("cat", "", [0, 0, 0], [], [(0, 2, False), (1, 3, False)], 1)
    layer_norm = torch.ops.aten.native_layer_norm.default._schema
    words = [0] * len(layer_norm.arguments)
    program.add_call("aten::native_layer_norm", "", words, [(1, [16])], [(0, 6, False), (2, -3, True)], 3)
    program.finish(7)
    assert program.holds()
    torch.ops.fastvit._program_run(torch.randn(3, 16), program.id)
    weight.mul_(2.0)
    assert not program.holds()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with Recorder() as recorder:
        for isa in _C.cpu_info()["supported"]:
            _C._set_cpu_capability(isa)
            for dtype in ("float32", "bfloat16"):
                for shape in ((19, 40), (100, 1101)):
                    weight = torch.randn(shape, dtype=getattr(torch, dtype))
                    torch.ops.fastvit.unpack_weight(torch.ops.fastvit.pack_weight(weight))
                for function, arguments in (*convolutions(), *attentions(), *products(), *windows(), *feed_forwards()):
                    changed = {name: lower(value) for name, value in arguments.items()}
                    run(function, arguments if dtype == "float32" else changed)
            run_program()
    print(json.dumps(sorted(recorder.names)))


if __name__ == "__main__":
    main()
