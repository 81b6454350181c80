"""The fused operators: the functions of ``fastvit.reference.functional``, each with a ``backend`` to choose from.

``IMPLEMENTATIONS`` holds, by operator, who can compute it in order of preference.
"""

from fastvit.ops.head_mixed_attention import IMPLEMENTATIONS as _HEAD_MIXED_ATTENTION
from fastvit.ops.head_mixed_attention import head_mixed_attention, re_attention, talking_heads_attention
from fastvit.ops.masked_attention import IMPLEMENTATIONS as _MASKED_ATTENTION
from fastvit.ops.masked_attention import masked_attention
from fastvit.ops.token_depthwise_conv import IMPLEMENTATIONS as _TOKEN_DEPTHWISE_CONV
from fastvit.ops.token_depthwise_conv import token_depthwise_conv

IMPLEMENTATIONS = {
    "head_mixed_attention": _HEAD_MIXED_ATTENTION,
    "masked_attention": _MASKED_ATTENTION,
    "token_depthwise_conv": _TOKEN_DEPTHWISE_CONV,
}

__all__ = [
    "IMPLEMENTATIONS",
    "head_mixed_attention",
    "masked_attention",
    "re_attention",
    "talking_heads_attention",
    "token_depthwise_conv",
]
