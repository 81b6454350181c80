"""Patching changes classes alone: state_dicts, copies, files, dtypes and devices go on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastvit.patching import is_patched, patch, report, unpatch
from fastvit.patching.fusion import Fused
from fastvit.reference.layers import Attention
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.tiny import FAMILIES, build, images

EVERY = (*FAMILIES, "timm_vit", "timm_cait", "timm_twins")


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _pickled_by_the_oldest_protocol(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol=0))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, _pickled, _saved]


def _fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


def _contents(model: nn.Module) -> list[dict[str, object]]:
    """All that every module of a model holds, dictionaries of hooks and the like by value."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_keeps_keys_and_tensors(name):
    model = build(name)
    before = model.state_dict()
    after = patch(model).state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    plain = build(name)
    plain.load_state_dict(after, strict=True)
    model.load_state_dict(build(name).state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    x = images(name)
    with torch.no_grad():
        assert torch.equal(unpatch(model)(x), plain(x))


@pytest.mark.parametrize("name", EVERY)
def test_copies_are_patched_and_can_be_unpatched(name):
    plain, x = build(name), images(name)
    classes = [type(module) for module in plain.modules()]
    with torch.no_grad():
        before = plain(x)
        patch(plain, backend="reference")
        expected = plain(x)
        for function in COPIES:
            clone = function(plain)
            assert [type(module) for module in clone.modules()] == [type(module) for module in plain.modules()]
            assert [row.backend for row in report(clone).rows] == [row.backend for row in report(plain).rows]
            assert torch.equal(clone(x), expected), function
            unpatch(clone)
            assert [type(module) for module in clone.modules()] == classes
            assert torch.equal(clone(x), before)
        assert is_patched(plain)


@pytest.mark.parametrize("name", EVERY)
def test_unpatch_is_bit_identical_and_leaves_no_residue(name):
    model, x = build(name), images(name)
    contents, classes = _contents(model), [type(module) for module in model.modules()]
    expected = model(x)
    patch(model, backend="reference", verify=x)
    model(x).sum().backward()
    model.zero_grad()
    assert _fused_names(model)
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert _contents(model) == contents
    assert all(row.status != "patched" for row in report(model).rows)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", EVERY)
def test_patching_twice_is_patching_once(name):
    model, x = patch(build(name)), images(name)
    classes, contents, rows = [type(module) for module in model.modules()], _contents(model), report(model).rows
    with torch.no_grad():
        once = model(x)
        assert torch.equal(patch(model)(x), once)
    assert [type(module) for module in model.modules()] == classes
    assert _contents(model) == contents
    assert report(model).rows == rows


@pytest.mark.parametrize("name", EVERY)
def test_a_part_of_the_blocks(name):
    model, x = build(name), images(name)
    names = _fused_names(patch(copy.deepcopy(model)))
    chosen = names[::2]
    with torch.no_grad():
        oracle, expected = copy.deepcopy(model).double()(x.double()), model(x)
        patch(model, filter_fn=lambda module, name: name in chosen)
        fused, rows = _fused_names(model), report(model).rows
        assert_as_accurate(model(x), expected, oracle)
    left = [row.name for row in rows if row.reasons == ("filter_fn leaves it out",)]
    assert left == names[1::2]
    # A block of which a part is left out only calls its parts, and stays plain as well.
    empty = {row.name for row in rows if any(reason.endswith("is not fused") for reason in row.reasons)}
    assert fused == [name for name in chosen if name not in empty]
    assert all(any(other.startswith(f"{name}.") for other in left) for name in empty)


@pytest.mark.parametrize("name", EVERY)
def test_other_dtypes_after_patch(name):
    on_pooled_draws(lambda: check_other_dtypes(build(name), torch.randn_like(images(name))))


def check_other_dtypes(plain, x):
    fused = patch(copy.deepcopy(plain))
    with torch.no_grad():
        oracle = copy.deepcopy(plain).double()(x.double())
        torch.testing.assert_close(fused.double()(x.double()), oracle)
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
            expected, got = plain.to(dtype)(x.to(dtype)), fused.to(dtype)(x.to(dtype))
            assert got.dtype == expected.dtype == dtype
            # The weights were rounded on the way: the exact result is that of the rounded ones.
            oracle = copy.deepcopy(plain).double()(x.to(dtype).double())
            assert_as_accurate(got, expected, oracle)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", EVERY)
def test_other_devices_after_patch(name):
    plain, x = build(name), images(name)
    fused = patch(copy.deepcopy(plain))
    with torch.no_grad():
        oracle, at_home = copy.deepcopy(plain).double()(x.double()), fused(x)
        expected, got = plain.cuda()(x.cuda()), fused.cuda()(x.cuda())
        assert_as_accurate(got, expected, oracle)
        assert torch.equal(fused.cpu()(x), at_home)


def _to_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize("first", ["patch", "meta"])
@pytest.mark.parametrize("name", EVERY)
def test_meta_device_then_to_empty_and_load(name, first):
    plain, x = build(name), images(name)
    state = plain.state_dict()
    order = (patch, _to_meta) if first == "patch" else (_to_meta, patch)
    model = order[1](order[0](copy.deepcopy(plain)))
    assert _fused_names(model) == _fused_names(patch(copy.deepcopy(plain)))
    with torch.no_grad():
        assert model(x.to("meta")).shape == plain(x).shape
        model.to_empty(device="cpu").load_state_dict(state)
        torch.testing.assert_close(model(x), patch(copy.deepcopy(plain))(x))


@pytest.mark.parametrize("name", EVERY)
def test_channels_last(name):
    plain, x = build(name), images(name)
    with torch.no_grad():
        oracle, expected = copy.deepcopy(plain).double()(x.double()), plain(x)
        fused = patch(plain)
        assert_as_accurate(fused(x.to(memory_format=torch.channels_last)), expected, oracle)
        fused.to(memory_format=torch.channels_last)
        assert_as_accurate(fused(x.to(memory_format=torch.channels_last)), expected, oracle)
        assert_as_accurate(fused(x), expected, oracle)


def test_blocks_shared_between_layers_stay_shared():
    model, x = build("vit"), images("vit")
    model.blocks[1].attn = model.blocks[0].attn
    expected = model(x)
    patch(model, verify=x)
    assert model.blocks[1].attn is model.blocks[0].attn
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("name", "tied"), [("vit", "qkv"), ("cait", "proj_l"), ("deepvit", "reatten_matrix")])
def test_weights_tied_between_layers_stay_tied(name, tied):
    model, x = build(name), images(name)
    first, second = (getattr(block.attn, tied) for block in model.blocks)
    second.weight = first.weight
    model(x).sum().backward()
    expected = first.weight.grad.clone()
    model.zero_grad()
    clone = _saved(patch(model))
    for fused in (model, clone):
        first, second = (getattr(block.attn, tied) for block in fused.blocks)
        assert first.weight is second.weight
        fused(x).sum().backward()
        torch.testing.assert_close(first.weight.grad, expected)


class _Scaled(Attention):
    """A user's subclass with a constructor and state of its own."""

    def __init__(self, dim: int, num_heads: int, factor: float):
        super().__init__(dim, num_heads)
        self.factor = factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.factor


def test_a_block_on_its_own_and_of_a_users_class():
    block = patch(_Scaled(8, 2, 3.0), strict=True)
    x = torch.randn(1, 4, 8)
    for function in (*COPIES, _pickled_by_the_oldest_protocol):
        clone = function(block)
        assert isinstance(clone, _Scaled)
        assert clone.factor == 3.0
        assert torch.equal(clone(x), block(x))
        assert type(unpatch(clone)) is _Scaled
    assert isinstance(block, Attention)


class _OwnReduce(Attention):
    def __reduce_ex__(self, protocol):
        return _OwnReduce, (8, 2), self.state_dict()

    def __setstate__(self, state):
        self.load_state_dict(state)


def test_a_class_that_pickles_in_its_own_way_still_does():
    block = patch(_OwnReduce(8, 2))
    clone = _pickled(block)
    assert isinstance(clone, _OwnReduce)
    x = torch.randn(1, 4, 8)
    torch.testing.assert_close(clone(x), block(x))


def test_a_class_put_over_a_fused_one_is_not_dropped():
    model = patch(build("vit"))
    attention = model.blocks[1].attn
    attention.__class__ = type("FSDPFusedAttention", (type(attention),), {})  # as fully_shard does
    before = [type(module) for module in model.modules()]
    for function in (unpatch, patch):
        with pytest.raises(RuntimeError, match=r"since patch.*: blocks\.1\.attn \(FSDPFusedAttention\)"):
            function(model)
        assert [type(module) for module in model.modules()] == before
    attention.__class__ = type(attention).__bases__[0]
    assert not is_patched(unpatch(model))


def test_a_class_put_over_a_plain_one_is_fused_and_given_back():
    model = build("vit")
    attention = model.blocks[1].attn
    sharded = type("FSDPAttention", (Attention,), {})
    attention.__class__ = sharded
    assert isinstance(patch(model).blocks[1].attn, Fused)
    assert type(unpatch(model).blocks[1].attn) is sharded
