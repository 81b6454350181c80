"""Training steps through head-mixed attention against the plain twin in float64: results, gradients, statistics."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import backends
from fastvit.ops.head_mixed_attention import head_mixed_attention, re_attention, talking_heads_attention
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm
from tests.helpers import assert_as_accurate, poisoned_empty

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
pytestmark = needs_cpp

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
KINDS = ("re", "re_eval", "talking", "layer", "talking_without_bias", "plain")


class Mixer(nn.Module):
    """The parameters of one kind of head-mixed attention, far from the identity."""

    def __init__(self, kind: str, heads: int, **norm_options: Any):
        super().__init__()
        self.kind = kind
        weights = [torch.eye(heads) + 0.2 * torch.randn(heads, heads) for _ in range(2)]
        biases = [0.1 * torch.randn(heads) for _ in range(2)]
        talking = kind.startswith("talking")
        given = {
            "pre_weight": weights[0] if talking else None,
            "pre_bias": biases[0] if kind == "talking" else None,
            "post_weight": None if kind == "plain" else weights[1],
            "post_bias": biases[1] if kind in ("talking", "re", "re_eval") else None,
        }
        for name, tensor in given.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.norm: nn.Module | None = None
        if kind in ("re", "re_eval"):
            self.norm = nn.BatchNorm2d(heads, **norm_options).train(kind == "re")
            # A variance of a size that maps have.
            for name, tensor in self.norm.named_buffers():
                if tensor.is_floating_point():
                    tensor.uniform_(1e-3, 2e-3) if "var" in name else tensor.normal_(0.05, 0.01)
        elif kind == "layer":
            self.norm = nn.LayerNorm(heads)
        if self.norm is not None and self.norm.weight is not None:
            with torch.no_grad():
                self.norm.weight.uniform_(0.5, 1.5)
                self.norm.bias.normal_(0.0, 0.1)

    def arguments(self) -> dict[str, Any]:
        names = ("pre_weight", "pre_bias", "post_weight", "post_bias")
        norm: BatchNorm | LayerNorm | None = None
        if self.norm is not None:
            norm = LayerNorm.of(self.norm) if isinstance(self.norm, nn.LayerNorm) else BatchNorm.of(self.norm)
        return {**{name: getattr(self, name) for name in names}, "norm": norm}


def make_qkv(batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return [torch.randn(size).to(dtype).transpose(1, 2) for size in sizes]


def step(
    op: Any, mixer: Mixer, qkv: list[Tensor], weights: Tensor, mask: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Everything a step leaves behind; the mixer itself is not changed."""
    mixer, dtype = copy.deepcopy(mixer).to(qkv[0].dtype), qkv[0].dtype
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out = op(*leaves, **mixer.arguments(), mask=mask, **options)
    (out * weights.to(dtype)).sum().backward()
    left = {"out": out.detach(), **{name: leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}}
    left |= {name: parameter.grad for name, parameter in mixer.named_parameters()}
    return left | dict(mixer.named_buffers())


def small(left: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Gradients and statistics of a few numbers each, in one tensor, each divided by its exact size.

    Together, since of a single one the largest error is a matter of luck; without those that are zero but for rounding,
    as is the gradient of a bias in front of a BatchNorm.
    """
    names = [name for name in exact if name not in ("out", *"qkv") and exact[name].is_floating_point()]
    sizes = {name: exact[name].double().square().mean().sqrt() for name in names}
    return torch.cat([(left[name].double() / size).flatten() for name, size in sizes.items() if size > 1e-9])


def assert_as_plain(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Holds everything that a step left behind to the accuracy rule, in the dtype that was computed in."""
    assert {name: (t.dtype, t.shape) for name, t in got.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
    assert got.get("norm.num_batches_tracked") == plain.get("norm.num_batches_tracked")
    dtype = got["out"].dtype
    for name in ("out", *"qkv"):
        assert_as_accurate(got[name].to(dtype), plain[name].to(dtype), exact[name], name=name)
    if len(got) > 4:
        tensors = small(got, exact).to(dtype), small(plain, exact).to(dtype), small(exact, exact)
        assert_as_accurate(*tensors, name="parameters and statistics")


def check(mixer: Mixer, qkv: list[Tensor], mask: Tensor | None = None, **options: Any) -> None:
    """Holds every tensor of a C++ training step to the accuracy rule."""
    mixer = mixer.to(qkv[0].dtype)
    weights = torch.randn(qkv[0].shape)
    with poisoned_empty():
        got = step(head_mixed_attention, mixer, qkv, weights, mask, backend="cpp", **options)
    plain = step(functional.head_mixed_attention, mixer, qkv, weights, mask, **options)
    exact = step(functional.head_mixed_attention, mixer, [t.double() for t in qkv], weights, mask, **options)
    assert_as_plain(got, plain, exact)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_instruction_set(isa: str, kind: str, dtype: torch.dtype) -> None:
    check(Mixer(kind, 6), make_qkv(2, 6, 19, 37, 20, dtype), output_scale=0.5)


MASKS = {"keys": (3, 25), "rows": (3, 1, 18, 25), "heads": (3, 4, 18, 25), "one_query_for_all": (1, 1, 18, 1)}


@DTYPES
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["re", "talking", "layer"])
def test_masks_with_empty_rows(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.rand(shape) < 0.6
    if len(shape) == 4:
        mask[-1, :, -1] = False
    else:
        mask[-1] = False
    check(Mixer(kind, 4), make_qkv(3, 4, 18, 25, 16, dtype), mask)


@DTYPES
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 12, 197, 32), "re"), ((1, 12, 197, 33), "re"), ((1, 12, 197, 32), "layer"), ((2, 4, 196, 48), "talking")],
)
def test_sizes_of_the_models(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    batch, heads, tokens, dim = shape
    check(Mixer(kind, heads), make_qkv(batch, heads, tokens, tokens, dim, dtype))


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.7}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1}],
    ids=str,
)
def test_settings_of_the_batch_norm(options: dict[str, Any]) -> None:
    check(Mixer("re", 4, **options), make_qkv(3, 4, 25, 31, 16, torch.float32))


def test_frozen_parts_get_no_gradient() -> None:
    """Whatever is frozen, the rest has the gradients it has when nothing is."""
    mixer, qkv = Mixer("re", 4), make_qkv(2, 4, 9, 11, 8, torch.float32)
    everything = step(head_mixed_attention, mixer, qkv, torch.ones(qkv[0].shape), None, backend="cpp")
    for frozen in ("post_weight", "post_bias", "norm.weight", "norm.bias"):
        part = copy.deepcopy(mixer)
        part.get_parameter(frozen).requires_grad_(False)
        left = step(head_mixed_attention, part, qkv, torch.ones(qkv[0].shape), None, backend="cpp")
        assert left.pop(frozen) is None
        assert all(torch.equal(tensor, everything[name]) for name, tensor in left.items())
    mixer.requires_grad_(False)
    q, k, v = (tensor.clone() for tensor in qkv)
    out = head_mixed_attention(q, k, v.requires_grad_(), **mixer.arguments(), backend="cpp")
    out.sum().backward()
    assert torch.equal(v.grad, everything["v"])
    assert q.grad is None


def test_batch_statistics_without_gradients() -> None:
    mixer, (q, k, v) = Mixer("re", 4), make_qkv(2, 4, 9, 11, 8, torch.float32)
    results = []
    for backend in ("cpp", "reference"):
        one = copy.deepcopy(mixer)
        with torch.no_grad():
            out = head_mixed_attention(q, k, v, **one.arguments(), backend=backend)
        results.append([out, *one.buffers()])
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][1], dict(mixer.named_buffers())["norm.running_mean"])


def test_one_value_a_head_is_left_to_the_reference() -> None:
    mixer, qkv = Mixer("re", 4), make_qkv(1, 4, 1, 1, 8, torch.float32)
    with pytest.raises(RuntimeError, match="batch statistics need more than one value per head"):
        head_mixed_attention(*qkv, **mixer.arguments(), backend="cpp")
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # as nn.BatchNorm2d says
        head_mixed_attention(*qkv, **mixer.arguments())


@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 8), (2, 4, 0, 6, 8), (2, 4, 5, 0, 8)], ids=str)
def test_empty_sizes(shape: tuple[int, ...]) -> None:
    for kind in ("talking", "layer"):
        mixer = Mixer(kind, 4)
        qkv = [tensor.requires_grad_() for tensor in make_qkv(*shape, torch.float32)]
        head_mixed_attention(*qkv, **mixer.arguments(), backend="cpp").sum().backward()
        assert all(not tensor.grad.any() for tensor in (*qkv, *mixer.parameters()))


def test_a_norm_of_nan_has_no_effect_on_empty_maps() -> None:
    mixer, qkv = Mixer("re_eval", 4), make_qkv(2, 4, 5, 0, 8, torch.float32)
    torch.nn.init.constant_(mixer.norm.weight, torch.nan)
    head_mixed_attention(*qkv, **mixer.arguments()).sum().backward()
    assert all(not parameter.grad.any() for parameter in mixer.parameters())


@pytest.mark.parametrize("kind", ["re", "talking", "layer"])
def test_autocast(kind: str) -> None:
    """Computed in bfloat16; gradients and statistics come back in the dtypes they have."""
    mixer, qkv = Mixer(kind, 4), make_qkv(2, 4, 21, 21, 18, torch.float32)
    weights = torch.randn(qkv[0].shape)
    exact = step(functional.head_mixed_attention, mixer, [t.double() for t in qkv], weights, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(head_mixed_attention, mixer, qkv, weights, None, backend="cpp")
        plain = step(functional.head_mixed_attention, mixer, qkv, weights, None)
    assert got["out"].dtype == torch.bfloat16
    assert got["post_weight"].dtype == torch.float32
    assert_as_plain(got, plain, exact)


def test_gradients_that_batch_statistics_cancel() -> None:
    """At a scale of zero all maps are the same: the norm's input is constant, and so is its output."""
    mixer = Mixer("re", 6)
    qkv = make_qkv(2, 6, 16, 3, 16, torch.float32)
    weights = torch.randn(qkv[0].shape)
    got = step(head_mixed_attention, mixer, qkv, weights, None, scale=0.0, backend="cpp")
    plain = step(functional.head_mixed_attention, mixer, qkv, weights, None, scale=0.0)
    exact = step(functional.head_mixed_attention, mixer, [t.double() for t in qkv], weights, None, scale=0.0)
    for name in ("out", "v", "norm.weight", "norm.bias"):
        assert_as_accurate(got[name], plain[name], exact[name], name=name)


@pytest.mark.parametrize("left", [1e-3, 1e-2, 0.1])
def test_a_variance_whose_terms_cancel(isa: str, left: float) -> None:
    """A mask leaves most queries one key, so that heads have nearly the same map, and weights add up to little."""
    q, k, v = make_qkv(1, 6, 40, 2, 8, torch.float32)
    mask = torch.rand(1, 1, 40, 2) < 0.5
    mask[..., 0, :] = True
    weight = torch.randn(6, 6)
    weight += (left - weight.sum(1, keepdim=True)) / 6

    def call(form: Callable[..., Tensor], dtype: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v, weight)]
        statistics = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
        norm = BatchNorm(*statistics, None, None, use_batch_stats=True, momentum=1.0)
        out = form(*leaves[:3], post_weight=leaves[3], norm=norm, mask=mask, **more)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)), *statistics]

    got = call(head_mixed_attention, torch.float32, backend="cpp")
    plain, exact = (call(functional.head_mixed_attention, dtype) for dtype in (torch.float32, torch.float64))
    names = ("out", "dq", "dk", "dv", "dweight", "running_mean", "running_var")
    for name, *three in zip(names, got, plain, exact, strict=True):
        assert_as_accurate(*three, name=name)


def test_what_is_nan_in_one_head_stays_there_without_a_mix() -> None:
    qkv = make_qkv(1, 4, 5, 9, 8, torch.float32)
    qkv[1][0, 2, 3, 0] = torch.nan
    mixer, weights = Mixer("plain", 4), torch.randn(qkv[0].shape)
    for left in step(head_mixed_attention, mixer, qkv, weights, None, backend="cpp").values():
        assert left[:, 2].isnan().any() and left[:, [0, 1, 3]].isfinite().all()


def test_deterministic_mode_gives_the_same_bits() -> None:
    mixer, qkv = Mixer("re", 6), make_qkv(3, 6, 40, 40, 16, torch.float32)
    weights = torch.randn(qkv[0].shape)
    threads = torch.get_num_threads()
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        torch.set_num_threads(2)
        for _ in range(5):
            results.append(step(head_mixed_attention, mixer, qkv, weights, None, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        assert all(torch.equal(tensor, results[0][name]) for name, tensor in result.items())


@pytest.mark.parametrize("kind", ["re", "re_eval", "talking", "layer"])
def test_compiles_in_one_graph_for_any_batch_and_length(kind: str) -> None:
    torch._dynamo.reset()
    mixer, compiled_mixer = Mixer(kind, 4), Mixer(kind, 4)
    compiled_mixer.load_state_dict(mixer.state_dict())
    graphs: list[int] = []

    def call(qkv: list[Tensor], mask: Tensor, used: Mixer) -> Tensor:
        return head_mixed_attention(*qkv, **used.arguments(), mask=mask, backend="cpp")

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(batch)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for batch, queries, keys in ((2, 9, 7), (3, 20, 21), (5, 4, 30)):
        mask = torch.rand(batch, keys) < 0.7
        results = []
        for function, used in ((call, mixer), (compiled, compiled_mixer)):
            torch.manual_seed(0)
            qkv = [tensor.requires_grad_() for tensor in make_qkv(batch, 4, queries, keys, 8, torch.float32)]
            used.zero_grad()
            function(qkv, mask, used).square().sum().backward()
            results.append([*(t.grad for t in qkv), *(p.grad for p in used.parameters()), *used.buffers()])
        torch.testing.assert_close(*results, rtol=0.0, atol=0.0)
    assert set(graphs) == {2}  # compiled for the first sizes, used for all
    torch._dynamo.reset()


class _Sizes(TorchDispatchMode):
    """Notes how many elements every operator's results have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.seen.append((result.numel(), str(func)))
        return results


def _peak_bytes(call: Callable[[], object]) -> int:
    """By how much the process's memory grows at most while a call runs, whoever allocates it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what there is
    before = _status_bytes("VmHWM")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("kind", ["re", "talking", "layer"])
def test_no_map_is_written(kind: str) -> None:
    """Nothing has the size of one image's maps: no operator's result, nor memory of the kernels, nor in backward."""
    heads, tokens = 8, 1000
    mixer, qkv = Mixer(kind, heads), make_qkv(1, heads, tokens, tokens, 8, torch.float32)
    weights = torch.randn(qkv[0].shape)

    def train(op: Any, **options: Any) -> list[tuple[int, str]]:
        with _Sizes() as sizes:
            step(op, mixer, qkv, weights, None, **options)
        return sizes.seen

    maps = heads * tokens * tokens
    seen = train(head_mixed_attention, backend="cpp")
    assert any("backward" in name for _, name in seen)
    assert max(size for size, _ in seen) <= 2 * qkv[0].numel()
    assert max(size for size, _ in train(functional.head_mixed_attention)) >= maps
    if not os.access("/proc/self/clear_refs", os.W_OK) or not sys.platform.startswith("linux"):
        return
    assert _peak_bytes(lambda: train(head_mixed_attention, backend="cpp")) < 4 * maps // 2
    assert _peak_bytes(lambda: train(functional.head_mixed_attention)) > 4 * maps


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_of_the_low_level_operators(full: bool) -> None:
    """With everything that is optional, and without any of it."""
    q, k, v = make_qkv(2, 4, 9, 7, 8, torch.float32 if full else torch.bfloat16)
    mask = torch.rand(2, 1, 9, 7) < 0.5 if full else None
    matrix, vector = torch.randn(4, 4), torch.randn(4)
    pre = post = (matrix, vector) if full else (None, None)
    affine = (vector, vector) if full else (None, None)
    settings = (1e-5, full, 0.5, not full, mask, 0.3)
    low = torch.ops.fastvit
    torch.library.opcheck(low.head_mixed_attention.default, (q, k, v, *pre, *post, *affine, None, None, *settings))
    arguments = (torch.randn_like(q), q, k, v, *pre, *post, *affine, *settings)
    torch.library.opcheck(low.head_mixed_attention_backward.default, arguments)
    torch.library.opcheck(low.head_map_moments.default, (q, k, *pre, mask, 0.3, matrix))
    torch.library.opcheck(low.head_map_moments_backward.default, (vector, matrix, q, k, *pre, mask, 0.3))


def test_twins_train_as_their_plain_forms() -> None:
    mixer, qkv, options = Mixer("re", 4), make_qkv(2, 4, 9, 9, 8, torch.float32), {"scale": 0.3}
    talker, out = Mixer("talking", 4), []
    for twins in (
        (re_attention, talking_heads_attention),
        (functional.re_attention, functional.talking_heads_attention),
    ):
        norm = BatchNorm.of(copy.deepcopy(mixer.norm))
        mixes = [getattr(talker, name) for name in ("pre_weight", "pre_bias", "post_weight", "post_bias")]
        first = twins[0](*qkv, mixer.post_weight, mixer.post_bias, norm, output_scale=0.5, **options)
        out.append((first, twins[1](*qkv, *mixes, **options)))
    assert all("Mix" in str(tensor.grad_fn) for tensor in out[0])
    torch.testing.assert_close(*out)
