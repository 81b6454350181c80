"""torchvision's ViT: the ``nn.MultiheadAttention`` inside its ``EncoderBlock``.

The block is what is fused, since only there is it known that nobody asks for the attention map. torch packs q, k and v
into a copy of their own before ``scaled_dot_product_attention``, and its inference path writes the N x N maps; here q,
k and v are views. torchvision itself is never imported.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, fused_backend, plain_class
from fastvit.patching.parts import (
    activation_name,
    backend_of_linears,
    check_activation,
    check_attributes,
    check_parameters,
    dropout_p,
)
from fastvit.reference.overrides import is_plain


def _attends_plainly(attention: nn.Module) -> bool:
    """Whether the block's attention is torch's own, self-attention over (B, N, C) tokens, without hooks."""
    return (
        is_plain(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
        and is_plain(attention.out_proj, NonDynamicallyQuantizableLinear)
    )


class EncoderBlockSeam(Fused):
    """torchvision's ``EncoderBlock`` with q, k and v left where the projection puts them."""

    fastvit_op = "masked_attention"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torchvision's name)
        attention, backend = self.self_attention, fused_backend(self)
        if backend is None or not _attends_plainly(attention) or input.dim() != 3:
            return plain_class(self).forward(self, input)
        batch, tokens, _ = input.shape
        linears = backend_of_linears(backend)
        packed = ops.linear(self.ln_1(input), attention.in_proj_weight, attention.in_proj_bias, backend=linears)
        q, k, v = (
            packed.view(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        out = ops.masked_attention(q, k, v, dropout_p=attention.dropout if attention.training else 0.0, backend=backend)
        out = ops.linear(
            out.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias, backend=linears
        )
        x = self.dropout(out) + input
        return x + self.mlp(self.ln_2(x))


class MlpSeam(Fused):
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
    if not found and not _attends_plainly(module.self_attention):
        found = ["self_attention is not a plain nn.MultiheadAttention(batch_first=True) without hooks"]
    return found


# Every global and attribute name that the forwards of the versions read (up to torchvision 0.22) use.
_BLOCK_NAMES = frozenset({"torch", "_assert", "dim", "shape", "ln_1", "self_attention", "dropout", "ln_2", "mlp"})

ROWS = (
    Row("torchvision.models.vision_transformer.EncoderBlock", EncoderBlockSeam, _check_block, _BLOCK_NAMES),
    Row("torchvision.models.vision_transformer.MLPBlock", MlpSeam, _check_mlp),
)
