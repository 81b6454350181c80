"""Hugging Face transformers' blocks: attention and MLP of ViT and DeiT (4.x and 5.x), SigLIP's MLP; CvT's shared part.

transformers itself is never imported here. The attention map that a ViT's attention returns beside its output is None
in the fused forwards, as it is with transformers' own ``sdpa`` interface; whoever wants the map
(``output_attentions=True``, a forward hook where the interface is ``eager``) gets the plain forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import (
    Fused,
    Row,
    are_plain,
    fused_backend,
    is_fused,
    names_used,
    parts_of,
    plain_class,
)
from fastvit.patching.replay import replayed
from fastvit.patching.rows.blocks import whole_backend
from fastvit.patching.rows.halves import Heads, add_attention, add_mlp, layer_of
from fastvit.patching.rows.mlps import Layers
from fastvit.patching.rows.parts import (
    activation_name,
    as_mask_and_bias,
    check_attributes,
    check_linear,
    check_parameters,
    dropout_p,
    forward_is_wrapped,
    is_plain_of,
    project,
)

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


class AttentionOverride(Fused):
    """``ViTAttention`` and ``DeiTAttention`` of transformers 5: q, k, v, softmax(q k^T) v and the output projection."""

    fastvit_op = "masked_attention"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        backend = fused_backend(self)
        if backend is None or _asks_for_more(kwargs) or _runs_plain(self) or not _is_usual_mask(self, attention_mask):
            return plain_class(self).forward(self, hidden_states, attention_mask, **kwargs)
        sizes = hidden_states.shape[:-1]
        heads = (*sizes, -1, self.head_dim)
        mask, bias = as_mask_and_bias(attention_mask)
        q, k, v = (
            project(layer, hidden_states, backend).view(heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = ops.masked_attention(
            q,
            k,
            v,
            mask,
            bias,
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=backend,
        )
        return project(self.o_proj, out.transpose(1, 2).reshape(*sizes, -1), backend), None


def _asks_for_more(arguments: dict[str, Any]) -> bool:
    """Whether the caller wants anything but the usual output (``output_attentions``, a position bias, ...)."""
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    return not given <= _OTHER_OUTPUTS


def _is_usual_mask(module: nn.Module, mask: Tensor | None) -> bool:
    """The eager interface adds its mask whatever the dtype; the models give it an additive one."""
    if mask is None:
        return True
    return mask.dim() == 4 and (mask.is_floating_point() or module.config._attn_implementation == "sdpa")


class SelfAttentionOverride(Fused):
    """``ViTSelfAttention`` and ``DeiTSelfAttention`` of transformers 4; ``head_mask`` takes the plain path."""

    fastvit_op = "masked_attention"

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        backend = fused_backend(self)
        if backend is None or head_mask is not None or _runs_plain(self):
            return plain_class(self).forward(self, hidden_states, head_mask)
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            project(layer, hidden_states, backend).view(heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out = ops.masked_attention(
            q,
            k,
            v,
            scale=self.scaling,
            dropout_p=self.dropout_prob if self.training else 0.0,
            backend=backend,
        )
        return out.transpose(1, 2).reshape(batch, tokens, self.all_head_size), None


class SelfOutputOverride(Fused):
    """The linear layer behind an attention whose module ends before it (transformers 4; CvT in both)."""

    fastvit_op = "linear"
    fastvit_reads: ClassVar = {"dense": nn.Linear}

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, hidden_states, input_tensor)
        return self.dropout(project(self.dense, hidden_states, backend))


class MlpOverride(Fused):
    """``ViTMLP`` and ``DeiTMLP`` of transformers 5, and SigLIP's."""

    fastvit_op = "mlp"

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers, backend = Layers(self.fc1, self.activation_fn, self.fc2), fused_backend(self)
        if backend is None or not layers.fusible():
            return plain_class(self).forward(self, hidden_states)
        return layers.run(hidden_states, backend)


class BlockOverride(Fused):
    """``ViTLayer`` and ``DeiTLayer`` of transformers 5, at inference on the CPU in a few calls."""

    fastvit_op = "linear"
    fastvit_needs = ("attention", "mlp")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attention = self._modules.get("attention")
        whole = isinstance(attention, AttentionOverride) and not _runs_plain(attention) and not _asks_for_more(kwargs)
        out = replayed(self, _run_whole, hidden_states, attention_mask) if whole else None
        return plain_class(self).forward(self, hidden_states, attention_mask, **kwargs) if out is None else out


def _run_whole(block: Any, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    backend = whole_backend(block, x)
    if backend is None or not _runs_whole(block, attention_mask, backend):
        return None
    attention, mlp = block.attention, block.mlp
    mask, bias = as_mask_and_bias(attention_mask)
    settings = {"mask": mask, "bias": bias, "scale": attention.scaling, "backend": backend}
    attend = functools.partial(ops.masked_attention, **settings)
    layers = [layer_of(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    heads, out = Heads(attention.num_attention_heads, attention.head_dim), layer_of(attention.o_proj)
    x = add_attention(x, block.layernorm_before, layers, heads, attend, out, backend)
    return add_mlp(x, block.layernorm_after, (mlp.fc1, activation_name(mlp.activation_fn), mlp.fc2), backend)


def _runs_whole(block: Any, mask: Tensor | None, backend: str) -> bool:
    """Whether a block is of known parts that do nothing more at inference than their tensors tell."""
    attention, mlp = block._modules.get("attention"), block._modules.get("mlp")
    return (
        are_plain(block, _OF_BLOCK)
        and isinstance(attention, AttentionOverride)
        and isinstance(mlp, MlpOverride)
        and is_fused(attention, backend)
        and is_fused(mlp, backend)
        and not attention.training
        and len(block.layernorm_before.normalized_shape) == len(block.layernorm_after.normalized_shape) == 1
        and dropout_p(block.dropout) == 0.0
        and activation_name(mlp.activation_fn) is not None
        and _is_usual_mask(attention, mask)
    )


_OF_BLOCK = parts_of(
    {
        **dict.fromkeys(("layernorm_before", "layernorm_after"), nn.LayerNorm),
        **{f"attention.{name}": nn.Linear for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "mlp.fc1": nn.Linear,
        "mlp.fc2": nn.Linear,
        "dropout": nn.Dropout,
    }
)


class LayerOverride(Fused):
    """``ViTLayer`` and ``DeiTLayer`` of transformers 4, whose MLP is two modules, the residual within the second."""

    fastvit_op = "mlp"

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None) -> Tensor:
        backend = fused_backend(self)
        layers = None if backend is None else layers_of(self)
        if backend is None or layers is None or not layers.fusible():
            return plain_class(self).forward(self, hidden_states, head_mask)
        hidden_states = self.attention(self.layernorm_before(hidden_states), head_mask) + hidden_states
        return layers.run(self.layernorm_after(hidden_states), backend) + hidden_states


def layers_of(module: Any) -> Layers | None:
    """A layer's MLP; None where somebody listens to the modules it is made of."""
    first, second = module.intermediate, module.output
    if not (is_plain_of(first, "transformers") and is_plain_of(second, "transformers")):
        return None
    activation = getattr(first, "intermediate_act_fn", None) or first.activation
    return Layers(first.dense, activation, second.dense, (second.dropout,))


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


def unknown_names(module: nn.Module, known: Mapping[str, frozenset[str]]) -> list[str]:
    """Reasons why the forwards of a module's parts are not those of the versions read."""
    found = []
    for part, names in known.items():
        unknown = sorted(names_used(type(getattr(module, part)).forward.__code__) - names)
        if unknown:
            found.append(f"forward of {part} uses {', '.join(unknown)}, which is not known")
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
_PARTS_OF_MLPS = {
    "intermediate": frozenset({"dense", "intermediate_act_fn", "activation"}),
    "output": frozenset({"dense", "dropout"}),
}
"""By part of a layer's MLP, the names its forward uses."""


def _check_mlp(module: nn.Module) -> list[str]:
    found = check_attributes(module, "fc1", "activation_fn", "fc2") + check_parameters(module, "hidden_states")
    names = ("fc1", "activation_fn", "fc2")
    return found or Layers(*(getattr(module, name) for name in names)).reasons(*names)


def check_layer(module: nn.Module, parameters: tuple[str, ...]) -> list[str]:
    """Reasons why the MLP of a layer, whose forward takes these parameters, is not two modules as known."""
    found = check_attributes(module, "attention", "layernorm_before", "layernorm_after", *_PARTS_OF_MLPS)
    found = found or check_parameters(module, *parameters) + unknown_names(module, _PARTS_OF_MLPS)
    if found:
        return found
    layers = layers_of(module)
    if layers is None:
        return ["intermediate or output has hooks, which the fused path would not call"]
    return layers.reasons("intermediate.dense", "the activation", "output.dense")


def _check_block(module: nn.Module) -> list[str]:
    found = check_attributes(module, "attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
    found += check_parameters(module, "hidden_states", "attention_mask", "kwargs")
    cls: Any = plain_class(module)
    forward = cls.forward
    while forward.__globals__["__name__"] == "transformers.modeling_layers":  # which looks whether to checkpoint
        forward = forward.__wrapped__
    if forward.__globals__["__name__"] != cls.__module__:
        return [*found, f"{cls.__name__}.forward was replaced by {forward!r}"]
    unknown = sorted(names_used(forward.__code__) - _BLOCK_NAMES)
    return found + [f"{cls.__name__}.forward of this version uses {', '.join(unknown)}, which is not known"] * bool(
        unknown
    )


def check_self_output(module: nn.Module) -> list[str]:
    """Reasons why a linear layer behind an attention is not as known."""
    return check_attributes(module, "dropout")


def _is_of_version_5(module: nn.Module) -> bool:
    """transformers 4 uses the same name for the module around its ``ViTSelfAttention``."""
    return not hasattr(module, "attention")


def _has_one_module_for_its_mlp(module: nn.Module) -> bool:
    """As in transformers 5."""
    return hasattr(module, "mlp")


def _has_two_modules_for_its_mlp(module: nn.Module) -> bool:
    """As in transformers 4; in 5 the MLP is one."""
    return hasattr(module, "intermediate")


SELF_OUTPUT_NAMES = frozenset({"dense", "dropout"})
_MLP_NAMES = frozenset({"fc1", "activation_fn", "fc2"})
_BLOCK_NAMES = frozenset({"attention", "layernorm_before", "layernorm_after", "mlp", "dropout"})
_WRAPPED_NAMES = _BLOCK_NAMES | {
    "__class__",
    "__name__",
    "_can_checkpoint_with_cache",
    "_gradient_checkpointing_func",
    "forward",
    "gradient_checkpointing",
    "logger",
    "partial",
    "rstrip",
    "training",
    "type",
    "warning_once",
}
"""With those of transformers' wrapper around a layer's forward (5.23), which checkpoints."""
LAYER_NAMES = frozenset({"attention", "layernorm_before", "layernorm_after", "drop_path", "intermediate", "output"})

_MODELS = "transformers.models"

ROWS = (
    *(
        row
        for name, path in (("ViT", "vit.modeling_vit"), ("DeiT", "deit.modeling_deit"))
        for row in (
            Row(
                f"{_MODELS}.{path}.{name}Attention",
                AttentionOverride,
                _check_attention,
                _ATTENTION_NAMES,
                _is_of_version_5,
            ),
            Row(
                f"{_MODELS}.{path}.{name}SelfAttention",
                SelfAttentionOverride,
                _check_self_attention,
                _SELF_ATTENTION_NAMES,
            ),
            Row(f"{_MODELS}.{path}.{name}SelfOutput", SelfOutputOverride, check_self_output, SELF_OUTPUT_NAMES),
            Row(
                f"{_MODELS}.{path}.{name}Layer",
                BlockOverride,
                _check_block,
                _WRAPPED_NAMES,
                _has_one_module_for_its_mlp,
            ),
            Row(f"{_MODELS}.{path}.{name}MLP", MlpOverride, _check_mlp, _MLP_NAMES),
            Row(
                f"{_MODELS}.{path}.{name}Layer",
                LayerOverride,
                functools.partial(check_layer, parameters=("hidden_states", "head_mask")),
                LAYER_NAMES,
                _has_two_modules_for_its_mlp,
            ),
        )
    ),
    Row(f"{_MODELS}.siglip.modeling_siglip.SiglipMLP", MlpOverride, _check_mlp, _MLP_NAMES),
    Row(f"{_MODELS}.siglip2.modeling_siglip2.Siglip2MLP", MlpOverride, _check_mlp, _MLP_NAMES),
)
