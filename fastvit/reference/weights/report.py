"""What a call of ``load_weights`` did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

SHOWN = 8
"""Names of a list that ``str(report)`` writes out."""


class ResizedTensor(NamedTuple):
    """A position embedding resampled to the model's grid."""

    name: str
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]


class SkippedHead(NamedTuple):
    """A classifier of another class count: the model's own was left as it is. 0 classes: there is no such head."""

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
        skipped_heads: classifiers of another class count, left at the model's own values.
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
            if names:
                more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"{title} ({len(names)}): {', '.join(names[:SHOWN])}{more}")
        lines += [f"dropped: {name}: {reason}" for name, reason in self.dropped.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join(lines)
