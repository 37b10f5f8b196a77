"""What was found of every architecture, and how a run is told. That the page shows it: test_docs.py."""

import json
import sys
from itertools import groupby
from pathlib import Path

import pytest
import uses
from architectures import ARCHITECTURES

from bench import architectures

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "locks"))
import versions  # noqa: E402


def rows_of_the_results():
    return json.loads(architectures.PATH.read_text())["rows"]


def test_every_use_of_every_architecture_was_tried_in_every_release_and_none_is_wrong():
    rows, tried = rows_of_the_results(), json.loads(versions.PATH.read_text())["rows"]
    assert not architectures.faults(rows)
    assert {row["transformers"] for row in rows} == {row["transformers"] for row in tried}
    roped = len(ARCHITECTURES) - len(uses.WITHOUT_ROPE)
    for _, own in groupby(rows, architectures.release_of):
        own = list(own)
        assert {row["architecture"] for row in own} == set(ARCHITECTURES)
        assert all(list(row["uses"]) == list(uses.USES) for row in own)
        assert len(own) == len(uses.NEARS) * (len(ARCHITECTURES) + roped * (len(uses.KEYS) - 1))


def found(release, architecture, said):
    uses = {"scoring": said, "greedy": "equal"}
    return {"transformers": release, "torch": "2.13.0", "architecture": architecture, "near": [0, 0],
            "keys": "as given", "uses": uses}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A run that finds these rows, over others of a file of its own: its exit status."""
    monkeypatch.setattr(architectures, "PATH", tmp_path / "found.json")
    monkeypatch.setattr(sys, "argv", ["architectures"])

    def run(*rows, before=()):
        architectures.save(before)
        monkeypatch.setattr(architectures, "tried", lambda: list(rows))
        return architectures.main()

    return run


def test_a_run_takes_the_place_of_its_release_alone(run, capsys):
    before = found("5.5.0", "Llama", "equal"), found("5.24.0", "Llama", "differs by 1.0e-01")
    assert run(found("5.24.0", "Llama", "equal"), before=before) == 0 and "0 faults" in capsys.readouterr().out
    rows = rows_of_the_results()
    assert [row["transformers"] for row in rows] == ["5.5.0", "5.24.0"]
    assert architectures.table(rows).splitlines()[:4] == [
        "| transformers | 5.5.0 | 5.24.0 |",
        "| --- | --: | --: |",
        "| torch | 2.13.0 | 2.13.0 |",
        "| Llama | 2 of 2 | 2 of 2 |",
    ]


def test_what_is_wrong_fails_and_what_is_exempt_is_named(run, capsys):
    rows = found("5.24.0", "Llama", "differs by 1.0e-01"), found("5.24.0", "Gemma", "exempt: its own fault")
    assert run(*rows) == 1
    said, table = capsys.readouterr().out, architectures.table(rows)
    assert "Llama, near=(0, 0), keys as given, scoring: differs by 1.0e-01" in said and "1 faults" in said
    assert "| Llama | 1 of 2 |" in table and "| Gemma | 1 of 2 |" in table
    assert table.endswith("* Gemma in transformers 5.24.0, scoring: its own fault.")
