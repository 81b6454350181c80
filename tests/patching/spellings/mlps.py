"""MLPs, and depthwise convolutions of tokens, as people write them: one small module a spelling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tests.patching.spellings.modules import Spelling

MLP, GLU, CONVOLUTION = "mlp", "glu_mlp", "token_depthwise_conv"
GRID, WIDTH, HIDDEN = 5, 24, 40
TOKENS = GRID * GRID

MLPS: dict[str, Spelling] = {}


def spelling(operator: str = MLP, shape: tuple[int, ...] = (2, TOKENS, WIDTH)) -> Callable[[Any], Any]:
    def enter(cls: Any) -> Any:
        MLPS[cls.__name__] = Spelling(cls, operator, shape)
        return cls

    return enter


class Layers(nn.Module):
    """Two linear layers; a subclass writes the forward."""

    hidden = HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(self.hidden, WIDTH)
        self.drop = nn.Dropout(0.0)
        self.make()

    def make(self) -> None:
        """Further parts."""


@spelling()
class Module(Layers):
    def make(self):
        self.act, self.norm = nn.GELU(), nn.Identity()

    def forward(self, x):
        return self.drop(self.fc2(self.norm(self.drop(self.act(self.fc1(x))))))


@spelling()
class Functional(Layers):
    def forward(self, x):
        hidden = F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias), approximate="tanh")
        return F.linear(input=hidden, weight=self.fc2.weight, bias=self.fc2.bias)


@spelling()
class WithResidual(Layers):
    def make(self):
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return x + self.scale * self.fc2(torch.relu(self.fc1(self.norm(x))))


@spelling()
class ReluInPlace(Layers):
    def make(self):
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)).contiguous())


@spelling()
class QuickGelu(Layers):
    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


@spelling()
class SiluByHand(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden.sigmoid() * hidden)


@spelling()
class SiluByExp(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden / (1.0 + torch.exp(-hidden)))


@spelling()
class GeluByErf(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden * 0.5 * (1.0 + torch.erf(hidden / math.sqrt(2.0))))


@spelling()
class GeluByTanh(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        inner = math.sqrt(2.0 / math.pi) * (hidden + 0.044715 * torch.pow(hidden, 3.0))
        return self.fc2(self.drop(0.5 * hidden * (1.0 + torch.tanh(inner))))


@spelling()
class GeluByCubes(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        cubed = hidden * hidden * hidden
        return self.fc2((hidden / 2) * (1 + (0.7978845608 * (hidden + cubed * 0.044715)).tanh()))


@spelling()
class GeluOfPowers(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        inner = hidden * (0.7978845608028654 * (1 + 0.044715 * hidden.square()))
        return self.fc2(hidden - hidden * (1 - inner.tanh()) / 2)


@spelling(shape=(2, 3, TOKENS, WIDTH))
class FourAxes(Layers):
    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)))


@spelling()
class OfAnImage(nn.Module):
    """1x1 convolutions of a view of tokens."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, kernel_size=1, bias=False)

    def forward(self, x):
        image = x.transpose(1, 2).view(-1, WIDTH, GRID, GRID)
        return self.fc2(F.gelu(self.fc1(image))).flatten(2).transpose(1, 2)


@spelling(GLU)
class SwiGlu(Layers):
    def make(self):
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return self.fc2(F.silu(self.gate(x)) * self.fc1(x))


@spelling(GLU)
class SwiGluByHand(Layers):
    def make(self):
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        gate = self.gate(x)
        return self.fc2(self.fc1(x) * (gate * torch.sigmoid(gate)))


@spelling(GLU)
class SwiGluWithNorm(Layers):
    def make(self):
        self.gate, self.norm = nn.Linear(WIDTH, HIDDEN, bias=False), nn.LayerNorm(HIDDEN)

    def forward(self, x):
        values, gate = self.fc1(x), F.silu(self.gate(x))
        return self.fc2(self.norm(self.drop(values * gate)))


@spelling(GLU)
class GateFirst(Layers):
    hidden = HIDDEN // 2

    def forward(self, x):
        gate, values = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.gelu(gate) * values)


@spelling(GLU)
class GateLast(Layers):
    hidden = HIDDEN // 2

    def forward(self, x):
        values, gate = torch.split(self.fc1(x), HIDDEN // 2, dim=2)
        return self.fc2(values.mul(gate.sigmoid()))


@spelling(GLU)
class Glu(Layers):
    hidden = HIDDEN // 2

    def forward(self, x):
        return self.fc2(F.glu(self.fc1(x), dim=-1))


@spelling(GLU)
class Bilinear(Layers):
    hidden = HIDDEN // 2

    def forward(self, x):
        first, second = self.fc1(x).split([HIDDEN // 2, HIDDEN // 2], -1)
        return self.fc2(first * second)


@spelling(CONVOLUTION)
class PositionalEncoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        image = x.transpose(1, 2).view(-1, WIDTH, GRID, GRID)
        return (self.proj(image) + image).flatten(2).transpose(1, 2)


@spelling(CONVOLUTION)
class BehindAClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 5, 2, 2, groups=WIDTH, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        image = rearrange(x[:, 1:], "b (h w) c -> b c h w", h=3)
        return rearrange(self.norm(self.conv(image)), "b c h w -> b (h w) c")


@spelling(CONVOLUTION)
class DepthwiseFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 1, 3, 3))

    def forward(self, x):
        image = x.mT.unflatten(2, (GRID, GRID))
        return F.gelu(F.conv2d(image, self.weight, padding="same", groups=WIDTH)).flatten(2).mT
