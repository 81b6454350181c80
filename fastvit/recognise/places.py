"""Where in a program an operation runs, read off the stack."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

__all__ = ["modules_running", "user_line"]

_FOREIGN = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent))


def _frames() -> Iterator[FrameType]:
    """From the caller outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def modules_running() -> tuple[nn.Module, ...]:
    """The modules whose forward runs, the outermost first."""
    found: list[nn.Module] = []
    for frame in _frames():
        if frame.f_code.co_name != "forward" or not frame.f_code.co_varnames:
            continue
        module = frame.f_locals.get(frame.f_code.co_varnames[0])
        if isinstance(module, nn.Module) and not (found and found[-1] is module):
            found.append(module)
    return tuple(reversed(found))


def user_line() -> str:
    """The line of the user's code that runs, as "file.py:12"; that of nobody's is ""."""
    for frame in _frames():
        path = frame.f_code.co_filename
        if not path.startswith(_FOREIGN) and f"{os.sep}einops{os.sep}" not in path:
            return f"{path}:{frame.f_lineno}"
    return ""
