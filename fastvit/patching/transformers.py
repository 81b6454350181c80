"""Hugging Face transformers' blocks: attention of ViT and DeiT (4.x and 5.x), CvT's convolutions and attention.

transformers itself is never imported here. The attention map that a ViT's attention returns beside its output is None
in the fused forwards, as it is with transformers' own ``sdpa`` interface; whoever wants the map
(``output_attentions=True``, a forward hook where the interface is ``eager``) gets the plain forward.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, intact, names_used
from fastvit.patching.parts import (
    as_mask_and_bias,
    check_attributes,
    check_depthwise,
    check_linear,
    check_parameters,
    dropout_p,
    forward_is_wrapped,
    is_plain,
)
from fastvit.reference.functional import BatchNorm, Projection

INTERFACES = ("eager", "sdpa")
"""The attention interfaces whose numbers the fused path gives."""

_OTHER_OUTPUTS = frozenset({"output_hidden_states", "return_dict"})
"""Arguments that reach the attention and do not concern it."""


def _wants_map(module: nn.Module) -> bool:
    """Whether somebody may want the map: transformers 4.x wraps the forward to collect it, and hooks are given it."""
    if forward_is_wrapped(module):
        return True
    hooked = any(not _leaves_map_alone(hook) for hook in module._forward_hooks.values())
    return hooked and module.config._attn_implementation == "eager"


def _leaves_map_alone(hook: object) -> bool:
    """Whether a hook is ours, or transformers' own (5.x), which stays for ever and listens to ``output_attentions``."""
    origin = getattr(getattr(hook, "func", hook), "__module__", None) or ""  # func: of a functools.partial
    return origin == "transformers.utils.output_capturing" or origin.startswith("fastvit.")


def _runs_plain(module: nn.Module) -> bool:
    config = module.config
    return (
        config._attn_implementation not in INTERFACES
        or bool(getattr(config, "output_attentions", False))
        or _wants_map(module)
    )


class AttentionSeam(Fused):
    """``ViTAttention`` and ``DeiTAttention`` of transformers 5: q, k, v, softmax(q k^T) v and the output projection."""

    fastvit_op = "masked_attention"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if _asks_for_more(kwargs) or _runs_plain(self) or not _is_usual_mask(self, attention_mask):
            return self.fastvit_plain.forward(self, hidden_states, attention_mask, **kwargs)
        sizes = hidden_states.shape[:-1]
        heads = (*sizes, -1, self.head_dim)
        mask, bias = as_mask_and_bias(attention_mask)
        out = ops.masked_attention(
            self.q_proj(hidden_states).view(heads).transpose(1, 2),
            self.k_proj(hidden_states).view(heads).transpose(1, 2),
            self.v_proj(hidden_states).view(heads).transpose(1, 2),
            mask,
            bias,
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.fastvit_backend,
        )
        return self.o_proj(out.transpose(1, 2).reshape(*sizes, -1)), None


def _asks_for_more(arguments: dict[str, Any]) -> bool:
    """Whether the caller wants anything but the usual output (``output_attentions``, a position bias, ...)."""
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    return not given <= _OTHER_OUTPUTS


def _is_usual_mask(module: nn.Module, mask: Tensor | None) -> bool:
    """The eager interface adds its mask whatever the dtype; the models give it an additive one."""
    if mask is None:
        return True
    return mask.dim() == 4 and (mask.is_floating_point() or module.config._attn_implementation == "sdpa")


class SelfAttentionSeam(Fused):
    """``ViTSelfAttention`` and ``DeiTSelfAttention`` of transformers 4; ``head_mask`` takes the plain path."""

    fastvit_op = "masked_attention"

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if head_mask is not None or _runs_plain(self):
            return self.fastvit_plain.forward(self, hidden_states, head_mask)
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, self.num_attention_heads, self.attention_head_size)
        out = ops.masked_attention(
            self.query(hidden_states).view(heads).transpose(1, 2),
            self.key(hidden_states).view(heads).transpose(1, 2),
            self.value(hidden_states).view(heads).transpose(1, 2),
            scale=self.scaling,
            dropout_p=self.dropout_prob if self.training else 0.0,
            backend=self.fastvit_backend,
        )
        return out.transpose(1, 2).reshape(batch, tokens, self.all_head_size), None


class CvtProjectionSeam(Fused):
    """CvT's depthwise convolution and BatchNorm, of the tokens that the map given is a view of."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not _projects_plainly(self):
            return self.fastvit_plain.forward(self, hidden_state)
        conv = self.convolution_projection.convolution
        return ops.token_depthwise_conv(
            hidden_state.flatten(2).transpose(1, 2),  # back to the tokens as they lie: no copy
            conv.weight,
            conv.bias,
            grid=tuple(hidden_state.shape[2:]),
            stride=conv.stride[0],
            padding=conv.padding[0],
            norm=BatchNorm.of(self.convolution_projection.normalization),
            backend=self.fastvit_backend,
        )


class CvtAttentionSeam(Fused):
    """CvT's attention behind its projections, without the maps; logits are scaled by the full width ** -0.5."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"dropout": nn.Dropout}

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        if not intact(self):
            return self.fastvit_plain.forward(self, hidden_state, height, width)
        projected = _cvt_projections(self, hidden_state, height, width)
        query, key, value = map(self.rearrange_for_multi_head_attention, projected)
        out = ops.masked_attention(
            query, key, value, scale=self.scale, dropout_p=dropout_p(self.dropout), backend=self.fastvit_backend
        )
        return out.transpose(1, 2).flatten(2)


def _cvt_projections(module: Any, hidden_state: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, N, C), from one reading of the tokens where no part in between is to be called."""
    parts = {
        name: (getattr(module, f"convolution_projection_{name}"), getattr(module, f"projection_{name}"))
        for name in ("key", "query", "value")
    }
    if not any(_must_be_called(module, *part) for part in parts.values()):
        key, query, value = (_as_projection(*part) for part in parts.values())
        prefix_tokens = int(module.with_cls_token)
        settings = {"grid": (height, width), "prefix_tokens": prefix_tokens, "backend": module.fastvit_backend}
        return ops.conv_projection(hidden_state, query, key, value, **settings)
    prefix, tokens = None, hidden_state
    if module.with_cls_token:
        prefix, tokens = hidden_state.split([1, height * width], 1)
    grid = tokens.transpose(1, 2).view(tokens.shape[0], tokens.shape[2], height, width)
    key, query, value = (project(_behind(prefix, convolve(grid))) for convolve, project in parts.values())
    return query, key, value


def _must_be_called(attention: Fused, convolution: nn.Module, linear: nn.Module) -> bool:
    """Whether a projection's parts do more than their tensors tell, or are not to be fused as the attention is."""
    known = isinstance(convolution, CvtProjectionSeam) and convolution.fastvit_backend == attention.fastvit_backend
    if not known or not _projects_plainly(convolution):
        return True
    return not is_plain(convolution, type(convolution)) or not is_plain(linear, nn.Linear)


def _as_projection(convolution: Any, linear: Any) -> Projection:
    conv, norm = convolution.convolution_projection.convolution, convolution.convolution_projection.normalization
    weights = (conv.weight, BatchNorm.of(norm), linear.weight, linear.bias)
    return Projection(*weights, conv.stride[0], conv.padding[0], conv.bias)


def _behind(prefix: Tensor | None, tokens: Tensor) -> Tensor:
    return tokens if prefix is None else torch.cat((prefix, tokens), dim=1)


def _projects_plainly(module: nn.Module) -> bool:
    """Whether what the fused projection reads, or leaves out, is still of the plain classes without hooks."""
    inner, last = module.convolution_projection, module.linear_projection
    unhooked = not any(part._forward_hooks or part._forward_pre_hooks for part in (inner, last))
    return unhooked and is_plain(inner.convolution, nn.Conv2d) and is_plain(inner.normalization, nn.BatchNorm2d)


def _check_interface(module: nn.Module) -> list[str]:
    """Reasons why the attention function that the configuration names is not a known one, or its map is wanted."""
    name = module.config._attn_implementation
    if name not in INTERFACES:
        return [f"the attention interface is {name!r}, known are {INTERFACES}"]
    functions = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    function = functions.get(name)
    if function is not None and not getattr(function, "__module__", "").startswith("transformers."):
        return [f"the attention interface {name!r} was replaced by {function!r}"]
    return ["a forward hook may want the attention map"] if _wants_map(module) else []


def _check_scaling(module: nn.Module, head_dim: int) -> list[str]:
    if module.scaling == head_dim**-0.5 and not module.is_causal:
        return []
    return [f"scaling is {module.scaling} and is_causal {module.is_causal}, expected {head_dim**-0.5} and False"]


def _check_attention(module: nn.Module) -> list[str]:
    names = ("config", "num_attention_heads", "head_dim", "scaling", "attention_dropout", "is_causal", "o_proj")
    found = check_attributes(module, *names) + check_parameters(module, "hidden_states", "attention_mask", "kwargs")
    if found:
        return found
    width = module.num_attention_heads * module.head_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        found += check_linear(module, name, width)
    return found + _check_scaling(module, module.head_dim) + _check_interface(module)


def _check_self_attention(module: nn.Module) -> list[str]:
    names = (
        "config",
        "num_attention_heads",
        "attention_head_size",
        "all_head_size",
        "scaling",
        "dropout_prob",
        "is_causal",
    )
    found = check_attributes(module, *names) + check_parameters(module, "hidden_states", "head_mask")
    if found:
        return found
    for name in ("query", "key", "value"):
        found += check_linear(module, name, module.num_attention_heads * module.attention_head_size)
    return found + _check_scaling(module, module.attention_head_size) + _check_interface(module)


_INNER_FORWARDS = {
    "convolution_projection": frozenset({"convolution", "normalization"}),
    "linear_projection": frozenset({"shape", "view", "permute"}),
}
"""By part of CvT's projection, the names its forward uses."""


def _check_projection(module: nn.Module) -> list[str]:
    found = check_attributes(module, *_INNER_FORWARDS)
    if found:
        return [*found, "fused are depthwise convolutions with BatchNorm (qkv_projection_method 'dw_bn')"]
    for name, known in _INNER_FORWARDS.items():
        unknown = sorted(names_used(type(getattr(module, name)).forward.__code__) - known)
        if unknown:
            found.append(f"forward of {name} uses {', '.join(unknown)}, which is not known")
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
_INTERFACE_NAMES = frozenset(
    {
        "shape",
        "view",
        "transpose",
        "config",
        "_attn_implementation",
        "ALL_ATTENTION_FUNCTIONS",
        "Callable",
        "eager_attention_forward",
        "training",
        "scaling",
        "reshape",
    }
)
_ATTENTION_NAMES = _INTERFACE_NAMES | {
    "head_dim",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "get_interface",
    "attention_dropout",
    "contiguous",
}
_SELF_ATTENTION_NAMES = _INTERFACE_NAMES | {
    "num_attention_heads",
    "attention_head_size",
    "all_head_size",
    "query",
    "key",
    "value",
    "is_causal",
    "dropout_prob",
    "size",
}
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


def _is_of_version_5(module: nn.Module) -> bool:
    """transformers 4 uses the same name for the module around its ``ViTSelfAttention``."""
    return not hasattr(module, "attention")


_MODELS = "transformers.models"

ROWS = (
    *(
        row
        for name, path in (("ViT", "vit.modeling_vit"), ("DeiT", "deit.modeling_deit"))
        for row in (
            Row(
                f"{_MODELS}.{path}.{name}Attention", AttentionSeam, _check_attention, _ATTENTION_NAMES, _is_of_version_5
            ),
            Row(
                f"{_MODELS}.{path}.{name}SelfAttention", SelfAttentionSeam, _check_self_attention, _SELF_ATTENTION_NAMES
            ),
        )
    ),
    Row(
        f"{_MODELS}.cvt.modeling_cvt.CvtSelfAttentionProjection",
        CvtProjectionSeam,
        _check_projection,
        _CVT_PROJECTION_NAMES,
    ),
    Row(f"{_MODELS}.cvt.modeling_cvt.CvtSelfAttention", CvtAttentionSeam, _check_cvt_attention, _CVT_ATTENTION_NAMES),
)
