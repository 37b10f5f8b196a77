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


ORDER = """
import re
from bench.compiled.resources import PACKED, CHUNK, Problem, compiling
from bench.compiled.resources import absorb_planes, attend_near, combine_heads, packed_pass

def accesses(kernel, problem, device):
    with compiling(device) as compiled:
        kernel(problem)
    (_, binary), = compiled
    assert getattr(binary.metadata, "launch_pdl", False) == (device == "sm90" and kernel is not absorb_planes)
    return re.findall(r"griddepcontrol\\.\\w+|(?:ld|st)\\.global|cp\\.async\\.c[ag]", binary.asm["ptx"])

far = Problem(256, 128, 4, group=4, chunk=CHUNK, bits=PACKED, options="bias rule offsets near")
near = Problem(head=128, heads=4, options="near")
for kernel, problem in ((packed_pass, far), (attend_near, near), (combine_heads, near)):
    found = accesses(kernel, problem, "sm90")
    before = found[: found.index("griddepcontrol.wait")]
    assert set(before) <= {"ld.global"}, (kernel, before)
    assert len(before) <= (8 if kernel is packed_pass else 0), (kernel, before)
    assert "st.global" in found and not any("griddep" in x for x in accesses(kernel, problem, "sm80"))
assert [x for x in accesses(absorb_planes, far, "sm90") if "griddep" in x] == ["griddepcontrol.launch_dependents"]
"""


@pytest.mark.slow
def test_what_is_launched_early_waits_before_it_touches_what_others_write():
    """Before it waits packed attention reads lengths and what a layer holds, which no kernel of the call writes; the
    first kernel of a call is launched after all that came before it."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ORDER]
    run = subprocess.run(command, env=env, cwd=report.RESULTS.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
