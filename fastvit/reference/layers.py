"""The block ViT, DeiT, DeepViT, CaiT, CPVT and CeiT are built from (timm 0.3.2's), and the layers around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit.reference import functional
from fastvit.reference.overrides import must_call


def to_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """An int or a pair of ints as a pair; ValueError names the argument otherwise."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
        raise ValueError(f"{name}: expected a positive int or a pair (height, width) of them, got {value!r}")
    return pair


class DropPath(nn.Module):
    """Stochastic depth: drops the whole residual branch of a sample with probability ``drop_prob`` while training.

    Kept branches are divided by the keep probability. Source: Huang et al. 2016; timm 0.3.2 ``drop.py``.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def token_grid(image_size: tuple[int, int], patch_size: tuple[int, int], name: str) -> tuple[int, int]:
    """Token grid (h, w) of an image; ValueError names the argument where the patch size does not divide it."""
    if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
        raise ValueError(f"{name}: image size {tuple(image_size)} is not divisible by patch_size {patch_size}")
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


class Convolving(nn.Module):
    """A patch embedding whose convolution is called in one place, which a fused module replaces."""

    proj: nn.Conv2d

    def project(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of tokens (B, D, h, w)."""
        return self.proj(x)


class PatchEmbed(Convolving):
    """Images (B, C, H, W) to patch tokens (B, h*w, D), row-major, by a convolution whose stride is its kernel size."""

    def __init__(self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = to_pair(patch_size, "patch_size")
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def grid(self, height: int, width: int, name: str = "x") -> tuple[int, int]:
        """Token grid (h, w) of an image; see :func:`token_grid`."""
        return token_grid((height, width), self.patch_size, name)

    def forward(self, x: Tensor) -> Tensor:
        self.grid(*x.shape[-2:])
        return self.project(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, activation (GELU in its erf form by default), Linear, with dropout after each linear layer."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, act_layer: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ConvolutionalStem(nn.Module):
    """A stem whose convolutions with BatchNorm are called in one place, which a fused block replaces."""

    def convolve(self, x: Tensor, conv: nn.Module, norm: nn.Module, activation: str | None = None) -> Tensor:
        """activation(norm(conv(x)))."""
        return functional.activate(functional.normalised(conv(x), norm), activation)


class Projecting(nn.Module):
    """An attention whose linear layers are called in one place, which a fused block replaces."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x)."""
        return layer(x)


class Attention(Projecting):
    """Multi-head self-attention with one fused qkv projection, axis order (q|k|v, heads, head_dim)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, D) queries, keys, values to (B, H, N, D); the part a fused block replaces."""
        return attend(self, q, k, v, mask)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Tokens (B, N, C) to queries, keys and values (B, H, N, D), views of one packed tensor."""
        batch, tokens, _ = x.shape
        qkv = self.linear(self.qkv, x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, out: Tensor) -> Tensor:
        """What the heads gathered (B, H, N, D) to tokens (B, N, C)."""
        return self.proj_drop(self.linear(self.proj, out.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(self.attend(q, k, v, mask))


def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Masked attention, scaled and dropped from as an attention's ``scale`` and ``attn_drop`` say."""
    drop, scale = attention.attn_drop, attention.scale
    if must_call(drop, nn.Dropout):  # whoever replaces it or hooks to it is given the maps
        return functional.attention_by_parts(q, k, v, mask, scale=scale, drop=drop)
    return functional.masked_attention(q, k, v, mask, scale=scale, dropout_p=dropout_p(drop))


def dropout_p(dropout: nn.Dropout) -> float:
    """The probability a Dropout layer applies in its present mode."""
    return dropout.p if dropout.training else 0.0


class TokenBlock(nn.Module):
    """A block of which a fused one can compute the first tokens alone."""

    def forward_first(self, x: Tensor, *args: Any, count: int) -> Tensor:
        """The first ``count`` tokens of ``forward(x, *args)``."""
        return self(x, *args)[:, :count]


class Block(TokenBlock):
    """Pre-norm transformer block: x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, act_layer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_linear_and_norm(module: nn.Module) -> None:
    """Initialise one module as the official code does; convolutions keep PyTorch's default (``model.apply`` this)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def linear_drop_path(rate: float, depth: int) -> list[float]:
    """Drop-path rates growing linearly from 0 in the first block to ``rate`` in the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def expand_mask(mask: Tensor | None, patches: int, prefix_tokens: int, batch: int | None = None) -> Tensor | None:
    """A model's ``mask`` argument to one that broadcasts over (B, H, N, N), N = prefix_tokens + patches.

    Args:
        mask: bool, True = attend: (B, patches), (B, patches, patches) or (B, N, N). Prefix tokens are never masked,
            neither as queries nor as keys, whatever a (B, N, N) mask says of them.
        batch: B, where it is to be checked.

    Returns:
        (B, 1, 1, N) or (B, 1, N, N), or None.

    Raises:
        TypeError: mask is not bool. ValueError: its shape is none of the above.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool (True = attend), got {mask.dtype}")
    total = patches + prefix_tokens
    if batch is not None and mask.dim() > 1 and mask.shape[0] != batch:
        raise ValueError(
            f"mask: expected a batch of {batch}, as x has, got {mask.shape[0]} (shape {tuple(mask.shape)})"
        )
    if mask.dim() == 2 and mask.shape[1] == patches:
        return F.pad(mask, (prefix_tokens, 0), value=True)[:, None, None, :]
    if mask.dim() == 3 and mask.shape[1] == mask.shape[2] and mask.shape[1] in (patches, total):
        inner = mask[:, -patches:, -patches:] if patches else mask
        return F.pad(inner, (prefix_tokens, 0, prefix_tokens, 0), value=True)[:, None]
    raise ValueError(
        f"mask: expected shape (batch, {patches}), (batch, {patches}, {patches}) or (batch, {total}, {total}), "
        f"got {tuple(mask.shape)}"
    )


RESIZE_KINDS = ("bicubic", "bicubic_antialias", "bilinear_align_corners")


def resize_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    *,
    prefix_tokens: int = 1,
    old_grid: tuple[int, int] | None = None,
    kind: str = "bicubic",
) -> Tensor:
    """Resample the grid part of a position embedding (1, P + h*w, D) to another grid; the first P entries are kept.

    Args:
        kind: "bicubic" (DeiT, transformers), "bicubic_antialias" (timm's default), "bilinear_align_corners" (the JAX
            ViT's scipy zoom of order 1).
        old_grid: square by default.

    Raises:
        ValueError: unknown kind, or a grid part that is not square while ``old_grid`` is not given.
    """
    if kind not in RESIZE_KINDS:
        raise ValueError(f"kind: expected one of {RESIZE_KINDS}, got {kind!r}")
    prefix, grid = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    if old_grid is None:
        side = round(grid.shape[1] ** 0.5)
        old_grid = (side, side)
    if old_grid[0] * old_grid[1] != grid.shape[1]:
        raise ValueError(f"pos_embed: {grid.shape[1]} grid entries do not form a {old_grid[0]} x {old_grid[1]} grid")
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    image = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    mode, align = ("bilinear", True) if kind == "bilinear_align_corners" else ("bicubic", False)
    image = F.interpolate(image, size=new_grid, mode=mode, align_corners=align, antialias=kind == "bicubic_antialias")
    grid = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat((prefix, grid), dim=1)


class Taken(NamedTuple):
    """Which blocks ``forward_intermediates`` keeps, and how many it runs."""

    indices: set[int]
    last: int


def take_indices(depth: int, indices: int | Sequence[int] | None) -> Taken:
    """Resolve timm's ``indices`` argument: n means the last n blocks, None all, negatives count from the end."""
    if indices is None:
        chosen = list(range(depth))
    elif isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"indices: expected a count from 1 to {depth}, got {indices}")
        chosen = list(range(depth - indices, depth))
    else:
        chosen = [i + depth if i < 0 else i for i in indices]
        if not chosen or not all(0 <= i < depth for i in chosen):
            raise ValueError(f"indices: expected block indices from {-depth} to {depth - 1}, got {tuple(indices)}")
    return Taken(set(chosen), max(chosen))


def run_block(block: Callable[..., Any], recompute: bool, *args: Any) -> Any:
    """``block(*args)``, checkpointed where asked for and where there is something to differentiate."""
    if not recompute or not torch.is_grad_enabled():
        return block(*args)
    if torch.compiler.is_compiling():  # recomputes in its own graph, and takes no contexts
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=_recompute_contexts)


def _recompute_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), functional.recomputing()
