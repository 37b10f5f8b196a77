"""One cell of each method, measured again: what is compared, and that the committed run found nothing beyond noise."""

import math

import pytest

import lrattn
from bench import quality
from bench.evaluation import method_check
from bench.evaluation.quality_plan import find, settings_of
from bench.support import report

RUN = report.load(method_check.PATH)


def test_every_method_has_a_cell_to_be_compared_with():
    held = quality.held_in(quality.PATH)
    others = {"commonkv", lrattn.methods.DEFAULT}  # younger than its cells, as those of bench/selection.py are
    known = {name for name, method in lrattn.methods.METHODS.items() if not method.exact} - others
    assert {row.method for _, row, _ in method_check.CELLS} == known
    for name, row, keep in method_check.CELLS:
        cell = method_check.before(name, row, keep, held)
        assert method_check.windows(cell) == (6 if row.packed else 3) and cell["windows"] == 6
    with pytest.raises(LookupError, match="cells: expected palu fisher"):
        method_check.before("smollm2", method_check.PALU, 0.99, held)


def test_the_committed_run_is_whole_and_as_before():
    rows = [find(RUN["rows"], model=m, **settings_of(row), keep=keep) for m, row, keep in method_check.CELLS]
    assert None not in rows and len(RUN["rows"]) == len(rows)
    for row in rows:
        assert method_check.as_before(row) and row["keep_now"] == row["keep_before"], row["method"]


def test_what_differs_by_more_than_a_cell_s_error_is_told():
    old = {"losses": [3.0, 3.2, 9.9], "error": 0.02}
    found = method_check.compared([3.01, 3.23], old)
    assert found["difference"] == pytest.approx(0.02) and found["error"] == pytest.approx(0.01)
    assert found["before"] == pytest.approx(math.exp(3.1)) and found["now"] == pytest.approx(math.exp(3.12))
    row = RUN["rows"][0]
    worse = row["texts"]["news"] | {"difference": -2.01 * row["texts"]["news"]["noise"]}
    assert "beyond" in method_check.table({"rows": [row | {"texts": {"news": worse}}]})
    assert "beyond" not in method_check.table(RUN)
