"""Data-parallel and fully sharded training in two processes give the losses of one process.

The processes are started once, for every family; they compare themselves and say what differs.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.libraries import declare_torchvision_nms
from fastvit.patching import patch, unpatch
from fastvit.patching.fusion import Fused
from fastvit.reference.cvt import Stage
from tests.helpers import spawned
from tests.tiny import FAMILIES, build, images

TIMM = ("timm_vit", "timm_cait", "timm_twins")
EVERY = (*FAMILIES, *TIMM)
OTHER_ORDERS = ("cait", "cvt", "timm_vit", "timm_cait")
"""Also patched, and unpatched, once they are sharded."""
PROCESSES = 2
STEPS = 2
BATCH = 4


def _model(name: str) -> nn.Module:
    """A patched model in training, its BatchNorms in eval mode: the statistics of half a batch are others."""
    torch.manual_seed(0)
    model = patch(build(name)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _loss(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A mean over images, so that those of parts of a batch can be averaged."""
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([tensor.square().mean() for tensor in outputs]).sum()


def _train(model: nn.Module, x: Tensor) -> Tensor:
    """The losses of a few steps of SGD, and that behind them without gradients, which other kernels may compute."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(model(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        losses.append(_loss(model(x)))
    return torch.stack(losses)


def _in_two(model: nn.Module, x: Tensor, rank: int) -> Tensor:
    """The losses of training on this process's share of a batch, averaged over the processes."""
    losses = _train(model, x.chunk(PROCESSES)[rank])
    distributed.all_reduce(losses)
    return losses / PROCESSES


def _sharded(model: nn.Module) -> nn.Module:
    """FSDP2 over each module that holds fused ones, and over what is left of the model."""
    from torch.distributed.fsdp import fully_shard

    holders = [
        module
        for module in model.modules()
        if any(isinstance(child, Fused) for child in module.children())
        and not isinstance(module, (Fused, nn.ModuleList, Stage))  # FSDP2 shards nothing that is not called
    ]
    for module in reversed(list(dict.fromkeys([model, *holders]))):  # from the inside out
        fully_shard(module)
    return model


def _worker(rank: int, folder: str, names: list[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    declare_torchvision_nms()  # a spawned process has not run the tests' conftest
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", PROCESSES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    results: dict[str, Tensor] = {}
    for name in names:
        x = images(name, BATCH)
        results[f"{name} DDP"] = _in_two(DistributedDataParallel(_model(name)), x, rank)
        results[f"{name} FSDP2"] = _in_two(_sharded(_model(name)), x, rank)
        if name in OTHER_ORDERS:
            results[f"{name} FSDP2, patched behind it"] = _in_two(patch(_sharded(unpatch(_model(name)))), x, rank)
            results[f"{name} FSDP2, unpatched behind it"] = _in_two(unpatch(_sharded(_model(name))), x, rank)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, Tensor]:
    """What two processes report, by family and way of training."""
    folder = tmp_path_factory.mktemp("processes")
    names = [name for name in EVERY if not name.startswith("timm") or importlib.util.find_spec("timm")]
    spawned(_worker, (str(folder), names), PROCESSES)
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", EVERY)
def test_two_processes_train_as_one(name, losses):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    alone = _train(_model(name), images(name, BATCH))
    assert not torch.allclose(alone[0], alone[1], rtol=1e-3)  # the weights do move
    ways = {way: got for way, got in losses.items() if way.startswith(f"{name} ")}
    assert len(ways) == (4 if name in OTHER_ORDERS else 2)
    for way, got in ways.items():
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}")
