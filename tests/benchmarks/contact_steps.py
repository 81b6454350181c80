"""Steps for the tests of ``benchmarks.first_contact``, whose items do all that kernels on a new device may do."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.first_contact.processes import Step, send

MODULE = "tests.benchmarks.contact_steps"
FOREVER = 3600.0
HANGS_IN = "CONTACT_HANGS_IN"
"""The environment variable with the folder in which an item that is about to hang leaves a file."""


def about_to_hang() -> None:
    """Tell a test whose clock then goes on by more than an item may take."""
    if HANGS_IN in os.environ:
        Path(os.environ[HANGS_IN], str(os.getpid())).touch()


class OutOfResources(Exception):  # noqa: N818 - Triton's
    """Neither a RuntimeError nor a ValueError."""


def mixed_items(options):
    return [
        "first",
        "out of resources",
        "raises later",
        "aborts",
        "segfaults",
        "hangs",
        "prints",
        "garbage",
        "exits",
        "candidates",
        "last",
    ]


def mixed(item, options, tell):
    if item == "out of resources":
        raise OutOfResources("shared memory, Required: 300000, Hardware limit: 232448")
    yield {"value": len(item), "without": options.without}
    if item == "raises later":
        raise MemoryError
    if item == "aborts":
        os.abort()
    if item == "segfaults":
        ctypes.string_at(0)
    if item == "hangs":
        about_to_hang()
        subprocess.run([sys.executable, "-c", f"import time; time.sleep({FOREVER})"], check=False)
    if item == "prints":
        sys.stdout.buffer.write(b"\xff\x00 not JSON\n" * 10)
        subprocess.run(["echo", '{"row": 1}'], check=True)
    if item == "garbage":
        os.write(tell.rows, b"\xff\xfe garbage\n[1]\n" + json.dumps({"row": 3}).encode() + b"\n")
        yield {"value": float("nan")}
    if item == "exits":
        print("a word\ngoodbye", file=sys.stderr)
        os._exit(7)
    if item == "candidates":
        for name in ("good", "bad", "worse", "fine"):
            if name not in options.without:
                tell.at(name)
                if name in ("bad", "worse"):
                    os._exit(3)
        tell.at("")
        yield {"measured": "all but those that crash"}


def dying_items(options):
    return list("abcdefgh")


def dying(item, options, tell):
    os.abort()
    yield {}


def flooding_items(options):
    return ["flood", "after"]


def flooding(item, options, tell):
    yield {"value": 1}
    while item == "flood":
        os.write(tell.rows, b"nonsense\n")


def busy_items(options):
    return ["endless", "after"]


def busy(item, options, tell):
    """Rows without an end: each is in time, all are not."""
    if item == "endless":
        about_to_hang()
    while item == "endless":
        send(tell.rows, {"row": {"value": 1}})
        time.sleep(0.01)
    yield {"value": 2}


def unlisted_items(options):
    raise RuntimeError("CUDA driver initialization failed")


def unlisted(item, options, tell):
    yield {}


def noted_items(options):
    return [str(number) for number in range(1000)]


def noted(item, options, tell):
    yield {"pid": os.getpid()}


def step(name: str, weight: float = 1.0, item_seconds: float = 600.0) -> Step:
    return Step(name, MODULE, weight, item_seconds)
