"""A kernel compiles for a GPU that need not be here: in a process of its own, since this one interprets."""

import os
import subprocess
import sys

import pytest

from bench.support import report

CODE = """
from bench.compiled.resources import QUICK, compile_for, faults
launch = next(c for c in QUICK if c.kernel.__name__ == {kernel!r} and c.device == {device!r})
rows = compile_for(launch)
assert rows and all(row["registers"] for row in rows), rows
assert not [fault for row in rows for fault in faults(launch, row)]
"""


@pytest.mark.parametrize(("kernel", "device"), [("latent_scores", "sm90"), ("write_latents", "sm90")])
def test_a_launch_compiles_and_fits(kernel, device):
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE.format(kernel=kernel, device=device)]
    run = subprocess.run(command, env=env, cwd=report.RESULTS.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
