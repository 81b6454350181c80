"""Training on parts of a batch, in one process or in several, and how near one comes to the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from fastvit import accuracy
from fastvit.patching import patch
from tests.tiny import build, images

STEPS = 3
BATCH = 8


class Outcome(NamedTuple):
    """Of a training.

    Attributes:
        losses: of each step, then without gradients in training mode, then in evaluation mode.
        parameters: of all of the model, one behind the other.
        statistics: the running ones of the first process.
    """

    losses: Tensor
    parameters: Tensor
    statistics: Tensor


def loss_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A mean over images, so that those of parts of a batch can be averaged."""
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([tensor.square().mean() for tensor in outputs]).sum()


def model_of(name: str, patched: bool = True) -> nn.Module:
    """In training, from the same weights in every process."""
    torch.manual_seed(0)
    model = build(name).train()
    return patch(model) if patched else model


def outcome_of(model: nn.Module, losses: list[Tensor]) -> Outcome:
    full = (getattr(each, "full_tensor", lambda each=each: each)() for each in model.parameters())
    statistics = [buffer.double().flatten() for name, buffer in model.named_buffers() if "running" in name]
    return Outcome(
        torch.stack(losses).double(),
        torch.cat([each.detach().double().flatten() for each in full]),
        torch.cat(statistics) if statistics else torch.zeros(0, dtype=torch.float64),
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def alone(name: str, parts: int, dtype: torch.dtype) -> Outcome:
    """The plain model in one process; a BatchNorm sees so many parts of the batch apart, and tracks the first."""
    model, x = model_of(name, patched=False).to(dtype), images(name, BATCH).to(dtype)
    optimizer, losses = optimizer_of(model), []

    def over_parts(learn: bool) -> Tensor:
        total, kept = torch.zeros((), dtype=dtype), {}
        for number, part in enumerate(x.chunk(parts)):
            loss = loss_of(model(part)) / parts
            if learn:
                loss.backward()
            total += loss.detach()
            if number == 0:
                kept = {key: buffer.clone() for key, buffer in model.named_buffers()}
        for key, buffer in model.named_buffers():
            buffer.copy_(kept[key])
        return total

    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(over_parts(True))
        optimizer.step()
    with torch.no_grad():
        losses.append(over_parts(False))
        model.eval()
        losses.append(over_parts(False))
    return outcome_of(model, losses)


def finished(
    net: nn.Module, model: nn.Module, part: Tensor, losses: list[Tensor], group: distributed.ProcessGroup | None = None
) -> Outcome:
    """Of a training whose steps had these losses on this process's part of a batch; ``net`` wraps ``model``."""
    with torch.no_grad():
        losses.append(loss_of(net(part)))
        for buffer in model.buffers():  # which DDP gives to all at the next step
            distributed.broadcast(buffer, group=group, group_src=0)
        net.eval()
        losses.append(loss_of(net(part)))
    outcome = outcome_of(model, losses)
    distributed.all_reduce(outcome.losses.div_(distributed.get_world_size(group)), group=group)
    return outcome


def assert_as_near(got: Outcome, plain: Outcome, exact: Outcome, way: str) -> None:
    """All of the weights, and of the statistics, to the accuracy rule; losses are those of the same run."""
    for what in ("parameters", "statistics"):
        right = getattr(exact, what)
        strayed = [float((getattr(each, what) - right).norm()) for each in (got, plain)]
        last_places = accuracy.ULPS * torch.finfo(torch.float32).eps * float(right.norm())
        assert strayed[0] <= accuracy.FACTOR * strayed[1] + last_places, (way, what, strayed)
