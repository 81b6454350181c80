"""The images of examples/train.py: which a step sees, where they come from, and what is done to them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import fastvit
from examples.images import Augment, OptionError, open_source, reseed, training_batches, validation_batches
from tests.examples.pictures import CLASSES, make_folder, make_shards, pictures

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open

CONFIG = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
BATCH = 8


def prepare(picture: Image.Image) -> torch.Tensor:
    """The picture itself, and a number that was drawn."""
    pixels = torch.from_numpy(np.array(picture)).double()
    return torch.cat((pixels.flatten(), torch.rand(1, dtype=torch.float64)))


def batches(source, start: int, stop: int, workers: int = 0, seed: int = 0, part=(0, 1)) -> list[torch.Tensor]:
    options = {"batch": BATCH, "seed": seed, "start": start, "stop": stop, "workers": workers, "part": part}
    return [torch.cat((images, labels[:, None]), 1) for images, labels in training_batches(source, prepare, **options)]


def seen(found: list[torch.Tensor]) -> Counter:
    """How often each image was in the batches, without the number drawn."""
    return Counter(tuple(row[:99].tolist()) for batch in found for row in batch)


def test_an_epoch_is_every_image_once_in_another_order(folder):
    source = open_source(str(folder), None, None, None)
    first, second = batches(source, 0, 3), batches(source, 3, 6)
    assert seen(first) == seen(second) and set(seen(first).values()) == {1} and len(seen(first)) == source.samples == 24
    assert not torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(torch.stack(first), torch.stack(batches(source, 0, 3, seed=1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_step_sees_depends_on_its_place_alone(workers, folder):
    source = open_source(str(folder), None, None, None)
    whole = batches(source, 0, 7)
    for start in (0, 2, 5):
        assert torch.equal(torch.stack(batches(source, start, 7, workers)), torch.stack(whole[start:]))


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_several_processes_see_together_what_one_sees(workers, kind, folder, tmp_path):
    """In the same order, drawn alike; for validation each image once."""
    if kind == "shards":
        pytest.importorskip("webdataset")
        source = open_source(*make_shards(tmp_path), None, None)
    else:
        source = open_source(str(folder), None, None, None)
    whole = torch.stack(batches(source, 1, 5, workers))
    options = {"batch": BATCH, "workers": workers}
    val = Counter(int(images.sum()) for batch, _ in validation_batches(source, prepare, **options) for images in batch)
    for count in (2, 4):
        parts = [(rank, count) for rank in range(count)]
        assert torch.equal(
            torch.cat([torch.stack(batches(source, 1, 5, workers, part=part)) for part in parts], 1), whole
        )
        theirs = [validation_batches(source, prepare, **options, part=part) for part in parts]
        assert Counter(int(images.sum()) for each in theirs for batch, _ in each for images in batch) == val


@pytest.mark.parametrize("shards", [3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_likewise(workers, shards, tmp_path):
    pytest.importorskip("webdataset")
    source = open_source(*make_shards(tmp_path, shards), None, None)
    steps = source.samples // BATCH
    whole = batches(source, 0, 3 * steps, workers)
    assert source.samples == 12 * shards and len(source.classes) == len(CLASSES) and len(whole) == 3 * steps
    for start in (1, steps, steps + 2):
        tail = batches(source, start, 3 * steps, workers)
        assert torch.equal(torch.stack(tail), torch.stack(whole[start:]))
    first, second = whole[:steps], whole[steps : 2 * steps]
    assert not torch.equal(torch.stack(first), torch.stack(second))
    if shards == 4:  # each worker has as many samples as it gives in an epoch
        assert seen(first) == seen(second) and set(seen(first).values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_every_image_once(workers, folder, tmp_path):
    sources = [open_source(str(folder), None, None, None)]
    if pytest.importorskip("webdataset"):
        sources.append(open_source(*make_shards(tmp_path), 48, 3))
    for source, count in zip(sources, (6, 12), strict=True):
        found = [
            torch.cat((images, labels[:, None]), 1)
            for images, labels in validation_batches(source, prepare, batch=4, workers=workers)
        ]
        assert sorted(seen(found).values()) == [1] * count
        assert Counter(int(row[-1]) for batch in found for row in batch) == dict.fromkeys(range(3), count // 3)


def test_folders(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        make_folder(tmp_path / "both" / part, count)
    source = open_source(str(tmp_path / "both"), None, None, None)
    assert (len(source.train), len(source.val), source.classes) == (12, 6, list(CLASSES))
    labels = {path.parent.name: label for path, label in (*source.train, *source.val)}
    assert labels == {name: CLASSES.index(name) for name in CLASSES}
    other = open_source(str(tmp_path / "both"), str(tmp_path / "both" / "train"), None, None)
    assert len(other.val) == 12
    (tmp_path / "both" / "val" / "red").rename(tmp_path / "both" / "val" / "purple")
    with pytest.raises(OptionError, match=r"--val-data: expected the classes of .*, got \['purple'\] too"):
        open_source(str(tmp_path / "both"), None, None, None)
    (tmp_path / "both" / "train" / "empty").mkdir()
    with pytest.raises(OptionError, match=r"--data: expected pictures \(.*\) in .*empty, got none"):
        open_source(str(tmp_path / "both"), None, None, None)
    (tmp_path / "lone" / "train").mkdir(parents=True)
    with pytest.raises(OptionError, match="--data: beside .*train there is no folder val or validation"):
        open_source(str(tmp_path / "lone"), None, None, None)


def test_shards_that_are_wrong(tmp_path):
    pytest.importorskip("webdataset")
    data, val = make_shards(tmp_path)
    with pytest.raises(OptionError, match="--val-data: expected the shards for validation"):
        open_source(data, None, None, None)
    with pytest.raises(OptionError, match=r"--data: there is no file .*part-09.tar"):
        open_source(str(tmp_path / "part-{00..09}.tar").replace("part-{00", "part-{09"), val, None, None)
    source = open_source(data, val, 48, 3)
    with pytest.raises(OptionError, match="--workers: expected at most one for each of 4 training shards, got 5"):
        batches(source, 0, 1, workers=5)


def test_without_augmentation_it_is_the_transform_for_evaluation():
    """But for the crop."""
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.default_cfg |= {**CONFIG, "crop_pct": 1.0}
    for size in ((32, 32), (77, 77)):
        _, picture = next(pictures(1))
        picture = picture.resize(size)
        expected = fastvit.transform(model)(picture)
        torch.testing.assert_close(Augment("none", CONFIG)(picture), expected)


@pytest.mark.parametrize("kind", ["crop", "affine"])
def test_augmentation_is_drawn_and_stays_within_the_picture(kind):
    white, augment = Image.new("RGB", (40, 24), (255, 255, 255)), Augment(kind, CONFIG)
    _, picture = next(pictures(1))
    reseed(1, 2)
    one, two = augment(picture), augment(picture)
    reseed(1, 2)
    assert torch.equal(augment(picture), one) and not torch.equal(one, two)
    most = torch.tensor([(1 - mean) / std for mean, std in zip(CONFIG["mean"], CONFIG["std"], strict=True)])
    for _ in range(20):
        pixels = augment(white)
        assert pixels.shape == (3, 32, 32)
        inside = pixels[:, 12:20, 12:20] if kind == "affine" else pixels  # what is turned in is black
        torch.testing.assert_close(inside, most.view(3, 1, 1).expand_as(inside))


def test_a_crop_is_a_part_of_the_size_asked_for():
    picture, augment = Image.new("RGB", (60, 30)), Augment("crop", CONFIG, least=0.25)
    random.seed(0)
    for _ in range(100):
        left, top, right, bottom = augment.part(picture)
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 30
        assert 0.25 <= (right - left) * (bottom - top) / 1800 <= 1.0 + 1e-9
