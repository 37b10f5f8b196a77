"""Combinations at equal bytes: the committed cells are whole, hold what they say, and are what the page shows."""

import pytest

from bench import combinations as combos
from bench.quality import held_in

CELLS = held_in(combos.PATH)


def test_every_row_was_measured_and_is_shown():
    for model in combos.CALIBRATED:
        dense, rows = combos.of_model(CELLS, model)
        wanted = [row.name for row in combos.ROWS if model == combos.FULL or row.name in combos.OTHER]
        assert [cell["row"] for cell in rows] == wanted and dense["row"] == combos.DENSE
    assert combos.pasted(combos.DOCS.read_text(), CELLS) == combos.DOCS.read_text()
    assert len({(cell["model"], cell["row"]) for cell in CELLS}) == len(CELLS)


def test_a_row_holds_the_bytes_it_is_named_by():
    """Of latents the share, from below; of the whole cache after 4,096 tokens the dense window and free pages more."""
    by_name = {row.name: row for row in combos.ROWS}
    for cell in CELLS:
        row = by_name[cell["row"]]
        if "impossible" in cell:
            assert "keep: expected at least" in cell["impossible"]
            continue
        if row.published:
            assert row.family in ("dense", "commonkv") or abs(cell["held"]["4096"] - row.keep) < 0.04
            continue
        assert 0.9 * row.keep < cell["latents"] <= row.keep * 1.001
        if "4096" in cell["held"]:
            window = 0.1 if row.more.get("method") == "commonkv" else 0.04
            assert cell["latents"] - 0.004 < cell["held"]["4096"] < cell["latents"] + window
        if "read" in cell:  # by every layer of a run
            span = row.more.get("span", 4 if row.more.get("method") == "commonkv" else 1)
            assert 0.8 * span * cell["latents"] <= cell["read"] <= span * cell["latents"] * 1.001


def test_far_is_the_share_of_what_the_dense_model_gains():
    dense = {"probe": [{"gain": 3.0}, {"gain": 1.0}], "losses": {"4096": {"a": 2.0, "b": 1.0}}}
    cell = {"probe": [{"gain": 1.5}, {"gain": 0.5}], "losses": {"4096": {"a": 2.5, "b": 1.1}}}
    assert combos.far(cell, dense) == pytest.approx(0.5) and combos.far(dense, dense) == 1
    assert combos.excess(cell, dense, 4096) == pytest.approx(0.3)


def test_rows_are_what_they_are_named():
    names = [row.name for row in combos.ROWS]
    assert len(set(names)) == len(names) and set(combos.OTHER) <= set(names)
    drawn = {x for families in combos.CURVES.values() for x in families} | set(combos.PUBLISHED)
    assert drawn <= {row.family for row in combos.ROWS}
    assert combos.Row("x", 1 / 32).name == "x, 1/32" and combos.Row("x", 0.5).name == "x, 0.5"


def test_the_setting_of_a_thirty_second_reads_further_than_rows_of_fewer_layers():
    dense, rows = combos.of_model(CELLS, combos.FULL)
    found = {cell["row"]: combos.far(cell, dense) for cell in rows if "probe" in cell}
    by_span = ["bits: one row, 1/32", "rows of 4 layers x bits, 1/32", "rows of 8 layers x bits, 1/32"]
    assert sorted(by_span, key=found.__getitem__) == by_span and found[by_span[-1]] > 0.9
