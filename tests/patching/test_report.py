"""The report and the explanation: as rows, text, JSON and HTML."""

from __future__ import annotations

import copy
import gc
import json
import sys
import weakref

import pytest
import torch
from torch import nn

from fastvit import backends, ops
from fastvit.patching import explain, patch, preference, report, reporting, unpatch
from fastvit.reference.layers import Mlp
from tests.tiny import build, images

ATTENTION = "sdpa" if backends.cpp_reasons() else "cpp"
"""The backend of attention on the CPU, inference in float32 or bfloat16."""


@pytest.fixture(autouse=True)
def _linears_are_the_librarys(monkeypatch):
    """Whether they are depends on the machine."""
    linear = sys.modules["fastvit.ops.linear"]
    for module in (linear, sys.modules["fastvit.ops.conv_batch_norm"]):
        monkeypatch.setattr(module, "_FASTER", {})
    monkeypatch.setattr(linear, "_WINNERS", set())
    monkeypatch.setattr(linear.autotune, "choose", lambda *_, **__: ("reference",))


def test_rows_say_what_is_and_what_could_be():
    model = build("ceit")
    assert {row.status for row in report(model).rows} == {"skipped"}
    assert report(model).rows[0].reasons == ("plain; fastvit.patch(model) would fuse it",)
    patch(model, ops="masked_attention")
    rows = {row.name: row for row in report(model).rows}
    assert (rows["blocks.0.attn"].cls, rows["blocks.0.attn"].status) == ("Attention", "patched")
    assert rows["blocks.0.attn"].backend == ATTENTION
    assert rows["blocks.0.leff"].reasons == ("ops leaves leff out",)
    assert rows["blocks.0.leff"].backend is None
    assert report(model).totals() == {
        "class_attention": (0, 1),
        "conv_batch_norm": (0, 2),
        "leff": (0, 2),
        "linear": (0, 2),
        "masked_attention": (2, 2),
        "mlp": (0, 1),
    }
    unpatch(model)
    assert {row.reasons for row in report(model).rows} == {("plain; fastvit.patch(model) would fuse it",)}


def test_unknown_blocks_are_named_once_and_innermost():
    class AttentionWrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 1)
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.pointwise = nn.Conv2d(4, 4, 1)

    rows = report(nn.Sequential(AttentionWrapper())).rows
    assert [(row.name, row.cls, row.status) for row in rows] == [
        ("0.inner", "MultiheadAttention", "unrecognised"),
        ("0.depthwise", "Conv2d", "unrecognised"),
    ]
    foot = str(report(nn.Sequential(AttentionWrapper()))).splitlines()[-1]
    assert foot == (
        "0 of 1 attention blocks, 0 of 1 convolutions patched; 2 unrecognised; "
        "ordinary convolutions, left to the library: 0.pointwise"
    )


class _Mixes(nn.Module):
    """An attention by what it holds, not by its name, with an MLP inside that is known, and one beside that is not."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(4, 12)
        self.position_mlp = Mlp(2, 4)


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)


def test_every_attention_and_mlp_is_named_whatever_it_holds():
    model = nn.Sequential(_Mixes(), SwiGLU(), nn.Linear(4, 4))
    patch(model)
    assert [(row.name, row.cls, row.kind, row.status) for row in report(model).rows] == [
        ("0", "_Mixes", "attention", "unrecognised"),
        ("0.position_mlp", "Mlp", "mlp", "patched"),
        ("1", "SwiGLU", "mlp", "unrecognised"),
    ]
    foot = str(report(model)).splitlines()[-1]
    assert foot == "0 of 1 attention blocks, 1 of 2 MLPs patched; 2 unrecognised"
    with pytest.raises(
        RuntimeError, match="strict: not every block can be fused:\n  0 .*not known, decided at .*example"
    ):
        patch(model, strict=True)


def test_the_share_is_estimated_without_running_the_model():
    model = patch(build("cait"))
    called: list[str] = []
    model.register_forward_hook(lambda *_: called.append("hook"))
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.train().modules()]
    estimated = report(model)
    assert estimated.flops_share == report(model.eval(), images("cait", 1)).flops_share
    assert called == ["hook"] * 2  # of the example
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert modes == [True] * len(modes)
    assert report(patch(nn.Sequential(build("vit").blocks))).flops_share is None  # takes no images
    assert report(unpatch(model)).flops_share is None


def test_text_is_a_table_with_totals():
    model = patch(build("cait"))
    lines = str(report(model)).splitlines()
    assert lines[0] == "CaiT"
    row = next(line for line in lines if "blocks_token_only.0 to 1 .attn" in line)
    assert "ClassAttention" in row
    assert "class_attention" in row
    assert "patched" in row
    share = f"{report(model).flops_share:.1%}"
    assert lines[-1] == (
        "4 of 4 attention blocks, 1 of 1 convolutions, 4 of 4 MLPs, 2 of 2 linear layers and blocks patched; "
        f"est. share of FLOPs covered: {share} (one 3 x 32 x 32 image)"
    )
    patch(model, ops="head_mixed_attention")
    told = "2 of 4 attention blocks, 0 of 1 convolutions, 0 of 4 MLPs, 0 of 2 linear layers and blocks patched; est."
    assert told in str(report(model))
    assert "\x1b" not in str(report(model))
    assert str(report(nn.Linear(1, 1))).endswith("no attention, depthwise convolution or MLP found")


def test_json_and_html():
    model = patch(build("vit"), verify=images("vit"))
    shown = report(model)
    data = json.loads(shown.to_json())
    assert data["model"] == "ViT"
    assert data["dry_run"] is False
    totals = {op: {"patched": 2, "known": 2} for op in ("masked_attention", "mlp")}
    assert data["totals"] == {
        "conv_batch_norm": {"patched": 1, "known": 1},
        "linear": {"patched": 2, "known": 2},
        **totals,
    }
    assert data["error"] == shown.error
    assert [row["name"] for row in data["rows"][:3]] == ["patch_embed", "blocks.0", "blocks.0.attn"]
    assert data["rows"][2] == {
        "name": "blocks.0.attn",
        "class": "Attention",
        "kind": "attention",
        "op": "masked_attention",
        "status": "patched",
        "backend": ATTENTION,
        "reasons": [],
        "backends": {"float32": ATTENTION, "bfloat16": ATTENTION, "float16": ATTENTION},
        "error": shown.rows[2].error,
        "plain_error": shown.rows[2].plain_error,
        "seconds": None,
        "plain_seconds": None,
    }
    html = shown._repr_html_()
    assert html.count("<tr>") == 8
    assert "blocks.0.attn" in html


def _backends(model: nn.Module) -> dict[str, tuple[str | None, dict[str, str]]]:
    return {row.op: (row.backend, dict(row.backends)) for row in report(model).rows}


def test_backends_are_those_of_each_dtype():
    """The choice for a dtype is what explain says of a model in it."""
    model = patch(build("cpvt"))
    told = _backends(model)
    for dtype in preference.DTYPES:
        name = str(dtype).removeprefix("torch.")
        ran = {row.op: row.backend for row in explain(model.to(dtype), images("cpvt").to(dtype)).rows}
        assert {op: backends[name] for op, (_, backends) in told.items()} == ran
        assert {op: backend for op, (backend, _) in _backends(model).items()} == ran
    assert _backends(model.double())["token_depthwise_conv"][0] == "reference"


def test_a_named_backend_is_reported_for_the_dtypes_it_takes(monkeypatch):
    convolution = ops.OPERATORS["token_depthwise_conv"]

    def only_float32(call, named):
        if call.x.dtype != torch.float32:
            yield "float32 only"

    fake = tuple(i._replace(reasons=only_float32) if i.name == "cpp" else i for i in convolution.implementations)
    monkeypatch.setattr(convolution, "implementations", fake)
    monkeypatch.setattr(backends, "cpp_reasons", list)
    model = patch(build("cpvt"), ops="token_depthwise_conv", backend="cpp")
    assert _backends(model)["token_depthwise_conv"] == ("cpp", {"float32": "cpp"})
    assert "cpp: float32" in str(report(model))
    patch(model, ops="token_depthwise_conv")
    assert "cpp: float32; reference: bfloat16, float16" in str(report(model))
    assert _backends(model.half())["token_depthwise_conv"][0] == "reference"


def test_every_operator_has_a_call_to_ask_for_its_backend():
    assert set(preference.CALLS) == set(ops.OPERATORS)


def test_asking_for_backends_computes_nothing_and_says_nothing(caplog):
    def fails(*_: object) -> None:
        raise AssertionError("ran")

    with pytest.MonkeyPatch.context() as monkeypatch, caplog.at_level("DEBUG", "fastvit"):
        for operator in ops.OPERATORS.values():
            blocked = tuple(i._replace(run=fails) for i in operator.implementations)
            monkeypatch.setattr(operator, "implementations", blocked)
        with torch.autocast("cpu", torch.bfloat16):
            assert preference.backend_for("masked_attention", "auto", torch.float32, torch.device("cpu")) == ATTENTION
        report(patch(build("cvt")))
        report(patch(build("cait").to("meta")))
    assert caplog.text == ""


def _attention_flops(tokens: int, keys: int, dim: int) -> int:
    return 2 * 2 * tokens * keys * dim


def test_share_of_flops_is_what_the_operators_compute():
    model, x = patch(build("vit")), images("vit")
    tokens, dim, depth, patches = 17, 48, 2, 16
    attention = depth * _attention_flops(tokens, tokens, dim)
    linears = depth * 2 * tokens * dim * (3 * dim + dim + 2 * 4 * dim)
    rest = 2 * patches * (3 * 8 * 8) * dim + 2 * dim * 7
    got = report(model, x).flops_share
    assert got == pytest.approx(attention / (attention + linears + rest))
    assert f"est. share of FLOPs covered: {got:.1%}" in str(report(model, x))
    assert json.loads(report(model, x).to_json())["flops_share"] == got
    estimated = report(model)
    assert (estimated.flops_share, estimated.flops_image) == (got, (3, 32, 32))
    assert f"est. share of FLOPs covered: {got:.1%} (one 3 x 32 x 32 image)" in str(estimated)
    patch(model, filter_fn=lambda module, name: "0" in name)
    assert report(model, x).flops_share == pytest.approx(got / 2)
    patch(model, backend="reference")
    assert report(model, x).flops_share == 0.0
    assert report(unpatch(model), x).flops_share == 0.0


def test_share_of_flops_leaves_out_what_a_fused_block_does_beside_its_operator():
    """CvT's attention calls linears that have hooks; then only the depthwise convolutions are fused."""
    model, x = patch(build("cvt"), ops="conv_projection"), images("cvt")
    convolutions = report(model, x).flops_share
    everything = report(patch(model), x).flops_share
    for name, module in model.named_modules():
        if name.endswith("proj_q"):
            module.register_forward_hook(lambda *_: None)
    assert 0 < convolutions < report(model, x).flops_share < everything


@pytest.mark.parametrize("name", ["cait", "cvt", "ceit", "timm_cait", "timm_twins"])
def test_shares_of_operators_add_up_and_nothing_is_left_on_the_model(name):
    model, x = build(name).train(), images(name)
    state = copy.deepcopy(model.state_dict())
    share = {}
    for op in (*report(model).totals(), None):
        patch(model, ops=op)
        before = [type(module) for module in model.modules()]
        share[op] = report(model, x).flops_share
        assert [type(module) for module in model.modules()] == before
    together, alone = share.pop(None), sum(share.values())
    assert 0 < together == pytest.approx(alone) or (name == "cvt" and together > alone)  # its linears join in
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_shares_want_an_example_the_model_takes():
    model = patch(build("vit"))
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="example: expected a tensor, .* got int"):
        report(model, 3)
    with pytest.raises(ValueError, match="x:"):
        report(model, torch.zeros(1, 3, 7, 7))
    assert [type(module) for module in model.modules()] == before
    assert report(nn.Identity(), torch.zeros(1)).flops_share is None


def test_reports_do_not_keep_models_alive():
    model = patch(build("vit"), verify=images("vit"))
    watch = weakref.ref(model)
    assert len(reporting._memories) >= 1
    del model
    gc.collect()
    assert watch() is None


def test_explain_tells_the_backend_of_each_block_and_why_not_the_others():
    model = patch(build("vit"))
    told = explain(model, images("vit"))
    assert [(row.name, row.op, row.backend) for row in told.rows] == [
        ("patch_embed", "conv_batch_norm", "reference"),
        *(
            (f"blocks.{i}{name}", op, backend)
            for i in (0, 1)
            for name, op, backend in (
                ("", "linear", "reference"),
                (".attn", "masked_attention", ATTENTION),
                ("", "linear", "reference"),
                ("", "mlp", "reference"),
            )
        ),
    ]
    assert told.rows[2].turned_down["triton"]
    assert "blocks.0 to 1 .attn" in str(told)
    assert "9 calls" in told._repr_html_()
    assert json.loads(told.to_json())["rows"][2]["backend"] == ATTENTION
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_explain_names_the_parts_that_a_block_calls():
    model = patch(build("vit"))
    model.blocks[0].norm2.register_forward_hook(lambda *_: None)
    rows = [(row.name, row.op) for row in explain(model, images("vit")).rows if row.name.startswith("blocks.0")]
    attention = [("blocks.0.attn", op) for op in ("linear", "masked_attention", "linear")]
    assert rows == [*(attention if not backends.cpp_reasons() else attention[1:2]), ("blocks.0.mlp", "mlp")]


def test_explain_follows_the_input():
    model = patch(build("cait"), ops="head_mixed_attention")
    wide = explain(model.double(), images("cait").double())
    assert {row.backend for row in wide.rows} == {"reference"}
    assert any("float64" in reason for reason in wide.rows[0].turned_down["cpp"])


def test_explain_of_a_plain_model_and_of_a_failing_one():
    assert "no fused operator was called" in str(explain(build("vit"), images("vit")))
    model = patch(build("vit"))
    with pytest.raises(ValueError, match="x:"):
        explain(model, torch.zeros(1, 3, 7, 7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match="example: expected a tensor, .* got int"):
        explain(model, 3)
