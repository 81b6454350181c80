"""accelerate and Lightning train a patched model as a loop by hand does, step by step to the same losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastvit.patching import is_patched, patch, report
from tests.tiny import build
from tests.training.steps import SEVEN, batches, loss_of

STEPS = 4
RATE = 0.02
HALF = ("vit", "ceit")
"""Also in bfloat16."""


def by_hand(model: nn.Module, name: str, precision: str, accumulate: int = 1) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step, (x, labels) in enumerate(batches(name, STEPS, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(x)
            loss = loss_of(outputs, labels)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """Two that are the same, patched and in training."""
    model = patch(build(name)).train()
    return model, copy.deepcopy(model)


def assert_unchanged(model: nn.Module, other: nn.Module) -> None:
    """Fused as it was, with the weights that training by hand gives."""
    assert is_patched(model) and report(model).totals() == report(other).totals()
    got, expected = model.state_dict(), other.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


CASES = [*((name, "no", 1) for name in SEVEN), *((name, "bf16", 1) for name in HALF), ("cait", "no", 2)]


@pytest.mark.parametrize(("name", "precision", "accumulate"), CASES)
def test_accelerate(name, precision, accumulate):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    one, other = models(name)
    expected = by_hand(one, name, precision, accumulate)
    try:
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
        )
        model, optimizer = accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=RATE))
        losses = []
        for x, labels in batches(name, STEPS, torch.float32):
            with accelerator.accumulate(model), accelerator.autocast():
                loss = loss_of(model(x), labels)
                losses.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        assert losses == expected
        assert_unchanged(accelerator.unwrap_model(model), one)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of workers and loggers it would like
@pytest.mark.parametrize(("name", "precision", "accumulate"), CASES)
def test_lightning(name, precision, accumulate, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, labels = batch
            loss = loss_of(self.model(x), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    one, other = models(name)
    expected = by_hand(one, name, precision, accumulate)
    task = Task(other)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, DataLoader(list(batches(name, STEPS, torch.float32)), batch_size=None))
    assert task.losses == expected
    assert_unchanged(task.model, one)
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    saved = torch.load(tmp_path / "task.ckpt", weights_only=False)["state_dict"]
    again = build(name)
    again.load_state_dict({key.removeprefix("model."): tensor for key, tensor in saved.items()})
