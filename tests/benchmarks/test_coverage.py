"""The coverage command: what it counts, what it says of a model, and rows that survive crashes and hangs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from benchmarks import report
from benchmarks.coverage import __main__ as command
from benchmarks.coverage import judging, models
from benchmarks.coverage.counting import Counting

HEADS, TOKENS, WIDTH = 4, 10, 32


def counted(call: Callable[[], object]) -> dict[str, int]:
    with torch.no_grad(), Counting() as counting:
        call()
    return {kind: number for kind, number in counting.found.items() if number}


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 2, HEADS, TOKENS, WIDTH // HEADS).unbind(0)


def mixed_over_heads() -> Tensor:
    q, k, v = qkv()
    mix = torch.randn(HEADS, HEADS)
    maps = F.linear((q @ k.mT).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2).softmax(-1)
    return F.conv2d(maps, mix[..., None, None]) @ v


def gated() -> Tensor:
    x, weight = torch.randn(2, TOKENS, WIDTH), torch.randn(2 * WIDTH, WIDTH)
    gate, value = F.linear(x, weight).chunk(2, -1)
    return F.linear(F.silu(gate) * value, weight)


CALLS: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "plain attention": (lambda: (lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v)(*qkv()), {"plain": 1}),
    "with a bias and a window": (
        lambda: (lambda q, k, v: ((q @ k.mT).view(1, 2, HEADS, TOKENS, TOKENS) + 1.0).softmax(-1)[0] @ v)(*qkv()),
        {"plain": 1},
    ),
    "heads mixed before and after": (mixed_over_heads, {"plain": 1}),
    "torch's kernel": (lambda: F.scaled_dot_product_attention(*qkv()), {"torch": 1}),
    "our kernel": (lambda: fastvit.ops.masked_attention(*qkv(), backend="cpp"), {"fastvit": 1}),
    "linear attention": (lambda: (lambda q, k, v: q @ (k.softmax(-2).mT @ v))(*qkv()), {}),
    "gated by a softmax": (lambda: torch.randn(2, 5).softmax(-1)[..., None] * torch.randn(2, 5, 3), {}),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))(torch.randn(3, 8)),
        {"mlp": 1},
    ),
    "mlp of convolutions": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))(torch.randn(2, 8, 4, 4)),
        {"mlp": 1},
    ),
    "gated mlp": (gated, {"mlp": 1}),
    "two linear layers": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))(torch.randn(3, 8)), {}),
    "depthwise between": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))(
            torch.randn(2, 8, 6, 6)
        ),
        {"depthwise": 1},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts(name):
    call, expected = CALLS[name]
    assert counted(call) == expected


class Block(nn.Module):
    """Attention that no row knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)


def judged(*makers: Callable[[], nn.Module]) -> dict:
    x = torch.randn(2, TOKENS, WIDTH)
    row = models.Class("here/Block", "Block", lambda: iter([lambda make=make: (make().eval(), x) for make in makers]))
    return judging.row_of(row)


def test_a_row_says_what_runs_fused():
    row = judged(Block)
    assert (row["status"], row["attention"], row["fused"], row["plain"]) == ("fused", 1, 1, 0)


def test_an_attempt_that_fails_is_followed_by_the_next():
    assert judged(lambda: nn.Linear(3, 3), Block)["status"] == "fused"
    row = judged(lambda: nn.Linear(3, 3))
    assert row["status"] == "not run"
    assert row["reason"].startswith("RuntimeError: mat1 and mat2")


def test_what_is_left_plain_has_its_reason():
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return (((q @ k.mT).softmax(-1) + torch.eye(x.shape[1])) @ v).transpose(1, 2).flatten(2)

    row = judged(Gated)
    assert row["status"] == "not"
    assert "softmax; a tensor is added behind the softmax" in row["reason"]


def test_a_wrong_result_is_called_wrong(monkeypatch):
    def spoil(model: nn.Module, **options: object) -> nn.Module:
        model.register_forward_hook(lambda module, args, out: out * 1.001)
        return model

    monkeypatch.setattr(fastvit, "patch", spoil)
    assert judged(Block)["status"] == "wrong"


def test_every_library_has_rows_of_distinct_names():
    pytest.importorskip("timm")
    rows = models.classes("timm")
    assert len({row.name for row in rows}) == len(rows) > 200
    assert {"Cait", "SwinTransformer", "Eva", "LevitDistilled"} <= {row.cls for row in rows}


STUB = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    name = line.strip()
    if name.endswith("MultiheadAttention"): os._exit(7)
    if name.endswith("Decoder"): time.sleep(60)
    print(json.dumps({"name": name, "class": "C", "status": "no attention", "reason": ""}), flush=True)
"""


def run(monkeypatch, tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(command, "JUDGING", [sys.executable, "-c", STUB])
    out = tmp_path / "out.json"
    status = command.main(["--library", "torch", "--json", str(out), "--csv", str(tmp_path / "out.csv"), *arguments])
    return status, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_crash_or_a_hang_loses_its_own_row_alone(jobs, monkeypatch, tmp_path):
    status, result = run(monkeypatch, tmp_path, "--timeout", "3", "--jobs", jobs)
    found = {row["name"].partition("/")[2]: (row["status"], row.get("reason")) for row in result["rows"]}
    assert list(found) == [row.name.partition("/")[2] for row in models.classes("torch")]
    assert found.pop("nn.MultiheadAttention") == ("failed", "its process ended with status 7")
    assert found.pop("nn.TransformerDecoder") == ("failed", "it took more than 3 seconds")
    assert set(found.values()) == {("no attention", "")}
    assert status == 1
    assert result["complete"] is False  # of other libraries there is nothing
    assert (tmp_path / "out.csv").read_text().startswith("name,class,status,reason\n")


def test_what_was_judged_before_an_interrupt_is_kept(monkeypatch, tmp_path):
    write, written = command.write, []

    def interrupting(path: Path, head: dict, rows: list) -> None:
        write(path, head, rows)
        if not written:
            written.append(rows)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command, "write", interrupting)
    status, result = run(monkeypatch, tmp_path)
    assert status == command.INTERRUPTED
    assert [row["name"] for row in result["rows"]] == ["torch/nn.MultiheadAttention"]
    assert result["complete"] is False
    assert result["asked"] == {"torch": len(models.classes("torch"))}


def test_a_run_is_resumed_with_what_is_missing_or_failed(monkeypatch, tmp_path):
    rows = [
        {"name": "torch/nn.TransformerDecoder", "class": "D", "status": "fused", "reason": "kept"},
        {"name": "torch/nn.Transformer", "class": "T", "status": "failed", "reason": "tried again"},
    ]
    (tmp_path / "out.json").write_text(json.dumps({"rows": rows}))
    _, result = run(monkeypatch, tmp_path, "--resume")
    found = {row["name"]: row for row in result["rows"]}
    assert list(found) == [row.name for row in models.classes("torch")]
    assert found["torch/nn.TransformerDecoder"] == rows[0]
    assert found["torch/nn.Transformer"]["status"] == "no attention"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--library", "keras"], "--library: invalid choice: 'keras'"),
        (["--library", "torch", "--only", "nope"], "--only: no row of torch has 'nope' in its name"),
        (["--jobs", "0"], "--jobs: expected a positive number, got 0"),
        (["--timeout", "-1"], "--timeout: expected a positive number, got -1"),
        (["--csv", "/no/such/folder/a.csv"], "--csv: there is no folder /no/such/folder"),
    ],
)
def test_error_messages_name_the_argument_the_value_and_what_is_accepted(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_counts_by_library():
    counts = {"attention": 3, "fused": 2, "by_torch": 0, "plain": 1, "mlps": 4, "mlps_fused": 3}
    counts |= {"depthwise": 1, "depthwise_fused": 0}
    rows = [
        {"name": "timm/a", "status": "partly", **counts},
        {"name": "timm/b", "status": "wrong", **counts},
        {"name": "torch/c", "status": "not run"},
    ]
    machine = {"versions": {}, "model_name": "A CPU", "devices": [{"threads": 2}]}
    text = report.coverage_block({"rows": rows, "machine": machine, "command": "command", "date": "2026-01-02"})
    timm, torchs = text.splitlines()[2:4]
    assert timm == "| timm | 2 | 2 | 0 | 0 | 1 | 0 | 1 | 0 | 0 | 0 | 4, 0, 2 | 6 of 8 | 0 of 2 |"
    assert torchs == "| torch | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 0, 0, 0 | 0 of 0 | 0 of 0 |"
