"""Research code that was copied into a project, under any class name: known by what it holds and what it computes.

The blocks of the official DeiT, CaiT, DeepViT, CeiT, CvT, CPVT and Twins repositories, and vit-pytorch's DeepViT. A
class is taken for one of them by its attributes; it is fused only if its forward uses no other names than theirs do (so
that it does nothing on the side, such as keeping its attention map) and a trial on random weights gives the same
numbers plain and fused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.patching.fusion import Row, names_used, plain_class
from fastvit.patching.rows import research_overrides as overrides
from fastvit.patching.rows import timm, vit_pytorch
from fastvit.patching.rows.parts import check_parameters
from fastvit.patching.rows.trial import tried


class Pattern(NamedTuple):
    """A block of an official repository.

    Attributes:
        name: the class there.
        override: what replaces its forward.
        looks: whether a module could be one, by its attributes.
        uses: the attributes its forward uses.
        example: positional arguments to try a module on.
        check: reasons why a module that looks like one would always run its plain forward.
        parts: sub-modules that are blocks of their own, by name, and their overrides.
    """

    name: str
    override: Any
    looks: Callable[[nn.Module], bool]
    uses: frozenset[str]
    example: Callable[[nn.Module], tuple[Any, ...]]
    check: Callable[[nn.Module], list[str]] = lambda module: []
    parts: Callable[[nn.Module], dict[str, Any]] = lambda module: {}


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(plain_class(module).forward).parameters)[1:]


def _holds(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _is_attention(module: nn.Module, *projections: str) -> bool:
    return (
        hasattr(module, "num_heads")
        and isinstance(getattr(module, "scale", None), float)
        and _holds(module, *projections, "proj", "attn_drop", "proj_drop")
    )


def _looks_like_attention(module: nn.Module) -> bool:
    transformed = ("proj_l", "proj_w", "reatten_matrix", "q_norm", "k_norm", "sr")
    if not _is_attention(module, "qkv") or any(hasattr(module, name) for name in transformed):
        return False
    return len(_parameters(module)) == 1


def _looks_like_talking_heads(module: nn.Module) -> bool:
    return _is_attention(module, "qkv", "proj_l", "proj_w") and len(_parameters(module)) == 1


def _looks_like_class_attention(module: nn.Module) -> bool:
    return _is_attention(module, "q", "k", "v") and len(_parameters(module)) == 1


def _looks_like_re_attention(module: nn.Module) -> bool:
    return (
        _is_attention(module, "qkv") and _holds(module, "reatten_matrix", "var_norm") and len(_parameters(module)) == 2
    )


def _looks_like_layer_normed_re_attention(module: nn.Module) -> bool:
    return _holds(module, "norm", "to_qkv", "reattn_norm", "to_out") and hasattr(module, "reattn_weights")


def _looks_untransformed(module: nn.Module) -> bool:
    plain = getattr(module, "apply_transform", True) is False and not hasattr(module, "reatten_matrix")
    return plain and _is_attention(module, "qkv") and len(_parameters(module)) == 2


def _looks_like_conv_attention(module: nn.Module) -> bool:
    projections = ("proj_q", "proj_k", "proj_v")
    return _is_attention(module, *projections) and hasattr(module, "forward_conv") and len(_parameters(module)) == 3


def _looks_like_known_conv_attention(module: nn.Module) -> bool:
    """With a ``forward_conv`` that does nothing on the side, so that it need not be called."""
    code = getattr(getattr(plain_class(module), "forward_conv", None), "__code__", None)
    return _looks_like_conv_attention(module) and code is not None and names_used(code) <= _NAMES | _CONVOLUTIONS


def _fusible_convolutions(module: nn.Module) -> dict[str, Any]:
    names = (f"conv_proj_{name}" for name in "qkv")
    return {
        name: overrides.ConvProjectionOverride for name in names if _is_fusible_projection(getattr(module, name, None))
    }


def _is_fusible_projection(part: Any) -> bool:
    return (
        isinstance(part, nn.Module) and _looks_like_conv_projection(part) and not overrides.check_conv_projection(part)
    )


def _looks_like_mlp(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    holds = _holds(module, "fc1", "act", "fc2") and parts <= {"fc1", "act", "fc2", *overrides.DROPOUTS}
    return holds and not isinstance(module.fc1, nn.Conv2d) and len(_parameters(module)) == 1


def _looks_like_conv_projection(module: nn.Module) -> bool:
    if plain_class(module) is not nn.Sequential or len(module) != 3:
        return False
    conv, norm, rearrange = module
    depthwise = isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels
    return depthwise and isinstance(norm, nn.BatchNorm2d) and type(rearrange).__name__ == "Rearrange"


def _looks_like_generator(module: nn.Module) -> bool:
    conv = overrides.convolution(module)
    depthwise = isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels
    alone = {name for name, _ in module.named_children()} == {"proj"} and not list(module.parameters(recurse=False))
    return depthwise and alone and len(_parameters(module)) == 3


def _keeps_class_token(module: nn.Module) -> bool:
    code = getattr(plain_class(module).forward, "__code__", None)
    return code is not None and "cat" in code.co_names


def _looks_like_leff(module: nn.Module) -> bool:
    convolutions = ("conv1", "conv2", "conv3")
    holds = _holds(module, *convolutions) and (_holds(module, "bn1", "bn2", "bn3") or not hasattr(module, "bn1"))
    return holds and hasattr(module, "with_bn") and len(_parameters(module)) == 1


def _tokens(width: int, count: int = 6) -> Tensor:
    return torch.randn(2, count, width, dtype=torch.float64)


def _example_packed(module: nn.Module) -> tuple[Any, ...]:
    return (_tokens(module.qkv.in_features),)


def _example_conv_attention(module: nn.Module) -> tuple[Any, ...]:
    prefix = bool(getattr(module, "with_cls_token", False))
    return _tokens(module.proj_q.in_features, 30 + prefix), 5, 6


def _example_conv_projection(module: nn.Module) -> tuple[Any, ...]:
    return (torch.randn(2, module[0].in_channels, 5, 6, dtype=torch.float64),)


def _example_generator(module: nn.Module) -> tuple[Any, ...]:
    return _tokens(overrides.convolution(module).in_channels, 30 + _keeps_class_token(module)), 5, 6


def _example_leff(module: nn.Module) -> tuple[Any, ...]:
    return (_tokens(module.conv1.in_channels, 17),)


_HEADS = frozenset({"num_heads", "scale", "attn_drop", "proj", "proj_drop"})
_NAMES = frozenset(
    "torch nn functional F math einsum rearrange shape size dim reshape view permute transpose unbind chunk split "
    "contiguous flatten unsqueeze squeeze softmax matmul cat int sqrt".split()
)
"""What a forward may use of torch and einops; none of it keeps anything."""
_SDPA_NAMES = frozenset({"fused_attn", "scaled_dot_product_attention", "p", "training", "head_dim"})
_CONVOLUTIONS = frozenset({"with_cls_token", *(f"conv_proj_{name}" for name in "qkv")})

PATTERNS = (
    Pattern(
        "DeiT's Attention",
        overrides.AttentionOverride,
        _looks_like_attention,
        _HEADS | _SDPA_NAMES | {"qkv"},
        _example_packed,
    ),
    Pattern(
        "CaiT's Attention_talking_head",
        timm.TalkingHeadOverride,
        _looks_like_talking_heads,
        _HEADS | {"qkv", "proj_l", "proj_w"},
        _example_packed,
    ),
    Pattern(
        "CaiT's Class_Attention",
        timm.ClassAttentionOverride,
        _looks_like_class_attention,
        _HEADS | {"q", "k", "v"},
        lambda module: (_tokens(module.q.in_features),),
    ),
    Pattern(
        "DeepViT's ReAttention",
        overrides.ReAttentionOverride,
        _looks_like_re_attention,
        _HEADS | {"qkv", "apply_transform", "reatten_matrix", "var_norm", "reatten_scale"},
        _example_packed,
    ),
    Pattern(
        "DeepViT's ReAttention without transform",
        overrides.UntransformedReAttentionOverride,
        _looks_untransformed,
        _HEADS | {"qkv", "apply_transform", "reatten_matrix", "var_norm", "reatten_scale"},
        _example_packed,
    ),
    Pattern(
        "vit-pytorch's DeepViT Attention",
        vit_pytorch.ReAttentionOverride,
        _looks_like_layer_normed_re_attention,
        vit_pytorch.RE_ATTENTION_NAMES | {"map"},
        lambda module: (_tokens(module.to_qkv.in_features),),
        vit_pytorch.check_re_attention,
    ),
    *(
        Pattern(
            name,
            override,
            looks,
            _HEADS | {"forward_conv"} | {f"{kind}_{name}" for kind in ("proj", "conv_proj") for name in "qkv"},
            _example_conv_attention,
            parts=_fusible_convolutions,
        )
        for name, override, looks in (
            ("CvT's Attention", overrides.ConvAttentionOverride, _looks_like_known_conv_attention),
            (
                "CvT's Attention with a forward_conv of its own",
                overrides.OwnConvAttentionOverride,
                _looks_like_conv_attention,
            ),
        )
    ),
    Pattern(
        "CvT's conv_proj Sequential",
        overrides.ConvProjectionOverride,
        _looks_like_conv_projection,
        frozenset(),
        _example_conv_projection,
        overrides.check_conv_projection,
    ),
    Pattern(
        "CPVT's PEG",
        overrides.PEGOverride,
        lambda module: _looks_like_generator(module) and _keeps_class_token(module),
        frozenset({"proj"}),
        _example_generator,
        overrides.check_generator,
    ),
    Pattern(
        "Twins' PosCNN",
        overrides.PosConvOverride,
        _looks_like_generator,
        frozenset({"proj", "s", "stride"}),
        _example_generator,
    ),
    Pattern(
        "CeiT's LocallyEnhancedFeedForward",
        overrides.LeFFOverride,
        _looks_like_leff,
        frozenset({"with_bn", "act", "gelu"}) | {f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)},
        _example_leff,
        overrides.check_leff,
    ),
    Pattern(
        "DeiT's Mlp",
        overrides.MlpOverride,
        _looks_like_mlp,
        frozenset({"fc1", "act", "fc2", *overrides.DROPOUTS}),
        lambda module: (_tokens(module.fc1.in_features),),
        lambda module: overrides.layers_of(module).reasons("fc1", "act", "fc2"),
    ),
)


def _check(module: nn.Module, pattern: Pattern) -> list[str]:
    # The same names, since a caller may pass arguments by them.
    expected = tuple(inspect.signature(pattern.override.forward).parameters)[1:]
    found = check_parameters(module, *expected) + pattern.check(module)
    return found or tried(module, pattern.override, pattern.example, pattern.parts(module))


def _row(pattern: Pattern) -> Row:
    return Row(
        f"{pattern.name} under any name",
        pattern.override,
        functools.partial(_check, pattern=pattern),
        _NAMES | pattern.uses if pattern.uses else None,
        pattern.looks,
    )


ROWS = tuple(_row(pattern) for pattern in PATTERNS)
