"""Packed weights: used again while nothing has changed, never after a change, and gone with the weight."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvit import backends, ops
from fastvit.ops import _packing

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

X = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were packed, in order."""
    packed: list[Tensor] = []
    pack = _packing.pack

    def count(weight: Tensor) -> Tensor:
        packed.append(weight.clone())
        return pack(weight)

    monkeypatch.setattr(_packing, "pack", count)
    monkeypatch.setattr(_packing, "_kept", {})
    return packed


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(24, 32)


def run(layer: nn.Linear, backend: str = "cpp") -> Tensor:
    with torch.no_grad():
        return ops.linear(X.to(layer.weight.dtype), layer.weight, layer.bias, backend=backend)


def assert_fresh(layer: nn.Linear, backend: str = "cpp") -> None:
    """The result is that of the weight as it is now: bit for bit that of a weight never seen before."""
    with torch.no_grad():
        x = X.to(layer.weight.dtype)
        expected = ops.linear(x, layer.weight.clone(), layer.bias.clone(), backend=backend)
    torch.testing.assert_close(run(layer, backend), expected, rtol=0, atol=0)


def test_a_weight_is_packed_once(layer: nn.Linear, packings: list[Tensor]) -> None:
    for _ in range(3):
        run(layer)
    with torch.inference_mode():
        ops.linear(X, layer.weight, layer.bias, backend="cpp")
        for _ in range(2):  # of views of one weight, as of a convolution's, there are many
            ops.mlp(X, layer.weight.view(32, 24), None, layer.weight.t(), None, backend="cpp")
    assert len(packings) == 2  # the weight, and its transpose


def _step(layer: nn.Linear) -> None:
    layer(X).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _load(layer: nn.Linear) -> None:
    layer.load_state_dict(nn.Linear(24, 32).state_dict())


def _assign(layer: nn.Linear) -> None:
    layer.load_state_dict(nn.Linear(24, 32).state_dict(), assign=True)


def _replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(32, 24))


def _replace_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn(32, 24)


def _turn_data(layer: nn.Linear) -> None:
    square = torch.randn(24, 24)
    layer.weight.data, layer.bias.data = square, torch.randn(24)
    run(layer)
    layer.weight.data = square.t()


def _write_data(layer: nn.Linear) -> None:
    layer.weight.data.mul_(2.0)


def _write_numpy(layer: nn.Linear) -> None:
    layer.weight.detach().numpy()[:] = 3.0


def _write_shared(layer: nn.Linear) -> None:
    layer.share_memory()
    run(layer)
    # As another process would: by another tensor on the same memory.
    torch.empty(0).set_(layer.weight.untyped_storage(), 0, (32, 24)).fill_(0.5)


def _lower(layer: nn.Linear) -> None:
    layer.to(torch.bfloat16)


def _raise_again(layer: nn.Linear) -> None:
    layer.to(torch.bfloat16)
    run(layer)
    layer.float()


def _freeze(layer: nn.Linear) -> None:
    layer.requires_grad_(False)
    with torch.no_grad():
        layer.weight.add_(1.0)


CHANGES = (
    _step,
    _load,
    _assign,
    _replace,
    _replace_data,
    _turn_data,
    _write_data,
    _write_numpy,
    _write_shared,
    _lower,
    _raise_again,
    _freeze,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_no_stale_weight_is_used(change: Callable[[nn.Linear], None], layer: nn.Linear) -> None:
    before = run(layer)
    change(layer)
    assert_fresh(layer)
    after = run(layer)
    assert after.shape != before.shape or after.dtype != before.dtype or not torch.equal(after, before)


@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_no_stale_weight_is_used_by_a_library(change: Callable[[nn.Linear], None], layer: nn.Linear, library: str):
    if reasons := backends.describe()["backends"][library]["reasons"]:
        pytest.skip("; ".join(reasons))
    before = run(layer, library)
    with torch.no_grad():  # for another number of rows, then for those again
        ops.linear(X[:30], layer.weight, layer.bias, backend=library)
    assert torch.equal(run(layer, library), before)
    change(layer)
    if layer.weight.dtype == torch.float32:
        assert_fresh(layer, library)
        assert not torch.equal(run(layer, library), before)
    assert len({key[0] for key in _packing._kept}) <= 2  # one packing of a layout


def test_requires_grad_alone_changes_nothing(layer: nn.Linear, packings: list[Tensor]) -> None:
    before = run(layer)
    layer.requires_grad_(False)
    assert torch.equal(run(layer), before)
    assert len(packings) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: _unpickled(layer)], ids=["deepcopy", "pickle"])
def test_copies_have_packings_of_their_own(duplicate: Callable[[nn.Linear], nn.Linear], layer: nn.Linear) -> None:
    run(layer)
    state = dict(layer.state_dict())
    twin = duplicate(layer)
    assert twin.state_dict().keys() == state.keys()
    assert vars(twin).keys() == vars(layer).keys()
    assert torch.equal(run(twin), run(layer))
    with torch.no_grad():
        twin.weight.zero_()
    assert_fresh(twin)
    assert_fresh(layer)


def _unpickled(layer: nn.Linear) -> nn.Linear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_packing_goes_with_its_weight(layer: nn.Linear) -> None:
    run(layer)
    _replace_data(layer)
    run(layer)
    assert len(_packing._kept) == 1  # a replaced .data does not leave one behind
    _replace(layer)
    gc.collect()
    assert not _packing._kept
    run(layer)
    _packing.release_memory()
    assert not _packing._kept
    assert_fresh(layer)


def test_inference_tensors_are_packed_at_each_call(packings: list[Tensor]) -> None:
    with torch.inference_mode():
        weight = torch.randn(32, 24)
        before = ops.linear(X, weight, backend="cpp")
        weight.mul_(2.0)
        assert torch.equal(ops.linear(X, weight, backend="cpp"), 2.0 * before)
    assert not packings


def test_switched_off(layer: nn.Linear, packings: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run(layer)
    monkeypatch.setattr(_packing, "ENABLED", False)
    assert torch.equal(run(layer), kept)
    assert len(packings) == 1
    with pytest.raises(ValueError, match="FASTVIT_PACK: expected '0' or '1', got 'no'"):
        _packing._enabled("no")
    assert [_packing._enabled(value) for value in ("", "0", "1")] == [True, False, True]


def test_training_keeps_no_packing(layer: nn.Linear, packings: list[Tensor]) -> None:
    ops.linear(X, layer.weight, layer.bias, backend="cpp").sum().backward()
    assert not packings


def test_two_threads_at_once(layer: nn.Linear) -> None:
    expected = run(layer)
    for _ in range(20):
        _packing.release_memory()
        start, results = threading.Barrier(4), []

        def work(start=start, results=results) -> None:
            start.wait()
            results.append(run(layer))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected) for result in results)


def test_another_weight_or_instruction_set_is_refused(layer: nn.Linear) -> None:
    run_packed = torch.ops.fastvit.packed_linear
    rest = (False, None, None, 0.0, 0, None, None)
    packed = _packing.packed(layer.weight)
    assert packed is not None
    run_packed(X, layer.weight, None, packed, *rest)
    for wrong in (packed[:-1], packed.double(), torch.zeros_like(packed)):
        with pytest.raises(RuntimeError, match="packed is not what pack_weight makes of this weight"):
            run_packed(X, layer.weight, None, wrong, *rest)
    native = importlib.import_module("fastvit._C")
    if native.cpu_info()["in_use"] != "portable":
        before = native.cpu_info()["in_use"]
        native._set_cpu_capability("portable")
        try:
            with pytest.raises(RuntimeError, match="packed is not what"):
                run_packed(X, layer.weight, None, packed, *rest)
        finally:
            native._set_cpu_capability(before)


def test_a_packing_that_holds_no_values_is_not_kept(layer: nn.Linear) -> None:
    expected = ops.linear(X, layer.weight.detach().clone(), layer.bias.detach().clone(), backend="cpp")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ops.linear(torch.empty(40, 24), layer.weight, layer.bias, backend="cpp")
    assert torch.equal(run(layer), expected)
