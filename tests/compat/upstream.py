"""A library's own tests, of a checkout of it, with every model fused as it is built, and without.

    python -m tests.compat.upstream timm CHECKOUT [pytest's options]

``CHECKOUT`` is a clone of the library's repository, whose tests its wheels do not hold; of transformers, at the version
that is installed. Tests that pass without ``fastvit.auto`` have to pass with it: the others are named, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "timm": ("tests/test_models.py::test_model_forward", "tests/test_models.py::test_model_backward"),
    "transformers": tuple(f"tests/models/{name}/test_modeling_{name}.py" for name in ("vit", "deit", "cvt")),
}

PYTEST = """
import sys
import pytest
from benchmarks.libraries import declare_torchvision_nms
declare_torchvision_nms()
sys.exit(pytest.main(sys.argv[1:]))
"""


def outcomes(checkout: Path, library: str, options: Sequence[str], fused: bool) -> dict[str, str]:
    """By test, "passed", "failed", "error" or "skipped"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-c", PYTEST, "-q", f"--junitxml={path}", *TESTS[library], *options]
        command += ["-p", "fastvit.auto"] if fused else []
        settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run(command, cwd=checkout, env=settings, check=False)
        found: dict[str, str] = {}
        if not path.exists():
            return found
        for case in ET.parse(path).iter("testcase"):
            told = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcome = {"failure": "failed"}.get(told[0], told[0]) if told else "passed"
            found[f"{case.get('classname')}::{case.get('name')}"] = outcome
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both; the exit status is 1 where a test passes plain alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat.upstream", description=__doc__.partition("\n")[0])
    parser.add_argument("library", choices=TESTS)
    parser.add_argument("checkout", type=Path)
    options, others = parser.parse_known_args(arguments)
    missing = [test for test in TESTS[options.library] if not (options.checkout / test.partition("::")[0]).is_file()]
    if missing:
        parser.error(f"CHECKOUT: {options.checkout} is no checkout of {options.library}: it has no {missing[0]}")
    plain = outcomes(options.checkout, options.library, others, fused=False)
    if "passed" not in plain.values():
        raise SystemExit(f"no test of {options.library} in {options.checkout} passes plain; what pytest says is above")
    fused = outcomes(options.checkout, options.library, others, fused=True)
    broken = [name for name, outcome in plain.items() if outcome == "passed" and fused.get(name) != "passed"]
    for name in broken:
        print(f"{name} passes without fastvit.auto; with it: {fused.get(name, 'not run')}")
    told = (
        ", ".join(f"{count} {outcome}" for outcome, count in Counter(each.values()).items()) for each in (plain, fused)
    )
    print(f"{options.library}, plain: {next(told)}; fused: {next(told)}; {len(broken)} broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
