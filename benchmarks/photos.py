"""Real photographs as model input: read with Pillow, resized, cropped and normalised as the model's weights expect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
"""Photographs that the scikit-image package contains."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def bundled_photographs() -> list[Path]:
    """Paths of the photographs in scikit-image; RuntimeError if it is not installed."""
    try:
        import skimage.data
    except ImportError as error:
        raise RuntimeError("the demo's photographs come with scikit-image: pip install scikit-image") from error
    return [Path(skimage.data.__file__).parent / name for name in PHOTOGRAPHS]


def open_photograph(path: Path) -> Image.Image:
    """An RGB image in the orientation of its EXIF data; ValueError if the file is not an image."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"--image: {path} is not an image Pillow can read ({error})") from error


def prepare(image: Image.Image, cfg: dict[str, Any]) -> Tensor:
    """One image to a normalised float32 tensor (3, h, w).

    The shorter side is resized to size / crop_pct, then the centre is cropped: the evaluation transform of the
    official repositories.
    """
    _, height, width = cfg["input_size"]
    scale = max(height / image.height, width / image.width) / cfg["crop_pct"]
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, _RESAMPLING[cfg["interpolation"]])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255.0
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    return (tensor - mean) / std


def photo_batch(paths: Sequence[Path], batch: int, cfg: dict[str, Any]) -> Tensor:
    """A batch (batch, 3, h, w) of the photographs; if there are too few, mirrored and zoomed views follow."""
    images = [open_photograph(path) for path in paths]
    views = []
    for i in range(batch):
        image, turn = images[i % len(images)], i // len(images)
        if turn % 2:
            image = ImageOps.mirror(image)
        zoomed = {**cfg, "crop_pct": cfg["crop_pct"] / (1 + 0.25 * (turn // 2))}
        views.append(prepare(image, zoomed))
    return torch.stack(views)
