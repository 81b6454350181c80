"""What a forward keeps for its backward: tensors saved, and those that a Python function's context holds besides.

python -m tests.training.saved    a table for published models, one image

"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def nodes(outputs: list[Tensor]) -> Iterator[object]:
    """Every node of the autograd graph."""
    waiting, seen = [output.grad_fn for output in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        yield node


def kept(model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """By address, what a forward of ``model`` leaves in memory for the backward; parameters and the input are not."""
    model(x)  # products are measured when a size is first seen, and what they keep is not the model's
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        outputs = pytree.tree_leaves(model(x))
    for node in nodes(outputs):
        found += [
            leaf
            for leaf in pytree.tree_leaves(list(getattr(node, "__dict__", {}).values()))
            if isinstance(leaf, Tensor)
        ]
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in found}
    return {address: tensor for address, tensor in storages.items() if address not in own}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept(model, x).values())


def main() -> None:
    import fastvit
    from benchmarks.models import MODELS

    print("| model | plain, MiB | patched, MiB | |\n|---|---|---|---|")
    for name in MODELS:
        model, x = fastvit.create_model(name, fused=False).train(), torch.randn(1, 3, 224, 224)
        plain = kept_bytes(model, x) / 2**20
        patched = kept_bytes(fastvit.patch(model), x) / 2**20
        print(f"| {name} | {plain:.0f} | {patched:.0f} | {patched / plain:.2f} |")


if __name__ == "__main__":
    main()
