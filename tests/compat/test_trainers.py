"""accelerate and Lightning train a patched model as a loop by hand does, step by step to the same losses.

In two processes of torchrun, too: this file is what they run.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.libraries import declare_torchvision_nms
from fastvit.patching import is_patched, patch, report
from tests.compat import parts
from tests.compat.parts import Outcome
from tests.helpers import HANG_GUARD
from tests.tiny import build, images
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


# --- In two processes -------------------------------------------------------------------------------------------------

PROCESSES = 2
TRAINERS = {"accelerate": "accelerate", "lightning": "pytorch_lightning"}


def two_by_accelerate(name: str, rank: int, folder: str) -> Outcome:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (PROCESSES, rank)
    model, x = parts.model_of(name), images(name, parts.BATCH)
    loader = DataLoader(TensorDataset(x), batch_size=parts.BATCH // PROCESSES)
    net, optimizer, loader = accelerator.prepare(model, parts.optimizer_of(model), loader)
    losses = []
    for _ in range(parts.STEPS):
        for (part,) in loader:
            optimizer.zero_grad()
            loss = parts.loss_of(net(part))
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
    assert accelerator.unwrap_model(net) is model and is_patched(model)
    return parts.finished(net, model, x.chunk(PROCESSES)[rank], losses)


def two_by_lightning(name: str, rank: int, folder: str) -> Outcome:
    import pytorch_lightning as lightning

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = parts.loss_of(self.model(batch[0]))
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return parts.optimizer_of(self.model)

    model, x = parts.model_of(name), images(name, parts.BATCH)
    # Lightning's own sampler shuffles; that of torch deals images out in turns, to each process its part of the batch.
    images_in_turns = TensorDataset(x.unflatten(0, (PROCESSES, -1)).transpose(0, 1).flatten(0, 1))
    sampler = DistributedSampler(images_in_turns, PROCESSES, rank, shuffle=False)
    task = Task(model)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=parts.STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, DataLoader(images_in_turns, batch_size=parts.BATCH // PROCESSES, sampler=sampler))
    assert (trainer.world_size, trainer.global_rank) == (PROCESSES, rank)
    assert task.model is model and is_patched(model)
    return parts.finished(model.train(), model, x.chunk(PROCESSES)[rank], task.losses)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str], Outcome]:
    """By trainer and family."""
    folder = tmp_path_factory.mktemp("trainers")
    here = [trainer for trainer, package in TRAINERS.items() if importlib.util.find_spec(package)]
    found = {}
    for trainer in here:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "--module"]
        run = subprocess.run(
            [sys.executable, *start, __name__, trainer, str(folder)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_GUARD,
        )
        assert run.returncode == 0, run.stderr
        loaded = torch.load(folder / trainer)
        found |= {(trainer, name): Outcome(*outcome) for name, outcome in loaded.items()}
    return found


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", SEVEN)
def test_in_two_processes(name, trainer, outcomes):
    pytest.importorskip(TRAINERS[trainer])
    got = outcomes[trainer, name]
    exact, plain = (parts.alone(name, PROCESSES, dtype) for dtype in (torch.float64, torch.float32))
    assert not torch.allclose(exact.losses[0], exact.losses[1], rtol=1e-3)  # the weights do move
    torch.testing.assert_close(got.losses, exact.losses, rtol=1e-4, atol=1e-6)
    parts.assert_as_near(got, plain, exact, trainer)


if __name__ == "__main__":
    trainer, folder = sys.argv[1:]
    declare_torchvision_nms()  # this process has not run the tests' conftest
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {name: tuple(globals()[f"two_by_{trainer}"](name, rank, folder)) for name in SEVEN}
    if rank == 0:
        torch.save(found, f"{folder}/{trainer}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
