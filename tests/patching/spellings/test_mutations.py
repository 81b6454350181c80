"""One operation of a spelling changed: it is seen to be something else, and computed exactly as it is written."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvit.patching import patch, unpatch
from tests.patching.spellings.calls import operators_in
from tests.patching.spellings.modules import MASKED, SPELLINGS, Heads, Spelling

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


def over_another_axis(softmax, map_, dim, rest):
    return softmax(map_, dim=(dim - 1) % map_.dim(), **rest)


def behind_a_relu(softmax, map_, dim, rest):
    return softmax(map_.relu(), dim=dim, **rest)


def of_the_largest(softmax, map_, dim, rest):
    kept = map_.topk(3, dim=dim).indices
    return softmax(torch.full_like(map_, -torch.inf).scatter(dim, kept, map_), dim=dim, **rest)


def in_front_of_a_power(softmax, map_, dim, rest):
    return softmax(map_, dim=dim, **rest).square()


def squared(softmax, map_, dim, rest):
    return softmax(map_ * map_, dim=dim, **rest)


class Mutation(TorchFunctionMode):
    """Has another function called in place of each softmax."""

    def __init__(self, mutate):
        super().__init__()
        self.mutate = mutate

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in SOFTMAX:
            return func(*args, **kwargs)
        dim = kwargs.pop("dim") if "dim" in kwargs else args[1]
        return self.mutate(func, args[0], dim, kwargs)


def mutated(spelling: Spelling, mutate) -> nn.Module:
    """The spelling, the whole of whose forward runs under the mutation in its attribute."""

    class Mutated(spelling.cls):
        def forward(self, x):
            with Mutation(self.mutation):
                return super().forward(x)

    module = Mutated().eval()
    module.mutation = mutate
    return module


def assert_same(got: Tensor, expected: Tensor) -> None:
    """To the last bit; NaN is NaN."""
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)


def held_to_what_is_written(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = module(x)
        with pytest.warns(UserWarning, match="fastvit: nothing"):
            patch(module, example=x)
        got, ran = operators_in(lambda: module(x))
    assert ran == []
    assert_same(got, expected)


MUTATIONS = (over_another_axis, behind_a_relu, of_the_largest, in_front_of_a_power, squared)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("name", [name for name in SPELLINGS if not name.startswith(("Scaled", "Multihead"))])
def test_mutated(name, mutate):
    torch.manual_seed(4)
    spelling = SPELLINGS[name]
    module, x = mutated(spelling, mutate), torch.randn(spelling.shape)
    with torch.no_grad():
        assert not torch.equal(module(x), spelling.cls.forward(module, x))
    held_to_what_is_written(module, x)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("name", ["Operators", "Windows", "EinsumHeadsLast", "TalkingHeads", "KeysByQueries"])
def test_mutated_after_it_was_recognised(name, mutate):
    """The way a forward takes may change from call to call: each is computed as it is written then."""
    torch.manual_seed(5)
    spelling = SPELLINGS[name]
    module = mutated(spelling, lambda softmax, map_, dim, rest: softmax(map_, dim=dim, **rest))
    x = torch.randn(spelling.shape)
    patch(module, example=x)
    with torch.no_grad():
        assert operators_in(lambda: module(x))[1] == [spelling.operator]
        module.mutation = mutate
        got, ran = operators_in(lambda: module(x))
        assert ran == []
        assert_same(got, unpatch(module)(x))


# --- Other things people write that are not what an operator computes -----------------------------------------------

OTHERS: dict[str, type[nn.Module]] = {}


def other(cls: type[nn.Module]) -> type[nn.Module]:
    OTHERS[cls.__name__] = cls
    return cls


@other
class FiniteFill(Heads):
    """-10000 is a number like any other: a row of it alone is a mean, and larger logits are seen through it."""

    def weigh(self, q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT * self.scale).masked_fill(mask, -1e4).softmax(-1) @ v


@other
class NormOfInstances(Heads):
    def make(self):
        self.mix, self.norm = nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)

    def weigh(self, q, k, v):
        return self.norm(self.mix((q @ k.mT * self.scale).softmax(-1))) @ v


@other
class Gated(Heads):
    def make(self):
        self.gate = nn.Parameter(torch.rand(9, 9))

    def weigh(self, q, k, v):
        return ((q @ k.mT * self.scale).softmax(-1) * self.gate.sigmoid()) @ v


@other
class WiderMix(Heads):
    def make(self):
        self.up, self.down = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def weigh(self, q, k, v):
        return self.down(self.up(q @ k.mT * self.scale)).softmax(-1) @ v


@other
class MixOverQueries(Heads):
    def make(self):
        self.mix = nn.Linear(9, 9)

    def weigh(self, q, k, v):
        return self.mix((q @ k.mT * self.scale).softmax(-1)) @ v


@other
class GroupedMix(Heads):
    def make(self):
        self.mix = nn.Conv2d(4, 4, 1, groups=2)

    def weigh(self, q, k, v):
        return self.mix((q @ k.mT * self.scale).softmax(-1)) @ v


@other
class LargerConvolution(Heads):
    def make(self):
        self.mix = nn.Conv2d(4, 4, 3, padding=1)

    def weigh(self, q, k, v):
        return self.mix((q @ k.mT * self.scale).softmax(-1)) @ v


@other
class NoSoftmax(Heads):
    def weigh(self, q, k, v):
        return (q @ k.mT * self.scale) @ v


@other
class SoftmaxTwice(Heads):
    def weigh(self, q, k, v):
        return (q @ k.mT * self.scale).softmax(-1).softmax(-1) @ v


@other
class BiasAfterSoftmax(Heads):
    def weigh(self, q, k, v):
        return ((q @ k.mT * self.scale).softmax(-1) + torch.eye(9)) @ v


@other
class WeightsTransposed(Heads):
    def weigh(self, q, k, v):
        return (q @ k.mT * self.scale).softmax(-1).mT @ v


@other
class NoScaleButAFloor(Heads):
    def weigh(self, q, k, v):
        return (q @ k.mT).clamp(-1.0, 1.0).softmax(-1) @ v


@other
class Renormalised(Heads):
    def weigh(self, q, k, v):
        attn = (q @ k.mT * self.scale).softmax(-1)
        return (attn / (1e-9 + attn.sum(dim=1, keepdim=True))) @ v


@other
class MaskAndMix(Heads):
    def make(self):
        self.mix = nn.Conv2d(4, 4, 1)

    def weigh(self, q, k, v):
        mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
        return self.mix((q @ k.mT * self.scale).masked_fill(mask, -torch.inf).softmax(-1)) @ v


@other
class EinsumSumsHeads(Heads):
    def weigh(self, q, k, v):
        attn = (q @ k.mT * self.scale).softmax(-1)
        return torch.einsum("bhij,bgjd->bgid", attn, v)


@other
class ChannelsAttend(Heads):
    """XCA without its norm: the map is of channels by channels, which no kernel is for."""

    def weigh(self, q, k, v):
        q, k, v = (t.repeat_interleave(33, 2).transpose(-2, -1) for t in (q, k, v))
        return ((q @ k.mT * self.scale).softmax(-1) @ v).transpose(-2, -1)[:, :, ::33]


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    torch.manual_seed(6)
    held_to_what_is_written(OTHERS[name]().eval(), torch.randn(2, 9, 24))


def test_active_attention_dropout_draws_as_the_plain_code_does():
    class Dropping(Heads):
        def make(self):
            self.drop = nn.Dropout(0.5)

        def weigh(self, q, k, v):
            return self.drop((q @ k.mT * self.scale).softmax(-1)) @ v

    module, x = Dropping().eval(), torch.randn(2, 9, 24)
    patch(module, example=x)
    module.train()

    def drawn(forward):
        torch.manual_seed(7)
        return forward(x)

    plain = functools.partial(Dropping.forward, module)
    with torch.no_grad():
        for _ in range(2):
            got, ran = operators_in(lambda: drawn(module))
            assert ran == []
            assert torch.equal(got, drawn(plain))
        module.eval()
        assert operators_in(lambda: module(x))[1] == [MASKED]
