"""CeiT: Incorporating Convolution Designs into Visual Transformers (Yuan et al. 2021, arXiv 2103.11816).

Three ideas on top of ViT: tokens made from a small convolutional stem (image-to-tokens), a feed-forward with a
depthwise convolution between its two linears (LeFF), and a last attention over the class tokens of all layers (LCA).
As in coeusguo/ceit, which the published weights need. Where that code and the paper part:

* no activation between the stem's BatchNorm and its max pooling;
* no GELU after LeFF's last BatchNorm, where the paper has one;
* LeFF's residual adds the class token that norm2 gave, cls + norm2(cls), where the paper leaves the token alone.

``leff="paper"`` takes the paper's side in the last two.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference import functional
from fastvit.reference.base import Variant
from fastvit.reference.functional import LEFF_FORMS, BatchNorm
from fastvit.reference.isotropic import Grid, IsotropicTransformer
from fastvit.reference.layers import (
    RESIZE_KINDS,
    Attention,
    ConvolutionalStem,
    Convolving,
    DropPath,
    Mlp,
    TokenBlock,
    attend,
    init_linear_and_norm,
    linear_drop_path,
    to_pair,
    token_grid,
)
from fastvit.reference.overrides import must_call


class Stem(ConvolutionalStem):
    """Convolution 7x7 stride 2, BatchNorm, max pooling 3x3 stride 2: a map at a quarter of the image's resolution."""

    def __init__(self, in_chans: int = 3, out_chans: int = 64):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.convolve(x, self.conv, self.bn))


class ImageToTokens(Convolving):
    """Images (B, C, H, W) to tokens (B, h*w, D), h = H / patch_size: the stem, then a patch embedding of its map."""

    def __init__(self, patch_size: int | tuple[int, int], in_chans: int, stem_chans: int, embed_dim: int):
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = to_pair(patch_size, "patch_size")
        if self.patch_size[0] % 4 or self.patch_size[1] % 4:
            raise ValueError(f"patch_size: expected a multiple of 4, the stem's stride, got {patch_size}")
        kernel_size = (self.patch_size[0] // 4, self.patch_size[1] // 4)
        self.backbone = Stem(in_chans, stem_chans)
        self.proj = nn.Conv2d(stem_chans, embed_dim, kernel_size, stride=kernel_size)

    def grid(self, height: int, width: int, name: str = "x") -> Grid:
        """Token grid (h, w) of an image; ValueError where the patch size does not divide it."""
        return token_grid((height, width), self.patch_size, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.backbone(x)).flatten(2).transpose(1, 2)


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution on tokens (B, N, C), as a linear; one that was wrapped since or is hooked is called."""
    if must_call(conv, nn.Conv2d):
        return conv(x.mT.unsqueeze(-1)).squeeze(-1).mT
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def leff_arguments(module: Any) -> dict[str, Any]:
    """The tensors and norms that :func:`functional.leff` takes, of a module with the official code's attributes.

    In training this counts a batch in the norms, so call it once per forward.
    """
    arguments: dict[str, Any] = {}
    for name, conv in (("up", module.conv1), ("dw", module.conv2), ("down", module.conv3)):
        arguments[f"{name}_weight"] = conv.weight if name == "dw" else conv.weight.flatten(1)
        arguments[f"{name}_bias"] = conv.bias
    if module.with_bn:
        norms = {"up": module.bn1, "dw": module.bn2, "down": module.bn3}
        arguments |= {f"{name}_norm": BatchNorm.of(norm) for name, norm in norms.items()}
    return arguments


class LeFF(nn.Module):
    """Locally-enhanced feed-forward: linear, BN, GELU, depthwise 3x3, BN, GELU, linear, BN on the patch tokens.

    The two linears are 1x1 convolutions in the state_dict, and run as linears on tokens. The result is what the
    residual adds: for the class tokens their own value in the official form, zero in the paper's, which leaves them be.
    Source: section 3.2; coeusguo/ceit ``LocallyEnhancedFeedForward``.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        kernel_size: int = 3,
        with_bn: bool = True,
        form: str = "official",
        prefix_tokens: int = 1,
    ):
        super().__init__()
        self.with_bn = with_bn
        self.form = form
        self.prefix_tokens = prefix_tokens
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size, padding=kernel_size // 2, groups=hidden_dim)
        self.conv3 = nn.Conv2d(hidden_dim, dim, 1)
        if with_bn:
            self.bn1 = nn.BatchNorm2d(hidden_dim)
            self.bn2 = nn.BatchNorm2d(hidden_dim)
            self.bn3 = nn.BatchNorm2d(dim)

    def transform(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, P + h*w, D) tokens to what the residual adds; the part a fused block replaces."""
        arguments = leff_arguments(self)
        return functional.leff(x, **arguments, grid=grid, prefix_tokens=self.prefix_tokens, form=self.form)

    def convolve(self, x: Tensor, grid: Grid, prefix_tokens: int) -> Tensor:
        """BN, GELU, depthwise convolution, BN, GELU on (B, P + h*w, C) tokens; replaced where linears are called."""
        around: dict[str, Any] = {"grid": grid, "prefix_tokens": prefix_tokens, "pre_activation": "gelu"}
        if self.with_bn:
            around |= {"pre_norm": BatchNorm.of(self.bn1), "norm": BatchNorm.of(self.bn2)}
        around["activation"] = "gelu"
        if must_call(self.conv2, nn.Conv2d):
            return functional.convolve_tokens(x, self.conv2, **around)
        return functional.token_depthwise_conv(x, self.conv2.weight, self.conv2.bias, **around)

    def transform_by_parts(self, x: Tensor, grid: Grid) -> Tensor:
        """As :meth:`transform`, for convolutions that have to be called."""
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        hidden = self.convolve(pointwise(self.conv1, patches), grid, 0)
        out = pointwise(self.conv3, hidden)
        if self.with_bn:
            out = BatchNorm.of(self.bn3)(out.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        if self.form == "paper":
            out, prefix = F.gelu(out), torch.zeros_like(prefix)
        return torch.cat((prefix, out), dim=1)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if any(must_call(conv, nn.Conv2d) for conv in (self.conv1, self.conv2, self.conv3)):
            return self.transform_by_parts(x, grid)
        return self.transform(x, grid)


class Block(TokenBlock):
    """Pre-norm block: x += drop_path(attn(norm1(x))); x += drop_path(leff(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        leff_kernel_size: int = 3,
        leff_with_bn: bool = True,
        leff: str = "official",
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.leff = LeFF(dim, int(dim * mlp_ratio), leff_kernel_size, leff_with_bn, leff)

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.leff(self.norm2(x), grid))


class LastQueryAttention(Attention):
    """Attention of the last token alone to all tokens: (B, N, C) to (B, 1, C), the last row of full attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, 1, D) query, (B, H, N, D) keys and values to (B, H, 1, D); the part a fused block replaces."""
        return attend(self, q, k, v, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, _, dim = x.shape
        q, k, v = self.project(x)
        out = self.attend(q[:, :, -1:], k, v, mask).transpose(1, 2).reshape(batch, 1, dim)
        return self.proj_drop(self.proj(out))


class LayerwiseClassAttention(nn.Module):
    """LCA: the class tokens of all layers (B, L, D) to one (B, D); only the last of them asks (section 3.3)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop: float = 0.0, attn_drop: float = 0.0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = LastQueryAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.feedforward = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1:] + self.attn(self.norm1(x))
        last = last + self.feedforward(self.norm2(last))
        return last[:, 0]


class CeiT(IsotropicTransformer):
    """Convolution-enhanced image transformer.

    :meth:`forward_features` gives the class token that LCA made, then the patch tokens, all normalised. The official
    code runs square maps only; here any grid will do, once :meth:`set_input_size` has resampled the position embedding.

    Args:
        stem_chans: channels of the stem.
        pool: "token" is all there is.
        leff: "official", or "paper" (GELU after LeFF's last norm, class token unchanged by LeFF).
        leff_kernel_size: of LeFF's depthwise convolution.
        leff_with_bn: False leaves LeFF's three BatchNorms out.
        pos_embed_resize: how the position embedding follows a change of image size.
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
        stem_chans: int = 64,
        leff: str = "official",
        leff_kernel_size: int = 3,
        leff_with_bn: bool = True,
        pos_embed_resize: str = "bicubic",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        for name, value, accepted in (
            ("pool", pool, ("token",)),
            ("leff", leff, LEFF_FORMS),
            ("pos_embed_resize", pos_embed_resize, RESIZE_KINDS),
        ):
            if value not in accepted:
                raise ValueError(f"{name}: expected one of {accepted}, got {value!r}")
        self.img_size = to_pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.num_prefix_tokens = 1
        self.pos_embed_resize = pos_embed_resize

        self.i2t = ImageToTokens(patch_size, in_chans, stem_chans, embed_dim)
        self.patch_size = self.i2t.patch_size
        patches = self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_rate,
                attn_drop_rate,
                drop_path,
                leff_kernel_size,
                leff_with_bn,
                leff,
            )
            for drop_path in linear_drop_path(drop_path_rate, depth)
        )
        self.lca = LayerwiseClassAttention(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate)
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, depth, embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = self.make_head(num_classes)
        self.apply(init_linear_and_norm)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def stem(self) -> ImageToTokens:
        return self.i2t

    def needs_patches(self) -> bool:
        return False

    def run_blocks(
        self,
        images: Tensor,
        mask: Tensor | None,
        keep: Collection[int] = (),
        last: int | None = None,
        prefix_alone: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """As every family's, but that blocks know the grid, and LCA makes the class token once all of them have run."""
        grid = self.stem.grid(*images.shape[-2:])
        mask = self.block_mask(images, mask)
        x = self.embed(images)
        kept, class_tokens = [], []
        for index in range(len(self.blocks) if last is None else last + 1):
            x = self.call_block(index, prefix_alone, x, grid, mask)
            class_tokens.append(x[:, 0].clone())  # a view would keep every layer's patch tokens in memory
            if index in keep:
                kept.append(x)
        if len(class_tokens) == len(self.blocks):
            class_token = self.lca(torch.stack(class_tokens, dim=1) + self.pos_layer_embed)
            x = torch.cat((class_token[:, None], x[:, 1:]), dim=1)
        return x, kept


_TINY = {"embed_dim": 192, "num_heads": 3}
_SMALL = {"embed_dim": 384, "num_heads": 6}
_BASE = {"embed_dim": 768, "num_heads": 12}


def _variant(size: dict, img_size: int, params: int, gmacs: float) -> Variant:
    return Variant(
        "ceit",
        CeiT,
        {**size, "img_size": img_size},
        params,
        gmacs,
        source="coeusguo/ceit ceit_model.py; arXiv 2103.11816, table 1",
    )


VARIANTS: dict[str, Variant] = {
    "ceit_tiny": _variant(_TINY, 224, 6_356_904, 1.395),
    "ceit_small": _variant(_SMALL, 224, 24_204_840, 4.760),
    "ceit_base": _variant(_BASE, 224, 94_405_416, 17.749),
    "ceit_tiny_384": _variant(_TINY, 384, 6_429_864, 5.103),
    "ceit_small_384": _variant(_SMALL, 384, 24_350_760, 15.980),
}
