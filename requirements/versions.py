"""Installs each line of versions.txt into a folder of its own, without dependencies: versions.py FOLDER."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def lines() -> list[list[str]]:
    """The requirements of each folder."""
    text = Path(__file__).with_name("versions.txt").read_text(encoding="utf-8")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def main(folder: Path) -> None:
    """Install what is not there yet."""
    for requirements in lines():
        target = folder / requirements[0]
        if target.exists():
            continue
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--quiet"]
        done = subprocess.run([*command, "--target", str(target), *requirements], check=False)
        if done.returncode != 0:
            raise SystemExit(f"{requirements[0]} cannot be installed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
