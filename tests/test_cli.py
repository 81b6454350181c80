"""The command line: python -m fastvit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fastvit import __main__, backends
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
        models = json.loads(text)
        assert list(models) == list_models("cait_*_384") != []
        for name, facts in models.items():
            assert facts["params"] == VARIANTS[name].params
            assert facts["img_size"] == 384

    def test_nothing_matches(self, cli) -> None:
        status, text = cli("list", "resnet*")
        assert status == 1
        assert "no model matches 'resnet*'" in text


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_wrong_use_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        __main__.main(arguments)
    assert error.value.code == 2
    assert "usage: python -m fastvit" in capsys.readouterr().err
