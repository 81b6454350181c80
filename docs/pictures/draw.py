"""Draws the pictures of the operators: ``python docs/pictures/draw.py``. A test holds the files to what this draws.

A picture is a graph on a grid: tensors (shaded), operations, and values that no memory holds (dashed), with a frame
around what one call computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
COLUMN, ROW = 138, 72
BOX = (112, 44)
MARGIN = 26
STYLES = {"tensor": "#dbe7fb", "operation": "#ffffff", "passing": "#ffffff"}


class Node(NamedTuple):
    """A box at a column and row, which may be fractions; its lines of text, and what it is."""

    column: float
    row: float
    text: str
    kind: str = "operation"


class Picture(NamedTuple):
    nodes: Mapping[str, Node]
    edges: str  # "from to, from to"
    call: Sequence[str]  # the nodes that one call computes
    told: str


def tensor(column: float, row: float, text: str) -> Node:
    return Node(column, row, text, "tensor")


def passing(column: float, row: float, text: str) -> Node:
    return Node(column, row, text, "passing")


def _attention(queries: str) -> Picture:
    nodes = {
        "q": tensor(0, 0, f"q|(B, H, {queries}, D)"),
        "k": tensor(0, 1, "k|(B, H, Nk, D)"),
        "v": tensor(0, 2, "v|(B, H, Nk, D)"),
        "logits": Node(1, 0.5, "scale · q kᵀ"),
        "masked": Node(2, 0.5, "+ bias,|mask"),
        "maps": passing(3, 0.5, f"softmax|(B, H, {queries}, Nk)"),
        "product": Node(4, 1, "maps · v"),
        "out": tensor(5, 1, f"out|(B, H, {queries}, D)"),
    }
    edges = "q logits, k logits, logits masked, masked maps, maps product, v product, product out"
    return Picture(nodes, edges, ("logits", "masked", "maps", "product"), "dashed: tile by tile, never in memory")


def _convolution(behind: Mapping[str, Node], edges: str, told: str) -> Picture:
    nodes = {
        "x": tensor(0, 0.5, "x|(B, P + h·w, C)"),
        "before": Node(1, 0, "norm,|activation"),
        "conv": Node(2, 0, "depthwise|k x k on (h, w)"),
        "prefix": Node(2, 1, "P prefix tokens|as they are"),
        **behind,
    }
    return Picture(
        nodes, f"x before, before conv, x prefix, {edges}", [name for name in nodes if name not in ("x", "out")], told
    )


PICTURES = {
    "masked_attention": _attention("Nq"),
    "class_attention": _attention("1…4"),
    "head_mixed_attention": Picture(
        {
            "q": tensor(0, 0, "q|(B, H, Nq, D)"),
            "k": tensor(0, 1, "k|(B, H, Nk, D)"),
            "v": tensor(0, 2, "v|(B, H, Nk, D)"),
            "logits": passing(1, 0.5, "scale · q kᵀ|(B, H, Nq, Nk)"),
            "pre": Node(2, 0.5, "mix heads|H x H"),
            "maps": passing(3, 0.5, "softmax|(B, H, Nq, Nk)"),
            "post": Node(4, 0.5, "mix heads|H x H"),
            "norm": Node(5, 0.5, "norm|over heads"),
            "product": Node(6, 1, "maps · v"),
            "out": tensor(7, 1, "out|(B, H, Nq, D)"),
        },
        "q logits, k logits, logits pre, pre maps, maps post, post norm, norm product, v product, product out",
        ("logits", "pre", "maps", "post", "norm", "product"),
        "dashed: all heads of a few queries at a time, never in memory; mixes and norm may be absent",
    ),
    "token_depthwise_conv": _convolution(
        {
            "behind": Node(3, 0, "norm,|activation"),
            "sum": Node(4, 0, "+ x|(residual)"),
            "out": tensor(5, 0.5, "out|(B, P + h'·w', C)"),
        },
        "conv behind, behind sum, sum out, prefix out",
        "tokens are read as they lie: no transpose to (B, C, h, w) and back",
    ),
    "depthwise_separable_conv": _convolution(
        {
            "behind": Node(3, 0, "BatchNorm"),
            "linear": Node(4, 0.5, "linear|C → O"),
            "out": tensor(5, 0.5, "out|(B, P + h'·w', O)"),
        },
        "conv behind, behind linear, prefix linear, linear out",
        "norm and activation in front are absent here",
    ),
    "conv_projection": Picture(
        {
            "x": tensor(0, 1, "x|(B, P + h·w, C)"),
            **{f"conv_{name}": Node(1, row, "depthwise|k x k") for row, name in enumerate("qkv")},
            **{f"norm_{name}": Node(2, row, "BatchNorm") for row, name in enumerate("qkv")},
            **{f"linear_{name}": Node(3, row, "linear|C → O") for row, name in enumerate("qkv")},
            **{name: tensor(4, row, f"{name}|(B, P + h'·w', O)") for row, name in enumerate("qkv")},
        },
        ", ".join(f"x conv_{n}, conv_{n} norm_{n}, norm_{n} linear_{n}, linear_{n} {n}" for n in "qkv"),
        [f"{step}_{name}" for step in ("conv", "norm", "linear") for name in "qkv"],
        "one reading of x for all three; strides of k and v may differ from that of q",
    ),
    "leff": Picture(
        {
            "x": tensor(0, 0.5, "x|(B, P + h·w, C)"),
            "up": Node(1, 0, "linear|C → E"),
            "first": Node(2, 0, "BatchNorm,|GELU"),
            "conv": Node(3, 0, "depthwise|k x k on (h, w)"),
            "second": Node(4, 0, "BatchNorm,|GELU"),
            "down": Node(5, 0, "linear, BN|E → O"),
            "prefix": Node(3, 1, "P prefix tokens|as they are"),
            "sum": Node(6, 0.5, "+ residual"),
            "out": tensor(7, 0.5, "out|(B, P + h·w, O)"),
        },
        "x up, up first, first conv, conv second, second down, down sum, x prefix, prefix sum, sum out",
        ("up", "first", "conv", "second", "down", "prefix", "sum"),
        "a LayerNorm may stand in front; at inference the BatchNorms are folded",
    ),
    "linear": Picture(
        {
            "x": tensor(0, 0, "x|(…, K)"),
            "norm": Node(1, 0, "LayerNorm"),
            "product": Node(2, 0, "· Wᵀ + bias|K → N"),
            "act": Node(3, 0, "activation"),
            "scale": Node(4, 0, "· LayerScale"),
            "sum": Node(5, 0, "+ residual"),
            "out": tensor(6, 0, "out|(…, N)"),
        },
        "x norm, norm product, product act, act scale, scale sum, sum out",
        ("norm", "product", "act", "scale", "sum"),
        "all but the product may be absent",
    ),
    "mlp": Picture(
        {
            "x": tensor(0, 0, "x|(…, K)"),
            "norm": Node(1, 0, "LayerNorm"),
            "fc1": Node(2, 0, "· W₁ᵀ + bias|K → M"),
            "hidden": passing(3, 0, "activation|(…, M)"),
            "fc2": Node(4, 0, "· W₂ᵀ + bias|M → N"),
            "scale": Node(5, 0, "· LayerScale"),
            "sum": Node(6, 0, "+ residual"),
            "out": tensor(7, 0, "out|(…, N)"),
        },
        "x norm, norm fc1, fc1 hidden, hidden fc2, fc2 scale, scale sum, sum out",
        ("norm", "fc1", "hidden", "fc2", "scale", "sum"),
        "dashed: a block of rows at a time, which stays in the cache",
    ),
    "glu_mlp": Picture(
        {
            "x": tensor(0, 0.5, "x|(…, K)"),
            "norm": Node(1, 0.5, "LayerNorm"),
            "gate": Node(2, 0, "· Wgᵀ + bias,|activation"),
            "value": Node(2, 1, "· Wvᵀ + bias"),
            "hidden": passing(3, 0.5, "gate · value|(…, M)"),
            "inner": Node(4, 0.5, "LayerNorm"),
            "fc2": Node(5, 0.5, "· W₂ᵀ + bias|M → N"),
            "sum": Node(6, 0.5, "· LayerScale|+ residual"),
            "out": tensor(7, 0.5, "out|(…, N)"),
        },
        "x norm, norm gate, norm value, gate hidden, value hidden, hidden inner, inner fc2, fc2 sum, sum out",
        ("norm", "gate", "value", "hidden", "inner", "fc2", "sum"),
        "dashed: in the epilogue of the values' product; both norms may be absent",
    ),
    "conv_batch_norm": Picture(
        {
            "x": tensor(0, 0, "x|(B, C, H, W)"),
            "windows": passing(1, 0, "windows|(B·H'·W', C·k·l)"),
            "product": Node(2, 0, "· Wᵀ + bias|C·k·l → O"),
            "norm": Node(3, 0, "BatchNorm"),
            "act": Node(4, 0, "activation"),
            "out": tensor(5, 0, "out|(B, O, H', W')"),
        },
        "x windows, windows product, product norm, norm act, act out",
        ("windows", "product", "norm", "act"),
        "dashed: read in the map where they lie; the result lies as tokens (B, H'·W', O) do",
    ),
}


def draw(picture: Picture) -> str:
    """The picture as SVG."""
    wide, high = BOX
    centres = {
        name: (MARGIN + wide / 2 + node.column * COLUMN, MARGIN + high / 2 + node.row * ROW)
        for name, node in picture.nodes.items()
    }
    width = max(x for x, _ in centres.values()) + wide / 2 + MARGIN
    height = max(y for _, y in centres.values()) + high / 2 + MARGIN + 22
    xs, ys = zip(*(centres[name] for name in picture.call), strict=True)
    left, top = min(xs) - wide / 2 - 10, min(ys) - high / 2 - 12
    frame = (left, top, max(xs) + wide / 2 + 10 - left, max(ys) + high / 2 + 12 - top)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" font-size="12" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff" rx="6"/>',
        '<rect x="{:g}" y="{:g}" width="{:g}" height="{:g}" fill="#e6f4ea" stroke="#3a8a4d" rx="8"/>'.format(*frame),
    ]
    for edge in picture.edges.split(", "):
        (x1, y1), (x2, y2) = (centres[name] for name in edge.split())
        lines.append(
            f'<path d="M{x1 + wide / 2:g} {y1:g} {x2 - wide / 2 - 2:g} {y2:g}" fill="none" stroke="#444" '
            'marker-end="url(#tip)"/>'
        )
    for name, node in picture.nodes.items():
        x, y = centres[name]
        dashed = ' stroke-dasharray="4 3"' if node.kind == "passing" else ""
        lines.append(
            f'<rect x="{x - wide / 2:g}" y="{y - high / 2:g}" width="{wide}" height="{high}" rx="4" '
            f'fill="{STYLES[node.kind]}" stroke="#444"{dashed}/>'
        )
        parts = node.text.split("|")
        for number, part in enumerate(parts):
            at = y + 4 + 15 * (number - (len(parts) - 1) / 2)
            lines.append(f'<text x="{x:g}" y="{at:g}">{escape(part)}</text>')
    told = escape(f"green: one call; {picture.told}")
    lines += [f'<text x="{width / 2:g}" y="{height - 10:g}" fill="#444">{told}</text>', "</svg>", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(picture), encoding="utf-8")
