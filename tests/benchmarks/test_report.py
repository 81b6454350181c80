"""Tables of results: the pages are what the report would write, losses are in, and nothing wrong has a speed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console

from benchmarks import report


def made_up(provider: str, ms: float | None, *, name: str = "m", status: str = "measured", **others) -> dict:
    """A row; eager, the baseline, takes 10 ms."""
    case = {"name": name, "mode": "fwd", "dtype": "float32", "batch": 8, "image_size": None, "allocator": "default"}
    row = {**case, "provider": provider, "baseline": "eager", "status": status, "reason": "", "disturbed": 0.0}
    if ms is not None:
        ratio = {"median": 10.0 / ms, "low": 9.0 / ms, "high": 11.0 / ms}
        row |= {"ms": {"median": ms, "low": ms, "high": ms}, "ratio": ratio, "share": 0.5, "prepare_s": 1.0}
        row["slots"] = [[number, ms, 0.0] for number in range(5)]
    return row | others


def result(suite: str, rows: list[dict], complete: bool = True) -> dict:
    machine = {
        "versions": {"torch": "2.13.0", "openvino": None},
        "model_name": "A CPU",
        "devices": [{"name": "A CPU", "threads": 2}],
    }
    command = f"python -m benchmarks.{suite}"
    head = {"suite": suite, "command": command, "date": "2026-01-02", "machine": machine, "complete": complete}
    return {**head, "rows": rows}


def test_the_pages_are_what_the_report_would_write():
    texts = [page.read_text(encoding="utf-8") for page in report.PAGES]
    assert [report.render(text) for text in texts] == texts
    assert [match[1] for match in report.BLOCK.findall("".join(texts))] == [
        *list(report.BLOCKS)[:-1],
        "classes",
        "left",
    ]


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_result_of_the_suite_has_its_plot(path: Path):
    found = json.loads(path.read_text(encoding="utf-8"))
    if not report.has_plot(found):
        pytest.skip("without a plot")
    assert (report.PICTURES / f"{path.stem}.svg").exists()


def test_a_models_line_has_the_baseline_the_fastest_other_and_the_share_of_the_limit():
    slots = [[0, 3.5, 0.0], [1, 4.0, 0.0], [2, 4.5, 0.0], [3, 0.1, 0.9]]  # the last was disturbed
    rows = [made_up("eager", 10.0), made_up("openvino", 4.0, slots=slots), made_up("fastvit", 5.0)]
    rows.append(made_up("fastvit-inductor", 1.0))
    line = report.models_block(result("models", rows)).splitlines()[2]
    cells = (
        "| m | fwd | float32 | 8 | default | 10 | 5 | 2.00x (1.80 to 2.20) | openvino | 0.80x (0.70 to 0.90) | 50% |"
    )
    assert line == cells


def test_a_wrong_result_has_no_speed():
    rows = [made_up("eager", 10.0), made_up("fastvit", None, status="inaccurate", error=1.0, plain_error=0.1)]
    line = report.models_block(result("models", rows)).splitlines()[2]
    assert "inaccurate" in line
    assert "x" not in line.replace("inaccurate", "")
    text = io.StringIO()
    Console(file=text, width=150).print(report.console_table(rows, "title"))
    assert "inaccurate" in text.getvalue()
    assert "1.0e+00 (1.0e-01)" in text.getvalue()


def test_losses_are_named_with_who_won():
    rows = [
        row
        for name, ours in (("leff: small", 20.0), ("leff: large", 5.0))
        for row in (made_up("eager", 10.0, name=name), made_up("fastvit", ours, name=name))
    ]
    line = report.ops_block(result("ops", rows)).splitlines()[2]
    assert line == "| leff | fwd | float32 | 8 | 0.50x to 2.00x | 0.50x to 2.00x | small 0.50 (eager) |"


def test_a_floor_is_no_rival():
    rows = [made_up("eager", 10.0), made_up("copy", 1.0, floor=True), made_up("fastvit", 5.0)]
    assert report.fastest_other(rows)["provider"] == "eager"


def test_disturbed_rows_are_marked_and_counted():
    rows = [made_up("eager", 10.0, disturbed=0.2), made_up("fastvit", 5.0)]
    assert report.models_block(result("models", rows)).endswith("Other processes disturbed 1 rows.")
    text = io.StringIO()
    Console(file=text, width=150).print(report.console_table(rows, "title"))
    assert "10 (10 to 10) ~" in text.getvalue()


def test_who_was_absent_is_listed_once_for_each_reason():
    rows = [made_up("zentorch", None, status="absent", name=name) | {"reason": "gone"} for name in "ab"]
    text = io.StringIO()
    Console(file=text, width=150).print(report.console_absent(rows))
    assert text.getvalue().count("zentorch") == 1


def test_every_result_of_models_is_shown_and_readme_shows_the_newest_of_inference(tmp_path):
    for name, mode, ms in (("01-zen", "fwd", 5.0), ("02-ice", "fwd", 2.0), ("03-training", "fwd_bwd", 4.0)):
        rows = [made_up("eager", 10.0, mode=mode), made_up("fastvit", ms, mode=mode), made_up("ort", 1.0, mode=mode)]
        (tmp_path / f"2026-01-{name}.json").write_text(json.dumps(result("models", rows)))
    models, speed, training = (report.block(name, tmp_path) for name in ("models", "speed", "training"))
    shown = [models.index(f"![models](pictures/2026-01-{name}.svg)") for name in ("02-ice", "01-zen")]
    assert shown == sorted(shown) and models.count("| model |") == 2
    assert "(0.50 of ort's speed)" in speed
    assert training.count("| model |") == 1 and "![training](pictures/2026-01-03-training.svg)" in training


def test_beside_eager_all_results_of_a_cpu_are_a_line_for_each_dtype_and_batch(tmp_path):
    """With the model whose interval reaches lowest; of those without a peer there is no table and no plot."""
    first = [made_up(provider, ms, name="a") for provider, ms in (("eager", 10.0), ("ort", 1.0), ("fastvit", 5.0))]
    second = [
        made_up(provider, ms, name=name, dtype=dtype)
        for name, dtype, ours in (("timm/b", first[0]["dtype"], 8.0), ("timm/c", "float16", 4.0))
        for provider, ms in (("eager", 10.0), ("fastvit", ours))
    ]
    for number, rows in enumerate((first, second)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result("models", rows)))
    lines = report.block("eager", tmp_path).splitlines()
    assert lines[2:4] == [
        "| A CPU, 2 threads | float32 | 8 | 2 | 1.25x to 2.00x | 1.12x (timm/b) |",
        "| A CPU, 2 threads | float16 | 8 | 1 | 2.50x to 2.50x | 2.25x (timm/c) |",
    ]
    assert report.block("models", tmp_path).count("| model |") == 1
    assert report.has_plot(result("models", first)) and not report.has_plot(result("models", second))


def test_training_is_plain_beside_patched_and_a_sentence_of_readme(tmp_path):
    modes = {"mode": "fwd_bwd", "dtype": "float32", "batch": 1}
    rows = [
        made_up(provider, ms, name=name, **modes)
        for name, ours in (("a", 5.0), ("b", 4.0))
        for provider, ms in (("eager", 10.0), ("inductor", 1.0), ("fastvit", ours))
    ]
    rows += [made_up("eager", 10.0, name="c", **modes), made_up("fastvit", None, name="c", status="failed", **modes)]
    newest, older, elsewhere = (result("models", each) for each in (rows, [], []))
    older["rows"] = [{**row, "dtype": "bfloat16", "batch": 8} for row in rows[:3]]
    elsewhere["rows"] = [{**row, "batch": 64} for row in rows]
    elsewhere["machine"] = {**elsewhere["machine"], "model_name": "Another", "devices": [{"name": "B", "threads": 9}]}
    assert report.training_block(newest).splitlines()[2:5] == [
        "| a | fwd_bwd | float32 | 1 | 10 | 5 | 2.00x (1.80 to 2.20) | 50% |",
        "| b | fwd_bwd | float32 | 1 | 10 | 4 | 2.50x (2.25 to 2.75) | 50% |",
        "| c | fwd_bwd | float32 | 1 | 10 |  | failed |  |",
    ]
    for number, each in enumerate((elsewhere, older, newest)):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    told = report.block("steps", tmp_path)
    assert "is 2.00x to 2.50x in float32 at batch 1, 2.00x to 2.00x in bfloat16 at batch 8 as fast as eager" in told
    assert "A CPU, 2 threads, 2026-01-02, torch 2.13.0" in told


def test_what_aotinductor_makes_of_plain_and_patched_stands_side_by_side():
    pairs = (("eager", 10.0), ("aotinductor", 8.0), ("fastvit-aotinductor", 4.0), ("fastvit", 5.0))
    rows = [made_up(provider, ms) for provider, ms in pairs] + [made_up("aotinductor", 8.0, name="alone")]
    lines = report.deployment_block(result("models", rows)).splitlines()
    assert lines[2:4] == ["| m | float32 | 8 | 8 | 4 | 2.00x (2.00 to 2.00) | 5 |", ""]


def test_complete_results_fill_a_block(tmp_path):
    for date, complete, ms in (("01", True, 5.0), ("02", True, 2.0), ("03", False, 1.0)):
        rows = [made_up("eager", 10.0, name="leff: a"), made_up("fastvit", ms, name="leff: a")]
        (tmp_path / f"2026-01-{date}-ops.json").write_text(json.dumps(result("ops", rows, complete)))
    text = "before\n<!-- report: ops -->\nold\n<!-- end of report -->\nafter\n"
    rendered = report.render(text, tmp_path)
    assert rendered.startswith("before\n<!-- report: ops -->\n| operator |")
    assert rendered.endswith("<!-- end of report -->\nafter\n")
    assert rendered.index("5.00x to 5.00x") < rendered.index("2.00x to 2.00x") and "10.00x" not in rendered
    assert "old" not in rendered
    assert rendered.index("(pictures/2026-01-02-ops.svg)") < rendered.index("(pictures/2026-01-01-ops.svg)")
    assert report.render(rendered, tmp_path) == rendered


def test_a_plot_is_the_same_each_time(tmp_path):
    rows = [made_up("eager", 10.0), made_up("fastvit", 5.0), made_up("gone", None, status="absent")]
    first, second = (report.plot(rows, tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second


def test_what_is_left_plain_has_its_reason():
    counts = {"fused": 2, "by_torch": 0, "plain": 1}
    rows = [
        {"name": "timm/a", "status": "fused", **counts, "reason": ""},
        {"name": "timm/b", "status": "partly", **counts, "reason": "mlp: {} | max is (b.py:3) | max is (b.py:7)"},
        {"name": "timm/c", "status": "failed", "reason": "it took long"},
    ]
    lines = report.left_block(result("coverage", rows)).splitlines()
    assert lines[2:4] == ["| `timm/b` | 2, 0, 1 | max is |", "| `timm/c` | failed | it took long |"]
    assert lines[4] == ""


def test_readme_names_the_rows_in_which_another_is_faster():
    rows = [made_up("eager", 10.0), made_up("openvino", 4.0), made_up("fastvit", 5.0)]
    rows += [{**row, "batch": 1} for row in (made_up("eager", 10.0), made_up("openvino", 5.0), made_up("fastvit", 4.0))]
    told = report.speed_block(result("models", rows))
    assert told.endswith("In 1 of 2 rows another is faster: m at batch 8 (0.80 of openvino's speed).")
    assert "A CPU, 2 threads, 2026-01-02, torch 2.13.0" in told
    assert "another" not in report.speed_block(result("models", rows[3:]))


def test_the_picture_names_every_contender_the_machine_and_the_day(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    rows = [made_up("eager", 10.0), made_up("fastvit", 5.0), made_up("openvino", 4.0), made_up("gone", None)]
    rows[-1] |= {"status": "failed"}
    others = [{**row, "batch": 1} for row in rows] + [{**row, "mode": "bwd", "name": "other"} for row in rows]
    text = report.picture(result("models", rows + others), tmp_path / "a.svg").read_text()
    for told in ("batch 1", "batch 8", "fastvit", "openvino", "times as fast as eager", "A CPU, 2 threads, 2026-01-02"):
        assert told in text
    assert "gone" not in text
    assert "other" not in text


def test_files_are_printed(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result("models", [made_up("eager", 10.0), made_up("fastvit", 5.0)])))
    assert report.main([str(path)]) == 0
    assert "2.00x" in capsys.readouterr().out
    path.write_text("[]")
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert f"FILE: {path} is no result" in capsys.readouterr().err
