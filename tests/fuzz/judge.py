"""Runs one case, and says what is wrong with the result."""

from __future__ import annotations

import functools
import itertools
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastvit import ops
from fastvit.accuracy import NONE, Deviation, deviation
from fastvit.ops._operator import recording
from fastvit.reference import functional
from fastvit.reference.functional import LayerNorm
from tests.fuzz.cases import Case, Foreign, draw
from tests.fuzz.memory import Spec, leaves, mapped
from tests.fuzz.orders import Reordered, batch_norm_of_tokens
from tests.helpers import poisoned_empty

EXPECTED_ERRORS = (ValueError, TypeError, RuntimeError)
DRAWS = 8, 32
"""How many draws of a case's values a result is judged by that is too far off at the first, and then with fewer."""
ORDERS = 4
"""In how many more orders of summation the plain form is then computed."""


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
            if ".running" in path and path not in unmoved and 0 not in tensor.stride():
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
_conv2d = torch.nn.functional.conv2d


def _conv_of_any_size(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    """``F.conv2d``, and of what it refuses, being empty, its result."""
    try:
        return _conv2d(x, weight, *rest, **named)
    except RuntimeError:
        if x.numel() and weight.numel():
            raise
        return _conv_of_the_map(x, weight, *rest, **named)


def _conv_in_channels_last(x: Tensor, *rest: Any) -> Tensor:
    return _conv2d(x.contiguous(memory_format=torch.channels_last), *rest)


def _conv_of_the_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d``, in which no tap is ever multiplied by the padding: infinities and NaN stay in their window.

    It has a result for maps and groups of size 0 too, which torch refuses.
    """
    (down, right), (above, left) = ((n, n) if isinstance(n, int) else n for n in (stride, padding))
    batch, _, height, width = x.shape
    rows = (height + 2 * above - weight.shape[2]) // down + 1
    columns = (width + 2 * left - weight.shape[3]) // right + 1
    if not x.numel() or not weight.numel():
        out = x.new_zeros(batch, weight.shape[0], rows, columns) + sum(t.flatten()[:0].sum() for t in (x, weight))
        return out if bias is None else out + bias[:, None, None]
    out = x.new_zeros(batch, groups, weight.shape[0] // groups, rows, columns)
    grouped = x.unflatten(1, (groups, weight.shape[1]))
    for i, j in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
        ys = [y for y in range(rows) if 0 <= y * down - above + i < height]
        xs = [x for x in range(columns) if 0 <= x * right - left + j < width]
        if ys and xs:
            seen = grouped[:, :, :, ys[0] * down - above + i : ys[-1] * down - above + i + 1 : down]
            seen = seen[..., xs[0] * right - left + j : xs[-1] * right - left + j + 1 : right]
            tap = weight[:, :, i, j].unflatten(0, (groups, -1))
            seen = torch.einsum("bgchw,goc->bgohw", seen, tap)
            out[..., ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] += seen
    out = out.flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


def _execute(
    function: Callable[..., Any], case: Case, arguments: dict[str, Any], upstream: Callable[..., Tensor]
) -> Results:
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
        # In inference mode torch does not tell Reordered of a product behind F.linear.
        self.case = case._replace(mode="no grad") if case.mode == "inference" else case
        self.redraw = redraw
        self.arguments = {name: value for name, value in arguments.items() if name != "backend"}
        self.first = next(tensor for _, tensor in leaves(arguments, Tensor)).dtype
        self.by_layer = isinstance(arguments.get("norm"), LayerNorm)

    def without_padding(self, dtype: torch.dtype) -> Results:
        """With convolutions that never multiply the padding."""
        return self(dtype, convolution=_conv_of_the_map)

    def reordered(self, dtype: torch.dtype, seed: int) -> Results:
        """With sums in other orders."""
        with Reordered(seed), mock.patch.object(functional.F, "batch_norm", batch_norm_of_tokens):
            return self(dtype, convolution=_conv_of_the_map)

    def by_sdpa(self) -> Results:
        """Attention without mask and bias, by torch's own kernel; NaN and infinities are where the plain form has them.

        For its errors alone: at large logits they are a limit of that backend.
        """

        def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, **_: Any) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

        found, plain = self(self.first, function=attention), self(self.first)
        return {name: t.where(t.isfinite() & plain[name].isfinite(), plain[name]) for name, t in found.items()}

    def is_refused(self) -> bool:
        """Whether torch does not take the call, with its own convolutions."""
        try:
            self(torch.float64, convolution=_conv2d)
        except Exception:  # it is torch's, of any kind
            return True
        return False

    def __call__(
        self,
        dtype: torch.dtype,
        threads: int = 1,
        as_given: bool = False,
        convolution: Callable[..., Tensor] = _conv_of_any_size,
        function: Callable[..., Any] | None = None,
    ) -> Results:
        """``as_given``: with the strides of the call's own tensors."""

        def copied(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # Beside 16 bits torch's batch norm takes float32, and its running statistics are to stay so.
            kept = leaf.dtype == torch.bool or ("norm." in path and dtype.itemsize == 2 and not self.by_layer)
            kind = leaf.dtype if kept else dtype
            if as_given:
                storage = leaf.detach().as_strided((leaf.untyped_storage().nbytes() // leaf.itemsize,), (1,), 0)
                copy = storage.to(kind, copy=True).as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
            else:
                copy = leaf.detach().to(kind, copy=True).contiguous()
            return copy.requires_grad_(leaf.requires_grad)

        def upstream(index: int, output: Tensor) -> Tensor:
            spec = self.case.gradient(index, output.shape, self.first)
            gradient = spec.storage_and_tensor(self.redraw)[1].to(output.dtype)
            return gradient if as_given else gradient.contiguous()

        torch.set_num_threads(threads)
        function = function or getattr(functional, self.case.op)
        with mock.patch.object(functional.F, "conv2d", convolution):
            return _execute(function, self.case, mapped(self.arguments, copied), upstream)


def _run_fused(case: Case, memory: Memory, redraw: int) -> Results:
    def upstream(index: int, output: Tensor) -> Tensor:
        return case.gradient(index, output.shape, output.dtype).storage_and_tensor(redraw)[1]

    torch.set_num_threads(case.threads)
    with poisoned_empty():
        return _execute(getattr(ops, case.op), case, memory.arguments, upstream)


def _backend(case: Case) -> str:
    """Of the implementation that runs."""
    chosen: list[str] = []
    with recording(lambda selection: chosen.append(selection.backend)):
        _run_fused(case, Memory(case), 0)
    return chosen[0]


# --- What a result has to be ----------------------------------------------------------------------------------------


def overflows(plain: Results, exact: Results) -> bool:
    """Whether a result overflows, or nearly so: one order of summation or precision may then, and another not."""
    return any(
        bool(
            (
                exact[name].isfinite()
                & (~tensor.isfinite() | (exact[name].abs() > torch.finfo(tensor.dtype).max / 100))
            ).any()
        )
        for name, tensor in plain.items()
    )


def measure(
    name: str,
    fused: Tensor,
    plain: list[Tensor],
    exact: Tensor,
    dtype: torch.dtype,
    overflowing: bool,
    without_padding: Callable[[torch.dtype], Results],
) -> Deviation:
    """How far off a result is; WrongError where its NaN and infinities are not where the plain form puts them.

    It may multiply the padding of a convolution by NaN or infinity or leave that be, as torch's own forms do.
    """
    if fused.shape != exact.shape or fused.dtype != dtype:
        raise WrongError(
            "shape", f"{name}: got {tuple(fused.shape)} {fused.dtype}, expected {tuple(exact.shape)} {dtype}"
        )
    if overflowing:
        return NONE
    alike = finite = torch.zeros(exact.shape, dtype=torch.bool)

    def compare() -> None:
        nonlocal alike, finite
        finite = fused.isfinite()
        for tensor in (*plain, exact.to(dtype)):
            alike = alike | (
                fused.isfinite() == tensor.isfinite()
            )  # inf - inf and inf * 0 are where an expression is expanded
            finite &= tensor.isfinite()

    compare()
    if not alike.all():
        plain, exact = [without_padding(plain[0].dtype)[name]], without_padding(torch.float64)[name]
        compare()
    if not alike.all():
        at = tuple(int(i) for i in (~alike).nonzero()[0])
        values = f"fused {fused[at]:g}, plain {plain[0][at]:g}, exact {exact[at]:g}"
        raise WrongError("special", f"{name}: {int((~alike).sum())} of {fused.numel()} elements, at {at} {values}")
    # Gradients of float32 parameters beside 16-bit activations have passed through those.
    coarsest = max((dtype, plain[0].dtype), key=lambda kind: torch.finfo(kind).eps)
    fused, exact, *plain = (t.where(finite, 0.0) for t in (fused.to(coarsest), exact, *plain))
    return deviation(fused, plain, exact)


def _scaled(single: Results, exact: Results) -> Results:
    """The plain form in float64 with the error to expect of it, float32's times the ratio of their roundings: its own
    cannot be seen, since it is the oracle.
    """
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {name: right + (single[name] - right).nan_to_num(0.0, 0.0, 0.0) * ratio for name, right in exact.items()}


def _deviations(case: Case, redraw: int, threads: Sequence[int], backend: str | None = None) -> dict[str, Deviation]:
    """Of every result, for one draw of the values; the plain form's is the worst over these numbers of threads.

    And, if the ``backend`` that runs is given, over several orders of summation, and what torch itself runs there.
    """
    memory = Memory(case, redraw)
    plain = Plain(case, memory.arguments, redraw)
    exact: Results = {}
    same: list[Results] = []
    refusal: Exception | None = None
    try:
        exact = plain(torch.float64)
        if plain.first == torch.float64:
            same = [_scaled(plain(torch.float32), exact)]
        else:
            same = [plain(plain.first, count) for count in threads]
        for seed in range(0 if backend is None else ORDERS):
            # What float32 gives is right in 16 bits too, and where float64 has no digits left, so is either result.
            wider = {kind: plain.reordered(kind, seed) for kind in {plain.first, torch.float32, torch.float64}}
            if plain.first == torch.float64:
                wider[torch.float32] = _scaled(wider[torch.float32], exact)
            same += wider.values()
        if backend == "reference":  # on the strides of the call, in whose order torch's products add
            same.append(plain(plain.first, as_given=True))
        elif backend == "channels_last":  # torch's own kernel for that layout
            same.append(plain(plain.first, convolution=_conv_in_channels_last))
        elif backend == "sdpa":  # torch's own kernel, which is not ours to mend
            same.append(plain.by_sdpa())
    except Exception as error:  # it is torch's, of any kind
        refusal = error
    everything = tuple(path for path, _ in leaves(memory.arguments, Tensor))
    try:
        fused = _run_fused(case, memory, redraw)
    except Exception as error:
        named = f"backend {case.arguments['backend']!r} cannot run this call" in str(error)
        if refusal is None and not named and not plain.is_refused():
            raise
        memory.check(unmoved=everything)
        return {}
    memory.check()
    if refusal is not None:
        if any(result.numel() for result in fused.values()):
            raise WrongError("lenient", f"the plain form raises {type(refusal).__name__}: {refusal}")
        return {}
    if case.arguments.get("dropout_p"):
        return {}
    torch.set_num_threads(1)
    dtypes = {path: tensor.dtype for path, tensor in leaves(memory.arguments, Tensor)}
    overflowing = overflows(same[0], exact)
    without_padding = functools.cache(plain.without_padding)

    def measured(name: str) -> Deviation:
        plains = [results[name] for results in same]
        dtype = dtypes.get(name.removeprefix("gradient of "), plains[0].dtype)
        return measure(name, fused[name], plains, exact[name], dtype, overflowing, without_padding)

    return {name: measured(name) for name in exact}


def _check_accuracy(case: Case) -> None:
    """A result too far off is judged again by the worst of several draws, since at one the plain form may be lucky."""
    suspects = [name for name, each in _deviations(case, 0, threads=(1,)).items() if not each.is_accurate]
    if not suspects:
        return
    backend = _backend(case)
    draws: list[dict[str, Deviation]] = []
    wrong = ""
    for count in DRAWS:
        draws += [_deviations(case, redraw, (1, 2), backend) for redraw in range(len(draws), count)]
        wrong = next(filter(None, (_too_far_off(case, name, draws) for name in suspects)), "")
        if not wrong:
            return
    raise WrongError("accuracy", wrong)


def _too_far_off(case: Case, name: str, draws: list[dict[str, Deviation]]) -> str:
    """How far a result is off in all draws together; empty where it is as accurate as it has to be."""
    each = [deviations[name] for deviations in draws if name in deviations]
    pooled = functools.reduce(Deviation.pooled, each, NONE)
    failing = sum(not part.is_accurate for part in each)
    # The derivative of ReLU steps between two roundings of zero, in one draw of eight at times.
    if pooled.is_accurate or failing <= (len(each) // 8 if "relu" in case.arguments.values() else 1):
        return ""
    errors = f"{pooled.excess:.3g} beyond rounding, the plain form's error {pooled.plain_error:.3g}"
    return f"{name}: {errors}, {failing} of {len(each)} draws"


def _check_refusal(case: Case) -> None:
    """A wrong argument: an error that names it, with nothing changed."""
    assert case.wrong is not None
    memory = Memory(case)
    torch.set_num_threads(case.threads)
    try:
        result = _execute(getattr(ops, case.op), case, memory.arguments, lambda _, output: torch.ones_like(output))
    except EXPECTED_ERRORS as error:
        memory.check(unmoved=tuple(path for path, _ in leaves(memory.arguments, Tensor)))
        if "cannot run this call" in str(error):  # for another reason
            return
        names = {case.wrong, case.wrong.partition(".")[0]}
        if _may_be_seen_elsewhere(case):
            names |= set(case.arguments)
        if not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names):
            raise WrongError("message", f"{case.wrong} is not named: {type(error).__name__}: {error}") from None
    else:
        if _is_taken_by_the_plain_form(case, result):
            return
        shapes = ", ".join(f"{name} {tuple(r.shape)}" for name, r in result.items())
        raise WrongError("silent", f"{case.wrong} was taken; {shapes}")


def _is_taken_by_the_plain_form(case: Case, result: Results) -> bool:
    """Whether a size that was changed is right as well, no other depending on it: with results of the same shapes."""
    if not isinstance(dict(leaves(case.arguments, object)).get(case.wrong or ""), Spec):
        return False
    plain = Plain(case, Memory(case).arguments)
    try:
        expected = plain(torch.float64)
    except Exception:  # it is torch's, of any kind
        return False
    return {name: r.shape for name, r in expected.items()} == {name: r.shape for name, r in result.items()}


def _may_be_seen_elsewhere(case: Case) -> bool:
    """Whether another argument is as likely to be the wrong one: their sizes, devices or dtypes do not go together."""
    spoilt = dict(leaves(case.arguments, object)).get(case.wrong or "")
    kinds = ("meta", "int64", "complex64", "bool")
    return (
        isinstance(spoilt, Spec)
        or (isinstance(spoilt, Foreign) and spoilt.kind in kinds)
        or case.wrong in ("grid", "padding", "stride", "prefix_tokens")
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
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
            found.append(("error", f"{type(error).__name__}: {error} ({where})"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return Finding(op, seed, isa, *found[0], str(case), case.size) if found else None
