"""The models that examples train and run: by name, small ones for small images, and those of a run's checkpoint."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import fastvit
from benchmarks.libraries import declare_torchvision_nms
from examples.images import OptionError

_SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
_STAGES = {"patch_size": (3, 3, 3), "patch_stride": (2, 2, 2), "patch_padding": (1, 1, 1)}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _SMALL),
    "deit": ("deit_tiny_distilled_patch16_224", _SMALL),
    "deepvit": ("deepvit_16b", _SMALL),
    "cait": ("cait_xxs24_224", {**_SMALL, "init_values": 0.1}),
    "cpvt": ("cpvt_tiny", _SMALL),
    "cvt": (
        "cvt_13",
        {**_STAGES, "img_size": 32, "embed_dim": (32, 64, 96), "depth": (1, 1, 2), "num_heads": (1, 2, 3)},
    ),
    "ceit": ("ceit_tiny", {**_SMALL, "stem_chans": 16}),
}
"""By family, the variant that a small model is made of, and what is smaller in it."""
CONVNET = "convnet"
NAMES = f"a name of `fastvit list`, timm/NAME, or for small images {', '.join(SMALL)} or {CONVNET}"


class ConvNet(nn.Sequential):
    """A small convolutional network, for a teacher: images (B, 3, H, W) to logits (B, classes)."""

    def __init__(self, classes: int, widths: Sequence[int] = (32, 64, 128), img_size: int = 32):
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
        half = (0.5, 0.5, 0.5)
        self.pretrained_cfg = {"input_size": (3, img_size, img_size), "mean": half, "std": half, "crop_pct": 1.0}


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` arguments as a dict; values are Python's literals, or else words."""
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (equals and key.isidentifier()):
            raise OptionError(f"--model-options: expected KEY=VALUE, such as depth=6, got {option!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def build(
    name: str,
    classes: int | None,
    *,
    size: int | None = None,
    drop_path: float = 0.0,
    options: Sequence[str] = (),
    pretrained: bool = False,
) -> nn.Module:
    """A plain model with ``classes`` classes (None: its own) and ``pretrained_cfg``, with fresh weights or timm's.

    Raises:
        OptionError: no such model, an option it does not know, or a size that it cannot take.
    """
    extra: dict[str, Any] = parsed(options)
    if drop_path:
        extra["drop_path_rate"] = drop_path
    try:
        if name.startswith("timm/"):
            return _of_timm(name.removeprefix("timm/"), classes, size, extra, pretrained)
        if pretrained:
            raise OptionError(f"--teacher: expected a checkpoint of a run, or timm/NAME with its weights, got {name!r}")
        if name == CONVNET:
            return ConvNet(classes, **extra, **({} if size is None else {"img_size": size}))
        variant, settings = SMALL.get(name, (name, {}))
        if size is not None:
            extra["img_size"] = size
        if classes is not None:
            extra["num_classes"] = classes
        model = fastvit.create_model(variant, fused=False, **{**settings, **extra})
    except (TypeError, ValueError) as error:
        hint = f"; expected {NAMES}" if "unknown model" in str(error) else ""
        raise OptionError(f"--model {name}: {error}{hint}") from error
    if name in SMALL:
        model.default_cfg["crop_pct"] = 1.0
    return model


def timm_module(name: str, option: str) -> Any:
    """A module of timm, or OptionError for the option that needs it."""
    declare_torchvision_nms()
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise OptionError(f"{option}: needs timm, which cannot be imported here ({error}): pip install timm") from error


def _of_timm(name: str, classes: int | None, size: int | None, extra: dict[str, Any], pretrained: bool) -> nn.Module:
    timm = timm_module("timm", "--model")
    if not timm.is_model(name):
        raise OptionError(f"--model: timm {timm.__version__} has no model {name!r}")
    try:  # transformers are built for a size; convolutional networks take any, and no such argument
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=classes, **extra, **({} if size is None else {"img_size": size})
        )
    except TypeError:
        model = timm.create_model(name, pretrained=pretrained, num_classes=classes, **extra)
    config = timm.data.resolve_model_data_config(model)
    model.pretrained_cfg = {**config, "input_size": (3, size, size) if size else config["input_size"]}
    return model


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a run's checkpoint, and what is written beside them; OptionError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["run"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise OptionError(f"{option}: there is no file {path}") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OptionError(f"{option}: {path} is not a checkpoint of examples/train.py ({error})") from error


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def from_checkpoint(path: Path, option: str) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model of a run, with the averaged weights where it has any, and what is written beside them."""
    tensors, facts = read_checkpoint(path, option)
    run = facts["settings"]
    model = build(run["model"], len(facts["classes"]), size=run["size"], options=run["model_options"])
    model.load_state_dict(part(tensors, "ema") or part(tensors, "model"))
    return model, facts


def trained(
    name: str,
    weights: str | None = None,
    *,
    classes: Path | None = None,
    size: int | None = None,
    options: Sequence[str] = (),
    head: str = "load",
) -> tuple[nn.Module, list[str]]:
    """A plain model with trained weights, in evaluation mode, and the names of its classes.

    Args:
        name: the checkpoint of a run, or what :func:`build` takes; timm downloads its weights where none are given.
        weights: a file, as ``fastvit.load_weights`` reads it. head: "skip" if the classes do not matter.
        classes: a file with a name in each line; numbers, or the run's names, if not given.

    Raises:
        OptionError: no such model, no weights, weights of another model, or another number of names than of classes.
    """
    try:
        names = None if classes is None else classes.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--classes: {error}") from error
    if name.endswith(".safetensors"):
        for option, value in (("--weights", weights), ("--size", size), ("--model-options", options)):
            if value:
                raise OptionError(f"{option}: the checkpoint of a run has its own, got {value}")
        model, facts = from_checkpoint(Path(name), "--model")
        names = facts["classes"] if names is None else names
    elif weights is not None:
        count = None if names is None or head == "skip" else len(names)
        model = build(name, count, size=size, options=options)
        try:
            fastvit.load_weights(model, weights, head=head)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise OptionError(f"--weights: {error}") from error
    elif name.startswith("timm/"):
        try:
            model = build(name, None, size=size, options=options, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise OptionError(f"--model: timm has no weights for {name} ({error}); --weights names a file") from error
    else:
        build(name, None, size=size, options=options)  # a wrong name is told first
        raise OptionError(f"--weights: expected a file with the weights of {name}, got none")
    count = model[-1].out_features if isinstance(model, ConvNet) else model.num_classes
    if names is None:
        names = [str(number) for number in range(count)]
    elif head == "load" and len(names) != count:
        raise OptionError(f"--classes: expected {count} names, one a line, got {len(names)}")
    return model.eval().requires_grad_(False), names


def teacher(name: str, classes: int, config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A function from images, normalised as the student's, to logits; it follows them to their device.

    Args:
        name: the checkpoint of a run, or ``timm/NAME``, whose published weights timm downloads.
        config: the student's ``pretrained_cfg``.

    Raises:
        OptionError: no such model, one of other classes, or one that does not take images of this size.
    """
    if name.startswith("timm/"):
        model = build(name, classes, pretrained=True)
    else:
        model, _ = from_checkpoint(Path(name), "--teacher")
    model.eval().requires_grad_(False)
    given, wanted = (
        {key: torch.tensor(each[key]).view(3, 1, 1) for key in ("mean", "std")}
        for each in (config, model.pretrained_cfg)
    )
    scale, shift = given["std"] / wanted["std"], (given["mean"] - wanted["mean"]) / wanted["std"]

    def answer(images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return model.to(images.device)(images * scale.to(images) + shift.to(images))

    try:
        with torch.no_grad():
            shape = answer(torch.zeros(1, *config["input_size"])).shape
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"--teacher: {name} does not take images of {config['input_size']}: {error}") from error
    if tuple(shape) != (1, classes):
        raise OptionError(f"--teacher: expected {classes} classes, as the images have, got {shape[-1]}")
    return answer
