"""Registered operators: one list of arguments gives the torch schema, the fake kernel's view of it and the packing.

A list of arguments is the text of a torch schema, "Tensor x, Tensor? bias, int stride". :func:`define` registers it and
returns the operator with a NamedTuple type of the same fields, so that nobody counts positions.
"""

from __future__ import annotations

import importlib
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.ops._operator import FusedExport
from fastvit.reference.functional import BatchNorm

__all__ = [
    "ACTIVATION_CODES",
    "GATE_CODES",
    "NO_NORM",
    "REGISTERED",
    "Registered",
    "adjacent_channels",
    "define",
    "heads_last",
    "launch",
    "norm_arguments",
    "unpack",
]

ACTIVATION_CODES = {None: 0, "gelu": 1, "quick_gelu": 2, "silu": 3, "relu": 4, "gelu_tanh": 5}
"""csrc's enum Activation."""

GATE_CODES = ACTIVATION_CODES | {"sigmoid": 6}
"""The same, of gates."""


class Registered(NamedTuple):
    """A registered operator, and the type of its arguments.

    ``eager`` is what ``call``, an ``OpOverload``, calls: half a microsecond sooner, but Dynamo cannot trace it.
    """

    call: Callable[..., Any]
    eager: Callable[..., Any]
    Arguments: type[Any]


REGISTERED: dict[str, Registered] = {}
"""Every registered operator by name."""


def define(name: str, arguments: str, returns: str, fake: Callable[[Any], Any]) -> Registered:
    """Define ``fastvit::name`` with a fake kernel.

    Args:
        arguments, returns: as in a torch schema: "Tensor q, Tensor? mask, float scale" and "(Tensor, Tensor)".
        fake: takes the arguments as one NamedTuple; gives empty results.
    """
    torch.library.define(f"fastvit::{name}", f"({arguments}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    fields = [argument.split()[1] for argument in arguments.split(", ")]
    record = namedtuple(name, fields)  # type: ignore[misc]

    def run_fake(*values: Any) -> Any:
        FusedExport.calls += FusedExport.wanted
        # One tensor on meta brings a call with others here, which would be answered with uninitialised memory.
        for field, value in zip(fields, values, strict=True):
            if isinstance(value, Tensor) and value.device != values[0].device:
                raise RuntimeError(f"{name}: {field} is on {value.device}, {fields[0]} is on {values[0].device}")
        return fake(record(*values))

    torch.library.register_fake(f"fastvit::{name}", run_fake)
    overload = getattr(torch.ops.fastvit, name).default
    REGISTERED[name] = Registered(overload, overload._op, record)
    return REGISTERED[name]


def launch(name: str, module: str, function: str, on_tokens: bool = False) -> None:
    """Let ``fastvit.kernels.<module>.<function>`` run ``fastvit::name``, on GPUs and in Triton's interpreter.

    The module is imported by the first call, since it imports Triton.

    Args:
        on_tokens: make every tensor contiguous that is not one of tokens (B, N, C), and give the function all arguments
            as one NamedTuple, since they are many.
    """

    @torch.library.impl(f"fastvit::{name}", ("cpu", "cuda"))
    def run(*arguments: Any) -> Any:
        run_kernels = getattr(importlib.import_module(f"fastvit.kernels.{module}"), function)
        if not on_tokens:
            return run_kernels(*arguments)
        dense = (a.contiguous() if isinstance(a, Tensor) and a.dim() != 3 else a for a in arguments)
        return run_kernels(REGISTERED[name].Arguments(*dense))


# --- Norms in a schema ----------------------------------------------------------------------------------------------


def norm_arguments(name: str, batch: bool = False) -> str:
    """The arguments of a BatchNorm; ``batch``: with a flag that asks for the statistics of the batch."""
    tensors = ", ".join(f"Tensor? {name}_{field}" for field in ("weight", "bias", "mean", "var"))
    return f"{tensors}, float {name}_eps" + (f", bool {name}_batch" if batch else "")


NO_NORM = BatchNorm(None, None, None, None, use_batch_stats=False, eps=0.0)
"""For the arguments of a norm that is absent."""


def unpack(norm: BatchNorm | None) -> tuple[Any, ...]:
    """The values for :func:`norm_arguments` of a BatchNorm that uses its running statistics."""
    norm = norm or NO_NORM
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps


def adjacent_channels(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) in this dtype with stride 1 along the last axis, as the attention kernels read it."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    # Not contiguous(), which leaves the strides of an empty tensor as they are.
    return tensor if tensor.stride(3) == 1 else tensor.clone(memory_format=torch.contiguous_format)


# --- Fakes ----------------------------------------------------------------------------------------------------------


def heads_last(like: Tensor) -> Tensor:
    """Uninitialised, of like's shape (B, H, N, D), in the memory order of (B, N, H, D)."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
