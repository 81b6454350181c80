"""Classes that carry the attributes of the official repositories' blocks, under other names, right and nearly right."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.patching import explain, is_patched, patch, report, unpatch
from fastvit.patching.fusion import Fused
from fastvit.patching.later import Later
from fastvit.patching.matching import recognise
from fastvit.patching.rows import trial
from tests.patching.fused_and_plain import check_inference, check_training
from tests.tiny import shake

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DIM, HEADS = 24, 4


class HeadsBase(nn.Module):
    """What all the attentions below hold; not an attention itself."""

    def __init__(self, packed: bool = True, drop: float = 0.0):
        super().__init__()
        self.num_heads = HEADS
        self.scale = (DIM // HEADS) ** -0.5
        if packed:
            self.qkv = nn.Linear(DIM, 3 * DIM)
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(DIM, DIM)
        self.proj_drop = nn.Dropout(drop)


class Mixer(HeadsBase):
    """As DeiT's Attention."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.attn_drop(torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1))
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, n, c)))


class Talker(HeadsBase):
    """As CaiT's talking heads."""

    def __init__(self, drop: float = 0.0):
        super().__init__(drop=drop)
        self.proj_l = nn.Linear(HEADS, HEADS)
        self.proj_w = nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        maps = self.proj_l((self.scale * q @ k.transpose(2, 3)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps = self.proj_w(maps.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj_drop(self.proj((self.attn_drop(maps) @ v).transpose(1, 2).reshape(b, n, c)))


class ClassLook(HeadsBase):
    """As CaiT's class attention."""

    def __init__(self, drop: float = 0.0):
        super().__init__(packed=False, drop=drop)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        split = (b, -1, self.num_heads, c // self.num_heads)
        q, k, v = (t.reshape(split).transpose(1, 2) for t in (self.q(x[:, :1]), self.k(x), self.v(x)))
        maps = self.attn_drop((q @ k.transpose(2, 3) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, 1, c)))


class Deeper(HeadsBase):
    """As DeepViT's re-attention: gives its maps beside the output."""

    def __init__(self, apply_transform: bool = True, drop: float = 0.0):
        super().__init__(drop=drop)
        self.apply_transform = apply_transform
        if apply_transform:
            self.reatten_matrix = nn.Conv2d(HEADS, HEADS, 1)
            self.var_norm = nn.BatchNorm2d(HEADS)
            self.reatten_scale = 0.7

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.attn_drop((q @ k.transpose(2, 3) * self.scale).softmax(dim=-1))
        if self.apply_transform:
            maps = self.var_norm(self.reatten_matrix(maps)) * self.reatten_scale
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, n, c))), maps


class Turned(nn.Module):
    """Stands for einops' layers between heads first and heads last."""

    def __init__(self, pattern: str, *axes: int):
        super().__init__()
        self.pattern, self.axes = pattern, axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


Turned.__name__ = "Rearrange"  # einops' name


class Regenerator(nn.Module):
    """As vit-pytorch's DeepViT attention."""

    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.heads, self.scale = HEADS, 5**-0.5
        self.norm, self.to_qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * 5 * HEADS, bias=False)
        self.dropout = nn.Dropout(drop)
        self.reattn_weights = nn.Parameter(torch.randn(HEADS, HEADS))
        there, back = Turned("b h i j -> b i j h", 0, 2, 3, 1), Turned("b i j h -> b h i j", 0, 3, 1, 2)
        self.reattn_norm = nn.Sequential(there, nn.LayerNorm(HEADS), back)
        self.to_out = nn.Sequential(nn.Linear(5 * HEADS, DIM), nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        maps = self.dropout((torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1))
        maps = self.reattn_norm(torch.einsum("bhij,hg->bgij", maps, self.reattn_weights))
        return self.to_out(torch.einsum("bhij,bhjd->bhid", maps, v).transpose(1, 2).flatten(2))


class Rearrange(nn.Module):
    """Stands for einops' layer 'b c h w -> b (h w) c'."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def projection(stride: int) -> nn.Sequential:
    conv = nn.Conv2d(DIM, DIM, 3, stride=stride, padding=1, groups=DIM, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(DIM), rearrange=Rearrange()))


class Convolver(HeadsBase):
    """As CvT's attention."""

    def __init__(self, drop: float = 0.0):
        super().__init__(packed=False, drop=drop)
        self.scale = DIM**-0.5
        self.with_cls_token = True
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = projection(1), projection(2), projection(2)
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward_conv(self, x: Tensor, h: int, w: int) -> list[Tensor]:
        first, rest = x.split([1, h * w], 1)
        grid = rest.transpose(1, 2).unflatten(2, (h, w))
        return [torch.cat((first, conv(grid)), 1) for conv in (self.conv_proj_q, self.conv_proj_k, self.conv_proj_v)]

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        q, k, v = self.forward_conv(x, h, w)
        b, n, c = q.shape
        split = (b, -1, self.num_heads, c // self.num_heads)
        q = self.proj_q(q).view(split).permute(0, 2, 1, 3)
        k = self.proj_k(k).view(split).permute(0, 2, 1, 3)
        v = self.proj_v(v).view(split).permute(0, 2, 1, 3)
        maps = F.softmax(torch.einsum("bhlk,bhtk->bhlt", q, k) * self.scale, dim=-1)
        out = torch.einsum("bhlt,bhtv->bhlv", self.attn_drop(maps), v).permute(0, 2, 1, 3).reshape(b, n, c)
        return self.proj_drop(self.proj(out))


class Locator(nn.Module):
    """As Twins' PosCNN."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(DIM, DIM, 3, stride, 1, groups=DIM))
        self.s = stride

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        b, _, c = x.shape
        grid = x.transpose(1, 2).view(b, c, H, W)
        out = self.proj(grid) + grid if self.s == 1 else self.proj(grid)
        return out.flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """As the generator of CPVT's paper, algorithm 1."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        b, _, c = x.shape
        grid = x[:, 1:].transpose(1, 2).view(b, c, H, W)
        return torch.cat((x[:, :1], (self.proj(grid) + grid).flatten(2).transpose(1, 2)), dim=1)


class Local(nn.Module):
    """As CeiT's LocallyEnhancedFeedForward."""

    def __init__(self, with_bn: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(DIM, 2 * DIM, 1)
        self.conv2 = nn.Conv2d(2 * DIM, 2 * DIM, 3, padding=1, groups=2 * DIM)
        self.conv3 = nn.Conv2d(2 * DIM, DIM, 1)
        self.act = nn.GELU()
        self.with_bn = with_bn
        if with_bn:
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(2 * DIM), nn.BatchNorm2d(2 * DIM), nn.BatchNorm2d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.size()
        first, rest = torch.split(x, [1, n - 1], dim=1)
        side = int(math.sqrt(n - 1))
        grid = rest.reshape(b, side, side, c).permute(0, 3, 1, 2)
        if self.with_bn:
            grid = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(grid))))))
            grid = self.bn3(self.conv3(grid))
        else:
            grid = self.conv3(self.act(self.conv2(self.act(self.conv1(grid)))))
        return torch.cat((first, grid.flatten(2).permute(0, 2, 1)), dim=1)


class QuickGELU(nn.Module):
    """As CvT's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Perceptron(nn.Module):
    """As the Mlp of all these repositories."""

    def __init__(self, act: type[nn.Module] = nn.GELU, drop: float = 0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 2 * DIM), act(), nn.Linear(2 * DIM, DIM)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class TwiceDropped(Perceptron):
    """As later ones, with two dropouts."""

    def __init__(self, act: type[nn.Module] = nn.GELU):
        super().__init__(act)
        del self.drop
        self.drop1, self.drop2 = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Forward(nn.Module):
    """As vit-pytorch's FeedForward, whose Sequential is fused."""

    def __init__(self, drop: float = 0.0):
        super().__init__()
        up, down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.net = nn.Sequential(nn.LayerNorm(DIM), up, nn.GELU(), nn.Dropout(drop), down, nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


Case = tuple[Callable[[], nn.Module], Callable[[], tuple], dict[str, int]]


def tokens(count: int) -> Tensor:
    return torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(0))


CASES: dict[str, Case] = {
    "attention": (Mixer, lambda: (tokens(10),), {"masked_attention": 1}),
    "talking_heads": (Talker, lambda: (tokens(10),), {"head_mixed_attention": 1}),
    "class_attention": (ClassLook, lambda: (tokens(10),), {"class_attention": 1}),
    "re_attention": (Deeper, lambda: (tokens(10),), {"head_mixed_attention": 1}),
    "untransformed": (lambda: Deeper(False), lambda: (tokens(10),), {"masked_attention": 1}),
    "layer_normed": (Regenerator, lambda: (tokens(10),), {"head_mixed_attention": 1}),
    "conv_attention": (Convolver, lambda: (tokens(31), 5, 6), {"masked_attention": 1, "conv_projection": 3}),
    "pos_conv": (Locator, lambda: (tokens(30), 5, 6), {"token_depthwise_conv": 1}),
    "pos_conv_stride": (lambda: Locator(2), lambda: (tokens(30), 5, 6), {"token_depthwise_conv": 1}),
    "peg": (Encoder, lambda: (tokens(31), 5, 6), {"token_depthwise_conv": 1}),
    "mlp": (Perceptron, lambda: (tokens(10),), {"mlp": 1}),
    "mlp_quick_gelu": (lambda: TwiceDropped(QuickGELU), lambda: (tokens(10),), {"mlp": 1}),
    "feed_forward": (Forward, lambda: (tokens(10),), {"mlp": 1}),
    "leff": (Local, lambda: (tokens(17),), {"leff": 1}),
    "leff_without_bn": (lambda: Local(False), lambda: (tokens(17),), {"leff": 1}),
}


class Model(nn.Module):
    """A block as users have it: inside something, its tuple unpacked."""

    def __init__(self, block: nn.Module, *grid: int):
        super().__init__()
        self.block = block
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x, *self.grid)
        return out[0] if isinstance(out, tuple) else out


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, arguments, _ = CASES[name]
    x, *grid = arguments()
    return shake(Model(make(), *grid)).eval(), x


@pytest.mark.parametrize("name", CASES)
def test_every_block_is_fused_and_called(name):
    model, x = build(name)
    patch(model, strict=True, verify=x)
    assert report(model).totals() == {op: (count, count) for op, count in CASES[name][2].items()}
    choices = [row for row in explain(model, x).rows if row.op != "linear"]  # the projections beside
    called = [row.name for row in choices if row.op != "conv_projection"]
    called += [f"{row.name}.conv_proj_{part}" for row in choices if row.op == "conv_projection" for part in "qkv"]
    assert sorted(called) == sorted(row.name for row in report(model).rows)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_inference(name, dtype):
    check_inference(*build(name), dtype, strict=True)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_training(name, dtype):
    check_training(*build(name), dtype, strict=True)


class ListensToItself(Convolver):
    def forward_conv(self, x: Tensor, h: int, w: int) -> list[Tensor]:
        self.seen = x
        return super().forward_conv(x, h, w)


@pytest.mark.parametrize("why", ["hook", "linear", "own"])
def test_cvts_projections_are_called_where_they_must_be(why):
    block, x = shake(ListensToItself() if why == "own" else Convolver()).eval(), (tokens(31), 5, 6)
    with torch.no_grad():
        expected = block(*x)
        patch(block, strict=True)
        if why == "hook":
            block.conv_proj_k.bn.register_forward_hook(lambda *_: None)
        elif why == "linear":
            block.proj_v.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(block(*x), expected)
        assert "conv_projection" not in [row.op for row in explain(block, x).rows]
        assert why != "own" or block.seen is x[0]


class DoubledGELU(QuickGELU):
    """Not what its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


DoubledGELU.__name__ = "QuickGELU"


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Perceptron(DoubledGELU), "Perceptron.forward computes something else than the known one in eval mode"),
        (lambda: Perceptron(nn.Tanh), "act is Tanh(), accepted without hooks are"),
        (lambda: _Gated(), "_Gated.forward computes something else than the known one in eval mode"),
    ],
)
def test_mlps_that_are_not_are_left_alone(block, reason):
    assert reason in recognise(block()).reasons[0]


class _Gated(Perceptron):
    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x)) * self.fc1(x)))


@pytest.mark.parametrize("make", [lambda: Perceptron(drop=0.5), lambda: Forward(0.5)])
def test_dropout_within_an_mlp_takes_the_plain_path(make):
    block, x = patch(make()), tokens(10)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("transform", [True, False])
def test_deepvits_maps_are_there_for_who_wants_them(transform):
    block, x = shake(Deeper(transform)).eval(), tokens(10)
    with torch.no_grad():
        _, expected = block(x)
        out, maps = patch(block)(x)
        assert isinstance(maps, Later)
        assert maps._result is None  # nobody has looked yet
        assert maps.shape == (2, HEADS, 10, 10)
        torch.testing.assert_close(maps * 1, expected)
        torch.testing.assert_close(maps.mean(), expected.mean())
        assert torch.equal(block(out, maps)[0], block(out)[0])


@pytest.mark.parametrize("transform", [True, False])
def test_deepvits_maps_in_training_have_gradients_and_count_nothing_twice(transform):
    plain = shake(Deeper(transform)).double().train()
    fused, x = patch(copy.deepcopy(plain)), tokens(10).double()
    for _ in range(3):
        with torch.no_grad():  # as the optimizer would, before anybody has looked at the maps
            for parameter, other in zip(plain.parameters(), fused.parameters(), strict=True):
                other.copy_(parameter)
        (out, maps), (expected, expected_maps) = fused(x), plain(x)
        assert isinstance(maps, Later)
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.add_(1.0)
        torch.testing.assert_close(maps * 1, expected_maps)
        for block, loss in ((fused, maps.square().sum()), (plain, expected_maps.square().sum())):
            block.zero_grad()
            loss.backward(retain_graph=True)
        for (name, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            if parameter.grad is not None:
                torch.testing.assert_close(other.grad, parameter.grad)
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))


def test_deepvits_dropped_maps_are_those_that_were_used():
    block = shake(Deeper(drop=0.5)).train()
    assert not isinstance(patch(block)(tokens(10))[1], Later)


class _KeepsMap(Mixer):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        self.last_map = (q @ k.transpose(2, 3) * self.scale).softmax(dim=-1)
        return self.proj_drop(self.proj((self.attn_drop(self.last_map) @ v).transpose(1, 2).reshape(b, n, c)))


class _OverQueries(Mixer):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.attn_drop(torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-2))
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, n, c)))


class _OtherPacking(Mixer):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, self.num_heads, 3, c // self.num_heads).permute(3, 0, 2, 1, 4).unbind(0)
        maps = self.attn_drop(torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1))
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, n, c)))


class _Residual(Mixer):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.attn_drop(torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1))
        return x + self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, n, c)))


class _LastTokenOnly(Mixer):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.attn_drop(torch.softmax(q[:, :, -1:] @ k.transpose(2, 3) * self.scale, dim=-1))
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, 1, c)))


class _DropsEarlier(Talker):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        maps = self.proj_l((self.scale * q @ k.transpose(2, 3)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps = self.proj_w(self.attn_drop(maps.softmax(dim=-1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).reshape(b, n, c)))


class _DropsOtherwise(Mixer):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.attn_drop(torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1))
        return self.proj(self.proj_drop((maps @ v).transpose(1, 2).reshape(b, n, c)))


class _NoIdentity(Encoder):
    def forward(self, x, H, W):
        b, _, c = x.shape
        grid = x[:, 1:].transpose(1, 2).view(b, c, H, W)
        return torch.cat((x[:, :1], self.proj(grid).flatten(2).transpose(1, 2)), dim=1)


class _LastGelu(Local):
    def forward(self, x):
        b, n, c = x.size()
        first, rest = torch.split(x, [1, n - 1], dim=1)
        side = int(math.sqrt(n - 1))
        grid = rest.reshape(b, side, side, c).permute(0, 3, 1, 2)
        grid = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(grid))))))
        return torch.cat((first, self.act(self.bn3(self.conv3(grid))).flatten(2).permute(0, 2, 1)), dim=1)


class _Fails(Mixer):
    def forward(self, x):
        return self.proj(self.qkv(x))


class _OtherName(Locator):
    def forward(self, x, height, W):
        return x


class _Calls(Mixer):
    def forward(self, x):
        return super().forward(x) * 2


ELSEWHERE = "computes something else than the known one"


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (_KeepsMap, "forward of this version uses last_map, which is not known"),
        (_OverQueries, ELSEWHERE),
        (_OtherPacking, ELSEWHERE),
        (_Residual, ELSEWHERE),
        (_LastTokenOnly, ELSEWHERE),
        (_DropsEarlier, f"{ELSEWHERE} where attn_drop drops"),
        (_DropsOtherwise, f"{ELSEWHERE} where proj_drop drops"),
        (_NoIdentity, ELSEWHERE),
        (_LastGelu, ELSEWHERE),
        (_Fails, "could not be tried: RuntimeError"),
        (_OtherName, "forward takes (x, height, W), expected is (x, H, W)"),
        (_Calls, "uses forward, super, which is not known"),
    ],
)
def test_what_computes_something_else_is_left_alone(cls, reason):
    block = cls()
    (found,) = recognise(block).reasons
    assert reason in found
    with pytest.warns(UserWarning, match="nothing to fuse"):
        patch(nn.Sequential(OrderedDict(block=block)))
    assert not is_patched(block)


def test_settings_that_change_the_meaning():
    for change in (
        lambda block: setattr(block.act, "approximate", "tanh"),
        lambda block: setattr(block.conv2, "padding_mode", "circular"),
        lambda block: setattr(block.conv2, "dilation", (2, 2)),
        lambda block: setattr(block, "bn1", nn.Identity()),
    ):
        block = Local()
        assert recognise(block).reasons == []
        change(block)
        assert recognise(block).reasons


def test_a_subclass_that_keeps_forward_is_fused():
    class Mine(Talker):
        def extra(self) -> int:
            return 1

    assert recognise(Mine()).reasons == []


def test_the_trial_leaves_module_and_random_state_alone(monkeypatch):
    block = Deeper(drop=0.2).train()
    called: list[int] = []
    block.register_forward_hook(lambda *_: called.append(1))
    block.qkv.register_forward_hook(lambda *_: called.append(2))
    before = copy.deepcopy(block.state_dict())
    random = torch.get_rng_state()
    assert recognise(block).reasons == []
    assert torch.equal(torch.get_rng_state(), random)
    assert not called
    assert block.training
    assert block.attn_drop.p == 0.2
    assert all(torch.equal(block.state_dict()[key], tensor) for key, tensor in before.items())
    monkeypatch.setattr(trial, "_try", lambda *_: pytest.fail("tried again without need"))
    assert recognise(block).reasons == []


def test_modules_on_meta_are_recognised():
    assert recognise(Talker().to("meta")).reasons == []


class _LowRank(nn.Module):
    """A linear with an adapter around it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_are_called():
    model, x = build("attention")
    model.block.qkv = _LowRank(model.block.qkv)
    patch(model, strict=True, verify=x)
    model(x).sum().backward()
    assert model.block.qkv.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("attention", "block.attn_drop"),
        ("re_attention", "block.var_norm"),
        ("layer_normed", "block.reattn_norm.1"),
        ("layer_normed", "block.dropout"),
        ("conv_attention", "block.conv_proj_k.bn"),
        ("conv_attention", "block.conv_proj_k.rearrange"),
        ("peg", "block.proj"),
        ("pos_conv", "block.proj.0"),
        ("leff", "block.conv2"),
        ("leff", "block.bn1"),
        ("leff", "block.act"),
    ],
)
def test_hooks_on_what_would_be_read_are_called(name, part):
    model, x = build(name)
    called: list[str] = []
    patch(model)
    model.get_submodule(part).register_forward_hook(lambda *_: called.append(part))
    with torch.no_grad():
        got = model(x)
        assert called
        torch.testing.assert_close(got, unpatch(model)(x))


@pytest.mark.parametrize("name", CASES)
def test_compile_without_graph_breaks(name):
    model, x = build(name)
    patch(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["re_attention", "untransformed", "leff", "conv_attention"])
def test_export_takes_the_reference_path(name):
    model, x = build(name)
    patch(model)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert not [node for node in exported.graph.nodes if "fastvit" in str(node.target)]
        torch.testing.assert_close(exported.module()(x), model(x))


def test_copies_keep_what_is_fused():
    model, x = build("re_attention")
    patch(model)
    clone = copy.deepcopy(model)
    assert isinstance(clone.block, Fused)
    with torch.no_grad():
        assert torch.equal(clone(x), model(x))
    assert type(unpatch(clone).block) is Deeper
