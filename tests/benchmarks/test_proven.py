"""The table of proven kernels: what a run must have shown, and that the package has what the results say."""

from __future__ import annotations

import pytest

from benchmarks import proven
from benchmarks.first_contact.summary import read
from benchmarks.jobs import JOBS
from fastvit.proven import PROVEN

PAIRS = [(job.name, "triton") for job in JOBS if job.op == "masked_attention"]


def run() -> list[dict]:
    """The rows of a run in which masked attention in Triton, and nothing else, passed all that was planned."""
    sources = {backend: proven.digest(backend) for backend in proven.SOURCES}
    rows = [{"step": "device", "chip": "sm_90", "sources": sources}]
    rows.append(
        {"step": "parity", "counts": {f"{job} {backend}": 2 for job, backend in PAIRS} | {"cait_s24 triton": 1}}
    )
    for job, backend in PAIRS:
        outcomes = ("passed", "skipped") if job == "vit_s" else ("passed", "passed")
        rows += [
            {"step": "parity", "test": f"test_{place}[float16-{job}-{backend}]", "outcome": outcome}
            for place, outcome in enumerate(outcomes)
        ]
    return rows


def test_an_operator_whose_tests_all_passed_is_proven_on_that_chip():
    assert proven.table([run()]) == {"masked_attention triton": ("sm_90",)}
    other = run()
    other[0] = {**other[0], "chip": "sm_80"}
    assert proven.table([run(), other, []]) == {"masked_attention triton": ("sm_80", "sm_90")}


def failed(rows):
    rows[-1]["outcome"] = "failed"


def cut_off(rows):
    rows.pop()


def another_job_was_not_planned(rows):
    del rows[1]["counts"]["vit_s triton"]


def all_skipped(rows):
    for row in rows[2:]:
        row["outcome"] = "skipped"


def made_with_other_kernels(rows):
    rows[0]["sources"]["triton"] = "another"


def no_device_told(rows):
    del rows[0]


@pytest.mark.parametrize(
    "spoil",
    [failed, cut_off, another_job_was_not_planned, all_skipped, made_with_other_kernels, no_device_told],
    ids=lambda spoil: spoil.__name__,
)
def test_anything_less_proves_nothing(spoil):
    rows = run()
    spoil(rows)
    assert proven.table([rows]) == {}


def test_the_package_has_the_table_of_the_results():
    found = proven.table(read(path) for path in sorted(proven.RESULTS.glob("*-first-contact-*.jsonl")))
    assert found == PROVEN, "run python -m benchmarks.proven"
    assert proven.text(found) == proven.TABLE.read_text(encoding="utf-8")


def test_the_table_is_a_module_again():
    found = {"leff cuda": ("sm_80", "sm_90"), "leff triton": ("sm_90",)}
    names: dict = {}
    exec(proven.text(found), names)
    assert names["PROVEN"] == found
