"""The plain functions themselves: gradients against finite differences, and what a masked key may not reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fastvit import reference
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection

GRID = (2, 3)
TOKENS = 1 + GRID[0] * GRID[1]
HEADS, DIM = 2, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def norm_of(channels: int, statistics: str, weight: Tensor, bias: Tensor | None) -> BatchNorm:
    """BatchNorm with given affine parameters; without running statistics to move where it uses the batch's."""
    if statistics == "batch":
        return BatchNorm(None, None, weight, bias, use_batch_stats=True)
    generator = torch.Generator().manual_seed(channels)
    mean, var = (torch.rand(channels, dtype=torch.float64, generator=generator) + 0.5 for _ in range(2))
    return BatchNorm(mean, var, weight, bias)


Case = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]


def attention_inputs(batch: int, queries: int = 4) -> list[Tensor]:
    return [draw(batch, HEADS, n, DIM) for n in (queries, 5, 5)]


def attention_mask(batch: int) -> Tensor:
    """One row without a key, one key that no query sees, the rest at random."""
    mask = torch.rand(batch, 1, 4, 5) < 0.7
    mask[:, :, 1] = False
    mask[..., 2] = False
    return mask


def head_mixing(batch: int, norm: Callable[[Tensor, Tensor], BatchNorm | LayerNorm], mask: Tensor | None) -> Case:
    def run(q, k, v, pre, pre_bias, post, post_bias, weight, bias):
        return functional.head_mixed_attention(
            *(q, k, v),
            pre_weight=pre,
            pre_bias=pre_bias,
            post_weight=post,
            post_bias=post_bias,
            norm=norm(weight, bias),
            output_scale=1.5,
            mask=mask,
        )

    matrices = [draw(HEADS, HEADS), draw(HEADS), draw(HEADS, HEADS), draw(HEADS)]
    return run, [*attention_inputs(batch), *matrices, draw(HEADS), draw(HEADS)]


def separable(x: Tensor, dw: Tensor, pw: Tensor, pw_bias: Tensor, norm: BatchNorm) -> Tensor:
    return functional.depthwise_separable_conv(x, dw, norm, pw, pw_bias, grid=GRID, stride=2, prefix_tokens=1)


def cases(batch: int, statistics: str) -> dict[str, Case]:
    """Every public function of ``functional`` with all its tensors as inputs of the check."""
    mask = attention_mask(batch)
    bias = torch.where(mask, draw(batch, HEADS, 4, 5), -torch.inf).detach().requires_grad_()
    finite_bias = draw(1, HEADS, 4, 5)

    def over(channels: int) -> Callable[[Tensor, Tensor], BatchNorm]:
        return lambda weight, bias: norm_of(channels, statistics, weight, bias)

    def leff(x, up, up_bias, dw, dw_bias, down, down_bias, *affine, form):
        norms = [norm_of(c, statistics, *affine[2 * i : 2 * i + 2]) for i, c in enumerate((3, 3, 2))]
        return functional.leff(
            *(x, up, up_bias, dw, dw_bias, down, down_bias),
            **dict(zip(("up_norm", "dw_norm", "down_norm"), norms, strict=True)),
            grid=GRID,
            form=form,
        )

    def token_conv(x, weight, conv_bias, *affine):
        return functional.token_depthwise_conv(
            *(x, weight, conv_bias),
            grid=GRID,
            prefix_tokens=1,
            pre_norm=norm_of(2, statistics, *affine[:2]),
            pre_activation="silu",
            norm=norm_of(2, statistics, *affine[2:]),
            activation="quick_gelu",
            residual=True,
        )

    def projections(x, *rest):
        parts = (
            Projection(dw, norm_of(2, statistics, weight, bias), pw, pw_bias)
            for dw, weight, bias, pw, pw_bias in (rest[i : i + 5] for i in (0, 5, 10))
        )
        return functional.conv_projection(x, *parts, grid=GRID, prefix_tokens=1)

    tokens, affine = draw(batch, TOKENS, 2), [draw(2), draw(2)]
    leff_inputs = [tokens, draw(3, 2), draw(3), draw(3, 1, 3, 3), draw(3), draw(2, 3), draw(2)]
    leff_inputs += [draw(c) for c in (3, 3, 3, 3, 2, 2)]
    return {
        "batch_norm": (lambda x, w, b: over(2)(w, b)(x), [draw(batch, 2, *GRID), *affine]),
        "layer_norm": (lambda x, w, b: LayerNorm(w, b)(x), [draw(batch, 2, *GRID), *affine]),
        "conv_batch_norm": (
            lambda x, w, b, *ab: functional.conv_batch_norm(
                x, w, b, over(2)(*ab), stride=2, padding=1, activation="gelu"
            ),
            [draw(batch, 3, 4, 6), draw(2, 3, 3, 3), draw(2), *affine],
        ),
        "linear": (lambda *t: functional.linear(*t, "gelu"), [draw(batch, 3), draw(2, 3), draw(2)]),
        "mlp": (functional.mlp, [draw(batch, 2, 3), draw(4, 3), draw(4), draw(2, 4), draw(2)]),
        "glu_mlp": (
            lambda *t: functional.glu_mlp(*t[:7], hidden_norm=LayerNorm(*t[7:])),
            [draw(*s) for s in ((batch, 2, 3), *((4, 3), (4,)) * 2, (2, 4), (2,), (4,), (4,))],
        ),
        "masked_attention": (functional.masked_attention, attention_inputs(batch)),
        "masked_attention, mask": (
            lambda *t: functional.masked_attention(*t[:3], mask, t[3]),
            [
                *attention_inputs(batch),
                finite_bias,
            ],
        ),
        "masked_attention, bias of -inf": (
            lambda *t: functional.masked_attention(*t[:3], None, torch.where(mask, t[3], -torch.inf)),
            [*attention_inputs(batch), bias.detach().nan_to_num(neginf=0.0).requires_grad_()],
        ),
        "class_attention, key padding": (
            lambda *t: functional.class_attention(*t, mask[:, 0, 0]),
            attention_inputs(batch, 1),
        ),
        "head_mixed_attention": head_mixing(batch, over(HEADS), None),
        "head_mixed_attention, mask": head_mixing(batch, over(HEADS), mask),
        "head_mixed_attention, layer norm": head_mixing(batch, LayerNorm, mask),
        "talking_heads_attention": (
            lambda *t: functional.talking_heads_attention(*t, mask=mask),
            [*attention_inputs(batch), draw(HEADS, HEADS), draw(HEADS), draw(HEADS, HEADS), draw(HEADS)],
        ),
        "re_attention": (
            lambda *t: functional.re_attention(*t[:5], over(HEADS)(*t[5:]), output_scale=0.5),
            [*attention_inputs(batch), draw(HEADS, HEADS), draw(HEADS), *affine],
        ),
        "token_depthwise_conv": (token_conv, [tokens, draw(2, 1, 3, 3), draw(2), *affine, draw(2), draw(2)]),
        "depthwise_separable_conv": (
            lambda x, dw, pw, pw_bias, *ab: separable(x, dw, pw, pw_bias, over(2)(*ab)),
            [tokens, draw(2, 1, 3, 3), draw(3, 2), draw(3), *affine],
        ),
        "conv_projection": (
            projections,
            [tokens, *(draw(*s) for _ in range(3) for s in ((2, 1, 3, 3), (2,), (2,), (3, 2), (3,)))],
        ),
        "leff, official": (lambda *t: leff(*t, form="official"), leff_inputs),
        "leff, paper": (lambda *t: leff(*t, form="paper"), leff_inputs),
    }


NAMES = tuple(cases(1, "batch"))
WITHOUT_STATISTICS = ("layer", "linear", "mlp", "glu", "masked", "class", "talking", "head_mixed_attention, layer norm")
CHECKED = [
    (name, batch, statistics)
    for name, batch, statistics in itertools.product(NAMES, (1, 2), ("batch", "running"))
    if statistics == "batch" or not name.startswith(WITHOUT_STATISTICS)
]


def test_every_function_is_checked() -> None:
    helpers = {"activate", "attention_probabilities", "recomputing"}  # called by the others, or no function of tensors
    functions = {name for name in functional.__all__ if name.islower()} - helpers
    assert functions <= {name.partition(",")[0] for name in NAMES}


@pytest.mark.parametrize(("name", "batch", "statistics"), CHECKED)
def test_gradients_are_those_of_finite_differences(name: str, batch: int, statistics: str) -> None:
    function, inputs = cases(batch, statistics)[name]
    assert gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("name", "statistics"), [(name, kind) for name, batch, kind in CHECKED if batch == 1])
def test_second_derivatives(name: str, statistics: str) -> None:
    function, inputs = cases(1, statistics)[name]
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name: str) -> None:
    function, inputs = cases(1, "batch")[name]
    assert gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


def family(name: str) -> nn.Module:
    size = {"embed_dim": (8, 12, 24), "depth": (1, 1, 1), "num_heads": (1, 2, 3), "num_classes": 3}
    if name == "cvt":
        return reference.CvT(img_size=48, **size)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}
    return {"ceit": reference.CeiT, "deepvit": reference.DeepViT, "cpvt": reference.CPVT}[name](**size)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["cvt", "ceit", "deepvit", "cpvt"])
def test_parameter_gradients_of_one_image(name: str, training: bool) -> None:
    model = family(name).double().train(training)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(1, 3, 48 if name == "cvt" else 32, 48 if name == "cvt" else 32, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    direction = torch.randn(model(images).shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(images) * direction).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    largest = max(g.abs().max().item() for g in gradients)
    step = 1e-5
    for parameter_name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        along = torch.randn_like(parameter)
        with torch.no_grad():
            ahead = loss_at(loss, parameter, along, step)
            behind = loss_at(loss, parameter, along, -step)
        numerical = (ahead - behind) / (2 * step)
        analytical = (gradient * along).sum()
        torch.testing.assert_close(
            analytical, numerical, rtol=1e-5, atol=1e-7 * largest, msg=lambda text, n=parameter_name: f"{n}: {text}"
        )


def loss_at(loss: Callable[[], Tensor], parameter: Tensor, along: Tensor, step: float) -> Tensor:
    before = parameter.clone()
    parameter.add_(along, alpha=step)
    value = loss()
    parameter.copy_(before)
    return value


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x (B, C, H, W) with the same numbers and other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "tokens":
        return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])
    if layout == "tokens, axes of size 1 without stride":
        tokens = lay_out(x, "channels_last")
        return tokens.as_strided(x.shape, [1 if n == 1 else s for n, s in zip(x.shape, tokens.stride(), strict=True)])
    if layout == "slice":
        return torch.cat((x, x), 3)[..., : x.shape[3]]
    return x.contiguous()


LAYOUTS = ("contiguous", "channels_last", "tokens", "tokens, axes of size 1 without stride", "slice")


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1), (1, 3, 1, 4), (1, 1, 3, 4), (2, 3, 1, 1), (2, 3, 4, 5)]
)
def test_batch_norm_in_every_layout(shape: tuple[int, ...], statistics: str, strided: bool) -> None:
    """Of the input, of the gradient, and of the tensors with a number per channel, against the formula."""
    x, gradient = draw(*shape), torch.randn(shape, dtype=torch.float64)
    per_channel = torch.rand(4, shape[1], 2, dtype=torch.float64) + 0.5
    per_channel = per_channel[..., 0] if strided else per_channel[..., 0].contiguous()
    weight, bias, mean, var = per_channel.unbind()
    weight.requires_grad_(), bias.requires_grad_()

    def formula(x: Tensor) -> Tensor:
        given = statistics == "running"
        m, v = (mean, var) if given else (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        m, v, w, b = (t[:, None, None] for t in (m, v, weight, bias))
        return (x - m) * (v + 1e-5).rsqrt() * w + b

    expected_out = formula(x)
    expected = torch.autograd.grad(expected_out, (x, weight, bias), gradient)
    for input_layout, gradient_layout in itertools.product(LAYOUTS, LAYOUTS):
        laid_out = lay_out(x.detach(), input_layout).requires_grad_()
        batch = statistics == "batch"
        norm = BatchNorm(mean.clone() if batch else mean, var.clone() if batch else var, weight, bias, batch)
        out = norm(laid_out)
        got = torch.autograd.grad(out, (laid_out, weight, bias), lay_out(gradient, gradient_layout))
        torch.testing.assert_close((out, *got), (expected_out, *expected), rtol=1e-9, atol=1e-9)


def test_running_statistics_with_strides_move() -> None:
    x, stats = torch.randn(1, 3, 4, 5), torch.rand(2, 3, 2)
    layer = nn.BatchNorm2d(3, affine=False)
    layer.running_mean.copy_(stats[0, :, 0])
    layer.running_var.copy_(stats[1, :, 0])
    BatchNorm(stats[0, :, 0], stats[1, :, 0], None, None, use_batch_stats=True)(x)
    layer(x)
    torch.testing.assert_close(stats[..., 0], torch.stack((layer.running_mean, layer.running_var)))


def test_leff_with_a_strided_weight_of_its_last_norm() -> None:
    """Without prefix tokens the gradient arrives channels-last, as the map is."""
    weight = torch.randn(4, dtype=torch.float64)[::2].requires_grad_()

    def run(x: Tensor, up: Tensor, dw: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        norm = norm_of(2, "batch", weight, None)
        return functional.leff(x, up, None, dw, None, down, None, grid=GRID, down_norm=norm, prefix_tokens=0)

    assert gradcheck(run, [draw(2, 6, 2), draw(3, 2), draw(3, 1, 3, 3), draw(2, 3), weight], fast_mode=True)


class TestMaskedKeys:
    """A masked key is absent: the oracle takes the visible keys of each query out and attends to those."""

    @staticmethod
    def attend_to_visible(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
        rows = []
        for b, h, i in itertools.product(*(range(n) for n in q.shape[:3])):
            keys = visible[b, h, i].nonzero()[:, 0]
            logits = k[b, h, keys] @ (q[b, h, i] * q.shape[-1] ** -0.5)
            logits = logits if bias is None else logits + bias[b, h, i, keys]
            rows.append(logits.softmax(0) @ v[b, h, keys])
        return torch.stack(rows).view(*q.shape[:3], -1)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("shape", [(2, 5), (2, 2, 4, 5), (1, 1, 4, 5), (2, 1, 1, 5), (2, 2, 4, 1), (2, 1, 4, 5)])
    @pytest.mark.parametrize("by_bias", [False, True], ids=["mask", "bias"])
    def test_what_is_masked_reaches_nothing(self, shape: tuple[int, ...], value: float, by_bias: bool) -> None:
        if by_bias and len(shape) == 2:
            pytest.skip("a bias has no form of key padding")
        for _ in range(10):
            q, k, v = (draw(2, 2, n, 3) for n in (4, 5, 5))
            mask = torch.rand(shape) < 0.6
            visible = (mask[:, None, None] if mask.dim() == 2 else mask).expand(2, 2, 4, 5)
            with torch.no_grad():  # not where anybody sees it
                k[~visible.any(2)] = value
                v[~visible.any(2)] = value
                q[~visible.any(3)] = value
            bias = torch.where(visible, torch.randn(2, 2, 4, 5).double(), -torch.inf).requires_grad_(by_bias)
            inputs = (q, k, v, bias) if by_bias else (q, k, v)
            out = functional.masked_attention(q, k, v, None if by_bias else mask, bias if by_bias else None)
            expected = self.attend_to_visible(q, k, v, visible, bias if by_bias else None)
            assert out.isfinite().all()
            self.assert_equal_with_derivatives(out, expected, inputs)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("where", ["key", "value", "query"])
    def test_what_one_query_sees_does_not_reach_another(self, where: str, value: float) -> None:
        q, k, v = (draw(1, 1, n, 3) for n in (2, 4, 4))
        mask = torch.tensor([[True, True, False, False], [False, False, True, True]])[None, None]
        with torch.no_grad():
            {"query": q, "key": k, "value": v}[where][0, 0, 0, 1] = value
        out = functional.masked_attention(q, k, v, mask)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        alone = functional.masked_attention(q[:, :, 1:], k[:, :, 2:], v[:, :, 2:])
        expected = torch.autograd.grad(alone.sum(), (q, k, v))
        seen = [t[0, 0, 1:] if n == 2 else t[0, 0, 2:] for t, n in zip((out, *gradients), (2, 2, 4, 4), strict=True)]
        wanted = [alone[0, 0], expected[0][0, 0, 1:], expected[1][0, 0, 2:], expected[2][0, 0, 2:]]
        torch.testing.assert_close(seen, wanted)
        assert out[0, 0, 0].isfinite().tolist() != [True] * 3  # and the query that sees it shows it

    def test_what_is_visible_goes_where_it_goes_without_a_mask(self) -> None:
        for name, value in itertools.product(("q", "k", "v"), (torch.nan, torch.inf, -torch.inf)):
            tensors = {n: draw(1, 2, 4, 3) for n in "qkv"}
            with torch.no_grad():
                tensors[name][0, 0, 1, 1] = value
            plain = functional.masked_attention(**tensors)
            for mask in (torch.ones(1, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)[None]):
                out = functional.masked_attention(**tensors, mask=mask)
                torch.testing.assert_close(out, plain, equal_nan=True)

    @staticmethod
    def assert_equal_with_derivatives(out: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
        gradient = torch.randn_like(out).requires_grad_()
        first, wanted = (torch.autograd.grad(o, inputs, gradient, create_graph=True) for o in (out, expected))
        torch.testing.assert_close((out, *first), (expected, *wanted))
        penalties = [sum(g.square().sum() for g in found) for found in (first, wanted)]
        second, wanted = (torch.autograd.grad(p, (*inputs, gradient)) for p in penalties)
        torch.testing.assert_close(second, wanted)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("by_query", [False, True])
    @pytest.mark.parametrize("kind", ["plain", "pre", "post", "batch_norm", "layer_norm"])
    def test_head_mixing(self, kind: str, by_query: bool, value: float) -> None:
        q, k, v = (draw(2, 2, n, 3) for n in (4, 5, 5))
        mask = torch.tensor([True, False, True, True, False]).expand(2, 1, 4 if by_query else 1, 5).clone()
        if by_query:
            mask[:, :, 1] = False
            mask[0, :, 2, 0] = False
        weight, affine = draw(2, 2), (draw(2), draw(2))
        options = {
            "plain": {},
            "pre": {"pre_weight": weight, "pre_bias": affine[0]},
            "post": {"post_weight": weight, "post_bias": affine[0]},
            "batch_norm": {"post_weight": weight, "norm": BatchNorm(None, None, *affine, use_batch_stats=True)},
            "layer_norm": {"post_weight": weight, "norm": LayerNorm(*affine)},
        }[kind]
        inputs = (q, k, v, weight, *affine)
        gradient, results = torch.randn(2, 2, 4, 3, dtype=torch.float64), []
        for content in (0.5, value):
            with torch.no_grad():
                k[:, :, [1, 4]] = content
                v[:, :, [1, 4]] = content
                if by_query:
                    q[:, :, 1] = content
            out = functional.head_mixed_attention(q, k, v, mask=mask, **options)
            results.append((out, *torch.autograd.grad(out, inputs, gradient, allow_unused=True)))
        torch.testing.assert_close(results[1], results[0])
        assert not results[1][2][:, :, [1, 4]].any() and not results[1][3][:, :, [1, 4]].any()

    def test_logits_as_low_as_numbers_go_are_not_masked(self) -> None:
        lowest = torch.finfo(torch.float32).min
        logits = torch.full((1, 1, 1, 4), lowest)
        mask = torch.tensor([True, True, False, False])
        expected = torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]])
        assert torch.equal(functional.attention_probabilities(logits, mask), expected)


@pytest.mark.parametrize("name", ["token_depthwise_conv", "leff, official", "masked_attention, mask", "re_attention"])
class TestTransformations:
    @pytest.fixture
    def case(self, name: str) -> Case:
        return cases(1, "batch")[name]

    def test_compiled_without_graph_breaks(self, case: Case) -> None:
        function, inputs = case
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        out, expected = compiled(*inputs), function(*inputs)
        gradient = torch.randn_like(expected)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
        )

    def test_exported(self, case: Case) -> None:
        function, inputs = case

        class Module(nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return function(*tensors)

        for strict in (False, True):
            program = torch.export.export(Module(), tuple(inputs), strict=strict)
            torch.testing.assert_close(program.module()(*inputs), function(*inputs))

    def test_functional_transforms(self, case: Case) -> None:
        function, inputs = case
        inputs = tuple(t.detach() for t in inputs)
        every = tuple(range(len(inputs)))
        gradients = torch.func.grad(lambda *t: function(*t).square().sum(), argnums=every)
        expected = gradients(*inputs)
        mapped = torch.func.vmap(gradients)(*(torch.stack((t, t)) for t in inputs))
        torch.testing.assert_close(tuple(m[1] for m in mapped), expected)
