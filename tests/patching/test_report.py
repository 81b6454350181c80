"""The report and the explanation: as rows, text, JSON and HTML."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from tiny import build, images
from torch import nn

from fastvit.patching import explain, patch, report, reporting, unpatch


def test_rows_say_what_is_and_what_could_be():
    model = build("ceit")
    assert {row.status for row in report(model).rows} == {"skipped"}
    assert report(model).rows[0].reasons == ("plain; fastvit.patch(model) would fuse it",)
    patch(model, ops="masked_attention")
    rows = {row.name: row for row in report(model).rows}
    assert (rows["blocks.0.attn"].cls, rows["blocks.0.attn"].status) == ("Attention", "patched")
    assert rows["blocks.0.attn"].backend == "sdpa"
    assert rows["blocks.0.leff"].reasons == ("ops leaves token_depthwise_conv out",)
    assert rows["blocks.0.leff"].backend is None
    assert report(model).totals() == {"masked_attention": (3, 3), "token_depthwise_conv": (0, 2)}
    unpatch(model)
    assert rows["blocks.0.leff"].reasons != report(model).rows[1].reasons


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
    assert "2 unrecognised" in str(report(nn.Sequential(AttentionWrapper())))


def test_text_is_a_table_with_totals():
    model = patch(build("cait"))
    lines = str(report(model)).splitlines()
    assert lines[0] == "CaiT"
    row = next(line for line in lines if "blocks_token_only.1.attn" in line)
    assert "ClassAttention" in row
    assert "masked_attention" in row
    assert "patched" in row
    assert lines[-1] == "head_mixed_attention: 2 of 2 patched; masked_attention: 2 of 2 patched"
    assert "\x1b" not in str(report(model))
    assert str(report(nn.Linear(1, 1))).endswith("no attention or depthwise convolution found")


def test_json_and_html():
    model = patch(build("vit"), verify=images("vit"))
    shown = report(model)
    data = json.loads(shown.to_json())
    assert data["model"] == "ViT"
    assert data["dry_run"] is False
    assert data["totals"] == {"masked_attention": {"patched": 2, "known": 2}}
    assert data["error"] == shown.error
    assert data["rows"][0] == {
        "name": "blocks.0.attn",
        "class": "Attention",
        "op": "masked_attention",
        "status": "patched",
        "backend": "sdpa",
        "reasons": [],
        "error": shown.rows[0].error,
        "plain_error": shown.rows[0].plain_error,
    }
    html = shown._repr_html_()
    assert html.count("<tr>") == 3
    assert "blocks.0.attn" in html


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
        ("blocks.0.attn", "masked_attention", "sdpa"),
        ("blocks.1.attn", "masked_attention", "sdpa"),
    ]
    assert told.rows[0].turned_down["triton"]
    assert "blocks.1.attn" in str(told)
    assert "2 calls" in told._repr_html_()
    assert json.loads(told.to_json())["rows"][1]["backend"] == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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
    with pytest.raises(TypeError, match="example: got int"):
        explain(model, 3)
