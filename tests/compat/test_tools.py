"""What measures and dissects models sees of a patched one: FLOP counters, profilers, symbolic tracing."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastvit import backends, ops
from fastvit.ops._schema import REGISTERED
from fastvit.patching import patch, unpatch
from tests.helpers import HANG_GUARD
from tests.tiny import CLASSES, FAMILIES, TIMM, build, images, shake

NEEDS_CPP = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def _count(model: nn.Module, x: Tensor) -> int:
    """FLOPs of a forward, and of a backward where the model trains; torch's own attention as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(x)
        if model.training:
            sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    return counter.get_total_flops()


@NEEDS_CPP
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_a_patched_model_has_the_flops_of_the_plain_one(name, training):
    model, x = build(name).train(training).requires_grad_(training), images(name)
    plain = _count(model, x)
    more = _count(patch(model), x) - plain
    if name == "deepvit" and training:  # BatchNorms are folded by products of H x H numbers
        assert 0 <= more <= sum(16 * block.attn.num_heads**3 for block in model.blocks)
    else:
        assert more == 0
    assert plain > 0


def test_every_registered_operator_has_a_formula():
    assert {getattr(torch.ops.fastvit, name) for name in REGISTERED} <= flop_registry.keys()


_AT_ITS_IMPORT = """
import sys
import fastvit
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import flop_registry
import torch
assert torch.ops.fastvit.linear in flop_registry
assert not any(type(finder).__module__.startswith("fastvit") for finder in sys.meta_path)
"""
_BEFORE = """
from torch.utils.flop_counter import flop_registry
import sys
finders = list(sys.meta_path)
import fastvit, torch
assert torch.ops.fastvit.linear in flop_registry and sys.meta_path == finders
"""


@pytest.mark.parametrize("code", [_AT_ITS_IMPORT, _BEFORE], ids=["fastvit_first", "counter_first"])
def test_formulas_are_registered_whichever_is_imported_first(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_GUARD)


# --- Profiler -------------------------------------------------------------------------------------------------------


@NEEDS_CPP
def test_a_profile_names_the_operators():
    model, x = patch(build("cpvt")), images("cpvt")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(x)
    names = {event.key for event in profile.key_averages()}
    assert {"fastvit::masked_attention_cpp", "fastvit::token_depthwise_conv"} <= names


# --- Symbolic tracing -----------------------------------------------------------------------------------------------


def _torchvision() -> nn.Module:
    library = pytest.importorskip("torchvision.models.vision_transformer")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
    return shake(library.VisionTransformer(**sizes, num_classes=CLASSES)).eval()


def _traced(model: nn.Module, tool: str) -> fx.GraphModule:
    if tool == "fx":
        return fx.symbolic_trace(model)
    library = pytest.importorskip("timm.models" if tool == "timm" else "torchvision.models.feature_extraction")
    names = library.get_graph_node_names(model)[1]
    return library.create_feature_extractor(model, {name: name for name in names[len(names) // 2 :: 7]})


def _nodes(graph: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.graph.nodes]


def _model(name: str) -> nn.Module:
    return _torchvision() if name == "torchvision" else build(name)


@pytest.mark.parametrize("tool", ["fx", "torchvision", "timm"])
@pytest.mark.parametrize("name", [*FAMILIES, *TIMM, "torchvision"])
def test_a_patched_model_is_traced_as_the_plain_one(name, tool):
    """To the same graph, or refused in the same words."""
    plain = _model(name)
    patched = patch(copy.deepcopy(plain))
    try:
        graph = _traced(plain, tool)
    except fx.proxy.TraceError as error:
        with pytest.raises(fx.proxy.TraceError, match=re.escape(str(error))):
            _traced(patched, tool)
        assert name in FAMILIES or name == "timm_twins_svt"
        return
    again = _traced(patched, tool)
    assert _nodes(again) == _nodes(graph)
    unpatch(patched)  # modules that timm has not traced into are in the graph themselves
    right, got = graph(images(name)), again(images(name))
    assert_close(got, right, rtol=0.0, atol=0.0)


class _Mlp(nn.Module):
    """Its operators are called on what is traced, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return ops.linear(hidden, self.fc1.weight, None, "relu")


def test_linear_layers_are_traced_by_their_plain_form():
    module, x = _Mlp(), torch.randn(3, 4)
    graph = fx.symbolic_trace(module)
    assert "fastvit" not in graph.code
    assert torch.equal(graph(x), module(x))


def test_tracing_with_tensors_keeps_the_operators():
    """``make_fx`` records what runs: it has shapes, and no modules to show."""
    module = patch(build("vit")).blocks[0].attn
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        names = {str(node.target) for node in make_fx(module)(x).graph.nodes}
    assert backends.cpp_reasons() or "fastvit.masked_attention_cpp.default" in names
