"""What the kernels compile to, on a machine without a GPU: in a process of its own, since this one interprets."""

import os
import subprocess
import sys

import pytest

from bench.compiled import resources
from bench.support import report

RESULTS = report.load(resources.PATH)


@pytest.mark.slow
def test_a_few_launches_compile_and_fit():
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled.resources", "--quick"]
    run = subprocess.run(command, env=env, cwd=report.RESULTS.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " 0 unfit" in run.stdout, run.stdout + run.stderr


def shapes_of(results):
    """What was compiled, as `describe` says it."""
    names = ("device", "rank", "values", "one_row", "head", "M", "S", "dtype", "options", "bits", "chunk", "uneven")
    return {tuple(row[n] for n in (*names, "theta")) for row in results["rows"]}


def test_the_committed_resources_are_of_these_sources_and_of_every_launch_of_the_table():
    assert RESULTS["sources"] == resources.sources_hash(), "the kernels changed: run make resources"
    assert shapes_of(RESULTS) == {(c.device, *resources.describe(c).values()) for c in resources.compilations()}
    assert {row["device"] for row in RESULTS["rows"]} == set(resources.DEVICES)


def test_every_launch_fits():
    plain = {f"{name}_kernel" for name in ("write_latents", "write_near", "pack_latents", "combine")}
    for row in RESULTS["rows"]:
        assert row["shared"] <= resources.DEVICES[row["device"]].shared, row
        if row["dtype"] != "float32":
            assert row["products"] or row["kernel"] in plain or row.get("pass") == "turn_queries", row
            kept = row["kernel"] == "attend_kernel" and row["M"] == 1 and row["rank"] > 160  # outside the loop
            assert row["spilled"] <= (48 if row["bits"] or kept else 0), row


def test_packed_rows_fit_by_the_triton_that_they_were_written_against():
    """No spill, and instructions a token and group: of the bare pass 40 for three widths and 34 for one, of the most
    options 55, but where a warp takes 16 tokens."""
    results = report.load(resources.BY_PLANE_PATH)
    assert results["sources"] == resources.sources_hash(), "the kernels changed: run it with --by-plane"
    assert results["triton"].startswith("3.6.")
    assert shapes_of(results) == {(c.device, *resources.describe(c).values()) for c in resources.by_plane("sm90")}
    rows = [row for row in results["rows"] if row["dtype"] != "float32"]
    assert not any(row["spilled"] for row in rows)
    counted = [row for row in rows if "tokens" in row]
    assert len(counted) > 60
    for row in counted:
        bare = row["pass"] == "packed_pass" and row["options"] == "none" and row["chunk"] in (0, resources.CHUNK)
        most = 34 if bare and len(row["bits"].split()) == 1 else 40 if bare else 55
        assert row["tokens"] == 16 or resources.a_token(row) <= most, row


ASKED = """
from unittest.mock import patch
from triton.runtime.jit import JITFunction
from bench.compiled import resources
asked = []
for c in dict.fromkeys([*resources.compilations(), *resources.QUICK]):
    with resources.compiling(c.device), patch.object(JITFunction, "run", lambda *_, **given: asked.append((c, given))):
        c.kernel(c.problem)
    own, given = asked[-1]
    early = c.device in ("sm90", "sm100")  # launches before the end of others
    assert own is c and given.get("CHAINED", False) <= early, c
    if c.kernel in (resources.absorb_queries, resources.turn_queries, resources.absorb_planes):
        assert given["CHAINED"] == early, c
assert len(asked) > 1500
"""


def test_every_compilation_is_of_a_launch_that_the_library_makes():
    """In a process of its own, since this one interprets; nothing is compiled."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ASKED]
    run = subprocess.run(command, env=env, cwd=report.RESULTS.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


ROW = {"dtype": "bfloat16", "registers": 99, "spilled": 0, "shared": 1024, "products": ["wgmma.mma_async.m64n16k16"]}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spilled": 8}, "8 bytes spilled"),
        ({"spilled": 8, "dtype": "float32"}, None),
        ({"shared": 228 << 10}, "bytes of shared memory"),
        ({"products": ["mma.m16n8k16"]}, "expected wgmma.mma_async"),
        ({"products": []}, "no tensor-core product"),
        ({"registers": 4, "dtype": "float32"}, "4 registers: it was compiled to nothing"),
    ],
)
def test_what_is_unfit(changes, fault):
    launch = resources.Compilation(resources.latent_scores, "sm90", resources.Problem(), product=True)
    found = resources.faults(launch, ROW | changes)
    assert (fault is None and not found) or (len(found) == 1 and fault in found[0])


def test_words_alone_do_not_make_results_stale():
    module = '"""Of a module."""\n\ndef f(x):\n    """Of\n    a function."""\n    return x  # why\n'
    other = module.replace("Of\n    a function", "Of a function, in\n    other\n    words")
    assert resources.code(module) == resources.code(other) == "def f(x):\n    return x"
    assert resources.code(module) != resources.code(module.replace("return x", "return -x"))
