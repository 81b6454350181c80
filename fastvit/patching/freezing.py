"""``freeze`` and ``unfreeze``: a model whose packed weights are the only ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvit.ops._packing import PackedWeight, sole_packings
from fastvit.patching.plan import check_model
from fastvit.patching.replay import forget
from fastvit.patching.verification import as_call

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, example: Any = None) -> Model:
    """Keep packed weights alone, in place: at inference on the CPU a patched model then needs half the memory for them.

    Linear weights that the C++ kernels have read packed, and nothing else has, are replaced by their packed copies.
    Results are the same, bit for bit; ``state_dict()`` and pickles hold ordinary weights. Training, ``load_state_dict``
    and whatever else writes to these weights raises a RuntimeError until :func:`unfreeze` (or ``unpatch``, or ``.to``
    another dtype or device) gives the weights back.

    Args:
        model: a patched model in eval mode.
        example: an input (a tensor, a tuple of arguments or a dict of keyword arguments) to run it on, so that its
            weights are packed; None where it has run already.

    Returns:
        The same object.

    Raises:
        TypeError: not an ``nn.Module``.
        ValueError: the model is in training mode; none of its weights is packed.
    """
    check_model(model)
    if model.training:
        raise ValueError("model: expected eval mode, call model.eval() first; got training mode")
    if example is not None:
        args, kwargs = as_call(example)
        with torch.no_grad():
            model(*args, **kwargs)
    packings = sole_packings()
    frozen: dict[int, PackedWeight] = {}
    found = list(_parameters(model))
    for _, _, weight in found:
        if type(weight) is nn.Parameter and id(weight) in packings:
            frozen[id(weight)] = PackedWeight(packings[id(weight)], weight, weight.requires_grad)
    if not frozen and not any(type(weight) is PackedWeight for _, _, weight in found):
        raise ValueError(
            "model: none of its weights is packed; patch it, and run it on the CPU first or give an example (products "
            "of torch, MKL or oneDNN may be faster on this machine: fastvit.explain tells)"
        )
    for module, name, weight in found:
        if id(weight) in frozen:
            module._parameters[name] = frozen[id(weight)]
    forget()  # records, which hold the weights
    return model


def unfreeze(model: Model) -> Model:
    """Give a model that :func:`freeze` was called on its ordinary weights back, bit for bit. Returns the model."""
    check_model(model)
    thawed: dict[int, nn.Parameter] = {}
    for module, name, weight in list(_parameters(model)):
        if type(weight) is PackedWeight:
            if id(weight) not in thawed:
                thawed[id(weight)] = nn.Parameter(weight.unpacked(), weight.trainable)
            module._parameters[name] = thawed[id(weight)]
    return model


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter with its place; one that is in several places, several times."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter
