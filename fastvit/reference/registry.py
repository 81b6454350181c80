"""Every named variant of the seven families, and how to build one by its name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection
from typing import Any

from fastvit.reference import cait, ceit, cpvt, cvt, deepvit, deit, vit
from fastvit.reference.base import Variant, VisionModel
from fastvit.reference.layers import to_pair
from fastvit.reference.weights.official import OFFICIAL

VARIANTS: dict[str, Variant] = {
    name: variant for family in (vit, deit, deepvit, cait, cpvt, cvt, ceit) for name, variant in family.VARIANTS.items()
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, family by family.

    Examples:
        >>> list_models("cait_x*_384")
        ['cait_xxs24_384', 'cait_xxs36_384', 'cait_xs24_384']
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]


def nearest_names(name: str, known: Collection[str] = VARIANTS, count: int = 3) -> list[str]:
    """The known names most like ``name``, best first. Beginnings count: people leave endings out, not families."""

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, name, candidate[: len(name)]).ratio()

    return [near for near in sorted(known, key=likeness, reverse=True)[:count] if likeness(near) >= 0.6]


def find_variant(name: str) -> Variant:
    """The variant of that name; ValueError suggests the nearest names."""
    if name not in VARIANTS:
        near = nearest_names(str(name))
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        if str(name).startswith("fastvit_"):  # as timm calls them
            hint = "; Apple's FastViT, a model, shares no more than its name with this package: timm has it"
        raise ValueError(f"name: unknown model {name!r}{hint} (fastvit.list_models() names all {len(VARIANTS)})")
    return VARIANTS[name]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    pool: str | None = None,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> VisionModel:
    """Build a named variant with fresh weights, initialised as in the official code.

    Args:
        name: one of :func:`list_models`.
        num_classes: 0 leaves the head out (Identity).
        img_size: pixels, an int or (height, width); the variant's own by default.
        pool: how tokens become one vector, where the family has a choice ("token", "avg", ...); its own by default.
        drop_rate, attn_drop_rate, drop_path_rate: probabilities of dropout, attention dropout and stochastic depth.
        options: further arguments of the family class, overriding the variant's.

    Raises:
        ValueError: unknown name (the nearest are suggested) or a value the family does not take.
        TypeError: an option the family does not know.
    """
    variant = find_variant(name)
    if options.pop("pretrained", False):
        where = f"those of {name} are at {OFFICIAL[name]}" if name in OFFICIAL else f"there are none of {name}"
        raise ValueError(
            "pretrained: expected False, since nothing is downloaded: weights come by fastvit.load_weights(model, "
            f"source), and {where} (fastvit list --weights)"
        )
    config = dict(variant.config)
    if img_size is not None:
        config["img_size"] = img_size
    if pool is not None:
        config["pool"] = pool
    rates = {"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate}
    for key, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{key}: expected a probability of at least 0 and less than 1, got {rate}")
    model = variant.build(num_classes=num_classes, in_chans=in_chans, **{**config, **rates, **options})
    model.default_cfg = variant.default_cfg(to_pair(model.img_size, "img_size"), in_chans)
    return model
