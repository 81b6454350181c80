"""Small pictures of a few classes, in folders and in shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")
SIDE = 32


def pictures(count: int, seed: int = 0) -> Iterator[tuple[int, Image.Image]]:
    """Noise with more of one colour, the class; ``count`` of each."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        for label in range(len(CLASSES)):
            pixels = draws.integers(0, 160, (SIDE, SIDE, 3))
            pixels[..., 2 - label] += 60
            yield label, Image.fromarray(pixels.astype(np.uint8))


def make_folder(folder: Path, count: int = 10) -> Path:
    """A folder for each class; one picture in five is for validation, in the order of their names."""
    for number, (label, picture) in enumerate(pictures(count)):
        path = folder / CLASSES[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def make_shards(folder: Path, shards: int = 4, count: int = 4) -> tuple[str, str]:
    """What names the shards for training and the one for validation; the last pixel tells the samples apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards + 1):
        with tarfile.open(folder / f"part-{shard:02}.tar", "w") as archive:
            for number, (label, picture) in enumerate(pictures(count, seed=shard)):
                file = io.BytesIO()
                picture.save(file, "png")
                for suffix, data in (("png", file.getvalue()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{shard:02}-{number:03}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder / f"part-{{00..{shards - 1:02}}}.tar"), str(folder / f"part-{shards:02}.tar")
