"""The command line: ``fastvit info | list | verify | bench``, or ``python -m fastvit``.

Torch is imported by the commands, not by ``--help``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastvit._version import __version__
from fastvit.cli import CannotLoad
from fastvit.cli.show import make_console

if TYPE_CHECKING:
    import torch

LIBRARIES = ("fastvit", "timm", "torchvision", "transformers", "vit_pytorch")
DTYPES = ("float32", "bfloat16", "float16")
BAD_USE = 2  # argparse's exit status for it
INTERRUPTED = 130  # the shell's for Ctrl-C
WIDTH_OF_A_FILE = 130


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    import torch

    return getattr(torch, text)


def _parser() -> argparse.ArgumentParser:
    """One sub-parser a command; ``run`` names the function that does it."""
    parser = argparse.ArgumentParser(prog="fastvit", description="Vision transformers, accelerated in place.")
    parser.add_argument("--version", action="version", version=f"fastvit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return command

    add("info", "facts.info", "versions, devices, backends (with the reasons why one cannot run) and the build")
    listing = add("list", "facts.list_variants", "the models that match a pattern, with their sizes")
    listing.add_argument("pattern", nargs="?", default="*", help="shell-style, e.g. 'cait_*_384'")
    listing.add_argument("--weights", action="store_true", help="where the official weights of each are")
    verifying = (
        "hold a patched model to the accuracy of the plain one, block by block; fails where one is over its budget"
    )
    _add_model(add("verify", "verify.verify", verifying), batch=2)
    timing = "time a model plain and patched, in turn, once the patched one has proved accurate"
    benching = _add_model(add("bench", "bench.bench", timing), batch=8)
    benching.add_argument("--rounds", type=_positive, default=11, help="timed rounds of each (default 11)")
    benching.add_argument("--compile", action="store_true", help="both under torch.compile")
    return parser


def _add_model(command: argparse.ArgumentParser, batch: int) -> argparse.ArgumentParser:
    """The arguments of a command that runs a model."""
    where = ", ".join(f"{library}/NAME" for library in LIBRARIES)
    command.add_argument("model", help=f"{where}, or package.module:factory; nothing is downloaded")
    command.add_argument("--batch", type=_positive, default=batch, help=f"images in a batch (default {batch})")
    command.add_argument("--dtype", type=_dtype, default="float32", help=", ".join(DTYPES))
    command.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    command.add_argument("--size", type=_positive, help="pixels of the square images (default: the model's own)")
    command.add_argument("--seed", type=int, default=0, help="of random weights and images (default 0)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    errors = make_console(stderr=True, soft_wrap=True)
    command = "fastvit"
    try:
        arguments = _parser().parse_args(argv)
        command = f"fastvit {arguments.command}"
        console = make_console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDTH_OF_A_FILE
        module, function = arguments.run.split(".")
        return getattr(importlib.import_module(f"fastvit.cli.{module}"), function)(arguments, console)
    except KeyboardInterrupt:
        errors.print(f"{command}: interrupted", style="red", markup=False)
        return INTERRUPTED
    except CannotLoad as error:
        errors.print(f"{command}: {error}", style="red", markup=False, highlight=False)
        return BAD_USE


if __name__ == "__main__":
    sys.exit(main())
