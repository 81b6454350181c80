"""A plugin of pytest: each test's outcome is a row as soon as it is known, and a poisoned worker is replaced.

``-p benchmarks.first_contact.suite``, with the pipe of rows in FASTVIT_CONTACT_ROWS.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from benchmarks.first_contact.processes import send
from benchmarks.first_contact.summary import counted

ROWS = int(os.environ.get("FASTVIT_CONTACT_ROWS", "-1"))
TEXT = 2000


def is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items and not is_worker():
        tell_counts([item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """All workers collect the same tests, and the process that collects none has this called for each."""
    tell_counts(ids)


_told: list[int] = []


def tell_counts(tests: Sequence[str]) -> None:
    if not _told:
        _told.append(len(tests))
        send(ROWS, {"row": {"tests": len(tests), "counts": counted(tests)}})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One row a test: of its call, or of whatever ended it before."""
    if is_worker() or (report.when != "call" and report.outcome == "passed"):
        return
    row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != "passed":
        row["text"] = str(report.longrepr)[-TEXT:]
    send(ROWS, {"row": row})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """End a worker whose GPU is lost to it, so that xdist starts another: every later test would fail as well."""
    report = yield
    torch: Any = sys.modules.get("torch")
    if is_worker() and call.excinfo is not None and torch is not None and torch.cuda.is_initialized():
        poisoned = True
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
            poisoned = False
        if poisoned:
            sys.stderr.write(f"{item.nodeid}: {call.excinfo.value}\n")
            os._exit(1)
    return report
