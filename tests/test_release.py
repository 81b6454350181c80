"""What is released, and what public CI runs: extras and pins, the workflows' commands, a tag and its notes."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit._version import __version__

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Distributions whose import has another name.
IMPORTED_AS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "xdist": "pytest-xdist"}
# What others of the extras bring: these are imported where they are.
BROUGHT_BY = {"fastapi": "litserve", "starlette": "litserve", "scipy": "scikit-learn"}
# Contenders that need an environment of their own.
APART = {"torch_tensorrt", "zentorch"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_extras() -> dict[str, set[str]]:
    """Each extra's distributions, those of the extras it names among them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    stated = {name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (\[.*?\])$", table, re.M | re.S)}

    def closure(extra: str) -> set[str]:
        names: set[str] = set()
        for requirement in stated[extra]:
            if inner := re.fullmatch(r"fastvit\[(.+)\]", requirement):
                names = names.union(*map(closure, inner[1].split(",")))
            else:
                names.add(normal(re.match(r"[\w.-]+", requirement)[0]))
        return names

    return {extra: closure(extra) for extra in stated}


EXTRAS = read_extras()


def pinned(*files: str) -> set[str]:
    """The distributions of requirement files, those of the files they name among them."""
    names: set[str] = set()
    for file in files:
        for line in (ROOT / "requirements" / f"{file}.txt").read_text(encoding="utf-8").splitlines():
            if line.startswith("-r "):
                names |= pinned(line.removeprefix("-r ").removesuffix(".txt"))
            elif line and not line.startswith("#"):
                names.add(normal(re.match(r"[\w.-]+", line)[0]))
    return names


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (["demo"], ["demo"]),
        (["train", "train-no-deps"], ["demo", "train", "embed", "serve"]),
        (["test", "test-no-deps", "bench", "triton"], ["test"]),
        (["docs"], ["docs"]),
    ],
    ids=["demo", "train", "test", "docs"],
)
def test_extras_are_what_the_requirement_files_pin(files: list[str], extras: list[str]) -> None:
    wanted = pinned(*files) - pinned("runtime") - (set() if "test" in files else pinned("build"))
    assert set().union(*(EXTRAS[extra] for extra in extras)) == wanted


def test_every_extra_is_compared() -> None:
    assert set(EXTRAS) == {*"triton demo timm transformers embed serve train bench docs test".split()}
    assert EXTRAS["bench"] - pinned("test", "test-no-deps") == {"openvino"}
    assert set().union(*(names for extra, names in EXTRAS.items() if extra != "docs")) == EXTRAS["test"]


def imports(folder: str) -> set[str]:
    """The distributions that the modules of a folder import, beside the standard library's and our own."""
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    ours = {"fastvit", "benchmarks", "examples", "tests", "torch"}
    return {
        normal(IMPORTED_AS.get(name, BROUGHT_BY.get(name, name)))
        for name in names - ours - APART - {*sys.stdlib_module_names}
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("examples", ["train", "embed", "serve"]), ("benchmarks", ["bench", "triton", "test"]), ("tests", ["test"])],
)
def test_extras_bring_what_is_imported(folder: str, extras: list[str]) -> None:
    found = imports(folder)
    assert len(found) > 5
    assert found <= pinned("runtime").union(*(EXTRAS[extra] for extra in extras))


def commands() -> list[str]:
    """Of the workflows' steps."""
    return [line for path in WORKFLOWS for line in re.findall(r"\brun: (?!\|)(.+)", path.read_text(encoding="utf-8"))]


def test_commands_of_the_workflows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    named = [re.sub(r'"[^"]*"', "x", command) for command in commands()]
    assert {"make lint", "make docs", "make wheel"} <= set(named)
    for command in named:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), command
            assert {word.partition("=")[0] for word in words[2:]} <= variables, command
        elif words[0] == "python3":
            assert (ROOT / words[1]).is_file(), command
        elif words[0] == "sudo":
            assert words[1:4] == ["apt-get", "install", "--yes"], command
        else:
            assert words[:3] == ["gh", "release", "create"], command


def test_workflows_test_what_the_metadata_promises() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    ci, release = (path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.+)\]", ci)[1]) == promised
    assert [f"3.{minor}" for minor in re.findall(r"/cp3(\d+)-cp3\1/bin/python\n(?! *PYTHONS)", release)] == promised
    assert re.search(r"PYTHONS: (python3.+)", release)[1].split() == [f"python{version}" for version in promised]
    assert re.search(r"python-version: \|\s+((3\.\d+\s+)+)", release)[1].split() == promised
    (oldest,) = re.findall(r'"torch>=(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"torch=={oldest}.0 " in ci and f"torch=={oldest}.0 " in release


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_takes_the_workflows_commands() -> None:
    """Every command as the shell would read it, without running it."""
    for command in commands():
        if command.startswith("make "):
            dry = ["bash", "-c", command.replace("make ", "make --dry-run --always-make ", 1)]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (command, done.stderr)


class TestRelease:
    """requirements/release.py, on a copy of the files it reads."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "fastvit").mkdir()
        for name, text in {
            "fastvit/_version.py": '"""The version."""\n\n__version__ = "1.2.3"\n',
            "CITATION.cff": "type: software\nversion: 1.2.3\n",
            "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2027-01-31)\n\n- New.\n\n## 1.2.2 (2026-12-01)\n\n- Old.\n",
        }.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    @staticmethod
    def notes(tag: str, root: Path) -> str:
        return runpy.run_path(str(ROOT / "requirements" / "release.py"))["notes"](tag, root)

    def test_notes_are_the_first_part_of_the_changelog(self, root: Path) -> None:
        assert self.notes("v1.2.3", root) == "- New.\n"

    @pytest.mark.parametrize("tag", ["v1.2.2", "1.2.3", "v1.2.3rc1", ""])
    def test_another_tag_is_refused(self, root: Path, tag: str) -> None:
        with pytest.raises(SystemExit, match=re.escape(f"expected v1.2.3 (fastvit/_version.py), got {tag!r}")):
            self.notes(tag, root)

    @pytest.mark.parametrize(
        ("file", "old", "new", "message"),
        [
            ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff: expected version 1.2.3"),
            ("CHANGELOG.md", "(2027-01-31)", "(unreleased)", r"CHANGELOG.md: .* got '1.2.3 \(unreleased\)'"),
            ("CHANGELOG.md", "## 1.2.3", "## 1.2.4", "CHANGELOG.md: expected its first part to be of 1.2.3"),
        ],
    )
    def test_files_that_disagree_are_refused(self, root: Path, file: str, old: str, new: str, message: str) -> None:
        text = (root / file).read_text(encoding="utf-8")
        (root / file).write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            self.notes("v1.2.3", root)

    def test_this_version_is_not_released_before_its_date_is_known(self) -> None:
        """The command, on the files as they are: notes, or what is missing."""
        version = re.search(r'"(.+)"\n', (ROOT / "fastvit/_version.py").read_text("utf-8").partition("__version__")[2])[
            1
        ]
        command = [sys.executable, "requirements/release.py", f"v{version}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        unreleased = f"## {__version__} (unreleased)" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        assert (done.returncode != 0) is unreleased, done.stderr
        assert ("(unreleased)" in done.stderr) is unreleased
