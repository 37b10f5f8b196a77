"""What the runs of vLLM share: what a CPU needs, factors, a server that ends with its block, and what its log says.

    with serving(options("lrattn", max_model_len=1024)) as server:
        answer = server.ask("/v1/chat/completions", {"messages": [..]})
        held = capacity(server.log())

vLLM is imported in processes of its own alone, so that this can be read without it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lrattn
from bench.support import models, texts
from lrattn.integrations.transformers.load import read_windows

ROOT = Path(__file__).parents[2]
ENTRY = "vllm.entrypoints.launchers.api_server.entry"  # of `vllm serve`, which wants the metadata of "vllm" itself
WAYS: dict[str, dict[str, Any] | None] = {  # what compress is told
    "dense": None,
    "lrattn": {},
    "lrattn, no window": {"far": (0, 0)},
}
WINDOWS, LENGTH = 8, 1024  # of the calibration
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
# Threads that are not bound to cores, of which a container may own others than vLLM thinks, and no compilation, which
# takes minutes on a CPU.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
CPU_OPTIONS = {"enforce_eager": True, "gpu_memory_utilization": 0.3, "distributed_executor_backend": "uni"}
SIZE = re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def on_gpu() -> bool:
    return torch.cuda.is_available()


def environment() -> dict[str, str]:
    """Variables of a process that runs vLLM, beside its own."""
    return QUIET | ({} if on_gpu() else CPU_ENVIRONMENT)


def options(way: str, **more: Any) -> dict[str, Any]:
    """Arguments of vLLM's LLM, which are those of its server."""
    chosen = {"model": str(models.CACHE / "smollm2"), "dtype": "bfloat16"} | ({} if on_gpu() else CPU_OPTIONS) | more
    if WAYS[way] is None:
        return chosen
    return chosen | {"attention_backend": "CUSTOM", "additional_config": {"lrattn": str(file_of(way))}}


def file_of(way: str) -> Path:
    return models.CACHE / f"smollm2 {way}.safetensors".replace(", ", " ").replace(" ", "-")


def make_factors(way: str) -> None:
    """`compress` of SmolLM2 on articles, once, which takes two minutes; its own folder is made there, too."""
    told, path = WAYS[way], file_of(way)
    if path.is_file() or told is None:
        return
    print(f"compressing SmolLM2 for {path.name}, once", flush=True)
    model, tokenizer = models.smollm2()
    calibration = read_windows(tokenizer, texts.wikipedia("calibration"), LENGTH, WINDOWS)
    with models.written_once(path) as new:
        lrattn.compress(model, calibration.split(1), **told).save(new)


class Capacity(NamedTuple):
    """tokens: that a cache holds. concurrency: requests of `length` tokens that fit at once."""

    tokens: int
    length: int
    concurrency: float


def capacity(log: str) -> Capacity:
    """What vLLM reports of its cache.

    Raises: ValueError if it does not.
    """
    found = SIZE.search(log)
    if found is None:
        raise ValueError(f"expected a line 'KV cache size: 1,024 tokens, Maximum ..' of vLLM's, got {log[-500:]!r}")
    tokens, length, concurrency = (x.replace(",", "") for x in found.groups())
    return Capacity(int(tokens), int(length), float(concurrency))


def words(told: dict[str, Any]) -> list[str]:
    """Options as the server's command line has them."""
    found = []
    for name, value in told.items():
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return found


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Of a streamed answer."""
    for line in lines:
        name, _, data = line.decode().strip().partition(": ")
        if name == "data" and data != "[DONE]":
            yield json.loads(data)


class Server(NamedTuple):
    port: int
    path: Path

    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def open(self, route: str, body: dict[str, Any] | None = None, seconds: float = 600) -> Any:
        """An answer to be read; of a streamed one, lines as they come."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return _direct.open(
            urllib.request.Request(f"http://127.0.0.1:{self.port}{route}", data, headers), timeout=seconds
        )

    def ask(self, route: str, body: dict[str, Any], seconds: float = 600) -> dict[str, Any]:
        with self.open(route, body, seconds) as answer:
            return json.load(answer)

    def counted(self, name: str) -> float:
        """A number that the server counts, over its engines."""
        with self.open("/metrics", seconds=10) as answer:
            rows = (line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
            return sum(float(value) for key, value in rows if key.split("{")[0] == name)


@contextmanager
def serving(told: dict[str, Any], seconds: float = 300) -> Iterator[Server]:
    """A server on the loopback that answers, for as long as the block; it and all of its processes are ended then.

    seconds: until it answers.
    Raises: RuntimeError, with the end of its log, if it does not.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it ends with this process
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        server = Server(found.getsockname()[1], Path(folder) / "log.txt")
        found.close()
        command = [sys.executable, "-m", ENTRY, "--host", "127.0.0.1", "--port", str(server.port), *words(told)]
        with server.path.open("w") as log:
            process = subprocess.Popen(
                command, env=os.environ | environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait(server, process, time.monotonic() + seconds)
            yield server
        finally:
            _end(process)
            signal.signal(signal.SIGTERM, before)


def _wait(server: Server, process: subprocess.Popen[bytes], until: float) -> None:
    while process.poll() is None and time.monotonic() < until:
        try:
            server.open("/health", seconds=10).close()
            return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"vLLM's server does not answer; the end of its log:\n{server.log()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of the whole group: its engine is a process of its own."""
    for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
