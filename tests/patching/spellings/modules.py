"""Attention as people write it: one small module a spelling, and the operator that computes it.

Each is a class of its own, which no table knows; what varies is how the same arithmetic is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, einsum, nn

MASKED, CLASS, MIXED = "masked_attention", "class_attention", "head_mixed_attention"
TOKENS, WIDTH, HEADS = 9, 24, 4


class Spelling(NamedTuple):
    """A class, the operator, and the shape of its input."""

    cls: Callable[[], nn.Module]
    operator: str
    shape: tuple[int, ...]


SPELLINGS: dict[str, Spelling] = {}


def spelling(operator: str = MASKED, shape: tuple[int, ...] = (2, TOKENS, WIDTH)) -> Callable[[Any], Any]:
    def enter(cls: Any) -> Any:
        SPELLINGS[cls.__name__] = Spelling(cls, operator, shape)
        return cls

    return enter


class Heads(nn.Module):
    """Projects to q, k, v (B, H, N, D) and back; a subclass writes ``weigh``, which gives (B, H, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.0)
        self.scale = (WIDTH // HEADS) ** -0.5
        self.make()

    def make(self) -> None:
        """Further parts."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.weigh(q, k, v).transpose(1, 2).reshape(b, n, c))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


# --- Products -------------------------------------------------------------------------------------------------------


@spelling()
class Operators(Heads):
    def weigh(self, q, k, v):
        attn = (q @ k.transpose(-2, -1)) * self.scale
        return self.drop(attn.softmax(dim=-1)) @ v


@spelling()
class Matmul(Heads):
    def weigh(self, q, k, v):
        scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(q.size(-1))
        return torch.matmul(F.softmax(scores, dim=-1), v)


@spelling()
class MatmulMethods(Heads):
    def weigh(self, q, k, v):
        return q.matmul(k.mT).mul(self.scale).softmax(-1).matmul(v)


@spelling()
class ScaledQueries(Heads):
    def weigh(self, q, k, v):
        q = q * self.scale
        return (q @ k.transpose(2, 3)).softmax(-1) @ v


@spelling()
class Bmm(Heads):
    def weigh(self, q, k, v):
        b, h, n, d = q.shape
        q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
        attn = torch.bmm(q, k.transpose(1, 2))
        return torch.bmm(torch.softmax(attn * self.scale, dim=2), v).view(b, h, n, d)


@spelling()
class Baddbmm(Heads):
    def weigh(self, q, k, v):
        b, h, n, d = q.shape
        q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
        empty = torch.empty(b * h, n, n, dtype=q.dtype, device=q.device)
        attn = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0.0, alpha=self.scale)
        return attn.softmax(-1).bmm(v).view(b, h, n, d)


@spelling()
class BaddbmmWithBias(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        b, h, n, d = q.shape
        bias = self.table.repeat(b, 1, 1)
        attn = torch.baddbmm(bias, q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2), beta=0.5, alpha=0.3)
        return (attn.softmax(-1) @ v.reshape(b * h, n, d)).view(b, h, n, d)


@spelling()
class Einsum(Heads):
    def weigh(self, q, k, v):
        attn = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        return torch.einsum("bhij,bhjd->bhid", attn.softmax(dim=-1), v)


@spelling()
class EinsumOtherLetters(Heads):
    def weigh(self, q, k, v):
        attn = einsum("n h x c, n h y c -> n h x y", q, k) * self.scale
        return einsum("n h x y, n h y c -> n h x c", torch.softmax(attn, -1), v)


@spelling()
class EinsumEllipsis(Heads):
    def weigh(self, q, k, v):
        attn = einsum("...id,...jd->...ij", q, k).mul_(self.scale)
        return einsum("...ij,...jd->...id", attn.softmax(-1), v)


@spelling()
class Moved(Heads):
    def weigh(self, q, k, v):
        attn = torch.movedim(q @ k.swapaxes(-1, -2) * self.scale, 0, 1)
        return torch.softmax(attn.moveaxis(1, 0), -1) @ v


@spelling()
class EinsumOperandList(Heads):
    def weigh(self, q, k, v):
        attn = einsum("bhid,bhjd->bhij", [q * self.scale, k])
        return einsum("bhij,bhjd->bhid", [attn.softmax(-1), v])


@spelling()
class EinsumTokensFirst(nn.Module):
    """Heads stay behind the tokens."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        attn = einsum("bihd,bjhd->bhij", q, k) * 0.4
        return einsum("bhij,bjhf->bihf", attn.softmax(-1), v).flatten(2)


@spelling()
class EinsumOutputOrder(Heads):
    def weigh(self, q, k, v):
        attn = einsum("bhid,bhjd->bhij", q, k) * self.scale
        return einsum("bhij,bhjf->bihf", attn.softmax(dim=-1), v).transpose(1, 2)


@spelling()
class EinsumHeadsLast(Heads):
    def weigh(self, q, k, v):
        attn = einsum("bhid,bhjd->bijh", q, k) * self.scale
        return einsum("bijh,bhjd->bhid", attn.softmax(dim=2), v)


@spelling()
class KeysByQueries(Heads):
    def weigh(self, q, k, v):
        attn = (k @ q.transpose(-2, -1)) * self.scale
        return attn.softmax(dim=-2).transpose(-2, -1) @ v


@spelling()
class EinsumKeysByQueries(Heads):
    def weigh(self, q, k, v):
        attn = einsum("bhjd,bhid->bhji", k, q) * self.scale
        return einsum("bhji,bhjd->bhid", F.softmax(attn, 2), v)


@spelling(shape=(2, WIDTH, 3, 5))
class ChannelsFirst(nn.Module):
    """Non-local block of images: tokens are the last axis."""

    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        attn = torch.bmm(q.permute(0, 2, 1), k).softmax(-1)
        return torch.bmm(v, attn.permute(0, 2, 1)).view_as(x)


@spelling(shape=(2, WIDTH, 3, 5))
class ChannelsFirstHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b (t h c) x y -> t b h c (x y)", t=3, h=HEADS)
        attn = (torch.einsum("bhdi,bhdj->bhij", q, k) * 0.3).softmax(dim=-1)
        return rearrange(torch.einsum("bhij,bhdj->bhid", attn, v), "b h (x y) d -> b (h d) x y", x=x.shape[2])


@spelling()
class ReturnsTransposed(Heads):
    def weigh(self, q, k, v):
        attn = torch.softmax(q @ k.mT * self.scale, dim=-1)
        return (v.transpose(-2, -1) @ attn.transpose(-2, -1)).transpose(-2, -1)


@spelling()
class WiderValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 48)

    def forward(self, x):
        q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=HEADS) for layer in (self.q, self.k, self.v))
        return rearrange((q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v, "b h n d -> b n (h d)")


@spelling()
class NarrowerValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 8)

    def forward(self, x):
        q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=HEADS) for layer in (self.q, self.k, self.v))
        return rearrange((q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v, "b h n d -> b n (h d)")


# --- Scales ---------------------------------------------------------------------------------------------------------


@spelling()
class ScaleInPlace(Heads):
    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1)
        attn *= self.scale
        return attn.softmax(-1) @ v


@spelling()
class DividedInPlace(Heads):
    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1)
        attn /= q.shape[-1] ** 0.5
        return attn.softmax(-1) @ v


@spelling()
class ScaleFromTheLeft(Heads):
    def weigh(self, q, k, v):
        return (self.scale * (q @ k.transpose(-2, -1))).softmax(-1) @ v


@spelling()
class ScaleBuffer(Heads):
    def make(self):
        self.register_buffer("temperature", torch.tensor(2.5))

    def weigh(self, q, k, v):
        return torch.div(q @ k.transpose(-2, -1), self.temperature).softmax(-1) @ v


@spelling()
class LearnedScale(Heads):
    """LSA's temperature."""

    def make(self):
        self.temperature = nn.Parameter(torch.log(torch.tensor(0.4)))

    def weigh(self, q, k, v):
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.temperature.exp()
        return torch.matmul(nn.Softmax(dim=-1)(dots), v)


@spelling()
class LogitScaleOfHeads(Heads):
    """Swin-V2: cosine similarity, one learned factor a head, clamped."""

    def make(self):
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.table = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        return (attn + self.table).softmax(-1) @ v


@spelling()
class ScaledAfterBias(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        return ((q @ k.transpose(-2, -1) + self.table) * self.scale).softmax(-1) @ v


@spelling()
class FactorAfterSoftmax(Heads):
    def weigh(self, q, k, v):
        return ((q @ k.transpose(-2, -1)).softmax(-1) * self.scale) @ v


@spelling()
class HeadFactorAfterSoftmax(Heads):
    def make(self):
        self.gate = nn.Parameter(torch.rand(HEADS, 1, 1))

    def weigh(self, q, k, v):
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return (attn * self.gate) @ v


# --- Biases ---------------------------------------------------------------------------------------------------------


@spelling()
class RelativeBias(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
        steps = torch.arange(TOKENS)
        self.register_buffer("index", steps[:, None] - steps[None, :] + TOKENS - 1)

    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1) * self.scale
        bias = self.table[self.index.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        return attn.softmax(-1) @ v


@spelling()
class BiasInPlace(Heads):
    def make(self):
        self.register_buffer("table", torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        attn = (q @ k.transpose(-2, -1)).mul_(self.scale)
        attn += self.table
        return attn.softmax(-1) @ v


@spelling()
class Slopes(Heads):
    """ALiBi: distances are subtracted."""

    def make(self):
        steps = torch.arange(TOKENS, dtype=torch.float32)
        self.register_buffer("distances", (steps[:, None] - steps).abs() * torch.rand(HEADS, 1, 1))

    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1) * self.scale
        return (attn - self.distances).softmax(-1) @ v


@spelling()
class TwoBiases(Heads):
    def make(self):
        self.across, self.down = nn.Parameter(torch.randn(HEADS, 1, TOKENS)), nn.Parameter(torch.randn(TOKENS, 1))
        self.table = nn.Parameter(torch.randn(TOKENS, TOKENS))

    def weigh(self, q, k, v):
        attn = torch.add(q @ k.transpose(-2, -1) * self.scale, self.across)
        attn = self.table + attn
        return torch.add(attn, self.down, alpha=2).softmax(-1) @ v


@spelling(shape=(4, TOKENS, WIDTH))
class Windows(Heads):
    """Swin: a position bias, then a mask of two windows added behind a reshape."""

    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.register_buffer("mask", torch.where(torch.rand(2, TOKENS, TOKENS) > 0.5, -100.0, 0.0))

    def weigh(self, q, k, v):
        b, h, n, _ = q.shape
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.table.unsqueeze(0)
        attn = attn.view(b // 2, 2, h, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, h, n, n)
        return self.drop(nn.Softmax(dim=-1)(attn)) @ v


@spelling()
class BiasOfFlatHeads(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        attn = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * self.scale
        attn = (attn.unflatten(0, (-1, HEADS)) + self.table).flatten(0, 1)
        return torch.bmm(attn.softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, HEADS))


@spelling()
class BiasOfKeysByQueries(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        attn = (k @ q.transpose(-2, -1)) * self.scale + self.table
        return einsum("bhji,bhjd->bhid", attn.softmax(dim=-2), v)


@spelling()
class BiasUnderPermute(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(TOKENS, TOKENS, HEADS))

    def weigh(self, q, k, v):
        attn = (q @ k.transpose(-2, -1) * self.scale).permute(0, 2, 3, 1) + self.table
        return attn.permute(0, 3, 1, 2).softmax(-1) @ v


# --- Masks ----------------------------------------------------------------------------------------------------------


def blocks(n: int = TOKENS) -> Tensor:
    """A mask, True where not to attend; one row has no key."""
    mask = torch.rand(n, n) > 0.6
    mask.fill_diagonal_(False)
    mask[3] = True
    return mask


@spelling()
class MaskedByInfinity(Heads):
    def make(self):
        self.register_buffer("mask", blocks() & (torch.arange(TOKENS) != 3)[:, None])

    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1) * self.scale
        return attn.masked_fill(self.mask, float("-inf")).softmax(-1) @ v


@spelling()
class MaskedByTheLeast(Heads):
    def make(self):
        self.register_buffer("mask", ~blocks())

    def weigh(self, q, k, v):
        dots = q @ k.transpose(-2, -1) * self.scale
        dots = dots.masked_fill(~self.mask, -torch.finfo(dots.dtype).max)
        return dots.softmax(-1) @ v


@spelling()
class MaskedInPlace(Heads):
    def make(self):
        self.register_buffer("mask", blocks())

    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1)
        attn.masked_fill_(self.mask, torch.finfo(attn.dtype).min)
        return attn.softmax(-1) @ v


@spelling()
class MaskedByWhere(Heads):
    def make(self):
        self.register_buffer("keep", torch.rand(1, 1, 1, TOKENS) > 0.4)

    def weigh(self, q, k, v):
        attn = q @ k.transpose(-2, -1) * self.scale
        return torch.where(self.keep, attn, float("-inf")).softmax(-1) @ v


@spelling()
class AdditiveMask(Heads):
    def make(self):
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(blocks(), -1e4)
        self.register_buffer("mask", mask)

    def weigh(self, q, k, v):
        return (q @ k.transpose(-2, -1) * self.scale + self.mask).softmax(-1) @ v


@spelling()
class DiagonalMask(Heads):
    """LSA: no token attends to itself."""

    def make(self):
        self.temperature = nn.Parameter(torch.log(torch.tensor(0.4)))

    def weigh(self, q, k, v):
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.temperature.exp()
        mask = torch.eye(dots.shape[-1], device=dots.device, dtype=torch.bool)
        dots = dots.masked_fill(mask, -torch.finfo(dots.dtype).max)
        return torch.matmul(dots.softmax(dim=-1), v)


@spelling()
class TwoMasks(Heads):
    def make(self):
        self.register_buffer("one", torch.rand(TOKENS, TOKENS) > 0.8)
        self.register_buffer("two", torch.arange(TOKENS) < 2)

    def weigh(self, q, k, v):
        attn = q @ k.mT * self.scale
        attn = attn.masked_fill(self.one, -torch.inf).masked_fill(self.two[None, None, None], -torch.inf)
        return attn.softmax(-1) @ v


# --- Softmax and dtype ----------------------------------------------------------------------------------------------


@spelling()
class SoftmaxModule(Heads):
    def make(self):
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.0)

    def weigh(self, q, k, v):
        return self.dropout(self.attend(q @ k.mT * self.scale)) @ v


@spelling()
class WideSoftmax(Heads):
    def weigh(self, q, k, v):
        attn = q @ k.transpose(-1, -2) * self.scale
        return F.softmax(attn, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling()
class CastAroundSoftmax(Heads):
    def weigh(self, q, k, v):
        attn = (q @ k.transpose(-1, -2) * self.scale).float().softmax(-1).type_as(v)
        return attn @ v


@spelling()
class CopiesBetween(Heads):
    def make(self):
        self.same = nn.Identity()

    def weigh(self, q, k, v):
        attn = self.same((q @ k.mT * self.scale).contiguous())
        return F.dropout(attn.clone().softmax(3), p=0.5, training=False) @ v


# --- Heads mixed ----------------------------------------------------------------------------------------------------


@spelling(MIXED)
class TalkingHeads(Heads):
    """CaiT: linear layers over heads, in front of the softmax and behind it, through permutes."""

    def make(self):
        self.proj_l, self.proj_w = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def weigh(self, q, k, v):
        attn = q * self.scale @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = attn.softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.drop(attn) @ v


@spelling(MIXED)
class ConvBeforeSoftmax(Heads):
    def make(self):
        self.mix = nn.Conv2d(HEADS, HEADS, 1)

    def weigh(self, q, k, v):
        return self.mix(q @ k.mT * self.scale).softmax(-1) @ v


@spelling(MIXED)
class ConvAfterSoftmax(Heads):
    def make(self):
        self.mix = nn.Conv2d(HEADS, HEADS, 1, bias=False)

    def weigh(self, q, k, v):
        return self.mix((q @ k.mT * self.scale).softmax(-1)) @ v


@spelling(MIXED)
class ConvOnBothSides(Heads):
    def make(self):
        self.before, self.after = nn.Conv2d(HEADS, HEADS, (1, 1)), nn.Conv2d(HEADS, HEADS, (1, 1))

    def weigh(self, q, k, v):
        return self.after(self.before(q @ k.mT).mul(self.scale).softmax(-1)) @ v


@spelling(MIXED)
class ReAttention(Heads):
    """DeepViT: mix, BatchNorm over heads, a factor."""

    def make(self):
        self.matrix, self.norm = nn.Conv2d(HEADS, HEADS, 1, 1), nn.BatchNorm2d(HEADS)

    def weigh(self, q, k, v):
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = self.drop(attn.softmax(dim=-1))
        attn = self.norm(self.matrix(attn)) * 0.3
        return attn @ v


@spelling(MIXED)
class EinsumMixAndLayerNorm(Heads):
    """vit-pytorch's DeepViT."""

    def make(self):
        self.weights = nn.Parameter(torch.randn(HEADS, HEADS))
        self.norm = nn.Sequential(Rearrange("b h i j -> b i j h"), nn.LayerNorm(HEADS), Rearrange("b i j h -> b h i j"))

    def weigh(self, q, k, v):
        attn = (einsum("b h i d, b h j d -> b h i j", q, k) * self.scale).softmax(dim=-1)
        attn = einsum("b h i j, h g -> b g i j", attn, self.weights)
        return einsum("b h i j, b h j d -> b h i d", self.norm(attn), v)


@spelling(MIXED)
class EinsumMixOutIn(Heads):
    def make(self):
        self.mix_in, self.mix_out = (nn.Parameter(torch.randn(HEADS, HEADS)) for _ in range(2))

    def weigh(self, q, k, v):
        attn = einsum("gh,bhij->bgij", self.mix_in, q @ k.mT * self.scale)
        return einsum("bhij,gh->bgij", attn.softmax(-1), self.mix_out) @ v


@spelling(MIXED)
class MatmulMix(Heads):
    def make(self):
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))

    def weigh(self, q, k, v):
        attn = (q @ k.mT * self.scale).softmax(-1)
        return torch.movedim(torch.movedim(attn, 1, -1) @ self.mix, -1, 1) @ v


@spelling(MIXED)
class NormWithoutMix(Heads):
    def make(self):
        self.norm = nn.BatchNorm2d(HEADS)

    def weigh(self, q, k, v):
        return self.norm((q @ k.mT * self.scale).softmax(-1)) @ v


@spelling(MIXED)
class FactorThenMix(Heads):
    def make(self):
        self.mix = nn.Conv2d(HEADS, HEADS, 1)

    def weigh(self, q, k, v):
        return self.mix(2.0 * (q @ k.mT * self.scale).softmax(-1)) @ v


# --- Queries, keys and values of other kinds ------------------------------------------------------------------------


@spelling(CLASS)
class ClassAttention(Heads):
    """CaiT: the class token alone asks."""

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b h n d", t=3, h=HEADS)
        attn = (q[:, :, :1] * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).flatten(2))


@spelling(CLASS)
class LearnedQuery(nn.Module):
    """Attention pooling."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, HEADS, 1, WIDTH // HEADS))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        k, v = rearrange(self.kv(x), "b n (t h d) -> t b h n d", t=2, h=HEADS)
        attn = self.query.expand(len(x), -1, -1, -1) @ k.transpose(-2, -1)
        return (attn.softmax(-1) @ v).flatten(1)


@spelling()
class MultiQuery(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH // HEADS)

    def forward(self, x):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=HEADS)
        k, v = self.kv(x).unsqueeze(1).chunk(2, dim=-1)
        return rearrange((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v, "b h n d -> b n (h d)")


@spelling()
class MultiQueryEinsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH // HEADS)

    def forward(self, x):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=HEADS)
        k, v = self.kv(x).chunk(2, dim=-1)
        attn = (q @ k.unsqueeze(1).transpose(-2, -1) * 0.4).softmax(-1)
        return einsum("bhij,bjd->bihd", attn, v).flatten(2)


@spelling()
class GroupedHeads(Heads):
    def weigh(self, q, k, v):
        k, v = (t[:, :2].repeat_interleave(2, dim=1) for t in (k, v))
        return (q @ k.mT * self.scale).softmax(-1) @ v


@spelling()
class Rotary(Heads):
    def weigh(self, q, k, v):
        half = q.shape[-1] // 2
        angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] / torch.arange(1, half + 1, dtype=q.dtype)
        cos, sin = angle.cos(), angle.sin()

        def turned(t):
            first, second = t.split(half, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        return (turned(q) @ turned(k).transpose(-2, -1) * self.scale).softmax(-1) @ v


@spelling(shape=(2, 16, WIDTH))
class ReducedKeys(nn.Module):
    """PVT: keys and values of a smaller image."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.sr, self.norm = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        small = self.sr(x.transpose(1, 2).reshape(b, c, 4, 4)).reshape(b, c, -1).permute(0, 2, 1)
        q = self.q(x).reshape(b, n, HEADS, -1).permute(0, 2, 1, 3)
        k, v = self.kv(self.norm(small)).reshape(b, -1, 2, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1)) * 0.4
        return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)


@spelling(shape=(2, 3, TOKENS, WIDTH))
class FiveAxes(nn.Module):
    """MobileViT: patches are an axis of their own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (rearrange(t, "b p n (h d) -> b p h n d", h=HEADS) for t in self.qkv(x).chunk(3, dim=-1))
        dots = torch.matmul(q, k.transpose(-1, -2)) * 0.4
        return rearrange(torch.matmul(dots.softmax(-1), v), "b p h n d -> b p n (h d)")


@spelling()
class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / WIDTH**0.5, dim=-1)
        return weights @ self.v(x)


# --- torch's own functions ------------------------------------------------------------------------------------------


@spelling()
class ScaledDotProduct(Heads):
    def weigh(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@spelling()
class ScaledDotProductMasked(Heads):
    def make(self):
        self.register_buffer("keep", ~blocks())

    def weigh(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep, scale=0.3)


@spelling()
class ScaledDotProductBiased(Heads):
    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.table[None])


@spelling(shape=(2, 3, TOKENS, WIDTH))
class ScaledDotProductOfFiveAxes(nn.Module):
    """NesT, Hiera: blocks of tokens are an axis of their own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (rearrange(t, "b t n (h d) -> b h t n d", h=HEADS) for t in self.qkv(x).chunk(3, dim=-1))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h t n d -> b t n (h d)")


@spelling()
class ScaledDotProductOfFlatHeads(Heads):
    def weigh(self, q, k, v):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, HEADS))


@spelling()
class MultiheadModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@spelling()
class MultiheadMasked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.register_buffer("ignored", torch.arange(TOKENS) > 6)

    def forward(self, x):
        bias = torch.zeros(TOKENS, TOKENS, dtype=x.dtype).fill_diagonal_(1.0)
        ignored = self.ignored.expand(len(x), -1)
        mask = torch.zeros_like(ignored, dtype=x.dtype).masked_fill(ignored, -3.0)
        return self.attn(x, x + 1, x, key_padding_mask=mask, attn_mask=bias, need_weights=False)[0]


@spelling()
class MultiheadFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH)) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(3 * WIDTH))

    def forward(self, x):
        x = x.transpose(0, 1)
        q, k, v, out = self.weights
        return F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, None, self.bias, None, None, False, 0.0, out, None, self.training,
            need_weights=False, use_separate_proj_weight=True, q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
        )[0].transpose(0, 1)  # fmt: skip


@spelling()
class ScaledDotProductOfWiderValues(Heads):
    """iFormer: the values have more channels than queries and keys."""

    def weigh(self, q, k, v):
        return F.scaled_dot_product_attention(q[..., :4], k[..., :4], v)


@spelling()
class ScaledDotProductOfNarrowerValues(Heads):
    """Conditional DETR: queries and keys hold positions beside what the values hold."""

    def weigh(self, q, k, v):
        q, k = (torch.cat((t, t.sin()), -1) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=0.2)


@spelling()
class ScaledDotProductOfSharedKeys(Heads):
    """MobileNetV4: all heads have the same keys and values."""

    def weigh(self, q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1])


@spelling(shape=(1, TOKENS, WIDTH))
class ScaledDotProductBiasedOfFlatHeads(Heads):
    """SAM: batch and heads are one axis, of the biases too."""

    def make(self):
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def weigh(self, q, k, v):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.table).unflatten(0, (-1, HEADS))
