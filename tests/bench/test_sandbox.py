"""Programs that a model wrote: right ones pass, wrong ones do not, and none reaches out of its process."""

import socket
import threading
from pathlib import Path

import pytest

from bench.tasks import sandbox
from bench.tasks.sandbox import passes


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "import hashlib, math, collections, re, typing, itertools\nassert hashlib.md5(b'').hexdigest()",
        "print('a' * 10**6)",
        "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nassert f(12) == 144",
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
    ],
)
def test_a_program_that_ends_passes(program):
    assert passes(program) == (True, "")


@pytest.mark.parametrize(
    "program, why",
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(: pass", "SyntaxError"),
        ("f = lambda: f()\nf()", "RecursionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "left early: exit status 0"),
        ("exit()", "NameError"),
    ],
)
def test_one_that_fails_or_leaves_early_does_not(program, why):
    """However it leaves: the tests that follow would not have run."""
    right, said = passes(program)
    assert not right and said.startswith(why)


@pytest.mark.parametrize(
    "program, why",
    [
        ("while True: pass", "left early: signal"),
        ("import time\ntime.sleep(60)", "no end within"),
        ("x = [0] * (1 << 29)", "MemoryError"),
        ("while True: print('a' * 1000)", "left early: signal"),
    ],
)
def test_time_and_memory_have_limits(program, why):
    right, said = passes(program, seconds=1)
    assert not right and said.startswith(why)


@pytest.mark.parametrize(
    "program",
    [
        "open('here', 'w')",
        "open('here', 'ab')",
        "import os\nos.open('here', os.O_CREAT | os.O_WRONLY)",
        "import pathlib\npathlib.Path('here').mkdir()",
        "import os\nos.remove('/tmp/nothing')",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import ctypes",
        "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    ],
)
def test_nothing_reaches_out_of_the_process(program):
    right, said = passes(program)
    assert not right and said.startswith("PermissionError: not in here")


def test_there_is_no_network():
    """A server that is there, on this machine, hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        heard = []

        def wait():
            try:
                heard.append(server.accept())
            except TimeoutError:
                return

        listener = threading.Thread(target=wait)
        listener.start()
        port = server.getsockname()[1]
        right, said = passes(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        listener.join()
    assert not right and said.startswith("PermissionError") and not heard


def test_a_program_sees_no_environment_and_leaves_no_file(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    before = set(Path.cwd().iterdir())
    assert passes("import os\nassert 'SECRET' not in os.environ")[0]
    assert passes("import os\nassert not os.listdir()")[0]
    assert set(Path.cwd().iterdir()) == before


def test_what_a_program_says_cannot_pass_it():
    """The word that says so is drawn anew each time."""
    assert not passes("import sys\nsys.__stdout__.write('0' * 32)\nsys.__stdout__.flush()\nassert False")[0]
    assert "{token}" in sandbox.GUARD
