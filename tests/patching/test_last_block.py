"""The last block computes the tokens that the head reads, and no others, until somebody could see the difference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fastvit import reference
from fastvit.ops._operator import recording
from fastvit.patching import patch
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.patching.test_blocks import MEDDLING, PARTS
from tests.tiny import ISOTROPIC, build, images, shake

PATHS = dict.fromkeys(("vit", "deit", "deepvit", "cpvt", "ceit"), "blocks.1") | {"cvt": "stage2.blocks.0"}
"""Of each family's last block."""
PREFIX = {"deit": 2}
TOKENS = {"deit": 18, "cvt": 10}


def parts(model: nn.Module, name: str) -> list[str]:
    """Everything around the last block that is called, and could be looked at."""
    names = dict(model.named_modules())
    inside = [f"{PATHS[name]}.{part}" for part in (*PARTS, "leff.conv1", "leff.conv3")]
    return [PATHS[name], "norm", *(part for part in inside if part in names)]


def tokens_of(model: nn.Module, *args: Any) -> list[tuple[str, int]]:
    """The operators that stand behind an attention's projection, and how many tokens each was given."""
    seen: list[tuple[str, int]] = []

    def note(run: Any, call: Any) -> Any:
        seen.append((op, call[0].shape[1]))
        return run(call)

    def record(selection: Any) -> Any:
        nonlocal op
        op = selection.op
        return note if op in ("mlp", "leff") else None

    op = ""
    with torch.no_grad(), recording(record):
        model(*args)
    return seen


@pytest.mark.parametrize("name", PATHS)
def test_only_the_tokens_that_the_head_reads(name):
    model, x = patch(build(name)), images(name)
    seen, tokens = tokens_of(model, x), TOKENS.get(name, 17)
    if name == "ceit":  # of two LeFFs the last is not run at all; the MLP is that of the class tokens
        assert seen == [("leff", tokens), ("mlp", 1)]
    else:
        assert seen[-1] == ("mlp", PREFIX.get(name, 1)) and min(count for _, count in seen[:-1]) > 2
    last = model.get_submodule(PATHS[name])
    handle = last.register_forward_hook(lambda *_: None)
    assert tokens_of(model, x)[1 if name == "ceit" else -1][1] == tokens
    handle.remove()
    assert tokens_of(model, x) == seen
    last.train()
    assert tokens_of(model, x) != seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PATHS)
def test_results(name, dtype):
    def check() -> None:
        model, x = build(name).to(dtype), images(name, batch=3).to(dtype)
        fused, exact = patch(copy.deepcopy(model)), copy.deepcopy(model).double()
        patches = 144 if name == "cvt" else 16
        total = patches + (0 if name == "cvt" else PREFIX.get(name, 1))
        masks = [None, *(torch.rand(3, *shape) < 0.6 for shape in ((patches,), (patches, patches), (total, total)))]
        masks[1][1] = False
        for mask in masks:
            plain = model(x, mask)
            assert torch.equal(plain, model.forward_head(model.forward_features(x, mask)))
            assert_as_accurate(fused(x, mask), plain, exact(x.double(), mask))

    with torch.no_grad():
        on_pooled_draws(check)


@pytest.mark.parametrize("name", PATHS)
def test_features_are_those_of_all_tokens(name):
    model, x = build(name), images(name)
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        for run in (
            lambda each: each.forward_features(x),
            lambda each: each.forward_intermediates(x, return_prefix_tokens=True, norm=True)[1][-1],
            lambda each: each.forward_intermediates(x, indices=1)[0],
        ):
            torch.testing.assert_close(run(fused), run(model), rtol=1e-4, atol=1e-4)
        logits = fused.forward_head(fused.forward_features(x))
        torch.testing.assert_close(fused(x), logits, rtol=1e-4, atol=1e-4)


# --- Whoever looks sees what he saw ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MEDDLING)
@pytest.mark.parametrize("name", PATHS)
def test_whoever_meddles_is_heard(name, kind):
    model, x = build(name), images(name)
    for part in parts(model, name):
        logs: tuple[list[str], list[str]] = ([], [])
        plain, fused = copy.deepcopy(model), patch(copy.deepcopy(model))
        MEDDLING[kind](plain, part, logs[0])
        MEDDLING[kind](fused, part, logs[1])
        with torch.no_grad():
            expected = plain.forward_head(plain.forward_features(x))
            logs[0].clear()
            torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4, msg=part)
        assert logs[0] == logs[1], part


def _shapes(model: nn.Module, part: str, x: Tensor) -> list[Any]:
    seen: list[Any] = []
    module = model.get_submodule(part)
    handles = (
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape)),
    )
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", PATHS)
def test_hooks_see_all_tokens(name):
    model, x = build(name), images(name)
    fused = patch(copy.deepcopy(model))
    for part in parts(model, name):
        shapes = _shapes(fused, part, x)
        assert shapes == _shapes(model, part, x), part
        if part in (PATHS[name], "norm"):
            assert [shape[1] for shape in shapes] == [TOKENS.get(name, 17)] * 2
        assert tokens_of(fused, x)[-1][1] < 3  # and nothing of that stays


@pytest.mark.parametrize("name", PATHS)
def test_hooks_for_all_modules_see_all_tokens(name):
    model, x = build(name), images(name)
    heard: list[list[Any]] = []
    for each in (model, patch(copy.deepcopy(model))):
        names, seen = {module: part for part, module in each.named_modules()}, []

        def hook(module: nn.Module, args: Any, output: Tensor, names: Any = names, seen: Any = seen) -> None:
            seen.append((names[module], output[0].shape if isinstance(output, tuple) else output.shape))

        handle = register_module_forward_hook(hook)
        try:
            with torch.no_grad():
                each(x)
        finally:
            handle.remove()
        heard.append(seen)
    assert heard[0] == heard[1]
    assert {(part, shape[1]) for part, shape in heard[1]} >= {(PATHS[name], TOKENS.get(name, 17))}
    assert dict(heard[1])["norm"][1] == TOKENS.get(name, 17)


STEPS = ("forward_features", "forward_head", "pool_tokens", "finish", "after_block", "run_blocks", "_run", "run_layer")


@pytest.mark.parametrize("where", ["subclass", "class", "instance"])
@pytest.mark.parametrize("name", PATHS)
def test_steps_of_somebody_elses_are_taken(name, where, monkeypatch):
    model, x = build(name), images(name)
    for step in filter(lambda step: hasattr(model, step), STEPS):
        before = getattr(type(model), step)
        counts: list[str] = []

        def own(self, *args, before=before, counts=counts, **options):
            counts.append("called")
            return before(self, *args, **options)

        each = copy.deepcopy(model)
        with monkeypatch.context() as context:
            if where == "subclass":
                each.__class__ = type("Own", (type(model),), {step: own})
            elif where == "class":
                context.setattr(type(model), step, own)
            else:
                setattr(each, step, own.__get__(each))
            fused = patch(copy.deepcopy(each))
            if where == "instance":
                setattr(fused, step, own.__get__(fused))
            with torch.no_grad():
                fused.forward_head(fused.forward_features(x))
                taken = bool(counts)
                counts.clear()
                got = fused(x)
            assert bool(counts) is taken, step
            assert tokens_of(fused, x)[1 if name == "ceit" else -1][1] == TOKENS.get(name, 17), step
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def test_a_pool_over_all_tokens():
    class Mean(reference.ViT):
        def pool_tokens(self, x: Tensor) -> Tensor:
            return x.mean(1)

    model, x = build("vit"), images("vit")
    model.__class__ = Mean
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model.head(model.forward_features(x).mean(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda pool=pool: reference.ViT(**ISOTROPIC, pool=pool) for pool in ("avg", "mean", "gap")),
        lambda: reference.CPVT(**ISOTROPIC, pool="gap"),
        lambda: reference.CPVT(**ISOTROPIC, num_pegs=2),
        lambda: reference.ViT(**{**ISOTROPIC, "depth": 1}),
        lambda: reference.ViT(**{**ISOTROPIC, "depth": 0}),
        lambda: reference.DeepViT(**ISOTROPIC, scale_adjustment=0.5, transformed_blocks=1),
        lambda: reference.CeiT(**{**ISOTROPIC, "img_size": 64, "patch_size": 16}, leff="paper", leff_with_bn=False),
        lambda: reference.CvT(embed_dim=(16, 32, 48), depth=(1, 1, 1), img_size=48, num_heads=(1, 2, 3), pool="gap"),
    ],
    ids=["avg", "mean", "gap", "cpvt_gap", "peg_behind", "one_block", "no_block", "scaled", "paper", "cvt_gap"],
)
def test_models_of_other_shapes(make):
    fused = shake(make()).eval()
    model = copy.deepcopy(fused)
    for each in (patch(fused), fused):
        with torch.no_grad():
            x = torch.randn(2, 3, *model.img_size)
            expected = model.forward_head(model.forward_features(x))
            torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "norms"), [("ceit", "leff.bn1"), ("cvt", "attn.conv_proj_q.bn")])
def test_a_norm_left_in_training_counts(name, norms):
    model, x = build(name), images(name)
    model.get_submodule(f"{PATHS[name]}.{norms}").train()
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    for (path, buffer), expected in zip(fused.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=path)
    assert fused.get_submodule(f"{PATHS[name]}.{norms}").num_batches_tracked == 1


# --- Compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_compiled_exported_and_mapped(name):
    torch._dynamo.reset()
    model, x = build(name), images(name)
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        expected = model(x)
        for run in (
            torch.compile(fused, fullgraph=True, dynamic=True, backend="eager"),
            torch.export.export(fused, (x,)).module(),
            torch.jit.trace(fused, x),
            lambda x: torch.vmap(fused)(x[:, None])[:, 0],  # where strides are those of a part
        ):
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)


def test_a_block_compiled_on_its_own_is_called_so():
    model, x = patch(build("vit")), images("vit")
    ran: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        ran.append("compiled")
        return graph.forward

    with torch.no_grad():
        expected = model(x)
        model.blocks[-1].compile(backend=backend)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert ran
        torch._dynamo.reset()
        model = patch(build("vit"))
        model.blocks[-1] = torch.compile(model.blocks[-1], backend=backend)
        ran.clear()
        model(x)
        assert ran
