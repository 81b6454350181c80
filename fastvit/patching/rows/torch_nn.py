"""torch's own ``nn.TransformerEncoderLayer``, whose inference path writes the N x N maps; MLPs in ``nn.Sequential``.

That path looks at the layer's tensors and calls none of its parts, so the layer is what is fused. Attention over one
tensor by ``nn.MultiheadAttention`` alone, and in a decoder, is known by what it computes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit import ops
from fastvit.ops._operator import any_autocast
from fastvit.patching.fusion import Fused, Row, fused_backend, plain_class
from fastvit.patching.rows.mlps import first_of
from fastvit.patching.rows.parts import activation_name, backend_of_linears, dropout_p
from fastvit.reference.overrides import is_plain


def attends_plainly(attention: Any) -> bool:
    """Whether a module is torch's own attention, self-attention over (B, N, C) tokens, without hooks."""
    return (
        is_plain(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
        and is_plain(attention.out_proj, NonDynamicallyQuantizableLinear)
    )


def attend(attention: nn.MultiheadAttention, x: Tensor, backend: str, residual: Tensor | None = None) -> Tensor:
    """What plain attention gives for x (B, N, C), its q, k and v left where the projection puts them."""
    linears = backend_of_linears(backend)
    packed = ops.linear(x, attention.in_proj_weight, attention.in_proj_bias, backend=linears)
    q, k, v = packed.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attention.dropout if attention.training else 0.0
    out = ops.masked_attention(q, k, v, dropout_p=dropout, backend=backend).transpose(1, 2).flatten(2)
    projection = attention.out_proj
    return ops.linear(out, projection.weight, projection.bias, residual=residual, backend=linears)


class EncoderLayerOverride(Fused):
    """``nn.TransformerEncoderLayer`` without masks; with one it is torch's."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {
        "linear1": nn.Linear,
        "linear2": nn.Linear,
        "dropout": nn.Dropout,
        "dropout1": nn.Dropout,
        "dropout2": nn.Dropout,
    }

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        backend = fused_backend(self)
        masked = src_mask is not None or src_key_padding_mask is not None or is_causal
        if backend is None or masked or src.is_nested or src.dim() != 3 or not _is_usual(self):
            return plain_class(self).forward(self, src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = _add_attention(self, src, self.norm1(src), backend)
            return _add_mlp(self, x, self.norm2(x), backend)
        x = self.norm1(_add_attention(self, src, src, backend))
        return self.norm2(_add_mlp(self, x, x, backend))


def _is_usual(layer: Any) -> bool:
    """Whether its attention is plain, and no half of it was replaced on the instance.

    Of a GELU by tanh torch's inference path makes an exact one.
    """
    activation = layer.activation
    exact = not isinstance(activation, nn.GELU) or activation.approximate == "none"
    replaced = "_sa_block" in layer.__dict__ or "_ff_block" in layer.__dict__
    return exact and not replaced and attends_plainly(layer.self_attn)


def _add_attention(layer: Any, x: Tensor, normed: Tensor, backend: str) -> Tensor:
    if dropout_p(layer.dropout1) > 0.0:
        return x + layer.dropout1(attend(layer.self_attn, normed, backend))
    return attend(layer.self_attn, normed, backend, residual=x)


_NAMES = "the first linear", "the activation", "the second linear"
_ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu"}


def _add_mlp(layer: Any, x: Tensor, normed: Tensor, backend: str) -> Tensor:
    function = layer.activation
    activation = activation_name(function) if isinstance(function, nn.Module) else _ACTIVATIONS.get(function)
    if activation is None or dropout_p(layer.dropout) > 0.0 or dropout_p(layer.dropout2) > 0.0:
        return x + layer._ff_block(normed)
    layers = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
    return ops.mlp(normed, *layers, activation, residual=x, backend=backend_of_linears(backend))


class SequentialOverride(Fused):
    """An ``nn.Sequential`` with linear layer, activation and linear layer: these as one, what is around is called."""

    fastvit_op = "mlp"
    fastvit_yields = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as torch names it)
        backend = fused_backend(self)
        parts: Any = list(self._modules.values())
        found = None if backend is None else first_of(parts)
        if backend is None or found is None or not found.layers.fusible():
            return plain_class(self).forward(self, input)
        x = input
        for part in parts[: found.begin]:
            x = part(x)
        fc1 = found.layers.fc1
        takes = x.dim() > 0 and x.shape[-1] == fc1.in_features and (x.dtype == fc1.weight.dtype or any_autocast())
        if takes:  # else torch has its own error
            x = found.layers.run(x, backend)
        for part in parts[found.end if takes else found.begin :]:
            x = part(x)
        return x


def _holds_mlp(module: nn.Module) -> bool:
    plain, known = plain_class(module), nn.Sequential
    as_known = plain.forward is known.forward and plain.__iter__ is known.__iter__
    found = first_of(list(module.children())) if as_known else None
    return found is not None and found.layers.named_activation() is not None


def _check_layer(module: nn.Module) -> list[str]:
    halves = (name for name in ("_sa_block", "_ff_block"))
    plain, known = plain_class(module), nn.TransformerEncoderLayer
    found = [
        f"{plain.__name__} overrides {name}" for name in halves if getattr(plain, name) is not getattr(known, name)
    ]
    return (
        found
        if _is_usual(module)
        else [*found, "self_attn is not plain, a half was replaced on the instance, or GELU is by tanh"]
    )


ROWS = (
    Row(
        "torch.nn.modules.transformer.TransformerEncoderLayer",
        EncoderLayerOverride,
        _check_layer,
        applies=lambda module: getattr(getattr(module, "self_attn", None), "batch_first", False),
    ),
    Row(
        "torch.nn.modules.container.Sequential",
        SequentialOverride,
        lambda module: first_of(list(module.children())).layers.reasons(*_NAMES),  # type: ignore[union-attr]
        applies=_holds_mlp,
    ),
)
