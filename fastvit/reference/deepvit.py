"""DeepViT: Towards Deeper Vision Transformer (Zhou et al. 2021, arXiv 2103.11886), as zhoudaquan/dvit_repo has it.

In deep ViTs the attention maps of later blocks grow alike. Re-attention regenerates them: the maps of all heads are
mixed by a learned H x H matrix and normalised over the heads before they weigh the values (paper, equation 3). What a
reader of the paper would not guess:

* the mix is a 1x1 convolution with a bias, the norm a BatchNorm2d, so rows no longer sum to 1 and may be negative;
* each block has its own mix; models with a CNN stem (S, L) use it in their last blocks only, the others are plain;
* S and L scale the input of both branches by 0.5 before the LayerNorm and the branch by 2 after it
  (``scale_adjustment``), which in effect doubles the residual branches;
* S multiplies the finished maps by head_dim ** -0.5 (``reatten_scale``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit.reference import functional
from fastvit.reference.base import INCEPTION_MEAN, INCEPTION_STD, Variant
from fastvit.reference.functional import BatchNorm
from fastvit.reference.isotropic import IsotropicTransformer
from fastvit.reference.layers import (
    Attention,
    ConvolutionalStem,
    Convolving,
    DropPath,
    Mlp,
    PatchEmbed,
    TokenBlock,
    dropout_p,
    init_linear_and_norm,
    linear_drop_path,
    run_block,
    to_pair,
    token_grid,
)
from fastvit.reference.overrides import must_call


class ReAttention(Attention):
    """Multi-head attention whose maps are mixed across heads, normalised and scaled (section 4.2).

    Args:
        transform: False leaves the maps as the softmax makes them, and the mix and the norm out.
        reatten_scale: factor on the finished maps.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        transform: bool = True,
        reatten_scale: float = 1.0,
    ):
        super().__init__(dim, num_heads, qkv_bias, attn_drop, proj_drop)
        self.transform = transform
        self.reatten_scale = reatten_scale
        self.reatten_matrix = nn.Conv2d(num_heads, num_heads, kernel_size=1) if transform else None
        self.var_norm = nn.BatchNorm2d(num_heads) if transform else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, D) queries, keys, values to (B, H, N, D); the part a fused block replaces."""
        if self.reatten_matrix is None:
            return super().attend(q, k, v, mask)
        if must_call(self.reatten_matrix, nn.Conv2d) or must_call(self.attn_drop, nn.Dropout):
            return functional.attention_by_parts(
                q,
                k,
                v,
                mask,
                scale=self.scale,
                post_mix=self.reatten_matrix,
                norm=BatchNorm.of(self.var_norm),
                output_scale=self.reatten_scale,
                drop=self.attn_drop,
            )
        return functional.re_attention(
            q,
            k,
            v,
            self.reatten_matrix.weight.flatten(1),
            self.reatten_matrix.bias,
            norm=BatchNorm.of(self.var_norm),
            output_scale=self.reatten_scale,
            mask=mask,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
        )

    def attend_with_map(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """As :meth:`attend`, and the finished maps (B, H, N, N): what weighs the rows of a unit matrix is the map."""
        unit = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        maps = ReAttention.attend(self, q, k, unit, mask)
        return maps @ v, maps

    def forward_with_map(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the finished maps (B, H, N, N)."""
        q, k, v = self.project(x)
        out, maps = self.attend_with_map(q, k, v, mask)
        return self.merge(out), maps


class ReAttentionBlock(TokenBlock):
    """Pre-norm block: x += drop_path(attn(norm1(s x))) / s; x += drop_path(mlp(norm2(s x))) / s.

    Args:
        scale_adjustment: s.
        transform, reatten_scale: of :class:`ReAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        scale_adjustment: float = 1.0,
        transform: bool = True,
        reatten_scale: float = 1.0,
    ):
        super().__init__()
        self.scale_adjustment = scale_adjustment
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReAttention(dim, num_heads, qkv_bias, attn_drop, drop, transform, reatten_scale)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale_adjustment == 1.0 else x * self.scale_adjustment

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + (branch if self.scale_adjustment == 1.0 else branch / self.scale_adjustment)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self._add(x, self.attn(self.norm1(self._scaled(x)), mask))
        return self._add(x, self.mlp(self.norm2(self._scaled(x))))

    def forward_with_map(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the finished attention maps (B, H, N, N)."""
        branch, maps = self.attn.forward_with_map(self.norm1(self._scaled(x)), mask)
        x = self._add(x, branch)
        return self._add(x, self.mlp(self.norm2(self._scaled(x)))), maps


class CNNStem(Convolving, ConvolutionalStem):
    """Images (B, C, H, W) to patch tokens (B, h*w, D) by three convolutions: 7x7 stride 2, 3x3, then the patches."""

    def __init__(
        self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, embed_dim: int = 768, stem_chans: int = 64
    ):
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = to_pair(patch_size, "patch_size")
        if any(side % 2 for side in self.patch_size):
            raise ValueError(f"patch_size: expected an even size with the CNN stem, got {patch_size!r}")
        half = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        self.conv1 = nn.Conv2d(in_chans, stem_chans, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chans)
        self.conv2 = nn.Conv2d(stem_chans, stem_chans, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_chans)
        self.proj = nn.Conv2d(stem_chans, embed_dim, kernel_size=half, stride=half)

    def grid(self, height: int, width: int, name: str = "x") -> tuple[int, int]:
        """Token grid (h, w) of an image; see :func:`~fastvit.reference.layers.token_grid`."""
        return token_grid((height, width), self.patch_size, name)

    def forward(self, x: Tensor) -> Tensor:
        self.grid(*x.shape[-2:])
        x = self.convolve(x, self.conv1, self.bn1, "relu")
        x = self.convolve(x, self.conv2, self.bn2, "relu")
        return self.project(x).flatten(2).transpose(1, 2)


STEMS = {"conv": PatchEmbed, "cnn": CNNStem}


class DeepViT(IsotropicTransformer):
    """Vision transformer with re-attention.

    Args:
        img_size: pixels, an int or (height, width); :meth:`set_input_size` changes it later.
        stem: "conv" for one patch convolution, "cnn" for the three convolutions of S and L.
        transformed_blocks: how many blocks, counted from the last, have re-attention; None for all.
        scale_adjustment: of :class:`ReAttentionBlock`.
        reatten_scale: of :class:`ReAttention`.
        cos_reg: in training mode, give (logits, attention maps of every block), for the official similarity loss.
        drop_rate: dropout after the position embedding, the attention projection and both linears of the MLP.
        attn_drop_rate: dropout of the softmaxed maps, before the mix.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        stem: str = "conv",
        transformed_blocks: int | None = None,
        scale_adjustment: float = 1.0,
        reatten_scale: float = 1.0,
        cos_reg: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem: expected one of {tuple(STEMS)}, got {stem!r}")
        transformed_blocks = depth if transformed_blocks is None else transformed_blocks
        if not 0 <= transformed_blocks <= depth:
            raise ValueError(
                f"transformed_blocks: expected a number from 0 to the depth, {depth}, got {transformed_blocks}"
            )
        self.img_size = to_pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.cos_reg = cos_reg

        self.patch_embed = STEMS[stem](patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        patches = self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            ReAttentionBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_rate,
                attn_drop_rate,
                drop_path,
                scale_adjustment,
                transform=index >= depth - transformed_blocks,
                reatten_scale=reatten_scale,
            )
            for index, drop_path in enumerate(linear_drop_path(drop_path_rate, depth))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear_and_norm)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.reset_classifier(num_classes)

    def needs_patches(self) -> bool:
        return False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Images (B, in_chans, H, W) to logits (B, num_classes); with ``cos_reg`` in training mode, and all maps."""
        if self.cos_reg and self.training:
            return self.forward_with_maps(x, mask)
        return super().forward(x, mask)

    def forward_with_maps(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, num_classes), and the finished attention maps (B, H, N, N) of every block."""
        mask = self.block_mask(x, mask)
        tokens, maps = self.embed(x), []
        for block in self.blocks:
            tokens, block_map = run_block(block.forward_with_map, self.checkpointing, tokens, mask)
            maps.append(block_map)
        return self.forward_head(self.norm(tokens)), maps


_S = {
    "embed_dim": 396,
    "depth": 16,
    "stem": "cnn",
    "transformed_blocks": 5,
    "scale_adjustment": 0.5,
    "reatten_scale": 33**-0.5,
}
_L = {"embed_dim": 420, "depth": 32, "stem": "cnn", "transformed_blocks": 12, "scale_adjustment": 0.5}


def _variant(config: dict, params: int, gmacs: float, img_size: int = 224) -> Variant:
    return Variant(
        "deepvit",
        DeepViT,
        {"num_heads": 12, "mlp_ratio": 3.0, **config, "img_size": img_size},
        params,
        gmacs,
        mean=INCEPTION_MEAN,
        std=INCEPTION_STD,
        crop_pct=0.9 if img_size == 224 else 1.0,
        source="zhoudaquan/dvit_repo deep_vision_transformer.py; arXiv 2103.11886",
    )


VARIANTS: dict[str, Variant] = {
    "deepvit_16b": _variant({"embed_dim": 384, "depth": 16}, 24_426_664, 5.272),
    "deepvit_24b": _variant({"embed_dim": 384, "depth": 24}, 36_261_448, 7.879),
    "deepvit_32b": _variant({"embed_dim": 384, "depth": 32}, 48_096_232, 10.486),
    "deepvit_s": _variant(_S, 27_312_632, 6.361),
    "deepvit_l": _variant(_L, 58_883_708, 13.149),
    "deepvit_l_384": _variant(_L, 59_043_308, 44.792, img_size=384),
}
