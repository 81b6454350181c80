"""Whole models: ``python -m benchmarks.models [--quick]``.

Every contender has the same model with the same weights, random but like trained ones, and images that change from call
to call. ``--only`` takes parts of the names below, or any model: a name of ``python -m fastvit list``, or of another
library, such as ``timm/vit_small_patch16_224``, ``transformers/ViTConfig``, ``vit_pytorch/cait.CaiT``, which is then
compared as it comes.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastvit
from benchmarks import providers
from benchmarks.command import Suite, main
from benchmarks.libraries import declare_torchvision_nms
from benchmarks.randomize import randomize_like_trained
from benchmarks.worker import Case, Form

MODELS = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deepvit_16b",
    "cait_xxs24_224",
    "cpvt_tiny_peg5",
    "cvt_13",
    "ceit_tiny",
)
FOREIGN = ("timm/vit_tiny_patch16_224", "transformers/CvtConfig", "vit_pytorch/deepvit.DeepViT")
JUDGED = 2
"""Images of a result that are judged at inference: float64 on a CPU is slow, and two show an error as well as eight."""


class Whole:
    """A model of one case."""

    input_gradients = False

    def __init__(self, case: Case) -> None:
        self.case = case
        self.few = None if case.training else JUDGED
        self.foreign = case.name not in fastvit.list_models()
        declare_torchvision_nms()  # before timm and transformers are imported
        if self.foreign:
            from fastvit.cli.models import load

            candidate = load(case.name, size=case.image_size)
            model, sample = candidate.model, pytree.tree_leaves(candidate.inputs(1))
            self.shape = tuple(sample[0].shape[1:])
        else:
            model = fastvit.create_model(case.name, fused=False, img_size=case.image_size)
            self.shape = tuple(model.default_cfg["input_size"])
        self.model = model
        self.notes: dict[str, Any] = {}

    def state(self) -> dict[str, Tensor]:
        if not self.foreign:
            randomize_like_trained(self.model, self._images(0))
        return self.model.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def _images(self, draw: int) -> Tensor:
        if self.case.photos:
            from benchmarks.photos import photo_batch

            photos = [Path(name) for name in self.case.photos]
            return photo_batch(photos, self.case.batch, self.model.default_cfg).roll(draw, 0)
        return torch.randn(self.case.batch, *self.shape, generator=torch.Generator().manual_seed(draw))

    def inputs(self, draw: int) -> tuple[Tensor, ...]:
        return (self._images(draw).to(self.case.device, self.case.torch_dtype),)

    def form(self, provider: str, example: tuple[Tensor, ...]) -> Form:
        # The model in the dtype of the case, whose rounded numbers float64 starts from, too.
        model = copy.deepcopy(self.model).to(self.case.device, self.case.torch_dtype).train(self.case.training)
        if provider in ("plain", "exact"):
            run: Any = model.double() if provider == "exact" else model
        else:
            run = providers.PROVIDERS[provider].build(model, example, self.case)
            self.notes = {"replaced": replaced_blocks(model)} if fastvit.is_patched(model) else {}
        owner = run if isinstance(run, nn.Module) else model
        return Form(_tensors(run), [each for each in owner.parameters() if each.requires_grad])


def replaced_blocks(model: nn.Module) -> dict[str, int]:
    """How many blocks of a patched model run on which operator and backend."""
    rows = fastvit.report(model).rows
    return dict(Counter(f"{row.op} ({row.backend})" for row in rows if row.status == "patched"))


def _tensors(run: Any) -> Any:
    """What a call gives as tensors alone: transformers' models give more, by name."""

    def call(images: Tensor) -> Any:
        out = run(images)
        return out if isinstance(out, (Tensor, tuple, list)) else out.logits

    return call if isinstance(run, nn.Module) else run


def open_case(case: Case) -> Whole:
    return Whole(case)


def absence(name: str, case: Case) -> str | None:
    return providers.absence(name, providers.PROVIDERS[name], case)


SUITE = Suite(
    name="models",
    module="benchmarks.models",
    description=__doc__,
    names=lambda: (*MODELS, *FOREIGN),
    others=lambda text: text in fastvit.list_models() or "/" in text or ":" in text,
    providers={name: provider.about for name, provider in providers.PROVIDERS.items()},
    absence=absence,
    pythons=providers.pythons(),
    quick={
        "only": list(MODELS),
        "providers": list(providers.QUICK),
        "mode": ["fwd"],
        "dtype": ["float32"],
        "batch": [1],
    },
)


def command(arguments: Sequence[str] | None = None) -> int:
    return main(SUITE, arguments)


if __name__ == "__main__":
    sys.exit(command())
