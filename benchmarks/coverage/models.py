"""Which classes are looked at, and a small model of each with random weights.

timm: for every model class, first word of a model's name and set of layer classes asked for, the smallest
configuration. transformers: every model class whose main input is an image, and that holds no language model. torch:
its own attention modules. Depths are cut to two blocks a stage, widths with the number of heads, and images to 64
pixels, as far as a class takes that; what is then still larger than 80 million parameters is left out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.libraries import declare_torchvision_nms
from fastvit.cli.models import randomize

LIBRARIES = ("timm", "transformers", "torch")
BATCH = 2
DEPTH = 2
PIXELS = 64
LARGEST = 80e6
LABELS = 32
"""Logits are judged together: of two alone, one may be right by luck."""
_SIZES = ("test", "atto", "femto", "pico", "zepto", "nano", "micro", "mini", "xxt", "xt", "tiny", "xxs", "xs", "small")


Attempt = Callable[[], tuple[nn.Module, Any]]
"""Makes a model in eval mode, and an example: a tensor, a tuple of arguments or a dict of keyword ones."""


def _small(make: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode, its weights moved from their initial values; TooLarge where it is."""
    with contextlib.suppress(RuntimeError, NotImplementedError, TypeError), torch.device("meta"):
        _check_size(make())  # before time and memory are spent on it; some constructors look at their tensors
    model = make()
    _check_size(model)
    return randomize(model).eval()


class TooLarge(Exception):  # noqa: N818 (no error: the model is left out)
    """The model has too many parameters; further attempts are larger."""


def _check_size(model: nn.Module) -> None:
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        raise TooLarge(f"{size / 1e6:.0f} million parameters are more than {LARGEST / 1e6:.0f} million")


class Class(NamedTuple):
    """A row: its name, the model's class, and what to try until a model is built and runs, the smallest first."""

    name: str
    cls: str
    attempts: Callable[[], Iterator[Attempt]]


def classes(library: str) -> list[Class]:
    """All of a library; ImportError where it is not installed."""
    declare_torchvision_nms()
    return {"timm": _timm, "transformers": _transformers, "torch": _torch}[library]()


# --- timm -----------------------------------------------------------------------------------------------------------


class _Asked(Exception):  # noqa: N818 (no error: it ends a construction where the class is known)
    def __init__(self, cls: type, settings: dict[str, Any]) -> None:
        self.cls, self.settings = cls, settings


def _timm() -> list[Class]:
    import timm

    groups: dict[tuple[Any, ...], list[tuple[Any, str, type, dict[str, Any]]]] = {}
    for name in timm.list_models():
        asked = _asked_of_timm(name)
        word = re.sub(r"\d.*", "", name.split("_")[0])
        key = (asked.cls, word, frozenset(_functions(asked.settings)))
        rank = next((place for place, size in enumerate(_SIZES) if size in name.split("_")), len(_SIZES))
        groups.setdefault(key, []).append(
            ((rank, sum(_numbers(asked.settings)), name), name, asked.cls, asked.settings)
        )
    smallest = sorted((min(group, key=lambda each: each[0]) for group in groups.values()), key=lambda each: each[1])
    return [
        Class(f"timm/{name}", cls.__name__, _attempts_of_timm(name, cls, given)) for _, name, cls, given in smallest
    ]


def _asked_of_timm(name: str) -> _Asked:
    """The class and the settings that an entry of timm's registry asks timm's builder for."""
    from timm.models import _registry

    entry = _registry.model_entrypoint(name)
    module = sys.modules[entry.__module__]
    builder = module.build_model_with_cfg  # type: ignore[attr-defined]

    def stop(cls: Any, variant: str, pretrained: bool, **settings: Any) -> nn.Module:
        raise _Asked(cls, settings)

    module.build_model_with_cfg = stop  # type: ignore[attr-defined]
    try:
        entry()
    except _Asked as asked:
        return asked
    finally:
        module.build_model_with_cfg = builder  # type: ignore[attr-defined]
    raise RuntimeError(f"timm/{name} does not call build_model_with_cfg")


def _functions(settings: Any) -> Iterator[str]:
    """Names of the classes and functions among nested settings."""
    if isinstance(settings, dict):
        settings = [value for key, value in settings.items() if key != "pretrained_filter_fn"]
    if isinstance(settings, (tuple, list)):
        for each in settings:
            yield from _functions(each)
    elif callable(settings):
        yield str(getattr(getattr(settings, "func", settings), "__qualname__", settings))


def _numbers(settings: Any) -> Iterator[float]:
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, (tuple, list)):
        for each in settings:
            yield from _numbers(each)
    elif isinstance(settings, (int, float)) and not isinstance(settings, bool):
        yield settings


def _attempts_of_timm(name: str, cls: type, given: dict[str, Any]) -> Callable[[], Iterator[Attempt]]:
    cut = {key: _cut(value) for key, value in given.items() if key in ("depth", "depths", "layers")}
    sizes = {key: given[key] for key in ("embed_dim", "num_heads") if isinstance(given.get(key), int)}
    narrow = {**cut, **_narrowed(sizes)}
    sized = "img_size" in inspect.signature(cls).parameters

    def made(settings: dict[str, Any], pixels: int | None) -> tuple[nn.Module, Any]:
        import timm

        model = _small(lambda: timm.create_model(name, num_classes=LABELS, **settings))
        shape = model.default_cfg["input_size"]
        return model, torch.randn(BATCH, *(shape if pixels is None else (shape[0], pixels, pixels)))

    def attempts() -> Iterator[Attempt]:
        for settings in (narrow, cut) if sized else ():
            for pixels in (PIXELS, 2 * PIXELS):
                yield functools.partial(made, {**settings, "img_size": pixels}, pixels)
        for settings in (cut, {}) if cut else ({},):
            for small in () if sized else (PIXELS, 2 * PIXELS):
                yield functools.partial(made, settings, small)
            yield functools.partial(made, settings, None)

    return attempts


def _cut(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(each) for each in value)
    return min(value, DEPTH) if isinstance(value, int) else value


def _narrowed(sizes: dict[str, int]) -> dict[str, int]:
    """Widths and numbers of heads over their largest common divisor of 4, 3 and 2 that leaves two heads."""
    heads = [value for name, value in sizes.items() if "heads" in name]
    for by in (4, 3, 2) if heads else ():
        if min(heads) >= 2 * by and not any(value % by for value in sizes.values()):
            return {name: value // by for name, value in sizes.items()}
    return {}


# --- transformers ---------------------------------------------------------------------------------------------------


def _transformers() -> list[Class]:
    import transformers
    import transformers.models

    found: dict[str, type] = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
        except ImportError:  # no such file, or one that needs another library
            continue
        for name in getattr(module, "__all__", ()):
            cls = getattr(module, name, None)
            if _takes_images(cls) and not name.endswith("PreTrainedModel"):
                found[name] = cls
    return [Class(f"transformers/{name}", name, _attempts_of_transformers(found[name])) for name in sorted(found)]


def _takes_images(cls: Any) -> bool:
    import transformers

    return (
        inspect.isclass(cls)
        and issubclass(cls, transformers.PreTrainedModel)
        and cls.config_class is not None
        and cls.main_input_name == "pixel_values"
        and "text_config" not in getattr(cls.config_class, "sub_configs", {})
    )


def _attempts_of_transformers(cls: Any) -> Callable[[], Iterator[Attempt]]:
    def made(pixels: int | None, narrow: bool, shallow: bool, which: str) -> tuple[nn.Module, Any]:
        config = cls.config_class()
        config.num_labels = LABELS
        for each in _configurations(config):
            _shrink(each, pixels, narrow, shallow)
        example = _examples(config, pixels)[which]
        if not example.keys() <= inspect.signature(cls.forward).parameters.keys():
            raise TypeError(f"{cls.__name__} takes no {', '.join(example)}")
        return _small(lambda: cls(copy.deepcopy(config))), example

    settings = ((PIXELS, True, True), (PIXELS, True, False), (PIXELS, False, True), (None, False, False))
    return lambda: (functools.partial(made, *each, which) for each in settings for which in _CALLS)


_LAYERS = re.compile(r"(^|_)(num_(hidden_|encoder_|decoder_)?layers|(en|de)coder_layers|depth)$|^n_layers?$")
_STAGES = ("depths", "num_blocks", "depth", "num_encoder_blocks", "stage_num_blocks")
_WIDTHS = re.compile(
    r"^(hidden_size|intermediate_size|d_model|embed_dim|.*ffn_dim|.*_heads|.*hidden_dim|hidden_dims?)$"
)


def _configurations(config: Any) -> list[Any]:
    """A configuration and those it holds, each once."""
    found = {id(config): config}
    for each in [config]:
        for value in vars(each).values():
            if hasattr(value, "to_diff_dict") and id(value) not in found:
                found |= {id(inner): inner for inner in _configurations(value)}
    return list(found.values())


def _shrink(config: Any, pixels: int | None, narrow: bool, shallow: bool) -> None:
    """Smaller images where ``pixels`` are given, fewer heads and fewer layers."""
    sizes = {name: value for name, value in vars(config).items() if type(value) is int}
    layers = {name: min(value, DEPTH) for name, value in sizes.items() if _LAYERS.search(name)}
    changes: dict[str, Any] = layers if shallow else {}
    changes |= (
        _narrowed({name: value for name, value in sizes.items() if value and _WIDTHS.match(name)}) if narrow else {}
    )
    for name, value in vars(config).items():
        if (
            shallow
            and name in _STAGES
            and isinstance(value, (tuple, list))
            and all(type(each) is int for each in value)
        ):
            changes[name] = _cut(value)
        elif name in ("image_size", "img_size") and pixels is not None and value is not None:
            patch = getattr(config, "patch_size", 1) or 1
            patch = patch[0] if isinstance(patch, (tuple, list)) else patch
            side = -(-pixels // patch) * patch if isinstance(patch, int) else pixels
            changes[name] = [side, side] if isinstance(value, (tuple, list)) else side
    for name, value in changes.items():
        setattr(config, name, value)


def _examples(config: Any, pixels: int | None) -> dict[str, dict[str, Any]]:
    """By one of ``_CALLS``, an example."""
    vision = next((getattr(config, name) for name in _VISION if getattr(config, name, None) is not None), config)
    sizes = [getattr(each, "image_size", None) or getattr(each, "img_size", None) for each in (config, vision)]
    size = next((each for each in sizes if each), None) or pixels or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = next((n for n in (getattr(each, "num_channels", None) for each in (config, vision)) if n), 3)
    image = torch.randn(BATCH, channels, height, width)
    film = torch.randn(BATCH, getattr(config, "num_frames", None) or 2, channels, height, width)
    words = torch.arange(1, 9).expand(BATCH, -1)
    calls = (
        {"pixel_values": image},
        {"pixel_values": film},
        {"pixel_values": image, "input_ids": words},
        {"pixel_values": image, "decoder_input_ids": words},
    )
    return dict(zip(_CALLS, calls, strict=True))


_CALLS = ("image", "film", "image and text", "image and answer")
_VISION = ("vision_config", "backbone_config", "encoder")


# --- torch ----------------------------------------------------------------------------------------------------------


def _torch() -> list[Class]:
    tokens = {"d_model": 64, "nhead": 4, "dim_feedforward": 128, "batch_first": True}

    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(**tokens), DEPTH)

    def decoder() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(**tokens), DEPTH)

    x = torch.randn(BATCH, 50, 64, generator=torch.Generator().manual_seed(0))
    whole = {"query": x, "key": x, "value": x, "need_weights": False}
    rows: list[tuple[str, Callable[[], nn.Module], Any]] = [
        ("nn.MultiheadAttention", lambda: nn.MultiheadAttention(64, 4, batch_first=True), whole),
        ("nn.TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(**tokens), x),
        ("nn.TransformerEncoder", encoder, x),
        ("nn.TransformerDecoder", decoder, (x, x)),
        ("nn.Transformer", lambda: nn.Transformer(64, 4, DEPTH, DEPTH, 128, batch_first=True), (x, x)),
    ]

    def attempts(make: Callable[[], nn.Module], example: Any) -> Callable[[], Iterator[Attempt]]:
        return lambda: iter([lambda: (randomize(make()).eval(), example)])

    return [Class(f"torch/{name}", name, attempts(make, example)) for name, make, example in rows]


def selected(rows: Iterable[Class], only: Iterable[str] | None) -> list[Class]:
    """The rows whose name contains one of these texts; all where there are none."""
    texts = list(only or ())
    return [row for row in rows if not texts or any(text in row.name for text in texts)]
