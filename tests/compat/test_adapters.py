"""Layers that others wrap, quantise, parametrise or watch after or before ``patch`` are called, not read past."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastvit.ops._operator import Selection, recording
from fastvit.patching import is_patched, patch, report, unpatch
from fastvit.patching.fusion import Fused
from tests.tiny import FAMILIES, build, images

TIMM = ("timm_vit", "timm_cait", "timm_twins")
EVERY = (*FAMILIES, *TIMM)
PROJECTIONS = {"cvt": "proj_q", "twins_pcpvt": "q", "timm_twins": "q"}
"""What stands for ``qkv`` where a family has no such layer."""


def _inside_fused_blocks(model: nn.Module, cls: type[nn.Module]) -> list[str]:
    """Names of the layers of this class that fused blocks hold."""
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, Fused)
        for part, layer in module.named_modules()
        if type(layer) is cls
    ]


def test_a_hook_that_wants_the_attention_map_keeps_it():
    pytest.importorskip("timm")
    model, x = build("timm_vit"), images("timm_vit")
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
    handle = model.blocks[0].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    patch(model)
    rows = {row.name: row for row in report(model).rows}
    reasons = ("attn_drop has forward hooks, which the fused path would not call",)
    assert rows["blocks.0.attn"].reasons == reasons
    assert rows["blocks.0"].reasons == ("attn is not fused",)
    assert rows["blocks.0.mlp"].status == rows["blocks.1"].status == "patched"
    # One that comes after patch is served as well: the block then runs its own forward.
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    expected = model(x)
    assert [tuple(attention.shape) for attention in maps] == [(2, 4, 17, 17)] * 2
    handle.remove()
    torch.testing.assert_close(patch(model, filter_fn=lambda module, name: "0" in name)(x), expected)


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_a_backward_hook_on_what_the_fused_path_reads_is_called(first):
    pytest.importorskip("timm")
    model, x = build("timm_cait"), images("timm_cait")
    if first == "patch":
        patch(model)
    called = []
    model.blocks[0].attn.proj_l.register_full_backward_hook(lambda *_: called.append("proj_l"))
    if first == "hook":
        patch(model)
        assert report(model).rows[0].reasons == ("proj_l has backward hooks, which the fused path would not call",)
    model(x).sum().backward()
    assert called == ["proj_l"]


class _LowRank(nn.Linear):
    """A linear with an adapter, as LoRA makes them."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize(
    ("name", "part"),
    [("vit", "qkv"), ("cait", "proj_l"), ("timm_vit", "qkv"), ("timm_cait", "qkv"), ("timm_cait", "proj_l")],
)
def test_adapters_are_called_whichever_comes_first(name, part, first):
    model, x = build(name), images(name)
    without = model(x)
    if first == "patch":
        patch(model)
    attention = model.blocks[0].attn
    setattr(attention, part, _LowRank(getattr(attention, part)))
    if first == "adapter":
        patch(model)
    assert isinstance(attention, Fused) == (part == "qkv" or first == "patch")
    got = model(x)
    assert not torch.allclose(got, without)
    torch.testing.assert_close(got, unpatch(model)(x))
    model.zero_grad()
    model(x).sum().backward()
    assert getattr(attention, part).up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize("name", EVERY)
def test_lora_by_peft(name, first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain, x = build(name), images(name)
    inside = _inside_fused_blocks(patch(copy.deepcopy(plain)), nn.Linear)
    targets = inside or [f"blocks.0.0.attn.{PROJECTIONS[name]}"]  # timm's Twins: no attention is fused, but its PEG
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    model = patch(plain) if first == "patch" else plain
    adapted = peft.get_peft_model(model, config)
    patch(adapted)
    assert is_patched(adapted)
    with torch.no_grad():
        got = adapted(x)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(x), got)
    adapted(x).sum().backward()
    gradients = {key: value.grad for key, value in adapted.named_parameters() if value.requires_grad}
    assert {key for key in gradients if "lora" in key} == set(gradients)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    with torch.no_grad():
        torch.testing.assert_close(unpatch(adapted)(x), got)
        torch.testing.assert_close(patch(adapted.merge_and_unload())(x), got, rtol=1e-4, atol=1e-5)


def test_lora_by_peft_on_convolutions_run_as_linears():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = patch(build("ceit")), images("ceit")
    without = model(x)
    config = peft.LoraConfig(
        target_modules=["blocks.0.leff.conv1", "blocks.0.leff.conv3"], r=2, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    got = adapted(x)
    assert not torch.allclose(got, without)
    got.sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in adapted.parameters() if value.requires_grad)
    torch.testing.assert_close(patch(adapted.merge_and_unload())(x), got, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
@pytest.mark.parametrize("first", ["quantise", "patch"])
@pytest.mark.parametrize("name", EVERY)
def test_int8_weights_by_torchao(name, first):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain, x = build(name), images(name)
    fused = copy.deepcopy(plain)
    if first == "patch":
        patch(fused)
    for model in (plain, fused):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if first == "quantise":
        patch(fused)
    for row in report(fused).rows:
        if row.op == "head_mixed_attention" and "cait" in name and first == "quantise":
            assert "proj_l has a Int8Tensor for weight, which kernels cannot read" in row.reasons
        elif row.op == "mlp" and first == "quantise":
            assert "fc1 has a Int8Tensor for weight, which kernels cannot read" in row.reasons
        elif row.op == "linear" and row.status == "skipped" and first == "quantise":  # a block with such parts
            assert all(reason.endswith("is not fused") for reason in row.reasons)
        elif row.op is not None:
            assert row.status == "patched"
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unpatch(fused)(x), plain(x), rtol=0, atol=0)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("first", ["parametrise", "patch"])
@pytest.mark.parametrize("name", EVERY)
def test_parametrised_linears(name, first):
    model, x = build(name), images(name)
    names = _inside_fused_blocks(patch(copy.deepcopy(model)), nn.Linear)
    without = model(x)
    if first == "patch":
        patch(model)
    for target in names or ["blocks.0.0.attn.q"]:
        parametrize.register_parametrization(model.get_submodule(target), "weight", _Doubled())
    if first == "parametrise":
        patch(model)
    with torch.no_grad():
        got = model(x)
        assert not torch.allclose(got, without)
        torch.testing.assert_close(got, unpatch(model)(x), rtol=1e-4, atol=1e-5)


def test_parametrisations_on_what_the_fused_path_reads_take_the_plain_path():
    pytest.importorskip("timm")
    model, x = build("timm_cait"), images("timm_cait")
    patch(model)
    parametrize.register_parametrization(model.blocks[0].attn.proj_l, "weight", _Doubled())
    got = model(x)
    torch.testing.assert_close(got, unpatch(model)(x))
    patch(model)
    assert report(model).rows[0].reasons == ("proj_l is ParametrizedLinear, expected is exactly Linear",)


@pytest.mark.parametrize("name", ["deepvit", "deepvit_cnn", "cvt", "ceit"])
def test_synchronised_batch_norm_trains(name):
    """In a single process it is a plain one."""
    plain, x = build(name), images(name)
    expected = copy.deepcopy(plain).train()
    expected(x)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(patch(copy.deepcopy(plain)))
    fused.train()(x)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(expected.named_buffers()))
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), expected.eval()(x))
        assert patch(fused, verify=x) is fused
        # At inference it is folded, in blocks that run whole, as a BatchNorm is.
        chosen: list[list[Selection]] = [[], []]
        for model, found in zip((fused, patch(plain)), chosen, strict=True):
            with recording(found.append):
                model.eval()(x)
        assert chosen[0] == chosen[1]


def test_what_stands_in_for_a_batch_norm_is_called():
    plain, x = build("ceit"), images("ceit")
    fused = patch(copy.deepcopy(plain))
    for model in (plain, fused):
        for block in model.blocks:
            block.leff.bn1 = _Frozen(block.leff.bn1)
            block.leff.bn2 = nn.Identity()
    for training in (False, True):
        with torch.no_grad():
            torch.testing.assert_close(fused.train(training)(x), plain.train(training)(x))


class _Frozen(nn.Module):
    """A BatchNorm that never looks at the batch, as detection models have them."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.shift = norm.bias.detach() - norm.running_mean * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None] + self.shift[:, None, None]
