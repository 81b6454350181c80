"""Attention and convolution classes of one's own: ``@fastvit.register`` tells ``patch`` how to fuse them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, fused_backend, plain_class

Override = TypeVar("Override", bound=type[Fused])
Check = Callable[[nn.Module], list[str]]

REGISTERED: dict[type[nn.Module], Row] = {}
"""The row of each class registered."""


def _no_reasons(module: nn.Module) -> list[str]:
    return []


def register(
    cls: type[nn.Module],
    *,
    op: str,
    reads: Mapping[str, type | tuple[type, ...]] | None = None,
    check: Check = _no_reasons,
) -> Callable[[Override], Override]:
    """Teach ``patch`` to fuse a class of your own.

    The decorated class, a subclass of ``fastvit.Fused`` at module level (so that patched models can be pickled), holds
    the methods that replace those of ``cls``; ``self`` is the module with all its attributes. Give the operator
    ``backend=self.fastvit_backend``, and call ``self.fastvit_plain.<method>(self, ...)`` for what you do not take. The
    plain method runs instead of yours while a part in ``reads`` is not plain, while hooks are registered for all
    modules, and where the method of ``cls`` was replaced since. Subclasses of ``cls`` that override none of these
    methods are fused too. A second registration replaces the first.

    Examples:
        >>> import fastvit, torch
        >>> class MyAttention(torch.nn.Module):
        ...     def forward(self, q, k, v):
        ...         return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        >>> @fastvit.register(MyAttention, op="masked_attention")
        ... class FusedMyAttention(fastvit.Fused):
        ...     def forward(self, q, k, v):
        ...         return fastvit.ops.masked_attention(q, k, v, backend=self.fastvit_backend)
        >>> model, q = MyAttention(), torch.randn(2, 3, 197, 64)
        >>> model = fastvit.patch(model, verify=(q, q, q))  # holds your methods to the accuracy of the plain ones
        >>> fastvit.is_patched(model)
        True
        >>> fastvit.unregister(MyAttention)

    Args:
        cls: the class to fuse.
        op: the operator of ``fastvit.ops`` that the methods call; what ``patch(ops=...)`` and reports go by.
        reads: parts whose tensors or settings the methods read instead of calling them ("drop", "net.0"), and the
            class, or the classes, each may have; where one is wrapped, replaced or hooked, the module is left alone
            with that reason.
        check: called with a module, gives the reasons why it cannot be fused.

    Raises:
        TypeError: ``cls`` is not an ``nn.Module`` class, or what is decorated not a subclass of ``fastvit.Fused``.
        ValueError: no such operator, or a method that ``cls`` does not have.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    if op not in ops.OPERATORS:
        raise ValueError(f"op: expected one of {sorted(ops.OPERATORS)}, got {op!r}")

    def decorate(override: Override) -> Override:
        if not (isinstance(override, type) and issubclass(override, Fused)):
            raise TypeError(f"register decorates a class of methods derived from fastvit.Fused, got {override!r}")
        override.fastvit_op = op
        override.fastvit_reads = dict(reads or {})
        row = Row(f"{cls.__module__}.{cls.__qualname__}", override, check)
        unknown = sorted(name for name in row.methods() if not hasattr(cls, name))
        if unknown or not row.methods():
            raise ValueError(f"{override.__name__}: expected methods of {cls.__name__}, got {unknown or 'none'}")
        for name in row.methods():
            if not hasattr(vars(override)[name], "fastvit_checks"):  # from an earlier registration
                setattr(override, name, _checking(vars(override)[name], name))
        REGISTERED[cls] = row
        return override

    return decorate


def _checking(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The method, or the plain one for a call in which somebody would else not be heard."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        chosen = getattr(plain_class(self), name) if fused_backend(self) is None else method
        return chosen(self, *args, **kwargs)

    call.fastvit_checks = True  # type: ignore[attr-defined]
    return call


def unregister(cls: type[nn.Module]) -> None:
    """Forget what :func:`register` was told about a class; models patched already stay as they are.

    Raises:
        ValueError: the class is not registered.
    """
    if cls not in REGISTERED:
        raise ValueError(f"cls: expected one of {sorted(c.__name__ for c in REGISTERED)}, got {cls!r}")
    del REGISTERED[cls]
