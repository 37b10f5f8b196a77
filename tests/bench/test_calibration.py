"""How much text a calibration needs: the committed cells are whole and are what the page shows."""

import pytest
import torch

from bench import calibration
from bench.quality import PAGE, held_in

CELLS = held_in(calibration.PATH)


def test_the_page_shows_the_committed_cells():
    page = PAGE.read_text()
    assert "<!-- bench.calibration: table -->" in page and calibration.pasted(page, CELLS) == page
    rows = [(cell["model"], cell["text"], cell["windows"]) for cell in CELLS]
    assert len(set(rows)) == len(rows)
    planned = {(name, *row) for name, own in calibration.ROWS.items() for row in own}
    assert set(rows) <= planned


@pytest.mark.parametrize("name", calibration.ROWS)
def test_a_text_of_another_kind_loses_more(name):
    """Of its keys and values, and mostly of the loss; of the same kind little more than the calibration's own."""
    cells = {(cell["text"], cell["windows"]): cell for cell in CELLS if cell["model"] == name}
    wiki = max((key for key in cells if key[0] == "wikipedia"), key=lambda key: key[1])
    code = max((key for key in cells if key[0] == "code"), key=lambda key: key[1])
    for text, own, other in (("wikipedia", wiki, code), ("code", code, wiki)):
        assert cells[own]["texts"][text]["residual"] < cells[other]["texts"][text]["residual"]
        assert cells[own]["texts"][text]["excess"] < cells[other]["texts"][text]["excess"]


def test_windows_of_two_texts_come_in_turn():
    class Characters:
        model_max_length = 10**9

        def __call__(self, text, **_):
            ids = torch.tensor([[ord(c) % 100 for c in text]])
            return type("Encoded", (), {"input_ids": ids})()

    mixed = calibration.calibration(Characters(), calibration.MIXED, 4)
    apart = [calibration.calibration(Characters(), name, 2) for name in ("wikipedia", "code")]
    assert mixed.shape == (4, calibration.LENGTH)
    assert torch.equal(mixed[0::2], apart[0]) and torch.equal(mixed[1::2], apart[1])
