"""What measures and takes models apart sees of a patched model: FLOP counters, profilers, symbolic tracing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastvit
from fastvit import backends, ops
from fastvit.ops import _flops, _schema
from tests.tiny import FAMILIES, TIMM, build, images

NEEDS_CPP = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


def _flops_of(model: nn.Module, x: Tensor, backward: bool) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(x)
        if backward:
            sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    return counter.get_total_flops()


def _more_in_a_patched(name: str, model: nn.Module, x: Tensor, training: bool) -> range:
    """FLOPs that a patched model spends beyond the plain one."""
    if name == "ceit" and not training:  # the class token goes through the linear layers of a LeFF with the others
        return range(
            *(
                lambda more: (more, more + 1)
            )(sum(4 * x.shape[0] * block.leff.conv1.weight.numel() for block in model.blocks))
        )
    if name == "deepvit" and training:  # products of H x H numbers
        return range(len(model.blocks) * 32 * model.blocks[0].attn.num_heads ** 3)
    return range(1)


@NEEDS_CPP
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_a_patched_model_has_the_flops_of_the_plain_one(name, training):
    model, x = build(name).train(training), images(name)
    with torch.set_grad_enabled(training):
        plain = _flops_of(model, x, training)
        fastvit.patch(model)
        counted = _flops_of(model, x, training)
    assert counted - plain in _more_in_a_patched(name, model, x, training)
