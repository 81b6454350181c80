"""The command line: ``python -m fastvit info | list | verify | bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.text import Text

from fastvit.cli import bench, facts, models, verify

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
BAD_USE = 2  # argparse's exit status for it
WIDTH_OF_A_FILE = 130


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def _parser() -> argparse.ArgumentParser:
    """One sub-parser a command; ``run`` is the function that does it."""
    parser = argparse.ArgumentParser(prog="python -m fastvit", description="Vision transformers, accelerated in place.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Callable[[argparse.Namespace, Console], int]) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return command

    add("info", facts.info)
    listing = add("list", facts.list_variants)
    listing.add_argument("pattern", nargs="?", default="*", help="shell-style, e.g. 'cait_*_384'")
    _add_model(add("verify", verify.verify), batch=2)
    benching = _add_model(add("bench", bench.bench), batch=8)
    benching.add_argument("--rounds", type=_positive, default=11, help="timed rounds of each (default 11)")
    benching.add_argument("--compile", action="store_true", help="both under torch.compile")
    return parser


def _add_model(command: argparse.ArgumentParser, batch: int) -> argparse.ArgumentParser:
    """The arguments of a command that runs a model."""
    where = ", ".join(f"{library}/NAME" for library in models.LOADERS)
    command.add_argument("model", help=f"{where}, or package.module:factory; nothing is downloaded")
    command.add_argument("--batch", type=_positive, default=batch, help=f"images in a batch (default {batch})")
    command.add_argument("--dtype", type=_dtype, default="float32", help=", ".join(DTYPES))
    command.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    command.add_argument("--size", type=_positive, help="pixels of the square images (default: the model's own)")
    command.add_argument("--seed", type=int, default=0, help="of random weights and images (default 0)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_A_FILE
    try:
        return arguments.run(arguments, console)
    except models.CannotLoad as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"python -m fastvit {arguments.command}: {error}", "red"))
        return BAD_USE


if __name__ == "__main__":
    sys.exit(main())
