"""The masked attention kernel in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import attention_masked as kernels

import fastvit
from fastvit.reference import functional
from tests.helpers import assert_as_accurate, poisoned_empty

pytestmark = pytest.mark.interpreter

# The interpreter's time depends on programs, not on elements: few programs, tiles smaller than the sequences.
STREAMING = kernels.Config(32, 16, 1)
ONE_PASS = kernels.Config(32, 64, 1, one_pass=True)
MASK_SHAPES = [(2, 21), (2, 1, 1, 21), (1, 1, 1, 21), (2, 1, 21, 21), (1, 2, 21, 21), (2, 2, 21, 21), (2, 2, 1, 21)]


def packed(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, size: float = 1.0):
    """q, k, v as the views of a packed projection (B, N, 3, H, D)."""
    qkv = torch.randn(batch, tokens, 3, heads, head_dim) * size
    return qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def check(q, k, v, mask=None, bias=None, scale=None, config=None):
    """Check one launch on poisoned memory against the accuracy rule, and the strides of the result."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    four_axes = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    with poisoned_empty():
        out, _ = kernels.masked_attention_forward(q, k, v, four_axes, bias, scale, config=config)
    plain = functional.masked_attention(q, k, v, mask, bias, scale)
    wide = [None if t is None else t.double() for t in (q, k, v, bias)]
    oracle = functional.masked_attention(*wide[:3], mask, wide[3], scale)
    assert_as_accurate(out, plain, oracle)
    assert out.transpose(1, 2).is_contiguous()
    return out


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS, None], ids=["streaming", "one_pass", "chosen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 33, 64])
def test_packed_qkv(head_dim, dtype, config):
    check(*packed(1, 2, 37, head_dim, dtype), config=config)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_of_every_broadcast_shape(shape, config):
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    check(q, k, v, mask=torch.rand(shape) > 0.4, config=config)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
@pytest.mark.parametrize("shape", [(21, 21), (2, 21, 21), (2, 2, 21, 21), (2, 1, 1, 21), (1, 2, 21, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_bias_with_and_without_mask(shape, masked, config):
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    bias = torch.randn(shape)[(None,) * (4 - len(shape))]
    bias[..., :1] = float("-inf")
    check(q, k, v, mask=torch.rand(2, 21) > 0.4 if masked else None, bias=bias, config=config)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
def test_transposed_mask_and_bias_are_read_by_their_strides(config):
    q, k, v = packed(1, 2, 21, 16, torch.float32)
    mask = (torch.rand(21, 21) > 0.4).t()[None, None]
    bias = torch.randn(21, 21, 2).permute(2, 1, 0)[None]
    check(q, k, v, mask=mask, bias=bias, config=config)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
def test_rows_without_keys_are_zero(config):
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    keys = torch.rand(2, 21) > 0.4
    keys[0] = False
    assert check(q, k, v, mask=keys, config=config)[0].eq(0).all()
    rows = torch.rand(2, 2, 21, 21) > 0.4
    rows[1, 0, 3] = False
    assert check(q, k, v, mask=rows, config=config)[1, 0, 3].eq(0).all()
    bias = torch.zeros(1, 1, 21, 21)
    bias[..., 7, :] = float("-inf")
    assert check(q, k, v, bias=bias, config=config)[:, :, 7].eq(0).all()


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
@pytest.mark.parametrize(
    "visible", [(0, 1), (17, 18), (34, 35), (3, 33), (20, 31), (0, 16), (16, 32), (2, 35, 3), (0, 34, 2)], ids=str
)
def test_what_stands_at_hidden_keys_reaches_nothing(visible, config):
    """Not even NaN does, though 0 * NaN is NaN: of keys before, behind and between the visible ones."""
    q, k, v = packed(1, 2, 35, 16, torch.float32)
    mask = torch.zeros(1, 35, dtype=torch.bool)
    mask[:, slice(*visible)] = True
    exact = functional.masked_attention(q.double(), k.double(), v.double(), mask)
    plain = functional.masked_attention(q, k, v, mask)
    k, v = (tensor.masked_fill(~mask[0, :, None], float("nan")) for tensor in (k, v))
    out, _ = kernels.masked_attention_forward(q, k, v, mask[:, None, None], None, 16**-0.5, config=config)
    assert_as_accurate(out, plain, exact)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS, None], ids=["streaming", "one_pass", "chosen"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (37, 1), (16, 64), (17, 33), (5, 50)], ids=str)
def test_token_counts(queries, keys, config):
    q, k, v = torch.randn(2, 2, queries, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
    check(q, k, v, mask=torch.rand(2, 1, queries, keys) > 0.3, config=config)


@pytest.mark.parametrize("num_keys", [130, 197, 260])
def test_configurations_chosen_for_long_sequences(num_keys):
    q = torch.randn(1, 1, 3, 48, dtype=torch.float16)
    k, v = (torch.randn(1, 1, num_keys, 48, dtype=torch.float16) for _ in range(2))
    check(q, k, v, mask=torch.rand(1, num_keys) > 0.3)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_logits(dtype, config):
    check(*packed(1, 2, 35, 16, dtype, size=12.0), config=config)


@pytest.mark.parametrize("config", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])
def test_maximum_that_rises_with_every_tile(config):
    """Every tile of the streaming form then rescales the accumulator."""
    q = torch.ones(1, 1, 3, 16)
    k = torch.arange(50.0)[None, None, :, None].expand(1, 1, 50, 16) / 4
    check(q, k, torch.randn(1, 1, 50, 16), config=config)


@pytest.mark.parametrize("layout", ["sequence_last", "heads_last", "channels_strided", "expanded"])
def test_layouts(layout):
    shape = (2, 3, 19, 24)
    make = {
        "sequence_last": lambda: torch.randn(2, 3, 24, 19).transpose(2, 3),
        "heads_last": lambda: torch.randn(19, 2, 24, 3).permute(1, 3, 0, 2),
        "channels_strided": lambda: torch.randn(2, 3, 19, 48)[..., ::2],
        "expanded": lambda: torch.randn(1, 3, 1, 24).expand(shape),
    }[layout]
    check(make(), make(), make())


def test_scale_and_empty_sizes():
    q, k, v = packed(1, 2, 9, 16, torch.float32)
    check(q, k, v, scale=0.3)
    check(q, k, v, scale=0.0)
    check(q, k, v, scale=-0.3)
    for batch, queries in ((0, 4), (2, 0)):
        out, _ = kernels.masked_attention_forward(torch.randn(batch, 2, queries, 16), *torch.randn(2, batch, 2, 3, 16))
        assert out.shape == (batch, 2, queries, 16)
    no_keys, _ = kernels.masked_attention_forward(torch.randn(2, 2, 5, 16), *torch.randn(2, 2, 2, 0, 16))
    assert no_keys.eq(0).all()


@pytest.mark.parametrize("table", [kernels.REGULAR, kernels.IRREGULAR], ids=["regular", "irregular"])
def test_every_shipped_configuration_is_right(table):
    for (product, block_d), configs in table.items():
        dtype = torch.float16 if product in ("half", "few") else torch.float32
        for config in configs:
            q, k, v = packed(1, 1, 45, block_d - 3, dtype)
            check(q, k, v, mask=torch.rand(1, 45) > 0.3, config=config)


@pytest.mark.parametrize(("setting", "off", "on"), [("allow_tf32", False, True), ("fp32_precision", "ieee", "tf32")])
def test_tf32_setting_chooses_the_product(setting, off, on):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert kernels.product_kind(torch.float16) == kernels.product_kind(torch.bfloat16) == "half"
        setattr(matmul, setting, off)
        assert kernels.product_kind(torch.float32) == "ieee"
        setattr(matmul, setting, on)
        assert kernels.product_kind(torch.float32) == "tf32"
    finally:
        matmul.fp32_precision = before


def test_public_function_and_operator():
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    mask, bias = torch.rand(2, 21) > 0.3, torch.randn(2, 21, 21)
    out = fastvit.ops.masked_attention(q, k, v, mask, bias, backend="triton")
    plain = functional.masked_attention(q, k, v, mask, bias)
    oracle = functional.masked_attention(q.double(), k.double(), v.double(), mask, bias.double())
    assert_as_accurate(out, plain, oracle)
    arguments = (q, k, v, mask[:, None, None], bias[None], 0.25, False)
    torch.library.opcheck(torch.ops.fastvit.masked_attention_triton.default, arguments)
    torch.library.opcheck(torch.ops.fastvit.masked_attention_triton.default, (q, k, v, None, None, 0.25, False))


def test_public_function_under_autocast():
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    with torch.autocast("cpu", torch.float16):
        out = fastvit.ops.masked_attention(q, k.half(), v, backend="triton")
    assert out.dtype == torch.float16
    plain = functional.masked_attention(q.half(), k.half(), v.half())
    assert_as_accurate(out, plain, functional.masked_attention(q.half().double(), k.half().double(), v.half().double()))


def test_reasons_of_the_interpreter():
    q = torch.randn(1, 1, 4, 16)
    for arguments, text in (
        ((q.bfloat16(),) * 3, "interpreter multiplies bfloat16"),
        ((q.double(),) * 3, "float64"),
        ((torch.randn(1, 1, 4, 130),) * 3, "larger than 128"),
    ):
        with pytest.raises(RuntimeError, match=text):
            fastvit.ops.masked_attention(*arguments, backend="triton")
    with pytest.raises(RuntimeError, match="dropout"):
        fastvit.ops.masked_attention(q, q, q, dropout_p=0.1, backend="triton")
