"""Features or labels of every image of a folder, of WebDataset shards or of parquet files, in parquet.

    python examples/embed.py --data pictures/ --model timm/vit_small_patch16_224 --out features/
    python examples/embed.py --data 'photos/*.parquet' --model runs/ceit/best.safetensors --output labels --out labels/
    torchrun --nproc-per-node 4 examples/embed.py --data 'a-{000..146}.tar' --model cvt_13 --weights cvt.pth --out cvt/

In --out: a file for each part of the images (some pictures of a folder, a shard, a row group), with a row an image:
its file, the features or labels, and an error where it is no image. A part is written whole or not at all, so the same
command goes on after any end, on any number of processes. Images that were mended are read once the files of their
parts are deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, get_worker_info  # noqa: E402

import fastvit  # noqa: E402
from examples.images import SUFFIXES, OptionError, Prepare, open_picture, picture_suffix, shard_samples  # noqa: E402
from examples.models import NAMES, trained  # noqa: E402
from examples.records import replacing  # noqa: E402
from examples.train import COUNT, FLAG, INTERRUPTED, PRECISIONS, number  # noqa: E402

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError:
    pa = None

SETTINGS = ("model", "model_options", "weights", "classes", "size", "output", "top", "precision", "column")
"""What the files of one folder have in common; kept in each."""
KEY = b"examples/embed.py"


# --- The images -------------------------------------------------------------------------------------------------------

Named = tuple[str, "Path | bytes"]


@dataclass(frozen=True)
class Part:
    """Images that are read one after the other, and whose rows are one file.

    Attributes:
        place: what a part that ends early is called. images: how many there are, where that is known.
        contents: a digest of what it is made of. read: gives (name, file or its bytes).
    """

    place: str
    images: int | None
    contents: str
    read: Callable[[], Iterator[Named]]


def plan(data: str, column: str, size: int) -> list[Part]:
    """The parts of what ``--data`` names, the same each time; OptionError where there is nothing of the kind."""
    if data.endswith(".parquet"):
        return _of_tables(data, column)
    if data.endswith((".tar", ".tar.gz")) or "::" in data or data.startswith("pipe:"):
        return _of_shards(data)
    folder = Path(data)
    if not folder.is_dir():
        raise OptionError(f"--data: expected a folder, shards that end in .tar, or .parquet files, got {data!r}")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise OptionError(f"--data: expected pictures ({', '.join(SUFFIXES)}) in {folder}, got none")
    parts = [names[first : first + size] for first in range(0, len(names), size)]
    return [Part(str(folder), len(some), _digest(some), partial(_files, folder, some)) for some in parts]


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _files(folder: Path, names: list[str]) -> Iterator[Named]:
    return ((name, folder / name) for name in names)


def _of_shards(data: str) -> list[Part]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise OptionError("--data: shards are read by webdataset, which is not here: pip install webdataset") from error
    urls = expand_urls(data)
    if missing := [url for url in urls if ":" not in url and not Path(url).is_file()]:
        raise OptionError(f"--data: there is no file {missing[0]}")
    return [Part(url, None, _digest(url), partial(_shard, url)) for url in urls]


def _shard(url: str) -> Iterator[Named]:
    for sample in shard_samples([url]):
        suffix = picture_suffix(sample)
        yield f"{url}/{sample['__key__']}" + ("" if suffix is None else f".{suffix}"), sample.get(suffix, b"")


def _of_tables(data: str, column: str) -> list[Part]:
    parts = []
    for path in sorted(Path(data).parent.glob(Path(data).name)):
        try:
            file = parquet.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise OptionError(f"--data: {path} is no parquet file: {error}") from error
        if column not in file.schema_arrow.names:
            raise OptionError(f"--column: expected one of {file.schema_arrow.names} of {path}, got {column!r}")
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            read = partial(_rows, path, column, group, first)
            parts.append(Part(f"{path}#{first}", rows, _digest([str(path), first, rows]), read))
            first += rows
    if not parts:
        raise OptionError(f"--data: expected rows in {data}, got none")
    return parts


def _rows(path: Path, column: str, group: int, first: int) -> Iterator[Named]:
    """Of a column of bytes, or of the structs with bytes that the datasets library writes."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
            for value in batch.column(0).to_pylist():
                data = value.get("bytes") if isinstance(value, dict) else value
                yield f"{path}#{first}", data if isinstance(data, bytes) else b""
                first += 1


class Pictures(IterableDataset):
    """Batches of parts, of which each worker reads some, each whole: (part, names, errors, images, whether it ends).

    An error is "" for an image; ``images`` (n, 3, H, W) are those without. Nothing that is wrong with a file ends it.
    """

    def __init__(self, parts: Sequence[tuple[int, Part]], prepare: Prepare, batch: int, empty: Tensor):
        self.parts, self.prepare, self.batch, self.empty = parts, prepare, batch, empty

    def __iter__(self) -> Iterator[tuple[int, list[str], list[str], Tensor, bool]]:
        worker = get_worker_info()
        for place, part in self.parts if worker is None else self.parts[worker.id :: worker.num_workers]:
            names, errors, images = [], [], []
            for name, found in self.decoded(part):
                names.append(name)
                errors.append(found if isinstance(found, str) else "")
                images += [] if isinstance(found, str) else [found]
                if len(images) == self.batch:
                    yield place, names, errors, torch.stack(images), False
                    names, errors, images = [], [], []
            yield place, names, errors, torch.stack(images) if images else self.empty, True

    def decoded(self, part: Part) -> Iterator[tuple[str, Tensor | str]]:
        """Images, and in their place what is wrong: decoders raise whatever they like."""
        files = part.read()
        while True:
            try:
                name, file = next(files)
            except StopIteration:
                return
            except Exception as error:
                yield part.place, f"{part.place} cannot be read any further: {type(error).__name__}: {error}"
                return
            try:
                yield name, self.prepare(open_picture(file, name))
            except Exception as error:
                said = str(error) if isinstance(error, OptionError) else f"{type(error).__name__}: {error}"
                yield name, said.removeprefix("--data: ")


# --- Features and labels ----------------------------------------------------------------------------------------------


class Embedding:
    """A model, and the parts that this process has to do with it."""

    def __init__(self, settings: argparse.Namespace):
        self.settings = s = settings
        self.rank, self.ranks = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device = torch.device(s.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        parts = plan(s.data, s.column, s.part)
        self.facts = {name: getattr(s, name) for name in SETTINGS}
        self.facts = json.loads(json.dumps(self.facts, default=str))
        self.all = list(enumerate(parts))[self.rank :: self.ranks]
        here = {path.name for path in s.out.glob("part-*.parquet")}
        if strangers := here - {self.file(place) for place in range(len(parts))}:
            raise OptionError(f"--out: {s.out / min(strangers)} is of other images than those of --data")
        self.done, self.wrong = 0, 0
        self.pending = [(place, part) for place, part in self.all if not self.is_done(place, part)]

        head = "skip" if s.output == "features" else "load"
        options = {"classes": s.classes, "size": s.size, "options": s.model_options, "head": head}
        self.model, self.names = trained(s.model, s.weights, **options)
        if s.output == "features":
            if not hasattr(self.model, "reset_classifier"):
                raise OptionError(f"--output: {s.model} has no features to give (reset_classifier)")
            self.model.reset_classifier(0)
        elif s.top > len(self.names):
            raise OptionError(f"--top: expected at most the number of classes, {len(self.names)}, got {s.top}")
        self.prepare = fastvit.transform(self.model)
        if s.patch:
            fastvit.patch(self.model)
        self.model.to(self.device)
        self.empty = torch.empty(0, *self.model.pretrained_cfg["input_size"])
        self.width = self.outputs(self.empty.new_zeros(1, *self.empty.shape[1:])).shape[1]

    @staticmethod
    def file(place: int) -> str:
        return f"part-{place:06}.parquet"

    def is_done(self, place: int, part: Part) -> bool:
        """Whether the part's file is there, written with these settings and of these images; its rows are counted."""
        path = self.settings.out / self.file(place)
        if not path.exists():
            return False
        try:
            facts = json.loads(parquet.read_metadata(path).metadata[KEY])
        except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's are among them
            raise OptionError(f"--out: {path} was not written by embed.py ({error})") from error
        for name, value in self.facts.items():
            if facts["settings"][name] != value:
                got, option = facts["settings"][name], name.replace("_", "-")
                raise OptionError(f"--{option}: expected {got!r}, with which {path} was written, got {value!r}")
        if facts["contents"] != part.contents:
            raise OptionError(f"--out: {path} is of other images than those of --data, or of another --part")
        self.done += facts["images"]
        self.wrong += facts["errors"]
        return True

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) to features (n, C) or probabilities (n, classes) in float32, on the CPU."""
        dtype = PRECISIONS[self.settings.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            result = self.model(images.to(self.device, non_blocking=True)).float()
        return (result if self.settings.output == "features" else result.softmax(1)).cpu()

    def columns(self, found: Tensor, good: Tensor) -> dict[str, Any]:
        """The columns of outputs, (good images, ...), with nulls where ``good`` (n,) is False."""
        if self.settings.output == "features":
            values = torch.zeros(len(good), self.width)
            values[good] = found
            mask = pa.array((~good).numpy())
            return {
                "features": pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), self.width, mask=mask)
            }
        probabilities, labels = found.topk(self.settings.top, dim=1)
        rows = iter(zip(labels.tolist(), probabilities.tolist(), strict=True))
        filled = [next(rows) if each else None for each in good.tolist()]
        return {
            "labels": pa.array(
                [None if row is None else [self.names[label] for label in row[0]] for row in filled],
                pa.list_(pa.string()),
            ),
            "probabilities": pa.array([None if row is None else row[1] for row in filled], pa.list_(pa.float32())),
        }

    def write(self, place: int, part: Part, names: list[str], errors: list[str], found: list[Tensor]) -> None:
        """The file of a part, at once."""
        good = torch.tensor([not error for error in errors], dtype=torch.bool)
        columns = {"file": pa.array(names, pa.string())}
        columns |= self.columns(torch.cat([self.empty.new_zeros(0, self.width), *found]), good)
        columns["error"] = pa.array([error or None for error in errors], pa.string())
        wrong = len(errors) - int(good.sum())
        facts = {"settings": self.facts, "contents": part.contents, "images": len(names), "errors": wrong}
        table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(facts)})
        with replacing(self.settings.out / self.file(place)) as temporary:
            parquet.write_table(table, temporary)
        self.wrong += wrong

    def total(self, finished: int) -> int | None:
        """The images of all parts; where nothing tells them, as many in each as in those finished so far."""
        if all(part.images is not None for _, part in self.all):
            return sum(part.images for _, part in self.all)
        return self.done * len(self.all) // finished if finished else None

    def run(self) -> None:
        """All that is pending."""
        s = self.settings
        s.out.mkdir(parents=True, exist_ok=True)
        console = Console(quiet=self.rank > 0)
        share = f"process 1 of {self.ranks}" if self.ranks > 1 else "images"
        columns = (TextColumn(share), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        columns += (TextColumn("left"), TimeRemainingColumn())
        loader = DataLoader(
            Pictures(self.pending, self.prepare, s.batch, self.empty),
            batch_size=None,
            num_workers=min(s.workers, len(self.pending)),
            pin_memory=self.device.type == "cuda",
        )
        parts, waiting = dict(self.pending), {}
        finished, before, since = len(self.all) - len(self.pending), self.done, time.perf_counter()
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=self.total(finished), completed=self.done, speed="")
            for place, names, errors, images, ends in loader:
                rows = waiting.setdefault(place, ([], [], []))
                rows[0].extend(names)
                rows[1].extend(errors)
                if len(images):
                    rows[2].append(self.outputs(images))
                self.done += len(names)
                if ends:
                    self.write(place, parts[place], *waiting.pop(place))
                    finished += 1
                speed = (self.done - before) / (time.perf_counter() - since)
                told = f"{speed:.0f} images/s, {self.wrong} errors"
                total = self.total(finished)
                bar.update(task, completed=self.done, total=total, speed=told)
                if ends and not console.is_terminal:
                    left = f", {(total - self.done) / speed:.0f} s left" if total and speed else ""
                    console.print(f"part {finished} of {len(self.all)}: {self.done} images, {told}{left}")
        console.print(f"{self.done} images, {self.wrong} of them errors, in {s.out}", soft_wrap=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings; argparse reports errors, with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a folder, shards 'a-{000..146}.tar', or parquet files 'b/*.parquet'")
    add("--column", default="image", help="of the images in parquet files: bytes, or a struct with bytes")
    add("--out", type=Path, required=True, help="a folder for the files")
    add("--part", type=COUNT, default=512, help="pictures of a folder in a file (default 512)")
    add("--output", choices=("features", "labels"), default="features", help="what is written (default features)")
    add("--top", type=COUNT, default=1, help="labels of an image (default 1)")
    model_arguments(parser)
    add("--precision", choices=tuple(PRECISIONS), default="float32", help="of autocast")
    add("--batch", type=COUNT, default=64, help="images the model takes at once (default 64)")
    add("--workers", type=number(int, 0), default=2, help="processes that read images (default 2)")
    return parser.parse_args(arguments)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a trained model, and of where it runs."""
    add = parser.add_argument
    add("--model", required=True, help=f"{NAMES}, or the checkpoint of a run, such as runs/ceit/best.safetensors")
    add("--model-options", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model, such as depth=6")
    add("--weights", help="a file as fastvit.load_weights reads it; timm's own if not given")
    add("--classes", type=Path, help="a file with the name of a class in each line")
    add("--size", type=COUNT, help="of the images; the model's own if not given")
    add("--patch", action=FLAG, default=True, help="with fused blocks")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        type=device,
        help="cpu or cuda; a GPU if there is one",
    )


def device(text: str) -> str:
    """An argparse type: a device that is here."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"expected one that is here, got {text!r} ({error})") from error
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed; the exit status is 0 at the end, 2 for wrong arguments, 130 after Ctrl-C."""
    settings = parse(arguments)
    try:
        if pa is None:
            raise OptionError("--out: parquet is written by pyarrow, which is not here: pip install pyarrow")
        Embedding(settings).run()
    except OptionError as error:
        print(f"embed.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("embed.py: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
