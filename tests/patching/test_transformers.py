"""transformers' ViT, DeiT and CvT: parity with the plain models, and every way in which their forwards are used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastvit import backends
from fastvit.patching import explain, patch, report, unpatch
from fastvit.patching.copies import plain_copy
from fastvit.patching.fusion import Fused
from fastvit.patching.matching import recognise
from tests.helpers import assert_as_accurate
from tests.patching.fused_and_plain import Logits, check_inference, check_training, exactly
from tests.tiny import CLASSES, shake

transformers = pytest.importorskip("transformers")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
only_4 = pytest.mark.skipif(VERSION >= (5, 0), reason="transformers 5 has no head_mask, and another class there")
only_5 = pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 passes no attention mask to ViT")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ATTENTION = "sdpa" if backends.cpp_reasons() else "cpp"
MODELS = ("vit_eager", "vit_sdpa", "deit_eager", "deit_sdpa", "cvt")
FUSED = {"cvt": {"masked_attention": 6, "conv_projection": 18, "mlp": 6, "linear": 6}}
OF_A_VIT = {"masked_attention": 2, "mlp": 2, "linear": 2}
"""``linear``: in transformers 4 the module behind an attention, in 5 the whole block."""


def build(name: str, **options: object) -> nn.Module:
    """A plain tiny model in eval mode, which takes and gives a tensor."""
    family, _, interface = name.partition("_")
    if family == "cvt":
        sizes = {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 3], "num_labels": CLASSES}
        model = transformers.CvtForImageClassification(transformers.CvtConfig(**sizes, **options))
    else:
        sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        options = {**sizes, "intermediate_size": 96, "num_labels": CLASSES, "attn_implementation": interface, **options}
        if family == "vit":
            model = transformers.ViTForImageClassification(transformers.ViTConfig(**options))
        else:
            model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**options))
    return shake(Logits(model)).eval()


def images(name: str, batch: int = 2) -> Tensor:
    size = (48, 64) if name == "cvt" else (32, 32)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def backends_of_attention(model: nn.Module, x: Tensor) -> set[str]:
    return {row.backend for row in explain(model, x).rows if row.op == "masked_attention"}


def attentions(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a ViT's or DeiT's attention."""
    return [module for module in model.modules() if hasattr(module, "scaling")]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_fused_and_called(name):
    model = patch(build(name), strict=True, verify=images(name))
    assert report(model).totals() == {op: (count, count) for op, count in FUSED.get(name, OF_A_VIT).items()}
    linears = {row.name for row in report(model).rows if row.op == "linear"}
    if name != "cvt" and VERSION >= (5, 0):
        assert {row.name for row in explain(model, images(name)).rows} == linears  # blocks that run whole
        return
    rows = [row for row in explain(model, images(name)).rows if row.op != "linear"]  # the projections beside
    called = [row.name for row in rows if row.op != "conv_projection"]
    joined = [row.name for row in rows if row.op == "conv_projection"]
    called += [f"{name}.convolution_projection_{part}" for name in joined for part in ("query", "key", "value")]
    assert sorted(called) == sorted({row.name for row in report(model).rows} - linears)


@DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_inference(name, dtype):
    check_inference(build(name), images(name), dtype)


@DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_training(name, dtype):
    dropout = {"drop_rate": [0.0] * 3, "drop_path_rate": [0.0] * 3} if name == "cvt" else {}
    check_training(build(name, **dropout), images(name, batch=3), dtype)


@pytest.mark.parametrize("name", ["vit_eager", "deit_eager"])
def test_output_attentions_gives_the_maps_and_leaves_nothing_behind(name):
    model, x = build(name), images(name)
    with torch.no_grad():
        expected = model.model(x, output_attentions=True)
        assert len(expected.attentions) == 2
        model = patch(copy.deepcopy(model), strict=True, ops="masked_attention")
        got = model.model(x, output_attentions=True)
        assert len(got.attentions) == 2
        for mine, theirs in zip(got.attentions, expected.attentions, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(got.logits, expected.logits)
        assert backends_of_attention(model, x) == {ATTENTION}  # fused again without it
        assert torch.equal(unpatch(model)(x), expected.logits)
        assert not any(isinstance(module, Fused) for module in model.modules())


def test_output_attentions_of_the_configuration():
    model, x = build("vit_eager", output_attentions=True), images("vit_eager")
    assert len(patch(model).model(x).attentions) == 2


def test_output_hidden_states():
    model, x = build("vit_sdpa"), images("vit_sdpa")
    with torch.no_grad():
        expected = model.model(x, output_hidden_states=True).hidden_states
        got = patch(model).model(x, output_hidden_states=True).hidden_states
        assert len(got) == len(expected) == 3
        torch.testing.assert_close(got, expected)
        attended = [row for row in explain(model, {"x": x}).rows if row.op == "masked_attention"]
        assert len(attended) == 2


@only_5
def test_a_copy_without_hooks_has_those_by_which_the_library_collects_hidden_states():
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Dinov2Config(**sizes, out_features=["stage1", "stage2"])
    model, x = shake(transformers.Dinov2Backbone(config)).eval(), images("vit")
    expected = model(x).feature_maps  # puts them on
    got = plain_copy(model, hooks=False)(x).feature_maps
    assert len(got) == len(expected) == 2
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_a_hook_on_the_attention_gets_the_map(first):
    model, x = build("vit_eager"), images("vit_eager")
    seen: list[Tensor] = []
    if first == "patch":
        patch(model)
    attentions(model)[0].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    patch(model)
    expected = ("a forward hook may want the attention map",)
    assert [row.reasons for row in report(model).rows if row.kind == "attention"] == [expected, ()]
    model(x)
    assert seen[0].shape == (2, 4, 17, 17)


def test_a_hook_that_comes_after_patch_gets_the_map():
    model, x = patch(build("vit_eager")), images("vit_eager")
    seen: list[Tensor] = []
    attentions(model)[0].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model(x)
    assert seen[0].shape == (2, 4, 17, 17)


@only_4
@pytest.mark.parametrize("name", ["vit_eager", "deit_eager"])
def test_head_mask_takes_the_plain_path(name):
    model, x = build(name), images(name)
    head_mask = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    with torch.no_grad():
        expected = model.model(x, head_mask=head_mask).logits
        assert not torch.allclose(expected, model(x))
        assert torch.equal(patch(model, ops="masked_attention").model(x, head_mask=head_mask).logits, expected)


@only_4
def test_pruned_heads():
    model, x = build("vit_sdpa"), images("vit_sdpa")
    model.model.vit._prune_heads({0: [1], 1: [0, 2]})
    check_inference(model, x, torch.float32)
    patch(model, strict=True)
    assert [row.status for row in report(model).rows if row.kind == "attention"] == ["patched"] * 2


@only_5
@pytest.mark.parametrize("name", ["vit_eager", "vit_sdpa"])
def test_attention_masks(name):
    model, x = build(name), images(name)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 5:9] = 0
    mask[1, 1:] = 0
    with torch.no_grad():
        expected = model.model(x, attention_mask=mask).logits
        assert not torch.allclose(expected, model(x))
        oracle = exactly(model).model(x.double(), attention_mask=mask).logits
        got = patch(model, strict=True).model(x, attention_mask=mask).logits
        assert_as_accurate(got, expected, oracle)


def test_attention_dropout_drops_in_training_only():
    model, x = patch(build("vit_sdpa", attention_probs_dropout_prob=0.5)), images("vit_sdpa")
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_the_interface_may_change_after_patch():
    model, x = build("vit_sdpa"), images("vit_sdpa")
    with torch.no_grad():
        expected = model(x)
        patch(model).model.set_attn_implementation("eager")
        torch.testing.assert_close(model(x), expected)
        assert backends_of_attention(model, x) == {ATTENTION}


def test_a_configuration_may_change_after_calls_that_are_replayed():
    model, x = build("vit_eager"), images("vit_eager")
    with torch.no_grad():
        patch(model)
        for _ in range(3):
            model(x)
        model.model.config.output_attentions = True
        for attention in attentions(model):
            attention.config.output_attentions = True
        assert len(model.model(x).attentions) == 2


@pytest.mark.parametrize("calls", [0, 3])
def test_an_interface_of_ones_own_is_left_alone(calls):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def doubled(module, query, key, value, mask, **options):
        return (value * 2).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("doubled", doubled)
    model, x = build("vit_sdpa"), images("vit_sdpa")
    patch(model)
    with torch.no_grad():
        for _ in range(calls):
            model(x)
    model.model.config._attn_implementation = "doubled"
    for attention in attentions(model):
        attention.config._attn_implementation = "doubled"
    with torch.no_grad():
        torch.testing.assert_close(model(x), unpatch(copy.deepcopy(model))(x))
    got = model(x)
    assert torch.equal(got, unpatch(model)(x))
    with pytest.warns(UserWarning, match="the attention interface is 'doubled', known are"):
        patch(model)


def test_a_known_interface_replaced_by_ones_own_is_left_alone(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build("vit_sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **options: None)
    with pytest.warns(UserWarning, match="the attention interface 'sdpa' was replaced by <function"):
        patch(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scaling": 1.0}, "scaling is 1.0"),
        ({"is_causal": True}, "is_causal True"),
        ({"num_attention_heads": 3}, "gives 48 channels, expected 36"),
    ],
)
def test_changed_settings_are_left_alone(change, reason):
    attention = attentions(build("vit_sdpa"))[0]
    for name, value in change.items():
        setattr(attention, name, value)
    assert reason in recognise(attention).reasons[0]


def test_a_changed_forward_is_left_alone():
    known = type(attentions(build("vit_sdpa"))[0])

    class Newer(known):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)[0] * 2, None

    attention = attentions(build("vit_sdpa"))[0]
    attention.__class__ = Newer
    assert recognise(attention).reasons == ["Newer overrides forward"]


def test_a_forward_of_another_version_is_left_alone(monkeypatch):
    attention = attentions(build("vit_sdpa"))[0]
    known = type(attention)

    def forward(self, hidden_states, output_attentions=False):
        return self.rotary(hidden_states), None

    forward.__module__ = known.__module__
    monkeypatch.setattr(known, "forward", forward)
    assert recognise(attention).reasons == [f"{known.__name__}.forward of this version uses rotary, which is not known"]

    def with_other_parameters(self, hidden_states, output_attentions=False):
        return hidden_states.view(hidden_states.shape), None

    with_other_parameters.__module__ = known.__module__
    monkeypatch.setattr(known, "forward", with_other_parameters)
    assert "forward takes (hidden_states, output_attentions), expected is (" in recognise(attention).reasons[0]


@pytest.mark.parametrize("part", ["convolution", "normalization", "linear_projection"])
@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hooks_within_cvts_projection_are_called(part, first):
    model, x = build("cvt"), images("cvt")
    projection = next(module for module in model.modules() if hasattr(module, "linear_projection"))
    called: list[str] = []
    if first == "patch":
        patch(model)
    inner = projection.linear_projection if part == "linear_projection" else projection.convolution_projection
    hooked = inner if part == "linear_projection" else getattr(inner, part)
    hooked.register_forward_hook(lambda module, args, output: called.append(part))
    if first == "hook":
        patch(model)
    model(x)
    assert called == [part]
    assert isinstance(projection, Fused) == (first == "patch")


def test_cvt_convolves_tokens_where_they_lie():
    """The map a projection gets is a view of the tokens; the fused one goes back to them without a copy."""
    model, x = patch(build("cvt")), images("cvt")
    projection = next(module for module in model.modules() if hasattr(module, "linear_projection"))
    given: list[Tensor] = []
    projection.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model(x)
    tokens = given[0].flatten(2).transpose(1, 2)
    assert tokens.data_ptr() == given[0].data_ptr()
    assert tokens.stride(2) == 1


def test_cvt_without_convolutions_is_left_alone():
    model = build("cvt")
    projection = next(module for module in model.modules() if hasattr(module, "linear_projection"))
    del projection.convolution_projection
    assert recognise(projection).reasons[0] == "convolution_projection not there"


@pytest.mark.parametrize("name", ["vit_eager", "vit_sdpa", "cvt"])
def test_compile_without_graph_breaks(name):
    block = build(name)
    module = attentions(block)[0] if name != "cvt" else next(m for m in block.modules() if hasattr(m, "with_cls_token"))
    patch(module)
    arguments = (torch.randn(2, 12, 16), 3, 4) if name == "cvt" else (torch.randn(2, 9, 48),)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), module(*arguments))
    torch._dynamo.reset()
