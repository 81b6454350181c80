"""The fused operators: the functions of ``fastvit.reference.functional``, each with a ``backend`` to choose from.

``IMPLEMENTATIONS`` holds, by operator, who can compute it in order of preference.
"""

from fastvit.ops.class_attention import IMPLEMENTATIONS as _CLASS_ATTENTION
from fastvit.ops.class_attention import class_attention
from fastvit.ops.conv_batch_norm import IMPLEMENTATIONS as _CONV_BATCH_NORM
from fastvit.ops.conv_batch_norm import conv_batch_norm
from fastvit.ops.conv_projection import IMPLEMENTATIONS as _CONV_PROJECTION
from fastvit.ops.conv_projection import conv_projection
from fastvit.ops.depthwise_separable_conv import IMPLEMENTATIONS as _DEPTHWISE_SEPARABLE_CONV
from fastvit.ops.depthwise_separable_conv import depthwise_separable_conv
from fastvit.ops.head_mixed_attention import IMPLEMENTATIONS as _HEAD_MIXED_ATTENTION
from fastvit.ops.head_mixed_attention import head_mixed_attention, re_attention, talking_heads_attention
from fastvit.ops.leff import IMPLEMENTATIONS as _LEFF
from fastvit.ops.leff import leff
from fastvit.ops.linear import IMPLEMENTATIONS as _LINEAR
from fastvit.ops.linear import linear
from fastvit.ops.masked_attention import IMPLEMENTATIONS as _MASKED_ATTENTION
from fastvit.ops.masked_attention import masked_attention
from fastvit.ops.mlp import IMPLEMENTATIONS as _MLP
from fastvit.ops.mlp import mlp
from fastvit.ops.token_depthwise_conv import IMPLEMENTATIONS as _TOKEN_DEPTHWISE_CONV
from fastvit.ops.token_depthwise_conv import token_depthwise_conv

IMPLEMENTATIONS = {
    "class_attention": _CLASS_ATTENTION,
    "conv_batch_norm": _CONV_BATCH_NORM,
    "conv_projection": _CONV_PROJECTION,
    "depthwise_separable_conv": _DEPTHWISE_SEPARABLE_CONV,
    "head_mixed_attention": _HEAD_MIXED_ATTENTION,
    "leff": _LEFF,
    "linear": _LINEAR,
    "masked_attention": _MASKED_ATTENTION,
    "mlp": _MLP,
    "token_depthwise_conv": _TOKEN_DEPTHWISE_CONV,
}

__all__ = [
    "IMPLEMENTATIONS",
    "class_attention",
    "conv_batch_norm",
    "conv_projection",
    "depthwise_separable_conv",
    "head_mixed_attention",
    "leff",
    "linear",
    "masked_attention",
    "mlp",
    "re_attention",
    "talking_heads_attention",
    "token_depthwise_conv",
]
