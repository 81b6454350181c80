"""CvT: Introducing Convolutions to Vision Transformers (Wu et al. 2021, arXiv 2103.15808), as microsoft/CvT has it.

Three stages, each on a coarser grid. Tokens are made by overlapping convolutions, queries, keys and values by a
depthwise convolution, BatchNorm and a linear layer; no position embedding. What the official code does and a reader of
the paper would not guess:

* the logits are scaled by C ** -0.5 with C the full width of the stage, not the width of a head;
* the activation of the MLP is QuickGELU (``act="gelu"`` gives the erf form transformers uses on the same weights);
* the class token lives in the last stage only, and skips the convolution and the BatchNorm of the projections;
* every LayerNorm has eps 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.reference import functional
from fastvit.reference.base import Variant
from fastvit.reference.functional import BatchNorm
from fastvit.reference.layers import (
    Convolving,
    DropPath,
    Mlp,
    Projecting,
    TokenBlock,
    attend,
    init_linear_and_norm,
    linear_drop_path,
    run_block,
    to_pair,
)
from fastvit.reference.overrides import must_call
from fastvit.reference.pyramid import Grid, Pyramid, check_per_stage


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.quick_gelu(x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ConvEmbed(Convolving):
    """Map (B, C, h, w) to tokens (B, h'*w', D) by an overlapping convolution and a LayerNorm (section 3.1)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        smallest = self.proj.kernel_size[0] - 2 * self.proj.padding[0]
        if min(x.shape[-2:]) < smallest:
            raise ValueError(f"x: expected a map of {smallest} or more in height and width, got {tuple(x.shape[-2:])}")
        x = self.project(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class ConvProjection(nn.Module):
    """Depthwise 3x3 convolution without bias, then BatchNorm, on tokens; prefix tokens pass through (section 3.2)."""

    def __init__(self, dim: int, stride: int = 1, kernel_size: int = 3):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def convolve(self, x: Tensor, grid: Grid, prefix_tokens: int) -> Tensor:
        """(B, P + h*w, C) to (B, P + h'*w', C); the part a fused block replaces."""
        norm = BatchNorm.of(self.bn)
        if must_call(self.conv, nn.Conv2d):
            return functional.convolve_tokens(x, self.conv, grid=grid, prefix_tokens=prefix_tokens, norm=norm)
        return functional.token_depthwise_conv(
            x, self.conv.weight, grid=grid, stride=self.stride, prefix_tokens=prefix_tokens, norm=norm
        )

    def forward(self, x: Tensor, grid: Grid, prefix_tokens: int = 0) -> Tensor:
        return self.convolve(x, grid, prefix_tokens)


class ConvAttention(Projecting):
    """Multi-head attention between convolutionally projected tokens; keys and values lie on a grid half as fine."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kv_stride: int = 2,
        prefix_tokens: int = 0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = dim**-0.5  # the full width, as in the official code
        self.prefix_tokens = prefix_tokens
        self.conv_proj_q = ConvProjection(dim)
        self.conv_proj_k = ConvProjection(dim, kv_stride)
        self.conv_proj_v = ConvProjection(dim, kv_stride)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries (B, N, C), keys and values (B, Nk, C), heads still side by side."""
        q = self.linear(self.proj_q, self.conv_proj_q(x, grid, self.prefix_tokens))
        k = self.linear(self.proj_k, self.conv_proj_k(x, grid, self.prefix_tokens))
        v = self.linear(self.proj_v, self.conv_proj_v(x, grid, self.prefix_tokens))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, D) queries, (B, H, Nk, D) keys and values to (B, H, N, D); the part a fused block replaces."""
        return attend(self, q, k, v, mask)

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for t in self.project(x, grid))
        out = self.attend(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(self.linear(self.proj, out))


class Block(TokenBlock):
    """Pre-norm block: x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act: str = "quick_gelu",
        kv_stride: int = 2,
        prefix_tokens: int = 0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = ConvAttention(dim, num_heads, qkv_bias, attn_drop, drop, kv_stride, prefix_tokens)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, ACTIVATIONS[act])

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """The modules of one stage: token embedding, class token (last stage only), blocks."""

    def __init__(self, embed: ConvEmbed, dim: int, class_token: bool, drop: float, blocks: Sequence[Block]):
        super().__init__()
        self.patch_embed = embed
        self.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None)
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(blocks)
        self.apply(init_linear_and_norm)
        if class_token:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        """Map (B, C, h, w) to tokens (B, [1 +] h'*w', D), and the grid (h', w')."""
        x, grid = self.patch_embed(image)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.pos_drop(x), grid


class CvT(Pyramid):
    """Convolutional vision transformer.

    Takes images of any size, square or not; ``img_size`` is what the variant was trained at. ``mask`` is over the
    tokens of the first stage, (B, h*w) or (B, h*w, h*w) with the grid of :meth:`token_grid`; the coarser stages see a
    token if any of its window is visible.

    Args:
        patch_size, patch_stride, patch_padding: of the token embedding's convolution, one per stage.
        embed_dim, depth, num_heads: one per stage.
        pool: "token" for the class token, "gap" for the mean of the normalised tokens, without a class token.
        act: "quick_gelu" (official) or "gelu" (erf; transformers).
        drop_path_rate: a number is the last stage's rate, as in the official configurations (others 0); or one per
            stage. Within a stage it grows linearly from 0.
        kv_stride: of the convolution that makes keys and values.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: Sequence[int] = (7, 3, 3),
        patch_stride: Sequence[int] = (4, 2, 2),
        patch_padding: Sequence[int] = (2, 1, 1),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 192, 384),
        depth: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pool: str = "token",
        act: str = "quick_gelu",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float | Sequence[float] = 0.0,
        kv_stride: int = 2,
    ):
        super().__init__()
        if pool not in ("token", "gap"):
            raise ValueError(f"pool: expected 'token' or 'gap', got {pool!r}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act: expected one of {sorted(ACTIVATIONS)}, got {act!r}")
        stages = len(depth)
        if isinstance(drop_path_rate, (int, float)):
            drop_path_rate = (0.0,) * (stages - 1) + (drop_path_rate,)
        check_per_stage(
            {
                "patch_size": patch_size,
                "patch_stride": patch_stride,
                "patch_padding": patch_padding,
                "embed_dim": embed_dim,
                "num_heads": num_heads,
                "drop_path_rate": drop_path_rate,
            },
            stages,
        )
        self.num_features = embed_dim[-1]
        self.num_prefix_tokens = 1 if pool == "token" else 0
        self.img_size = to_pair(img_size, "img_size")
        self.patch_size = (patch_stride[0],) * 2
        self.depths = tuple(depth)
        self.kv_stride = kv_stride
        for i in range(stages):
            blocks = [
                Block(
                    embed_dim[i],
                    num_heads[i],
                    mlp_ratio,
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    rate,
                    act,
                    kv_stride,
                    self.prefix_tokens(i),
                )
                for rate in linear_drop_path(drop_path_rate[i], depth[i])
            ]
            embed = ConvEmbed(
                embed_dim[i - 1] if i else in_chans, embed_dim[i], patch_size[i], patch_stride[i], patch_padding[i]
            )
            stage = Stage(embed, embed_dim[i], self.prefix_tokens(i) > 0, drop_rate, blocks)
            self.add_module(f"stage{i}", stage)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-5)
        self.reset_classifier(num_classes)

    @property
    def stages(self) -> list[Stage]:
        """The stages in order."""
        return [getattr(self, f"stage{i}") for i in range(len(self.depths))]

    def embed(self, stage: int, image: Tensor) -> tuple[Tensor, Grid]:
        return self.stages[stage].embed(image)

    @property
    def last_block(self) -> Any:
        blocks = self.stages[-1].blocks
        return blocks[-1] if len(blocks) else None

    def needs_patches(self) -> bool:
        return self.num_prefix_tokens == 0

    def run_layer(self, stage: int, index: int, x: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        block = self.stages[stage].blocks[index]
        return run_block(block, self.grad_checkpointing and self.training, x, grid, mask)

    def key_grid(self, stage: int, grid: Grid) -> Grid:
        return -(-grid[0] // self.kv_stride), -(-grid[1] // self.kv_stride)

    def token_grid(self, height: int, width: int) -> Grid:
        """Token grid (h, w) of the first stage for an image of that size: what ``mask`` is laid over."""
        conv = self.stages[0].patch_embed.proj
        sizes = zip((height, width), conv.kernel_size, conv.stride, conv.padding, strict=True)
        h, w = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        return h, w

    def init_head(self, head: nn.Linear) -> None:
        nn.init.trunc_normal_(head.weight, std=0.02)  # the bias keeps PyTorch's default

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}


_SOURCE = "microsoft/CvT cls_cvt.py; arXiv 2103.15808, table 1"
_CVT_21 = {"depth": (1, 4, 16)}
_CVT_W24 = {"embed_dim": (192, 768, 1024), "depth": (2, 2, 20), "num_heads": (3, 12, 16)}


def _variant(config: dict, params: int, gmacs: float, img_size: int = 224) -> Variant:
    return Variant(
        "cvt",
        CvT,
        {"img_size": img_size, **config},
        params,
        gmacs,
        crop_pct=0.875 if img_size == 224 else 1.0,
        crop_mode="center" if img_size == 224 else "squash",  # the official code resizes to 384 x 384
        source=_SOURCE,
    )


VARIANTS: dict[str, Variant] = {
    "cvt_13": _variant({}, 19_997_480, 4.566),
    "cvt_21": _variant(_CVT_21, 31_622_696, 7.178),
    "cvt_13_384": _variant({}, 19_997_480, 16.269, 384),
    "cvt_21_384": _variant(_CVT_21, 31_622_696, 24.849, 384),
    "cvt_w24_384": _variant(_CVT_W24, 277_196_392, 194.222, 384),
}
