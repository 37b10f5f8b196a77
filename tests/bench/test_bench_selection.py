"""What fewer tokens and layers lose: the committed cells are whole, say what they hold, and are what the page shows."""

from types import SimpleNamespace

import pytest
import torch

import lrattn
from bench import selection
from bench.quality import held_in
from lrattn.selection import POLICIES

CELLS = held_in(selection.PATH)


def test_every_row_was_measured_and_is_shown():
    dense, rows = selection.found_in(CELLS)
    expected = [selection.row_of(name, s) for name, base in selection.BASES.items() for s in base.selections]
    assert [cell["row"] for cell in rows] == expected and dense["row"] == selection.DENSE
    assert selection.pasted(selection.DOCS.read_text(), CELLS) == selection.DOCS.read_text()
    systems = {name for name, method in lrattn.methods.METHODS.items() if method.exact}
    assert {word for cell in rows for word in cell["row"].split()} >= systems


def test_what_is_held_is_what_was_asked_for():
    """Bytes of the tensors once tokens are chosen: the share of the base's, and a page or two a layer; or what is kept
    whatever the share, the dense window's tokens and all of some layers."""
    _, rows = selection.found_in(CELLS)
    by_row = {cell["row"]: cell for cell in rows}
    for cell in rows:
        if "impossible" in cell or cell["share"] is None:
            continue
        base = by_row[cell["base"]]
        for n in map(str, selection.LENGTHS):
            whole, fixed = POLICIES[cell["policy"]].whole / 30, 68 / (int(n) - selection.SCORED - 1)
            least = whole + (1 - whole) * fixed if cell["base"] != selection.DENSE else 0
            assert cell["tokens"][n] <= max(cell["share"], least) + 0.001
            latents = 0.125 if cell["base"] != selection.DENSE else 1.0
            more = 40 * latents / int(n) + 4 / 768 * cell["tokens"][n]  # half-filled pages; positions
            assert cell["held"][n] <= base["held"][n] - latents * (1 - cell["tokens"][n]) + more


def test_losses_are_over_the_dense_model_s_on_the_same_windows():
    dense = {"losses": {"1024": {"a": [2.0, 3.0], "b": [1.0]}}}
    cell = {"losses": {"1024": {"a": [2.1, 3.3], "b": [1.2]}}}
    mean, error = selection.excess(cell, dense, 1024)
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1 / 3**0.5)
    for row in CELLS:
        if "losses" in row:
            assert all(len(x) == selection.LENGTHS[int(n)] for n, own in row["losses"].items() for x in own.values())


def test_a_row_is_a_base_and_a_policy():
    assert selection.row_of("exact", None) == "exact"
    assert selection.row_of("exact", lrattn.Selection("curdkv", 0.3)) == "curdkv 0.3"
    assert selection.row_of("lrattn 0.125", lrattn.Selection("refreekv")) == "refreekv on lrattn 0.125"
    assert selection.BASES["lrattn 0.5"].selections == [None] and len(selection.BASES["exact"].selections) == 11


def test_bytes_count_wide_numbers_as_16_bits():
    held = [torch.zeros(3, dtype=torch.int64), torch.zeros(5), torch.zeros(7, dtype=torch.uint8)]
    assert selection.nbytes(SimpleNamespace(tensors=held)) == 24 + 10 + 7
