"""Creates the virtual environment that make uses, with everything pinned. Needs only Python's standard library.

    python requirements/environment.py demo|train|test|bench|lint|docs|wheel [--venv .venv] [--torch REQUIREMENT]

Torch comes first and alone; whatever else is installed then is held to that torch. A torch already there is kept when
it is new enough: in the virtual environment, or in the Python that runs this (the environment then sees its packages).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEFAULT_TORCH = "torch==2.13.0"
# Exit status 0 if the Python that runs it has torch >= 2.10; its metadata is enough, importing takes seconds.
HAS_TORCH = """
import importlib.metadata as metadata, sys
try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(tuple(map(int, version.split(".")[:2])) < (2, 10))
"""
# Prints what must not change: torch, and the packages it asks for by exact version (a CUDA build: triton, nvidia-*).
PINS_OF_TORCH = """
import importlib.metadata as metadata, re
print("torch==" + metadata.version("torch"))
for requirement in metadata.requires("torch") or []:
    name = re.match(r"[\\w.-]+", requirement)[0]
    if "==" in requirement.split(";")[0]:
        try:
            print(name + "==" + metadata.version(name))
        except metadata.PackageNotFoundError:
            pass  # for another platform or an extra
"""
HAS_TRITON = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)"


def say(message: str) -> None:
    """Tell the user what happens next."""
    print(f"==> {message}", flush=True)


def succeeds(python: Path, code: str) -> bool:
    """Whether that Python runs the code with exit status 0."""
    return subprocess.run([str(python), "-c", code], check=False).returncode == 0


def python_of(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


class Environment:
    """A virtual environment that is being filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = python_of(folder)
        self.constraints = folder / "torch-constraints.txt"

    def create(self) -> None:
        """Make the environment; with sight of this Python's packages where those include a usable torch."""
        if self.python.exists():
            return
        inherit = succeeds(Path(sys.executable), HAS_TORCH)
        say(f"creating {self.folder}" + (" on top of this Python's torch" if inherit else ""))
        nested = sys.prefix != sys.base_prefix
        try:
            venv.create(self.folder, system_site_packages=inherit and not nested, with_pip=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"venv failed ({error}); on Debian and Ubuntu: apt install python3-venv") from error
        if inherit and nested:
            self.see_packages_of_this_environment()

    def see_packages_of_this_environment(self) -> None:
        """Put the packages of the virtual environment that runs this behind the new one's own.

        What venv calls the system's packages are those of the Python both environments were made with.
        """
        code = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
        own = subprocess.run([str(self.python), "-c", code], check=True, capture_output=True, text=True).stdout
        seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        Path(own, "parent-environment.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")

    def pip(self, *arguments: str) -> None:
        """Run pip install, showing its progress."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
        if subprocess.run(command, check=False, cwd=ROOT).returncode != 0:
            raise SystemExit(f"this failed: {' '.join(command)}")

    def install(self, *names: str, dependencies: bool = True) -> None:
        """Install requirement files without touching torch and what belongs to it."""
        arguments = [argument for name in names for argument in ("-r", str(HERE / f"{name}.txt"))]
        arguments += ["-c", str(HERE / "constraints.txt")]
        if self.constraints.exists():
            arguments += ["-c", str(self.constraints)]
        self.pip(*arguments, *([] if dependencies else ["--no-deps"]))

    def install_torch(self, requirement: str | None) -> None:
        """Install the torch asked for; without a wish keep one that is new enough."""
        if requirement is None and succeeds(self.python, HAS_TORCH):
            say("keeping the torch that is there")
        else:
            say(f"installing {requirement or DEFAULT_TORCH}")
            self.pip(*shlex.split(requirement or DEFAULT_TORCH))
            if not succeeds(self.python, HAS_TORCH):
                raise SystemExit(f"TORCH: expected a torch >= 2.10, got {requirement!r}")
        pins = subprocess.run([str(self.python), "-c", PINS_OF_TORCH], check=True, capture_output=True)
        self.constraints.write_bytes(pins.stdout)

    def install_triton(self) -> None:
        """Triton, unless torch brought its own."""
        if not succeeds(self.python, HAS_TRITON):
            say("installing triton")
            self.install("triton")


def main() -> None:
    """Bring the environment to what the named purpose needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("purpose", choices=("demo", "train", "test", "bench", "lint", "docs", "wheel"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", help=f"a pip requirement; by default what is there, or {DEFAULT_TORCH}")
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - this file also runs where fastvit would not
        raise SystemExit(
            f"Python >= 3.10 is needed, this is {sys.version.split()[0]}; make PYTHON=python3.11 names another"
        )
    environment = Environment(arguments.venv.resolve())
    environment.create()
    say(f"installing what `make {arguments.purpose}` needs")
    if arguments.purpose == "lint":  # mypy looks at no torch
        environment.install("runtime", "lint")
        return
    if arguments.purpose in ("docs", "wheel"):
        environment.install(arguments.purpose)
        return
    environment.install_torch(arguments.torch)
    environment.install(arguments.purpose)
    if arguments.purpose in ("test", "bench"):
        environment.install_triton()
    if arguments.purpose != "demo":
        environment.install(f"{'train' if arguments.purpose == 'train' else 'test'}-no-deps", dependencies=False)


if __name__ == "__main__":
    main()
