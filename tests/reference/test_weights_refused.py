"""Weights that do not fit, and files that are damaged, hostile or something else: every way a load can fail."""

from __future__ import annotations

import os
import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastvit.reference.weights import load_weights
from tests.reference.checkpoints import FAMILIES, assert_refused, assert_state, build, jax_arrays, snapshot


class TestNamesAndShapes:
    def test_strict_names_what_is_missing_and_unexpected(self):
        weights = build("vit").state_dict()
        removed = [name for name in list(weights) if name.startswith("blocks.1.")]
        for name in removed:
            del weights[name]
        weights |= {f"extra.{i}": torch.ones(1) for i in range(20)}
        model = build("vit")
        before = snapshot(model)
        with pytest.raises(ValueError, match="does not fit ViT") as caught:
            load_weights(model, weights)
        assert f"missing (12): {', '.join(removed[:8])}, and 4 more" in str(caught.value)
        assert f"unexpected (20): {', '.join(f'extra.{i}' for i in range(8))}, and 12 more" in str(caught.value)
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

    def test_other_shapes_of_everything_are_counted(self):
        words = r"(?s)nothing was loaded\n  .*\n  and \d+ more$"
        assert_refused(build("vit"), build("vit", embed_dim=64, num_heads=2), words)

    def test_other_shapes_behind_a_prefix(self):
        weights = {f"module.{name}": torch.ones(3, 3, 3, 3) for name in build("vit").state_dict()}
        assert_refused(build("vit"), weights, r"cls_token: \(3, 3, 3, 3\) in the source, \(1, 1, 32\) in the model")

    def test_model_without_parameters(self):
        assert_refused(nn.Identity(), build("vit"), "none of its 32 names .* belongs to Identity")

    def test_class_for_an_instance(self):
        words = r"source: expected .*, got <class .*ViT'>: give an instance of it"
        assert_refused(build("vit"), type(build("vit")), words, TypeError)

    @pytest.mark.parametrize("source", [None, 3, [torch.ones(1)]])
    def test_source_of_another_type(self, source):
        assert_refused(build("vit"), source, "source: expected", TypeError)

    def test_model_of_another_type(self):
        with pytest.raises(TypeError, match="model: expected .*got dict"):
            load_weights({}, build("vit"))


class TestAllOrNothing:
    """What used to fail after most of the tensors had been overwritten."""

    def test_dtype_that_torch_does_not_convert(self):
        if not hasattr(torch, "float4_e2m1fn_x2"):
            pytest.skip("this torch has no float4")
        weights = build("vit").state_dict()
        weights["head.bias"] = torch.empty(5, dtype=torch.float4_e2m1fn_x2)
        assert_refused(build("vit"), weights, "head.bias cannot be read as torch.float32, nothing was loaded")

    def test_expanded_parameter(self):
        model = build("vit")
        model.head.bias = nn.Parameter(torch.ones(1).expand(5))
        assert_refused(model, build("vit"), "model: head.bias is an expanded tensor.*clone it")

    def test_archive_damaged_in_one_entry(self, tmp_path):
        path = tmp_path / "weights.npz"
        arrays = jax_arrays(False)
        np.savez(path, **arrays)
        data, last = path.read_bytes(), arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_1/kernel"].tobytes()
        where = data.index(last)
        path.write_bytes(data[:where] + bytes(len(last)) + data[where + len(last) :])
        assert_refused(build("vit"), path, "fc2.weight cannot be read as torch.float32, nothing was loaded: BadZipFile")


class TestBounds:
    """A small file does not take much memory, and a long one does not make a long message."""

    LARGE = 2**28  # float32: 1 GiB, of zeros that compress to a thousandth

    @pytest.fixture(autouse=True)
    def limit(self):
        """Nothing may allocate more than a few megabytes in Python, nor a tensor of a megabyte outside of meta."""
        tracemalloc.start()
        try:
            with NoLargeTensor():
                yield
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("name", ["head/kernel", "cls", "Transformer/posembed_input/pos_embedding", "unknown"])
    def test_npz_that_unpacks_into_much(self, name, tmp_path):
        shapes = {"head/kernel": (32, self.LARGE // 32), "cls": (1, 1, self.LARGE)}
        shape = shapes.get(name, (1, self.LARGE // 32, 32))
        path = tmp_path / "weights.npz"
        np.savez(path, **{key: value for key, value in jax_arrays(False).items() if key != name})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(bytes(2**20))
        assert_refused(build("vit"), path, "does not fit|damaged")
        if name == "unknown":
            assert load_weights(build("vit"), path, strict=False).unexpected == [name]

    def test_expanded_tensors_in_a_file(self, tmp_path):
        weights, path = build("vit").state_dict(), tmp_path / "weights.pth"
        weights["pos_embed"] = torch.ones(1).expand(1, 2**40, 32)
        weights["blocks.0.attn.qkv.weight"] = torch.ones(1).expand(2**40, 32)
        torch.save(weights, path)
        assert_refused(build("vit"), path, r"pos_embed: \(1, 1099511627776, 32\)")
        weights = {"pos_embed": weights["pos_embed"], "cls_token": weights["cls_token"]}
        assert_refused(build("vit"), weights, "expected at most 65536 tokens", strict=False)

    def test_query_key_value_apart(self):
        weights = {
            f"encoder.layer.0.attention.attention.{part}.weight": torch.ones(1).expand(2**30, 32)
            for part in ("query", "key", "value")
        }
        weights["embeddings.patch_embeddings.projection.weight"] = torch.ones(32, 3, 8, 8)
        words = r"blocks.0.attn.qkv.weight: \(3221225472, 32\) in the source"
        assert_refused(build("vit"), weights, words, strict=False)

    def test_compressed_pickle(self, tmp_path):
        path, plain = tmp_path / "weights.pth", tmp_path / "plain.pth"
        torch.save(build("vit").state_dict(), plain)
        with zipfile.ZipFile(plain) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
            for entry in before.infolist():
                # megabytes of nothing behind the end of each record
                after.writestr(entry.filename, before.read(entry) + bytes(2**20))
        assert path.stat().st_size < 2**22
        assert_refused(build("vit"), path, "it is compressed, to unpack into")

    @pytest.mark.parametrize("name", ["pipe.pth", "pipe.npz", "pipe.safetensors"])
    def test_fifo(self, name, tmp_path):
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no FIFOs")
        os.mkfifo(tmp_path / name)
        assert_refused(build("vit"), tmp_path / name, f"{name}, which is no regular file")

    def test_device(self, tmp_path):
        if not Path("/dev/zero").exists():
            pytest.skip("this system has no /dev/zero")
        (tmp_path / "zero.pth").symlink_to("/dev/zero")
        assert_refused(build("vit"), tmp_path / "zero.pth", "zero.pth, which is no regular file")

    def test_directory(self, tmp_path):
        assert_refused(build("vit"), tmp_path, "which is a directory")


class NoLargeTensor(TorchFunctionMode):
    """Refuses operations that give a tensor of more than a megabyte of memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and func is not torch.Tensor.expand:
            assert result.untyped_storage().nbytes() <= 2**22, func
        return result


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
        assert_refused(build("vit"), path, r"weights.npz cannot be read.*payload.npy holds pickled objects")
        assert not marker.exists()

    def test_whole_pickled_model(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save(build("vit"), path)
        assert_refused(build("vit"), path, r"a pickled model.*asks for fastvit\..*save the model's state_dict")

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
        assert_refused(build("vit"), path, "File is not a zip file")


def test_messages_and_reports_are_bounded():
    weights = {**build("vit").state_dict(), **{f"extra.{i}": torch.ones(1) for i in range(3000)}}
    weights["x" * 10**5] = torch.ones(1)
    for source in (weights, {"extra" + name: value for name, value in weights.items()}):
        with pytest.raises(ValueError) as caught:
            load_weights(build("vit"), source)
        assert len(str(caught.value)) < 4000
    assert len(str(load_weights(build("vit"), weights, strict=False))) < 4000
    odd = {f"note.{i}": i for i in range(3000)}
    assert len(str(load_weights(build("vit"), {**build("vit").state_dict(), **odd}))) < 4000
