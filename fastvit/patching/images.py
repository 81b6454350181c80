"""Which images does a model take? As its own attributes, or those of its parts, tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

USUAL_SIZES = (224, 256, 384, 128, 96, 64, 48, 32)
"""Pixels to try where nothing is told, the most usual first."""

Shape = tuple[int, int, int]
"""Channels, height, width."""


def own_shape(model: nn.Module) -> Shape | None:
    """The shape of the images that a model, or the first of its parts that says so, was made for."""
    return next((shape for module in model.modules() for shape in _told(module)), None)


def likely_shapes(model: nn.Module) -> list[Shape]:
    """All that a model and its parts tell, and images of the usual sizes; the likeliest first, each once."""
    told = [shape for module in model.modules() for shape in _told(module)]
    return list(dict.fromkeys([*told, *((3, size, size) for size in USUAL_SIZES)]))


def _told(module: Any) -> Iterator[Shape]:
    settings = getattr(module, "default_cfg", None)
    if isinstance(settings, dict) and len(settings.get("input_size", ())) == 3:  # timm's models
        channels, height, width = settings["input_size"]
        yield channels, height, width
    for source in (module, getattr(module, "config", None)):  # transformers' models tell it in their configuration
        size = getattr(source, "img_size", None) or getattr(source, "image_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            size = (size, size)
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(pixels, int) for pixels in size):
            channels = getattr(source, "num_channels", None) or getattr(source, "in_chans", None)
            yield channels if isinstance(channels, int) else 3, size[0], size[1]
