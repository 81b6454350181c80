"""Serves a trained, patched model over HTTP, on LitServe: pictures in, labels and probabilities out.

    python examples/serve.py --model runs/ceit/best.safetensors
    curl -F image=@cat.jpg http://127.0.0.1:8000/predict
    curl -H 'Content-Type: application/json' -d '{"image": "'$(base64 -w0 cat.jpg)'"}' http://127.0.0.1:8000/predict

GET /health is 200 once the model is ready, GET /metrics is for Prometheus. A picture is opened by the process that took
its request, which refuses what is none; what arrives within --wait of one another goes through the model together.
SIGTERM and Ctrl-C end it after the requests that have been taken.
"""
# LitServe and FastAPI read annotations as objects: `from __future__ import annotations` would leave them strings.

import argparse
import base64
import binascii
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import litserve  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from fastapi import Depends, HTTPException, Request  # noqa: E402
from fastapi.concurrency import run_in_threadpool  # noqa: E402
from fastapi.responses import PlainTextResponse  # noqa: E402
from starlette.datastructures import UploadFile  # noqa: E402
from torch import Tensor  # noqa: E402

import fastvit  # noqa: E402
from examples.embed import model_arguments  # noqa: E402
from examples.images import OptionError, Prepare, open_picture  # noqa: E402
from examples.models import trained  # noqa: E402
from examples.train import COUNT, PRECISIONS, number  # noqa: E402

EXPECTED = "a form with a file `image`, JSON with base64 in `image`, or a body of type image/*"


# --- Numbers ----------------------------------------------------------------------------------------------------------


class Metrics:
    """Numbers that the processes of the server share: those of COUNTED are added up, those of SET are set."""

    COUNTED = {
        'requests_total{code="2xx"}': "answered",
        'requests_total{code="4xx"}': "refused",
        'requests_total{code="5xx"}': "failed",
        "request_seconds_total": "time from a request to its answer",
        "images_total": "images that went through the model",
        "batches_total": "calls of the model",
        "model_seconds_total": "time in the model",
    }
    SET = {"patched": "whether the model has fused blocks", "memory_bytes": "of the process that holds the model"}

    def __init__(self, patched: bool):
        self.names = [*self.COUNTED, *self.SET]
        self.values = multiprocessing.get_context("spawn").Array("d", len(self.names))
        self["patched"] = float(patched)

    def __getitem__(self, name: str) -> float:
        return self.values[self.names.index(name)]

    def __setitem__(self, name: str, value: float) -> None:
        self.values[self.names.index(name)] = value

    def add(self, **amounts: float) -> None:
        """To those whose names begin so."""
        with self.values.get_lock():
            for name, amount in amounts.items():
                self.values.get_obj()[self.names.index(name)] += amount

    def took(self, status: int, seconds: float) -> None:
        with self.values.get_lock():
            values = self.values.get_obj()
            values[0 if status < 400 else 1 if status < 500 else 2] += 1
            values[self.names.index("request_seconds_total")] += seconds

    def text(self) -> str:
        """In the format that Prometheus reads."""
        lines: list[str] = []
        for name, value in zip(self.names, list(self.values), strict=True):
            metric = f"fastvit_{name.partition('{')[0]}"
            kind = f"# TYPE {metric} {'counter' if name in self.COUNTED else 'gauge'}"
            lines += ([] if kind in lines else [kind]) + [f"fastvit_{name} {value!r}"]
        return "\n".join([*lines, ""])


class Timed:
    """A middleware that counts the requests for predictions, and their time."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self.app(scope, receive, send)
        since, status = time.perf_counter(), 500

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            return await self.app(scope, receive, noted)
        finally:
            self.metrics.took(status, time.perf_counter() - since)


# --- From a request to an answer --------------------------------------------------------------------------------------


async def prepared(request: Request) -> np.ndarray:
    """The picture of a request as the model takes it, (3, H, W) in float32.

    Raises:
        HTTPException: 415 for another type, 400 for a body that is not of its type, 422 for what is no picture.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form() as form:
            file = form.get("image")
            data = await file.read() if isinstance(file, UploadFile) else None
    elif kind == "application/json":
        try:
            body = await request.json()
            text = body.get("image") if isinstance(body, dict) else None
            data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
        except (ValueError, binascii.Error) as error:
            raise HTTPException(400, f"expected {EXPECTED}, got what is not JSON, or not base64: {error}") from error
    elif kind.startswith("image/"):
        data = await request.body()
    else:
        raise HTTPException(415, f"expected {EXPECTED}, got {kind or 'no type'}")
    if data is None:
        raise HTTPException(400, f"expected {EXPECTED}, got no `image`")
    return await run_in_threadpool(_opened, data, request.app.state.prepare)


def _opened(data: bytes, prepare: Prepare) -> np.ndarray:
    try:
        return prepare(open_picture(data, "image")).numpy()
    except Exception as error:  # decoders raise whatever they like
        raise HTTPException(422, str(error).removeprefix("--data: ")) from error


class Classifier(litserve.LitAPI):
    """The model, in a process of its own."""

    def __init__(self, settings: argparse.Namespace, metrics: Metrics):
        super().__init__(max_batch_size=settings.batch, batch_timeout=settings.wait / 1000)
        self.settings, self.metrics = settings, metrics

    def setup(self, device: str) -> None:
        """Load the model; called by the process that holds it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; this one ends last
        self.model, self.names = load(self.settings)
        self.place = torch.device(self.settings.device)
        self.model.to(self.place)
        self.patched = False
        self.predict(torch.zeros(1, *self.model.pretrained_cfg["input_size"]))

    def decode_request(self, request: Annotated[np.ndarray, Depends(prepared)]) -> Tensor:
        return torch.from_numpy(request)

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    @torch.inference_mode()
    def predict(self, x: Tensor) -> list[tuple[list[int], list[float]]]:
        """Images (B, 3, H, W) to the first labels of each, and their probabilities."""
        if self.patched != bool(self.metrics["patched"]):  # /patched/... has been called
            self.patched = not self.patched
            (fastvit.patch if self.patched else fastvit.unpatch)(self.model)
        since, dtype = time.perf_counter(), PRECISIONS[self.settings.precision]
        with torch.autocast(self.place.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(x.to(self.place))
        probabilities, labels = logits.float().softmax(1).topk(min(self.settings.top, logits.shape[1]), dim=1)
        rows = list(zip(labels.tolist(), probabilities.tolist(), strict=True))
        self.metrics.add(images_total=len(x), batches_total=1, model_seconds_total=time.perf_counter() - since)
        self.metrics["memory_bytes"] = psutil.Process().memory_info().rss
        return rows

    def encode_response(self, output: tuple[list[int], list[float]]) -> dict[str, Any]:
        return {"labels": [self.names[label] for label in output[0]], "probabilities": output[1]}


def load(settings: argparse.Namespace) -> tuple[torch.nn.Module, list[str]]:
    """The plain model, and the names of its classes."""
    s = settings
    return trained(s.model, s.weights, classes=s.classes, size=s.size, options=s.model_options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings; argparse reports errors, with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model_arguments(parser)
    add("--precision", choices=tuple(PRECISIONS), default="float32", help="of autocast")
    add("--top", type=COUNT, default=5, help="labels of an answer (default 5)")
    add("--batch", type=number(int, 2), default=8, help="images the model takes at once, at most (default 8)")
    add(
        "--wait",
        type=number(float, 0, above=True),
        default=5.0,
        help="ms for others, before a batch starts (default 5)",
    )
    add("--host", choices=("127.0.0.1", "0.0.0.0", "::"), default="127.0.0.1", help="0.0.0.0: for other machines, too")
    add("--port", type=number(int, 1024, 65535), default=8000, help="(default 8000)")
    add("--servers", type=COUNT, default=1, help="processes that take requests and open pictures (default 1)")
    add("--switch", action="store_true", help="POST /patched/true and /patched/false patch and unpatch the model")
    return parser.parse_args(arguments)


def build(settings: argparse.Namespace) -> litserve.LitServer:
    """The server, which has not been started; OptionError for a model that there is not."""
    torch.set_num_threads(1)  # the processes that take requests are forked from here
    metrics = Metrics(settings.patch)
    api = Classifier(settings, metrics)
    server = litserve.LitServer(api, accelerator="cpu", middlewares=[(Timed, {"metrics": metrics})])
    server.app.state.prepare = fastvit.transform(load(settings)[0])
    allowed = [Depends(server.setup_auth())]

    @server.app.get("/metrics", dependencies=allowed)
    def show() -> PlainTextResponse:
        return PlainTextResponse(metrics.text())

    if settings.switch:

        @server.app.post("/patched/{wanted}", dependencies=allowed)
        def switch(wanted: bool) -> dict[str, bool]:
            metrics["patched"] = float(wanted)
            return {"patched": wanted}

    return server


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; the exit status is 0 after SIGTERM or Ctrl-C, 2 for wrong arguments."""
    settings = parse(arguments)
    try:
        server = build(settings)
    except OptionError as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
        return 2
    own = os.getpid()

    def stop(number: int, frame: Any) -> None:
        """LitServe ends by KeyboardInterrupt; its forked processes come here when they have ended by themselves."""
        if os.getpid() != own:
            raise SystemExit(0)
        # The thread that ends the server where a worker has died asks this each time, and would take what comes now,
        # the end of all workers, for that.
        server._shutdown_event = threading.Event()
        server._shutdown_event.set()
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    address = f"http://{settings.host}:{settings.port}/predict"
    print(f"{settings.model} at {address}", flush=True)
    server.run(
        host=settings.host,
        port=settings.port,
        num_api_servers=settings.servers,
        log_level="warning",
        generate_client_file=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
