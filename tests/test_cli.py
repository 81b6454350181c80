"""The command line: python -m fastvit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvit import __main__, backends
from fastvit.cli import facts, models
from fastvit.reference.registry import VARIANTS, list_models


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command in this process: (exit status, what it printed), on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, str]:
        status = __main__.main(arguments)
        return status, capsys.readouterr().out

    return run


def test_as_a_module() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "fastvit", "info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["versions"]["torch"] == torch.__version__


class TestInfo:
    def test_names_versions_devices_and_every_backend(self, cli) -> None:
        status, text = cli("info")
        assert status == 0
        assert f"fastvit {backends.__version__}" in text
        assert f"torch {torch.__version__}" in text
        assert "threads:" in text
        for name in backends.BACKENDS:
            assert name in text

    def test_says_why_a_backend_cannot_run(self, cli, monkeypatch: pytest.MonkeyPatch) -> None:
        reason = "fastvit._C was built for another Python: found [_C.so]"  # brackets are markup to rich
        monkeypatch.setattr(backends, "_EXTENSION", backends.Extension(reason, {"compiler": "gcc [x] 12"}))
        monkeypatch.setattr(backends, "REQUESTED", frozenset({"cpp"}))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        _, text = cli("info")
        table = [[cell.strip() for cell in line.split("│")[1:]] for line in text.splitlines()]
        rows = {row[0]: row for row in table if row}
        assert rows["cpp"][1:3] == ["no", reason]
        assert text.splitlines()[1] == reason
        assert rows["cuda"][1:3] == ["no", f"{reason}; disabled by FASTVIT_BACKEND"]
        assert rows["sdpa"][1:3] == ["no", "disabled by FASTVIT_BACKEND"]
        assert rows["reference"][1:3] == ["yes", ""]
        assert rows["reason"][1] == reason
        assert rows["extension"][1] == "no"
        assert rows["compiler"][1] == "gcc [x] 12"

    def test_json_is_the_description(self, cli) -> None:
        status, text = cli("info", "--json")
        assert status == 0
        assert json.loads(text) == json.loads(json.dumps(backends.describe()))

    def test_shows_what_the_environment_asks_for(self, cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTVIT_LOG", "debug")
        assert "FASTVIT_LOG=debug" in cli("info")[1]


class TestList:
    def test_every_model(self, cli) -> None:
        status, text = cli("list")
        assert status == 0
        words = set(text.split())
        assert set(list_models()) <= words
        assert f"{len(VARIANTS)} models" in text

    def test_pattern(self, cli) -> None:
        status, text = cli("list", "cait_*_384", "--json")
        assert status == 0
        found = json.loads(text)
        assert list(found) == list_models("cait_*_384") != []
        for name, told in found.items():
            assert told["params"] == VARIANTS[name].params
            assert told["img_size"] == 384

    def test_nothing_matches(self, cli) -> None:
        status, text = cli("list", "resnet*")
        assert status == 1
        assert "no model matches 'resnet*'" in text


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_wrong_use_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        __main__.main(arguments)
    assert error.value.code == 2
    assert "usage: fastvit" in capsys.readouterr().err


def in_fresh_process(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which then says on its error output whether torch was imported."""
    program = f"""
import sys
from fastvit.__main__ import main
{code}
try:
    status = main({list(arguments)!r})
except SystemExit as error:
    status = error.code
print("torch" in sys.modules, file=sys.stderr)
sys.exit(status)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"], ["verify", "-h"], []])
def test_help_and_version_do_without_torch(arguments: list[str]) -> None:
    result = in_fresh_process(*arguments)
    assert result.stderr.splitlines()[-1] == "False"
    assert result.returncode == (0 if arguments else __main__.BAD_USE)
    if arguments == ["--version"]:
        assert result.stdout == f"fastvit {backends.__version__}\n"


def test_the_console_script_is_the_module() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer read TOML")
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fastvit": "fastvit.__main__:main"}


def test_libraries_are_those_that_load() -> None:
    assert set(__main__.LIBRARIES) == set(models.LOADERS)


def test_interrupted_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "info", interrupt)
    assert __main__.main(["info"]) == 130
    assert capsys.readouterr().err == "fastvit info: interrupted\n"


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("vit_tiny", "vit_tiny_patch16_224"), ("fastvit/cait_xxs", "cait_xxs24_224"), ("timm/vit_tny", "vit_tiny_")],
)
def test_unknown_models_suggest_the_nearest_of_their_library(given, nearest, capsys) -> None:
    if given.startswith("timm"):
        pytest.importorskip("timm")
    assert __main__.main(["bench", given]) == __main__.BAD_USE
    assert f"did you mean {nearest}" in " ".join(capsys.readouterr().err.split())


class TestTerminal:
    """On a terminal, which rich takes FORCE_COLOR for."""

    @pytest.mark.parametrize(("no_color", "styled"), [("", True), ("1", False)])
    def test_no_color(self, no_color: str, styled: bool) -> None:
        result = in_fresh_process("list", "cvt*", FORCE_COLOR="1", NO_COLOR=no_color, TERM="xterm-256color")
        assert ("\x1b[" in result.stdout) == styled and "cvt_13" in result.stdout
        result = in_fresh_process("bench", "nonsense", FORCE_COLOR="1", NO_COLOR=no_color, TERM="xterm-256color")
        assert ("\x1b[" in result.stderr) == styled

    @pytest.mark.parametrize("command", [["list"], ["info"], ["--help"], ["bench", "--help"]])
    def test_forty_columns(self, command: list[str]) -> None:
        lines = in_fresh_process(*command, COLUMNS="40").stdout.splitlines()
        assert max(map(len, lines)) <= 40 and not any("│" in line or "┃" in line for line in lines)

    def test_rows_under_one_another(self, cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        _, text = cli("list", "cvt_13")
        assert text.splitlines() == [
            "1 models", "model: cvt_13", "  family: cvt", "  image: 224", "  parameters: 20.00 M", "  GMACs: 4.57"
        ]  # fmt: skip


def test_where_weights_are(cli) -> None:
    status, text = cli("list", "--weights")
    assert status == 0 and len(text.splitlines()) == len(VARIANTS)
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert lines["deit_tiny_patch16_224"].startswith("https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-")
    assert lines["cvt_13"] == "hf-hub:microsoft/cvt-13" and lines["cpvt_tiny"] == "none published"
    assert json.loads(cli("list", "cvt_13", "--json")[1])["cvt_13"]["weights"] == "hf-hub:microsoft/cvt-13"
