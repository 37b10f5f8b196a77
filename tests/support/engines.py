"""vLLM engines for tests: all that a test module asks for run in one process, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.support import vllm_runs

ENVIRONMENT = vllm_runs.QUIET | vllm_runs.CPU_ENVIRONMENT
ENVIRONMENT |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
LIMIT = 600  # seconds


def run_jobs(folder: Path, jobs: list[dict], **environment: str) -> dict[str, dict]:
    """The result of each job by name, see engine_jobs.py. Fails where the process did, with the end of its log."""
    asked, found, log = folder / "jobs.json", folder / "results.json", folder / "engines.log"
    asked.write_text(json.dumps(jobs))
    begin = time.monotonic()
    with log.open("w") as file:
        command = [sys.executable, str(Path(__file__).with_name("engine_jobs.py")), str(asked), str(found)]
        told = {**os.environ, **ENVIRONMENT, **environment}
        done = subprocess.run(command, env=told, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT, check=False)
    results = json.loads(found.read_text()) if found.is_file() else {}
    missing = [job["name"] for job in jobs if job["name"] not in results]
    assert not missing, f"{missing} after {time.monotonic() - begin:.0f} s, status {done.returncode}:\n{tail(log)}"
    return results


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def ids_of(result: dict, rounds: int | None = None) -> list:
    """The ids of a job that ran; of its rounds one after the other."""
    assert "error" not in result, result["error"]
    return [ids for part in result["ids"] for ids in part]
