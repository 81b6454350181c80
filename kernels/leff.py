"""CeiT's feed-forward at inference: two matrix products, the convolution inside the second.

    h = GELU(norm(x w1^T + b1))                                 on the grid tokens, (B, h*w, E)
    out = norm(GELU(norm(depthwise(h) + db)) w2^T + b2)         on the grid tokens, (B, P + h*w, O)

In the paper's form a GELU follows. Prefix tokens are x's own, or zeros in the paper's form. The expansion h is written
once, in x's dtype, and read by the last kernel; the result of the convolution never reaches memory.

Tile plan:

- ``leff_fold_kernel``: biases and norms, whose statistics are given, become one scale and one offset per channel of a
  float32 result, and the scale behind the convolution goes into its taps. Vectors only: it takes a launch, no time.
- ``leff_expand_kernel``: one program makes h [BLOCK_M grid tokens, BLOCK_N] in a loop over BLOCK_K input channels.
  Programs that share their tokens are neighbours, so x comes from the cache.
- ``leff_contract_kernel``: one program makes out [BLOCK_M tokens, BLOCK_N (+ BLOCK_N2)] in a loop over BLOCK_K channels
  of h. Each step makes the left operand [BLOCK_M, BLOCK_K] in registers: k * k shifted tiles of h, of which all but the
  first come from the L1 cache, times their taps, plus the offset, GELU. Making it costs as much as multiplying it, so a
  program is to be as wide as the output: a second, narrower accumulator makes widths of 192 and 384 out of powers of
  two. Rows are tokens with the prefix ones among them, whose result is replaced by x at the end.

Products take the input dtype (float32 as true float32, or TF32 where PyTorch's setting allows it) and accumulate in
float32; everything between them is float32.

Source: Yuan et al. 2021 (CeiT), section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import product_kind
from fastvit.kernels._tokens import MOST_ROWS, gelu, load_norm, load_vector, place_rows, with_near_rows
from fastvit.kernels._tuning import choose, token_bucket
from torch import Tensor

FOLD_BLOCK = 128


class Behind(NamedTuple):
    """What stands behind a product or the convolution: a bias, then a BatchNorm, of which var is None where none is."""

    bias: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


class Config(NamedTuple):
    """How one launch is cut: tile sizes, warps and loop stages; block_n2 is the second accumulator's width or 0."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_n2: int = 0


# Keyed by what is multiplied ("half": float16 and bfloat16 on tensor cores, "tf32": float32 on tensor cores, "ieee":
# float32 on the plain units). The first of a row fits every chip without spills and within 99 kB of shared memory (64
# kB on gfx942); the others those that `choose_contract` gives them to. tests/kernels holds them to that.
EXPAND: dict[str, tuple[Config, ...]] = {
    "half": (Config(64, 64, 32, 4, 2), Config(128, 128, 32, 8, 3)),
    "tf32": (Config(64, 64, 32, 4, 1),),
    "ieee": (Config(64, 32, 16, 4, 2),),
}
"""The second of a row is for aligned rows only."""

CONTRACT: dict[str, tuple[Config, ...]] = {
    "half": (Config(32, 64, 16, 4, 1), Config(64, 128, 16, 8, 2, 64), Config(64, 256, 32, 8, 2, 128)),
    "tf32": (Config(32, 64, 16, 4, 1), Config(32, 128, 16, 8, 1, 64)),
    "ieee": (Config(32, 64, 16, 4, 1),),
}
"""Aligned rows, narrow first. The second of a row is for NVIDIA, the third for its compute capability 9 and later."""

CONTRACT_AMD = Config(16, 128, 16, 4, 1, 64)
"""What gfx942 takes beside the first of "half"."""

CONTRACT_IRREGULAR: dict[str, Config] = {
    "half": Config(32, 32, 16, 4, 1),
    "tf32": Config(32, 32, 16, 8, 1),
    "ieee": Config(32, 32, 16, 8, 1),
}
"""Rows read element by element: one address per element takes registers."""


def choose_expand(product: str, *, regular: bool) -> tuple[Config, ...]:
    """The candidates for the first kernel; regular: rows start on 16 bytes and hold a multiple of 16 elements."""
    return EXPAND[product] if regular else EXPAND[product][:1]


def choose_contract(product: str, width: int, *, regular: bool, chip: int) -> tuple[Config, ...]:
    """The candidates for the second kernel.

    Args:
        width: output channels. Wider than they are is of no use, but for the narrowest candidate.
        chip: compute capability's major number, 0 for AMD.
    """
    if not regular:
        return (CONTRACT_IRREGULAR[product],)
    first, *others = CONTRACT[product]
    if chip == 0:
        others = [CONTRACT_AMD] if product == "half" else []
    elif chip < 9:
        others = others[:1]
    return (first, *(config for config in others if config.block_n < width))


@triton.jit
def _weight_tile(weight, first_row, first_column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transposed tile [COLUMNS, ROWS] of a contiguous (num_rows, num_columns) matrix, zeros outside."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    return tl.load(weight + rows[None, :] * num_columns + columns[:, None], mask=inside, other=0)


@triton.jit
def _scale_and_offset(behind, first, size, BLOCK: tl.constexpr):
    """What stands behind a result, of BLOCK channels from first on, as result * scale + offset."""
    bias = load_vector(behind.bias, first, size, BLOCK)
    center, scale, shift = load_norm(
        behind.mean, behind.var, behind.weight, behind.shift, behind.eps, first, size, BLOCK
    )  # fmt: skip
    return scale, (bias - center) * scale + shift


@triton.jit
def leff_fold_kernel(up, taps, dw, down, folded, folded_down, E, num_out, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """folded (TAPS + 3, E): the taps with the scale behind them in, the offset; scale and offset behind the expansion.

    folded_down (2, num_out): scale and offset behind the contraction.
    """
    blocks = tl.cdiv(E, BLOCK)
    program = tl.program_id(0)
    if program < blocks:
        channels = program * BLOCK + tl.arange(0, BLOCK)
        within = channels < E
        scale, offset = _scale_and_offset(dw, program * BLOCK, E, BLOCK)
        for tap in range(TAPS):
            value = tl.load(taps + channels * TAPS + tap, mask=within, other=0).to(tl.float32)
            tl.store(folded + tap * E + channels, value * scale, mask=within)
        tl.store(folded + TAPS * E + channels, offset, mask=within)
        scale, offset = _scale_and_offset(up, program * BLOCK, E, BLOCK)
        tl.store(folded + (TAPS + 1) * E + channels, scale, mask=within)
        tl.store(folded + (TAPS + 2) * E + channels, offset, mask=within)
    else:
        first = (program - blocks) * BLOCK
        channels = first + tl.arange(0, BLOCK)
        scale, offset = _scale_and_offset(down, first, num_out, BLOCK)
        tl.store(folded_down + channels, scale, mask=channels < num_out)
        tl.store(folded_down + num_out + channels, offset, mask=channels < num_out)


@triton.jit
def _scaled(acc, folded, first, size, BLOCK: tl.constexpr):
    """acc [rows, BLOCK columns from first on] * scale + offset, which are two rows of folded."""
    scale = load_vector(folded, first, size, BLOCK)
    offset = load_vector(folded + size, first, size, BLOCK)
    return acc * scale[None, :] + offset[None, :]


@triton.jit(do_not_specialize=["prefix_tokens", "grid_tokens", "num_rows"])
def leff_expand_kernel(
    x,
    weight,
    folded,
    out,
    stride_xb,
    stride_xn,
    prefix_tokens,
    grid_tokens,
    num_rows,
    C,
    E,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h [BLOCK_M grid tokens of all images in a row, BLOCK_N of the E channels]."""
    blocks = tl.cdiv(E, BLOCK_N)
    program = tl.program_id(0)
    first_column = (program % blocks) * BLOCK_N
    first_image, image, token, exists = place_rows((program // blocks) * BLOCK_M, num_rows, grid_tokens, BLOCK_M)
    x += first_image * stride_xb
    out += first_image * (grid_tokens * E)
    source = image * stride_xb + (prefix_tokens + token) * stride_xn
    target = (image * grid_tokens + token) * E
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        channels = k + tl.arange(0, BLOCK_K)
        inside = exists[:, None] & (channels < C)[None, :]
        left = tl.load(x + (source[:, None] + channels[None, :]), mask=inside, other=0)
        right = _weight_tile(weight, first_column, k, E, C, BLOCK_N, BLOCK_K)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc = gelu(_scaled(acc, folded + (TAPS + 1) * E, first_column, E, BLOCK_N))
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = exists[:, None] & (columns < E)[None, :]
    tl.store(out + (target[:, None] + columns[None, :]), acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _convolved(
    h,
    folded,
    corner,
    row,
    column,
    height,
    width,
    first_channel,
    E,
    PADDING: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """GELU(norm(depthwise(h))) [BLOCK_M tokens, BLOCK_K channels] in float32; zeros behind the last channel.

    corner: pointer offsets of the tokens in h; row, column: their places in the grid, row negative where there is none.
    """
    channels = first_channel + tl.arange(0, BLOCK_K)
    within = channels < E
    offset = load_vector(folded + KERNEL * KERNEL * E, first_channel, E, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32) + offset[None, :]
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            tap = load_vector(folded + (dy * KERNEL + dx) * E, first_channel, E, BLOCK_K)
            y, z = row + (dy - PADDING), column + (dx - PADDING)
            inside = (row >= 0) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            place = corner + ((dy - PADDING) * width + (dx - PADDING)) * E
            tile = tl.load(h + (place[:, None] + channels[None, :]), mask=inside[:, None] & within[None, :], other=0)
            acc += tile.to(tl.float32) * tap[None, :]
    return gelu(acc)


@triton.jit
def _finish(
    acc,
    folded_down,
    x,
    out,
    target,
    source,
    from_x,
    exists,
    first_column,
    num_out,
    PAPER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The norm, and what the form asks for behind it and for prefix tokens; writes [BLOCK_M tokens, BLOCK_N]."""
    columns = first_column + tl.arange(0, BLOCK_N)
    within = (columns < num_out)[None, :]
    acc = _scaled(acc, folded_down, first_column, num_out, BLOCK_N)
    if PAPER:
        result = tl.where(from_x[:, None], 0.0, gelu(acc)).to(out.dtype.element_ty)
    else:
        prefix = tl.load(x + (source[:, None] + columns[None, :]), mask=from_x[:, None] & within, other=0)
        result = tl.where(from_x[:, None], prefix, acc.to(out.dtype.element_ty))
    tl.store(out + (target[:, None] + columns[None, :]), result, mask=exists[:, None] & within)


@triton.jit(do_not_specialize=["prefix_tokens", "height", "width", "num_rows"])
def leff_contract_kernel(
    h,
    folded,
    weight,
    folded_down,
    x,
    out,
    stride_xb,
    stride_xn,
    prefix_tokens,
    height,
    width,
    num_rows,
    E,
    num_out,
    KERNEL: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [BLOCK_M tokens of all images in a row, BLOCK_N + BLOCK_N2 of the num_out channels]."""
    blocks = tl.cdiv(num_out, BLOCK_N + BLOCK_N2)
    program = tl.program_id(0)
    first_column = (program % blocks) * (BLOCK_N + BLOCK_N2)
    tokens = prefix_tokens + height * width
    first_image, image, token, exists = place_rows((program // blocks) * BLOCK_M, num_rows, tokens, BLOCK_M)
    x += first_image * stride_xb
    out += first_image * (tokens * num_out)
    h += first_image * (height * width * E)
    place = token - prefix_tokens
    row = tl.where(exists & (place >= 0), place // width, -1)
    column = place % width
    corner = (image * (height * width) + place) * E

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2 != 0:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    for k in range(0, E, BLOCK_K):
        left = _convolved(
            h, folded, corner, row, column, height, width, k, E, KERNEL // 2, KERNEL, BLOCK_M, BLOCK_K
        )  # fmt: skip
        left = left.to(h.dtype.element_ty)
        right = _weight_tile(weight, first_column, k, num_out, E, BLOCK_N, BLOCK_K)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if BLOCK_N2 != 0:
            right2 = _weight_tile(weight, first_column + BLOCK_N, k, num_out, E, BLOCK_N2, BLOCK_K)
            acc2 = tl.dot(left, right2, acc2, input_precision=PRECISION)

    source = image * stride_xb + token * stride_xn
    target = (image * tokens + token) * num_out
    from_x = exists & (token < prefix_tokens)
    _finish(acc, folded_down, x, out, target, source, from_x, exists, first_column, num_out, PAPER, BLOCK_N)
    if BLOCK_N2 != 0:
        _finish(
            acc2, folded_down, x, out, target, source, from_x, exists, first_column + BLOCK_N, num_out, PAPER, BLOCK_N2
        )


def _is_regular(*tensors: Tensor) -> bool:
    """Whether Triton can see that every row of every tensor starts on 16 bytes, and reads them in pieces of that."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in tensor.stride()[:-1])
        for tensor in tensors
    )


def _chip() -> int:
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 8


def _fold(up: Behind, dw_weight: Tensor, dw: Behind, down: Behind, num_out: int) -> tuple[Tensor, Tensor]:
    """What :func:`leff_fold_kernel` gives."""
    expansion, taps = dw_weight.shape[0], dw_weight.shape[-1] ** 2
    options = {"dtype": torch.float32, "device": dw_weight.device}
    folded, folded_down = torch.empty((taps + 3, expansion), **options), torch.empty((2, num_out), **options)
    leff_fold_kernel[(triton.cdiv(expansion, FOLD_BLOCK) + triton.cdiv(num_out, FOLD_BLOCK),)](
        up, dw_weight, dw, down, folded, folded_down, expansion, num_out, TAPS=taps, BLOCK=FOLD_BLOCK, num_warps=4
    )
    return folded, folded_down


def _launch_expand(
    config: Config,
    x: Tensor,
    weight: Tensor,
    folded: Tensor,
    h: Tensor,
    prefix_tokens: int,
    precision: str,
) -> None:
    batch, grid_tokens, expansion = h.shape
    rows = batch * grid_tokens
    leff_expand_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(expansion, config.block_n),)](
        x,
        weight,
        folded,
        h,
        x.stride(0),
        x.stride(1),
        prefix_tokens,
        grid_tokens,
        rows,
        x.shape[2],
        expansion,
        TAPS=folded.shape[0] - 3,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _launch_contract(
    config: Config,
    h: Tensor,
    folded: Tensor,
    weight: Tensor,
    folded_down: Tensor,
    x: Tensor,
    out: Tensor,
    grid: tuple[int, int],
    kernel: int,
    paper: bool,
    precision: str,
) -> None:
    batch, tokens, width = out.shape
    programs = triton.cdiv(batch * tokens, config.block_m) * triton.cdiv(width, config.block_n + config.block_n2)
    leff_contract_kernel[(programs,)](
        h,
        folded,
        weight,
        folded_down,
        x,
        out,
        x.stride(0),
        x.stride(1),
        tokens - grid[0] * grid[1],
        *grid,
        batch * tokens,
        h.shape[2],
        width,
        KERNEL=kernel,
        PAPER=paper,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_N2=config.block_n2,
        BLOCK_K=config.block_k,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _check_reach(tokens: int, weights: tuple[Tensor, Tensor]) -> None:
    """Offsets inside an image and inside a weight are 32-bit."""
    widest = max(weights[0].shape[0], weights[1].shape[0])
    if (tokens + MOST_ROWS // 2) * widest >= 2**30 or any(weight.numel() >= 2**31 for weight in weights):
        raise ValueError(
            f"x: got {tokens} tokens beside weights {[tuple(weight.shape) for weight in weights]}, accepted are up to "
            "2^30 elements per image, expanded or put out, and 2^31 per weight"
        )


def leff_forward(
    x: Tensor,
    up_weight: Tensor,
    up_behind: Behind,
    dw_weight: Tensor,
    dw_behind: Behind,
    down_weight: Tensor,
    down_behind: Behind,
    grid: tuple[int, int],
    prefix_tokens: int,
    paper: bool,
    *,
    expand: Config | None = None,
    contract: Config | None = None,
) -> Tensor:
    """Launch the kernels.

    Args:
        x: (B, P + h*w, C); float32, float16 or bfloat16, copied only where its channels are not adjacent.
        up_weight: (E, C) and down_weight: (O, E), in x's dtype; O = C where there are prefix tokens.
        dw_weight: (E, 1, k, k), zero padding k // 2; k of 1 or 3, more taps spill registers. It and the vectors may be
            float32 beside a narrower x. All contiguous.
        up_behind, dw_behind, down_behind: bias and BatchNorm with its statistics, each (E,), (E,) and (O,) or None.
        grid: (h, w). prefix_tokens: P.
        paper: gives zeros for prefix tokens, and a GELU at the end; else prefix tokens are handed through.
        expand, contract: in place of the configurations chosen.

    Returns:
        (B, P + h*w, O), contiguous.

    Raises:
        ValueError: a map or a weight of more elements than offsets reach.
    """
    batch, tokens, channels = x.shape
    expansion, kernel = up_weight.shape[0], dw_weight.shape[-1]
    _check_reach(tokens, (up_weight, down_weight))
    out = torch.empty((batch, tokens, down_weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    product = product_kind(x.dtype)
    with torch.cuda.device_of(x):
        x = with_near_rows(x)
        h = torch.empty((batch, grid[0] * grid[1], expansion), dtype=x.dtype, device=x.device)
        folded, folded_down = _fold(up_behind, dw_weight, dw_behind, down_behind, out.shape[2])
        regular, precision = _is_regular(x, up_weight, down_weight, out), "tf32" if product == "tf32" else "ieee"
        key = (x.dtype, precision, channels, expansion, out.shape[2], kernel, regular, token_bucket(batch * tokens))

        def run_expand(config: Config) -> None:
            _launch_expand(config, x, up_weight, folded, h, prefix_tokens, precision)

        def run_contract(config: Config) -> None:
            _launch_contract(config, h, folded, down_weight, folded_down, x, out, grid, kernel, paper, precision)

        candidates = choose_expand(product, regular=regular)
        run_expand(expand or choose("leff_expand", key, candidates, run_expand))
        candidates = choose_contract(product, out.shape[2], regular=regular, chip=_chip())
        run_contract(contract or choose("leff_contract", key, candidates, run_contract))
    return out


def leff_operator(
    x: Tensor,
    up_weight: Tensor,
    dw_weight: Tensor,
    down_weight: Tensor,
    *rest: Tensor | float | int | bool | None,
) -> Tensor:
    """The operator ``leff_triton`` of ``fastvit/ops/_leff_triton.py``: the fields of what stands behind each follow."""
    behinds = [Behind(*rest[start : start + 6]) for start in (0, 6, 12)]
    height, width, prefix_tokens, paper = rest[18:]
    weights = (up_weight, dw_weight, down_weight)
    parts = [part for pair in zip(weights, behinds, strict=True) for part in pair]
    return leff_forward(x, *parts, (height, width), prefix_tokens, paper)
