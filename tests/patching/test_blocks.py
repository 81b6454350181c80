"""Blocks that run whole at inference: how many calls they are, and that whoever meddles with a part is heard."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fastvit import backends
from fastvit.ops._operator import recording
from fastvit.patching import is_patched, patch, replay, unpatch
from fastvit.patching.fusion import Fused, give
from fastvit.patching.rows import blocks
from fastvit.patching.rows import reference as table
from fastvit.reference.deepvit import ReAttentionBlock
from tests.helpers import CallCounter, assert_as_accurate, on_pooled_draws
from tests.ops.test_call_counts import python_calls
from tests.tiny import build

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

MOST_CALLS = 12


class Family(NamedTuple):
    """Where a tiny model has a block, the grid that it is called with, its tokens, and the calls of it fused."""

    path: str
    grid: tuple[int, int] | None
    tokens: int
    calls: int
    keys: int | None = None


FAMILIES = {
    "vit": Family("blocks.0", None, 17, 8),
    "deit": Family("blocks.0", None, 18, 8),
    "deepvit": Family("blocks.0", None, 17, 9),
    "deepvit_cnn": Family("blocks.1", None, 17, 9),
    "cait": Family("blocks.0", None, 16, 8),
    "cpvt": Family("blocks.0", None, 17, 8),
    "cvt": Family("stage2.blocks.0", (3, 3), 10, 12, 5),
    "ceit": Family("blocks.0", (4, 4), 17, 10),
    "twins_pcpvt": Family("blocks.1.0", (8, 8), 64, 14, 4),
    "twins_pcpvt_unreduced": Family("blocks.3.0", (2, 2), 4, 9),
}
PARTS = (
    *("norm1", "attn", "attn.qkv", "attn.proj_q", "attn.q", "attn.kv", "attn.proj", "attn.proj_drop"),
    *("attn.attn_drop", "attn.conv_proj_q", "attn.sr", "attn.norm"),
    *("norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop", "leff", "drop_path"),
)


class Case(NamedTuple):
    block: nn.Module
    x: Tensor
    grid: tuple[tuple[int, int], ...]

    def run(self, block: nn.Module, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return block(self.x if x is None else x, *self.grid, mask)

    def parts(self) -> list[str]:
        names = dict(self.block.named_modules())
        return [name for name in PARTS if name in names]


def make(name: str, dtype: torch.dtype = torch.float32) -> Case:
    family = FAMILIES[name]
    block = build(name.removesuffix("_unreduced")).get_submodule(family.path).to(dtype)
    x = torch.randn(4, family.tokens, block.norm1.normalized_shape[0], dtype=dtype)
    return Case(block, x, () if family.grid is None else (family.grid,))


def fused(case: Case, **options: Any) -> nn.Module:
    return patch(copy.deepcopy(case.block), **options)


@needs_cpp
@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_is_few_calls(name, monkeypatch):
    linear = sys.modules["fastvit.ops.linear"]
    monkeypatch.setattr(linear, "_FASTER", {})
    monkeypatch.setattr(linear, "_WINNERS", set())
    monkeypatch.setattr(linear.autotune, "choose", lambda *_, **__: ("cpp",))
    case = make(name)
    block = fused(case, backend="cpp")
    with torch.no_grad(), CallCounter() as plain:
        case.run(case.block)
    with torch.no_grad():
        case.run(block)
        with CallCounter() as counted:
            case.run(block)
    assert len(counted.names) == FAMILIES[name].calls < len(plain.names) / 2, counted.names
    # PCPVT's spatial reduction takes a map, made of tokens, and gives one.
    assert FAMILIES[name].calls <= MOST_CALLS or name == "twins_pcpvt"


PYTHON_CALLS = {
    **dict.fromkeys(("vit", "deit", "cpvt"), 121),
    "deepvit": 150,
    "deepvit_cnn": 150,
    "cait": 131,
    "cvt": 251,
    "ceit": 190,
    "twins_pcpvt": 171,
    "twins_pcpvt_unreduced": 140,
}
"""The most that a warm call of a block enters where it asks of every part whether it is still plain."""


@needs_cpp
@pytest.mark.usefixtures("kernels_first")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_is_few_python_calls(name, monkeypatch):
    case = make(name)
    block = fused(case)
    with torch.no_grad():
        for _ in range(2):
            case.run(block)
        replayed = len(python_calls(lambda: case.run(block)))
        monkeypatch.setattr(replay, "_C", None)
        chosen = len(python_calls(lambda: case.run(block)))
    assert chosen <= PYTHON_CALLS[name]
    assert replayed <= 30


# --- Whoever meddles with a part is heard ----------------------------------------------------------------------------

Meddle = Callable[[nn.Module, str, list[str]], None]
"""Does something to a part (block, its name, the log of what ran)."""


def _hook(block: nn.Module, name: str, log: list[str]) -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        log.append(name)
        return output * 1.5

    block.get_submodule(name).register_forward_hook(hook)


def _pre_hook(block: nn.Module, name: str, log: list[str]) -> None:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        log.append(name)
        return (args[0] * 1.5, *args[1:])

    block.get_submodule(name).register_forward_pre_hook(hook)


def _forward(block: nn.Module, name: str, log: list[str]) -> None:
    part = block.get_submodule(name)
    before = part.forward

    def forward(*args: Any) -> Tensor:
        log.append(name)
        return before(*args) * 1.5

    part.forward = forward


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, log: list[str]):
        super().__init__()
        self.inner, self.log = inner, log

    def forward(self, *args: Any) -> Tensor:
        self.log.append("wrapper")
        return self.inner(*args) + 0.1

    def __getattr__(self, name: str) -> Any:  # as adapters pass on what they do not have
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _put(block: nn.Module, name: str, part: nn.Module) -> None:
    holder, _, last = name.rpartition(".")
    setattr(block.get_submodule(holder), last, part)


def _wrapper(block: nn.Module, name: str, log: list[str]) -> None:
    _put(block, name, _Wrapper(block.get_submodule(name), log))


def _sequential(block: nn.Module, name: str, log: list[str]) -> None:
    part = block.get_submodule(name)
    if isinstance(part, (nn.Linear, nn.LayerNorm)):
        _put(block, name, nn.Sequential(part, _Wrapper(nn.Identity(), log)))


def _subclass(block: nn.Module, name: str, log: list[str]) -> None:
    part = block.get_submodule(name)

    class Own(type(part)):
        def forward(self, *args: Any) -> Tensor:
            log.append(name)
            return super().forward(*args) * 1.5

    part.__class__ = Own


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrization(block: nn.Module, name: str, log: list[str]) -> None:
    part = block.get_submodule(name)
    if "weight" in part._parameters:
        parametrize.register_parametrization(part, "weight", _Double())


MEDDLING: dict[str, Meddle] = {
    "hook": _hook,
    "pre_hook": _pre_hook,
    "forward": _forward,
    "wrapper": _wrapper,
    "sequential": _sequential,
    "subclass": _subclass,
    "parametrization": _parametrization,
}


@pytest.mark.parametrize("when", ["before_patch", "after_patch", "after_calls"])
@pytest.mark.parametrize("kind", MEDDLING)
@pytest.mark.parametrize("name", FAMILIES)
def test_whoever_meddles_with_a_part_is_heard(name, kind, when):
    case = make(name)
    for part in case.parts():
        logs: tuple[list[str], list[str]] = ([], [])
        plain, block = copy.deepcopy(case.block), copy.deepcopy(case.block)
        MEDDLING[kind](plain, part, logs[0])
        if when == "before_patch":
            MEDDLING[kind](block, part, logs[1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing may be left to fuse
                patch(block)
        else:
            patch(block)
            if when == "after_calls":  # which are replayed from the second one on
                with torch.no_grad():
                    for _ in range(3):
                        case.run(block)
            MEDDLING[kind](block, part, logs[1])
        with torch.no_grad():
            expected, got = case.run(plain), case.run(block)
        assert logs[0] == logs[1], part
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize("name", FAMILIES)
def test_backward_hooks_are_heard(name):
    case = make(name)
    for part in case.parts():
        logs: dict[str, list[str]] = {"plain": [], "fused": []}
        for which, block in (("plain", copy.deepcopy(case.block)), ("fused", fused(case))):
            log = logs[which]
            block.get_submodule(part).register_full_backward_hook(lambda *_, log=log: log.append("after"))
            block.get_submodule(part).register_full_backward_pre_hook(lambda *_, log=log: log.append("before"))
            case.run(block, case.x.clone().requires_grad_()).sum().backward()
        assert logs["plain"] == logs["fused"], part


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_for_all_modules_are_heard(name):
    case = make(name)
    heard: list[list[str]] = []
    for block in (case.block, fused(case)):
        names = {module: part for part, module in block.named_modules()}
        called: list[str] = []
        hook = register_module_forward_hook(lambda module, *_, to=called, names=names: to.append(names[module]))
        try:
            with torch.no_grad():
                case.run(block)
        finally:
            hook.remove()
        heard.append(called)
    assert heard[0] == heard[1]
    assert {"norm1", "attn", "attn.proj", "norm2", "drop_path", ""} <= set(heard[0])


@pytest.fixture
def whole(monkeypatch) -> list[str]:
    """What of a block ran whole."""
    ran: list[str] = []

    def noting(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(*args: Any) -> Tensor:
            ran.append(run.__name__)
            return run(*args)

        return note

    for run in (blocks.add_attention, blocks.add_projection, blocks.add_mlp):
        for module in (blocks, table):
            monkeypatch.setattr(module, run.__name__, noting(run))
    return ran


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_runs_whole_until_somebody_meddles(name, whole):
    case = make(name)
    block = fused(case)
    with torch.no_grad():
        case.run(block)
    assert whole
    hook = block.norm1.register_forward_hook(lambda *_: None), block.norm2.register_forward_hook(lambda *_: None)
    whole.clear()
    with torch.no_grad():
        case.run(block)
    assert not whole
    for each in hook:
        each.remove()
    with torch.no_grad():
        case.run(block)
    assert whole


# --- Modes, gradients, backends --------------------------------------------------------------------------------------

DROPS = ("attn.proj_drop", "mlp.drop", "drop_path")


def _with_drops(case: Case) -> nn.Module:
    block = copy.deepcopy(case.block)
    for part in map(dict(block.named_modules()).get, DROPS):
        if part is not None:
            setattr(part, "drop_prob" if hasattr(part, "drop_prob") else "p", 0.4)
    return block


def _seeded(run: Callable[[], Tensor]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run()


@pytest.mark.parametrize("grads", [True, False], ids=["gradients", "no_gradients"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_drops_as_the_plain_block_does(name, grads, whole):
    case = make(name)
    plain = _with_drops(case)
    block = patch(copy.deepcopy(plain)).train()
    plain.train()
    with torch.set_grad_enabled(grads):
        expected = _seeded(lambda: case.run(plain))
        torch.testing.assert_close(_seeded(lambda: case.run(block)), expected, rtol=1e-4, atol=1e-4)
    assert not whole


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dropout_left_in_training_drops(name):
    case = make(name)
    plain = _with_drops(case)
    for part in set(DROPS) & set(case.parts()):
        one, other = copy.deepcopy(plain), patch(copy.deepcopy(plain))
        one.get_submodule(part).train()
        other.get_submodule(part).train()
        with torch.no_grad():
            expected = _seeded(lambda: case.run(one))  # noqa: B023 (called at once)
            assert not torch.equal(expected, case.run(plain))
            got = _seeded(lambda: case.run(other))  # noqa: B023
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    block = fused(case)
    with torch.no_grad():
        expected = case.run(block)
        block.attn.attn_drop.p = 0.5
        assert torch.equal(case.run(block), expected)
        block.attn.attn_drop.train()
        assert not torch.allclose(case.run(block), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_every_parameter(name):
    case = make(name)
    block = fused(case)
    weights = torch.randn_like(case.x)
    for each in (case.block, block):
        (case.run(each) * weights).sum().backward()
    for (path, parameter), of_plain in zip(block.named_parameters(), case.block.parameters(), strict=True):
        assert parameter.grad is not None, path
        size = of_plain.grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(parameter.grad / size, of_plain.grad / size, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_another_backend_never_takes_our_product(name, backend, whole):
    case, choices = make(name), []
    block = fused(case, backend=backend)
    with torch.no_grad(), recording(choices.append):
        got = case.run(block)
        torch.testing.assert_close(got, case.run(case.block), rtol=1e-4, atol=1e-4)
    assert not whole
    assert not [choice for choice in choices if choice.backend == "cpp"]


@pytest.mark.parametrize("part", ["", "attn", "mlp"])
def test_parts_of_another_backend_are_called(part, whole):
    case = make("vit")
    block = fused(case)
    give(block.get_submodule(part), type(block.get_submodule(part)), "triton")
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):  # it does not run here, or is none of MLPs
        case.run(block)
    assert not whole


@needs_cpp
def test_a_backend_asked_for_is_insisted_on():
    case = make("vit")
    block = fused(case, backend="cpp")
    choices: list[Any] = []
    with torch.no_grad(), recording(choices.append):
        case.run(block)
    assert [(each.op, each.backend) for each in choices] == [
        (op, "cpp") for op in ("linear", "masked_attention", "linear", "mlp")
    ]
    with torch.no_grad(), pytest.raises(RuntimeError, match="float64"):
        case.run(block.double(), case.x.double())


# --- Results ---------------------------------------------------------------------------------------------------------


def _masks(name: str) -> Iterator[Tensor | None]:
    family = FAMILIES[name]
    yield None
    visible = torch.rand(4, 1, family.tokens, family.keys or family.tokens) < 0.6
    visible[..., 0] = True
    visible[1] = False  # sees nothing
    yield visible
    yield visible[:, :, :1].contiguous()


@pytest.mark.parametrize("backend", ["auto", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_results(name, dtype, backend):
    def check() -> None:
        case = make(name, dtype)
        block, exact = fused(case, backend=backend), copy.deepcopy(case.block).double()
        for mask in _masks(name):
            for x in (case.x, case.x.transpose(0, 1).contiguous().transpose(0, 1), case.x[:1]):
                of_x = None if mask is None else mask[: len(x)]
                plain, oracle = case.run(case.block, x, of_x), case.run(exact, x.double(), of_x)
                assert_as_accurate(case.run(block, x, of_x), plain, oracle)

    with torch.no_grad():
        on_pooled_draws(check)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_pickles_and_unpatch(name, whole):
    case = make(name)
    block = fused(case)
    with torch.no_grad():
        expected = case.run(block)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            whole.clear()
            assert torch.equal(case.run(other), expected) and whole
        assert not is_patched(unpatch(block))
        assert [vars(one).keys() for one in block.modules()] == [vars(one).keys() for one in case.block.modules()]
        assert torch.equal(case.run(block), case.run(case.block))


@pytest.mark.parametrize("name", ["vit", "cait", "cvt", "ceit", "twins_pcpvt"])
def test_torch_compile_takes_blocks_whole(name):
    case = make(name)
    block = torch.compile(fused(case), fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for x in (case.x, case.x[:2], torch.cat([case.x] * 3)):
            torch.testing.assert_close(case.run(block, x), case.run(case.block, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepvit", "cpvt"])
def test_a_norm_over_tokens_and_channels_is_called(name):
    case = make(name)
    for part in ("norm1", "norm2"):
        plain = copy.deepcopy(case.block)
        setattr(plain, part, nn.LayerNorm(tuple(case.x.shape[1:])))
        block = patch(copy.deepcopy(plain))
        with torch.no_grad():
            torch.testing.assert_close(case.run(block), case.run(plain), rtol=1e-4, atol=1e-4)


def test_steps_of_a_subclass_are_taken():
    class Own(ReAttentionBlock):
        def _add(self, x: Tensor, branch: Tensor) -> Tensor:
            return x + 2 * branch

    case = make("deepvit")
    case.block.__class__ = Own
    block = fused(case)
    assert not isinstance(block, Fused) and isinstance(block.attn, Fused)
    with torch.no_grad():
        torch.testing.assert_close(case.run(block), case.run(case.block), rtol=1e-4, atol=1e-4)


@needs_cpp
@pytest.mark.parametrize(
    ("settings", "as_product"),
    [
        ({"kernel_size": 2, "stride": 2}, True),
        ({"kernel_size": (4, 2), "stride": (4, 2), "bias": False}, True),
        ({"kernel_size": 3, "stride": 3}, True),  # which leaves a row and a column out
        ({"kernel_size": 2, "stride": 1}, True),
        ({"kernel_size": 2, "stride": 2, "padding": 1}, True),
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, False),
        ({"kernel_size": 2, "stride": 2, "groups": 2}, False),
    ],
    ids=str,
)
def test_a_spatial_reduction_is_a_product_of_windows(settings, as_product):
    case = make("twins_pcpvt")
    channels = case.block.norm1.normalized_shape[0]
    case.block.attn.sr = nn.Conv2d(channels, channels, **settings)
    block = fused(case, backend="cpp")
    with torch.no_grad(), CallCounter() as counted:
        got = case.run(block)
    assert ("aten.convolution.default" not in counted.names) is as_product
    exact = copy.deepcopy(case.block).double()
    with torch.no_grad():
        assert_as_accurate(got, case.run(case.block), case.run(exact, case.x.double()))


# --- Patches of an image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "twins_pcpvt"])
def test_patches(name):
    model = build(name)
    plain = model.patch_embed if name == "vit" else model.patch_embeds[1]
    x = torch.randn(2, plain.in_chans, 16, 24)
    convolutions = {
        "its own": plain.proj,
        "overlapping": nn.Conv2d(plain.in_chans, 48, plain.patch_size, stride=2),
        "padded": nn.Conv2d(plain.in_chans, 48, plain.patch_size, plain.patch_size, padding=1),
        "dilated": nn.Conv2d(plain.in_chans, 48, plain.patch_size, plain.patch_size, dilation=2),
    }
    for what, convolution in convolutions.items():
        exchanged = copy.deepcopy(plain)
        exchanged.proj = convolution
        if name != "vit":
            exchanged.norm = nn.LayerNorm(convolution.out_channels)
        block = patch(copy.deepcopy(exchanged))
        with torch.no_grad():
            torch.testing.assert_close(block(x), exchanged(x), rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}")  # noqa: B023


def test_hooks_and_wrappers_of_the_patches_are_called():
    plain = build("vit").patch_embed
    x = torch.randn(2, 3, 16, 24)
    for kind in ("hook", "pre_hook", "forward", "wrapper", "subclass", "parametrization"):
        logs: tuple[list[str], list[str]] = ([], [])
        one, other = copy.deepcopy(plain), patch(copy.deepcopy(plain))
        MEDDLING[kind](one, "proj", logs[0])
        MEDDLING[kind](other, "proj", logs[1])
        with torch.no_grad():
            torch.testing.assert_close(other(x), one(x), rtol=1e-4, atol=1e-4)
        assert logs[0] == logs[1]
