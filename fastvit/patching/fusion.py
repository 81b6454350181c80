"""Fused classes: a plain class with its slow methods replaced, and nothing added to the instance.

An *override* is a subclass of :class:`Fused` that holds only the methods to replace. ``fused_class(override, plain)``
puts it in front of the plain class, so ``module.__class__ = fused_class(override, type(module))`` fuses a module in
place and ``module.__class__ = plain_class(module)`` undoes it exactly. The same works for a user's own subclass of a
known class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastvit.ops._packing import PackedWeight
from fastvit.reference.overrides import calls_everything, is_plain, own_forward, take_for_ordinary

take_for_ordinary(PackedWeight)

Parts = tuple[tuple[tuple[str, ...], tuple[type, ...]], ...]
"""Parts of a module by their path, and the classes that each may have."""


class Fused:
    """What every fused class carries. The attributes live on the class.

    No ``__slots__`` here or in overrides: an override must have the memory layout of an ``nn.Module``, or Python
    refuses the change of class.
    """

    fastvit_op: ClassVar[str]
    """The operator in ``fastvit.ops`` that the replaced methods call."""
    fastvit_reads: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}
    """Parts whose tensors or settings are read instead of calling them, "net.0" as well as "fc1", and the class, or the
    classes, each may have."""
    fastvit_needs: ClassVar[tuple[str, ...]] = ()
    """Sub-modules that must be fused as well, or it would only call its parts: then ``patch`` leaves it alone."""
    fastvit_yields: ClassVar[bool] = False
    """Whether it is left plain within a fused module of its kind, which may read it as its own."""
    fastvit_plain: ClassVar[type[nn.Module]]
    """The class that ``unpatch`` gives back."""
    fastvit_backend: ClassVar[str]
    """What ``patch`` was given."""
    fastvit_parts: ClassVar[Parts]
    """``fastvit_reads``, split."""
    fastvit_methods: ClassVar[tuple[tuple[type, str, Any], ...]]
    """Methods as they were when the class was made, with the class they are looked up on: its own, and of the plain
    class those that it replaces."""

    if TYPE_CHECKING:  # the attributes of the class it is put in front of

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy by (override, plain class), since the class itself is made at run time."""
        rebuild, args, *rest = tuple(super().__reduce_ex__(max(2, protocol)))
        cls = type(self)
        if args and args[0] is cls:  # what object gives: (copyreg.__newobj__, (cls, ...), state, ...)
            return (_rebuild, (cls.__bases__[0], cls.fastvit_plain, cls.fastvit_backend, *args[1:]), *rest)
        return (rebuild, args, *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript asks this before it compiles; it would get lost in the fused path."""
        raise RuntimeError(
            f"TorchScript cannot compile {type(self).__name__}: call fastvit.unpatch(model) first (torch.compile and "
            "torch.export take the model as it is)"
        )


def _rebuild(override: type[Fused], plain: type[nn.Module], backend: str = "auto", *new_args: Any) -> nn.Module:
    cls = fused_class(override, plain, backend)
    return cls.__new__(cls, *new_args)


_classes: dict[tuple[type[Fused], type[nn.Module], str, Parts], type[nn.Module]] = {}


def fused_class(override: type[Fused], plain: type[nn.Module], backend: str = "auto") -> type[nn.Module]:
    """The subclass of ``plain`` whose methods ``override`` replaces; always the same object for the same arguments."""
    keep_pages_mapped()
    parts = parts_of(override.fastvit_reads)  # which another registration may have changed
    key = override, plain, backend, parts
    if key not in _classes:
        attributes = {
            "__module__": plain.__module__,
            "__doc__": override.__doc__,
            "fastvit_plain": plain,
            "fastvit_backend": backend,
            "fastvit_parts": parts,
        }
        cls: Any = type(f"Fused{plain.__name__}", (override, plain), attributes)
        names = {name: cls for known in plain.__mro__[: plain.__mro__.index(nn.Module)] for name in vars(known)}
        looked_up = [*names.items(), *((name, plain) for name in names if name in vars(override))]
        cls.fastvit_methods = tuple(
            (owner, name, getattr(owner, name))
            for name, owner in looked_up
            if not name.startswith("__") and isinstance(inspect.getattr_static(owner, name), FunctionType)
        )
        own_forward(cls, ours=hasattr(override, "forward"))  # first seen by a later call, it would be compiled anew
        _classes.setdefault(key, cls)  # whichever thread is first
    return _classes[key]


def parts_of(reads: Mapping[str, type | tuple[type, ...]]) -> Parts:
    """Paths of parts and their classes, as :func:`are_plain` takes them."""
    return tuple(
        (tuple(path.split(".")), expected if isinstance(expected, tuple) else (expected,))
        for path, expected in reads.items()
    )


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
    return plain_of(type(module))


def plain_of(cls: Any) -> type[nn.Module]:
    """The plain class of a fused one; any other itself."""
    return getattr(cls, "fastvit_plain", cls)


def for_backend(cls: Any, backend: str) -> type[nn.Module]:
    """A fused class as it is for a backend."""
    return fused_class(cls.__bases__[0], cls.fastvit_plain, backend)


def give(module: nn.Module, cls: type[nn.Module], backend: str = "auto") -> None:
    """Set a module's class, by one assignment; a fused one for ``backend``, where that is not the default."""
    if holds_own_method(module, "forward"):
        del module.forward  # it would stay that of the class before
    for part in module.modules():
        own_forward(plain_class(part))  # before anybody replaces it
    module.__class__ = cls if backend == "auto" else for_backend(cls, backend)


def holds_own_method(module: nn.Module, name: str) -> bool:
    """Whether the method of this name was put on the instance as it is on its class, fused or plain.

    transformers 4 and accelerate do so when they take off the wrapper that they had put around it.
    """
    method = vars(module).get(name)
    if not isinstance(method, MethodType) or method.__self__ is not module:
        return False
    plain = plain_class(module)
    known = [type(module), plain, *(cls for key, cls in tuple(_classes.items()) if key[1] is plain)]
    return any(method.__func__ is inspect.getattr_static(cls, name) for cls in known)


def check_uncovered(model: nn.Module) -> None:
    """RuntimeError where somebody put a class of his own over a fused one (FSDP and parametrisations do).

    The plain class, or another fused one, would silently drop it.
    """
    covered = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, Fused) and not is_ours(type(module))
    ]
    if covered:
        raise RuntimeError(
            "classes were put over fused ones since patch (as FSDP and parametrisations do); take them off before "
            f"patching anew or undoing: {', '.join(covered)}"
        )


def is_ours(cls: type) -> bool:
    """Whether a class was made here, and is not derived from one that was."""
    return "fastvit_plain" in vars(cls)


def fused_backend(module: Any) -> str | None:
    """The backend for a method of a fused class, which asks this first, or None where the plain method is to run.

    That is so where somebody would not be heard: where a part that is read has another class, a hook or a forward of
    its own, where a method was replaced on the class, where hooks are registered for all modules, and where torch.fx
    traces. A bound method that outlives ``unpatch`` finds a plain module; what is asked of the class here is not to be
    asked again, since another thread may ``unpatch`` in between.
    """
    cls: Any = type(module)
    methods = getattr(cls, "fastvit_methods", None)
    if methods is None or calls_everything():
        return None
    for owner, name, method in methods:
        if getattr(owner, name) is not method:
            return None
    return cls.fastvit_backend if are_plain(module, cls.fastvit_parts) else None


def are_plain(module: Any, parts: Parts) -> bool:
    """Whether all of these parts of a module may be read instead of called, as far as they themselves tell."""
    for path, expected in parts:
        part = module
        for name in path:
            part = part._modules.get(name)
        if not is_plain(part, *expected):
            return False
    return True


def is_fused(part: Any, backend: str, *plain: type[nn.Module]) -> bool:
    """Whether a part is fused for this backend, and nothing but the methods it then got would run if it were called.

    Args:
        plain: the classes that it may have been; any by default.
    """
    cls: Any = type(part)
    if not is_ours(cls) or cls.fastvit_backend != backend or not is_plain(part, cls):
        return False
    for owner, name, method in cls.fastvit_methods:
        if getattr(owner, name) is not method or name in part.__dict__:
            return False
    return not plain or cls.fastvit_plain in plain


@dataclass(frozen=True)
class Row:
    """One class that can be fused: a line in a library's table.

    Attributes:
        path: where the class is defined, ``"timm.models.cait.ClassAttn"``.
        override: the methods that replace its own.
        check: attributes and shapes; gives the reasons why a module is not as expected.
        known_names: every global and attribute name the forward of the versions read uses; None where the class is
            our own. A forward that uses any other name has changed under us.
        applies: which modules of the class the row is for, where the class has several rows.
    """

    path: str
    override: type[Fused]
    check: Callable[[nn.Module], list[str]] = field(default=lambda module: [])
    known_names: frozenset[str] | None = None
    applies: Callable[[nn.Module], bool] = field(default=lambda module: True)

    @property
    def op(self) -> str:
        """The operator the override calls."""
        return self.override.fastvit_op

    def methods(self) -> set[str]:
        """Names of the methods that fusing replaces."""
        return {name for name, value in vars(self.override).items() if callable(value) and not name.startswith("__")}


def names_used(code: CodeType) -> set[str]:
    """Global and attribute names in a function's code, nested functions included."""
    used = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            used |= names_used(constant)
    return used
