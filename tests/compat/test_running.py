"""Patched models run under everything PyTorch runs a module under, with the plain model's results and side effects."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import replicate
from torch.utils.data import DataLoader, Dataset

from fastvit.patching import patch, unpatch
from fastvit.patching.fusion import Fused
from tests.helpers import HANG_GUARD, assert_as_accurate
from tests.tiny import FAMILIES, build, images

TIMM = ("timm_vit", "timm_cait", "timm_twins")
EVERY = (*FAMILIES, *TIMM)


def _total(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The sum of squares of an output; DeiT's distilled models give a pair in training."""
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([tensor.float().square().sum() for tensor in outputs]).sum()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Without those of biases in front of a BatchNorm: in training they are zero, but for rounding."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad for name, grad in gradients.items() if not name.endswith("reatten_matrix.bias")}


def _called(model: nn.Module, x: Tensor, hooked: set[str]) -> list[str]:
    """What hooks of every kind on the modules of these names see in a forward and a backward, in order."""
    calls: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: calls.append(what)

    for name, module in model.named_modules():
        if name in hooked:
            module.register_forward_pre_hook(note(f"before {name}"))
            module.register_forward_hook(note(f"behind {name}"))
            module.register_full_backward_pre_hook(note(f"back into {name}"))
            module.register_full_backward_hook(note(f"back out of {name}"))
    _total(model(x.clone().requires_grad_())).backward()
    return calls


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, "blocks") for name in EVERY),
        # timm's Twins adds in place to what backward hooks inside its PEG have made a view.
        *((name, "everything") for name in EVERY if name != "timm_twins"),
    ],
)
def test_hooks_are_called_as_before(name, which):
    plain, x = build(name), images(name)
    fused = patch(copy.deepcopy(plain))
    blocks = {name for name, module in fused.named_modules() if isinstance(module, Fused)}
    hooked = blocks if which == "blocks" else {name for name, _ in fused.named_modules()}
    expected = _called(plain, x, hooked)
    assert blocks <= {call.removeprefix("back out of ") for call in expected}
    assert _called(fused, x, hooked) == expected
    torch.testing.assert_close(_gradients(fused), _gradients(plain), rtol=1e-3, atol=1e-4)
    unpatch(fused)
    assert all(len(module._forward_hooks) == (name in hooked) for name, module in fused.named_modules())


@pytest.mark.parametrize("name", EVERY)
def test_a_forward_hook_may_change_the_result(name):
    model, x = patch(build(name)), images(name)
    block = next(module for module in model.modules() if isinstance(module, Fused))

    def doubled(module, args, output):
        return output * 2 if isinstance(output, Tensor) else (output[0] * 2, *output[1:])

    with torch.no_grad():
        before = model(x)
        handle = block.register_forward_hook(doubled)
        assert not torch.allclose(model(x), before)
        changed = model(x)
        torch.testing.assert_close(unpatch(model)(x), changed)
        handle.remove()
        assert torch.equal(patch(model)(x), before)


@pytest.mark.parametrize("name", EVERY)
def test_switching_between_train_and_eval(name):
    plain, x = build(name), images(name)
    fused = patch(copy.deepcopy(plain))
    before = {key: buffer.clone() for key, buffer in plain.named_buffers()}
    for model in (plain, fused):
        model.eval()(x)
        model.train()
        _total(model(x)).backward()
        model.eval()
    torch.testing.assert_close(_gradients(fused), _gradients(plain), rtol=1e-3, atol=1e-4)
    after = dict(fused.named_buffers())
    torch.testing.assert_close(after, dict(plain.named_buffers()))
    assert all(not torch.equal(after[key], before[key]) for key in before if "running" in key)
    with torch.no_grad():
        oracle = copy.deepcopy(plain).double()(x.double())
        plain.load_state_dict(fused.state_dict())
        assert_as_accurate(fused(x), plain(x), oracle)


@pytest.mark.parametrize("name", EVERY)
def test_frozen_parts(name):
    plain, x = build(name), images(name)
    fused = patch(copy.deepcopy(plain))
    names = {name for name, module in fused.named_modules() if isinstance(module, Fused)}
    for model in (plain, fused):
        for name, module in model.named_modules():
            if name in names:
                module.requires_grad_(False)
        _total(model(x)).backward()
    assert 0 < len(_gradients(fused)) < len(list(fused.parameters()))
    torch.testing.assert_close(_gradients(fused), _gradients(plain), rtol=1e-3, atol=1e-4)
    fused.requires_grad_(False)
    assert not _total(fused(x)).requires_grad
    x.requires_grad_()
    _total(fused(x)).backward()  # through frozen weights to the image
    got, x.grad = x.grad, None
    _total(unpatch(fused)(x)).backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_autocast(name, device):
    plain, x = build(name), images(name)
    with torch.no_grad():
        oracle = copy.deepcopy(plain).double()(x.double())
    plain, x = plain.to(device), x.to(device)
    fused = patch(copy.deepcopy(plain))
    with torch.autocast(device, torch.bfloat16):
        with torch.no_grad():
            expected, got = plain(x), fused(x)
        assert got.dtype == expected.dtype
        assert_as_accurate(got, expected, oracle)
        _total(fused.train()(x)).backward()
    assert all(gradient.dtype == torch.float32 for gradient in _gradients(fused).values())
    assert all(gradient.isfinite().all() for gradient in _gradients(fused).values())


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode_leaves_nothing_behind(name):
    model, x = patch(build(name)), images(name)
    with torch.inference_mode():
        got = model(x)
    with torch.no_grad():
        expected = model(x)
    assert got.is_inference() and not expected.is_inference()
    assert torch.equal(got, expected)
    _total(model(x)).backward()
    assert _gradients(model)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "timm_twins"])  # timm has none for Twins
def test_gradient_checkpointing(name):
    model, x = patch(build(name)).train(), images(name)
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(True)
    for each in (model, again):
        _total(each(x)).backward()
    assert _gradients(model).keys() == _gradients(again).keys()
    torch.testing.assert_close(_gradients(again), _gradients(model))
    torch.testing.assert_close(dict(again.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("name", EVERY)
def test_transforms_of_torch_func(name):
    model, x = patch(build(name)), images(name)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return _total(torch.func.functional_call(model, parameters, (x,)))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    loss(parameters, x).backward()
    for key, gradient in _gradients(model).items():
        torch.testing.assert_close(per_sample[key].sum(0), gradient, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        doubled = {key: value * 2 for key, value in parameters.items()}
        expected = copy.deepcopy(model)
        expected.load_state_dict(doubled, strict=False)
        torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), expected(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_mode_differentiation(name):
    """Of the reference models: torch's own attention, which timm calls, has no forward mode on the CPU."""
    model, x = build(name).requires_grad_(False), images(name)
    direction = torch.randn_like(x)

    def derivative(model: nn.Module) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent

    expected = derivative(model)
    torch.testing.assert_close(derivative(patch(model)), expected)
    _, transformed = torch.func.jvp(model, (x,), (direction,))
    torch.testing.assert_close(transformed, expected)


@pytest.mark.parametrize("name", EVERY)
def test_threads_in_inference(name):
    model = patch(build(name))
    batches = [images(name, seed=seed) for seed in range(6)]

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    expected = [run(x) for x in batches]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(run, batches))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class _Features(Dataset):
    """Runs a model where the data are loaded."""

    def __init__(self, model: nn.Module, batches: list[Tensor]):
        self.model = model
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(self.batches[index])


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")  # Python 3.12 says so of any fork here
def test_forked_workers_run_models_that_the_parent_has_run():
    models = nn.ModuleList([patch(build(name)) for name in FAMILIES])
    batches = [images(name) for name in FAMILIES]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # so that there is a pool of threads that the fork does not take along
    try:
        with torch.no_grad():
            expected = [model(x) for model, x in zip(models, batches, strict=True)]

        def first_of(index: int) -> Dataset:
            return _Features(models[index], batches[index : index + 1])

        everything = torch.utils.data.ConcatDataset([first_of(index) for index in range(len(models))])
        loader = DataLoader(
            everything, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=HANG_GUARD
        )
        torch.testing.assert_close(list(loader), expected)
        with torch.no_grad():
            torch.testing.assert_close([model(x) for model, x in zip(models, batches, strict=True)], expected)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def two_pretended_devices(monkeypatch) -> None:
    """Lets ``replicate`` copy to the CPU what it would broadcast to GPUs; all else is its own doing."""
    module = importlib.import_module("torch.nn.parallel.replicate")  # the name is that of its function too
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices],
    )


@pytest.mark.usefixtures("two_pretended_devices")
@pytest.mark.parametrize("name", EVERY)
def test_replicas_of_data_parallel(name):
    model, x = patch(build(name)), images(name, batch=4)
    with torch.no_grad():
        expected = model(x)
        replicas = replicate(model, [0, 1], detach=True)
        assert [type(module) for module in replicas[1].modules()] == [type(module) for module in model.modules()]
        got = torch.cat([replica(part) for replica, part in zip(replicas, x.chunk(2), strict=True)])
        torch.testing.assert_close(got, expected)
    _total(model(x)).backward()
    alone = _gradients(model)
    model.zero_grad(set_to_none=True)
    replicas = replicate(model, [0, 1])
    torch.stack([_total(replica(part)) for replica, part in zip(replicas, x.chunk(2), strict=True)]).sum().backward()
    torch.testing.assert_close(_gradients(model), alone, rtol=1e-3, atol=1e-4)
