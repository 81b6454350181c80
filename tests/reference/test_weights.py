"""Published weights into the reference models: every format against its library's outputs, and every way to fail."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import assert_same, randomise
from torch import nn
from torch.nn import functional as F

from fastvit.reference import CPVT, CaiT, CeiT, CvT, DeepViT, DeiT, TwinsPCPVT, ViT
from fastvit.reference.layers import resize_pos_embed
from fastvit.reference.weights import LoadReport, ResizedTensor, SkippedHead, load_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
CVT = {"img_size": 32, "embed_dim": (8, 16, 32), "depth": (1, 2, 3), "num_heads": (1, 2, 4), "num_classes": 5}
TWINS = {"img_size": 64, "embed_dim": (8, 16, 24, 32), "depth": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
FAMILIES = {
    "vit": lambda **options: ViT(**{**SMALL, **options}),
    "vit_avg": lambda **options: ViT(**{**SMALL, "pool": "avg", **options}),
    "deit": lambda **options: DeiT(**{**SMALL, **options}),
    "deit_distilled": lambda **options: DeiT(**{**SMALL, "distilled": True, **options}),
    "deepvit": lambda **options: DeepViT(**{**SMALL, **options}),
    "cait": lambda **options: CaiT(**{**SMALL, **options}),
    "cpvt": lambda **options: CPVT(**{**SMALL, **options}),
    "twins": lambda **options: TwinsPCPVT(**{**TWINS, "num_classes": 5, **options}),
    "cvt": lambda **options: CvT(**{**CVT, **options}),
    "ceit": lambda **options: CeiT(**{**SMALL, **options}),
}
HUGGING_FACE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def build(family: str, **options) -> nn.Module:
    """A small model of a family with values that show when one goes astray."""
    return randomise(FAMILIES[family](**options)).eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert different == []


def assert_refused(model: nn.Module, source, words: str, error: type[Exception] = ValueError, **options) -> None:
    """The load fails with these words, and the model is bit for bit what it was."""
    before = snapshot(model)
    with pytest.raises(error, match=words):
        load_weights(model, source, **options)
    assert_state(model, before)


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size)


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


class TestTimm:
    """timm shares the official names; its live models are read directly and give the same outputs."""

    @pytest.fixture(autouse=True)
    def timm(self):
        pytest.importorskip("timm")

    @pytest.mark.parametrize(("pool", "ours"), [("token", "token"), ("avg", "avg")])
    def test_vit(self, pool, ours):
        from timm.models.vision_transformer import VisionTransformer

        theirs, model, x = (
            randomise(VisionTransformer(**SMALL, global_pool=pool)).eval(),
            build("vit", pool=ours),
            images(),
        )
        report = load_weights(model, theirs)
        assert report.notes == [] and report.source == "timm.models.vision_transformer.VisionTransformer"
        assert_same(model(x), theirs(x))

    def test_vit_that_pools_otherwise_is_noted(self):
        from timm.models.vision_transformer import VisionTransformer

        theirs = randomise(VisionTransformer(**SMALL, global_pool="avg", fc_norm=False)).eval()
        assert any("pools by 'avg'" in note for note in load_weights(build("vit"), theirs).notes)
        model, x = build("vit", pool="mean"), images()
        assert load_weights(model, theirs).notes == []
        assert_same(model(x), theirs(x))

    def test_deit_distilled(self):
        from timm.models.deit import VisionTransformerDistilled

        theirs, model, x = randomise(VisionTransformerDistilled(**SMALL)).eval(), build("deit_distilled"), images()
        load_weights(model, theirs)
        assert_same(model(x), theirs(x))

    def test_cait(self):
        from timm.models.cait import Cait

        theirs, model, x = randomise(Cait(**SMALL)).eval(), build("cait"), images()
        load_weights(model, theirs)
        assert_same(model(x), theirs(x))

    def test_twins(self):
        from timm.models.twins import Twins

        sizes = {"embed_dims": TWINS["embed_dim"], "depths": TWINS["depth"], "num_heads": TWINS["num_heads"]}
        theirs = Twins(**sizes, img_size=64, mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1), num_classes=5)
        randomise(theirs).eval()
        model, x = build("twins"), images(64)
        load_weights(model, theirs)
        assert_same(model(x), theirs(x))

    def test_other_number_of_heads(self):
        """Nothing in the shapes tells it: only the live model does."""
        from timm.models.vision_transformer import VisionTransformer

        theirs = randomise(VisionTransformer(**{**SMALL, "num_heads": 4}))
        assert_refused(build("vit"), theirs, r"attention heads: \[4\] in the source, \[2\]")
        load_weights(build("vit"), theirs, strict=False)

    def test_grid_that_is_not_square(self):
        from timm.models.vision_transformer import VisionTransformer

        theirs = randomise(VisionTransformer(**{**SMALL, "img_size": (16, 64)})).eval()  # as many patches as 4 x 4
        model = build("vit")
        report = load_weights(model, theirs)
        assert report.resized == [ResizedTensor("pos_embed", (1, 17, 32), (1, 17, 32))]
        assert torch.equal(model.pos_embed, resize_pos_embed(theirs.pos_embed, (4, 4), old_grid=(2, 8)))


def transformers_4_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers 5.x has in memory, by the names of 4.x and of the files on its hub."""
    rules = [
        (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ]
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


class TestTransformers:
    @pytest.fixture(autouse=True)
    def transformers(self):
        self.library = pytest.importorskip("transformers")

    def vit(self, kind="ViTForImageClassification"):
        return randomise(getattr(self.library, kind)(self.library.ViTConfig(**HUGGING_FACE))).eval()

    def deit(self, kind="DeiTForImageClassificationWithTeacher"):
        return randomise(getattr(self.library, kind)(self.library.DeiTConfig(**HUGGING_FACE))).eval()

    def check(self, model, theirs):
        """Live, and by 4.x names; both give the library's outputs."""
        x, live = images(), load_weights(model, theirs)
        assert_same(model(x), theirs(x).logits)
        expected = snapshot(model)
        randomise(model)
        renamed = load_weights(model, transformers_4_names(theirs.state_dict()))
        assert_state(model, expected)
        assert {live.format, renamed.format} == {"transformers-4", "transformers-5"}
        return live

    def test_vit(self):
        assert self.check(build("vit", norm_eps=1e-12), self.vit()).notes == []

    def test_eps_is_noted(self):
        for source in (self.vit(), self.vit().state_dict()):
            report = load_weights(build("vit"), source)
            assert any("1e-12" in note and "1e-06" in note for note in report.notes)

    def test_deit_with_both_heads(self):
        self.check(build("deit_distilled", norm_eps=1e-12), self.deit())

    def test_deit_with_one_head_lacks_the_other(self):
        theirs = self.deit("DeiTForImageClassification")
        assert_refused(build("deit_distilled"), theirs, r"missing \(2\): head_dist.weight, head_dist.bias")

    @pytest.mark.parametrize("old", [False, True])
    def test_base_model_without_prefix(self, old):
        theirs, model = self.vit("ViTModel"), build("vit", num_classes=0, norm_eps=1e-12)
        report = load_weights(model, transformers_4_names(theirs.state_dict()) if old else theirs)
        assert set(report.dropped) == {"pooler.dense.weight", "pooler.dense.bias"}
        x = images()
        assert_same(model.forward_features(x), theirs(x).last_hidden_state)

    def test_mask_token_is_dropped(self):
        theirs = self.library.ViTModel(self.library.ViTConfig(**HUGGING_FACE), use_mask_token=True)
        report = load_weights(build("vit", num_classes=0), theirs)
        assert "embeddings.mask_token" in report.dropped

    def test_half_of_a_query_key_value_triple(self):
        weights = transformers_4_names(self.vit().state_dict())
        del weights["vit.encoder.layer.1.attention.attention.key.weight"]
        words = r"missing \(1\): blocks.1.attn.qkv.weight\n.*unexpected \(2\): blocks.1.attn.q.weight, blocks.1.attn.v"
        assert_refused(build("vit"), weights, words)

    def cvt(self, kind="CvtForImageClassification"):
        config = {"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4], "num_labels": 5}
        return randomise(getattr(self.library, kind)(self.library.CvtConfig(**config))).eval()

    def test_cvt(self):
        theirs, model, x = self.cvt(), build("cvt", act="gelu"), images()
        report = load_weights(model, theirs)
        assert report.format == "transformers" and report.notes == []
        assert_same(model(x), theirs(x).logits)

    def test_cvt_activation_is_noted(self):
        assert any("act='gelu'" in note for note in load_weights(build("cvt"), self.cvt()).notes)

    def test_cvt_base_model(self):
        report = load_weights(build("cvt"), self.cvt("CvtModel"), strict=False)
        assert report.missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"] and report.unexpected == []


class TestTorchvision:
    @pytest.fixture
    def theirs(self):
        library = pytest.importorskip("torchvision")
        return randomise(library.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=5)).eval()

    def test_outputs(self, theirs):
        model, x = build("vit"), images()
        report = load_weights(model, theirs)
        assert report.format == "torchvision" and report.notes == []
        assert_same(model(x), theirs(x))

    def test_names_before_0_13(self, theirs):
        model, old = build("vit"), build("vit")
        load_weights(model, theirs)
        weights = {
            name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
            for name, value in theirs.state_dict().items()
        }
        load_weights(old, weights)
        assert_state(old, model.state_dict())

    def test_into_a_model_of_its_own_library(self, theirs):
        """Any module takes weights by its own names."""
        other = randomise(type(theirs)(32, 8, 2, 2, 32, 128, num_classes=5))
        load_weights(other, theirs.state_dict())
        assert_state(other, theirs.state_dict())


def jax_arrays(linen: bool, tokens: int = 17, **options) -> dict[str, np.ndarray]:
    """Random weights in the layout of flax, by the published files' numbers or by linen's."""
    rng = np.random.default_rng(0)
    numbers = {"norm2": 1, "attention": 0, "mlp": 0} if linen else {"norm2": 2, "attention": 1, "mlp": 3}
    shapes = {"cls": (1, 1, 32), "embedding/kernel": (8, 8, 3, 32), "embedding/bias": (32,)}
    shapes |= {"Transformer/posembed_input/pos_embedding": (1, tokens, 32), "head/kernel": (32, 5), "head/bias": (5,)}
    norms = ["Transformer/encoder_norm"]
    for block in range(2):
        name = f"Transformer/encoderblock_{block}"
        norms += [f"{name}/LayerNorm_0", f"{name}/LayerNorm_{numbers['norm2']}"]
        attention = f"{name}/MultiHeadDotProductAttention_{numbers['attention']}"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}/{part}/kernel": (32, 2, 16), f"{attention}/{part}/bias": (2, 16)}
        shapes |= {f"{attention}/out/kernel": (2, 16, 32), f"{attention}/out/bias": (32,)}
        mlp = f"{name}/MlpBlock_{numbers['mlp']}"
        shapes |= {f"{mlp}/Dense_0/kernel": (32, 128), f"{mlp}/Dense_0/bias": (128,)}
        shapes |= {f"{mlp}/Dense_1/kernel": (128, 32), f"{mlp}/Dense_1/bias": (32,)}
    shapes |= {f"{norm}/{leaf}": (32,) for norm in norms for leaf in ("scale", "bias")}
    return {name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def jax_forward(arrays: dict[str, np.ndarray], x: torch.Tensor, linen: bool) -> torch.Tensor:
    """The ViT of google-research in float64, straight on flax's layout."""
    weights = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    numbers = (1, 0, 0) if linen else (2, 1, 3)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}/scale"], weights[f"{name}/bias"], 1e-6)

    def project(x, name, equation):
        return torch.einsum(equation, x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]

    patches = x.unfold(2, 8, 8).unfold(3, 8, 8)  # batch, channel, row, column, pixel row, pixel column
    tokens = torch.einsum("bcrsij,ijcd->brsd", patches, weights["embedding/kernel"]).flatten(1, 2)
    tokens = torch.cat((weights["cls"].expand(len(x), -1, -1), tokens + weights["embedding/bias"]), 1)
    tokens = tokens + weights["Transformer/posembed_input/pos_embedding"]
    for block in range(2):
        name = f"Transformer/encoderblock_{block}"
        attention = f"{name}/MultiHeadDotProductAttention_{numbers[1]}"
        y = norm(tokens, f"{name}/LayerNorm_0")
        q, k, v = (project(y, f"{attention}/{part}", "bnd,dhe->bnhe") for part in ("query", "key", "value"))
        probabilities = torch.einsum("bnhe,bmhe->bhnm", q, k).div(4.0).softmax(-1)  # head dim 16
        mixed = torch.einsum("bhnm,bmhe->bnhe", probabilities, v)
        tokens = tokens + project(mixed, f"{attention}/out", "bnhe,hed->bnd")
        mlp = f"{name}/MlpBlock_{numbers[2]}"
        y = project(norm(tokens, f"{name}/LayerNorm_{numbers[0]}"), f"{mlp}/Dense_0", "bnd,df->bnf")
        tokens = tokens + project(F.gelu(y, approximate="tanh"), f"{mlp}/Dense_1", "bnd,df->bnf")
    return project(norm(tokens, "Transformer/encoder_norm")[:, 0], "head", "bd,dc->bc")


class TestJax:
    @pytest.mark.parametrize("linen", [False, True])
    @pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
    def test_outputs(self, linen, prefix, tmp_path):
        arrays, path = jax_arrays(linen), tmp_path / "vit.npz"
        np.savez(path, **{prefix + name: array for name, array in arrays.items()})
        model, x = build("vit", act="gelu_tanh").double(), images().double()
        report = load_weights(model, path)
        assert report.format == "vit-jax" and report.notes == []
        assert_same(model(x), jax_forward(arrays, x, linen), tolerance=1e-12)

    def test_erf_gelu_is_noted(self):
        assert any("gelu_tanh" in note for note in load_weights(build("vit"), jax_arrays(False)).notes)

    def test_pre_logits_are_dropped(self):
        extra = {"pre_logits/kernel": np.ones((32, 32), np.float32), "pre_logits/bias": np.ones(32, np.float32)}
        report = load_weights(build("vit"), {**jax_arrays(False), **extra})
        assert set(report.dropped) == {"pre_logits.kernel", "pre_logits.bias"}

    def test_mean_pooling_has_no_class_token(self, tmp_path):
        arrays = jax_arrays(True, tokens=16)
        del arrays["cls"]
        model = build("vit", pool="gap")
        load_weights(model, arrays)
        assert torch.equal(model.pos_embed, torch.from_numpy(arrays["Transformer/posembed_input/pos_embedding"]))
        assert_refused(build("vit"), arrays, r"pos_embed.*tokens are \[\], the model's \['cls_token'\]")

    def test_bfloat16_as_numpy_reads_it_back(self):
        arrays = jax_arrays(False)
        cls = torch.from_numpy(arrays["cls"]).bfloat16()
        arrays["cls"] = cls.view(torch.int16).numpy().view("V2")
        model = build("vit")
        load_weights(model, arrays)
        assert torch.equal(model.cls_token, cls.float())

    def test_arrays_of_wrong_rank(self):
        arrays = jax_arrays(False)
        arrays["head/kernel"] = np.array(1.0, np.float32)
        assert_refused(build("vit"), arrays, "damaged vit-jax checkpoint")


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


class TestNamesAndShapes:
    def test_strict_names_all_of_them(self):
        weights = build("vit").state_dict()
        removed = [name for name in list(weights) if name.startswith("blocks.1.")]
        for name in removed:
            del weights[name]
        weights |= {f"extra.{i}": torch.ones(1) for i in range(20)}
        model = build("vit")
        before = snapshot(model)
        with pytest.raises(ValueError, match="does not fit ViT") as caught:
            load_weights(model, weights)
        assert all(name in str(caught.value) for name in (*removed, *(f"extra.{i}" for i in range(20))))
        assert_state(model, before)
        report = load_weights(model, weights, strict=False)
        assert report.missing == removed and report.unexpected == [f"extra.{i}" for i in range(20)]
        assert "unexpected (20): extra.0" in str(report) and "and 12 more" in str(report)
        assert_state(model, {**before, **{name: weights[name] for name in report.loaded}})
        assert len(report.loaded) == len(before) - len(removed)

    @pytest.mark.parametrize("strict", [True, False])
    def test_other_shapes_are_refused(self, strict):
        words = r"blocks.0.mlp.fc1.weight: \(64, 32\) in the source, \(128, 32\) in the model"
        assert_refused(build("vit"), build("vit", mlp_ratio=2.0), words, strict=strict)

    @pytest.mark.parametrize("strict", [True, False])
    def test_last_tensor_that_does_not_fit_stops_the_first(self, strict):
        weights = build("vit").state_dict()
        weights["norm.bias"] = torch.ones(31)
        assert_refused(build("vit"), weights, r"norm.bias: \(31,\)", strict=strict)

    def test_integers_for_weights(self):
        weights = {**build("vit").state_dict(), "norm.bias": torch.ones(32, dtype=torch.int8)}
        assert_refused(build("vit"), weights, "norm.bias: torch.int8 in the source, torch.float32")

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    @pytest.mark.parametrize("kind", ["meta", "sparse", "quantised"])
    def test_tensors_without_plain_numbers(self, kind):
        odd = {
            "meta": lambda: torch.ones(32, device="meta"),
            "sparse": lambda: torch.ones(32).to_sparse(),
            "quantised": lambda: torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8),
        }[kind]()
        assert_refused(build("vit"), {**build("vit").state_dict(), "norm.bias": odd}, "norm.bias is no plain tensor")

    def test_same_name_twice(self):
        weights = jax_arrays(False)
        weights["Transformer/encoderblock_0/LayerNorm_1/bias"] = np.ones(32, np.float32)
        assert_refused(build("vit"), weights, "holds blocks.0.norm2.bias twice")

    @pytest.mark.parametrize("strict", [True, False])
    def test_foreign_state_dict(self, strict):
        foreign = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
        assert_refused(build("vit"), foreign, "not a checkpoint of this model.*0.weight.*timm", strict=strict)

    @pytest.mark.parametrize("strict", [True, False])
    def test_resnet(self, strict):
        library = pytest.importorskip("torchvision")
        assert_refused(build("deepvit"), library.models.resnet18(), "none of its 122 names", strict=strict)

    def test_vit_pytorch_is_named_as_not_convertible(self):
        library = pytest.importorskip("vit_pytorch")
        other = library.ViT(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, mlp_dim=64)
        assert_refused(build("vit"), other, "vit-pytorch")

    def test_family_of_another_kind(self):
        assert_refused(build("cait"), build("vit"), "missing")

    def test_meta_model(self):
        with torch.device("meta"):
            model = FAMILIES["vit"]()
        with pytest.raises(ValueError, match=r"meta device.*to_empty"):
            load_weights(model, build("vit"))

    def test_model_without_memory_yet(self):
        with pytest.raises(ValueError, match="UninitializedParameter"):
            load_weights(nn.LazyLinear(3), {"weight": torch.ones(3, 3)})

    @pytest.mark.parametrize("source", [None, 3, [torch.ones(1)]])
    def test_source_of_another_type(self, source):
        assert_refused(build("vit"), source, "source: got", TypeError)

    def test_model_of_another_type(self):
        with pytest.raises(TypeError, match="model: got dict"):
            load_weights({}, build("vit"))


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class TestFiles:
    """Files that are damaged, hostile or not what they are called: a clear error, no code run, the model untouched."""

    @pytest.fixture
    def weights(self):
        return build("vit").state_dict()

    @pytest.mark.parametrize("legacy", [False, True])
    def test_pickles_with_code(self, weights, tmp_path, legacy):
        path, marker = tmp_path / "weights.pth", tmp_path / "it_ran"
        content = {**weights, "payload": Malicious(marker)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert_refused(build("vit"), path, r"weights.pth cannot be read.*mkdir")
        assert not marker.exists()
        torch.load(path, weights_only=False)  # the trap is a real one
        assert marker.exists()

    def test_plain_pickle_with_code(self, tmp_path):
        path, marker = tmp_path / "weights.bin", tmp_path / "it_ran"
        path.write_bytes(pickle.dumps({"model": Malicious(marker)}, protocol=2))
        assert_refused(build("vit"), path, "weights.bin cannot be read")
        assert not marker.exists()

    def test_npz_with_pickled_objects(self, tmp_path):
        path, marker = tmp_path / "weights.npz", tmp_path / "it_ran"
        np.savez(path, **jax_arrays(False), payload=np.array([Malicious(marker)], dtype=object))
        assert_refused(build("vit"), path, r"weights.npz cannot be read.*allow_pickle=False")
        assert not marker.exists()

    def test_whole_pickled_model(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save(build("vit"), path)
        assert_refused(build("vit"), path, r"asks for fastvit\..*save the state_dict")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
        with pytest.warns(UserWarning, match="TorchScript"):
            assert_refused(build("vit"), path, "cannot be read.*TorchScript")

    @pytest.mark.parametrize("extension", ["pth", "safetensors", "npz", "legacy.pth"])
    @pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, weights, tmp_path, extension, part):
        path = tmp_path / f"weights.{extension}"
        if extension == "npz":
            np.savez(path, **jax_arrays(False))
        elif extension == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(weights, path)
        else:
            torch.save(weights, path, _use_new_zipfile_serialization=extension == "pth")
        data = path.read_bytes()
        load_weights(build("vit"), path)
        path.write_bytes(data[: int(len(data) * part)])
        assert_refused(build("vit"), path, rf"{re.escape(str(path))} cannot be read, it may be truncated or damaged")

    @pytest.mark.parametrize("extension", ["pth", "safetensors", "npz"])
    @pytest.mark.parametrize("content", [b"<html>404 not found</html>", bytes(4096), b"\x80", b"PK\x03\x04"])
    def test_something_else_under_the_name(self, tmp_path, extension, content):
        path = tmp_path / f"weights.{extension}"
        path.write_bytes(content)
        assert_refused(build("vit"), path, r"cannot be read, it may be truncated or damaged")

    @pytest.mark.parametrize("extension", ["pth", "safetensors", "npz"])
    def test_empty(self, tmp_path, extension):
        path = tmp_path / f"weights.{extension}"
        path.touch()
        assert_refused(build("vit"), path, "is empty")

    @pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text"], ids=["list", "tensor", "str"])
    def test_no_dict(self, tmp_path, content):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        assert_refused(build("vit"), path, f"holds a {type(content).__name__}")

    @pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}])
    def test_no_tensors(self, tmp_path, content):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        assert_refused(build("vit"), path, "holds no tensors")

    def test_dict_that_holds_itself(self):
        content: dict = {}
        content["model"] = content
        assert_refused(build("vit"), content, "holds no tensors")

    def test_missing_file(self, tmp_path):
        assert_refused(build("vit"), tmp_path / "nowhere.pth", "nowhere.pth", FileNotFoundError)

    def test_unknown_extension(self, tmp_path):
        assert_refused(build("vit"), str(tmp_path / "weights.h5"), r"'.h5', accepted are .pth, .*npz")

    def test_one_array_under_the_name_of_many(self, tmp_path):
        path = tmp_path / "weights.npz"
        with path.open("wb") as file:
            np.save(file, np.ones(3))
        assert_refused(build("vit"), path, "not an archive of arrays")


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
