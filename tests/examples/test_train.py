"""examples/train.py from end to end: each family, killed and resumed, distilled, averaged, in parts, and refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import fastvit
from examples.images import OptionError, training_batches
from examples.models import SMALL, ConvNet, from_checkpoint
from examples.processes import POINTER
from examples.train import Run, main, parse
from tests.examples.pictures import CLASSES, make_shards
from tests.helpers import HANG_GUARD

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open

ROOT = Path(__file__).parents[2]
TINY = {
    **{family: ["embed_dim=16", "depth=2", "num_heads=2"] for family in SMALL},
    "cvt": ["embed_dim=(8,8,16)", "depth=(1,1,1)", "num_heads=(1,1,2)"],
    "ceit": ["embed_dim=16", "depth=2", "num_heads=2", "stem_chans=8"],
    "convnet": ["widths=(8,8)"],
}
BATCH, EPOCHS = 8, 2
STEPS = 3 * EPOCHS
"""Of 24 pictures."""


def arguments(out: Path, data: Path | str, model: str, *others: str) -> list[str]:
    options = ["--model", model, "--model-options", *TINY[model], "--batch", str(BATCH), "--epochs", str(EPOCHS)]
    return ["--out", str(out), "--data", str(data), *options, "--device", "cpu", "--log-every", "2", *others]


def rows(out: Path, name: str = "train") -> list[dict[str, str]]:
    with (out / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[tuple[str, str]]:
    """Step and loss, to the last digit."""
    return [(row["step"], row["loss"]) for row in rows(out)]


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(file.metadata()["run"])


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert rows(one, "val") == rows(other, "val")
    for name in ("last.safetensors", "best.safetensors"):
        (tensors, facts), (expected, facts_too) = contents(one / name), contents(other / name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        assert (facts["step"], facts["best"]) == (facts_too["step"], facts_too["best"])


@pytest.mark.parametrize("model", SMALL)
def test_each_family(model, folder, tmp_path):
    fused, plain = tmp_path / "fused", tmp_path / "plain"
    assert main(arguments(fused, folder, model)) == 0
    assert main(arguments(plain, folder, model, "--no-patch")) == 0
    assert [int(step) for step, _ in losses(fused)] == list(range(1, STEPS + 1))
    got, expected = (torch.tensor([float(loss) for _, loss in losses(out)]) for out in (fused, plain))
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=0)
    assert len(set(got.tolist())) == STEPS
    judged = rows(fused, "val")
    assert [row["epoch"] for row in judged] == ["1", "2"]
    # What is kept is what was judged.
    settings, saved = parse(["--out", str(fused), "--resume"])
    run = Run(settings, saved)
    loss, accuracy = run.judge()
    assert (f"{loss:.6f}", accuracy) == (f"{float(judged[-1]['val_loss']):.6f}", float(judged[-1]["val_accuracy"]))
    best, facts = from_checkpoint(fused / "best.safetensors", "--weights")
    assert facts["best"] == max(float(row["val_accuracy"]) for row in judged)
    assert not fastvit.is_patched(best) and facts["classes"] == list(CLASSES)
    assert (fused / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(folder, tmp_path):
    assert main(arguments(tmp_path / "run", folder, "vit", "--epochs", "20", "--warmup", "1", "--lr", "3e-3")) == 0
    assert float(rows(tmp_path / "run", "val")[-1]["val_accuracy"]) == 1.0


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[1]))
from examples import train
moment, steps = sys.argv[2], 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def update(self, *batch, plain=train.Run.update):
    global steps
    steps += 1
    if moment == "step" and steps == 5:
        die()
    return plain(self, *batch)

def save_file(tensors, path, facts, plain=train.save_file):
    plain(tensors, path, facts)
    if moment == "checkpoint" and steps:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        die()

def add(self, rows, plain=train.Table.add):
    plain(self, rows)
    if moment == "row":
        with open(self.path, "r+") as file:
            file.truncate(os.path.getsize(self.path) - 5)
        die()

train.Run.update, train.save_file, train.Table.add = update, save_file, add
sys.exit(train.main(sys.argv[3:]))
"""


def test_killed_at_any_moment_and_resumed(folder, tmp_path):
    """Within an epoch, in the middle of a row and of a checkpoint; dropouts, averages and statistics go on, too."""
    pytest.importorskip("timm")
    options = ["--ema", "0.9", "--drop-path", "0.2", "--mixup", "0.8", "--policy", "rand-m5-mstd0.5", "--erase", "0.3"]
    options += ["--save-every", "2", "--epochs", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*arguments(whole, folder, "ceit", *options)]) == 0
    command = [sys.executable, "-c", KILLED, str(torch.get_num_threads())]
    begin = arguments(killed, folder, "ceit", *options)
    ways = {"step": begin, "row": ["--out", str(killed), "--resume"], "checkpoint": [*begin, "--resume"]}
    reached = []
    for moment, how in ways.items():
        run = subprocess.run([*command, moment, *how], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == -9, (moment, run.stderr)
        reached.append(contents(killed / "last.safetensors")[1]["step"])
    assert 0 < reached[0] <= reached[1] <= reached[2] < 9
    assert main(["--out", str(killed), "--resume"]) == 0
    assert_same_run(killed, whole)


def test_ctrl_c_and_a_finished_run(folder, tmp_path, monkeypatch, capsys):
    update = Run.update

    def interrupted(self: Run, *batch: torch.Tensor) -> torch.Tensor:
        if self.step == 4:
            raise KeyboardInterrupt
        return update(self, *batch)

    out = tmp_path / "run"
    monkeypatch.setattr(Run, "update", interrupted)
    assert main(arguments(out, folder, "vit")) == 130
    assert f"--out {out} --resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(Run, "update", update)
    assert main(["--out", str(out), "--resume"]) == 0
    before = losses(out)
    assert len(before) == STEPS
    assert main(["--out", str(out), "--resume"]) == 0  # nothing is left to do
    assert losses(out) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_shards(workers, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    data, val = make_shards(tmp_path / "shards")
    options = ["--val-data", val, "--workers", str(workers), "--save-every", "1"]
    assert main(arguments(tmp_path / "whole", data, "vit", *options)) == 0
    update = Run.update

    def interrupted(self: Run, *batch: torch.Tensor) -> torch.Tensor:
        if self.step == 7:
            raise KeyboardInterrupt
        return update(self, *batch)

    monkeypatch.setattr(Run, "update", interrupted)
    assert main(arguments(tmp_path / "resumed", data, "vit", *options)) == 130
    monkeypatch.setattr(Run, "update", update)
    assert main(["--out", str(tmp_path / "resumed"), "--resume"]) == 0
    assert len(losses(tmp_path / "whole")) == 12  # 48 samples in batches of 8, twice
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    options = ["--epochs", "1", "--batch", "128", "--device", "cpu", "--model-options", *TINY["vit"]]
    assert main(["--out", str(out), "--data", "digits", *options]) == 0
    tensors, facts = contents(out / "last.safetensors")
    assert facts["classes"] == [str(digit) for digit in range(10)] and tensors["model.head.weight"].shape[0] == 10
    assert facts["settings"]["augment"] == "affine" and facts["step"] == (1797 - 360) // 128


# --- What a step does -------------------------------------------------------------------------------------------------


def begun(out: Path, folder: Path, model: str, *options: str) -> tuple[Run, list[list[torch.Tensor]]]:
    """A run that has not taken a step, and its batches."""
    run = Run(*parse(arguments(out, folder, model, *options)))
    run.model.train()
    order = {"batch": BATCH, "seed": 0, "start": 0, "stop": STEPS, "workers": 0}
    return run, list(training_batches(run.source, run.prepare, **order))


@pytest.fixture(scope="module")
def teacher_file(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    assert main(arguments(out, folder, "convnet", "--no-patch")) == 0
    return out / "best.safetensors"


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("model", ["deit", "cvt"])
def test_distillation(model, kind, folder, teacher_file, tmp_path):
    """DeiT's second head learns from the teacher, a model's only head from both; the teacher sees its own scale."""
    options = ["--teacher", str(teacher_file), "--distillation", kind, "--alpha", "0.3", "--tau", "2"]
    run, batches = begun(tmp_path / "run", folder, model, *options)
    images, labels = batches[0]
    net, _ = from_checkpoint(teacher_file, "--teacher")
    assert isinstance(net, ConvNet)
    net.eval()
    mean, std = (torch.tensor(run.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = net((images * std + mean - 0.5) / 0.5)
        outputs = run.model(images)
        one, two = outputs if model == "deit" else (outputs, outputs)
        if kind == "hard":
            theirs = F.cross_entropy(two, wanted.argmax(1))
        else:
            theirs = 4 * F.kl_div((two / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean")
        expected = 0.7 * F.cross_entropy(one, labels, label_smoothing=0.1) + 0.3 * theirs
        torch.testing.assert_close(run.loss(images, labels), expected)
    assert main(arguments(tmp_path / "run", folder, model, *options)) == 0
    assert not [name for name in contents(tmp_path / "run" / "last.safetensors")[0] if "teacher" in name]


def test_both_heads_learn_where_there_is_no_teacher(folder, tmp_path):
    run, batches = begun(tmp_path / "run", folder, "deit")
    loss = run.loss(*batches[0])
    loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in (run.model.head, run.model.head_dist))


def test_averaged_weights(folder, tmp_path):
    run, batches = begun(tmp_path / "run", folder, "ceit", "--ema", "0.8")
    expected: dict[str, torch.Tensor] = {}
    for batch in batches[:4]:
        run.update(*batch)
        for name, parameter in run.model.named_parameters():
            new = parameter.detach().clone()
            expected[name] = 0.8 * expected[name] + 0.2 * new if name in expected else new
    averaged = dict(run.ema.module.named_parameters())
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged[name], tensor)
    statistics = {name: buffer for name, buffer in run.model.named_buffers() if "running" in name}
    assert statistics
    assert all(torch.equal(run.ema.module.get_buffer(name), buffer) for name, buffer in statistics.items())


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Of the first step, as AdamW keeps them: a tenth."""
    return {name: run.optimizer.state[each]["exp_avg"] * 10 for name, each in run.model.named_parameters()}


@pytest.mark.parametrize("model", ["vit", "cait"])
def test_a_batch_in_parts(model, folder, tmp_path):
    found = []
    for parts in (1, 4):
        run, batches = begun(tmp_path / str(parts), folder, model, "--accumulate", str(parts), "--clip", "0")
        found.append((run.update(*batches[0]), gradients(run)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(folder, tmp_path):
    run, batches = begun(tmp_path / "run", folder, "deit", "--clip", "0.01")
    run.update(*batches[0])
    norm = torch.stack([gradient.square().sum() for gradient in gradients(run).values()]).sum().sqrt()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_gradient_checkpointing_changes_nothing(folder, tmp_path):
    for name, options in (("kept", []), ("again", ["--grad-checkpointing"])):
        assert main(arguments(tmp_path / name, folder, "deepvit", "--drop-path", "0.3", *options)) == 0
    got, expected = (torch.tensor([float(loss) for _, loss in losses(tmp_path / each)]) for each in ("again", "kept"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(precision, folder, tmp_path):
    out = tmp_path / "run"
    assert main(arguments(out, folder, "deit", "--precision", precision)) == 0
    assert main(arguments(tmp_path / "full", folder, "deit")) == 0
    got, expected = (torch.tensor([float(loss) for _, loss in losses(each)]) for each in (out, tmp_path / "full"))
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0)
    tensors, facts = contents(out / "last.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("model.")} == {torch.float32}
    assert bool(facts["scaler"]) == (precision == "float16")


def test_compiled(folder, tmp_path, monkeypatch):
    """By a quick backend; Inductor's own is tried in tests/training."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        assert main(arguments(tmp_path / name, folder, "vit", *options)) == 0
    compiled, eager = (torch.tensor([float(loss) for _, loss in losses(tmp_path / e)]) for e in ("compiled", "eager"))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)


def test_groups_of_parameters(folder, tmp_path):
    pytest.importorskip("timm")
    run, _ = begun(tmp_path / "run", folder, "vit", "--layer-decay", "0.5", "--weight-decay", "0.2")
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    found = {names[each]: group for group in run.optimizer.param_groups for each in group["params"]}
    assert found.keys() == set(names.values())
    assert {name for name, group in found.items() if group["weight_decay"] == 0} == {
        name for name in found if "norm" in name or name.endswith("bias") or name in ("cls_token", "pos_embed")
    }
    scales = {name: found[name]["scale"] for name in ("head.weight", "norm.bias", "blocks.1.attn.qkv.weight")}
    assert list(scales.values()) == [1, 0.5, 0.5] and found["pos_embed"]["scale"] == 0.125
    assert found["blocks.0.mlp.fc1.weight"]["scale"] == 0.25


def test_the_rate_grows_and_falls(folder, tmp_path):
    options = ["--warmup", "2", "--lr", "0.5", "--min-lr", "0.1", "--epochs", "10"]
    run, _ = begun(tmp_path / "run", folder, "vit", *options)
    rates = [run.rate(step) for step in range(run.total)]
    assert run.total == 30 and rates.index(max(rates)) == 6 and rates[6] == 0.5
    assert rates[:7] == sorted(rates[:7]) and rates[6:] == sorted(rates[6:], reverse=True)
    assert abs(rates[18] - 0.3) < 1e-9 and 0.1 < rates[-1] < 0.102


def test_weights_to_start_from(folder, tmp_path, teacher_file):
    assert main(arguments(tmp_path / "first", folder, "deit")) == 0
    model, _ = from_checkpoint(tmp_path / "first" / "last.safetensors", "--weights")
    torch.save(model.state_dict(), tmp_path / "deit.pth")
    run, _ = begun(tmp_path / "second", folder, "deit", "--weights", str(tmp_path / "deit.pth"))
    assert torch.equal(run.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


# --- What is refused --------------------------------------------------------------------------------------------------

WRONG = {
    "--epochs 0": "argument --epochs: expected a whole number of at least 1, got '0'",
    "--epochs two": "argument --epochs: expected a whole number of at least 1, got 'two'",
    "--lr -1": "argument --lr: expected a number above 0, got '-1'",
    "--lr nan": "argument --lr: expected a number above 0, got 'nan'",
    "--label-smoothing 1.5": "argument --label-smoothing: expected a number of at least 0 and at most 1, got '1.5'",
    "--precision half": "argument --precision: invalid choice: 'half'",
    "--accumulate 3": "--accumulate: expected a divisor of --batch 8, got 3",
    "--mixup 0.8 --batch 9": "--batch: expected an even number, since images are mixed in pairs, got 9",
    "--device gpu": "--device: expected one that is here, got 'gpu'",
    "--batch 64": "--batch: expected at most the number of training images, 24, got 64",
    "--model vitt": "--model vitt: name: unknown model 'vitt'",
    "--model timm/vit_none": "--model: timm .* has no model 'vit_none'",
    "--model-options depth": "--model-options: expected KEY=VALUE, such as depth=6, got 'depth'",
    "--model-options deep=3": "--model vit: .*unexpected keyword argument 'deep'",
    "--size 30": "--model vit: img_size: .*30",
    "--policy nonsense": "--policy: expected one of timm's, such as rand-m9-mstd0.5-inc1, got 'nonsense'",
    "--teacher nowhere.safetensors": "--teacher: there is no file nowhere.safetensors",
    "--weights nowhere.pth": "--weights: .*nowhere.pth",
    "--data nowhere": "--data: expected digits, a folder, or shards that end in .tar, got 'nowhere'",
    "--samples 5": "--samples: expected with shards only, whose number of images nothing tells, got 5",
    "--val-data nowhere": "--val-data: there is no folder nowhere",
    "--engine ddp": "--engine: expected under torchrun, which starts the processes, got 'ddp'",
    "--unknown 5": "unrecognized arguments: --unknown 5",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments(options, folder, tmp_path, capsys):
    if "timm" in options or "policy" in options:
        pytest.importorskip("timm")
    base = arguments(tmp_path / "run", folder, "vit")
    try:
        status = main([*base, *options.split()])
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = capsys.readouterr().err
    assert re.search(WRONG[options], said), said
    assert "Traceback" not in said


def test_a_run_is_neither_overwritten_nor_changed(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(out, folder, "vit")) == 0
    for options, message in (
        (arguments(out, folder, "vit"), f"--out: {out} holds a run: --resume goes on with it"),
        (["--out", str(out), "--resume", "--lr", "0.5"], "--lr: expected 0.001, with which the run began, or nothing"),
        (["--out", str(tmp_path / "other"), "--resume"], f"--data: expected .*; no run is in {tmp_path / 'other'}"),
        (["--out", str(tmp_path / "other")], "--data: expected digits, a folder or shards"),
    ):
        with pytest.raises(SystemExit):
            main(options)
        assert re.search(message, capsys.readouterr().err)
    added = folder / "red" / "zzz.png"
    added.write_bytes(min((folder / "red").iterdir()).read_bytes())
    try:
        assert main(["--out", str(out), "--resume"]) == 2
    finally:
        added.unlink()
    assert "--data: expected the samples that the run began with, 24, got 25" in capsys.readouterr().err
    (out / "last.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        main(["--out", str(out), "--resume"])
    assert "--resume: " in capsys.readouterr().err


def test_one_class_is_not_enough(folder, tmp_path, capsys):
    shutil.copytree(folder / "red", tmp_path / "pictures" / "red")
    assert main(arguments(tmp_path / "run", tmp_path / "pictures", "vit")) == 2
    assert "--data: expected two classes or more, got 1: ['red']" in capsys.readouterr().err


def test_a_damaged_shard_is_named(tmp_path, capsys):
    pytest.importorskip("webdataset")
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"no archive" * 100)
    for more in ([], ["--samples", "8", "--classes", "3"]):
        options = ["--val-data", str(shard), *more]
        assert main(arguments(tmp_path / "run", shard, "vit", *options)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"train.py: error: --data: {shard} cannot be read, it may be damaged or cut off: ")


def test_no_folder_for_the_run(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "file", folder, "vit"))
    assert f"--out: expected a folder, or a name for one, got the file '{tmp_path / 'file'}'" in capsys.readouterr().err
    assert main(arguments(tmp_path / "file" / "run", folder, "vit")) == 2
    assert "--out: this folder cannot be made: " in capsys.readouterr().err
    (tmp_path / POINTER).write_text("nothing")
    with pytest.raises(SystemExit):
        main([*arguments(tmp_path, folder, "vit"), "--resume"])
    assert f"--resume: {tmp_path / POINTER} is not what examples/train.py writes" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["torch", "examples.images"])
def test_ctrl_c_while_libraries_are_imported(at, tmp_path):
    """The interrupt comes as a module is about to be imported."""
    code = f"""
import builtins, os, runpy, signal, sys
plain = builtins.__import__
def imported(name, *rest, **named):
    if name == {at!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return plain(name, *rest, **named)
builtins.__import__ = imported
sys.argv = ["train.py", "--data", "digits", "--out", "run"]
runpy.run_path({str(ROOT / "examples" / "train.py")!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANG_GUARD)
    assert (run.returncode, run.stderr) == (130, "train.py: interrupted\n")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_named(workers, tmp_path, capsys):
    from tests.examples.pictures import make_folder

    folder = make_folder(tmp_path / "pictures")
    victim = sorted((folder / "red").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:60])
    assert main(arguments(tmp_path / "run", folder, "vit", "--workers", workers)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: error: --data: {victim} is not a picture that Pillow can read")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "module", "package"),
    [("digits", "sklearn.datasets", "scikit-learn"), ("a.tar", "webdataset", "webdataset")],
)
def test_a_library_that_is_missing_is_named(data, module, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.shardlists", None)
    assert main(["--out", str(tmp_path), "--data", data, "--device", "cpu"]) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_other_classes_for_the_teacher(folder, teacher_file, tmp_path):
    from examples.models import teacher

    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(OptionError, match="--teacher: expected 5 classes, as the images have, got 3"):
        teacher(str(teacher_file), 5, config)


def test_a_loss_that_is_lost(folder, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", folder, "vit", "--lr", "1e30", "--warmup", "0", "--clip", "0")) == 1
    assert "is not finite" in capsys.readouterr().err
