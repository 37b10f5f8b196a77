"""The demo knows when it is wrong."""

import json

import pytest
import tiny
import torch

import lrattn
from bench import demo
from bench.support import report
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.models.interface import cache_argument

RUN = json.loads((report.RESULTS / "demo.json").read_text())
ROW = RUN["rows"][-1]
HELD = ROW["cache_bytes"]
BEYOND = "from dense, beyond 2.5%"


def test_the_committed_run_is_right_and_fits_a_terminal():
    assert demo.faults(RUN) == []
    assert max(map(len, demo.table(RUN).splitlines())) <= 100


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cache_bytes": HELD | {"4096": HELD["4096"] - 16}}, "bytes at 4096 tokens, its factors say"),
        ({"tokens_cached": 0}, "the cache holds 0"),
        ({"perplexity": 1.03 * ROW["perplexity"]}, BEYOND),
        ({"perplexity": float("nan")}, BEYOND),
        ({"ids": [ROW["ids"][0] + 1, *ROW["ids"][1:]]}, "the answer begins otherwise than the dense one"),
    ],
    ids=["bytes", "tokens", "loss", "no loss", "answer"],
)
def test_a_wrong_run_is_told_in_one_line_and_by_the_exit_status(change, says, tmp_path, capsys, monkeypatch):
    results = RUN | {"rows": [*RUN["rows"][:-1], ROW | change]}
    (tmp_path / "demo.json").write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["demo", "--plot-only", "--out", str(tmp_path)])
    assert demo.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("WRONG: lrattn-rebuilt: ") and says in line


def test_its_rows_are_the_dense_cache_the_default_and_two_alternatives():
    assert [row["name"] for row in RUN["rows"]] == ["dense", *demo.CHOICES]
    default, plain, smallest = (row["keep"] for row in RUN["rows"][1:])
    assert 0.12 < default <= 0.125 and 0.49 < plain <= 0.5 and 0.06 < smallest <= 0.0625
    assert "lrattn: compress(model, batches)" in demo.table(RUN).splitlines()


@pytest.mark.parametrize("method, bits", [("lrattn", 16), ("lrattn", "auto"), ("lrattn-rebuilt", "auto")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_cache_holds_the_bytes_that_the_demo_counts(family, method, bits):
    """Counted from what the factors say alone; beyond the window and within it."""
    model = tiny.model(family)
    factors = lrattn.compress(model, [tiny.tokens(4, 100)], method, keep=0.5, bits=bits, far=(16, 2), progress=False)
    for length in (10, 64):
        cache = LatentCache(factors)
        with torch.no_grad(), latent_attention(model, factors):
            model(tiny.tokens(1, length), **cache_argument(cache))
        assert cache.nbytes == demo.bytes_said(factors, length)
