"""torchvision's ViT: the ``nn.MultiheadAttention`` inside its ``EncoderBlock``.

The block is what is fused, since only there is it known that nobody asks for the attention map. torch packs q, k and v
into a copy of their own before ``scaled_dot_product_attention``, and its inference path writes the N x N maps; here q,
k and v are views. At inference on the CPU the block is four calls. torchvision itself is never imported.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, ClassVar

from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, are_plain, fused_backend, is_fused, parts_of, plain_class
from fastvit.patching.replay import replayed
from fastvit.patching.rows.blocks import whole_backend
from fastvit.patching.rows.ends import Head, count_read, methods_of
from fastvit.patching.rows.halves import Heads, add_attention, add_mlp, layer_of
from fastvit.patching.rows.parts import (
    activation_name,
    check_activation,
    check_attributes,
    check_parameters,
    dropout_p,
    is_plain_of,
)
from fastvit.patching.rows.torch_nn import attend, attends_plainly


class EncoderBlockOverride(Fused):
    """torchvision's ``EncoderBlock`` with q, k and v left where the projection puts them."""

    fastvit_op = "masked_attention"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torchvision's name)
        out = replayed(self, _run_whole, input, count_read(self, _head))
        if out is not None:
            return out
        attention, backend = self.self_attention, fused_backend(self)
        if backend is None or not attends_plainly(attention) or input.dim() != 3:
            return plain_class(self).forward(self, input)
        out = attend(attention, self.ln_1(input), backend)
        x = self.dropout(out) + input
        return x + self.mlp(self.ln_2(x))


def _runs_whole(block: Any, backend: str) -> bool:
    """Whether a block is of known parts that do nothing more at inference than their tensors tell."""
    mlp, attention = block._modules.get("mlp"), block._modules.get("self_attention")
    if not isinstance(mlp, MlpOverride):
        return False
    layers: Any = mlp
    return (
        are_plain(block, _AROUND)
        and is_fused(mlp, backend)
        and len(layers) == 5
        and are_plain(mlp, mlp.fastvit_parts)
        and activation_name(layers[1]) is not None
        and len(block.ln_1.normalized_shape) == len(block.ln_2.normalized_shape) == 1
        and all(dropout_p(dropout) == 0.0 for dropout in (block.dropout, layers[2], layers[4]))
        and attends_plainly(attention)
        and not attention.training
    )


_AROUND = parts_of({"ln_1": nn.LayerNorm, "ln_2": nn.LayerNorm, "dropout": nn.Dropout})


def _run_whole(block: Any, x: Tensor, count: int | None) -> Tensor | None:
    backend = whole_backend(block, x)
    if backend is None or x.dim() != 3 or not _runs_whole(block, backend):
        return None
    attention = block.self_attention
    fused = functools.partial(ops.masked_attention, backend=backend)
    layers, heads = [(attention.in_proj_weight, attention.in_proj_bias)], Heads(attention.num_heads, attention.head_dim)
    out = layer_of(attention.out_proj)
    x = add_attention(x, block.ln_1, layers, heads, fused, out, backend, count=count)
    return add_mlp(x, block.ln_2, (block.mlp[0], activation_name(block.mlp[1]), block.mlp[3]), backend)


def _reads_class_token(model: Any, block: nn.Module) -> int | None:
    """1 where nobody but the heads sees what the last block gives."""
    encoder = model._modules.get("encoder")
    if not is_plain_of(encoder, "torchvision") or not are_plain(encoder, _ENDS_OF_ENCODER):
        return None
    return 1 if is_fused(block, getattr(block, "fastvit_backend", "")) else None


_ENDS_OF_ENCODER = parts_of({"ln": nn.LayerNorm, "layers": nn.Sequential})


def _head(model: Any) -> Head | None:
    plain: Any = plain_class(model)
    if (plain.__module__, plain.__name__) != ("torchvision.models.vision_transformer", "VisionTransformer"):
        return None
    of_encoder = methods_of(sys.modules[plain.__module__].Encoder, ("forward",), _ENCODER_NAMES)
    methods = methods_of(plain, ("forward",), _MODEL_NAMES)
    if methods is None or of_encoder is None:
        return None
    return Head(methods, frozenset({of_encoder["forward"].__code__}), "encoder.layers", _reads_class_token)


class MlpOverride(Fused):
    """torchvision's ``MLPBlock`` (linear, activation, dropout, linear, dropout), activation inside the product."""

    fastvit_op = "mlp"
    fastvit_reads: ClassVar = {"0": nn.Linear, "2": nn.Dropout, "3": nn.Linear, "4": nn.Dropout}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Sequential's name)
        backend, layers = fused_backend(self), tuple(self._modules.values())
        activation = None if backend is None or len(layers) != 5 else activation_name(layers[1])
        if backend is None or activation is None or dropout_p(layers[2]) > 0.0 or dropout_p(layers[4]) > 0.0:
            return plain_class(self).forward(self, input)
        fc1, _, _, fc2, _ = layers
        return ops.mlp(input, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation, backend=backend)


def _check_mlp(module: Any) -> list[str]:
    if len(module) != 5:
        return [f"has {len(module)} layers, expected are linear, activation, dropout, linear, dropout"]
    return check_activation("1", module[1])


def _check_block(module: nn.Module) -> list[str]:
    found = check_attributes(module, "ln_1", "self_attention", "dropout", "ln_2", "mlp")
    found = found or check_parameters(module, "input")
    if not found and not attends_plainly(module.self_attention):
        found = ["self_attention is not a plain nn.MultiheadAttention(batch_first=True) without hooks"]
    return found


# Every global and attribute name that the forwards of the versions read (up to torchvision 0.22) use.
_BLOCK_NAMES = frozenset({"torch", "_assert", "dim", "shape", "ln_1", "self_attention", "dropout", "ln_2", "mlp"})

_MODEL_NAMES = frozenset("_process_input cat class_token encoder expand heads shape torch".split())
_ENCODER_NAMES = frozenset("_assert dim dropout layers ln pos_embedding shape torch".split())

ROWS = (
    Row("torchvision.models.vision_transformer.EncoderBlock", EncoderBlockOverride, _check_block, _BLOCK_NAMES),
    Row("torchvision.models.vision_transformer.MLPBlock", MlpOverride, _check_mlp),
)
