"""CeiT's feed-forward at inference: two GEMMs, the depthwise convolution fused into the prologue of the second.

    h = GELU(norm(x w1^T + b1))                                 on the grid tokens, (B, h*w, E)
    out = norm(GELU(norm(depthwise(h) + db)) w2^T + b2)         on the grid tokens, (B, P + h*w, O)

In the paper's form a GELU follows. The result's prefix tokens are those of x, in the paper's form zeros. The expansion
h is written once, in x's dtype, and read by the last kernel; the convolution's result stays in registers.

Tiling:

- ``leff_fold_kernel``: every epilogue (bias, and norm with given statistics) becomes a scale and an offset per channel;
  the convolution's scale is folded into its taps. It handles vectors only, so its time is that of a launch.
- ``leff_expand_kernel``: one program computes h [BLOCK_M grid tokens, BLOCK_N] in a loop over BLOCK_K input channels.
  Programs that share their tokens are adjacent, so x comes from the cache.
- ``leff_contract_kernel``: one program computes out [BLOCK_M tokens, BLOCK_N (+ BLOCK_N2)] in a loop over BLOCK_K
  channels of h. Each iteration computes the left operand [BLOCK_M, BLOCK_K] in registers (``_depthwise_prologue.py``):
  the convolution of h, then GELU. The rows include prefix tokens, whose results are replaced at the end.

GEMMs take the input dtype (float32 as true float32, or TF32 where PyTorch's setting allows it) and accumulate in
float32; everything between them is float32.

Source: Yuan et al. 2021 (CeiT), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastvit.kernels._depthwise_prologue import (
    FOLD_BLOCK,
    Config,
    Epilogue,
    chip,
    choose_configs,
    depthwise_tile,
    fold_taps,
    scale_and_offset,
    weight_tile,
)
from fastvit.kernels._primitives import has_aligned_rows, input_precision, product_kind
from fastvit.kernels._tokens import MAX_TILE_ROWS, gelu, load_vector, locate_rows, with_small_row_strides
from torch import Tensor

from fastvit import autotune

# Keyed and tested like the table of _depthwise_prologue.py.
EXPAND: dict[str, tuple[Config, ...]] = {
    "half": (Config(64, 64, 32, 4, 2), Config(128, 128, 32, 8, 3)),
    "tf32": (Config(64, 64, 32, 4, 1),),
    "ieee": (Config(64, 32, 16, 4, 2),),
}
"""The second candidate is for aligned rows only."""


def choose_expand_configs(product: str, *, regular: bool) -> tuple[Config, ...]:
    """The candidates for the first GEMM, wide ones first; regular: all tensors have aligned rows."""
    return EXPAND[product][::-1] if regular else EXPAND[product][:1]


@triton.jit
def leff_fold_kernel(up, taps, dw, down, folded, folded_down, E, num_out, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """folded (TAPS + 3, E): scaled taps, then the convolution's offset, then the expansion's scale and offset.

    folded_down (2, num_out): the contraction's scale and offset.
    """
    blocks = tl.cdiv(E, BLOCK)
    program = tl.program_id(0)
    if program < blocks:
        channels = program * BLOCK + tl.arange(0, BLOCK)
        within = channels < E
        fold_taps(taps, dw, folded, program * BLOCK, E, TAPS, BLOCK)
        scale, offset = scale_and_offset(up, program * BLOCK, E, BLOCK)
        tl.store(folded + (TAPS + 1) * E + channels, scale, mask=within)
        tl.store(folded + (TAPS + 2) * E + channels, offset, mask=within)
    else:
        first = (program - blocks) * BLOCK
        channels = first + tl.arange(0, BLOCK)
        scale, offset = scale_and_offset(down, first, num_out, BLOCK)
        tl.store(folded_down + channels, scale, mask=channels < num_out)
        tl.store(folded_down + num_out + channels, offset, mask=channels < num_out)


@triton.jit
def _scaled(acc, folded, first, size, BLOCK: tl.constexpr):
    """acc [rows, BLOCK columns from first on] * scale + offset; folded is these two rows."""
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
    """h [BLOCK_M grid tokens, counted over all images, BLOCK_N of the E channels]."""
    blocks = tl.cdiv(E, BLOCK_N)
    program = tl.program_id(0)
    first_column = (program % blocks) * BLOCK_N
    first_image, image, token, exists = locate_rows((program // blocks) * BLOCK_M, num_rows, grid_tokens, BLOCK_M)
    x += first_image * stride_xb
    out += first_image * (grid_tokens * E)
    source = image * stride_xb + (prefix_tokens + token) * stride_xn
    target = (image * grid_tokens + token) * E
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        channels = k + tl.arange(0, BLOCK_K)
        inside = exists[:, None] & (channels < C)[None, :]
        left = tl.load(x + (source[:, None] + channels[None, :]), mask=inside, other=0)
        right = weight_tile(weight, first_column, k, E, C, BLOCK_N, BLOCK_K)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc = gelu(_scaled(acc, folded + (TAPS + 1) * E, first_column, E, BLOCK_N))
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = exists[:, None] & (columns < E)[None, :]
    tl.store(out + (target[:, None] + columns[None, :]), acc.to(out.dtype.element_ty), mask=inside)


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
    """Apply the epilogue, replace prefix tokens by what the form asks for, and write [BLOCK_M tokens, BLOCK_N]."""
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
    """out [BLOCK_M tokens, counted over all images, BLOCK_N + BLOCK_N2 of the num_out channels]."""
    blocks = tl.cdiv(num_out, BLOCK_N + BLOCK_N2)
    program = tl.program_id(0)
    first_column = (program % blocks) * (BLOCK_N + BLOCK_N2)
    tokens = prefix_tokens + height * width
    first_image, image, token, exists = locate_rows((program // blocks) * BLOCK_M, num_rows, tokens, BLOCK_M)
    x += first_image * stride_xb
    out += first_image * (tokens * num_out)
    h += first_image * (height * width * E)
    position = token - prefix_tokens
    row = tl.where(exists & (position >= 0), position // width, -1)
    column = position % width
    origin = (image * (height * width) + position) * E

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2 != 0:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    for k in range(0, E, BLOCK_K):
        left = depthwise_tile(
            h, E, folded, origin, row, column, height, width, k, E, KERNEL // 2, KERNEL, BLOCK_M, BLOCK_K
        )  # fmt: skip
        left = gelu(left).to(h.dtype.element_ty)
        right = weight_tile(weight, first_column, k, num_out, E, BLOCK_N, BLOCK_K)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if BLOCK_N2 != 0:
            right2 = weight_tile(weight, first_column + BLOCK_N, k, num_out, E, BLOCK_N2, BLOCK_K)
            acc2 = tl.dot(left, right2, acc2, input_precision=PRECISION)

    source = image * stride_xb + token * stride_xn
    target = (image * tokens + token) * num_out
    from_x = exists & (token < prefix_tokens)
    _finish(acc, folded_down, x, out, target, source, from_x, exists, first_column, num_out, PAPER, BLOCK_N)
    if BLOCK_N2 != 0:
        _finish(
            acc2, folded_down, x, out, target, source, from_x, exists, first_column + BLOCK_N, num_out, PAPER, BLOCK_N2
        )


def _fold(up: Epilogue, dw_weight: Tensor, dw: Epilogue, down: Epilogue, num_out: int) -> tuple[Tensor, Tensor]:
    """Launch :func:`leff_fold_kernel`."""
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
        PRECISION=precision,
        **config.options(),
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
        BLOCK_N2=config.block_n2,
        PRECISION=precision,
        **config.options(),
    )


def _check_offsets(tokens: int, weights: tuple[Tensor, Tensor]) -> None:
    """ValueError where offsets within an image or a weight exceed 32 bits."""
    widest = max(weights[0].shape[0], weights[1].shape[0])
    if (tokens + MAX_TILE_ROWS // 2) * widest >= 2**30 or any(weight.numel() >= 2**31 for weight in weights):
        raise ValueError(
            f"x: expected at most 2^30 elements per image of the expansion and of the output, and 2^31 per weight, got "
            f"{tokens} tokens and weights {[tuple(weight.shape) for weight in weights]}"
        )


def leff_forward(
    x: Tensor,
    up_weight: Tensor,
    up_epilogue: Epilogue,
    dw_weight: Tensor,
    dw_epilogue: Epilogue,
    down_weight: Tensor,
    down_epilogue: Epilogue,
    grid: tuple[int, int],
    prefix_tokens: int,
    paper: bool,
    *,
    expand: Config | None = None,
    contract: Config | None = None,
) -> Tensor:
    """Launch the kernels.

    Args:
        x: (B, P + h*w, C); float32, float16 or bfloat16; copied where channels are not of stride 1.
        up_weight: (E, C) and down_weight: (O, E), in x's dtype; O = C where there are prefix tokens.
        dw_weight: (E, 1, k, k), zero padding k // 2; k is 1 or 3, more taps spill registers. It and the vectors may be
            float32 with x in half precision. All contiguous.
        up_epilogue, dw_epilogue, down_epilogue: vectors of (E,), (E,) and (O,), or None.
        grid: (h, w). prefix_tokens: P.
        paper: whether prefix tokens give zeros and a GELU follows; else prefix tokens pass through.
        expand, contract: configurations instead of the autotuned ones.

    Returns:
        (B, P + h*w, O), contiguous.

    Raises:
        ValueError: an image or a weight with more elements than 32-bit offsets allow.
    """
    batch, tokens, channels = x.shape
    expansion, kernel = up_weight.shape[0], dw_weight.shape[-1]
    _check_offsets(tokens, (up_weight, down_weight))
    out = torch.empty((batch, tokens, down_weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    product = product_kind(x.dtype)
    with torch.cuda.device_of(x):
        x = with_small_row_strides(x)
        h = torch.empty((batch, grid[0] * grid[1], expansion), dtype=x.dtype, device=x.device)
        folded, folded_down = _fold(up_epilogue, dw_weight, dw_epilogue, down_epilogue, out.shape[2])
        regular, precision = has_aligned_rows(x, up_weight, down_weight, out), input_precision(product)
        key = (
            x.dtype,
            precision,
            channels,
            expansion,
            out.shape[2],
            kernel,
            regular,
            autotune.token_bucket(batch * tokens),
        )

        def run_expand(config: Config) -> None:
            _launch_expand(config, x, up_weight, folded, h, prefix_tokens, precision)

        def run_contract(config: Config) -> None:
            _launch_contract(config, h, folded, down_weight, folded_down, x, out, grid, kernel, paper, precision)

        candidates = choose_expand_configs(product, regular=regular)
        run_expand(expand or autotune.choose("leff_expand", key, candidates, run_expand))
        candidates = choose_configs(product, out.shape[2], regular=regular, chip=chip())
        run_contract(contract or autotune.choose("leff_contract", key, candidates, run_contract))
    return out


def leff_operator(a: Any) -> Tensor:
    """The operator ``fastvit::leff_triton``."""
    up, dw, down = (Epilogue.of(a, name) for name in ("up", "dw", "down"))
    layers = a.up_weight, up, a.dw_weight, dw, a.down_weight, down
    return leff_forward(a.x, *layers, (a.height, a.width), a.prefix_tokens, a.paper)
