"""From a file, a mapping or a live model to a flat dict of named tensors. Nothing read here can run code."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_ENTRIES = ("model", "state_dict", "model_state_dict")
EMA_ENTRIES = ("state_dict_ema", "model_ema", "ema")
MAX_NESTING = 4
"""Levels of nested entries searched; a hostile file may contain itself."""
WRAPPING_MODULES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass
class Contents:
    """What a source holds: tensors by name, wrappers' prefixes removed."""

    source: str
    tensors: dict[str, Tensor]
    entry: str | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    """The live model the tensors come from, if they do."""


def read_source(source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module) -> Contents:
    """Read any source ``load_weights`` takes.

    Raises:
        FileNotFoundError (or another OSError), TypeError: as usual. ValueError: the file cannot be read as what its
            name says, or holds no tensors.
    """
    if isinstance(source, nn.Module):
        kind = type(source)
        contents = _contents(source.state_dict(), f"{kind.__module__}.{kind.__qualname__}")
        contents.model = source
        return contents
    if isinstance(source, Mapping):
        return _contents(source, "state_dict")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _contents(_read_file(path), str(path))
    raise TypeError(
        f"source: expected a path, a state_dict (mapping of tensors) or a module, got {type(source).__name__}"
    )


def strip_wrapping(names: Iterable[str]) -> dict[str, str]:
    """Each name to what it is without the prefixes that DataParallel, torch.compile, FSDP, ... put in front."""
    clean = {name: ".".join(part for part in name.split(".") if part not in WRAPPING_MODULES) for name in names}
    for prefix in ("module.", "model.") * 2:
        if clean and all(name.startswith(prefix) for name in clean.values()):
            clean = {name: short.removeprefix(prefix) for name, short in clean.items()}
    return clean


def _contents(mapping: Mapping[Any, Any], source: str) -> Contents:
    contents = Contents(source, {})
    mapping = _unwrap(mapping, contents)
    tensors = {}
    for name, value in mapping.items():
        tensor = _as_tensor(value)
        if name == "n_averaged":
            contents.dropped[name] = "the counter of torch.optim.swa_utils.AveragedModel"
        elif tensor is None or not isinstance(name, str):
            contents.dropped[str(name)] = f"not a tensor under a name, but {type(value).__name__}"
        else:
            tensors[name] = tensor.detach()
    if not tensors:
        raise ValueError(f"source: {source} holds no tensors (its entries: {some(map(str, mapping))})")
    contents.tensors = {clean: tensors[name] for name, clean in strip_wrapping(tensors).items()}
    return contents


def _unwrap(mapping: Mapping[Any, Any], contents: Contents) -> Mapping[Any, Any]:
    """The state dict inside of a training checkpoint; plain weights are preferred to averaged (EMA) ones."""
    taken: list[str] = []
    for _ in range(MAX_NESTING):
        found = [key for key in (*PLAIN_ENTRIES, *EMA_ENTRIES) if isinstance(mapping.get(key), (Mapping, nn.Module))]
        if not found:
            break
        taken.append(found[0])
        averaged = [key for key in found[1:] if key in EMA_ENTRIES]
        if averaged:
            contents.notes.append(
                f"{averaged[0]!r} (averaged weights) is in the file too; pass that mapping to load it"
            )
        inner = mapping[found[0]]
        mapping = inner.state_dict() if isinstance(inner, nn.Module) else inner
    contents.entry = ".".join(taken) or None
    return mapping


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor as it is, a numpy array as a tensor, anything else as None."""
    if isinstance(value, Tensor):
        return value
    numpy = sys.modules.get("numpy")  # if it was never imported, the value is no array
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:  # how numpy reads bfloat16 back
        return torch.from_numpy(numpy.ascontiguousarray(value).view(numpy.uint16)).view(torch.bfloat16)
    if value.dtype.kind not in "fiub":
        return None
    try:
        # The copy makes strides, byte order and writability what torch wants.
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=True))
    except TypeError:
        return None  # a dtype that torch lacks


def _read_file(path: Path) -> Mapping[Any, Any]:
    extension = path.suffix.lower()
    if extension not in READERS:
        raise ValueError(f"source: expected one of the extensions {', '.join(READERS)}, got {path}")
    with path.open("rb") as file:  # a missing file or a directory is named by the OSError of this
        if not file.read(1):
            raise ValueError(f"source: {path} is empty")
    try:
        loaded = READERS[extension](path)
    except ImportError:
        raise
    except Exception as error:  # a damaged file can make a parser raise anything
        raise ValueError(f"source: {path} cannot be read, it may be truncated or damaged: {_reason(error)}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"source: expected a dict of tensors in {path}, got {type(loaded).__name__}")
    return loaded


def _read_torch(path: Path) -> Any:
    # Training scripts store their arguments beside the weights: a Namespace is data, restoring it runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"source: {path} needs the package safetensors (pip install safetensors)") from error
    return load_file(path)


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    with path.open("rb") as file:  # np.load leaves a damaged file open that it opened itself
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("not an archive of arrays")
        return dict(archive.items())


READERS: dict[str, Callable[[Path], Any]] = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".tar": _read_torch,
    ".ckpt": _read_torch,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}


def _reason(error: Exception) -> str:
    """Why a file cannot be read: the library's first sentence. What follows may advise to read the file unsafely."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", text)
        if found is None:
            return "not a file of tensors written by torch.save"
        return (
            f"it asks for {found[1]} while being unpickled, and only tensors and plain containers are read "
            "(of a whole model, save the state_dict)"
        )
    return f"{type(error).__name__}: {text.splitlines()[0].split('. ')[0] if text else 'no further reason'}"


def some(names: Iterable[str], count: int = 5) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") if names else "none"
