"""Parts with an ``nn.SyncBatchNorm``: processes with a part of the batch each give what one process gives with all.

The processes are started once for all cases; the models are tried in tests/compat/test_processes.py, and the maps of
re-attention in test_head_mixed_attention_processes.py. torch's own layer does not run on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from fastvit.patching import patch
from fastvit.reference.ceit import LeFF, Stem
from fastvit.reference.cvt import ConvAttention
from fastvit.reference.functional import BatchNorm, normalised, recomputing
from tests.helpers import assert_as_accurate, spawned

SHARES = {"unequal": (3, 2), "one has none": (0, 5), "one value each": (1, 1)}
"""Images that each process has."""
CHANNELS, GRID, STEPS = 6, (4, 5), 2
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "no affine": {"affine": False},
}


class Norm(nn.Module):
    """A norm alone."""

    def __init__(self, **options: Any):
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS, **options)

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.bn)


class Tokens(nn.Module):
    """A part that takes tokens and their grid."""

    def __init__(self, part: nn.Module, method: str = "forward"):
        super().__init__()
        self.part, self.method = part, method

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat((x.new_ones(x.shape[0], 1, CHANNELS), x.flatten(2).transpose(1, 2)), dim=1)
        found = getattr(self.part, self.method)(tokens, GRID)
        return found if isinstance(found, Tensor) else torch.cat([each.flatten(1) for each in found], dim=1)


def _leff(**options: Any) -> nn.Module:
    return Tokens(LeFF(CHANNELS, 8, **options))


PARTS: dict[str, Callable[[], nn.Module]] = {
    **{f"norm, {case}": lambda options=options: Norm(**options) for case, options in OPTIONS.items()},
    "stem": lambda: Stem(CHANNELS, 8),
    "leff": _leff,
    "leff, paper": lambda: _leff(form="paper"),
    "projection": lambda: Tokens(ConvAttention(CHANNELS, 2, prefix_tokens=1), "project"),
}
WAYS = ("plain", "fused", "recomputed")
DTYPES = (torch.float64, torch.float32)


def _build(name: str, way: str, dtype: torch.dtype, synchronised: bool) -> nn.Module:
    torch.manual_seed(0)
    part = PARTS[name]()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if way != "plain" and not name.startswith("norm"):
        patch(part)
    if synchronised:
        part = nn.SyncBatchNorm.convert_sync_batchnorm(part)
    return part.to(dtype).train()


def _train(part: nn.Module, way: str, images: slice, total: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a few steps leave behind in a process that has these images; its outputs and gradients of all steps."""
    draws = torch.Generator().manual_seed(1)
    left: dict[str, list[Tensor]] = {"out": [], "dx": []}
    for _ in range(STEPS):
        side = (1, 1) if total == 2 else GRID
        x = torch.randn(total, CHANNELS, *side, generator=draws)[images].to(dtype).requires_grad_()
        if way == "recomputed":  # as a checkpointed block would: once more than counts
            with recomputing(), torch.no_grad():
                part(x)
        out = part(x)
        target = torch.randn(total, *out.shape[1:], generator=draws)[images].to(dtype)
        (out * target).sum().backward()
        left["out"].append(out.detach())
        left["dx"].append(x.grad)
    joined = {name: torch.stack(tensors) for name, tensors in left.items()}
    joined |= {
        name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in part.named_parameters()
    }
    return joined | dict(part.named_buffers())


def _cases() -> list[tuple[str, str, str]]:
    found = [
        (name, way, "unequal") for name in PARTS for way in WAYS if not (name.startswith("norm") and way == "fused")
    ]
    unusual = ("one has none", "one value each")
    return [*found, *(("norm, usual", "plain", shares) for shares in unusual), ("leff", "fused", unusual[0])]


def _refusals(rank: int) -> list[str]:
    """What is said of a second derivative, and of one value in all."""
    norm = nn.SyncBatchNorm(CHANNELS)
    x = torch.randn(2, CHANNELS, requires_grad=True)
    said = []
    try:
        (gradient,) = torch.autograd.grad(normalised(x, norm).square().sum(), x, create_graph=True)
        gradient.sum().backward()
    except RuntimeError as error:
        said.append(str(error))
    try:
        normalised(torch.randn(rank, CHANNELS), norm)
    except ValueError as error:
        said.append(str(error))
    return said


def _worker(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for name, way, shares in _cases():
        counts = SHARES[shares]
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for dtype in DTYPES:
            part = _build(name, way, dtype, True)
            results[name, way, shares, dtype] = _train(part, way, mine, sum(counts), dtype)
    bfloat16 = BatchNorm.of(nn.SyncBatchNorm(CHANNELS))(torch.ones(2, CHANNELS, 3, dtype=torch.bfloat16) * (1 + rank))
    results["bfloat16"] = bfloat16
    results["refusals"] = _refusals(rank)
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process reports."""
    folder = tmp_path_factory.mktemp("processes")
    spawned(_worker, (str(folder),), 2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def _as_one(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    """One process's tensor from those of several: images side by side, gradients added, buffers the same in each."""
    tensors = [part[name] for part in parts]
    if name in ("out", "dx"):
        return torch.cat(tensors, dim=1)
    if any(word in name for word in ("running", "num_batches")):
        assert torch.equal(tensors[0], tensors[1])
        return tensors[0]
    return tensors[0] + tensors[1]


@pytest.mark.parametrize("case", _cases(), ids="-".join)
def test_two_processes_give_what_one_gives(case, results):
    name, _, shares = case
    total = sum(SHARES[shares])
    exact, plain = (_train(_build(name, "plain", dtype, False), "plain", slice(None), total, dtype) for dtype in DTYPES)
    got = {dtype: {key: _as_one([each[(*case, dtype)] for each in results], key) for key in exact} for dtype in DTYPES}
    for key, expected in exact.items():
        torch.testing.assert_close(
            got[torch.float64][key], expected, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )
    # Biases in front of batch statistics have a gradient of zero, of which float32 leaves rounding alone.
    keys = [key for key, tensor in exact.items() if tensor.is_floating_point() and tensor.norm() > 1e-9]
    for kind in ("out", "dx", ""):  # few numbers are judged together
        names = [key for key in keys if key == kind or (not kind and key not in ("out", "dx"))]
        if names:
            one, two, right = (
                torch.cat([each[key].flatten() for key in names]) for each in (got[torch.float32], plain, exact)
            )
            assert_as_accurate(one, two, right, name=kind or "gradients and statistics")


def test_bfloat16(results):
    """Ones here and twos there: mean 1.5, deviation 0.5."""
    one, other = (each["bfloat16"] for each in results)
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, torch.full_like(one, -1.0)) and torch.equal(other, torch.full_like(other, 1.0))


def test_what_is_refused(results):
    for said in (each["refusals"] for each in results):
        assert said == [
            "norm: double backward through statistics of several processes is not implemented",
            "Expected more than 1 value per channel when training, got 1 in all processes",
        ]
