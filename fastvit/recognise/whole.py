"""Torch's own functions of which one call holds a whole chain, handed to the operators: attention, depthwise conv2d."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.recognise.chain import FEW_QUERIES, BreaksOff, break_off

__all__ = ["CONVOLUTIONS", "WHOLE"]

Whole = Callable[[str], Any]
"""Computes the call by an operator with this backend."""


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[str, Whole]:
    """The operator and the call for ``F.scaled_dot_product_attention``; BreaksOff for what they do not take."""
    if is_causal or enable_gqa:
        break_off("causal masks and grouped heads are left to torch")
    if dropout_p:
        break_off("attention dropout is active, which is drawn as the plain code draws it")
    if query.shape[-1] != key.shape[-1] or key.shape[:-1] != value.shape[:-1] or not 3 <= query.dim() == key.dim():
        break_off(f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype or 0 in query.shape or 0 in key.shape:
        break_off("queries, keys and values differ in dtype, or are empty")
    lead = query.shape[:-2]
    if any(size not in (1, of_query) for size, of_query in zip(key.shape[:-2], lead, strict=True)):
        break_off(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} differ in batch or heads")
    if not query.is_floating_point():
        break_off(f"queries of {query.dtype}")
    front = () if attn_mask is None else attn_mask.shape[:-2]
    sizes = zip(reversed(front), reversed(lead), strict=False)
    if len(front) > (2 if len(lead) == 2 else 1) or any(size not in (1, of_query) for size, of_query in sizes):
        break_off(f"a mask of {len(front) + 2} axes for queries {tuple(query.shape)}")
    if not _all_kernels_allowed():
        break_off("sdpa_kernel chooses among torch's own kernels")
    mask, bias = _mask_and_bias(attn_mask, query)
    few = query.shape[-2] <= FEW_QUERIES < key.shape[-2]
    attention = ops.class_attention if few else ops.masked_attention

    def run(backend: str) -> Tensor:
        q, k, v = query, key, value
        if k.shape[:-2] != lead:
            k, v = (each.expand(*lead, *each.shape[-2:]) for each in (k, v))
        if len(lead) != 2:
            q, k, v = (tensor.reshape(-1, *tensor.shape[-3:]) for tensor in (q, k, v))
        width, values = q.shape[-1], v.shape[-1]
        if width != values:
            q, k, v = (F.pad(each, (0, max(width, values) - each.shape[-1])) for each in (q, k, v))
        factor = width**-0.5 if scale is None else scale
        out = attention(q, k, v, mask=mask, bias=bias, scale=factor, backend=backend)
        out = out[..., :values] if values < width else out
        return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])

    return "class_attention" if few else "masked_attention", run


def _all_kernels_allowed() -> bool:
    return (
        torch._C._get_flash_sdp_enabled()
        and torch._C._get_mem_efficient_sdp_enabled()
        and torch._C._get_math_sdp_enabled()
    )


def _mask_and_bias(attn_mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if attn_mask is None:
        return None, None
    if attn_mask.dtype != torch.bool and attn_mask.dtype != query.dtype:
        break_off(f"a mask of {attn_mask.dtype} is added to logits of {query.dtype}")
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return (mask, None) if mask.dtype == torch.bool else (None, mask)


def multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[str, Whole]:
    """The operator and the call for ``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls."""
    if need_weights:
        break_off("it returns its map (need_weights=True)")
    if any(tensor is not None for tensor in (bias_k, bias_v, static_k, static_v)) or add_zero_attn:
        break_off("it appends keys of its own")
    if training and dropout_p:
        break_off("attention dropout is active, which is drawn as the plain code draws it")
    if is_causal or query.dim() != 3 or key.shape[:2] != value.shape[:2] or query.shape[1] != key.shape[1]:
        break_off("it is causal, or not called with (tokens, batch, channels)")
    width = query.shape[-1]
    if width != embed_dim_to_check or width % num_heads or torch.is_autocast_enabled(query.device.type):
        break_off(f"{width} channels of {embed_dim_to_check} for {num_heads} heads, or autocast")
    if 0 in query.shape or 0 in key.shape or not query.dtype == key.dtype == value.dtype:
        break_off("its inputs differ in dtype, or are empty")
    batch, keys = key.shape[1], key.shape[0]
    mask = bias = None
    for given, shape in ((attn_mask, None), (key_padding_mask, (batch, 1, 1, keys))):
        if given is None:
            continue
        if given.dtype not in (torch.bool, query.dtype):
            break_off(f"a mask of {given.dtype} is added to logits of {query.dtype}")
        if shape is None:
            shape = (1, 1, *given.shape) if given.dim() == 2 else (batch, num_heads, *given.shape[-2:])
            wanted = (query.shape[0], keys) if given.dim() == 2 else (batch * num_heads, query.shape[0], keys)
        else:
            wanted = (batch, keys)
        if tuple(given.shape) != wanted:
            break_off(f"a mask of shape {tuple(given.shape)}, expected is {wanted}")
        given = given.reshape(shape)
        if given.dtype == torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given

    def run(backend: str) -> tuple[Tensor, None]:
        if use_separate_proj_weight:
            weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        else:
            weights = in_proj_weight.chunk(3)  # type: ignore[union-attr]
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        if query is key and key is value and not use_separate_proj_weight:
            projected = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
        else:
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        q, k, v = (tensor.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for tensor in projected)
        out = ops.masked_attention(q, k, v, mask=mask, bias=bias, backend=backend)
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None

    return "masked_attention", run


def depthwise(
    input: Tensor,  # noqa: A002 (as torch names it)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[str, Whole] | None:
    """The operator and the call for a depthwise ``F.conv2d`` of tokens seen as an image; None for any other."""
    if groups == 1 or input.dim() != 4 or not groups == input.shape[1] == weight.shape[0]:
        return None
    channels, (height, width) = groups, input.shape[2:]
    stride, dilation = _only(stride), _only(dilation)
    if padding == "same" and weight.shape[-1] % 2 == 0:
        break_off("an even kernel is padded more on one side")
    padding = weight.shape[-1] // 2 if padding == "same" else 0 if padding == "valid" else _only(padding)
    if stride is None or padding is None or dilation != 1 or weight.shape[2] != weight.shape[3]:
        break_off("a depthwise convolution that is dilated, or not the same along both axes")
    if 0 in input.shape or input.dtype != weight.dtype:
        break_off(f"an input of {input.dtype} {tuple(input.shape)} for a weight of {weight.dtype}")
    if torch.is_autocast_enabled(input.device.type):
        break_off("autocast")
    along_w = input.stride(3)
    if input.stride(1) != 1 or along_w != channels or input.stride(2) != width * along_w:
        break_off("its input lies channel by channel, for which torch's own is made")
    rows, columns = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in (height, width))
    if rows < 1 or columns < 1:
        break_off(f"a kernel {tuple(weight.shape[2:])} is larger than its input {(height, width)}")

    def run(backend: str) -> Tensor:
        tokens, grid = input.flatten(2).transpose(1, 2), (height, width)
        out = ops.token_depthwise_conv(tokens, weight, bias, grid=grid, stride=stride, padding=padding, backend=backend)
        return out.transpose(1, 2).unflatten(2, (rows, columns))

    return "token_depthwise_conv", run


def _only(value: Any) -> int | None:
    """The number that stands for both axes; None where they differ."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else None


_SIGNATURES: dict[Callable[..., Any], Callable[..., tuple[str, Whole]]] = {
    F.scaled_dot_product_attention: scaled_dot_product,
    F.multi_head_attention_forward: multi_head,
}


def _reader(read: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    names = inspect.signature(read)

    def bound(args: Any, kwargs: Any) -> Any:
        try:
            names.bind(*args, **kwargs)
        except TypeError as error:
            raise BreaksOff(str(error)) from None
        return read(*args, **kwargs)

    return bound


WHOLE = {function: _reader(read) for function, read in _SIGNATURES.items()}
"""Attention: by function, how its arguments are read, as the operator's name and the call."""

CONVOLUTIONS = dict.fromkeys((F.conv2d, torch.conv2d), _reader(depthwise))
"""The same of convolutions; None where it is not depthwise."""
