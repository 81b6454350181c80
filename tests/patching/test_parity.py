"""A patched model gives what the plain one gives: every family, timm's models, each dtype, eval and training."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops._operator import recording
from fastvit.patching import explain, patch, report, unpatch
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.patching.fused_and_plain import check_inference, check_training, training_step
from tests.tiny import FAMILIES, TIMM, build, images

EVERY = (*FAMILIES, *TIMM)
FUSED = {
    "vit": {"linear": 2, "conv_batch_norm": 1, "masked_attention": 2, "mlp": 2},
    "deit": {"linear": 2, "conv_batch_norm": 1, "masked_attention": 2, "mlp": 2},
    "deepvit": {"linear": 2, "conv_batch_norm": 1, "head_mixed_attention": 2, "mlp": 2},
    "cait": {"linear": 2, "conv_batch_norm": 1, "head_mixed_attention": 2, "class_attention": 2, "mlp": 4},
    "cpvt": {"linear": 2, "conv_batch_norm": 1, "masked_attention": 2, "token_depthwise_conv": 1, "mlp": 2},
    "cvt": {"linear": 3, "conv_batch_norm": 3, "masked_attention": 3, "conv_projection": 9, "mlp": 3},
    "ceit": {"linear": 2, "conv_batch_norm": 2, "masked_attention": 2, "class_attention": 1, "leff": 2, "mlp": 1},
    "twins_pcpvt": {"linear": 4, "conv_batch_norm": 4, "masked_attention": 4, "token_depthwise_conv": 4, "mlp": 4},
    "timm_vit": {"linear": 2, "masked_attention": 2, "mlp": 2},
    "timm_vit_qk_norm": {"masked_attention": 2, "mlp": 2},
    "timm_deit_distilled": {"linear": 2, "masked_attention": 2, "mlp": 2},
    "timm_cait": {"head_mixed_attention": 2, "class_attention": 2, "mlp": 4},
    "timm_deit3": {"linear": 2, "masked_attention": 2, "mlp": 2},
    "timm_beit": {"masked_attention": 2, "mlp": 2},
    "timm_beit_shared": {"masked_attention": 2, "mlp": 2},
    "timm_relpos": {"masked_attention": 2, "mlp": 4},
    "timm_twins": {"masked_attention": 4, "mlp": 4, "token_depthwise_conv": 4},
    "timm_twins_svt": {"masked_attention": 5, "mlp": 5, "token_depthwise_conv": 4},
}
"""Blocks each tiny model has."""


@pytest.fixture(autouse=True)
def _own_products(monkeypatch):
    """Linear layers by our own kernel on every machine that has it, few rows or not."""
    if not backends.cpp_reasons():
        linear = sys.modules["fastvit.ops.linear"]
        monkeypatch.setattr(linear, "CPP_MIN_ROWS", 1)


@pytest.mark.parametrize("name", EVERY)
def test_every_block_is_fused_and_called(name):
    model = patch(build(name))
    totals = report(model).totals()
    assert totals == {op: (count, count) for op, count in FUSED[name].items()}
    patched = {row.name: row.op for row in report(model).rows if row.status == "patched"}
    told = explain(model, images(name)).rows
    blocks = {row for row, op in patched.items() if op == "linear"}
    assert blocks <= {row.name for row in told}
    choices = [row for row in told if row.op != "linear"]
    # A block that runs whole calls its MLP's operator itself, timm's its attention's as well.
    part = {"mlp": "mlp", "leff": "leff", "masked_attention": "attn"}
    whole = [row for row in choices if row.name in blocks and row.op == "conv_batch_norm"]  # of PCPVT
    single = [row for row in choices if row.op != "conv_projection" and row not in whole]
    called = [f"{row.name}.{part[row.op]}" if row.name in blocks else row.name for row in single]
    joined = [row.name for row in choices if row.op == "conv_projection"]
    called += [f"{attention}.conv_proj_{part}" for attention in joined for part in "qkv"]
    assert sorted(called) == sorted(patched.keys() - blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*EVERY, "deepvit_cnn"])
def test_inference(name, dtype):
    check_inference(build(name), images(name, batch=3), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*EVERY, "deepvit_cnn"])
def test_training(name, dtype):
    on_pooled_draws(lambda: check_training(build(name), images(name, batch=3), dtype))


@pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
@pytest.mark.parametrize("name", ["deepvit", "cait", "timm_cait"])
def test_head_mixing_is_fused_in_training_too(name):
    model, choices = patch(build(name)).train(), []
    with recording(choices.append):
        training_step(model, images(name))
    assert [choice.backend for choice in choices if choice.op == "head_mixed_attention"] == ["cpp", "cpp"]


@pytest.mark.parametrize("name", ["vit", "deepvit", "cait", "cpvt", "cvt", "ceit"])
def test_masks(name):
    plain, x = build(name), images(name)
    with torch.no_grad():
        tokens = {"cvt": 144, "ceit": 16}.get(name, 16)
        mask = torch.rand(2, tokens) < 0.7
        mask[1] = False
        oracle = copy.deepcopy(plain).double()(x.double(), mask)
        expected = plain(x, mask)
        assert not torch.equal(expected, plain(x))
        assert_as_accurate(patch(plain)(x, mask), expected, oracle)


@pytest.mark.parametrize("kind", ["bool", "bool_2d", "additive", "causal"])
def test_timm_attention_masks(kind):
    block = build("timm_vit").blocks[0].attn
    x = torch.randn(2, 6, 48)
    bool_mask = torch.rand(2, 1, 6, 6) < 0.6
    bool_mask[..., 0] = True
    options = {
        "bool": {"attn_mask": bool_mask},
        "bool_2d": {"attn_mask": bool_mask[0, 0]},
        "additive": {"attn_mask": torch.randn(6, 6)},
        "causal": {"is_causal": True},
    }[kind]
    with torch.no_grad():
        expected = block(x, **options)
        oracle = copy.deepcopy(block).double()(x.double(), **{k: _double(v) for k, v in options.items()})
        assert_as_accurate(patch(block, strict=True)(x, **options), expected, oracle)
        block.fused_attn = False
        assert_as_accurate(block(x, **options), unpatch(block)(x, **options), oracle)


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", ["timm_vit", "timm_cait", "vit", "cait"])
def test_attention_dropout_drops_in_training_only(name):
    model, x = build(name), images(name)
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.5
    patch(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_autocast():
    for name in ("vit", "cait", "ceit", "timm_vit", "timm_cait", "timm_twins"):
        plain, x = build(name), images(name)
        oracle = copy.deepcopy(plain).double()(x.double())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = plain(x)
            got = patch(plain)(x)
        assert got.dtype == expected.dtype
        assert_as_accurate(got, expected, oracle, name=name)
