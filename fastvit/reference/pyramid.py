"""What the two pyramids, CvT and Twins-PCPVT, share: a loop over stages, masks on coarser grids, features by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.base import VisionModel
from fastvit.reference.layers import Taken, expand_mask, take_indices

Grid = tuple[int, int]


def check_per_stage(arguments: Mapping[str, Sequence], stages: int) -> None:
    """ValueError names the argument that does not have one value per stage."""
    for name, values in arguments.items():
        if len(values) != stages:
            raise ValueError(f"{name}: expected one value per stage ({stages}, as in depth), got {tuple(values)}")


def tokens_to_map(x: Tensor, grid: Grid, prefix_tokens: int = 0) -> Tensor:
    """Tokens (B, P + h*w, C) to a map (B, C, h, w), without the P prefix tokens."""
    patches = x[:, prefix_tokens:] if prefix_tokens else x
    return patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)


def stage_mask(mask: Tensor | None, fine: Grid, queries: Grid, keys: Grid, prefix_tokens: int = 0) -> Tensor | None:
    """A mask over the first stage's tokens as one that attention on coarser grids can take.

    A coarse token is visible if any fine token of its window is (adaptive max pooling); of a pairwise mask both axes
    are pooled. Prefix tokens see everything and are seen by everyone.

    Args:
        mask: bool (B, P) or (B, P, P) over the ``fine`` grid, P = h*w; None stays None.
        fine: the grid of the first stage.
        queries: the grid of the queries.
        keys: the grid of the keys.
        prefix_tokens: the number of tokens that precede both.

    Returns:
        (B, 1, 1, Nk) or (B, 1, Nq, Nk), prefix tokens included.
    """
    if mask is None:
        return None
    pooled = _pool_any(mask, fine, keys)
    if mask.dim() == 2:
        return F.pad(pooled, (prefix_tokens, 0), value=True)[:, None, None]
    pooled = _pool_any(pooled.transpose(1, 2), fine, queries).transpose(1, 2)
    return F.pad(pooled, (prefix_tokens, 0, prefix_tokens, 0), value=True)[:, None]


def _pool_any(mask: Tensor, fine: Grid, coarse: Grid) -> Tensor:
    """(..., h*w) bool on the fine grid to (..., h'*w') on the coarse one."""
    if fine == coarse:
        return mask
    image = mask.reshape(-1, 1, *fine).float()
    return F.adaptive_max_pool2d(image, coarse).bool().view(*mask.shape[:-1], coarse[0] * coarse[1])


class Pyramid(VisionModel):
    """A model whose stages run on ever coarser grids; subclasses say what a stage is made of.

    They set ``depths`` (blocks per stage), ``num_features``, ``num_prefix_tokens``, ``norm`` and ``head``, and provide
    :meth:`embed`, :meth:`run_layer` and :meth:`key_grid`. Blocks are counted through all stages. Intermediates of
    earlier stages have those stages' widths and grids.
    """

    layer_groups = (
        (r"^blocks\.(\d+)\.(\d+)", None),
        (r"^stage(\d+)\.blocks\.(\d+)", None),
        (r"^(?:patch_embeds\.|pos_block\.|stage)(\d+)", (0,)),
    )
    coarse_layer_groups = ((r"^(?:blocks\.|patch_embeds\.|pos_block\.|stage)(\d+)", None),)

    depths: tuple[int, ...]
    norm: nn.LayerNorm

    def embed(self, stage: int, image: Tensor) -> tuple[Tensor, Grid]:
        """The image or the former stage's map (B, C, h, w) to the stage's tokens (B, P + h'*w', C') and its grid."""
        raise NotImplementedError(f"{type(self).__name__}.embed")

    def run_layer(self, stage: int, index: int, x: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        """Tokens through the block of that index within the stage."""
        raise NotImplementedError(f"{type(self).__name__}.run_layer")

    def key_grid(self, stage: int, grid: Grid) -> Grid:
        """The grid of the keys and values in a stage whose queries lie on ``grid``."""
        raise NotImplementedError(f"{type(self).__name__}.key_grid")

    def prefix_tokens(self, stage: int) -> int:
        """How many prefix tokens a stage has; the last stage has the model's ``num_prefix_tokens``, the others none."""
        return self.num_prefix_tokens if stage == len(self.depths) - 1 else 0

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        taken: Taken | None = None,
        stop_early: bool = False,
        prefix_alone: bool = False,
    ) -> tuple[Tensor, list[tuple[int, Tensor, Grid]]]:
        """Run the stages: the last tokens before the final norm, and (stage, tokens, grid) after each block taken.

        With ``prefix_alone`` the last tokens are the prefix tokens only.
        """
        kept: list[tuple[int, Tensor, Grid]] = []
        image, fine, block = x, None, 0
        for stage, depth in enumerate(self.depths):
            tokens, grid = self.embed(stage, image)
            prefix = self.prefix_tokens(stage)
            if fine is None:
                fine = grid
                expand_mask(mask, grid[0] * grid[1], 0, batch=x.shape[0])  # checks it against the first stage's tokens
            seen = stage_mask(mask, fine, grid, self.key_grid(stage, grid), prefix)
            for index in range(depth):
                if prefix_alone and block == sum(self.depths) - 1:
                    return self.last_block.forward_first(tokens, grid, seen, count=prefix), kept
                tokens = self.run_layer(stage, index, tokens, grid, seen)
                if taken is not None and block in taken.indices:
                    kept.append((stage, tokens, grid))
                if stop_early and taken is not None and block == taken.last:
                    return tokens, kept
                block += 1
            image = tokens_to_map(tokens, grid, prefix)
        return tokens, kept

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) to the last stage's normalised tokens (B, P + h*w, C)."""
        return self.norm(self._run(x, mask)[0])

    def forward_prefix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self._run(x, mask, prefix_alone=True)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits (B, num_classes), or to the pooled features (B, C) with ``pre_logits``.

        The class token where the model has one, else the mean of the tokens.
        """
        x = x[:, 0] if self.num_prefix_tokens else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 (no head) or more, got {num_classes}")
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes).to(self.norm.weight)
            self.init_head(self.head)

    def init_head(self, head: nn.Linear) -> None:
        """Initialise a head as the official code does."""
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

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
    ) -> list | tuple[Tensor, list]:
        """Features after chosen blocks, counted through all stages (the last block of each stage: ``stage_ends``).

        Arguments as in :meth:`VisionModel.forward_intermediates`. ``norm`` reaches the last stage's intermediates only:
        the final norm has that stage's width.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        if stop_early and not intermediates_only:
            raise ValueError("stop_early: needs intermediates_only=True, final features are those of the last block")
        tokens, kept = self._run(x, mask, take_indices(sum(self.depths), indices), stop_early)
        features = []
        for stage, taken, grid in kept:
            prefix = self.prefix_tokens(stage)
            if norm and stage == len(self.depths) - 1:
                taken = self.norm(taken)
            patches = tokens_to_map(taken, grid, prefix) if output_fmt == "NCHW" else taken[:, prefix:]
            features.append((patches, taken[:, :prefix]) if return_prefix_tokens else patches)
        return features if intermediates_only else (self.norm(tokens), features)

    @property
    def stage_ends(self) -> list[int]:
        """Index of the last block of each stage: what to pass as ``indices`` for a feature pyramid."""
        return [sum(self.depths[: stage + 1]) - 1 for stage in range(len(self.depths))]
