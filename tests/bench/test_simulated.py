"""Simulated times beside measured ones: only those of the same step, and nothing made up for the others."""

from bench.compiled import simulated
from bench.decode import launches
from bench.support import report


def row(layer, batch, commit=simulated.BEFORE[0], **us):
    return {"layer": f"Llama-2-7B, {layer}", "batch": batch, "commit": commit, "us": us}


def test_measured_steps_are_of_the_same_layer_batch_and_tokens():
    found = simulated.before({
        "tokens": 32768,
        "rows": [
            row("position-free, 4 bits", 1, table=9.0, fast=8.0),
            row("position-free, 4 bits", 1, simulated.BEFORE[1], table=7.0, fast=5.0),
            row("position-free", 16),  # kernels alone were
            row("position-free", 1, "0000000", table=1.0),
            row("4 bits", 16, table=1.0),
            row("one row, keep 0.125", 16, table=1.0),
        ],
    })  # fmt: skip
    assert found == {("Llama-2-7B", (4,), 1, 32768): 5.0}


def test_the_table_has_what_was_measured_where_it_was_and_a_dash_elsewhere():
    results, old = report.load(simulated.PATH), simulated.before(report.load(launches.PATH))
    lines = simulated.table(results).splitlines()[1:]
    shown = {
        (r["model"], tuple(r["bits"]), r["batch"], r["tokens"]): line.split()[-1]
        for r, line in zip(results["rows"], lines, strict=True)
    }
    assert {key: us for key, us in shown.items() if us != "-"} == {key: f"{us:.1f}" for key, us in old.items()}
    assert set(old) == {
        *((model, (8, 4, 2), batch, 32768) for model in ("Llama-3.1-8B", "Llama-2-7B") for batch in (1, 16)),
        *(("Llama-3.1-8B", (4,), batch, 32768) for batch in (1, 16)),
        *((model, (), 1, 32768) for model in ("Llama-3.1-8B", "Llama-2-7B")),
    }
