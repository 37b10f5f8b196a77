"""The one command for a GPU, rehearsed on a CPU, so that no minute of a GPU goes to a slip."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bench import gpu_check
from bench.support import report

HOUR = 3600.0  # nothing here takes as long, however slow the machine
STEPS = [step.name for step in gpu_check.steps(report.RESULTS, dry=True)]


@pytest.mark.slow
def test_a_rehearsal_ends_well_and_leaves_one_small_folder(tmp_path):
    """The commands of the real run, through the interpreter."""
    command = [sys.executable, "-m", "bench.gpu_check", "--dry", "--minutes", "600", "--out", str(tmp_path / "out")]
    run = subprocess.run(
        [*command, "--commit", "abc1234"], cwd=gpu_check.ROOT, capture_output=True, text=True, check=False
    )
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert not {row["name"] for row in found["steps"] if row["status"] != "done"} and not run.returncode, run.stdout
    assert [row["name"] for row in found["steps"]] == STEPS
    assert found["dry"] and found["machine"]["commit"] == "abc1234"
    assert {"gpu", "driver", "torch", "triton", "commit"} <= set(found["machine"])
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert len(files) <= 8 and max(files.values()) <= 16 << 20
    assert set(files) == set(found["files"]) | {"gpu_check.json"}
    assert {"tests.txt", "decode_latency_dry.json", "decode_latency_dry.png", "palu_decode_dry.json",
            "palu_decode_dry.png", "host_cost.json"} <= set(files)  # fmt: skip
    assert "1 passed" in (tmp_path / "out" / "tests.txt").read_text()
    latency = json.loads((tmp_path / "out" / "decode_latency_dry.json").read_text())
    assert latency["dry"] and latency["left_out"] == [] and latency["machine"] == found["machine"]
    assert all("lrattn" in row["times"] and not row["faults"] for row in latency["rows"])
    palu = json.loads((tmp_path / "out" / "palu_decode_dry.json").read_text())
    assert len(palu["rows"][0]["times"]) == 6


def step(name, code, share=1.0, worth=0.0, text=""):
    return gpu_check.Step(name, lambda _: [sys.executable, "-c", code], share, worth, text)


def test_a_step_that_fails_is_kept_and_does_not_stop_the_rest(tmp_path):
    steps = [step("bad", "import sys; sys.exit('a typo')"), step("good", "print('fine')", text="good.txt")]
    assert gpu_check.run(steps, HOUR, tmp_path, dry=True) == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["status"] for row in found["steps"]] == ["failed: exit status 1", "done"]
    assert "a typo" in found["steps"][0]["output"] and found["faults"] == ["bad: failed: exit status 1"]
    assert (tmp_path / "good.txt").read_text() == "fine\n"


def test_all_steps_well_is_exit_status_zero(tmp_path):
    assert gpu_check.run([step("good", "")], HOUR, tmp_path, dry=True) == 0


def test_a_step_finds_the_cases_of_the_tests(tmp_path):
    """Where pytest is missing, nobody else says where they are."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('cases') is None)"
    assert gpu_check.run([step("cases", code)], HOUR, tmp_path, dry=True) == 0


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
    assert gpu_check.run([step("slow", code, share=0.02)], 100.0, tmp_path, dry=True) == 1
    ((limit, out),) = limits
    assert limit == 2.0 and "ended after its 2 s" in (tmp_path / "gpu_check.json").read_text()
    assert out.read() == ""


def test_a_step_is_begun_only_if_it_is_worth_it(tmp_path):
    ran = tmp_path / "ran"
    steps = [step("long", f"open({str(ran)!r}, 'w')", worth=2 * HOUR), step("short", "")]
    assert gpu_check.run(steps, HOUR, tmp_path, dry=True) == 1
    first, second = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert first["status"].startswith("not begun") and second["status"] == "done" and not ran.exists()


def test_too_many_files_are_a_fault(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.json").write_text("")
    assert gpu_check.run([], HOUR, tmp_path, dry=True) == 1


@pytest.mark.parametrize("module, expected", [("pytest", "gpu_smoke"), ("xdist", "--gpu")])
def test_what_is_missing_there_is_done_without(module, expected, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    command = gpu_check.tests(dry=False)
    assert expected in " ".join(command) and "-n" not in command


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_check.main()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry", "--out", str(report.RESULTS)])
    with pytest.raises(SystemExit):
        gpu_check.main()
