"""The one command for a GPU, rehearsed on a CPU, so that no minute of a GPU goes to a slip."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from bench import gpu_check
from bench.support import report

HOUR = 3600.0  # nothing here takes as long, however slow the machine


@pytest.mark.slow
def test_a_rehearsal_ends_well_and_leaves_one_small_folder(tmp_path):
    """The commands of the real run, through the interpreter."""
    out = tmp_path / "out"
    words = ["--dry", "--minutes", "600", "--out", str(out), "--commit", "abc1234"]
    command = [sys.executable, "-m", "bench.gpu_check", *words]
    run = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, check=False)
    texts = {path.name: path.read_text() for path in out.iterdir() if path.suffix != ".png"}
    found = json.loads(texts["gpu_check.json"])
    steps = [step.name for step in gpu_check.steps(report.RESULTS, dry=True)]
    assert [(row["name"], row["status"]) for row in found["steps"]] == [(name, "done") for name in steps], run.stdout
    assert not run.returncode and found["dry"] and found["machine"]["commit"] == "abc1234"
    assert {"gpu", "driver", "torch", "triton", "commit"} <= set(found["machine"])
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert len(sizes) <= 8 and max(sizes.values()) <= 16 << 20 and set(sizes) == {*found["files"], "gpu_check.json"}
    assert {"subnormals_dry.json", "host_cost.json", "decode_latency_dry.png", "palu_decode_dry.json"} <= set(sizes)
    assert "1 passed" in texts["tests.txt"] and "1 passed" in found["steps"][2]["output"]
    assert {row["change"] for row in json.loads(texts["band_dry.json"])["rows"]} > {"table", "rebuilt whole"}
    latency = json.loads(texts["decode_latency_dry.json"])
    assert latency["dry"] and latency["left_out"] == [] and latency["machine"] == found["machine"]
    assert all("lrattn" in row["times"] and not row["faults"] for row in latency["rows"])
    assert len(json.loads(texts["palu_decode_dry.json"])["rows"][0]["times"]) == 6


def step(name, code, share=1.0, worth=0.0, text=""):
    return gpu_check.Step(name, lambda _: [sys.executable, "-c", code], share, worth, text)


def ran(folder, *steps, seconds=HOUR):
    """Exit status and report of a run."""
    code = gpu_check.run(steps, seconds, folder, dry=True)
    return code, json.loads((folder / "gpu_check.json").read_text())


def test_a_step_that_fails_or_is_not_worth_it_is_kept_and_does_not_stop_the_rest(tmp_path):
    code, found = ran(
        tmp_path,
        step("bad", "import sys; sys.exit('a typo')"),
        step("long", f"open({str(tmp_path / 'ran')!r}, 'w')", worth=2 * HOUR),
        step("good", "print('fine')", text="good.txt"),
    )
    bad, long, good = (row["status"] for row in found["steps"])
    assert bad == "failed: exit status 1" and long.startswith("not begun") and good == "done"
    assert code == 1 and found["faults"] == [f"bad: {bad}", f"long: {long}"] and "a typo" in found["steps"][0]["output"]
    assert (tmp_path / "good.txt").read_text() == "fine\n" and not (tmp_path / "ran").exists()


def test_a_step_finds_the_cases_of_the_tests_and_all_well_is_exit_status_zero(tmp_path):
    """Where pytest is missing, nobody else says where they are."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('cases') is None)"
    assert ran(tmp_path, step("cases", code))[0] == 0


def test_a_step_is_ended_with_all_it_started_when_its_time_is_up(tmp_path, monkeypatch):
    """Its time is up once its child has begun; then nobody is left to hold the pipe that the child writes to."""
    pipe, limits = tmp_path / "pipe", []
    os.mkfifo(pipe)
    writes = "print('begun', file=out, flush=True); time.sleep(100); print('late', file=out)"
    child = f"import time; out = open({str(pipe)!r}, 'w'); {writes}"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            limits.append((timeout, pipe.open()))
            assert limits[0][1].readline() == "begun\n"
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Popen)
    status, found = ran(tmp_path, step("slow", code, share=0.02), seconds=100.0)
    ((limit, out),) = limits
    assert status == 1 and limit == 2.0 and found["steps"][0]["status"] == "ended after its 2 s"
    assert out.read() == ""


def test_too_many_files_are_a_fault(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.json").write_text("")
    assert ran(tmp_path)[0] == 1


def test_steps_fit_the_time_together_and_what_was_never_measured_comes_first(tmp_path):
    """Where each takes all it may, the last has what is left; each is worth beginning with its own share."""
    *steps, _ = found = gpu_check.steps(tmp_path, dry=False)
    assert sum(step.share for step in steps) <= 1 and all(540 * step.share >= step.worth for step in found)
    assert [step.name for step in found[2:4]] == ["band, tests", "band, kernels"]


@pytest.mark.parametrize("file", gpu_check.BANDED)
def test_the_tests_that_come_first_are_there(file):
    names = re.findall(r"^def (test_\w+)", (gpu_check.ROOT / file).read_text(), re.M)
    words = set(re.findall(r"\w+", gpu_check.FIRST)) - {"or", "and", "bfloat16"}
    assert words and all(any(word in name for name in names) for word in words)


@pytest.mark.parametrize("module, expected", [("pytest", "gpu_smoke"), ("xdist", "--gpu")])
def test_what_is_missing_there_is_done_without(module, expected, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    command = gpu_check.tests(False, gpu_check.TESTS)
    assert expected in " ".join(command) and "-n" not in command


@pytest.mark.parametrize("words", [["--out", "folder"], ["--dry", "--out", str(report.RESULTS)]])
def test_without_a_gpu_only_a_rehearsal_runs_and_never_among_the_results(words, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
    with pytest.raises(SystemExit):
        gpu_check.main()
