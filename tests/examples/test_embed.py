"""examples/embed.py: every image once, in the order of its part, from each kind of source, through kills and damage."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastvit
from examples import embed
from examples.models import build
from tests.examples.pictures import make_folder, make_shards, pictures

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open

ROOT = Path(__file__).parents[2]
OPTIONS = ["embed_dim=16", "depth=2", "num_heads=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "deit.pth"
    torch.save(build("deit", 3, options=OPTIONS).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("names") / "classes.txt"
    path.write_text("sky\ngrass\nfire\n")
    return path


def arguments(out: Path, data: Path | str, weights: Path, *others: str) -> list[str]:
    model = ["--model", "deit", "--model-options", *OPTIONS, "--weights", str(weights)]
    return ["--data", str(data), "--out", str(out), *model, "--device", "cpu", "--workers", "0", *others]


def run(*given) -> None:
    assert embed.main(arguments(*given)) == 0


def rows(out: Path) -> list[dict]:
    return parquet.read_table(out).to_pylist()


def plain(weights: Path, folder: Path, files: list[str], features: bool = True) -> torch.Tensor:
    """What the model, not patched, says of each picture."""
    model = build("deit", 3, options=OPTIONS).eval()
    fastvit.load_weights(model, weights)
    prepare = fastvit.transform(model)
    with torch.no_grad():
        images = torch.stack([prepare(Image.open(folder / file)) for file in files])
        return model.forward_head(model.forward_features(images), pre_logits=features)


def test_features_of_a_folder(folder, weights, tmp_path, capsys):
    run(tmp_path / "out", folder, weights, "--part", "7", "--batch", "3")
    found = rows(tmp_path / "out")
    assert [row["file"] for row in found] == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert {row["error"] for row in found} == {None}
    expected = plain(weights, folder, [row["file"] for row in found])
    torch.testing.assert_close(torch.tensor([row["features"] for row in found]), expected, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "out").iterdir())) == 5  # 30 pictures
    said = capsys.readouterr().out
    assert re.search(r"part 2 of 5: 14 images, \d+ images/s, 0 errors, \d+ s left", said)
    assert "30 images, 0 of them errors" in said


def test_labels(folder, weights, names, tmp_path, capsys):
    options = ["--output", "labels", "--classes", str(names), "--top"]
    assert embed.main(arguments(tmp_path / "out", folder, weights, *options, "4")) == 2
    assert "--top: expected at most the number of classes, 3, got 4" in capsys.readouterr().err
    run(tmp_path / "out", folder, weights, *options, "2")
    found = rows(tmp_path / "out")
    expected = plain(weights, folder, [row["file"] for row in found], features=False).softmax(1).topk(2)
    torch.testing.assert_close(
        torch.tensor([row["probabilities"] for row in found]), expected.values, rtol=1e-4, atol=1e-5
    )
    words = names.read_text().split()
    assert [row["labels"] for row in found] == [[words[i] for i in row] for row in expected.indices.tolist()]


def test_what_is_no_image_is_recorded(weights, names, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "pictures", count=4)
    run(tmp_path / "whole", folder, weights)
    whole = {row["file"]: row["features"] for row in rows(tmp_path / "whole")}
    files = sorted(whole)
    (folder / files[0]).write_bytes(b"no picture")
    (folder / files[4]).write_bytes((folder / files[4]).read_bytes()[:200])
    (folder / files[5]).write_bytes(b"")
    Image.new("RGB", (64, 64)).save(folder / files[11])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)  # it refuses what has more than twice as many
    for workers, output in (("0", "features"), ("2", "labels")):
        out = tmp_path / workers
        options = ["--classes", str(names), "--part", "5", "--batch", "2", "--workers", workers, "--output", output]
        run(out, folder, weights, *options)
        found = {row["file"]: row for row in rows(out)}
        assert sorted(found) == files
        assert [file for file in files if found[file]["error"]] == [files[0], files[4], files[5], files[11]]
        assert f"{files[0]} is not a picture that Pillow can read" in found[files[0]]["error"]
        assert "DecompressionBomb" in found[files[11]]["error"]
        for file, row in found.items():
            assert (row[output] is None) == (row["error"] is not None)
            if output == "features" and row["error"] is None:
                torch.testing.assert_close(torch.tensor(row["features"]), torch.tensor(whole[file]))


def test_shards(weights, tmp_path):
    pytest.importorskip("webdataset")
    data, _ = make_shards(tmp_path)
    run(tmp_path / "whole", data, weights)
    whole = {row["file"]: row["features"] for row in rows(tmp_path / "whole")}
    cut = tmp_path / "part-01.tar"
    with tarfile.open(cut) as archive:
        members = [member for member in archive if member.name.endswith("png")]
    assert len(whole) == 48 and f"{cut}/{members[3].name}" in whole
    cut.write_bytes(cut.read_bytes()[: members[3].offset_data + 700])
    run(tmp_path / "cut", data, weights, "--workers", "2")
    found = {row["file"]: row for row in rows(tmp_path / "cut")}
    wrong = {file: row["error"] for file, row in found.items() if row["error"]}
    assert wrong.keys() == {str(cut)} and "cannot be read any further" in wrong[str(cut)]
    good = [file for file in whole if not file.startswith(str(cut)) or file <= f"{cut}/{members[1].name}"]
    assert sorted(good) == sorted(found.keys() - wrong.keys())
    got, expected = (
        torch.tensor([found[file]["features"] for file in good]),
        torch.tensor([whole[file] for file in good]),
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_parquet(kind, folder, weights, tmp_path):
    images: list = []
    for _, picture in pictures(4):
        file = io.BytesIO()
        picture.save(file, "png")
        images.append(file.getvalue())
    images[3], images[5] = None, b"no picture"
    values = images if kind == "bytes" else [{"bytes": each, "path": None} for each in images]
    for number, first in enumerate((0, 6)):
        table = pa.table({"id": range(6), "img": values[first : first + 6]})
        parquet.write_table(table, tmp_path / f"in-{number}.parquet", row_group_size=4)
    run(tmp_path / "out", tmp_path / "in-*.parquet", weights, "--column", "img")
    found = rows(tmp_path / "out")
    assert [row["file"] for row in found] == [f"{tmp_path}/in-{n}.parquet#{row}" for n in (0, 1) for row in range(6)]
    assert [number for number, row in enumerate(found) if row["error"]] == [3, 5]
    assert len(list((tmp_path / "out").iterdir())) == 4
    for number, (_, picture) in enumerate(pictures(4)):
        picture.save(tmp_path / f"{number}.png")
    good = [number for number in range(12) if number not in (3, 5)]
    expected = plain(weights, tmp_path, [f"{number}.png" for number in good])
    got = torch.tensor([found[number]["features"] for number in good])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="processes that end with their parent are Linux's")
def test_killed_on_two_processes_and_taken_up_by_others(folder, weights, tmp_path, monkeypatch):
    """By torchrun, ended in the middle by a signal that nothing can catch; then on three."""
    out = tmp_path / "out"
    options = arguments(out, folder, weights, "--part", "1", "--batch", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    halting = tmp_path / "halting.py"  # each process reads three pictures, and would then for ever read the next
    halting.write_text(
        "import ctypes, itertools, sys, time\n"
        "ctypes.CDLL(None).prctl(1, 9)\n"  # torchrun's processes have sessions of their own, and would outlive it
        "from examples import embed\nread, count = embed.open_picture, itertools.count()\n"
        "embed.open_picture = lambda *given: (time.sleep(3600 * (next(count) > 2)), read(*given))[1]\n"
        "sys.exit(embed.main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log").open("w")
    started = subprocess.Popen(
        [*command, str(halting), *options], cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=log
    )
    try:
        while len(list(out.glob("*.parquet"))) < 6:
            assert started.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        log.close()
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(written) == 6
    (out / "part-000029.parquet.tmp").write_bytes(b"half")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert embed.main(options) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert sorted(path.name for path in out.iterdir()) == [embed.Embedding.file(number) for number in range(30)]
    found = rows(out)
    assert [row["file"] for row in found] == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    expected = plain(weights, folder, [row["file"] for row in found])
    torch.testing.assert_close(torch.tensor([row["features"] for row in found]), expected, rtol=1e-4, atol=1e-5)


def test_interrupted(folder, weights, tmp_path, monkeypatch, capsys):
    write, calls = embed.Embedding.write, []

    def interrupted(self, *given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        write(self, *given)

    options = arguments(tmp_path, folder, weights, "--part", "8")
    monkeypatch.setattr(embed.Embedding, "write", interrupted)
    assert embed.main(options) == 130
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(embed.Embedding, "write", write)
    assert embed.main(options) == 0
    assert len(rows(tmp_path)) == 30
    assert "the same command goes on" in capsys.readouterr().err


def test_other_settings_and_other_images_are_refused(folder, weights, tmp_path, capsys):
    options = arguments(tmp_path / "out", folder, weights, "--part", "10")
    assert embed.main(options) == 0
    other = make_folder(tmp_path / "other", count=11)
    for wrong, message in (
        (["--output", "labels"], "--output: expected 'features', with which .*part-000000.parquet was written"),
        (["--model", "vit"], "--model: expected 'deit', with which"),
        (["--part", "11"], "part-000000.parquet is of other images than those of --data, or of another --part"),
        (["--part", "15"], "part-000002.parquet is of other images"),
        (["--data", str(other)], "part-0000.*.parquet is of other images"),
    ):
        assert embed.main([*options, *wrong]) == 2
        assert re.search(message, capsys.readouterr().err)
    (tmp_path / "out" / "part-000001.parquet").write_bytes(b"nothing")
    assert embed.main(options) == 2
    assert "part-000001.parquet was not written by embed.py" in capsys.readouterr().err


WRONG = {
    "--data nowhere": "--data: expected a folder, shards that end in .tar, or .parquet files, got 'nowhere'",
    "--data nowhere.tar": "--data: there is no file nowhere.tar",
    "--data nowhere.parquet": "--data: expected rows in nowhere.parquet, got none",
    "--model cvtt --weights x": "--model cvtt: name: unknown model 'cvtt'",
    "--weights nowhere.pth": "--weights: .*nowhere.pth",
    "--model runs/x.safetensors": "--weights: the checkpoint of a run has its own",
    "--classes nowhere.txt": "--classes: .*nowhere.txt",
    "--device gpu": "argument --device: expected one that is here, got 'gpu'",
    "--batch 0": "argument --batch: expected a whole number of at least 1, got '0'",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments(options, folder, weights, tmp_path, capsys):
    if "tar" in options:
        pytest.importorskip("webdataset")
    try:
        status = embed.main([*arguments(tmp_path / "out", folder, weights), *options.split()])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and re.search(WRONG[options], said), said
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_refused(folder, tmp_path, capsys):
    assert embed.main(["--data", str(folder), "--out", str(tmp_path / "out"), "--model", "vit", "--device", "cpu"]) == 2
    assert "--weights: expected a file with the weights of vit, got none" in capsys.readouterr().err


def test_a_missing_pyarrow_is_named(folder, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, "pa", None)
    assert embed.main(arguments(tmp_path, folder, weights)) == 2
    assert "pip install pyarrow" in capsys.readouterr().err
