"""torchvision's ViT: parity with the plain model, and what is inside the block staying in force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastvit.patching import explain, patch, report, unpatch
from fastvit.patching.fusion import Fused
from fastvit.patching.matching import recognise
from tests.patching.fused_and_plain import check_inference, check_training
from tests.tiny import CLASSES, shake

vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def build(**options: float) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
    return shake(vision_transformer.VisionTransformer(**sizes, num_classes=CLASSES, **options)).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_block_is_fused_and_called():
    model = patch(build(), strict=True, verify=images())
    assert [row.cls for row in report(model).rows] == ["EncoderBlock", "MLPBlock"] * 2
    called = [(row.name, row.op) for row in explain(model, images()).rows]
    ops = ("linear", "masked_attention", "linear", "mlp")  # of a block that runs whole
    blocks = [row.name for row in report(model).rows if row.cls == "EncoderBlock"]
    assert called == [(block, op) for block in blocks for op in ops]


@DTYPES
def test_inference(dtype):
    check_inference(build(), images(), dtype)


@DTYPES
def test_training(dtype):
    check_training(build(), images(3), dtype)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_drops_in_training_only(kind):
    model, x = patch(build(**{kind: 0.5})), images()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hooks_on_the_attention_are_called(first):
    model, x = build(), images()
    called: list[tuple] = []
    if first == "patch":
        patch(model)
    block = model.encoder.layers[0]
    block.self_attention.register_forward_hook(lambda module, args, output: called.append(output))
    if first == "hook":
        patch(model)
        expected = ("self_attention is not a plain nn.MultiheadAttention(batch_first=True) without hooks",)
        assert report(model).rows[0].reasons == expected
    assert isinstance(block, Fused) == (first == "patch")
    expected = model(x)
    assert len(called) == 1
    torch.testing.assert_close(unpatch(model)(x), expected)


class _Quieter(nn.MultiheadAttention):
    def forward(self, *args: Tensor, **options: object) -> tuple:
        out, weights = super().forward(*args, **options)
        return out / 2, weights


@pytest.mark.parametrize(
    "attention",
    [
        lambda: _Quieter(48, 4, batch_first=True),
        lambda: nn.MultiheadAttention(48, 4, batch_first=True, add_bias_kv=True),
        lambda: nn.MultiheadAttention(48, 4, batch_first=True, add_zero_attn=True),
        lambda: nn.MultiheadAttention(48, 4),
        lambda: nn.MultiheadAttention(48, 4, kdim=48, vdim=48, batch_first=True),
    ],
    ids=["subclass", "bias_kv", "zero_attn", "sequence_first", "same_widths"],
)
def test_other_attention_in_the_block_is_run_as_it_is(attention):
    model, x = patch(build()), images()
    model.encoder.layers[1].self_attention = shake(attention()).eval()
    with torch.no_grad():
        got = model(x)
        torch.testing.assert_close(got, unpatch(model)(x))


def test_a_parametrised_projection_takes_the_plain_path():
    model, x = patch(build()), images()
    attention = model.encoder.layers[0].self_attention
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", _Doubled())
    got = model(x)
    torch.testing.assert_close(got, unpatch(model)(x))
    assert recognise(model.encoder.layers[0]).reasons


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_changed_block_is_left_alone(monkeypatch):
    block = build().encoder.layers[0]

    def forward(self, input):  # noqa: A002
        return input + self.layer_scale(self.self_attention(self.ln_1(input)))

    forward.__module__ = vision_transformer.__name__
    monkeypatch.setattr(vision_transformer.EncoderBlock, "forward", forward)
    assert recognise(block).reasons == ["EncoderBlock.forward of this version uses layer_scale, which is not known"]


def test_inputs_of_other_shapes_get_torchvisions_error():
    block = patch(build().encoder.layers[0])
    with pytest.raises(AssertionError, match="Expected"):
        block(torch.randn(5, 48))


def test_compile_without_graph_breaks():
    block, x = patch(build().encoder.layers[0]), torch.randn(2, 9, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    torch._dynamo.reset()
