"""Calls that are simulated launch by launch: what the simulator is told of each, and what is added to it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from bench.compiled import resources, simulated_calls
from bench.compiled.resources import empty
from bench.compiled.simulated_calls import CASES, SHAPES, Case, Launched, Simulation, Work
from bench.support import report

RESULTS = report.load(simulated_calls.PATH)
ROWS = RESULTS["rows"]
CASE = Case(SHAPES[0], 2, 8192)  # eight groups of four heads, rank 256


def launched(grid, idle="", **arguments):
    """idle: an argument that the code has no use for."""
    meta = SimpleNamespace(num_warps=4, num_stages=2, shared=1024)
    used = " ".join(f"%{name}" for name in arguments if name != idle)
    asm = {"cubin": b"", "ttir": f"tt.func ({', '.join(f'%{name}' for name in arguments)}) {used} %{idle}_stride"}
    binary = SimpleNamespace(hash="one", metadata=meta, asm=asm)
    return Launched("some_kernel", binary, grid, {"BLOCK_T": 64, "tiles": 128, **arguments})


class Simulator:
    """Takes a microsecond a trip; told holds what it was asked, and waves are of 264 programs."""

    def __init__(self):
        self.told = []

    def Machine(self):
        return None

    def parse(self, name):
        return name

    def usage(self, name):
        return {"REG": 200, "STACK": 8}

    def predict(self, code, machine, **given):
        self.told.append(given)
        return SimpleNamespace(us=float(given["trips"]), waves=given["programs"] / 264)


def test_the_committed_calls_are_of_these_sources():
    assert RESULTS["sources"] == resources.sources_hash(), "the kernels changed: run bench.compiled.simulated_calls"
    assert RESULTS["triton"].startswith("3.6.")
    told = CASES[0].told()
    assert [{name: row[name] for name in told} for row in ROWS] == [case.told() for case in CASES]


def test_the_kernels_of_a_call_read_every_latent_once():
    """Also where its sequences go some at a time."""
    for case, row in zip(CASES, ROWS, strict=True):
        read = sum(kernel["bytes"] for kernel in row["kernels"] if kernel["part"] in ("attend", "values"))
        assert read == case.batch * case.tokens * case.shape.row_bytes, case
        own = [kernel["part"] for kernel in row["kernels"]]
        parts = [*simulated_calls.PARTS] if case.shape.bits else ["queries", "attend", "combine"]
        assert own == parts * (len(own) // len(parts))


def test_a_call_is_its_kernels_and_what_was_measured_of_the_rest():
    for case, row in zip(CASES, ROWS, strict=True):
        names = ("sum_us", "gaps_us", "temporaries_us")
        assert row["call_us"] == pytest.approx(sum(row[name] for name in names), abs=0.3)
        assert row["sum_us"] == pytest.approx(sum(kernel["us"] for kernel in row["kernels"]), abs=0.1)
        times = sum(kernel["part"] == "queries" for kernel in row["kernels"])
        assert row["gaps_us"] == round(times * simulated_calls.gaps(case), 1)
    assert simulated_calls.gaps(Case(SHAPES[0], 16, 8192)) == pytest.approx(347.52 - 344.6)  # of its batch 1


def test_the_table_has_what_was_measured_where_it_was_and_a_dash_elsewhere():
    lines = simulated_calls.table(RESULTS).splitlines()[1:]
    old = {tuple(line.split()[:6]): line.split()[-1] for line in lines}
    assert len(old) == len(CASES)
    assert {key: us for key, us in old.items() if us != "-"} == {
        ("Llama-2-7B", "256", "16", "1", "32768", "64"): "347.5",
        ("Llama-2-7B", "160", "16", "1", "32768", "64"): "287.8",
        ("Llama-2-7B", "256", "16", "16", "32768", "64"): "4970.3",
        ("Llama-2-7B", "160", "16", "16", "32768", "64"): "4078.6",
        ("Llama-3.1-8B", "256", "16", "1", "32768", "64"): "118.3",
        ("Llama-3.1-8B", "160", "16", "1", "32768", "64"): "96.0",
        ("Llama-3.1-8B", "256", "16", "16", "32768", "64"): "1381.1",
        ("Llama-3.1-8B", "160", "16", "16", "32768", "64"): "1155.6",
        ("Llama-2-7B", "256", "8/4/2", "1", "32768", "64"): "985.2",
        ("Llama-2-7B", "256", "8/4/2", "16", "32768", "64"): "14489.4",
        ("Llama-3.1-8B", "256", "8/4/2", "1", "32768", "64"): "417.4",
        ("Llama-3.1-8B", "256", "8/4/2", "16", "32768", "64"): "5120.7",
    }  # fmt: skip


def test_what_a_launch_reads_and_how_it_shares_it():
    call = CASE.call()
    one_side = 2 * 8192 * 8 * 256 * 2
    scores = launched((32, 9, 2), idle="cv", ck=call.ck, cv=call.cv)
    both = launched((8, 9, 2), ck=call.ck, cv=call.cv)
    pieces, tail = launched((16, 9, 2), cv=call.cv, BLOCKS_R=2), launched((8, 9, 2), cv=call.cv, tiles=129)
    assert Work.of(scores, call, []) == (128, one_side, 0.25, 64)  # four heads of a group
    assert Work.of(both, call, []) == (128, 2 * one_side, 1.0, 64)
    assert Work.of(pieces, call, []) == (128, one_side, 1.0, 64)
    assert Work.of(tail, call, []) == (129, one_side, 1.0, 64)  # no token beyond the last
    x, terms = empty(2, 128), empty(2, 3)
    assert Work.of(launched((2, 128, 2), q=call.q), call, [x, terms]) == (0, 4 * (256 + 6), 1.0, 64)


def test_programs_of_several_waves_have_as_many_tiles_as_they_have_on_average():
    def told(*grid, page=64, tiles=128):
        simulator = Simulator()
        row = Simulation(simulator)(launched(grid), Work(tiles, 7, 0.25, page))
        assert (row["us"], row["programs"]) == (row["trips"], simulator.told[-1]["programs"])
        return row["trips"], simulator.told[-1]

    trips, given = told(32, 9, 1)  # 14.2 tiles
    assert trips == 14 and {name: given[name] for name in ("warps", "reg", "shared", "stages", "dram_bytes")} == {
        "warps": 4, "reg": 200, "shared": 1024, "stages": 2, "dram_bytes": 7,
    }  # fmt: skip
    assert told(8, 9, 1)[0] == 15  # one wave waits for those that have most
    assert told(2, 128, 1, tiles=0)[0] == 1  # a tile is a program's, and none goes through several
    assert (given["lookup_lines"], told(32, 9, 1, page=16)[1]["lookup_lines"]) == (8, 2)


@pytest.mark.parametrize(
    "splits, rank, loops",
    [(32, 256, (1, [])), (100, 256, (4, [])), (32, 400, (2, [1])), (128, 400, (2, [4]))],
)
def test_what_combines_goes_through_its_ranks_and_splits(splits, rank, loops):
    """Where ranks are a single block, there is no loop of them in the code."""
    simulator = Simulator()
    sizes = {"first": 1, "last": splits + 1, "BLOCK_S": 32, "RANK": rank, "BLOCK_R": 256}
    row = Simulation(simulator)(launched((64,), **sizes), Work(0, 0, 1.0, 64))
    assert (row["trips"], simulator.told[-1]["inner"]) == loops


@dataclass
class Instruction:
    op: str
    pred: str = ""
    target: int = -1


TURNS = [Instruction("EXIT", "P1"), Instruction("BRA", "P0", 4), Instruction("STG"), Instruction("EXIT")]
ABSORBS = [Instruction("BRA", "", 6), Instruction("EXIT"), Instruction("HGMMA"), Instruction("EXIT")]


def test_a_kernel_of_two_kinds_of_programs_takes_what_each_does_by_its_share():
    """Also where those that absorb come first in the code."""

    class Two(Simulator):
        def predict(self, code, machine, **given):
            return SimpleNamespace(us=10.0 if simulated_calls.products(code) else 4.0, waves=1)

    other = [*TURNS[:2], Instruction("HGMMA"), Instruction("EXIT"), Instruction("STG"), Instruction("EXIT")]
    for code in (TURNS + ABSORBS, other):
        simulator = Two()
        simulator.parse = lambda _, code=code: code
        launch = launched((8, 3, 1), FAST=(16,), T=4)._replace(kernel=simulated_calls.ABSORB)
        row = Simulation(simulator)(launch, Work(0, 0, 1.0, 64))
        assert row["us"] == 8.0 and code[1].pred == "P0"
    for code in (TURNS + TURNS, [*TURNS[:2], *ABSORBS[2:], *ABSORBS[2:]]):
        with pytest.raises(RuntimeError, match="one side of the first branch"):
            simulated_calls.ways(code)


def test_launches_that_are_alike_are_simulated_once():
    simulator = Simulator()
    simulation = Simulation(simulator)
    for grid, page in (((8, 4, 1), 64), ((8, 4, 1), 64), ((8, 4, 2), 64), ((8, 4, 1), 16)):
        simulation(launched(grid), Work(128, 7, 1.0, page))
    assert len(simulator.told) == 3


CALL = """
from dataclasses import make_dataclass
from types import SimpleNamespace
from bench.compiled.simulated_calls import CASES, PATH, SHAPES, Case, Simulation, report, simulate
Instruction = make_dataclass("Instruction", ("op", "pred", "target"))
code = [Instruction(*given) for given in (("BRA", "P0", 2), ("EXIT", "", 0), ("HMMA", "", 0), ("EXIT", "", 0))]
class Simulator:
    Machine, parse = staticmethod(lambda: None), staticmethod(lambda _: code)
    usage = staticmethod(lambda _: {"REG": 0, "STACK": 0})
    predict = staticmethod(lambda *_, **given: SimpleNamespace(us=1.0, waves=1))
rows = {tuple(case.told().values()): row for case, row in zip(CASES, report.load(PATH)["rows"])}
for case in (Case(SHAPES[0], 1, 32768), Case(SHAPES[2], 16, 131072)):
    names = ("part", "kernel", "programs", "trips", "bytes")
    found, expected = ([tuple(k[n] for n in names) for k in row["kernels"]]
                       for row in (simulate(Simulation(Simulator), case), rows[tuple(case.told().values())]))
    assert found == expected, (found, expected)
"""


@pytest.mark.slow
def test_a_call_launches_what_the_committed_row_says():
    """In a process of its own, since this one interprets."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CALL]
    run = subprocess.run(command, env=env, cwd=report.RESULTS.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
