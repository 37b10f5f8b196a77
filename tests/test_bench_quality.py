"""What bench.quality and bench.probe say of their cells."""

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import tiny
import torch

import lrattn
from bench import probe, quality, quality_plan, quality_plot, quality_table, texts
from bench.quality_plan import JOINT, NESTED, PALU, PLANS, cells, find, row_of, settings_of
from lrattn.integrations.transformers import latent_attention
from lrattn.integrations.transformers.perplexity import losses, perplexity


def test_losses_are_the_model_s_own_and_perplexity_is_their_mean():
    model, windows = tiny.model("llama"), tiny.tokens(3, 24)
    found = losses(model, windows, progress=False)
    with torch.no_grad():
        own = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert found == pytest.approx(own, rel=1e-5) and len(set(found)) == 3
    assert perplexity(model, windows, progress=False) == pytest.approx(math.exp(fmean(own)), rel=1e-5)


def test_errors_are_of_differences_not_of_windows():
    dense, gaps = [1.0, 4.0, 9.0], [0.10, 0.12, 0.11]
    found = quality.compared([d + g for d, g in zip(dense, gaps, strict=True)], dense)
    assert found["excess"] == pytest.approx(0.11) and found["error"] == pytest.approx(stdev(gaps) / math.sqrt(3))


def test_the_halves_of_the_news_are_apart():
    parts = [texts.news(half).split("\n\n") for half in ("calibration", "evaluation")]
    assert all(len(part) > 140 for part in parts) and not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("name", PLANS)
def test_cells_are_told_apart_by_their_settings(name):
    staged = list(cells(name))
    assert staged[0][1]["method"] == "dense" and [s for s, _ in staged] == sorted(s for s, _ in staged)
    settings = [c for _, c in staged]
    assert all(find(settings, **c) is c for c in settings)
    for cell in settings:
        assert settings_of(row_of(cell)).items() <= cell.items()


def test_plans_measure_each_part_of_a_row_with_and_without_a_window():
    """A cell with a window, and one of another sample, has the plain cell it is compared with."""
    settings = [c for _, c in cells("smollm2")]
    for cell in (c for c in settings if c["method"] != "dense"):
        plain = {"recent": 0, "sample": "0", "far": [0, 0], "counted": False}
        names = ("method", "ranks", "shared", "keep", "length")
        assert find(settings, **{n: cell[n] for n in names}, **plain)


class Tokens(quality.Subject):
    """A subject without texts: windows of random tokens."""

    def __init__(self, folder):
        self.name, self.model, self.folder = "tiny", tiny.model("llama"), folder

    def evaluation(self, text, length, count):
        return tiny.tokens(count, length, seed=len(text))

    def calibration(self, sample):
        return tiny.tokens(6, 40, seed=1).split(1)

    def moments(self, sample, far):
        return lrattn.calibrate(
            self.model, self.calibration(sample), gather=("fisher", "metric", "rotated"), far=far, progress=False
        )


def cell_of(row, keep, **changed):
    plain = {"model": "smollm2", "sample": "0", "recent": 0, "sinks": 0, "counted": False, "group_size": 2}
    return {**plain, **settings_of(row), "keep": keep, "length": 40, "windows": 3, "probe": False, **changed}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    subject, held = Tokens(tmp_path_factory.mktemp("kept")), []
    near = {"recent": 8, "sinks": 2}
    for cell in (
        cell_of(quality_plan.DENSE, 1.0),
        cell_of(PALU, 1.0),
        cell_of(PALU, 0.5),
        cell_of(JOINT, 0.5),
        cell_of(PALU, 0.5, **near),
        cell_of(PALU, 0.5, **near, counted=True),
        cell_of(PALU, 0.01),
        cell_of(replace(PALU, refine=9), 0.5),
        cell_of(NESTED, 0.5),
        cell_of(NESTED, 0.75),
    ):
        held.append(cell | quality.run(subject, cell, held))
    return held


def test_cells_measure_what_their_settings_say(measured):
    dense, whole, half, joint, beside, counted, never, refined, *nested = measured
    assert abs(whole["texts"]["news"]["excess"]) < 1e-5 < abs(half["texts"]["news"]["excess"])
    own = dense["texts"]["news"]
    assert own["perplexity"] == pytest.approx(math.exp(fmean(own["losses"])), rel=1e-5)
    assert half["achieved_keep"] == half["whole_keep"] == 0.5 and half["predicted"] is None
    assert joint["predicted"] > 0 and len(joint["predicted_layers"]) == 3 and joint["key_share"] == 1
    assert beside["factors"] == half["factors"] != joint["factors"] and beside["texts"] != half["texts"]
    assert beside["whole_keep"] == 0.5 + 10 / 40
    assert 0.4 < counted["whole_keep"] <= 0.5 and counted["achieved_keep"] < 0.26
    assert refined["achieved_keep"] == 0.5 and refined["texts"] != half["texts"]
    assert [cell["achieved_keep"] for cell in nested] == [0.5, 0.75]
    assert nested[0]["texts"]["news"]["excess"] > nested[1]["texts"]["news"]["excess"]
    assert never["impossible"].startswith("keep: expected at least") and "texts" not in never


def test_what_is_trained_for_every_keep_is_trained_once(tmp_path, monkeypatch):
    subject, cell = Tokens(tmp_path), cell_of(NESTED, 0.5)
    made = subject.factors(cell)
    monkeypatch.setattr(lrattn, "refine", lambda *_, **__: pytest.fail("trained again"))
    again, wider = subject.factors(cell), subject.factors(cell | {"keep": 0.75})
    assert quality.digest_of(made) == quality.digest_of(again) and wider.keep == 0.75


def test_a_window_of_a_cell_is_the_window_of_attention(measured, tmp_path):
    subject = Tokens(tmp_path)
    half, beside = measured[2], measured[4]
    factors = lrattn.compress(subject.model, method="palu", ranks="fisher", keep=0.5, group_size=2,
                              moments=subject.moments("0", (0, 0)), progress=False)  # fmt: skip
    assert quality.digest_of(factors) == half["factors"]
    with latent_attention(subject.model, factors, recent=8, sinks=2):
        found = losses(subject.model, subject.evaluation("news", 40, 3), progress=False)
    assert found == pytest.approx(beside["texts"]["news"]["losses"], abs=1e-5)


def test_tables_and_plots_hold_what_was_measured(measured, tmp_path):
    near = dict(zip(("recent", "sinks"), quality_plan.NEAR, strict=True))
    measured = [c | {"length": quality_plan.LENGTH} | (near if c["recent"] else {}) for c in measured]
    shown = quality_table.table(measured, "smollm2")
    for cell in measured[2:4]:
        for text in texts.TEXTS:
            assert f"{cell['texts'][text]['excess']:.3f} ±{cell['texts'][text]['error']:.3f}" in shown
    beyond = quality_table.window(measured, "smollm2")
    for cell in measured[4:6]:
        assert f"{cell['whole_keep']:.3f}" in beyond and f"{cell['texts']['news']['excess']:.3f} ±" in beyond
    results = {"cells": measured}
    page = quality_table.pasted("a\n<!-- bench.quality: smollm2 -->\nold\n<!-- end -->\nb\n", results)
    assert page == f"a\n<!-- bench.quality: smollm2 -->\n\n```text\n{shown}\n```\n\n<!-- end -->\nb\n"
    assert quality_table.pasted(page, results) == page
    quality_plot.plot(results, tmp_path / "quality.json")
    made = {path.stem.removeprefix("quality-") for path in tmp_path.glob("*.png")}
    assert made == set(quality_plot.shown(results)) >= {"wikipedia", "news", "window", "layers", "split"}


def test_passages_are_planted_at_their_distance_in_one_sequence_of_each_pair():
    ids = torch.arange(probe.SKIP + 2 * probe.BLOCK * 9)
    rows = probe.sequences(ids)
    tail, where = probe.places()
    for pair in rows.split(2):
        assert torch.equal(pair[0, tail:], pair[1, tail:])
        for i, (again, planted) in enumerate(where):
            assert again - (planted + probe.PASSAGE) == sorted(probe.DISTANCES)[i // 2] and planted >= probe.LEAD
            passage = pair[0, again : again + probe.PASSAGE]
            times = [int((row == passage[0]).sum()) for row in pair]
            assert times == [2, 1][:: 1 if i % 2 == 0 else -1]
            assert torch.equal(pair[i % 2, planted : planted + probe.PASSAGE], passage)


class Copier(torch.nn.Module):
    """Predicts what followed the last earlier occurrence of a token within `reach`, else nothing in particular."""

    def __init__(self, vocabulary, reach):
        super().__init__()
        self.vocabulary, self.reach = vocabulary, reach

    def forward(self, input_ids, use_cache, logits_to_keep):
        row = input_ids[0]
        logits = torch.zeros(1, len(row), self.vocabulary)
        for t in range(len(row) - logits_to_keep, len(row)):
            earlier = (row[max(t - self.reach, 0) : t] == row[t]).nonzero()
            if len(earlier):
                logits[0, t, row[max(t - self.reach, 0) + earlier[-1, 0] + 1]] = 40.0
        return type("Out", (), {"logits": logits[:, -logits_to_keep:]})


def test_the_probe_tells_how_far_a_model_copies():
    distances = (128, 512)
    whole = probe.sequences(torch.arange(probe.SKIP + probe.BLOCK * 5), distances, pairs=1)
    tokens, rows = whole.unique(return_inverse=True)
    near, far = probe.measure(Copier(len(tokens), 300), rows, distances=distances, progress=False)
    assert near["gain"] == pytest.approx(math.log(len(tokens))) and near["again_right"] == 1
    assert far["gain"] == 0 and far["again_right"] == far["first_right"] == near["first_right"] < 0.1
    assert near["first"] == pytest.approx(math.log(len(tokens))) and near["distance"] == 128


@pytest.mark.parametrize("distances", [(32, 512), (128, 192)])
def test_passages_that_would_lie_over_one_another_are_refused(distances):
    with pytest.raises(ValueError, match="distances: expected"):
        probe.places(distances)
