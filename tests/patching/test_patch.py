"""patch, unpatch and patched: what they promise, and what bad use gets."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastvit import backends
from fastvit.patching import fusion, is_patched, patch, patched, report, swap, unpatch
from fastvit.patching.fusion import Fused, plain_class
from fastvit.reference.layers import Attention, Block, Mlp, PatchEmbed
from tests.tiny import build, images


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


@pytest.fixture
def model() -> nn.Module:
    return build("vit")


def test_patch_is_in_place_and_unpatch_exact(model):
    before, residue, x = classes(model), attributes(model), images("vit")
    with torch.no_grad():
        expected = model(x)
        assert patch(model, backend="sdpa") is model
        assert fused_names(model) == ["blocks.0.attn", "blocks.1.attn"]
        assert isinstance(model.blocks[0].attn, Attention)
        assert is_patched(model)
        model(x)
        assert unpatch(model) is model
        assert torch.equal(model(x), expected)
    assert classes(model) == before
    assert attributes(model) == residue
    assert not is_patched(model)


def test_patching_twice_patches_anew(model):
    once = classes(patch(model))
    patch(model, backend="reference")
    assert {module.fastvit_backend for module in model.modules() if isinstance(module, Fused)} == {"reference"}
    assert classes(patch(model)) == once
    patch(model, filter_fn=lambda module, name: name == "blocks.1.attn")
    assert fused_names(model) == ["blocks.1.attn"]


def test_a_module_that_is_itself_a_block():
    attention = build("vit").blocks[0].attn
    patch(attention, strict=True, verify=torch.randn(2, 5, 48))
    assert [row.name for row in report(attention).rows if row.status == "patched"] == [""]
    assert type(unpatch(attention)) is Attention


def test_filter_fn_sees_module_and_qualified_name(model):
    seen = {}
    patch(model, filter_fn=lambda module, name: seen.setdefault(name, plain_class(module)) and name.endswith("0.attn"))
    parts = {f"blocks.{i}.{name}": cls for i in (0, 1) for name, cls in (("attn", Attention), ("mlp", Mlp))}
    assert seen == {"patch_embed": PatchEmbed, "blocks.0": Block, "blocks.1": Block, **parts}
    assert fused_names(model) == ["blocks.0.attn"]
    assert {row.reasons for row in report(model).rows} == {("filter_fn leaves it out",), ()}


def test_a_block_whose_parts_stay_plain_stays_plain_too(model):
    patch(model, filter_fn=lambda module, name: name != "blocks.0.mlp")
    assert fused_names(model) == ["patch_embed", "blocks.0.attn", "blocks.1", "blocks.1.attn", "blocks.1.mlp"]
    assert {row.name: row.reasons for row in report(model).rows}["blocks.0"] == ("mlp is not fused",)
    assert fused_names(patch(model, ops=["linear", "conv_batch_norm"])) == ["patch_embed"]
    rows = {row.name: row for row in report(model).rows}
    assert rows["blocks.1"].status == "skipped" and rows["blocks.1"].reasons == (
        "attn is not fused",
        "mlp is not fused",
    )


def test_ops_chooses_operators():
    model = build("ceit")
    everything = fused_names(patch(model))
    convolutions = fused_names(patch(model, ops="leff"))
    attentions = fused_names(patch(model, ops=["masked_attention", "class_attention", "linear"]))
    assert convolutions == ["blocks.0.leff", "blocks.1.leff"]
    others = fused_names(patch(model, ops=["mlp", "conv_batch_norm"]))
    assert sorted(convolutions + attentions + others) == sorted(everything)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ops": "attention"}, ValueError, r"ops: expected some of \[.*'masked_attention'.*got \['attention'\]"),
        ({"backend": "fast"}, ValueError, r"backend: expected one of \['auto', .*'cpp'.*'sdpa'.*got 'fast'"),
    ],
)
def test_unknown_names_list_the_valid_ones(model, options, error, message):
    with pytest.raises(error, match=message):
        patch(model, **options)
    assert not is_patched(model)


def test_a_backend_that_cannot_run_here_raises_its_reasons(model, monkeypatch):
    monkeypatch.setattr(backends, "triton_reasons", lambda device: ["too old", f"not on {device.type}"])
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: too old; not on cpu"):
        patch(model, backend="triton")
    assert not is_patched(model)


def test_a_backend_that_an_operator_lacks_leaves_the_block_alone():
    model = build("ceit")
    patch(model, backend="sdpa")
    rows = {row.name: row for row in report(model).rows}
    assert rows["blocks.0.attn"].backend == "sdpa"
    assert rows["blocks.0.leff"].status == "unsupported"
    assert "leff has no backend 'sdpa'" in rows["blocks.0.leff"].reasons[0]
    with pytest.raises(RuntimeError, match=r"(?s)strict: .*\n  blocks.0.leff \(LeFF\): leff has no"):
        patch(model, backend="sdpa", strict=True)


def test_what_is_not_a_python_module_is_refused():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        patch({})
    linear = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="TorchScript"):
        patch(nn.Sequential(torch.jit.script(linear)))
    with pytest.raises(TypeError, match="GraphModule"):
        patch(torch.fx.symbolic_trace(linear))
    for function in (unpatch, report):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            function("vit")
    for function in (patch, unpatch, report):
        with pytest.raises(TypeError, match="got the class Linear: give an instance of it"):
            function(nn.Linear)


@pytest.mark.parametrize("argument", ["example", "verify", "benchmark"])
def test_an_array_for_an_example_is_refused_by_the_name_of_its_argument(argument, model):
    with pytest.raises(TypeError, match=rf"{argument}: expected a tensor, .*got ndarray: torch.from_numpy"):
        patch(model, **{argument: np.zeros((1, 3, 32, 32), np.float32)})
    assert not is_patched(model)


@pytest.mark.parametrize("argument", ["example", "verify", "benchmark"])
def test_inference_mode_around_the_call(argument, model):
    with torch.inference_mode():
        patch(model, **{argument: images("vit")})
    assert is_patched(model) or argument == "benchmark"  # which leaves plain what a timer finds slower


def test_patched_takes_the_arguments_of_patch():
    theirs, ours = (inspect.signature(function).parameters for function in (patch, patched))
    assert list(ours.values()) == list(theirs.values())


def test_nothing_to_fuse_warns_without_a_list_of_classes():
    words = "nothing to fuse in Sequential: it holds no attention, depthwise convolution of tokens or MLP$"
    with pytest.warns(UserWarning, match=words) as log:
        patch(nn.Sequential(nn.Linear(2, 2)))
    assert log[0].filename == __file__
    with pytest.raises(
        RuntimeError, match=r"0 \(MultiheadAttention\): MultiheadAttention is not known, decided at .*example"
    ):
        patch(nn.Sequential(nn.MultiheadAttention(4, 1)), strict=True)
    with pytest.raises(RuntimeError, match="strict: fastvit: nothing to fuse"):
        patch(nn.Sequential(nn.Linear(2, 2)), strict=True)


def test_apples_fastvit_is_told_from_this_package():
    timm = pytest.importorskip("timm")
    with pytest.warns(UserWarning, match="fastvit: FastVit is Apple's FastViT, a model that shares no more than"):
        patch(timm.create_model("fastvit_t8"), dry_run=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(timm.create_model("vit_tiny_patch16_224", depth=1), dry_run=True)


def test_everything_turned_down_warns_with_the_reasons(model):
    with pytest.warns(UserWarning, match="blocks.1.mlp: filter_fn leaves it out$"):  # and nothing of nearest classes
        patch(model, filter_fn=lambda module, name: False)


class _OwnAttend(Attention):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) * 2


class _OwnForward(Attention):
    def forward(self, x, mask=None):
        return self.proj(x)


class _AroundAttend(Attention):
    def forward(self, x, mask=None):
        return self.attend(*(x[:, None],) * 3, mask)[:, 0] * 2


def test_strict_raises_every_reason_at_once(model):
    model.blocks[0].attn.__class__ = _OwnAttend
    model.blocks[1].attn = nn.Sequential(_OwnForward(48, 4), nn.MultiheadAttention(48, 4))
    with pytest.raises(RuntimeError) as error:
        patch(model, strict=True)
    for line in (
        "blocks.0.attn (_OwnAttend): _OwnAttend overrides attend",
        "blocks.1.attn.0 (_OwnForward): _OwnForward overrides forward",
        "blocks.1.attn.1 (MultiheadAttention): MultiheadAttention is not known",
    ):
        assert line in str(error.value)
    assert not is_patched(model)
    # Leaving a block out on purpose is not a failure.
    patch(build("vit"), strict=True, filter_fn=lambda module, name: "0" in name)


def test_a_subclass_with_its_own_forward_around_the_override_is_fused():
    block = _AroundAttend(48, 4)
    x = torch.randn(2, 5, 48)
    expected = block(x)
    patch(block, strict=True)
    assert isinstance(block, _AroundAttend)
    torch.testing.assert_close(block(x), expected)


def test_a_forward_replaced_on_the_instance_is_left_alone(model):
    model.blocks[0].attn.forward = lambda x, mask=None: x
    patch(model)
    assert fused_names(model) == ["patch_embed", "blocks.0.mlp", "blocks.1", "blocks.1.attn", "blocks.1.mlp"]
    reasons = {row.name: row.reasons for row in report(model).rows}
    assert reasons["blocks.0.attn"] == ("forward was replaced on the instance",)
    assert reasons["blocks.0"] == ("attn is not fused",)


def test_dry_run_changes_nothing_and_fills_the_report(model):
    patch(model, ops="masked_attention", filter_fn=lambda module, name: "1" in name)
    before = classes(model)
    assert patch(model, dry_run=True, verify=images("vit")) is model
    assert classes(model) == before
    planned = report(model)
    assert planned.dry_run
    assert [row.status for row in planned.rows] == ["patched"] * 7
    assert planned.error is not None
    assert "dry run" in str(planned)
    patch(model)
    assert not report(model).dry_run


def test_failing_half_way_leaves_the_model_as_it_was(model, monkeypatch):
    patch(model, backend="sdpa", filter_fn=lambda module, name: "1" in name)
    before, residue = classes(model), attributes(model)

    given = []

    def fuse_one_and_fail(module, cls):
        given.append(module)
        if len(given) == 2:
            raise KeyboardInterrupt
        fusion.give(module, cls)

    monkeypatch.setattr(swap, "give", fuse_one_and_fail)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    assert classes(model) == before
    assert attributes(model) == residue


def test_an_error_in_filter_fn_leaves_the_model_as_it_was(model):
    def fails(module, name):
        raise LookupError(name)

    with pytest.raises(LookupError):
        patch(model, filter_fn=fails)
    assert not is_patched(model)


def test_patched_restores_the_state_before(model):
    with patched(model) as same:
        assert same is model
        assert len(fused_names(model)) == 7
    assert not is_patched(model)
    patch(model, backend="sdpa", filter_fn=lambda module, name: "0" in name)
    before = report(model).rows
    with contextlib.suppress(ZeroDivisionError), patched(model, backend="reference"):
        assert model.blocks[1].attn.fastvit_backend == "reference"
        raise ZeroDivisionError
    assert fused_names(model) == ["blocks.0.attn"]
    assert model.blocks[0].attn.fastvit_backend == "sdpa"
    assert report(model).rows == before


def test_an_explicit_backend_is_held_to_at_run_time():
    model = patch(build("vit"), backend="sdpa")
    assert model.blocks[0].attn.fastvit_backend == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(model(images("vit")), unpatch(model)(images("vit")))
