"""Peak memory and time of a whole training step on a GPU, of the fused and of the plain model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastvit
from fastvit.patching.timing import interleaved

MODELS: dict[str, dict[str, Any]] = {
    "deepvit_s": {"img_size": 32, "depth": 2, "transformed_blocks": 1},
    "cait_s24_224": {"img_size": 32, "depth": 1},
    "ceit_small": {"img_size": 64, "depth": 1},
    "cvt_13": {"img_size": 48, "depth": (1, 1, 1)},
}
"""By model, the options of a small version."""

CLASSES = 1000


def peak_mebibytes(call: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Memory that is allocated before a call, and its peak during the call; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return {"held": held / 2**20, "peak": torch.cuda.max_memory_allocated(device) / 2**20}


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


def describe_steps(row: dict[str, Any]) -> str:
    """A line of the report."""
    times, peaks = row["milliseconds"], row["peak_mebibytes"]
    memory = ""
    if peaks["fused"] is not None:
        memory = f"  peak {peaks['fused']['peak']:.0f} MiB of plain's {peaks['plain']['peak']:.0f}"
    faster = times["plain"] / times["fused"]
    return f"{row['model']:<20} {row['batch']:>3} step      {times['fused']:8.3f} ms  plain {faster:.2f}x{memory}"
