"""Depthwise-separable convolution at inference: convolution and BatchNorm fused into the linear layer's prologue.

    out = norm(depthwise(x) + db) w^T + b    on the grid tokens, (B, P + h'*w', O);  x w^T + b on the prefix tokens

CvT's projections are three of these, on one x.

Tiling:

- ``fold_kernel``: bias and norm, whose statistics are given, are folded into the taps and an offset.
- ``separable_kernel``: one program computes out [BLOCK_M tokens, BLOCK_N (+ BLOCK_N2)] in a loop over BLOCK_K channels
  of x. It computes their convolution in registers, as the GEMM's left operand (``_depthwise_prologue.py``). The rows
  include prefix tokens, whose left operand is x itself.

The GEMM takes the input dtype (float32 as true float32, or TF32 where PyTorch's setting allows it) and accumulates in
float32; everything else is float32.

Source: Wu et al. 2021 (CvT), section 3.2.
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
    weight_tile,
)
from fastvit.kernels._primitives import has_aligned_rows, input_precision, product_kind
from fastvit.kernels._tokens import MAX_TILE_ROWS, load_vector, locate_rows, with_small_row_strides
from torch import Tensor

from fastvit import autotune


@triton.jit
def fold_kernel(taps, epilogue, folded, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """folded (TAPS + 1, C): scaled taps, then the offset."""
    fold_taps(taps, epilogue, folded, tl.program_id(0) * BLOCK, C, TAPS, BLOCK)


@triton.jit
def _store(acc, bias, out, target, exists, first_column, num_out, BLOCK_N: tl.constexpr):
    """Add the bias and write [BLOCK_M tokens, BLOCK_N]."""
    columns = first_column + tl.arange(0, BLOCK_N)
    acc += load_vector(bias, first_column, num_out, BLOCK_N)[None, :]
    inside = exists[:, None] & (columns < num_out)[None, :]
    tl.store(out + (target[:, None] + columns[None, :]), acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["prefix_tokens", "height", "width", "out_width", "tokens", "num_rows"])
def separable_kernel(
    x,
    folded,
    weight,
    bias,
    out,
    stride_xb,
    stride_xn,
    prefix_tokens,
    height,
    width,
    out_width,
    tokens,
    num_rows,
    C,
    num_out,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [BLOCK_M tokens, counted over all images, BLOCK_N + BLOCK_N2 of the num_out channels].

    tokens: those of one image of out, prefix tokens included. PREFIX: whether there are prefix tokens.
    """
    blocks = tl.cdiv(num_out, BLOCK_N + BLOCK_N2)
    program = tl.program_id(0)
    first_column = (program % blocks) * (BLOCK_N + BLOCK_N2)
    first_image, image, token, exists = locate_rows((program // blocks) * BLOCK_M, num_rows, tokens, BLOCK_M)
    x += first_image * stride_xb
    out += first_image * (tokens * num_out)
    position = token - prefix_tokens
    row = tl.where(exists & (position >= 0), position // out_width * STRIDE, -1)
    column = position % out_width * STRIDE
    origin = image * stride_xb + (prefix_tokens + row * width + column) * stride_xn
    from_x = exists & (token < prefix_tokens)
    source = image * stride_xb + token * stride_xn

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2 != 0:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    for k in range(0, C, BLOCK_K):
        left = depthwise_tile(
            x, stride_xn, folded, origin, row, column, height, width, k, C, PADDING, KERNEL, BLOCK_M, BLOCK_K
        ).to(x.dtype.element_ty)  # fmt: skip
        if PREFIX:
            channels = k + tl.arange(0, BLOCK_K)
            inside = from_x[:, None] & (channels < C)[None, :]
            prefix = tl.load(x + (source[:, None] + channels[None, :]), mask=inside, other=0)
            left = tl.where(from_x[:, None], prefix, left)
        right = weight_tile(weight, first_column, k, num_out, C, BLOCK_N, BLOCK_K)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if BLOCK_N2 != 0:
            right2 = weight_tile(weight, first_column + BLOCK_N, k, num_out, C, BLOCK_N2, BLOCK_K)
            acc2 = tl.dot(left, right2, acc2, input_precision=PRECISION)

    target = (image * tokens + token) * num_out
    _store(acc, bias, out, target, exists, first_column, num_out, BLOCK_N)
    if BLOCK_N2 != 0:
        _store(acc2, bias, out, target, exists, first_column + BLOCK_N, num_out, BLOCK_N2)


def _fold(dw_weight: Tensor, epilogue: Epilogue) -> Tensor:
    """Launch :func:`fold_kernel`."""
    channels, taps = dw_weight.shape[0], dw_weight.shape[-1] ** 2
    folded = torch.empty((taps + 1, channels), dtype=torch.float32, device=dw_weight.device)
    fold_kernel[(triton.cdiv(channels, FOLD_BLOCK),)](
        dw_weight, epilogue, folded, channels, TAPS=taps, BLOCK=FOLD_BLOCK, num_warps=4
    )
    return folded


def depthwise_separable_conv_forward(
    x: Tensor,
    dw_weight: Tensor,
    epilogue: Epilogue,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    grid: tuple[int, int],
    stride: int,
    padding: int,
    prefix_tokens: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """Launch the kernels.

    Args:
        x: (B, P + h*w, C); float32, float16 or bfloat16; copied where channels are not of stride 1.
        dw_weight: (C, 1, k, k); k is 1 or 3, more taps spill registers. epilogue: the convolution's, vectors of (C,) or
            None. pw_weight: (O, C), in x's dtype. pw_bias: (O,) or None. All but pw_weight may be float32 with x in
            half precision. All contiguous.
        grid: (h, w). stride, padding: of the convolution. prefix_tokens: P.
        config: instead of the autotuned one.

    Returns:
        (B, P + h'*w', O), contiguous, with h' = (h + 2 * padding - k) // stride + 1, likewise w'.

    Raises:
        ValueError: an image or a weight with more elements than 32-bit offsets allow.
    """
    batch, _, channels = x.shape
    kernel, width = dw_weight.shape[-1], pw_weight.shape[0]
    out_height, out_width = ((size + 2 * padding - kernel) // stride + 1 for size in grid)
    tokens = prefix_tokens + out_height * out_width
    if (tokens + MAX_TILE_ROWS // 2) * width >= 2**30 or pw_weight.numel() >= 2**31:
        raise ValueError(
            "x: expected at most 2^30 elements per image of the output and 2^31 per weight, got "
            f"{tokens} tokens and weight {tuple(pw_weight.shape)}"
        )
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    product = product_kind(x.dtype)
    with torch.cuda.device_of(x):
        x = with_small_row_strides(x)
        folded = _fold(dw_weight, epilogue)
        regular, precision = has_aligned_rows(x, pw_weight, out), input_precision(product)

        def launch(config: Config) -> None:
            rows = triton.cdiv(batch * tokens, config.block_m)
            separable_kernel[(rows * triton.cdiv(width, config.block_n + config.block_n2),)](
                x,
                folded,
                pw_weight,
                pw_bias,
                out,
                x.stride(0),
                x.stride(1),
                prefix_tokens,
                *grid,
                out_width,
                tokens,
                batch * tokens,
                channels,
                width,
                KERNEL=kernel,
                STRIDE=stride,
                PADDING=padding,
                PREFIX=prefix_tokens > 0,
                BLOCK_N2=config.block_n2,
                PRECISION=precision,
                **config.options(),
            )

        candidates = choose_configs(product, width, regular=regular, chip=chip())
        key = (x.dtype, precision, channels, width, kernel, stride, padding, regular, prefix_tokens > 0)
        launch(
            config or autotune.choose("separable", (*key, autotune.token_bucket(batch * tokens)), candidates, launch)
        )
    return out


def depthwise_separable_conv_operator(a: Any) -> Tensor:
    """The operator ``fastvit::depthwise_separable_conv_triton``."""
    geometry = (a.height, a.width), a.stride, a.padding, a.prefix_tokens
    return depthwise_separable_conv_forward(a.x, a.dw_weight, Epilogue.of(a, "dw"), a.pw_weight, a.pw_bias, *geometry)
