"""Builds fastvit and its native part, fastvit._C. Project metadata is in pyproject.toml.

The native part needs a C++20 compiler and pybind11, and no torch: it declares the few functions of LibTorch's stable C
interface itself (csrc/common/torch_abi.h). So pip's isolated build environment need not download torch, and one binary
loads with every torch >= 2.10 the user may have. Torch must not be imported here, not even to read the metadata.

Environment:
    FASTVIT_BUILD_EXT       0: pure Python. 1: a native part that cannot be built is an error. Unset: the package is
                            then pure Python, and `python -m fastvit info` says why.
    FASTVIT_BUILD_CUDA      0: no CUDA part. 1: a CUDA part that cannot be built is an error. Unset: it is built where
                            there is an nvcc, unless the torch seen here has no CUDA and no architectures are asked for.
    FASTVIT_CUDA_ARCH_LIST  CUDA architectures, e.g. "8.0;9.0+PTX" (or TORCH_CUDA_ARCH_LIST). Default: those of
                            DEFAULT_ARCHS that nvcc knows, and PTX of the newest.
    CUDA_HOME, CUDACXX      where nvcc is; otherwise PATH. Without nvcc there is no CUDA part. No GPU need be visible.
    FASTVIT_ISA_LIST        instruction sets of the CPU kernels, e.g. "portable,avx2". Default: all that can be built.
    FASTVIT_SANITIZE        sanitizers, e.g. "address,undefined": a slow build, with objects of its own, for finding
                            errors, each of which ends the process. Python must then have been started with LD_PRELOAD
                            of libasan, libubsan and libstdc++.
    CXX, CXXFLAGS, LDFLAGS  as usual. CXX may compile for another machine, such as aarch64-linux-gnu-g++.
    ARCHFLAGS               on macOS: architectures, e.g. "-arch arm64". Default: that of the Python that runs this.
    MAX_JOBS                compilers run at once; default: from cores and available memory.
A value that is none of these ends the build, whatever FASTVIT_BUILD_EXT says.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
EDITABLE = ROOT / ".editable"  # holds a link to fastvit/ alone: what an editable install puts on Python's path
EXTENSION = "fastvit._C"
# The operators for C++ programs, beside it: the same objects without Python.
LIBRARY = "libfastvit.dylib" if platform.system() == "Darwin" else "libfastvit.so"
# Where objects are kept between builds (an editable install gives a fresh temporary directory each time).
SANITIZE = os.environ.get("FASTVIT_SANITIZE", "")
SANITIZERS = ("address", "undefined", "thread", "leak")
if SANITIZE and not set(SANITIZE.split(",")) <= set(SANITIZERS):
    raise SystemExit(f"FASTVIT_SANITIZE: expected some of {', '.join(SANITIZERS)}, joined by commas, got {SANITIZE!r}")
_KIND = f"-{SANITIZE.replace(',', '-')}" if SANITIZE else ""
OBJECTS = ROOT / "build" / f"native-{sysconfig.get_platform()}{_KIND}"  # but for the bindings, of every Python
MEMORY_PER_JOB = 1.5  # GiB
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

# -ffast-math never: masks and padding rely on infinities and NaN.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
]
# vptr would need the run-time types of the libraries loaded.
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"] if SANITIZE else []
if SANITIZE:
    CXX_FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE_FLAGS]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS: dict[str, list[str]] = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    # As for x86, GCC is not to load ahead into registers that there are not; Clang, which does not, has no such flag.
    "neon": ["-DFASTVIT_NEON", "-fno-schedule-insns", "-Wno-ignored-optimization-argument"],
}
# What the compiler must take with those flags, whatever machine this is: it may compile for another.
X86_PROBE = "#include <immintrin.h>\n"
NEON_PROBE = """
#include <arm_neon.h>
#if !defined(__aarch64__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error
#endif
"""
ISA_PROBES = {isa: NEON_PROBE if isa == "neon" else X86_PROBE for isa in ISA_FLAGS if isa != "portable"}
DEFAULT_ARCHS = ("80", "90", "100")


class BuildError(RuntimeError):
    """The native part cannot be built; the message is the reason recorded for `python -m fastvit info`."""


@dataclass
class Unit:
    """One compiler run: a source file with its flags."""

    source: Path
    object: Path
    command: list[str]  # compiler and flags, without source, output and dependency file


@dataclass
class Binary:
    """One linker run: what it makes, and of which objects."""

    path: Path
    units: list[Unit]
    cxx: list[str]
    flags: list[str]

    def command(self) -> list[str]:
        """The linker's command."""
        return [*self.cxx, *(str(unit.object) for unit in self.units), *self.flags, "-o", str(self.path)]


@dataclass
class Toolchain:
    """The compilers found, and what they can do."""

    cxx: list[str]
    compiler: str  # first line of --version
    isas: list[str]
    nvcc: list[str] = field(default_factory=list)
    nvcc_version: str | None = None
    cuda_lib: Path | None = None
    cuda_archs: list[str] = field(default_factory=list)  # sm_80 ... compute_100
    cuda_reason: str | None = None  # why there is no CUDA part


def read_version() -> str:
    """The version stated in fastvit/_version.py."""
    text = (ROOT / "fastvit" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise BuildError("fastvit/_version.py does not state __version__")
    return match[1]


def extension_mode() -> str:
    """FASTVIT_BUILD_EXT: "0", "1" or "" (try)."""
    mode = os.environ.get("FASTVIT_BUILD_EXT", "")
    if mode not in ("", "0", "1"):
        raise SystemExit(f"FASTVIT_BUILD_EXT: expected 0, 1 or unset, got {mode!r}")
    return mode


def cuda_mode() -> str:
    """FASTVIT_BUILD_CUDA: "0", "1" or "" (try)."""
    mode = os.environ.get("FASTVIT_BUILD_CUDA", "")
    if mode not in ("", "0", "1"):
        raise SystemExit(f"FASTVIT_BUILD_CUDA: expected 0, 1 or unset, got {mode!r}")
    return mode


def torch_without_cuda() -> str | None:
    """The version of the torch that is installed here, if it has no CUDA; it is not imported. None in isolation."""
    spec = importlib.util.find_spec("torch")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    return version[1] if version and re.search(r"^cuda\b.*= None$", text, re.MULTILINE) else None


def find_cxx() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first of the usual names on PATH; on macOS for which architecture."""
    asked = shlex.split(os.environ.get("CXX", ""))
    archs = shlex.split(os.environ.get("ARCHFLAGS", "") or f"-arch {platform.machine()}")
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return [*command, *archs] if platform.system() == "Darwin" else command
    return None


def reason_not_to_build() -> str | None:
    """Why the native part is not even tried, from what is cheap to see; None if it is."""
    if extension_mode() == "0":
        return "FASTVIT_BUILD_EXT=0 was set at build time"
    if platform.system() not in ("Linux", "Darwin"):
        return f"the native part is built on Linux and macOS only, this is {platform.system()}"
    if find_cxx() is None:
        return f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}; c++, g++, clang++ on PATH)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed in the build environment"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"Python's headers are not installed (no Python.h in {sysconfig.get_path('include')})"
    return None


def run(command: list[str]) -> str:
    """The output of a command; BuildError with its last lines if it fails."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}") from error
    if result.returncode != 0:
        tail = "\n".join(result.stdout.strip().splitlines()[-15:])
        raise BuildError(f"`{shlex.join(command[:1])}` failed with status {result.returncode}:\n{tail}")
    return result.stdout


def compiles(cxx: list[str], flags: list[str], code: str) -> bool:
    """Whether the compiler accepts the code with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code, encoding="utf-8")
        try:
            run([*cxx, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
        except BuildError:
            return False
    return True


def find_isas(cxx: list[str]) -> list[str]:
    """The instruction sets of this architecture that the compiler can build, as far as they are asked for."""
    value = os.environ.get("FASTVIT_ISA_LIST", "")
    asked = {isa for isa in re.split(r"[;,\s]+", value.lower()) if isa}
    if not asked <= set(ISA_FLAGS):
        raise SystemExit(f"FASTVIT_ISA_LIST: expected some of {', '.join(ISA_FLAGS)}, got {value!r}")
    wanted = {"portable", *asked} if asked else set(ISA_FLAGS)
    if "avx512_bf16" in wanted:
        wanted.add("avx512")  # whose kernels it takes for all but bfloat16
    usable = {isa for isa in wanted - {"portable"} if compiles(cxx, ISA_FLAGS[isa], ISA_PROBES[isa])}
    return [isa for isa in ISA_FLAGS if isa == "portable" or isa in usable]


def find_nvcc() -> str | None:
    """nvcc by CUDACXX, CUDA_HOME or CUDA_PATH, PATH, or in the usual place."""
    for variable, suffix in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        if value := os.environ.get(variable):
            return shutil.which(str(Path(value, suffix)) if suffix else value)
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_archs(known: list[str]) -> list[str]:
    """The architectures to compile for, as nvcc names them: sm_XX for machine code, compute_XX for PTX."""
    variable = "FASTVIT_CUDA_ARCH_LIST" if os.environ.get("FASTVIT_CUDA_ARCH_LIST") else "TORCH_CUDA_ARCH_LIST"
    asked = os.environ.get(variable)
    if not asked:
        machine = [arch for arch in DEFAULT_ARCHS if arch in known] or known[-1:]
        return [*(f"sm_{arch}" for arch in machine), f"compute_{machine[-1]}"]
    archs: list[str] = []
    for word in re.split(r"[;,\s]+", asked.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise SystemExit(f"{variable}: expected architectures such as 8.0, 80 or 9.0+PTX, got {word!r}")
        number = match[1] + match[2] + match[3]
        archs += [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]
    return list(dict.fromkeys(archs))


def add_cuda(toolchain: Toolchain) -> None:
    """Fill in the CUDA part, or the reason why there is none."""
    toolchain.cuda_reason = reason_without_cuda() or find_cuda(toolchain)
    if toolchain.cuda_reason and cuda_mode() == "1":
        raise SystemExit(f"FASTVIT_BUILD_CUDA=1, but the CUDA part cannot be built: {toolchain.cuda_reason}")


def reason_without_cuda() -> str | None:
    """Why no CUDA part is tried; None if it is."""
    mode = cuda_mode()
    if mode == "0":
        return "FASTVIT_BUILD_CUDA=0 was set at build time"
    if not any(CSRC.glob("*/cuda*.cu")):
        return "these sources have no CUDA part"
    if platform.system() != "Linux":
        return f"the CUDA part is built on Linux only, this is {platform.system()}"
    version = None if mode == "1" or os.environ.get("FASTVIT_CUDA_ARCH_LIST") else torch_without_cuda()
    if version is not None:
        return f"torch {version} has no CUDA; FASTVIT_BUILD_CUDA=1 builds the CUDA part all the same"
    return None


def find_cuda(toolchain: Toolchain) -> str | None:
    """Fill in nvcc and what it compiles for; the reason if it cannot be used."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found at build time (CUDACXX, CUDA_HOME, PATH)"
    release = re.search(r"release [\d.]+, V([\d.]+)", run([nvcc, "--version"]))
    archs = cuda_archs(re.findall(r"sm_(\d+)\b", run([nvcc, "--list-gpu-code"])))
    # A dry run shows where the toolkit's libraries are, even if nvcc is called through a link.
    plan = run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    folders = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', plan)]
    lib = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if lib is None:
        return f"{nvcc} has no libcudart_static.a beside it (looked in {', '.join(map(str, folders))})"
    toolchain.nvcc, toolchain.nvcc_version = [nvcc], release[1] if release else "unknown"
    toolchain.cuda_lib, toolchain.cuda_archs = lib, archs
    return None


def find_toolchain() -> Toolchain:
    """The compilers; BuildError if there is none that can build the native part."""
    if reason := reason_not_to_build():
        raise BuildError(reason)
    cxx = find_cxx()
    assert cxx is not None  # reason_not_to_build saw one
    compiler = run([*cxx, "--version"]).splitlines()[0]
    if not compiles(cxx, CXX_FLAGS, "#include <bit>\nint main() { return std::bit_cast<int>(0.0f); }\n"):
        raise BuildError(f"the compiler ({compiler}) cannot build C++20: GCC >= 11 or Clang >= 14 is needed")
    toolchain = Toolchain(cxx=cxx, compiler=compiler, isas=find_isas(cxx))
    add_cuda(toolchain)
    return toolchain


def macro(name: str, value: str) -> str:
    """A compiler flag that defines a macro as a string."""
    return f'-D{name}="{value}"'


def plan_units(toolchain: Toolchain) -> list[Unit]:
    """Every compiler run: cpu*.cpp once per instruction set, other C++ once, CUDA files for all architectures.

    The longest come first, so that no compiler is alone at the end.
    """
    base = [*toolchain.cxx, *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), f"-I{CSRC}"]
    has_isas = [f"-DFASTVIT_HAS_{isa.upper()}" for isa in toolchain.isas]
    units: list[Unit] = []
    sources = [*CSRC.glob("*/cpu*.cpp"), *CSRC.glob("*.cpp"), *CSRC.glob("*/*.cpp")]
    for source in dict.fromkeys(sources):
        name = source.relative_to(CSRC).with_suffix("")
        if source.stem.startswith("cpu"):
            for isa in toolchain.isas:
                # Where there are others, the portable kernels are for CPUs of long ago.
                rest = ["-O2"] if isa == "portable" and len(toolchain.isas) > 1 and not SANITIZE else []
                command = [*base, f"-DFASTVIT_ISA={isa}", *ISA_FLAGS[isa], *rest]
                units.append(Unit(source, OBJECTS / f"{name}.{isa}.o", command))
        else:
            folder, extra = OBJECTS, []
            if source.stem in PYTHON_FILES:
                folder, extra = OBJECTS / (sysconfig.get_config_var("SOABI") or "python"), binding_flags(toolchain)
            units.append(Unit(source, folder / f"{name}.o", [*base, *has_isas, *extra]))
    for source in sorted(CSRC.glob("*/cuda*.cu")) if toolchain.nvcc else []:
        name = source.relative_to(CSRC).with_suffix("")
        units.append(Unit(source, OBJECTS / f"{name}.cu.o", [*toolchain.nvcc, *cuda_flags(toolchain)]))
    return units


PYTHON_FILES = "bindings", "snapshot"


def plan_binaries(toolchain: Toolchain, units: list[Unit], extension: str) -> list[Binary]:
    """fastvit._C, and the library for C++ programs: on the CPU, with csrc/library.cpp in the place of the bindings."""
    library = [unit for unit in units if unit.source == CSRC / "library.cpp"]
    of_extension = [unit for unit in units if unit not in library]
    cpu = [unit for unit in of_extension if unit.source.suffix == ".cpp" and unit.source.stem not in PYTHON_FILES]
    has_cuda = any(unit.source.suffix == ".cu" for unit in units)
    return [
        Binary(OBJECTS / extension, of_extension, toolchain.cxx, link_flags(toolchain, has_cuda)),
        # In this order: library.cpp registers, at its start, what the others list at theirs.
        Binary(OBJECTS / LIBRARY, cpu + library, toolchain.cxx, link_flags(toolchain, False, library=True)),
    ]


def binding_flags(toolchain: Toolchain) -> list[str]:
    """Only these files see Python, pybind11 and the build's description."""
    import pybind11

    return [
        *(f"-isystem{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))),
        macro("FASTVIT_VERSION", read_version()),
        macro("FASTVIT_CUDA_ARCHS", " ".join(toolchain.cuda_archs)),
        macro("FASTVIT_NVCC_VERSION", toolchain.nvcc_version or ""),
    ]


def cuda_flags(toolchain: Toolchain) -> list[str]:
    """nvcc's flags: one -gencode per architecture."""
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-cudart=static", f"-I{CSRC}", f"-ccbin={toolchain.cxx[0]}"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "--threads=0"]
    for arch in toolchain.cuda_archs:
        flags.append(f"-gencode=arch=compute_{arch.split('_')[1]},code={arch}")
    return flags


def make_torch_stub(toolchain: Toolchain) -> Path:
    """An empty libtorch_cpu.so to link against.

    The binary must name libtorch_cpu.so as a library it needs, for its symbols to be found in the copy that
    `import torch` has loaded; the linker does not need the library's contents.
    """
    stub = OBJECTS / "stub" / "libtorch_cpu.so"
    if not stub.exists():
        stub.parent.mkdir(parents=True, exist_ok=True)
        source = stub.with_suffix(".cpp")
        source.write_text("", encoding="utf-8")
        run([*toolchain.cxx, "-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so", str(source), "-o", str(stub)])
    return stub


def link_flags(toolchain: Toolchain, has_cuda: bool, library: bool = False) -> list[str]:
    """The linker's flags; they follow the objects. ``library``: of LIBRARY, which macOS tells from an extension."""
    extra = [*SANITIZE_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
    if platform.system() == "Darwin":
        kind = ["-dynamiclib", f"-Wl,-install_name,@rpath/{LIBRARY}"] if library else ["-bundle"]
        return [*kind, "-undefined", "dynamic_lookup", *extra]
    flags = ["-shared", "-Wl,--no-as-needed", str(make_torch_stub(toolchain)), "-Wl,--as-needed"]
    if has_cuda:
        flags += [str(toolchain.cuda_lib / "libcudart_static.a") if toolchain.cuda_lib else ""]
        flags += ["-Wl,--exclude-libs,libcudart_static.a", "-lrt"]
    return [*flags, "-lpthread", "-ldl", *extra]


def max_jobs() -> int:
    """How many compilers to run at once: MAX_JOBS, or as cores and available memory allow."""
    if asked := os.environ.get("MAX_JOBS"):
        if not asked.isdecimal() or int(asked) < 1:
            raise SystemExit(f"MAX_JOBS: expected a positive integer, got {asked!r}")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(gib / MEMORY_PER_JOB) for gib in available_memory())]))


def available_memory() -> Iterator[float]:
    """GiB that the kernel could give, caches it would drop among them, and those left of a container's limit."""
    with contextlib.suppress(OSError, ValueError, StopIteration):  # macOS does not tell
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        yield int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        yield (limit - used) / 2**30


def find_ninja() -> str | None:
    """The ninja executable: of the Python package, or on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
        if packaged:
            return packaged
    return shutil.which("ninja")


def ninja_escape(text: str) -> str:
    """Text as a path or value in a build.ninja file."""
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def dependency_flags(unit: Unit, depfile: Path) -> list[str]:
    """Flags that make the compiler list the headers a source includes."""
    return ["-MD", "-MF", str(depfile)] if unit.source.suffix == ".cu" else ["-MMD", "-MF", str(depfile)]


def full_command(unit: Unit) -> list[str]:
    """The whole compiler command of a unit."""
    depfile = unit.object.with_suffix(".d")
    return [*unit.command, *dependency_flags(unit, depfile), "-c", str(unit.source), "-o", str(unit.object)]


def build_with_ninja(ninja: str, units: list[Unit], binaries: list[Binary]) -> None:
    """Compile what changed and link, through ninja."""
    lines = ["ninja_required_version = 1.5", ""]
    lines += [
        "rule compile",
        "  command = $cmd",
        "  depfile = $dep",
        "  deps = gcc",
        "  description = compile $what",
        "",
    ]
    lines += ["rule link", "  command = $cmd", "  description = link $what", ""]
    for unit in units:
        lines.append(f"build {ninja_escape(str(unit.object))}: compile {ninja_escape(str(unit.source))}")
        lines.append(f"  cmd = {shlex.join(full_command(unit)).replace('$', '$$')}")
        lines.append(f"  what = {unit.object.relative_to(OBJECTS)}")
        lines.append(f"  dep = {unit.object.with_suffix('.d')}")
    for binary in binaries:
        objects = " ".join(ninja_escape(str(unit.object)) for unit in binary.units)
        lines.append(f"build {ninja_escape(str(binary.path))}: link {objects}")
        lines.append(f"  cmd = {shlex.join(binary.command()).replace('$', '$$')}")
        lines.append(f"  what = {binary.path.name}")
    (OBJECTS / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [ninja, "-C", str(OBJECTS), "-j", str(max_jobs())]
    output: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            output.append(line)
            print(line, end="", flush=True)
    if process.returncode != 0:
        raise BuildError(f"compiling failed:\n{first_error(output)}")


def build_plainly(units: list[Unit], binaries: list[Binary]) -> None:
    """Compile everything and link, without ninja."""
    for folder in {unit.object.parent for unit in units}:
        folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(max_jobs()) as pool:
        running = {pool.submit(run, full_command(unit)): unit for unit in units}
        for done, future in enumerate(concurrent.futures.as_completed(running), start=1):
            try:
                output = future.result()
            except BuildError:
                pool.shutdown(cancel_futures=True)
                raise
            source = running[future].source.relative_to(ROOT)
            print(
                f"[{done}/{len(units) + len(binaries)}] compiled {source} -> {running[future].object.name}\n{output}",
                end="",
            )
            sys.stdout.flush()
    for binary in binaries:
        run(binary.command())


def first_error(lines: list[str]) -> str:
    """The lines of a compiler's output from its first error on."""
    start = next((i for i, line in enumerate(lines) if "error:" in line), max(0, len(lines) - 15))
    return "".join(lines[start : start + 15])


def replace_file(source: Path, target: Path) -> None:
    """Put a copy of a binary at target. Replaced, not overwritten: a running process may have the old one mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(source, fresh)
    fresh.replace(target)


@contextlib.contextmanager
def objects_locked() -> Iterator[None]:
    """One build at a time in the objects' folder."""
    import fcntl  # not on Windows, where nothing is built

    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_native(toolchain: Toolchain, target: Path) -> None:
    """Compile and link fastvit._C and the library for C++ programs, and put them at target and beside it."""
    units = plan_units(toolchain)
    binaries = plan_binaries(toolchain, units, target.name)
    ninja = find_ninja()
    if ninja:
        build_with_ninja(ninja, units, binaries)
    else:
        build_plainly(units, binaries)
    for binary in binaries:
        replace_file(binary.path, target.with_name(binary.path.name))


def build_info(toolchain: Toolchain | None, reason: str | None) -> dict[str, Any]:
    """What `python -m fastvit info` reports about the build, also without a binary."""
    info: dict[str, Any] = {
        "version": read_version(),
        "extension": toolchain is not None,
        "reason": reason,
        "python": sysconfig.get_config_var("SOABI") or f"python{sys.version_info.major}.{sys.version_info.minor}",
        "platform": sysconfig.get_platform(),
    }
    if toolchain is not None:
        info |= {
            "compiler": toolchain.compiler,
            "cxx_flags": [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))],
            "isa_flags": {isa: ISA_FLAGS[isa] for isa in toolchain.isas},
            "isa_levels": toolchain.isas,
            "cuda_archs": toolchain.cuda_archs,
            "cuda_reason": toolchain.cuda_reason,
            "nvcc": toolchain.nvcc_version,
        }
    return info


def write_build_info(folder: Path, info: dict[str, Any]) -> None:
    """Leave the description of the build beside the package's modules."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


class BuildExtension(build_ext):
    """Builds fastvit._C with the project's own rules (per instruction set, nvcc, ninja)."""

    def run(self) -> None:
        """Build into build_lib; for ``--inplace`` and editable installs copy from there beside the sources."""
        target = Path(self.build_lib, self.get_ext_filename(EXTENSION)).resolve()
        info = self.build(target) if self.extensions else build_info(None, reason_not_to_build())
        write_build_info(target.parent, info)
        if self.inplace:
            put_in_source(target, info)
        tell(info)

    def build(self, target: Path) -> dict[str, Any]:
        """Build the native part if possible, and describe what was built."""
        try:
            toolchain = find_toolchain()
            with objects_locked():
                build_native(toolchain, target)
        except BuildError as error:
            if extension_mode() == "1":
                raise SystemExit(f"FASTVIT_BUILD_EXT=1, but the native part cannot be built: {error}") from error
            for name in (target.name, LIBRARY):
                target.with_name(name).unlink(missing_ok=True)
            return build_info(None, str(error))
        return build_info(toolchain, None)


class BuildPython(build_py):
    """Records why there is no native part where none is tried, since build_ext does not run then."""

    def run(self) -> None:
        """Copy the modules (not in editable mode) and leave the description of the build."""
        super().run()
        if self.distribution.has_ext_modules():
            return
        info = build_info(None, reason_not_to_build())
        if self.editable_mode:
            put_in_source(ROOT / "build" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", info)
        else:
            write_build_info(Path(self.build_lib, "fastvit"), info)
        tell(info)


class BuildWheel(bdist_wheel):
    """Names a wheel without the native part so, by its build tag: pip shows the name, and nothing else of a build."""

    @property
    def wheel_dist_name(self) -> str:
        """Name, version, and the build tag once it is built."""
        if self.build_number or not self.distribution.have_run.get("build"):
            return super().wheel_dist_name
        record = Path(self.get_finalized_command("build").build_lib, "fastvit", "_build_info.json")
        native = json.loads(record.read_text(encoding="utf-8"))["extension"]
        return super().wheel_dist_name + ("" if native else "-0without_native_part")


class EditableWheel(editable_wheel):
    """Editable by a path, which type checkers follow: an import hook they do not see.

    Nor does a hook see ``import fastvit`` in the folder that holds the checkout: Python takes a folder of that name for
    an empty package first. A package on the path comes before those.
    """

    def finalize_options(self) -> None:
        """Lay the links that make fastvit/ the package as it is installed."""
        EDITABLE.mkdir(exist_ok=True)
        for link, target in ((ROOT / "fastvit" / "kernels", "../kernels"), (EDITABLE / "fastvit", "../fastvit")):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        self.distribution.package_dir = {"": EDITABLE.name}
        super().finalize_options()


def tell(info: dict[str, Any]) -> None:
    """Say, as the last line of a build, whether there is a native part; what a compiler said comes before it."""
    first, *details = (info["reason"] or "").splitlines() or [""]
    if details:
        print("\n".join(details), file=sys.stderr)
    for_what = ", ".join([*info.get("isa_levels", ()), *info.get("cuda_archs", ())])
    with_it = (
        f"with its native part, for {for_what}"
        if info["extension"]
        else f"WITHOUT its native part: {first.rstrip(':')}"
    )
    print(f"fastvit is built {with_it}", file=sys.stderr, flush=True)


def put_in_source(built: Path, info: dict[str, Any]) -> None:
    """Make the source tree's fastvit/ what this build gave: its binary, or none, and the description."""
    package = ROOT / "fastvit"
    for name in (built.name, LIBRARY):
        if info["extension"]:
            replace_file(built.with_name(name), package / name)
        else:
            (package / name).unlink(missing_ok=True)
    write_build_info(package, info)


def native_modules() -> list[Extension]:
    """The native part if it can be tried. Declared only then, so that a pure wheel is tagged as pure."""
    if extension_mode() == "1" or reason_not_to_build() is None:
        return [Extension(EXTENSION, sources=[], optional=True)]
    return []


setup(
    packages=sorted({*find_packages(str(ROOT), include=["fastvit", "fastvit.*"]), "fastvit.kernels"}),
    package_dir={"fastvit.kernels": "kernels"},
    package_data={"fastvit": ["py.typed"]},
    include_package_data=False,
    ext_modules=native_modules(),
    cmdclass={
        "bdist_wheel": BuildWheel,
        "build_ext": BuildExtension,
        "build_py": BuildPython,
        "editable_wheel": EditableWheel,
    },
)
