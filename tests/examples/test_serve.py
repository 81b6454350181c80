"""examples/serve.py and load.py: answers, refusals, numbers, switching under load, and the end."""

from __future__ import annotations

import base64
import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastvit
from examples.models import build

for library in ("litserve", "python_multipart", "psutil"):
    pytest.importorskip(library)
from examples import load, serve  # noqa: E402

ROOT = Path(__file__).parents[2]
OPTIONS = ["embed_dim=16", "depth=2", "num_heads=2"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("served")
    torch.save(build("deit", 3, options=OPTIONS).state_dict(), folder / "deit.pth")
    (folder / "classes.txt").write_text("sky\ngrass\nfire\n")
    model = ["--model", "deit", "--model-options", *OPTIONS, "--weights", str(folder / "deit.pth")]
    return [*model, "--classes", str(folder / "classes.txt"), "--device", "cpu"]


@pytest.fixture(scope="module")
def port(arguments) -> Iterator[int]:
    """Of a server, which ends cleanly when it is told to."""
    found = load.free_port()
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), *arguments, "--port", str(found), "--top", "2"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        load.wait_for(server, load.Load(found, [], 0, 1.0, switch=False))
        yield found
        server.send_signal(signal.SIGTERM)
        said = server.communicate(timeout=60)[1]
        assert server.returncode == 0 and "Traceback" not in said, said
    finally:
        server.kill()


def post(port: int, body: bytes, kind: str | None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/predict", body, {} if kind is None else {"Content-Type": kind})
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told


def form(name: str, data: bytes) -> tuple[bytes, str]:
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    return head.encode() + data + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


def in_json(value: object) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"


def metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = load.ask(connection, "/metrics")[1].decode()
    connection.close()
    return {name: float(value) for name, value in re.findall(r"^fastvit_(\S+) (\S+)$", text, re.MULTILINE)}


def test_answers_are_the_models(port, folder, arguments):
    path = sorted(folder.rglob("*.png"))[0]
    model, names = serve.load(serve.parse(arguments))
    with torch.no_grad():
        expected = model(fastvit.transform(model)(Image.open(path))[None]).softmax(1)[0].topk(2)
    data, before = path.read_bytes(), metrics(port)
    answers = [
        post(port, *form("image", data)),
        post(port, *in_json({"image": base64.b64encode(data).decode()})),
        post(port, data, "image/png"),
    ]
    for status, told in answers:
        assert status == 200 and told["labels"] == [names[label] for label in expected.indices]
        torch.testing.assert_close(torch.tensor(told["probabilities"]), expected.values, rtol=1e-4, atol=1e-6)
    after = metrics(port)
    assert after["images_total"] - before["images_total"] == 3 and after["patched"] == 1
    assert after['requests_total{code="2xx"}'] - before['requests_total{code="2xx"}'] == 3
    assert after["memory_bytes"] > 1e6 and after["model_seconds_total"] > before["model_seconds_total"]


REFUSED = {
    "no picture": (form("image", b"no picture"), 422, "image is not a picture that Pillow can read"),
    "empty": (form("image", b""), 422, "image is not a picture that Pillow can read"),
    "another field": (form("file", b"x"), 400, "got no `image`"),
    "no base64": (in_json({"image": "%%%"}), 400, "not base64"),
    "a number": (in_json({"image": 5}), 400, "got no `image`"),
    "a list": (in_json([1]), 400, "got no `image`"),
    "no JSON": ((b"{", "application/json"), 400, "not JSON"),
    "base64 of no picture": (in_json({"image": "aGVsbG8="}), 422, "not a picture"),
    "text": ((b"hello", "text/plain"), 415, "expected a form with a file `image`, .*, got text/plain"),
    "nothing": ((b"", None), 415, "got no type"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, port):
    (body, kind), status, message = REFUSED[what]
    before = metrics(port)
    got, told = post(port, body, kind)
    assert got == status and re.search(message, told["detail"]), told
    after = metrics(port)
    assert after['requests_total{code="4xx"}'] - before['requests_total{code="4xx"}'] == 1
    assert after["images_total"] == before["images_total"]


def test_under_load(arguments, folder, capfd):
    """Patched and unpatched all the while."""
    given = ["--data", str(folder), "--clients", "4", "--seconds", "4", "--switch", *arguments]
    status = load.main(given)
    said = capfd.readouterr()
    assert status == 0, said
    assert "the answers are the model's, memory stayed, and the server ended cleanly" in said.out
    assert "Traceback" not in said.err


def test_other_answers_are_found(arguments, folder):
    paths = sorted(folder.rglob("*.png"))[:2]
    plain, exact, names = load.expected(serve.parse(arguments), paths)
    tried = load.Load(0, [], 0, 1.0, switch=False)
    values, labels = plain[0].topk(2)
    right = {"labels": [names[label] for label in labels], "probabilities": values.tolist()}
    tried.answers = {(0, json.dumps(right)): 1}
    assert tried.wrong(plain, exact, names) == []
    for wrong in (
        {**right, "probabilities": [float(values[0]) * 1.001, float(values[1])]},
        {**right, "labels": right["labels"][::-1]},
        {
            "labels": [names[label] for label in plain[0].topk(3).indices[1:]],
            "probabilities": plain[0].topk(3).values[1:].tolist(),
        },
    ):
        tried.answers = {(0, json.dumps(wrong)): 7}
        assert "picture 0: 7 times" in tried.wrong(plain, exact, names)[0]
    tried.seconds, tried.memory = 10.0, [(second, 100.0 + 5 * second) for second in range(11)]
    assert tried.growth() > load.GROWTH


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch", "1"], "argument --batch: expected a whole number of at least 2, got '1'"),
        (["--port", "80"], "argument --port: expected a whole number of at least 1024 and at most 65535, got '80'"),
        (["--weights", "nowhere.pth"], "--weights: .*nowhere.pth"),
        (["--model", "cvtt"], "--model cvtt: name: unknown model 'cvtt'"),
    ],
)
def test_wrong_arguments(wrong, message, arguments, capsys):
    threads = torch.get_num_threads()
    try:
        status = serve.main([*arguments, *wrong])
    except SystemExit as error:
        status = error.code
    finally:
        torch.set_num_threads(threads)
    assert status == 2 and re.search(message, capsys.readouterr().err)
