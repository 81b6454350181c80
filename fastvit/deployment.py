"""Deployment without Python: ``torch.export`` with the operators kept, and what AOTInductor is to know of them.

A graph cannot hold a packed weight, whose layout is that of the CPU it was packed on. So it packs the weights itself
(``fastvit::pack_constant``), and AOTInductor makes that part of the graph one that runs when the model first runs, and
again when its constants are updated.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastvit import backends
from fastvit.ops._operator import FusedExport

__all__ = ["exporting", "inductor_configs", "operator_library"]


@contextlib.contextmanager
def exporting(*, fused: bool = True) -> Iterator[None]:
    """Say whether ``torch.export.export`` keeps the operators of patched models; elsewhere it takes the plain path.

    For inference on the CPU: within it no gradients are recorded, and each operator is the C++ one. Which product or
    kernel is the fastest is not measured.

    Args:
        fused: False exports the plain path, as is done without this.

    Raises:
        RuntimeError: fastvit's native part is missing; and, in the call of ``torch.export.export``, an operator or a
            module cannot be kept: it says which, and why.
    """
    if not fused:
        before, FusedExport.wanted = FusedExport.wanted, False
    else:
        if reasons := backends.cpp_reasons():
            raise RuntimeError(f"fastvit.exporting(fused=True): {'; '.join(reasons)}")
        before, FusedExport.wanted, FusedExport.calls = FusedExport.wanted, True, 0
    try:
        with torch.no_grad() if fused else contextlib.nullcontext():
            yield
        if fused and not FusedExport.calls:
            warnings.warn(
                "fastvit.exporting(fused=True): no operator of fastvit was exported; was the model patched?",
                stacklevel=3,
            )
    finally:
        FusedExport.wanted = before


_PACKED_WEIGHT = """int32_t fastvit_shims();
static inline AOTITorchError aoti_torch_cpu_pack_constant(AtenTensorHandle weight, AtenTensorHandle* packed) {
  AtenTensorHandle owned = nullptr;
  AOTITorchError error = aoti_torch_new_tensor_handle(weight, &owned);
  if (error != 0) return error;
  StableIValue stack[1] = {reinterpret_cast<StableIValue>(owned)};
  error = aoti_torch_call_dispatcher("fastvit::pack_constant", "", stack);
  if (error == 0) *packed = reinterpret_cast<AtenTensorHandle>(stack[0]);
  return error;
}"""
"""A C function in the code that AOTInductor writes, behind "extern": torch 2.13 finds no other way from its part for
constants to an operator of somebody else's."""


def inductor_configs() -> dict[str, Any]:
    """What ``torch._inductor.aoti_compile_and_package(..., inductor_configs=...)`` is to be given for a fused program.

    With it weights are packed when the compiled model first runs, and again after its constants were updated; without,
    at each call.
    """
    return {
        "aot_inductor.use_runtime_constant_folding": True,
        "aot_inductor.custom_ops_to_c_shims": {torch.ops.fastvit.pack_constant.default: [_PACKED_WEIGHT]},
    }


def operator_library() -> Path:
    """The shared library that gives a process without Python the operators of a fused program, once it is loaded.

    Raises:
        RuntimeError: fastvit's native part is missing.
    """
    path = Path(__file__).with_name("libfastvit.dylib" if sys.platform == "darwin" else "libfastvit.so")
    if not path.is_file():
        reasons = backends.cpp_reasons() or [f"{path} is missing: rebuild fastvit"]
        raise RuntimeError(f"fastvit.deployment.operator_library: {'; '.join(reasons)}")
    return path
