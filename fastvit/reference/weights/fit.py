"""Does a source fit a model: classifiers of another class count, position embeddings of another size, shapes, names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastvit.reference.layers import resize_pos_embed
from fastvit.reference.weights.files import Contents
from fastvit.reference.weights.report import LoadReport, ResizedTensor, SkippedHead
from fastvit.reference.weights.settings import patch_grid, unwrapped

HEADS = ("head", "head_dist")
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


def check_storage(contents: Contents) -> None:
    """ValueError where a tensor of the source has no plain numbers in memory."""
    for name, tensor in contents.tensors.items():
        odd = type(tensor) is not Tensor or tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized
        if odd:
            kind = (
                "on the meta device" if tensor.is_meta else f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}"
            )
            raise ValueError(f"source: {contents.source}: {name} is no plain tensor ({kind})")


def skip_heads(model: nn.Module, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], report: LoadReport) -> None:
    """Take classifiers of another class count out of ``tensors`` and into the report."""
    for head in HEADS:
        theirs, ours = (_classes(named, head) for named in (tensors, wanted))
        no_such_head = ours == 0 and getattr(model, "num_classes", None) != 0
        if theirs == 0 or theirs == ours or no_such_head:
            continue
        report.skipped_heads.append(SkippedHead(head, theirs, ours))
        for leaf in ("weight", "bias"):
            tensors.pop(f"{head}.{leaf}", None)


def _classes(tensors: Mapping[str, Tensor], head: str) -> int:
    weight = tensors.get(f"{head}.weight")
    return 0 if weight is None or weight.dim() != 2 else weight.shape[0]


def fit_pos_embed(
    model: nn.Module,
    tensors: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    contents: Contents,
    report: LoadReport,
) -> list[str]:
    """Resample ``pos_embed`` in ``tensors`` to the model's grid; returns the reasons if it cannot."""
    if "pos_embed" not in tensors or "pos_embed" not in wanted:
        return []
    theirs, ours = tensors["pos_embed"], wanted["pos_embed"]
    new_grid = patch_grid(model)
    old_grid = None if contents.model is None else patch_grid(unwrapped(contents.model))
    if theirs.shape == ours.shape and old_grid in (None, new_grid):
        return []
    shapes = f"pos_embed: {tuple(theirs.shape)} in the source, {tuple(ours.shape)} in the model"
    if theirs.dim() != 3 or theirs.shape[::2] != ours.shape[::2] or new_grid is None:
        return [shapes]
    tokens = [[name for name in PREFIX_TOKENS if name in named] for named in (tensors, wanted)]
    if tokens[0] != tokens[1]:
        return [f"{shapes}; the source's tokens are {tokens[0]}, the model's {tokens[1]}"]
    prefix = ours.shape[1] - new_grid[0] * new_grid[1]
    kind = getattr(model, "pos_embed_resize", "bicubic")
    try:
        resized = resize_pos_embed(theirs, new_grid, prefix_tokens=prefix, old_grid=old_grid, kind=kind)
    except (ValueError, RuntimeError) as error:
        return [f"{shapes}; with {prefix} prefix tokens taken off, {error}"]
    tensors["pos_embed"] = resized
    report.resized.append(ResizedTensor("pos_embed", tuple(theirs.shape), tuple(ours.shape)))
    return []


def compare_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], report: LoadReport) -> list[str]:
    """Fill the report's lists of names; what can be copied under no circumstances is returned."""
    skipped = tuple(f"{head.name}." for head in report.skipped_heads)
    problems = []
    for name, ours in wanted.items():
        theirs = tensors.get(name)
        if theirs is None:
            # torch.load_state_dict does not ask for this counter either: old files and other libraries have none.
            if not name.endswith("num_batches_tracked") and not name.startswith(skipped):
                report.missing.append(name)
        elif theirs.shape != ours.shape:
            problems.append(f"{name}: {tuple(theirs.shape)} in the source, {tuple(ours.shape)} in the model")
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
            problems.append(f"{name}: {theirs.dtype} in the source, {ours.dtype} in the model")
        else:
            report.loaded.append(name)
    report.unexpected.extend(name for name in tensors if name not in wanted)
    return problems
