"""The steps that compute: the device, small calls, the goals' rows and all others, peak memory, whole models.

Each ``<step>(item, options, tell)`` yields its rows; see ``processes.py``. Times are those of CUDA graphs' replays.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.first_contact.processes import Options, Tell
from benchmarks.gpu_goals import BATCH, DTYPE, GOALS, MEMORY_GOALS
from benchmarks.gpu_models import MODELS, measure_inference, measure_steps
from benchmarks.gpu_rows import JOB, KERNELS, measure
from benchmarks.gpu_timing import compare
from benchmarks.jobs import JOBS, Job, parts, widened
from benchmarks.proven import SOURCES, digest
from fastvit import autotune, backends, ops
from fastvit.accuracy import deviation
from fastvit.reference import functional

Rows = Iterator[dict[str, Any]]

COPIED = 1 << 32
"""Bytes of the copy that is timed: many times a GPU's cache."""
SMALL_BATCH = 2
OURS = ("fused", *KERNELS)


def _device(options: Options) -> torch.device:
    torch.manual_seed(0)
    return torch.device(options.device)


def _rounds(options: Options) -> int:
    return 1 if options.small else 15


def _batch(options: Options) -> int:
    """Of whole models."""
    return SMALL_BATCH if options.small else BATCH


# --- The device -----------------------------------------------------------------------------------------------------


def device_items(options: Options) -> Sequence[str]:
    return ["versions", "rates"]


def device(item: str, options: Options, tell: Tell) -> Rows:
    """What runs here, and what a copy and a product reach."""
    where = _device(options)
    if item == "versions":
        known = where.type == "cuda"
        about = {
            "device": torch.cuda.get_device_name(where) if known else "cpu",
            "chip": backends.chip_of(where) if known else "cpu",
            "sources": {backend: digest(backend) for backend in SOURCES},
        }
        yield about | {"machine": {key: value for key, value in backends.describe().items() if key != "location"}}
        if where.type == "cuda":
            properties = torch.cuda.get_device_properties(where)
            yield {"l2_bytes": properties.L2_cache_size, "multiprocessors": properties.multi_processor_count}
            yield {"nvidia_smi": subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout}
        return
    size, side = (1 << 20, 256) if options.small else (COPIED, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    left, right = torch.randn(2, side, side, device=where, dtype=torch.bfloat16)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    times = {name: each["median"] for name, each in compare(calls, rounds=3, device=where).items()}
    rates = {"copy_terabytes_a_second": 2 * size / times["copy"] / 1e9}
    yield rates | {"product_teraflops": 2 * side**3 / times["product"] / 1e9, "milliseconds": times}


# --- Small calls ----------------------------------------------------------------------------------------------------


def _backends_of(job: Job) -> list[str]:
    return [entry.name for entry in ops.OPERATORS[job.op].implementations if entry.name in KERNELS]


def small_items(options: Options) -> Sequence[str]:
    """One job an operator, and one of batch statistics, with each backend: "job backend"."""
    first = {(job.op, "training" in job.name): job for job in reversed(JOBS)}
    return [f"{job.name} {backend}" for job in reversed(first.values()) for backend in _backends_of(job)]


def small(item: str, options: Options, tell: Tell) -> Rows:
    """One small forward and backward with one backend, by the accuracy rule."""
    autotune.ENABLED = False
    name, backend = item.split()
    job, where = JOB[name], _device(options)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    tensors = job.tensors(SMALL_BATCH, dtype, where, small=True)
    found = {}
    for which, namespace, given, options_of in (
        ("fused", ops, tensors, {"backend": backend}),
        ("plain", functional, tensors, {}),
        ("exact", functional, widened(tensors), {}),
    ):
        leaves = job.leaves(given)
        outputs = parts(job.call(namespace, {**given, **leaves}, **options_of))
        torch.manual_seed(1)
        grads = [torch.randn(out.shape).to(dtype).to(out) for out in outputs]  # the same numbers for all
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
        names = [*(f"output {place}" for place in range(len(outputs))), *(f"gradient of {leaf}" for leaf in leaves)]
        found[which] = dict(zip(names, [out.detach() for out in outputs] + list(gradients), strict=True))
    wrong = {}
    for name, fused in found["fused"].items():
        judged = deviation(fused, [found["plain"][name]], found["exact"][name])
        if not judged.is_accurate:
            wrong[name] = {"error": judged.fused, "plain": judged.plain, "special": judged.special}
    row = {"op": job.op, "backend": backend, "checked": len(found["fused"])}
    yield {**row, "failed": "less accurate than the rule allows", "inaccurate": wrong} if wrong else row


# --- Rows -----------------------------------------------------------------------------------------------------------


def _row_of(item: str, options: Options, tell: Tell, *, tuned: bool, **which: Any) -> Rows:
    """A row of "job mode batch" in the goals' dtype, with the first configuration of each kernel or a measured one."""
    autotune.ENABLED = tuned
    name, mode, batch = item.split()
    settings = {"training": mode == "training", "without": options.without, "at": tell.at, **which}
    settings |= {"small": options.small, "rounds": _rounds(options)}
    row = measure(name, int(batch), getattr(torch, DTYPE), _device(options), **settings)
    yield _judged({**row, "tuned": tuned})


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row, failed where one of our results was inaccurate."""
    ours = [name for name in row["inaccurate"] if name in OURS]
    return {**row, "failed": f"inaccurate: {', '.join(ours)}"} if ours else row


def goals_items(options: Options) -> Sequence[str]:
    """Each goal's row once."""
    return list(dict.fromkeys(f"{goal.job} {goal.mode} {BATCH}" for goal in GOALS))


def goals(item: str, options: Options, tell: Tell) -> Rows:
    """A goal's row: our kernels in their first configuration, the library's, floors, eager."""
    yield from _row_of(item, options, tell, tuned=False)


tuned_items = goals_items


def tuned(item: str, options: Options, tell: Tell) -> Rows:
    """The same with configurations that are measured, which takes compiling all of them."""
    yield from _row_of(item, options, tell, tuned=True)


def others_items(options: Options) -> Sequence[str]:
    """All other rows: of the other jobs and modes, and of single images."""
    every = [f"{job.name} {mode} {batch}" for batch in (BATCH, 1) for job in JOBS for mode in ("inference", "training")]
    return [item for item in every if item not in goals_items(options)]


others = tuned


def compiled_items(options: Options) -> Sequence[str]:
    """The rows of goals over torch.compile."""
    over = [goal for goal in GOALS if goal.over.startswith("compile")]
    return list(dict.fromkeys(f"{goal.job} {goal.mode} {BATCH}" for goal in over))


def compiled(item: str, options: Options, tell: Tell) -> Rows:
    """A row of the fused operator and of the plain code under max-autotune."""
    compiled = ["compile_max_autotune"]
    with autotune.unmeasured():  # what part one has measured is taken, nothing else is
        yield from _row_of(item, options, tell, tuned=True, compiled=compiled, only=["fused", "plain", *compiled])


# --- Models ---------------------------------------------------------------------------------------------------------


def memory_items(options: Options) -> Sequence[str]:
    return [goal.model for goal in MEMORY_GOALS]


def memory(item: str, options: Options, tell: Tell) -> Rows:
    """Peak memory and time of a training step, plain and fused."""
    row = measure_steps(item, _batch(options), _device(options), rounds=_rounds(options), small=options.small)
    plain, fused = row["first_loss"].values()
    same = math.isclose(plain, fused, rel_tol=0.05)
    yield row if same else {**row, "failed": f"the first loss is {fused:.4g} instead of {plain:.4g}"}


def models_items(options: Options) -> Sequence[str]:
    return list(MODELS)


def models(item: str, options: Options, tell: Tell) -> Rows:
    """Inference of a whole model: plain, fused, each of them compiled as well."""
    settings = {"rounds": _rounds(options), "small": options.small, "without": options.without, "at": tell.at}
    yield _judged(measure_inference(item, _batch(options), _device(options), **settings))


def call_once(name: str, backend: str) -> None:
    """One call of a job at the goals' size, for a profiler."""
    torch.manual_seed(0)
    tensors = JOB[name].tensors(BATCH, getattr(torch, DTYPE), "cuda")
    with torch.no_grad():
        JOB[name].call(ops, tensors, backend=backend)
    torch.cuda.synchronize()
