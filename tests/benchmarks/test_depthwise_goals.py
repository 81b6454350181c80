"""The goals of the depthwise family: how they are judged, and a small run of the command from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import depthwise_goals
from benchmarks.depthwise_goals import GOALS, TABLES, describe_goal, judge
from benchmarks.ops import token_depthwise_conv
from benchmarks.ops._timing import Measured
from fastvit import backends

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
PEERS = ("eager", "nchw", "channels-last", "copy")


def made_up(name: str, ours: float, *, batch: int = 8, dtype: str = "float32", accurate: bool = True, **peers) -> dict:
    """A row at inference; peers take 10 ms unless another time is given."""
    times = {"fastvit": {"median": ours}} | {peer: {"median": peers.get(peer, 10.0)} for peer in PEERS}
    row = {"op": "token_depthwise_conv", "mode": "inference", "shape": {"name": name}, "batch": batch, "dtype": dtype}
    return row | {"accurate": accurate, "ms": times}


def judged(rows: list[dict], what: str, over: str, batch: int = 8, dtype: str = "float32") -> dict:
    """The only goal of that description."""
    (goal,) = (
        goal
        for goal in judge(rows)
        if (goal["what"], goal["over"][0], goal["batch"], goal["dtype"]) == (what, over, batch, dtype)
    )
    return goal


def test_a_goal_is_met_if_every_row_meets_it():
    rows = [made_up("ceit LeFF middle 768", 2.5), made_up("ceit LeFF middle 1536", 2.0)]
    goal = judged(rows, "LeFF middle", "eager")
    assert goal["met"]
    assert [row["reached"] for row in goal["rows"]] == [4.0, 5.0]
    assert describe_goal(goal) == (
        "met    LeFF middle over eager, batch 8, float32: 4.00 to 5.00, at least 4.00; 2 of 2 rows"
    )


def test_rows_that_miss_are_named():
    rows = [made_up("ceit LeFF middle 768", 2.5), made_up("ceit LeFF middle 1536", 4.0)]
    assert describe_goal(judged(rows, "LeFF middle", "eager")) == (
        "NOT MET LeFF middle over eager, batch 8, float32: 2.50 to 4.00, at least 4.00; "
        "1 of 2 rows, not ceit LeFF middle 1536 (2.50)"
    )


def test_a_floor_limits_the_time():
    rows = [made_up("cpvt PEG 192", 1.6, copy=1.0), made_up("cvt 64 stride 1", 3.5, copy=2.0)]
    goal = judged(rows, "bare convolution", "copy")
    assert [(row["reached"], row["met"]) for row in goal["rows"]] == [(1.6, True), (1.75, False)]
    assert not goal["met"]
    assert "1.60 to 1.75, at most 1.60; 1 of 2 rows, not cvt 64 stride 1 (1.75)" in describe_goal(goal)


def test_the_fastest_peer_counts():
    rows = [made_up("ceit depthwise 768", 2.0, nchw=1.9), made_up("cpvt PEG 192", 2.0, eager=2.0)]
    goal = judged(rows, "bare convolution", "eager")
    assert [row["reached"] for row in goal["rows"]] == [0.95, 1.0]
    assert "over the fastest of eager, nchw, channels-last, batch 8" in describe_goal(goal)


def test_each_batch_size_and_dtype_has_its_own_goals():
    row = made_up("ceit LeFF middle 768", 2.0, batch=1, dtype="bfloat16")
    assert [goal["dtype"] for goal in judge([row]) if goal["rows"]] == ["bfloat16"]
    goal = judged([row], "LeFF middle", "eager", 1, "bfloat16")
    assert (goal["wanted"], goal["rows"][0]["reached"], goal["met"]) == (8.0, 5.0, False)


def test_an_inaccurate_row_meets_no_goal():
    rows = [made_up("ceit LeFF middle 768", 1.0, accurate=False)]
    line = describe_goal(judged(rows, "LeFF middle", "eager"))
    assert line.endswith("inaccurate, at least 4.00; 0 of 1 rows, not ceit LeFF middle 768 (inaccurate)")


def test_what_was_not_measured_is_not_met():
    goals = judge([])
    assert len(goals) == len(GOALS)
    assert not any(goal["met"] for goal in goals)
    assert all(": not measured, at " in describe_goal(goal) for goal in goals)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.rows.what}-{goal.over[0]}-{goal.batch}-{goal.dtype}")
def test_goals_name_rows_and_candidates_that_exist(goal):
    table = TABLES[goal.rows.op, goal.rows.mode]
    assert set(goal.over) <= set(table.columns)
    assert all(any(row.startswith(name) for row in table.rows) for name in goal.rows.names)


def test_every_shape_has_a_goal_over_a_peer_and_one_over_a_copy():
    for name in token_depthwise_conv.INFERENCE.rows:
        assert sum(bool(goal["rows"]) for goal in judge([made_up(name, 1.0)])) == 2


@needs_cpp
def test_a_small_run_writes_its_measurements(tmp_path, capsys):
    path = tmp_path / "goals.json"
    depthwise_goals.main(["--only", "cvt 384", "--batch", "1", "--rounds", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == str(torch.__version__)
    rows = [(row["op"], row["mode"], row["shape"]["name"]) for row in found["rows"] if row["dtype"] == "bfloat16"]
    convolutions = ["cvt 384 stride 1", "cvt 384 stride 2"]
    assert rows == [
        *(("token_depthwise_conv", "inference", name) for name in convolutions),
        ("conv_projection", "inference", "cvt 384"),
        *(("token_depthwise_conv", "training", name) for name in convolutions),
    ]
    for row in found["rows"]:
        assert row["accurate"]
        times = [*row["ms"].values(), *row.get("backward_ms", {}).values()]
        assert all(0 < measured["low"] <= measured["median"] <= measured["high"] for measured in times)
    goals = {(goal["what"], goal["over"][0], goal["batch"], goal["dtype"]): goal for goal in found["goals"]}
    backward = goals["backward pass", "eager", 1, "float32"]
    times = next(row for row in found["rows"] if row["mode"] == "training")["backward_ms"]
    assert [row["name"] for row in backward["rows"]] == convolutions
    assert backward["rows"][0]["reached"] == times["eager"]["median"] / times["fastvit"]["median"]
    assert not goals["LeFF middle", "eager", 1, "float32"]["rows"]
    printed = capsys.readouterr().out
    assert all(describe_goal(goal) in printed for goal in found["goals"])


@needs_cpp
def test_the_backward_pass_timed_alone_is_that_of_the_step(monkeypatch):
    ran: list[None] = []
    operator = token_depthwise_conv.token_depthwise_conv

    def counted(*args, **kwargs):
        ran.append(None)
        return operator(*args, **kwargs)

    def compare(calls, inputs, *, prepare, **_):
        passed = prepare["fastvit backward"](inputs[0])
        ran.clear()
        alone = calls["fastvit backward"](passed)
        assert not ran
        whole = calls["fastvit"](inputs[0])
        assert ran
        assert all(map(torch.equal, alone, whole))
        return {name: Measured(float(place), 0.0, 0.0) for place, name in enumerate(calls)}

    monkeypatch.setattr(token_depthwise_conv, "token_depthwise_conv", counted)
    monkeypatch.setattr(token_depthwise_conv, "compare", compare)
    shape = token_depthwise_conv.Shape("LeFF", 6, 32, leff=True)
    row = token_depthwise_conv.measure_training(shape, 2, torch.float32, rounds=1)
    assert row["accurate"]
    medians = [[each["median"] for each in row[times].values()] for times in ("ms", "backward_ms")]
    assert medians == [[0.0, 1.0], [2.0, 3.0]]


@needs_cpp
@pytest.mark.parametrize("pass_", ["forward", "gradient of a parameter"])
def test_a_wrong_result_gets_no_ratio(pass_, monkeypatch, capsys):
    operator = token_depthwise_conv.token_depthwise_conv

    def wrong(x, weight, *rest, **options):
        if pass_ == "forward":
            return 1.01 * operator(x, weight, *rest, **options)
        return operator(x, 1.01 * weight - 0.01 * weight.detach(), *rest, **options)

    monkeypatch.setattr(token_depthwise_conv, "token_depthwise_conv", wrong)
    arguments = ["--only", "cvt 384 stride 2", "--batch", "1", "--dtype", "float32", "--rounds", "1"]
    token_depthwise_conv.main(arguments if pass_ == "forward" else [*arguments, "--training"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("cvt 384 stride 2, batch 1, float32")
    assert "wrong" in last
    assert "x" not in last.partition("|")[2]
