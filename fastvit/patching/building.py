"""Fuse the blocks of chosen libraries while models are being built.

A block is looked at when it is first put into another module, which is when its own constructor is done: torch calls
the hook for that wherever a module is registered. Nothing of the libraries is touched or imported, so it makes no
difference when they are imported, and taking the hook away leaves nothing behind.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fastvit import backends
from fastvit.patching import matching
from fastvit.patching.fusion import Fused, give
from fastvit.patching.rows import TABLES

LIBRARIES = tuple(
    sorted({row.path.partition(".")[0] for row in itertools.chain(*TABLES)} - {__name__.partition(".")[0], "torch"})
)
"""The libraries whose classes stand in a table; torch's own are parts of anybody's models."""

log = logging.getLogger("fastvit")


class _Builder:
    """The hook, the libraries it is for, and the blocks it has judged: those stay as they are ever after."""

    def __init__(self) -> None:
        self.libraries: frozenset[str] = frozenset()
        self.judged: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.handle: torch.utils.hooks.RemovableHandle | None = None
        self.lock = threading.Lock()

    def switch(self, libraries: frozenset[str]) -> None:
        with self.lock:
            self.libraries = libraries
            requested = backends.REQUESTED
            wanted = bool(libraries) and requested != {"reference"}
            if wanted and self.handle is None:
                self.handle = register_module_module_registration_hook(self)
            elif not wanted and self.handle is not None:
                self.handle.remove()
                self.handle = None
                self.judged.clear()

    def __call__(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is None or not _is_of(module, self.libraries):
            return
        # unpatch() and patch(filter_fn=...) have the last word on a block: it is not judged again where it is only put
        # elsewhere (fx does so), and DataParallel's replicas are what the module they were made from is.
        if isinstance(module, Fused) or module in self.judged or getattr(module, "_is_replica", False):
            return
        self.judged.add(module)
        _fuse(module)


def _is_of(module: nn.Module, libraries: frozenset[str]) -> bool:
    """Whether a module's class, or one it is derived from, is defined in one of the libraries."""
    return any(known.__module__.partition(".")[0] in libraries for known in type(module).__mro__)


def _fuse(module: nn.Module) -> None:
    try:
        with torch.device("cpu"):  # a model may be under construction on "meta", and a block be tried on small inputs
            match = matching.recognise(module)
    except Exception as error:  # building somebody's model must not fail because of what we make of a block
        log.warning("%s is left alone: %s: %s", type(module).__name__, type(error).__name__, error)
        return
    if match is not None and match.fused is not None:
        give(module, match.fused)


_builder = _Builder()


def check_libraries(argument: str, libraries: str | Iterable[str] | None) -> frozenset[str]:
    """The libraries asked for (None: all); ValueError lists the valid names."""
    if libraries is None:
        return frozenset(LIBRARIES)
    libraries = [libraries] if isinstance(libraries, str) else list(libraries)
    if not libraries or not set(libraries) <= set(LIBRARIES):
        raise ValueError(f"{argument}: expected some of {', '.join(LIBRARIES)}, got {libraries}")
    return frozenset(libraries)


def fuse_when_built(libraries: frozenset[str]) -> None:
    """From now on, fuse the blocks of these libraries as they are built; none switches it off."""
    _builder.switch(libraries)


def fused_when_built() -> frozenset[str]:
    """The libraries whose blocks are fused as they are built now."""
    return _builder.libraries
