"""The faster of two kernels by measuring, with a stand-in for the GPU: what is asked, when, and what comes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: there is one kernel to choose from")

from fastvit import backends, ops
from fastvit.ops import _dispatch, _measured
from fastvit.ops._dispatch import Implementation
from fastvit.patching import preference
from fastvit.reference.functional import BatchNorm


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


class Inner(NamedTuple):
    weight: Tensor
    norm: BatchNorm | None
    stride: int


class Call(NamedTuple):
    x: Tensor
    inner: Inner
    grid: tuple[int, int]
    form: str


def make(tokens: int = 20, norm: BatchNorm | None = None, form: str = "a", stride: int = 1) -> Call:
    x = torch.randn(2, tokens, 8).as_subclass(OnGPU)
    return Call(x, Inner(torch.randn(8, 1, 3, 3), norm, stride), (tokens, 1), form)


def implementations(**reasons: str) -> tuple[Implementation, ...]:
    def one(name: str) -> Implementation:
        return Implementation(name, lambda call: [reasons[name]] if name in reasons else [], lambda call: name)

    return tuple(map(one, ("cuda", "cpp", "triton", "reference")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the tuner is asked, which runs every candidate and prefers the last."""
    found: list[Any] = []

    class Tuning:
        @staticmethod
        def choose(name: str, key: tuple, candidates: list[tuple[str]], run: Any) -> tuple[str]:
            found.append((name, key, [run(candidate) for candidate in candidates]))
            return candidates[-1]

        @staticmethod
        def token_bucket(tokens: int) -> int:
            return 1 << (tokens - 1).bit_length()

    monkeypatch.setattr(_measured, "_tuning", lambda: Tuning)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: torch.no_grad())
    return found


def order(call: Call, backend: str = "auto", **reasons: str) -> list[str]:
    found = _measured.fastest_first("op", implementations(**reasons), backend, call.x, call)
    return [each.name for each in found]


def test_the_faster_one_comes_first_and_the_others_as_they_were(asked):
    assert order(make()) == ["triton", "cuda", "cpp", "reference"]
    ((name, key, ran),) = asked
    assert (name, ran) == ("op", ["cuda", "triton"])
    assert all(isinstance(part, (str, int, torch.dtype)) for part in key)


STANDS = ["cuda", "cpp", "triton", "reference"]


def test_the_order_stands_where_there_is_nothing_to_choose(asked, monkeypatch):
    assert order(make(), triton="not this") == order(make(), cuda="not this") == order(make(), "cuda") == STANDS
    assert order(make()._replace(x=torch.randn(2, 20, 8))) == STANDS
    assert order(make()._replace(x=torch.randn(0, 20, 8).as_subclass(OnGPU))) == STANDS
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"cuda"}))
    assert order(make()) == STANDS
    assert asked == []


def test_nothing_is_measured_in_training(asked):
    vector = torch.ones(8)
    batch = BatchNorm(vector, vector, vector, vector, use_batch_stats=True)
    assert order(make(norm=batch)) == STANDS
    learnt = make(norm=BatchNorm(vector, vector, vector.clone().requires_grad_(), vector))
    assert order(learnt) == STANDS
    weight = make()
    weight.inner.weight.requires_grad_()
    assert order(weight) == STANDS
    assert asked == []
    with torch.no_grad():
        assert order(weight) == order(learnt) != STANDS


def test_a_key_knows_sizes_and_settings_and_about_how_many_tokens(asked):
    vector = torch.ones(8)
    given = BatchNorm(vector, vector, vector, vector)
    calls = [make(), make(form="b"), make(stride=2), make(norm=given), make(tokens=70)]
    calls.append(make()._replace(x=make().x.bfloat16()))
    for call in calls:
        order(call)
    assert len({key for _, key, _ in asked}) == len(calls)
    order(make(tokens=21))
    assert asked[0][1] == asked[-1][1]


def test_a_question_about_the_choice_measures_nothing(asked, monkeypatch):
    with _measured.unmeasured():
        assert order(make()) == STANDS
    assert order(make()) != STANDS

    def measures(*arguments: Any) -> Any:
        assert _measured._unmeasured.get()
        return arguments[1]

    for name in ("leff", "token_depthwise_conv", "depthwise_separable_conv", "conv_projection"):
        module = __import__(f"fastvit.ops.{name}", fromlist=["fastest_first"])
        monkeypatch.setattr(module, "fastest_first", measures)
        assert preference.backend_for(name, "auto", torch.float32, torch.device("cpu")) in {
            each.name for each in ops.IMPLEMENTATIONS[name]
        }


def test_nothing_is_measured_while_exporting(asked, monkeypatch):
    monkeypatch.setattr(_measured, "must_be_plain", lambda: True)
    assert order(make()) == STANDS
    assert asked == []
    assert not _dispatch.must_be_plain()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_the_tuner_takes_names_and_without_a_gpu_the_first():
    def run(candidate: tuple[str]) -> None:
        raise AssertionError(f"ran {candidate}")

    assert _measured._tuning().choose("leff", (torch.float16, "16", 16), [("cuda",), ("triton",)], run) == ("cuda",)
