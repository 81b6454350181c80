"""``load_weights``: check everything a source holds against a model, then copy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate, takewhile
from typing import Any

from torch import Tensor, nn

from fastvit.reference.base import check_module
from fastvit.reference.weights.convert import Converted, Format, Stored
from fastvit.reference.weights.files import MAX_NESTING, Contents, first_sentence, read_source, without_wrappers
from fastvit.reference.weights.fit import compare_tensors, fit_pos_embed, skip_heads
from fastvit.reference.weights.jax import VIT_JAX
from fastvit.reference.weights.native import NATIVE
from fastvit.reference.weights.report import LoadReport, short, some
from fastvit.reference.weights.settings import head_count_problems, numerical_notes, unwrapped
from fastvit.reference.weights.torchvision import TORCHVISION
from fastvit.reference.weights.transformers import CVT, VIT_4, VIT_5

FORMATS = (VIT_JAX, VIT_4, VIT_5, CVT, TORCHVISION)
WRAPPERS = ("module", "model", "backbone", "teacher", "student", "base_encoder", "momentum_encoder")
"""Under which training code keeps the network; the first of two that fit alike is taken, as by DINO and MoCo v3."""
MAX_PREFIXES = 16


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    strict: bool = True,
    head: str = "load",
) -> LoadReport:
    """Copy published weights into a model, whatever library wrote them.

    The format is recognised by the names in the source: the official repositories', timm's (the same), transformers'
    ViT, DeiT and CvT (4.x and 5.x), torchvision's VisionTransformer, and the JAX ViT's .npz. Of a training checkpoint,
    the entry ``model`` or ``state_dict`` is taken, else ``teacher`` or ``student`` (DINO), else ``state_dict_ema`` or
    ``model_ema``; ``report.entry`` says which. Names may stand behind ``module.``, ``model.``, ``backbone.``,
    ``teacher.``, ``student.``, MoCo's ``base_encoder.`` and compilers' words: what stands elsewhere (a criterion, a
    second network), MAE's decoder and projection heads are dropped, and reported.

    Position embeddings of another image size are resampled (by ``model.pos_embed_resize`` where the model has it, else
    "bicubic"), prefix tokens kept. BatchNorm's ``num_batches_tracked`` may be absent. NaN and infinite weights are
    loaded, and noted in the report.

    Nothing is copied before all of it has been compared, read and converted, and nothing is read before the shapes
    fit: after an error the model is what it was. Values go into the existing parameters and buffers, in their dtype and
    on their device, so that optimizers keep working.

    Examples:
        >>> import fastvit
        >>> trained = fastvit.create_model("deit_tiny_patch16_224", depth=1)
        >>> model = fastvit.create_model("deit_tiny_patch16_224", depth=1, num_classes=10)
        >>> print(fastvit.load_weights(model, {"model": trained.state_dict()}, head="skip"))
        18 tensors loaded into DeiT from state_dict (format native, entry 'model')
          head left as it was: head, 1000 classes in the source, 10 in the model

    Args:
        model: one of this package's models, or any module with the official names. May be patched, compiled or wrapped
            in DataParallel.
        source: a file (.pth, .pt, .bin, .tar, .ckpt written by ``torch.save``; .safetensors; .npz), a model on the
            Hugging Face hub ("hf-hub:org/name" or "hf-hub:org/name@revision", by huggingface_hub), a mapping of tensors
            or numpy arrays, or a live model. Files are read in ways that cannot run code.
        strict: also raise on names that are missing or unexpected, and on a classifier of another class count; with
            False they are only reported.
        head: "load", or "skip": leave the model's own classifier as it is, whatever the source holds.

    Raises:
        ValueError: the source cannot be read, holds nothing for this model, does not fit it in shape or, when
            ``strict``, in names; or the model has no memory to copy into (meta device, sharded, expanded).
        TypeError: ``model`` is not a module, or ``source`` none of the above. FileNotFoundError: no such file.
        ImportError: a .safetensors file without the package safetensors, a hub's model without huggingface_hub.
    """
    check_module(model)
    if head not in ("load", "skip"):
        raise ValueError(f"head: expected 'load' or 'skip', got {head!r}")
    bare = unwrapped(model)
    names, wanted = _destinations(model)
    contents = read_source(source)
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
    other_heads = skip_heads(bare, tensors, wanted, report, every=head == "skip")
    misfits = fit_pos_embed(bare, tensors, wanted, contents, report)
    misfits += compare_tensors(tensors, wanted, report)
    problems = []
    if strict:
        for title, left in (("missing", report.missing), ("unexpected", report.unexpected)):
            problems += [f"{title} ({len(left)}): {some([*map(short, left)])}"] if left else []
        if any(name.startswith("head") for name in report.missing):
            problems.append("head='skip' leaves the model's own classifier as it is")
        problems += [*other_heads, *head_count_problems(bare, contents)]
    problems += misfits
    if problems:
        raise ValueError(
            f"source: {report.source} (format {report.format}) does not fit {report.model}, nothing was loaded\n  "
            + some(problems, "\n  ")
        )
    values = {name: _value(name, tensors[name], wanted[name], report) for name in report.loaded}
    odd = [name for name, value in values.items() if value.is_floating_point() and not _is_finite(value)]
    if odd:
        report.notes.append(f"NaN or infinite values in {len(odd)} tensors: {some(odd)}")
    model.load_state_dict({names[name]: value for name, value in values.items()}, strict=False)
    return report


def _value(name: str, stored: Stored, ours: Tensor, report: LoadReport) -> Tensor:
    """A tensor of the source, read, as the model wants it."""
    try:
        return stored.read().to(ours.dtype)
    except Exception as error:  # a damaged archive, a dtype that torch does not convert
        raise ValueError(
            f"source: {report.source}: {name} cannot be read as {ours.dtype}, nothing was loaded: "
            f"{first_sentence(error)}"
        ) from error


def _is_finite(value: Tensor) -> bool:
    return bool((value.float() if value.itemsize == 1 else value).isfinite().all())  # float8 has no isfinite


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
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"model: {name} is an expanded tensor, whose elements share memory: clone it first")
    clean = without_wrappers(state)
    while clean and any(all(name.startswith(f"{word}.") for name in clean.values()) for word in WRAPPERS):
        clean = {name: inner.partition(".")[2] for name, inner in clean.items()}
    return {official: name for name, official in clean.items()}, {clean[name]: tensor for name, tensor in state.items()}


def _convert(contents: Contents, wanted: Mapping[str, Tensor]) -> tuple[Format, Converted]:
    """The tensors under the model's names: of those behind the prefix that most of them fit the model by."""
    found = {}
    for prefix in _prefixes(contents.tensors):
        inner = {name[len(prefix) :]: tensor for name, tensor in contents.tensors.items() if name.startswith(prefix)}
        layout, converted = _convert_names(inner, wanted, contents.source)
        shapes = {name: tensor.meta.shape for name, tensor in converted.tensors.items()}
        fitting = sum(shapes.get(name) == tensor.shape for name, tensor in wanted.items())
        found[prefix] = (fitting, len(shapes.keys() & wanted.keys())), layout, converted
    best = max(found, key=lambda prefix: found[prefix][0])
    score, layout, converted = found[best]
    for name in contents.tensors:
        if not name.startswith(best):
            converted.dropped[name] = f"not under {best!r}, as the model's weights are"
    for prefix in found:
        if prefix != best and any(score) and found[prefix][0] == score:
            contents.notes.append(f"what is under {prefix!r} would fit as well as what is under {best!r}")
    return layout, converted


def _prefixes(names: Collection[str]) -> list[str]:
    """What stands before names in a source: nothing, or words of wrappers."""
    found = Counter(
        prefix
        for name in names
        for prefix in accumulate(f"{word}." for word in takewhile(WRAPPERS.__contains__, name.split(".", MAX_NESTING)))
    )
    often = [prefix for prefix, _ in found.most_common(MAX_PREFIXES)]
    return ["", *sorted(often, key=lambda prefix: [WRAPPERS.index(word) for word in prefix[:-1].split(".")])]


def _convert_names(tensors: Mapping[str, Stored], wanted: Collection[str], source: str) -> tuple[Format, Converted]:
    """The tensors under the model's names. A model of any other library takes its own names as they are."""
    layout = NATIVE
    if len(tensors.keys() & set(wanted)) * 2 <= len(tensors):
        layout = next((candidate for candidate in FORMATS if candidate.recognises(tensors)), NATIVE)
    try:
        return layout, layout.convert(tensors, wanted)
    except (IndexError, RuntimeError) as error:  # wrong number of axes, parts that do not go together
        raise ValueError(f"source: {source} is a damaged {layout.name} checkpoint: {short(str(error))}") from error


def _foreign(tensors: Collection[str], wanted: Collection[str], model: str) -> str | None:
    """What is wrong with a source that was never meant for this model; None for one that may have been."""
    if any("to_patch_embedding." in name for name in tensors) and "patch_embed.proj.weight" in wanted:
        return f"is a model of vit-pytorch, other functions of other parameters than the published {model}"
    if not set(tensors).isdisjoint(wanted):
        return None
    return (
        f"is not a checkpoint of this model: none of its {len(tensors)} names ({some([*map(short, tensors)])}) belongs "
        f"to {model}; understood are the names of the official code and timm, transformers (ViT, DeiT, CvT), "
        "torchvision's VisionTransformer and the JAX ViT"
    )
