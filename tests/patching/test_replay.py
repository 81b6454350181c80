"""Blocks that call their operators again: the same bits, and the long way as soon as anything is different."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import backends
from fastvit.ops._operator import log, recording
from fastvit.patching import patch, replay, unpatch
from fastvit.reference.layers import Block
from fastvit.reference.vit import ViT
from tests.patching.test_blocks import FAMILIES, Case, fused, make
from tests.tiny import ISOTROPIC, build

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What of a block ran: "replayed", "recorded", or "chosen"."""
    found: list[str] = []

    def noting(what: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any) -> Any:
            found.append(what)
            return run(*args)

        return note

    monkeypatch.setattr(replay.Replay, "__call__", noting("replayed", replay.Replay.__call__))
    monkeypatch.setattr(replay, "_record", noting("recorded", replay._record))
    return found


def warm(case: Case, block: nn.Module) -> Tensor:
    """The result of a call that is replayed."""
    with torch.no_grad():
        for _ in range(3):
            out = case.run(block)
    return out


@pytest.mark.parametrize("name", ["vit", "twins_pcpvt"])  # whose reduction packs its weight by pixels
def test_a_weight_is_not_packed_at_each_call(name, ran, monkeypatch):
    case = make(name)
    block, made = fused(case), []
    warm(case, block)
    _values(block)
    with torch.no_grad():
        for _ in range(3):
            case.run(block)
        pack = torch.ops.fastvit.pack_weight.default
        with _Noting(made):
            case.run(block)
        (kept,) = replay._blocks[id(block)].replays.values()
        assert pack not in made and len(kept.weights) >= 4
        ran.clear()
        case.run(block)
    assert ran == ["replayed"]


class _Noting(TorchDispatchMode):
    def __init__(self, made: list[Any]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_second_call_is_recorded_and_further_ones_replayed_with_the_same_bits(name, ran):
    case = make(name)
    block = fused(case)
    with torch.no_grad():
        first, second, third = (case.run(block) for _ in range(3))
        assert ran == ["recorded", "replayed", "replayed"]
        other = torch.randn_like(case.x)
        replayed = case.run(block, other)
        with recording(lambda _: None):
            chosen = case.run(block, other)
    assert ran == ["recorded", "replayed", "replayed", "replayed"]
    assert torch.equal(first, second) and torch.equal(second, third)
    assert torch.equal(replayed, chosen) and not torch.equal(replayed, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_replayed(dtype, ran):
    case = make("vit", dtype)
    block = fused(case)
    with torch.no_grad():
        assert torch.equal(case.run(block), warm(case, block))
    assert ran.count("replayed") == 3


def test_models_of_libraries_are_replayed(ran):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        patch(model)
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        tokens = model.forward_features(x)
        results = [model(x) for _ in range(3)]
        assert ran.count("replayed") >= 6
        assert tokens.shape[1] == 5 and torch.equal(model.forward_features(x), tokens)  # all of the last block's
    assert all(torch.equal(results[0], each) for each in results[1:])


# --- Changes -----------------------------------------------------------------------------------------------------


def _values(block: Any) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.25)


def _data(block: Any) -> None:
    for parameter in block.parameters():
        parameter.data = parameter.data * 1.25


def _parameters(block: Any) -> None:
    for part in block.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                setattr(part, name, nn.Parameter(parameter.detach() * 1.25))


def _state(block: Any) -> None:
    block.load_state_dict({name: value * 1.25 for name, value in block.state_dict().items()})


def _assigned(block: Any) -> None:
    block.load_state_dict({name: value * 1.25 for name, value in block.state_dict().items()}, assign=True)


def _eps(block: Any) -> None:
    block.norm1.eps = block.norm2.eps = 0.5


def _scale(block: Any) -> None:
    block.attn.scale *= 2.0


def _part(block: Any) -> None:
    block.mlp.fc2 = nn.Linear(block.mlp.fc2.in_features, block.mlp.fc2.out_features)
    nn.init.constant_(block.mlp.fc2.weight, 0.01)
    nn.init.zeros_(block.mlp.fc2.bias)


def _activation(block: Any) -> None:
    block.mlp.act = nn.ReLU()


def _dropped(block: Any) -> None:
    block.mlp.fc2.bias = None


CHANGES = (_values, _data, _parameters, _state, _assigned, _eps, _scale, _part, _activation, _dropped)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_block_is_seen(change):
    case = make("vit")
    plain, block = copy.deepcopy(case.block), fused(case)
    before = warm(case, block)
    change(plain)
    change(block)
    with torch.no_grad():
        for _ in range(4):  # the long way, recorded, replayed
            got = case.run(block)
            torch.testing.assert_close(got, case.run(plain), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


def test_a_method_replaced_on_a_class_is_called(monkeypatch):
    case = make("vit")
    block = fused(case)
    warm(case, block)
    called, forward = [], nn.LayerNorm.forward

    def noting(self: nn.LayerNorm, x: Tensor) -> Tensor:
        called.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.LayerNorm, "forward", noting)
    with torch.no_grad():
        case.run(block)
    assert called == [block.norm1, block.norm2]


def test_a_change_of_dtype_is_the_blocks_own_error():
    case = make("vit")
    plain, block = copy.deepcopy(case.block), fused(case)
    warm(case, block)
    for each in (plain, block):
        each.norm1.double()
        each.attn.double()
    with torch.no_grad():
        for each in (plain, block):
            with pytest.raises((RuntimeError, ValueError)):
                case.run(each)


def test_training_and_gradients_take_the_long_way(ran):
    case = make("vit")
    block = fused(case)
    warm(case, block)
    ran.clear()
    case.run(block).sum().backward()
    block.train()
    with torch.no_grad():
        case.run(block)
    assert "replayed" not in ran


def test_unpatching_and_patching_for_another_backend_are_seen(ran):
    case = make("vit")
    block = fused(case)
    warm(case, block)
    ran.clear()
    patch(block, backend="reference")
    with torch.no_grad():
        case.run(block)
        unpatch(block)
        assert torch.equal(case.run(block), case.run(case.block))
    assert "replayed" not in ran


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def _hook_for_all() -> Iterator[None]:
    handle = register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _debugging() -> Iterator[None]:
    level = log.level
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)


WATCHED = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "functions": _Functions,
    "operators": _Operators,
    "hook_for_all": _hook_for_all,
    "recorder": lambda: recording(lambda _: None),
    "debugging": _debugging,
    "forward_gradients": torch.autograd.forward_ad.dual_level,
    "profiler": torch.profiler.profile,
}


@pytest.mark.parametrize("how", WATCHED)
def test_a_call_that_is_watched_takes_the_long_way(how, ran):
    case = make("vit")
    block = fused(case)
    warm(case, block)
    ran.clear()
    with torch.no_grad(), WATCHED[how]():
        case.run(block)
    assert not ran


def test_a_mask_takes_the_long_way(ran):
    case = make("vit")
    block = fused(case)
    mask = torch.ones(4, 1, 1, 17, dtype=torch.bool)
    mask[:, :, :, 5:] = False
    with torch.no_grad():
        for _ in range(3):
            got = case.run(block, mask=mask)
        torch.testing.assert_close(got, case.run(case.block, mask=mask), rtol=1e-4, atol=1e-4)
    assert not ran


# --- What is recorded ------------------------------------------------------------------------------------------------


def _replay_of(run: Callable[..., Tensor | None], block: nn.Module, x: Tensor) -> replay.Replay | None:
    with torch.no_grad():
        return replay._record(block, run, x, ())


ELSEWHERE = torch.ones(4)


@pytest.mark.parametrize(
    ("run", "recorded"),
    [
        (lambda block, x: block(x), True),
        (lambda block, x: torch.cat([x, x, block.weight], 1 - 1), True),
        (lambda block, x: torch.cat([x]), False),
        (lambda block, x: torch.stack([x, x + x, x[:, :1].expand_as(x)], -1), True),
        (lambda block, x: torch.stack([x, ELSEWHERE.expand_as(x)]), False),
        (lambda block, x: x.t().unflatten(0, (2, 2)).permute(2, 0, 1).unbind(0)[1][1:], True),
        (lambda block, x: torch.nn.functional.layer_norm(x, (4,), block.weight[0], None, 0.5), True),
        (lambda block, x: torch.nn.functional.layer_norm(x, (4,)), True),
        (lambda block, x: torch.add(x, x, alpha=2), False),
        (lambda block, x: x + 1, False),  # numbers that torch alone can pass on
        (lambda block, x: torch.nn.functional.gelu(x), False),
        (lambda block, x: torch.nn.functional.adaptive_avg_pool2d(x[None, None], 2).flatten(), True),
        (lambda block, x: block.weight, False),  # not made of x
        (lambda block, x: x, False),
        (lambda block, x: x + ELSEWHERE, False),  # which may change
        (lambda block, x: x + torch.rand(4), False),
        (lambda block, x: torch.nn.functional.dropout(x, 0.5), False),
        (lambda block, x: x.clone().add_(1.0), False),
        (lambda block, x: x * float(x.sum()), False),  # of a value
        (lambda block, x: torch.max(x, 0)[0], True),
        (lambda block, x: None, False),
    ],
)
def test_only_what_can_be_called_again_is_recorded(run, recorded):
    block = nn.Linear(4, 4).eval()
    made = _replay_of(run, block, torch.randn(3, 4))
    assert (made is not None) == recorded
    if made is not None:
        x = torch.randn(3, 4)
        with torch.no_grad():
            assert torch.equal(made(x), run(block, x))


class _Counting(nn.Dropout):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize("how", ["hook", "class"])
def test_what_hangs_on_a_part_that_is_called_is_called_each_time(how, ran):
    """The attention's dropout, which lies in a map that the fused path never makes."""
    case = make("vit")
    block, called = fused(case), []
    warm(case, block)
    if how == "hook":
        block.attn.attn_drop.register_forward_hook(lambda *_: called.append(True))
    else:
        block.attn.attn_drop = _Counting(0.0).eval()
        before = _Counting.calls
    ran.clear()
    with torch.no_grad():
        for _ in range(6):
            case.run(block)
    assert (len(called) if how == "hook" else _Counting.calls - before) == 6
    assert "replayed" not in ran


def test_a_block_that_changes_while_it_runs_is_not_recorded():
    block = nn.Linear(4, 4).eval()

    def run(block: Any, x: Tensor) -> Tensor:
        block.calls = getattr(block, "calls", 0) + 1
        return block(x)

    assert _replay_of(run, block, torch.randn(3, 4)) is None
    assert block.calls == 1


def test_a_block_that_always_changes_is_recorded_a_bounded_number_of_times(ran):
    case = make("vit")
    block = fused(case)
    with torch.no_grad():
        for step in range(3 * replay.MOST_KINDS):
            block.step = step
            case.run(block)
    assert ran == ["recorded", "replayed"] * replay.MOST_KINDS


def test_kinds_of_calls_are_bounded():
    case = make("vit")
    block = fused(case)
    with torch.no_grad():
        for batch in range(1, 2 * replay.MOST_KINDS):
            case.run(block, torch.randn(batch, *case.x.shape[1:]))
    assert len(replay._blocks[id(block)].replays) == replay.MOST_KINDS


def test_nothing_is_kept_alive():
    case = make("vit")
    block = fused(case)
    warm(case, block)
    key, weight = id(block), weakref.ref(block.mlp.fc1.weight)
    assert key in replay._blocks
    block.mlp.fc1.weight = nn.Parameter(torch.zeros_like(block.mlp.fc1.weight))
    with torch.no_grad():
        case.run(block)  # until then the record holds it
    assert weight() is None
    warm(case, block)
    weight = weakref.ref(block.mlp.fc1.weight)
    fastvit.release_memory()
    assert key not in replay._blocks
    block.mlp.fc1.weight = nn.Parameter(torch.zeros_like(block.mlp.fc1.weight))
    assert weight() is None
    warm(case, block)
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None and key not in replay._blocks


def test_frozen_weights_are_replayed(ran):
    model = patch(build("vit"))
    x = torch.randn(2, 3, *model.img_size)
    with torch.no_grad():
        expected = model(x)
        fastvit.freeze(model)
        got = [model(x) for _ in range(3)]
        assert "replayed" in ran
        assert all(torch.equal(each, expected) for each in got)
        fastvit.unfreeze(model)
        assert torch.equal(model(x), expected)


def test_threads_share_a_record():
    case = make("vit")
    block = fused(case)
    expected, failed = warm(case, block), []

    def call() -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(case.run(block), expected):
                    failed.append(True)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- Models ----------------------------------------------------------------------------------------------------------

NAMES = ("vit", "deit", "deepvit", "cait", "cpvt", "cvt", "ceit", "twins_pcpvt")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_model_is_replayed_up_to_its_head_with_the_same_bits(name, inference, ran):
    plain = build(name)
    model = patch(copy.deepcopy(plain))
    x, other = torch.randn(2, 2, 3, *model.img_size)  # of one memory: a program's views are of wherever its input lies
    with torch.inference_mode(inference), torch.no_grad():
        first = [model(x) for _ in range(3)]
        ran.clear()
        got = model(other)
        assert ran == ["replayed"]
        with recording(lambda _: None):
            assert torch.equal(model(other), got)
        torch.testing.assert_close(got, plain(other), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(first[0], each) for each in first[1:])


def _written(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def _statistics(model: nn.Module) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [_values, _data, _written, _parameters, _state, _assigned, _statistics])
def test_what_changes_in_a_model_is_seen(name, change, ran):
    plain = build(name)
    model = patch(copy.deepcopy(plain))
    x = torch.randn(2, 3, *model.img_size)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        assert ran[-1] == "replayed"
        change(plain)
        change(model)
        expected = plain(x)
        for _ in range(4):  # the long way, recorded, replayed
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def _model(ran: list[str], name: str = "vit") -> tuple[Any, Tensor]:
    """A model that has been replayed, and images for it."""
    model = patch(build(name))
    x = torch.randn(1, 3, *model.img_size)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert ran[-1] == "replayed"
    ran.clear()
    return model, x


def _on_instance(name: str) -> Callable[..., object]:
    def change(model: Any, called: list[str], monkeypatch: Any) -> None:
        method = getattr(model, name)
        setattr(model, name, lambda *args, **kwargs: called.append(name) or method(*args, **kwargs))

    return change


def _on_class(name: str) -> Callable[..., object]:
    def change(model: Any, called: list[str], monkeypatch: Any) -> None:
        owner = next(cls for cls in type(model).__mro__ if name in vars(cls))
        method = vars(owner)[name]
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: called.append(name) or method(*args, **kwargs))

    return change


def _hooked(part: str) -> Callable[..., object]:
    def change(model: Any, called: list[str], monkeypatch: Any) -> None:
        model.get_submodule(part).register_forward_hook(lambda *_: called.append(part))

    return change


MEDDLES = {
    **{f"instance {name}": _on_instance(name) for name in ("forward_features", "run_blocks", "embed", "finish")},
    **{f"class {name}": _on_class(name) for name in ("run_blocks", "embed", "call_block", "after_block")},
    **{f"hook {part}": _hooked(part) for part in ("norm", "pos_drop", "blocks.1", "blocks.0.attn", "blocks.0.mlp.fc1")},
}


@pytest.mark.parametrize("how", MEDDLES)
@pytest.mark.parametrize("before", [False, True])
def test_whoever_meddles_with_a_model_is_heard_at_each_call(how, before, ran, monkeypatch):
    model, x = (patch(build("vit")), None) if before else _model(ran)
    x = torch.randn(1, 3, *model.img_size) if x is None else x
    called: list[str] = []
    MEDDLES[how](model, called, monkeypatch)
    with torch.no_grad():
        for calls in range(1, 6):
            model(x)
            assert len(called) >= calls
    assert not called or len(called) % 5 == 0


class _Own(ViT):
    seen = 0

    def after_block(self, index: int, x: Tensor, grid: Any) -> Tensor:
        type(self).seen += 1
        return super().after_block(index, x, grid)


def test_a_class_of_the_users_own_is_called(ran):
    model = patch(_Own(**ISOTROPIC).eval())
    with torch.no_grad():
        for calls in range(1, 6):
            model(torch.randn(1, 3, 32, 32))
            assert _Own.seen == 2 * calls


def test_a_model_that_trains_or_is_plain_is_not_replayed(ran):
    model, x = _model(ran)
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    assert "replayed" not in ran
    unpatch(model)
    ran.clear()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert not ran


def test_a_program_gives_up_intermediate_results_as_it_runs():
    program = replay._C.Program()
    replay._hold(torch.ones(3), program.id, True)
    for index in range(50):
        program.add_call("add", "", [0, 0], [], [(0, index, False), (1, -1, False)], 1)
    program.finish(50)
    big = torch.zeros(1 << 22, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = replay._run(big, program.id)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert torch.equal(out, torch.full_like(big, 50.0))
    assert grown < 5 * big.nbytes / 1024


# --- Programs --------------------------------------------------------------------------------------------------------


def test_a_program_says_what_is_wrong_with_it():
    program = replay._C.Program()
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"there is no program -1"):
        replay._run(x, -1)
    with pytest.raises(RuntimeError, match="is not finished"):
        replay._run(x, program.id)
    with pytest.raises(RuntimeError, match="fastvit::nothing has no kernel"):
        program.add_call("fastvit::nothing", "", [], [], [], 1)
    with pytest.raises(RuntimeError, match="no result 1"):
        program.finish(1)
    program.add_call("add", "", [0, 0], [], [(0, 0, False), (1, -1, False)], 1)
    with pytest.raises(RuntimeError, match="no tensor -1"):
        program.finish(1)
    identity = program.id
    del program
    gc.collect()
    with pytest.raises(RuntimeError, match="there is no program"):
        replay._run(x, identity)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (lambda w: w.data.mul_(1.0), True),
        (lambda w: w.data.mul_(1.5), False),
        (lambda w: setattr(w, "data", w.data.clone()), False),
        (lambda w: setattr(w, "data", w.data.t()), False),
        (lambda w: w.share_memory_(), False),
    ],
)
def test_a_program_sees_what_happens_to_a_weight(change, holds):
    program, weight = replay._C.Program(), nn.Parameter(torch.randn(4, 4))
    replay._hold(weight, program.id, True)
    program.watch(-1)
    assert program.holds()
    change(weight)
    assert program.holds() == holds


# --- Snapshots -------------------------------------------------------------------------------------------------------


def _snapshot(*objects: Any) -> Any:
    return replay._C.Snapshot(objects, ("_parameters", "_forward_hooks"))


CHANGES_OF_A_MODULE: dict[str, Callable[[Any], object]] = {
    "set": lambda part: setattr(part, "in_features", 5),
    "added": lambda part: setattr(part, "new", 1),
    "deleted": lambda part: delattr(part, "in_features"),
    "class": lambda part: setattr(part, "__class__", type("Other", (nn.Linear,), {})),
    "parameter": lambda part: setattr(part, "bias", nn.Parameter(torch.zeros(4))),
    "hook": lambda part: part.register_forward_hook(lambda *_: None),
    "method": lambda part: setattr(part, "forward", lambda x: x),
    "another dictionary": lambda part: setattr(part, "_forward_hooks", dict(part._forward_hooks)),
}


@pytest.mark.parametrize("change", CHANGES_OF_A_MODULE)
def test_a_snapshot_sees(change):
    part = nn.Linear(4, 4)
    snapshot = _snapshot(nn.ReLU(), part) if change == "gone" else _snapshot(part)
    assert snapshot.holds()
    CHANGES_OF_A_MODULE[change](part)
    assert not snapshot.holds()


def test_a_snapshot_sees_a_class_that_was_changed():
    class Base(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Own(Base):
        pass

    snapshot = _snapshot(Own())
    part = Own()
    snapshot = _snapshot(part)
    assert snapshot.holds()
    Base.forward = lambda self, x: x + 1
    assert not snapshot.holds()


def test_a_snapshot_sees_an_object_that_is_gone():
    part = nn.Linear(4, 4)
    snapshot = _snapshot(part)
    del part
    gc.collect()
    assert not snapshot.holds()


def test_a_snapshot_of_another_object():
    with pytest.raises(AttributeError):
        replay._C.Snapshot([1], ())
    with pytest.raises(TypeError):
        replay._C.Snapshot(1, ())


def test_what_is_not_looked_at():
    """State dict hooks and values within tensors: no call depends on them, or their readers ask themselves."""
    part = Block(8, 2)
    snapshot = _snapshot(*part.modules())
    part.register_state_dict_pre_hook(lambda *_: None)
    with torch.no_grad():
        part.mlp.fc1.weight.zero_()
    assert snapshot.holds()
