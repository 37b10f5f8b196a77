"""Errors of scores by a band: the committed run is what the code computes, and what is wrong with a band is told."""

import json
import sys

import pytest

from bench.decode import band_numerics
from bench.decode.band_numerics import MOST, ROWS, WAYS, Row
from bench.support import report

RUN = report.load(band_numerics.PATH)
GAUSSIAN = Row("1e4", 32768, "Gaussian")


def test_the_committed_run_is_whole_and_within_its_limits():
    assert [Row(r["rope"], r["position"], r["kind"]) for r in RUN["rows"]] == [*ROWS]
    assert (RUN["seeds"], RUN["most"]) == (6, MOST) and not band_numerics.faults(RUN)
    for r in RUN["rows"]:
        assert r["band"] < r["fma"] / 5, "a band errs less than what its operands are rounded by"
        assert r["position"] < 1e5 or max(r["fma"], r["rows"]) < r["engine"] / 2, "float32 angles err more, far out"


@pytest.mark.parametrize("row", ROWS[::9], ids=str)
def test_the_committed_numbers_are_computed_again(row):
    (held,) = (r for r in RUN["rows"] if (r["rope"], r["position"], r["kind"]) == row)
    found = band_numerics.computed(row)
    for name in (*WAYS, "score", "error", "of_bound"):
        assert found[name] == pytest.approx(held[name], rel=1e-2), name


def test_the_table_has_every_row():
    lines = band_numerics.table(RUN).splitlines()[1:]
    for r, line in zip(RUN["rows"], lines, strict=True):
        assert line.startswith(r["rope"]) and f" {r['kind']} " in line
        assert line.split()[-7:-2] == [f"{r[way]:.1e}" for way in WAYS]


def run(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["band_numerics"])
    monkeypatch.setattr(band_numerics, "PATH", folder / "found.json")
    monkeypatch.setattr(band_numerics, "ROWS", (GAUSSIAN,))
    monkeypatch.setattr(band_numerics, "SEEDS", 1)
    return band_numerics.main()


def test_a_run_is_kept_with_its_machine(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 1 and {"cpu", "torch", "commit"} <= set(found["machine"])
    assert capsys.readouterr().out.endswith(band_numerics.table(found) + "\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda band: band._replace(coefficients=-band.coefficients), ("fma", "rows", "of the bound")),
        (lambda band: band._replace(functions=band.functions.roll(1, 0)), ("fma", "rows", "of the bound")),
        (lambda band: band._replace(error=band.error / 10), ("of the bound",)),
    ],
    ids=["signs", "places", "error"],
)
def test_a_wrong_band_is_told(change, told, tmp_path, monkeypatch, capsys):
    own = band_numerics.band_of
    monkeypatch.setattr(band_numerics, "band_of", lambda rope: change(own(rope)))
    assert run(tmp_path, monkeypatch) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TOO MUCH: 1e4 at 32768")]
    assert len(lines) == len(told) and all(word in line for word, line in zip(told, lines))
