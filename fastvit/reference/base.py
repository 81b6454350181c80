"""What the seven families share as classes: the interface of a model, and the hook that lets a built model be fused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.reference.layers import TokenBlock
from fastvit.reference.overrides import calls_everything, is_plain, is_untouched

on_build: list[Callable[[nn.Module], object]] = [*getattr(sys.modules[__name__.partition(".")[0]], "_on_build", ())]
"""Called with every family model once it is built, in order. The package around has the swap to fused blocks here."""

run_features: Callable[[Callable[..., Tensor], Tensor, Tensor | None], Tensor] | None = None
"""Called with ``forward_features`` or ``forward_prefix`` of a model and their arguments: the package around has its
faster way to call them again here."""


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Variant:
    """One published model: the family class, its arguments, and the facts the tests hold it to.

    ``params`` is the exact parameter count with 1000 classes at the variant's image size; ``gmacs`` the multiply-adds
    (in 1e9) of matmuls, convolutions, Q K^T and A V at batch 1.
    """

    family: str
    build: type[VisionModel]
    config: Mapping[str, Any]
    params: int
    gmacs: float
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    source: str = ""

    def default_cfg(self, img_size: tuple[int, int], in_chans: int) -> dict[str, Any]:
        """How images are prepared for this variant's published weights."""
        return {
            "input_size": (in_chans, *img_size),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
        }


def check_module(model: object) -> None:
    """TypeError where ``model`` is no ``nn.Module``."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got the class {model.__name__}: give an instance of it")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


class _BuiltModel(type):
    """Runs :data:`on_build` after the outermost ``__init__``, so that subclasses users write are fused too."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        for hook in on_build:
            hook(model)
        return model


_STEPS = (
    *("forward_features", "forward_head", "pool_tokens", "finish"),
    *("run_blocks", "after_block", "_run", "run_layer"),
)


def _steps(cls: type) -> list[Any]:
    """The methods that an image takes to the logits, of those classes that have them."""
    return [getattr(cls, name, None) for name in _STEPS]


class VisionModel(nn.Module, metaclass=_BuiltModel):
    """An image classifier of one of the seven families.

    Subclasses set ``num_classes``, ``num_features`` (width of the token that reaches the head), ``num_prefix_tokens``,
    ``img_size`` and ``patch_size``, and provide :meth:`forward_features` and :meth:`forward_head`.

    ``default_cfg`` says how images are prepared for published weights: ``input_size`` (3, h, w), ``mean``, ``std``,
    ``crop_pct``, ``crop_mode`` ("center", or "squash" to a square), ``interpolation``;
    :func:`fastvit.reference.registry.create_model` fills it in.
    """

    layer_groups: Sequence[tuple[str, tuple[int, ...] | None]] = ((r"^(?:blocks|pos_block)\.(\d+)", None),)
    """Patterns of names, and numbers of layers where the pattern has none: for :meth:`group_matcher`."""
    coarse_layer_groups: Sequence[tuple[str, tuple[int, ...] | None]] | None = None

    num_classes: int
    num_features: int
    num_prefix_tokens: int = 1
    grad_checkpointing: bool = False
    default_cfg: dict
    known_steps: list[Any] | None = None
    """The methods for which the nearest class with its own :meth:`needs_patches` speaks."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "needs_patches" in vars(cls):
            cls.known_steps = _steps(cls)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) to normalised tokens (B, N, C)."""
        raise NotImplementedError(f"{type(self).__name__}.forward_features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits (B, num_classes), or to the pooled features (B, C) with ``pre_logits``."""
        raise NotImplementedError(f"{type(self).__name__}.forward_head")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes).

        ``mask`` is bool, True = attend: (B, patches), or (B, N, N) with N the patches or all tokens. Class tokens are
        never masked; a query with no key left attends to nothing.
        """
        features = self.forward_prefix if self.reads_prefix_alone() else self.forward_features
        return self.forward_head(features(x, mask) if run_features is None else run_features(features, x, mask))

    def needs_patches(self) -> bool:
        """Whether anything behind the last block reads its patch tokens."""
        return True

    def reads_prefix_alone(self) -> bool:
        """Whether nobody sees the last block's patch tokens: at inference, with no other methods, modules or hooks."""
        return (
            not (torch.is_grad_enabled() or self.training or self.needs_patches())
            and _steps(type(self)) == self.known_steps
            and not any(name in vars(self) for name in _STEPS)
            and not calls_everything()
            and is_plain(self.norm, nn.LayerNorm)
            and is_untouched(self.norm)
            and isinstance(self.last_block, TokenBlock)
            and is_untouched(self.last_block)
        )

    @property
    def last_block(self) -> Any:
        """The block in front of the final norm."""
        return None

    def forward_prefix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prefix tokens (B, P, C) of :meth:`forward_features`."""
        raise NotImplementedError(f"{type(self).__name__}.forward_prefix")

    def get_classifier(self) -> nn.Module:
        """The linear layer (or Identity) that makes the logits."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; ``num_classes=0`` makes it Identity."""
        raise NotImplementedError(f"{type(self).__name__}.reset_classifier")

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the official training recipe excludes from weight decay."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer each parameter belongs to, in timm's manner: for ``timm.optim.param_groups_layer_decay``.

        The stem comes first, then block by block (``coarse``: stage by stage, where there are stages), the norm with
        what precedes it, and heads last.
        """
        return {
            "stem": r"^(?:cls_token|dist_token|pos_embed|patch_embed\.|i2t\.|patch_embeds\.0\.|stage0\.patch_embed\.)",
            "blocks": list((coarse and self.coarse_layer_groups) or self.layer_groups),
            "class_blocks": [(r"^blocks_token_only\.(\d+)", None), (r"^(?:lca\.|pos_layer_embed)", (0,))],
            "norm": [(r"^(?:norm|fc_norm)\.", (99999,))],  # timm's number for the layer in front
        }

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """``default_cfg``, by the name that ``timm.data.resolve_model_data_config`` reads."""
        return self.default_cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (training mode only)."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        mask: Tensor | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks, in timm's manner.

        Args:
            indices: block indices (negative from the end), n for the last n blocks, None for all.
            norm: apply the final norm to each intermediate.
            return_prefix_tokens: give (grid, prefix tokens) pairs.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C).
            stop_early: do not run the blocks after the last index; needs ``intermediates_only``.

        Returns:
            The list of intermediates, or (final features, intermediates).
        """
        raise NotImplementedError(f"{type(self).__name__}.forward_intermediates")
