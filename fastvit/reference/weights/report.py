"""What a call of ``load_weights`` did."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

SHOWN = 8
"""Names of a list that are written out, in a report and in an error."""
LONGEST = 200


def short(text: str) -> str:
    """A text from a source on one line, of bounded length."""
    line = text.partition("\n")[0]
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def some(texts: Collection[str], separator: str = ", ") -> str:
    """The first few of the texts, and how many there are more."""
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join([*islice(texts, SHOWN), *more]) or "none"


class ResizedTensor(NamedTuple):
    """A position embedding resampled to the model's grid."""

    name: str
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]


class SkippedHead(NamedTuple):
    """A classifier that was not loaded: the model's own was left as it is. 0 classes: there is no such head."""

    name: str
    source_classes: int
    model_classes: int


@dataclass
class LoadReport:
    """What was loaded and what was not; ``str()`` is a summary to read.

    Attributes:
        source: the file, or the class of the live model, or "state_dict".
        model: class of the model loaded into.
        format: "native" (official, timm and this package share it), "transformers-4", "transformers-5", "torchvision",
            "vit-jax".
        entry: key under which the file kept the weights ("model", "state_dict_ema", ...), None if they were not nested.
        loaded: names, in the model's order, of the tensors copied.
        missing: names the model has and the source does not.
        unexpected: names the source has and the model does not.
        resized: position embeddings resampled to the model's grid; these are in ``loaded`` too.
        skipped_heads: classifiers not loaded, left at the model's own values.
        dropped: name to reason, of what the source holds and no model here has a use for.
        notes: what to know before comparing outputs with the source's library.
    """

    source: str
    model: str
    format: str
    entry: str | None = None
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[ResizedTensor] = field(default_factory=list)
    skipped_heads: list[SkippedHead] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        entry = f", entry {self.entry!r}" if self.entry else ""
        lines = [
            f"{len(self.loaded)} tensors loaded into {self.model} from {self.source} (format {self.format}{entry})"
        ]
        lines += [f"resized: {name} {old} -> {new}" for name, old, new in self.resized]
        lines += [
            f"head left as it was: {name}, {theirs} classes in the source, {ours} in the model"
            for name, theirs, ours in self.skipped_heads
        ]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"{title} ({len(names)}): {some([*map(short, names)])}"] if names else []
        for reason in dict.fromkeys(self.dropped.values()):
            lines.append(
                f"dropped: {some([short(name) for name, why in self.dropped.items() if why == reason])}: {reason}"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join(lines)
