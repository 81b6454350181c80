"""python -m fastvit verify | bench: models of every library by name, verdicts, and what bad names get."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit import __main__
from fastvit.cli import bench as bench_command
from fastvit.cli import models
from fastvit.patching import timing
from fastvit.patching.rows import reference as table

SMALL = ("--size", "32", "--batch", "2")
OWN = """
import torch
from torch import nn
import fastvit

def small():
    settings = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4, num_classes=300)
    return fastvit.reference.CaiT(**settings)

def with_example():
    return small(), {"x": torch.randn(3, 3, 32, 32)}

def number():
    return 3

def nothing_to_fuse():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))

class Class(fastvit.reference.ViT):
    def __init__(self):
        super().__init__(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4, num_classes=300)

class names:
    inside = small()
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command in this process: (exit status, standard output, standard error), on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = __main__.main(arguments)
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's own."""
    (tmp_path / "my_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_models"
    sys.modules.pop("my_models", None)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own attention, fused, is off by a thousandth."""
    right = table.AttentionOverride.attend
    monkeypatch.setattr(table.AttentionOverride, "attend", lambda self, *args: right(self, *args) * 1.001)


def patched_ops(candidate: models.Candidate) -> set[str]:
    fastvit.patch(candidate.model)
    return {row.op for row in fastvit.report(candidate.model).rows if row.status == "patched"}


class TestModels:
    @pytest.mark.parametrize(
        ("name", "library", "ops"),
        [
            ("fastvit/ceit_tiny", None, {"masked_attention", "class_attention", "leff", "linear"}),
            ("deit_tiny_patch16_224", None, {"masked_attention", "linear"}),
            ("timm/cait_xxs24_224", "timm", {"head_mixed_attention", "class_attention"}),
            ("torchvision/vit_b_32", "torchvision", {"masked_attention"}),
            ("transformers/CvtConfig", "transformers", {"masked_attention", "conv_projection", "linear"}),
            ("transformers/DeiTConfig", "transformers", {"masked_attention", "linear"}),
            ("vit_pytorch/SimpleViT", "vit_pytorch", {"masked_attention", "linear"}),
            ("vit_pytorch/cait.CaiT", "vit_pytorch", {"head_mixed_attention"}),
        ],
    )
    def test_each_library_by_name(self, name, library, ops):
        pytest.importorskip(library or "torch")
        candidate = models.load(name, size=32)
        inputs = candidate.inputs(3)
        x = inputs["pixel_values"] if name.startswith("transformers") else inputs
        assert x.shape == (3, 3, 32, 32)
        assert not candidate.model.training and not fastvit.is_patched(candidate.model)
        assert patched_ops(candidate) - {"mlp", "conv_batch_norm"} == ops

    def test_sizes_are_the_models_own(self):
        pytest.importorskip("timm")
        assert models.load("timm/vit_tiny_patch16_384").inputs(1).shape == (1, 3, 384, 384)
        assert models.load("cait_xxs24_384").inputs(1).shape == (1, 3, 384, 384)

    def test_a_model_that_transformers_cannot_import_says_so(self):
        class Broken:
            @property
            def _model_mapping(self):
                raise ModuleNotFoundError("Could not import module 'CvtForImageClassification'")

        library = SimpleNamespace(AutoModelForImageClassification=Broken(), AutoModel=Broken())
        with pytest.raises(models.CannotLoad, match="transformers cannot import the model of a dict: Could not import"):
            models._of_config(library, {})

    def test_a_directory_saved_by_transformers(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=5
        )
        saved = transformers.ViTForImageClassification(config)
        saved.save_pretrained(tmp_path)
        candidate = models.load(f"transformers/{tmp_path}")
        assert type(candidate.model) is type(saved)
        assert candidate.inputs(2)["pixel_values"].shape == (2, 3, 32, 32)
        for name, tensor in saved.state_dict().items():
            assert torch.equal(candidate.model.state_dict()[name], tensor), name
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(models.CannotLoad, match="transformers cannot load"):
            models.load(f"transformers/{tmp_path}")

    @pytest.mark.parametrize("name", ["small", "with_example", "Class", "names.inside"])
    def test_of_ones_own(self, own, name):
        candidate = models.load(f"{own}:{name}", size=32)
        inputs = candidate.inputs(2)
        assert models.batch_of(inputs) == (3 if name == "with_example" else 2)
        assert isinstance(inputs, dict) == (name == "with_example")
        assert patched_ops(candidate)

    def test_a_seed_gives_the_same_model_and_another_another(self):
        one, same, other = (models.load("ceit_tiny", size=32, seed=seed) for seed in (1, 1, 2))
        states = [candidate.model.state_dict()["blocks.0.attn.qkv.weight"] for candidate in (one, same, other)]
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "resnet",
                r"model: expected fastvit/NAME, timm/NAME, .*, or package.module:factory for your own, got 'resnet'",
            ),
            ("keras/vit", "model: expected .*, got 'keras/vit'"),
            ("fastvit/cait_xss24_224", "unknown model 'cait_xss24_224'; did you mean .*cait_xxs24_224"),
            ("timm/deit_smal_patch16_224", "timm .* has no model 'deit_smal.*did you mean .*deit_small_patch16_224"),
            ("torchvision/vit_b_17", "torchvision has no model 'vit_b_17'; did you mean .*vit_b_16"),
            ("transformers/VitConfg", "no configuration class 'VitConfg', and there is no .*did you mean .*ViTConfig"),
            ("vit_pytorch/cat.CaiT", "vit_pytorch has no module 'cat'; did you mean .*cait"),
            ("vit_pytorch/cait.Cait", "vit_pytorch.cait has no model 'Cait'; did you mean .*CaiT"),
            ("vit_pytorch/mae.MAE", "vit_pytorch.mae.MAE wants encoder.*: write a function"),
            ("no_such.module:thing", "there is no module 'no_such' to take 'thing' from"),
        ],
    )
    def test_unknown_names_get_the_nearest(self, name, message):
        for library in ("timm", "torchvision", "transformers", "vit_pytorch"):
            if name.startswith(library):
                pytest.importorskip(library)
        with pytest.raises(models.CannotLoad, match=message):
            models.load(name)

    def test_wrong_factories(self, own):
        with pytest.raises(models.CannotLoad, match="my_models has no 'smal'; did you mean small"):
            models.load(f"{own}:smal")
        with pytest.raises(
            models.CannotLoad, match="my_models:number: expected a torch.nn.Module, or one and an example, got int"
        ):
            models.load(f"{own}:number")

    def test_a_torchvision_of_another_torch(self, monkeypatch, tmp_path):
        text = 'raise RuntimeError("operator torchvision::nms does not exist")'
        (tmp_path / "timm.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "timm", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(models.CannotLoad, match="nms does not exist; the torchvision here is not that of torch 2"):
            models.load("timm/vit_tiny_patch16_224")

    def test_a_library_that_is_not_there(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(
            models.CannotLoad, match="timm .*(not installed here: pip install timm|import of timm halted)"
        ):
            models.load("timm/vit_tiny_patch16_224")

    def test_an_error_in_ones_own_module_is_not_hidden(self, tmp_path, monkeypatch):
        (tmp_path / "broken_models.py").write_text("import no_such_dependency")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            models.load("broken_models:model")


class TestVerify:
    def test_an_accurate_model(self, cli):
        status, out, _ = cli("verify", "deit_tiny_patch16_224", *SMALL)
        assert status == 0
        assert "blocks.11.attn" in out and "the whole model" in out
        assert "accurate: at most twice" in out and "bit by bit: yes" in out

    def test_json_and_bfloat16(self, cli, own):
        status, out, err = cli("verify", f"{own}:small", "--dtype", "bfloat16", "--json", *SMALL)
        told = json.loads(out)
        assert (status, err) == (0, "")
        assert told["accurate"] is told["undone_exactly"] is True
        assert (told["model"], told["dtype"], told["device"]) == ("my_models:small", "bfloat16", "cpu")
        assert 1e-4 < told["plain_error"] < 1e-1
        assert [row["within_budget"] for row in told["rows"]] == [True] * len(told["rows"])

    def test_parity_that_fails(self, cli, wrong):
        status, out, _ = cli("verify", "deit_tiny_patch16_224", *SMALL)
        assert status == 1
        assert "over budget" in out
        assert "less accurate than the plain model's own error allows: blocks.0.attn" in out
        status, out, _ = cli("verify", "deit_tiny_patch16_224", "--json", *SMALL)
        told = json.loads(out)
        assert status == 1 and told["accurate"] is False and told["undone_exactly"] is True
        assert not any(row["within_budget"] for row in told["rows"] if row["name"].endswith("attn"))

    def test_nothing_patched_is_no_success(self, cli, own):
        status, out, _ = cli("verify", f"{own}:nothing_to_fuse", *SMALL)
        assert status == 1
        assert "nothing was patched" in out

    def test_an_undoing_that_leaves_something_behind(self, cli, monkeypatch):
        from fastvit.cli import verify

        def unpatch(model: nn.Module) -> nn.Module:
            fastvit.unpatch(model)
            with torch.no_grad():
                model.head.bias.add_(1.0)
            return model

        monkeypatch.setattr(verify, "unpatch", unpatch)
        status, out, _ = cli("verify", "deit_tiny_patch16_224", *SMALL)
        assert status == 1
        assert "bit by bit: no" in out


class TestBench:
    def test_speed_beside_parity(self, cli, own):
        status, out, _ = cli("bench", f"{own}:small", "--rounds", "3", *SMALL)
        assert status == 0
        assert "my_models:small, batch 2, float32 on cpu" in out
        assert "1 head_mixed_attention" in out
        assert "x (" in out

    def test_json(self, cli, own):
        status, out, _ = cli("bench", f"{own}:with_example", "--rounds", "3", "--json")
        told = json.loads(out)
        assert status == 0
        assert (told["batch"], told["accurate"], told["compile"]) == (3, True, False)
        assert sum(told["replaced"].values()) == 8
        speed, speedup = told["images_per_s"], told["speedup"]
        assert 0 < speedup["low"] <= speedup["median"] <= speedup["high"]
        assert speed["plain"] > 0 and speed["patched"] > 0

    def test_images_per_second_and_speedup_are_of_the_times(self, cli, own, monkeypatch):
        def fake(calls, device, *, rounds):
            assert len(calls) == 2 and rounds == 4
            return [[0.5] * rounds, [2.0] * rounds]

        monkeypatch.setattr(bench_command, "interleaved", fake)
        _, out, _ = cli("bench", f"{own}:small", "--rounds", "4", "--json", *SMALL)
        told = json.loads(out)
        assert told["images_per_s"] == {"plain": 1.0, "patched": 4.0}
        assert told["speedup"] == {"median": 4.0, "low": 4.0, "high": 4.0}

    def test_the_patched_and_the_plain_model_are_timed(self, cli, own, monkeypatch):
        timed: list[bool] = []
        real = timing.interleaved

        def spy(calls, device, *, rounds):
            timed.extend(fastvit.is_patched(call.func) for call in calls)
            return real(calls, device, rounds=rounds)

        monkeypatch.setattr(bench_command, "interleaved", spy)
        cli("bench", f"{own}:small", "--rounds", "1", *SMALL)
        assert timed == [True, False]

    def test_no_speed_on_a_red_gate(self, cli, wrong, monkeypatch):
        def never(*_: object, **__: object) -> None:
            raise AssertionError("timed")

        monkeypatch.setattr(bench_command, "interleaved", never)
        status, out, _ = cli("bench", "deit_tiny_patch16_224", *SMALL)
        assert status == 1
        assert "not timed: less accurate" in out
        assert "x (" not in out
        status, out, _ = cli("bench", "deit_tiny_patch16_224", "--json", *SMALL)
        told = json.loads(out)
        assert status == 1 and told["accurate"] is False
        assert not {"images_per_s", "speedup"} & set(told)

    def test_compile_compiles_both(self, cli, own, monkeypatch):
        compiled: list[bool] = []

        def fake_compile(model: nn.Module) -> nn.Module:
            compiled.append(fastvit.is_patched(model))
            return model

        monkeypatch.setattr(torch, "compile", fake_compile)
        status, out, _ = cli("bench", f"{own}:small", "--rounds", "1", "--compile", *SMALL)
        assert status == 0
        assert sorted(compiled) == [False, True]
        assert "torch.compile" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: expected a positive integer, got '0'"),
        (["--size", "x"], "argument --size: expected a positive integer, got 'x'"),
        (["--dtype", "int8"], "argument --dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "argument --device: 'tpu' cannot be used here: "),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["verify", "ceit_tiny", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_models_go_to_standard_error(cli):
    status, out, err = cli("verify", "ceit_tny")
    assert (status, out) == (2, "")
    assert err.startswith("fastvit verify: model: expected fastvit/NAME")


def test_examples_keep_what_is_not_floating():
    example = {"x": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool), "flag": True}
    moved = models.to(example, torch.device("cpu"), torch.bfloat16)
    assert isinstance(moved["x"], Tensor)
    assert (moved["x"].dtype, moved["mask"].dtype, moved["flag"]) == (torch.bfloat16, torch.bool, True)
