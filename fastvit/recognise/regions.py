"""Where a compiled graph may be searched for attention: the forwards of patched modules, as Dynamo traced them.

Such a forward is called through a :class:`Region`, a module, of which Dynamo notes in every operation's metadata that
it ran within it. Tracing one also announces the pass that searches (``graph.py``) to Inductor, chained to the one that
the user has, for as long as this compilation lasts: what else is compiled has nothing of it, and nothing is left behind
in Inductor's configuration. One given in ``torch.compile(options=...)`` stands in its place: then all runs plain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

__all__ = ["Region", "region"]


class Region(nn.Module):
    """Calls a function on a module; what it calls stands within the region."""

    backend: ClassVar[str]
    """Of the operators that take a chain in it."""

    def forward(self, function: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The function's result for the module and its arguments, unchanged."""
        _announce()
        return function(module, *args, **kwargs)


@functools.cache
def _class_for(backend: str) -> type[Region]:
    return type("Region", (Region,), {"backend": backend})


def region(backend: str) -> Region:
    """A new one; its class tells the backend."""
    return _class_for(backend)()


def _announce() -> None:
    """Called as a region is traced, and not when the graph runs."""
    from torch._dynamo.callback import callback_handler
    from torch._inductor import config

    from fastvit.recognise.graph import Fusing

    if not isinstance(config.pre_grad_custom_pass, Fusing):
        config.pre_grad_custom_pass = Fusing(config.pre_grad_custom_pass)
        if _withdraw not in callback_handler.end_callbacks:
            callback_handler.register_end_callback(_withdraw)
    config.pre_grad_custom_pass.regions += 1


# What torch.compiler.assume_constant_result does, which imports Dynamo: a second for those who compile nothing.
_announce._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _withdraw(_: Any) -> None:
    """As a compilation ends, also by an error: the user's configuration as it was."""
    from torch._inductor import config

    from fastvit.recognise.graph import Fusing

    if isinstance(config.pre_grad_custom_pass, Fusing):
        config.pre_grad_custom_pass = config.pre_grad_custom_pass.users
