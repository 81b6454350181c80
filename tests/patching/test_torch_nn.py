"""torch's own encoder layers: parity with the plain ones, which at inference never call their parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.patching import explain, patch, report, unpatch
from fastvit.patching.fusion import Fused
from tests.patching.fused_and_plain import check_inference, check_training
from tests.tiny import shake

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LAYERS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm": {"norm_first": True, "activation": "gelu"},
    "activation module": {"activation": nn.GELU()},
    "activation of its own": {"activation": F.hardswish},
}
VARIANTS = pytest.mark.parametrize("variant", LAYERS)


def build(dropout: float = 0.0, **options: Any) -> nn.Module:
    sizes = {"d_model": 48, "nhead": 4, "dim_feedforward": 96, "batch_first": True, "dropout": dropout}
    layer = nn.TransformerEncoderLayer(**sizes, **options)
    return shake(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 17, 48, generator=torch.Generator().manual_seed(0))


def same(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The patched model gives what it gives unpatched."""
    with torch.no_grad():
        got = model(*args, **kwargs)
        torch.testing.assert_close(got, unpatch(copy.deepcopy(model))(*args, **kwargs))


def test_every_layer_is_fused_and_called():
    model = patch(build(), strict=True, verify=tokens())
    assert [(row.cls, row.status) for row in report(model).rows] == [("TransformerEncoderLayer", "patched")] * 2
    called = [(row.name, row.op) for row in explain(model, tokens()).rows]
    assert called == [(f"layers.{i}", op) for i in range(2) for op in ("linear", "masked_attention", "linear", "mlp")]


@VARIANTS
@DTYPES
def test_inference(dtype, variant):
    check_inference(build(**LAYERS[variant]), tokens(), dtype)


@VARIANTS
@DTYPES
def test_training(dtype, variant):
    check_training(build(**LAYERS[variant]), tokens(3), dtype)


def test_dropout_drops_in_training_only():
    model, x = patch(build(dropout=0.5)), tokens()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_masks_are_torchs():
    model, x = patch(build()), tokens()
    mask = torch.ones(17, 17, dtype=torch.bool).triu(1)
    padding = torch.arange(17).expand(2, -1) > 12
    same(model, x, mask=mask)
    same(model, x, mask=mask, is_causal=True)
    same(model, x, src_key_padding_mask=padding)


def test_a_gelu_by_tanh_which_torch_computes_exactly_at_inference_is_torchs():
    model = patch(build())
    model.layers[1].activation = nn.GELU("tanh")
    same(model, tokens())


def test_one_sequence_and_nested_ones_are_torchs():
    layer = patch(build()).layers[0]
    same(layer, tokens()[0])
    with torch.no_grad():
        ragged = torch.nested.nested_tensor([tokens()[0, :5], tokens()[1]])
        got = layer(ragged)
        expected = unpatch(copy.deepcopy(layer))(ragged)
    for one, other in zip(got.unbind(), expected.unbind(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("part", ["self_attn", "self_attn.out_proj", "linear1", "dropout1"])
def test_hooks_on_parts_are_called_as_in_a_plain_layer(part):
    model, x, called = patch(build()), tokens(), []
    model.layers[0].get_submodule(part).register_forward_hook(lambda module, args, output: called.append(part))
    model(x)
    fused, called[:] = list(called), []
    unpatch(model)(x)
    assert fused == called


def test_a_half_of_ones_own_is_run():
    class Halved(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return super()._ff_block(x) / 2

    layer = shake(Halved(48, 4, 96, batch_first=True)).eval()
    with pytest.warns(UserWarning, match="Halved overrides _ff_block"):
        patch(layer)
    assert not isinstance(layer, Fused)
    model = patch(build())
    model.layers[0]._sa_block = lambda x, *args, **kwargs: x / 2
    same(model.train(), tokens())


@pytest.mark.usefixtures("kernels_first")
def test_a_layer_over_sequences_first_is_known_by_what_it_computes():
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0)
    model = shake(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
    patch(model, example=tokens())
    assert [(row.cls, row.status) for row in report(model).rows] == [
        ("TransformerEncoderLayer", "patched"),
        ("MultiheadAttention", "patched"),
    ]
    same(model, tokens())


def test_compile_without_graph_breaks():
    layer, x = patch(build()).layers[0], tokens()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch._dynamo.reset()


# --- MLPs in nn.Sequential ------------------------------------------------------------------------------------------


class Named(nn.Sequential):
    pass


def layers(drop: float = 0.0) -> list[nn.Module]:
    return [nn.Linear(48, 96), nn.GELU(), nn.Dropout(drop), nn.Linear(96, 48), nn.Dropout(drop)]


SEQUENCES = {
    "alone": lambda: nn.Sequential(*layers()[:4]),
    "behind a norm": lambda: nn.Sequential(nn.LayerNorm(48), *layers()),
    "of a class of its own": lambda: Named(nn.Linear(48, 96), nn.Dropout(0.0), nn.SiLU(), nn.Linear(96, 48)),
    "behind another layer": lambda: nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), nn.Tanh(), *layers()),
    "three layers": lambda: nn.Sequential(*layers(), nn.Tanh(), nn.Linear(48, 48)),
}


@pytest.mark.parametrize("name", SEQUENCES)
@DTYPES
def test_sequences(name, dtype):
    model = nn.Sequential(shake(SEQUENCES[name]()).eval())
    check_inference(model, tokens(), dtype)
    check_training(model, tokens(), dtype)
    patch(model, verify=tokens().to(dtype))
    assert [(row.name, row.op) for row in report(model).rows] == [("0", "mlp")]
    assert [row.op for row in explain(model, tokens().to(dtype)).rows] == ["mlp"]


def test_a_sequence_that_was_changed_or_is_heard_is_called():
    heard: list[Tensor] = []
    model = shake(nn.Sequential(nn.LayerNorm(48), *layers())).eval()
    patch(model)
    model[2].register_forward_hook(lambda *args: heard.append(args[2]))
    same(model, tokens())
    assert len(heard) == 2
    model[2] = nn.Tanh()
    same(model, tokens())
    assert not [row for row in explain(model, tokens()).rows if row.op == "mlp"]
    model.append(nn.Linear(48, 8))
    same(model, tokens())
    assert type(unpatch(model)) is nn.Sequential


def test_dropout_in_a_sequence_is_drawn():
    model = nn.Sequential(*layers(0.5)).train()
    torch.manual_seed(1)
    expected = model(tokens())
    torch.manual_seed(1)
    torch.testing.assert_close(patch(model)(tokens()), expected, rtol=0.0, atol=0.0)


def test_a_sequence_that_overrides_its_forward_runs_it():
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = patch(shake(nn.Sequential(Doubled(*layers()))).eval())
    for _ in range(2):  # the first call decides
        same(model, tokens())


def test_a_sequence_with_an_order_of_its_own_is_called_in_it():
    class Reversed(nn.Sequential):
        def __iter__(self):
            return reversed(list(self._modules.values()))

    model = nn.Sequential(shake(Reversed(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48))).eval())
    patch(model)
    for _ in range(2):
        same(model, tokens())


@pytest.mark.parametrize("wrong", [torch.randn(2, 7), torch.randn(2, 48).double(), torch.ones(2, 48).long()])
def test_what_a_sequence_does_not_take_raises_torch_s_own_error(wrong):
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)).eval()
    with pytest.raises(RuntimeError) as plain:
        model(wrong)
    with pytest.raises(RuntimeError) as fused:
        patch(model)(wrong)
    assert str(fused.value) == str(plain.value)
