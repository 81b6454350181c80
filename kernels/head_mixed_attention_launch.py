"""Launching the kernels of head-mixed attention: their arguments, compile-time plans, and the row statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import (
    FULL_MASK,
    KEY_MASK,
    NO_MASK,
    empty_heads_last,
    has_aligned_rows,
    product_kind,
    with_small_strides,
)
from fastvit.kernels.head_mixed_attention_configs import (
    AMD_SHARED,
    SMALLEST_SHARED,
    Config,
    configurations,
    pressure_of,
)
from fastvit.kernels.head_mixed_attention_maps import Heads, Mask, Mixes, Plan, Rows, row_statistics_kernel
from torch import Tensor

from fastvit import autotune

MIN_SLOTS = 16
"""Rows of a tensor core instruction."""

Result = TypeVar("Result")


@triton.jit(do_not_specialize=["num_rows"])
def pad_kernel(
    tensor, padded, stride_b, stride_h, stride_n, stride_d, num_rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy 64 rows of a (B, H, N, HEAD_DIM) of any strides to a contiguous (B, N, H, COLUMNS), zeros behind them."""
    SIDE: tl.constexpr = triton.next_power_of_2(COLUMNS)
    b = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * 64 + tl.arange(0, 64))[:, None]
    columns = tl.arange(0, SIDE)[None, :]
    source = tensor + b * stride_b + (rows // HEADS).to(tl.int64) * stride_n + (rows % HEADS).to(tl.int64) * stride_h
    inside = rows < num_rows
    tile = tl.load(source + columns * stride_d, mask=inside & (columns < HEAD_DIM), other=0)
    place = padded + (b * num_rows + rows) * COLUMNS
    tl.store(place + columns, tile, mask=inside & (columns < COLUMNS))


def as_operand(tensor: Tensor) -> Heads:
    """A (B, H, N, D) tensor to load tiles from: in place where its rows are aligned, else a padded copy.

    Every tile of q, k and v is loaded many times: one copy costs less than loading unaligned rows element by element.
    """
    if not has_aligned_rows(tensor):
        batch, heads, tokens, head_dim = tensor.shape
        columns = padded_dim(head_dim)
        padded = tensor.new_empty((batch, tokens, heads, columns)).transpose(1, 2)
        with torch.cuda.device_of(tensor):
            pad_kernel[triton.cdiv(tokens * heads, 64), batch](
                tensor, padded, *tensor.stride(), tokens * heads, HEADS=heads, HEAD_DIM=head_dim, COLUMNS=columns
            )
        tensor = padded
    return as_heads(with_small_strides(tensor))


def padded_dim(head_dim: int) -> int:
    """The head dimension of an operand, padded to whole vectors."""
    return -(-head_dim // 16) * 16


def as_heads(tensor: Tensor) -> Heads:
    """A (B, H, N, D) tensor with columns of stride 1, as an argument of kernels."""
    return Heads(tensor, *tensor.stride()[:3])


def _as_mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Mask | None, int]:
    if mask is None:
        return None, NO_MASK
    mask = with_small_strides(mask.view(torch.uint8).expand(shape))
    kind = KEY_MASK if mask.stride(1) == mask.stride(2) == 0 else FULL_MASK
    return Mask(mask, *mask.stride()), kind


class Problem:
    """q, k, mask and parameters of one call, as arguments of kernels.

    Arguments as in :func:`fastvit.kernels.head_mixed_attention.head_mixed_attention_forward`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float,
        pre_weight: Tensor | None = None,
        pre_bias: Tensor | None = None,
        post_weight: Tensor | None = None,
        post_bias: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 0.0,
        layer_norm: bool = False,
        output_scale: float = 1.0,
        centred: bool = False,
    ) -> None:
        self.shape = (*q.shape[:3], k.shape[2])
        self.batch, self.heads, self.num_queries, self.num_keys = self.shape
        self.head_dim = q.shape[3]
        self.empty = q.numel() == 0 or k.numel() == 0
        self.like, self.device, self.dtype = q, q.device, q.dtype
        self.q, self.k = as_operand(q), as_operand(k)
        self.mask, self.mask_kind = _as_mask(mask, self.shape)
        parameters = (pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias)
        contiguous = (None if tensor is None else tensor.contiguous() for tensor in parameters)
        # float: Triton would specialise the kernel on an int 1.
        centre = 1.0 / max(self.num_keys, 1) if centred else 0.0
        self.mixes = Mixes(*contiguous, float(norm_eps), float(output_scale), float(scale), centre)
        self.layer_norm = layer_norm
        self.product = product_kind(q.dtype)

    def plan(self, config: Config, *, spread_keys: bool = False, heads: int | None = None) -> Plan:
        """The compile-time settings of a kernel with ``heads`` heads per program, by default all."""
        heads = self.heads if heads is None else heads
        padded, columns = triton.next_power_of_2(heads), padded_dim(self.head_dim)
        exact = config.exact or self.product == "ieee"
        amd = torch.version.hip is not None  # its matrix instructions take float32
        block_out = min(config.block_out, triton.next_power_of_2(columns))
        return Plan(
            heads=heads,
            head_dim=self.head_dim,
            padded_dim=columns,
            padded_heads=padded,
            slots=padded if heads == 1 else max(padded, MIN_SLOTS),
            block_m=config.block_m,
            block_n=config.block_n,
            depth=32 if config.resident and columns % 32 == 0 else 16,
            resident=config.resident,
            block_out=block_out,
            block_rest=config.block_rest if 0 < columns - block_out <= config.block_rest else 0,
            spread_keys=spread_keys,
            mask_kind=self.mask_kind,
            pre_mix=self.mixes.pre_weight is not None,
            post_mix=self.mixes.post_weight is not None,
            layer_norm=self.layer_norm,
            exact=exact,
            precision="tf32" if self.product == "tf32" and not exact else "ieee",
            mix_precision="ieee" if exact or amd else "tf32",
        )

    def run(self, kernel: str, launch: Callable[[Config], Result], *, one_head: bool = False) -> Result:
        """The results of ``launch``, which allocates them, with the autotuned configuration."""
        heads = 1 if one_head else self.heads
        pressure = pressure_of(
            pre_mix=self.mixes.pre_weight is not None,
            layer_norm=self.layer_norm,
            full_mask=self.mask_kind == FULL_MASK,
        )
        candidates = configurations(kernel, heads, self.head_dim, self.product, pressure, shared_limit(self.device))
        with torch.cuda.device_of(self.like):
            key = (
                self.dtype,
                self.product,
                heads,
                self.head_dim,
                *map(autotune.token_bucket, (self.num_keys, self.batch * self.num_queries)),
                self.mask_kind,
                *(tensor is not None for tensor in self.mixes[:4]),
                self.layer_norm,
            )
            return launch(autotune.choose(kernel, key, candidates, launch))

    def row_statistics(self) -> Rows:
        """Maximum, reciprocal sum and log-sum-exp of each row of the maps; delta is uninitialised."""
        one_head = self.mixes.pre_weight is None

        def launch(config: Config) -> Rows:
            plan = self.plan(config, heads=1 if one_head else self.heads)
            rows = Rows(*torch.empty((4, *self.shape[:3]), dtype=torch.float32, device=self.device).unbind(0))
            grid = (programs(self.batch, self.num_queries, plan.block_m, plan), self.heads // plan.heads)
            row_statistics_kernel[grid](
                self.q, self.k, self.mask, self.mixes, rows, self.heads, self.num_queries, self.num_keys,
                PLAN=plan, **options(config),
            )  # fmt: skip
            return rows

        return self.run("row_statistics", launch, one_head=one_head)

    def new_heads(self, tokens: int) -> Tensor:
        """An uninitialised (B, H, tokens, D) with the strides of a contiguous (B, tokens, H, D)."""
        return empty_heads_last(self.like, tokens)

    def new_parts(self, plan: Plan, count: int, axes: int) -> Tensor:
        """Uninitialised partial sums of ``count`` programs, a vector or matrix over slots each."""
        return torch.empty((count, *(plan.slots,) * axes), dtype=torch.float32, device=self.device)

    def sum_of_parts(self, parts: Tensor | None, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum over programs and groups of slots, in a fixed order: (H, H) or (H), (0) for None."""
        if parts is None:
            return torch.empty(0, dtype=dtype, device=self.device)
        groups = (plan.slots // plan.padded_heads, plan.padded_heads)
        total = parts.sum(0, dtype=torch.float64)
        if total.dim() == 2:
            total = total.view(*groups, *groups).diagonal(dim1=0, dim2=2).sum(-1)[: self.heads, : self.heads]
        else:
            total = total.view(groups).sum(0)[: self.heads]
        return total.to(dtype)

    def zeros(self, parameter: Tensor | None) -> Tensor:
        """A zero gradient of a parameter, (0) for None."""
        shape = (0,) if parameter is None else parameter.shape
        return torch.zeros(shape, dtype=torch.float32, device=self.device)


def options(config: Config) -> dict[str, int]:
    """Compiler options. maxnreg is as high as it can be: left alone, ptxas may use fewer registers and spill."""
    registers = {} if torch.version.hip is not None else {"maxnreg": min(255, 65536 // (32 * config.num_warps))}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **registers}


def programs(batch: int, num_rows: int, block: int, plan: Plan) -> int:
    """The number of programs over the rows (queries or keys) of a batch; ``block`` is rows per group of slots."""
    return batch * triton.cdiv(num_rows, block * (plan.slots // plan.padded_heads))


def column_blocks(plan: Plan) -> int:
    """The number of programs over the columns of a result."""
    return triton.cdiv(plan.head_dim - plan.block_rest, plan.block_out)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory per program; the smallest limit where there is no GPU."""
    if device.type != "cuda":
        return SMALLEST_SHARED
    if torch.version.hip is not None:
        return AMD_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
