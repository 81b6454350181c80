"""Does a source fit a model: classifiers of another class count, position embeddings of another size, shapes, names."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor, nn

from fastvit.reference.layers import resize_pos_embed
from fastvit.reference.weights.convert import Stored
from fastvit.reference.weights.files import Contents
from fastvit.reference.weights.report import LoadReport, ResizedTensor, SkippedHead
from fastvit.reference.weights.settings import patch_grid, unwrapped

HEADS = ("head", "head_dist")
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
MAX_TOKENS = 2**16
"""Longest position embedding that is resampled: images of 4096 x 4096 pixels in patches of 16."""


def skip_heads(
    model: nn.Module, tensors: dict[str, Stored], wanted: Mapping[str, Tensor], report: LoadReport, *, every: bool
) -> list[str]:
    """Take classifiers of another class count, or ``every`` one, out of ``tensors`` and into the report.

    Returns what speaks against that: a classifier that would keep random weights without anybody having asked for it.
    """
    problems = []
    for head in HEADS:
        theirs = _classes(tensors[f"{head}.weight"].meta) if f"{head}.weight" in tensors else 0
        ours = _classes(wanted[f"{head}.weight"]) if f"{head}.weight" in wanted else 0
        no_such_head = ours == 0 and (theirs == 0 or getattr(model, "num_classes", None) != 0)
        if no_such_head or (not every and theirs in (0, ours)):
            continue
        report.skipped_heads.append(SkippedHead(head, theirs, ours))
        for leaf in ("weight", "bias"):
            tensors.pop(f"{head}.{leaf}", None)
        if ours and not every:
            problems.append(
                f"{head}: {theirs} classes in the source, {ours} in the model; "
                f"head='skip' loads the rest and leaves the model's own {head} as it is"
            )
    return problems


def _classes(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 2 else 0


def fit_pos_embed(
    model: nn.Module,
    tensors: dict[str, Stored],
    wanted: Mapping[str, Tensor],
    contents: Contents,
    report: LoadReport,
) -> list[str]:
    """Have ``pos_embed`` of ``tensors`` resampled to the model's grid; returns the reasons if it cannot be."""
    if "pos_embed" not in tensors or "pos_embed" not in wanted:
        return []
    theirs, ours = tensors["pos_embed"].meta, wanted["pos_embed"]
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
    if theirs.shape[1] > MAX_TOKENS:
        return [f"{shapes}; expected at most {MAX_TOKENS} tokens"]
    prefix = ours.shape[1] - new_grid[0] * new_grid[1]
    kind = getattr(model, "pos_embed_resize", "bicubic")
    resize = functools.partial(resize_pos_embed, new_grid=new_grid, prefix_tokens=prefix, old_grid=old_grid, kind=kind)
    try:
        tensors["pos_embed"] = tensors["pos_embed"].then(resize)
    except (ValueError, RuntimeError) as error:
        return [f"{shapes}; with {prefix} prefix tokens taken off, {error}"]
    report.resized.append(ResizedTensor("pos_embed", tuple(theirs.shape), tuple(ours.shape)))
    return []


def compare_tensors(tensors: Mapping[str, Stored], wanted: Mapping[str, Tensor], report: LoadReport) -> list[str]:
    """Fill the report's lists of names; what can be copied under no circumstances is returned."""
    skipped = tuple(f"{head.name}." for head in report.skipped_heads)
    problems = []
    for name, ours in wanted.items():
        if name not in tensors:
            # torch.load_state_dict does not ask for this counter either: old files and other libraries have none.
            if not name.endswith("num_batches_tracked") and not name.startswith(skipped):
                report.missing.append(name)
            continue
        theirs = tensors[name].meta
        if theirs.shape != ours.shape:
            problems.append(f"{name}: {tuple(theirs.shape)} in the source, {tuple(ours.shape)} in the model")
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
            problems.append(f"{name}: {theirs.dtype} in the source, {ours.dtype} in the model")
        else:
            report.loaded.append(name)
    report.unexpected.extend(name for name in tensors if name not in wanted)
    return problems
