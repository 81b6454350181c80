"""One run in several processes, as torchrun starts them: DDP or FSDP2, and checkpoints of which each writes its part.

torchrun tells a process its place by environment variables; without them the run is a process alone, and nothing here
exchanges anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from examples.images import OptionError
from examples.records import replacing

DDP, FSDP = "ddp", "fsdp"
POINTER = "last.json"
"""The file in a run's folder that names the folder of the last sharded checkpoint, with the run's facts beside it."""


class Processes(NamedTuple):
    """The processes of a run, and this one's place among them."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """Its number on this machine, and of its GPU."""
    started: bool = False
    """By torchrun, be it one alone."""

    @classmethod
    def of_environment(cls) -> Processes:
        if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")), started=True)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Each process's own GPU, for "cuda"."""
        return torch.device(f"cuda:{self.local}" if self.started and name == "cuda" else name)

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Within it the processes can talk; what fails here waits for no other, since torchrun ends those."""
        if not self.started:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = own_part(next(rendezvous("env://"))[0], self.rank, self.count)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)
        dist.barrier()
        yield
        dist.barrier()
        dist.destroy_process_group()

    def lost_another(self, error: RuntimeError) -> bool:
        """Whether that is what an exchange says whose other side has gone."""
        return self.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def mean(self, tensor: Tensor) -> Tensor:
        """Over the processes."""
        return self.sum(tensor) / self.count

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the processes; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, *models: nn.Module) -> None:
        """The first process's running statistics for all, as DDP does before each step."""
        if self.count > 1:
            for model in models:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def in_step(
        self, batches: Iterable[list[Tensor]], filler: list[Tensor], device: torch.device
    ) -> Iterator[list[Tensor]]:
        """The batches, and the filler as long as another process has some: forwards of FSDP2 are taken together."""
        rest = iter(batches)
        while True:
            batch = next(rest, None)
            some = torch.tensor(float(batch is not None), device=device)
            if not self.sum(some):
                return
            yield filler if batch is None else batch


ALONE = Processes()


def own_part(store: dist.Store, rank: int, count: int) -> dist.Store:
    """A part of torchrun's store for this start alone: the addresses that processes left before a restart stay in it.

    The first process names a part. Another one may read the name of a start before, in which nobody answers it.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("start", mine)
        for other in range(1, count):
            their = store.get(f"{mine}/{other}").decode()
            store.set(f"{mine}/{other}/{their}", "")
        return dist.PrefixStore(mine, store)
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mine)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{start}/{rank}/{mine}"], timedelta(seconds=1))
            return dist.PrefixStore(start, store)


# --- Engines ----------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2 over each block, and over what is left of the model; in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # from the inside out
        if module is model or hasattr(module, "attn"):
            fully_shard(module, mesh=mesh)
    return model


@contextlib.contextmanager
def synchronising(net: nn.Module, model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward of a part of a batch: gradients are exchanged at the last alone."""
    if isinstance(net, DistributedDataParallel) and not last:
        with net.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def as_placed(value: Tensor, place: Tensor) -> Tensor:
    """A tensor, divided among the processes as ``place`` is; each has the whole of it."""
    if isinstance(place, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(place.device), place.device_mesh, place.placements, src_data_rank=None)
    return value


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided among the processes, all of which ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- Sharded checkpoints ----------------------------------------------------------------------------------------------


def save_sharded(out: Path, tensors: dict[str, Tensor], facts: dict[str, Any], processes: Processes) -> None:
    """Every process writes its part into a new folder, to which the pointer then turns: one of both is whole always."""
    import torch.distributed.checkpoint as dcp

    folder = out / f"last-{facts['step']}"
    if processes.first:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed as it wrote
    dist.barrier()
    dcp.save(tensors, checkpoint_id=folder)
    if processes.first:
        with replacing(out / POINTER) as temporary:
            temporary.write_text(json.dumps({"folder": folder.name, "run": facts}))
        for other in set(out.glob("last-*")) - {folder}:
            shutil.rmtree(other)


def read_pointer(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the last sharded checkpoint and the run's facts; None where there is none."""
    try:
        told = json.loads((out / POINTER).read_text())
        return out / told["folder"], told["run"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--resume: {out / POINTER} is not what examples/train.py writes ({error})") from error


def names_in(folder: Path) -> set[str]:
    """Of the tensors in a sharded checkpoint."""
    import torch.distributed.checkpoint as dcp

    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def load_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, in whatever way they are divided now."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in a process alone
        dcp.load(tensors, checkpoint_id=folder)
