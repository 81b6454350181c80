"""A contender in a process of its own: ``python -m benchmarks.worker`` obeys commands, one JSON object a line.

``reference`` makes the numbers that every contender of a case is held to, ``rates`` measures what the machine can do;
``prepare``, ``check`` and ``slot`` build, judge and time one contender. An answer is one JSON object a line, too. The
process that asks is ``benchmarks.runner``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fastvit import backends, ops
from fastvit.accuracy import NONE, Deviation, deviation
from fastvit.patching.coverage import FlopCounter

MODES = ("fwd", "bwd", "fwd_bwd")
DTYPES = ("float32", "bfloat16", "float16")
DRAWS = 3
"""Inputs a contender is judged on if it fails on the first: a single result may be right, or wrong, by luck."""

FRESH_BYTES, FRESH_COPIES = 64 << 20, 32
"""Inputs take turns, as many as exceed most caches."""

PRODUCT, COPY_BYTES = (1024, 1024, 1024), 64 << 20


@dataclass(frozen=True)
class Case:
    """What contenders are compared on. ``suite`` is a module with ``open_case(case) -> Workload``."""

    suite: str
    name: str
    mode: str = "fwd"
    dtype: str = "float32"
    batch: int = 1
    image_size: int | None = None
    device: str = "cpu"
    threads: int | None = None
    photos: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def training(self) -> bool:
        return self.mode != "fwd"


class Absent(Exception):  # noqa: N818
    """The contender cannot take part; the message says why."""


class Form(NamedTuple):
    """One implementation: a call on the inputs, and the tensors beside them that get gradients in training.

    The result of a ``floor`` is not what the others compute, and is not judged.
    """

    call: Callable[..., Any]
    leaves: Sequence[Tensor] = ()
    floor: bool = False


class Workload(Protocol):
    """A case, opened: the same parameters and inputs in every process."""

    input_gradients: bool
    few: int | None
    """How many images of a result are judged; None for all."""

    def state(self) -> dict[str, Tensor]:
        """The parameters, for :meth:`load` in the other processes."""

    def load(self, state: dict[str, Tensor]) -> None: ...

    def inputs(self, draw: int) -> tuple[Tensor, ...]:
        """One of any number of inputs, in the dtype and on the device of the case."""

    def form(self, provider: str, example: tuple[Tensor, ...]) -> Form:
        """The implementation of a provider; "plain" and, in float64, "exact" are there beside the contenders.

        Raises:
            Absent: there is none.
        """


class Passes:
    """The passes of one form: all of its results, and its times."""

    def __init__(self, form: Form, case: Case, input_gradients: bool) -> None:
        self.form, self.case = form, case
        self.input_gradients = input_gradients
        self.grads: list[Tensor] = []

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode(not self.case.training):
            return [leaf for leaf in pytree.tree_leaves(self.form.call(*inputs)) if isinstance(leaf, Tensor)]

    def backward(self, out: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
        wanted = [each for each in inputs if each.requires_grad] + list(self.form.leaves)
        return list(torch.autograd.grad(out, wanted, self.grads, allow_unused=True))

    def ready(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs as leaves of their own, if they get gradients."""
        if not (self.case.training and self.input_gradients):
            return list(inputs)
        return [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]

    def results(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients."""
        inputs = self.ready(inputs)
        out = self.forward(inputs)
        if not self.case.training:
            return out, []
        generator = torch.Generator().manual_seed(1)
        dtype = self.case.torch_dtype  # rounded to it in float64, too
        self.grads = [torch.randn(o.shape, generator=generator).to(o.device, dtype).to(o.dtype) for o in out]
        gradients = self.backward(out, inputs)
        return [each.detach() for each in out], [each for each in gradients if each is not None]

    def seconds(self, inputs: Sequence[Tensor]) -> float:
        """One timed call; in mode "bwd" the forward pass is not timed."""
        inputs = self.ready(inputs)
        wait(self.case.device)
        begin = time.perf_counter()
        out = self.forward(inputs)
        if self.case.training:
            if self.case.mode == "bwd":
                wait(self.case.device)
                begin = time.perf_counter()
            self.backward(out, inputs)
        wait(self.case.device)
        return time.perf_counter() - begin


def wait(device: str) -> None:
    """Until the device has done what was asked of it."""
    if device != "cpu":
        torch.accelerator.synchronize(device)


def _pooled(
    ours: Sequence[Tensor], plains: Sequence[Sequence[Tensor]], exact: Sequence[Tensor], few: int | None
) -> Deviation:
    """The deviation of several tensors as if they were one, each scaled by a power of two to values around 1.

    One that is zero but for rounding, as the gradient of a bias in front of a norm, is scaled as the largest of all is:
    alone, its noise would outweigh every error of the others.
    """
    found = NONE
    largest = [_largest(right) for right in exact]
    for mine, *others, right, own in zip(ours, *plains, exact, largest, strict=True):
        mine = mine[:few] if few is not None else mine
        zero = any(_largest(other.double() - right) > own for other in others)
        size = max(largest) if zero else own
        scale = 2.0 ** -round(math.log2(size)) if 0.0 < size < math.inf else 1.0
        each = deviation(mine * scale, [other * scale for other in others], right * scale)
        if zero:  # errors relative to the largest value, too
            own = max(own * scale, torch.finfo(mine.dtype).tiny)
            each = each._replace(fused=each.fused * own, plain=each.plain * own)
        found = found.pooled(each)
    return found


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def packed_products(x: Tensor, weight: Tensor) -> list[Callable[[], Tensor]]:
    """oneDNN's and MKL's products with a weight packed beforehand, as far as this build of torch has them."""
    found: list[Callable[[], Tensor]] = []
    rows = len(x)
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        found.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    if torch.backends.mkl.is_available():
        ready = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        found.append(lambda: torch.ops.mkl._mkl_linear(x, ready, weight, None, rows))
    return found


class Contender:
    """What a process keeps between commands."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.workload: Workload | None = None
        self.passes: Passes | None = None
        self.reference: dict[str, Any] = {}
        self.pool: Iterator[tuple[Tensor, ...]] = iter(())

    def open(self, case: dict[str, Any]) -> Workload:
        self.case = Case(**case)
        if self.case.threads:
            torch.set_num_threads(self.case.threads)
        torch.manual_seed(0)
        self.workload = importlib.import_module(self.case.suite).open_case(self.case)
        return self.workload

    def do_reference(self, case: dict[str, Any], path: str) -> dict[str, Any]:
        """Write the parameters and the right results to a file; FLOPs and least traffic of one call."""
        workload = self.open(case)
        assert self.case is not None
        state = workload.state()
        draws = []
        forms = [workload.form("plain", workload.inputs(0)), workload.form("exact", workload.inputs(0))]
        plain, exact = (Passes(form, self.case, workload.input_gradients) for form in forms)
        for draw in range(DRAWS):
            inputs = workload.inputs(draw)
            few = [each[: workload.few] for each in inputs]
            plains = [plain.results(few)]
            if self.case.dtype == "float32" and self.case.device == "cpu":  # another order of the same sums
                with torch.backends.mkldnn.flags(enabled=False):
                    plains.append(plain.results(few))
            wide = [each.double() if each.is_floating_point() else each for each in few]
            draws.append({"plain": plains, "exact": exact.results(wide)})
        torch.save({"state": state, "draws": draws}, path)
        inputs = workload.inputs(0)
        ready = plain.ready(inputs)
        with (
            FlopCounter() as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            out = plain.forward(ready)
        moved = [*inputs, *out, *state.values()]
        times = {"fwd": 1, "bwd": 2, "fwd_bwd": 3}[self.case.mode]
        return {
            "flops": counter.flops * times,
            "bytes": sum(each.numel() * each.element_size() for each in moved) * times,
        }

    def do_prepare(self, case: dict[str, Any], provider: str, path: str) -> dict[str, Any]:
        """Build the contender, with its first call."""
        workload = self.open(case)
        assert self.case is not None
        self.reference = torch.load(path, weights_only=True)
        workload.load(self.reference.pop("state"))
        example = workload.inputs(0)
        begin = time.perf_counter()
        form = workload.form(provider, example)
        self.passes = Passes(form, self.case, workload.input_gradients)
        self.passes.results(example)
        wait(self.case.device)
        seconds = time.perf_counter() - begin
        count = max(2, min(FRESH_COPIES, FRESH_BYTES // max(1, sum(each.nbytes for each in example))))
        self.pool = itertools.cycle([workload.inputs(draw) for draw in range(count)])
        return {"seconds": seconds, "floor": form.floor, "notes": getattr(workload, "notes", {})}

    def do_check(self) -> dict[str, Any]:
        """Judge the results, by the accuracy rule of :mod:`fastvit.accuracy`."""
        workload, passes = self.workload, self.passes
        assert workload is not None and passes is not None
        found = [NONE, NONE]
        for draw in range(DRAWS):
            numbers = self.reference["draws"][draw]
            results = passes.results(workload.inputs(draw))
            for i, few in enumerate((workload.few, None)):  # outputs, gradients
                plains = [each[i] for each in numbers["plain"]]
                found[i] = found[i].pooled(_pooled(results[i], plains, numbers["exact"][i], few))
            if all(each.is_accurate for each in found):
                break
        self.reference.clear()
        worst = max(found, key=lambda each: each.fused)
        return {"accurate": all(each.is_accurate for each in found), "error": worst.fused, "plain_error": worst.plain}

    def do_slot(self, calls: int) -> dict[str, Any]:
        """The seconds of some calls, each on another input; of several, the first is not timed."""
        assert self.passes is not None
        if calls > 1:
            self.passes.seconds(next(self.pool))
        return {"seconds": sum(self.passes.seconds(next(self.pool)) for _ in range(calls))}

    def do_rates(self) -> dict[str, Any]:
        """What this machine reaches: FLOP/s of a large product by the fastest of several, and bytes/s of a copy."""
        assert self.case is not None
        rows, depth, columns = PRODUCT
        dtype, device = self.case.torch_dtype, self.case.device
        x = torch.randn(rows, depth, device=device).to(dtype)
        weight = torch.randn(columns, depth, device=device).to(dtype)
        products: list[Callable[[], Any]] = [lambda: F.linear(x, weight)]
        if device == "cpu" and not backends.cpp_reasons() and self.case.dtype in ("float32", "bfloat16"):
            products.append(lambda: ops.linear(x, weight, backend="cpp"))
        if device == "cpu" and self.case.dtype == "float32":
            products += packed_products(x, weight)
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        with torch.inference_mode():
            product = min(self._fastest(call) for call in products)
            copy = self._fastest(lambda: target.copy_(source))
        return {"product": 2 * rows * depth * columns / product, "copy": 2 * COPY_BYTES / copy}

    def _fastest(self, call: Callable[[], Any], times: int = 3) -> float:
        assert self.case is not None
        found = []
        for _ in range(times):
            begin = time.perf_counter()
            call()
            wait(self.case.device)
            found.append(time.perf_counter() - begin)
        return min(found)


def obey(contender: Contender, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to one command; what is raised becomes "absent" or "failed"."""
    try:
        return getattr(contender, f"do_{command.pop('do')}")(**command)
    except Absent as reason:
        return {"absent": str(reason)}
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"failed": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]}


def main() -> None:
    """Answer commands until there are no more."""
    if sys.platform == "linux":  # a stopped process would outlive the one that asks
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what libraries print goes into the log
        contender = Contender()
        for line in sys.stdin:
            answers.write(json.dumps(obey(contender, json.loads(line))) + "\n")


def as_json(case: Case) -> dict[str, Any]:
    return dataclasses.asdict(case)


if __name__ == "__main__":
    from benchmarks.worker import main as own  # suites import this module too, and there must be one of it

    own()
