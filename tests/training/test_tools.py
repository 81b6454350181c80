"""What people train with: hooks on gradients, anomaly mode, torch.compile."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastvit import backends, ops
from fastvit.patching import patch
from tests.ops.calls import CALLS
from tests.tiny import build
from tests.training.steps import SEVEN, batches, copies, loss_of, train

NEEDS_CPP = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


@pytest.fixture
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    x, labels = next(batches(name, 1, torch.float32))
    loss_of(model(x), labels).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", SEVEN)
def test_hooks_on_the_gradients_of_parameters(name):
    """Each is called once, with the whole gradient, and what it gives is kept."""
    model = patch(build(name)).train()
    hooked, before, after = copy.deepcopy(model), Counter(), Counter()
    for key, parameter in hooked.named_parameters():
        parameter.register_hook(lambda gradient, key=key: before.update([key]) or gradient * 2)
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: after.update([key]))
    expected, got = gradients(model, name), gradients(hooked, name)
    assert before == after == Counter(expected.keys())
    assert all(torch.equal(got[key], 2 * gradient) for key, gradient in expected.items())


@pytest.mark.parametrize("name", SEVEN)
def test_hooks_on_the_gradients_of_tokens(name):
    """A hook on the tensor that one block gives the next sees and changes what the blocks before it get."""
    found = []
    for model in (build(name).train(), patch(build(name)).train()):
        model.load_state_dict(found[0][0] if found else model.state_dict())
        state = copy.deepcopy(model.state_dict())
        stage = model.stage1 if name == "cvt" else model
        seen: list[Tensor] = []

        def change(gradient: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(gradient)
            return gradient * 3

        def watch(module, inputs, output, change=change) -> None:
            output.register_hook(change)

        stage.blocks[0].register_forward_hook(watch)
        found.append((state, seen, gradients(model, name)))
    (_, expected, plain), (_, got, fused) = found
    assert len(got) == len(expected) == 1
    torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", SEVEN)
def test_anomaly_mode(name):
    one, other = copies(patch(build(name)).train(), 2)
    expected = gradients(one, name)
    with torch.autograd.detect_anomaly(check_nan=True):
        got = gradients(other, name)
    assert all(torch.equal(got[key], gradient) for key, gradient in expected.items())


@NEEDS_CPP
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
@pytest.mark.parametrize("op", CALLS)
def test_anomaly_mode_names_an_operator(op):
    def differentiable(path: pytree.KeyPath, leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and "running" not in pytree.keystr(path):
            leaf.requires_grad_()
        return leaf

    arguments = pytree.tree_map_with_path(differentiable, CALLS[op](False))
    with torch.autograd.detect_anomaly(check_nan=True):
        outputs = [output for output in pytree.tree_leaves(getattr(ops, op)(**arguments)) if output.requires_grad]
        for output in outputs:
            output.register_hook(lambda gradient: gradient * torch.nan)
        loss = torch.stack([output.sum() for output in outputs]).sum()
        with pytest.raises(RuntimeError, match=r"Function '\w+' returned nan values in its \d+th output"):
            loss.backward()


@pytest.mark.parametrize("name", SEVEN)
def test_compiled_training(name, nothing_compiled_yet):
    """Four steps in one graph, with gradients and statistics, as they are without a compiler."""
    one, other = copies(patch(build(name)), 2)
    expected = train(one, name, 4)
    got = train(torch.compile(other, fullgraph=True, backend="aot_eager"), name, 4)
    for each, right in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(each), torch.as_tensor(right), rtol=1e-4, atol=1e-5)


def test_training_compiled_by_inductor(nothing_compiled_yet):
    """DeepViT, whose statistics the operator updates; one block, since Inductor takes its time."""
    one, other = copies(patch(build("deepvit", depth=1)), 2)
    expected = train(one, "deepvit", 3)
    got = train(torch.compile(other, fullgraph=True), "deepvit", 3)
    for each, right in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(each), torch.as_tensor(right), rtol=1e-4, atol=1e-5)
