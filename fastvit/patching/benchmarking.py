"""Is a fused block faster here? Each is timed both ways on the input it gets, and left plain where it loses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastvit.patching.copies import plain_copy
from fastvit.patching.fusion import Fused, give, plain_class
from fastvit.patching.plan import SKIPPED, Finding, apply, device_of, parts_needed, without_empty_blocks
from fastvit.patching.timing import Times, interleaved, readable
from fastvit.patching.verification import END_TO_END, as_call, undisturbed, watching


def choose(
    model: nn.Module, example: Any, findings: Sequence[Finding], backend: str
) -> tuple[list[Finding], dict[str | None, Times]]:
    """Time each finding with a fused class, and the whole model, plain and with what won.

    A copy that shares its tensors is run in its place, in eval mode without gradients; a module that runs several times
    in one forward is timed on its first input. Blocks inside a block are decided before it, and are in both its runs
    what they will be; one that needs a part which lost is not timed, and left alone.

    Returns:
        The findings, those that lost turned into skipped ones with the times as their reason; and the times by module
        name, of the whole model under ``END_TO_END``.
    """
    args, kwargs = as_call(example)
    times: dict[str | None, Times] = {}
    twin = plain_copy(model)
    found = [finding._replace(module=twin.get_submodule(finding.name)) for finding in findings]
    with undisturbed(twin):
        hooks = {finding.module: _timing(finding, backend, times) for finding in found if finding.fused is not None}
        with watching(hooks):
            twin(*args, **kwargs)
        chosen = without_empty_blocks(_decided(finding, times) for finding in found)
        times[END_TO_END] = _compared(functools.partial(twin, *args, **kwargs), twin, chosen, backend)
    return [each._replace(module=of.module) for each, of in zip(chosen, findings, strict=True)], times


def _timing(finding: Finding, backend: str, times: dict[str | None, Times]) -> Callable[..., None]:
    """A forward hook, the module's first, that times the plain and the fused class on the input and lets one stay."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if finding.name in times or not all(isinstance(part, Fused) for _, part in parts_needed(finding)):
            return

        def run() -> Any:
            return module.forward(*args, **kwargs)  # its hooks cost the same either way

        times[finding.name] = _compared(run, module, [finding], backend)
        if not times[finding.name].loses:
            apply([finding], backend)

    return hook


def _compared(run: Callable[[], Any], model: nn.Module, findings: Sequence[Finding], backend: str) -> Times:
    """The times of ``run`` with the findings fused and plain; they are left plain."""
    fused = [finding for finding in findings if finding.fused is not None]

    def prepare(candidate: int) -> None:
        if candidate == 0:
            apply(fused, backend)
        else:
            _undo(fused)

    try:
        return Times.of(*interleaved([run, run], device_of(model), prepare=prepare))
    finally:
        _undo(fused)


def _undo(findings: Sequence[Finding]) -> None:
    for finding in findings:
        give(finding.module, plain_class(finding.module))


def _decided(finding: Finding, times: dict[str | None, Times]) -> Finding:
    """The finding, or one that leaves its module alone because it lost."""
    measured = times.get(finding.name)
    if finding.fused is None or measured is None or not measured.loses:
        return finding
    reason = f"slower here ({readable(measured.fused)} against {readable(measured.plain)}), so left alone"
    return finding._replace(status=SKIPPED, fused=None, reasons=(reason,), wanted=True)
