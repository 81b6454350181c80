"""vit-pytorch's models: parity with the plain ones, in their own layouts."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from fastvit.patching import explain, patch, report, unpatch
from fastvit.patching.matching import recognise
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.patching.fused_and_plain import check_inference, check_training
from tests.tiny import CLASSES, shake

pytest.importorskip("vit_pytorch")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ISOTROPIC = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES, "dim": 48, "depth": 2, "heads": 4}
PYRAMID = {"num_classes": CLASSES, "s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 48, "s3_depth": 1}
FUSED = {
    "vit": {"masked_attention": 2, "mlp": 2, "linear": 1},
    "simple_vit": {"masked_attention": 2, "mlp": 2, "linear": 1},
    "distillable_vit": {"masked_attention": 2, "mlp": 2, "linear": 1},
    "deepvit": {"head_mixed_attention": 2, "mlp": 2, "linear": 1},
    "cait": {"head_mixed_attention": 4, "mlp": 4},
    "cvt": {"masked_attention": 3, "conv_projection": 6},
    "twins_svt": {"token_depthwise_conv": 4, "masked_attention": 14},
}
OF_CONVOLUTIONS = {"cvt": 1, "twins_svt": 2}
"""MLPs of 1x1 convolutions whose input lies as tokens do, which the example shows; the others are torch's."""


def build(name: str, **options: float) -> nn.Module:
    from vit_pytorch import SimpleViT, ViT
    from vit_pytorch.cait import CaiT
    from vit_pytorch.cvt import CvT
    from vit_pytorch.deepvit import DeepViT
    from vit_pytorch.distill import DistillableViT
    from vit_pytorch.twins_svt import TwinsSVT

    windows = {f"s{stage}_{kind}": 2 for stage in (1, 2) for kind in ("local_patch_size", "global_k")}
    windows |= {f"s{stage}_{kind}": 1 for stage in (3, 4) for kind in ("local_patch_size", "global_k")}
    isotropic = {**ISOTROPIC, "mlp_dim": 96, "dim_head": 12}
    family, sizes = {
        "vit": (ViT, isotropic),
        "simple_vit": (SimpleViT, isotropic),
        "distillable_vit": (DistillableViT, isotropic),
        "deepvit": (DeepViT, isotropic),
        "cait": (CaiT, {**isotropic, "cls_depth": 2}),
        "cvt": (CvT, {**PYRAMID, "s2_depth": 1}),
        "twins_svt": (TwinsSVT, {**PYRAMID, **windows, "s4_emb_dim": 64, "s4_depth": 1}),
    }[name]
    return shake(family(**sizes, **options)).eval()


def images(name: str, batch: int = 2) -> Tensor:
    size = {"cvt": (32, 48), "twins_svt": (32, 64)}.get(name, (32, 32))
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def attention_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "attend") or hasattr(module, "reattn_norm"))


@pytest.mark.usefixtures("kernels_first")
@pytest.mark.parametrize("name", FUSED)
def test_every_block_is_fused_and_called(name):
    model = patch(build(name), verify=images(name))
    fused = FUSED[name] | ({"mlp": OF_CONVOLUTIONS[name]} if name in OF_CONVOLUTIONS else {})
    assert report(model).totals() == {op: (count, count) for op, count in fused.items()}
    assert not [row for row in report(model).rows if row.status == "skipped"]
    if "linear" in FUSED[name]:  # the blocks run whole
        (transformer,) = (row.name for row in report(model).rows if row.op == "linear")
        assert {row.name for row in explain(model, images(name)).rows} == {transformer}
        return
    choices = [row for row in explain(model, images(name)).rows if row.op != "linear"]  # the projections beside
    called = [row.name for row in choices if row.op != "conv_projection"]
    called += [f"{row.name}.{part}" for row in choices if row.op == "conv_projection" for part in ("to_q", "to_kv")]
    assert sorted(called) == sorted(row.name for row in report(model).rows if row.status == "patched")


@DTYPES
@pytest.mark.parametrize("name", FUSED)
def test_inference(name, dtype):
    check_inference(build(name), images(name), dtype)


@DTYPES
@pytest.mark.parametrize("name", FUSED)
def test_training(name, dtype):
    on_pooled_draws(lambda: check_training(build(name), torch.randn_like(images(name, batch=3)), dtype))


@pytest.mark.parametrize("name", ["vit", "deepvit", "cait", "cvt"])
def test_attention_dropout_drops_in_training_only(name):
    model, x = build(name), images(name)
    for module in model.modules():
        if hasattr(module, "attend") or hasattr(module, "reattn_norm"):
            module.dropout.p = 0.5
    patch(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_caits_dropout_stands_between_the_softmax_and_the_second_mix():
    attention = build("cait").patch_transformer.layers[0][0].fn
    attention.dropout.p = 0.5
    x = torch.randn(2, 9, 48)
    results = []
    for module in (attention.train(), patch(attention, backend="reference")):
        torch.manual_seed(0)
        results.append(module(x))
    torch.testing.assert_close(*results)


def test_the_distillation_wrapper():
    from vit_pytorch.distill import DistillWrapper

    student = build("distillable_vit")
    wrapper = DistillWrapper(student=student, teacher=build("vit"), temperature=3.0, alpha=0.3).eval()
    x, labels = images("vit"), torch.tensor([1, 2])
    with torch.no_grad():
        oracle = copy.deepcopy(wrapper).double()(x.double(), labels)
        expected = wrapper(x, labels)
        patch(wrapper)
        assert report(wrapper).totals() == {"linear": (2, 2), "masked_attention": (4, 4), "mlp": (4, 4)}
        assert_as_accurate(wrapper(x, labels), expected, oracle)


@pytest.mark.parametrize("name", ["vit", "simple_vit", "cait", "cvt"])
def test_the_librarys_recorder_gets_its_maps(name):
    """``vit_pytorch.recorder`` hooks ``attend``; before or after patch, those blocks run their own forward."""
    model, x = build(name), images(name)
    expected = model(x)
    for first in ("patch", "hook"):
        unpatch(model)
        maps: list[Tensor] = []
        if first == "patch":
            patch(model)
        hooks = [
            module.attend.register_forward_hook(lambda module, args, output, maps=maps: maps.append(output))
            for module in model.modules()
            if hasattr(module, "attend")
        ]
        if first == "hook":
            warns = pytest.warns(
                UserWarning, match=r"nothing but MLPs and products to fuse in [\s\S]*attend has forward"
            )
            with contextlib.nullcontext() if name == "cvt" else warns:
                patch(model)
            assert "attend has forward hooks" in recognise(attention_of(model)).reasons[0]
        got = model(x)
        assert len(maps) == len(hooks)
        torch.testing.assert_close(got, expected)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_twins_peg_keeps_the_order_its_map_came_in(layout):
    peg = next(module for module in build("twins_svt").modules() if type(module).__name__ == "PEG")
    x = torch.randn(2, 16, 6, 7).to(memory_format=layout)
    with torch.no_grad():
        expected = peg(x)
        got = patch(peg)(x)
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(got, expected)


def test_cvts_tokens_are_not_copied_between_convolution_and_attention():
    projection = patch(next(module for module in build("cvt").modules() if type(module).__name__ == "DepthWiseConv2d"))
    with torch.no_grad():
        out = projection(torch.randn(2, 16, 6, 7))
    assert out.flatten(2).transpose(1, 2).stride(2) == 1


@pytest.mark.parametrize("hooked", ["to_q", "to_kv.net.0", "to_q.net.2"])
def test_cvts_projections_are_called_where_somebody_listens(hooked):
    """Elsewhere one operator does both, from one reading of the map; not in training, which counts the norm once."""
    attention, x = patch(attention_of(build("cvt"))), torch.randn(2, 16, 4, 6)
    with torch.no_grad():
        joined = attention(x)
        assert "conv_projection" in [row.op for row in explain(attention, x).rows]
        called: list[str] = []
        attention.get_submodule(hooked).register_forward_hook(lambda *_: called.append(hooked))
        torch.testing.assert_close(attention(x), joined)
        assert called == [hooked]
    assert "conv_projection" not in [row.op for row in explain(attention, x).rows]
    assert "conv_projection" not in [row.op for row in explain(patch(attention).train(), x).rows]


@pytest.mark.parametrize("training", [False, True])
def test_dropout_within_an_mlp_takes_the_plain_path(training):
    block = patch(build("vit", dropout=0.5).transformer.layers[0][1]).train(training)
    x = torch.randn(2, 9, 48)
    assert [row.op for row in explain(block, x).rows] == ([] if training else ["mlp"])
    assert torch.equal(block(x), block(x)) != training


def replace_norm(attention: nn.Module, norm: nn.Module) -> None:
    attention.reattn_norm[1] = norm


def swap_rearrangements(attention: nn.Module) -> None:
    norm = attention.reattn_norm
    norm[0], norm[2] = norm[2], norm[0]


@pytest.mark.parametrize("part", ["reattn_norm", "reattn_norm.0", "reattn_norm.1"])
def test_deepvits_maps_are_there_for_a_hook(part):
    """Whoever wants to see the maps before or behind their norm gets them, and the same results."""
    model, x = build("deepvit"), images("deepvit")
    expected = model(x)
    patch(model)
    maps: list[Tensor] = []
    attention_of(model).get_submodule(part).register_forward_hook(lambda module, args, output: maps.append(output))
    torch.testing.assert_close(model(x), expected)
    assert len(maps) == 1
    assert recognise(attention_of(model)).reasons


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("vit", lambda attention: setattr(attention.attend, "dim", 1), "attend is a softmax over axis 1"),
        ("vit", lambda attention: setattr(attention, "heads", 3), "to_qkv gives 144 channels, expected 108"),
        ("cait", lambda attention: setattr(attention, "heads", 2), "mix_heads_pre_attn does not map heads to heads"),
        ("cvt", lambda attention: delattr(attention, "to_kv"), "to_kv not there"),
        ("deepvit", lambda attention: setattr(attention, "heads", 2), "reattn_weights does not map heads to heads"),
        ("deepvit", lambda attention: attention.reattn_norm.pop(2), "between two rearrangements"),
        ("deepvit", lambda attention: replace_norm(attention, nn.LayerNorm((4, 1))), "not a plain nn.LayerNorm over"),
        (
            "deepvit",
            lambda attention: replace_norm(attention, nn.BatchNorm2d(4)),
            "is BatchNorm2d, expected is exactly LayerNorm",
        ),
        ("deepvit", lambda attention: swap_rearrangements(attention), "reattn_norm.0 is not the rearrangement"),
    ],
)
def test_changed_settings_are_left_alone(name, change, reason):
    attention = attention_of(build(name))
    change(attention)
    assert reason in recognise(attention).reasons[0]


@pytest.mark.parametrize("name", ["vit", "deepvit", "cait", "cvt", "twins_svt"])
def test_a_forward_of_another_version_is_left_alone(name, monkeypatch):
    model = build(name)
    module = next(m for m in model.modules() if type(m).__name__ == ("PEG" if name == "twins_svt" else "Attention"))
    cls = type(module)

    def forward(self, x):
        return self.rotary(x)

    forward.__module__ = cls.__module__
    monkeypatch.setattr(cls, "forward", forward)
    assert recognise(module).reasons == [f"{cls.__name__}.forward of this version uses rotary, which is not known"]


def test_compile_without_graph_breaks():
    for name, shape in (("vit", (2, 9, 48)), ("deepvit", (2, 9, 48)), ("cait", (2, 9, 48)), ("cvt", (2, 16, 4, 6))):
        attention, x = patch(attention_of(build(name))), torch.randn(shape)
        with torch.no_grad():
            compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), attention(x))
    torch._dynamo.reset()
