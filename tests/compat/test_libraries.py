"""What the other files here ask of the seven families and timm, asked of the other libraries' models."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastvit.patching import patch, unpatch

MODELS = ("vit_pytorch vit", "vit_pytorch cait", "vit_pytorch cvt", "transformers vit_sdpa", "transformers cvt")
EVERY = (*MODELS, "torchvision")


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _build(which: str) -> tuple[nn.Module, Tensor]:
    """The tiny model that the library's own tests have, plain, and images."""
    library, *name = which.split()
    pytest.importorskip(library, reason=f"{library} is not installed")
    tests = importlib.import_module(f"tests.patching.test_{library}")
    return tests.build(*name), tests.images(*name)


@pytest.mark.parametrize("which", EVERY)
def test_copies_and_other_dtypes(which):
    model, x = _build(which)
    with torch.no_grad():
        before = model(x)
        expected = patch(model)(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(module) for module in clone.modules()] == [type(module) for module in model.modules()]
            torch.testing.assert_close(clone(x), expected)
            assert torch.equal(unpatch(clone)(x), before)
        assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == expected.shape
        torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), before, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x).float().sum().backward()
    gradients = [(parameter.grad, parameter) for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.dtype == parameter.dtype for gradient, parameter in gradients)


@pytest.mark.parametrize("which", EVERY)
def test_compile_and_export(which):
    model, x = _build(which)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(patch(model), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
        exported = torch.export.export(model, (x,))
        assert not [node for node in exported.graph.nodes if "fastvit" in str(node.target)]
        torch.testing.assert_close(exported.module()(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", EVERY)
def test_transforms_of_torch_func(which):
    model, x = _build(which)
    patch(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    loss(parameters, x).backward()
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(per_sample[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)
