"""Other libraries, made importable."""

from __future__ import annotations

import importlib.util
import sys

import torch


def declare_torchvision_nms() -> None:
    """Let torchvision be imported where its binary was built for another torch than the one installed.

    timm, transformers and torchvision's models only need torchvision's Python code, which fails at import when its
    binary has not declared ``torchvision::nms``. Nobody calls that operator, so declaring it is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
