"""The kernels of head-mixed attention in Triton's interpreter, forward and backward, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import head_mixed_attention_launch as launching
from fastvit.kernels.head_mixed_attention import head_mixed_attention_forward
from fastvit.kernels.head_mixed_attention_backward import head_mixed_attention_backward
from fastvit.kernels.head_mixed_attention_configs import Config
from fastvit.kernels.head_mixed_attention_moments import head_map_moments, head_map_moments_backward

from fastvit.reference import functional
from tests.helpers import assert_as_accurate, poisoned_empty

pytestmark = pytest.mark.interpreter

KINDS = ("re", "talking", "norm", "bare_norm", "pre", "post", "plain")
NAMES = ("pre_weight", "pre_bias", "post_weight", "post_bias", "norm_weight", "norm_bias")
EPS = 1e-5


class HeadNorm:
    """LayerNorm over the heads of maps (B, H, Nq, Nk), as vit-pytorch's DeepViT has it."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, maps: Tensor) -> Tensor:
        shape = (maps.shape[1],)
        weight, bias = (None if t is None else t.to(maps.dtype) for t in (self.weight, self.bias))
        return torch.nn.functional.layer_norm(maps.movedim(1, -1), shape, weight, bias, EPS).movedim(-1, 1)


def make_qkv(batch, heads, queries, keys, dim, dtype=torch.float32, size=1.0):
    """q, k, v as views of a packed projection (B, N, 3, H, D)."""
    packed = (size * torch.randn(batch, max(queries, keys), 3, heads, dim)).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def make_parts(kind: str, heads: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The parameters and settings of a kind."""
    matrices = [(torch.eye(heads) + 0.3 * torch.randn(heads, heads)).to(dtype) for _ in range(2)]
    vectors = [(0.3 * torch.randn(heads)).to(dtype) for _ in range(4)]
    vectors[2] = (1.0 + vectors[2]).to(dtype)
    given = {
        "re": ("post_weight", "post_bias"),
        "talking": NAMES[:4],
        "norm": ("post_weight", "norm_weight", "norm_bias"),
        "bare_norm": ("pre_weight",),
        "pre": ("pre_weight", "pre_bias"),
        "post": ("post_weight",),
        "plain": (),
    }[kind]
    values = dict(zip(NAMES, (matrices[0], vectors[0], matrices[1], *vectors[1:]), strict=True))
    parts: dict[str, Any] = {name: values[name] if name in given else None for name in NAMES}
    return parts | {
        "layer_norm": kind.endswith("norm"),
        "output_scale": -1.5 if kind in ("re", "norm", "plain") else 1.0,
    }


def plain(q, k, v, parts, mask, scale):
    norm = HeadNorm(parts["norm_weight"], parts["norm_bias"]) if parts["layer_norm"] else None
    mixes = {name: parts[name] for name in NAMES[:4]}
    return functional.head_mixed_attention(
        q, k, v, **mixes, norm=norm, output_scale=parts["output_scale"], mask=mask, scale=scale
    )


def to(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype).requires_grad_() if isinstance(value, Tensor) else value


def with_gradients(q, k, v, parts, mask, scale, grad, dtype):
    """Result and gradients of the plain form in a dtype, by name."""
    leaves = {"q": q, "k": k, "v": v} | {name: parts[name] for name in NAMES if parts[name] is not None}
    leaves = {name: to(value, dtype) for name, value in leaves.items()}
    parts = parts | {name: leaves[name] for name in NAMES if name in leaves}
    out = plain(leaves["q"], leaves["k"], leaves["v"], parts, mask, scale)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype), allow_unused=True)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def check(q, k, v, parts, mask=None, scale=None, grad=None):
    """Check forward and backward on poisoned memory against the accuracy rule; returns the results by name."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grad = torch.randn_like(q) if grad is None else grad
    before = [parts[name] for name in NAMES]
    settings = (*before, EPS, parts["layer_norm"], parts["output_scale"], False, mask, scale)
    with poisoned_empty():
        out = head_mixed_attention_forward(q, k, v, *before, None, None, *settings[len(before) :])
        gradients = head_mixed_attention_backward(grad, q, k, v, *settings)
    got = {"out": out} | dict(zip(("q", "k", "v", *NAMES), gradients, strict=True))
    reference = with_gradients(q, k, v, parts, mask, scale, grad, q.dtype)
    oracle = with_gradients(q, k, v, parts, mask, scale, grad, torch.float64)
    for name in NAMES:
        if parts[name] is None:
            assert got.pop(name).numel() == 0
    for name, value in got.items():
        assert_as_accurate(value.to(reference[name].dtype), reference[name], oracle[name], name=name)
    for name in ("out", "q", "k", "v"):
        assert got[name].transpose(1, 2).is_contiguous()
    return got


# The interpreter's time depends on programs and tiles, not on elements.
WHOLE = Config(block_m=32, block_n=64, block_out=64, num_warps=1)
RESIDENT = Config(block_m=16, block_n=16, block_out=32, num_warps=1)
RELOADING = RESIDENT._replace(resident=False)
EXACT = RELOADING._replace(block_m=2, exact=True)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Sets the configuration of launches; by default one tile for the whole problem."""

    def use(config: Config) -> None:
        def configurations(kernel, *_):
            return (config if kernel in ("query_gradients", "key_gradients") else config._replace(block_rest=0),)

        monkeypatch.setattr(launching, "configurations", configurations)

    use(WHOLE)
    return use


@pytest.mark.parametrize(("kind", "heads"), [*((kind, 5) for kind in KINDS), ("talking", 12), ("norm", 12)])
def test_every_kind(kind, heads):
    check(*make_qkv(1, heads, 21, 21, 16), make_parts(kind, heads))


@pytest.mark.parametrize(
    ("kind", "config"),
    [("talking", RELOADING), ("norm", RESIDENT), ("talking", RESIDENT._replace(block_rest=16))],
    ids=["reloading", "resident", "rest"],
)
def test_several_tiles_and_column_blocks(kind, config, tiles):
    tiles(config)
    check(*make_qkv(1, 6, 35, 19, 33), make_parts(kind, 6))


def test_exact_products_of_half_precision_operands(tiles):
    tiles(EXACT)
    check(*make_qkv(1, 17, 9, 9, 16, torch.float16), make_parts("talking", 17, torch.float16))


@pytest.mark.parametrize("kind", ["talking", "norm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_in_the_shipped_configurations(kind, dtype, monkeypatch):
    monkeypatch.undo()
    check(*make_qkv(1, 4, 19, 19, 32, dtype), make_parts(kind, 4, dtype))


@pytest.mark.parametrize("head_dim", [35, 48, 72])
def test_head_dimensions(head_dim):
    check(*make_qkv(1, 4, 17, 17, head_dim), make_parts("talking", 4))


@pytest.mark.parametrize("kind", ["talking", "norm"])
def test_more_heads_than_slots_of_one_product(kind):
    check(*make_qkv(1, 18, 17, 17, 16), make_parts(kind, 18))


@pytest.mark.parametrize("kind", ["talking", "norm"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 21), (1, 1, 21, 21), (2, 6, 21, 21), (2, 6, 21, 1)], ids=str)
def test_masks_of_every_broadcast_shape(kind, shape):
    """Among them fully masked rows, which give zeros and get no gradient."""
    mask = torch.rand(shape) > 0.4
    mask[0, 0, 0] = False
    got = check(*make_qkv(2, 6, 21, 21, 16), make_parts(kind, 6), mask=mask)
    empty = ~mask.expand(2, 6, 21, 21).any(-1)
    assert got["out"][empty].eq(0).all()
    if kind == "norm":  # with a pre-mix, other heads' rows contribute to the gradient of this q
        assert got["q"][empty].eq(0).all()


def test_transposed_mask_is_read_by_its_strides():
    mask = (torch.rand(19, 19) > 0.4).t()[None, None]
    check(*make_qkv(1, 3, 19, 19, 16), make_parts("re", 3), mask=mask)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (37, 1), (5, 50)], ids=str)
def test_token_counts(queries, keys):
    mask = torch.rand(2, 1, queries, keys) > 0.3
    check(*make_qkv(2, 3, queries, keys, 16), make_parts("talking", 3), mask=mask)


@pytest.mark.parametrize("kind", ["re", "talking"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_logits(kind, dtype):
    check(*make_qkv(1, 4, 19, 19, 16, dtype, size=8.0), make_parts(kind, 4, dtype))


@pytest.mark.parametrize("layout", ["contiguous", "heads_last", "columns_strided", "expanded", "odd_start"])
def test_layouts(layout):
    tensors = []
    for _ in range(4):
        x = torch.randn(2, 3, 19, 16)
        if layout == "heads_last":
            x = torch.randn(2, 19, 16, 3).permute(0, 3, 1, 2)
        elif layout == "columns_strided":
            x = torch.randn(2, 3, 19, 32)[..., ::2]
        elif layout == "expanded":
            x = torch.randn(1, 1, 19, 16).expand(2, 3, 19, 16)
        elif layout == "odd_start":
            x = torch.randn(2, 3, 19, 17)[..., 1:]
        tensors.append(x)
    *qkv, grad = tensors
    check(*qkv, make_parts("re", 3), grad=grad)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_do(batch, queries, keys):
    q, k = torch.randn(batch, 3, queries, 16), torch.randn(batch, 3, keys, 16)
    parts = make_parts("talking", 3)
    settings = (*(parts[name] for name in NAMES), EPS, False, 1.0, False, None, 0.25)
    results = [
        head_mixed_attention_forward(q, k, k, *settings[: len(NAMES)], None, None, *settings[len(NAMES) :]),
        *head_mixed_attention_backward(q, q, k, k, *settings),
        *head_map_moments(q, k, None, None, None, 0.25),
        *head_map_moments_backward(torch.ones(3), torch.ones(3, 3), q, k, None, None, None, 0.25),
    ]
    assert results[0].shape == results[1].shape == q.shape
    assert results[2].shape == results[3].shape == k.shape
    assert all(result.eq(0).all() for result in results)


def moments(q: Tensor, k: Tensor, pre_weight: Tensor | None, pre_bias: Tensor | None, mask: Tensor | None):
    logits = q @ k.transpose(2, 3) * 0.25
    if pre_weight is not None:
        logits = torch.nn.functional.conv2d(logits, pre_weight[:, :, None, None], pre_bias)
    centred = functional.attention_probabilities(logits, mask) - 1.0 / k.shape[2]
    flat = centred.transpose(0, 1).flatten(1)
    return flat.sum(1), flat @ flat.t()


def moments_with_gradients(inputs: list[Tensor | None], mask: Tensor | None, grads: list[Tensor], dtype: torch.dtype):
    leaves = [to(value, dtype) for value in inputs]
    results = moments(*leaves, mask)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(results, wanted, [grad.to(dtype) for grad in grads])
    return [*(result.detach() for result in results), *gradients]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    ("heads", "pre_mix", "dtype"), [(5, False, torch.float32), (6, True, torch.float32), (6, True, torch.float16)]
)
def test_moments(heads, pre_mix, masked, dtype, tiles):
    tiles(RELOADING if pre_mix else RESIDENT)
    q, k, _ = make_qkv(2, heads, 19, 23, 16, dtype)
    parts = make_parts("pre" if pre_mix else "plain", heads, dtype)
    mask = torch.rand(2, 1, 19, 23) > 0.4 if masked else None
    if masked:
        mask[1, 0, 2] = False
    inputs = [q, k, parts["pre_weight"], parts["pre_bias"]]
    grads = [torch.randn(heads), torch.randn(heads, heads)]
    with poisoned_empty():
        sums, second = head_map_moments(*inputs, mask, 0.25)
        gradients = head_map_moments_backward(*grads, *inputs, mask, 0.25)
    got = [sums, second, *(gradient for gradient in gradients if gradient.numel())]
    reference = moments_with_gradients(inputs, mask, grads, dtype)
    oracle = moments_with_gradients(inputs, mask, grads, torch.float64)
    assert len(got) == len(oracle)
    for i, (value, plain_value, exact) in enumerate(zip(got, reference, oracle, strict=True)):
        assert_as_accurate(value.to(dtype), plain_value, exact, name=f"result {i}")
