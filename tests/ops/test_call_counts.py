"""How many Python functions one warm inference call runs: the same few whatever chose the backend or observes it.

Counts frames of Python code, the public function's own among them; calls of C functions are not counted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from benchmarks.overhead.cases import CALLS, PARTS, backend_of, runner
from fastvit import backends, ops
from fastvit.reference import functional

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

SINGLE = 8
"""The bound of an operator that is no composition."""

CHECK = 28
"""Further calls where the plain form runs, which is checked in Python beforehand."""

LOGGED = 24
"""Further calls of an operator that is observed: the reasons against each other implementation are put into words."""


def python_calls(run: Callable[[], Any]) -> list[CodeType]:
    """The code of every Python function that a warm call of ``run`` enters, in order."""
    for _ in range(3):
        run()
    entered: list[CodeType] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.append(frame.f_code)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def assert_few_calls(run: Callable[[], Any], bound: int) -> None:
    with torch.no_grad():
        entered = python_calls(run)
    if len(entered) > bound:
        lines = [f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno} {code.co_name}" for code in entered]
        pytest.fail("\n".join([f"{len(entered)} Python calls, at most {bound} are allowed:", *lines]), pytrace=False)


@pytest.mark.usefixtures("kernels_first")
@pytest.mark.parametrize("way", ["default", "named", "requested", "logged"])
@pytest.mark.parametrize("op", CALLS)
def test_calls_of_an_operator(op, way, monkeypatch, caplog):
    options = {"backend": backend_of(op)} if way == "named" else {}
    if way == "requested":
        monkeypatch.setattr(backends, "REQUESTED", frozenset({backend_of(op)}))
    elif way == "logged":
        caplog.set_level(logging.DEBUG, "fastvit")
    run = runner(getattr(ops, op), CALLS[op](False), training=False, **options)
    assert_few_calls(run, SINGLE * PARTS.get(op, 1) + (LOGGED * PARTS.get(op, 1) if way == "logged" else 0))


@pytest.mark.parametrize("op", CALLS)
def test_calls_where_the_plain_form_runs(op):
    call = CALLS[op](False).to(torch.float64)
    with torch.no_grad():
        plain = python_calls(runner(getattr(functional, op), call, training=False))
    bound = (SINGLE + CHECK) * PARTS.get(op, 1) + len(plain)
    assert_few_calls(runner(getattr(ops, op), call, training=False), bound)
