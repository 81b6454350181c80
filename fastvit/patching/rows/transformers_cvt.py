"""Hugging Face transformers' CvT: its attention, the convolutions of its projections, and its MLP.

transformers itself is never imported here.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, fused_backend, is_fused, plain_class
from fastvit.patching.rows.parts import (
    check_attributes,
    check_depthwise,
    check_linear,
    check_parameters,
    dropout_p,
    is_plain_of,
    project,
)
from fastvit.patching.rows.transformers import (
    LAYER_NAMES,
    SELF_OUTPUT_NAMES,
    check_layer,
    check_self_output,
    layers_of,
    unknown_names,
)
from fastvit.reference.functional import BatchNorm, Projection
from fastvit.reference.overrides import is_plain


class CvtSelfOutputOverride(Fused):
    """The same under CvT's names."""

    fastvit_op = "linear"
    fastvit_reads: ClassVar = {"dense": nn.Linear}

    def forward(self, hidden_state: Tensor, input_tensor: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, hidden_state, input_tensor)
        return self.dropout(project(self.dense, hidden_state, backend))


class CvtLayerOverride(Fused):
    """``CvtLayer``, likewise."""

    fastvit_op = "mlp"

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        backend = fused_backend(self)
        layers = None if backend is None else layers_of(self)
        if backend is None or layers is None or not layers.fusible():
            return plain_class(self).forward(self, hidden_state, height, width)
        attended = self.attention(self.layernorm_before(hidden_state), height, width)
        hidden_state = self.drop_path(attended) + hidden_state
        out = layers.run(self.layernorm_after(hidden_state), backend) + hidden_state
        return self.drop_path(out)


class CvtProjectionOverride(Fused):
    """CvT's depthwise convolution and BatchNorm, of the tokens that the map given is a view of."""

    fastvit_op = "conv_projection"

    def forward(self, hidden_state: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None or not _projects_plainly(self):
            return plain_class(self).forward(self, hidden_state)
        conv = self.convolution_projection.convolution
        return ops.token_depthwise_conv(
            hidden_state.flatten(2).transpose(1, 2),  # back to the tokens as they lie: no copy
            conv.weight,
            conv.bias,
            grid=tuple(hidden_state.shape[2:]),
            stride=conv.stride[0],
            padding=conv.padding[0],
            norm=BatchNorm.of(self.convolution_projection.normalization),
            backend=backend,
        )


class CvtAttentionOverride(Fused):
    """CvT's attention behind its projections, without the maps; logits are scaled by the full width ** -0.5."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"dropout": nn.Dropout}

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, hidden_state, height, width)
        projected = _cvt_projections(self, hidden_state, height, width, backend)
        query, key, value = map(self.rearrange_for_multi_head_attention, projected)
        out = ops.masked_attention(
            query, key, value, scale=self.scale, dropout_p=dropout_p(self.dropout), backend=backend
        )
        return out.transpose(1, 2).flatten(2)


def _cvt_projections(module: Any, hidden_state: Tensor, height: int, width: int, backend: str) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, N, C), from one reading of the tokens where no part in between is to be called."""
    parts = {
        name: (getattr(module, f"convolution_projection_{name}"), getattr(module, f"projection_{name}"))
        for name in ("key", "query", "value")
    }
    if all(_is_projection(*part, backend) for part in parts.values()):
        key, query, value = (_as_projection(*part) for part in parts.values())
        prefix_tokens = int(module.with_cls_token)
        return ops.conv_projection(
            hidden_state, query, key, value, grid=(height, width), prefix_tokens=prefix_tokens, backend=backend
        )
    prefix, tokens = None, hidden_state
    if module.with_cls_token:
        prefix, tokens = hidden_state.split([1, height * width], 1)
    grid = tokens.transpose(1, 2).view(tokens.shape[0], tokens.shape[2], height, width)
    key, query, value = (project(_behind(prefix, convolve(grid))) for convolve, project in parts.values())
    return query, key, value


def _is_projection(convolution: Any, linear: nn.Module, backend: str) -> bool:
    """Whether a projection's parts do no more than their tensors tell, and are fused as the attention is."""
    fused = isinstance(convolution, CvtProjectionOverride) and is_fused(convolution, backend)
    return fused and _projects_plainly(convolution) and is_plain(linear, nn.Linear)


def _as_projection(convolution: Any, linear: Any) -> Projection:
    conv, norm = convolution.convolution_projection.convolution, convolution.convolution_projection.normalization
    weights = (conv.weight, BatchNorm.of(norm), linear.weight, linear.bias)
    return Projection(*weights, conv.stride[0], conv.padding[0], conv.bias)


def _behind(prefix: Tensor | None, tokens: Tensor) -> Tensor:
    return tokens if prefix is None else torch.cat((prefix, tokens), dim=1)


def _projects_plainly(module: nn.Module) -> bool:
    """Whether what the fused projection reads, or leaves out, is still of the plain classes without hooks."""
    inner, last = module.convolution_projection, module.linear_projection
    return (
        is_plain_of(inner, "transformers")
        and is_plain_of(last, "transformers")
        and is_plain(inner.convolution, nn.Conv2d)
        and is_plain(inner.normalization, nn.BatchNorm2d)
    )


_INNER_FORWARDS = {
    "convolution_projection": frozenset({"convolution", "normalization"}),
    "linear_projection": frozenset({"shape", "view", "permute"}),
}
"""By part of CvT's projection, the names its forward uses."""


def _check_projection(module: nn.Module) -> list[str]:
    found = check_attributes(module, *_INNER_FORWARDS)
    if found:
        return [*found, "fused are depthwise convolutions with BatchNorm (qkv_projection_method 'dw_bn')"]
    found = unknown_names(module, _INNER_FORWARDS)
    if found:
        return found
    inner = module.convolution_projection
    found = check_depthwise("convolution", inner.convolution, inner.normalization)
    return found if found or _projects_plainly(module) else ["its parts have forward hooks, which would not be called"]


def _check_cvt_attention(module: nn.Module) -> list[str]:
    found = check_attributes(module, "num_heads", "embed_dim", "scale", "with_cls_token")
    found = found or check_parameters(module, "hidden_state", "height", "width")
    if found:
        return found
    for name in ("query", "key", "value"):
        found += check_attributes(module, f"convolution_projection_{name}")
        found += check_linear(module, f"projection_{name}", module.embed_dim)
    return found


# Every global and attribute name that the forwards of the versions read (4.57 and 5.23) use.
_CVT_PROJECTION_NAMES = frozenset({"convolution_projection", "linear_projection"})
_CVT_ATTENTION_NAMES = frozenset(
    {
        "with_cls_token",
        "torch",
        "split",
        "shape",
        "permute",
        "view",
        "convolution_projection_key",
        "convolution_projection_query",
        "convolution_projection_value",
        "cat",
        "embed_dim",
        "num_heads",
        "rearrange_for_multi_head_attention",
        "projection_query",
        "projection_key",
        "projection_value",
        "einsum",
        "scale",
        "nn",
        "functional",
        "softmax",
        "dropout",
        "contiguous",
    }
)


_CVT = "transformers.models.cvt.modeling_cvt"

ROWS = (
    Row(
        f"{_CVT}.CvtSelfAttentionProjection",
        CvtProjectionOverride,
        _check_projection,
        _CVT_PROJECTION_NAMES,
    ),
    Row(
        f"{_CVT}.CvtLayer",
        CvtLayerOverride,
        functools.partial(check_layer, parameters=("hidden_state", "height", "width")),
        LAYER_NAMES,
    ),
    Row(f"{_CVT}.CvtSelfOutput", CvtSelfOutputOverride, check_self_output, SELF_OUTPUT_NAMES),
    Row(f"{_CVT}.CvtSelfAttention", CvtAttentionOverride, _check_cvt_attention, _CVT_ATTENTION_NAMES),
)
