"""torchvision's ViT: the ``nn.MultiheadAttention`` inside its ``EncoderBlock``.

The block is what is fused, since only there is it known that nobody asks for the attention map. torch packs q, k and v
into a copy of their own before ``scaled_dot_product_attention``, and its inference path writes the N x N maps; here q,
k and v are views. torchvision itself is never imported.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit import ops
from fastvit.patching.fusion import Fused, Row
from fastvit.patching.parts import check_attributes, check_parameters, is_plain


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
        attention = self.self_attention
        if input.dim() != 3 or not _attends_plainly(attention):
            return self.fastvit_plain.forward(self, input)
        batch, tokens, dim = input.shape
        packed = F.linear(self.ln_1(input), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (
            packed.view(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        out = ops.masked_attention(
            q, k, v, dropout_p=attention.dropout if attention.training else 0.0, backend=self.fastvit_backend
        )
        x = self.dropout(attention.out_proj(out.transpose(1, 2).reshape(batch, tokens, dim))) + input
        return x + self.mlp(self.ln_2(x))


def _check_block(module: nn.Module) -> list[str]:
    found = check_attributes(module, "ln_1", "self_attention", "dropout", "ln_2", "mlp")
    found = found or check_parameters(module, "input")
    if not found and not _attends_plainly(module.self_attention):
        found = ["self_attention is not a plain nn.MultiheadAttention(batch_first=True) without hooks"]
    return found


# Every global and attribute name that the forwards of the versions read (up to torchvision 0.22) use.
_BLOCK_NAMES = frozenset({"torch", "_assert", "dim", "shape", "ln_1", "self_attention", "dropout", "ln_2", "mlp"})

ROWS = (Row("torchvision.models.vision_transformer.EncoderBlock", EncoderBlockSeam, _check_block, _BLOCK_NAMES),)
