"""The fused operators: the functions of ``fastvit.reference.functional``, each with a ``backend`` to choose from.

``OPERATORS`` holds, by name, who can compute each in order of preference.
"""

from fastvit.ops import _flops
from fastvit.ops import attention as _attention
from fastvit.ops import conv_batch_norm as _conv_batch_norm
from fastvit.ops import conv_projection as _conv_projection
from fastvit.ops import head_mixed_attention as _head_mixed_attention
from fastvit.ops import leff as _leff
from fastvit.ops import linear as _linear
from fastvit.ops import token_depthwise_conv as _token_depthwise_conv
from fastvit.ops.attention import class_attention, masked_attention
from fastvit.ops.conv_batch_norm import conv_batch_norm
from fastvit.ops.conv_projection import conv_projection, depthwise_separable_conv
from fastvit.ops.head_mixed_attention import head_mixed_attention, re_attention, talking_heads_attention
from fastvit.ops.leff import leff
from fastvit.ops.linear import glu_mlp, linear, mlp
from fastvit.ops.token_depthwise_conv import token_depthwise_conv
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection

OPERATORS = {
    operator.name: operator
    for operator in (
        _attention.CLASS,
        _conv_batch_norm.OPERATOR,
        _conv_projection.PROJECTION,
        _conv_projection.SEPARABLE,
        _linear.GLU_MLP,
        _head_mixed_attention.OPERATOR,
        _leff.OPERATOR,
        _linear.LINEAR,
        _attention.MASKED,
        _linear.MLP,
        _token_depthwise_conv.OPERATOR,
    )
}

_flops.register_when_imported()

__all__ = [
    "OPERATORS",
    "BatchNorm",
    "LayerNorm",
    "Projection",
    "class_attention",
    "conv_batch_norm",
    "conv_projection",
    "depthwise_separable_conv",
    "glu_mlp",
    "head_mixed_attention",
    "leff",
    "linear",
    "masked_attention",
    "mlp",
    "re_attention",
    "talking_heads_attention",
    "token_depthwise_conv",
]


def __dir__() -> list[str]:
    return __all__
