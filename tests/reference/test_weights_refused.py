"""Weights that do not fit, and files that are damaged, hostile or something else: every way a load can fail."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastvit.reference.weights import load_weights
from tests.reference.checkpoints import FAMILIES, assert_refused, assert_state, build, jax_arrays, snapshot


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
        assert_refused(build("vit"), source, "source: expected", TypeError)

    def test_model_of_another_type(self):
        with pytest.raises(TypeError, match="model: expected .*got dict"):
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
        assert_refused(build("vit"), path, f"expected a dict of tensors in .*, got {type(content).__name__}")

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
        assert_refused(build("vit"), str(tmp_path / "weights.h5"), r"one of the extensions .pth, .*npz, got .*\.h5")

    def test_one_array_under_the_name_of_many(self, tmp_path):
        path = tmp_path / "weights.npz"
        with path.open("wb") as file:
            np.save(file, np.ones(3))
        assert_refused(build("vit"), path, "not an archive of arrays")
