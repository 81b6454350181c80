"""Other versions of the libraries than the one installed: recognised as well, or left alone with a reason.

``make versions`` installs them and runs this; they lie in folders under ``.venv/versions``, or where
FASTVIT_TEST_VERSIONS says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import HANG_GUARD

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("FASTVIT_TEST_VERSIONS", ROOT / ".venv" / "versions"))
VERSIONS = [
    line.split()[0]
    for line in (ROOT / "requirements" / "versions.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
NEWER = {("timm==0.9.16", "timm_vit_qk_norm"), ("timm==1.0.9", "timm_vit_qk_norm")}
"""Models that a version does not have yet."""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version(version):
    if not (FOLDER / version).exists():
        pytest.skip(f"{version} is not installed in {FOLDER}: make versions")
    library, _, number = version.partition("==")
    command = [sys.executable, "-m", "tests.compat.other_version", library.replace("-", "_")]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER / version), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_GUARD, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == number
    missing = {name for name, outcome in told["models"].items() if "rows" not in outcome}
    assert missing == {name for older, name in NEWER if older == version}
    for name in set(told["models"]) - missing:
        rows = told["models"][name]["rows"]
        assert any(status == "patched" for _, status, _ in rows)
        left = {(status, *reasons) for _, status, reasons in rows if status != "patched"}
        if name not in ("cvt", "twins_svt"):  # vit-pytorch's MLPs there are convolutions, and Twins' attention unknown
            assert not left, name
        assert all(len(reasons) > 1 for reasons in left)
