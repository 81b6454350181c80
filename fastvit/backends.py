"""The backends this machine can run, and the reasons why it cannot run the others.

Everything is looked up once, when this module is imported, so that each call of an operator only reads values, which
``torch.compile`` can trace. ``python -m fastvit info`` prints :func:`describe`.

Environment, read at import; letter case does not matter, and any other value is a ValueError:
    FASTVIT_BACKEND          the backends that the automatic choice may take: "auto", or names joined by commas.
    FASTVIT_CPU_CAPABILITY   the instruction set of the C++ kernels, instead of the best this CPU has (read by the
                             extension): portable, avx2, avx512, avx512_bf16, neon.
    FASTVIT_UNPROVEN         1: the automatic choice takes Triton and CUDA kernels where they are not proven, too.
    TRITON_INTERPRET         1 runs Triton kernels in Triton's interpreter, on any device.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import struct
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvit._version import __version__
from fastvit.proven import PROVEN

BACKENDS = ("reference", "sdpa", "channels_last", "mkl", "onednn", "cpp", "cuda", "triton")
GPU_KERNELS = ("cuda", "triton")
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "neon")
MIN_TORCH = (2, 10)
MIN_TRITON = (3, 6)

_PACKAGE = Path(__file__).resolve().parent
_HOW_TO_BUILD = "pip install --no-build-isolation -e . with FASTVIT_BUILD_EXT=1 shows what is missing"


@dataclass(frozen=True)
class Extension:
    """The native part, ``fastvit._C``: the operators it has, or the reason why it cannot be used.

    ``info`` is the description of the build (of the binary where it loads, of the build's record otherwise).
    """

    reason: str | None
    info: Mapping[str, Any] = field(default_factory=dict)
    operators: frozenset[tuple[str, str]] = frozenset()

    @property
    def available(self) -> bool:
        """Whether the binary is loaded and belongs to this package."""
        return self.reason is None

    def has_op(self, name: str, device_type: str) -> bool:
        """Whether there is a kernel of the operator for tensors on "cpu" or "cuda"."""
        return (name, device_type) in self.operators


def _release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "2.13.0+cpu"; (0, 0) if there is none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _read_build_record(package: Path) -> dict[str, Any]:
    """The record of the build, _build_info.json; {} if there is none that can be read."""
    try:
        record = json.loads((package / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _find_binary(package: Path) -> tuple[Path | None, str | None]:
    """The binary this Python would load, or the reason why there is none."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (package / f"_C{suffix}").is_file():
            return package / f"_C{suffix}", None
    others = sorted(path.name for path in package.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        wanted = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        return None, f"fastvit._C was built for another Python: found {', '.join(others)}, this one needs {wanted}"
    record = _read_build_record(package)
    if record.get("reason"):
        return None, f"fastvit was installed without its native part: {record['reason']}"
    if record.get("extension"):
        return None, f"the native part was built, but its binary is missing from {package}; reinstall fastvit"
    return None, f"fastvit._C was never built in {package}; {_HOW_TO_BUILD}"


def _unbuilt_checkout(package: Path) -> str | None:
    """What to do where ``import fastvit`` took a checkout in which nothing was built; None elsewhere."""
    if not (package.parent / "setup.py").is_file() or (package / "_build_info.json").exists():
        return None
    others = [path for path in sys.path if Path(path or ".", "fastvit").resolve() != package]
    installed = importlib.machinery.PathFinder.find_spec("fastvit", others)
    if installed is None or installed.origin is None:
        cure = "`make build` builds it"
    else:
        cure = f"run elsewhere for the copy in {Path(installed.origin).parent}, or `make build`"
    return f"fastvit is the checkout in {package.parent}, whose native part was never built: {cure}"


def _damage(path: Path) -> str | None:
    """What is wrong with the layout of an ELF file; None if nothing is, and on systems other than Linux.

    Loading a truncated library can end the process with a bus error, which no ``except`` sees. The section headers are
    the last thing in the file, so a file that holds them whole is not truncated.
    """
    if sys.platform != "linux":
        return None
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "it is not a shared library"
    sections_at = struct.unpack_from("<Q", header, 40)[0]
    section_size, sections = struct.unpack_from("<HH", header, 58)
    end, size = sections_at + section_size * sections, path.stat().st_size
    return f"it is truncated: {size} bytes of {end}" if size < end else None


def load_extension() -> Extension:
    """Load ``fastvit._C``. A failure becomes the reason of the result, except for a wrong FASTVIT_CPU_CAPABILITY.

    Raises:
        ValueError: FASTVIT_CPU_CAPABILITY names no instruction set of this CPU.
    """
    record = _read_build_record(_PACKAGE)
    if _release(torch.__version__) < MIN_TORCH:
        return Extension(f"fastvit._C needs torch >= {_dotted(MIN_TORCH)}, this is {torch.__version__}", record)
    path, reason = _find_binary(_PACKAGE)
    if path is None:
        return Extension(reason, record)
    if damage := _damage(path):
        return Extension(f"{path} cannot be loaded: {damage}; reinstall fastvit", record)
    try:
        module = importlib.import_module("fastvit._C")
    except ImportError as error:
        if str(error).startswith("FASTVIT_CPU_CAPABILITY"):
            raise ValueError(str(error)) from None
        return Extension(f"{path} does not load with torch {torch.__version__}: {error}", record)
    info = {**record, **module.build_info()}
    if info["version"] != __version__:
        return Extension(f"fastvit._C was built for fastvit {info['version']}, this is {__version__}: rebuild it", info)
    operators = frozenset((name, key.lower()) for name, key in module.operators())
    return Extension(None, {**info, "operators": sorted(operators)}, operators)


def _requested(value: str) -> frozenset[str] | None:
    """The backends named by FASTVIT_BACKEND; None for a free choice."""
    names = [name.strip().lower() for name in value.split(",") if name.strip()]
    if names in ([], ["auto"]):
        return None
    if not set(names) <= set(BACKENDS):
        accepted = ", ".join(BACKENDS)
        raise ValueError(f"FASTVIT_BACKEND: expected 'auto' or some of {accepted}, joined by commas, got {value!r}")
    return frozenset(names)


def _check_cpu_capability(value: str) -> None:
    """ValueError unless the value names an instruction set: the check where no extension is there to check it."""
    if value and value.lower() not in INSTRUCTION_SETS:
        raise ValueError(f"FASTVIT_CPU_CAPABILITY: expected one of {', '.join(INSTRUCTION_SETS)}, got {value!r}")


def _unproven(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTVIT_UNPROVEN: expected '0' or '1', got {value!r}")
    return value == "1"


def _interpreted(value: str) -> bool:
    """TRITON_INTERPRET, with Triton's own words for true; Triton takes every other value for false."""
    true, false = ("1", "true", "on", "yes", "y"), ("", "0", "false", "off", "no", "n")
    if value.lower() not in true + false:
        raise ValueError(f"TRITON_INTERPRET: expected 1, true, on or yes, or 0, false, off or no, got {value!r}")
    return value.lower() in true


def _library_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_version() -> str | None:
    """Triton's version, under any of the names it is distributed by; None if it cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    names = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")
    return next((version for name in names if (version := _library_version(name))), "unknown")


def _triton_problem() -> str | None:
    """Why no Triton kernel can run on any device; None if one can."""
    if TRITON_VERSION is None:
        return "triton is not installed"
    if TRITON_VERSION != "unknown" and _release(TRITON_VERSION) < MIN_TRITON:
        return f"triton >= {_dotted(MIN_TRITON)} is needed, this is {TRITON_VERSION}"
    if importlib.util.find_spec("fastvit.kernels") is None:
        return "fastvit.kernels is not installed (an uninstalled source tree has it under kernels/)"
    return None


REQUESTED: frozenset[str] | None = _requested(os.environ.get("FASTVIT_BACKEND", ""))
UNPROVEN: bool = _unproven(os.environ.get("FASTVIT_UNPROVEN", ""))
TRITON_VERSION: str | None = _triton_version()
TRITON_INTERPRETED: bool = _interpreted(os.environ.get("TRITON_INTERPRET", ""))
_TRITON_PROBLEM: str | None = _triton_problem()
_EXTENSION: Extension = load_extension()
if not _EXTENSION.available:
    _check_cpu_capability(os.environ.get("FASTVIT_CPU_CAPABILITY", ""))
    if advice := _unbuilt_checkout(_PACKAGE):
        warnings.warn(advice, stacklevel=2)


def extension() -> Extension:
    """The native part of this installation."""
    return _EXTENSION


def cpp_reasons() -> list[str]:
    """Why the C++ kernels cannot run here; an empty list if they can."""
    reason = _EXTENSION.reason
    return [] if reason is None else [reason]


def cuda_reasons(device: torch.device | None = None) -> list[str]:
    """Why the CUDA kernels cannot run, here or on one device; an empty list if they can."""
    if _EXTENSION.reason is not None:
        return [_EXTENSION.reason]
    if not _EXTENSION.info["cuda_archs"]:
        return [f"fastvit._C was built without CUDA: {_EXTENSION.info.get('cuda_reason') or 'no reason was recorded'}"]
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} was built without CUDA"]
    if device is not None and device.type != "cuda":
        return [f"the CUDA kernels take tensors on a CUDA device, not on {device.type}"]
    if device is not None and not _covers(_EXTENSION.info["cuda_archs"], torch.cuda.get_device_capability(device)):
        archs = ", ".join(_EXTENSION.info["cuda_archs"])
        return [f"the CUDA kernels were compiled for {archs}; this GPU is {torch.cuda.get_device_capability(device)}"]
    return []


def _covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code compiled for these architectures runs on a GPU of that compute capability.

    Machine code runs on its own major version from its minor version on, PTX on everything newer.
    """
    major, minor = capability
    for arch in archs:
        kind, number = arch.split("_")
        if not number.isdigit():  # sm_90a: that very chip only
            if kind == "sm" and number[:-1] == f"{major}{minor}":
                return True
            continue
        arch_major, arch_minor = int(number[:-1]), int(number[-1])
        if kind == "compute" and (arch_major, arch_minor) <= (major, minor):
            return True
        if kind == "sm" and arch_major == major and arch_minor <= minor:
            return True
    return False


def triton_reasons(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on the device; an empty list if they can."""
    if _TRITON_PROBLEM is not None:
        return [_TRITON_PROBLEM]
    if TRITON_INTERPRETED or device.type == "cuda":  # ROCm's devices are called cuda, too
        return []
    return [f"Triton kernels run on CUDA and ROCm devices, not on {device.type} (TRITON_INTERPRET=1 interprets them)"]


def chip_of(device: torch.device) -> str:
    """The kind of a GPU, "sm_90" or "gfx942"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


# What torch.compiler.assume_constant_result does, which would import the compiler here.
chip_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unproven_reasons(op: str, backend: str, device: torch.device) -> list[str]:
    """Why a kernel is not chosen unasked: its tests have not passed on such a GPU; an empty list if they have.

    ``fastvit/proven.py`` says which have, where.
    """
    if device.type != "cuda" or backend not in GPU_KERNELS or UNPROVEN:
        return []
    chips = PROVEN.get(f"{op} {backend}", ())
    if chips and chip_of(device) in chips:
        return []
    return ["it has not been proven on this kind of GPU yet: FASTVIT_UNPROVEN=1 or its name takes it"]


def _proven_here(gpu: torch.device | None) -> str | None:
    """A sentence on what the automatic choice takes on this GPU; None without one."""
    if gpu is None:
        return None
    chip = chip_of(gpu)
    found = ", ".join(name for name, chips in PROVEN.items() if chip in chips) or "none"
    others = "taken too, by FASTVIT_UNPROVEN=1" if UNPROVEN else "taken by name, or with FASTVIT_UNPROVEN=1"
    return f"Kernels proven on {chip}: {found}; all other Triton and CUDA kernels are {others}."


def mkl_reasons() -> list[str]:
    """Why products cannot be MKL's with packed weights; an empty list if they can."""
    return [] if torch.backends.mkl.is_available() else ["this torch was built without MKL"]


def onednn_reasons() -> list[str]:
    """Why products cannot be oneDNN's with packed weights; an empty list if they can."""
    return [] if torch.backends.mkldnn.is_available() else ["this torch was built without oneDNN"]


def describe() -> dict[str, Any]:
    """Versions, devices, every backend with the reasons why it cannot run, and the build: JSON-ready."""
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    reasons = {
        "reference": [],
        "sdpa": [],
        "channels_last": [],
        "mkl": mkl_reasons(),
        "onednn": onednn_reasons(),
        "cpp": cpp_reasons(),
        "cuda": cuda_reasons(gpu) or ([] if gpu else ["torch sees no CUDA device"]),
        "triton": triton_reasons(gpu or torch.device("cpu")),
    }
    backends = {
        name: {"available": not why, "reasons": why, "allowed": REQUESTED is None or name in (*REQUESTED, "reference")}
        for name, why in reasons.items()
    }
    return {
        "fastvit": __version__,
        "location": str(_PACKAGE),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "devices": _devices(),
        "backends": backends,
        "proven": _proven_here(gpu),
        "build": {**_EXTENSION.info, "extension": _EXTENSION.available, "reason": _EXTENSION.reason},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("FASTVIT_")},
    }


def _versions() -> dict[str, str | None]:
    """torch, and every library fastvit works with."""
    names = ("numpy", "safetensors", "timm", "transformers", "torchvision", "vit-pytorch")
    others = {name: _library_version(name) for name in names}
    return {"torch": str(torch.__version__), "triton": TRITON_VERSION, **others}


def _devices() -> list[dict[str, Any]]:
    """The CPU and every GPU."""
    cpu: dict[str, Any] = {"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}
    if _EXTENSION.available:
        cpu |= importlib.import_module("fastvit._C").cpu_info()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"device": f"cuda:{index}", "name": properties.name, "memory": memory, "capability": capability})
    return [cpu, *gpus]


def _cpu_name() -> str:
    """The CPU's name as the operating system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
