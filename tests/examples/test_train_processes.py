"""examples/train.py under torchrun: the losses of one process, killed, restarted, and resumed on another number."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.images import OptionError
from examples.models import from_checkpoint
from examples.processes import POINTER, Processes, read_pointer
from examples.train import Run, main, parse
from tests.examples.test_train import ROOT, arguments, contents, losses, rows
from tests.helpers import HANG_GUARD

EPOCHS = 3
STEPS = 3 * EPOCHS
OPTIONS = ["--sync-batchnorm", "--epochs", str(EPOCHS), "--save-every", "2", "--ema", "0.9", "--log-every", "1"]
WORKER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from examples import train

victim, step = map(int, sys.argv[1:3])

def update(self, *batch, plain=train.Run.update):
    if (self.processes.rank, self.step) == (victim, step) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *batch)

train.Run.update = update
sys.exit(train.main(sys.argv[3:]))
"""
NOBODY = ("-1", "0")


def torchrun(
    script: Path, processes: int, victim: tuple[str, str], *words: str, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Of so many processes, one killed in front of a step, unless it has been restarted."""
    script.write_text(WORKER)
    start = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *start, str(script), *victim, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=HANG_GUARD
    )


def as_floats(out: Path) -> torch.Tensor:
    found = losses(out)
    assert [int(step) for step, _ in found] == list(range(1, STEPS + 1))
    return torch.tensor([float(loss) for _, loss in found])


def assert_same_losses(one: Path, other: Path) -> None:
    torch.testing.assert_close(as_floats(one), as_floats(other), rtol=2e-3, atol=0)
    judged = [[float(row["val_loss"]) for row in rows(out, "val")] for out in (one, other)]
    torch.testing.assert_close(*map(torch.tensor, judged), rtol=5e-3, atol=0)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(out, folder, "ceit", *OPTIONS)) == 0
    return out


def test_restarted_by_torchrun(folder, alone, tmp_path):
    """DDP in two processes, of which one is killed: torchrun says so, starts both again, and they go on."""
    out = tmp_path / "run"
    words = arguments(out, folder, "ceit", *OPTIONS, "--engine", "ddp", "--resume")
    run = torchrun(tmp_path / "worker.py", 2, ("1", "5"), *words, restarts=1)
    assert run.returncode == 0, run.stderr
    assert "Signal 9 (SIGKILL)" in run.stderr or "exitcode: -9" in run.stderr
    assert_same_losses(out, alone)
    assert run.stdout.count("step 0 of 9") == run.stdout.count("step 4 of 9") == 1
    assert "2 processes (ddp)" in run.stdout


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_parts_and_checkpointed_blocks(engine, folder, tmp_path):
    """Gradients are exchanged with the last part; a family without BatchNorm, whose statistics parts would change."""
    options = ["--epochs", str(EPOCHS), "--accumulate", "2", "--grad-checkpointing", "--log-every", "1"]
    assert main(arguments(tmp_path / "alone", folder, "cait", *options)) == 0
    words = arguments(tmp_path / "run", folder, "cait", *options, "--engine", engine)
    run = torchrun(tmp_path / "worker.py", 2, NOBODY, *words)
    assert run.returncode == 0, run.stderr
    assert_same_losses(tmp_path / "run", tmp_path / "alone")


def test_resumed_on_another_number_of_processes(folder, alone, tmp_path):
    """FSDP2 in two, killed; in four, killed; then in one: each goes on with what the others have left."""
    out, script = tmp_path / "run", tmp_path / "worker.py"
    begin = arguments(out, folder, "ceit", *OPTIONS, "--engine", "fsdp")
    run = torchrun(script, 2, ("0", "3"), *begin)
    assert run.returncode == 1
    assert re.search(
        r"train.py: error: process 1 of 2 has lost another one \(.+\); .*--resume goes on|Signal 9", run.stderr
    )
    shards, facts = read_pointer(out)
    assert facts["step"] == 3 and not (out / "last.safetensors").exists()
    assert len(list(shards.glob("*.distcp"))) == 2  # each has written its part
    again = torchrun(script, 2, NOBODY, *begin)
    assert again.returncode == 1 and "holds a run: --resume goes on with it" in again.stderr
    run = torchrun(script, 4, ("3", "7"), "--out", str(out), "--resume", "--grad-checkpointing")
    assert run.returncode == 1 and "--grad-checkpointing: expected False, with which the run began" in run.stderr
    run = torchrun(script, 4, ("3", "7"), "--out", str(out), "--resume")
    assert run.returncode == 1 and "step 3 of 9 on cpu, float32, 4 processes (fsdp)" in run.stdout, run.stderr
    shards, facts = read_pointer(out)
    assert facts["step"] == 6 and len(list(shards.glob("*.distcp"))) == 4
    assert [path.name for path in out.glob("last*")] in ([POINTER, "last-6"], ["last-6", POINTER])
    model, _ = from_checkpoint(out / "best.safetensors", "--weights")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert main(["--out", str(out), "--resume"]) == 0
    assert_same_losses(out, alone)
    assert not list(out.glob("last-*")) and not (out / POINTER).exists()  # older than what one process wrote
    (tensors, facts), (expected, _) = contents(out / "last.safetensors"), contents(alone / "last.safetensors")
    assert facts["step"] == STEPS and tensors.keys() == expected.keys()
    for name in ("optimizer.exp_avg_sq.blocks.0.attn.qkv.weight", "ema.head.weight", "model.backbone.bn.running_var"):
        if name in expected:
            torch.testing.assert_close(tensors[name], expected[name], rtol=0.05, atol=1e-6)


# --- What is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "--batch 9": "--batch: expected a multiple of 2 processes, got 9",
    "--batch 12 --accumulate 4": "--batch: expected a multiple of 2 processes x --accumulate 4, got 12",
    "--batch 6 --mixup 0.8": "--batch: expected an even number for each process, since images are mixed in pairs",
    "--device cuda:1": "--device: expected cuda or cpu, since each process has its own, got 'cuda:1'",
    "--engine zero": "argument --engine: invalid choice: 'zero'",
}


@pytest.mark.parametrize("options", REFUSED)
def test_wrong_arguments(options, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse([*arguments(tmp_path / "run", folder, "vit"), *options.split()], Processes(0, 2, 0, True))
    assert REFUSED[options] in capsys.readouterr().err


def test_synchronised_norms_of_others_on_the_cpu(folder, tmp_path):
    two = Processes(0, 2, 0, True)
    settings = parse(arguments(tmp_path / "run", folder, "convnet", "--sync-batchnorm", "--engine", "fsdp"), two)
    with pytest.raises(OptionError, match="--sync-batchnorm: on the CPU expected with a name of `fastvit list`, got"):
        Run(*settings, two)
