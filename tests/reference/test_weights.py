"""Our own weights into the reference models: round trips, position embeddings resized, heads of other class counts."""

from __future__ import annotations

import argparse
import sys

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
        assert set(report.dropped) == {"epoch", "<int>"} and "int" in report.dropped["epoch"]

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
    @pytest.mark.parametrize("options", [{"head": "skip"}, {"strict": False}])
    @pytest.mark.parametrize("family", ["vit", "cait", "cvt", "ceit", "twins"])
    def test_of_another_class_count_is_left_alone_where_asked(self, family, options):
        source, target = build(family), build(family, num_classes=7)
        own = {name: value.clone() for name, value in target.head.state_dict().items()}
        report = load_weights(target, source, **options)
        assert report.skipped_heads == [SkippedHead("head", 5, 7)]
        assert report.missing == [] and report.unexpected == [] and not {"head.weight", "head.bias"} & {*report.loaded}
        assert "head, 5 classes in the source, 7 in the model" in str(report)
        others = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
        assert_state(target, {**others, **{f"head.{name}": value for name, value in own.items()}})

    @pytest.mark.parametrize("family", ["vit", "deit_distilled", "cvt"])
    def test_of_another_class_count_is_refused(self, family):
        """A head left random without a word is the wrong model in production."""
        words = r"head: 5 classes in the source, 1000 in the model; head='skip' loads the rest"
        assert_refused(build(family, num_classes=1000), build(family), words)

    def test_skipped_whatever_the_source_holds(self):
        for source in (build("vit"), build("vit", num_classes=0)):
            target = build("vit")
            own = target.head.weight.clone()
            report = load_weights(target, source, head="skip")
            assert torch.equal(target.head.weight, own) and [each.name for each in report.skipped_heads] == ["head"]

    def test_another_value(self):
        assert_refused(build("vit"), build("vit"), "head: expected 'load' or 'skip', got 'drop'", head="drop")

    def test_both_heads_of_a_distilled_model(self):
        report = load_weights(build("deit_distilled", num_classes=3), build("deit_distilled"), head="skip")
        assert report.skipped_heads == [SkippedHead("head", 5, 3), SkippedHead("head_dist", 5, 3)]

    def test_model_without_head(self):
        report = load_weights(build("vit", num_classes=0), build("vit"))
        assert report.skipped_heads == [SkippedHead("head", 5, 0)]

    def test_source_without_head(self):
        source = build("vit", num_classes=0)
        assert_refused(build("vit"), source, r"missing \(2\): head.weight, head.bias\n  head='skip' leaves")
        assert load_weights(build("vit"), source, strict=False).missing == ["head.weight", "head.bias"]


class TestTrainingCode:
    """Checkpoints of other people's training code: the network behind a prefix, and things that are not the network."""

    @pytest.mark.parametrize(
        "prefix", ["student.", "teacher.", "backbone.", "module.model.", "model.student.backbone."]
    )
    def test_network_behind_a_prefix_beside_something_else(self, prefix):
        source, target = build("vit"), build("vit")
        extra = {"criterion.weight": torch.ones(3), "queue": torch.ones(2, 3)}
        report = load_weights(
            target, {**extra, **{prefix + name: value for name, value in source.state_dict().items()}}
        )
        assert_state(target, source.state_dict())
        assert set(report.dropped) == set(extra) and f"not under {prefix!r}" in str(report)

    def test_lightning(self, tmp_path):
        source, target, path = build("deit"), build("deit"), tmp_path / "last.ckpt"
        weights = {f"model.{name}": value for name, value in source.state_dict().items()}
        weights |= {"criterion.alpha": torch.tensor(0.5), "train_metric.total": torch.tensor(3)}
        torch.save({"epoch": 1, "state_dict": weights, "callbacks": {}, "pytorch-lightning_version": "2.5"}, path)
        report = load_weights(target, path)
        assert set(report.dropped) == {"criterion.alpha", "train_metric.total"}
        assert_state(target, source.state_dict())

    def test_mae(self):
        source, target = build("vit", num_classes=0), build("vit")
        decoder = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
        weights = {"model": {**source.state_dict(), **{name: torch.ones(2) for name in decoder}}}
        assert_refused(target, weights, "head='skip'")
        report = load_weights(target, weights, head="skip")
        assert set(report.dropped) == set(decoder) and "MAE" in str(report)
        assert torch.equal(target.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)

    def test_dino(self):
        """The official file: two networks, each behind DataParallel's prefix and beside its projection head."""
        teacher, student = build("vit", num_classes=0), build("vit", num_classes=0)
        head = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_g": torch.ones(4, 1)}
        networks = {
            name: {**{f"backbone.{key}": value for key, value in network.state_dict().items()}, **head}
            for name, network in (("student", student), ("teacher", teacher))
        }
        networks["student"] = {f"module.{name}": value for name, value in networks["student"].items()}
        target = build("vit")
        report = load_weights(target, {**networks, "epoch": 3}, head="skip")
        assert report.entry == "teacher" and set(report.dropped) == set(head)
        assert any("'student' is in the file too" in note for note in report.notes)
        assert torch.equal(target.cls_token, teacher.cls_token)
        load_weights(target, networks["student"], head="skip")
        assert torch.equal(target.cls_token, student.cls_token)

    def test_moco_v3(self):
        base, momentum, target = build("vit", num_classes=0), build("vit", num_classes=0), build("vit")
        weights = {f"module.base_encoder.{name}": value for name, value in base.state_dict().items()}
        weights |= {f"module.momentum_encoder.{name}": value for name, value in momentum.state_dict().items()}
        weights |= {
            "module.base_encoder.head.0.weight": torch.ones(2, 2),
            "module.predictor.0.weight": torch.ones(2, 2),
        }
        report = load_weights(target, {"state_dict": weights}, head="skip")
        assert torch.equal(target.cls_token, base.cls_token) and report.dropped["head.0.weight"].startswith(
            "the projec"
        )
        assert any("'module.momentum_encoder.' would fit as well" in note for note in report.notes)

    def test_teacher_of_another_size(self):
        student, teacher, target = build("deit"), build("deit", embed_dim=64), build("deit")
        networks = {"student": student, "teacher": teacher}
        load_weights(
            target,
            {f"{name}.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()},
        )
        assert_state(target, student.state_dict())

    def test_numbers_that_are_none_are_noted(self):
        weights = build("vit").state_dict()
        weights["norm.bias"][3] = float("nan")
        weights["cls_token"] = weights["cls_token"] / 0
        target = build("vit")
        report = load_weights(target, weights)
        assert "NaN or infinite values in 2 tensors: cls_token, norm.bias" in str(report)
        assert load_weights(target, build("vit")).notes == []


class TestHub:
    """Ids of the Hugging Face hub, from its cache on disk."""

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path / "models--org--name"

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    @pytest.mark.parametrize("given", ["hf-hub:org/name", "hf_hub:org/name", "hf-hub:org/name@main"])
    def test_cached(self, cache, name, given):
        source, target = build("vit"), build("vit")
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0" * 40)
        path = cache / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True)
        if name.endswith("bin"):
            torch.save(source.state_dict(), path)
        else:
            pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
        assert load_weights(target, given).source == given
        assert_state(target, source.state_dict())

    @pytest.mark.parametrize("given", ["hf-hub:org/name", "hf-hub:not/a/name", "hf-hub:"])
    def test_absent(self, cache, given):
        assert_refused(build("vit"), given, rf"no model.safetensors or .* for {given} \(expected hf-hub:org/name")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert_refused(build("vit"), "hf-hub:org/name", "needs the package huggingface_hub", ImportError)

    def test_url(self):
        words = "got the URL https://a.b/c.pth: download it first, by torch.hub.download_url_to_file"
        assert_refused(build("vit"), "https://a.b/c.pth", words)


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
