"""What must be true of a tag before it is released: release.py TAG prints the release's notes, from CHANGELOG.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, root: Path = ROOT) -> str:
    """The part of CHANGELOG.md about a tag's version; SystemExit if the tag is not that of a release."""
    stated = re.search(r'^__version__ = "(.+)"$', (root / "fastvit/_version.py").read_text("utf-8"), re.MULTILINE)
    if stated is None or tag != f"v{stated[1]}":
        wanted = "no version" if stated is None else f"v{stated[1]}"
        raise SystemExit(f"the tag: expected {wanted} (fastvit/_version.py), got {tag!r}")
    if f"\nversion: {stated[1]}\n" not in (root / "CITATION.cff").read_text("utf-8"):
        raise SystemExit(f"CITATION.cff: expected version {stated[1]}")
    heading, *rest = re.split(r"^## ", (root / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)[1].split("\n", 1)
    if not re.fullmatch(rf"{re.escape(stated[1])} \(\d{{4}}-\d\d-\d\d\)", heading):
        raise SystemExit(f"CHANGELOG.md: expected its first part to be of {stated[1]} (YYYY-MM-DD), got {heading!r}")
    return "".join(rest).strip() + "\n"


if __name__ == "__main__":
    print(notes(*sys.argv[1:2] or [""]), end="")
