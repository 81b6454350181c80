"""CaiT: Going deeper with Image Transformers (Touvron et al. 2021, arXiv 2103.17239), as facebookresearch has it.

Two stages. In the first the patch tokens, without a class token, go through many blocks of talking-heads attention,
whose residual branches are scaled channel by channel (LayerScale). In the second the class token alone is updated, by
two blocks of class attention over itself and the finished patch tokens. What a reader of the paper would not guess:

* the position embedding has no entry for the class token;
* both head mixers are Linear layers with a bias, and start near zero as every Linear does, not at the identity;
* stochastic depth has the same rate in every block, and none, nor any dropout, in the class stage;
* LayerScale starts at 1e-5 in XXS36 too, where the paper's rule for more than 24 blocks says 1e-6.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastvit.reference import functional
from fastvit.reference.base import Variant
from fastvit.reference.isotropic import IsotropicTransformer
from fastvit.reference.layers import (
    Attention,
    DropPath,
    Mlp,
    PatchEmbed,
    Projecting,
    TokenBlock,
    dropout_p,
    expand_mask,
    init_linear_and_norm,
    run_block,
    to_pair,
)
from fastvit.reference.overrides import must_call


class TalkingHeadAttention(Attention):
    """Multi-head attention whose maps are mixed across heads before (``proj_l``) and after (``proj_w``) the softmax."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__(dim, num_heads, qkv_bias, attn_drop, proj_drop)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, D) queries, keys, values to (B, H, N, D); the part a fused block replaces."""
        before, after, drop = self.proj_l, self.proj_w, self.attn_drop
        if must_call(before, nn.Linear) or must_call(after, nn.Linear) or must_call(drop, nn.Dropout):
            pre_mix, post_mix = partial(_over_heads, before), partial(_over_heads, after)
            return functional.attention_by_parts(
                q, k, v, mask, scale=self.scale, pre_mix=pre_mix, post_mix=post_mix, drop=drop, drop_last=True
            )
        return functional.talking_heads_attention(
            q,
            k,
            v,
            before.weight,
            before.bias,
            after.weight,
            after.bias,
            mask=mask,
            scale=self.scale,
            dropout_p=dropout_p(drop),
        )


def _over_heads(mix: nn.Module, maps: Tensor) -> Tensor:
    """A linear layer over the heads of maps (B, H, Nq, Nk)."""
    return mix(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScaleBlock(TokenBlock):
    """Pre-norm block: x += drop_path(gamma_1 attn(norm1(x))); x += drop_path(gamma_2 mlp(norm2(x))) (section 2).

    Args:
        init_values: what gamma_1 and gamma_2 (C,) start at.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TalkingHeadAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ClassAttention(Projecting):
    """Attention with the first token as the only query, over all tokens (section 3)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, 1, D) query, (B, H, N, D) keys and values to (B, H, 1, D); the part a fused block replaces."""
        return functional.class_attention(q, k, v, mask, scale=self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) to what the first of them gathers, (B, 1, C)."""
        heads = (self.num_heads, self.head_dim)
        projected = self.q(x[:, :1]), self.linear(self.k, x), self.linear(self.v, x)
        q, k, v = (t.unflatten(2, heads).transpose(1, 2) for t in projected)
        return self.proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class ClassAttentionBlock(nn.Module):
    """cls += gamma_1 attn(norm1(cls and patches)); cls += gamma_2 mlp(norm2(cls)); the patches stay as they are."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, init_values: float = 1e-5
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, cls: Tensor, mask: Tensor | None = None) -> Tensor:
        """Patch tokens (B, N, C) and class token (B, 1, C) to the class token (B, 1, C)."""
        cls = cls + self.gamma_1 * self.attn(self.norm1(torch.cat((cls, x), dim=1)), mask)
        return cls + self.gamma_2 * self.mlp(self.norm2(cls))


class CaiT(IsotropicTransformer):
    """Class-attention in image transformers.

    Intermediates are those of the first stage, patch tokens without a class token; ``forward_features`` gives the class
    token in front of them.

    Args:
        img_size: pixels, an int or (height, width); :meth:`set_input_size` changes it later.
        depth: blocks of the first stage.
        class_depth: blocks of the class stage.
        init_values: what LayerScale starts at, in both stages.
        drop_rate: dropout after the position embedding, the attention projection and both linears of the MLP; as the
            next two, in the first stage only.
        attn_drop_rate: dropout of the finished attention maps.
        drop_path_rate: stochastic depth, the same in every block.
    """

    cls_token: nn.Parameter

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_depth: int = 2,
        init_values: float = 1e-5,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.img_size = to_pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = embed_dim

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            LayerScaleBlock(
                embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path_rate, init_values
            )
            for _ in range(depth)
        )
        self.blocks_token_only = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, init_values) for _ in range(class_depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear_and_norm)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.reset_classifier(num_classes)

    def prefix_tokens(self) -> list[nn.Parameter]:
        return []  # the class token joins after the blocks

    def block_mask(self, images: Tensor, mask: Tensor | None) -> Tensor | None:
        height, width = self.stem.grid(*images.shape[-2:])
        if mask is not None and mask.dim() == 3 and mask.shape[1] == height * width + 1:
            mask = mask[:, 1:, 1:]  # over all tokens; the class token is not among those of the first stage
        return super().block_mask(images, mask)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class stage: patch tokens (B, N, C) to normalised tokens (B, 1 + N, C)."""
        mask = expand_mask(mask, x.shape[1], 1)
        if mask is not None:
            mask = mask[:, :, :1]  # the class token's row: what a pairwise mask says of patches leaves it alone
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            cls = run_block(block, self.checkpointing, x, cls, mask)
        return self.norm(torch.cat((cls, x), dim=1))


_XXS = {"embed_dim": 192, "num_heads": 4}
_XS = {"embed_dim": 288, "num_heads": 6}
_S = {"embed_dim": 384, "num_heads": 8}
_M = {"embed_dim": 768, "num_heads": 16}


def _variant(size: dict, depth: int, img_size: int, params: int, gmacs: float, init_values: float = 1e-5) -> Variant:
    return Variant(
        "cait",
        CaiT,
        {**size, "depth": depth, "init_values": init_values, "img_size": img_size},
        params,
        gmacs,
        crop_pct=1.0,
        source="facebookresearch/deit cait_models.py; arXiv 2103.17239, table 3",
    )


VARIANTS: dict[str, Variant] = {
    "cait_xxs24_224": _variant(_XXS, 24, 224, 11_956_264, 2.523),
    "cait_xxs24_384": _variant(_XXS, 24, 384, 12_029_224, 9.599),
    "cait_xxs36_224": _variant(_XXS, 36, 224, 17_299_720, 3.756),
    "cait_xxs36_384": _variant(_XXS, 36, 384, 17_372_680, 14.313),
    "cait_xs24_384": _variant(_XS, 24, 384, 26_670_088, 19.241),
    "cait_s24_224": _variant(_S, 24, 224, 46_916_200, 9.327),
    "cait_s24_384": _variant(_S, 24, 384, 47_062_120, 32.110),
    "cait_s36_384": _variant(_S, 36, 384, 68_366_632, 47.908, 1e-6),
    "cait_m36_384": _variant(_M, 36, 384, 271_221_352, 172.944, 1e-6),
    "cait_m48_448": _variant(_M, 48, 448, 356_460_520, 329.108, 1e-6),
    # In the paper only, without official code; LayerScale starts by the paper's rule.
    "cait_xs36_224": _variant(_XS, 36, 224, 38_557_432, 8.03, 1e-6),
    "cait_s48_224": _variant(_S, 48, 224, 89_525_224, 18.48, 1e-6),
    "cait_m24_224": _variant(_M, 24, 224, 185_850_088, 35.78),
}
