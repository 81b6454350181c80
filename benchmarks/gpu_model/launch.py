"""What a launch of a kernel is, and the tensors it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from benchmarks.gpu_model.machine_code import Binary


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        parameters: as they lie in the kernel's constant bank.
        traffic: bytes of its tensors, each counted once.
        build: compiles it; gives the code, and the bytes of shared memory of a block. None for a kernel of torch's.
        block: keys in a tile of attention.
        thread: of the first block, whose warp is executed.
        flops: of a product of the library's.
        key: equal for launches of the same code with the same sizes.
    """

    kernel: str
    key: str
    traffic: int
    grid: tuple[int, int, int] = (1, 1, 1)
    warps: int = 0
    parameters: bytes = b""
    build: Callable[[], tuple[Binary, int]] | None = None
    block: int = 1
    thread: int = 0
    flops: int = 0


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; equal ones and what is broadcast once."""
    found = {}
    for tensor in tensors:
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        found[tensor.data_ptr(), tuple(tensor.shape)] = math.prod(sizes) * tensor.element_size()
    return sum(found.values())


def leaves_of(values: Any) -> Iterator[Any]:
    """What nested tuples, lists and dictionaries hold."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from leaves_of(value)
    elif isinstance(values, dict):
        yield from leaves_of(list(values.values()))
    else:
        yield values


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in leaves_of(values) if isinstance(value, Tensor)]
