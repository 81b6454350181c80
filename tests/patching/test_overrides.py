"""What is hung on a part, on its class or on all modules is heard in every library's blocks, as in the plain model.

Each meddling multiplies what a part gives, so that one that is skipped shows in the output, and notes its calls.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from fastvit.patching import patch, patched, unpatch
from fastvit.patching.fusion import Fused, plain_class
from tests import tiny

FACTOR = 1.5
LIBRARIES = {
    "vit_pytorch": ("vit", "simple_vit", "cait", "deepvit", "cvt", "twins_svt"),
    "transformers": ("vit_eager", "vit_sdpa", "cvt"),
    "torchvision": ("vit",),
    "research": ("Mixer", "Talker", "ClassLook", "Deeper", "Convolver", "Locator", "Encoder", "Local", "Perceptron"),
}
MODELS = (*tiny.FAMILIES, *tiny.TIMM, *(f"{library}:{name}" for library, names in LIBRARIES.items() for name in names))


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A plain tiny model in eval mode, and what it takes."""
    library, _, name = name.rpartition(":")
    if not library:
        return tiny.build(name), tiny.images(name)
    pytest.importorskip("vit_pytorch" if library == "vit_pytorch" else "transformers")
    if library == "vit_pytorch":
        from tests.patching import test_vit_pytorch as tests

        return tests.build(name), tests.images(name)
    if library == "transformers":
        from tests.patching import test_transformers as tests

        return tests.build(name), tests.images(name)
    if library == "torchvision":
        from tests.patching import test_torchvision as tests

        return tests.build(), tests.images()
    from tests.patching import test_research as tests

    found = next(case for case, (make, *_) in tests.CASES.items() if type(make()).__name__ == name)
    return tests.build(found)


def parts(model: nn.Module) -> list[str]:
    """The fused modules of a patched model and all within them; of equal blocks the first."""
    names = {
        f"{name}.{inner}".strip(".")
        for name, module in model.named_modules()
        if isinstance(module, Fused)
        for inner, _ in module.named_modules()
    }
    kinds: dict[tuple[type, str], str] = {}
    for name in sorted(names):
        kinds.setdefault((plain_class(model.get_submodule(name)), name.rpartition(".")[2]), name)
    return list(kinds.values())


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def scaled(output: Any) -> Any:
    return (output[0] * FACTOR, *output[1:]) if isinstance(output, tuple) else output * FACTOR


# --- On an instance -------------------------------------------------------------------------------------------------

Log = list[str]


@contextlib.contextmanager
def own_forward(part: nn.Module, log: Log) -> Iterator[None]:
    """As adapters by hand, quantisers and accelerate put it over a layer's."""
    before = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        log.append("forward")
        return scaled(before(*args, **kwargs))

    part.forward = forward
    yield
    del part.forward


@contextlib.contextmanager
def own_method(part: nn.Module, log: Log) -> Iterator[None]:
    """The same as a bound method."""
    before = part.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        log.append("forward")
        return scaled(before(*args, **kwargs))

    part.forward = types.MethodType(forward, part)
    yield
    del part.forward


@contextlib.contextmanager
def hook(part: nn.Module, log: Log) -> Iterator[None]:
    def note(module: nn.Module, args: Any, output: Any) -> Any:
        log.append("hook")
        return scaled(output)

    with part.register_forward_hook(note):
        yield


@contextlib.contextmanager
def pre_hook(part: nn.Module, log: Log) -> Iterator[None]:
    def note(module: nn.Module, args: Any, kwargs: Any) -> Any:
        log.append("pre_hook")
        if args:
            return (args[0] * FACTOR, *args[1:]), kwargs
        return args, {name: value * FACTOR if isinstance(value, Tensor) else value for name, value in kwargs.items()}

    with part.register_forward_pre_hook(note, with_kwargs=True):
        yield


@contextlib.contextmanager
def own_class(part: nn.Module, log: Log) -> Iterator[None]:
    before = type(part)

    class Own(before):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            log.append("class")
            return scaled(super().forward(*args, **kwargs))

    part.__class__ = Own
    yield
    part.__class__ = before


@contextlib.contextmanager
def forward_on_class(part: nn.Module, log: Log) -> Iterator[None]:
    """``nn.Linear.forward = mine``, ``SomeAttention.forward = mine``."""
    cls = plain_class(part)
    before = cls.forward
    own = vars(cls).get("forward")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        log.append(type(part).__name__.removeprefix("Fused"))
        return scaled(before(self, *args, **kwargs))

    cls.forward = forward
    yield
    if own is None:
        del cls.forward
    else:
        cls.forward = own


ON_INSTANCES = (own_forward, own_method, hook, pre_hook, own_class)


def outputs(model: nn.Module, x: Tensor, name: str, meddle: Callable[..., Any]) -> tuple[Tensor, Log]:
    log: Log = []
    with meddle(model.get_submodule(name), log):
        return model(x), log


@pytest.mark.parametrize("meddle", [*ON_INSTANCES, forward_on_class], ids=lambda meddle: meddle.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_after_patch(name, meddle):
    model, x = build(name)
    names = parts(patch(model))
    assert names
    with torch.no_grad():
        heard = {part: outputs(model, x, part, meddle) for part in names}
        unpatch(model)
        for part in names:
            expected, log = outputs(model, x, part, meddle)
            assert heard[part][1] == log, part
            torch.testing.assert_close(
                heard[part][0], expected, rtol=1e-4, atol=1e-4, msg=lambda m, p=part: f"{p}: {m}"
            )


@pytest.mark.filterwarnings("ignore:fastvit")  # nothing may be left to fuse
@pytest.mark.parametrize("name", [*tiny.FAMILIES, "timm_vit", "timm_cait", "torchvision:vit", "vit_pytorch:deepvit"])
def test_before_patch(name):
    model, x = build(name)
    names = parts(patch(model))
    unpatch(model)
    for meddle in (own_forward, forward_on_class):
        for part in names:
            log: Log = []
            with torch.no_grad(), meddle(model.get_submodule(part), log):
                expected, of_plain = model(x), list(log)
                log.clear()
                with patched(model):
                    got = model(x)
            assert log == of_plain, part
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- On all modules ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_call() -> Iterator[None]:
    before = nn.Module.__call__
    nn.Module.__call__ = lambda self, *args, **kwargs: _less(self, before(self, *args, **kwargs))
    yield
    nn.Module.__call__ = before


def _less(module: nn.Module, output: Any) -> Any:
    """A clamp of what leaves have."""
    return output if list(module.children()) or not isinstance(output, Tensor) else output.clamp(-0.1, 0.1)


FOR_ALL = {
    "hook": lambda: register_module_forward_hook(lambda module, args, output: _less(module, output)),
    "pre_hook": lambda: register_module_forward_pre_hook(
        lambda module, args: None if list(module.children()) or not args else (args[0] * FACTOR, *args[1:])
    ),
    "call": own_call,
}


@pytest.mark.parametrize("kind", FOR_ALL)
@pytest.mark.parametrize("name", MODELS)
def test_all_modules(name, kind):
    model, x = build(name)
    with torch.no_grad():
        with FOR_ALL[kind]():
            expected = model(x)
        patch(model)
        model(x)  # decides what has no row
        fused = model(x)
        with FOR_ALL[kind]():
            got = model(x)
        assert not torch.allclose(got, fused, rtol=1e-3)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), fused)


# --- Adapters, norms of weights, pruning -----------------------------------------------------------------------------


def _pruned(layer: nn.Module) -> Callable[[], object]:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return lambda: prune.remove(layer, "weight")


def _parametrized(norm: Callable[[nn.Module], object]) -> Callable[[nn.Module], Callable[[], object]]:
    def put(layer: nn.Module) -> Callable[[], object]:
        norm(layer)
        return lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight")

    return put


def _normed(norm: Callable[[nn.Module], object], remove: Callable[[nn.Module], object]) -> Callable[..., Any]:
    def put(layer: nn.Module) -> Callable[[], object]:
        norm(layer)
        return lambda: remove(layer)

    return put


WEIGHTS = {
    "prune": _pruned,
    "weight_norm": _parametrized(parametrizations.weight_norm),
    "spectral_norm": _parametrized(parametrizations.spectral_norm),
    "old_weight_norm": _normed(old_weight_norm, nn.utils.remove_weight_norm),
    "old_spectral_norm": _normed(old_spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old norms
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["vit", "cait", "cvt", "timm_vit", "timm_cait", "torchvision:vit", "vit_pytorch:vit"])
def test_weights_that_are_computed(name, kind):
    """After patch, before it, and once they are numbers again."""
    model, x = build(name)
    patch(model)
    layers = [model.get_submodule(part) for part in parts(model)]
    layers = [layer for layer in layers if type(layer) in (nn.Linear, nn.Conv2d)]
    with torch.no_grad():
        for layer in layers:  # so that each of these changes what the weight is
            layer.weight.mul_(2.0)
    before = model(x)
    merge = [WEIGHTS[kind](layer) for layer in layers]
    with torch.no_grad():
        late = model(x)
        expected = unpatch(model)(x)
        with patched(model):
            early = model(x)
        patch(model)
        for each in merge:
            each()
        merged = model(x)
    assert kind.endswith("weight_norm") or not torch.allclose(expected, before, rtol=1e-3)
    for got in (late, early, merged):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


OFFLOADED = (
    "vit",
    "deit",
    "deepvit",
    "cait",
    "cpvt",
    "ceit",
    "twins_pcpvt",
    "timm_vit",
    "timm_cait",
    "timm_twins",
    "vit_pytorch:deepvit",
    "transformers:vit_sdpa",
)


@pytest.mark.parametrize("first", ["offload", "patch"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_offloading_by_accelerate(name, first):
    """It puts a forward on each instance, which fetches the weights that else lie on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    model, x = build(name)
    with torch.no_grad():
        expected = model(x)
        if first == "patch":
            patch(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        if first == "offload":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # there may be nothing to fuse
                patch(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        unpatch(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        accelerate.hooks.remove_hook_from_submodules(model)
        with_forwards = classes(patch(model))
        for module in model.modules():
            vars(module).pop("forward", None)
        assert classes(patch(model)) == with_forwards  # that which accelerate leaves is each class's own
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["as a function", "as a method"])
def test_collectors_of_maps_get_them(kind):
    """As those of timm and transformers are written: over a dropout's forward, or over that of the attention."""
    maps: list[Tensor] = []

    def collects(before: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args = args[kind == "as a method" :]
            output = before(*args, **kwargs)
            maps.append(output[1] if isinstance(output, tuple) else output)
            return output

        return forward

    def put(part: nn.Module) -> None:
        forward = collects(part.forward)
        part.forward = types.MethodType(forward, part) if kind == "as a method" else forward

    for name in ("vit", "deepvit", "cait", "twins_pcpvt", "timm_vit", "timm_cait", "vit_pytorch:vit", "research:Mixer"):
        model, x = build(name)
        for attention in patch(model).modules():
            if hasattr(attention, "fused_attn"):
                attention.fused_attn = False
        drops = [part.attn_drop for part in model.modules() if hasattr(part, "attn_drop")]
        drops += [part.dropout for part in model.modules() if "attend" in dict(part.named_children())]
        maps.clear()
        for drop in drops:
            put(drop)
        model(x)
        assert len(maps) == len(drops) > 0, name
        assert all(each.dim() == 4 and each.shape[1] > 0 for each in maps)
    model, x = build("transformers:vit_eager")
    attentions = [part for part in patch(model).modules() if hasattr(part, "scaling")]
    maps.clear()
    for attention in attentions:
        put(attention)
    model(x)
    assert len(maps) == len(attentions) == 2 and all(each.shape[-1] == each.shape[-2] for each in maps)


# --- Bound methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_bound_methods_outlive_the_class(name):
    model, x = build(name)
    of_plain = {part: model.get_submodule(part).forward for part in dict(model.named_modules()) if part}
    with torch.no_grad():
        expected = model(x)
        fused = [module for module in patch(model).modules() if isinstance(module, Fused)]
        bound = {module: module.forward for module in fused}

        def check() -> None:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)

        for module in fused:
            module.forward = lambda *args, run=bound[module], **kwargs: run(*args, **kwargs)
        check()
        unpatch(model)
        check()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is nothing left to fuse
            with patched(model):
                check()
        for module in fused:
            module.forward = bound[module]  # as accelerate and transformers 4 put it back
        check()
        # Those without a row are fused at a first call, which the model itself waits for.
        assert {module for module in patch(model).modules() if isinstance(module, Fused)} >= {*fused} - {model}
        assert not any("forward" in vars(module) for module in {*fused} - {model})
        for part, forward in of_plain.items():
            model.get_submodule(part).forward = lambda *args, run=forward, **kwargs: run(*args, **kwargs)
        check()
