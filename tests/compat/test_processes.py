"""DDP and FSDP2 in two and four processes give the losses and weights of one process, for each family.

Four processes are started once. In two pairs, and then all together, they train every family and leave what came of it
to the tests. What one process gives with the same groups of images in each BatchNorm is the measure: in float64 what is
right, in float32, plain, how far off one may be.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.libraries import declare_torchvision_nms
from fastvit.patching import patch, unpatch
from fastvit.patching.fusion import Fused
from fastvit.reference.cvt import Stage
from fastvit.reference.functional import recomputing
from tests.compat.parts import BATCH, STEPS, Outcome, alone, assert_as_near, finished, loss_of, model_of, optimizer_of
from tests.helpers import spawned
from tests.tiny import FAMILIES, images

TIMM = ("timm_vit", "timm_cait", "timm_twins")
EVERY = (*FAMILIES, "deepvit_cnn", *TIMM)
OTHER_ORDERS = ("cait", "cvt", "timm_vit", "timm_cait")
"""Also patched, and unpatched, once they are sharded."""
WITH_NORMS = ("deepvit", "deepvit_cnn", "cvt", "ceit")
MIXED = ("vit", "cait")
"""Also in bfloat16. FSDP2 casts the weights of a BatchNorm too, which torch's CPU kernel does not take."""
RECOMPUTED = ("deepvit", "ceit")
PROCESSES = 4


# --- The processes ----------------------------------------------------------------------------------------------------


def _together(wrap: Callable[[nn.Module], nn.Module], model: nn.Module, x: Tensor, mesh: DeviceMesh) -> Outcome:
    """Training on this process's part of a batch, in the processes of a mesh."""
    group, rank, count = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    net, part = wrap(model), x.chunk(count)[rank]
    optimizer, losses = optimizer_of(net), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net(part))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return finished(net, model, part, losses, group)


def _sharded(model: nn.Module, mesh: DeviceMesh, within: bool = False, **options: Any) -> nn.Module:
    """FSDP2 over each block and what is left of the model; ``within``, below the fused modules' own classes."""
    from torch.distributed.fsdp import fully_shard

    if within:
        parts = [
            module
            for module in model.modules()
            if any(isinstance(child, Fused) for child in module.children())
            and not isinstance(module, (Fused, nn.ModuleList, Stage))  # FSDP2 shards nothing that is not called
        ]
    else:
        parts = [module for module in model.modules() if hasattr(module, "attn")]
    assert within or len(parts) > 1
    for module in reversed(list(dict.fromkeys([model, *parts]))):  # from the inside out
        fully_shard(module, mesh=mesh, **options)
    return model


def _recomputed(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Each block under torch's activation checkpointing, and then FSDP2."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs

    torchs.apply_activation_checkpointing(
        model,
        partial(torchs.checkpoint_wrapper, context_fn=lambda: (contextlib.nullcontext(), recomputing())),
        check_fn=lambda module: hasattr(module, "attn"),
    )
    return _sharded(model, mesh)


def _ways(name: str, mesh: DeviceMesh) -> dict[str, Callable[[], Outcome]]:
    """How a family is trained in the processes of a mesh. DDP takes no SyncBatchNorm on the CPU, when it is made."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    x = images(name, BATCH)
    ddp, fsdp = partial(DistributedDataParallel, process_group=mesh.get_group()), partial(_sharded, mesh=mesh)
    halved = partial(fsdp, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))

    synchronise = partial(nn.SyncBatchNorm.convert_sync_batchnorm, process_group=mesh.get_group())

    def train(wrap: Callable[[nn.Module], nn.Module], patched: bool = True) -> Callable[[], Outcome]:
        return lambda: _together(wrap, model_of(name, patched), x, mesh)

    ways = {"DDP": train(ddp), "FSDP2": train(fsdp)}
    if name in WITH_NORMS:
        ways |= {"DDP, synchronised": train(lambda m: synchronise(ddp(m)))}
        ways |= {"FSDP2, patched, synchronised": train(lambda m: fsdp(synchronise(m)))}
        ways |= {"FSDP2, synchronised, patched": train(lambda m: fsdp(patch(synchronise(m))), patched=False)}
        ways |= {"FSDP2, synchronised, plain": train(lambda m: fsdp(synchronise(m)), patched=False)}
    if name in MIXED:
        ways |= {"FSDP2, mixed": train(halved), "FSDP2, mixed, plain": train(halved, patched=False)}
    if name in RECOMPUTED:
        ways |= {"DDP, recomputed": train(lambda m: m.set_grad_checkpointing() or ddp(m))}
        ways |= {"FSDP2, recomputed": train(partial(_recomputed, mesh=mesh))}
    if name in OTHER_ORDERS and mesh.size() == 2:
        within = partial(fsdp, within=True)
        ways |= {"FSDP2, patched behind it": train(lambda m: patch(within(m)), patched=False)}
        ways |= {"FSDP2, unpatched behind it": train(lambda m: unpatch(within(m)))}
    return ways


def _worker(rank: int, folder: str, names: list[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    declare_torchvision_nms()  # a spawned process has not run the tests' conftest
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", PROCESSES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("number", "pair"))
    ours = [name for name in names if name not in TIMM]
    for mesh, theirs in ((pairs["pair"], names[rank // 2 :: 2]), (init_device_mesh("cpu", (PROCESSES,)), ours)):
        found = {(name, way): train() for name in theirs for way, train in _ways(name, mesh).items()}
        if mesh.get_local_rank() == 0:
            torch.save({key: tuple(outcome) for key, outcome in found.items()}, f"{folder}/{mesh.size()}-{rank}")
    distributed.destroy_process_group()


# --- What they say ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[int, dict[tuple[str, str], Outcome]]:
    """By number of processes, family and way."""
    folder = tmp_path_factory.mktemp("processes")
    names = [name for name in EVERY if name not in TIMM or importlib.util.find_spec("timm")]
    spawned(_worker, (str(folder), names), PROCESSES)
    found: dict[int, dict[tuple[str, str], Outcome]] = {2: {}, PROCESSES: {}}
    for file in ("2-0", "2-2", f"{PROCESSES}-0"):
        loaded = torch.load(folder / file)
        found[int(file[0])] |= {key: Outcome(*outcome) for key, outcome in loaded.items()}
    return found


@pytest.mark.parametrize("processes", [2, PROCESSES])
@pytest.mark.parametrize("name", EVERY)
def test_they_train_as_one_process(name, processes, outcomes):
    if name in TIMM:
        pytest.importorskip("timm")
        if processes == PROCESSES:
            pytest.skip("libraries' models are trained in two processes")
    ways = {way: outcome for (each, way), outcome in outcomes[processes].items() if each == name}
    more = 4 * (name in WITH_NORMS) + 2 * (name in MIXED) + 2 * (name in RECOMPUTED)
    assert len(ways) == 2 + more + 2 * (name in OTHER_ORDERS and processes == 2)
    for parts in {processes, 1} if name in WITH_NORMS else {processes}:
        exact, plain = (alone(name, parts, dtype) for dtype in (torch.float64, torch.float32))
        assert not torch.allclose(exact.losses[0], exact.losses[1], rtol=1e-3)  # the weights do move
        for way, got in ways.items():
            if "mixed" in way or ("synchronised" in way) is not (parts == 1):
                continue
            torch.testing.assert_close(
                got.losses, exact.losses, rtol=1e-4, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}"
            )
            assert_as_near(got, plain, exact, way)


def test_statistics_of_all_are_others():
    """The tests of synchronised norms would hold if they were not."""
    for name in WITH_NORMS:
        whole, apart = (alone(name, parts, torch.float64) for parts in (1, 2))
        assert not torch.allclose(whole.losses[:-1], apart.losses[:-1], rtol=1e-3)


@pytest.mark.parametrize("processes", [2, PROCESSES])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_precision(name, processes, outcomes):
    """At most twice as far from float64 as the plain model by the same policy, and farther than in float32."""
    exact = alone(name, 1, torch.float64)
    fused, plain = (outcomes[processes][name, way] for way in ("FSDP2, mixed", "FSDP2, mixed, plain"))
    assert_as_near(fused, plain, exact, "mixed")
    errors = [(outcomes[processes][name, way].losses - exact.losses).abs().max() for way in ("FSDP2, mixed", "FSDP2")]
    assert errors[0] > 10 * errors[1]
