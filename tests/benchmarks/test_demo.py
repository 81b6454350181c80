"""The demo: its photographs, its error messages, and a small run from end to end."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmarks import demo
from benchmarks.photos import bundled_photographs, photo_batch, prepare
from benchmarks.randomize import randomize_like_trained
from fastvit.reference import create_model

CFG = {"input_size": (3, 32, 48), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0), "crop_pct": 0.875}
CFG["interpolation"] = "bicubic"


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (33, 49), (7, 5)])
def test_images_are_cropped_to_the_models_size_and_normalised(size):
    grey = Image.fromarray(np.full((size[1], size[0], 3), 51, dtype=np.uint8))
    pixels = prepare(grey, CFG)
    assert pixels.shape == (3, 32, 48)
    for channel, (mean, std) in enumerate(zip(CFG["mean"], CFG["std"], strict=True)):
        torch.testing.assert_close(pixels[channel], torch.full((32, 48), (0.2 - mean) / std))


def test_every_view_of_a_batch_is_different():
    paths = bundled_photographs()
    batch = photo_batch(paths, 3 * len(paths), CFG)
    assert len({view.numpy().tobytes() for view in batch}) == 3 * len(paths)


def test_every_branch_of_a_randomized_model_reaches_its_logits():
    images = torch.randn(2, 3, 32, 32)
    vit = create_model("vit_tiny_patch16_224", img_size=32)
    assert not vit(images).any()
    assert randomize_like_trained(vit, images)(images).std() > 0.01
    cait = randomize_like_trained(create_model("cait_xxs24_224", img_size=32), images)
    assert cait.blocks[0].gamma_1.min() >= 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nope"], "--models: unknown model 'nope'"),
        (["--batch", "0"], "--batch: expected a positive number, got 0"),
        (["--rounds", "-1"], "--rounds: expected a positive number, got -1"),
        (["--device", "gpu"], "--device: "),
        (["--image", "missing.png"], "--image: there is no file missing.png"),
        (["--image", __file__], "is not an image"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    ],
)
def test_error_messages_name_the_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_from_end_to_end(tmp_path: Path, capsys):
    picture = tmp_path / "own.png"
    Image.effect_noise((300, 260), 60).convert("RGB").save(picture)
    arguments = ["--models", "vit_tiny_patch16_224", "--batch", "2", "--rounds", "2", "--device", "cpu"]
    assert demo.main([*arguments, "--image", str(picture), "--out", str(tmp_path / "out")]) == 0
    assert "masked_attention" in capsys.readouterr().out
    outcome = json.loads((tmp_path / "out" / "demo.json").read_text())["outcomes"][0]
    assert outcome["accurate"] and 0 < outcome["error_after"] < 1e-4
    with Image.open(tmp_path / "out" / "demo.png") as chart:
        assert chart.size[0] > 500


def test_no_speed_is_printed_for_an_inaccurate_model():
    good = demo.Outcome("m", 10.0, 20.0, 2.0, 1.9, 2.1, 1e-6, 1e-6, True, {"masked_attention (cpp)": 12})
    text = io.StringIO()
    console = Console(file=text, width=200)
    console.print(demo.result_table([good, dataclasses.replace(good, accurate=False)], "title"))
    assert text.getvalue().count("2.00x") == 1
    assert "inaccurate" in text.getvalue()
