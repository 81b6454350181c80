"""fastvit.backends on this machine and on simulated ones, and every environment variable."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvit import backends
from fastvit._version import __version__

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT_", "TRITON_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, check=False)


def usable(info: dict, operators: tuple = (), reason: str | None = None) -> backends.Extension:
    return backends.Extension(reason, info, frozenset(operators))


class TestExtension:
    def test_operators_are_asked_by_name_and_device(self) -> None:
        extension = usable({}, [("leff", "cpu")])
        assert extension.available
        assert extension.has_op("leff", "cpu")
        assert not extension.has_op("leff", "cuda")
        assert not extension.has_op("other", "cpu")

    def test_reason_means_unavailable(self) -> None:
        extension = backends.Extension("no compiler")
        assert not extension.available
        assert not extension.has_op("leff", "cpu")

    @pytest.mark.skipif(not backends.extension().available, reason=f"no binary: {backends.extension().reason}")
    def test_the_binary_here(self) -> None:
        extension = backends.extension()
        assert backends.cpp_reasons() == []
        assert extension.info["version"] == __version__
        assert extension.info["cxx_standard"] >= 202002
        assert "portable" in extension.info["isa_levels"]
        assert extension.operators
        for name, device in extension.operators:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastvit::{name}", device.upper())

    @pytest.mark.skipif(not backends.extension().available, reason=f"no binary: {backends.extension().reason}")
    def test_instruction_sets(self) -> None:
        from fastvit import _C

        before = _C.cpu_info()
        assert before["in_use"] in before["supported"]
        assert set(before["supported"]) <= set(backends.extension().info["isa_levels"])
        try:
            for name in before["supported"]:
                _C._set_cpu_capability(name)
                assert _C.cpu_info()["in_use"] == name
            with pytest.raises(ValueError, match=r"name: expected one of portable.*got 'mmx'"):
                _C._set_cpu_capability("mmx")
        finally:
            _C._set_cpu_capability(before["in_use"])

    @pytest.mark.skipif(not backends.extension().available, reason=f"no binary: {backends.extension().reason}")
    def test_instruction_set_asked_for_by_the_environment(self) -> None:
        code = "from fastvit import backends, _C; print(_C.cpu_info()['in_use'])"
        for name in ("portable", "PORTABLE"):
            assert in_fresh_process(code, FASTVIT_CPU_CAPABILITY=name).stdout == "portable\n"


class TestCudaReasons:
    @pytest.fixture
    def built_for(self, monkeypatch: pytest.MonkeyPatch):
        def build(*archs: str, torch_cuda: str | None = "13.0", capability: tuple[int, int] = (9, 0)) -> None:
            info = {"cuda_archs": list(archs), "cuda_reason": "nvcc was not found"}
            monkeypatch.setattr(backends, "_EXTENSION", usable(info))
            monkeypatch.setattr(torch.version, "cuda", torch_cuda)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

        return build

    def test_no_binary(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_EXTENSION", backends.Extension("never built"))
        assert backends.cuda_reasons() == ["never built"]
        assert backends.cpp_reasons() == ["never built"]

    def test_built_without_cuda(self, built_for) -> None:
        built_for()
        assert backends.cuda_reasons() == ["fastvit._C was built without CUDA: nvcc was not found"]

    def test_torch_without_cuda(self, built_for) -> None:
        built_for("sm_80", torch_cuda=None)
        assert backends.cuda_reasons() == [f"torch {torch.__version__} was built without CUDA"]

    def test_another_device(self, built_for) -> None:
        built_for("sm_80")
        assert backends.cuda_reasons() == []
        assert "not on cpu" in backends.cuda_reasons(CPU)[0]

    @pytest.mark.parametrize(
        ("archs", "capability", "runs"),
        [
            (["sm_80"], (8, 0), True),
            (["sm_80"], (8, 9), True),  # machine code runs on later chips of its generation
            (["sm_86"], (8, 0), False),
            (["sm_80"], (9, 0), False),
            (["sm_80", "compute_80"], (12, 0), True),  # PTX is compiled for whatever comes later
            (["compute_90"], (8, 0), False),
            (["sm_90a"], (9, 0), True),
            (["sm_90a", "compute_90a"], (10, 0), False),
            (["sm_80", "sm_90", "sm_100", "compute_100"], (12, 0), True),
            (["sm_80", "sm_90", "sm_100", "compute_100"], (7, 5), False),
        ],
    )
    def test_architectures(self, built_for, archs, capability, runs) -> None:
        built_for(*archs, capability=capability)
        reasons = backends.cuda_reasons(CUDA)
        assert (reasons == []) is runs
        if not runs:
            assert ", ".join(archs) in reasons[0]
            assert str(capability) in reasons[0]


class TestTritonReasons:
    def test_on_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_TRITON_PROBLEM", None)
        monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
        assert backends.triton_reasons(CUDA) == []
        assert "not on cpu" in backends.triton_reasons(CPU)[0]
        assert "not on mps" in backends.triton_reasons(MPS)[0]
        monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
        assert backends.triton_reasons(CPU) == []

    @pytest.mark.parametrize(
        ("version", "problem"),
        [(None, "triton is not installed"), ("3.5.1", "triton >= 3.6 is needed, this is 3.5.1"), ("3.10.0", None)],
    )
    def test_versions(self, monkeypatch: pytest.MonkeyPatch, version: str | None, problem: str | None) -> None:
        monkeypatch.setattr(backends, "TRITON_VERSION", version)
        assert backends._triton_problem() == problem

    def test_a_problem_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_TRITON_PROBLEM", "triton is not installed")
        assert backends.triton_reasons(CUDA) == ["triton is not installed"]

    def test_importing_fastvit_does_not_import_triton(self) -> None:
        code = "import sys; sys.modules['triton'] = None\nimport fastvit.backends as b; print(b._TRITON_PROBLEM)"
        result = in_fresh_process(code)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "triton is not installed\n"


class TestRequested:
    @pytest.mark.parametrize("value", ["", "auto", " auto ", ","])
    def test_free_choice(self, value: str) -> None:
        assert backends._requested(value) is None

    def test_names(self) -> None:
        assert backends._requested("cpp, SDPA") == {"cpp", "sdpa"}

    @pytest.mark.parametrize("value", ["cudnn", "cpp,cublas", "auto,cpp"])
    def test_unknown_names_are_refused(self, value: str) -> None:
        accepted = "reference, sdpa, channels_last, mkl, onednn, cpp, cuda, triton, joined by commas"
        with pytest.raises(ValueError, match=f"FASTVIT_BACKEND: expected 'auto' or some of {accepted}, got '{value}'"):
            backends._requested(value)

    def test_read_from_the_environment(self) -> None:
        code = "import fastvit.backends as b; print(sorted(b.REQUESTED), b.describe()['backends']['sdpa']['allowed'])"
        assert in_fresh_process(code, FASTVIT_BACKEND="cpp").stdout == "['cpp'] False\n"


class TestEnvironment:
    """A wrong value of any variable is an error that names the variable, what it takes and what it got."""

    @pytest.mark.parametrize(
        ("variable", "value", "expected"),
        [
            ("FASTVIT_BACKEND", "fast", "expected 'auto' or some of reference, sdpa, .*, got 'fast'"),
            ("FASTVIT_CPU_CAPABILITY", "mmx", "expected one of portable.*got 'mmx'"),
            ("FASTVIT_LOG", "loud", "expected 'debug', .*, got 'loud'"),
            ("FASTVIT_AUTO", "keras", r"expected some of timm, .*, got \['keras'\]"),
            ("FASTVIT_AUTOTUNE", "yes", "expected '0' or '1', got 'yes'"),
            ("FASTVIT_UNPROVEN", "yes", "expected '0' or '1', got 'yes'"),
            ("TRITON_INTERPRET", "perhaps", "expected 1, .*, got 'perhaps'"),
        ],
    )
    def test_of_the_package(self, variable: str, value: str, expected: str) -> None:
        result = in_fresh_process("import fastvit", **{variable: value})
        assert result.returncode != 0
        assert re.search(f"ValueError: {variable}: {expected}", result.stderr)

    def test_a_cache_directory_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        code = "from fastvit import autotune; autotune.cache_directory()"
        result = in_fresh_process(code, FASTVIT_CACHE_DIR=str(tmp_path / "file"))
        assert "ValueError: FASTVIT_CACHE_DIR: expected a directory, got" in result.stderr

    @pytest.mark.parametrize("name", ["mmx", "avx512_fp16", " "])
    def test_instruction_sets_without_an_extension(self, name: str) -> None:
        expected = "FASTVIT_CPU_CAPABILITY: expected one of portable, avx2, avx512, avx512_bf16, neon, got"
        with pytest.raises(ValueError, match=f"{expected} '{name}'"):
            backends._check_cpu_capability(name)
        hide = "import sys, importlib.machinery; importlib.machinery.EXTENSION_SUFFIXES.clear(); "
        hide += (
            "importlib.machinery.EXTENSION_SUFFIXES.append('.none'); import fastvit.backends as b; print(b.extension())"
        )
        result = in_fresh_process(hide, FASTVIT_CPU_CAPABILITY=name)
        assert expected in result.stderr
        assert "was built for another Python" in in_fresh_process(hide, FASTVIT_CPU_CAPABILITY="AVX2").stdout

    @pytest.mark.skipif(not backends.extension().available, reason=f"no binary: {backends.extension().reason}")
    def test_an_instruction_set_that_this_cpu_lacks(self) -> None:
        from fastvit import _C

        lacking = [name for name in backends.INSTRUCTION_SETS if name not in _C.cpu_info()["supported"]]
        if not lacking:
            pytest.skip("this CPU runs all of them")
        result = in_fresh_process("import fastvit", FASTVIT_CPU_CAPABILITY=lacking[0])
        assert re.search(
            f"ValueError: FASTVIT_CPU_CAPABILITY: expected .*portable.*, got '{lacking[0]}'", result.stderr
        )

    @pytest.mark.parametrize(
        ("value", "interpreted"),
        [("", False), ("0", False), ("False", False), ("1", True), ("ON", True), ("yes", True)],
    )
    def test_the_interpreter_is_on_where_triton_has_it_on(self, value: str, interpreted: bool) -> None:
        assert backends._interpreted(value) is interpreted
        libtriton = pytest.importorskip("triton._C.libtriton")
        os.environ["FASTVIT_TEST_OF_A_SWITCH"] = value
        try:
            assert libtriton.getenv_bool("FASTVIT_TEST_OF_A_SWITCH", False) is interpreted
        finally:
            del os.environ["FASTVIT_TEST_OF_A_SWITCH"]

    @pytest.mark.parametrize(
        ("variable", "value", "function", "expected"),
        [
            ("FASTVIT_BUILD_EXT", "yes", "extension_mode()", "expected 0, 1 or unset, got 'yes'"),
            ("FASTVIT_BUILD_CUDA", "2", "cuda_mode()", "expected 0, 1 or unset, got '2'"),
            ("FASTVIT_ISA_LIST", "avx2,mmx", "find_isas(['c++'])", "expected some of portable, .*, got 'avx2,mmx'"),
            ("FASTVIT_CUDA_ARCH_LIST", "hopper", "cuda_archs(['90'])", "expected .*9.0.PTX, got 'hopper'"),
            ("TORCH_CUDA_ARCH_LIST", "8.0;Hopper", "cuda_archs(['90'])", "expected .*9.0.PTX, got 'Hopper'"),
            ("FASTVIT_SANITIZE", "adress", "SANITIZE", "expected some of address, .*, got 'adress'"),
            ("MAX_JOBS", "many", "max_jobs()", "expected a positive integer, got 'many'"),
            ("MAX_JOBS", "0", "max_jobs()", "expected a positive integer, got '0'"),
        ],
    )
    def test_of_the_build(self, variable: str, value: str, function: str, expected: str) -> None:
        setup = Path(__file__).parents[1] / "setup.py"
        if not setup.is_file():
            pytest.skip("no source tree")
        load = f"import runpy, sys; sys.argv = ['setup.py', '--version']; setup = runpy.run_path({str(setup)!r})"
        result = in_fresh_process(f"{load}; exec({function!r}, setup)", **{variable: value})
        assert result.returncode != 0
        assert re.search(f"^{variable}: {expected}", result.stderr, re.MULTILINE)


def test_questions_can_be_traced() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def choose(x: torch.Tensor) -> torch.Tensor:
        if backends.cpp_reasons() or backends.cuda_reasons():
            x = x + 1
        if backends.extension().has_op("token_depthwise_conv", x.device.type):
            x = x + 2
        return x if backends.triton_reasons(x.device) else x + 4

    expected = bool(backends.cpp_reasons() or backends.cuda_reasons()) * 1.0
    expected += 2.0 * backends.extension().has_op("token_depthwise_conv", "cpu")
    expected += 4.0 * (not backends.triton_reasons(CPU))
    assert choose(torch.zeros(())).item() == expected


def test_description() -> None:
    description = backends.describe()
    assert description["fastvit"] == __version__
    assert description["versions"]["torch"] == torch.__version__
    assert set(description["backends"]) == set(backends.BACKENDS)
    for backend in description["backends"].values():
        assert backend["available"] is (backend["reasons"] == [])
    assert description["devices"][0]["threads"] == torch.get_num_threads()
    assert len(description["devices"]) == 1 + torch.cuda.device_count()
    assert description["build"]["extension"] is backends.extension().available


@pytest.mark.parametrize(("version", "release"), [("2.13.0+cpu", (2, 13)), ("3.6.0", (3, 6)), ("unknown", (0, 0))])
def test_release(version: str, release: tuple[int, int]) -> None:
    assert backends._release(version) == release
