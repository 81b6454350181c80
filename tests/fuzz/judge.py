"""Runs one case, and says what is wrong with the result."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.fuzz.cases import Case, Foreign, draw
from tests.fuzz.memory import Spec, leaves, mapped
from tests.helpers import poisoned_empty

EXPECTED_ERRORS = (ValueError, TypeError, RuntimeError)
DRAWS = 8
"""How many draws of a case's values a result is judged by that is too far off at the first."""


class Finding(NamedTuple):
    """Something wrong. ``kind``: one word."""

    op: str
    seed: int
    isa: str
    kind: str
    detail: str
    case: str
    size: int

    @property
    def replay(self) -> str:
        return f"python -m tests.fuzz --op {self.op} --isa {self.isa} --replay {self.seed}"


class WrongError(Exception):
    """Ends a case with a finding of this kind."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Memory:
    """The tensors of a call in guarded memory, and what must not change of them."""

    def __init__(self, case: Case, redraw: int = 0) -> None:
        self._held: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def place(path: str, leaf: Any) -> Any:
            if isinstance(leaf, Foreign):
                return _foreign(leaf.spec.storage_and_tensor()[1], leaf.kind)
            if not isinstance(leaf, Spec):
                return leaf
            storage, tensor = leaf.storage_and_tensor(redraw)
            self._held[path] = storage, storage.clone(), tensor
            return tensor.requires_grad_() if case.mode == "backward" and path in case.trained else tensor

        self.arguments = mapped(case.arguments, place)

    def check(self, unmoved: Sequence[str] = ()) -> None:
        """Only running statistics may have changed, and nothing between their elements; those ``unmoved`` neither."""
        for path, (storage, before, tensor) in self._held.items():
            if ".running" in path and path not in unmoved:
                before.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
            if not torch.equal(_bits(storage), _bits(before)):
                raise WrongError("modified", f"{path} was written to")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _foreign(tensor: Tensor, kind: str) -> Any:
    if kind in ("numpy", "list"):
        array = tensor.float().numpy()
        return array if kind == "numpy" else array.tolist()
    if kind == "str":
        return "tensor"
    return tensor.to("meta") if kind == "meta" else tensor.nan_to_num(0, 0, 0).to(getattr(torch, kind))


Results = dict[str, Tensor]


def _execute(function: Callable[..., Any], case: Case, arguments: dict[str, Any], upstream: Callable[..., Tensor]) -> Results:
    """The outputs, the gradients of what is trained and the running statistics, by name."""
    context = {"inference": torch.inference_mode, "no grad": torch.no_grad}.get(case.mode, torch.enable_grad)
    with context():
        outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    leaf = {path: tensor for path, tensor in leaves(arguments, Tensor) if tensor.requires_grad}
    if leaf and case.mode == "backward":
        if case.upstream == "sum":
            gradients = torch.autograd.grad([o.sum() for o in outputs], list(leaf.values()), allow_unused=True)
        else:
            wanted = [upstream(i, output) for i, output in enumerate(outputs)]
            gradients = torch.autograd.grad(outputs, list(leaf.values()), wanted, allow_unused=True)
        for (path, tensor), gradient in zip(leaf.items(), gradients, strict=True):
            results[f"gradient of {path}"] = torch.zeros_like(tensor) if gradient is None else gradient
    moved = {path: tensor.clone() for path, tensor in leaves(arguments, Tensor) if ".running" in path}
    return results | moved


class Plain:
    """The plain form of a case's values, contiguous and in memory of its own."""

    def __init__(self, case: Case, arguments: dict[str, Any], redraw: int = 0) -> None:
        self.case, self.redraw = case, redraw
        self.arguments = {name: value for name, value in arguments.items() if name != "backend"}
        self.first = next(tensor for _, tensor in leaves(arguments, Tensor)).dtype

    def __call__(self, dtype: torch.dtype, threads: int = 1) -> Results:
        def copied(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            of_norm = "norm." in path and dtype != torch.float64  # torch's norms take parameters in float32, too
            kind = leaf.dtype if leaf.dtype == torch.bool or of_norm else dtype
            copy = leaf.detach().to(kind, copy=True).contiguous()
            return copy.requires_grad_(leaf.requires_grad)

        def upstream(index: int, output: Tensor) -> Tensor:
            spec = self.case.gradient(index, output.shape, self.first)
            return spec.storage_and_tensor(self.redraw)[1].to(output.dtype).contiguous()

        torch.set_num_threads(threads)
        function = getattr(functional, self.case.op)
        return _execute(function, self.case, mapped(self.arguments, copied), upstream)


def _run_fused(case: Case, memory: Memory, redraw: int) -> Results:
    def upstream(index: int, output: Tensor) -> Tensor:
        return case.gradient(index, output.shape, output.dtype).storage_and_tensor(redraw)[1]

    torch.set_num_threads(case.threads)
    with poisoned_empty():
        return _execute(getattr(ops, case.op), case, memory.arguments, upstream)


# --- What a result has to be ----------------------------------------------------------------------------------------


class Error(NamedTuple):
    """How far off a result is, and how far it may be: err(plain), and a few ulp beside twice that."""

    of_fused: Tensor
    of_plain: Tensor
    rounding: Tensor

    @property
    def excess(self) -> float:
        """Above 1: too far off."""
        return float((self.of_fused / (2 * self.of_plain + self.rounding)).max())


def measure(name: str, fused: Tensor, plain: list[Tensor], exact: Tensor) -> Error | None:
    """The error of every element; WrongError where NaN and infinities are not where the plain form puts them."""
    if fused.shape != exact.shape or fused.dtype != plain[0].dtype:
        expected = f"{tuple(exact.shape)} {plain[0].dtype}"
        raise WrongError("shape", f"{name}: got {tuple(fused.shape)} {fused.dtype}, expected {expected}")
    if fused.numel() == 0:
        return None
    got, *same = (t.double() for t in (fused, *plain))
    lowered = exact.to(fused.dtype).double()
    # Sums of huge numbers overflow in one order and not in another: any of the plain form's is right.
    alike = torch.zeros(got.shape, dtype=torch.bool)
    for candidate in (*same, lowered):
        alike |= (got == candidate) | (got.isnan() & candidate.isnan()) | (got.isfinite() & candidate.isfinite())
    if not alike.all():
        at = tuple(int(i) for i in (~alike).nonzero()[0])
        values = f"fused {got[at]:g}, plain {same[0][at]:g}, exact {exact[at]:g}"
        raise WrongError("special", f"{name}: {int((~alike).sum())} of {got.numel()} elements, at {at} {values}")
    limits = torch.finfo(fused.dtype)
    finite = got.isfinite() & lowered.isfinite()
    zero = torch.zeros(())
    size = torch.where(finite, exact, zero).abs()
    ulps = 16 if fused.dtype == torch.float64 else 4  # in float64 the oracle errs as much as what it judges
    scale = size.clamp_min(size.square().mean().sqrt().nan_to_num(0.0, 0.0, 0.0))
    rounding = ulps * limits.eps * (scale + limits.tiny)
    error = torch.where(finite, got - exact, zero).abs()
    worst = torch.zeros((), dtype=torch.float64)
    for candidate in same:
        worst = torch.maximum(worst, torch.where(finite & candidate.isfinite(), candidate - exact, zero).abs().max())
    return Error(error, worst, rounding)


def _errors(case: Case, redraw: int, threads: Sequence[int]) -> dict[str, Error]:
    """Of every result, for one draw of the values; the plain form's is the worst over these numbers of threads."""
    memory = Memory(case, redraw)
    plain = Plain(case, memory.arguments, redraw)
    try:
        exact, same = plain(torch.float64), [plain(plain.first, count) for count in threads]
    except EXPECTED_ERRORS as error:
        exact, same, refusal = {}, [], error
    try:
        fused = _run_fused(case, memory, redraw)
    except RuntimeError as error:
        if f"backend {case.arguments['backend']!r} cannot run this call" in str(error) or not same:
            memory.check(unmoved=tuple(path for path, _ in leaves(memory.arguments, Tensor)))
            return {}
        raise
    except EXPECTED_ERRORS:
        if not same:
            return {}
        raise
    memory.check()
    if not same:
        if any(result.numel() for result in fused.values()):
            raise WrongError("lenient", f"the plain form raises {type(refusal).__name__}: {refusal}")
        return {}
    if case.arguments.get("dropout_p"):
        return {}
    torch.set_num_threads(1)
    errors = {name: measure(name, fused[name], [s[name] for s in same], exact[name]) for name in exact}
    return {name: error for name, error in errors.items() if error is not None}


def _check_accuracy(case: Case) -> None:
    """A result too far off is judged again by the worst of several draws, since at one the plain form may be lucky."""
    suspects = {name for name, error in _errors(case, 0, threads=(1,)).items() if error.excess > 1}
    if not suspects:
        return
    draws = [_errors(case, redraw, threads=(1, 2)) for redraw in range(DRAWS)]
    for name in sorted(suspects):
        each = [errors[name] for errors in draws if name in errors]
        plain = torch.stack([error.of_plain for error in each]).max()
        pooled = max(error._replace(of_plain=plain).excess for error in each)
        failing = sum(error.excess > 1 for error in each)
        if pooled > 1 and failing > 1:  # one alone: a step of an activation's derivative between two roundings
            largest = max(float(error.of_fused.max()) for error in each)
            detail = f"error {largest:.3g}, the plain form's {float(plain):.3g}; {pooled:.2f} times what is allowed"
            raise WrongError("accuracy", f"{name}: {detail}, {failing} of {len(each)} draws")


def _check_refusal(case: Case) -> None:
    """A wrong argument: an error that names it, with nothing changed."""
    assert case.wrong is not None
    memory = Memory(case)
    torch.set_num_threads(case.threads)
    try:
        result = _execute(getattr(ops, case.op), case, memory.arguments, lambda _, output: torch.ones_like(output))
    except EXPECTED_ERRORS as error:
        memory.check(unmoved=tuple(path for path, _ in leaves(memory.arguments, Tensor)))
        names = {case.wrong, case.wrong.partition(".")[0]}
        if _may_be_seen_elsewhere(case):
            names |= set(case.arguments)
        if not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names):
            raise WrongError("message", f"{case.wrong} is not named: {type(error).__name__}: {error}") from None
    else:
        shapes = ", ".join(f"{name} {tuple(r.shape)}" for name, r in result.items())
        raise WrongError("silent", f"{case.wrong} was taken; {shapes}")


def _may_be_seen_elsewhere(case: Case) -> bool:
    """Whether another argument is as likely to be the wrong one: their sizes, devices or dtypes do not go together."""
    spoilt = dict(leaves(case.arguments, object)).get(case.wrong or "")
    kinds = ("meta", "int64", "complex64", "bool")
    return isinstance(spoilt, Spec) or (isinstance(spoilt, Foreign) and spoilt.kind in kinds) or case.wrong in (
        "grid", "padding", "stride", "prefix_tokens"
    )


def judge(op: str, seed: int, isa: str) -> Finding | None:
    """Run the case of a seed on a thread of its own, whose workspaces are fresh; a finding, or None."""
    case = draw(op, seed)
    found: list[tuple[str, str]] = []

    def run() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                _check_refusal(case) if case.wrong else _check_accuracy(case)
        except WrongError as error:
            found.append((error.kind, str(error)))
        except Exception as error:  # whatever it is, it is what was looked for
            found.append(("error", f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return Finding(op, seed, isa, *found[0], str(case), case.size) if found else None
