"""A newcomer's walk: clone, install, patch, read the report, load weights, verify, bench, unpatch, uninstall.

``python -m tests.walk`` does it in each way of installing, in a clean environment that is lent this one's libraries, so
that nothing is downloaded. Objects are those of this checkout's build where they would be the same (``compiler.py``):
then a walk takes seconds, and minutes otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.test_build import CXX, ROOT, Python, clean_environment, copy_sources, run

WAYS = ("compiled", "pure", "no compiler", "editable")
"""Of installing."""

OWN = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width=48, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((maps @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 8, 8)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x)
        return self.head((x + self.mlp(x)).mean(1))


def make():
    return Model().eval()
"""
"""The user's own model."""

SESSION = """
import copy, importlib.util, json, sys, warnings
import torch
import fastvit
import libraries
import mine

libraries.declare_torchvision_nms()
with_kernels = json.loads(sys.argv[1])
size = {"img_size": 32, "num_classes": 10}
models = {"own": mine.make(), "ours": fastvit.create_model("ceit_tiny", depth=2, **size, fused=False).eval()}
if importlib.util.find_spec("timm"):
    import timm
    models["timm"] = timm.create_model("vit_tiny_patch16_224", depth=2, **size).eval()
if importlib.util.find_spec("transformers"):
    from transformers import ViTConfig, ViTForImageClassification
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    models["transformers"] = ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8)).eval()

images = torch.randn(2, 3, 32, 32)
logits = lambda out: out if isinstance(out, torch.Tensor) else out.logits
for name, model in models.items():
    classes, plain = [type(module) for module in model.modules()], copy.deepcopy(model)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = logits(model(images))
        assert fastvit.patch(model, example=images) is model and fastvit.is_patched(model)
        torch.testing.assert_close(logits(model(images)), before, rtol=1e-4, atol=1e-4)
    report = fastvit.report(model)
    statuses = {row.status for row in report.rows if row.op in ("mlp", "leff")}
    assert statuses == {"patched" if with_kernels else "plain"}, (name, str(report))
    assert with_kernels or any("install fastvit anew" in str(each.message) for each in caught), name
    assert len(str(report).splitlines()) > 3 and json.loads(report.to_json())["rows"]
    assert model.state_dict().keys() == plain.state_dict().keys()
    fastvit.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(logits(model(images)), before)

torch.save(models["ours"].state_dict(), "weights.pt")
loaded = fastvit.create_model("ceit_tiny", depth=2, **size).eval()
told = fastvit.load_weights(loaded, "weights.pt")
with torch.no_grad():
    torch.testing.assert_close(loaded(images), models["ours"](images), rtol=1e-4, atol=1e-4)
print(json.dumps({"models": sorted(models), "where": fastvit.__file__}))
"""


def walk(way: str, folder: Path) -> dict[str, object]:
    """Go through it in an empty folder; AssertionError at the first thing that is not as README.md says.

    Args:
        way: one of ``WAYS``.

    Returns:
        What ``fastvit info`` said, the models that were patched, and where fastvit was imported from.
    """
    clone = copy_sources(folder / "clone")
    for name in ("examples", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "out"))
    python, work = Python(folder / "venv"), folder / "work"
    work.mkdir()
    (work / "mine.py").write_text(OWN, encoding="utf-8")
    (work / "session.py").write_text(SESSION, encoding="utf-8")
    shutil.copy2(ROOT / "benchmarks" / "libraries.py", work)  # with which a torchvision of another torch is imported
    kernels = way in ("compiled", "editable")
    where = ("-e", ".") if way == "editable" else (".",)
    python.install("--no-build-isolation", *where, cwd=clone, env=_building(way, folder))

    def fastvit(*words: str) -> str:
        command = (python.executable, "-W", "ignore", "-m", "fastvit", *words)
        return run(*command, cwd=work, env=clean_environment(FASTVIT_AUTOTUNE="0", PYTHONPATH=str(work)))

    info = json.loads(fastvit("info", "--json"))
    assert info["build"]["extension"] is kernels, info["build"]
    environment = clean_environment(FASTVIT_AUTOTUNE="0", PYTHONPATH=str(work))
    session = (python.executable, "-W", "ignore::DeprecationWarning", work / "session.py", json.dumps(kernels))
    found = json.loads(run(*session, cwd=work, env=environment).splitlines()[-1])
    assert Path(found["where"]).resolve().parent == (clone if way == "editable" else python.packages) / "fastvit"
    for model in ("mine:make", "vit_tiny_patch16_224") if kernels else ("vit_tiny_patch16_224",):
        assert fastvit("verify", model, "--size", "32", "--batch", "2")
        assert "images" in fastvit("bench", model, "--size", "32", "--batch", "2", "--rounds", "1")
    run(sys.executable, "-m", "pip", "--python", python.executable, "uninstall", "-y", "fastvit", cwd=work)
    absent = run(python.executable, "-c", "import fastvit", cwd=work, ok=False)
    assert "No module named 'fastvit'" in absent
    assert not [path for path in python.packages.iterdir() if "fastvit" in path.name], "nothing is left"
    return {"info": info, **found}


def _building(way: str, folder: Path) -> dict[str, str]:
    """The environment of the installation."""
    if way == "pure":
        return clean_environment(FASTVIT_BUILD_EXT="0")
    if way == "no compiler":
        (folder / "bin").mkdir()
        return clean_environment(CXX="", PATH=str(folder / "bin"))
    compiler = folder / "c++"
    words = f"{sys.executable} -I {ROOT}/tests/compiler.py {ROOT} {CXX}" if _is_built() else CXX
    compiler.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    return clean_environment(CXX=str(compiler), FASTVIT_BUILD_EXT="1", FASTVIT_BUILD_CUDA="0")


def _is_built() -> bool:
    """Whether the objects of this checkout's build are those of its sources."""
    objects, ninja = ROOT / "build" / f"native-{sysconfig.get_platform()}", _ninja()
    if ninja is None or not (objects / "build.ninja").is_file():
        return False
    return "no work to do" in run(ninja, "-n", "-C", objects, cwd=ROOT)


def _ninja() -> str | None:
    """The ninja that setup.py uses."""
    spec = importlib.util.find_spec("ninja")
    return shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR) if spec else shutil.which("ninja")


def main(words: list[str]) -> int:
    """Walk in the ways that are named, or in all."""
    for way in words or WAYS:
        with tempfile.TemporaryDirectory() as folder:
            found = walk(way, Path(folder))
        print(f"{way}: {', '.join(found['models'])}", flush=True)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
