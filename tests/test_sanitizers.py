"""The CPU kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, touch nothing they should not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit import backends

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which(os.environ.get("CXX", "c++"))


def library(name: str) -> str | None:
    """The path of one of the compiler's own libraries."""
    if CXX is None or sys.platform != "linux":
        return None
    found = subprocess.run(
        [CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return found if Path(found).is_absolute() else None


PRELOADED = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]


def environment(**changes: str) -> dict[str, str]:
    """Without what steers a build or limits what runs."""
    steering = ("FASTVIT_", "CUDA", "CXXFLAGS", "PYTHONPATH", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering)} | changes


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fastvit whose extension is built with sanitizers; its objects are kept between runs."""
    if None in PRELOADED:
        pytest.skip("the compiler has no AddressSanitizer as a library of its own")
    folder = tmp_path_factory.mktemp("sanitized")
    env = environment(
        CUDACXX="/nonexistent/nvcc",
        CXXFLAGS="-O0",  # compiles in a third of the time, and every access is there to be watched
        FASTVIT_BUILD_EXT="1",
        FASTVIT_ISA_LIST="portable,avx2",
        FASTVIT_SANITIZE="address,undefined",
    )
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (binary,) = (folder / "fastvit").glob("_C.*.so")
    assert b"__asan_report_load" in binary.read_bytes(), "the binary is not watched"
    return folder


@pytest.mark.build
@pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
def test_every_operator_is_clean(package: Path) -> None:
    env = environment(
        ASAN_OPTIONS="detect_leaks=0",
        FASTVIT_AUTOTUNE="0",  # a timer would find the watched kernels slow
        LD_PRELOAD=" ".join(str(path) for path in PRELOADED),
        OMP_NUM_THREADS="2",
        PYTHONPATH=str(package),
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    script = ROOT / "tests" / "sanitized_calls.py"
    result = subprocess.run(
        [sys.executable, str(script)], env=env, cwd=package, capture_output=True, text=True, check=False
    )
    report = result.stderr[-6000:]
    assert result.returncode == 0, report
    assert "Sanitizer" not in report and "runtime error" not in report, report
    called = set(json.loads(result.stdout.splitlines()[-1]))
    assert called == {name for name, device in backends.extension().operators if device == "cpu"}
