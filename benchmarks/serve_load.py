"""Does the service keep what it promises under load? Many clients at once, every answer compared with the model's own.

    python benchmarks/serve_load.py --model efficientnet_lite0.in1k --seconds 60 --out results/serve_load.json
    python benchmarks/serve_load.py --broken 0.05 --out results/serve_load_broken.json

`--clients` connections each send one photograph after another (a closed loop) to `effnet serve`, which runs beside them
on the same machine. An answer is wrong when the best class differs from what the engine says of that image alone, or
its probability by more than `--tolerance`; a request is lost when it has no answer. Both must be zero.

Throughput is a share of the engine's own at that batch: `--workers` processes that do nothing but call it on prepared
images, with the same threads, measured in the same run before and after the load; so HTTP, decoding and the clients
themselves are what the share loses. With `--broken`, periods with and without broken uploads alternate (A B B A), and
the good requests of both are compared. Memory: resident bytes of the front and of the workers after the first
1,000 requests and after `--requests`. The last line of stdout is one JSON document.
"""

import argparse
import asyncio
import importlib.resources
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
SETTLED = 1000  # requests before anything counts, and between two readings of memory


# --- the images -----------------------------------------------------------------------------------------------------


def photographs(count: int, px: int) -> list[bytes]:
    """JPEGs of parts of scikit-image's photographs, `px` wide."""
    from PIL import Image

    draw, made = random.Random(0), []
    for number in range(count):
        photo = Image.open(str(importlib.resources.files("skimage") / "data" / PHOTOS[number % len(PHOTOS)]))
        side = draw.randint(200, min(photo.size))
        left, top = (draw.randint(0, whole - side) for whole in photo.size)
        part = photo.convert("RGB").crop((left, top, left + side, top + side)).resize((px, px * 3 // 4))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=88)
        made.append(file.getvalue())
    return made


def broken_uploads(good: bytes) -> list[tuple[bytes, int]]:
    """Bodies that are no good image, and the status that each must get."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return [
        (good[: len(good) // 3], 422),
        (b"GIF89a" + bytes(50), 422),
        (b"text, no image", 415),
        (bomb, 413),
        (b"", 422),
    ]


# --- the engine's own speed -----------------------------------------------------------------------------------------


def engine_rate(options: argparse.Namespace) -> float:
    """Images per second of `workers` processes that only call the engine, all at the same time."""
    command = [sys.executable, __file__, "--engine-only", *sys.argv[1:]]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(options.workers)
    ]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


def only_engine(options: argparse.Namespace) -> None:
    """One of these processes: says that it is ready, waits for a word, and prints images per second."""
    views = prepared(options)[0]
    batch = np.resize(views, (options.max_batch, *views.shape[1:]))
    engine = opened(options)
    for _ in range(3):
        engine(batch)
    print("ready", flush=True)
    sys.stdin.readline()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.engine_seconds:
        engine(batch)
        count += len(batch)
    print(count / (time.perf_counter() - start))


def opened(options: argparse.Namespace) -> Any:
    """The engine with the threads that a worker has."""
    import torch

    from effnet.engine import open_engine

    torch.set_num_threads(told(options).worker_threads)
    return open_engine(options.model)


def told(options: argparse.Namespace) -> Any:
    """What the service is told."""
    from effnet.serve import Options

    return Options(workers=options.workers, threads=options.threads, max_batch=options.max_batch)


def prepared(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The images as the engine takes them, and its probabilities of each one alone."""
    from effnet.images import decode, prepare

    engine = opened(options)
    views = np.stack([prepare(decode(image), engine.preprocess) for image in photographs(options.images, options.px)])
    return views, np.concatenate([engine(view[None]) for view in views])


# --- the clients ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Tally:
    """What happened in the periods of one kind. `ms`: of good requests."""

    seconds: float = 0.0
    ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def document(self) -> dict[str, Any]:
        """Percentiles and counts."""
        quantiles = np.percentile(self.ms, [50, 95, 99]) if self.ms else [0, 0, 0]
        ms = {f"p{p}_ms": round(float(q), 1) for p, q in zip((50, 95, 99), quantiles, strict=True)}
        return {"images_per_s": round(len(self.ms) / self.seconds, 1), **ms, "outcomes": dict(self.outcomes)}


@dataclass(kw_only=True)
class Load:
    """The clients, and what they know about right answers."""

    host: str
    port: int
    good: list[bytes]
    best: list[tuple[int, float]]  # class and probability of each good image
    tolerance: float
    total: int = 0

    async def period(
        self, clients: int, share: float, tally: Tally, *, seconds: float, most: int | None = None
    ) -> None:
        """All clients ask for so many seconds, or until `most` requests have been made in all."""
        start = time.perf_counter()

        def over() -> bool:
            return time.perf_counter() - start > seconds or (most is not None and self.total >= most)

        await asyncio.gather(*(self._client(number, share, tally, over) for number in range(clients)))
        tally.seconds += time.perf_counter() - start

    async def _client(self, number: int, share: float, tally: Tally, over: Any) -> None:
        draw = random.Random(number + self.total)
        broken = broken_uploads(self.good[0])
        reader, writer = await asyncio.open_connection(self.host, self.port)
        while not over():
            self.total += 1
            bad = draw.random() < share
            which = draw.randrange(len(broken) if bad else len(self.good))
            body, wanted = broken[which] if bad else (self.good[which], 200)
            start = time.perf_counter()
            try:
                status, answer = await asyncio.wait_for(exchange(reader, writer, body), 60)
            except (OSError, EOFError, TimeoutError):
                tally.outcomes["lost"] += 1
                reader, writer = await asyncio.open_connection(self.host, self.port)
                continue
            took = 1e3 * (time.perf_counter() - start)
            if status != wanted:
                tally.outcomes[f"{'broken' if bad else 'good'} got {status}"] += 1
            elif bad:
                tally.outcomes["broken, refused"] += 1
            elif self._right(answer, which):
                tally.outcomes["right"] += 1
                tally.ms.append(took)
            else:
                tally.outcomes["wrong"] += 1
        writer.close()
        await writer.wait_closed()

    def _right(self, answer: bytes, which: int) -> bool:
        first = json.loads(answer)["results"][0]["predictions"][0]
        index, probability = self.best[which]
        return first["index"] == index and abs(first["probability"] - probability) <= self.tolerance


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bytes]:
    """One request on a kept connection, by hand: a client library would cost more than the service."""
    head = f"POST /predict HTTP/1.1\r\nHost: load\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


# --- the run --------------------------------------------------------------------------------------------------------


def resident_mb(pids: list[int]) -> list[float]:
    """Of each process, as Linux counts it."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return [round(count * os.sysconf("SC_PAGE_SIZE") / 1e6, 1) for count in pages]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def watched(load: Load, pids: list[int], readings: list[dict[str, Any]]) -> None:
    """Reads the processes' memory after every `SETTLED` requests, until it is cancelled."""
    while True:
        if load.total >= SETTLED * (len(readings) + 1):
            readings.append({"requests": load.total, "rss_mb": resident_mb(pids)})
        await asyncio.sleep(0.2)


async def under_load(load: Load, options: argparse.Namespace, pids: list[int]) -> dict[str, Any]:
    """All periods; what the good requests saw with and without broken ones; memory and CPU time."""
    kinds: dict[str, Tally] = {"clean": Tally()} | ({"with broken": Tally()} if options.broken else {})
    warm, readings = Tally(), []
    watch = asyncio.create_task(watched(load, pids, readings))
    await load.period(options.clients, 0.0, warm, seconds=600, most=min(SETTLED, options.requests))
    cpu = [cpu_seconds(pid) for pid in pids], time.process_time()
    order = ["clean", "with broken", "with broken", "clean"] if options.broken else ["clean"]
    for name in order:
        seconds = options.seconds * len(kinds) / len(order)
        await load.period(options.clients, options.broken if "broken" in name else 0.0, kinds[name], seconds=seconds)
        print(f"{name:12} {kinds[name].document()}", file=sys.stderr, flush=True)
    used = [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, cpu[0], strict=True)]
    own = time.process_time() - cpu[1]
    rest = Tally()
    await load.period(options.clients, options.broken, rest, seconds=3600, most=options.requests)
    watch.cancel()
    readings.append({"requests": load.total, "rss_mb": resident_mb(pids)})
    outcomes = sum((tally.outcomes for tally in [warm, *kinds.values(), rest]), Counter())
    return {
        "periods": {name: tally.document() for name, tally in kinds.items()},
        "outcomes": dict(outcomes),
        "memory": {"processes": ["front", *["worker"] * (len(pids) - 1)], "readings": readings},
        "cpu_s": {"front": round(used[0], 1), "workers": [round(s, 1) for s in used[1:]], "clients": round(own, 1)},
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The engine alone, the service under load, the engine alone again."""
    probabilities = prepared(options)[1]
    best = [(int(row.argmax()), float(row.max())) for row in probabilities]
    rates = [engine_rate(options)]
    command = [sys.executable, "-m", "effnet", "serve", options.model, "--port", "0", "--json"]
    command += ["--workers", str(options.workers), "--max-batch", str(options.max_batch)]
    command += ["--threads", str(options.threads)] if options.threads else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = json.loads(server.stdout.readline())
            good = photographs(options.images, options.px)
            load = Load(host="127.0.0.1", port=found["port"], good=good, best=best, tolerance=options.tolerance)
            seen = asyncio.run(under_load(load, options, [server.pid, *found["workers"]]))
            server.send_signal(signal.SIGTERM)
            seen["exit_code"] = server.wait(60)
        finally:
            server.kill()
    rates.append(engine_rate(options))
    share = seen["periods"]["clean"]["images_per_s"] / (sum(rates) / 2)
    return {
        "model": found["model"],
        "engine_images_per_s": [round(r, 1) for r in rates],
        "share": round(share, 3),
    } | seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientnet_lite0.in1k")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, for each kind of period")
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many, until memory is read last")
    parser.add_argument("--broken", type=float, default=0.0, help="share of broken uploads in every second period")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=32, help="different ones")
    parser.add_argument("--px", type=int, default=320, help="their width")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a probability; wider for bf16 and int8")
    parser.add_argument("--engine-seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine_only:
        only_engine(options)
        return
    from effnet.bench import busy_seconds, record, share_of_others

    before = busy_seconds()
    document = measured(options)
    environment = record() | {"others": share_of_others(before, busy_seconds())}
    arguments = {name: value for name, value in vars(options).items() if name not in ("out", "engine_only")}
    document = {"arguments": arguments, "environment": environment} | document
    for name, row in document["periods"].items():
        numbers = ", ".join(f"{key} {value}" for key, value in row.items() if key != "outcomes")
        print(f"{name:12} {numbers}   {row['outcomes']}")
    own = " and ".join(map(str, document["engine_images_per_s"]))
    print(f"throughput   {document['share']:.1%} of the engine's own ({own} images/s at batch {options.max_batch})")
    for reading in document["memory"]["readings"]:
        print(f"memory       {reading['rss_mb']} MB after {reading['requests']} requests (front, then workers)")
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
