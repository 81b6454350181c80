"""CeiT's feed-forward in Triton's interpreter, against the plain steps in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import torch.nn.functional as F
from fastvit.kernels import leff as kernels
from helpers import assert_as_accurate, poisoned_empty

from fastvit.reference import functional

pytestmark = pytest.mark.interpreter


def plain(x, w1, b1, dw, db, w2, b2, grid, prefix, form):
    """The steps one by one, in x's dtype."""
    w1, b1, dw, db, w2, b2 = (None if t is None else t.to(x.dtype) for t in (w1, b1, dw, db, w2, b2))
    h = functional.token_depthwise_conv(
        F.linear(x[:, prefix:], w1, b1), dw, db, grid=grid, pre_activation="gelu", activation="gelu"
    )
    out = F.linear(h, w2, b2)
    if form == "paper":
        return torch.cat((torch.zeros_like(x[:, :prefix]), F.gelu(out)), 1)
    return torch.cat((x[:, :prefix], out), 1) if prefix else out


def make(batch, grid, channels, expansion, dtype, *, prefix=1, kernel=3, biases=True, parameters=None):
    tokens = prefix + grid[0] * grid[1]
    of = parameters or dtype
    x = torch.randn(batch, tokens, channels).to(dtype)
    w1 = (torch.randn(expansion, channels) * channels**-0.5).to(dtype)
    w2 = (torch.randn(channels, expansion) * expansion**-0.5).to(dtype)
    dw = torch.randn(expansion, 1, kernel, kernel).to(of) / kernel
    b1, db, b2 = (torch.randn(n).to(of) if biases else None for n in (expansion, expansion, channels))
    return x, w1, b1, dw, db, w2, b2, grid, prefix


def check(arguments, *, form="official", **configs):
    *tensors, grid, prefix = arguments
    with poisoned_empty():
        out = kernels.leff_forward(*arguments, form=form, **configs)
    wide = [None if t is None else t.double() for t in tensors]
    assert_as_accurate(out, plain(*arguments, form), plain(*wide, grid, prefix, form))
    if prefix:
        x = tensors[0][:, :prefix]
        assert torch.equal(out[:, :prefix], x if form == "official" else torch.zeros_like(x))


# The interpreter takes its time per program: tiles that are wide for the sizes here.
WIDE = {"expand": kernels.Config(64, 64, 32, 1, 1), "contract": kernels.Config(64, 32, 32, 1, 1, 16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["official", "paper"])
def test_as_accurate_as_the_plain_steps(dtype, form):
    check(make(2, (7, 5), 48, 40, dtype), form=form, **WIDE)


@pytest.mark.parametrize("grid", [(1, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_grids_and_prefix_tokens(grid, prefix):
    check(make(2, grid, 16, 40, torch.float32, prefix=prefix), **WIDE)


@pytest.mark.parametrize("kernel", [1, 5])
def test_other_kernel_sizes(kernel):
    check(make(1, (6, 4), 16, 32, torch.float32, kernel=kernel), **WIDE)


def test_configurations_chosen_for_sizes_no_tile_divides():
    check(make(1, (5, 4), 21, 33, torch.float32))
    check(make(1, (3, 5), 80, 32, torch.float16))


def test_float32_parameters_beside_bfloat16_tokens_and_no_biases():
    check(make(1, (4, 6), 16, 32, torch.bfloat16, parameters=torch.float32), **WIDE)
    check(make(1, (4, 6), 16, 32, torch.float32, biases=False), **WIDE)


def test_other_output_width_without_prefix_tokens():
    x, w1, b1, dw, db, w2, b2, *rest = make(2, (4, 5), 16, 32, torch.float32, prefix=0)
    check((x, w1, b1, dw, db, w2[:9], b2[:9], *rest), **WIDE)


@pytest.mark.parametrize("layout", ["rows", "expanded", "channels"])
def test_strided_tokens(layout):
    x, *rest = make(2, (4, 5), 16, 32, torch.float32)
    wide = torch.randn(4, 40, 48)
    x = {
        "rows": wide[::2, 3:24, 8:24],
        "expanded": wide[:1, :21, :16].expand(2, -1, -1),
        "channels": wide[:2, :21, ::3],
    }
    check((x[layout], *rest), **WIDE)


def test_empty_batch():
    x, *rest = make(1, (4, 5), 16, 32, torch.float32)
    assert kernels.leff_forward(x[:0], *rest).shape == (0, 21, 16)


def test_maps_beyond_32_bit_offsets_are_refused():
    x = torch.empty(1, 1, 16, device="meta").expand(1, 2**21, 16)
    _, *rest = make(1, (1, 1), 16, 1024, torch.float32)
    with pytest.raises(ValueError, match="accepted are up to"):
        kernels.leff_forward(x, *rest[:6], (2**11, 2**10), 0)
