"""What looks like an MLP, or a convolution of tokens, and is none runs as it is written; and so does one in the making
that somebody looks at, changes or keeps.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit.patching import explain, patch, report, unpatch
from fastvit.patching.deferral import Recognised
from fastvit.recognise.deferred import Deferring, Event
from tests.helpers import assert_as_accurate
from tests.patching.spellings.calls import gradients, in_float64, operators_in
from tests.patching.spellings.mlps import CONVOLUTION, GLU, GRID, HIDDEN, MLP, MLPS, TOKENS, WIDTH, Layers
from tests.patching.spellings.modules import MASKED, Operators

pytestmark = pytest.mark.usefixtures("kernels_first")


def draw() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(2, TOKENS, WIDTH)


def image_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2).view(-1, WIDTH, GRID, GRID)


# --- Something else -------------------------------------------------------------------------------------------------

OTHERS: dict[str, type[nn.Module]] = {}


def other(cls: type[nn.Module]) -> type[nn.Module]:
    OTHERS[cls.__name__] = cls
    return cls


@other
class NoActivation(Layers):
    def forward(self, x):
        return self.fc2(self.drop(self.fc1(x)))


@other
class AnotherActivation(Layers):
    def forward(self, x):
        return self.fc2(F.elu(self.fc1(x)))


@other
class SigmoidAlone(Layers):
    def forward(self, x):
        return self.fc2(torch.sigmoid(self.fc1(x)))


@other
class ActivatedTwice(Layers):
    def forward(self, x):
        return self.fc2(F.relu(F.gelu(self.fc1(x))))


@other
class ScaledInFront(Layers):
    def forward(self, x):
        return self.fc2(F.gelu(2.0 * self.fc1(x)))


@other
class AnotherSlope(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.5 * hidden))


@other
class RoundedConstant(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden * 0.5 * (1.0 + torch.erf(hidden / 1.4142)))


@other
class ByTheTensorItself(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(2.0**hidden * hidden)


@other
class ShiftedThereAndBack(Layers):
    def forward(self, x):
        return self.fc2(self.fc1(x).add(50.0).sigmoid().mul(1.0) * F.silu(self.fc1(x) - 50.0))


@other
class IdentityForMostNumbers(Layers):
    hidden = HIDDEN // 2

    def forward(self, x):
        first, second = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(first) * (second * torch.sigmoid(second + 90.0)))


@other
class CornerElsewhere(Layers):
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x) - 0.002))


@other
class Squared(Layers):
    def forward(self, x):
        hidden = F.relu(self.fc1(x))
        return self.fc2(hidden * hidden)


@other
class NormWithoutGate(Layers):
    def make(self):
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


@other
class ResidualInside(Layers):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(F.gelu(hidden) + hidden)


@other
class BothActivated(Layers):
    hidden = HIDDEN // 2

    def forward(self, x):
        first, second = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(first) * F.silu(second))


@other
class GateOfAnother(Layers):
    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc1(x.flip(1)))


@other
class CutAlongTokens(Layers):
    def forward(self, x):
        first, second = self.fc1(x[:, 1:]).chunk(2, 1)
        return self.fc2(F.silu(first) * second)


@other
class ShiftedBetween(Layers):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)).roll(1, 1))


@other
class LargerKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, 3, padding=1)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(image_of(x))))


@other
class ChannelByChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, 1)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        return self.conv(self.fc2(F.gelu(self.fc1(image_of(x).contiguous()))))


@other
class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=WIDTH)

    def forward(self, x):
        return self.conv(image_of(x))


@other
class AlongOneAxis(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0), groups=WIDTH)

    def forward(self, x):
        return self.conv(image_of(x))


@other
class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        return self.conv(image_of(x))


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    module, x = OTHERS[name]().eval(), draw()
    with torch.no_grad():
        expected = module(x)
        with pytest.warns(UserWarning, match="fastvit: nothing"):
            patch(module, example=x)
        got, ran = operators_in(lambda: module(x))
        assert ran == []
        assert torch.equal(got, expected)
        for kind in ("mlp", "convolution"):  # also where it is deferred
            with Deferring("auto", kind=kind) as mode:
                deferred = module(x)
            assert torch.equal(mode.finish(deferred), expected)
            assert mode.fused == 0


def test_a_chain_that_breaks_off_where_another_begins():
    class Deep(Layers):
        def make(self):
            self.fc0 = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(self.fc0(x))))

    module, x = Deep().eval(), draw()
    with torch.no_grad():
        expected = module(x)
        patch(module, example=x)
        got, ran = operators_in(lambda: module(x))
    assert ran == [MLP]
    assert_as_accurate(got, expected, in_float64(module)(x.double()))


# --- Looked at, changed or kept in the making -----------------------------------------------------------------------


def changed_input(module, x):
    hidden = module.fc1(x)
    x.add_(1.0)
    return module.fc2(F.gelu(hidden))


def changed_weight(module, x):
    hidden = F.gelu(module.fc1(x))
    module.fc1.weight.data.mul_(2.0)
    return module.fc2(hidden)


def changed_in_place(module, x):
    hidden = module.fc1(x)
    hidden[:, 0] = 7.0
    return module.fc2(F.gelu(hidden))


def changed_piece(module, x):
    first, second = module.fc1(x).chunk(2, -1)
    product = F.silu(first) * second
    second.add_(1.0)
    return F.linear(product, module.fc2.weight[:, : HIDDEN // 2])


def changed_through_a_view(module, x):
    first, second = module.fc1(x).chunk(2, -1)
    view = second.view(-1, HIDDEN // 2) if second.is_contiguous() else second[..., :]
    product = F.silu(first) * second
    view.zero_()
    return F.linear(product, module.fc2.weight[:, : HIDDEN // 2])


def activated_in_place_beside_another_use(module, x):
    hidden = module.fc1(x)
    twice = 2.0 * hidden
    return module.fc2(F.relu(hidden, inplace=True)) + module.fc2(twice)


def looked_at(module, x):
    hidden = F.gelu(module.fc1(x))
    assert float(hidden.abs().max()) > 0.0
    return module.fc2(hidden)


@pytest.mark.parametrize(
    "forward",
    [
        changed_input,
        changed_weight,
        changed_in_place,
        changed_piece,
        changed_through_a_view,
        activated_in_place_beside_another_use,
        looked_at,
    ],
    ids=lambda forward: forward.__name__,
)
@pytest.mark.parametrize("grad", [False, True])
def test_exactly_as_written(forward, grad):
    module = Layers().eval()
    plain = copy.deepcopy(module)
    with torch.set_grad_enabled(grad):
        try:
            expected = forward(plain, draw())
        except RuntimeError as error:  # what autograd forbids it forbids here
            expected = error
        with Deferring("auto", kind="mlp") as mode:
            try:
                got = mode.finish(forward(module, draw()))
            except RuntimeError as error:
                got = error
    if isinstance(expected, RuntimeError):
        assert isinstance(got, RuntimeError)
        return
    assert torch.equal(got, expected)
    if grad and forward is not changed_input:  # which the gradient of the weight needs: torch refuses
        got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(module.fc1.weight.grad, plain.fc1.weight.grad)


def test_kept_hidden_values_are_the_plain_ones_and_have_their_gradient():
    class Keeping(Layers):
        kept = None

        def forward(self, x):
            self.kept = F.gelu(self.fc1(x))
            return self.fc2(self.kept)

    module, x = Keeping().eval(), draw()
    plain = copy.deepcopy(module)
    patch(module, example=x)
    with torch.no_grad():
        for _ in range(2):
            module(x)
            plain(x)
            assert torch.equal(module.kept, plain.kept)
    for _ in range(2):
        module(x).sum().backward(inputs=[module.kept])
        plain(x).sum().backward(inputs=[plain.kept])
        assert torch.equal(module.kept.grad, plain.kept.grad)


def test_hooks_on_a_layer_are_heard_and_active_dropout_is_drawn():
    module, x = MLPS["Module"].cls().eval(), draw()
    patch(module, example=x)
    heard = []
    handle = module.act.register_forward_hook(lambda *args: heard.append(args[2]))
    with torch.no_grad():
        assert operators_in(lambda: module(x))[1] == []
        assert len(heard) == 1
        assert torch.equal(heard[0], F.gelu(module.fc1(x)))
        handle.remove()
        assert operators_in(lambda: module(x))[1] == [MLP]
        module.drop.p = 0.5
        module.train()
        torch.manual_seed(5)
        got, ran = operators_in(lambda: module(x))
        torch.manual_seed(5)
        assert torch.equal(got, unpatch(module)(x))
        assert ran == []


def test_autocast_and_low_precision():
    module, x = MLPS["SwiGlu"].cls().eval(), draw()
    patch(module, example=x)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = module(x), unpatch(copy.deepcopy(module))(x)
        assert got.dtype == expected.dtype == torch.bfloat16
        exact = in_float64(module)(x.double())
        assert_as_accurate(got, expected, exact)
        half, halved = module.bfloat16(), x.bfloat16()
        plain, double = unpatch(copy.deepcopy(half)), in_float64(half)
        got, ran = operators_in(lambda: half(halved))
        assert_as_accurate(got, plain(halved), double(halved.double()))
        assert ran in ([GLU], [])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_the_way_of_its_forward(reentrant):
    module = MLPS["GateFirst"].cls().train()
    plain, double, x = copy.deepcopy(module), in_float64(module), draw()
    patch(module, example=x)
    _, expected = gradients(plain, x)
    _, exact = gradients(double, x.double())
    for _ in range(3):
        _, got = gradients(module, x, lambda x: checkpoint(module, x, use_reentrant=reentrant))
        for name in got:
            assert_as_accurate(got[name], expected[name], exact[name], name=name)


def recognised(module: nn.Module, x: Tensor) -> nn.Module:
    patch(module, example=x)
    assert isinstance(module, Recognised)
    return module


def test_an_even_kernel_of_the_same_size_is_torch_s():
    module = nn.Conv2d(WIDTH, WIDTH, 4, padding="same", groups=WIDTH)
    x = image_of(draw())
    expected = module(x)
    with pytest.warns(UserWarning, match="fastvit: nothing"):
        patch(module, example=x)
    assert torch.equal(module(x), expected)


def test_an_instance_that_keeps_its_values_is_decided_alone():
    class Hooked(Layers):
        place = 0
        got: list[Tensor]

        def forward(self, x):
            hidden = F.gelu(self.fc1(x))
            out = self.fc2(hidden)
            if self.place == 2 and hidden.requires_grad:
                hidden.register_hook(self.got.append)
            return x + out

    model, x = nn.Sequential(Hooked(), Hooked(), Hooked()), draw()
    for place, each in enumerate(model):
        each.place, each.got = place, []
    patch(model, example=x)
    for _ in range(4):
        model(x.clone().requires_grad_()).sum().backward()
    assert len(model[2].got) == 4


def test_a_gradient_asked_for_too_late_is_missed_aloud_and_once():
    class Sometimes(Layers):
        keeps = {"hidden": False}

        def forward(self, x):
            hidden = F.gelu(self.fc1(x))
            out = self.fc2(hidden)
            if self.keeps["hidden"]:
                hidden.retain_grad()
                self.kept = hidden
            return out

    x = draw()
    module = recognised(Sometimes(), x)
    for _ in range(2):
        module(x).sum().backward()
    module.keeps = {"hidden": True}
    with pytest.warns(UserWarning, match="lost in this call"):
        module(x)
    module(x).sum().backward()
    assert module.kept.grad is not None


def test_a_function_that_changes_hidden_values_in_place_has_its_gradient():
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            ctx.mark_dirty(hidden)
            hidden.relu_()
            ctx.save_for_backward(hidden)
            return hidden

        @staticmethod
        def backward(ctx, grad):
            (hidden,) = ctx.saved_tensors
            return grad * (hidden > 0)

    class Mixed(Layers):
        def make(self):
            self.fc3 = nn.Linear(WIDTH, HIDDEN)

        def forward(self, x):
            return self.fc2(InPlace.apply(self.fc1(x))) + self.fc2(F.gelu(self.fc3(x)))

    module, x = Mixed(), draw()
    plain, double = copy.deepcopy(module), in_float64(module)
    recognised(module, x)
    _, expected = gradients(plain, x)
    _, exact = gradients(double, x.double())
    for _ in range(3):
        _, got = gradients(module, x)
        for name in got:
            assert_as_accurate(got[name], expected[name], exact[name], name=name)


@pytest.mark.parametrize("begins", ["outside", "inside"])
def test_a_checkpoint_within_a_forward_recomputes_what_it_ran(begins):
    class Saving(Layers):
        def forward(self, x):
            if begins == "inside":
                return checkpoint(lambda x: self.fc2(F.gelu(self.fc1(x))), x, use_reentrant=False) * 2
            return checkpoint(lambda hidden: self.fc2(F.gelu(hidden)), self.fc1(x), use_reentrant=False) * 2

    module, x = Saving(), draw()
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=x)
    _, expected = gradients(plain, x)
    _, exact = gradients(double, x.double())
    for _ in range(3):
        _, got = gradients(module, x)
        for name in got:
            assert_as_accurate(got[name], expected[name], exact[name], name=name)


INSIDE = {
    "grad": lambda x: torch.func.grad(lambda t: (t**2).sum())(x),
    "vmap in place": lambda x: torch.vmap(lambda t: t.clone().mul_(2.0))(x),
    "vmap of an argument in place": lambda x: torch.vmap(lambda t: t.mul_(2.0))(x.clone()),
    "functionalize": lambda x: torch.func.functionalize(lambda t: t.mul_(2.0))(x.clone()),
    "sparse": lambda x: x.to_sparse().mul_(2.0).to_dense(),
}


@pytest.mark.parametrize("name", INSIDE)
def test_transforms_while_hidden_values_are_in_the_making(name):
    class Transforming(Layers):
        def forward(self, x):
            hidden = self.fc1(x)
            extra = INSIDE[name](x.detach())
            return self.fc2(F.gelu(hidden)) + extra

    module, x = Transforming().eval(), draw()
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=x)
    with torch.no_grad():
        for _ in range(2):
            assert_as_accurate(module(x), plain(x), double(x.double()))


# --- In a model -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention in a module of its own, the MLP in this one's forward."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Operators(), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.pos = MLPS["PositionalEncoding"].cls()

    def forward(self, x):
        x = self.pos(x + self.attn(self.norm1(x)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_attention_within_a_module_that_holds_an_mlp():
    model, x = nn.Sequential(Block(), Block()).eval(), draw()
    plain, double = copy.deepcopy(model), in_float64(model)
    patch(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        got, ran = operators_in(lambda: model(x))
        assert ran == [MASKED, CONVOLUTION, MLP] * 2
        assert_as_accurate(got, plain(x), double(x.double()))
    assert isinstance(model[0], Recognised)
    assert isinstance(model[1].attn, Recognised)
    assert [row.op for row in report(model).rows] == [MLP, MASKED, CONVOLUTION] * 2
    model.train()
    gradients(model, x)
    (_, got), ran = operators_in(lambda: gradients(model, x))
    assert ran == [MASKED, CONVOLUTION, MLP] * 2
    (_, expected), (_, exact) = gradients(plain.train(), x), gradients(double.train(), x.double())
    for name in got:
        assert_as_accurate(got[name], expected[name], exact[name], name=name)


class Whole(Block):
    """All in one forward, the hidden values' layer and the attention's beside each other."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, TOKENS)
        self.pos, self.attn = MLPS["PositionalEncoding"].cls().proj, None

    def forward(self, x):
        x = x + self.pos(image_of(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + self.bias(x)[:, None]
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_several_kinds_in_one_forward():
    model, x = nn.Sequential(Whole(), Whole()).eval(), draw()
    plain, double = copy.deepcopy(model), in_float64(model)
    patch(model, example=x)
    with torch.no_grad():
        got, ran = operators_in(lambda: model(x))
        assert ran == [CONVOLUTION, MASKED, MLP] * 2
        assert_as_accurate(got, plain(x), double(x.double()))
    assert [row.op for row in report(model).rows] == [MASKED, CONVOLUTION] * 2
    model.train()
    gradients(model, x)
    (_, got), ran = operators_in(lambda: gradients(model, x))
    assert ran == [CONVOLUTION, MASKED, MLP] * 2
    (_, expected), (_, exact) = gradients(plain.train(), x), gradients(double.train(), x.double())
    for name in got:
        assert_as_accurate(got[name], expected[name], exact[name], name=name)
    unpatch(model)
    with torch.no_grad():
        assert operators_in(lambda: model.eval()(x))[1] == []
        patch(model, ops=[MLP, GLU], example=x)
        assert operators_in(lambda: model(x))[1] == [MLP] * 2


def test_activations_of_many_steps_take_no_longer_than_their_steps():
    class Doubling(Layers):
        def forward(self, x):
            hidden = self.fc1(x)
            for _ in range(40):
                hidden = (hidden + hidden) * 0.5
            return self.fc2(hidden * torch.sigmoid(hidden))

    module, x = recognised(Doubling().eval(), draw()), draw()
    with torch.no_grad():
        assert operators_in(lambda: module(x))[1] == [MLP]


def test_explained():
    module, x = MLPS["GateLast"].cls().eval(), draw()
    told = explain(patch(module, example=x), x).chains
    assert [(each.chain, each.op) for each in told] == [("linear, split 1, sigmoid, split 0, gate, linear", GLU)]
    events: list[Event] = []
    with torch.no_grad(), Deferring("auto", tell=events.append, kind="mlp") as mode:
        mode.finish(OTHERS["ShiftedBetween"]().eval()(x))
    assert [(each.told, each.operator) for each in events] == [(("linear", "gelu"), None)]
    assert "roll" in events[0].reason


def test_sequences_of_one_class_are_decided_each():
    """nn.Sequential is one class: what is found out about one of them says nothing of another."""
    wide = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    model, x = nn.Sequential(wide, nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH))).eval(), draw()
    patch(model, example=x)
    with torch.no_grad():
        assert operators_in(lambda: model(x))[1] == [MLP]
    assert not isinstance(model[1], Recognised)
    assert [(row.name, row.status) for row in report(model).rows] == [("0", "patched"), ("1", "unrecognised")]


def test_asked_for_other_operators():
    model, x = nn.Sequential(Block()).eval(), draw()
    patch(model, ops=[MASKED], example=x)
    with torch.no_grad():
        assert operators_in(lambda: model(x))[1] == [MASKED]
