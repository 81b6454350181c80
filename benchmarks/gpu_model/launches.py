"""A CUDA device that is not there: the launches of an operator's call, as a real one would get them.

Tensors stay on the CPU, and Triton kernels are compiled for sm_90 with the specialisation of a real launch, not run.
What torch itself is asked to compute, such as a copy that pads, is computed and recorded as a launch of the library's.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import struct
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from benchmarks.gpu_model import cuda
from benchmarks.gpu_model.launch import Launch, size_of, tensors_of
from benchmarks.gpu_model.machine_code import Binary, disassemble
from fastvit import backends
from fastvit.ops._operator import Operator
from fastvit.ops._schema import REGISTERED
from fastvit.ops.conv_projection import convolved_together
from fastvit.ops.token_depthwise_conv import convolved

IN_CUDA = {
    "token_depthwise_conv": (lambda a: convolved(a.x, a.weight, a), cuda.convolution),
    "conv_projection": (convolved_together, cuda.projection),
}
"""The operators with CUDA kernels: their empty results, and their launches."""

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT, MULTIPROCESSORS = 232448, 132

FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"})
"""Operations that launch nothing, apart from views."""

WIDTHS = {"i64": 8, "u64": 8, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i8": 1, "u8": 1, "i1": 1}


def pack(signature: Any, values: Any, into: bytearray) -> None:
    """Lay arguments out as a kernel's parameters; signature: a type, or a tuple of them, for each."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            pack(kind, value, into)
        elif kind != "constexpr":
            width = 8 if kind.startswith("*") else WIDTHS.get(kind, 4)
            into.extend(bytes(-len(into) % width))
            number = value.data_ptr() if isinstance(value, Tensor) else value
            if kind.startswith("fp"):
                into.extend(struct.pack("<f", number)[-width:])
            else:
                into.extend((int(number) % (1 << 8 * width)).to_bytes(width, "little"))


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def is_active(self) -> bool:
        return True


class _Library(TorchDispatchMode):
    """Records what torch computes."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "fastvit" and name in IN_CUDA:
            empty, launches_of = IN_CUDA[name]
            arguments = REGISTERED[name].Arguments(*args)
            result = empty(arguments)
            self._launches.extend(launches_of(arguments, result))
            return result
        if func.namespace == "fastvit":  # what its implementation asks of torch counts
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        flops = 0
        if name in ("mm", "addmm"):  # counted, not computed
            *_, left, right = args
            result = left.new_empty(left.shape[0], right.shape[1])
            flops = 2 * left.numel() * right.shape[1]
        else:
            result = func(*args, **(kwargs or {}))
        tensors = tensors_of([args, kwargs, result])
        if tensors and not func.is_view and name not in FREE:
            key = f"{name} {[tuple(tensor.shape) for tensor in tensors]}"
            self._launches.append(Launch(f"torch's {name}", key, size_of(tensors), flops=flops))
        return result


def record_triton(function: Any, arguments: Any, keywords: dict[str, Any], grid: Any) -> Launch:
    """The launch that a call of a Triton function would make."""
    keywords = {**keywords, "debug": False, "instrumentation_mode": ""}
    *_, backend, binder = function.device_caches[0]
    bound, specialization, options = binder(*arguments, **keywords)
    sizes = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]
    options, signature, constants, attributes = function._pack_args(backend, keywords, bound, specialization, options)
    parameters = bytearray()
    pack(signature.values(), bound.values(), parameters)

    def build() -> tuple[Binary, int]:
        source = function.ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
        return disassemble(compiled.asm["cubin"]), compiled.metadata.shared

    name = function.fn.__name__
    return Launch(
        name,
        f"{name} {sizes} {options} {signature} {constants} {attributes}",
        size_of(tensors_of(list(bound.values()))),
        sizes,
        options.num_warps,
        bytes(parameters),
        build,
        bound.get("BLOCK_N", 1),
    )


@contextlib.contextmanager
def recording(configuration: int = 0) -> Iterator[list[Launch]]:
    """Within it operators run on the missing device; their launches come into the list.

    Args:
        configuration: which of a kernel's configurations is launched, where it has several.
    """
    found: list[Launch] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        found.append(record_triton(self, arguments, keywords, grid))

    def choose(kernel: str, key: Any, configurations: Sequence[Any], run: Any, on_cpu: bool = False) -> Any:
        return configurations[min(configuration, len(configurations) - 1)]

    def call(self: Operator, call: Any, backend: str = "auto") -> Any:
        wanted = "triton" if backend == "auto" else backend
        named = {each.name: each for each in self.implementations}
        return named.get(wanted, self.implementations[-1]).run(call)

    with contextlib.ExitStack() as stack:
        kernels = importlib.import_module("fastvit.kernels")
        names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
        modules = [importlib.import_module(f"fastvit.kernels.{name}") for name in names]
        device = {
            "chip": lambda *_: 9,
            "shared_limit": lambda *_: SHARED_LIMIT,
            "gluon_runs": lambda *_: True,
        }
        for module in modules:
            for name in device.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, device[name]))
        stack.enter_context(mock.patch("fastvit.autotune.choose", choose))
        stack.enter_context(mock.patch("fastvit.autotune.multiprocessors", return_value=MULTIPROCESSORS))
        stack.enter_context(mock.patch.object(backends, "TRITON_INTERPRETED", True))  # takes tensors on the CPU
        stack.enter_context(mock.patch.object(backends, "REQUESTED", frozenset(backends.GPU_KERNELS)))
        projections = importlib.import_module("fastvit.ops.conv_projection")
        stack.enter_context(mock.patch.dict(projections._HAS_TOGETHER, cpu=True))  # in CUDA
        stack.enter_context(mock.patch.object(Operator, "__call__", call))
        stack.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(_Library(found))
        yield found
