"""``load_weights``: check everything a source holds against a model, then copy."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from fastvit.reference.weights.convert import Converted, Format
from fastvit.reference.weights.files import Contents, read_source, some, strip_wrapping
from fastvit.reference.weights.fit import check_storage, compare_tensors, fit_pos_embed, skip_heads
from fastvit.reference.weights.jax import VIT_JAX
from fastvit.reference.weights.native import NATIVE
from fastvit.reference.weights.report import LoadReport
from fastvit.reference.weights.settings import head_count_problems, numerical_notes, unwrapped
from fastvit.reference.weights.torchvision import TORCHVISION
from fastvit.reference.weights.transformers import CVT, VIT_4, VIT_5

FORMATS = (VIT_JAX, VIT_4, VIT_5, CVT, TORCHVISION)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    strict: bool = True,
) -> LoadReport:
    """Copy published weights into a model, whatever library wrote them.

    The format is recognised by the names in the source: the official repositories', timm's (the same), transformers'
    ViT, DeiT and CvT (4.x and 5.x), torchvision's VisionTransformer, and the JAX ViT's .npz. ``model.``, ``module.``,
    ``_orig_mod.`` in front of all names are removed. Of a training checkpoint, the entry ``model`` or ``state_dict``
    is taken, and ``state_dict_ema`` or ``model_ema`` only where there is no plain one; ``report.entry`` says which.

    Position embeddings of another image size are resampled (by ``model.pos_embed_resize`` where the model has it, else
    "bicubic"), prefix tokens kept. A classifier of another class count is no error: the model keeps its own, and
    ``report.skipped_heads`` says so. BatchNorm's ``num_batches_tracked`` may be absent.

    Nothing is copied before all of it has been checked: after any error the model is what it was. Values go into the
    existing parameters and buffers, in their dtype and on their device, so that optimizers keep working.

    Args:
        model: one of this package's models, or any module with the official names. May be patched, compiled or wrapped
            in DataParallel.
        source: a file (.pth, .pt, .bin, .tar, .ckpt written by ``torch.save``; .safetensors; .npz), a mapping of
            tensors or numpy arrays, or a live model. Files are read in ways that cannot run code.
        strict: also raise on names that are missing or unexpected; with False they are only reported.

    Raises:
        ValueError: the source cannot be read, holds nothing for this model, does not fit it in shape or, when
            ``strict``, in names (all are listed); or the model has no memory to copy into (meta device, sharded).
        TypeError: ``model`` is not a module, or ``source`` none of the above. FileNotFoundError: no such file.
        ImportError: a .safetensors file without the package safetensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    bare = unwrapped(model)
    names, wanted = _destinations(model)
    contents = read_source(source)
    check_storage(contents)
    layout, converted = _convert(contents, wanted)
    report = LoadReport(
        contents.source,
        type(bare).__name__,
        layout.name,
        contents.entry,
        dropped={**contents.dropped, **converted.dropped},
        notes=[*contents.notes, *numerical_notes(bare, contents, layout)],
    )
    tensors = converted.tensors
    reason = _foreign(tensors, wanted, report.model)
    if reason:
        raise ValueError(f"source: {contents.source} {reason}")
    skip_heads(bare, tensors, wanted, report)
    problems = fit_pos_embed(bare, tensors, wanted, contents, report)
    problems += compare_tensors(tensors, wanted, report)
    if strict:
        for title, left in (("missing", report.missing), ("unexpected", report.unexpected)):
            problems += [f"{title} ({len(left)}): {', '.join(left)}"] if left else []
        problems += head_count_problems(bare, contents)
    if problems:
        raise ValueError(
            f"source: {report.source} (format {report.format}) does not fit {report.model}, nothing was loaded"
            + "".join(f"\n  {problem}" for problem in problems)
        )
    model.load_state_dict({names[name]: tensors[name] for name in report.loaded}, strict=False)
    return report


def _destinations(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The model's tensors by official name, and the names ``model.load_state_dict`` knows them by."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device; give it memory first: model.to_empty(device=...)")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"model: expected plain parameters and buffers, got a {type(tensor).__name__} for {name}: load before "
                "sharding or quantising, or after the first call of a lazy module"
            )
    clean = strip_wrapping(state)
    return {short: name for name, short in clean.items()}, {clean[name]: tensor for name, tensor in state.items()}


def _convert(contents: Contents, wanted: Collection[str]) -> tuple[Format, Converted]:
    """The tensors under the model's names. A model of any other library takes its own names as they are."""
    tensors = contents.tensors
    layout = NATIVE
    if len(tensors.keys() & set(wanted)) * 2 <= len(tensors):
        layout = next((candidate for candidate in FORMATS if candidate.recognises(tensors)), NATIVE)
    try:
        return layout, layout.convert(tensors, wanted)
    except (IndexError, RuntimeError) as error:  # wrong number of axes, parts that do not go together
        raise ValueError(f"source: {contents.source} is a damaged {layout.name} checkpoint: {error}") from error


def _foreign(tensors: Collection[str], wanted: Collection[str], model: str) -> str | None:
    """What is wrong with a source that was never meant for this model; None for one that may have been."""
    if any("to_patch_embedding." in name for name in tensors) and "patch_embed.proj.weight" in wanted:
        return f"is a model of vit-pytorch, other functions of other parameters than the published {model}"
    if not set(tensors).isdisjoint(wanted):
        return None
    return (
        f"is not a checkpoint of this model: none of its {len(tensors)} names ({some(tensors)}) belongs to {model}; "
        "understood are the names of the official code and timm, transformers (ViT, DeiT, CvT), torchvision's "
        "VisionTransformer and the JAX ViT"
    )
