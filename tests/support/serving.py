"""vLLM's OpenAI server, on 127.0.0.1 in processes of its own: started, asked, killed, and ended with all it started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import psutil

from bench.support.vllm_runs import CPU_ENVIRONMENT, ENTRY, QUIET

SURROUNDINGS = QUIET | CPU_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
# A few requests, of a few pages, a few tokens a step: requests wait, and prompts come in chunks.
FEW = "--max-model-len 512 --max-num-seqs 6 --max-num-batched-tokens 64 --block-size 32"
QUICK = "--dtype float32 --enforce-eager --gpu-memory-utilization 0.3 --kv-cache-memory-bytes 16777216"
LATENT = ("--attention-backend", "CUSTOM")


class Server:
    """Starts when it is made. `with` ends it.

    words: of its command line. log: a file for all that it says.
    """

    def __init__(self, model, log, *words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.begun = log, time.monotonic()
        own = ("--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port))
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", ENTRY, *own, *QUICK.split(), *FEW.split(), *words],
                env=os.environ | SURROUNDINGS,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sign, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            end = time.monotonic() + seconds
            while self._signalled(0) and time.monotonic() < end:
                self._signalled(sign)
                sign = 0
                time.sleep(0.1)

    def _signalled(self, sign):
        """Whether anything of its group is there."""
        self.process.poll()  # takes away what has ended
        try:
            os.killpg(self.process.pid, sign)
        except ProcessLookupError:
            return False
        return True

    def ready(self, seconds=120):
        """Waits until it answers."""
        while True:
            late = time.monotonic() - self.begun > seconds
            if self.process.poll() is not None or late:
                raise RuntimeError(f"no server after {seconds} s, or ended:\n{self.log.read_text()[-4000:]}")
            try:
                return self.get("health") and self
            except OSError:
                time.sleep(0.2)

    def ended(self, seconds=120):
        """The exit status of one that ends by itself."""
        return self.process.wait(seconds - (time.monotonic() - self.begun))

    def kill(self):
        """At once, all but Python's resource tracker, which then takes away their shared memory."""
        leader = psutil.Process(self.process.pid)
        for process in (leader, *leader.children(recursive=True)):
            if not any("resource_tracker" in word for word in process.cmdline()):
                process.kill()
        self.process.wait()

    def get(self, path, body=None):
        """The open answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return urlopen(Request(f"http://127.0.0.1:{self.port}/{path}", data, headers), timeout=60)

    def complete(self, prompt, tokens, **more):
        """The open answer to a prompt, of text or token ids: so many tokens, the likeliest ones."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return self.get("v1/completions", body | {"return_token_ids": True} | more)

    def answer(self, prompt, tokens, **more):
        with self.complete(prompt, tokens, **more) as answer:
            return json.load(answer)["choices"][0]

    def counted(self, name):
        """A counter of its metrics."""
        with self.get("metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}_total{{"))
