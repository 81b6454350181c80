"""From a file, a mapping or a live model to a flat dict of named tensors, each read when it is asked for.

Nothing here can run code, and no file makes more of memory than it is long before its shapes are known to fit.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.reference.weights.convert import Stored
from fastvit.reference.weights.report import short, some

PLAIN_ENTRIES = ("model", "state_dict", "model_state_dict", "teacher", "student")
"""By preference; of the two networks of self-supervised training, the teacher is the one that DINO publishes."""
EMA_ENTRIES = ("state_dict_ema", "model_ema", "ema")
MAX_NESTING = 4
"""Levels of nested entries searched; a hostile file may contain itself."""
WRAPPING_MODULES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
UNPACKED = 2**24
"""Bytes that a file of torch.save may unpack into beyond its own length; TorchScript, named later, compresses code."""
HUB = re.compile(r"hf[-_]hub:")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
ACCEPTED = "a path, 'hf-hub:org/name', a state_dict (mapping of tensors) or a module"


@dataclass
class Contents:
    """What a source holds: tensors by name, without the words that compiling and sharding put between."""

    source: str
    tensors: dict[str, Stored]
    entry: str | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    """The live model the tensors come from, if they do."""


def read_source(source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module) -> Contents:
    """Read any source ``load_weights`` takes.

    Raises:
        FileNotFoundError (or another OSError), TypeError: as usual. ImportError: a package that reads it is not there.
        ValueError: it cannot be read as what its name says, or holds no tensors.
    """
    if isinstance(source, nn.Module):
        kind = type(source)
        contents = _contents(source.state_dict(), f"{kind.__module__}.{kind.__qualname__}")
        contents.model = source
        return contents
    if isinstance(source, Mapping):
        return _contents(source, "state_dict")
    if isinstance(source, str) and "://" in source:
        raise ValueError(
            f"source: expected {ACCEPTED}, got the URL {short(source)}: download it first, by "
            "torch.hub.download_url_to_file(url, path), and give the path"
        )
    if isinstance(source, str) and HUB.match(source):
        return _contents(_read_file(_from_hub(source)), source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _contents(_read_file(path), str(path))
    hint = ": give an instance of it" if isinstance(source, type) else ""
    raise TypeError(f"source: expected {ACCEPTED}, got {short(repr(source)) if hint else type(source).__name__}{hint}")


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Each name to what it is without the words that torch.compile, FSDP and checkpointing put in it."""
    return {name: ".".join(part for part in name.split(".") if part not in WRAPPING_MODULES) for name in names}


def _contents(mapping: Mapping[Any, Any], source: str) -> Contents:
    contents = Contents(source, {})
    mapping = _unwrap(mapping, contents)
    tensors = {}
    for name, value in mapping.items():
        stored = _stored(name, value, source) if isinstance(name, str) else None
        if name == "n_averaged":
            contents.dropped[name] = "the counter of torch.optim.swa_utils.AveragedModel"
        elif stored is not None:
            tensors[name] = stored
        elif isinstance(name, str):
            contents.dropped[name] = f"not a tensor, but {type(value).__name__}"
        else:
            contents.dropped[f"<{type(name).__name__}>"] = "not a name"
    if not tensors:
        raise ValueError(f"source: {source} holds no tensors (its entries: {some([*map(short, contents.dropped)])})")
    contents.tensors = {clean: tensors[name] for name, clean in without_wrappers(tensors).items()}
    return contents


def _unwrap(mapping: Mapping[Any, Any], contents: Contents) -> Mapping[Any, Any]:
    """The state dict inside of a training checkpoint; plain weights are preferred to averaged (EMA) ones."""
    taken: list[str] = []
    for _ in range(MAX_NESTING):
        found = [key for key in (*PLAIN_ENTRIES, *EMA_ENTRIES) if isinstance(mapping.get(key), (Mapping, nn.Module))]
        if not found:
            break
        taken.append(found[0])
        contents.notes += [f"{key!r} is in the file too; pass that mapping to load it" for key in found[1:]]
        inner = mapping[found[0]]
        mapping = inner.state_dict() if isinstance(inner, nn.Module) else inner
    contents.entry = ".".join(taken) or None
    return mapping


def _stored(name: str, value: Any, source: str) -> Stored | None:
    """A tensor, an array, or what a reader has prepared; None for anything else. ValueError without plain numbers."""
    if isinstance(value, Tensor):
        value = value.detach()
        if type(value) is not Tensor or value.is_meta or value.layout != torch.strided or value.is_quantized:
            kind = "on the meta device" if value.is_meta else f"{type(value).__name__}, {value.layout}, {value.dtype}"
            raise ValueError(f"source: {source}: {short(name)} is no plain tensor ({kind})")
        return Stored.of(value.shape, value.dtype, lambda: value)
    numpy = sys.modules.get("numpy")  # if it was never imported, the value is no array
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _stored_array(value.shape, value.dtype, lambda: value)
    return value if isinstance(value, Stored) else None


def _stored_array(shape: tuple[int, ...], dtype: Any, read: Callable[[], Any]) -> Stored | None:
    """A numpy array; None for a dtype that torch lacks."""
    import numpy as np

    def tensor(array: Any) -> Tensor:
        if dtype.kind == "V" and dtype.itemsize == 2:  # how numpy reads bfloat16 back
            return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
        # The copy makes strides, byte order and writability what torch wants.
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=True))

    if dtype.kind not in "fiubV":
        return None
    try:
        return Stored.of(shape, tensor(np.empty(0, dtype)).dtype, lambda: tensor(read()))
    except TypeError:
        return None


def _from_hub(source: str) -> Path:
    """The weights of a model on the Hugging Face hub: downloaded, or from the local cache where there is no network."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ImportError(f"source: {source} needs the package huggingface_hub: pip install huggingface_hub") from error
    repository, _, revision = HUB.sub("", source).partition("@")
    reason: Exception | None = None
    for name in HUB_FILES:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except EntryNotFoundError as error:
            reason = error
        except (OSError, ValueError) as error:
            reason = error
            break
    assert reason is not None
    raise ValueError(
        f"source: no {' or '.join(HUB_FILES)} for {source} (expected hf-hub:org/name or hf-hub:org/name@revision): "
        f"{first_sentence(reason)}"
    ) from reason


def _read_file(path: Path) -> Mapping[Any, Any]:
    if path.is_dir() or (path.exists() and not path.is_file()):  # opening a FIFO waits, and a device may never end
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"source: expected a file of weights, got {path}, which is {kind}")
    extension = path.suffix.lower()
    if extension not in READERS:
        raise ValueError(f"source: expected one of the extensions {', '.join(READERS)}, got {path}")
    if not path.stat().st_size:  # a missing file is named by the OSError of this
        raise ValueError(f"source: {path} is empty")
    try:
        loaded = READERS[extension](path)
    except ImportError:
        raise
    except Exception as error:  # a damaged file can make a parser raise anything
        raise ValueError(f"source: {path} cannot be read{_reason(error)}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"source: expected a dict of tensors in {path}, got {type(loaded).__name__}")
    return loaded


def _read_torch(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    if mapped:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size + UNPACKED:
            raise ValueError(f"it is compressed, to unpack into {unpacked} bytes, which torch.save does not do")
    # Training scripts store their arguments beside the weights: a Namespace is data, restoring it runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"source: {path} needs the package safetensors (pip install safetensors)") from error
    return load_file(path)  # mapped into memory, not read


def _read_npz(path: Path) -> dict[str, Stored | None]:
    import numpy as np

    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

    def stored(archive: zipfile.ZipFile, member: str) -> Stored | None:
        def read() -> Any:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)

        with archive.open(member) as file:  # the header alone: a few bytes may unpack into gigabytes of zeros
            shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
        if dtype.hasobject:
            raise ValueError(f"{short(member)} holds pickled objects, which may run code")
        return _stored_array(shape, dtype, read)

    with zipfile.ZipFile(path) as archive:
        return {member.removesuffix(".npy"): stored(archive, member) for member in archive.namelist()}


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
    asked = re.search(r"GLOBAL ([\w.]+)", text) if isinstance(error, pickle.UnpicklingError) else None
    if asked is not None:
        return (
            f": it is a pickled model or other object: it asks for {short(asked[1])} while being unpickled, which may "
            "run code. Expected tensors and plain containers: save the model's state_dict, by "
            "torch.save(model.state_dict(), path)"
        )
    if isinstance(error, pickle.UnpicklingError):
        text = "not a file of tensors written by torch.save"
    else:
        text = first_sentence(error)
    return f", it may be truncated or damaged: {text}"


def first_sentence(error: Exception) -> str:
    """An error by its class and the beginning of its text."""
    return f"{type(error).__name__}: {short(str(error).split('. ')[0]) or 'no further reason'}"
