"""patch(benchmark=...): each block timed both ways on its own input, and left plain where fused is slower."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

from fastvit.patching import fusion, is_patched, patch, report, timing, unpatch
from fastvit.patching.fusion import Fused
from fastvit.patching.rows import reference as table
from fastvit.patching.timing import Times, interleaved, readable
from fastvit.reference import ceit
from tests.tiny import build, images

SLOW = 0.01
WITHOUT_MLPS = ("masked_attention", "leff")
CPU = torch.device("cpu")


class Clock:
    """Time that passes only in ``sleep``, and by a little whenever somebody looks."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def _slowed(method):
    def slow(*args):
        CLOCK.sleep(SLOW)
        return method(*args)

    return slow


@pytest.fixture(autouse=True)
def own_clock(monkeypatch):
    """A clock that no load on the machine moves, and few rounds."""
    monkeypatch.setattr(fusion, "_classes", {})  # made of the methods that a test puts into the tables
    monkeypatch.setattr(timing, "time", CLOCK)
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)


@pytest.fixture
def slow_attention(monkeypatch):
    """Fused attention loses by far, fused convolution wins by far."""
    monkeypatch.setattr(table.AttentionOverride, "attend", _slowed(table.AttentionOverride.attend))
    monkeypatch.setattr(ceit, "leff_arguments", _slowed(ceit.leff_arguments))  # the table has its own


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


def test_losers_are_left_alone_and_the_report_says_by_how_much(slow_attention):
    model, x = build("ceit"), images("ceit")
    with torch.no_grad():
        expected = model(x)
        assert patch(model, ops=WITHOUT_MLPS, benchmark=x, verify=x) is model
        torch.testing.assert_close(model(x), expected)
    assert fused_names(model) == ["blocks.0.leff", "blocks.1.leff"]
    shown = report(model)
    rows = {row.name: row for row in shown.rows}
    lost, won = rows["blocks.0.attn"], rows["blocks.0.leff"]
    assert (lost.status, lost.backend) == ("skipped", None)
    assert re.fullmatch(r"slower here \([\d.]+ ms against [\d.]+ (ms|us)\), so left alone", lost.reasons[0])
    assert lost.seconds > lost.plain_seconds + SLOW / 2
    assert won.status == "patched" and won.plain_seconds > won.seconds + SLOW / 2
    assert lost.error is None and won.error is not None
    assert shown.plain_seconds > shown.seconds + SLOW
    assert "slower here" in str(shown) and "end to end: " in str(shown).splitlines()[-1]
    data = json.loads(shown.to_json())
    assert data["seconds"] == shown.seconds
    assert {row["name"]: row["plain_seconds"] for row in data["rows"]}["blocks.0.attn"] == lost.plain_seconds


def test_strict_counts_what_could_be_fused(slow_attention):
    assert fused_names(patch(build("ceit"), ops=WITHOUT_MLPS, benchmark=images("ceit"), strict=True)) == [
        "blocks.0.leff",
        "blocks.1.leff",
    ]


def test_nothing_wins_warns(monkeypatch):
    monkeypatch.setattr(table.AttentionOverride, "attend", _slowed(table.AttentionOverride.attend))
    monkeypatch.setattr(table.MlpOverride, "forward", _slowed(table.MlpOverride.forward))
    monkeypatch.setattr(table.EmbeddingOverride, "project", _slowed(table.EmbeddingOverride.project))
    told = (
        r"nothing to fuse in ViT:\s+patch_embed: slower here.*\s+blocks.0: attn is not fused, mlp is not fused\s+blocks"
    )
    with pytest.warns(UserWarning, match=told):
        assert not is_patched(patch(build("vit"), benchmark=images("vit")))


def test_a_block_is_judged_around_what_its_parts_turned_out_to_be(monkeypatch):
    """Its plain run has the parts that won; where one lost there is nothing to time."""
    run = table.ReferenceBlockOverride.forward
    parts: set[tuple[bool, ...]] = set()

    def recording(self, *args):
        parts.add((isinstance(self.attn, Fused), isinstance(self.mlp, Fused)))
        return run(self, *args)

    monkeypatch.setattr(table.ReferenceBlockOverride, "forward", recording)
    model = patch(build("vit"), benchmark=images("vit"))
    assert parts == {(True, True)} and len(fused_names(model)) == 7
    monkeypatch.setattr(table.ReferenceBlockOverride, "forward", _slowed(recording))
    rows = {row.name: row for row in report(patch(model, benchmark=images("vit"))).rows}
    assert re.match("slower here", rows["blocks.0"].reasons[0]) and rows["blocks.0.attn"].status == "patched"
    monkeypatch.setattr(table.MlpOverride, "forward", _slowed(table.MlpOverride.forward))
    rows = {row.name: row for row in report(patch(model, benchmark=images("vit"))).rows}
    assert rows["blocks.0"].reasons == ("mlp is not fused",) and rows["blocks.0"].seconds is None
    assert fused_names(model) == ["patch_embed", "blocks.0.attn", "blocks.1.attn"]


def test_inputs_are_the_real_ones(monkeypatch):
    seen: dict[type, list[tuple[int, ...]]] = {}

    def record(method):
        def recording(self, q, *args):
            seen.setdefault(type(self), []).append(tuple(q.shape))
            return method(self, q, *args)

        return recording

    monkeypatch.setattr(table.AttentionOverride, "attend", record(table.AttentionOverride.attend))
    patch(build("vit"), benchmark=images("vit", batch=3))
    (shapes,) = seen.values()
    class_token_alone = (3, 4, 1, 12)  # in the last block, where the whole model is timed
    assert set(shapes) == {(3, 4, 17, 12), class_token_alone}
    shapes = [shape for shape in shapes if shape != class_token_alone]
    assert len(shapes) >= 2 * (timing.MIN_ROUNDS + 1)


def test_dry_run_measures_and_changes_nothing(slow_attention):
    model = build("ceit")
    before = [type(module) for module in model.modules()]
    patch(model, benchmark=images("ceit"), dry_run=True)
    assert [type(module) for module in model.modules()] == before
    statuses = {row.name: row.status for row in report(model).rows}
    assert (statuses["blocks.0.attn"], statuses["blocks.0.leff"]) == ("skipped", "patched")


def test_times_are_of_what_is_nested_too():
    model = patch(build("cvt"), benchmark=images("cvt"))
    rows = report(model).rows
    assert any(row.name.endswith("attn") for row in rows) and any(row.name.endswith("conv_proj_q") for row in rows)
    assert all(row.seconds and row.plain_seconds for row in rows)


def test_nothing_else_of_the_model_changes():
    model = build("cvt").train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    patch(model, benchmark=images("cvt"))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(row.seconds for row in report(unpatch(model)).rows)


def test_a_failure_leaves_the_model_as_it_was():
    model = patch(build("vit"), filter_fn=lambda module, name: "1" in name)
    for example, error in ((torch.zeros(1, 3, 7, 7), ValueError), (7, TypeError)):
        with pytest.raises(error):
            patch(model, benchmark=example)
        assert fused_names(model) == ["blocks.1", "blocks.1.attn", "blocks.1.mlp"]
        assert not any(module._forward_hooks for module in model.modules())


def test_losing_takes_the_median_and_three_rounds_of_four():
    assert Times.of([1.1] * 8, [1.0] * 8).loses
    assert not Times.of([1.01] * 8, [1.0] * 8).loses
    assert not Times.of([0.9] * 8, [1.0] * 8).loses
    assert not Times.of([1.3, 0.8, 1.3, 0.8, 1.3, 1.3, 0.8, 1.3], [1.0] * 8).loses
    assert Times.of([3.0], [2.0]) == Times(3.0, 2.0, (1.5, 1.5, 1.5))


def test_candidates_take_turns_in_random_order():
    played: list[str] = []
    seconds = interleaved(
        [lambda: played.append("a"), lambda: played.append("b")],
        CPU,
        rounds=20,
        warmup=2,
        prepare=lambda candidate: played.append("AB"[candidate]),
    )
    assert [len(each) for each in seconds] == [20, 20]
    turns = ["".join(played[i : i + 4]) for i in range(0, len(played), 4)]
    assert len(turns) == 22
    assert set(turns) == {"AaBb", "BbAa"}


def test_rounds_fill_the_budget(monkeypatch):
    monkeypatch.setattr(timing, "MAX_ROUNDS", 50)
    assert len(interleaved([lambda: CLOCK.sleep(0.001)], CPU, budget=0.02)[0]) == 19
    assert len(interleaved([lambda: None], CPU, budget=0.02)[0]) == 50
    assert len(interleaved([lambda: CLOCK.sleep(0.01)], CPU, budget=0.02)[0]) == 7


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.3e-3, "1.3 ms"), (12.0, "12 s"), (0.2514, "251 ms"), (3.2e-5, "32 us"), (1234.0, "1234 s")]
)
def test_readable(seconds, text):
    assert readable(seconds) == text
