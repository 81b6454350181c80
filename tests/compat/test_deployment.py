"""Models exported with the operators kept: as programs in Python, and compiled by AOTInductor in a C++ program."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit import backends, deployment
from fastvit.ops._schema import REGISTERED
from fastvit.patching import patch, report
from tests.helpers import HANG_GUARD, assert_as_accurate
from tests.tiny import FAMILIES, SIZES, build, images

ROOT = Path(__file__).resolve().parents[2]
SEVEN = tuple(name for name in FAMILIES if name != "twins_pcpvt")
MODELS = (*SEVEN, "twins_pcpvt", "timm_vit", "timm_cait")
KERNELS = {"masked_attention": "masked_attention_cpp", "class_attention": "masked_attention_cpp"} | {
    op: op for op in ("head_mixed_attention", "token_depthwise_conv")
}
"""The operator that a call of an operator is in the graph, where that is one kernel."""
CXX = shutil.which("c++")
BATCH = torch.export.Dim("batch", min=1, max=64)

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


def run(*command: str | Path, **options: object) -> str:
    """What a command prints; it must succeed."""
    words = [str(word) for word in command]
    options = {"cwd": ROOT, **options}
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=HANG_GUARD, **options)
    assert result.returncode == 0, f"{words[:2]} gave {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def operators(program: torch.export.ExportedProgram) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("fastvit.")]


def exported(model: nn.Module, x: Tensor, **options: object) -> torch.export.ExportedProgram:
    with fastvit.exporting(fused=True):
        return torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},), **options)


def judge(got: Tensor, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert_as_accurate(got, plain(x), copy.deepcopy(plain).double()(x.double()))


# --- As a program ----------------------------------------------------------------------------------------------------

LOAD_AND_RUN = """
import sys, torch, fastvit
folder = sys.argv[1]
for name in sys.argv[2:]:
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    with torch.no_grad():
        torch.save([program(x) for x in torch.load(f"{folder}/{name}.pt")], f"{folder}/{name}.out")
"""


class Programs(NamedTuple):
    operators: dict[str, list[str]]
    patched: dict[str, list[str]]
    outputs: dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Every model exported, saved, and loaded and run by a fresh process."""
    folder, found = tmp_path_factory.mktemp("programs"), Programs({}, {}, {})
    names = []
    for name in MODELS:
        if name.startswith("timm_"):
            try:
                import timm  # noqa: F401
            except ImportError:
                continue
        names.append(name)
        torch.manual_seed(1)
        model = patch(build(name))
        found.patched[name] = [row.op for row in report(model).rows if row.status == "patched"]
        program = exported(model, images(name))
        found.operators[name] = operators(program)
        torch.export.save(program, folder / f"{name}.pt2")
        torch.save([images(name, batch) for batch in (1, 2, 5)], folder / f"{name}.pt")
    run(sys.executable, "-c", LOAD_AND_RUN, folder, *names)
    for name in names:
        found.outputs[name] = torch.load(folder / f"{name}.out")
    return found


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", MODELS)
def test_a_program_holds_the_operators_and_gives_their_result_in_a_fresh_process(name, programs):
    if name not in programs.outputs:
        pytest.skip("timm is not installed")
    patched, kept = programs.patched[name], programs.operators[name]
    wanted = [KERNELS[op] for op in patched if op in KERNELS]
    for kernel in set(wanted):
        assert kept.count(kernel) == wanted.count(kernel), kernel
    # The last block computes the tokens alone that the head reads.
    assert kept.count("conv_projection") == max(patched.count("conv_projection") // 3 - 1, 0)
    assert kept.count("packed_leff") == max(patched.count("leff") - 1, 0)
    assert kept.count("packed_mlp") == patched.count("mlp")
    assert kept.count("pack_constant") >= 2 * patched.count("mlp")
    torch.manual_seed(1)
    plain = build(name)
    for batch, got in zip((1, 2, 5), programs.outputs[name], strict=True):
        judge(got, plain, images(name, batch))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["deepvit", "ceit"])
def test_export_by_dynamo(name):
    model, x = patch(build(name)), images(name, 3)
    program = exported(model, images(name), strict=True)
    assert {"packed_linear", "pack_constant"} < set(operators(program))
    judge(program.module()(x), fastvit.unpatch(model), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cpvt", "cvt"])
def test_export_with_dynamic_image_sizes(name):
    model, step = patch(build(name)), 16
    sides = {2: step * torch.export.Dim("rows", min=2, max=8), 3: step * torch.export.Dim("columns", min=2, max=8)}
    with fastvit.exporting(fused=True):
        program = torch.export.export(model, (torch.randn(2, 3, 48, 64),), dynamic_shapes=({0: BATCH, **sides},))
    assert operators(program)
    x = torch.randn(3, 3, 80, 32)
    judge(program.module()(x), fastvit.unpatch(model), x)


def test_a_program_follows_its_weights():
    """They are packed where it runs, and anew when one changes."""
    model, x = patch(build("vit")), images("vit")
    program = exported(model, x).module()
    with torch.no_grad():
        before = program(x)
        for weights in (model, program):
            weights.get_parameter("blocks.0.mlp.fc1.weight")[3, 5] += 1.0
        assert not torch.equal(program(x), before)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_without_or_with_false_the_plain_path_is_exported():
    model, x = patch(build("vit")), images("vit")
    assert not operators(torch.export.export(model, (x,)))
    with fastvit.exporting(fused=False):
        assert not operators(torch.export.export(model, (x,)))
    with fastvit.exporting(fused=True):
        with fastvit.exporting(fused=False):
            assert not operators(torch.export.export(model, (x,)))
        assert operators(torch.export.export(model, (x,)))
    assert not operators(torch.export.export(model, (x,)))


@pytest.mark.filterwarnings("ignore:.*")
def test_a_model_that_was_not_patched_warns():
    with (
        pytest.warns(UserWarning, match=r"no operator of fastvit was exported; was the model patched\?"),
        fastvit.exporting(fused=True),
    ):
        torch.export.export(build("vit"), (images("vit"),))
    model = patch(build("vit"))
    for _ in range(2):  # the second time, fake kernels might have been remembered
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exported(model, images("vit"))
        assert not [each for each in caught if "fastvit" in str(each.message)]


class Foreign(nn.Module):
    """Attention that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_kept_is_refused(strict, monkeypatch):
    def refused(model: nn.Module, x: Tensor, reason: str) -> None:
        with pytest.raises(Exception, match=reason), fastvit.exporting(fused=True):  # Dynamo wraps it in its own
            torch.export.export(model, (x,), strict=strict)

    x = images("vit")
    only = "which cannot run this call: "
    refused(patch(build("vit"), backend="reference"), x, only + "the backend asked for is 'reference'")
    refused(patch(build("vit").double()), x.double(), only + r"dtype torch\.float64 is not one of")
    refused(patch(build("vit", attn_drop_rate=0.1).train()), x, only + "attention dropout is not implemented")
    refused(patch(build("ceit").train()), images("ceit"), only + "a norm takes the statistics of the batch")
    tokens = torch.randn(2, 17, 48)
    known = patch(Foreign().eval(), example=tokens)
    assert report(known).rows[0].status == "patched"
    for model in (known, patch(Foreign().eval())):
        refused(model, tokens, "what Foreign computes is found as it runs, which torch.export does not do")
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"reference"}))
    refused(patch(build("vit"), backend="auto"), x, only + "FASTVIT_BACKEND disables it")


def test_without_the_native_part(monkeypatch):
    monkeypatch.setattr(backends, "cpp_reasons", lambda: ["fastvit._C was never built"])
    with (
        pytest.raises(RuntimeError, match=r"fastvit\.exporting\(fused=True\): fastvit\._C was never built"),
        fastvit.exporting(fused=True),
    ):
        pass
    monkeypatch.setattr(deployment, "__file__", "/nowhere/deployment.py")
    with pytest.raises(RuntimeError, match=r"operator_library: fastvit\._C was never built"):
        deployment.operator_library()


# --- The library for C++ ---------------------------------------------------------------------------------------------

SCHEMAS = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = str(getattr(torch.ops.fastvit, name).default._schema)
    except AttributeError:
        found[name] = None
assert "fastvit" not in sys.modules
print(json.dumps(found))
"""


def test_the_library_registers_the_operators_of_inference_as_python_does(programs):
    found = json.loads(run(sys.executable, "-c", SCHEMAS, deployment.operator_library(), *REGISTERED))
    registered = {name: schema for name, schema in found.items() if schema is not None}
    assert registered == {name: str(REGISTERED[name].call._schema) for name in registered}
    kept = {name for names in programs.operators.values() for name in names}
    assert kept | {"packed_glu_mlp"} == registered.keys()


def test_the_library_beside_python_changes_nothing():
    code = """
import sys, torch, fastvit
x = torch.randn(2, 4, 9, 16)
before = fastvit.ops.masked_attention(x, x, x, backend="cpp")
torch.ops.load_library(sys.argv[1])
assert torch.equal(fastvit.ops.masked_attention(x, x, x, backend="cpp"), before)
weight = torch.randn(32, 16)
assert torch.ops.fastvit.pack_constant(weight) is torch.ops.fastvit.pack_constant(weight)  # Python's, which keeps it
"""
    run(sys.executable, "-c", code, deployment.operator_library())


# --- AOTInductor -----------------------------------------------------------------------------------------------------


class Together(nn.Module):
    """The seven families, each on a corner of the images, so that one compilation is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name: build(name) for name in SEVEN})

    def forward(self, x: Tensor) -> Tensor:
        sides = {name: SIZES.get(name, 32) for name in SEVEN}
        return torch.stack([model(x[..., : sides[name], : sides[name]]) for name, model in self.models.items()])


class Compiled(NamedTuple):
    plain: nn.Module
    package: Path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if CXX is None:
        pytest.skip("no C++ compiler on PATH")
    torch.manual_seed(1)
    plain, package = Together().eval(), tmp_path_factory.mktemp("package") / "model.pt2"
    program = exported(patch(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64))
    configs = deployment.inductor_configs()
    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=configs)
    return Compiled(plain, package)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_seven_families_in_a_cpp_program(compiled, tmp_path):
    """By the commands of the documentation, as they are written there."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    commands = textwrap.dedent(re.search(r"is such a program:\n\n((?: {4}.*\n)+)", page)[1])
    for name, target in (("examples", ROOT / "examples"), ("model.pt2", compiled.package)):
        (tmp_path / name).symlink_to(target)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    x = torch.randn(3, 3, 64, 64)
    torch.save(x, tmp_path / "images.pt")
    run("sh", "-ec", commands, cwd=tmp_path, env=environment)
    judge(torch.load(tmp_path / "logits.pt"), compiled.plain, x)
    program = tmp_path / "deploy"
    for binary in (program, deployment.operator_library()):
        needed = run("ldd", binary)
        assert "libtorch_cpu.so" in needed
        assert "libpython" not in needed and "libtorch_python" not in needed
    torch.save(x[:1], tmp_path / "x.pt")
    run(program, deployment.operator_library(), compiled.package, tmp_path / "x.pt", tmp_path / "out.pt")
    judge(torch.load(tmp_path / "out.pt"), compiled.plain, x[:1])


@pytest.mark.slow
def test_weights_are_packed_apart_from_the_calls(compiled):
    """In the part of the compiled model that runs when its constants change."""
    with zipfile.ZipFile(compiled.package) as archive:
        (wrapper,) = (name for name in archive.namelist() if name.endswith("wrapper.cpp"))
        code = archive.read(wrapper).decode()
    packs = "(aoti_torch_cpu_pack_constant("
    constants, _, calls = code.partition("::run_impl(")
    assert packs in constants
    assert packs not in calls


UPDATE = """
import sys, torch
library, package, x, name, changed, out = sys.argv[1:]
torch.ops.load_library(library)
model, x = torch._inductor.aoti_load_package(package), torch.load(x)
before = model(x)
model.load_constants({name: torch.load(changed)}, check_full_update=False)
torch.save([before, model(x)], out)
assert "fastvit" not in sys.modules
"""


@pytest.mark.slow
def test_updated_constants_are_packed_anew(compiled, tmp_path):
    plain, name, x = copy.deepcopy(compiled.plain), "models.cait.blocks.0.mlp.fc1.weight", torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain.get_parameter(name)[3, 5] += 5.0
    torch.save(x, tmp_path / "x.pt")
    torch.save(plain.get_parameter(name).detach(), tmp_path / "changed.pt")
    files = (tmp_path / "x.pt", name, tmp_path / "changed.pt", tmp_path / "out.pt")
    run(sys.executable, "-c", UPDATE, deployment.operator_library(), compiled.package, *files)
    before, after = torch.load(tmp_path / "out.pt")
    judge(before, compiled.plain, x)
    judge(after, plain, x)
    assert not torch.allclose(before, after)
