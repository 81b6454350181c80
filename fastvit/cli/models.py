"""Models by name: ``timm/deit_small_patch16_224``, ``transformers/ViTConfig``, ``my.module:factory`` and so on.

Nothing is downloaded. Models that come without weights get random ones that behave like trained ones.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.cli import CannotLoad
from fastvit.patching import create_model
from fastvit.patching.images import own_shape
from fastvit.reference.registry import list_models, nearest_names

CLASSES = 1000
DEFAULT_SIZE = 224


class Candidate(NamedTuple):
    """A plain model, and ``inputs(batch)``: a tensor, a tuple of arguments or a dict of keyword arguments."""

    name: str
    model: nn.Module
    inputs: Callable[[int], Any]


def load(name: str, *, size: int | None = None, seed: int = 0) -> Candidate:
    """The model of a name, in eval mode, on the CPU, in float32 or as it was saved.

    Args:
        name: "library/model", "module.path:factory" (a function without arguments that gives a model, or a model and an
            example input; a class; or a model), or one of :func:`fastvit.list_models`.
        size: pixels of the square images; the model's own by default.
        seed: of weights and inputs.

    Raises:
        CannotLoad: no such model, or its library is not there; says what is.
    """
    torch.manual_seed(seed)
    library, slash, rest = name.partition("/")
    if slash and library in LOADERS:
        model, inputs = LOADERS[library](rest, size)
    elif ":" in name:
        model, inputs = _from_factory(name, size)
    elif name in list_models():
        model, inputs = _from_fastvit(name, size)
    else:
        known = ", ".join(f"{library}/NAME" for library in LOADERS)
        near = _nearest(name, list_models())
        raise CannotLoad(f"model: expected {known}, or package.module:factory for your own, got {name!r}{near}")
    return Candidate(name, model.eval(), inputs)


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the names most like one that does not exist, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = nearest_names(name.lower(), by_lower)
    return f"; did you mean {', '.join(by_lower[match] for match in near)}?" if near else ""


def _library(name: str) -> Any:
    """The module of a library, or why there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise CannotLoad(f"{name} is not installed here: pip install {name.replace('_', '-')}") from error
        raise CannotLoad(f"{name} cannot be imported: {error}") from error
    except Exception as error:
        cure = ""
        if "torchvision::" in str(error):  # its operators, which its binary declares
            cure = f"; the torchvision here is not that of torch {torch.__version__}: pip install --upgrade torchvision"
        raise CannotLoad(f"{name} cannot be imported: {type(error).__name__}: {error}{cure}") from error


def _images(model: nn.Module, size: int | None) -> Callable[[int], Any]:
    """Random images of the size a model takes, as its attributes give it."""
    shape = _shape(model, size)
    return lambda batch: torch.randn(batch, *shape)


def _shape(model: nn.Module, size: int | None) -> tuple[int, int, int]:
    channels, height, width = own_shape(model) or (3, DEFAULT_SIZE, DEFAULT_SIZE)
    return (channels, height, width) if size is None else (channels, size, size)


def randomize(model: nn.Module) -> nn.Module:
    """Move fresh weights away from the values that hide errors: LayerScale near 0, heads of zeros, identity norms."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


_Loaded = tuple[nn.Module, Callable[[int], Any]]


def _from_fastvit(name: str, size: int | None) -> _Loaded:
    try:
        model = create_model(name, fused=False, img_size=size)
    except ValueError as error:
        raise CannotLoad(f"fastvit/{name}: {error}") from error
    return randomize(model), _images(model, size)


def _from_timm(name: str, size: int | None) -> _Loaded:
    timm = _library("timm")
    if not timm.is_model(name):
        raise CannotLoad(f"timm {timm.__version__} has no model {name!r}{_nearest(name, timm.list_models())}")
    options = {} if size is None else {"img_size": size}
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        raise CannotLoad(f"timm/{name} cannot be made for images of another size: {error}") from error
    return randomize(model), _images(model, size)


def _from_torchvision(name: str, size: int | None) -> _Loaded:
    models = _library("torchvision").models
    known = models.list_models()
    if name not in known:
        raise CannotLoad(f"torchvision has no model {name!r}{_nearest(name, known)}")
    options = {} if size is None or not name.startswith("vit") else {"image_size": size}
    model = models.get_model(name, weights=None, **options)
    return randomize(model), _images(model, size)


def _from_transformers(name: str, size: int | None) -> _Loaded:
    transformers = _library("transformers")
    if Path(name).is_dir():
        model = _saved(transformers, name)
    else:
        known = [attribute for attribute in dir(transformers) if attribute.endswith("Config")]
        if name not in known:
            raise CannotLoad(
                f"transformers {transformers.__version__} has no configuration class {name!r}, and there is no such "
                f"directory{_nearest(name, known)}"
            )
        options = {} if size is None else {"image_size": size}
        config = getattr(transformers, name)(num_labels=CLASSES, **options)  # two logits are too few to judge by
        model = randomize(_of_config(transformers, config))
    shape = _shape(model, size)
    return model, lambda batch: {"pixel_values": torch.randn(batch, *shape)}


def _saved(transformers: Any, path: str) -> nn.Module:
    """The model saved in a directory, of the class its configuration names."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        return cls.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CannotLoad(f"transformers cannot load {path!r}: {error}") from error


def _of_config(transformers: Any, config: Any) -> nn.Module:
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModel):
        try:
            if type(config) in auto._model_mapping:
                found = auto._model_mapping[type(config)]  # of DeiT two, which from_config needs a choice between
                return (found[0] if isinstance(found, tuple) else found)._from_config(config)
        except ImportError as error:  # its models are imported when they are asked for
            raise CannotLoad(f"transformers cannot import the model of a {type(config).__name__}: {error}") from error
    raise CannotLoad(f"transformers has no model for a bare {type(config).__name__}")


_VIT_PYTORCH_ARGUMENTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_classes": CLASSES,
    "dim": 192,
    "depth": 12,
    "cls_depth": 2,
    "heads": 3,
    "mlp_dim": 768,
}
"""Values, those of DeiT-Tiny, for the arguments that its classes give no default."""


def _from_vit_pytorch(name: str, size: int | None) -> _Loaded:
    package = _library("vit_pytorch")
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    module, dot, class_name = name.rpartition(".")
    if dot and module not in modules:
        raise CannotLoad(f"vit_pytorch has no module {module!r}{_nearest(module, modules)}")
    home = _library(f"vit_pytorch.{module}") if dot else package
    cls = getattr(home, class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        known = [key for key, value in vars(home).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
        raise CannotLoad(
            f"{home.__name__} has no model {class_name!r}{_nearest(class_name, known)} (others are named by their "
            "module: vit_pytorch/cait.CaiT)"
        )
    model = _with_usual_arguments(cls, size)
    pixels = size or _VIT_PYTORCH_ARGUMENTS["image_size"]
    return randomize(model), lambda batch: torch.randn(batch, 3, pixels, pixels)


def _with_usual_arguments(cls: type[nn.Module], size: int | None) -> nn.Module:
    usual = {**_VIT_PYTORCH_ARGUMENTS, **({} if size is None else {"image_size": size})}
    wanted = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    unknown = [parameter.name for parameter in wanted if parameter.name not in usual]
    if unknown:
        raise CannotLoad(
            f"{cls.__module__}.{cls.__name__} wants {', '.join(unknown)}: write a function that makes it, and give "
            "package.module:function"
        )
    return cls(**{parameter.name: usual[parameter.name] for parameter in wanted})


def _from_factory(name: str, size: int | None) -> _Loaded:
    path, _, attributes = name.partition(":")
    try:
        made: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{path}.".startswith(f"{error.name}."):
            raise CannotLoad(f"model: there is no module {error.name!r} to take {attributes!r} from") from error
        raise
    for attribute in attributes.split("."):
        if not hasattr(made, attribute):
            raise CannotLoad(f"{path} has no {attribute!r}{_nearest(attribute, dir(made))}")
        made = getattr(made, attribute)
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CannotLoad(f"{name}: expected a torch.nn.Module, or one and an example, got {type(model).__name__}")
    return model, _images(model, size) if example is None else lambda batch: example


LOADERS: dict[str, Callable[[str, int | None], _Loaded]] = {
    "fastvit": _from_fastvit,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
    "vit_pytorch": _from_vit_pytorch,
}
"""By library, what makes a model and its inputs from a name and an image size."""


def to(example: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An example with its tensors on a device, floating ones in a dtype."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return pytree.tree_map_only(Tensor, move, example)


def batch_of(example: Any) -> int:
    """How many images an example holds: the leading size of its first tensor."""
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else 1
