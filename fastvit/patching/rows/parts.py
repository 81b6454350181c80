"""What the libraries' tables share: is a sub-module the plain class, and is the structure around it the known one."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fastvit import backends, ops
from fastvit.patching.fusion import holds_own_method, plain_class
from fastvit.reference.cvt import QuickGELU
from fastvit.reference.overrides import is_plain, must_call, obstacles

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",  # or "gelu_tanh"
    QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
_ACTIVATIONS_BY_PATH = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
}
"""Those of libraries, by where their classes are defined."""


def dropout_p(dropout: nn.Dropout) -> float:
    """The probability a dropout layer drops with now."""
    return dropout.p if dropout.training else 0.0


def backend_of_linears(backend: str) -> str:
    """The backend of the linear layers in a block that has this one: none that was asked for has them but "cpp"."""
    return "auto" if backend in ("auto", "cpp") else "reference"


def project(linear: nn.Module, x: Tensor, backend: str) -> Tensor:
    """linear(x), by our own product where it is the faster one and the layer is the plain class without hooks.

    ``backend`` is that of the block.
    """
    if backends.cpp_reasons() or backend not in ("auto", "cpp") or must_call(linear, nn.Linear):
        return linear(x)
    return ops.linear(x, linear.weight, linear.bias)


def activation_name(module: nn.Module) -> str | None:
    """The operators' name of an activation layer; None where they have none, or where it has to be called."""
    cls = type(module)
    name = _ACTIVATIONS.get(cls) or _ACTIVATIONS_BY_PATH.get(f"{cls.__module__}.{cls.__name__}")
    if name is None or not is_plain(module, cls):
        return None
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate) if cls is nn.GELU else name


def is_plain_of(part: Any, library: str) -> bool:
    """:func:`is_plain` of whichever class of a library."""
    cls = type(part)
    return cls.__module__.partition(".")[0] == library and is_plain(part, cls)


def is_rearrangement(part: Any) -> bool:
    """Whether a part is einops' layer, or one that a project brings along under its name."""
    cls = type(part)
    return cls.__name__ == "Rearrange" and is_plain(part, cls)


def forward_is_wrapped(module: nn.Module) -> bool:
    """Whether somebody put a function of his own in place of this instance's forward (to see what it returns)."""
    return "forward" in module.__dict__ and not holds_own_method(module, "forward")


def as_mask_and_bias(attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A library's attention mask as (bool mask, additive bias)."""
    if attention_mask is None:
        return None, None
    return (None, attention_mask) if attention_mask.is_floating_point() else (attention_mask, None)


def check_parameters(module: nn.Module, *names: str) -> list[str]:
    """A reason where the forward of a module's plain class takes other parameters than these."""
    taken = tuple(inspect.signature(plain_class(module).forward).parameters)[1:]
    if taken == names:
        return []
    return [f"forward takes ({', '.join(taken)}), expected is ({', '.join(names)})"]


def check_attributes(module: nn.Module, *names: str) -> list[str]:
    """A reason naming the attributes that a module lacks."""
    missing = [name for name in names if not hasattr(module, name)]
    return [f"{', '.join(missing)} not there"] if missing else []


def check_activation(name: str, activation: nn.Module) -> list[str]:
    """A reason where the operators do not have this activation."""
    if activation_name(activation) is not None:
        return []
    accepted = ", ".join(cls.__name__ for cls in _ACTIVATIONS)
    return [f"{name} is {activation!r}, accepted without hooks are {accepted}"]


def check_linear(module: nn.Module, name: str, width: int) -> list[str]:
    """A reason where a projection gives another width. One that is not a plain linear answers for itself."""
    part: Any = getattr(module, name, None)
    if type(part) is nn.Linear and part.out_features != width:
        return [f"{name} gives {part.out_features} channels, expected {width}"]
    return [] if isinstance(part, nn.Module) else [f"{name} is missing"]


def check_scale(name: str, got: float, head_dim: int) -> list[str]:
    """A reason where the logits are scaled by another number than head_dim ** -0.5."""
    expected = head_dim**-0.5
    return [] if got == expected else [f"{name} is {got}, expected {expected} (head dimension ** -0.5)"]


def check_depthwise(name: str, conv: Any, norm: object = None) -> list[str]:
    """Reasons why tokens cannot be convolved by this convolution (and the BatchNorm behind it) as they lie."""
    if obstacles(conv, nn.Conv2d):
        return [f"{name} is not a plain nn.Conv2d without hooks"]
    expected = {
        "groups": (conv.groups, conv.in_channels),
        "out_channels": (conv.out_channels, conv.in_channels),
        "kernel_size": (conv.kernel_size, (conv.kernel_size[0],) * 2),
        "padding": (conv.padding, (conv.padding[0],) * 2),
        "stride": (conv.stride, (conv.stride[0],) * 2),
        "dilation": (conv.dilation, (1, 1)),
        "padding_mode": (conv.padding_mode, "zeros"),
    }
    found = [f"{name} has {what} {got}, expected {want}" for what, (got, want) in expected.items() if got != want]
    if norm is not None and obstacles(norm, nn.BatchNorm2d):
        found.append(f"the norm behind {name} is not a plain nn.BatchNorm2d without hooks")
    return found
