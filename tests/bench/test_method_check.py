"""One cell of each method, measured again: what is compared, and that the committed run found nothing beyond noise."""

import copy
import math

import pytest

import lrattn
from bench import quality
from bench.evaluation import method_check
from bench.evaluation.quality_plan import find, settings_of
from bench.support import report

RUN = report.load(method_check.PATH)
LEFT = {"recalkv-ovc", "recalkv-greedy"}  # of nine heads, hours beside the rest: not measured again yet


def test_every_method_has_a_cell_to_be_compared_with():
    held = quality.held_in(quality.PATH)
    assert {row.method for _, row, _ in method_check.CELLS} == set(lrattn.methods.METHODS)
    for name, row, keep in method_check.CELLS:
        cell = method_check.before(name, row, keep, held)
        assert method_check.windows(cell) == (6 if row.packed else 3) and cell["windows"] == 6
    with pytest.raises(LookupError, match="cells: expected palu fisher"):
        method_check.before("smollm2", method_check.PALU, 0.99, held)


def test_the_committed_run_is_whole_and_as_before():
    rows = [find(RUN["rows"], model=m, **settings_of(row), keep=keep) for m, row, keep in method_check.CELLS]
    missing = {row.method for found, (_, row, _) in zip(rows, method_check.CELLS) if found is None}
    assert missing <= LEFT and len(RUN["rows"]) == len(rows) - len(missing)
    rows = [row for row in rows if row is not None]
    assert [row["method"] for row in rows if not method_check.as_before(row)] == []
    assert [row["method"] for row in rows if row["keep_now"] != row["keep_before"]] == []
    assert method_check.table(RUN) in quality.PAGE.read_text()


def test_what_differs_by_more_than_a_cell_s_error_is_told():
    old = {"losses": [3.0, 3.2, 9.9], "error": 0.02}
    found = method_check.compared([3.01, 3.23], old)
    assert found["difference"] == pytest.approx(0.02) and found["error"] == pytest.approx(0.01)
    assert found["before"] == pytest.approx(math.exp(3.1)) and found["now"] == pytest.approx(math.exp(3.12))
    results = copy.deepcopy(RUN)
    results["rows"][0]["texts"]["news"]["difference"] = -2.01 * results["rows"][0]["texts"]["news"]["noise"]
    assert "beyond" in method_check.table(results) and "beyond" not in method_check.table(RUN)
