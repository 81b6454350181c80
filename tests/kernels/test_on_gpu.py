"""Every Triton and CUDA operator on a GPU: forward and backward against float64, CUDA graphs, determinism, autotuning.

``python -m benchmarks.first_contact`` runs this file and the benchmarks in one go.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.jobs import JOBS, Job, parts, widened
from fastvit import autotune, ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, poisoned_empty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("triton", "cuda")
BATCH = 3
DEVICE = "cuda"
"""Another one where ``test_on_gpu_can_fail.py`` plants faults."""
BUSY = 4096
"""Sides of products that keep a stream busy."""


def backends_of(op: str) -> list[str]:
    return [entry.name for entry in ops.OPERATORS[op].implementations if entry.name in BACKENDS]


PAIRS = [(job, backend) for job in JOBS for backend in backends_of(job.op)]
each_pair = pytest.mark.parametrize(("job", "backend"), PAIRS, ids=lambda value: getattr(value, "name", value))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def true_float32():
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


def run(job: Job, tensors, backend: str):
    """The operator's outputs; the test is skipped, with every reason, where the backend does not take the call."""
    try:
        return parts(job.call(ops, tensors, backend=backend))
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))


def plain(job: Job, tensors):
    return parts(job.call(functional, tensors))


def weights_for(job: Job, tensors):
    """Random gradients of the outputs."""
    with torch.no_grad():
        return [torch.randn_like(out) for out in plain(job, tensors)]


def differentiate(job: Job, tensors, call, grads):
    """The outputs of ``call`` and the gradient of every leaf, by name."""
    leaves = job.leaves(tensors)
    outputs = call({**tensors, **leaves})
    grads = [grad.to(out.dtype) for out, grad in zip(outputs, grads, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def check_step(job: Job, tensors, call):
    """Check the outputs and gradients of ``call`` against those of the plain code, by the accuracy rule."""
    grads = weights_for(job, tensors)
    with poisoned_empty():
        ours = differentiate(job, tensors, call, grads)
    reference = differentiate(job, tensors, lambda t: plain(job, t), grads)
    exact = differentiate(job, widened(tensors), lambda t: plain(job, t), grads)
    for name in exact:
        assert_as_accurate(ours[name], reference[name], exact[name], name=name)


def equal(outputs, others):
    return all(map(torch.equal, outputs, others))


@each_pair
@each_dtype
@pytest.mark.parametrize("small", [True, False], ids=["small", "published"])
def test_forward_is_as_accurate_as_the_reference(job, backend, dtype, small):
    tensors = job.tensors(BATCH, dtype, DEVICE, small=small)
    with torch.no_grad():
        with poisoned_empty():
            outputs = run(job, tensors, backend)
        for each in zip(outputs, plain(job, tensors), plain(job, widened(tensors)), strict=True):
            assert_as_accurate(*each)


@each_pair
@each_dtype
@pytest.mark.parametrize("small", [True, False], ids=["small", "published"])
def test_gradients_are_as_accurate_as_the_references(job, backend, dtype, small):
    check_step(job, job.tensors(BATCH, dtype, DEVICE, small=small), lambda t: run(job, t, backend))


class Watched:
    """A namespace of operators that keeps the norms which take the batch's statistics."""

    def __init__(self, namespace):
        self.namespace, self.norms = namespace, []

    def __getattr__(self, name):
        def call(*arguments, **options):
            leaves = pytree.tree_leaves((arguments, options), is_leaf=lambda value: isinstance(value, BatchNorm))
            self.norms += [leaf for leaf in leaves if isinstance(leaf, BatchNorm) and leaf.use_batch_stats]
            return getattr(self.namespace, name)(*arguments, **options)

        return call


def moved_statistics(job: Job, tensors, namespace, **backend):
    """The running statistics behind a training step, by name."""
    watched = Watched(namespace)
    try:
        job.call(watched, {**tensors, **job.leaves(tensors)}, **backend)
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))
    assert watched.norms
    statistics = ("running_mean", "running_var")
    return {f"{name} {i}": getattr(norm, name) for i, norm in enumerate(watched.norms) for name in statistics}


@pytest.mark.parametrize(
    ("job", "backend"),
    [(job, backend) for job, backend in PAIRS if "training" in job.name],
    ids=lambda value: getattr(value, "name", value),
)
@each_dtype
def test_running_statistics_move_as_the_references_do(job, backend, dtype):
    tensors = job.tensors(BATCH, dtype, DEVICE)
    ours, reference, exact = (
        moved_statistics(job, tensors, ops, backend=backend),
        moved_statistics(job, tensors, functional),
        moved_statistics(job, widened(tensors), functional),
    )
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_as_accurate(ours[name], reference[name], exact[name], name=name)


@each_pair
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_autotune_candidate_is_as_accurate(job, backend, place, monkeypatch):
    """At inference, which has kernels of its own, and in training."""
    tensors = job.tensors(BATCH, torch.bfloat16, DEVICE)

    def take(name, key, candidates, run):
        return candidates[min(place, len(candidates) - 1)]

    monkeypatch.setattr(autotune, "choose", take)
    with torch.no_grad():
        for each in zip(run(job, tensors, backend), plain(job, tensors), plain(job, widened(tensors)), strict=True):
            assert_as_accurate(*each)
    check_step(job, tensors, lambda t: run(job, t, backend))


@each_pair
def test_a_graph_captures_the_forward_and_replays_it_on_other_inputs(job, backend):
    first, second = (job.tensors(BATCH, torch.float16, DEVICE) for _ in range(2))
    held = {name: tensor.clone() for name, tensor in first.items()}
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(job, held, backend)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(job, held, backend)
        for tensors in (first, second):
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
            graph.replay()
            assert equal(out, run(job, tensors, backend))


@each_pair
def test_a_first_call_may_be_captured(job, backend, monkeypatch, tmp_path):
    """Nothing may be measured then, even if no result is known yet."""
    tensors = job.tensors(BATCH, torch.float16, DEVICE, small=True)
    with torch.no_grad():
        eager = run(job, tensors, backend)  # compiles and loads the kernels, which a capture does not allow
        monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(autotune, "_chosen", {})
        monkeypatch.setattr(autotune, "_fastest", lambda *_: pytest.fail("measured while captured"))
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            run(job, tensors, backend)  # compiles the first configuration, which the capture will use
        finally:
            torch.use_deterministic_algorithms(False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(job, tensors, backend)
        graph.replay()
        for each in zip(out, eager, plain(job, widened(tensors)), strict=True):
            assert_as_accurate(*each)


@each_pair
@each_dtype
def test_results_repeat_to_the_bit_in_deterministic_mode(job, backend, dtype):
    tensors = job.tensors(BATCH, dtype, DEVICE)
    grads = weights_for(job, tensors)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [differentiate(job, tensors, lambda t: run(job, t, backend), grads) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            assert torch.equal(tensor, other[name]), name


COMPILED = {(job.op, "training" in job.name, backend): (job, backend) for job, backend in reversed(PAIRS)}
"""One job an operator and backend, and one of batch statistics: compiling takes long."""


@pytest.mark.parametrize(("job", "backend"), list(COMPILED.values()), ids=lambda value: getattr(value, "name", value))
def test_compiled_in_one_graph_with_gradients(job, backend):
    tensors = job.tensors(BATCH, torch.float32, DEVICE, small=True)
    run(job, tensors, backend)
    torch.compiler.reset()  # the jobs share the code that is traced, and recompilations of one are limited
    compiled = torch.compile(lambda t: job.call(ops, t, backend=backend), fullgraph=True)
    check_step(job, tensors, lambda t: parts(compiled(t)))


@each_pair
def test_another_stream_is_used_where_it_is_current(job, backend):
    tensors = job.tensors(BATCH, torch.float16, DEVICE)
    with torch.no_grad():
        eager = run(job, tensors, backend)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
            busy = torch.randn(BUSY, BUSY, device=DEVICE)
            for _ in range(20):
                busy = torch.softmax(busy @ busy, 1)  # so that work on the default stream would start too early
            for name, tensor in tensors.items():
                late[name].copy_(tensor)
            out = run(job, late, backend)
        torch.cuda.current_stream().wait_stream(side)
    assert equal(out, eager)


@pytest.mark.parametrize(
    "job", [job for job in JOBS if {*BACKENDS} <= {*backends_of(job.op)}], ids=lambda job: job.name
)
def test_the_faster_of_two_kernels_is_measured_once(job, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", {})
    tensors = job.tensors(BATCH, torch.float16, DEVICE)
    with torch.no_grad():
        for backend in BACKENDS:
            run(job, tensors, backend)
        for each in zip(run(job, tensors, "auto"), plain(job, tensors), plain(job, widened(tensors)), strict=True):
            assert_as_accurate(*each)
        trains = "training" in job.name  # a run to measure would move running statistics
        assert [known[0] for known in autotune._chosen].count(job.op) == (0 if trains else 1)
        monkeypatch.setattr(autotune, "_fastest", lambda *_: pytest.fail("measured again"))
        run(job, tensors, "auto")


def test_measured_configurations_are_found_again_by_another_process(tmp_path):
    program = (
        "import sys, torch; from fastvit import autotune as t, ops\n"
        "if sys.argv[1] == 'second': t._fastest = lambda *_: sys.exit('measured again')\n"
        "q, k, v = torch.randn(3, 2, 8, 197, 64, device='cuda', dtype=torch.float16)\n"
        "ops.masked_attention(q, k, v, backend='triton'); print(sorted(t._chosen.values()))"
    )
    environment = {**os.environ, "FASTVIT_CACHE_DIR": str(tmp_path), "FASTVIT_AUTOTUNE": "1"}
    texts = [
        subprocess.run(
            [sys.executable, "-c", program, turn], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for turn in ("first", "second")
    ]
    assert texts[0] == texts[1] != "[]\n"
    assert list(tmp_path.rglob("*.json"))


@each_dtype
def test_class_attention_kernels(dtype):
    forward = pytest.importorskip("fastvit.kernels.attention_class", exc_type=ImportError)
    backward = pytest.importorskip("fastvit.kernels.attention_class_backward", exc_type=ImportError)
    for batch, heads, queries, keys, dim in ((1, 8, 1, 197, 48), (64, 8, 1, 197, 48), (2, 6, 2, 1025, 64)):
        q = torch.randn(batch, heads, queries, dim, device=DEVICE, dtype=dtype)
        k, v = torch.randn(batch, keys, 2, heads, dim, device=DEVICE, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        mask, bias = (
            torch.rand(batch, 1, 1, keys, device=DEVICE) > 0.3,
            torch.randn(1, heads, 1, keys, device=DEVICE, dtype=dtype),
        )
        mask[0] = False
        grad, scale = torch.randn_like(q), dim**-0.5
        with poisoned_empty():
            out = forward.class_attention_forward(q, k, v, mask, bias, scale)
            ours = (out, *backward.class_attention_backward(grad, q, k, v, mask, bias, scale, True))
        results = []
        for wide in (dtype, torch.float64):
            leaves = [t.to(wide).detach().requires_grad_() for t in (q, k, v, bias)]
            expected = functional.masked_attention(*leaves[:3], mask, leaves[3], scale)
            results.append((expected.detach(), *torch.autograd.grad(expected, leaves, grad.to(wide))))
        for name, *three in zip(("output", "dq", "dk", "dv", "dbias"), ours, *results, strict=True):
            assert_as_accurate(*three, name=name)
