"""One model, plain and patched: what each computes, and whether the results agree. Runs in a process of its own.

python -m benchmarks.coverage.judging      # reads a name a line, writes a row of JSON for each
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastvit
from benchmarks.coverage import models
from benchmarks.coverage.counting import Counting
from fastvit.accuracy import NONE, Deviation, deviation
from fastvit.patching import verification
from fastvit.patching.copies import float64_copy
from fastvit.patching.deferral import has_fused_class
from fastvit.patching.plan import survey
from fastvit.patching.verification import as_call

DRAWS = 4
"""So many inputs are judged as one batch where the rule breaks on the first: a plain error may be small by luck."""
JITTER = 2.0**-6
SELECTS = 1e-2
"""A larger error of the plain model, relative, is none of rounding: it took another top-k than in float64."""
SEED = 0


def row_of(row: models.Class) -> dict[str, Any]:
    """What became of a class: its status, and for a model that ran, the counts and errors."""
    found: dict[str, Any] = {"name": row.name, "class": row.cls}
    reason = ""
    for attempt in row.attempts():
        torch.manual_seed(SEED)
        try:
            model, example = attempt()
            plain, before = _counted(model, example)
            if not _floating(plain):
                raise ValueError("it returns no floating-point tensor")
        except models.TooLarge as error:
            reason = str(error)
            break
        except Exception as error:  # somebody's model
            reason = reason or f"{type(error).__name__}: {error}".partition("\n")[0][:160]
            continue
        try:
            exact = float64_copy(model)
            _run(exact, _doubled(example))
        except Exception as error:
            reason = reason or f"in float64: {type(error).__name__}: {error}".partition("\n")[0][:160]
            continue
        try:
            return {**found, **_judged(model, exact, example, before)}
        except Exception as error:
            return {**found, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
    return {**found, "status": "not run", "reason": reason}


def _judged(model: nn.Module, exact: nn.Module, example: Any, before: Counter[str]) -> dict[str, Any]:
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastvit.patch(model, example=example)
    _run(model, example)
    _, after = _counted(model, example)
    found = NONE
    for draw in range(DRAWS):
        example = pytree.tree_map_only(Tensor, _jittered, example) if draw else example
        found = found.pooled(_deviation(_run(model, example), _run(plain, example), _run(exact, _doubled(example))))
        if found.is_accurate:
            break
    right, judged_by = found.is_accurate, ""
    if not right and found.plain > SELECTS:
        right, judged_by = _modules_are_accurate(model, example), "module by module: it selects by what it computed"
    attention, mlps, depthwise = sum(before[kind] for kind in ("torch", "plain")), before["mlp"], before["depthwise"]
    ours, by_torch = min(after["fastvit"], attention), after["torch"]
    left = max(0, attention - ours - by_torch)
    return {
        "status": _status(attention, ours, left) if right else "wrong",
        "attention": attention,
        "fused": ours,
        "by_torch": attention - ours - left,
        "plain": left,
        "mlps": mlps,
        "mlps_fused": max(0, mlps - after["mlp"]),
        "depthwise": depthwise,
        "depthwise_fused": max(0, depthwise - after["depthwise"]),
        "error": found.fused,
        "error_of_plain": found.plain,
        "reason": _why(model, example) if left or not right else judged_by,
    }


def _modules_are_accurate(model: nn.Module, example: Any) -> bool:
    """Whether each fused module keeps the rule on what it gets in the plain model."""
    findings = [finding for finding in survey(model) if has_fused_class(finding.module)]
    errors = verification.measure(model, example, findings, "auto")
    return all(error.within_budget for name, error in errors.items() if name is not verification.END_TO_END)


def _status(attention: int, ours: int, left: int) -> str:
    if not attention:
        return "no attention"
    if left:
        return "partly" if left < attention else "not"
    return "fused" if ours == attention else "with torch"


def _why(model: nn.Module, example: Any) -> str:
    """The chains of operations that broke off and the operators that ran their plain form, each once."""
    found = fastvit.explain(model, example)
    told = [f"{each.chain}; {each.reason} ({Path(each.line).name})" for each in found.chains if each.op is None]
    told += [f"{each.op}: {each.turned_down}" for each in found.rows if each.backend == "reference"]
    return " | ".join(dict.fromkeys(told))[:600]


def _counted(model: nn.Module, example: Any) -> tuple[Any, Counter[str]]:
    with Counting() as counting:
        out = _run(model, example)
    return out, counting.found


def _run(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_call(example)
    torch.manual_seed(SEED)
    with torch.no_grad():
        return model(*args, **kwargs)


def _jittered(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1.0 + JITTER * torch.randn_like(tensor))


def _doubled(example: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, example
    )


def _floating(output: Any) -> list[Tensor]:
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _deviation(fused: Any, plain: Any, exact: Any) -> Deviation:
    """The worst of all floating-point outputs."""
    outputs = [_floating(each) for each in (fused, plain, exact)]
    if len({tuple(tensor.shape for tensor in output) for output in outputs}) != 1:
        return NONE._replace(fused=float("inf"), excess=float("inf"))
    every = [deviation(*tensors) for tensors in zip(*outputs, strict=True)]
    wrong = [each for each in every if not each.is_accurate]
    return max(wrong or every, key=lambda each: each.excess - 2.0 * each.plain_error, default=NONE)


def main() -> None:
    """Serve until standard input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    known = {row.name: row for row in models.classes(sys.argv[1])}
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(row_of(known[line.strip()])), file=out, flush=True)


if __name__ == "__main__":
    main()
