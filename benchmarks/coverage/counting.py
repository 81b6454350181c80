"""What a forward computes, counted below autograd, where torch's fused kernels and ours are single operations.

An attention is a product of matrices, a softmax of it, and a product with that; or one of the fused kernels. (A softmax
of keys alone, as linear attention has it, is none.) An MLP is two products (of matrices, or 1x1 convolutions) with an
activation between. Tensors are followed by what they are made of: copies, views, sums with a bias, dropout and norms
keep what a tensor is.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counting"]

_OURS = {"masked_attention_cpp", "head_mixed_attention", "masked_attention_triton", "head_mixed_attention_triton"}
_TORCHS = (
    *("_scaled_dot_product_", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    "_triton_multi_head_attention",
)
_SOFTMAXES = {"_softmax", "_safe_softmax", "_masked_softmax"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul"}
_ACTIVATIONS = {
    "gelu",
    "silu",
    "relu",
    "hardswish",
    "hardtanh",
    "mish",
    "elu",
    "leaky_relu",
    "sigmoid",
    "tanh",
    "clamp",
}
_ACTIVATIONS |= {f"{name}_" for name in _ACTIVATIONS}
_KEEPING = {"mul", "mul_", "native_dropout", "native_layer_norm", "clone", "_to_copy", "contiguous", "split", "chunk"}
_KEEPING |= {
    "slice",
    "select",
    "narrow",
    "unbind",
    "split_with_sizes",
    "native_batch_norm",
    "cudnn_batch_norm",
    "copy_",
}
LOGITS, MAP, PRODUCT, ACTIVATED = "logits", "map", "product", "activated"


class Counting(TorchDispatchMode):
    """In ``found``, how often "fastvit", "torch" and "plain" attention, "mlp" and "depthwise" were computed."""

    counts_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.kinds: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._look(func.namespace, func._schema.name.partition("::")[2], given, args, out)
        return out

    def _look(self, namespace: str, name: str, given: list[Tensor], args: tuple[Any, ...], out: Any) -> None:
        if namespace == "fastvit":
            self.found["fastvit"] += name in _OURS
            return
        if name.startswith(_TORCHS):
            self.found["torch"] += 1
            return
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        kinds: set[str] = set()
        convolves = name == "convolution"
        if convolves and given[1].dim() > 2:
            weight = given[1]
            self.found["depthwise"] += weight.shape[1] == 1 and args[8] > 1
            if weight.shape[2:].numel() > 1 or args[8] > 1:
                return
        if name in _SOFTMAXES:
            kinds |= {MAP} if self._is(given[0], LOGITS) else set()
        elif name in _PRODUCTS or convolves:
            kinds |= self._product(name, given, made)
        elif name in _ACTIVATIONS and self._is(given[0], PRODUCT):
            kinds |= {ACTIVATED, PRODUCT}
        else:
            kinds |= self._kept(name, given, made)
        for tensor in made:
            if kinds:
                key = id(tensor)
                self.kinds[key] = (weakref.ref(tensor, lambda _, key=key: self.kinds.pop(key, None)), frozenset(kinds))

    def _is(self, tensor: Tensor, kind: str) -> bool:
        found = self.kinds.get(id(tensor))
        return found is not None and found[0]() is tensor and kind in found[1]

    def _product(self, name: str, given: list[Tensor], made: list[Tensor]) -> set[str]:
        maps = [tensor for tensor in given if self._is(tensor, MAP)]
        if maps:
            batched = name in ("bmm", "baddbmm") and maps[0].shape[0] > 1
            if made[0].numel() == maps[0].numel() and not batched:
                return {MAP}  # mixed over heads
            self.found["plain"] += 1
        elif any(self._is(tensor, ACTIVATED) for tensor in given):
            self.found["mlp"] += 1
        return {PRODUCT, LOGITS} if name in ("bmm", "baddbmm") else {PRODUCT} | self._kept("", given, made) & {LOGITS}

    def _kept(self, name: str, given: list[Tensor], made: list[Tensor]) -> set[str]:
        sizes = {tensor.numel() for tensor in made}
        same = [tensor for tensor in given if {tensor.numel()} == sizes]
        kept = {kind for kind in (LOGITS, MAP) if any(self._is(tensor, kind) for tensor in same)}
        reshapes = {tensor.numel() for tensor in given[:1]} == sizes
        for tensor in given:
            if self._is(tensor, PRODUCT) and (reshapes or name in _KEEPING):
                kept.add(PRODUCT)
            single = len([each for each in given if each.numel() > 1]) == 1
            if self._is(tensor, ACTIVATED) and (name in _KEEPING or (single and reshapes)):
                kept.add(ACTIVATED)
        return kept
