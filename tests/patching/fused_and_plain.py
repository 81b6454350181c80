"""What every library's models are held to: as accurate patched as plain, and exactly as before once unpatched."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.patching import patch, unpatch
from tests.helpers import assert_as_accurate


class Logits(nn.Module):
    """A transformers model that takes a tensor and gives one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def exactly(model: nn.Module) -> nn.Module:
    """A float64 copy, with transformers' sdpa attention: the eager one always takes its softmax in float32."""
    double = copy.deepcopy(model).double()
    if isinstance(double, Logits) and hasattr(double.model, "set_attn_implementation"):
        for module in double.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "sdpa"
    return double


class Step(NamedTuple):
    """Outputs of a training step, and every gradient and running statistic behind it."""

    outputs: tuple[Tensor, ...]
    state: dict[str, Tensor]


def training_step(model: nn.Module, x: Tensor) -> Step:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every model drops the same
        outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = torch.linspace(-1, 1, outputs[0].numel(), dtype=x.dtype).view_as(outputs[0])
    torch.stack([(output * weights).sum() for output in outputs]).sum().backward()
    state = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Step(outputs, state | {name: buffer.clone() for name, buffer in model.named_buffers()})


def joined(state: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """All tensors in one, each divided by its exact size, so that the smallest counts as the largest does.

    One error budget for the model: of a single small tensor the largest error is too much a matter of luck. Gradients
    that are zero but for rounding (the bias of keys) have no digits to compare.
    """
    sizes = {name: tensor.double().square().mean().sqrt() for name, tensor in exact.items()}
    least = 1e-9 * torch.stack(list(sizes.values())).median()
    return torch.cat([(state[name].double() / size).flatten() for name, size in sizes.items() if size > least])


def check_inference(model: nn.Module, x: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """The model in eval mode, plain, patched with ``options`` and unpatched; the state dict keeps its tensors."""
    plain, x = model.to(dtype).eval(), x.to(dtype)
    state = plain.state_dict()
    with torch.no_grad():
        oracle = exactly(plain)(x.double())
        expected = plain(x)
        got = patch(plain, **options)(x)
        after = plain.state_dict()
        assert list(after) == list(state)
        assert all(after[key].data_ptr() == tensor.data_ptr() for key, tensor in state.items())
        assert_as_accurate(got, expected, oracle)
        assert torch.equal(unpatch(plain)(x), expected)


def check_training(model: nn.Module, x: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """Outputs, gradients and running statistics of a training step."""
    plain, x = model.to(dtype).train(), x.to(dtype)
    fused = patch(copy.deepcopy(plain), **options)
    exact = training_step(exactly(plain), x.double())
    expected = training_step(plain, x)
    got = training_step(fused, x)
    for outputs in zip(got.outputs, expected.outputs, exact.outputs, strict=True):
        assert_as_accurate(*outputs)
    assert got.state.keys() == expected.state.keys() == exact.state.keys()
    assert_as_accurate(
        joined(got.state, exact.state).to(dtype),
        joined(expected.state, exact.state).to(dtype),
        joined(exact.state, exact.state),
    )
