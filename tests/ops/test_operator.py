"""The choice of an implementation: order, refusals, the environment's restriction, recording, logging, tracing."""

from __future__ import annotations

import logging

import pytest
import torch
from fastvit.ops._dispatch import Implementation, Selection, gradients_needed, recording, select, turned_down
from torch import nn

from fastvit import backends, ops
from fastvit.ops import _dispatch


def _small_only(x: torch.Tensor) -> list[str]:
    return [] if x.shape[0] <= 4 else ["takes up to 4 rows"]


def _no_gradients(x: torch.Tensor) -> list[str]:
    return ["no backward"] if gradients_needed(x) else []


IMPLEMENTATIONS = (
    Implementation("cuda", lambda x: ["not on a GPU", "too old"], lambda x: x * 100),
    Implementation("cpp", lambda x: _small_only(x) + _no_gradients(x), lambda x: x * 2),
    Implementation("sdpa", _no_gradients, lambda x: x * 3),
    Implementation("reference", lambda x: [], lambda x: x * 4),
)
SMALL, LARGE = torch.ones(4), torch.ones(5)


def run(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    return select("double", IMPLEMENTATIONS, backend, (x,), {}).run(x)


def name(x: torch.Tensor, backend: str = "auto") -> str:
    return select("double", IMPLEMENTATIONS, backend, (x,), {}).name


def test_auto_takes_the_first_without_reasons():
    assert name(SMALL) == "cpp"
    assert name(LARGE) == "sdpa"
    assert name(LARGE.clone().requires_grad_()) == "reference"


def test_a_named_backend_never_falls_back():
    assert name(SMALL, "sdpa") == "sdpa"
    with pytest.raises(RuntimeError, match=r"double: backend 'cuda' cannot run this call: not on a GPU; too old"):
        name(SMALL, "cuda")
    with pytest.raises(RuntimeError, match="takes up to 4 rows; no backward"):
        name(LARGE.clone().requires_grad_(), "cpp")


def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"backend: double has none named 'fast'.*'auto', 'cuda', 'cpp', 'sdpa', 'ref"):
        name(SMALL, "fast")


def test_the_environment_narrows_the_automatic_choice_only(monkeypatch):
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"sdpa"}))
    assert name(SMALL) == "sdpa"
    assert name(SMALL, "cpp") == "cpp"
    assert "FASTVIT_BACKEND" in turned_down("double", IMPLEMENTATIONS, (SMALL,), {})["cpp"][0]
    monkeypatch.setattr(backends, "REQUESTED", frozenset({"reference"}))
    assert name(SMALL) == "reference"


def test_gradients_are_needed_where_autograd_will_ask():
    leaf = torch.ones(1, requires_grad=True)
    assert gradients_needed(None, SMALL, leaf)
    assert gradients_needed(leaf * 2)
    assert not gradients_needed(None, SMALL)
    with torch.no_grad():
        assert not gradients_needed(leaf)
    with torch.inference_mode():
        assert not gradients_needed(leaf)


def test_turned_down_gives_every_reason():
    assert turned_down("double", IMPLEMENTATIONS, (LARGE,), {}) == {
        "cuda": ["not on a GPU", "too old"],
        "cpp": ["takes up to 4 rows"],
    }


def test_recording_sees_choices_of_its_block_only():
    seen: list[Selection] = []
    name(SMALL)
    with recording(seen.append):
        name(LARGE)
    name(SMALL)
    assert [(choice.op, choice.backend) for choice in seen] == [("double", "sdpa")]
    assert seen[0].turned_down["cpp"] == ["takes up to 4 rows"]


def test_the_log_tells_each_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_told", set())
    with caplog.at_level(logging.DEBUG, "fastvit"):
        for _ in range(3):
            name(LARGE)
        name(SMALL)
    assert [record.message for record in caplog.records] == [
        "double: sdpa; not cuda: not on a GPU, too old; not cpp: takes up to 4 rows",
        "double: cpp; not cuda: not on a GPU, too old",
    ]


def test_traceable_without_graph_breaks():
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for x in (SMALL, LARGE, LARGE.clone().requires_grad_()):
        assert torch.equal(compiled(x), run(x))
    torch._dynamo.reset()


class _Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run(x, "cpp")


def test_export_trace_and_transforms_take_the_reference():
    exported = torch.export.export(_Doubling(), (SMALL,)).module()
    assert torch.equal(exported(SMALL), SMALL * 4)
    assert torch.equal(torch.jit.trace(_Doubling(), SMALL, check_trace=False)(SMALL), SMALL * 4)
    assert torch.equal(torch.func.vmap(run)(torch.ones(2, 3)), torch.full((2, 3), 4.0))
    assert torch.equal(torch.func.grad(lambda x: run(x).sum())(SMALL), torch.full((4,), 4.0))
    assert torch.equal(run(SMALL), SMALL * 2)


def test_fastvit_log_gives_the_logger_a_handler(capsys, monkeypatch):
    monkeypatch.setattr(_dispatch, "_told", set())
    level, handlers = _dispatch.log.level, list(_dispatch.log.handlers)
    try:
        _dispatch.configure_log("debug")
        name(SMALL)
    finally:
        _dispatch.log.setLevel(level)
        _dispatch.log.handlers[:] = handlers
    assert capsys.readouterr().err == "fastvit: double: cpp; not cuda: not on a GPU, too old\n"
    with pytest.raises(ValueError, match="FASTVIT_LOG: got 'shout', accepted are 'debug'"):
        _dispatch.configure_log("shout")


def test_a_recorder_may_stand_around_the_run():
    def around(run, *args):
        return run(*args) + 1.0

    with recording(lambda selection: around if selection.backend == "sdpa" else None):
        x = torch.ones(1, 1, 2, 8)
        assert torch.equal(ops.masked_attention(x, x, x, backend="sdpa"), x + 1.0)
        assert torch.equal(ops.masked_attention(x, x, x, backend="reference"), x)
