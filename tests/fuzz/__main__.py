"""python -m tests.fuzz: random calls of every public operator, held to the plain form in float64.

python -m tests.fuzz --seeds 0:10000 --isa avx2 --jobs 2
python -m tests.fuzz --op leff --isa avx2 --replay 123
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

os.environ.setdefault("FASTVIT_AUTOTUNE", "0")  # a case is the same one when it is replayed

from tests.fuzz.cases import OPERATORS, draw
from tests.fuzz.judge import Finding
from tests.fuzz.workers import hunt, supported_isas
from tests.standalone.program import TARGETS

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last)) if last else range(int(first))


def _summary(findings: list[Finding], cases: int) -> Table:
    """By operator and kind of failure, with the smallest case of each."""
    table = Table(
        "operator",
        "kind",
        "findings",
        Column("smallest case", no_wrap=True),
        title=f"{len(findings)} findings in {cases} cases",
    )
    groups = defaultdict(list)
    for finding in findings:
        groups[finding.op, finding.kind].append(finding)
    for (op, kind), group in sorted(groups.items()):
        table.add_row(
            op,
            kind,
            str(len(group)),
            min(group, key=lambda finding: finding.size).replay.removeprefix("python -m tests.fuzz "),
        )
    return table


def _tell(finding: Finding) -> None:
    console.print(
        f"\n{finding.op} {finding.kind}: {finding.detail}\n  {finding.case}\n  {finding.replay}", markup=False
    )


def main() -> int:
    isas = supported_isas()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", type=_seeds, default=range(2000), help="FIRST:LAST, or how many (2000)")
    parser.add_argument("--op", choices=OPERATORS, action="append", help="these operators only, each with every seed")
    choices = [*isas, *(name for name in TARGETS if name not in isas)]
    parser.add_argument("--isa", choices=choices, action="append", help="instruction sets (all that this CPU has)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--replay", type=int, metavar="SEED", help="one case of --op, spelled out")
    parser.add_argument("--json", type=Path, help="append each finding to this file as a line")
    options = parser.parse_args()
    if options.replay is not None:
        if len(options.op or ()) != 1:
            parser.error("--replay: needs one --op")
        console.print(str(draw(options.op[0], options.replay)), markup=False)
        tasks = [(options.op[0], options.replay)]
    elif options.op:
        tasks = [(op, seed) for seed in options.seeds for op in options.op]
    else:
        tasks = [(random.Random(seed).choice(list(OPERATORS)), seed) for seed in options.seeds]
    findings: list[Finding] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        for isa in options.isa or isas:
            for finding in progress.track(hunt(tasks, isa, options.jobs), len(tasks), description=isa):
                if finding is not None:
                    findings.append(finding)
                    _tell(finding)
                    if options.json:
                        with options.json.open("a") as file:
                            file.write(json.dumps(finding._asdict()) + "\n")
    console.print(_summary(findings, len(tasks) * len(options.isa or isas)))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
