"""fastvit.auto: models of the libraries are fused as they are built, and only while it is on."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vit_pytorch
from torch import nn
from torch.nn.modules import module as torch_module

import fastvit
import fastvit.auto
from fastvit import backends
from fastvit.patching import building, is_patched, report, unpatch
from fastvit.patching.fusion import Fused

fastvit.auto.disable()  # the import switched it on, for every test file this process collects

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

from timm.layers.attention import Attention  # noqa: E402


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    """Each test begins and ends with it switched off."""
    fastvit.auto.disable()
    yield
    fastvit.auto.disable()


def _timm() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(**SETTINGS)


def _timm_cait() -> nn.Module:
    return timm.models.cait.Cait(**SETTINGS)


def _config() -> transformers.ViTConfig:
    return transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )


def _transformers() -> nn.Module:
    return transformers.ViTForImageClassification(_config())


def _torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96)


def _vit_pytorch() -> nn.Module:
    return vit_pytorch.ViT(image_size=32, patch_size=8, num_classes=7, dim=48, depth=2, heads=4, mlp_dim=96)


BUILDERS = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "vit_pytorch": _vit_pytorch,
}


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


@pytest.mark.parametrize("library", BUILDERS)
def test_models_built_while_it_is_on_are_what_patch_makes_of_them(library):
    build = BUILDERS[library]
    assert fused(build()) == []
    fastvit.auto.enable()
    model = build().eval()
    fastvit.auto.disable()
    plain = build().eval()
    assert fused(plain) == []
    assert fused(model) == fused(fastvit.patch(copy.deepcopy(plain))) != []
    assert {row.status for row in report(model).rows} == {"patched"}
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got, expected = model(x), plain(x)
        got, expected = (out.logits if library == "transformers" else out for out in (got, expected))
        torch.testing.assert_close(got, expected)
        unpatch(model)
        again = model(x)
    assert not is_patched(model)
    assert torch.equal(again.logits if library == "transformers" else again, expected)


def test_every_library_of_the_tables_is_known():
    assert set(BUILDERS) == set(fastvit.auto.LIBRARIES)


def test_libraries_are_chosen():
    fastvit.auto.enable("timm")
    assert fastvit.auto.enabled() == ("timm",)
    assert fused(_timm()) and not fused(_vit_pytorch())
    fastvit.auto.enable(["vit_pytorch", "transformers"])
    assert fastvit.auto.enabled() == ("transformers", "vit_pytorch")
    assert fused(_vit_pytorch()) and not fused(_timm())


@pytest.mark.parametrize(
    ("libraries", "got"), [("tim", r"\['tim'\]"), (["timm", "keras"], r"\['timm', 'keras'\]"), ([], r"\[\]")]
)
def test_unknown_libraries_are_refused_and_nothing_changes(libraries, got):
    fastvit.auto.enable("timm")
    with pytest.raises(ValueError, match=f"libraries: expected some of .*timm, .*vit_pytorch, got {got}"):
        fastvit.auto.enable(libraries)
    assert fastvit.auto.enabled() == ("timm",)


def test_off_leaves_nothing_behind():
    hooks = torch_module._global_module_registration_hooks
    before = dict(hooks)
    fastvit.auto.enable()
    fastvit.auto.enable()
    assert len(hooks) == len(before) + 1
    fastvit.auto.disable()
    fastvit.auto.disable()
    assert dict(hooks) == before
    assert fastvit.auto.enabled() == ()
    assert not building._builder.judged


class _SetsUpAfterwards(Attention):
    """A subclass whose constructor goes on after that of the library's class, with another width of the projection."""

    def __init__(self, dim: int, **options: object) -> None:
        super().__init__(dim, **options)
        self.qkv = nn.Linear(dim, 4 * dim)


class _Around(Attention):
    """A subclass whose forward is around the library's."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, num_heads=4)
        self.extra = nn.Parameter(torch.ones(dim))


class _Holder(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


def test_a_subclass_is_judged_when_its_own_constructor_is_done():
    fastvit.auto.enable()
    assert not fused(_Holder(_SetsUpAfterwards(48, num_heads=4)))
    holder = _Holder(_Around(48))
    assert fused(holder) == ["block"]
    assert isinstance(holder.block, _Around)
    assert "extra" in holder.block.state_dict()


@pytest.mark.parametrize("add", ["list", "dict", "sequential", "add_module"])
def test_every_way_of_registering_a_block(add):
    fastvit.auto.enable()
    block = Attention(48, num_heads=4)
    holder: nn.Module = {
        "list": lambda: nn.ModuleList([block]),
        "dict": lambda: nn.ModuleDict({"a": block}),
        "sequential": lambda: nn.Sequential(block),
        "add_module": lambda: nn.Module(),
    }[add]()
    if add == "add_module":
        holder.add_module("a", block)
    assert len(fused(holder)) == 1


def test_unpatch_and_patch_have_the_last_word():
    fastvit.auto.enable()
    model = unpatch(_timm_cait())
    _Holder(model.blocks[0].attn)
    nn.Sequential(*model.blocks)
    assert not is_patched(model)
    fastvit.patch(model, filter_fn=lambda module, name: name == "blocks.0.attn")
    assert fused(model) == ["blocks.0.attn"]
    assert fused(copy.deepcopy(model)) == ["blocks.0.attn"]
    replica = model.blocks[1].attn._replicate_for_data_parallel()
    assert not fused(_Holder(replica))


def test_pickle_and_deepcopy_while_on_and_when_off():
    fastvit.auto.enable()
    model = _timm().eval()
    names = fused(model)
    assert fused(copy.deepcopy(model)) == names
    pickled = pickle.dumps(model)
    fastvit.auto.disable()
    plain = _timm()
    stored = io.BytesIO()
    torch.save(plain, stored)
    assert fused(pickle.loads(pickled)) == names
    fastvit.auto.enable()
    stored.seek(0)
    assert fused(torch.load(stored, weights_only=False)) == []


def test_from_pretrained_and_the_meta_device(tmp_path: Path):
    plain = _transformers().eval()
    plain.save_pretrained(tmp_path)
    fastvit.auto.enable()
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    assert len(fused(model)) == 6  # two layers, and attention and MLP of each
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, plain(x).logits)
    with torch.device("meta"):
        empty = _timm_cait()
    assert len(fused(empty)) == len(fused(_timm_cait())) == 8
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_models_built_in_threads():
    models: list[nn.Module] = []
    fastvit.auto.enable()
    threads = [threading.Thread(target=lambda: models.append(_timm())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(fused(model)) for model in models] == [6] * 4


def test_a_block_that_cannot_be_judged_does_not_stop_the_model(monkeypatch, caplog):
    def fails(module: nn.Module) -> None:
        raise LookupError("new internals")

    monkeypatch.setattr(building.matching, "recognise", fails)
    fastvit.auto.enable()
    with caplog.at_level(logging.WARNING, "fastvit"):
        assert fused(_timm()) == []
    assert "Attention is left alone: LookupError: new internals" in caplog.text


def test_random_numbers_are_those_of_the_plain_model():
    torch.manual_seed(0)
    plain = _timm_cait()
    fastvit.auto.enable()
    torch.manual_seed(0)
    model = _timm_cait()
    assert fused(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_fastvit_backend_reference_leaves_models_plain(monkeypatch):
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"reference"}))
    fastvit.auto.enable()
    assert not torch_module._global_module_registration_hooks
    assert fused(_timm()) == []


_FRESH = """
import json, sys
import fastvit
libraries = sorted(name for name in fastvit.auto.LIBRARIES if name in sys.modules)
from tests import conftest
import vit_pytorch
model = vit_pytorch.ViT(image_size=32, patch_size=8, num_classes=7, dim=48, depth=2, heads=4, mlp_dim=96)
print(json.dumps([libraries, fastvit.is_patched(model)]))
"""


def test_a_library_may_be_imported_afterwards():
    """Before it is how every other test here has it."""
    command = [sys.executable, "-W", "ignore", "-c", _FRESH]
    environment = {**os.environ, "FASTVIT_AUTO": "timm,vit_pytorch"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [[], True]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", fastvit.auto.LIBRARIES), ("TIMM", ("timm",)), ("timm, vit_pytorch", ("timm", "vit_pytorch"))],
)
def test_fastvit_auto_names_libraries(monkeypatch, value, expected):
    monkeypatch.setenv("FASTVIT_AUTO", value)
    importlib.reload(fastvit.auto)
    assert fastvit.auto.enabled() == expected


def test_a_wrong_fastvit_auto_is_refused(monkeypatch):
    monkeypatch.setenv("FASTVIT_AUTO", "timm,tf")
    with pytest.raises(ValueError, match=r"FASTVIT_AUTO: expected some of timm, .*, got \['timm', 'tf'\]"):
        importlib.reload(fastvit.auto)
    assert fastvit.auto.enabled() == ()
