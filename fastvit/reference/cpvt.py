"""CPVT: Conditional Positional Encodings for Vision Transformers (Chu et al. 2021, arXiv 2102.10882), and Twins-PCPVT.

CPVT is ViT with its position embedding replaced by a position encoding generator (PEG): a depthwise convolution, with
zero padding, of the tokens laid out as their map, added to them after the first block (or the first five). Padding
shows tokens where the border is, so nothing is tied to one image size. No code or weights of plain CPVT were ever
published: the paper's algorithm 1 is followed, in ViT's parameter names, with the PEG named as the authors named it in
Twins. Twins-PCPVT (Chu et al. 2021, arXiv 2104.13840; Meituan-AutoML/Twins) is their pyramid with PEG, the one whose
weights exist: spatial-reduction attention in four stages, a PEG after the first block of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit.reference import functional
from fastvit.reference.base import Variant
from fastvit.reference.isotropic import IsotropicTransformer
from fastvit.reference.layers import (
    Block,
    DropPath,
    Mlp,
    PatchEmbed,
    Projecting,
    attend,
    init_linear_and_norm,
    linear_drop_path,
    run_block,
    to_pair,
    token_grid,
)
from fastvit.reference.overrides import must_call
from fastvit.reference.pyramid import Grid, Pyramid, check_per_stage, tokens_to_map


class PEG(nn.Module):
    """Position encoding generator: x + depthwise 3x3 convolution of x, zero-padded; prefix tokens pass through."""

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"peg_kernel_size: expected an odd size, which keeps the grid, got {kernel_size}")
        conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Sequential(conv)

    def convolve(self, x: Tensor, grid: Grid, prefix_tokens: int) -> Tensor:
        """(B, P + h*w, C) tokens to the same shape; the part a fused module replaces."""
        if must_call(self.proj, nn.Sequential) or must_call(self.proj[0], nn.Conv2d):
            return functional.convolve_tokens(x, self.proj, grid=grid, prefix_tokens=prefix_tokens, residual=True)
        conv = self.proj[0]
        return functional.token_depthwise_conv(
            x, conv.weight, conv.bias, grid=grid, prefix_tokens=prefix_tokens, residual=True
        )

    def forward(self, x: Tensor, grid: Grid, prefix_tokens: int = 0) -> Tensor:
        return self.convolve(x, grid, prefix_tokens)


class CPVT(IsotropicTransformer):
    """Conditional position encoding vision transformer, for images of any size the patch size divides.

    Args:
        img_size: what the model is meant for; images of other sizes need no preparation.
        pool: "token" for the class token, "gap" for no class token, the final norm, then the mean of the tokens (the
            paper does not say which of the two comes first; this is the order of the authors' Twins).
        num_pegs: the number of leading blocks that a PEG follows.
        peg_kernel_size: of their convolution.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pool: str = "token",
        num_pegs: int = 1,
        peg_kernel_size: int = 3,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if pool not in ("token", "gap"):
            raise ValueError(f"pool: expected 'token' or 'gap', got {pool!r}")
        if not 0 <= num_pegs <= depth:
            raise ValueError(f"num_pegs: expected a number of blocks from 0 to depth ({depth}), got {num_pegs}")
        self.img_size = to_pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.pool = pool
        self.num_prefix_tokens = 1 if pool == "token" else 0

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        self.stem.grid(*self.img_size, name="img_size")
        if self.num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path)
            for drop_path in linear_drop_path(drop_path_rate, depth)
        )
        self.pos_block = nn.ModuleList(PEG(embed_dim, peg_kernel_size) for _ in range(num_pegs))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = self.make_head(num_classes)
        self.apply(init_linear_and_norm)  # convolutions keep PyTorch's default, the PEGs' too
        if self.num_prefix_tokens:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def needs_patches(self) -> bool:
        return self.pool != "token" or len(self.pos_block) >= len(self.blocks)  # a PEG behind the last block reads them

    def after_block(self, index: int, x: Tensor, grid: Grid) -> Tensor:
        return self.pos_block[index](x, grid, self.num_prefix_tokens) if index < len(self.pos_block) else x

    def pool_tokens(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.pool == "token" else x.mean(dim=1)


class SpatialReductionAttention(Projecting):
    """Attention to keys and values on a grid ``sr_ratio`` times coarser, made by a strided convolution and LayerNorm.

    Source: Wang et al. 2021 (PVT, arXiv 2102.12122), section 3.3. The inner norm has eps 1e-5, unlike the blocks'.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, h*w, C) to those that keys and values are made of, (B, h'*w', C)."""
        if self.sr_ratio == 1:
            return x
        return self.norm(self.sr(tokens_to_map(x, grid)).flatten(2).transpose(1, 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, D) queries, (B, H, Nk, D) keys and values to (B, H, N, D); the part a fused block replaces."""
        return attend(self, q, k, v, mask)

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        q = self.linear(self.q, x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        kv = self.linear(self.kv, self.reduce(x, grid)).unflatten(2, (2, self.num_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = self.attend(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(self.linear(self.proj, out))


class PyramidBlock(nn.Module):
    """Pre-norm block: x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
        sr_ratio: int,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NormedPatchEmbed(PatchEmbed):
    """Patch embedding followed by a LayerNorm, whose eps is 1e-5, unlike the blocks'."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__(patch_size, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class TwinsPCPVT(Pyramid):
    """Twins-PCPVT, called CPVT-v2 by its authors: a pyramid with a PEG after the first block of each stage.

    Takes images of any size, square or not, that the product of the patch sizes (32) divides. ``mask`` is over the
    first stage's tokens, (B, h/4 * w/4) or that squared; coarser grids see a token if any of its window is visible.

    Args:
        patch_size: of each stage's patch embedding, the first on the image, the others on the former stage's map.
        embed_dim, depth, num_heads, mlp_ratio, sr_ratio: one per stage.
        pool: "gap", the final norm, then the mean of the tokens, is all there is.
        drop_path_rate: of the last block, growing linearly from 0 through all stages.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: Sequence[int] = (4, 2, 2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 320, 512),
        depth: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratio: Sequence[float] = (8, 8, 4, 4),
        sr_ratio: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        pool: str = "gap",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if pool != "gap":
            raise ValueError(f"pool: expected 'gap' (there is no class token), got {pool!r}")
        stages = len(depth)
        check_per_stage(
            {
                "patch_size": patch_size,
                "embed_dim": embed_dim,
                "num_heads": num_heads,
                "mlp_ratio": mlp_ratio,
                "sr_ratio": sr_ratio,
            },
            stages,
        )
        self.img_size = to_pair(img_size, "img_size")
        self.num_features = embed_dim[-1]
        self.num_prefix_tokens = 0
        self.patch_size = (patch_size[0],) * 2
        self.stride = math.prod(patch_size)
        self.sr_ratios = tuple(sr_ratio)
        self.depths = tuple(depth)
        token_grid(self.img_size, (self.stride,) * 2, "img_size")

        widths = (in_chans, *embed_dim)
        self.patch_embeds = nn.ModuleList(
            NormedPatchEmbed(patch_size[i], widths[i], widths[i + 1]) for i in range(stages)
        )
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(linear_drop_path(drop_path_rate, sum(depth)))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                PyramidBlock(
                    embed_dim[i],
                    num_heads[i],
                    mlp_ratio[i],
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    next(rates),
                    sr_ratio[i],
                )
                for _ in range(depth[i])
            )
            for i in range(stages)
        )
        self.pos_block = nn.ModuleList(PEG(dim) for dim in embed_dim)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.reset_classifier(num_classes)
        self.apply(init_linear_and_norm)
        self.apply(_init_convolution)

    def embed(self, stage: int, image: Tensor) -> tuple[Tensor, Grid]:
        if stage == 0:
            token_grid((image.shape[2], image.shape[3]), (self.stride,) * 2, "x")
        patch_embed = self.patch_embeds[stage]
        return self.pos_drop(patch_embed(image)), patch_embed.grid(*image.shape[-2:])

    def run_layer(self, stage: int, index: int, x: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        x = run_block(self.blocks[stage][index], self.grad_checkpointing and self.training, x, grid, mask)
        return self.pos_block[stage](x, grid) if index == 0 else x

    def key_grid(self, stage: int, grid: Grid) -> Grid:
        ratio = self.sr_ratios[stage]
        return grid[0] // ratio, grid[1] // ratio

    def no_weight_decay(self) -> set[str]:
        return {f"pos_block.{name}" for name, _ in self.pos_block.named_parameters()}


def _init_convolution(module: nn.Module) -> None:
    """A normal of variance 2 / fan_out (per group), zero bias: Twins' initialisation of every convolution."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_TINY = {"embed_dim": 192, "num_heads": 3}
_SMALL = {"embed_dim": 384, "num_heads": 6}
_BASE = {"embed_dim": 768, "num_heads": 12}
_PEG5 = {"num_pegs": 5}
_GAP = {"pool": "gap"}


def _cpvt(config: dict, params: int, gmacs: float) -> Variant:
    return Variant("cpvt", CPVT, config, params, gmacs, source="arXiv 2102.10882, table 1 and algorithm 1")


def _twins(config: dict, params: int, gmacs: float) -> Variant:
    source = "Meituan-AutoML/Twins gvt.py; arXiv 2104.13840, table 1"
    return Variant("cpvt", TwinsPCPVT, config, params, gmacs, source=source)


VARIANTS: dict[str, Variant] = {
    "cpvt_tiny": _cpvt(_TINY, 5_681_512, 1.254),
    "cpvt_tiny_peg5": _cpvt(_TINY | _PEG5, 5_689_192, 1.255),
    "cpvt_tiny_gap": _cpvt(_TINY | _GAP, 5_681_320, 1.247),
    "cpvt_tiny_peg5_gap": _cpvt(_TINY | _PEG5 | _GAP, 5_689_000, 1.248),
    "cpvt_small": _cpvt(_SMALL, 21_978_856, 4.600),
    "cpvt_small_peg5": _cpvt(_SMALL | _PEG5, 21_994_216, 4.602),
    "cpvt_small_gap": _cpvt(_SMALL | _GAP, 21_978_472, 4.575),
    "cpvt_small_peg5_gap": _cpvt(_SMALL | _PEG5 | _GAP, 21_993_832, 4.577),
    "cpvt_base": _cpvt(_BASE, 86_424_040, 17.565),
    "cpvt_base_peg5": _cpvt(_BASE | _PEG5, 86_454_760, 17.571),
    "cpvt_base_gap": _cpvt(_BASE | _GAP, 86_423_272, 17.473),
    "cpvt_base_peg5_gap": _cpvt(_BASE | _PEG5 | _GAP, 86_453_992, 17.478),
    "twins_pcpvt_small": _twins({}, 24_106_216, 3.809),
    "twins_pcpvt_base": _twins({"depth": (3, 4, 18, 3)}, 43_828_456, 6.653),
    "twins_pcpvt_large": _twins({"depth": (3, 8, 27, 3)}, 60_989_672, 9.808),
}
