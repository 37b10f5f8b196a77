"""The table of architectures: what is in the page is what was found, everywhere."""

import json
import sys
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


def test_the_page_shows_what_was_found():
    text = (ROOT / "docs" / "architectures.md").read_text()
    begin, end = "<!-- python -m bench.architectures --table -->\n", "\n<!-- end -->"
    assert begin + architectures.table(rows_of_the_results()) + end in text


def test_every_use_of_every_architecture_was_tried_in_every_release_and_none_is_wrong():
    rows = rows_of_the_results()
    assert not architectures.faults(rows)
    releases = {architectures.release_of(row) for row in rows}
    tried = json.loads(versions.PATH.read_text())["rows"]
    assert {row["transformers"] for row in rows} == {row["transformers"] for row in tried}
    for release in releases:
        own = [row for row in rows if architectures.release_of(row) == release]
        assert {row["architecture"] for row in own} == set(ARCHITECTURES)
        assert all(list(row["uses"]) == list(uses.USES) for row in own)
        roped = len(ARCHITECTURES) - len(uses.WITHOUT_ROPE)
        assert len(own) == len(uses.NEARS) * (len(ARCHITECTURES) + roped)


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Results of two architectures and one other release, without a run."""
    monkeypatch.setattr(architectures, "PATH", tmp_path / "found.json")
    monkeypatch.setattr(sys, "argv", ["architectures"])

    def row(release, architecture, said):
        names = {"transformers": release, "torch": "2.13.0", "architecture": architecture}
        return names | {"near": [0, 0], "keys": "as given", "uses": {"scoring": said, "greedy": "equal"}}

    return row


def test_a_run_takes_the_place_of_its_release_alone(found, monkeypatch, capsys):
    architectures.save([found("5.5.0", "Llama", "equal"), found("5.24.0", "Llama", "differs by 1.0e-01")])
    monkeypatch.setattr(architectures, "tried", lambda: [found("5.24.0", "Llama", "equal")])
    assert architectures.main() == 0 and "0 faults" in capsys.readouterr().out
    rows = rows_of_the_results()
    assert [row["transformers"] for row in rows] == ["5.5.0", "5.24.0"]
    assert architectures.table(rows).splitlines()[:4] == [
        "| transformers | 5.5.0 | 5.24.0 |",
        "| --- | --: | --: |",
        "| torch | 2.13.0 | 2.13.0 |",
        "| Llama | 2 of 2 | 2 of 2 |",
    ]


def test_what_is_wrong_fails_and_what_is_exempt_is_named(found, monkeypatch, capsys):
    rows = [found("5.24.0", "Llama", "differs by 1.0e-01"), found("5.24.0", "Gemma", "exempt: its own fault")]
    monkeypatch.setattr(architectures, "tried", lambda: rows)
    assert architectures.main() == 1
    said = capsys.readouterr().out
    assert "Llama, near=(0, 0), keys as given, scoring: differs by 1.0e-01" in said and "1 faults" in said
    table = architectures.table(rows)
    assert "| Llama | 1 of 2 |" in table and "| Gemma | 1 of 2 |" in table
    assert table.endswith("* Gemma in transformers 5.24.0, scoring: its own fault.")
