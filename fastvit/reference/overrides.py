"""What somebody may have hung on a module, on its class or on all modules: such a part is called, never read instead.

Parts are asked at each call. The forward that a class was defined with is noted where the class is first seen here, so
that one put over it later (``nn.Linear.forward = mine``) is noticed.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules import module as _torch

WATCHES = "fastvit_watches"
"""The attribute of a hook that only watches, and need not see a module that runs within another's fused path."""

HOOKS_FOR_ALL = (
    _torch._global_forward_pre_hooks,
    _torch._global_forward_hooks,
    _torch._global_backward_pre_hooks,
    _torch._global_backward_hooks,
)
_CALL = nn.Module.__call__
_ordinary: tuple[type, ...] = (nn.Parameter, type(None), Tensor, FakeTensor)
_forwards: dict[type, Any] = {}
"""By class, the forward it was defined with; None where another had been put over it before."""


def take_for_ordinary(cls: type[Tensor]) -> None:
    """Parts with such parameters may be read: all who read them know the class."""
    global _ordinary
    _ordinary = (*_ordinary, cls)


if hasattr(_symbolic_trace, "_is_fx_tracing_flag"):

    def is_fx_tracing() -> bool:
        """Whether ``torch.fx`` or ``torch.export`` traces, without the warning of torch's own function of that name."""
        return _symbolic_trace._is_fx_tracing_flag

else:  # torch >= 2.14, where it is a thread's own
    is_fx_tracing = _symbolic_trace._get_is_fx_tracing


def symbolically_traced() -> bool:
    """Whether ``torch.fx`` traces with proxies in place of tensors; ``make_fx`` traces with tensors."""
    return _symbolic_trace.is_fx_symbolic_tracing() and get_proxy_mode() is None


def calls_everything() -> bool:
    """Whether no module may be read instead of called: hooks for all, another ``nn.Module.__call__``, torch.fx."""
    if any(HOOKS_FOR_ALL):
        return True
    if is_fx_tracing():  # which replaces nn.Module.__call__ itself
        return symbolically_traced()
    return nn.Module.__call__ is not _CALL


def is_own(method: object, cls: type, name: str) -> bool:
    """Whether a class got its method where it was defined: a replacement comes from elsewhere."""
    module = next(known for known in cls.__mro__ if name in vars(known)).__module__
    code = getattr(method, "__code__", None)
    if code is None or getattr(method, "__module__", None) != module:
        return False
    source = getattr(sys.modules.get(module), "__file__", None)
    return source is None or code.co_filename == source  # functools.wraps copies the name of the module


def own_forward(cls: type, ours: bool = False) -> Any:
    """The forward a class was defined with; None where another had been put over it before it was seen here.

    Args:
        ours: whether the class was made just now with a forward of ours, which may be defined elsewhere.
    """
    if cls not in _forwards:
        forward = getattr(cls, "forward", None)
        _forwards[cls] = forward if ours or is_own(forward, cls, "forward") else None
    return _forwards[cls]


def holds_own_forward(part: Any) -> bool:
    """Whether the forward on an instance is its class's: accelerate leaves it where it takes its hooks off."""
    cls: Any = type(part)
    forward = vars(part)["forward"]
    return isinstance(forward, MethodType) and forward.__self__ is part and forward.__func__ is cls.forward


def is_plain(part: Any, *expected: type[Any]) -> bool:
    """Whether calling a part, of exactly one of these classes, runs what that class defines and nothing beside it.

    Hooks for all modules are left out: :func:`calls_everything` tells of them, once for all parts.
    """
    cls: Any = type(part)
    if cls not in expected:
        return False
    if part is None:
        return True
    forward = _forwards.get(cls)
    if forward is None:
        forward = own_forward(cls)
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    if forward is not cls.forward or hooks or "forward" in part.__dict__:
        return not obstacles(part, cls)
    for parameter in part._parameters.values():  # noqa: SIM110 (a generator would be further calls)
        if type(parameter) not in _ordinary:
            return False
    return True


def must_call(part: Any, *expected: type) -> bool:
    """Whether a part of one of these classes has to be called, where its tensors would else be read."""
    return any(HOOKS_FOR_ALL) or not is_plain(part, *expected)


def obstacles(part: Any, *expected: type) -> list[str]:
    """Why the tensors and settings of a part may not be used without calling it (none: they may).

    Each follows its name: "is ParametrizedLinear, ...", "has forward hooks, ...". Hooks for all modules, which come and
    go, are left out, and so is a fused class that yields to a row for the whole.
    """
    if symbolically_traced():
        return ["is traced by torch.fx, which records the modules that are called"]
    cls: Any = type(part)
    if getattr(cls, "fastvit_yields", False):
        cls = cls.fastvit_plain
    if cls not in expected:
        return [f"is {cls.__name__}, expected is exactly {' or '.join(each.__name__ for each in expected)}"]
    if part is None:
        return []
    found = []
    if own_forward(cls) is not cls.forward:
        found.append(f"is a {cls.__name__}, whose forward was replaced on the class by {cls.forward!r}")
    if "forward" in vars(part) and not holds_own_forward(part):
        found.append("has a forward of its own, which the fused path would not call")
    if any(
        not getattr(hook, WATCHES, False) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ):
        found.append("has forward hooks, which the fused path would not call")
    if part._backward_hooks or part._backward_pre_hooks:
        found.append("has backward hooks, which the fused path would not call")
    for name, parameter in part._parameters.items():
        if type(parameter) not in _ordinary:  # quantised, sharded and not gathered, or of a user's own class
            found.append(f"has a {type(parameter).__name__} for {name}, which kernels cannot read")
    return found


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing beside it, not even a hook that watches."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and not {"forward", "forward_first"} & vars(module).keys() and module._compiled_call_impl is None


for _cls in (
    *(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv2d, nn.LayerNorm, nn.Dropout, nn.Identity),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Sequential, nn.Softmax),
    *(nn.MultiheadAttention, nn.GELU, nn.SiLU, nn.ReLU),
):
    own_forward(_cls)
