"""Whole models on a GPU, fused and plain: peak memory and time of a training step, and inference compiled as well."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastvit
from benchmarks.gpu_timing import compare, peak_mebibytes, refusal
from benchmarks.randomize import randomize_like_trained
from fastvit.accuracy import is_accurate
from fastvit.patching.timing import interleaved

MODELS: dict[str, dict[str, Any]] = {
    "deepvit_s": {"img_size": 32, "depth": 2, "transformed_blocks": 1},
    "cait_s24_224": {"img_size": 32, "depth": 1},
    "ceit_small": {"img_size": 64, "depth": 1},
    "cvt_13": {"img_size": 48, "depth": (1, 1, 1)},
    "vit_small_patch16_224": {"img_size": 32, "depth": 1},
    "cpvt_small": {"img_size": 32, "depth": 2},
}
"""By model, the options of a small version."""

CLASSES = 1000


def _step(name: str, fused: bool, batch: int, device: torch.device, options: dict[str, Any]) -> Callable[[], float]:
    """One step of AdamW in bfloat16 autocast on random images; returns the loss."""
    torch.manual_seed(0)
    model = fastvit.create_model(name, fused=fused, num_classes=CLASSES, **options).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    height, width = model.img_size if isinstance(model.img_size, tuple) else (model.img_size,) * 2
    images = torch.randn(batch, 3, height, width, generator=generator).to(device)
    labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            out = model(images)
            loss = sum(
                F.cross_entropy(logits.float(), labels) for logits in (out if isinstance(out, tuple) else (out,))
            )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure_steps(name: str, batch: int, device: torch.device, *, rounds: int, small: bool) -> dict[str, Any]:
    """The row of a model: peak memory, milliseconds, and the loss of the first step, which must be the same for both.

    Memory is measured with one model on the device; time with both, which take turns.
    """
    options = MODELS[name] if small else {}
    peaks, losses = {}, {}
    for which, fused in (("plain", False), ("fused", True)):
        step = _step(name, fused, batch, device, options)
        losses[which] = float(step())  # also allocates the optimizer's state
        peaks[which] = peak_mebibytes(step, device)
        del step
    steps = [_step(name, fused, batch, device, options) for fused in (False, True)]
    seconds = interleaved(steps, device, rounds=rounds)
    return {
        "model": name,
        "batch": batch,
        "first_loss": losses,
        "peak_mebibytes": peaks,
        "milliseconds": {
            which: 1e3 * statistics.median(times) for which, times in zip(("plain", "fused"), seconds, strict=True)
        },
    }


def measure_inference(
    name: str,
    batch: int,
    device: torch.device,
    *,
    rounds: int,
    small: bool,
    without: Collection[str] = (),
    at: Callable[[str], None] = lambda candidate: None,
) -> dict[str, Any]:
    """A model's row at inference in bfloat16: milliseconds of the plain and the fused model, eager and compiled.

    Args:
        without: candidates not to run. at: told of each before it first runs: a fault of one may end the process.
    """
    options = MODELS[name] if small else {}
    built = {which: fastvit.create_model(name, fused=which == "fused", **options) for which in ("plain", "fused")}
    generator = torch.Generator().manual_seed(1)
    size = built["plain"].img_size
    images = torch.randn(batch, 3, *(size if isinstance(size, tuple) else (size, size)), generator=generator)
    randomize_like_trained(built["plain"], images[:2])
    built["fused"].load_state_dict(built["plain"].state_dict())
    images, few = (each.to(device, torch.bfloat16) for each in (images, images[:2]))
    models = {which: model.to(device, torch.bfloat16).eval() for which, model in built.items()}
    with torch.no_grad():
        expected = models["plain"](few)
        exact = models["plain"].double()(few.double())
        models["plain"].to(torch.bfloat16)
    for which in ("plain", "fused"):
        models[f"{which}_compiled"] = torch.compile(models[which], dynamic=False)
    calls: dict[str, Callable[[], object]] = {}
    refused, inaccurate = {}, []
    for candidate, model in models.items():
        if candidate in without:
            continue
        at(candidate)

        def infer(model: nn.Module = model) -> None:
            with torch.no_grad():
                model(images)

        try:
            infer()
            with torch.no_grad():
                accurate = "compiled" in candidate or is_accurate(model(few), expected, exact)
        except Exception as error:
            refused[candidate] = refusal(error, device)
            continue
        if accurate:
            calls[candidate] = infer
        else:
            inaccurate.append(candidate)
    at("")
    times = compare(calls, rounds=rounds, device=device)
    return {"model": name, "batch": batch, "inference": times, "refused": refused, "inaccurate": inaccurate}
