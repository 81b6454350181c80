"""The commands of the suite: their options and messages, what they write, and rows that name what exists."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

import fastvit
from benchmarks import command, models, providers
from benchmarks.command import Suite
from benchmarks.ops import __main__ as ops_command
from benchmarks.ops.cases import Op, open_case, rows
from benchmarks.runner import Race
from benchmarks.worker import Absent, Case, Contender, Form, Passes
from fastvit import backends, ops
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.tiny import build, images

SUITES = {"models": models.SUITE, "ops": ops_command.SUITE}
STUB = str(Path(__file__).with_name("stub.py"))
TINY = Suite(
    name="models",
    module="tests.benchmarks.fakes",
    description="A tiny suite.",
    names=lambda: ["one", "other"],
    providers={"eager": "", "fastvit": "", "gone": ""},
    absence=lambda name, case: "it left" if name == "gone" else None,
    pythons=dict.fromkeys(("eager", "fastvit", "reference"), STUB),
)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "--only: no row has 'nope' in its name; there are "),
        (["--mode", "forward"], "--mode: invalid choice: 'forward'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--batch", "0"], "--batch: expected a positive number, got 0"),
        (["--batch", "x"], "--batch: invalid int value: 'x'"),
        (["--threads", "-1"], "--threads: expected a positive number, got -1"),
        (["--rounds", "0"], "--rounds: expected a positive number, got 0"),
        (["--providers", "eager", "tvm"], "--providers: expected some of eager, "),
        (["--baseline", "tvm"], "--baseline: expected some of eager, "),
        (["--allocator", "tcmalloc"], "--allocator: expected default, raised or the file of a library, got 'tcmalloc'"),
        (["--device", "gpu"], "--device: "),
        (["--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["--json", "/no/such/folder/a.json"], "--json: there is no folder /no/such/folder"),
        (["--plot", "chart.xyz"], "--plot: expected a name that ends in .png or .svg, got 'chart.xyz'"),
    ],
)
def test_error_messages_name_the_argument_the_value_and_what_is_accepted(suite, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(SUITES[suite], arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_image_sizes_are_for_models_and_positive(capsys):
    of_models = "--image-size: expected a positive number, got 0"
    for suite, message in ((models.SUITE, of_models), (ops_command.SUITE, "--image-size")):
        with pytest.raises(SystemExit):
            command.main(suite, ["--image-size", "0"])
        assert message in capsys.readouterr().err


def chosen(suite: Suite, *arguments: str) -> list[Case]:
    return command.cases(suite, command.parse(suite, arguments))


def test_options_are_axes_whose_product_is_measured():
    found = chosen(models.SUITE, "--only", "cvt", "--batch", "2", "1", "--dtype", "float32", "--mode", "fwd", "bwd")
    assert {case.name for case in found} == {"cvt_13"}
    assert [(case.mode, case.batch) for case in found] == [("fwd", 2), ("fwd", 1), ("bwd", 2), ("bwd", 1)]
    assert [case.image_size for case in chosen(models.SUITE, "--only", "cvt", "--image-size", "96", "64")][:2] == [
        96,
        64,
    ]


def test_models_that_are_no_row_can_be_named():
    names = ("deepvit_s", "timm/vit_small_patch16_224", "package.module:factory")
    assert {case.name for case in chosen(models.SUITE, "--only", *names)} == set(names)


def test_the_quick_sample_is_small_and_of_rows_that_exist():
    for suite in SUITES.values():
        found = chosen(suite, "--quick")
        assert 0 < len(found) <= 8
        assert {case.name for case in found} <= set(suite.names())
        assert command.parse(suite, ["--quick", "--rounds", "2"]).rounds == 2


def test_the_baseline_is_measured_whoever_was_chosen():
    options = command.parse(models.SUITE, ["--providers", "fastvit", "--baseline", "inductor"])
    assert options.providers == ["inductor", "fastvit"]


def run_tiny(monkeypatch, tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setenv("FASTVIT_STUB", str(tmp_path))
    out = tmp_path / "rows.json"
    few = ["--dtype", "float32", "--batch", "1", "--rounds", "2", "--json", str(out)]
    status = command.main(TINY, [*few, *arguments])
    return status, json.loads(out.read_text())


def test_a_run_writes_rows_in_every_form(monkeypatch, tmp_path, capsys):
    table, chart = tmp_path / "rows.csv", tmp_path / "chart.svg"
    written = ["--csv", str(table), "--plot", str(chart)]
    status, found = run_tiny(monkeypatch, tmp_path, *written, "--allocator", "default", "raised")
    assert status == 0
    assert found["complete"]
    assert found["command"].startswith("python -m benchmarks.models --dtype float32")
    assert found["machine"]["versions"]["torch"] == str(torch.__version__)
    keys = [(row["name"], row["allocator"], row["provider"]) for row in found["rows"]]
    assert keys == [
        (name, allocator, provider)
        for name in ("one", "other")
        for allocator in ("default", "raised")
        for provider in ("eager", "fastvit", "gone")
    ]
    assert {row["reason"] for row in found["rows"] if row["status"] == "absent"} == {"it left"}
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [key[2] for key in keys]
    assert float(lines[0]["ms_median"]) == found["rows"][0]["ms"]["median"]
    assert "<svg" in chart.read_text()
    printed = capsys.readouterr().out
    assert "it left" in printed
    assert "other, fwd, float32, batch 1, raised" in printed


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    ran = Race._round

    def interrupted(self, number):
        if self.case.name == "other" and number == 1:
            raise KeyboardInterrupt
        ran(self, number)

    monkeypatch.setattr(Race, "_round", interrupted)
    status, found = run_tiny(monkeypatch, tmp_path)
    assert status == 130
    assert not found["complete"]
    assert [len(row.get("slots", ())) for row in found["rows"]] == [2, 2, 0, 1, 1, 0]
    assert "interrupted: what was measured is kept" in capsys.readouterr().out


def test_a_failure_of_ours_is_an_exit_status(monkeypatch, tmp_path):
    monkeypatch.setitem(TINY.pythons, "fastvit", shutil.which("false"))
    status, found = run_tiny(monkeypatch, tmp_path)
    assert status == 1
    row = found["rows"][1]
    assert (row["status"], row["reason"]) == ("failed", "its process ended with status 1")


def test_the_bar_tells_the_time_left():
    text = io.StringIO()
    bar = command.progress_bar(Console(file=text, force_terminal=True, width=120))
    with bar:
        bar.add_task("preparing eager", total=10, completed=5)
        bar.refresh()
    assert "preparing eager" in text.getvalue()
    assert "left" in text.getvalue()


@pytest.mark.parametrize("name", sorted(providers.PROVIDERS))
def test_who_cannot_run_here_says_why(name, monkeypatch):
    provider = providers.PROVIDERS[name]
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    monkeypatch.setattr(providers, "ENVIRONMENTS", Path("/nowhere"))
    case = Case("", "", device=provider.devices[0])

    def why(**changed) -> str | None:
        return providers.absence(name, provider, dataclasses.replace(case, **changed))

    if "cpu" not in provider.devices:
        assert why(device="cpu") == "runs on cuda, this is cpu"
    if not provider.training:
        assert why(mode="fwd_bwd") == "inference only"
    if "bfloat16" not in provider.dtypes:
        assert why(dtype="bfloat16") == f"runs in {' or '.join(provider.dtypes)}, this is bfloat16"
    if provider.packages:
        assert why() == f"not installed: pip install {' '.join(provider.packages)}"
    if provider.apart:
        assert why() == f"not installed: make bench-{name}"


def forms_of(workload, *names: str) -> dict[str, Form]:
    return {name: workload.form(name, workload.inputs(0)) for name in names}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_models_of_other_libraries_get_the_same_weights(name):
    case = Case("benchmarks.models", name, batch=1, image_size=32)
    workload = models.open_case(case)
    workload.load(workload.state())
    peers = [peer for peer in ("timm", "transformers") if not providers.absence(peer, providers.PROVIDERS[peer], case)]
    if not peers:
        pytest.skip("neither timm nor transformers is installed")
    exact = Passes(workload.form("exact", ()), case, False).results([workload.inputs(0)[0].double()])[0]
    plain = Passes(workload.form("plain", ()), case, False).results(workload.inputs(0))[0]
    for peer in peers:
        (logits,) = Passes(workload.form(peer, ()), case, False).results(workload.inputs(0))[0]
        torch.testing.assert_close(logits, plain[0], rtol=1e-4, atol=1e-5)
        assert exact[0].abs().max() > 0.01


def test_a_library_without_the_model_says_so():
    if providers.absence("timm", providers.PROVIDERS["timm"], Case("", "")):
        pytest.skip("timm is not installed")
    workload = models.open_case(Case("benchmarks.models", "ceit_tiny", batch=1, image_size=32))
    with pytest.raises(Absent, match="has no model 'ceit_tiny'"):
        workload.form("timm", workload.inputs(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["aotinductor", "fastvit-aotinductor"])
def test_what_aotinductor_makes_gives_the_models_result(name):
    if name.startswith("fastvit") and backends.cpp_reasons():
        pytest.skip("; ".join(backends.cpp_reasons()))
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on PATH")
    model, x = build("vit"), images("vit")
    with torch.inference_mode():
        plain, exact = model(x), copy.deepcopy(model).double()(x.double())
        run = providers.PROVIDERS[name].build(model, (x,), Case("", ""))
        assert_as_accurate(run(x), plain, exact)
    assert fastvit.is_patched(model) is name.startswith("fastvit")


def test_a_patched_model_says_what_was_replaced():
    workload = models.open_case(Case("benchmarks.models", "vit_tiny_patch16_224", batch=1, image_size=32))
    workload.form("fastvit", workload.inputs(0))
    assert sum(count for what, count in workload.notes["replaced"].items() if what.startswith("masked_attention")) == 12


def test_inputs_change_from_call_to_call_and_are_the_same_in_every_process():
    case = Case("benchmarks.models", "vit_tiny_patch16_224", batch=2, image_size=32)
    first, second = models.open_case(case), models.open_case(case)
    assert torch.equal(first.inputs(3)[0], second.inputs(3)[0])
    assert not torch.equal(first.inputs(3)[0], first.inputs(4)[0])
    row = Case("benchmarks.ops.cases", "leff: ceit tiny 192", batch=2)
    one, two = open_case(row), open_case(row)
    assert torch.equal(one.inputs(3)[0], two.inputs(3)[0])
    assert all(map(torch.equal, one.state().values(), two.state().values()))


def test_every_operator_has_rows():
    with_rows = {row.op for row in rows().values()}
    composed = {"depthwise_separable_conv", "re_attention", "talking_heads_attention"}  # parts or names of others
    assert with_rows | composed >= set(ops.OPERATORS)
    assert with_rows <= set(dir(ops))


def elements(row: Op) -> int:
    return sum(each.numel() for each in row.inputs(1, torch.float32))


OPERATORS = list(dict.fromkeys(row.op for row in rows().values()))
SMALLEST = {op: min((row for row in rows().values() if row.op == op), key=elements) for op in OPERATORS}


@pytest.mark.parametrize("op", SMALLEST)
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_all_forms_of_an_operators_row_compute_the_same(op, mode):
    row = SMALLEST[op]
    case = Case("benchmarks.ops.cases", row.name, mode, batch=2)
    workload = open_case(case)
    names = [name for name in row.peers if not (case.training and name in row.prepared)]
    found = forms_of(workload, "plain", "exact", "eager", "fastvit", *names)
    seeds = itertools.count()

    def check() -> None:
        inputs = workload.inputs(next(seeds))
        results = {
            name: [*out, *gradients]
            for name, form in found.items()
            for out, gradients in [
                Passes(form, case, True).results([each.double() for each in inputs] if name == "exact" else inputs)
            ]
        }
        assert len(results["plain"]) > (2 if case.training else 0)
        for place, each in enumerate(zip(results["fastvit"], results["plain"], results["exact"], strict=True)):
            assert_as_accurate(*each, name=str(place))
        for name in names:
            if not found[name].floor:
                for got, expected in zip(results[name], results["plain"], strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    on_pooled_draws(check)
    if case.training:
        for name in set(row.peers) & set(row.prepared):
            assert ops_command.absence(name, case)
            with pytest.raises(Absent):
                workload.form(name, workload.inputs(0))


@pytest.mark.parametrize("name", rows())
def test_every_row_can_be_made(name):
    row = rows()[name]
    tensors = [leaf for leaf in pytree.tree_leaves(row.arguments(1)) if isinstance(leaf, torch.Tensor)]
    assert all(tensor.dtype in (torch.float32, torch.bool) for tensor in tensors)
    assert all(each.dtype == torch.bfloat16 for each in row.inputs(1, torch.bfloat16))
    assert set(row.peers) <= set(ops_command.PROVIDERS)
    assert set(row.floors) <= set(row.peers)


def test_the_models_of_the_suite_exist():
    assert set(models.MODELS) <= set(fastvit.list_models())


@pytest.mark.parametrize("name", models.FOREIGN)
def test_the_models_of_other_libraries_exist(name):
    pytest.importorskip(name.partition("/")[0])
    assert models.Whole(Case("benchmarks.models", name)).foreign


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_the_right_results_of_a_model_can_be_made(name, mode, tmp_path):
    """CaiT hands parameters from module to module, which torch's own counter of FLOPs does not take at inference."""
    case = Case("benchmarks.models", name, mode, image_size=32)
    answer = Contender().do_reference(dataclasses.asdict(case), str(tmp_path / "reference.pt"))
    assert answer["flops"] > 0 and answer["bytes"] > 0
    kept = torch.load(tmp_path / "reference.pt", weights_only=True)
    assert kept["state"].keys() == fastvit.create_model(name).state_dict().keys()
