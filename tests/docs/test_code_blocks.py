"""Every fenced block of README.md and docs/ is run: Python as one session a page, commands one by one."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastvit
from fastvit import __main__, backends
from fastvit.patching import building
from fastvit.patching.register import REGISTERED
from tests.docs.pages import PAGES, ROOT, Block, blocks

LANGUAGES = {"python", "pycon", "sh", "text"}
"""Text is what is printed, and messages, which test_messages.py looks for."""
NATIVE = {"packed-weights.md", "deployment.md"}
"""Pages that show what the native part does."""
PYTHON = [page for page in PAGES if any(block.language in ("python", "pycon") for block in blocks(page))]
COMMANDS = sorted(
    {
        line.partition(" #")[0].strip()
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
    }
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def afterwards_as_before(kernels_first) -> Iterator[None]:
    """What a page may change for the whole process is put back."""
    registered, built = dict(REGISTERED), building.fused_when_built()
    auto = sys.modules.pop("fastvit.auto", None)  # which enables itself when it is imported first
    vars(fastvit).pop("auto", None)
    yield
    REGISTERED.clear()
    REGISTERED.update(registered)
    building.fuse_when_built(built)
    sys.modules.pop("fastvit.auto", None)
    vars(fastvit).pop("auto", None)
    if auto is not None:
        sys.modules["fastvit.auto"] = fastvit.auto = auto
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # exporters' and libraries' own
@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python(page, tmp_path, monkeypatch, afterwards_as_before):
    for library in ("timm", "peft", "torchao", "onnx", "onnxscript"):
        if re.search(rf"\b{library}\b", "".join(block.text for block in blocks(page))):
            pytest.importorskip(library)
    if page.name in NATIVE and backends.cpp_reasons():
        pytest.skip("; ".join(backends.cpp_reasons()))
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where classes of the page are looked for
    session = vars(module)
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page):
            if block.language == "python":
                exec(compile("\n" * block.line + block.text, str(page), "exec"), session)
            elif block.language == "pycon":
                run_examples(page, block, session)


def run_examples(page: Path, block: Block, session: dict) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, session, page.name, str(page), block.line)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append, clear_globs=False)
    session.update(test.globs)
    assert runner.failures == 0, "".join(report)


def has_target(arguments: list[str], line: str) -> None:
    """``make TARGET``: that there is one of this name; what it does is tested elsewhere."""
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert arguments[0] in " ".join(targets).split() or arguments[0] in ("bench-zentorch", "bench-torch-tensorrt")


def installs(arguments: list[str], line: str) -> None:
    """``pip install .[EXTRA]``: that the package has it; tests/test_build.py installs."""
    assert arguments[0] == "install"
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")[2]
    extras = re.findall(r"^(\w+) = ", table.partition("\n\n")[0], re.MULTILINE)
    for asked in re.findall(r"\[([\w,]+)\]", line):
        assert set(asked.split(",")) <= set(extras)


def runs(arguments: list[str], line: str) -> None:
    """``fastvit ...``."""
    if "timm/" in line:
        pytest.importorskip("timm")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert __main__.main(arguments) == 0
    assert out.getvalue()


def has_options(module: str, arguments: list[str]) -> None:
    """``python -m benchmarks...``, which takes minutes: that it has these options."""
    with (
        mock.patch.object(sys, "argv", [module, "--help"]),
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    options = [each for each in arguments if each.startswith("--")]
    assert [each for each in options if each not in out.getvalue()] == []


@pytest.mark.filterwarnings("ignore")  # libraries' own, and of modules that this process has imported
@pytest.mark.parametrize("line", COMMANDS)
def test_command(line):
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if variables and words[0] == "fastvit":
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["python", "-m"]:
        has_options(words[2], words[3:])
    else:
        {"make": has_target, "pip": installs, "fastvit": runs}[words[0]](words[1:], line)


def test_every_block_says_what_it_is():
    found = {(name_of(page), block.language) for page in PAGES for block in blocks(page)}
    assert {(page, language) for page, language in found if language not in LANGUAGES} == set()
    assert len(COMMANDS) > 10 and len(PYTHON) > 5
