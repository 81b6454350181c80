"""The files of a run: each is whole at every moment, whenever the process that writes it is killed."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of ``path`` at once: a reader sees the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Table:
    """A CSV file with a column ``step``: the steps taken when a row was written."""

    def __init__(self, path: Path, columns: Sequence[str], step: int, keeps: bool = True):
        """Keep the rows up to ``step``; what a killed process wrote beyond its checkpoint will come again.

        ``keeps`` is False in a process that leaves the file to another one.
        """
        self.path, self.columns, self.keeps = path, columns, keeps
        if not keeps:
            return
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            kept = self.rows() if path.exists() else []
            csv.writer(file).writerows(
                [columns, *([row[name] for name in columns] for row in kept if int(row["step"]) <= step)]
            )

    def rows(self) -> list[dict[str, str]]:
        """The rows that are whole."""
        with self.path.open(newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [row for row in csv.DictReader(lines) if None not in row.values() and len(row) == len(self.columns)]

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        if not self.keeps:
            return
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)


def plot(train: Table, val: Table, title: str, path: Path) -> None:
    """Both curves as a PNG: loss on the left, accuracy on the right; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows, judged = train.rows(), val.rows()
    left.plot(
        [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], color="#9aa5b1", label="training"
    )
    steps = [int(row["step"]) for row in judged]
    left.plot(steps, [float(row["val_loss"]) for row in judged], color="#2f6fde", label="validation")
    left.set(xlabel="step", ylabel="loss", title=title)
    left.legend(frameon=False)
    right.plot(steps, [100 * float(row["val_accuracy"]) for row in judged], color="#2f6fde")
    right.set(xlabel="step", ylabel="validation accuracy, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def events(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
