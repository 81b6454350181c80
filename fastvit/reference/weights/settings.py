"""What the weights do not say: settings of a model that change its outputs but no name and no shape."""

from __future__ import annotations

from torch import nn

from fastvit.reference.weights.convert import Format
from fastvit.reference.weights.files import Contents

CVT_NOTE = (
    "transformers runs these weights with the erf form of GELU, the official code with QuickGELU as this model does; "
    "for transformers' outputs build it with act='gelu'"
)
JAX_NOTE = (
    "the JAX code runs these weights with the tanh form of GELU; the erf form, which this model and every torch port "
    "use, moves logits by some 1e-4; for the JAX outputs build it with act='gelu_tanh'"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DataParallel and the like."""
    while True:
        inner = next((getattr(model, name) for name in ("_orig_mod", "module") if hasattr(model, name)), None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def patch_grid(model: nn.Module) -> tuple[int, int] | None:
    """Patches down and across of a model's own image size, where it (or, in timm, its ``patch_embed``) says so."""
    for holder in (model, getattr(model, "patch_embed", None)):
        grid = getattr(holder, "grid_size", None)
        if isinstance(grid, tuple) and len(grid) == 2:
            return grid
    return None


def head_count_problems(model: nn.Module, contents: Contents) -> list[str]:
    """Attention heads change no shape: only a live source can be asked how many it has."""
    theirs, ours = _attention_heads(contents.model), _attention_heads(model)
    if not theirs or not ours or theirs == ours:
        return []
    return [
        f"attention heads: {sorted(theirs)} in the source, {sorted(ours)} in the model (same shapes, other outputs)"
    ]


def _attention_heads(model: nn.Module | None) -> set[int]:
    if model is None:
        return set()
    counts = (
        getattr(module, name, None) for module in model.modules() for name in ("num_heads", "num_attention_heads")
    )
    return {count for count in counts if isinstance(count, int)}


def _layer_norm_eps(model: nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}


def numerical_notes(model: nn.Module, contents: Contents, layout: Format) -> list[str]:
    """Why outputs may differ from the source's library although every weight fits."""
    notes = []
    known = set() if layout.layer_norm_eps is None else {layout.layer_norm_eps}
    theirs, ours = known if contents.model is None else _layer_norm_eps(contents.model), _layer_norm_eps(model)
    if theirs and ours and theirs != ours:
        one, other = ("/".join(f"{eps:g}" for eps in sorted(values)) for values in (theirs, ours))
        notes.append(
            f"LayerNorm eps is {one} where these weights come from and {other} in this model: for the very outputs of "
            f"that library build the model with norm_eps={one}"
        )
    pools = getattr(contents.model, "global_pool", None), getattr(model, "pool", None)
    if all(isinstance(pool, str) for pool in pools) and (pools[0] == "token") != (pools[1] == "token"):
        notes.append(f"the source pools by {pools[0]!r}, this model by {pools[1]!r}: the outputs will differ")
    activation = {"vit-jax": ("tanh", JAX_NOTE), "transformers": ("none", CVT_NOTE)}.get(layout.name)
    if activation and activation[0] not in _gelu_forms(model):
        notes.append(activation[1])
    return notes


def _gelu_forms(model: nn.Module) -> set[str]:
    return {module.approximate for module in model.modules() if isinstance(module, nn.GELU)}
