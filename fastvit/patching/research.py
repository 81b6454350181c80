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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching import timm, vit_pytorch
from fastvit.patching.fusion import Fused, Row, intact, plain_class
from fastvit.patching.later import Later
from fastvit.patching.parts import check_depthwise, check_parameters, dropout_p, is_plain
from fastvit.patching.trial import tried
from fastvit.reference import functional
from fastvit.reference.ceit import leff_arguments
from fastvit.reference.functional import BatchNorm


def _packed_heads(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, N, D) as views of the packed projection."""
    batch, tokens, dim = x.shape
    qkv = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, dim // module.num_heads)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _merged(module: nn.Module, out: Tensor) -> Tensor:
    return module.proj_drop(module.proj(out.transpose(1, 2).flatten(2)))


class AttentionSeam(Fused):
    """The attention of DeiT, CaiT and CeiT."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor) -> Tensor:
        if not intact(self):
            return self.fastvit_plain.forward(self, x)
        q, k, v = _packed_heads(self, x)
        out = ops.masked_attention(
            q, k, v, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=self.fastvit_backend
        )
        return _merged(self, out)


def _later(compute: Callable[[], Tensor]) -> Tensor:
    """A map for whoever may want it; in a graph it is a node like others, left out where nobody uses it."""
    in_a_graph = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    return compute() if in_a_graph else Later(compute)


class UntransformedReAttentionSeam(Fused):
    """DeepViT's attention in its first blocks, where maps are not mixed; the map it returns is computed on demand."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not intact(self) or dropout_p(self.attn_drop) > 0.0:  # the map returned is the one that was dropped from
            return self.fastvit_plain.forward(self, x, atten)
        q, k, v = _packed_heads(self, x)
        out = ops.masked_attention(q, k, v, scale=self.scale, backend=self.fastvit_backend)
        return _merged(self, out), _later(functools.partial(_finished_map, q, k, scale=self.scale))


class ReAttentionSeam(Fused):
    """DeepViT's re-attention; the map it returns is computed on demand, with gradients where the block has them."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout, "reatten_matrix": nn.Conv2d, "var_norm": nn.BatchNorm2d}

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not intact(self) or dropout_p(self.attn_drop) > 0.0:  # the map returned is the one that was dropped from
            return self.fastvit_plain.forward(self, x, atten)
        q, k, v = _packed_heads(self, x)
        weight, bias, norm = (
            self.reatten_matrix.weight.flatten(1),
            self.reatten_matrix.bias,
            BatchNorm.of(self.var_norm),
        )
        options = {"output_scale": self.reatten_scale, "scale": self.scale}
        out = ops.re_attention(q, k, v, weight, bias, norm, **options, backend=self.fastvit_backend)
        as_it_is = {"post_weight": _copied(weight), "post_bias": _copied(bias), "norm": _as_it_is(norm)}
        return _merged(self, out), _later(functools.partial(_finished_map, q, k, **as_it_is, **options))


def _copied(tensor: Tensor | None) -> Tensor | None:
    """Safe from an optimizer's step; a few numbers."""
    return None if tensor is None else tensor.clone()


def _as_it_is(norm: BatchNorm) -> BatchNorm:
    """The norm of this forward pass, once more: what it was, and nothing counted twice."""
    mean, var = (None, None) if norm.use_batch_stats else (_copied(norm.running_mean), _copied(norm.running_var))
    return norm._replace(running_mean=mean, running_var=var, weight=_copied(norm.weight), bias=_copied(norm.bias))


def _finished_map(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """What weighs the rows of a unit matrix is the map; all in the dtype that autocast gave q."""
    for name in ("post_weight", "post_bias"):
        options[name] = None if options.get(name) is None else options[name].to(q.dtype)
    unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    return functional.head_mixed_attention(q, k, unit, **options)


class ConvAttentionSeam(Fused):
    """CvT's attention behind its own ``forward_conv``, logits scaled as the module says."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        if not intact(self):
            return self.fastvit_plain.forward(self, x, h, w)
        q, k, v = self.forward_conv(x, h, w)
        projected = ((self.proj_q, q), (self.proj_k, k), (self.proj_v, v))
        q, k, v = (project(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for project, tokens in projected)
        out = ops.masked_attention(
            q,
            k,
            v,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=self.fastvit_backend,
        )
        return _merged(self, out)


class ConvProjectionSeam(Fused):
    """CvT's (convolution, BatchNorm, rearrangement to tokens), of the tokens that the map given is a view of."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Sequential's name)
        if _check_conv_projection(self):
            return self.fastvit_plain.forward(self, input)
        conv, norm, _ = self.children()
        return ops.token_depthwise_conv(
            input.flatten(2).transpose(1, 2),
            conv.weight,
            conv.bias,
            grid=tuple(input.shape[2:]),
            stride=conv.stride[0],
            padding=conv.padding[0],
            norm=BatchNorm.of(norm),
            backend=self.fastvit_backend,
        )


def _position_encoding(module: nn.Module, conv: Any, x: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    return ops.token_depthwise_conv(
        x,
        conv.weight,
        conv.bias,
        grid=grid,
        stride=conv.stride[0],
        padding=conv.padding[0],
        prefix_tokens=prefix,
        residual=conv.stride[0] == 1,
        backend=module.fastvit_backend,
    )


def _check_conv_projection(module: nn.Module) -> list[str]:
    conv, norm, rearrange = module.children()
    found = check_depthwise("its convolution", conv, norm)
    return found if is_plain(rearrange, type(rearrange)) else [*found, "its rearrangement has forward hooks"]


class PosConvSeam(Fused):
    """Twins' ``PosCNN``: a position encoding generator for tokens without a class token."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        conv = _convolution(self)
        if _check_generator(self) or x.shape[1] != H * W:
            return self.fastvit_plain.forward(self, x, H, W)
        return _position_encoding(self, conv, x, (H, W), 0)


class PEGSeam(Fused):
    """CPVT's position encoding generator, which lets the class token in front pass."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        conv = _convolution(self)
        if _check_generator(self) or x.shape[1] != H * W + 1:
            return self.fastvit_plain.forward(self, x, H, W)
        return _position_encoding(self, conv, x, (H, W), 1)


def _convolution(module: nn.Module) -> Any:
    """What is, or is alone in, a generator's ``proj``."""
    proj: Any = getattr(module, "proj", None)
    return proj[0] if isinstance(proj, nn.Sequential) and len(proj) == 1 else proj


def _check_generator(module: nn.Module) -> list[str]:
    found = check_depthwise("proj", _convolution(module))
    return found if is_plain(module.proj, type(module.proj)) else [*found, "proj has forward hooks"]


class LeFFSeam(Fused):
    """CeiT's feed-forward whole: on the patch tokens as they lie, the class token in front passing."""

    fastvit_op = "leff"
    fastvit_reads: ClassVar = {"conv1": nn.Conv2d, "conv2": nn.Conv2d, "conv3": nn.Conv2d}

    def forward(self, x: Tensor) -> Tensor:
        side = int((x.shape[1] - 1) ** 0.5)
        if not intact(self) or _check_leff(self) or side * side != x.shape[1] - 1:
            return self.fastvit_plain.forward(self, x)
        return ops.leff(x, **leff_arguments(self), grid=(side, side), backend=self.fastvit_backend)


def _check_leff(module: nn.Module) -> list[str]:
    norms = ("bn1", "bn2", "bn3") if module.with_bn else ()
    found = [
        f"{name} is not a plain nn.BatchNorm2d without hooks"
        for name in norms
        if not is_plain(getattr(module, name), nn.BatchNorm2d)
    ]
    gelus = [part for part in module.children() if is_plain(part, nn.GELU) and part.approximate == "none"]
    if len(gelus) != 1:
        found.append("it does not hold one plain nn.GELU() without hooks")
    found += check_depthwise("conv2", module.conv2)
    conv: Any = module.conv2
    keeps = (conv.kernel_size[0] % 2, conv.padding[0], conv.stride[0]) == (1, conv.kernel_size[0] // 2, 1)
    return found if found or keeps else ["conv2 does not keep the size of the map"]


class Pattern(NamedTuple):
    """A block of an official repository.

    Attributes:
        name: the class there.
        seam: what replaces its forward.
        looks: whether a module could be one, by its attributes.
        uses: the attributes its forward uses.
        example: positional arguments to try a module on.
        check: reasons why a module that looks like one would always run its plain forward.
    """

    name: str
    seam: Any
    looks: Callable[[nn.Module], bool]
    uses: frozenset[str]
    example: Callable[[nn.Module], tuple[Any, ...]]
    check: Callable[[nn.Module], list[str]] = lambda module: []


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


def _looks_like_conv_projection(module: nn.Module) -> bool:
    if plain_class(module) is not nn.Sequential or len(module) != 3:
        return False
    conv, norm, rearrange = module
    depthwise = isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels
    return depthwise and isinstance(norm, nn.BatchNorm2d) and type(rearrange).__name__ == "Rearrange"


def _looks_like_generator(module: nn.Module) -> bool:
    conv = _convolution(module)
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
    return _tokens(_convolution(module).in_channels, 30 + _keeps_class_token(module)), 5, 6


def _example_leff(module: nn.Module) -> tuple[Any, ...]:
    return (_tokens(module.conv1.in_channels, 17),)


_HEADS = frozenset({"num_heads", "scale", "attn_drop", "proj", "proj_drop"})
_NAMES = frozenset(
    "torch nn functional F math einsum rearrange shape size dim reshape view permute transpose unbind chunk split "
    "contiguous flatten unsqueeze squeeze softmax matmul cat int sqrt".split()
)
"""What a forward may use of torch and einops; none of it keeps anything."""

PATTERNS = (
    Pattern("DeiT's Attention", AttentionSeam, _looks_like_attention, _HEADS | {"qkv"}, _example_packed),
    Pattern(
        "CaiT's Attention_talking_head",
        timm.TalkingHeadSeam,
        _looks_like_talking_heads,
        _HEADS | {"qkv", "proj_l", "proj_w"},
        _example_packed,
    ),
    Pattern(
        "CaiT's Class_Attention",
        timm.ClassAttentionSeam,
        _looks_like_class_attention,
        _HEADS | {"q", "k", "v"},
        lambda module: (_tokens(module.q.in_features),),
    ),
    Pattern(
        "DeepViT's ReAttention",
        ReAttentionSeam,
        _looks_like_re_attention,
        _HEADS | {"qkv", "apply_transform", "reatten_matrix", "var_norm", "reatten_scale"},
        _example_packed,
    ),
    Pattern(
        "DeepViT's ReAttention without transform",
        UntransformedReAttentionSeam,
        _looks_untransformed,
        _HEADS | {"qkv", "apply_transform", "reatten_matrix", "var_norm", "reatten_scale"},
        _example_packed,
    ),
    Pattern(
        "vit-pytorch's DeepViT Attention",
        vit_pytorch.ReAttentionSeam,
        _looks_like_layer_normed_re_attention,
        vit_pytorch.RE_ATTENTION_NAMES | {"map"},
        lambda module: (_tokens(module.to_qkv.in_features),),
        vit_pytorch.check_re_attention,
    ),
    Pattern(
        "CvT's Attention",
        ConvAttentionSeam,
        _looks_like_conv_attention,
        _HEADS | {"forward_conv"} | {f"{kind}_{name}" for kind in ("proj", "conv_proj") for name in "qkv"},
        _example_conv_attention,
    ),
    Pattern(
        "CvT's conv_proj Sequential",
        ConvProjectionSeam,
        _looks_like_conv_projection,
        frozenset(),
        _example_conv_projection,
        _check_conv_projection,
    ),
    Pattern(
        "CPVT's PEG",
        PEGSeam,
        lambda module: _looks_like_generator(module) and _keeps_class_token(module),
        frozenset({"proj"}),
        _example_generator,
        _check_generator,
    ),
    Pattern(
        "Twins' PosCNN", PosConvSeam, _looks_like_generator, frozenset({"proj", "s", "stride"}), _example_generator
    ),
    Pattern(
        "CeiT's LocallyEnhancedFeedForward",
        LeFFSeam,
        _looks_like_leff,
        frozenset({"with_bn", "act", "gelu"}) | {f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)},
        _example_leff,
        _check_leff,
    ),
)


def _check(module: nn.Module, pattern: Pattern) -> list[str]:
    # The same names, since a caller may pass arguments by them.
    expected = tuple(inspect.signature(pattern.seam.forward).parameters)[1:]
    found = check_parameters(module, *expected) + pattern.check(module)
    return found or tried(module, pattern.seam, pattern.example)


def _row(pattern: Pattern) -> Row:
    return Row(
        f"{pattern.name} under any name",
        pattern.seam,
        functools.partial(_check, pattern=pattern),
        _NAMES | pattern.uses if pattern.uses else None,
        pattern.looks,
    )


ROWS = tuple(_row(pattern) for pattern in PATTERNS)
