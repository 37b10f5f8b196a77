"""The first minutes of keys by a band: what is timed, what it stands beside, and what is made of it."""

import json
import sys
from functools import wraps

import pytest
import torch

from bench.compiled import simulated_calls
from bench.decode import band_minutes, gpu_decode, timing
from bench.decode.band_minutes import CHANGES, FIRST, LONG, REBUILT, SHORT, TABLE, Case, launched, layer_of, stages
from lrattn.kernels import decode, plan

MHA, GQA = band_minutes.DRY


class Replaying(timing.WallClock):
    """As a captured graph: what is checked was written by a replay, over NaN."""

    def prepare(self, run):
        result = run()
        result.fill_(torch.nan)
        return timing.Prepared(run, run(), run)

    def microseconds(self, replays, rounds):
        return {name: [1.0] for name in replays}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(band_minutes, "DRY_TOKENS", 70)
    return gpu_decode.Bench.of([], dry=True)._replace(clock=Replaying())


def rehearsed(folder, monkeypatch, bench, cases, *words):
    """Exit status and JSON of a run of these cases."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["band_minutes", "--dry", "--out", str(folder), *words])
    monkeypatch.setattr(band_minutes.Bench, "of", lambda *_: bench)
    monkeypatch.setattr(band_minutes, "stages", lambda dry: [cases])
    code = band_minutes.main()
    return code, json.loads((folder / "band_dry.json").read_text())


@pytest.mark.every(4)
@pytest.mark.parametrize("case, kernels", [
    (Case(MHA, 1), {"absorb", "attend", "combine"}),
    (Case(GQA, 2, REBUILT), {"absorb", "attend_rebuilt", "latent_values", "combine"}),
], ids=["band", "rebuilt"])  # fmt: skip
def test_each_kernel_is_timed_alone_and_together_they_are_right(case, kernels, bench):
    row = band_minutes.measure(case, bench)
    assert set(row["times"]) == kernels | {"call"} and row["error"] < 1e-2 and row["latent_bytes"] > 0


def test_a_kernel_that_does_not_write_alone_what_it_wrote_in_the_call_is_wrong(bench, monkeypatch):
    own, calls = decode.attend, []

    @wraps(own)
    def attend(*given):
        calls.append(given)
        if len(calls) < 4:  # two of the whole call, one that is recorded
            own(*given)

    monkeypatch.setattr(decode, "attend", attend)
    with pytest.raises(timing.WrongResult):
        band_minutes.measure(Case(MHA, 1), bench)


def test_a_wrong_call_is_a_fault_and_a_launch_that_does_not_fit_is_none(tmp_path, monkeypatch, bench):
    class Unfit(RuntimeError):
        pass

    def measure(case, bench):
        raise Unfit("shared memory") if case.change == LONG else timing.WrongResult("results differ")

    monkeypatch.setattr(band_minutes, "measure", measure)
    assert rehearsed(tmp_path, monkeypatch, bench, [Case(MHA, 1, LONG)])[0] == 0
    code, found = rehearsed(tmp_path, monkeypatch, bench, [Case(MHA, 1, LONG), Case(MHA, 1), Case(MHA, 1, SHORT)])
    unfit, *faults = found["rows"]
    assert code == 1 and "shared memory" in unfit["unfit"] and all("differ" in row["fault"] for row in faults)


def test_it_ends_in_its_time_and_goes_on_from_there(tmp_path, monkeypatch, bench):
    """One case at least; what is left out is named. Another machine's results are not gone on with."""
    monkeypatch.setattr(band_minutes, "measure", lambda case, bench: {"times": {}})
    cases = [Case(MHA, 1), Case(GQA, 2), Case(MHA, 1, REBUILT)]
    code, found = rehearsed(tmp_path, monkeypatch, bench, cases, "--minutes", "0")
    assert code == 0 and len(found["rows"]) == 1 and found["left_out"] == list(map(str, cases[1:]))
    code, found = rehearsed(tmp_path, monkeypatch, bench, cases, "--resume")
    assert [Case(row["layer"], row["batch"], row["change"]) for row in found["rows"]] == cases and not found["left_out"]
    monkeypatch.setenv("LRATTN_COMMIT", "another")
    with pytest.raises(SystemExit, match="another machine or commit"):
        rehearsed(tmp_path, monkeypatch, bench, cases, "--resume")


@pytest.mark.parametrize(
    "us, said", [(79.0, "holds"), (81.0, "undecided"), (84.1, "falsified"), (None, "not measured")]
)
def test_the_verdict(us, said):
    """4 us of it may be the launch of a graph."""
    row = {**FIRST._asdict(), "times": {"attend": {"median_us": us}} if us else {}}
    other = {**FIRST._replace(batch=16)._asdict(), "times": {"attend": {"median_us": 1000.0}}}
    results = {"floor_us": 4.0, "rows": [other, row], "machine": {"gpu": "a GPU"}}
    results["verdict"] = band_minutes.verdict(results)
    text = band_minutes.conclusion(results)
    assert results["verdict"]["design"] == said and said in text and (us is None or f"{us:.1f} us" in text)


def test_cases_are_those_simulated_and_the_verdict_comes_first():
    table, others = stages(dry=False)
    shapes = {layer_of(case, dry=False).shape for case in table}
    assert table[0] == FIRST and shapes == set(simulated_calls.SHAPES) and len(table) == 2 * len(shapes)
    assert len({*table, *others}) == len(table) + len(others)
    assert {case.change for case in others} == set(CHANGES) - {TABLE}


def test_what_a_kernel_stands_beside():
    """All launches of a call that goes some sequences at a time; what two kernels did that are now one."""
    told = band_minutes.predicted(Case("Llama-2-7B, keep 0.5", 16))
    assert told == pytest.approx({"absorb": 89.7 + 89.7, "attend": 814.7 + 814.7, "combine": 8.7 + 8.7,
                                  "call": 1919.9})  # fmt: skip
    told = band_minutes.before(Case("Llama-2-7B, keep 0.3", 1))
    assert told == pytest.approx({"absorb": 6.6, "attend_rebuilt": 215.2, "latent_values": 53.9,
                                  "combine": 3.7 + 5.5, "call": 287.78})  # fmt: skip
    assert band_minutes.beside(FIRST, {"attend": 125.8})["ratio"] == {"attend": 2.0}
    assert not band_minutes.predicted(Case(MHA, 1)) and not band_minutes.before(Case(MHA, 1))


@pytest.mark.parametrize("name", [SHORT, LONG])
def test_another_launch_takes_the_tables_place_and_leaves_it(name, bench):
    """Also where the table's was asked for before."""
    x = layer_of(Case(MHA, 1), dry=True).problem(16, 1, bench)
    sizes = (1, torch.float16, "sm90", *(side.sizes for side in x.layer.operands))
    own = plan.banded(*sizes).launch
    with CHANGES[name].made():
        assert plan.banded(*sizes).launch[:2] == CHANGES[name].launch[:2]
        assert plan.banded(*sizes).launch.block_t == CHANGES[name].launch.block_t
    assert plan.banded(*sizes).launch == own != CHANGES[name].launch


def test_splits_are_those_asked_for(bench):
    x = layer_of(Case(MHA, 1), dry=True).problem(300, 1, bench)
    for n in (1, 3):
        assert band_minutes.parts(launched(band_minutes.ours(x, num_splits=n))["attend"][0]) == n
