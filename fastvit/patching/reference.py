"""Our own models' blocks. Each does its slow part in one method, and that method is all a seam replaces."""

from __future__ import annotations

from torch import Tensor

from fastvit import ops
from fastvit.patching.fusion import Fused, Row
from fastvit.reference.functional import BatchNorm
from fastvit.reference.layers import dropout_p


class AttentionSeam(Fused):
    """Attention without its N x N map."""

    fastvit_op = "masked_attention"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return ops.masked_attention(
            q, k, v, mask, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=self.fastvit_backend
        )


class ConvProjectionSeam(Fused):
    """CvT's depthwise convolution and BatchNorm on tokens as they lie."""

    fastvit_op = "token_depthwise_conv"

    def convolve(self, x: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
        return ops.token_depthwise_conv(
            x,
            self.conv.weight,
            grid=grid,
            stride=self.stride,
            prefix_tokens=prefix_tokens,
            norm=BatchNorm.of(self.bn),
            backend=self.fastvit_backend,
        )


ROWS = (
    Row("fastvit.reference.layers.Attention", AttentionSeam),
    Row("fastvit.reference.cvt.ConvAttention", AttentionSeam),
    Row("fastvit.reference.cvt.ConvProjection", ConvProjectionSeam),
)
