"""What the plain transformers share: one grid of tokens of one width, from the patches to the head.

ViT, DeiT, DeepViT, CaiT, CPVT and CeiT say what they are made of; how an image runs through it is said here, once:
patches, prefix tokens, position embedding, blocks, final norm, pooling, head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.reference.base import VisionModel
from fastvit.reference.layers import expand_mask, resize_pos_embed, run_block, take_indices, to_pair

Grid = tuple[int, int]


class IsotropicTransformer(VisionModel):
    """A transformer whose tokens keep their number and width through all blocks.

    Subclasses set ``img_size``, ``num_features``, ``num_classes`` and ``num_prefix_tokens``, and the modules
    ``patch_embed`` (a stem: images to tokens, with ``grid``, ``patch_size`` and ``in_chans`` as
    :class:`~fastvit.reference.layers.PatchEmbed` has them), ``pos_drop``, ``blocks``, ``norm`` and ``head``; and, where
    they have them, the parameters ``cls_token`` (1, 1, C) and ``pos_embed`` (1, prefix + patches, C).
    """

    cls_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    pos_embed_resize: str = "bicubic"
    """How :meth:`set_input_size` resamples, one of :data:`~fastvit.reference.layers.RESIZE_KINDS`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("cls_token", None)
        self.register_parameter("pos_embed", None)

    # What a family may override.

    @property
    def stem(self) -> nn.Module:
        """The module that makes patch tokens (B, h*w, C) of images."""
        return self.patch_embed

    def prefix_tokens(self) -> list[nn.Parameter]:
        """The learned tokens (1, 1, C) that precede the patches in every block."""
        return [] if self.cls_token is None else [self.cls_token]

    def after_block(self, index: int, x: Tensor, grid: Grid) -> Tensor:
        """What happens to the tokens between a block and the next."""
        return x

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The last block's tokens to those the head sees; ``mask`` is as the user gave it."""
        return self.norm(x)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to one vector (B, C)."""
        return x[:, 0]

    # Forward pass.

    @property
    def grid_size(self) -> Grid:
        """Token grid (h, w) of an image of ``img_size``."""
        return self.stem.grid(*self.img_size, name="img_size")

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the tokens (B, N, C) that enter the first block."""
        if images.dim() != 4 or images.shape[1] != self.stem.in_chans:
            raise ValueError(
                f"x: expected shape (batch, {self.stem.in_chans}, height, width), got {tuple(images.shape)}"
            )
        if self.pos_embed is not None and tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"x: expected images of {self.img_size}, the size of the position embedding (set_input_size() "
                f"resamples it), got {tuple(images.shape[2:])}"
            )
        x = self.stem(images)
        prefix = [token.expand(x.shape[0], -1, -1) for token in self.prefix_tokens()]
        if prefix:
            x = torch.cat((*prefix, x), dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x)

    def block_mask(self, images: Tensor, mask: Tensor | None) -> Tensor | None:
        """The user's ``mask`` for these images as the blocks take it: broadcastable to (B, H, N, N)."""
        height, width = self.stem.grid(*images.shape[-2:])
        return expand_mask(mask, height * width, len(self.prefix_tokens()), batch=images.shape[0])

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.grad_checkpointing and self.training

    @property
    def last_block(self) -> Any:
        return self.blocks[-1] if len(self.blocks) else None

    def call_block(self, index: int, prefix_alone: bool, x: Tensor, *args: Any) -> Tensor:
        """Tokens through one block; with ``prefix_alone`` the last gives the prefix tokens only."""
        run: Any = self.blocks[index]
        if prefix_alone and index == len(self.blocks) - 1:
            run = partial(run.forward_first, count=len(self.prefix_tokens()))
        return run_block(run, self.checkpointing, x, *args)

    def run_blocks(
        self,
        images: Tensor,
        mask: Tensor | None,
        keep: Collection[int] = (),
        last: int | None = None,
        prefix_alone: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Images through the blocks up to index ``last`` (all by default).

        Returns:
            The tokens (B, N, C) after the last block run, with ``prefix_alone`` its prefix tokens (B, P, C); and those
            after each block whose index is in ``keep``.
        """
        grid = self.stem.grid(*images.shape[-2:])
        mask = self.block_mask(images, mask)
        x = self.embed(images)
        kept = []
        for index in range(len(self.blocks) if last is None else last + 1):
            x = self.call_block(index, prefix_alone, x, mask)
            x = self.after_block(index, x, grid)
            if index in keep:
                kept.append(x)
        return x, kept

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, N, C), prefix tokens first."""
        return self.finish(self.run_blocks(x, mask)[0], mask)

    def forward_prefix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.run_blocks(x, mask, prefix_alone=True)[0], mask)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits (B, num_classes), or to the pooled features (B, C) with ``pre_logits``."""
        x = self.pool_tokens(x)
        return x if pre_logits else self.head(x)

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
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        if stop_early and not intermediates_only:
            raise ValueError("stop_early: needs intermediates_only=True, final features are those of the last block")
        taken = take_indices(len(self.blocks), indices)
        grid = self.stem.grid(*x.shape[-2:])
        tokens, kept = self.run_blocks(x, mask, taken.indices, taken.last if stop_early else None)
        prefix, features = len(self.prefix_tokens()), []
        for item in kept:
            item = self.norm(item) if norm else item
            patches = item[:, prefix:]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).reshape(x.shape[0], -1, *grid)
            features.append((patches, item[:, :prefix]) if return_prefix_tokens else patches)
        return features if intermediates_only else (self.finish(tokens, mask), features)

    # Changing a built model.

    def reset_classifier(self, num_classes: int) -> None:
        like = next(self.parameters())
        self.head = self.make_head(num_classes).to(like.device, like.dtype).train(self.training)
        self.num_classes = num_classes

    def make_head(self, num_classes: int) -> nn.Module:
        """A fresh head; Identity without classes."""
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 (no head) or more, got {num_classes}")
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        self.init_head(head)
        return head

    def init_head(self, head: nn.Linear) -> None:
        """Initialise a head as the official code does."""
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size: resamples ``pos_embed`` (a new Parameter) by ``pos_embed_resize``.

        Raises:
            ValueError: ``img_size`` is not a size the patches divide; the model is left as it was.
        """
        old_grid, new_size = self.grid_size, to_pair(img_size, "img_size")
        new_grid = self.stem.grid(*new_size, name="img_size")
        if self.pos_embed is not None:
            resized = resize_pos_embed(
                self.pos_embed.detach(),
                new_grid,
                prefix_tokens=len(self.prefix_tokens()),
                old_grid=old_grid,
                kind=self.pos_embed_resize,
            )
            self.pos_embed = nn.Parameter(resized.clone(), requires_grad=self.pos_embed.requires_grad)
        self.img_size = new_size
        if getattr(self, "default_cfg", None) is not None:
            self.default_cfg = {**self.default_cfg, "input_size": (self.stem.in_chans, *new_size)}

    def no_weight_decay(self) -> set[str]:
        return {name for name in ("cls_token", "pos_embed") if getattr(self, name) is not None}
