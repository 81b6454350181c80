"""From one integer seed to one call of an operator: its arguments, and what is done with the result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastvit.reference.functional import BatchNorm, LayerNorm, Projection
from tests.fuzz.memory import Spec, is_node, leaves, mapped

DTYPES = {torch.float32: 5, torch.bfloat16: 3, torch.float16: 1, torch.float64: 1}
MOODS = {
    "normal": 60,
    "scaled:30": 5,
    "scaled:0.001": 3,
    "offset:100": 5,
    "constant": 3,
    "zero": 4,
    "huge": 4,
    "denormal": 4,
    "nan:1": 4,
    "inf:1": 3,
    "-inf:2": 3,
}
ACTIVATIONS = (None, "gelu", "quick_gelu", "silu", "relu", "gelu_tanh")


class Draw(random.Random):
    """The choices that follow from one seed, and what several operators draw alike."""

    def __init__(self, op: str, seed: int) -> None:
        super().__init__(f"{op} {seed}")
        self.op = op
        self.dtype = self.weighted(DTYPES)
        # Parameters in float32 beside activations in 16 bits, as mixed precision has them.
        self.mixed = self.dtype.itemsize == 2 and self.chance(0.3)
        self.mood = self.weighted(MOODS)
        self.oddness = self.choice((0.0, 0.3, 0.8))

    def weighted(self, options: dict[Any, int]) -> Any:
        return self.choices(list(options), list(options.values()))[0]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def size(self, usual: int, least: int = 0) -> int:
        """0 and 1 now and then, most often up to ``usual``, sometimes several times that."""
        kind = self.random()
        if kind < 0.15:
            return self.choice((0, 1)) if least == 0 else 1
        return self.randint(1, usual if kind < 0.9 else 4 * usual)

    def tensor(
        self, *shape: int, values: str | None = None, dtype: torch.dtype | None = None, plain: bool = False
    ) -> Spec:
        """``values``: the case's mood at times and normal otherwise by default. ``plain``: contiguous."""
        if values is None:
            values = self.mood if self.chance(0.4) else "normal"
        strides, offset = self._layout(shape, plain)
        return Spec(shape, dtype or self.dtype, values, strides, offset, self.chance(0.7), self.getrandbits(31))

    def _layout(self, shape: tuple[int, ...], plain: bool) -> tuple[tuple[int, ...], int]:
        odd = not plain and self.chance(self.oddness)
        order = list(range(len(shape)))
        if odd and self.chance(0.5):
            self.shuffle(order)
        kind = self.choice(("dense", "sliced", "expanded")) if odd else "dense"
        strides, offset, step = [0] * len(shape), self.choice((0, 3)) if odd else 0, 1
        for axis in reversed(order):
            size = max(1, shape[axis])
            every, more = (self.choice((1, 1, 2)), self.choice((0, 1, 5))) if kind == "sliced" else (1, 0)
            strides[axis] = step * every
            offset += step * (more // 2)
            step *= size * every + more
        if kind == "expanded" and shape:
            strides[self.randrange(len(shape))] = 0
        if odd:  # what the stride of an axis of one element is does not matter
            strides = [
                self.choice((s, 1, 7, 2**40)) if size == 1 else s for s, size in zip(strides, shape, strict=True)
            ]
        return tuple(strides), offset

    def parameter(self, *shape: int, values: str | None = None, may_be_float32: bool = True) -> Spec:
        return self.tensor(*shape, values=values, dtype=torch.float32 if self.mixed and may_be_float32 else None)

    def optional(self, *shape: int, may_be_float32: bool = True) -> Spec | None:
        return None if self.chance(0.3) else self.parameter(*shape, may_be_float32=may_be_float32)

    def batch_norm(self, channels: int) -> BatchNorm:
        batch_stats = self.chance(0.5)
        tracked = not batch_stats or self.chance(0.8)
        variance = "zero" if self.chance(0.05) else "positive"
        of = torch.float32 if self.mixed else self.dtype
        return BatchNorm(
            self.tensor(channels, dtype=of, plain=batch_stats) if tracked else None,
            self.tensor(channels, values=variance, dtype=of, plain=batch_stats) if tracked else None,
            self.optional(channels),
            self.optional(channels),
            batch_stats,
            self.choice((0.1, 0.1, 0.0, 1.0)),
            self.choice((1e-5, 1e-5, 1e-3)),
        )

    def norm(self, channels: int) -> BatchNorm | None:
        return self.batch_norm(channels) if self.chance(0.5) else None

    def mask_shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """What broadcasts to (B, H, Nq, Nk)."""
        shape = tuple(1 if self.chance(0.4) else size for size in full[:3]) + full[3:]
        return shape if self.chance(0.85) else shape[1:]


# --- The operators --------------------------------------------------------------------------------------------------


def _attention(d: Draw, queries: int = 20, heads: int = 5, bias: bool = True) -> dict[str, Any]:
    full = B, H, Nq, Nk = d.size(3), d.size(heads), d.size(queries), d.size(20)
    D = d.choice((d.size(9), d.size(40), 8, 16, 33, 64, 128, 129))
    masked = {}
    hidden = d.randint(1, max(Nk, 1)) if d.chance(0.2) else 0  # keys that nothing may be seen of
    if d.chance(0.5) or (hidden and not bias):
        kind = f"keys:{hidden}" if hidden else d.choice(("rows:0.7", "any:0.5", "any:0", "any:1"))
        shape = (B, Nk) if d.chance(0.4) and not kind.startswith("rows") else d.mask_shape(full)
        masked["mask"] = d.tensor(*shape, values=kind, dtype=torch.bool)
    if bias and (d.chance(0.4) or (hidden and not masked)):
        kind = f"keys:-inf,{hidden}" if hidden and not masked else d.choice((None, "masking:0.3", "masking:1"))
        masked["bias"] = d.tensor(*d.mask_shape(full), values=kind)
    behind = [f"tail:{d.choice(('nan', 'inf', '1e4'))},{hidden}" if hidden and d.chance(0.5) else None for _ in "kv"]
    k, v = (d.tensor(B, H, Nk, D, values=values) for values in behind)
    scale = d.choice((None, None, None, 0.3, 10.0, 0.0, -1.0))
    dropout = {"dropout_p": 0.5} if d.chance(0.02) else {}
    return {"q": d.tensor(B, H, Nq, D), "k": k, "v": v, **masked, "scale": scale, **dropout}


def _square(d: Draw, heads: int) -> Spec:
    return d.parameter(heads, heads, values=d.choice((None, "near identity", "near identity")))


def _mixed_heads(d: Draw) -> tuple[dict[str, Any], int]:
    arguments = _attention(d, heads=d.choice((4, 4, 12, 34)), bias=False)
    return arguments, arguments["q"].shape[1]


def _head_norm(d: Draw, heads: int) -> BatchNorm | LayerNorm | None:
    layer = LayerNorm(d.optional(heads), d.optional(heads), d.choice((1e-5, 1e-3)))
    return layer if d.chance(0.3) else d.norm(heads)


def _head_mixed_attention(d: Draw) -> dict[str, Any]:
    arguments, heads = _mixed_heads(d)
    for name in ("pre", "post"):
        if d.chance(0.7):
            arguments |= {f"{name}_weight": _square(d, heads), f"{name}_bias": d.optional(heads)}
    after = {"dropout_after_mix": d.chance(0.5), "output_scale": d.choice((1.0, 1.0, 0.5, -2.0))}
    return {**arguments, "norm": _head_norm(d, heads), **after}


def _re_attention(d: Draw) -> dict[str, Any]:
    arguments, heads = _mixed_heads(d)
    scale = {"output_scale": d.choice((1.0, 1.0, 0.5))}
    return {**arguments, "weight": _square(d, heads), "bias": d.optional(heads), "norm": _head_norm(d, heads), **scale}


def _talking_heads_attention(d: Draw) -> dict[str, Any]:
    arguments, heads = _mixed_heads(d)
    mixes = {f"{name}_weight": _square(d, heads) for name in ("pre", "post")}
    return {**arguments, **mixes, **{f"{name}_bias": d.optional(heads) for name in ("pre", "post")}}


def _tokens(d: Draw) -> tuple[dict[str, Any], int]:
    """x with its grid and prefix tokens, and its channels."""
    big = d.chance(0.03)
    h, w = (d.size(30 if big else 9, least=1) for _ in range(2))
    prefix, channels = d.choice((0, 0, 1, 2)), d.choice((d.size(20), d.size(70), 16, 40, 64))
    x = d.tensor(d.size(3), prefix + h * w, channels)
    return {"x": x, "grid": (h, w), "prefix_tokens": prefix}, channels


def _kernel(d: Draw) -> int:
    return d.choice((3, 3, 3, 1, 2, 4, 5, 7, 8, 11))


def _padding(d: Draw, grid: tuple[int, int], kernel: int) -> int | None:
    """The usual one, or any with which the kernel fits."""
    if d.chance(0.6) and min(grid) + 2 * (kernel // 2) >= kernel:
        return None
    return d.randint(max(0, -(-(kernel - min(grid)) // 2)), kernel + 1)


def _token_depthwise_conv(d: Draw) -> dict[str, Any]:
    arguments, channels = _tokens(d)
    kernel, stride = _kernel(d), d.choice((1, 1, 1, 2, 3))
    padding = _padding(d, arguments["grid"], kernel)
    keeps = stride == 1 and 2 * (kernel // 2 if padding is None else padding) == kernel - 1
    return {
        **arguments,
        "weight": d.parameter(channels, 1, kernel, kernel),
        "bias": d.optional(channels),
        "stride": stride,
        "padding": padding,
        "pre_norm": d.norm(channels),
        "pre_activation": d.choice(ACTIVATIONS),
        "norm": d.norm(channels),
        "activation": d.choice(ACTIVATIONS),
        "residual": keeps and d.chance(0.5),
    }


def _projection(d: Draw, grid: tuple[int, int], channels: int) -> Projection:
    kernel, outputs = _kernel(d), d.size(40)
    return Projection(
        d.parameter(channels, 1, kernel, kernel),
        d.norm(channels),
        d.parameter(outputs, channels),
        d.optional(outputs),
        d.choice((1, 1, 2)),
        _padding(d, grid, kernel),
        d.optional(channels),
    )


def _depthwise_separable_conv(d: Draw) -> dict[str, Any]:
    arguments, channels = _tokens(d)
    return {**arguments, **_projection(d, arguments["grid"], channels)._asdict()}


def _conv_projection(d: Draw) -> dict[str, Any]:
    arguments, channels = _tokens(d)
    return {**arguments, **{name: _projection(d, arguments["grid"], channels) for name in "qkv"}}


def _leff(d: Draw) -> dict[str, Any]:
    arguments, channels = _tokens(d)
    hidden, kernel = d.size(30), d.choice((1, 3, 3, 3, 5, 7))
    outputs = channels if arguments["prefix_tokens"] or d.chance(0.5) else d.size(30)
    return {
        **arguments,
        "up_weight": d.parameter(hidden, channels),
        "up_bias": d.optional(hidden),
        "dw_weight": d.parameter(hidden, 1, kernel, kernel),
        "dw_bias": d.optional(hidden),
        "down_weight": d.parameter(outputs, hidden),
        "down_bias": d.optional(outputs),
        "up_norm": d.norm(hidden),
        "dw_norm": d.norm(hidden),
        "down_norm": d.norm(outputs),
        "form": d.choice(("official", "official", "paper")),
    } | {name: value for name, value in _around(d, arguments["x"], channels, outputs).items() if name != "scale"}


def _rows(d: Draw) -> tuple[Spec, int]:
    inner = d.choice((d.size(20), d.size(70), 16, 64))
    return d.tensor(*(d.size(20 if axis == 0 else 4) for axis in range(d.choice((0, 1, 1, 2, 2, 3)))), inner), inner


def _linear(d: Draw) -> dict[str, Any]:
    x, inner = _rows(d)
    outputs = d.size(70)
    weight, bias = d.tensor(outputs, inner), d.optional(outputs, may_be_float32=False)
    layer = {"x": x, "weight": weight, "bias": bias, "activation": d.choice(ACTIVATIONS)}
    return layer | _around(d, x, inner, outputs)


def _around(d: Draw, x: Spec, inner: int, outputs: int) -> dict[str, Any]:
    """What stands before and behind a product, each at times."""
    around: dict[str, Any] = {}
    if inner and d.chance(0.3):
        # As of an nn.LayerNorm. In float32 beside half precision, torch's own gradients lose digits.
        weight = d.optional(inner, may_be_float32=False)
        bias = None if weight is None else d.optional(inner, may_be_float32=False)
        around["norm"] = LayerNorm(weight, bias, d.choice((1e-6, 1e-5, 1e-2)))
    if d.chance(0.3):
        around["scale"] = d.parameter(outputs, may_be_float32=False)
    if d.chance(0.3):
        around["residual"] = d.tensor(*x.shape[:-1], outputs)
    return around


def _mlp(d: Draw) -> dict[str, Any]:
    x, inner = _rows(d)
    hidden, outputs = d.size(40), d.size(40)
    return {
        "x": x,
        "fc1_weight": d.tensor(hidden, inner),
        "fc1_bias": d.optional(hidden, may_be_float32=False),
        "fc2_weight": d.tensor(outputs, hidden),
        "fc2_bias": d.optional(outputs, may_be_float32=False),
        "activation": d.choice(ACTIVATIONS),
    } | _around(d, x, inner, outputs)


def _glu_mlp(d: Draw) -> dict[str, Any]:
    x, inner = _rows(d)
    hidden, outputs = d.size(40), d.size(40)
    weight = None if d.chance(0.5) else d.optional(hidden, may_be_float32=False)
    return {
        "x": x,
        "gate_weight": d.tensor(hidden, inner),
        "gate_bias": d.optional(hidden, may_be_float32=False),
        "value_weight": d.tensor(hidden, inner),
        "value_bias": d.optional(hidden, may_be_float32=False),
        "fc2_weight": d.tensor(outputs, hidden),
        "fc2_bias": d.optional(outputs, may_be_float32=False),
        "activation": d.choice((*ACTIVATIONS, "sigmoid")),
        "hidden_norm": LayerNorm(weight, None, d.choice((1e-6, 1e-5))) if hidden and d.chance(0.3) else None,
    } | _around(d, x, inner, outputs)


def _conv_batch_norm(d: Draw) -> dict[str, Any]:
    channels, outputs, height, width = d.size(9), d.size(20), d.size(12, least=1), d.size(12, least=1)
    kernel = d.choice((1, 2, 3, 3, 5, 7)), d.choice((1, 2, 3, 3, 5, 7))
    padding = tuple(d.randint(max(0, -(-(k - n) // 2)), k) for k, n in zip(kernel, (height, width), strict=True))
    d.mixed = False  # as nn.Conv2d, it wants one dtype
    return {
        "x": d.tensor(d.size(3), channels, height, width),
        "weight": d.parameter(outputs, channels, *kernel),
        "bias": d.optional(outputs),
        "norm": d.batch_norm(outputs) if d.chance(0.6) else None,
        "stride": d.choice((1, 2, (1, 2), (3, 1), kernel)),
        "padding": padding,
        "activation": d.choice(ACTIVATIONS),
    }


class Operator(NamedTuple):
    """How its arguments are drawn, and the backends that run on a CPU."""

    draw: Callable[[Draw], dict[str, Any]]
    backends: tuple[str, ...]


OPERATORS = {
    "masked_attention": Operator(_attention, ("cpp", "sdpa", "reference")),
    "class_attention": Operator(lambda d: _attention(d, queries=4), ("cpp", "sdpa", "reference")),
    "head_mixed_attention": Operator(_head_mixed_attention, ("cpp", "reference")),
    "re_attention": Operator(_re_attention, ("cpp", "reference")),
    "talking_heads_attention": Operator(_talking_heads_attention, ("cpp", "reference")),
    "token_depthwise_conv": Operator(_token_depthwise_conv, ("cpp", "reference")),
    "depthwise_separable_conv": Operator(_depthwise_separable_conv, ("cpp", "reference")),
    "conv_projection": Operator(_conv_projection, ("cpp", "reference")),
    "leff": Operator(_leff, ("cpp", "reference")),
    "linear": Operator(_linear, ("cpp", "reference")),
    "mlp": Operator(_mlp, ("cpp", "reference")),
    "glu_mlp": Operator(_glu_mlp, ("cpp", "reference")),
    "conv_batch_norm": Operator(_conv_batch_norm, ("cpp", "channels_last", "reference")),
}


# --- One wrong argument ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """A tensor to be made into something that no operator takes."""

    spec: Spec
    kind: str

    def __repr__(self) -> str:
        return f"{self.kind} of {self.spec}"


WRONG_NUMBERS: dict[str, tuple[Any, ...]] = {
    "grid": ((4, 2**62 + 1), (2**32, 2**32), (2**31, 2), (-1, -1), (0, 4), (3, 4, 5), 12, None, "ab", (2.5, 2), 2**70),
    "stride": (0, -1, "2", None, 1.5, (1, 1, 1), -(2**63), 2**70),
    "padding": (-1, -(2**62), 2**62, 2**63 - 1, 2**70, 1.5, (1, 1, 1), [0]),
    "prefix_tokens": (-1, 2**63 - 1, -(2**63), 2**70, 0.5, "1", None),
    "activation": ("tanh", 3, torch.nn.ReLU()),
    "pre_activation": ("tanh", 1, torch.nn.ReLU()),
    "form": ("both", None, 3),
    "dropout_p": (1.5, -0.1, "0.5", float("nan"), None),
    "scale": ("1", [1.0], 1j),
    "output_scale": ("1", [1.0], None),
    "backend": ("fast", None, 3, ["cpp"]),
}
OF_ROWS = ("linear", "mlp", "glu_mlp")
"""Operators of x (..., K)."""
OPTIONAL = ("bias", "mask", "padding", "scale", "residual")


def _spoil_tensor(d: Draw, path: str, spec: Spec) -> Any:
    kinds = ["shape", "axes", "int64", "complex64", "meta", "numpy", "list", "str", "None", "bool"]
    if path.endswith(OPTIONAL) or ".running" in path or path.endswith("norm.weight"):
        kinds.remove("None")
    if path == "mask":
        kinds[kinds.index("bool")] = "float32"
    if path == "x" and d.op in OF_ROWS:
        kinds.remove("axes")
    kind = d.choice(kinds)
    if kind == "shape":
        any_rows = path in ("x", "weight", "fc2_weight") and d.op in OF_ROWS
        axis = len(spec.shape) - 1 if any_rows else d.randrange(len(spec.shape))
        # Three more than there are broadcast to nothing.
        return d.tensor(
            *(size + 3 * (i == axis) for i, size in enumerate(spec.shape)),
            values="any:1" if path == "mask" else None,
            dtype=spec.dtype,
        )
    if kind == "axes":
        return d.tensor(2, 1, 3, *spec.shape, values="any:1" if path == "mask" else None, dtype=spec.dtype)
    return None if kind == "None" else Foreign(spec, kind)


def _spoil(d: Draw, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments with one of them wrong, and its path."""
    wrong: dict[str, Callable[[Any], Any]] = {}
    for path, spec in leaves(arguments, Spec):
        wrong[path] = lambda _, path=path, spec=spec: _spoil_tensor(d, path, spec)
    for path, value in leaves(arguments, object):
        if (name := path.rpartition(".")[2]) in WRONG_NUMBERS and not isinstance(value, Spec):
            wrong[path] = lambda _, name=name: d.choice(
                [w for w in WRONG_NUMBERS[name] if w is not None or name not in OPTIONAL]
            )
    for name, value in arguments.items():
        if is_node(value) and d.chance(0.3):
            wrong[name] = lambda _: d.choice((torch.nn.BatchNorm2d(3), "norm", 3, [None] * 9))
    path = d.choice(sorted(wrong))
    if path in arguments:
        return {**arguments, path: wrong[path](None)}, path
    return mapped(arguments, lambda at, leaf: wrong[path](leaf) if at == path else leaf), path


# --- A case ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One call. ``wrong``: the path of the argument that it must refuse, or None."""

    op: str
    seed: int
    arguments: dict[str, Any]
    threads: int
    mode: str  # "inference" (inference_mode), "no grad", "forward" (nothing requires a gradient) or "backward"
    trained: frozenset[str]
    upstream: str  # "random", "odd" (strides, and the values of the mood) or "sum" (of the outputs)
    wrong: str | None

    @property
    def size(self) -> int:
        return sum(spec.numel for _, spec in leaves(self.arguments, Spec))

    def gradient(self, index: int, shape: torch.Size, dtype: torch.dtype) -> Spec:
        """Of the output of that index."""
        d = Draw(f"gradient {index} of {self.op}", self.seed)
        d.oddness = 1.0 if self.upstream == "odd" else 0.0
        d.mood = "normal" if self.upstream == "random" or d.mood in ("huge", "zero", "denormal") else d.mood
        return d.tensor(*shape, dtype=dtype)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={_told(value)}" for name, value in self.arguments.items())
        how = f"{self.mode}, {self.threads} threads"
        if self.mode == "backward":
            how += f", upstream gradient {self.upstream}, of {', '.join(sorted(self.trained))}"
        return f"ops.{self.op}({arguments})  # {how}"


def _told(value: Any) -> str:
    if not is_node(value):
        return repr(value)
    defaults = type(value)._field_defaults
    given = {name: v for name, v in value._asdict().items() if name not in defaults or v is not defaults[name]}
    return f"{type(value).__name__}({', '.join(f'{name}={_told(v)}' for name, v in given.items())})"


def draw(op: str, seed: int) -> Case:
    """The case of a seed."""
    d = Draw(op, seed)
    operator = OPERATORS[op]
    arguments = operator.draw(d)
    arguments["backend"] = d.choice(("auto",) * len(operator.backends) + operator.backends)
    mode = d.choice(("inference", "no grad", "forward", "backward", "backward", "backward"))
    trained = frozenset(
        path
        for path, spec in leaves(arguments, Spec)
        if spec.dtype.is_floating_point and ".running" not in path and d.chance(0.85)
    )
    wrong = None
    if d.chance(0.15):
        arguments, wrong = _spoil(d, arguments)
    upstream = d.choice(("random", "random", "odd", "sum"))
    return Case(op, seed, arguments, d.choice((1, 1, 2)), mode, trained, upstream, wrong)
