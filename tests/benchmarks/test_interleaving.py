"""Candidates take turns, each call on the next input, and what prepares a call is not timed with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.ops._timing import compare
from benchmarks.timing import on_inputs
from fastvit.patching import timing


def test_a_call_gets_what_was_just_prepared_for_it_from_the_next_input():
    played: list[str] = []

    def prepare(candidate: str):
        return lambda argument: played.append(candidate.upper()) or f"{candidate}{argument}"

    calls = [lambda made, candidate=candidate: played.append(f"{candidate}:{made}") for candidate in "ab"]
    seconds = on_inputs(calls, [0, 1, 2], rounds=4, warmup=1, prepare=[prepare("a"), prepare("b")])
    assert [len(each) for each in seconds] == [4, 4]
    turns = [tuple(played[i : i + 2]) for i in range(0, len(played), 2)]
    names = [prepared.lower() for prepared, _ in turns]
    assert turns == [(name.upper(), f"{name}:{name}{i % 3}") for i, name in enumerate(names)]
    assert all(set(names[i : i + 2]) == {"a", "b"} for i in range(0, len(names), 2))


def test_preparing_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def passes(seconds: float):
        def wait(_: object) -> None:
            nonlocal now
            now += seconds

        return wait

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    seconds = on_inputs([passes(1.0), passes(2.0)], [None], rounds=3, warmup=0, prepare=[passes(8.0), passes(16.0)])
    assert seconds == [[1.0] * 3, [2.0] * 3]


def test_all_calls_of_a_round_are_prepared_before_the_first():
    played: list[str] = []
    times = compare(
        {"whole": lambda x: None, "alone": lambda x: played.append(f"call {x}")},
        [1, 2, 3],
        rounds=1,
        repeats=2,
        prepare={"alone": lambda x: played.append(f"prepare {x}") or -x},
    )
    first, second = (text.removeprefix("prepare ") for text in played[-4:-2])
    assert (first, second) in {("1", "2"), ("3", "1"), ("2", "3")}
    assert played[-2:] == [f"call -{first}", f"call -{second}"]
    assert set(times) == {"whole", "alone"}
