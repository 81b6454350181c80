"""The C++ operators in a program without torch: for this machine, and for another CPU, under an emulator."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fastvit
from fastvit import backends

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15}
DTYPES |= {torch.int64: 4, torch.complex64: 9}  # which no operator takes
"""As torch's C interface counts them."""


class Target(NamedTuple):
    """What a program is built with, how it is started, and the instruction set of its kernels."""

    compiler: tuple[str, ...]
    emulator: tuple[str, ...]
    isa: str
    flags: tuple[str, ...] = ()  # for all files
    link_flags: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What is needed and not installed; None where nothing is."""
        lacking = [name for name in (*self.compiler, *self.emulator) if shutil.which(name) is None]
        if lacking:
            return f"needs {' and '.join(lacking)}"
        return None if importlib.util.find_spec("pybind11") else "needs pybind11, as any build"


TARGETS = {
    "standalone": Target(("c++",), (), "portable", ("-O1",)),  # its kernels are those that all other tests run
    "neon": Target(("aarch64-linux-gnu-g++",), ("qemu-aarch64",), "neon", link_flags=("-static",)),
}
"""By name; on Debian those for neon are g++-aarch64-linux-gnu and qemu-user."""


def build_rules() -> ModuleType:
    """setup.py, as a module."""
    spec = importlib.util.spec_from_file_location("fastvit_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None  # it is a .py file
    rules = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", {"fastvit_setup": rules}), mock.patch("setuptools.setup"):
        spec.loader.exec_module(rules)
    return rules


@functools.cache
def build(name: str) -> Path:
    """The program of a target, by the rules of setup.py; its objects are kept between runs."""
    target, rules = TARGETS[name], build_rules()
    rules.OBJECTS = ROOT / "build" / f"standalone-{name}"
    with mock.patch.dict("os.environ", FASTVIT_ISA_LIST=target.isa, CXXFLAGS=" ".join(target.flags)):
        cxx = list(target.compiler)
        toolchain = rules.Toolchain(cxx=cxx, compiler="", isas=rules.find_isas(cxx))
        # Operators and what they share; above them lies what calls them, from Python or C++.
        units = [unit for unit in rules.plan_units(toolchain) if unit.source.parent != rules.CSRC]
    plain = next(unit for unit in units if unit.source.stem == "isa")
    units.append(rules.Unit(SOURCE, rules.OBJECTS / "program.o", plain.command))
    binary = rules.Binary(rules.OBJECTS / "program", units, cxx, list(target.link_flags))
    with rules.objects_locked():
        if ninja := rules.find_ninja():
            rules.build_with_ninja(ninja, units, [binary])
        else:
            rules.build_plainly(units, [binary])
    return binary.path


class Program:
    """A program of a target that runs, with the calls that it answers."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name]
        command = [*self.target.emulator, str(build(name))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None  # they are pipes
        self.to, self.results = self.process.stdin, self.process.stdout

    def stop(self) -> None:
        self.to.close()
        self.process.wait()
        self.results.close()

    def call(self, op: str, *arguments: Any) -> Any:
        """``torch.ops.fastvit.<op>(*arguments)``.

        Raises:
            RuntimeError: what the operator raises, or the program ends.
        """
        schema = getattr(torch.ops.fastvit, op).default._schema
        told = [_text(op), _text(self.target.isa), _numbers(torch.get_num_threads())]
        told.append(_numbers(len(schema.arguments), len(schema.returns)))
        for argument, value in zip(schema.arguments, arguments, strict=True):
            told += _value(value, str(argument.type).startswith("Optional"))
        try:
            self.to.write(b"".join(told))
            self.to.flush()
            if self._number():
                raise RuntimeError(self._read(self._number()).decode())
            tensors = tuple(self._tensor() for _ in schema.returns)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the program ended with status {self.process.wait()} at {op}") from None
        return tensors[0] if len(tensors) == 1 else tensors

    def _read(self, count: int) -> bytes:
        data = self.results.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _number(self) -> int:
        return struct.unpack("<q", self._read(8))[0]

    def _tensor(self) -> Tensor:
        code = self._number()
        dtype = next(each for each in DTYPES if DTYPES[each] == code)
        sizes, strides = ([self._number() for _ in range(self._number())] for _ in range(2))
        count = _extent(sizes, strides)
        data = bytearray(self._read(count * dtype.itemsize))
        flat = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return flat.as_strided(sizes, strides)

    @contextlib.contextmanager
    def in_place_of_the_extension(self) -> Iterator[None]:
        """Within it, the operators on the CPU are those of the program."""
        fastvit.release_memory()  # packed weights have a layout of their own
        library = torch.library.Library("fastvit", "IMPL")
        for name, device in backends.extension().operators:
            if device == "cpu":
                library.impl(name, functools.partial(self.call, name), "CPU", allow_override=True)
        try:
            yield
        finally:
            library._destroy()
            fastvit.release_memory()
            self.stop()


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _text(text: str) -> bytes:
    return _numbers(len(text)) + text.encode()


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie from the first to the last."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _value(value: Any, optional: bool) -> Iterator[bytes]:
    """An argument: a letter of its kind, and what is on the stack."""
    if value is None:
        yield _numbers(ord("n"), 0)
        return
    if optional:
        yield _numbers(ord("o"))
    if isinstance(value, Tensor):
        sizes, strides = value.shape, value.stride()
        yield _numbers(ord("t"), DTYPES[value.dtype], len(sizes), *sizes, len(strides), *strides)
        memory = value.detach().as_strided((_extent(sizes, strides),), (1,))
        yield memory.clone().view(torch.uint8).numpy().tobytes()
    else:
        yield struct.pack("<qd" if isinstance(value, float) else "<qq", ord("v"), value)
