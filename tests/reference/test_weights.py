"""Our own weights into the reference models: round trips, position embeddings resized, heads of other class counts."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from fastvit.reference.layers import resize_pos_embed
from fastvit.reference.weights import LoadReport, ResizedTensor, SkippedHead, load_weights
from tests.reference.checkpoints import FAMILIES, assert_refused, assert_state, build


class TestRoundTrip:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("kind", ["mapping", "live", "pth", "safetensors"])
    def test_native_weights_come_back_bit_for_bit(self, family, kind, tmp_path):
        source, target = build(family), build(family)
        given = {"mapping": source.state_dict(), "live": source}.get(kind, tmp_path / f"weights.{kind}")
        if kind == "pth":
            torch.save(source.state_dict(), given)
        elif kind == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(source.state_dict(), given)
        report = load_weights(target, given)
        assert_state(target, source.state_dict())
        assert report.format == "native" and report.loaded == list(target.state_dict())
        assert not (report.missing or report.unexpected or report.resized or report.skipped_heads or report.dropped)

    def test_parameters_stay_the_same_objects_in_their_dtype(self):
        source, target = build("vit"), build("vit").bfloat16()
        parameters = dict(target.named_parameters())
        load_weights(target, source)
        for name, parameter in target.named_parameters():
            assert parameter is parameters[name] and parameter.dtype == torch.bfloat16 and parameter.requires_grad
            assert torch.equal(parameter, source.get_parameter(name).bfloat16())

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module."])
    def test_wrapping_prefixes(self, prefix):
        source, target = build("cait"), build("cait")
        load_weights(target, {prefix + name: value for name, value in source.state_dict().items()})
        assert_state(target, source.state_dict())

    def test_into_and_from_wrapped_models(self):
        source, target = build("deit"), build("deit")
        load_weights(nn.DataParallel(torch.compile(target)), torch.compile(nn.DataParallel(source)))
        assert_state(target, source.state_dict())

    def test_averaged_model(self):
        source, target = build("vit"), build("vit")
        report = load_weights(target, torch.optim.swa_utils.AveragedModel(source))
        assert_state(target, source.state_dict())
        assert set(report.dropped) == {"n_averaged"}

    def test_compiled_blocks(self):
        source, target = build("vit"), build("vit")
        expected = source.state_dict()
        source.blocks[1] = torch.compile(source.blocks[1])
        load_weights(target, source)
        assert_state(target, expected)

    @pytest.mark.parametrize("key", ["model", "state_dict", "state_dict_ema", "model_ema"])
    def test_entry_of_a_training_checkpoint(self, key, tmp_path):
        source, target = build("ceit"), build("ceit")
        path = tmp_path / "checkpoint.pth.tar"
        torch.save(
            {"epoch": 3, key: source.state_dict(), "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}, path
        )
        report = load_weights(target, path)
        assert report.entry == key and f"entry '{key}'" in str(report)
        assert_state(target, source.state_dict())

    def test_plain_weights_are_preferred_to_averaged_ones(self):
        plain, averaged, target = build("deepvit"), build("deepvit"), build("deepvit")
        report = load_weights(target, {"state_dict_ema": averaged.state_dict(), "state_dict": plain.state_dict()})
        assert report.entry == "state_dict" and any("state_dict_ema" in note for note in report.notes)
        assert_state(target, plain.state_dict())

    def test_nested_entries(self):
        source, target = build("vit"), build("vit")
        report = load_weights(target, {"state_dict": {"model": source}})
        assert report.entry == "state_dict.model"
        assert_state(target, source.state_dict())

    def test_batch_counter_may_be_absent(self):
        source, target = build("cvt"), build("cvt")
        weights = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert load_weights(target, weights).missing == []
        assert_state(target, {**target.state_dict(), **weights})

    def test_entries_that_are_no_tensors_are_reported(self):
        source, target = build("vit"), build("vit")
        report = load_weights(target, {**source.state_dict(), "epoch": 7, 3: torch.ones(1)})
        assert set(report.dropped) == {"epoch", "3"} and "int" in report.dropped["epoch"]

    def test_numpy_arrays(self):
        source, target = build("vit"), build("vit")
        arrays = {name: value.numpy() for name, value in source.state_dict().items()}
        arrays["cls_token"] = arrays["cls_token"].astype(">f4")
        load_weights(target, arrays)
        assert_state(target, source.state_dict())

    def test_old_pre_logits_are_dropped(self):
        source, target = build("vit"), build("vit")
        extra = {"pre_logits.fc.weight": torch.ones(32, 32), "pre_logits.fc.bias": torch.ones(32)}
        report = load_weights(target, {**source.state_dict(), **extra})
        assert set(report.dropped) == set(extra) and report.unexpected == []


class TestPositionEmbedding:
    @pytest.mark.parametrize("kind", ["bicubic", "bicubic_antialias", "bilinear_align_corners"])
    @pytest.mark.parametrize(("size", "grid"), [(48, (6, 6)), (16, (2, 2)), ((32, 64), (4, 8))])
    def test_resized_by_the_kind_of_the_model(self, kind, size, grid):
        source, target = build("vit"), build("vit", img_size=size, pos_embed_resize=kind)
        report = load_weights(target, source.state_dict())
        expected = resize_pos_embed(source.pos_embed, grid, prefix_tokens=1, kind=kind)
        assert torch.equal(target.pos_embed, expected) and torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
        assert report.resized == [ResizedTensor("pos_embed", (1, 17, 32), tuple(expected.shape))]
        assert "pos_embed" in report.loaded and "resized: pos_embed (1, 17, 32) ->" in str(report)

    @pytest.mark.parametrize(("family", "prefix"), [("deit_distilled", 2), ("cait", 0), ("ceit", 1), ("deepvit", 1)])
    def test_prefix_tokens_are_kept(self, family, prefix):
        source, target = build(family), build(family, img_size=64)
        load_weights(target, source.state_dict())
        assert torch.equal(target.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
        grid = resize_pos_embed(source.pos_embed[:, prefix:], (8, 8), prefix_tokens=0)
        assert torch.equal(target.pos_embed[:, prefix:], grid)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(("source", "target"), [("vit", "deit_distilled"), ("deit_distilled", "vit")])
    def test_other_prefix_tokens_are_refused(self, source, target, strict):
        words = r"pos_embed: .*dist_token"
        assert_refused(build(target), build(source).state_dict(), words, strict=strict)

    @pytest.mark.parametrize("entries", [16, 18, 1])
    def test_entries_that_form_no_grid(self, entries):
        weights = build("vit").state_dict()
        weights["pos_embed"] = torch.ones(1, entries, 32)
        assert_refused(build("vit", img_size=48), weights, rf"pos_embed: \(1, {entries}, 32\) in the source")

    def test_other_width(self):
        assert_refused(
            build("vit", img_size=48), build("vit", embed_dim=16), r"pos_embed: \(1, 17, 16\).*\(1, 37, 32\)"
        )


class TestHeads:
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("family", ["vit", "cait", "cvt", "ceit", "twins"])
    def test_of_another_class_count_is_left_alone(self, family, strict):
        source, target = build(family), build(family, num_classes=7)
        own = {name: value.clone() for name, value in target.head.state_dict().items()}
        report = load_weights(target, source, strict=strict)
        assert report.skipped_heads == [SkippedHead("head", 5, 7)]
        assert report.missing == [] and report.unexpected == [] and not {"head.weight", "head.bias"} & {*report.loaded}
        assert "head, 5 classes in the source, 7 in the model" in str(report)
        others = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
        assert_state(target, {**others, **{f"head.{name}": value for name, value in own.items()}})

    def test_both_heads_of_a_distilled_model(self):
        report = load_weights(build("deit_distilled", num_classes=3), build("deit_distilled"))
        assert report.skipped_heads == [SkippedHead("head", 5, 3), SkippedHead("head_dist", 5, 3)]

    def test_model_without_head(self):
        report = load_weights(build("vit", num_classes=0), build("vit"))
        assert report.skipped_heads == [SkippedHead("head", 5, 0)]

    def test_source_without_head(self):
        source = build("vit", num_classes=0)
        assert_refused(build("vit"), source, r"missing \(2\): head.weight, head.bias")
        assert load_weights(build("vit"), source, strict=False).missing == ["head.weight", "head.bias"]


def test_report_reads_well():
    report = LoadReport(
        "weights.pth",
        "ViT",
        "native",
        "model",
        loaded=["a", "b"],
        missing=["c"],
        resized=[ResizedTensor("pos_embed", (1, 5, 2), (1, 10, 2))],
        skipped_heads=[SkippedHead("head", 1000, 10)],
        dropped={"epoch": "not a tensor"},
        notes=["mind the gap"],
    )
    assert str(report).splitlines() == [
        "2 tensors loaded into ViT from weights.pth (format native, entry 'model')",
        "  resized: pos_embed (1, 5, 2) -> (1, 10, 2)",
        "  head left as it was: head, 1000 classes in the source, 10 in the model",
        "  missing (1): c",
        "  dropped: epoch: not a tensor",
        "  note: mind the gap",
    ]
