"""Launches beside the table's: which are tried, and what is said of those that cannot be."""

import json
import sys

import pytest
import torch

from bench.decode import launches
from lrattn.kernels.launch import Launch

LAYER = launches.DRY["dry"]


@pytest.mark.slow
def test_a_rehearsal_times_the_table_and_an_alternative(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["launches", "--dry", "--out", str(tmp_path)])
    assert launches.main() == 0
    (row,) = json.loads((tmp_path / "launches_dry.json").read_text())["rows"]
    assert launches.TABLE in row["us"] and len(row["us"]) == 3 and not row["faults"]
    assert "by the table" in capsys.readouterr().out


@pytest.mark.parametrize("layer", launches.LAYERS.values(), ids=launches.LAYERS)
def test_every_alternative_is_launched(layer):
    """What is varied is what the layer's step asks for, in the place of the table's own launch."""
    for kernel in layer.kernels:
        if kernel in ("attend_packed", "packed_values"):
            for own in launches.ALTERNATIVES[kernel]:
                with launches.used(launches.Variant(kernel, own)):
                    codes = codes_of(layer)
                assert own == (codes.keys if kernel == "attend_packed" else codes.values)
            continue
        if kernel == "fused_absorbed":
            assert absorbed_of(layer) == launches.plan.absorbed.__wrapped__(*sizes_of(layer))  # and is now known
            for own in launches.ALTERNATIVES[kernel]:
                with launches.used(launches.Variant(kernel, own)):
                    assert absorbed_of(layer).launch[:4] == (*own[:2], 16, own.block_r)
        variant = launches.Variant(kernel, Launch(4, 1, block_r=64, block_d=128))
        with launches.used(variant):
            found = getattr(launches.launch, kernel)("sm90", 2, rows=4, head=64, rank=256)
        assert found == Launch(4, 1, block_q=16, block_r=64, block_d=64)


def sizes_of(layer):
    """Query rows of a kv head of a 16-bit step, and what else its plan is of."""
    model, x = layer.shape.model, layer.problem(16, 1, launches.Bench.of([], dry=True))
    rows = model.query_heads // model.kv_heads
    return rows, torch.float16, "sm90", *(side.sizes for side in x.layer.operands)


def absorbed_of(layer):
    """How it takes plain rows whose queries are absorbed whole."""
    return launches.plan.absorbed(*sizes_of(layer))


def codes_of(layer):
    """How a 16-bit step takes its packed rows."""
    return launches.plan.planes(*sizes_of(layer)[1:])


@pytest.mark.parametrize("layer", launches.LAYERS.values(), ids=launches.LAYERS)
def test_what_is_varied_is_what_takes_the_rows(layer):
    codes = codes_of(layer)
    taken = (codes.keys is not None, codes.values is not None)
    named = ("attend_packed" in layer.kernels, bool({"attend_packed", "packed_values"} & set(layer.kernels)))
    assert taken == named


def test_a_launch_that_is_wrong_is_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(launches, "ours", lambda x: lambda: x.q * 0)
    assert "results differ" in launches.fault(LAYER, launches.Variant(), dry=True)


def test_the_table_shows_the_fastest_of_what_was_tried():
    row = {"layer": "a layer", "batch": 1, "must_read": 3_000_000, "us": {launches.TABLE: 2.0, "other": 1.0},
           "kernels": {"small": 0.1, "large": 1.5}}  # fmt: skip
    told = launches.table({"machine": {"commit": "abc1234"}, "rows": [row, row | {"us": {}}]}).splitlines()
    assert len(told) == 2
    assert told[1].split() == ["a", "layer", "abc1234", "1", "3.0", "2.0", "1500", "1.0", "large", "2,", "small", "0"]
