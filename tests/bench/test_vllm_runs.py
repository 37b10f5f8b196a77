"""The runs of vLLM but for vLLM itself: what they read of it, what they say, and that they know when it is wrong."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest

from bench import demo_vllm, serve
from bench.support import report, vllm_runs

DEMO = report.load(report.RESULTS / "demo_vllm.json")
SERVE = report.load(serve.PATH)
LINE = "INFO [utils.py:1] CPU KV cache size: 361,472 tokens, Maximum concurrency for 1,024 tokens per request: "


def test_capacity_is_read_from_the_line_that_vllm_logs():
    assert vllm_runs.capacity(f"first\n{LINE}353.00x\nlast") == (361472, 1024, 353.0)
    assert vllm_runs.capacity(f"{LINE}1353.25x").concurrency == 1353.25
    with pytest.raises(ValueError, match="expected a line"):
        vllm_runs.capacity("INFO nothing")


def test_options_are_words_of_a_command_line():
    told = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 4, "additional_config": {"lrattn": "a b"}}
    said = ["--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "4", "--additional-config", '{"lrattn": "a b"}']
    assert vllm_runs.words(told) == said


def test_a_way_names_the_backend_and_its_file_and_dense_names_none():
    files = [vllm_runs.options(way)["additional_config"]["lrattn"] for way in list(vllm_runs.WAYS)[1:]]
    assert len(set(files)) == 2 and all(" " not in os.path.basename(file) for file in files)
    assert {vllm_runs.options(way).get("attention_backend") for way in vllm_runs.WAYS} == {None, "CUSTOM"}
    assert not {"attention_backend", "additional_config"} & set(vllm_runs.options("dense"))


def test_a_gpu_gets_no_option_and_no_variable_of_a_cpu(monkeypatch):
    monkeypatch.setattr(vllm_runs, "on_gpu", lambda: True)
    assert not set(vllm_runs.CPU_OPTIONS) & set(vllm_runs.options("lrattn"))
    assert not set(vllm_runs.CPU_ENVIRONMENT) & set(vllm_runs.environment())


def test_events_of_a_stream():
    lines = [b'data: {"choices": [1]}\n', b"\n", b": ping\n", b'data: {"choices": []}\n', b"\n", b"data: [DONE]\n"]
    assert list(vllm_runs.events(lines)) == [{"choices": [1]}, {"choices": []}]


def test_a_server_that_does_not_start_is_told_with_its_log_and_one_that_hangs_is_ended(monkeypatch, tmp_path):
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: begun.append(popen(*words, **more)) or begun[-1])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "hanging.py").write_text("import time; time.sleep(600)")
    for entry, seconds, says in (("no_such_module", 300, "No module named no_such_module"), ("hanging", 1, "answer")):
        monkeypatch.setattr(vllm_runs, "ENTRY", entry)
        with pytest.raises(RuntimeError, match=says), vllm_runs.serving({}, seconds):
            pass
    assert [process.returncode for process in begun] == [1, -signal.SIGTERM]


ANSWERING = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

print(os.getpid(), flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
ASKING = """
import time
from bench.support import vllm_runs

vllm_runs.ENTRY = "answering"
with vllm_runs.serving({}) as server:
    print(server.log().split()[0], flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_a_process_that_is_told_to_end(tmp_path):
    """It is in a group of its own, which a shell does not tell."""
    (tmp_path / "answering.py").write_text(ANSWERING)
    paths = os.pathsep.join((str(tmp_path), str(vllm_runs.ROOT)))
    more = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": paths}}
    with subprocess.Popen([sys.executable, "-c", ASKING], **more) as process:
        pid = int(process.stdout.readline())
        process.terminate()
        assert process.wait(60) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_most_at_once():
    assert serve.most_at_once([(0, 2), (1, 3), (2, 4), (5, 6)]) == 3


def test_the_committed_runs_are_right_and_fit_a_terminal():
    assert demo_vllm.faults(DEMO) == [] and serve.faults(SERVE) == []
    assert max(map(len, demo_vllm.table(DEMO).splitlines())) <= 100
    assert max(map(len, serve.table(SERVE).splitlines())) <= 120
    assert [row["way"] for row in SERVE["served"]] == list(vllm_runs.WAYS)
    cells = [(row["length"], row["way"]) for row in SERVE["capacity"]]
    assert cells == [(length, way) for length in serve.LENGTHS for way in vllm_runs.WAYS]


def demo_fewer(run):
    run["rows"][1]["tokens"] = 6 * run["rows"][0]["tokens"]


def demo_silent(run):
    run["rows"][1]["answers"][0]["text"] = " "


def demo_other(run):
    run["rows"][1]["answers"][2]["text"] = "Because it is."


@pytest.mark.parametrize(
    "change, says",
    [
        (demo_fewer, "not 6.5 times as many"),
        (demo_silent, "no answer to"),
        (demo_other, "begins otherwise than the dense"),
    ],
)
def test_a_wrong_demo_is_told_in_one_line_and_by_the_exit_status(change, says, tmp_path, capsys, monkeypatch):
    run = copy.deepcopy(DEMO)
    change(run)
    (tmp_path / "demo_vllm.json").write_text(json.dumps(run))
    monkeypatch.setattr("sys.argv", ["demo_vllm", "--show-only", "--out", str(tmp_path)])
    assert demo_vllm.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("WRONG: ") and says in line


def serve_fewer(run):
    run["capacity"][-1]["tokens"] //= 2


def serve_short(run):
    run["served"][1]["tokens"][0] -= 1


def serve_other(run):
    run["served"][1]["first_ids"] = [[0] for _ in run["served"][1]["first_ids"]]


@pytest.mark.parametrize(
    "change, says",
    [
        (serve_fewer, "times dense in requests of 32,768"),
        (serve_short, "tokens each, got"),
        (serve_other, "begin as dense"),
    ],
)
def test_a_wrong_run_of_the_benchmark_is_told_in_one_line_and_by_the_exit_status(
    change, says, tmp_path, capsys, monkeypatch
):
    run = copy.deepcopy(SERVE)
    change(run)
    monkeypatch.setattr(serve, "PATH", tmp_path / "serve.json")
    serve.PATH.write_text(json.dumps(run))
    monkeypatch.setattr("sys.argv", ["serve", "--plot-only"])
    assert serve.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("WRONG: ") and says in line and (tmp_path / "serve.png").stat().st_size
