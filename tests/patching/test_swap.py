"""Changing classes: all or none whatever interrupts it, while others call the model, and no more than was changed."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastvit import ops, reference
from fastvit.patching import is_patched, patch, patched, report, reporting, unpatch
from fastvit.patching.fusion import Fused
from fastvit.reference.layers import Attention, Block, Mlp
from tests.patching.test_overrides import MODELS, build, classes


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """All that hangs on the modules, hooks and modes included."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


# --- While others call the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_classes_change_in_the_middle_of_a_call(name, monkeypatch):
    """As another thread would change them: before each operator that a block calls, to plain or back."""
    model, x = build(name)
    with torch.no_grad():
        expected = model(x)
    changes = 0

    def changing(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal changes
            changes += 1
            (unpatch if is_patched(model) else patch)(model)
            return operator(*args, **kwargs)

        return call

    patch(model)
    for operator in ops.__all__:
        if callable(getattr(ops, operator)) and operator in (*ops.OPERATORS, "re_attention", "talking_heads_attention"):
            monkeypatch.setattr(ops, operator, changing(getattr(ops, operator)))
    for _ in range(2):  # the second time from plain in the middle of a block
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        patch(model)
    assert changes >= 2


def test_threads():
    """One thread calls the model while two others patch and undo it."""
    model, x = build("vit")
    with torch.no_grad():
        expected = model(x)
    wrong: list[object] = []
    start = threading.Barrier(3)

    def runs(step: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            start.wait()
            try:
                for turn in range(60):
                    step(turn)
            except Exception as error:
                wrong.append(error)

        return run

    def calls(_: int) -> None:
        with torch.no_grad():
            got = model(x)
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4):
            wrong.append(got)

    def changes(turn: int) -> None:
        patch(model, backend="reference" if turn % 2 else "auto")
        if turn % 3 == 0:
            unpatch(model)

    threads = [threading.Thread(target=runs(step)) for step in (calls, changes, changes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Whoever came last, the model is wholly as its call left it.
    assert {module.fastvit_backend for module in model.modules() if isinstance(module, Fused)} in (
        {"auto"},
        {"reference"},
    )


def test_patching_anew_never_passes_by_plain(monkeypatch):
    """Another thread would see it."""
    model, _ = build("vit")
    patch(model)
    seen: list[type] = []

    def note(self: nn.Module, name: str, value: Any) -> None:
        seen.append(value)
        object.__setattr__(self, name, value)

    monkeypatch.setattr(Attention, "__setattr__", note)
    patch(model, backend="reference")
    patch(model, backend="auto")
    assert [cls.fastvit_backend for cls in seen] == ["reference"] * 2 + ["auto"] * 2


# --- All or nothing --------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, at a line of this package."""


def lines(run: Callable[[], object], interrupt_at: int | None = None) -> list[tuple[str, int]]:
    """The lines of the patching code that ``run`` executes, in order; at one of them it is interrupted."""
    found: list[tuple[str, int]] = []

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            found.append((frame.f_code.co_filename, frame.f_lineno))
            if len(found) - 1 == interrupt_at:
                raise Interrupted
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local if "/fastvit/patching/" in frame.f_code.co_filename else None

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return found


def moments(run: Callable[[], object]) -> dict[int, tuple[str, int]]:
    """Where to interrupt: at each line as it runs first and as it runs last."""
    ran = lines(run)
    first = {line: at for at, line in reversed(list(enumerate(ran)))}
    last = {line: at for at, line in enumerate(ran)}
    return {at: ran[at] for at in (*first.values(), *last.values())}


@pytest.mark.parametrize("what", ["patch", "patch anew", "unpatch", "dry run"])
def test_ctrl_c_at_every_line(what):
    block = Block(8, 2).eval()
    do = {
        "patch": lambda: patch(block, filter_fn=lambda module, name: name != "mlp"),
        "patch anew": lambda: patch(block, backend="reference"),
        "unpatch": lambda: unpatch(block),
        "dry run": lambda: patch(block, dry_run=True),
    }[what]

    def prepare() -> None:
        unpatch(block)
        if what in ("patch anew", "unpatch"):
            patch(block, ops="masked_attention")

    def state() -> tuple[Any, ...]:
        memory = reporting.recall(block)
        return classes(block), attributes(block), memory and (memory.left_alone, memory.planned)

    prepare()
    old = state()
    do()
    new = state()
    prepare()
    ends: Counter[bool] = Counter()
    for moment, line in moments(do).items():
        prepare()
        with pytest.raises(Interrupted):
            lines(do, moment)
        # An exception on the line of a `with` on its way out skips the exit.
        torch.set_grad_enabled(True)
        for _ in range(torch.autocast_increment_nesting()):
            torch.autocast_decrement_nesting()
        assert state() in (old, new), line
        ends[state() == old] += 1
    assert old != new and ends[True] > 20 and ends[False]


def test_warnings_as_errors_leave_the_model_as_it_was():
    model = build("vit")[0]
    for block in model.blocks:
        block.attn.__class__ = _Own
    before, of_modules = classes(model), attributes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="nothing but MLPs and products to fuse"):
            patch(model)
    assert classes(model) == before and attributes(model) == of_modules and reporting.recall(model) is None


class _Own(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("step", ["memory_of", "remember"])
def test_an_error_in_reporting_leaves_the_model_as_it_was(step, monkeypatch):
    model = build("vit")[0]
    patch(model, ops="masked_attention")
    before, memory = classes(model), reporting.recall(model)
    right = getattr(reporting, step)

    def fails(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(reporting, step, right)
        raise ZeroDivisionError

    monkeypatch.setattr(reporting, step, fails)
    with pytest.raises(ZeroDivisionError):
        patch(model)
    assert classes(model) == before and reporting.recall(model) is memory


# --- patched puts back what it changed ------------------------------------------------------------------------------


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_patched_leaves_what_it_did_not_change():
    model = build("vit")[0]
    first, second = model.blocks
    with patched(model, filter_fn=lambda module, name: name.startswith("blocks.0.")):
        assert isinstance(first.attn, Fused) and not isinstance(second.attn, Fused)
        patch(second)  # by itself
        first.mlp.__class__ = _OwnMlp
        parametrize.register_parametrization(first.mlp.fc1, "weight", _Doubled())
        model.head = nn.Identity()
    assert type(first.attn) is Attention and type(first.mlp) is _OwnMlp
    assert isinstance(second.attn, Fused) and isinstance(second, Fused)
    assert type(first.mlp.fc1).__name__ == "ParametrizedLinear" and type(model.head) is nn.Identity


class _OwnMlp(Mlp):
    pass


def test_a_class_over_a_fused_one_stays_and_is_told():
    model = build("vit")[0]
    told = r"classes were put over fused ones .*: blocks.0.attn \(Covering"
    with pytest.raises(RuntimeError, match=told), patched(model):
        _cover(model.blocks[0].attn)
    assert type(model.blocks[1].attn) is Attention and isinstance(model.blocks[0].attn, Fused)


def _cover(module: nn.Module) -> None:
    """As FSDP and parametrisations do."""
    module.__class__ = type("Covering", (type(module),), {})


# --- verify leaves no trace -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "cvt", "timm_cait"])
def test_verify_calls_hooks_once_a_forward_and_leaves_no_trace(name):
    model, x = build(name)
    calls: Counter[str] = Counter()
    holders = {part: module for part, module in model.named_modules() if list(module.children())}
    for part, module in holders.items():  # on leaves they would keep what reads them plain
        module.register_forward_hook(lambda *_, part=part: calls.update([part]))
        module.register_forward_pre_hook(lambda *_, part=part: calls.update([part]))
    model(x)
    once = dict(calls)
    calls.clear()
    model.train()
    model.norm.eval()
    before, random = attributes(model), torch.get_rng_state()
    patch(model, verify=x, dry_run=True)
    assert attributes(model) == before and torch.equal(torch.get_rng_state(), random)
    # Plain, fused and float64; each draw that a suspect costs is three more.
    assert calls.keys() == once.keys()
    assert {calls[part] / once[part] for part in once} <= {3.0, 12.0}


def test_verify_takes_a_lambda_as_forward():
    """Copies share it with all that it holds, which is not in float64."""
    for name in ("mlp.fc1", "mlp.act", "attn"):
        model, x = build("vit")
        part = model.blocks[0].get_submodule(name)
        part.forward = lambda *args, run=part.forward: run(*args) * 1.5
        with torch.no_grad():
            expected = model(x)
            patch(model, verify=x)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_run_in_float64_is_named():
    model, x = build("vit")
    weight = torch.randn(48, 48)
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: output @ weight)
    with pytest.raises(
        RuntimeError, match="verify: ViT has to run in float64 for the comparison, which failed: .*dtype"
    ):
        patch(model, verify=x)
    assert not is_patched(model)


# --- A deep model takes its blocks' time, and no more -----------------------------------------------------------------


def calls(run: Callable[[], object]) -> int:
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def _of_blocks(depth: int) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "num_classes": 2}
    return unpatch(reference.ViT(depth=depth, **sizes)).eval()


def _of_unknown(depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.MultiheadAttention(4, 1), nn.Conv2d(2, 2, 1)) for _ in range(depth)))


@pytest.mark.filterwarnings("ignore:fastvit")
@pytest.mark.parametrize("make", [_of_blocks, _of_unknown])
def test_four_times_the_blocks_are_four_times_the_calls(make):
    counts: list[list[int]] = []
    for depth in (50, 200):
        model = make(depth)
        patch(model)  # what is done once, is done
        unpatch(model)
        counts.append([calls(lambda run=run, model=model: run(model)) for run in (patch, unpatch, report)])
    for few, many in zip(*counts, strict=True):
        assert many < 4.1 * few


def test_the_estimate_of_flops_too():
    few, many = (_report_of(depth) for depth in (5, 20))
    assert many < 4.1 * few


def _report_of(depth: int) -> int:
    model = patch(_of_blocks(depth))
    report(model)
    return calls(lambda: report(model))
