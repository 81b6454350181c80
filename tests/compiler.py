"""A compiler that takes objects from a checkout's build where it would make the same: ``compiler.py CHECKOUT CXX ...``.

It does so where the checkout's ninja file, which must have nothing to do, has the very same command but for the folder
and the compiler's path, and no file of csrc differs. Anything else is compiled.
"""

from __future__ import annotations

import filecmp
import os
import shlex
import shutil
import sys
from pathlib import Path


def kept_object(checkout: Path, compiler: str, arguments: list[str]) -> Path | None:
    """The checkout's object for these arguments; None where there is none, or another."""
    if "-c" not in arguments or "-o" not in arguments:
        return None
    source, target = (Path(arguments[arguments.index(option) + 1]) for option in ("-c", "-o"))
    root = next((folder for folder in source.parents if (folder / "setup.py").is_file()), None)
    if root is None or not target.is_relative_to(root):
        return None
    kept = checkout / target.relative_to(root)
    ninja = next((folder / "build.ninja" for folder in kept.parents if (folder / "build.ninja").is_file()), None)
    if ninja is None or not kept.is_file():
        return None
    asked = [word.replace(str(root), str(checkout)) for word in arguments]
    lines = (shlex.split(line.partition("cmd = ")[2]) for line in ninja.read_text(encoding="utf-8").splitlines())
    if not any(words[1:] == asked and shutil.which(words[0]) == shutil.which(compiler) for words in lines if words):
        return None
    files = [path for path in (checkout / "csrc").rglob("*.*") if path.is_file()]
    same = all(filecmp.cmp(path, root / path.relative_to(checkout), shallow=False) for path in files)
    return kept if same else None


def main(checkout: str, compiler: str, *arguments: str) -> None:
    """Copy the object, or become the compiler."""
    kept = kept_object(Path(checkout), compiler, list(arguments))
    if kept is None:
        os.execvp(compiler, [compiler, *arguments])
    target = Path(arguments[arguments.index("-o") + 1])
    shutil.copyfile(kept, target)
    target.with_suffix(".d").write_text(f"{target}:\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
