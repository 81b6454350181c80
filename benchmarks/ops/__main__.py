"""Operators alone: ``python -m benchmarks.ops [--quick] [--only leff]``.

Each operator at the sizes of published models, beside its plain form (eager, and compiled by Inductor), the library's
fastest equivalents, and floors, which do less than the operator has to. Inputs change from call to call. In training,
all inputs and parameters get gradients and norms take batch statistics.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.command import Suite, main
from benchmarks.ops.cases import rows
from benchmarks.worker import Case

PROVIDERS = {
    "eager": "the plain form",
    "inductor": "the plain form by torch.compile",
    "sdpa": "F.scaled_dot_product_attention; for head mixing, without it: a floor",
    "nchw": "the library's convolution on NCHW, norms folded beforehand, with the transposes",
    "channels-last": "the same on a view of the tokens as a channels-last image",
    "copy": "a copy of the input: a floor",
    "fastvit": "the operator",
}
QUICK = (
    "masked_attention: vit_s",
    "class_attention: cait_s_class",
    "head_mixed_attention: cait_s24_224",
    "token_depthwise_conv: ceit LeFF middle 768",
    "conv_projection: cvt 192",
    "leff: ceit tiny 192",
    "conv_batch_norm: ceit 7x7",
    "mlp: vit_s_mlp",
)


def absence(name: str, case: Case) -> str | None:
    """Why a provider has no part in a row."""
    row = rows()[case.name]
    if name in ("eager", "inductor", "fastvit"):
        return None
    if name not in row.peers:
        return f"no peer of {row.op}"
    return "inference only: norms are folded beforehand" if case.training and name in row.prepared else None


SUITE = Suite(
    name="ops",
    module="benchmarks.ops.cases",
    description=__doc__,
    names=lambda: list(rows()),
    providers=PROVIDERS,
    absence=absence,
    quick={
        "only": list(QUICK),
        "providers": [name for name in PROVIDERS if name != "inductor"],
        "mode": ["fwd"],
        "dtype": ["float32"],
        "batch": [8],
    },
    image_size=False,
)


def command(arguments: Sequence[str] | None = None) -> int:
    return main(SUITE, arguments)


if __name__ == "__main__":
    sys.exit(command())
