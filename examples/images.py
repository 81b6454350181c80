"""Labelled images for training: scikit-learn's digits, folders of pictures, WebDataset shards.

Whatever is drawn (the order, the augmentation) is a function of the seed and the place in the run, so that a run that
is taken up again sees the images it would have seen.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

Picture = Image.Image
Prepare = Callable[[Picture], Tensor]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
TRAINING_FOLDERS, VALIDATION_FOLDERS = ("train", "training"), ("val", "validation", "valid", "test")
HELD_OUT = 5
"""One picture in so many is for validation, where a folder does not say which are."""
BUFFER = 1000
"""Samples of shards among which the next is drawn."""
TEST_DIGITS = 360


class OptionError(Exception):
    """An argument is wrong; the message begins with the option, and says what is accepted and what it got."""


def reseed(*numbers: int) -> int:
    """Seed torch, numpy and random: what is drawn next is a function of these numbers alone."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    return seed


# --- Pictures ---------------------------------------------------------------------------------------------------------


def open_picture(file: Path | bytes, name: str) -> Picture:
    """An RGB picture in the orientation of its EXIF data; OptionError names one that cannot be read."""
    try:
        picture = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise OptionError(f"--data: {name} is not a picture that Pillow can read: {error}") from error


@dataclass
class Augment:
    """A picture to a normalised tensor (3, H, W), seen differently each time.

    Args:
        kind: "crop" for a random part, resized, and its mirror image half of the time; "affine" for a small shift, turn
            and change of size, which keep a digit the digit it is; "none" for the whole picture, resized.
        config: the model's ``pretrained_cfg``: ``input_size``, ``mean``, ``std``.
        least: of the picture's area, in a crop.
        policy: a function from a picture to a picture, as timm's RandAugment. erase: from a tensor to a tensor.
    """

    kind: str
    config: dict[str, Any]
    least: float = 0.08
    policy: Callable[[Picture], Picture] | None = None
    erase: Callable[[Tensor], Tensor] | None = None

    def __call__(self, picture: Picture) -> Tensor:
        _, height, width = self.config["input_size"]
        box = self.part(picture) if self.kind == "crop" else None
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if self.kind == "crop" and random.random() < 0.5:
            picture = ImageOps.mirror(picture)
        elif self.kind == "affine":
            picture = picture.transform((width, height), Image.Transform.AFFINE, self.motion(picture), BILINEAR)
        if self.policy is not None:
            picture = self.policy(picture)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1).contiguous() / 255
        mean, std = (torch.tensor(self.config[name]).view(3, 1, 1) for name in ("mean", "std"))
        pixels = (pixels - mean) / std
        return pixels if self.erase is None else self.erase(pixels)

    def part(self, picture: Picture) -> tuple[float, float, float, float]:
        """A box of ``least`` to 1 of the area and an aspect ratio of 3/4 to 4/3; the whole picture if none is found."""
        for _ in range(10):
            area = picture.width * picture.height * random.uniform(self.least, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if width <= picture.width and height <= picture.height:
                left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
                return left, top, left + width, top + height
        return 0.0, 0.0, float(picture.width), float(picture.height)

    @staticmethod
    def motion(picture: Picture) -> tuple[float, ...]:
        """The coefficients of a turn by at most 15 degrees, 0.85 to 1.15 of the size and a shift by a tenth."""
        angle, size = math.radians(random.uniform(-15, 15)), 1 / random.uniform(0.85, 1.15)
        a, b = size * math.cos(angle), size * math.sin(angle)
        x, y = picture.width / 2, picture.height / 2
        right, down = (random.uniform(-0.1, 0.1) * side for side in picture.size)
        return a, b, x - a * (x + right) - b * (y + down), -b, a, y + b * (x + right) - a * (y + down)


BILINEAR = Image.Resampling.BILINEAR


# --- Where they come from ---------------------------------------------------------------------------------------------

Item = tuple["Path | Picture", int]


@dataclass
class Source:
    """Images for training and for validation: lists of (picture, label), or addresses of shards."""

    train: Sequence[Item] | list[str]
    val: Sequence[Item] | list[str]
    classes: list[str]
    samples: int
    """Of an epoch."""

    @property
    def in_shards(self) -> bool:
        return isinstance(self.train[0], str)


def open_source(data: str, val_data: str | None, samples: int | None, classes: int | None) -> Source:
    """The images that ``--data`` names: "digits", a folder, or shards such as "train-{0000..0146}.tar".

    Raises:
        OptionError: there is nothing of the kind, or too little of it.
    """
    source = _open(data, val_data, samples, classes)
    if len(source.classes) < 2:
        raise OptionError(f"--data: expected two classes or more, got {len(source.classes)}: {source.classes}")
    return source


def _open(data: str, val_data: str | None, samples: int | None, classes: int | None) -> Source:
    if data == "digits":
        return _digits()
    if data.endswith((".tar", ".tar.gz")) or "::" in data or data.startswith("pipe:"):
        return _shards(data, val_data, samples, classes)
    for option, value in (("--samples", samples), ("--classes", classes)):
        if value is not None:
            raise OptionError(f"{option}: expected with shards only, whose number of images nothing tells, got {value}")
    return _folders(Path(data), None if val_data is None else Path(val_data))


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise OptionError(
            "--data: the digits come with scikit-learn, which is not here: pip install scikit-learn"
        ) from error
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    items = [
        (Image.fromarray(each).convert("RGB"), int(label)) for each, label in zip(pixels, digits.target, strict=True)
    ]
    train, val = train_test_split(items, test_size=TEST_DIGITS, stratify=digits.target, random_state=0)
    return Source(train, val, [str(digit) for digit in range(10)], len(train))


def _folders(folder: Path, val_folder: Path | None) -> Source:
    """A folder for each class, as torchvision's ImageFolder; in ``train`` and ``val``, or divided here."""
    if not folder.is_dir():
        raise OptionError(f"--data: expected digits, a folder, or shards that end in .tar, got {str(folder)!r}")
    train_folder = next((folder / name for name in TRAINING_FOLDERS if (folder / name).is_dir()), folder)
    if val_folder is None and train_folder != folder:
        val_folder = next((folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()), None)
        if val_folder is None:
            names = " or ".join(VALIDATION_FOLDERS)
            raise OptionError(f"--data: beside {train_folder} there is no folder {names}; --val-data names another")
    classes = _classes_of(train_folder, "--data")
    train = _pictures_of(train_folder, classes, "--data")
    if val_folder is not None:
        if strangers := set(_classes_of(val_folder, "--val-data")) - set(classes):
            raise OptionError(f"--val-data: expected the classes of {train_folder}, got {sorted(strangers)[:5]} too")
        val = _pictures_of(val_folder, [name for name in classes if (val_folder / name).is_dir()], "--val-data")
        val = [(path, classes.index(path.relative_to(val_folder).parts[0])) for path, _ in val]
    else:
        numbered = list(enumerate(train))
        val = [item for number, item in numbered if number % HELD_OUT == HELD_OUT - 1]
        train = [item for number, item in numbered if number % HELD_OUT != HELD_OUT - 1]
    for option, part in (("--data", train), ("--val-data", val)):
        if not part:
            raise OptionError(f"{option}: expected at least one picture of each kind, got none in {folder}")
    return Source(train, val, classes, len(train))


def _classes_of(folder: Path, option: str) -> list[str]:
    if not folder.is_dir():
        raise OptionError(f"{option}: there is no folder {folder}")
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not classes:
        raise OptionError(f"{option}: expected a folder for each class in {folder}, got none")
    return classes


def _pictures_of(folder: Path, classes: Sequence[str], option: str) -> list[Item]:
    items: list[Item] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise OptionError(f"{option}: expected pictures ({', '.join(SUFFIXES)}) in {folder / name}, got none")
        items += [(path, label) for path in found]
    return items


def _shards(data: str, val_data: str | None, samples: int | None, classes: int | None) -> Source:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise OptionError("--data: shards are read by webdataset, which is not here: pip install webdataset") from error
    if val_data is None:
        raise OptionError("--val-data: expected the shards for validation beside those of --data, got none")
    train, val = expand_urls(data), expand_urls(val_data)
    for option, urls in (("--data", train), ("--val-data", val)):
        if missing := [url for url in urls if ":" not in url and not Path(url).is_file()]:
            raise OptionError(f"{option}: there is no file {missing[0]}")
    if samples is None or classes is None:
        labels = [_label(sample) for sample in _whole_shards(train)]
        samples = len(labels) if samples is None else samples
        classes = max(labels, default=-1) + 1 if classes is None else classes
    if not samples:
        raise OptionError(f"--data: expected samples in the shards, got none in {data}")
    return Source(train, val, [str(label) for label in range(classes)], samples)


def shard_samples(urls: list[str], shuffled: random.Random | None = None) -> Iterator[dict[str, Any]]:
    """The samples of shards, in order or drawn out of a buffer: dicts of bytes by suffix."""
    import webdataset

    stages = [webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples()]
    if shuffled is not None:
        stages.append(webdataset.shuffle(BUFFER, rng=shuffled))
    return iter(webdataset.DataPipeline(*stages))


def _whole_shards(urls: list[str], shuffled: random.Random | None = None) -> Iterator[dict[str, Any]]:
    """The same; OptionError names a shard that cannot be read to its end."""
    try:
        yield from shard_samples(urls, shuffled)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        url = next((each for each in error.args if each in urls), f"one of {urls}")  # webdataset adds it
        raise OptionError(f"--data: {url} cannot be read, it may be damaged or cut off: {error.args[0]}") from error


def picture_suffix(sample: dict[str, Any]) -> str | None:
    """Under which the sample has its picture; None where it has none."""
    return next((suffix[1:] for suffix in SUFFIXES if suffix[1:] in sample), None)


def _label(sample: dict[str, Any]) -> int:
    try:
        return int(sample["cls"])
    except (KeyError, ValueError) as error:
        got = repr(sample["cls"][:20]) if "cls" in sample else "none"
        raise OptionError(
            f"--data: expected a number in {sample['__key__']}.cls of {sample['__url__']}, got {got}"
        ) from error


def _decoded(sample: dict[str, Any], prepare: Prepare) -> tuple[Tensor, int]:
    name = f"{sample['__key__']} of {sample['__url__']}"
    suffix = picture_suffix(sample)
    if suffix is None:
        raise OptionError(f"--data: {name} holds no picture ({', '.join(SUFFIXES)})")
    return prepare(open_picture(sample[suffix], name)), _label(sample)


# --- Batches ----------------------------------------------------------------------------------------------------------


class Listed(Dataset):
    """Items by (epoch, index): the epoch is among what the augmentation's draws depend on."""

    def __init__(self, items: Sequence[Item], prepare: Prepare, seed: int):
        self.items, self.prepare, self.seed = items, prepare, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        reseed(self.seed, 1, *key)
        picture, label = self.items[key[1]]
        return self.prepare(open_picture(picture, str(picture)) if isinstance(picture, Path) else picture), label


Part = tuple[int, int]
"""A process's number, and how many there are."""


def _order(samples: int, batch: int, seed: int, start: int, stop: int, part: Part) -> Iterator[list[tuple[int, int]]]:
    """The keys of a part of each step's batch; what an epoch has beyond its last full batch is left out."""
    steps, own = samples // batch, batch // part[1]
    for epoch in range(start // steps, -(-stop // steps)):
        shuffled = np.random.default_rng((seed, 0, epoch)).permutation(samples)
        for step in range(max(start, epoch * steps), min(stop, (epoch + 1) * steps)):
            first = step % steps * batch + part[0] * own
            yield [(epoch, int(index)) for index in shuffled[first : first + own]]


class Streamed(IterableDataset):
    """Batches of shards, of which each worker reads some, in an order of its own, and anew where they end early.

    Every process reads them all, whatever their number, and decodes its own part of each batch.
    """

    def __init__(
        self,
        urls: list[str],
        samples: int,
        batch: int,
        prepare: Prepare,
        seed: int,
        start: int,
        stop: int,
        part: Part,
    ):
        self.urls, self.steps, self.batch, self.prepare = urls, samples // batch, batch, prepare
        self.seed, self.start, self.stop = seed, start, stop
        own = batch // part[1]
        self.own = range(part[0] * own, (part[0] + 1) * own)

    def __iter__(self) -> Iterator[list[Tensor]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        stream, epoch = (self.start + number) % workers, -1  # batches are taken from the workers in turn
        samples: Iterator[tuple[int, dict[str, Any]]] = iter(())
        for step in range(self.start + number, self.stop, workers):
            if step // self.steps != epoch:
                epoch = step // self.steps
                first = epoch * self.steps
                first += (stream - first) % workers
                begun = (step - first) // workers * self.batch
                samples = itertools.islice(enumerate(self.read(epoch, stream, workers)), begun, None)
            batch = []
            for number_in_batch, (place, sample) in enumerate(itertools.islice(samples, self.batch)):
                if number_in_batch in self.own:
                    reseed(self.seed, 1, epoch, stream, place)
                    batch.append(_decoded(sample, self.prepare))
            yield default_collate(batch)

    def read(self, epoch: int, stream: int, streams: int) -> Iterator[dict[str, Any]]:
        """The samples of a stream's share of the shards, endlessly."""
        urls = [self.urls[i] for i in np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.urls))]
        for turn in itertools.count():
            shuffled = random.Random(int(np.random.default_rng((self.seed, 2, epoch, stream, turn)).integers(2**62)))
            samples = _whole_shards(urls[stream::streams], shuffled)
            first = next(samples, None)
            if first is None:
                raise OptionError(f"--data: expected samples for each worker, got none in {urls[stream::streams]}")
            yield first
            yield from samples


class StreamedOnce(IterableDataset):
    """The samples of shards, each once; of several processes one."""

    def __init__(self, urls: list[str], prepare: Prepare, part: Part):
        self.urls, self.prepare, self.part = urls, prepare, part

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        urls = self.urls if worker is None else self.urls[worker.id :: worker.num_workers]
        samples = itertools.islice(_whole_shards(urls), self.part[0], None, self.part[1]) if urls else ()
        return (_decoded(sample, self.prepare) for sample in samples)


def training_batches(
    source: Source,
    prepare: Prepare,
    *,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    workers: int,
    part: Part = (0, 1),
) -> Iterable[list[Tensor]]:
    """The batches of steps ``start`` to ``stop``: images (batch, 3, H, W) and labels (batch,), the same for one seed.

    ``part``, (process, processes), gives one process's share of each batch; together they are the same for any number.

    Raises:
        OptionError: fewer images than a batch, or fewer shards than workers.
    """
    if source.samples < batch:
        raise OptionError(f"--batch: expected at most the number of training images, {source.samples}, got {batch}")
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if not source.in_shards:
        order: Any = _order(source.samples, batch, seed, start, stop, part)
        return DataLoader(Listed(source.train, prepare, seed), batch_sampler=order, **options)
    if workers > len(source.train):
        raise OptionError(
            f"--workers: expected at most one for each of {len(source.train)} training shards, got {workers}"
        )
    streamed = Streamed(source.train, source.samples, batch, prepare, seed, start, stop, part)
    return DataLoader(streamed, batch_size=None, **options)


def validation_batches(
    source: Source, prepare: Prepare, *, batch: int, workers: int, part: Part = (0, 1)
) -> Iterable[list[Tensor]]:
    """Every image for validation once, in one of the processes, in batches; the last may be smaller."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if source.in_shards:
        return DataLoader(StreamedOnce(source.val, prepare, part), batch_size=batch, **options)
    keys = [(0, index) for index in range(part[0], len(source.val), part[1])]
    batches = [keys[first : first + batch] for first in range(0, len(keys), batch)]
    return DataLoader(Listed(source.val, prepare, 0), batch_sampler=batches, **options)
