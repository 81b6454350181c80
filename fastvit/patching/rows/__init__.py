"""What is known of each library's classes: one table a library, and what their overrides have in common."""

from __future__ import annotations

from fastvit.patching.rows import (
    reference,
    timm,
    torch_nn,
    torchvision,
    transformers,
    transformers_cvt,
    vit_pytorch,
)

TABLES = (
    *(reference.ROWS, timm.ROWS, transformers.ROWS, transformers_cvt.ROWS, torchvision.ROWS, torch_nn.ROWS),
    vit_pytorch.ROWS,
)
"""The rows of every library; a further library is a file with ``ROWS`` and its name here."""
