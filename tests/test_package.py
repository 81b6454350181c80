"""import fastvit: what it costs, what it gives, and what the environment changes."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit.patching.rows import reference
from fastvit.reference import registry

SIZE = {"img_size": 32, "num_classes": 5}


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_version_is_told_once():
    root = Path(__file__).parents[1]
    assert f"\nversion: {fastvit.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {fastvit.__version__} " in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_is_cheap_and_needs_no_optional_library():
    code = """
import json, sys
import torch
before = set(sys.modules)
import fastvit
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    new = json.loads(result.stdout)
    libraries = {name.partition(".")[0] for name in new}
    optional = {"triton", "timm", "transformers", "torchvision", "vit_pytorch", "rich", "numpy", "safetensors"}
    assert not libraries & optional
    beside = [name for name in new if not name.startswith("fastvit.")]
    assert len(beside) < 50, beside  # of the standard library, which torch had not imported


def test_torch_comes_with_the_first_name_that_is_used():
    """Not with the import, and whichever of our modules comes first, reference models are fused as they are built."""
    code = """
import sys
import fastvit
assert "torch" not in sys.modules and not hasattr(fastvit, "__wrapped__") and "torch" not in sys.modules
%s
model = ViT(img_size=32, embed_dim=16, depth=1, num_heads=2)
print(fastvit.is_patched(model), fastvit.__version__)
import torch
print(len(dir(torch.ops.fastvit)) > 3, sorted(fastvit.__all__) == dir(fastvit))
"""
    spellings = (
        "ViT = fastvit.reference.ViT",
        "from fastvit.reference import ViT",
        "from fastvit.reference.vit import ViT; import fastvit.ops",
        "from fastvit import *; ViT = reference.ViT",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT_", "TRITON_"))}
    for spelling in spellings:
        result = subprocess.run(
            [sys.executable, "-c", code % spelling], env=environment, capture_output=True, text=True, check=False
        )
        assert result.stdout.split() == ["True", fastvit.__version__, "True", "True"], (spelling, result.stderr)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'fastvit' has no attribute 'patched_model'"):
        fastvit.patched_model  # noqa: B018


def test_public_names_are_there_and_documented():
    for name in fastvit.__all__:
        value = getattr(fastvit, name)
        assert name == "__version__" or value.__doc__, name


def test_completion_shows_public_names_alone():
    for module in (fastvit, fastvit.ops, fastvit.patching, fastvit.reference):
        assert sorted(module.__all__) == dir(module)
        assert all(hasattr(module, name) for name in module.__all__)
    assert {"BatchNorm", "LayerNorm", "Projection"} < set(dir(fastvit.ops))


def test_examples_in_docstrings():
    """What public docstrings show is run."""
    pytest.importorskip("PIL", reason="the example of transform makes an image by Pillow")
    finder, runner, shown = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(), set()
    for name, value in {"fastvit": fastvit, **{name: getattr(fastvit, name) for name in fastvit.__all__}}.items():
        for test in (
            [] if isinstance(value, str) else finder.find(value, name, globs=dict(vars(inspect.getmodule(value))))
        ):
            runner.run(test)
            shown |= {name} if test.examples else set()
    assert runner.failures == 0
    expected = "fastvit create_model list_models load_weights patch patched register transform"
    assert shown >= set(expected.split())


def test_create_model_fuses_unless_told_not_to():
    model = fastvit.create_model("cait_xxs24_224", depth=2, **SIZE)
    assert {row.status for row in fastvit.report(model).rows} == {"patched"}
    plain = fastvit.create_model("cait_xxs24_224", depth=2, fused=False, **SIZE)
    assert not fastvit.is_patched(plain)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_create_model_takes_what_the_reference_takes():
    ours = inspect.signature(fastvit.create_model).parameters
    theirs = inspect.signature(registry.create_model).parameters
    assert {name: parameter.default for name, parameter in ours.items() if name != "fused"} == {
        name: parameter.default for name, parameter in theirs.items()
    }
    with pytest.raises(ValueError, match="did you mean"):
        fastvit.create_model("deit_small")


def test_pretrained_says_where_weights_are():
    with pytest.raises(
        ValueError, match=r"fastvit.load_weights.* are at https://dl.fbaipublicfiles.com/deit/XXS24_224"
    ):
        fastvit.create_model("cait_xxs24_224", pretrained=True)
    with pytest.raises(ValueError, match=r"there are none of cpvt_tiny \(fastvit list --weights\)"):
        fastvit.create_model("cpvt_tiny", pretrained=True)
    fastvit.create_model("cait_xxs24_224", pretrained=False, depth=1, **SIZE)
    assert fastvit.reference.weights.official.OFFICIAL.keys() < set(fastvit.list_models())


def test_a_users_subclass_of_a_family_is_fused_as_it_is_built():
    class Mine(fastvit.reference.ViT):
        pass

    assert fastvit.is_patched(Mine(img_size=32, embed_dim=16, depth=1, num_heads=2))


def test_every_row_names_a_class_that_exists():
    for row in reference.ROWS:
        module, _, name = row.path.rpartition(".")
        assert inspect.isclass(getattr(sys.modules[module], name)), row.path
        assert row.op in fastvit.ops.OPERATORS
        assert row.methods()


@pytest.mark.parametrize(("value", "expected"), [("reference", "False None"), ("triton", "True reference")])
def test_fastvit_backend_in_a_fresh_process(value, expected):
    code = """
import fastvit
model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
print(fastvit.is_patched(model), fastvit.report(model).rows[0].backend)
"""
    result = run(code, FASTVIT_BACKEND=value, TRITON_INTERPRET="0")
    assert result.stdout.strip() == expected, result.stderr


def test_a_wrong_fastvit_backend_is_refused():
    result = run("import fastvit", FASTVIT_BACKEND="fast")
    assert result.returncode != 0
    assert "FASTVIT_BACKEND: expected 'auto' or some of" in result.stderr


def test_losing_the_native_part_is_loud(tmp_path):
    """Without it blocks whose operators run plain are not called patched: patch warns, strict refuses."""
    package = tmp_path / "fastvit"
    source = Path(fastvit.__file__).parent
    shutil.copytree(
        source, package, ignore=shutil.ignore_patterns("_C.*", "_build_info.json", "__pycache__", "kernels")
    )
    code = f"""
import json, sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
import fastvit
model = fastvit.create_model("cait_xxs24_224", depth=2, img_size=32, fused=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fastvit.patch(model)
report = fastvit.report(model)
try:
    fastvit.patch(model, strict=True)
    strict = "passed"
except RuntimeError as error:
    strict = str(error)
fastvit.patch(model, strict=True, backend="reference")
warned = [str(each.message) for each in caught]
rows = [[row.op, row.status, row.reasons] for row in report.rows]
asked = [row.status for row in fastvit.report(model).rows]
print(json.dumps([fastvit.__file__, warned, rows, str(report), strict, asked]))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    where, warned, rows, table, strict, asked = json.loads(result.stdout)
    assert Path(where).parent == package
    (warning,) = warned
    assert re.match(
        r"fastvit: \d+ of the blocks found run as they did before: nothing faster here: fastvit\._C", warning
    )
    assert "with a C++ compiler there, install fastvit anew (python -m fastvit info)" in warning
    assert warning.count("nothing faster here") == warning.count("was never built") == 1
    plain = {op: (status, *reasons) for op, status, reasons in rows}
    for op in ("head_mixed_attention", "mlp"):
        assert plain[op][0] == "plain" and plain[op][1].startswith("nothing faster here: fastvit._C was never built")
    assert plain["class_attention"] == ("patched",)  # by the library's fused attention
    assert "run plain, since nothing faster runs here" in table and "blocks.0 to 1 .attn" in table
    assert table.count("was never built in") <= 2, "a reason is said once"
    assert strict.startswith("strict: not every block can be fused:\n  blocks.0.attn: nothing faster here: fastvit._C")
    assert set(asked) == {"patched"}, "who asks for it by name gets it"


def test_an_unbuilt_checkout_says_so(tmp_path, monkeypatch):
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "site-packages"
    ignored = shutil.ignore_patterns("_C.*", "_build_info.json", "__pycache__", "kernels")
    shutil.copytree(Path(fastvit.__file__).parent, checkout / "fastvit", ignore=ignored)
    (checkout / "setup.py").touch()
    result = run(f"import sys; sys.path.insert(0, {str(checkout)!r}); import fastvit; fastvit.patch, fastvit.report")
    said = f"fastvit is the checkout in {checkout}, whose native part was never built: "
    assert result.stderr.count(said) == 1, result.stderr

    advice = fastvit.backends._unbuilt_checkout
    monkeypatch.setattr(sys, "path", ["", str(checkout), str(elsewhere)])
    monkeypatch.chdir(checkout)
    assert advice(checkout / "fastvit") == f"{said}`make build` builds it"
    (elsewhere / "fastvit").mkdir(parents=True)
    assert advice(checkout / "fastvit") == f"{said}`make build` builds it", "that folder is no copy"
    (elsewhere / "fastvit" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert advice(checkout / "fastvit") == f"{said}run elsewhere for the copy in {elsewhere}/fastvit, or `make build`"
    (checkout / "fastvit" / "_build_info.json").touch()
    assert advice(checkout / "fastvit") is None, "it is known then why there is none"
    assert advice(elsewhere / "fastvit") is None, "this is no checkout"
