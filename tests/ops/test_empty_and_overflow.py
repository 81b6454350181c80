"""Axes of size 0 and 1, and sizes whose products do not fit into 64 bits: neither crashes nor wrong results.

Each case runs on a thread of its own, as the memory a thread keeps between calls hides what a first call does, and
several in a process, which a crash ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection
from tests.helpers import HANG_GUARD, on_pooled_draws
from tests.ops.composed import hold_to

ROOT = Path(__file__).resolve().parents[2]
Case = tuple[str, Callable[[], None]]


# --- Sizes of zero and one ------------------------------------------------------------------------------------------


def tensors_of(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def gradients(outputs: list[Tensor], leaves: list[Tensor], expanded: bool) -> list[Tensor]:
    """The leaves' gradients under ones; expanded: of stride 0, as those behind a sum are."""
    ones = [torch.ones((), dtype=out.dtype).expand_as(out) for out in outputs]
    grads = ones if expanded else [one.contiguous().clone() for one in ones]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


REFUSALS = (RuntimeError, ValueError, IndexError, ZeroDivisionError)


def expect(function: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor) -> None:
    """Hold a call without and with gradients, and the gradients, to the plain form in float64.

    Sizes that the plain form does not take must not end the process. Most results have few numbers, so draws are pooled
    (:func:`run_cases`).
    """

    def results(call: Callable[..., Any], tensors: list[Tensor], expanded: bool) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = tensors_of(call(*leaves))
        with torch.no_grad():
            inferred = tensors_of(call(*tensors))
        return [*inferred, *(out.detach() for out in outputs), *gradients(outputs, leaves, expanded)]

    try:
        wanted = results(plain, [tensor.double() for tensor in inputs], False)
        same = results(plain, list(inputs), False)
    except REFUSALS:
        with contextlib.suppress(*REFUSALS):
            results(function, list(inputs), True)
        return
    for expanded in (False, True):
        hold_to(*(dict(enumerate(each)) for each in (results(function, list(inputs), expanded), same, wanted)))


def sizes(*usual: int) -> Iterator[tuple[int, ...]]:
    """These sizes with one axis of 0 or 1 at a time, and with two of them 0."""
    yield usual
    for axis, size in itertools.product(range(len(usual)), (0, 1)):
        yield (*usual[:axis], size, *usual[axis + 1 :])
    for first, second in itertools.combinations(range(len(usual)), 2):
        yield tuple(0 if axis in (first, second) else size for axis, size in enumerate(usual))


def attention_cases(name: str, queries: int) -> Iterator[Case]:
    function, plain = getattr(ops, name), getattr(functional, name)
    for batch, heads, rows, keys, dim in sizes(2, 3, queries, 7, 8):
        for kind in ("", "bool", "keys", "bias", "row of bias"):

            def run(shape=(batch, heads, rows, keys, dim), kind=kind) -> None:
                batch, heads, rows, keys, dim = shape
                q, k, v = torch.randn(batch, heads, rows, dim), *torch.randn(2, batch, heads, keys, dim)
                mask = torch.rand(batch, 1, rows, keys) > 0.4 if kind == "bool" else None
                mask = torch.rand(batch, keys) > 0.4 if kind == "keys" else mask
                biases = {"bias": (heads, rows, keys), "row of bias": (1, 1, keys)}
                bias = [torch.randn(biases[kind])] if kind in biases else []

                def call(form, **more):
                    return lambda q, k, v, bias=None: form(q, k, v, mask, bias, 0.5, **more)

                expect(call(function, backend="cpp"), call(plain), q, k, v, *bias)

            yield f"{name} {(batch, heads, rows, keys, dim)} {kind}", run


def head_mixing_cases() -> Iterator[Case]:
    for batch, heads, rows, keys, dim in sizes(2, 3, 5, 7, 8):
        for kind, masked in itertools.product(("talking", "layer norm", "running", "batch"), (False, True)):

            def run(shape=(batch, heads, rows, keys, dim), kind=kind, masked=masked) -> None:
                batch, heads, rows, keys, dim = shape
                if kind == "batch" and batch * rows * keys <= 1:
                    return  # no statistics
                q, k, v = torch.randn(batch, heads, rows, dim), *torch.randn(2, batch, heads, keys, dim)
                small = [torch.randn(heads, heads), torch.randn(heads), torch.randn(heads, heads), torch.randn(heads)]
                mask = torch.rand(batch, 1, rows, keys) > 0.4 if masked else None

                def call(form, **more):
                    def with_norm(q, k, v, a, b, c, d):
                        if kind == "talking":
                            given = {"pre_weight": a, "pre_bias": b, "post_weight": c, "post_bias": d}
                        elif kind == "layer norm":
                            given = {"post_weight": a, "post_bias": b, "norm": LayerNorm(c.sum(0), d)}
                        else:
                            mean, var = q.new_zeros(heads), q.new_ones(heads)
                            norm = BatchNorm(mean, var, c.sum(0), d, use_batch_stats=kind == "batch")
                            given = {"post_weight": a, "post_bias": b, "norm": norm}
                        return form(q, k, v, mask=mask, scale=0.5, **given, **more)

                    return with_norm

                fused = call(ops.head_mixed_attention, backend="cpp")
                expect(fused, call(functional.head_mixed_attention), q, k, v, *small)

            yield f"head_mixed_attention {(batch, heads, rows, keys, dim)} {kind} {masked}", run


def convolution_cases() -> Iterator[Case]:
    for batch, channels, prefix, height, width in sizes(2, 20, 2, 3, 4):
        if height * width == 0:
            continue  # no grid, which the checks refuse
        for kernel, kind in itertools.product((1, 3, 5), ("", "gelu", "running", "batch", "pre")):

            def run(shape=(batch, channels, prefix, height, width), kernel=kernel, kind=kind) -> None:
                batch, channels, prefix, height, width = shape
                if batch == 0 and kind in ("batch", "pre"):
                    return  # no statistics
                x = torch.randn(batch, prefix + height * width, channels)
                weight, bias = torch.randn(channels, 1, kernel, kernel), torch.randn(channels)
                affine = [torch.rand(channels) + 0.5, torch.randn(channels)]

                def call(form, **more):
                    def with_norm(x, weight, bias, norm_weight, norm_bias):
                        mean, var = x.new_zeros(channels), x.new_ones(channels)
                        norm = BatchNorm(mean, var, norm_weight, norm_bias, use_batch_stats=kind in ("batch", "pre"))
                        given: dict[str, Any] = {
                            "": {"residual": True},
                            "gelu": {"pre_activation": "gelu", "activation": "gelu"},
                            "pre": {"pre_norm": norm},
                        }.get(kind, {"norm": norm})
                        grid = {"grid": (height, width), "prefix_tokens": prefix}
                        return form(x, weight, bias, **grid, **given, **more)

                    return with_norm

                fused = call(ops.token_depthwise_conv, backend="cpp")
                expect(fused, call(functional.token_depthwise_conv), x, weight, bias, *affine)

            yield f"token_depthwise_conv {(batch, channels, prefix, height, width)} {kernel} {kind}", run


def composed_cases() -> Iterator[Case]:
    for batch, channels, out, prefix in sizes(2, 20, 6, 1):

        def separable(batch=batch, channels=channels, out=out, prefix=prefix) -> None:
            x, depthwise = torch.randn(batch, prefix + 6, channels), torch.randn(channels, 1, 3, 3)
            pointwise, bias = torch.randn(out, channels), torch.randn(out)
            settings = {"grid": (2, 3), "prefix_tokens": prefix}

            def call(form, **more):
                return lambda x, a, b, c: form(x, a, running(x), b, c, **settings, **more)

            fused = call(ops.depthwise_separable_conv, backend="cpp")
            expect(fused, call(functional.depthwise_separable_conv), x, depthwise, pointwise, bias)

        def projection(batch=batch, channels=channels, out=out, prefix=prefix) -> None:
            x, weights = torch.randn(batch, prefix + 6, channels), torch.randn(3, channels, 1, 3, 3)
            pointwise = torch.randn(3, out, channels)
            settings = {"grid": (2, 3), "prefix_tokens": prefix}

            def call(form, **more):
                def parts(x, weights, pointwise):
                    each = [Projection(weights[i], running(x), pointwise[i], stride=1 + (i > 0)) for i in range(3)]
                    return form(x, *each, **settings, **more)

                return parts

            expect(call(ops.conv_projection, backend="cpp"), call(functional.conv_projection), x, weights, pointwise)

        def leff(batch=batch, channels=channels, hidden=out, prefix=prefix) -> None:
            x = torch.randn(batch, prefix + 6, channels)
            layers = (torch.randn(hidden, channels), torch.randn(hidden, 1, 3, 3), torch.randn(channels, hidden))

            def call(form, **more):
                def layered(x, up, depthwise, down):
                    of_hidden = running(up.t())
                    settings = {"up_norm": of_hidden, "dw_norm": of_hidden, "down_norm": running(x)}
                    none = (None,)
                    tensors = (up, *none, depthwise, *none, down, *none)
                    return form(x, *tensors, grid=(2, 3), prefix_tokens=prefix, **settings, **more)

                return layered

            expect(call(ops.leff, backend="cpp"), call(functional.leff), x, *layers)

        for function in (separable, projection, leff):
            yield f"{function.__name__} {(batch, channels, out, prefix)}", function


def running(x: Tensor) -> BatchNorm:
    """A norm by running statistics of x's channels."""
    channels = x.shape[-1]
    return BatchNorm(x.new_zeros(channels), x.new_ones(channels), x.new_ones(channels), x.new_zeros(channels))


def product_cases() -> Iterator[Case]:
    for batch, rows, depth, columns in sizes(2, 10, 9, 20):
        for activation in (None, "gelu"):

            def linear(shape=(batch, rows, depth, columns), activation=activation) -> None:
                batch, rows, depth, columns = shape
                tensors = torch.randn(batch, rows, depth), torch.randn(columns, depth), torch.randn(columns)

                def fused(x, weight, bias):
                    return ops.linear(x, weight, bias, activation, backend="cpp")

                expect(fused, lambda *given: functional.linear(*given, activation), *tensors)
                without = tensors[:2]
                expect(lambda x, w: fused(x, w, None), lambda x, w: functional.linear(x, w, None, activation), *without)

            yield f"linear {(batch, rows, depth, columns)} {activation}", linear

        def mlp(batch=batch, rows=rows, depth=depth, columns=columns) -> None:
            first, second = torch.randn(columns, depth), torch.randn(depth, columns)
            tensors = torch.randn(batch, rows, depth), first, torch.randn(columns), second, torch.randn(depth)
            expect(lambda *given: ops.mlp(*given, backend="cpp"), functional.mlp, *tensors)

        yield f"mlp {(batch, rows, depth, columns)}", mlp

        def glu_mlp(batch=batch, rows=rows, depth=depth, columns=columns) -> None:
            gate, values, second = (torch.randn(*size) for size in ((columns, depth),) * 2 + ((depth, columns),))
            biases = torch.randn(columns), torch.randn(columns), torch.randn(depth)
            layers = (gate, biases[0], values, biases[1], second, biases[2])
            expect(
                lambda *given: ops.glu_mlp(*given, backend="cpp"),
                functional.glu_mlp,
                torch.randn(batch, rows, depth),
                *layers,
            )

        yield f"glu_mlp {(batch, rows, depth, columns)}", glu_mlp


# --- Sizes that do not fit ------------------------------------------------------------------------------------------

BIG = 2**62
GEOMETRIES = {
    "grid": (4, BIG + 1, 1, 0, 0),
    "grid of no tokens": (2**32, 2**32, 1, 0, 0),
    "width": (1, 2**63 - 1, 1, 0, 0),
    "padding": (2, 2, 1, BIG, 0),
    "padding squared": (2, 2, 1, 2**33, 0),
    "prefix": (2, 2, 1, 0, 2**63 - 1),
    "prefix and grid": (2**31, 2**32, 1, 0, 2**63 - 4),
}


def refused(call: Callable[[], Any]) -> None:
    """An error says so; neither a result nor a crash."""
    try:
        got = call()
    except (ValueError, RuntimeError, MemoryError):
        return
    raise AssertionError(f"gave {[tuple(tensor.shape) for tensor in tensors_of(got)]}")


def overflow_cases() -> Iterator[Case]:
    none = (None,) * 4
    for (name, numbers), (batch, tokens), kernel in itertools.product(
        GEOMETRIES.items(), ((1, 4), (1, 0), (0, 4)), (1, 3)
    ):
        where = f"{name} {(batch, tokens)} {kernel}"

        def public(numbers=numbers, batch=batch, tokens=tokens, kernel=kernel) -> None:
            height, width, stride, padding, prefix = numbers
            x, weight = torch.ones(batch, tokens, 8), torch.ones(8, 1, kernel, kernel)
            settings = {"grid": (height, width), "stride": stride, "padding": padding, "prefix_tokens": prefix}
            refused(lambda: ops.token_depthwise_conv(x, weight, **settings))
            refused(lambda: ops.token_depthwise_conv(x, weight, backend="cpp", **settings))

        def forward(numbers=numbers, batch=batch, tokens=tokens, kernel=kernel) -> None:
            x, weight = torch.ones(batch, tokens, 8), torch.ones(8, 1, kernel, kernel)
            operator = torch.ops.fastvit.token_depthwise_conv.default
            refused(lambda: operator(x, weight, None, *none, 0.0, 0, *none, 0.0, 0, *numbers, False))

        def training(numbers=numbers, batch=batch, tokens=tokens, kernel=kernel) -> None:
            x, weight = torch.ones(batch, tokens, 8), torch.ones(8, 1, kernel, kernel)
            norms = (*none, 0.0, False, 0, *none, 0.0, batch > 0, 1)
            operators = torch.ops.fastvit
            refused(lambda: operators.token_depthwise_conv_training.default(x, weight, None, *norms, *numbers, False))
            norms = (*none, 0.0, False, 0, *none, 0.0, False, 0)
            rest = (weight, None, *norms, *numbers, False, True, True)
            backward = operators.token_depthwise_conv_backward.default
            refused(lambda: backward(x, x, torch.empty(0), *rest))

        def projection(numbers=numbers, batch=batch, tokens=tokens, kernel=kernel) -> None:
            height, width, stride, padding, prefix = numbers
            x, weight = torch.ones(batch, tokens, 8), torch.ones(8, 1, kernel, kernel)
            part = (weight, None, *none, 0.0, stride, padding)
            operator = torch.ops.fastvit.conv_projection.default
            refused(lambda: operator(x, *part, *part, *part, height, width, prefix))

        for function in (public, forward, training, projection):
            yield f"{function.__name__}: {where}", function

    def long_stride() -> None:
        x, weight = torch.randn(2, 12, 20), torch.randn(20, 1, 3, 3)
        for stride in (100, BIG, 2**63 - 1):

            def fused(x, weight, stride=stride):
                return ops.token_depthwise_conv(x, weight, grid=(3, 4), stride=stride, backend="cpp")

            expect(fused, lambda x, w: functional.token_depthwise_conv(x, w, grid=(3, 4), stride=100), x, weight)

    def long_axes() -> None:
        """Tensors that are expanded have sizes no memory would hold."""
        one = torch.ones(1, 1, 1, 8)
        refused(lambda: ops.masked_attention(one.expand(1, 1, 2**50, 8), one, one, backend="cpp"))
        refused(lambda: ops.masked_attention(one, *[one.expand(1, 1, 2**40, 8)] * 2, backend="cpp"))
        refused(lambda: ops.masked_attention(one.expand(2**31, 2**29, 1, 8), one, one, backend="cpp"))
        every = one.expand(2**30, 2**29, 1, 8)
        refused(lambda: ops.masked_attention(every, every, every, backend="cpp"))
        refused(lambda: ops.linear(torch.ones(1, 8).expand(2**40, 8), torch.ones(1, 8).expand(2**20, 8), backend="cpp"))
        weight, huge = torch.ones(1, 1, 1, 1).expand(2**59, 1, 1, 1), torch.ones(1, 1, 1).expand(1, 4, 2**59)
        operator = torch.ops.fastvit.token_depthwise_conv.default
        refused(lambda: operator(huge, weight, None, *none, 0.0, 0, *none, 0.0, 0, 2, 2, 1, 0, 0, False))

    yield "long stride", long_stride
    yield "long axes", long_axes


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "masked_attention": lambda: attention_cases("masked_attention", 20),
    "class_attention": lambda: attention_cases("class_attention", 3),
    "head_mixed_attention": head_mixing_cases,
    "token_depthwise_conv": convolution_cases,
    "compositions": composed_cases,
    "products": product_cases,
    "overflow": overflow_cases,
}


# --- Threads and processes ------------------------------------------------------------------------------------------

CASES_OF_A_PROCESS = 40


def run_cases(cases: list[Case], writer: int) -> None:
    """Run each on a new thread; tells what is about to run, and what went wrong with it."""
    for index, (_, run) in enumerate(cases):
        found: list[str] = []

        def guarded(run: Callable[[], None] = run, found: list[str] = found) -> None:
            try:
                on_pooled_draws(run, draws=16)  # one channel's statistics are a result of one number
            except BaseException:
                found.append(traceback.format_exc())

        os.write(writer, f"{json.dumps([index, None])}\n".encode())
        torch.manual_seed(0)
        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()
        if found:
            os.write(writer, f"{json.dumps([index, found[0][-3000:]])}\n".encode())


def failures_of(cases: list[Case]) -> Iterator[tuple[str, str]]:
    """Of the first cases, up to the one that ends their process, or all."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        run_cases(cases[:CASES_OF_A_PROCESS], writer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        told = [json.loads(line) for line in lines]
    _, status = os.waitpid(child, 0)
    yield from ((cases[index][0], why) for index, why in told if why)
    done = CASES_OF_A_PROCESS
    if status != 0:
        done = told[-1][0] + 1
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        yield cases[done - 1][0], signal.Signals(ended).name if ended else f"status {status}"
    if cases[done:]:
        yield from failures_of(cases[done:])


def main(isa: str, group: str) -> None:
    from fastvit import _C

    _C._set_cpu_capability(isa)
    print(json.dumps(dict(failures_of(list(GROUPS[group]())))))


@pytest.mark.parametrize("group", GROUPS)
def test_sizes(isa, group):
    command = [sys.executable, "-m", "tests.ops.test_empty_and_overflow", isa, group]
    # Each case's thread would bring a team of its own, whose members wait by spinning: as many threads as other tests.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_GUARD, check=False)
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, f"{len(wrong)} cases fail: " + "\n".join(f"{name}: {why}" for name, why in wrong.items())


if __name__ == "__main__":
    main(*sys.argv[1:])
