"""Fused classes: a plain class with its slow methods replaced, and nothing added to the instance.

A *seam* is a subclass of :class:`Fused` that holds only the methods to replace. ``fused_class(seam, plain)`` puts it in
front of the plain class, so ``module.__class__ = fused_class(seam, type(module))`` fuses a module in place and
``module.__class__ = plain_class(module)`` undoes it exactly. The same works for a user's own subclass of a known class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_hooks_for_all

from fastvit.ops._packing import PackedWeight
from fastvit.reference.layers import obstacles, symbolically_traced

BACKEND_ATTRIBUTE = "fastvit_backend"


class Fused:
    """What every fused class carries. The attributes live on the class.

    No ``__slots__`` here or in seams: a seam must have the memory layout of an ``nn.Module``, or Python refuses the
    change of class.
    """

    fastvit_op: ClassVar[str]
    """The operator in ``fastvit.ops`` that the replaced methods call."""
    fastvit_reads: ClassVar[Mapping[str, type[nn.Module]]] = {}
    """Sub-modules whose tensors or settings are read instead of calling them, and the one class each may have."""
    fastvit_needs: ClassVar[tuple[str, ...]] = ()
    """Sub-modules that must be fused as well, or it would only call its parts: then ``patch`` leaves it alone."""
    fastvit_plain: ClassVar[type[nn.Module]]
    """The class that ``unpatch`` gives back."""
    fastvit_backend = "auto"
    """Set on the instance, as a plain attribute, only where ``patch`` was given another one."""

    if TYPE_CHECKING:  # the attributes of the class it is put in front of

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy by (seam, plain class), since the class itself is made at run time."""
        rebuild, args, *rest = tuple(super().__reduce_ex__(max(2, protocol)))
        cls = type(self)
        if args and args[0] is cls:  # what object gives: (copyreg.__newobj__, (cls, ...), state, ...)
            return (_rebuild, (cls.__bases__[0], cls.fastvit_plain, *args[1:]), *rest)
        return (rebuild, args, *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript asks this before it compiles; it would get lost in the fused path."""
        raise RuntimeError(
            f"TorchScript cannot compile {type(self).__name__}: call fastvit.unpatch(model) first (torch.compile and "
            "torch.export take the model as it is)"
        )


def _rebuild(seam: type[Fused], plain: type[nn.Module], *new_args: Any) -> nn.Module:
    cls = fused_class(seam, plain)
    return cls.__new__(cls, *new_args)


_classes: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def fused_class(seam: type[Fused], plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``plain`` whose methods ``seam`` replaces; always the same object for the same pair."""
    keep_pages_mapped()
    if (seam, plain) not in _classes:
        attributes = {"__module__": plain.__module__, "__doc__": seam.__doc__, "fastvit_plain": plain}
        _classes[seam, plain] = type(f"Fused{plain.__name__}", (seam, plain), attributes)
    return _classes[seam, plain]


@functools.cache
def keep_pages_mapped() -> None:
    """Let glibc keep the memory of activations between operations instead of giving it back to the kernel.

    It keeps blocks up to the size of the largest that was freed before, and unmaps larger ones, whose pages then fault
    at each operation. One block of nearly the most it learns from, 32 MiB, is freed here, untouched. What the user set
    (``MALLOC_MMAP_THRESHOLD_``) stays; other allocators are not affected.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it is without fastvit."""
    return module.fastvit_plain if isinstance(module, Fused) else type(module)


def give(module: nn.Module, cls: type[nn.Module], backend: str = "auto") -> None:
    """Set a module's class, and its backend as an instance attribute where it is not the default."""
    if holds_own_method(module, "forward"):
        del module.forward  # it would stay that of the class before
    module.__class__ = cls
    vars(module).pop(BACKEND_ATTRIBUTE, None)
    if backend != "auto":
        vars(module)[BACKEND_ATTRIBUTE] = backend


def holds_own_method(module: nn.Module, name: str) -> bool:
    """Whether the method of this name was put on the instance as it is on the class.

    transformers 4 does so when it takes off the wrapper by which it collected attention maps.
    """
    method = vars(module).get(name)
    return (
        isinstance(method, MethodType)
        and method.__self__ is module
        and method.__func__ is inspect.getattr_static(type(module), name)
    )


def undo(model: nn.Module) -> None:
    """Give every fused module its plain class back.

    Raises:
        RuntimeError: somebody put a class of his own over a fused one since (FSDP and parametrisations do), which the
            plain class would silently drop.
    """
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    covered = [f"{name} ({type(module).__name__})" for name, module in fused if not is_ours(type(module))]
    if covered:
        raise RuntimeError(
            "classes were put over fused ones since patch (as FSDP and parametrisations do); take them off before "
            f"patching anew or undoing: {', '.join(covered)}"
        )
    for _, module in fused:
        give(module, plain_class(module))


def is_ours(cls: type) -> bool:
    """Whether a class was made here, and is not derived from one that was."""
    return "fastvit_plain" in vars(cls)


def readable(part: Any, expected: type[nn.Module]) -> bool:
    """:func:`is_plain` and no hook for all modules, a fifth of its time where nothing at all is out of the ordinary."""
    if has_hooks_for_all():
        return False
    if type(part) is expected and "forward" not in vars(part):
        hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        if not hooks and all(type(parameter) in _ORDINARY for parameter in part._parameters.values()):
            return True
    return is_plain(part, expected)


_ORDINARY = (nn.Parameter, PackedWeight, type(None))


def is_plain(part: Any, expected: type[nn.Module]) -> bool:
    """Whether a sub-module is exactly of this class, with nothing hooked to it: only then may its tensors be read."""
    return not obstacles(part, expected)


def intact(module: nn.Module) -> bool:
    """Whether every sub-module that the fused path reads is still the plain class, without hooks.

    Adapters, quantisation, parametrisations and hooks may arrive after ``patch``; the seam then runs the plain forward,
    as it does while torch.fx traces and while a hook is registered for all modules.
    """
    if symbolically_traced() or has_hooks_for_all():
        return False
    return all(not obstacles(getattr(module, name), expected) for name, expected in module.fastvit_reads.items())


@dataclass(frozen=True)
class Row:
    """One class that can be fused: a line in a library's table.

    Attributes:
        path: where the class is defined, ``"timm.models.cait.ClassAttn"``.
        seam: the methods that replace its own.
        check: attributes and shapes; gives the reasons why a module is not as expected.
        known_names: every global and attribute name the forward of the versions read uses; None where the class is
            our own. A forward that uses any other name has changed under us.
        applies: which modules of the class the row is for, where the class has several rows.
    """

    path: str
    seam: type[Fused]
    check: Callable[[nn.Module], list[str]] = field(default=lambda module: [])
    known_names: frozenset[str] | None = None
    applies: Callable[[nn.Module], bool] = field(default=lambda module: True)

    @property
    def op(self) -> str:
        """The operator the seam calls."""
        return self.seam.fastvit_op

    def methods(self) -> set[str]:
        """Names of the methods that fusing replaces."""
        return {name for name, value in vars(self.seam).items() if callable(value) and not name.startswith("__")}


def names_used(code: CodeType) -> set[str]:
    """Global and attribute names in a function's code, nested functions included."""
    used = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            used |= names_used(constant)
    return used
