"""Published weights into the reference models: every format against the outputs of its library."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastvit.reference.layers import resize_pos_embed
from fastvit.reference.weights import ResizedTensor, load_weights
from tests.reference.checkpoints import SMALL, TWINS, assert_refused, assert_state, build, images, jax_arrays, snapshot
from tests.reference.parity import assert_same, randomise

HUGGING_FACE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


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
