"""Re-attention with a synchronised BatchNorm: two processes with a part of the batch each give what one gives with all.

The processes are started once for all cases. nn.SyncBatchNorm itself does not run on the CPU, the fused path does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from fastvit import backends, ops
from fastvit.ops.head_mixed_attention import Call, attend
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, recomputing
from tests.helpers import assert_as_accurate, spawned
from tests.ops import head_mixed_attention_plain

SHARES = (3, 2)
"""Images a process has: unequal, so that the counts matter, too."""
HEADS, TOKENS, DIM, STEPS = 4, 9, 5, 2

CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "no affine": {"affine": False},
}
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, BatchNorm, Tensor], Tensor]


def _algebra(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, norm: BatchNorm, mask: Tensor) -> Tensor:
    call = Call(q, k, v, None, None, weight, bias, norm, 1.0, mask[:, None, None], 0.5, 0.0, False)
    return attend(head_mixed_attention_plain.PLAIN, call)


def _fused(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, norm: BatchNorm, mask: Tensor) -> Tensor:
    return ops.re_attention(q, k, v, weight, bias, norm, mask=mask, scale=0.5, backend="cpp")


def _reference(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, norm: BatchNorm, mask: Tensor) -> Tensor:
    return functional.re_attention(q, k, v, weight, bias, norm, mask=mask, scale=0.5)


def _train(attend: Attend, norm: nn.Module, images: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a few steps leave behind in a process that has these images; its outputs and gradients of all steps.

    The parameters' gradients are those of the sum of all images' losses once they are added up over the processes.
    """
    torch.manual_seed(0)
    norm = norm.to(dtype)
    total = sum(SHARES)
    parameters = {"weight": torch.randn(HEADS, HEADS), "bias": torch.randn(HEADS)}
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in parameters.items()}
    left: dict[str, list[Tensor]] = {}
    for _ in range(STEPS):
        qkv = torch.randn(3, total, HEADS, TOKENS, DIM)[:, images].to(dtype).requires_grad_()
        mask = (torch.rand(total, TOKENS) < 0.8)[images]
        target = torch.randn(total, HEADS, TOKENS, DIM)[images].to(dtype)
        with recomputing():  # as a checkpointed block would, once more than counts
            attend(*qkv.detach(), *leaves.values(), BatchNorm.of(norm), mask)
        out = attend(*qkv, *leaves.values(), BatchNorm.of(norm), mask)
        loss = (out * target).sum()
        loss.backward()
        for name, tensor in (("out", out), ("qkv", qkv.grad)):
            left.setdefault(name, []).append(tensor.detach())
    joined = {name: torch.cat(tensors, 0 if name == "out" else 1) for name, tensors in left.items()}
    joined |= {name: tensor.grad for name, tensor in (*leaves.items(), *norm.named_parameters())}
    return joined | dict(norm.named_buffers())


def _ways() -> dict[str, tuple[Attend, torch.dtype]]:
    ways: dict[str, tuple[Attend, torch.dtype]] = {"algebra": (_algebra, torch.float64)}
    return ways if backends.cpp_reasons() else ways | {"cpp": (_fused, torch.float32)}


def _worker(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", len(SHARES))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(SHARES))
    mine = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    results = {}
    for way, (attend_by, dtype) in _ways().items():
        for case, options in CASES.items():
            results[way, case] = _train(attend_by, nn.SyncBatchNorm(HEADS, **options), mine, dtype)
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    """By process, what it reports for every way and case."""
    folder = tmp_path_factory.mktemp("processes")
    spawned(_worker, (str(folder),), len(SHARES))
    return [torch.load(folder / str(rank)) for rank in range(len(SHARES))]


def _together(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    """One process's tensor from those of several: images side by side, gradients added, buffers the same in each."""
    tensors = [part[name] for part in parts]
    if name in ("out", "qkv"):
        axis = 0 if name == "out" else 1
        steps = [tensor.chunk(STEPS, axis) for tensor in tensors]
        return torch.cat([torch.cat(step, axis) for step in zip(*steps, strict=True)], axis)
    if name in ("running_mean", "running_var", "num_batches_tracked"):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
        return tensors[0]
    return torch.stack(tensors).sum(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", _ways())
def test_two_processes_give_what_one_gives(way: str, case: str, results: Any) -> None:
    parts = [result[way, case] for result in results]
    exact, plain = (
        _train(_reference, nn.BatchNorm2d(HEADS, **CASES[case]), slice(None), dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert parts[0].keys() == exact.keys()
    for name, expected in exact.items():
        got = _together(parts, name)
        if way == "algebra" or name == "num_batches_tracked":
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        else:
            assert_as_accurate(got, plain[name], expected, name=name)
