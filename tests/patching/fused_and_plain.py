"""What every library's models are held to: as accurate patched as plain, and exactly as before once unpatched."""

from __future__ import annotations

import copy

import torch
from helpers import assert_as_accurate
from test_parity import joined, training_step
from torch import Tensor, nn

from fastvit.patching import patch, unpatch


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


def check_inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """The model in eval mode, plain, patched and unpatched again; ``state_dict`` keeps its keys and tensors."""
    plain, x = model.to(dtype).eval(), x.to(dtype)
    state = plain.state_dict()
    with torch.no_grad():
        oracle = exactly(plain)(x.double())
        expected = plain(x)
        got = patch(plain)(x)
        after = plain.state_dict()
        assert list(after) == list(state)
        assert all(after[key].data_ptr() == tensor.data_ptr() for key, tensor in state.items())
        assert_as_accurate(got, expected, oracle)
        assert torch.equal(unpatch(plain)(x), expected)


def check_training(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Outputs, gradients and running statistics of a training step."""
    plain, x = model.to(dtype).train(), x.to(dtype)
    fused = patch(copy.deepcopy(plain))
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
