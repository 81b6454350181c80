"""Blocks of libraries that run whole at inference: how many calls they are, and that whoever meddles with a part is
heard.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fastvit.ops._operator import recording
from fastvit.patching import patch, unpatch
from tests.helpers import CallCounter, assert_as_accurate, on_pooled_draws
from tests.patching.test_blocks import MEDDLING, MOST_CALLS, needs_cpp
from tests.tiny import shake

WIDTH, HEADS, HIDDEN, TOKENS = 48, 4, 96, 17


def _torchvision() -> nn.Module:
    library = pytest.importorskip("torchvision.models.vision_transformer")
    return library.EncoderBlock(HEADS, WIDTH, HIDDEN, 0.0, 0.0)


def _timm() -> nn.Module:
    library = pytest.importorskip("timm.models.vision_transformer")
    return library.Block(WIDTH, HEADS, HIDDEN // WIDTH, qkv_bias=True, init_values=0.5)


def _transformers(family: str, layer: Callable[[Any], Any]) -> nn.Module:
    library = pytest.importorskip("transformers")
    if int(library.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has its MLP in two modules")
    config = getattr(library, f"{family}Config")(
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=HIDDEN, attn_implementation="sdpa"
    )
    return layer(library)(config)


def _vit() -> nn.Module:
    return _transformers("ViT", lambda library: library.models.vit.modeling_vit.ViTLayer)


def _deit() -> nn.Module:
    return _transformers("DeiT", lambda library: library.models.deit.modeling_deit.DeiTLayer)


def _vit_pytorch(module: str, **options: Any) -> nn.Module:
    pytest.importorskip("vit_pytorch")
    library = pytest.importorskip(f"vit_pytorch.{module}")
    sizes = {"dim": WIDTH, "depth": 1, "heads": HEADS, "dim_head": 12, "mlp_dim": HIDDEN}
    return library.Transformer(**sizes | options)


class Library(NamedTuple):
    """How a block is built, its calls fused, and those of its parts that give a tensor and may be meddled with."""

    build: Callable[[], nn.Module]
    calls: int
    parts: tuple[str, ...]
    ops: tuple[str, ...] = ("linear", "masked_attention", "linear", "mlp")


_OF_VIT_PYTORCH = ("norm", "layers.0.0", "layers.0.0.norm", "layers.0.0.to_qkv", "layers.0.0.attend")
_OF_VIT_PYTORCH += (
    "layers.0.0.to_out",
    "layers.0.1",
    "layers.0.1.net",
    "layers.0.1.net.0",
    "layers.0.1.net.1",
    "layers.0.1.net.2",
)
_OF_TRANSFORMERS = ("layernorm_before", "layernorm_after", "dropout", "mlp", "mlp.fc1", "mlp.fc2", "mlp.activation_fn")
_OF_TRANSFORMERS += ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
LIBRARIES = {
    "torchvision": Library(
        _torchvision, 8, ("ln_1", "ln_2", "dropout", "mlp", "mlp.0", "mlp.1", "mlp.2", "mlp.3", "mlp.4")
    ),
    "timm": Library(
        _timm,
        8,
        (
            *("norm1", "norm2", "ls1", "ls2", "drop_path1", "attn.qkv", "attn.proj", "attn.proj_drop"),
            *("attn.q_norm", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop1"),
        ),
    ),
    "transformers_vit": Library(
        _vit, 10, _OF_TRANSFORMERS, (*["linear"] * 3, "masked_attention", "linear", "mlp")
    ),
    "transformers_deit": Library(
        _deit, 10, _OF_TRANSFORMERS, (*["linear"] * 3, "masked_attention", "linear", "mlp")
    ),
    "vit_pytorch": Library(
        lambda: _vit_pytorch("vit"), 9, (*_OF_VIT_PYTORCH, "layers.0.0.to_out.0", "layers.0.0.to_out.1")
    ),
    "vit_pytorch_simple": Library(lambda: _vit_pytorch("simple_vit"), 9, _OF_VIT_PYTORCH),
    "vit_pytorch_unprojected": Library(
        lambda: _vit_pytorch("vit", heads=1, dim_head=WIDTH), 9, _OF_VIT_PYTORCH, ("linear", "masked_attention", "mlp")
    ),
    "vit_pytorch_deepvit": Library(
        lambda: _vit_pytorch("deepvit"), 9, (*_OF_VIT_PYTORCH[1:4], *_OF_VIT_PYTORCH[5:]),
        ("linear", "head_mixed_attention", "linear", "mlp"),
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", LIBRARIES)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    block = shake(LIBRARIES[name].build()).eval().to(dtype)
    return block, torch.randn(4, TOKENS, WIDTH, dtype=dtype)


def ops_of(block: nn.Module, *args: Tensor) -> tuple[str, ...]:
    """The operators that a call of a block is made of."""
    choices: list[str] = []
    with torch.no_grad(), recording(lambda selection: choices.append(selection.op)):
        block(*args)
    return tuple(choices)


@needs_cpp
@EACH
def test_a_block_is_few_calls(name, monkeypatch):
    linear = sys.modules["fastvit.ops.linear"]
    monkeypatch.setattr(linear, "_FASTER", {})
    monkeypatch.setattr(linear.autotune, "choose", lambda *_, **__: ("cpp",))
    block, x = make(name)
    patch(block, backend="cpp")
    with torch.no_grad():
        block(x)
        with CallCounter() as counted:
            block(x)
    assert len(counted.names) == LIBRARIES[name].calls <= MOST_CALLS, counted.names
    assert ops_of(block, x) == LIBRARIES[name].ops


@pytest.mark.parametrize("when", ["before_patch", "after_patch", "after_calls"])
@pytest.mark.parametrize("kind", MEDDLING)
@EACH
def test_whoever_meddles_with_a_part_is_heard(name, kind, when):
    original, x = make(name)
    for part in LIBRARIES[name].parts:
        logs: tuple[list[str], list[str]] = ([], [])
        plain, block = copy.deepcopy(original), copy.deepcopy(original)
        MEDDLING[kind](plain, part, logs[0])
        if when == "before_patch":
            MEDDLING[kind](block, part, logs[1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing may be left to fuse
                patch(block)
        else:
            patch(block)
            if when == "after_calls":  # which are replayed from the second one on
                with torch.no_grad():
                    for _ in range(3):
                        block(x)
            MEDDLING[kind](block, part, logs[1])
        with torch.no_grad():
            expected, got = plain(x), block(x)
        assert logs[0] == logs[1], part
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize(("name", "part"), [("torchvision", "self_attention"), ("transformers_vit", "attention")])
def test_hooks_of_an_attention_that_gives_a_pair_are_called(name, part):
    original, x = make(name)
    found = []
    for block in (original, patch(copy.deepcopy(original))):
        block.get_submodule(part).register_forward_hook(lambda module, args, output: (output[0] * 1.5, output[1]))
        with torch.no_grad():
            found.append(block(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(found[0], make(name)[0](x))


@EACH
def test_hooks_for_all_modules_are_heard(name):
    original, x = make(name)
    heard: list[list[str]] = []
    for block in (original, patch(copy.deepcopy(original))):
        names, called = {module: part for part, module in block.named_modules()}, []
        hook = register_module_forward_hook(lambda module, *_, to=called, names=names: to.append(names[module]))
        try:
            with torch.no_grad():
                block(x)
        finally:
            hook.remove()
        heard.append(called)
    assert heard[0] == heard[1]
    assert set(LIBRARIES[name].parts) <= set(heard[0])


@EACH
def test_what_trains_runs_by_its_parts(name):
    block, x = make(name)
    patch(block)
    whole = ops_of(block, x)
    assert whole == LIBRARIES[name].ops
    assert block(x).requires_grad
    for part in LIBRARIES[name].parts:
        module = block.get_submodule(part)
        if isinstance(module, nn.Dropout):
            module.p = 0.5
            with torch.no_grad():
                expected = block(x)
                module.train()
                assert not torch.equal(block(x), expected), part
                module.eval()
    assert ops_of(block, x) == whole


def _masks(name: str) -> Iterator[tuple[Tensor, ...]]:
    yield ()
    if name.startswith("transformers"):
        visible = torch.rand(4, 1, TOKENS, TOKENS) < 0.6
        visible[..., 0] = True
        yield (visible,)
        yield (torch.where(visible, 0.0, -100.0),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@EACH
def test_results(name, dtype):
    def check() -> None:
        plain, x = make(name, dtype)
        block, exact = patch(copy.deepcopy(plain)), copy.deepcopy(plain).double()
        for given in _masks(name):
            given = [mask.to(dtype) if mask.is_floating_point() else mask for mask in given]
            wide = [mask.double() if mask.is_floating_point() else mask for mask in given]
            for each in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
                assert_as_accurate(block(each, *given), plain(each, *given), exact(each.double(), *wide))

    with torch.no_grad():
        on_pooled_draws(check)


@EACH
def test_gradients_and_unpatch(name):
    plain, x = make(name)
    block = patch(copy.deepcopy(plain))
    weights = torch.randn_like(x)
    for each in (plain, block):
        (each(x) * weights).sum().backward()
    for (path, got), expected in zip(block.named_parameters(), plain.parameters(), strict=True):
        size = expected.grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(got.grad / size, expected.grad / size, rtol=1e-4, atol=1e-4, msg=path)
    with torch.no_grad():
        assert torch.equal(unpatch(block)(x), plain(x))


@EACH
def test_torch_compile_takes_blocks_whole(name):
    block, x = make(name)
    patch(block)
    with torch.no_grad():
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
