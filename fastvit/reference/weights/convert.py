"""What the converters share: tables of names with ``{N}`` for numbers, and the packing of query, key and value."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.reference.weights.report import short


class Stored(NamedTuple):
    """A tensor that is not read yet: what it will be, on the meta device, and how to read it."""

    meta: Tensor
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, shape: Collection[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> Stored:
        """What ``read`` will give has this shape and dtype."""
        return cls(torch.empty(tuple(shape), dtype=dtype, device="meta"), read)

    def then(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """What ``change`` makes of it once it is read."""
        return Stored(change(self.meta), lambda: change(self.read()))


@dataclass
class Converted:
    """Tensors under native names; what matched no rule keeps its own name."""

    tensors: dict[str, Stored]
    dropped: dict[str, str] = field(default_factory=dict)


class Format(NamedTuple):
    """A way to name and lay out the weights.

    ``recognises`` looks at all names. ``convert`` takes the tensors and the names the model wants. ``layer_norm_eps``
    is what the library that writes this format normalises with, where it always is the same.
    """

    name: str
    recognises: Callable[[Collection[str]], bool]
    convert: Callable[[Mapping[str, Stored], Collection[str]], Converted]
    layer_norm_eps: float | None = None


def rename(tensors: Mapping[str, Stored], table: Mapping[str, str], dropped: Mapping[str, str] = {}) -> Converted:
    """Rename by a table of stems: ``"layer.{N}.query": "blocks.{N}.attn.q"`` turns ``layer.3.query.bias`` into
    ``blocks.3.attn.q.bias``. Entries under a stem of ``dropped`` (stem to reason, ``.*`` being any rest) are left out.

    Raises:
        ValueError: two entries get the same name.
    """
    rules = [(_pattern(stem), native) for stem, native in table.items()]
    reasons = [(_pattern(stem), reason) for stem, reason in dropped.items()]
    converted = Converted({})
    for name, tensor in tensors.items():
        reason = next((reason for pattern, reason in reasons if pattern.fullmatch(name)), None)
        if reason is not None:
            converted.dropped[name] = reason
            continue
        native = next(
            (_renamed(match, native) for pattern, native in rules if (match := pattern.fullmatch(name))), name
        )
        if native in converted.tensors:
            raise ValueError(f"source: holds {short(native)} twice, the second time as {short(name)}")
        converted.tensors[native] = tensor
    return converted


def _pattern(stem: str) -> re.Pattern[str]:
    numbered = re.sub(r"\\\{([A-Z])\\\}", r"(?P<\1>\\d+)", re.escape(stem)).replace(r"\.\*", r"\..+")
    return re.compile(numbered + r"(?P<leaf>\.\w+)?")


def _renamed(match: re.Match[str], native: str) -> str:
    return native.format(**match.groupdict()) + (match["leaf"] or "")


def pack_qkv(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """``attn.{q,k,v}.*`` of a block to one ``attn.qkv.*`` (rows of q, then k, then v); incomplete triples stay."""
    packed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        stem, part, leaf = name.rpartition(".attn.")[0], *_last_two(name)
        triple = [f"{stem}.attn.{letter}.{leaf}" for letter in "qkv"]
        if name not in triple or not all(other in tensors for other in triple):
            packed[name] = tensor
        elif part == "q":
            packed[f"{stem}.attn.qkv.{leaf}"] = _joined([tensors[other] for other in triple])
    return packed


def _joined(parts: list[Stored]) -> Stored:
    return Stored(torch.cat([part.meta for part in parts]), lambda: torch.cat([part.read() for part in parts]))


def _last_two(name: str) -> tuple[str, str]:
    head, _, leaf = name.rpartition(".")
    return head.rpartition(".")[2], leaf
