"""Trains an image classifier on a CPU or a GPU; killed at any moment, `--resume` goes on to the same losses.

    python examples/train.py --data digits --model ceit --out runs/ceit
    python examples/train.py --data pictures/ --model deit_tiny_patch16_224 --weights deit.pth --out runs/pictures
    python examples/train.py --data 'train-{000..146}.tar' --val-data 'val-{00..06}.tar' --model cvt_13 --out runs/cvt
    python examples/train.py --out runs/ceit --resume
    torchrun --nproc-per-node 8 examples/train.py --data pictures/ --model cvt_13 --out runs/cvt --resume

In --out: last.safetensors and best.safetensors (weights, averaged weights, the optimizer's state), train.csv, val.csv,
TensorBoard's events where it is installed, and at the end curves.png. With --engine fsdp the last checkpoint is a
folder that last.json names, of which each process writes its part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 130


def leave(*_: object) -> None:
    """At Ctrl-C before the run begins, as while libraries are imported, which do not expect it."""
    print("train.py: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

import fastvit  # noqa: E402
from examples.images import Augment, OptionError, open_source, reseed, training_batches, validation_batches  # noqa: E402
from examples.models import NAMES, build, part, read_checkpoint, teacher, timm_module  # noqa: E402
from examples.processes import (  # noqa: E402
    ALONE,
    DDP,
    FSDP,
    POINTER,
    Processes,
    as_placed,
    load_sharded,
    names_in,
    read_pointer,
    save_sharded,
    shard,
    synchronising,
    whole,
)
from examples.records import Table, events, plot, replacing  # noqa: E402
from fastvit.losses import DistillationLoss  # noqa: E402
from fastvit.reference import VisionModel  # noqa: E402

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FREE = ("out", "resume", "device", "engine", "workers", "log_every", "save_every")
"""What may be another when a run is resumed, as may the number of processes."""
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
Saved = tuple["dict[str, Tensor] | Path", dict[str, Any]]
"""A checkpoint: its tensors, or the folder that their parts are in, and what is written beside them."""


# --- The command line -------------------------------------------------------------------------------------------------


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or float from ``least`` (or ``above`` it) to ``most``."""
    words = f"{'a whole number' if kind is int else 'a number'} {'above' if above else 'of at least'} {least:g}"
    words += "" if most == math.inf else f" and at most {most:g}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return value

    return parse


COUNT, PART, POSITIVE = number(int, 1), number(float, 0, 1), number(float, 0, above=True)
FLAG = argparse.BooleanOptionalAction
OPTIONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    # name: (default, argparse's arguments, help)
    "data": (None, {}, "digits, a folder with a folder of pictures for each class (or train/ and val/), or shards"),
    "val-data": (None, {}, "a folder or shards for validation"),
    "samples": (None, {"type": COUNT}, "images in the shards of --data; counted if not given"),
    "classes": (None, {"type": COUNT}, "classes of the shards; the greatest label decides if not given"),
    "model": ("vit", {}, NAMES),
    "model-options": ([], {"nargs": "+", "metavar": "KEY=VALUE"}, "arguments of the model, such as depth=6"),
    "size": (None, {"type": COUNT}, "of the images; the model's own if not given"),
    "weights": (None, {}, "start from these, as fastvit.load_weights reads them; heads of other classes start anew"),
    "out": (None, {"type": Path, "required": True}, "the folder of this run"),
    "resume": (False, {"action": "store_true"}, "go on with the run in --out, with its settings"),
    "seed": (0, {"type": number(int, 0)}, "of every draw"),
    "epochs": (30, {"type": COUNT}, "times that every training image is seen"),
    "batch": (64, {"type": COUNT}, "images of an optimizer's step"),
    "accumulate": (1, {"type": COUNT}, "parts that a batch is computed in"),
    "lr": (1e-3, {"type": POSITIVE}, "the peak of a cosine schedule"),
    "min-lr": (1e-5, {"type": number(float, 0)}, "its end"),
    "warmup": (2.0, {"type": number(float, 0)}, "epochs of linear growth before"),
    "weight-decay": (0.05, {"type": number(float, 0)}, "of matrices and filters, but for the model's no_weight_decay"),
    "layer-decay": (
        1.0,
        {"type": number(float, 0, 1, above=True)},
        "factor on the rate from a layer to the one before",
    ),
    "clip": (1.0, {"type": number(float, 0)}, "greatest norm of the gradients; 0 is none"),
    "label-smoothing": (0.1, {"type": PART}, "share of the labels that goes to all classes"),
    "drop-path": (0.0, {"type": number(float, 0, 0.99)}, "stochastic depth of the last block"),
    "ema": (0.0, {"type": number(float, 0, 0.999999)}, "decay of averaged weights, which are then judged; 0 is none"),
    "augment": (None, {"choices": ("crop", "affine", "none")}, "affine for digits, else crop, if not given"),
    "least-crop": (0.08, {"type": number(float, 0, 1, above=True)}, "least part of a picture's area in a crop"),
    "policy": (None, {}, "timm's RandAugment, such as rand-m9-mstd0.5-inc1"),
    "erase": (0.0, {"type": PART}, "probability of timm's random erasing"),
    "mixup": (0.0, {"type": number(float, 0)}, "alpha of timm's mixup"),
    "cutmix": (0.0, {"type": number(float, 0)}, "alpha of timm's cutmix"),
    "teacher": (None, {}, "the checkpoint of a run, or timm/NAME: distillation as in DeiT"),
    "distillation": ("hard", {"choices": ("soft", "hard")}, "what is learnt of a teacher"),
    "alpha": (0.5, {"type": PART}, "weight of the teacher's term"),
    "tau": (3.0, {"type": POSITIVE}, "temperature of soft distillation"),
    "patch": (True, {"action": FLAG}, "with fused blocks"),
    "compile": (False, {"action": FLAG}, "by torch.compile, patched or not"),
    "precision": ("float32", {"choices": tuple(PRECISIONS)}, "of autocast; float16 with a scaler of gradients"),
    "grad-checkpointing": (False, {"action": FLAG}, "compute blocks again in the backward pass"),
    "device": (None, {}, "cpu, cuda, cuda:1, ...; a GPU, or one for each process, if not given and there is one"),
    "engine": (None, {"choices": (DDP, FSDP)}, "under torchrun: ddp if not given; fsdp divides weights and states"),
    "sync-batchnorm": (False, {"action": FLAG}, "statistics of BatchNorm over the images of all processes"),
    "workers": (0, {"type": number(int, 0)}, "processes that load images, for each that trains"),
    "log-every": (10, {"type": COUNT}, "steps"),
    "save-every": (200, {"type": COUNT}, "steps, and at the end of each epoch"),
}
DEFAULTS = {name.replace("-", "_"): default for name, (default, _, _) in OPTIONS.items()}


def last_checkpoint(out: Path) -> Saved | None:
    """Of a run, whichever engine wrote it: of two the later; OptionError where it cannot be read."""
    path, found = out / "last.safetensors", []
    if path.exists():
        found.append(read_checkpoint(path, "--resume"))
    if (sharded := read_pointer(out)) is not None:
        if not (sharded[0] / ".metadata").is_file():
            raise OptionError(f"--resume: {out / POINTER} names {sharded[0]}, which holds no checkpoint")
        found.append(sharded)
    return max(found, key=lambda saved: saved[1]["step"], default=None)


def holds_a_run(out: Path) -> bool:
    return any((out / name).exists() for name in ("last.safetensors", POINTER))


def parse(arguments: Sequence[str] | None, processes: Processes = ALONE) -> tuple[argparse.Namespace, Saved | None]:
    """The settings of the run, and its checkpoint where it is resumed; argparse reports errors, with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    for name, (default, options, text) in OPTIONS.items():
        told = "" if default in (None, False, []) else f" (default {default})"
        parser.add_argument(f"--{name}", **options, default=argparse.SUPPRESS, help=text + told)
    given = vars(parser.parse_args(arguments))
    out, saved = given["out"], None
    settings = DEFAULTS | given
    if out.exists() and not out.is_dir():
        parser.error(f"--out: expected a folder, or a name for one, got the file {str(out)!r}")
    if "resume" not in given and holds_a_run(out):
        parser.error(f"--out: {out} holds a run: --resume goes on with it, another folder begins a new one")
    try:
        saved = last_checkpoint(out)
    except OptionError as error:
        parser.error(str(error))
    if saved is not None:
        settings = DEFAULTS | saved[1]["settings"] | {name: given[name] for name in FREE if name in given}
        for name, value in given.items():
            if settings[name] != value:
                option = f"--{name.replace('_', '-')}"
                parser.error(
                    f"{option}: expected {settings[name]!r}, with which the run began, or nothing, got {value!r}"
                )
    elif settings["data"] is None:
        parser.error(
            "--data: expected digits, a folder or shards" + (f"; no run is in {out}" if "resume" in given else "")
        )
    if settings["device"] is None:
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if not processes.started:
        if given.get("engine") is not None:
            parser.error(f"--engine: expected under torchrun, which starts the processes, got {given['engine']!r}")
        settings["engine"] = None
    elif settings["engine"] is None:
        settings["engine"] = DDP
    if processes.started and ":" in settings["device"]:
        parser.error(f"--device: expected cuda or cpu, since each process has its own, got {settings['device']!r}")
    try:
        torch.empty(1, device=processes.device(settings["device"]))
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: expected one that is here, got {settings['device']!r} ({str(error).splitlines()[0]})")
    if settings["augment"] is None:
        settings["augment"] = "affine" if settings["data"] == "digits" else "crop"
    if settings["batch"] % settings["accumulate"]:
        parser.error(f"--accumulate: expected a divisor of --batch {settings['batch']}, got {settings['accumulate']}")
    if settings["batch"] % (settings["accumulate"] * processes.count):
        parts = f"{processes.count} processes" + f" x --accumulate {settings['accumulate']}" * (
            settings["accumulate"] > 1
        )
        parser.error(f"--batch: expected a multiple of {parts}, got {settings['batch']}")
    if settings["batch"] // processes.count % 2 and (settings["mixup"] or settings["cutmix"]):
        own = "an even number" + " for each process" * (processes.count > 1)
        parser.error(f"--batch: expected {own}, since images are mixed in pairs, got {settings['batch']}")
    return argparse.Namespace(**settings), saved


# --- The run ----------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: vectors and the model's own exceptions do not decay; earlier layers learn more slowly."""
    layers: dict[str, int] = {}
    if layer_decay < 1:
        if not hasattr(model, "group_matcher"):
            raise OptionError(f"--layer-decay: {type(model).__name__} does not tell its layers (group_matcher)")
        layers = timm_module("timm.models", "--layer-decay").group_parameters(
            model, model.group_matcher(coarse=False), reverse=True
        )
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    last, groups = max(layers.values(), default=0), {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else weight_decay
        scale = layer_decay ** (last - layers.get(name, last))
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


class Run:
    """A model, the images, and how far the one has come with the other; in each of the processes."""

    def __init__(self, settings: argparse.Namespace, saved: Saved | None, processes: Processes = ALONE):
        self.settings, self.processes, s = settings, processes, settings
        self.console = Console(quiet=not processes.first)
        self.device = processes.device(s.device)
        self.source = open_source(s.data, s.val_data, s.samples, s.classes)
        self.steps = max(1, self.source.samples // s.batch)
        self.total = s.epochs * self.steps
        reseed(s.seed, 3)
        options = {"size": s.size, "drop_path": s.drop_path, "options": s.model_options}
        self.model = build(s.model, len(self.source.classes), **options)
        if s.weights is not None and saved is None:
            try:
                fastvit.load_weights(self.model, s.weights, head="skip")
            except (OSError, ValueError, TypeError, ImportError) as error:
                raise OptionError(f"--weights: {error}") from error
        if s.grad_checkpointing:
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise OptionError(f"--grad-checkpointing: {s.model} has no such thing")
            self.model.set_grad_checkpointing(True)
        config = self.model.pretrained_cfg
        self.prepare_val = fastvit.transform(self.model)
        self.prepare = Augment(s.augment, config, s.least_crop, *self.timms(config))
        self.teacher = None if s.teacher is None else teacher(s.teacher, len(self.source.classes), config)
        if s.sync_batchnorm and s.engine != DDP:
            self.synchronise()
        if s.patch:
            fastvit.patch(self.model)
        self.model.to(self.device)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(s.ema)) if s.ema else None
        if s.engine == FSDP:
            for model in self.models():
                shard(model, self.device)
        self.fused = s.precision != "float16"  # a scaler of gradients wants the other form
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, s.weight_decay, s.layer_decay), lr=s.lr, fused=self.fused
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s.precision == "float16")
        mixes = bool(s.mixup or s.cutmix)
        self.mix = None
        if mixes:
            self.mix = timm_module("timm.data", "--mixup").Mixup(
                s.mixup, s.cutmix, label_smoothing=s.label_smoothing, num_classes=len(self.source.classes)
            )
        self.base = nn.CrossEntropyLoss(label_smoothing=0.0 if mixes else s.label_smoothing)
        self.distilled = DistillationLoss(
            s.distillation, s.alpha, s.tau, self.teacher, reduction="batchmean", base_criterion=self.base
        )
        self.step, self.best, self.begun = 0, -1.0, saved is not None
        if saved is not None:
            self.restore(*saved)
        self.net = self.model
        if s.engine == DDP:
            self.net = DistributedDataParallel(self.model, [self.device] if self.device.type == "cuda" else None)
            if s.sync_batchnorm:  # behind it, since on the CPU DDP takes no model that has them
                self.synchronise()
        self.parallel = self.net
        if s.compile:
            self.net = torch.compile(self.net)

    def models(self) -> list[nn.Module]:
        """The one that learns, and the average of its weights where there is one."""
        return [self.model] if self.ema is None else [self.model, self.ema.module]

    def synchronise(self) -> None:
        """Make the model's norms SyncBatchNorms, which torch has for GPUs, and fastvit's models for the CPU too."""
        s = self.settings
        if self.processes.count > 1 and self.device.type == "cpu" and not isinstance(self.model, VisionModel):
            raise OptionError(
                f"--sync-batchnorm: on the CPU expected with a name of `fastvit list`, got --model {s.model}"
            )
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def timms(self, config: dict[str, Any]) -> tuple[Any, Any]:
        """RandAugment and random erasing, where they are asked for."""
        s, policy, erase = self.settings, None, None
        if s.policy is not None:
            module = timm_module("timm.data.auto_augment", "--policy")
            mean = tuple(round(255 * value) for value in config["mean"])
            try:
                policy = module.rand_augment_transform(
                    s.policy, {"translate_const": config["input_size"][1] // 3, "img_mean": mean}
                )
            except (AssertionError, ValueError, KeyError) as error:
                raise OptionError(
                    f"--policy: expected one of timm's, such as rand-m9-mstd0.5-inc1, got {s.policy!r}"
                ) from error
        if s.erase:
            erase = timm_module("timm.data.random_erasing", "--erase").RandomErasing(
                s.erase, mode="pixel", device="cpu"
            )
        return policy, erase

    # Checkpoints.

    def weights(self) -> dict[str, Tensor]:
        """Of the model, and their average."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
            tensors["averaged"] = self.ema.n_averaged
        return tensors

    def states(self) -> dict[str, Tensor]:
        """Of the optimizer."""
        return {
            f"optimizer.{key}.{name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def save(self, *names: str) -> None:
        """Write everything the run goes on from; each file is whole at every moment."""
        self.processes.share_buffers(*self.models())
        out, first = self.settings.out, self.processes.first
        settings = {name: value for name, value in vars(self.settings).items() if name not in ("out", "resume")}
        facts = {
            "settings": settings,
            "classes": self.source.classes,
            "samples": self.source.samples,
            "step": self.step,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
            "fastvit": fastvit.__version__,
        }
        tensors, divided = self.weights(), self.settings.engine == FSDP
        if not divided:
            tensors |= self.states()
        if files := [name for name in names if not (divided and name == "last")]:
            dense = {}
            for name, tensor in tensors.items():
                gathered = whole(tensor)  # by all
                if first:
                    dense[name] = gathered.detach().contiguous()
            for name in files if first else ():
                with replacing(out / f"{name}.safetensors") as temporary:
                    save_file(dense, temporary, {"run": json.dumps(facts), "format": "pt"})
        if divided and "last" in names:
            save_sharded(out, tensors | self.states(), facts, self.processes)
        if first and "last" in names:  # what another engine wrote is older now
            if divided:
                (out / "last.safetensors").unlink(missing_ok=True)
            elif (sharded := read_pointer(out)) is not None:
                (out / POINTER).unlink()
                shutil.rmtree(sharded[0])

    def read_parts(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a sharded checkpoint, divided as the model is now."""
        there = names_in(folder)
        tensors = {name: torch.empty_like(tensor) for name, tensor in self.weights().items()}
        for name, parameter in self.model.named_parameters():
            empty = {"step": torch.empty(())} | {
                key: torch.empty_like(parameter.detach()) for key in OPTIMIZER_STATE[1:]
            }
            tensors |= {f"optimizer.{key}.{name}": value for key, value in empty.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name in there or "optimizer." not in name}
        load_sharded(folder, tensors)
        return tensors

    def restore(self, tensors: dict[str, Tensor] | Path, facts: dict[str, Any]) -> None:
        """Go back to where :meth:`save` was called."""
        for what in ("classes", "samples"):
            if facts[what] != getattr(self.source, what):
                got = getattr(self.source, what)
                raise OptionError(f"--data: expected the {what} that the run began with, {facts[what]}, got {got}")
        if isinstance(tensors, Path):
            tensors = self.read_parts(tensors)
        for model, prefix in zip(self.models(), ("model", "ema"), strict=False):
            places = model.state_dict()
            found = part(tensors, prefix)
            model.load_state_dict({name: as_placed(value, places.get(name, value)) for name, value in found.items()})
        if self.ema is not None:
            self.ema.n_averaged.copy_(tensors["averaged"])
        for name, parameter in self.model.named_parameters():
            for key in OPTIMIZER_STATE:
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    place = parameter.device if self.fused or key != "step" else value.device
                    value = value if key == "step" else as_placed(value, parameter)
                    self.optimizer.state[parameter][key] = value.to(place)
        self.scaler.load_state_dict(facts["scaler"])
        self.step, self.best = facts["step"], facts["best"]

    # Steps.

    def rate(self, step: int) -> float:
        """The learning rate: linear growth, then half a cosine."""
        s, warm = self.settings, min(self.settings.warmup * self.steps, self.total - 1)
        if step < warm:
            return s.lr * (step + 1) / (warm + 1)
        share = (step - warm) / max(1.0, self.total - warm)
        return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * share))

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.settings.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of both heads, where there are two; a model with one learns from labels and teacher with that."""
        outputs = self.net(images)
        if self.teacher is None:
            heads = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.stack([self.base(logits.float(), labels) for logits in heads]).mean()
        return self.distilled(images, outputs if isinstance(outputs, tuple) else (outputs, outputs), labels)

    def update(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimizer; gives the loss of this process's images."""
        s = self.settings
        reseed(s.seed, 4, self.step)  # what is drawn depends on the step alone, so nothing of it has to be kept
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        if not self.processes.first:
            reseed(s.seed, 4, self.step, self.processes.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group["scale"]
        total = torch.zeros((), device=self.device)
        for number, (some, theirs) in enumerate(
            zip(images.chunk(s.accumulate), labels.chunk(s.accumulate), strict=True), 1
        ):
            with synchronising(self.parallel, self.model, number == s.accumulate):
                with self.autocast():
                    loss = self.loss(some, theirs) / s.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if s.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        return total

    def judge(self) -> tuple[float, float]:
        """Loss and accuracy on the images for validation, of the averaged weights where there are any."""
        model, processes, s = self.models()[-1], self.processes, self.settings
        processes.share_buffers(model)
        model.eval()
        loss, right, count = 0.0, 0, 0
        own = s.batch // processes.count
        batches = validation_batches(self.source, self.prepare_val, batch=own, workers=s.workers, part=self.part)
        if processes.count > 1:
            filler = [torch.zeros(1, *self.model.pretrained_cfg["input_size"]), torch.zeros(0, dtype=torch.long)]
            batches = processes.in_step(batches, filler, self.device)
        with torch.no_grad(), self.autocast():
            for images, labels in batches:
                labels = labels.to(self.device)
                logits = model(images.to(self.device)).float()[: len(labels)]
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
                count += len(labels)
        loss, right, count = processes.sum(
            torch.tensor([loss, right, count], dtype=torch.float64, device=self.device)
        ).tolist()
        if not count:
            raise OptionError("--val-data: expected at least one image, got none")
        return loss / count, right / count

    @property
    def part(self) -> tuple[int, int]:
        """Of the images of a batch, this process's."""
        return self.processes.rank, self.processes.count

    def train(self) -> None:
        """To the end, from wherever the run is."""
        s = self.settings
        batches = training_batches(
            self.source,
            self.prepare,
            batch=s.batch,
            seed=s.seed,
            start=self.step,
            stop=self.total,
            workers=s.workers,
            part=self.part,
        )
        try:
            s.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--out: this folder cannot be made: {error}") from error
        first = self.processes.first
        train = Table(s.out / "train.csv", ("step", "epoch", "lr", "loss", "images_per_s"), self.step, keeps=first)
        val = Table(s.out / "val.csv", ("step", "epoch", "val_loss", "val_accuracy"), self.step, keeps=first)
        if not self.begun:
            self.save("last")
        writer = events(s.out, self.step) if first else None
        self.announce()
        waiting: list[tuple[int, float, Tensor]] = []
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        columns += (TextColumn("{task.fields[speed]}"), TextColumn("left"), TimeRemainingColumn())
        bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        with bar:
            task = bar.add_task("", total=self.total, completed=self.step, epoch=self.step // self.steps + 1, speed="")
            self.model.train()
            since = time.perf_counter()
            for images, labels in batches:
                rate = self.rate(self.step)
                loss = self.update(images, labels)
                waiting.append((self.step, rate, loss))
                done = self.step % self.steps == 0
                if done or self.step % s.log_every == 0 or self.step % s.save_every == 0:
                    losses = self.processes.mean(torch.stack([each for _, _, each in waiting])).tolist()  # waits
                    speed = len(waiting) * s.batch / (time.perf_counter() - since)
                    rows = [
                        (step, (step - 1) // self.steps + 1, rate, loss, f"{speed:.1f}")
                        for (step, rate, _), loss in zip(waiting, losses, strict=True)
                    ]
                    train.add(rows)
                    for step, _, rate, loss, _ in rows if writer is not None else ():
                        writer.add_scalar("train/loss", loss, step)
                        writer.add_scalar("train/rate", rate, step)
                    if bad := [step for step, _, _, loss, _ in rows if not math.isfinite(loss)]:
                        raise ArithmeticError(
                            f"the loss of step {bad[0]} is not finite: try a smaller --lr or bfloat16"
                        )
                    waiting.clear()
                    bar.update(task, completed=self.step, speed=f"{speed:.0f} images/s, loss {losses[-1]:.3f}")
                    since = time.perf_counter()
                if done:
                    self.end_epoch(val, writer)
                    bar.update(task, epoch=min(s.epochs, self.step // self.steps + 1))
                    self.model.train()
                    since = time.perf_counter()
                elif self.step % s.save_every == 0:
                    self.save("last")
        if writer is not None:
            writer.close()
        if first:
            plot(train, val, f"{s.model} on {Path(s.data).name}", s.out / "curves.png")
        self.console.print(
            f"best validation accuracy {100 * self.best:.2f} %; curves and checkpoints in {s.out}", soft_wrap=True
        )

    def end_epoch(self, val: Table, writer: Any) -> None:
        """Judge the model, and keep it."""
        loss, accuracy = self.judge()
        epoch = self.step // self.steps
        val.add([(self.step, epoch, loss, accuracy)])
        if writer is not None:
            writer.add_scalar("val/loss", loss, self.step)
            writer.add_scalar("val/accuracy", accuracy, self.step)
            writer.flush()
        better = accuracy > self.best
        self.best = max(self.best, accuracy)
        self.save(*(("best", "last") if better else ("last",)))
        self.console.print(
            f"epoch {epoch} of {self.settings.epochs}: validation loss {loss:.4f}, accuracy {100 * accuracy:.2f} %"
            + (" (best)" if better else "")
        )

    def announce(self) -> None:
        """Say what is trained on what."""
        s, count = self.settings, sum(parameter.numel() for parameter in self.model.parameters())
        totals = fastvit.report(self.model).totals() if s.patch else {}
        fused = ", ".join(f"{done} of {all_} {op}" for op, (done, all_) in totals.items()) or "none"
        self.console.print(
            f"{s.model}: {count:,} parameters, fused blocks: {fused}; {self.source.samples:,} images of "
            f"{len(self.source.classes)} classes; step {self.step} of {self.total} on {s.device}, {s.precision}"
            + f", {self.processes.count} processes ({s.engine})"
            * self.processes.started,
            soft_wrap=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status is 0 at the end, 130 after Ctrl-C, 2 for wrong arguments, 1 for a lost loss or process."""
    processes = Processes.of_environment()
    settings, saved = parse(arguments, processes)
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with processes.joined(processes.device(settings.device)):
            Run(settings, saved, processes).train()
    except OptionError as error:
        # A worker of the loader puts its stack in front of the message.
        print(f"train.py: error: {str(error).rpartition('OptionError: ')[2].strip()}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        print(
            f"train.py: error: process {processes.rank} of {processes.count} has lost another one "
            f"({str(error).splitlines()[0]}); --out {settings.out} --resume goes on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        goes_on = f"; --out {settings.out} --resume goes on" if holds_a_run(settings.out) else ""
        print(f"train.py: interrupted{goes_on}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
