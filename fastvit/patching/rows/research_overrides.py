"""What replaces the forwards of research code's blocks; :mod:`fastvit.patching.rows.research` says of which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import Fused, fused_backend, is_fused, plain_class
from fastvit.patching.later import Later
from fastvit.patching.rows.mlps import Layers
from fastvit.patching.rows.parts import check_depthwise, dropout_p, is_rearrangement, project
from fastvit.reference import functional
from fastvit.reference.ceit import leff_arguments
from fastvit.reference.functional import BatchNorm, Projection
from fastvit.reference.overrides import is_plain, obstacles


def _packed_heads(module: nn.Module, x: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, N, D) as views of the packed projection."""
    qkv = project(module.qkv, x, backend).unflatten(2, (3, module.num_heads, -1))
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _merged(module: nn.Module, out: Tensor, backend: str) -> Tensor:
    return module.proj_drop(project(module.proj, out.transpose(1, 2).flatten(2), backend))


class AttentionOverride(Fused):
    """The attention of DeiT, CaiT and CeiT."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        q, k, v = _packed_heads(self, x, backend)
        out = ops.masked_attention(q, k, v, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=backend)
        return _merged(self, out, backend)


def _later(compute: Callable[[], Tensor]) -> Tensor:
    """A map for whoever may want it; in a graph it is a node like others, left out where nobody uses it."""
    in_a_graph = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    return compute() if in_a_graph else Later(compute)


class UntransformedReAttentionOverride(Fused):
    """DeepViT's attention in its first blocks, where maps are not mixed; the map it returns is computed on demand."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        backend = fused_backend(self)
        if backend is None or dropout_p(self.attn_drop) > 0.0:  # the map returned is the one that was dropped from
            return plain_class(self).forward(self, x, atten)
        q, k, v = _packed_heads(self, x, backend)
        out = ops.masked_attention(q, k, v, scale=self.scale, backend=backend)
        return _merged(self, out, backend), _later(functools.partial(_finished_map, q, k, scale=self.scale))


class ReAttentionOverride(Fused):
    """DeepViT's re-attention; the map it returns is computed on demand, with gradients where the block has them."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout, "reatten_matrix": nn.Conv2d, "var_norm": nn.BatchNorm2d}

    def forward(self, x: Tensor, atten: Tensor | None = None) -> tuple[Tensor, Tensor]:
        backend = fused_backend(self)
        if backend is None or dropout_p(self.attn_drop) > 0.0:  # the map returned is the one that was dropped from
            return plain_class(self).forward(self, x, atten)
        q, k, v = _packed_heads(self, x, backend)
        weight, bias, norm = (
            self.reatten_matrix.weight.flatten(1),
            self.reatten_matrix.bias,
            BatchNorm.of(self.var_norm),
        )
        options = {"output_scale": self.reatten_scale, "scale": self.scale}
        out = ops.re_attention(q, k, v, weight, bias, norm, **options, backend=backend)
        as_it_is = {"post_weight": _copied(weight), "post_bias": _copied(bias), "norm": _as_it_is(norm)}
        return _merged(self, out, backend), _later(functools.partial(_finished_map, q, k, **as_it_is, **options))


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


def _conv_attention(module: nn.Module, projected: Iterable[Tensor], backend: str) -> Tensor:
    """CvT's attention behind its projections (B, N, C), logits scaled as the module says."""
    q, k, v = (tokens.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for tokens in projected)
    drop = dropout_p(module.attn_drop)
    return _merged(module, ops.masked_attention(q, k, v, scale=module.scale, dropout_p=drop, backend=backend), backend)


def _called_projections(module: nn.Module, x: Tensor, h: int, w: int, backend: str) -> Iterator[Tensor]:
    for name, tokens in zip("qkv", module.forward_conv(x, h, w), strict=True):
        yield project(getattr(module, f"proj_{name}"), tokens, backend)


class OwnConvAttentionOverride(Fused):
    """CvT's attention behind a ``forward_conv`` of its own, which is called."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, h, w)
        return _conv_attention(self, _called_projections(self, x, h, w, backend), backend)


class ConvAttentionOverride(Fused):
    """CvT's attention; its three projections read their tokens once where their convolutions are fused as well."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, h, w)
        parts = [(getattr(self, f"conv_proj_{name}"), getattr(self, f"proj_{name}")) for name in "qkv"]
        if not all(_is_projection(*part, backend) for part in parts):
            return _conv_attention(self, _called_projections(self, x, h, w, backend), backend)
        settings = {"grid": (h, w), "prefix_tokens": x.shape[1] - h * w, "backend": backend}
        projected = ops.conv_projection(x, *(_as_projection(*part) for part in parts), **settings)
        return _conv_attention(self, projected, backend)


def _is_projection(convolution: Any, linear: nn.Module, backend: str) -> bool:
    """Whether a projection's parts do no more than their tensors tell, and are fused as the attention is."""
    fused = isinstance(convolution, ConvProjectionOverride) and is_fused(convolution, backend)
    return fused and not check_conv_projection(convolution) and is_plain(linear, nn.Linear)


def _as_projection(convolution: Any, linear: Any) -> Projection:
    conv, norm, _ = convolution.children()
    weights = (conv.weight, BatchNorm.of(norm), linear.weight, linear.bias)
    return Projection(*weights, conv.stride[0], conv.padding[0], conv.bias)


class ConvProjectionOverride(Fused):
    """CvT's (convolution, BatchNorm, rearrangement to tokens), of the tokens that the map given is a view of."""

    fastvit_op = "conv_projection"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Sequential's name)
        backend = fused_backend(self)
        if backend is None or check_conv_projection(self):
            return plain_class(self).forward(self, input)
        conv, norm, _ = self.children()
        return ops.token_depthwise_conv(
            input.flatten(2).transpose(1, 2),
            conv.weight,
            conv.bias,
            grid=tuple(input.shape[2:]),
            stride=conv.stride[0],
            padding=conv.padding[0],
            norm=BatchNorm.of(norm),
            backend=backend,
        )


def _position_encoding(conv: Any, x: Tensor, grid: tuple[int, int], prefix: int, backend: str) -> Tensor:
    return ops.token_depthwise_conv(
        x,
        conv.weight,
        conv.bias,
        grid=grid,
        stride=conv.stride[0],
        padding=conv.padding[0],
        prefix_tokens=prefix,
        residual=conv.stride[0] == 1,
        backend=backend,
    )


def check_conv_projection(module: nn.Module) -> list[str]:
    conv, norm, rearrange = module.children()
    found = check_depthwise("its convolution", conv, norm)
    return found if is_rearrangement(rearrange) else [*found, "its rearrangement has forward hooks"]


class PosConvOverride(Fused):
    """Twins' ``PosCNN``: a position encoding generator for tokens without a class token."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None or check_generator(self) or x.shape[1] != H * W:
            return plain_class(self).forward(self, x, H, W)
        return _position_encoding(convolution(self), x, (H, W), 0, backend)


class PEGOverride(Fused):
    """CPVT's position encoding generator, which lets the class token in front pass."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None or check_generator(self) or x.shape[1] != H * W + 1:
            return plain_class(self).forward(self, x, H, W)
        return _position_encoding(convolution(self), x, (H, W), 1, backend)


def convolution(module: nn.Module) -> Any:
    """What is, or is alone in, a generator's ``proj``."""
    proj: Any = getattr(module, "proj", None)
    return proj[0] if isinstance(proj, nn.Sequential) and len(proj) == 1 else proj


def check_generator(module: nn.Module) -> list[str]:
    around = [f"proj {obstacle}" for obstacle in obstacles(module.proj, nn.Sequential, nn.Conv2d)]
    return [*check_depthwise("proj", convolution(module)), *around]


class LeFFOverride(Fused):
    """CeiT's feed-forward whole: on the patch tokens as they lie, the class token in front passing."""

    fastvit_op = "leff"
    fastvit_reads: ClassVar = {"conv1": nn.Conv2d, "conv2": nn.Conv2d, "conv3": nn.Conv2d}

    def forward(self, x: Tensor) -> Tensor:
        side = int((x.shape[1] - 1) ** 0.5)
        backend = fused_backend(self)
        if backend is None or check_leff(self) or side * side != x.shape[1] - 1:
            return plain_class(self).forward(self, x)
        return ops.leff(x, **leff_arguments(self), grid=(side, side), backend=backend)


def check_leff(module: nn.Module) -> list[str]:
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


class MlpOverride(Fused):
    """The ``Mlp`` of all these repositories; QuickGELU, which CvT's brings along, is known by its name."""

    fastvit_op = "mlp"

    def forward(self, x: Tensor) -> Tensor:
        layers, backend = layers_of(self), fused_backend(self)
        if backend is None or not layers.fusible():
            return plain_class(self).forward(self, x)
        return layers.run(x, backend)


DROPOUTS = ("drop", "drop1", "drop2", "dropout")


def layers_of(module: Any) -> Layers:
    dropouts = tuple(getattr(module, name) for name in DROPOUTS if hasattr(module, name))
    return Layers(module.fc1, module.act, module.fc2, dropouts, by_name=True)
