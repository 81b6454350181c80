"""What pip makes of the source tree: contents of the archives, with and without compiler, nvcc, ninja and isolation."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvit._version import __version__
from tests.standalone.program import build_rules

ROOT = Path(__file__).resolve().parents[1]
SHIMS = "".join(
    f"#include <torch/csrc/{each}.h>\n" for each in ("stable/library", "inductor/aoti_torch/generated/c_shim_cpu")
)
HEADER = ROOT / "csrc" / "common" / "torch_abi.h"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CXX = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc")
PURE = "0without_native_part"  # the build tag of a wheel
QUICKLY = {"CXXFLAGS": "-O0"}  # what is compiled here is inspected, not timed
VARIABLES = ("FASTVIT_", "CXX", "CUDA", "LDFLAGS", "TORCH_CUDA", "MAX_JOBS", "PYTHONPATH", "TRITON_")

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(sys.platform != "linux", reason="the build is tested on Linux"),
]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler on PATH")


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without anything that steers the build, and then the changes."""
    return {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)} | changes


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, ok: bool = True) -> str:
    """Output of a command that must succeed, or must fail."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment() if env is None else env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (result.returncode == 0) is ok, f"{command} gave {result.returncode}:\n{result.stdout}"
    return result.stdout


def copy_sources(target: Path) -> Path:
    """The files a checkout has, without what builds leave behind."""
    target.mkdir(parents=True)
    left_behind = shutil.ignore_patterns("*.so", "*.so.new", "__pycache__", "_build_info.json", "*.egg-info")
    for name in ("fastvit", "kernels", "csrc", "tests", "requirements"):
        shutil.copytree(ROOT / name, target / name, ignore=left_behind, symlinks=True)
    (target / "fastvit" / "kernels").unlink(missing_ok=True)  # the link of an editable install
    for pattern in ("*.py", "*.toml", "*.in", "*.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy2(path, target)
    return target


def without_kernels(source: Path) -> Path:
    """Drop the operators, so that a build takes seconds; the rest is everything that a build must get right."""
    for path in source.glob("csrc/*"):
        if path.is_dir() and path.name != "common":
            shutil.rmtree(path)
    (source / "csrc" / "library.cpp").write_text("", encoding="utf-8")  # which registers them
    return source


def make_wheel(source: Path, *options: str, env: dict[str, str] | None = None) -> Path:
    """The wheel pip builds from a source tree."""
    folder = source / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, *options, ".", cwd=source, env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def build_record(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fastvit/_build_info.json"))


class Python:
    """A virtual environment that sees this one's packages, but not this checkout."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.executable = folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        self.folder = folder
        # A .pth file lends the packages; the .pth files among them (editable installs) are not read.
        seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.packages / "lent.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")

    def install(self, *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.executable, "install", "--no-deps")
        run(*pip, *arguments, cwd=cwd or self.folder, env=env)

    def run(self, code: str, **environment: str) -> str:
        return run(self.executable, "-c", code, cwd=self.folder, env=clean_environment(**environment))

    def info(self, **environment: str) -> dict:
        command = (self.executable, "-W", "ignore", "-m", "fastvit", "info", "--json")
        return json.loads(run(*command, cwd=self.folder, env=clean_environment(**environment)))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_sources(tmp_path_factory.mktemp("sdist") / "source")
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist: whatever is built from it is built from nothing else."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)  # made a moment ago, by us
    return folder / f"fastvit-{__version__}"


def checkout_is_complete() -> bool:
    """Whether the checkout's own binary, which `make test` has built, has all that a build without options has."""
    record = ROOT / "fastvit" / "_build_info.json"
    built = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    has_cuda = {"sm_80", "sm_90"} <= set(built.get("cuda_archs", ())) or NVCC is None
    return built.get("version") == __version__ and "avx512_bf16" in built.get("isa_levels", ()) and has_cuda


# The checkout's binary is inspected where it is complete; the wheel then needs no second compilation of the same.
LESS = {"FASTVIT_ISA_LIST": "portable,avx2", "FASTVIT_CUDA_ARCH_LIST": "8.0+PTX"} if checkout_is_complete() else {}


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """Built as `pip install fastvit` would from an sdist: in pip's own, isolated environment, which has no torch."""
    if CXX is None:
        pytest.skip("no C++ compiler on PATH")
    try:
        return make_wheel(source, env=clean_environment(**QUICKLY, **LESS, FASTVIT_BUILD_EXT="1"))
    except AssertionError as error:
        if "No matching distribution found for" in str(error) or "NewConnectionError" in str(error):
            pytest.skip("the package index cannot be reached for the build requirements")
        raise


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    python = Python(tmp_path_factory.mktemp("installed") / "venv")
    python.install("--no-index", wheel)
    return python


@pytest.fixture(scope="module")
def complete(request: pytest.FixtureRequest) -> Path:
    """The folder of a package whose binary has every instruction set and GPU that a build without options has."""
    return ROOT / "fastvit" if LESS else request.getfixturevalue("installed").packages / "fastvit"


@pytest.fixture
def breakable(installed: Python) -> Iterator[Python]:
    """The installed package, put right again after the test."""
    package = installed.packages / "fastvit"
    kept = installed.folder / "kept"
    shutil.copytree(package, kept)
    yield installed
    shutil.rmtree(package)
    kept.rename(package)


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    return without_kernels(copy_sources(tmp_path / "source"))


def test_sdist_holds_what_a_build_needs_and_no_more(sdist: Path) -> None:
    checkout = sdist.parents[1]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(checkout)) for path in (checkout / "csrc").rglob("*.*") if path.is_file()}
    wanted |= {str(path.relative_to(checkout)) for path in (checkout / "kernels").glob("*.py")}
    wanted |= {str(path.relative_to(checkout)) for path in (checkout / "tests").rglob("*.py")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "fastvit/py.typed", "fastvit/backends.py"}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    unwanted = [name for name in names if re.search(r"\.(so|o|pyc)$|_build_info\.json$|^(\.venv|build)/", name)]
    assert not unwanted


def test_isolated_wheel_is_compiled_and_complete(source: Path, wheel: Path) -> None:
    names = names_in(wheel)
    modules = {str(path.relative_to(source)) for path in (source / "fastvit").rglob("*.py")}
    modules |= {f"fastvit/kernels/{path.name}" for path in (source / "kernels").glob("*.py")}
    modules.add(f"fastvit-{__version__}.dist-info/licenses/LICENSE")
    beside = {f"fastvit/_C{SUFFIX}", "fastvit/libfastvit.so", "fastvit/py.typed", "fastvit/_build_info.json"}
    assert modules | beside <= names
    strangers = {name.split("/")[0] for name in names} - {"fastvit", f"fastvit-{__version__}.dist-info"}
    assert not strangers, "nothing may be installed beside the package: no top-level kernels, csrc, tests"
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]
    assert re.fullmatch(rf"fastvit-{__version__}-cp\d+-.*\.whl", wheel.name)


def test_metadata_says_what_the_package_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"fastvit-{__version__}.dist-info/METADATA").decode()
    assert f"Version: {__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata
    requirements = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", metadata, re.MULTILINE)
    assert sorted(requirements) == ["numpy", "rich", "safetensors", "torch"]


def test_installed_package_uses_its_binary(installed: Python) -> None:
    info = installed.info()
    assert info["location"] == str(installed.packages / "fastvit")
    assert info["build"]["extension"] is True
    assert info["build"]["version"] == __version__
    assert info["backends"]["cpp"] == {"available": True, "reasons": [], "allowed": True}
    assert info["build"]["operators"], "the binary must hold operators"
    kernels = installed.run("import fastvit.kernels; print(fastvit.kernels.__file__)").strip()
    assert kernels == str(installed.packages / "fastvit" / "kernels" / "__init__.py")


def test_operators_run_in_the_installed_package(installed: Python) -> None:
    code = """
import torch, fastvit
from fastvit import ops
from fastvit.reference import functional
x, weight = torch.randn(2, 1 + 6 * 5, 16), torch.randn(16, 1, 3, 3)
arguments = dict(grid=(6, 5), prefix_tokens=1)
torch.testing.assert_close(
    ops.token_depthwise_conv(x, weight, backend="cpp", **arguments),
    functional.token_depthwise_conv(x, weight, **arguments),
)
print("same")
"""
    assert installed.run(code).splitlines()[-1] == "same"


def device_code(binary: Path) -> set[str]:
    """The architectures of the device code in a binary, as nvcc names them.

    Device code is in "fat binaries": a header (magic number, version, its own size, size of what follows), then one
    entry per architecture (kind: 1 PTX, 2 machine code; its header's size; the payload's size; ...; architecture).
    """
    data, found, at = binary.read_bytes(), set(), 0
    while (at := data.find(b"\x50\xed\x55\xba\x01\x00", at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            found.add(f"{'sm' if kind == 2 else 'compute'}_{struct.unpack_from('<I', data, entry + 28)[0]}")
            entry += entry_header + payload
        at = end
    return found


@needs_nvcc
@pytest.mark.skipif(not any(ROOT.glob("csrc/*/*.cu")), reason="these sources have no CUDA part")
def test_cuda_part_is_compiled_without_a_gpu_and_with_a_torch_without_cuda(installed: Python, complete: Path) -> None:
    for package, wanted in ((installed.packages / "fastvit", {"sm_80"}), (complete, {"sm_80", "sm_90"})):
        archs = json.loads((package / "_build_info.json").read_text(encoding="utf-8"))["cuda_archs"]
        assert wanted <= set(archs)
        assert [arch for arch in archs if arch.startswith("compute_")], "PTX for GPUs to come"
        assert device_code(package / f"_C{SUFFIX}") == set(archs)
    assert installed.info()["build"]["cuda_archs"]


def find_cuobjdump() -> str | None:
    """The tool that reads device code: of the CUDA toolkit, or in the triton wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    packaged = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(packaged) if packaged.is_file() else None


@needs_nvcc
@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump, neither on PATH nor in a triton wheel")
def test_no_cuda_kernel_spills_or_has_local_memory(complete: Path) -> None:
    """What ptxas -v would tell, read from the binary: values that find no register lie on the stack."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None
    report = run(cuobjdump, "-res-usage", complete / f"_C{SUFFIX}", cwd=ROOT)
    chips = re.findall(r"^arch = (sm_\d+)$", report, re.MULTILINE)
    assert {"sm_80", "sm_90"} <= set(chips)
    functions = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    # Forward: 3 dtypes x (3 kernel sizes x 2 strides + any other); so are gradients, beside what both need.
    assert sum("7Forward" in name for name, *_ in functions) == 21 * len(set(chips))
    assert sum("17ProjectionForward" in name for name, *_ in functions) == 3 * len(set(chips))
    assert sum("Gradient" in name for name, *_ in functions) == 21 * len(set(chips))
    assert not [name for name, _, stack, local in functions if int(stack) + int(local) > 0]


@needs_compiler
def test_without_nvcc_there_is_the_cpp_part_alone(source: Path, wheel: Path) -> None:
    settings = {**QUICKLY, **LESS, "FASTVIT_BUILD_EXT": "1", "FASTVIT_CUDA_ARCH_LIST": "8.0"}
    env = clean_environment(**settings, CUDACXX="/nonexistent/nvcc")
    record = build_record(make_wheel(source, "--no-build-isolation", env=env))
    assert record["extension"] is True
    assert record["cuda_archs"] == []
    assert "nvcc was not found" in record["cuda_reason"]


@needs_compiler
@needs_nvcc
def test_architectures_asked_for(small_source: Path, tmp_path: Path) -> None:
    kernel = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
    (small_source / "csrc" / "common" / "cuda_twice.cu").write_text(kernel, encoding="utf-8")
    env = clean_environment(**QUICKLY, FASTVIT_CUDA_ARCH_LIST="8.6;9.0+PTX")
    wheel = make_wheel(small_source, "--no-build-isolation", env=env)
    assert build_record(wheel)["cuda_archs"] == ["sm_86", "sm_90", "compute_90"]
    with zipfile.ZipFile(wheel) as archive:
        binary = Path(archive.extract(f"fastvit/_C{SUFFIX}", tmp_path))
    assert device_code(binary) == {"sm_86", "sm_90", "compute_90"}


@pytest.mark.parametrize(("cuda", "asked", "archs"), [("None", "", False), ("'13.0'", "", True), ("None", "1", True)])
@needs_compiler
@needs_nvcc
def test_cuda_is_left_out_where_torch_is_seen_to_have_none(
    small_source: Path, tmp_path: Path, cuda: str, asked: str, archs: bool
) -> None:
    (small_source / "csrc" / "common" / "cuda_empty.cu").touch()
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise ImportError('the build imports torch')\n", encoding="utf-8")
    version = f"__version__ = '2.10.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    (torch / "version.py").write_text(version, encoding="utf-8")
    env = clean_environment(**QUICKLY, FASTVIT_BUILD_CUDA=asked, PYTHONPATH=str(tmp_path))
    record = build_record(make_wheel(small_source, "--no-build-isolation", env=env))
    assert record["extension"]
    assert bool(record["cuda_archs"]) is archs
    wanted = None if archs else "torch 2.10.0 has no CUDA; FASTVIT_BUILD_CUDA=1 builds the CUDA part all the same"
    assert record["cuda_reason"] == wanted


@needs_compiler
def test_cuda_asked_for_without_nvcc(small_source: Path) -> None:
    (small_source / "csrc" / "common" / "cuda_empty.cu").touch()
    env = clean_environment(FASTVIT_BUILD_CUDA="1", CUDACXX="/nonexistent/nvcc")
    output = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_source, env=env, ok=False)
    assert "FASTVIT_BUILD_CUDA=1, but the CUDA part cannot be built: nvcc was not found" in output


def test_malformed_architectures_are_refused(small_source: Path) -> None:
    if NVCC is None or CXX is None:
        pytest.skip("architectures are read only where there are compilers")
    (small_source / "csrc" / "common" / "cuda_empty.cu").touch()
    env = clean_environment(FASTVIT_CUDA_ARCH_LIST="hopper")
    output = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_source, env=env, ok=False)
    assert "FASTVIT_CUDA_ARCH_LIST: expected architectures such as 8.0, 80 or 9.0+PTX, got 'hopper'" in output


def test_pure_python_on_request(small_source: Path) -> None:
    env = clean_environment(FASTVIT_BUILD_EXT="0")
    wheel = make_wheel(small_source, "--no-build-isolation", env=env)
    assert wheel.name == f"fastvit-{__version__}-{PURE}-py3-none-any.whl", "pip shows the name"
    told = run(sys.executable, "setup.py", "--quiet", "build", cwd=small_source, env=env)
    reason = "FASTVIT_BUILD_EXT=0 was set at build time"
    assert told.splitlines()[-1] == f"fastvit is built WITHOUT its native part: {reason}"
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
    assert build_record(wheel)["reason"] == reason


def test_pure_python_where_there_is_no_compiler(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wheel = make_wheel(small_source, "--no-build-isolation", env=clean_environment(PATH=str(tmp_path / "empty")))
    assert wheel.name.endswith(f"-{PURE}-py3-none-any.whl")
    assert "no C++ compiler found" in build_record(wheel)["reason"]
    python = Python(tmp_path / "venv")
    python.install("--no-index", wheel)
    info = python.info()
    (reason,) = info["backends"]["cpp"]["reasons"]
    assert "no C++ compiler found" in reason
    assert info["backends"]["reference"]["available"] is True
    assert info["backends"]["cuda"]["reasons"] == [reason]


def test_a_failed_build_gives_pure_python_and_the_reason(small_source: Path) -> None:
    (small_source / "csrc" / "bindings.cpp").write_text("this is not C++\n", encoding="utf-8")
    wheel = make_wheel(small_source, "--no-build-isolation")
    assert f"-{PURE}-" in wheel.name
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
    record = build_record(wheel)
    assert record["extension"] is False
    assert "error:" in record["reason"]
    assert "bindings.cpp" in record["reason"]


def test_a_failed_build_is_loud_on_request(small_source: Path, tmp_path: Path) -> None:
    env = clean_environment(FASTVIT_BUILD_EXT="1", CXX=str(shutil.which("false")))
    command = ("pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", ".")
    output = run(sys.executable, "-m", *command, cwd=small_source, env=env, ok=False)
    assert "FASTVIT_BUILD_EXT=1, but the native part cannot be built" in output


def test_wrong_switch_is_refused(small_source: Path) -> None:
    env = clean_environment(FASTVIT_BUILD_EXT="yes")
    output = run(sys.executable, "setup.py", "--version", cwd=small_source, env=env, ok=False)
    assert "FASTVIT_BUILD_EXT: expected 0, 1 or unset, got 'yes'" in output


@pytest.mark.parametrize(
    ("available", "limit", "jobs"),
    [("90000000 kB", "max", 8), ("5000000 kB", "max", 3), ("90000000 kB", "4000000000", 1), ("90000000 kB", "", 8)],
    ids=["cores", "memory", "container", "no container"],
)
def test_compilers_at_once_fit_the_memory(small_source: Path, tmp_path: Path, available: str, limit: str, jobs: int):
    (tmp_path / "meminfo").write_text(f"MemTotal: 99000000 kB\nMemFree: 100000 kB\nMemAvailable: {available}\n")
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1000000000\n")
    program = (
        "import sys, os, pathlib; sys.argv = ['setup.py', '--version']; __file__ = 'setup.py'\n"
        "exec(open('setup.py').read()); os.sched_getaffinity = lambda pid: range(8)\n"
        f"CGROUP = pathlib.Path({str(tmp_path)!r}); MEMINFO = CGROUP / 'meminfo'; print(max_jobs())"
    )
    output = run(sys.executable, "-c", program, cwd=small_source, env=clean_environment())
    assert output.splitlines()[-1] == str(jobs)


def test_metadata_needs_no_torch(small_source: Path) -> None:
    hidden = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    output = run(sys.executable, "-c", "__file__ = 'setup.py'; " + hidden, cwd=small_source)
    assert output.splitlines()[-1] == __version__


@needs_compiler
def test_builds_in_place_and_again_only_what_changed(small_source: Path) -> None:
    build = functools.partial(
        run, sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_source, env=clean_environment(**QUICKLY)
    )
    assert build().splitlines()[-1].startswith("fastvit is built with its native part, for portable, ")
    assert (small_source / "fastvit" / f"_C{SUFFIX}").is_file()
    assert (small_source / "fastvit" / "libfastvit.so").is_file()
    assert json.loads((small_source / "fastvit" / "_build_info.json").read_text())["extension"] is True
    assert "no work to do" in build()
    header = small_source / "csrc" / "common" / "isa.h"
    header.write_text(header.read_text() + "\n// changed\n", encoding="utf-8")
    output = build()
    assert "compile common/isa.o" in output
    assert f"compile {sysconfig.get_config_var('SOABI')}/bindings.o" in output
    assert "compile common/torch_abi.o" not in output


@needs_compiler
def test_builds_without_ninja(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "ninja.py").write_text("BIN_DIR = '/nonexistent'\n", encoding="utf-8")
    tools = tmp_path / "bin"  # what the compiler calls, and no ninja
    tools.mkdir()
    for tool in ("as", "ld"):
        (tools / tool).symlink_to(shutil.which(tool))
    env = clean_environment(**QUICKLY, CXX=CXX, PATH=str(tools), PYTHONPATH=str(tmp_path), MAX_JOBS="2")
    output = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_source, env=env)
    assert "ninja: Entering directory" not in output
    count = int(re.search(r"\[1/(\d+)\] compiled ", output)[1])
    assert re.search(rf"\[{count - 2}/{count}\] compiled ", output), "the last two steps link"
    assert "compiled csrc/bindings.cpp" in output
    assert (small_source / "fastvit" / f"_C{SUFFIX}").is_file()
    assert (small_source / "fastvit" / "libfastvit.so").is_file()


@needs_compiler
def test_a_wheel_is_imported_without_torch_triton_and_compiler(small_source: Path, tmp_path: Path) -> None:
    """As by `make wheel-test`, which takes the wheels of a release, the torch of an index and its other packages."""
    wheel = make_wheel(small_source, "--no-build-isolation", env=clean_environment(**QUICKLY, FASTVIT_BUILD_EXT="1"))
    python = Python(tmp_path / "venv")
    python.install("--no-index", wheel)
    (python.packages / "lent.pth").unlink()
    for name in ("rich", "markdown_it", "mdurl", "pygments"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        (python.packages / name).symlink_to(Path(spec.origin).parent)
    (tmp_path / "empty").mkdir()
    code = """
import importlib.util, shutil
assert not any(map(importlib.util.find_spec, ("torch", "triton")))
assert not any(map(shutil.which, ("c++", "g++", "nvcc")))
import fastvit
print(fastvit.__version__, fastvit.__file__)
"""
    bare = {"PATH": str(tmp_path / "empty")}
    told = run(python.executable, "-c", code, cwd=tmp_path, env=bare)
    assert told.split() == [__version__, str(python.packages / "fastvit" / "__init__.py")]
    assert "usage: fastvit" in run(python.executable.with_name("fastvit"), "--help", cwd=tmp_path, env=bare)
    assert __version__ in run(python.executable.with_name("fastvit"), "--version", cwd=tmp_path, env=bare)


@needs_compiler
def test_avx512_bf16_brings_the_set_whose_other_kernels_it_takes(small_source: Path) -> None:
    env = clean_environment(**QUICKLY, FASTVIT_ISA_LIST="avx512_bf16")
    record = build_record(make_wheel(small_source, "--no-build-isolation", env=env))
    if "avx512_bf16" not in record["isa_levels"]:
        pytest.skip("neither this architecture nor its compiler has it")
    assert record["isa_levels"] == ["portable", "avx512", "avx512_bf16"]


def test_compiles_for_arm(small_source: Path, tmp_path: Path) -> None:
    """By a compiler for another machine, which it is asked what it compiles for."""
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    env = clean_environment(**QUICKLY, CXX=compiler, FASTVIT_BUILD_EXT="1")
    run(sys.executable, "setup.py", "build", "--build-lib", tmp_path / "built", cwd=small_source, env=env)
    record = json.loads((tmp_path / "built" / "fastvit" / "_build_info.json").read_text(encoding="utf-8"))
    assert record["isa_levels"] == ["portable", "neon"]
    for binary in (tmp_path / "built" / "fastvit").glob("*.so"):
        assert struct.unpack_from("<H", binary.read_bytes(), 18)[0] == 183  # ELF's number of AArch64


@pytest.mark.parametrize(
    ("archflags", "archs"), [("", ["-arch", "arm64"]), ("-arch x86_64 -arch arm64", "-arch x86_64 -arch arm64".split())]
)
def test_flags_of_macos(monkeypatch: pytest.MonkeyPatch, archflags: str, archs: list[str]) -> None:
    """What Apple's compiler and linker are given; nothing of it is Linux's."""
    rules = build_rules()
    monkeypatch.setattr(rules.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(rules.platform, "machine", lambda: "arm64")
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("ARCHFLAGS", archflags)
    monkeypatch.delenv("LDFLAGS", raising=False)
    cxx = rules.find_cxx()
    assert cxx == ["c++", *archs]
    toolchain = rules.Toolchain(cxx=cxx, compiler="Apple clang", isas=["portable", "neon"])
    rules.LIBRARY = "libfastvit.dylib"
    extension, library = rules.plan_binaries(toolchain, rules.plan_units(toolchain), "_C.so")
    assert extension.flags == ["-bundle", "-undefined", "dynamic_lookup"]
    assert library.flags[0] == "-dynamiclib" and library.flags[1].endswith(",@rpath/libfastvit.dylib")
    commands = [unit.command for unit in extension.units] + [extension.command(), library.command()]
    assert all(command[: 1 + len(archs)] == ["c++", *archs] for command in commands)
    linux = re.compile(r"-Wl,--|-Wl,-soname|-l(dl|rt|pthread)|-fopenmp|-m(avx|fma)")
    assert not [word for command in commands for word in command if linux.match(word)]


@needs_compiler
def test_editable_install(tmp_path: Path) -> None:
    small_source = without_kernels(copy_sources(tmp_path / "parent" / "fastvit"))
    python = Python(tmp_path / "venv")
    python.install("--no-build-isolation", "-e", ".", cwd=small_source, env=clean_environment(**QUICKLY))
    info = python.info()
    assert info["location"] == str(small_source / "fastvit")
    assert info["build"]["extension"] is True
    kernels = python.run("import fastvit.kernels; print(fastvit.kernels.__file__)").strip()
    assert Path(kernels).resolve() == small_source / "kernels" / "__init__.py"
    # By a path, which type checkers follow, with nothing else of the checkout on it.
    (path,) = python.packages.glob("__editable__*")
    folder = Path(path.read_text(encoding="utf-8").strip())
    assert [each.name for each in folder.iterdir()] == ["fastvit"] and (folder / "fastvit" / "py.typed").is_file()
    # Where a folder called fastvit lies, it is not taken for an empty package.
    code = "import fastvit; print(fastvit.__version__)"
    told = run(python.executable, "-W", "ignore", "-c", code, cwd=tmp_path / "parent", env=clean_environment())
    assert told.split() == [__version__]
    env = clean_environment(FASTVIT_BUILD_EXT="0")
    python.install("--no-build-isolation", "-e", ".", cwd=small_source, env=env)
    info = python.info()
    assert info["build"]["extension"] is False
    assert not [*(small_source / "fastvit").glob("*.so")], "an older binary must not survive a pure install"
    assert "FASTVIT_BUILD_EXT=0" in info["build"]["reason"]


class TestBrokenBinary:
    """`import fastvit` works, and info says exactly what is wrong."""

    @staticmethod
    def reason(python: Python) -> str:
        info = python.info()
        assert info["backends"]["cpp"]["available"] is False
        assert info["backends"]["reference"]["available"] is True
        assert info["backends"]["cpp"]["reasons"] == [info["build"]["reason"]]
        return info["build"]["reason"]

    @staticmethod
    def binary(python: Python) -> Path:
        return python.packages / "fastvit" / f"_C{SUFFIX}"

    def test_missing(self, breakable: Python) -> None:
        self.binary(breakable).unlink()
        assert "its binary is missing" in self.reason(breakable)

    def test_missing_without_a_record(self, breakable: Python) -> None:
        self.binary(breakable).unlink()
        (breakable.packages / "fastvit" / "_build_info.json").unlink()
        assert "was never built" in self.reason(breakable)

    def test_truncated(self, breakable: Python) -> None:
        whole = self.binary(breakable).read_bytes()
        self.binary(breakable).write_bytes(whole[: len(whole) // 2])
        assert f"it is truncated: {len(whole) // 2} bytes of" in self.reason(breakable)

    def test_garbage(self, breakable: Python) -> None:
        self.binary(breakable).write_bytes(b"\x00" * 4096)
        assert "it is not a shared library" in self.reason(breakable)

    def test_of_another_python(self, breakable: Python) -> None:
        binary = self.binary(breakable)
        binary.rename(binary.with_name("_C.cpython-399-x86_64-linux-gnu.so"))
        reason = self.reason(breakable)
        assert "built for another Python: found _C.cpython-399-x86_64-linux-gnu.so" in reason
        assert f"needs _C{SUFFIX}" in reason

    def test_of_another_version(self, breakable: Python) -> None:
        (breakable.packages / "fastvit" / "_version.py").write_text('__version__ = "99.0"\n', encoding="utf-8")
        reason = self.reason(breakable)
        assert reason == f"fastvit._C was built for fastvit {__version__}, this is 99.0: rebuild it"

    def test_that_needs_what_this_torch_lacks(self, breakable: Python, tmp_path: Path) -> None:
        source = tmp_path / "alien.cpp"
        source.write_text('extern "C" void torch_of_tomorrow(); extern "C" void PyInit__C() { torch_of_tomorrow(); }\n')
        run(CXX, "-shared", "-fPIC", source, "-o", self.binary(breakable), cwd=tmp_path)
        reason = self.reason(breakable)
        assert f"does not load with torch {torch.__version__}" in reason
        assert "torch_of_tomorrow" in reason

    def test_with_a_torch_that_is_too_old(self, installed: Python) -> None:
        code = (
            "import torch; torch.__version__ = '2.9.1'; from fastvit import backends as b; print(b.extension().reason)"
        )
        assert installed.run(code).splitlines()[-1] == "fastvit._C needs torch >= 2.10, this is 2.9.1"


# --- The hand-written declarations of LibTorch's stable interface --------------------------------------------------

TORCH_INCLUDE = Path(torch.__file__).parent / "include"
TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"
needs_torch_headers = pytest.mark.skipif(
    CXX is None or not (TORCH_INCLUDE / "torch/csrc/stable/library.h").is_file(),
    reason="needs a C++ compiler and torch's headers",
)


@functools.cache
def declared() -> frozenset[str]:
    """The functions of torch that torch_abi.h declares."""
    block = re.search(r'extern "C" \{(.*?)\n\}', HEADER.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    names = frozenset(re.findall(r"\b((?:aoti_)?torch_\w+)\(", block[1]))
    assert len(names) > 20
    return names


def check_syntax(folder: Path, code: str, *flags: str, ok: bool = True) -> str:
    unit = folder / "unit.cpp"
    unit.write_text(code, encoding="utf-8")
    includes = (f"-I{TORCH_INCLUDE}", f"-I{ROOT / 'csrc'}")
    return run(CXX, "-std=c++20", "-fsyntax-only", *includes, *flags, unit, cwd=folder, ok=ok)


@needs_torch_headers
def test_declarations_agree_with_torch(tmp_path: Path) -> None:
    check_syntax(tmp_path, f"{SHIMS}#include <common/torch_abi.h>\n", TORCH_2_10)


@needs_torch_headers
def test_a_wrong_declaration_would_be_noticed(tmp_path: Path) -> None:
    text = HEADER.read_text(encoding="utf-8")
    wrong = text.replace("int64_t grain_size", "int32_t grain_size")
    assert wrong != text
    (tmp_path / "torch_abi.h").write_text(wrong, encoding="utf-8")
    code = f'{SHIMS}#include "{tmp_path}/torch_abi.h"\n'
    assert "torch_parallel_for" in check_syntax(tmp_path, code, TORCH_2_10, ok=False)


@needs_torch_headers
def test_every_declared_function_is_in_torch_2_10(tmp_path: Path) -> None:
    uses = "\n".join(f"  use(&{name});" for name in sorted(declared()))
    code = f"{SHIMS}template <class F> void use(F) {{}}\n"
    check_syntax(tmp_path, code + "void all() {\n" + uses + "\n}\n", TORCH_2_10)


@needs_torch_headers
def test_type_of_the_function_found_at_run_time(tmp_path: Path) -> None:
    code = """#include <torch/csrc/stable/library.h>
#include <type_traits>
using GetStream = AOTITorchError (*)(int32_t, void**);
static_assert(std::is_same_v<decltype(&aoti_torch_get_current_cuda_stream), GetStream>);
"""
    check_syntax(tmp_path, code, TORCH_2_10, "-DUSE_CUDA")
    source = (ROOT / "csrc" / "common" / "torch_abi.cpp").read_text(encoding="utf-8")
    assert "using GetStream = AOTITorchError (*)(int32_t, void**);" in source


def undefined_symbols(binary: Path) -> set[str]:
    output = run("nm", "--dynamic", "--undefined-only", "--format=posix", binary, cwd=binary.parent)
    return {line.split()[0].partition("@")[0] for line in output.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("binary", [f"_C{SUFFIX}", "libfastvit.so"])
def test_binary_asks_torch_only_for_declared_functions(installed: Python, binary: str) -> None:
    wanted = undefined_symbols(installed.packages / "fastvit" / binary)
    assert any(name.startswith(("Py", "_Py")) for name in wanted) is binary.startswith("_C"), "the other has no Python"
    of_torch = {name for name in wanted if re.match(r"(aoti_)?torch_", name)}
    assert of_torch
    assert of_torch <= declared()
    mangled = [name for name in wanted if re.search(r"(2at|3c10|5torch|4aten)[0-9A-Z]", name)]
    assert not mangled, "symbols of torch's C++ are of one torch version"
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert [name for name in declared() if not hasattr(torch_library, name)] == []


WIDE = re.compile(r"\.(avx2|avx512|avx512_bf16)\.o$")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_code_is_shared_between_instruction_sets(source: Path, wheel: Path) -> None:
    """The linker keeps one body of an inline function: it might be one that this CPU cannot run."""
    builds = [*source.glob("build/native-*")]
    if LESS:  # the checkout has the two widest sets as well
        builds += [ROOT / "build" / folder.name for folder in builds]
    for folder in builds:
        owners: dict[str, list[str]] = {}
        for path in folder.rglob("*.o"):
            if not (ROOT / "csrc" / path.relative_to(folder).parent / f"{path.name.partition('.')[0]}.cpp").is_file():
                continue  # CUDA, or left over from a file that is gone
            for line in run("nm", "--defined-only", "--format=posix", path, cwd=source).splitlines():
                name, kind, *_ = line.split()
                if kind == "W":
                    owners.setdefault(name, []).append(path.name)
        assert owners
        shared = {name: files for name, files in owners.items() if len(files) > 1 and any(map(WIDE.search, files))}
        assert not shared
