"""The table of peers: what the pages show is made of the committed cells, and a row is of the cells it names."""

import re

import pytest

from bench import peers
from bench.support import report
from bench.tasks import tables
from bench.tasks.rows import ROWS


@pytest.mark.parametrize("page", peers.PAGES, ids=lambda p: p.name)
def test_the_pages_show_the_table_of_the_committed_cells(page):
    assert "<!-- bench.peers: table -->" in page.read_text()
    assert peers.pasted(page) == page.read_text() and peers.PLOT.is_file()


def test_every_row_is_of_cells_that_are_planned():
    names = {row.name for row in ROWS}
    assert {peer.task for peer in peers.PEERS if peer.task} <= names
    for peer in peers.PEERS[1:]:
        assert peers.loss_of(peer) is not None, peer.name
        assert re.fullmatch(r"[\d.]+ \[simulated\]|-", peers.decode(peer))  # nothing simulated is shown as measured
    assert peers.decode(peers.PEERS[0]) == "1" and "[simulated]" in peers.decode(peers.PEERS[1])


def test_a_cell_that_is_not_there_is_a_dash(tmp_path, monkeypatch):
    path = tmp_path / "tasks.json"
    report.write(path, {"cells": []})
    monkeypatch.setattr(peers, "TASKS", path)
    row = peers.lines()[1]
    assert row[1] == "0.125" and row[3] == row[4] == "-"


def test_problems_are_those_of_the_cell_and_beside_the_dense_cache(tmp_path, monkeypatch):
    path = tmp_path / "tasks.json"
    cells = [
        {"task": "humaneval", "row": "dense", "bytes": 1.0, "solved": ["HumanEval/1", "HumanEval/2"]},
        {
            "task": "humaneval",
            "row": "lrattn 1/8",
            "bytes": 0.125,
            "solved": ["HumanEval/2", "HumanEval/7", "HumanEval/8"],
        },
    ]
    report.write(path, {"cells": cells})
    monkeypatch.setattr(peers, "TASKS", path)
    assert [row[1] for row in peers.lines()[:2]] == ["1", "0.125"]
    assert [row[3] for row in peers.lines()[:2]] == ["2", "3 (+1)"]
    lost, won = tables.pairs(tables.solved(cells[1]), tables.solved(cells[0]))
    assert (lost, won) == (1, 2) and tables.net_error(1, 2, 164) == pytest.approx((3 - 1 / 164) ** 0.5)
