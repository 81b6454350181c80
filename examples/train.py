"""Trains an image classifier on a CPU or a GPU; killed at any moment, `--resume` goes on to the same losses.

    python examples/train.py --data digits --model ceit --out runs/ceit
    python examples/train.py --data pictures/ --model deit_tiny_patch16_224 --weights deit.pth --out runs/pictures
    python examples/train.py --data 'train-{000..146}.tar' --val-data 'val-{00..06}.tar' --model cvt_13 --out runs/cvt
    python examples/train.py --out runs/ceit --resume

In --out: last.safetensors and best.safetensors (weights, averaged weights, the optimizer's state), train.csv, val.csv,
TensorBoard's events where it is installed, and at the end curves.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

import fastvit  # noqa: E402
from examples.images import Augment, OptionError, open_source, reseed, training_batches, validation_batches  # noqa: E402
from examples.models import NAMES, build, part, read_checkpoint, teacher, timm_module  # noqa: E402
from examples.records import Table, events, plot, replacing  # noqa: E402
from fastvit.losses import DistillationLoss  # noqa: E402

INTERRUPTED = 130
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FREE = ("out", "resume", "device", "workers", "log_every", "save_every")
"""What may be another when a run is resumed."""


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
    "device": (None, {}, "cpu, cuda, cuda:1, ...; a GPU if not given and there is one"),
    "workers": (0, {"type": number(int, 0)}, "processes that load images"),
    "log-every": (10, {"type": COUNT}, "steps"),
    "save-every": (200, {"type": COUNT}, "steps, and at the end of each epoch"),
}
DEFAULTS = {name.replace("-", "_"): default for name, (default, _, _) in OPTIONS.items()}


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, tuple[dict[str, Tensor], dict[str, Any]] | None]:
    """The settings of the run, and its checkpoint where it is resumed; argparse reports errors, with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    for name, (default, options, text) in OPTIONS.items():
        told = "" if default in (None, False, []) else f" (default {default})"
        parser.add_argument(f"--{name}", **options, default=argparse.SUPPRESS, help=text + told)
    given = vars(parser.parse_args(arguments))
    path, saved = given["out"] / "last.safetensors", None
    settings = DEFAULTS | given
    if path.exists():
        if "resume" not in given:
            parser.error(
                f"--out: {given['out']} holds a run: --resume goes on with it, another folder begins a new one"
            )
        try:
            saved = read_checkpoint(path, "--resume")
        except OptionError as error:
            parser.error(str(error))
        settings = DEFAULTS | saved[1]["settings"] | {name: given[name] for name in FREE if name in given}
        for name, value in given.items():
            if settings[name] != value:
                option = f"--{name.replace('_', '-')}"
                parser.error(
                    f"{option}: expected {settings[name]!r}, with which the run began, or nothing, got {value!r}"
                )
    elif settings["data"] is None:
        parser.error(
            "--data: expected digits, a folder or shards"
            + (f"; no run is in {path.parent}" if "resume" in given else "")
        )
    if settings["device"] is None:
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=settings["device"])
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: expected one that is here, got {settings['device']!r} ({str(error).splitlines()[0]})")
    if settings["augment"] is None:
        settings["augment"] = "affine" if settings["data"] == "digits" else "crop"
    if settings["batch"] % settings["accumulate"]:
        parser.error(f"--accumulate: expected a divisor of --batch {settings['batch']}, got {settings['accumulate']}")
    if settings["batch"] % 2 and (settings["mixup"] or settings["cutmix"]):
        parser.error(f"--batch: expected an even number, since images are mixed in pairs, got {settings['batch']}")
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
    """A model, the images, and how far the one has come with the other."""

    def __init__(self, settings: argparse.Namespace, saved: tuple[dict[str, Tensor], dict[str, Any]] | None):
        self.settings = s = settings
        self.console = Console()
        self.device = torch.device(s.device)
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
        if s.patch:
            fastvit.patch(self.model)
        self.model.to(self.device)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(s.ema)) if s.ema else None
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
        self.net = torch.compile(self.model) if s.compile else self.model
        self.step, self.best = 0, -1.0
        if saved is not None:
            self.restore(*saved)

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

    def save(self, *names: str) -> None:
        """Write everything the run goes on from; each file is whole at every moment."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
            tensors["averaged"] = self.ema.n_averaged
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
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
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        for name in names:
            with replacing(self.settings.out / f"{name}.safetensors") as temporary:
                save_file(tensors, temporary, {"run": json.dumps(facts), "format": "pt"})

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go back to where :meth:`save` was called."""
        for what in ("classes", "samples"):
            if facts[what] != getattr(self.source, what):
                got = getattr(self.source, what)
                raise OptionError(f"--data: expected the {what} that the run began with, {facts[what]}, got {got}")
        self.model.load_state_dict(part(tensors, "model"))
        if self.ema is not None:
            self.ema.module.load_state_dict(part(tensors, "ema"))
            self.ema.n_averaged.copy_(tensors["averaged"])
        for name, parameter in self.model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    place = parameter.device if self.fused or key != "step" else value.device
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
        """One step of the optimizer; gives the loss."""
        s = self.settings
        reseed(s.seed, 4, self.step)  # what is drawn depends on the step alone, so nothing of it has to be kept
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group["scale"]
        total = torch.zeros((), device=self.device)
        for some, theirs in zip(images.chunk(s.accumulate), labels.chunk(s.accumulate), strict=True):
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
        model = self.model if self.ema is None else self.ema.module
        model.eval()
        loss, right, count = 0.0, 0, 0
        batches = validation_batches(
            self.source, self.prepare_val, batch=self.settings.batch, workers=self.settings.workers
        )
        with torch.no_grad(), self.autocast():
            for images, labels in batches:
                labels = labels.to(self.device)
                logits = model(images.to(self.device)).float()
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
                count += len(labels)
        if not count:
            raise OptionError("--val-data: expected at least one image, got none")
        return loss / count, right / count

    def train(self) -> None:
        """To the end, from wherever the run is."""
        s = self.settings
        batches = training_batches(
            self.source, self.prepare, batch=s.batch, seed=s.seed, start=self.step, stop=self.total, workers=s.workers
        )
        s.out.mkdir(parents=True, exist_ok=True)
        train = Table(s.out / "train.csv", ("step", "epoch", "lr", "loss", "images_per_s"), self.step)
        val = Table(s.out / "val.csv", ("step", "epoch", "val_loss", "val_accuracy"), self.step)
        if not self.step:
            self.save("last")
        writer = events(s.out, self.step)
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
                    losses = torch.stack([each for _, _, each in waiting]).tolist()  # waits for the device
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
            f"{len(self.source.classes)} classes; step {self.step} of {self.total} on {s.device}, {s.precision}",
            soft_wrap=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status is 0 at the end, 2 for wrong arguments, 1 where the loss is lost, 130 after Ctrl-C."""
    settings, saved = parse(arguments)
    try:
        Run(settings, saved).train()
    except OptionError as error:
        # A worker of the loader puts its stack in front of the message.
        print(f"train.py: error: {str(error).rpartition('OptionError: ')[2].strip()}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"train.py: interrupted; --out {settings.out} --resume goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
