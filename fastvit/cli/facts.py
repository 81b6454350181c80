"""``info`` and ``list``: what this machine can run, and the models."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastvit import backends
from fastvit.cli.show import print_json, table
from fastvit.reference.registry import VARIANTS, list_models
from fastvit.reference.weights.official import OFFICIAL


def info(arguments: argparse.Namespace, console: Console) -> int:
    """Versions, devices, backends (with the reasons why one cannot run) and the build."""
    description = backends.describe()
    if arguments.json:
        print_json(description)
        return 0
    console.print(f"fastvit {description['fastvit']} in {escape(description['location'])}", highlight=False)
    if not description["build"]["extension"]:
        console.print(description["build"]["reason"], style="red", markup=False, highlight=False)
    console.print(f"Python {description['python']} on {description['platform']}", highlight=False)
    found = {name: version for name, version in description["versions"].items() if version}
    console.print(", ".join(f"{name} {version}" for name, version in found.items()), highlight=False)
    for name, value in description["environment"].items():
        console.print(f"{name}={escape(value)}", highlight=False)
    console.print(_devices_table(description), _backends_table(description))
    if description["proven"]:
        console.print(description["proven"], highlight=False)
    console.print(_build_table(description["build"]))
    return 0


def list_variants(arguments: argparse.Namespace, console: Console) -> int:
    """The models that match the pattern, with their sizes."""
    names = list_models(arguments.pattern)
    if not names:
        console.print(f"no model matches {arguments.pattern!r}; fastvit list shows all {len(VARIANTS)}")
        return 1
    if arguments.json:
        print_json({name: _facts(name) for name in names})
        return 0
    if arguments.weights:
        for name in names:  # whole lines, so that addresses can be copied
            console.print(
                f"{name}  {OFFICIAL.get(name, 'none published')}", soft_wrap=True, highlight=False, markup=False
            )
        return 0
    shown = table("model", "family", ">image", ">parameters", ">GMACs", title=f"{len(names)} models")
    for name in names:
        facts = _facts(name)
        millions = f"{facts['params'] / 1e6:.2f} M"
        shown.add_row(name, facts["family"], str(facts["img_size"]), millions, f"{facts['gmacs']:.2f}")
    console.print(shown)
    return 0


def _facts(name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    return {
        "family": variant.family,
        "img_size": variant.config.get("img_size", 224),
        "params": variant.params,
        "gmacs": variant.gmacs,
        "weights": OFFICIAL.get(name),
    }


def _backends_table(description: dict[str, Any]) -> Table:
    shown = table("backend", "here", "reasons", title="Backends")
    for name, backend in description["backends"].items():
        reasons = [*backend["reasons"], *([] if backend["allowed"] else ["disabled by FASTVIT_BACKEND"])]
        usable = not reasons
        shown.add_row(name, Text("yes", "green") if usable else Text("no", "red"), escape("; ".join(reasons)))
    return shown


def _devices_table(description: dict[str, Any]) -> Table:
    shown = table("device", "name", "", title="Devices")
    for device in description["devices"]:
        rest = {key: value for key, value in device.items() if key not in ("device", "name")}
        details = ", ".join(f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in rest.items())
        shown.add_row(device["device"], device["name"], details)
    return shown


def _build_table(build: dict[str, Any]) -> Table:
    shown = table("native part", "", title="Build")
    first = {key: build[key] for key in ("extension", "reason")}
    for key, value in {**first, **build}.items():
        if value not in (None, [], {}):
            shown.add_row(key.replace("_", " "), escape(_plain(value)))
    return shown


def _plain(value: Any) -> str:
    """A value of the description as words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(item) or '-'}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(item, (list, tuple)) for item in value)
        return ", ".join("/".join(item) for item in value) if nested else " ".join(map(str, value))
    return str(value)
