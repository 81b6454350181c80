"""From a photograph to what a model takes, as it was evaluated; with neither timm nor torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.reference.base import check_module
from fastvit.reference.weights.settings import unwrapped

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""


def transform(model: nn.Module) -> Callable[[Any], Tensor]:
    """How images are prepared for a model's published weights, as ``timm.data.create_transform`` would for evaluation.

    The shorter side is resized to the model's size over ``crop_pct`` (with ``crop_mode="squash"`` both sides), the
    centre is cropped, values are brought to 0..1 and normalised.

    Examples:
        >>> import fastvit
        >>> from PIL import Image
        >>> prepare = fastvit.transform(fastvit.create_model("deit_tiny_patch16_224"))
        >>> prepare(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])

    Args:
        model: one made by :func:`fastvit.create_model`, or any with timm's ``pretrained_cfg``; patched, compiled or
            wrapped in DataParallel, too.

    Returns:
        A function from a PIL image to a float32 tensor (3, H, W).

    Raises:
        TypeError: not an ``nn.Module``. ValueError: the model does not say how, or wants something else than three
            channels.
    """
    check_module(model)
    model = unwrapped(model)
    settings = getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, dict) or "mean" not in settings:
        raise ValueError(f"model: expected pretrained_cfg, as fastvit.create_model gives it, on {type(model).__name__}")
    channels, height, width = settings["input_size"]
    if channels != 3:
        raise ValueError(f"model: expected one of three channels, got input_size {settings['input_size']}")
    crop = settings.get("crop_pct") or 0.875
    scaled = math.floor(height / crop), math.floor(width / crop)
    filtered = FILTERS[settings.get("interpolation") or "bicubic"]
    squash = settings.get("crop_mode") == "squash"
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))

    def prepare(image: Any) -> Tensor:
        image = image.convert("RGB")
        if squash:
            size = scaled[1], scaled[0]
        elif image.width * scaled[0] <= image.height * scaled[1]:
            size = scaled[1], int(scaled[1] * image.height / image.width)
        else:
            size = int(scaled[0] * image.width / image.height), scaled[0]
        image = image.resize(size, filtered)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return (pixels.view(height, width, 3).permute(2, 0, 1).contiguous().float() / 255 - mean) / std

    return prepare
