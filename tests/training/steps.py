"""Steps of training, the same for a plain model, its patched copy and its copy in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import CLASSES, FAMILIES, images

SEVEN = tuple(name for name in FAMILIES if name != "twins_pcpvt")  # whose blocks are those of cpvt and vit
BATCH = 4


class Training(NamedTuple):
    """Losses by step, and the parameters and running statistics at the end."""

    losses: list[float]
    parameters: Tensor
    statistics: Tensor
    batches_counted: list[int]


def batches(name: str, count: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Four batches, again and again."""
    for step in range(count):
        seed = step % 4
        labels = torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))
        yield images(name, BATCH, seed=seed).to(dtype), labels


def loss_of(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([F.cross_entropy(logits, labels) for logits in heads]).mean()


def train(model: nn.Module, name: str, steps: int, dtype: torch.dtype = torch.float32) -> Training:
    """SGD with momentum: Adam's division makes steps of rounding where a gradient is zero."""
    owner = getattr(model, "_orig_mod", model)
    owner.to(dtype).train()
    optimizer, losses = torch.optim.SGD(owner.parameters(), lr=0.02, momentum=0.9), []
    with torch.random.fork_rng(devices=[]):
        for step, (x, labels) in enumerate(batches(name, steps, dtype)):
            torch.manual_seed(step)  # every model drops the same
            loss = loss_of(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    buffers = dict(owner.named_buffers())
    statistics = [tensor.double().flatten() for key, tensor in buffers.items() if "running" in key]
    return Training(
        losses,
        torch.cat([parameter.detach().double().flatten() for parameter in owner.parameters()]),
        torch.cat(statistics) if statistics else torch.zeros(0, dtype=torch.float64),
        [int(tensor) for key, tensor in buffers.items() if key.endswith("num_batches_tracked")],
    )


def with_dropouts(model: nn.Module, rate: float) -> nn.Module:
    """Every dropout and drop path of the model at that rate."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif hasattr(module, "drop_prob"):
            module.drop_prob = rate
    return model


def copies(model: nn.Module, count: int) -> list[nn.Module]:
    return [copy.deepcopy(model) for _ in range(count)]
