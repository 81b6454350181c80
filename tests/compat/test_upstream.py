"""The command that runs a library's own tests: on a checkout made up for the purpose."""

from __future__ import annotations

import pytest

from tests.compat import upstream

TESTS = """
import sys
import pytest

@pytest.mark.parametrize("name", ["vit", "{name}"])
def test_model_forward(name):
    assert name != "broken" or "fastvit.auto" not in sys.modules

def test_model_backward():
    assert {backward}
"""


def checkout(folder, **values):
    (folder / "tests").mkdir()
    (folder / "tests" / "test_models.py").write_text(TESTS.format(**values))
    return str(folder)


def test_what_passes_plain_alone_is_named(tmp_path, capsys):
    assert upstream.main(["timm", checkout(tmp_path, name="broken", backward=True)]) == 1
    told = capsys.readouterr().out
    assert "test_model_forward[broken] passes without fastvit.auto; with it: failed" in told
    assert "timm, plain: 3 passed; fused: 2 passed, 1 failed; 1 broken" in told


def test_what_fails_in_both_is_not_ours_and_options_are_pytests(tmp_path, capsys):
    path = checkout(tmp_path, name="deit", backward=False)
    assert upstream.main(["timm", path, "-k", "backward or deit"]) == 0
    assert "timm, plain: 1 passed, 1 failed; fused: 1 passed, 1 failed; 0 broken" in capsys.readouterr().out


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        upstream.main(["transformers", str(tmp_path)])
    assert stopped.value.code == 2
    message = f"CHECKOUT: {tmp_path} is no checkout of transformers: it has no tests/models/vit/test_modeling_vit.py"
    assert message in capsys.readouterr().err


def test_no_test_that_passes_is_no_success(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_models.py").write_text("import no_such_library")
    with pytest.raises(SystemExit, match="no test of timm in .* passes plain"):
        upstream.main(["timm", str(tmp_path)])
