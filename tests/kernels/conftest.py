"""Tests marked ``interpreter`` run in Triton's interpreter, in a process of their own.

Triton decides when a kernel is decorated, for its own library too, so TRITON_INTERPRET=1 must be set before the first
import of triton; in the process of the other tests it must not be. At the first marked test of a file a child pytest
runs all of the file that were selected, and each one here takes over the outcome of its twin there. To have them in
place, under a debugger for instance: ``TRITON_INTERPRET=1 pytest tests/kernels``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import HANG_GUARD

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
REPORT = "FASTVIT_TEST_INTERPRETER_REPORT"

_outcomes = pytest.StashKey[dict[str, list[str]]]()
_seen: dict[str, list[str]] = {}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> dict[Any, Any]:
    """What compiling each of the module's CASES gave, by case; its ``build(case)`` says what to compile."""
    from tests.kernels.aot import compile_all

    module = request.module
    builds = [functools.partial(module.build, case) for case in module.CASES]
    return dict(zip(module.CASES, compile_all(builds), strict=True))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs in Triton's interpreter, in a process of its own")
    if INTERPRETING:
        _teach_products()
        _teach_gluon()
        _patch_language_once()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Let the child's outcome stand for the call."""
    if INTERPRETING or pyfuncitem.get_closest_marker("interpreter") is None:
        return None
    outcomes = pyfuncitem.session.stash.setdefault(_outcomes, {})
    if pyfuncitem.nodeid not in outcomes:  # of this file alone: xdist gives the others to other workers
        items = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
        marked = [item.nodeid for item in items if item.get_closest_marker("interpreter") is not None]
        missing = ["failed", "it did not run in the interpreter's process"]
        outcomes.update(dict.fromkeys(marked, missing) | _run_child(pyfuncitem.config.rootpath, marked))
    outcome, text = outcomes[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _run_child(root: Path, nodeids: list[str]) -> dict[str, list[str]]:
    """Run these tests under TRITON_INTERPRET=1; outcome and text by node id."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT: str(report)}
        environment.pop("PYTEST_ADDOPTS", None)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(root), *nodeids]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=HANG_GUARD, check=False
        )
        if not report.exists():
            text = f"the interpreter's process ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
            return {nodeid: ["failed", text] for nodeid in nodeids}
        return json.loads(report.read_text())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: note the worst phase of each test."""
    if report.outcome != "passed" or report.when == "call":
        _seen[report.nodeid] = [report.outcome, report.longreprtext or str(report.longrepr or "")]


def pytest_sessionfinish() -> None:
    if REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(json.dumps(_seen))


def _teach_products() -> None:
    """Have ``tl.dot`` take bfloat16, which the interpreter keeps as uint16, for the numbers they are, and round once.

    numpy sums in an order that depends on the shapes and strides of the operands, so that q k^T would differ from the
    transpose of k q^T. A GPU adds along the contraction in one order, and both are equal. A conversion to bfloat16
    rounds to the nearest, as on a GPU, where the interpreter cuts off.
    """
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return

    def create_dot(self, a, b, d, *others):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def _teach_gluon() -> None:
    try:
        from tests.kernels import gluon_interpreter
    except ImportError:
        return
    gluon_interpreter.install()


def _patch_language_once() -> None:
    """The interpreter patches ``triton.language`` at a launch, and again at every call from one kernel function to
    another, which takes most of its time. The launch's patch holds for our modules; Triton's own need one more."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    plain, patched = interpreter.InterpretedFunction.__call__, set()

    def call(self, *arguments, **options):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patched.add(module)
            return plain(self, *arguments, **options)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
