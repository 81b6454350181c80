"""``fold_normalization``: a model that takes images as they are decoded, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastvit.patching.fusion import plain_class
from fastvit.patching.normalization import Normalization, NormalizingConv2d
from fastvit.patching.plan import check_model
from fastvit.reference.overrides import is_plain


class FoldedNormalization:
    """What :func:`fold_normalization` did. As a context manager it is undone at the end of the ``with`` block."""

    def __init__(self, convolution: nn.Module):
        self._convolution = convolution

    def remove(self) -> None:
        """Let the model take normalised images again; nothing where it does already."""
        _unfold(self._convolution)

    def __enter__(self) -> FoldedNormalization:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_READERS = {
    "fastvit.reference.layers.PatchEmbed": "proj",
    "fastvit.reference.cpvt.NormedPatchEmbed": "proj",
    "fastvit.reference.deepvit.CNNStem": "conv1",
    "fastvit.reference.cvt.ConvEmbed": "proj",
    "fastvit.reference.ceit.Stem": "conv",
    "timm.layers.patch_embed.PatchEmbed": "proj",
    "timm.layers.patch_embed.PatchEmbedWithSize": "proj",
    "timm.models.twins.PatchEmbed": "proj",
    "transformers.models.vit.modeling_vit.ViTPatchEmbeddings": "projection",
    "transformers.models.deit.modeling_deit.DeiTPatchEmbeddings": "projection",
    "transformers.models.cvt.modeling_cvt.CvtConvEmbeddings": "projection",
    "torchvision.models.vision_transformer.VisionTransformer": "conv_proj",
}
"""The modules that begin with a convolution of the image, and its name there."""


def fold_normalization(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> FoldedNormalization:
    """Let a vision transformer take images of values 0..255, normalised within its first convolution.

    Afterwards ``model(images)`` is what ``model((images / 255 - mean) / std)`` was before, for images (B, C, H, W) of
    uint8 or a floating dtype, channels-last too. Where the convolution pads, it pads with what zeros were then. The
    parameters and the ``state_dict`` stay as they are, so checkpoints may be loaded and the model trained meanwhile;
    ``patch`` may come before or after. A convolution that is exchanged afterwards does not normalise, and what reads
    the images beside it (the loss of a reconstruction) sees them as they are.

    Args:
        model: one of our families, or of timm (ViT, DeiT, CaiT, Twins and others with its ``PatchEmbed``), transformers
            (ViT, DeiT, CvT) or torchvision (ViT), patched or not.
        mean: per channel, of images of values 0..1, as ``model.default_cfg["mean"]`` has it.
        std: likewise, above 0.

    Returns:
        A handle whose ``remove()`` undoes it; so does ``unpatch(model)``.

    Raises:
        TypeError: not an ``nn.Module``, or one whose code is frozen (TorchScript, fx).
        ValueError: ``mean`` or ``std`` is not a number for each channel in the range above.
        RuntimeError: no convolution is known to read the model's image, it is hooked, wrapped or normalises already, or
            something pads the image in front of it.
    """
    check_model(model)
    convolution = _reader(model)
    channels = convolution.in_channels
    normalization = Normalization(_numbers("mean", mean, channels), _numbers("std", std, channels))
    convolution.__class__ = NormalizingConv2d
    convolution.normalization = normalization
    return FoldedNormalization(convolution)


def _numbers(name: str, values: Any, channels: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    low = 0.0 if name == "mean" else math.nextafter(0.0, 1.0)
    if len(numbers) != channels or not all(low <= number <= 1.0 for number in numbers):
        more = "from 0 to 1" if name == "mean" else "above 0, up to 1"
        raise ValueError(f"{name}: expected {channels} numbers {more} (of images of values 0..1), got {values!r:.200}")
    return numbers


def _reader(model: nn.Module) -> nn.Conv2d:
    """The convolution that reads the image."""
    for name, module in model.named_modules():
        path = _known(plain_class(module))
        if path is None:
            continue
        convolution = getattr(module, _READERS[path])
        where = f"{name}.{_READERS[path]}".lstrip(".")
        if isinstance(convolution, NormalizingConv2d):
            raise RuntimeError(f"model: {where} normalises already, with {convolution.normalization}; undo that first")
        if not is_plain(convolution, nn.Conv2d):
            raise RuntimeError(f"model: expected a plain nn.Conv2d without hooks at {where}, got {convolution!r:.200}")
        if getattr(module, "dynamic_img_pad", False):
            raise RuntimeError(
                f"model: {name} pads images with zeros (dynamic_img_pad), which before normalisation are not the mean"
            )
        return convolution
    known = ", ".join(sorted({path.rpartition(".")[2] for path in _READERS}))
    raise RuntimeError(
        f"model: no convolution of {plain_class(model).__name__} is known to read its image; known are those of {known}"
    )


def _known(cls: type) -> str | None:
    """The known class that a class is or inherits its forward from."""
    for base in cls.__mro__:
        path = f"{base.__module__}.{base.__qualname__}"
        if path in _READERS:
            return path
        if "forward" in vars(base):
            break
    return None


def unfold(model: nn.Module) -> None:
    """Undo :func:`fold_normalization` in a model and its parts."""
    for module in model.modules():
        _unfold(module)


def _unfold(module: nn.Module) -> None:
    if type(module) is NormalizingConv2d:
        module.__class__ = nn.Conv2d
        del module.normalization
