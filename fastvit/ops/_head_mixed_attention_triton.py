"""Head-mixed attention by ``kernels/head_mixed_attention*.py`` and ``kernels/head_map_moments.py``.

Operators of their own beside those of the C++ kernels, since Triton's interpreter runs them on the CPU, too. The
kernels are imported when one first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.ops._head_mixed_attention_schemas import define_operators
from fastvit.ops._head_mixing import Engine

__all__ = ["ENGINE"]

define_operators("_triton")


@torch.library.impl("fastvit::head_mixed_attention_triton", ("cpu", "cuda"))
def _forward(*arguments: Any) -> Tensor:
    from fastvit.kernels.head_mixed_attention import head_mixed_attention_forward

    return head_mixed_attention_forward(*arguments)


@torch.library.impl("fastvit::head_mixed_attention_triton_backward", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastvit.kernels.head_mixed_attention_backward import head_mixed_attention_backward

    return head_mixed_attention_backward(*arguments)


@torch.library.impl("fastvit::head_map_moments_triton", ("cpu", "cuda"))
def _moments(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastvit.kernels.head_mixed_attention_moments import head_map_moments

    return head_map_moments(*arguments)


@torch.library.impl("fastvit::head_map_moments_triton_backward", ("cpu", "cuda"))
def _moments_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastvit.kernels.head_mixed_attention_moments import head_map_moments_backward

    return head_map_moments_backward(*arguments)


ENGINE = Engine(
    torch.ops.fastvit.head_mixed_attention_triton.default,
    torch.ops.fastvit.head_mixed_attention_triton_backward.default,
    torch.ops.fastvit.head_map_moments_triton.default,
    torch.ops.fastvit.head_map_moments_triton_backward.default,
)
