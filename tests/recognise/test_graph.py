"""Chains in compiled graphs: what is not understood stays as written, and only patched models are touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

from fastvit import backends
from fastvit.patching import patch, unpatch
from fastvit.recognise.graph import Fusing
from tests.helpers import assert_as_accurate
from tests.patching.spellings.calls import in_float64
from tests.patching.spellings.compiling import compiled
from tests.patching.spellings.modules import MASKED, MIXED, SPELLINGS, Heads
from tests.patching.spellings.test_mutations import MUTATIONS, OTHERS, mutated

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="kernels in C++ are not built")


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.pre_grad_custom_pass = None


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(2, 9, 24)


def recognised(module: nn.Module) -> nn.Module:
    """Patched, and undecided: what is compiled is searched whole, whatever a call in eager mode would show."""
    return patch(module)


def left_as_written(module: nn.Module, x: torch.Tensor, **options) -> None:
    """The graph of the patched module is that of the plain one, to the last bit."""
    plain = copy.deepcopy(module)
    run, passed = compiled(recognised(module), **options)
    expected, _ = compiled(plain, **options)
    with torch.no_grad():
        torch.testing.assert_close(run(x), expected(x), rtol=0.0, atol=0.0, equal_nan=True)
    assert passed.operators() == []


# --- Left as written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("name", ["Operators", "TalkingHeads", "KeysByQueries"])
def test_mutated(name, mutate, x):
    left_as_written(mutated(SPELLINGS[name], mutate), x)


@pytest.mark.parametrize("name", OTHERS)
def test_others(name, x):
    left_as_written(OTHERS[name]().eval(), x)


class Returned(Heads):
    def weigh(self, q, k, v):
        attn = (q @ k.mT * self.scale).softmax(-1)
        return attn @ v + attn.sum()


class Stored(Heads):
    def weigh(self, q, k, v):
        self.attn = (q @ k.mT * self.scale).softmax(-1)
        return self.attn @ v


class TwoProducts(Heads):
    def weigh(self, q, k, v):
        attn = (q @ k.mT * self.scale).softmax(-1)
        return attn @ v + attn @ (v + 1)


class QueriesChanged(Heads):
    def weigh(self, q, k, v):
        q = q.clone()
        logits = q @ k.mT
        q.mul_(2.0)
        return (logits * self.scale).softmax(-1) @ v + q


class KeysChangedThroughAView(Heads):
    def weigh(self, q, k, v):
        k = k.clone()
        logits = q @ k.mT
        k.mT[:, :, 0] += 1.0
        return (logits * self.scale).softmax(-1) @ v + k


class BiasChanged(Heads):
    def make(self):
        self.register_buffer("bias", torch.randn(9, 9))

    def weigh(self, q, k, v):
        attn = q @ k.mT + self.bias
        self.bias.zero_()
        return attn.softmax(-1) @ v


class ViewChanged(Heads):
    def weigh(self, q, k, v):
        attn = q @ k.mT
        turned = attn.mT
        turned.mul_(torch.arange(9.0))
        return attn.softmax(-1) @ v


class CopyTurnedOut(Heads):
    """What contiguous gives here is the map itself."""

    def weigh(self, q, k, v):
        attn = q @ k.mT
        attn.contiguous().mul_(0.3)
        return attn.softmax(-1) @ v


class Detached(Heads):
    def weigh(self, q, k, v):
        return (q @ k.mT * self.scale).detach().softmax(-1) @ v


class StatisticsRead(Heads):
    def make(self):
        self.mix, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def weigh(self, q, k, v):
        attn = self.norm(self.mix((q @ k.mT * self.scale).softmax(-1)))
        return attn @ (v + self.norm.running_mean[:, None, None])


@pytest.mark.parametrize(
    "cls",
    [Returned, Stored, TwoProducts, QueriesChanged, KeysChangedThroughAView, BiasChanged, ViewChanged, CopyTurnedOut],
)
def test_maps_seen_or_changed_by_others(cls, x):
    left_as_written(cls().eval(), x)


def test_a_map_cut_off_from_gradients(x):
    left_as_written(Detached().eval(), x)


def test_statistics_read_in_between(x):
    """In eval nothing moves them: then they may be read."""
    left_as_written(StatisticsRead().train(), x)
    run, passed = compiled(recognised(StatisticsRead().eval()))
    with torch.no_grad():
        run(x)
    assert passed.operators() == [MIXED]


class Switching(Heads):
    def weigh(self, q, k, v):
        with torch.no_grad():
            attn = q @ k.mT
        return (attn * self.scale).softmax(-1) @ v


class Casting(Heads):
    def weigh(self, q, k, v):
        with torch.autocast("cpu", enabled=False):
            attn = q.float() @ k.mT.float()
        return (attn * self.scale).softmax(-1) @ v


def test_gradients_or_autocast_switched_in_between(x):
    module = Switching().eval()
    run, passed = compiled(recognised(module))
    run(x).sum().backward()
    assert passed.operators() == []
    module = Casting().eval()
    run, passed = compiled(recognised(module))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        run(x)
    assert passed.operators() == []


def test_under_autocast(x):
    module = SPELLINGS["Operators"].cls().eval()
    plain, double = copy.deepcopy(module), in_float64(module)
    run, passed = compiled(recognised(module))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got, expected = run(x), plain(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert passed.operators() == [MASKED]
    with torch.no_grad():
        assert_as_accurate(got, expected, double(x.double()))


def test_active_attention_dropout(x):
    class Dropping(Heads):
        def weigh(self, q, k, v):
            return nn.functional.dropout((q @ k.mT * self.scale).softmax(-1), 0.5, self.training) @ v

    module = Dropping().train()
    run, passed = compiled(recognised(module))
    with torch.no_grad():
        run(x)
        assert passed.operators() == []
        module.eval()
        run(x)
    assert passed.operators() == [MASKED]


def test_hooks_see_the_map(x):
    module, seen = SPELLINGS["SoftmaxModule"].cls().eval(), []
    module.attend.register_forward_hook(lambda part, args, out: out.clamp(max=0.2))
    left_as_written(module, x)
    module.attend.register_forward_hook(lambda part, args, out: seen.append(out))
    run, passed = compiled(recognised(copy.deepcopy(module)))
    with torch.no_grad():
        run(x)
    assert passed.operators() == []
    assert [tuple(out.shape) for out in seen] == [(2, 4, 9, 9)]


class Viewed(Heads):
    """Needs the product as it would lie in memory."""

    def weigh(self, q, k, v):
        out = (q @ k.mT * self.scale).softmax(-1) @ v
        return (out + 0.0).view(-1, *out.shape[2:]).view(out.shape)


def test_a_view_of_the_product(x):
    module = Viewed().eval()
    plain, double = copy.deepcopy(module), in_float64(module)
    run, passed = compiled(recognised(module))
    with torch.no_grad():
        assert_as_accurate(run(x), plain(x), double(x.double()))
    assert passed.operators() == [MASKED]


# --- Which models, and for how long ---------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = SPELLINGS["Operators"].cls(), SPELLINGS["Matmul"].cls()

    def forward(self, x):
        return self.other(self.one(x))


def test_patched_modules_alone(x):
    pair = Pair().eval()
    patch(pair.one, example=x)
    run, passed = compiled(pair)
    with torch.no_grad():
        run(x)
        assert passed.operators() == [MASKED]
        patch(pair, example=x)
        run(x)
        assert passed.operators() == [MASKED] * 3
        unpatch(pair)
        run(x)
        assert passed.operators() == [MASKED] * 3
    assert len(passed.graphs) == 3


def test_what_filter_fn_leaves_out(x):
    pair = Pair().eval()
    patch(pair, filter_fn=lambda module, name: name != "one")
    run, passed = compiled(pair)
    with torch.no_grad():
        run(x)
        assert passed.operators() == []  # a graph cannot ask it
        torch._dynamo.reset()
        pair(x)
        run, passed = compiled(pair)
        run(x)
    assert passed.operators() == [MASKED]


def test_a_backend_asked_for(x):
    module = SPELLINGS["TalkingHeads"].cls().eval()
    run, passed = compiled(patch(module, backend="sdpa"))
    with torch.no_grad():
        run(x)
    assert passed.operators() == []  # head_mixed_attention has none of that name
    run, passed = compiled(patch(SPELLINGS["Operators"].cls().eval(), backend="sdpa"))
    with torch.no_grad():
        run(x)
    assert passed.operators() == [MASKED]
    assert "backend = 'sdpa'" in passed.graphs[0].code


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backends_without_inductors_passes(backend, x):
    module = SPELLINGS["Windows"].cls().eval()
    plain = copy.deepcopy(module)
    run, x = torch.compile(patch(module), fullgraph=True, backend=backend), torch.randn(SPELLINGS["Windows"].shape)
    with torch.no_grad():
        torch.testing.assert_close(run(x), plain(x))
    assert config.pre_grad_custom_pass is None


def test_a_graph_break_in_the_middle(x):
    class Broken(Heads):
        def weigh(self, q, k, v):
            attn = (q @ k.mT * self.scale).softmax(-1)
            torch._dynamo.graph_break()
            return attn @ v

    module = Broken().eval()
    plain, plainly = compiled(copy.deepcopy(module), fullgraph=False)
    run, passed = compiled(patch(module, example=x), fullgraph=False)
    with torch.no_grad():
        torch.testing.assert_close(run(x), plain(x))
    assert passed.operators() == []
    assert len(passed.graphs) == len(plainly.graphs)


def test_checkpoints_recompute_by_the_operator(x):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = SPELLINGS["Operators"].cls()

        def forward(self, x):
            return checkpoint(self.attn, x, use_reentrant=False)

    module = Checkpointed()
    plain = copy.deepcopy(module)
    run, passed = compiled(patch(module, example=x))
    for forward in (run, plain):
        forward(x).square().sum().backward()
    for got, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    assert passed.operators() == [MASKED]


# --- The user's passes, and caches ----------------------------------------------------------------------------------


class Counting(CustomGraphPass):
    def __init__(self, name="counting"):
        self.name, self.softmaxes = name, []

    def __call__(self, graph):
        self.softmaxes.append(sum("softmax" in str(node.target) for node in graph.nodes))

    def uuid(self):
        return self.name


@pytest.mark.parametrize("several", [False, True])
def test_the_users_pass_runs_in_front(several, x):
    mine = Counting()
    theirs = [mine, mine] if several else mine
    config.pre_grad_custom_pass = theirs
    run, passed = compiled(patch(SPELLINGS["Operators"].cls().eval()))
    with torch.no_grad():
        run(x)
    assert passed.operators() == [MASKED]
    assert mine.softmaxes == ([1, 1] if several else [1])
    assert config.pre_grad_custom_pass is theirs


def test_the_configuration_after_a_failure(x):
    def fail(graph):
        raise ValueError("no")

    config.pre_grad_custom_pass = fail
    run, _ = compiled(patch(SPELLINGS["Operators"].cls().eval()))
    with torch.no_grad(), pytest.raises(Exception, match="no"):
        run(x)
    assert config.pre_grad_custom_pass is fail


def test_cache_keys(monkeypatch):
    key = Fusing(None).uuid()
    assert key is not None
    assert key == Fusing(None).uuid()
    assert Fusing(Counting()).uuid() not in (key, Fusing(Counting("other")).uuid(), None)
    assert Fusing(lambda graph: None).uuid() is None
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"sdpa"}))
    assert Fusing(None).uuid() != key
