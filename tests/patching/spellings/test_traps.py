"""What could see that a map is deferred does not: mutation, aliases, modes, gradients, tracers, hooks, other code."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastvit import autotune
from fastvit.patching import deferral, explain, is_patched, patch, report, unpatch
from fastvit.patching.deferral import Recognised, Undecided
from fastvit.recognise.deferred import Deferring
from tests.helpers import assert_as_accurate
from tests.patching.spellings.calls import gradients, in_float64, operators_in
from tests.patching.spellings.modules import CLASS, MASKED, SPELLINGS, Heads, Operators


def draw() -> torch.Tensor:
    return torch.randn(2, 9, 24)


def recognised(module: nn.Module, x: torch.Tensor | None = None) -> nn.Module:
    patch(module.eval(), example=draw() if x is None else x)
    assert isinstance(module, Recognised)
    return module


def deferred(code, *args):
    """What code gives with maps deferred, and how many chains an operator took."""
    mode = Deferring("auto")
    with mode:
        out = code(*args)
    return mode.finish(out), mode


def qkv(requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(2, 4, 9, 6, requires_grad=requires_grad) for _ in range(3)]


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)


# --- Mutation and aliases -------------------------------------------------------------------------------------------


def scaled_q(q, k, v):
    attn = q @ k.mT
    q.mul_(3.0)
    return attn.softmax(-1) @ v


def data_of_k(q, k, v):
    attn = (q @ k.mT).softmax(-1)
    k.data.zero_()
    return attn @ v


def alias_of_bias(q, k, v):
    bias = torch.zeros(9, 9)
    alias = bias.view(-1)
    attn = q @ k.mT + bias
    alias.fill_(1.0)
    alias[:5] = 7.0
    return attn.softmax(-1) @ v


def out_into_mask(q, k, v):
    mask = torch.zeros(9, 9, dtype=torch.bool)
    attn = (q @ k.mT).masked_fill(mask, -torch.inf)
    torch.logical_not(torch.eye(9, dtype=torch.bool), out=mask)
    return attn.softmax(-1) @ v


def set_item(q, k, v):
    scale = torch.tensor([2.0])
    attn = (q @ k.mT) * scale
    scale[0] = 5.0
    return attn.softmax(-1) @ v


def inplace_argument(q, k, v):
    attn = (q @ k.mT).softmax(-1)
    F.relu(q, inplace=True)
    F.relu(k, True)
    return attn @ v


def through_numpy(q, k, v):
    attn = (q @ k.mT).softmax(-1)
    q.numpy()[...] = 0.0
    return attn @ v


def foreach(q, k, v):
    attn = (q @ k.mT).softmax(-1)
    torch._foreach_mul_([q, k], 2.0)
    return attn @ v


def map_seen_through_a_view(q, k, v):
    attn = q @ k.mT
    view = attn.view(8, 9, 9)
    attn.mul_(2.0)
    return view.softmax(-1) @ v.reshape(8, 9, 6)


def view_changed(q, k, v):
    attn = q @ k.mT
    attn.transpose(-2, -1).add_(torch.arange(9.0))
    return attn.softmax(-1) @ v


def child_made_before(q, k, v):
    attn = q @ k.mT
    weights = attn.softmax(-1)
    attn.mul_(5.0)
    return weights @ v + attn.softmax(-1) @ v


def item_of_the_map(q, k, v):
    attn = q @ k.mT
    weights = attn.softmax(-1)
    attn[..., 0] = -torch.inf
    return attn.softmax(-1) @ v + weights @ v


def in_place_twice(q, k, v):
    attn = q @ k.mT
    same = attn
    attn *= 2.0
    same += torch.ones(9)
    return attn.softmax(-1) @ v


MUTATIONS = (
    scaled_q,
    data_of_k,
    alias_of_bias,
    out_into_mask,
    set_item,
    inplace_argument,
    through_numpy,
    foreach,
    map_seen_through_a_view,
    view_changed,
    child_made_before,
    item_of_the_map,
)


@pytest.mark.parametrize("code", MUTATIONS, ids=lambda code: code.__name__)
def test_a_mutation_computes_first(code):
    tensors = qkv()
    with torch.no_grad():
        expected = code(*(t.clone() for t in tensors))
        got, _ = deferred(code, *tensors)
    assert_same(got, expected)


def test_a_map_changed_in_place_by_a_step_stays_deferred():
    tensors = qkv()
    got, mode = deferred(in_place_twice, *tensors)
    assert mode.fused == 1
    assert_as_accurate(got, in_place_twice(*tensors), in_place_twice(*(t.double() for t in tensors)))


def test_a_mutation_of_something_else_leaves_the_chain_alone():
    def code(q, k, v):
        attn = (q @ k.mT).softmax(-1)
        torch.zeros(3).add_(1.0)
        return attn @ v

    assert deferred(code, *qkv())[1].fused == 1


# --- Maps that are kept ---------------------------------------------------------------------------------------------


class Keeps(Heads):
    """Returns its map, or stores it, where asked."""

    returns = stores = False

    def forward(self, x, with_map=False):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.mT * self.scale).softmax(-1)
        if self.__dict__.get("storing"):
            self.map = attn
        out = (attn @ v).transpose(1, 2).reshape(b, n, c)
        return (out, attn) if with_map else out


def test_a_map_returned_or_stored_is_the_plain_one():
    module, x = recognised(Keeps()), draw()
    with torch.no_grad():
        expected_out, expected_map = Keeps.forward(module, x, True)
        out, map_ = module(x, with_map=True)
        assert type(map_) is torch.Tensor
        assert_same(map_, expected_map)
        assert_as_accurate(out, expected_out, Keeps.forward(in_float64(module), x.double()))
        module.storing = True
        module(x)
        assert_same(module.map * 2, expected_map * 2)
        assert_same(torch.stack([module.map, copy.deepcopy(module.map)])[1], expected_map)
        assert_same(pickle.loads(pickle.dumps(module.map)), expected_map)
        assert (module.map.numpy() == expected_map.numpy()).all()


@pytest.mark.parametrize("way", ["returned", "stored", "hooked", "retained"])
def test_the_gradient_of_a_map_is_the_plain_one(way):
    class Asked(Keeps):
        def forward(self, x, with_map=False):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
            attn = (q @ k.mT * self.scale).softmax(-1)
            if way == "stored":
                self.maps = [attn]
            if way == "hooked" and attn.requires_grad:
                attn.register_hook(self.__dict__.setdefault("seen", []).append)
            if way == "retained" and attn.requires_grad:
                attn.retain_grad()
                self.maps = [attn]
            out = (attn @ v).transpose(1, 2).reshape(b, n, c)
            return (out, attn) if way == "returned" else out

    module, x = recognised(Asked()), draw()

    def gradient(forward):
        out = forward(x)
        out, map_ = out if way == "returned" else (out, None)
        if way in ("returned", "stored"):
            return torch.autograd.grad(out.square().sum(), module.maps[0] if map_ is None else map_)[0]
        out.square().sum().backward()
        return module.seen[-1] if way == "hooked" else module.maps[0].grad

    expected = gradient(lambda x: Asked.forward(module, x))
    for _ in range(3):
        assert_same(gradient(module), expected)


# --- Metadata and modes at each operation ---------------------------------------------------------------------------


def test_what_a_map_says_of_itself_is_what_a_plain_one_says():
    def code(q, k, v):
        attn = q @ k.mT
        turned = attn.permute(0, 2, 3, 1)
        told = [
            (m.shape, m.size(-1), m.dtype, m.device, m.dim(), m.numel(), m.requires_grad, m.ndim, len(m))
            for m in (attn, turned, attn.double(), attn.softmax(-1))
        ]
        return [*told, (turned.stride(), turned.is_contiguous(), attn.stride(), attn.grad_fn is None, attn.is_leaf)]

    for requires_grad in (False, True):
        tensors = qkv(requires_grad)
        assert deferred(code, *tensors)[0] == code(*tensors)
        with torch.no_grad():
            assert deferred(code, *tensors)[0] == code(*tensors)


def test_gradient_mode_of_each_operation():
    def detached(q, k, v):
        with torch.no_grad():
            attn = (q @ k.mT).softmax(-1)
        return attn @ v

    def half_detached(q, k, v):
        attn = q @ k.mT
        with torch.no_grad():
            weights = attn.softmax(-1)
        return weights @ v

    for code in (detached, half_detached):
        results = []
        for forward in (code, lambda *tensors, code=code: deferred(code, *tensors)[0]):
            torch.manual_seed(0)
            tensors = qkv(True)
            forward(*tensors).square().sum().backward()
            results.append([tensor.grad for tensor in tensors])
        assert results[0][0] is results[1][0] is None
        assert_same(results[1][2], results[0][2])


def test_autocast_of_each_operation():
    def inside(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            attn = q @ k.mT * 0.4
        return attn.softmax(-1) @ v.to(attn.dtype)

    tensors = qkv()
    got, mode = deferred(inside, *tensors)
    assert mode.fused == 0
    assert_same(got, inside(*tensors))

    def around(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return (q @ k.mT * 0.4).softmax(-1) @ v

    got, mode = deferred(around, *tensors)
    assert mode.fused == 1
    assert got.dtype == torch.bfloat16
    assert_as_accurate(
        got, around(*tensors), ((tensors[0] @ tensors[1].mT).double() * 0.4).softmax(-1) @ tensors[2].double()
    )


def test_inference_mode():
    module, x = recognised(Operators()), draw()
    with torch.inference_mode():
        got, ran = operators_in(lambda: module(x))
    assert ran == [MASKED]
    assert got.is_inference()


def test_an_illegal_shape_raises_torch_s_own_error_where_it_stands():
    def product(q, k, v):
        return q @ k

    def sum_(q, k, v):
        return (q @ k.mT + torch.zeros(5)).softmax(-1) @ v

    def axis(q, k, v):
        return (q @ k.mT).softmax(7) @ v

    def values(q, k, v):
        return (q @ k.mT).softmax(-1) @ v[:, :, 1:]

    def argument(q, k, v):
        return (q @ k.mT).softmax(along=1) @ v

    for code in (product, sum_, axis, values, argument):
        with pytest.raises(Exception) as plain:
            code(*qkv())
        with pytest.raises(type(plain.value)) as got:
            deferred(code, *qkv())
        assert str(got.value) == str(plain.value)
        assert any(entry.name == code.__name__ for entry in got.traceback)


# --- Code that torch does not let us see ----------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_an_autograd_function_takes_the_map_and_its_gradient():
    def code(q, k, v):
        return Doubled.apply((q @ k.mT * 0.4).softmax(-1)) @ v

    results = []
    for forward in (code, lambda *tensors: deferred(code, *tensors)[0]):
        torch.manual_seed(0)
        tensors = [tensor.detach().double().requires_grad_() for tensor in qkv()]
        out = forward(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        twice = torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)
        results.append([out, *grads, *twice])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_map_that_outlives_the_mode_is_computed_as_it_was_recorded():
    held = []

    def code(q, k, v):
        held.append((q @ k.mT).softmax(-1))
        raise ZeroDivisionError

    q, k, v = qkv(True)
    with pytest.raises(ZeroDivisionError):
        deferred(code, q, k, v)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        shifted = held[0] + 0
    assert shifted.dtype == torch.float32
    assert held[0].grad_fn is not None
    assert_same(held[0].detach(), (q @ k.mT).softmax(-1).detach())


# --- Who else wants to see every operation --------------------------------------------------------------------------


class Logging(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Logging, Seeing])
def test_somebody_s_mode_sees_the_plain_operations(mode):
    module, x = recognised(Operators()), draw()
    with torch.no_grad(), mode():
        got, ran = operators_in(lambda: module(x))
    assert ran == []
    assert_same(got, Operators.forward(module, x).detach())


def test_a_default_device_is_no_obstacle():
    module, x = recognised(Operators()), draw()
    with torch.no_grad(), torch.device("cpu"):
        assert operators_in(lambda: module(x))[1] == [MASKED]


def test_vmap_jvp_and_forward_ad_see_the_plain_operations():
    module, x = recognised(Operators()), draw()
    plain = copy.deepcopy(module)
    unpatch(plain)
    with torch.no_grad():
        got, ran = operators_in(lambda: torch.func.vmap(module)(x[:, None]))
        assert ran == []
        torch.testing.assert_close(got, torch.func.vmap(plain)(x[:, None]))
        (_, tangent), ran = operators_in(lambda: torch.func.jvp(module, (x,), (x,)))
        assert ran == []
        torch.testing.assert_close(tangent, torch.func.jvp(plain, (x,), (x,))[1])

    def inner(q, k, v):
        return torch.func.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)

    tensors = [t.flatten(1, 1)[None].expand(2, -1, -1, -1, -1) for t in qkv()]
    got, mode = deferred(inner, *tensors)
    assert mode.fused == 0
    torch.testing.assert_close(got, inner(*tensors))


def test_fx_jit_export_and_compile_see_the_plain_code():
    module, x = recognised(Operators()), draw()
    module(x)
    with torch.no_grad():
        expected = Operators.forward(module, x)
        exported = torch.export.export(module, (x,))
        assert not any("fastvit" in str(node.target) for node in exported.graph.nodes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module, x)
        assert "fastvit" not in str(traced.graph)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_same(compiled(x), expected)
        patch(unpatch(module))
        assert isinstance(module, Undecided)
        assert_same(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
        assert isinstance(module, Undecided)


def test_a_compiled_part_is_called_with_the_plain_map():
    class Compiled(Heads):
        def make(self):
            self.soft = nn.Softmax(-1)

        def weigh(self, q, k, v):
            return self.soft(q @ k.mT) @ v

    module, x = recognised(Compiled()), draw()
    module.soft.compile(backend="eager")
    with torch.no_grad():
        got, ran = operators_in(lambda: module(x))
        assert ran == []
        assert_same(got, Compiled.forward(module, x))


def test_a_compiled_function_inside():
    soft = torch.compile(lambda attn: attn.relu().softmax(-1), backend="eager")

    def code(q, k, v):
        return soft(q @ k.mT) @ v

    with torch.no_grad():
        tensors = qkv()
        torch.testing.assert_close(
            deferred(code, *tensors)[0], (tensors[0] @ tensors[1].mT).relu().softmax(-1) @ tensors[2]
        )


def test_hooks_get_plain_maps():
    module, x = recognised(Operators()), draw()
    with torch.no_grad():
        expected, seen = Operators.forward(module, x), []
        handle = module.drop.register_forward_hook(lambda part, args, out: seen.append((type(args[0]), out)))
        got, ran = operators_in(lambda: module(x))
        assert ran == []
        assert_same(got, expected)
        assert seen[0][0] is torch.Tensor
        handle.remove()
        assert operators_in(lambda: module(x))[1] == [MASKED]
        handle = nn.modules.module.register_module_forward_hook(lambda part, args, out: None)
        assert operators_in(lambda: module(x))[1] == []
        handle.remove()


def test_subclasses_of_tensor_are_left_alone():
    class Own(torch.Tensor):
        pass

    module, x = recognised(Operators()), draw()
    with torch.no_grad():
        got, ran = operators_in(lambda: module(x.as_subclass(Own)))
    assert ran == []
    assert type(got) is Own


def test_sdpa_kernel_is_obeyed():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module = recognised(SPELLINGS["ScaledDotProduct"].cls())
    with torch.no_grad():
        assert operators_in(lambda: module(draw()))[1] == [MASKED]
        with sdpa_kernel(SDPBackend.MATH):
            assert operators_in(lambda: module(draw()))[1] == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_the_way_of_its_forward(reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Operators()
            self.checkpoints = True

        def forward(self, x):
            return checkpoint(self.attn, x, use_reentrant=reentrant) if self.checkpoints else self.attn(x)

    block, x = Block(), draw()
    patch(block)
    _, expected = gradients(copy.deepcopy(unpatch(copy.deepcopy(block))), x)
    for _ in range(3):
        _, got = gradients(block, x)
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        block(x)
    for _ in range(3):
        (_, got), ran = operators_in(lambda: gradients(block, x))
        torch.testing.assert_close(got, expected)
    assert MASKED in ran


# --- Finding --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Operators(), nn.Dropout(0.5), nn.BatchNorm1d(9), SPELLINGS["ReAttention"].cls())
        self.pool = SPELLINGS["ClassAttention"].cls()

    def forward(self, x, *, scale=1.0):
        return self.pool(self.blocks(x) * scale)


def test_the_smallest_modules_are_found_and_nothing_is_disturbed():
    model, x = Model().train(), draw()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    patch(model, example=x)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.blocks[1].training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    fused = {name: row.op for name, row in ((row.name, row) for row in report(model).rows) if row.status == "patched"}
    assert fused == {"blocks.0": MASKED, "blocks.3": "head_mixed_attention", "pool": CLASS}
    assert type(model) is Model


def test_the_first_call_adds_no_forward_and_draws_once():
    model, x = Model().train(), draw()
    plain = copy.deepcopy(model)
    calls = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    patch(model)
    rows = [row for row in report(model).rows if row.status == "unrecognised"]
    assert all("decided at the first call" in row.reasons[-1] for row in rows)
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    assert_same(got, plain(x))
    assert calls == [1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    assert isinstance(model.pool, Recognised)
    assert type(model) is Model
    assert "decided" not in str(report(model))
    assert type(unpatch(model).pool) is SPELLINGS["ClassAttention"].cls


def test_a_branch_not_taken_at_first_is_a_candidate():
    class Branches(Heads):
        def weigh(self, q, k, v):
            attn = q @ k.mT
            attn = attn.relu() if self.training else attn
            return attn.softmax(-1) @ v

    module, x = Branches().train(), draw()
    patch(module, example=x)
    with torch.no_grad():
        assert operators_in(lambda: module(x))[1] == []
        module.eval()
        assert operators_in(lambda: module(x))[1] == [MASKED]


def test_options_choose_among_what_is_found():
    model, x = Model().eval(), draw()
    patch(model, example=x, ops="class_attention")
    assert [type(part).__mro__[1].__name__ for part in (model.pool, model.blocks[0])] == ["RecognisedClass", "Heads"]
    patch(model, filter_fn=lambda module, name: name != "blocks.0")
    with torch.no_grad():
        model(x)
    assert not isinstance(model.blocks[0], Recognised)
    assert isinstance(model.blocks[3], Recognised)


def test_strict_and_dry_run_ask_for_an_example():
    class SelfAttention(Operators):
        pass

    model, x = nn.Sequential(SelfAttention()), draw()
    with pytest.raises(RuntimeError, match=r"0 \(SelfAttention\): .*decided at the first call; give patch an example"):
        patch(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch(model, dry_run=True)
    assert "give patch an example" in report(model).rows[0].reasons[-1]
    assert not is_patched(model)
    patch(model, dry_run=True, example=x)
    assert report(model).rows[0].status == "patched"
    assert not is_patched(model)
    patch(model, strict=True, example=x)
    assert is_patched(model)


def test_the_first_call_tells_why_attention_stays_plain():
    class FlooredAttention(Heads):
        def weigh(self, q, k, v):
            return (q @ k.mT * self.scale).clamp(-1.0, 1.0).softmax(-1) @ v

    model, x = nn.Sequential(FlooredAttention(), Operators()).eval(), draw()
    patch(model)
    model(x)
    reasons = {row.name: row.reasons for row in report(model).rows}
    assert "clamp" in reasons["0"][0]
    assert reasons["1"] == ()
    patch(unpatch(model), example=x)
    assert {row.name: row.reasons for row in report(model).rows} == reasons


def test_nothing_to_gain_is_put_back_with_a_warning():
    class NoMap(nn.Module):
        def forward(self, x):
            return x @ x.mT

    model = NoMap()
    patch(model)
    with pytest.warns(UserWarning, match="nothing to fuse in NoMap"):
        model(draw())
    assert type(model) is NoMap


def test_copies_pickles_and_state(tmp_path):
    for ready in (True, False):
        model, x = Model().eval(), draw()
        patch(model, example=x if ready else None)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                twin(x)
                assert operators_in(lambda twin=twin, x=x: twin(x))[1] == [MASKED, "head_mixed_attention", CLASS]
                assert type(unpatch(twin).pool) is SPELLINGS["ClassAttention"].cls
        assert list(model.state_dict()) == list(Model().state_dict())
        assert vars(model).keys() == vars(Model()).keys()
        assert isinstance(model, Model)


def test_concurrent_first_calls_publish_once():
    model, x = Model().eval(), draw()
    expected = Model.forward(copy.deepcopy(model), x).detach()
    patch(model)
    results, start = [], threading.Barrier(4)

    def call():
        start.wait()
        with torch.no_grad():
            results.append(model(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        torch.testing.assert_close(got, expected)
    assert type(model) is Model
    assert isinstance(model.pool, Recognised)


def test_a_backend_by_name_is_held_to():
    model, x = Operators().eval(), draw()
    patch(model, example=x, backend="reference")
    assert model.fastvit_backend == "reference"
    with torch.no_grad():
        assert operators_in(lambda: model(x))[1] == [MASKED]


# --- What it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deferring_takes", [1.0, 3.0])
def test_a_module_is_deferred_where_that_is_faster(deferring_takes, monkeypatch):
    """The calls themselves take turns, none is added, and what is slower by the clock is put back."""
    monkeypatch.setattr(autotune, "ENABLED", True)
    model, x, now, calls = recognised(Operators()), draw(), [0.0], []
    deferred_calls, plain = deferral._deferred, Operators.forward

    def slow(*args):
        calls.append("deferred")
        out = deferred_calls(*args)
        now[0] += deferring_takes - 2.0
        return out

    def counted(self, *args):
        now[0] += 2.0
        calls.append("forward")
        return plain(self, *args)

    monkeypatch.setattr(deferral, "_deferred", slow)
    monkeypatch.setattr(type(model).fastvit_plain, "forward", counted)
    monkeypatch.setattr(deferral.time, "perf_counter", lambda: now[0])
    with torch.no_grad():
        expected = plain(model, x)
        for lap in range(1 + 2 * autotune.Race.LAPS):
            torch.testing.assert_close(model(x), expected)
            if lap in (3, 4):  # whoever asks is told what is fused, whose turn it may be
                before = len(calls)
                assert [each.op for each in explain(model, x).chains] == [MASKED]
                assert report(model, x).flops_share > 0
                del calls[before:]
        assert calls == ["deferred", "forward"] + ["deferred", "forward", "forward"] * autotune.Race.LAPS
        calls.clear()
        model(x)
    assert calls == (["deferred", "forward"] if deferring_takes < 2.0 else ["forward"])
    told = explain(model, x)
    chains = told.chains
    assert [each.op for each in chains] == ([MASKED] if deferring_takes < 2.0 else [None])
    assert deferring_takes < 2.0 or "(the model itself): left plain: the plain code is faster at this size" in str(told)
    model(x[:1])  # another size is another kind of call
    assert len(deferral.decisions(model)) == 2


def test_intercepted_calls_of_a_chain(monkeypatch):
    """Of each call torch makes, one passes through the mode; four maps are made, and none is asked its shape by it."""
    module, x = recognised(Operators()), draw()
    intercepted = []
    plain = Deferring.__torch_function__

    def counting(self, func, *rest):
        intercepted.append(getattr(func, "__name__", ""))
        return plain(self, func, *rest)

    monkeypatch.setattr(Deferring, "__torch_function__", counting)
    with torch.no_grad():
        module(x)
    # shape, linear, reshape, permute, unbind; k transposed, q @ k, * scale, softmax, dropout, @ v; transpose, reshape,
    # linear
    assert len(intercepted) == 14
