"""A tensor that is computed when somebody looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Later(Tensor):
    """Stands for the result of ``compute``, which is called, once, by the first use of it.

    With gradients where they were enabled as it was made.

    For outputs that belong to a block's contract and that hardly anybody uses, such as attention maps. Eager mode only.
    """

    _compute: Callable[[], Tensor]
    _result: Tensor | None
    _differentiable: bool

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor]) -> Later:
        self = Tensor._make_subclass(cls, torch.empty(0))
        self._compute, self._result = compute, None
        self._differentiable = torch.is_grad_enabled()
        return self

    def __init__(self, compute: Callable[[], Tensor]):
        super().__init__()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every use of the tensor, its shape included, is one of the tensor computed."""
        args, kwargs = pytree.tree_map_only(cls, _computed, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _computed(later: Later) -> Tensor:
    if later._result is None:
        with torch.set_grad_enabled(later._differentiable):
            later._result = later._compute()
    return later._result
