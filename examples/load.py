"""Tries examples/serve.py under load: the same answers as of the plain model, no growth of memory, a clean end.

    python examples/load.py --data pictures/ --model runs/ceit/best.safetensors --clients 8 --seconds 60

starts the server on the loopback, sends it pictures of the folder for a while, and ends it. Further options are the
server's; with --switch the model is patched and unpatched all the while. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: make the packages beside it importable
    sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastvit  # noqa: E402
from examples import serve  # noqa: E402
from examples.images import SUFFIXES, OptionError, open_picture  # noqa: E402
from examples.train import COUNT, POSITIVE  # noqa: E402
from fastvit.accuracy import is_accurate  # noqa: E402

WARM = 0.25
"""Part of the time after which memory is expected to stay as it is."""
GROWTH = 1.1
"""Of memory behind that: what an allocator may still take, where a leak would go on."""


def ask(connection: http.client.HTTPConnection, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an answer; a POST of a picture where there is a body."""
    connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "image/*"} if body else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def expected(settings: argparse.Namespace, paths: Sequence[Path]) -> tuple[Tensor, Tensor, list[str]]:
    """The plain model's probabilities (pictures, classes), called directly, in float32 and float64, and the names."""
    model, names = serve.load(settings)
    prepare = fastvit.transform(model)
    images = torch.stack([prepare(open_picture(path, str(path))) for path in paths])
    with torch.inference_mode():
        plain = torch.cat([model(image[None]).softmax(1) for image in images])
        exact = torch.cat([model.double()(image[None].double()).softmax(1) for image in images])
    return plain, exact, names


class Load:
    """Clients of a server, and what they were answered."""

    def __init__(self, port: int, bodies: Sequence[bytes], clients: int, seconds: float, switch: bool):
        self.port, self.bodies, self.seconds, self.switch = port, bodies, seconds, switch
        self.answers: dict[tuple[int, str], int] = {}
        """How often (picture, answer) came."""
        self.times: list[float] = []
        self.failed: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client, args=(number,)) for number in range(clients)]

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def client(self, first: int) -> None:
        """Requests one after the other, on one connection."""
        try:
            connection = self.connection()
            for number in itertools.count(first):
                if time.perf_counter() > self.end:
                    break
                place, since = number % len(self.bodies), time.perf_counter()
                status, answer = ask(connection, "/predict", self.bodies[place])
                with self.lock:
                    self.times.append(time.perf_counter() - since)
                    key = place, answer.decode()
                    self.answers[key] = self.answers.get(key, 0) + 1
                    if status != 200:
                        self.failed.append(f"status {status}: {answer[:200]!r}")
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            self.failed.append(f"{type(error).__name__}: {error}")

    def run(self, processes: Sequence[psutil.Process]) -> None:
        """The whole of it; meanwhile the memory is watched, and the model is switched."""
        begun = time.perf_counter()
        self.end = begun + self.seconds
        for thread in self.threads:
            thread.start()
        connection, patched = self.connection(), True
        while time.perf_counter() < self.end:
            self.memory.append((time.perf_counter() - begun, sum(each.memory_info().rss for each in processes)))
            if self.switch:
                patched = not patched
                ask(connection, f"/patched/{str(patched).lower()}", b"x")
            time.sleep(min(0.25, self.seconds / 20))
        for thread in self.threads:
            thread.join()
        connection.close()

    def growth(self) -> float:
        """Memory at the end over that when it was warm, of medians."""
        warm = [used for when, used in self.memory if WARM * self.seconds < when <= 2 * WARM * self.seconds]
        last = [used for when, used in self.memory if when > (1 - WARM) * self.seconds]
        return sorted(last)[len(last) // 2] / sorted(warm)[len(warm) // 2] if warm and last else 1.0

    def wrong(self, plain: Tensor, exact: Tensor, names: list[str]) -> list[str]:
        """What is wrong with the answers, if anything."""
        found = list(self.failed[:3])
        for (place, answer), times in self.answers.items() if not self.failed else ():
            told = json.loads(answer)
            labels = [names.index(label) for label in told["labels"]]
            got = torch.tensor(told["probabilities"])
            # The k-th greatest is held to the k-th greatest, too: no label may stand for a likelier one.
            for judged in (lambda p, labels=labels: p[labels], lambda p, labels=labels: p.topk(len(labels)).values):
                if not is_accurate(got, judged(plain[place]), judged(exact[place])):
                    found.append(f"picture {place}: {times} times {answer}")
                    break
        return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Try it; the exit status is 0 if all was right, 1 if not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of pictures, of which 32 are sent")
    parser.add_argument("--clients", type=COUNT, default=8, help="(default 8)")
    parser.add_argument("--seconds", type=POSITIVE, default=60.0, help="(default 60)")
    own, rest = parser.parse_known_args(arguments)
    settings = serve.parse(rest)
    try:
        paths = sorted(path for path in own.data.rglob("*") if path.suffix.lower() in SUFFIXES)[:32]
        if not paths:
            raise OptionError(f"--data: expected a folder of pictures, got {str(own.data)!r}")
        wanted = expected(settings, paths)
    except OptionError as error:
        print(f"load.py: error: {error}", file=sys.stderr)
        return 2
    port = free_port()
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), *rest, "--port", str(port)]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        load = Load(port, [path.read_bytes() for path in paths], own.clients, own.seconds, settings.switch)
        wait_for(server, load)
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        load.run(processes)
        connection = load.connection()
        told = ask(connection, "/metrics")[1].decode()
        connection.close()
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
        left = psutil.wait_procs(processes, timeout=5)[1]
    finally:
        for each in psutil.Process(server.pid).children(recursive=True) if server.poll() is None else ():
            each.kill()
        server.kill()
        server.wait()
    times = sorted(load.times)
    p50, p99 = (1000 * times[int(part * len(times))] if times else float("nan") for part in (0.5, 0.99))
    counted = {name: float(value) for name, value in re.findall(r"^fastvit_(\w+) (\S+)$", told, re.MULTILINE)}
    batch = counted["images_total"] / max(1.0, counted["batches_total"])
    print(
        f"{len(times)} requests of {own.clients} clients in {own.seconds:g} s: {len(times) / own.seconds:.1f} images/s"
        f", {p50:.1f} ms (median), {p99:.1f} ms (99 %); {batch:.1f} images a batch; "
        f"memory {load.memory[-1][1] / 2**20:.0f} MiB, {load.growth():.3f} of what it was"
    )
    wrong = load.wrong(*wanted)
    wrong += [f"memory grew to {load.growth():.2f} of what it was"] if load.growth() > GROWTH else []
    wrong += [f"the server ended with status {status}"] if status else []
    wrong += [f"process {each.pid} did not end" for each in left]
    print("\n".join(wrong) or "the answers are the model's, memory stayed, and the server ended cleanly")
    return 1 if wrong or not times else 0


def wait_for(server: subprocess.Popen, load: Load) -> None:
    """Until the server is healthy."""
    while server.poll() is None:
        try:
            connection = load.connection()
            if ask(connection, "/health")[0] == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise SystemExit(f"load.py: error: the server ended with status {server.returncode}")


if __name__ == "__main__":
    sys.exit(main())
