"""What bench.quality and bench.evaluation.probe say of their cells."""

import math
import re
from dataclasses import replace
from itertools import accumulate
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import tiny
import torch

import lrattn
from bench import quality
from bench.evaluation import probe, quality_frontier, quality_plan, quality_plot, quality_table
from bench.evaluation.quality_plan import JOINT, NESTED, PALU, PLANS, cells, find, quantised, row_of, settings_of
from bench.support import texts
from lrattn.integrations.transformers import latent_attention
from lrattn.integrations.transformers.perplexity import losses, perplexity


def test_the_halves_of_the_news_are_apart():
    parts = [texts.news(half).split("\n\n") for half in ("calibration", "evaluation")]
    assert all(len(part) > 140 for part in parts) and not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("name", PLANS)
def test_cells_are_told_apart_by_their_settings_and_the_frontier_is_a_part_of_them(name):
    stages, settings = zip(*cells(name))
    frontier = [c for _, c in cells(name, frontier=True)]
    assert settings[0]["method"] == frontier[0]["method"] == "dense" and list(stages) == sorted(stages)
    assert all(find(settings, **c) is c and settings_of(row_of(c)).items() <= c.items() for c in settings)
    assert all(find(settings, **c) for c in frontier) and len(frontier) == len({repr(c) for c in frontier})
    for row in map(row_of, frontier[1:]):
        assert row.method == "dense" or quality_frontier.family(row) in quality_plot.FRONTIER
        assert len(row.label) < quality_table.LABEL


def test_plans_measure_each_part_of_a_row_with_and_without_a_window():
    """A cell with a window, and one of another sample, has the plain cell it is compared with; the frontier begins with
    what decides."""
    settings = [c for _, c in cells("smollm2")]
    for cell in (c for c in settings if c["method"] != "dense" and not row_of(c).packed):
        plain = {"recent": 0, "sample": "0", "far": [0, 0], "counted": False}
        assert find(settings, **{n: cell[n] for n in ("method", "ranks", "shared", "keep", "length")}, **plain)
    first = [row_of(c).label for _, c in cells("smollm2", frontier=True) if c["method"] != "dense"][:11]
    assert first[:2] == ["rebuilt joint auto"] * 2 and {"kivi-32 4 bits", "kivi-32 8 bits"} <= set(first)


def test_processes_share_the_cells(monkeypatch, tmp_path):
    out = tmp_path / "quality.json"
    out.write_text('{"cells": []}')

    def asked(*words):
        monkeypatch.setattr("sys.argv", ["quality", "--frontier", "--windows", "1", "--out", str(out), *words])
        chosen = []
        monkeypatch.setattr(quality, "measure", lambda cells, *_, **__: chosen.extend(cells))
        quality.main()
        return chosen

    whole, *parts = asked(), asked("--part", "0/2"), asked("--part", "1/2")
    dense = [c for c in whole if c["method"] == "dense"]
    others = whole[len(dense) :]
    assert dense and parts == [dense + others[::2], dense + others[1::2]]
    assert {c["method"] for c in asked("--method", "quantised")} == {"dense", "quantised"}
    with pytest.raises(SystemExit):
        asked("--part", "2/2")


class Tokens(quality.Subject):
    """A subject without texts: windows of random tokens."""

    def __init__(self, folder):
        self.name, self.model, self.folder = "tiny", tiny.model("llama"), folder

    def evaluation(self, text, length, count):
        return tiny.tokens(count, length, seed=len(text))

    def calibration(self, sample):
        return tiny.tokens(6, 40, seed=1).split(1)

    def moments(self, sample, row):
        planned = replace(row, far=quality_plan.NEAR) if any(row.far) else row  # whose window is of these lengths
        gather = quality.gathered("smollm2", sample, planned)
        return lrattn.calibrate(self.model, self.calibration(sample), gather=gather, far=row.far, progress=False)


def cell_of(row, keep, **changed):
    plain = {"model": "smollm2", "sample": "0", "recent": 0, "sinks": 0, "counted": False, "group_size": 2}
    return {**plain, **settings_of(row), "keep": keep, "length": 40, "windows": 3, "probe": False, **changed}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    subject, held = Tokens(tmp_path_factory.mktemp("kept")), []
    near, data, kivi = {"recent": 8, "sinks": 2}, {"sample": ""}, quantised("kivi-32", 4)[0]
    for row, keep, *changed in (
        (quality_plan.DENSE, 1.0),
        (PALU, 1.0),
        (PALU, 0.5),
        (JOINT, 0.5),
        (PALU, 0.5, near),
        (PALU, 0.5, near | {"counted": True}),
        (PALU, 0.01),
        (replace(PALU, refine=9), 0.5),
        (NESTED, 0.5),
        (NESTED, 0.75),
        (replace(JOINT, bits="auto"), 0.125),
        (replace(PALU, bits=8), 0.25),
        (kivi, 1.0, data),
        (kivi, 1.0, data | {"recent": 32, "sinks": 2}),
        (quantised("half", 16)[0], 1.0, data),
        *((row, 0.3) for row in quality_plan.UNROTATED),
        *((replace(row, far=(8, 2)), 0.3, near) for row in quality_plan.CHUNKED),
    ):
        cell = cell_of(row, keep, **dict(*changed))
        held.append(cell | quality.run(subject, cell, held))
    return held


@pytest.mark.slow
def test_losses_are_the_model_s_own_and_errors_of_differences_not_of_windows(measured, tmp_path):
    subject, (own, half) = Tokens(tmp_path), (measured[i]["texts"]["news"] for i in (0, 2))
    windows = subject.evaluation("news", 40, 3)
    with torch.no_grad():
        found = [subject.model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert own["losses"] == pytest.approx(found, rel=1e-5) and len(set(found)) == 3
    assert perplexity(subject.model, windows, progress=False) == pytest.approx(own["perplexity"], rel=1e-5)
    assert own["perplexity"] == pytest.approx(math.exp(fmean(found)), rel=1e-5)
    gaps = [a - b for a, b in zip(half["losses"], own["losses"])]
    assert half["excess"] == pytest.approx(fmean(gaps), abs=2e-6)
    assert half["error"] == pytest.approx(stdev(gaps) / math.sqrt(3), rel=1e-3)


def test_cells_measure_what_their_settings_say(measured):
    _, whole, half, joint, beside, counted, never, refined, *nested = measured[:10]
    assert abs(whole["texts"]["news"]["excess"]) < 1e-5 < abs(half["texts"]["news"]["excess"])
    assert half["achieved_keep"] == half["whole_keep"] == 0.5 and half["predicted"] is None
    assert joint["predicted"] > 0 and len(joint["predicted_layers"]) == 3 and joint["key_share"] == 1
    assert beside["factors"] == half["factors"] != joint["factors"] and beside["texts"] != half["texts"]
    assert beside["whole_keep"] == 0.5 + 10 / 40
    assert 0.4 < counted["whole_keep"] <= 0.5 and counted["achieved_keep"] < 0.26
    assert refined["achieved_keep"] == 0.5 and refined["texts"] != half["texts"]
    assert [cell["achieved_keep"] for cell in nested] == [0.5, 0.75]
    assert nested[0]["texts"]["news"]["excess"] > nested[1]["texts"]["news"]["excess"]
    assert never["impossible"].startswith("keep: expected at least") and "texts" not in never


def test_cells_of_fewer_bits_count_every_byte(measured):
    """A token of the tiny model is 3 layers of 2 * 4 * 32 numbers, 1536 bytes."""
    auto, palu, kivi, near, half, *absorbed = measured[10:]
    channels, rotated, apart, joint = absorbed
    for cell in measured[10:]:
        assert cell["dense_bytes_per_token"] == 1536
        assert cell["achieved_keep"] == cell["bytes_per_token"] / 1536
        window = cell["recent"] + cell["sinks"]
        dense = 1536 - (cell["bytes_per_token"] if cell["quantiser"] else 0)
        for n, found in cell["bytes_at"].items():
            assert found == pytest.approx(cell["bytes_per_token"] + window * dense / int(n), abs=0.06)
    assert 180 < auto["bytes_per_token"] <= 192 and 360 < palu["bytes_per_token"] <= 384
    assert kivi["bytes_per_token"] == near["bytes_per_token"] == 768 * 5 / 8 and half["bytes_per_token"] == 1536
    assert kivi["whole_keep"] == 5 / 16 and near["whole_keep"] == pytest.approx(5 / 16 * 6 / 40 + 34 / 40)
    assert sum(map(sum, palu["widths"])) > 0.8 * sum(map(sum, measured[2]["widths"]))  # at half of its bytes
    assert all(414 < cell["bytes_per_token"] <= 460 and cell["key_groups"] == 2 for cell in absorbed)  # of whole steps
    assert channels["predicted"] > rotated["predicted"] > 0 and apart["predicted"] > joint["predicted"] > 0
    assert joint["key_share"] == 1 > apart["key_share"] and joint["rows_shared"]
    told = ",".join(quality_table.keys(cell) for cell in (palu, kivi, channels, joint))
    assert re.fullmatch(r"\d+ r,,\d+ a,\d+ a", told)
    assert auto["key_share"] == 1 and palu["factors"] != measured[2]["factors"]
    lost = [cell["texts"]["news"]["losses"] for cell in (measured[0], half, near, kivi)]
    gaps = [max(abs(a - b) for a, b in zip(x, lost[0], strict=True)) for x in lost[1:]]
    assert 10 * gaps[0] < gaps[1] < gaps[2]


def test_keys_read_a_share_of_a_row_s_bytes(tmp_path):
    """Keys that ride read a row's first segments, with their scales, padded; keys apart their own."""
    subject = Tokens(tmp_path)

    def layer(**changes):
        given = {"moments": subject.moments("0", JOINT), "progress": False, "group_size": 4}
        return lrattn.compress(subject.model, None, JOINT.method, **given, **changes).layers[1]

    ride = layer(shared="ride", bits="auto", keep=0.15)
    (form,) = ride.values.formats
    ends = list(accumulate(rank for rank, _ in form.segments))
    segments = form.segments[: 1 + ends.index(ride.keys.width)]
    assert 0 < len(segments) < len(form.segments)
    assert quality.key_bytes(ride) == sum(-(-r * b // 128) * 16 for r, b in segments) + 4
    plain = replace(ride, values=replace(ride.values, format=None))
    chunked, given = (replace(plain, **form) for form in ({"chunk": 64}, {"rope": None}))
    forms = ride, plain, chunked, replace(plain, chunk=128), given, replace(given, max_position=64)
    assert len({quality.digest_of(lrattn.Factors((own,))) for own in forms}) == len(forms)
    assert quality.key_bytes(plain) == 2 * plain.keys.width < plain.bytes_per_token
    apart = layer(shared=False, bits=4, keep=0.2)
    assert quality.key_bytes(apart) == apart.keys.latent_bytes == apart.bytes_per_token - apart.values.latent_bytes


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """Measures cells with a run that stands for theirs, into a file of its own; returns those in it."""
    path = tmp_path / "quality.json"
    monkeypatch.setattr(quality, "Subject", lambda name: SimpleNamespace(name=name, folder=tmp_path))

    def measuring(run, *wanted, again=False):
        monkeypatch.setattr(quality, "run", lambda _, cell, held: run(cell, path))
        quality.measure(wanted, path, math.inf, again=again)
        return quality.held_in(path)

    return measuring


def test_cells_of_other_processes_stay(measuring, tmp_path):
    cell, trained = cell_of(PALU, 0.5), tmp_path / "smollm2-trained.factors"

    def run(cell, path):
        with quality.updated(path) as others:
            others.append(cell | {"keep": 0.9, "texts": "another's"})
        return {"texts": "own"}

    def lacks(*_):
        raise ImportError("no package")

    assert [c["texts"] for c in measuring(run, cell)] == ["another's", "own"]
    trained.touch()
    assert [c["texts"] for c in measuring(run, cell, again=True)] == ["another's", "another's", "own"]
    assert not trained.exists()
    assert len(measuring(lacks, cell_of(quantised("quanto", 4)[0], 1.0))) == 3
    with pytest.raises(ImportError):
        measuring(lacks, cell | {"keep": 0.3})


def test_the_dense_model_is_measured_again_only_where_it_alone_is_asked_for(measuring):
    dense, cell = cell_of(quality_plan.DENSE, 1.0), cell_of(PALU, 0.5)
    ran = []
    for again, wanted, expected in (
        (False, [dense, cell], ["dense", "palu"]),
        (True, [dense, cell], ["palu"]),
        (True, [dense], ["dense"]),
        (False, [dense, cell], []),
    ):
        held = measuring(lambda cell, _: ran.append(cell["method"]) or {"texts": "own"}, *wanted, again=again)
        assert ran == expected and len(held) == 2
        ran.clear()


def points(row, *shares_and_losses):
    return [quality_frontier.Point({}, row, share, lost, 0.001) for share, lost in shares_and_losses]


@pytest.mark.parametrize(
    "low_rank, expected",
    [
        ((0.05, 0.001), r"up to 31% of the dense bytes \(5.0 bits a number\) low rank loses less .* wins at no bytes"),
        ((0.06, 0.05), "up to 25% .* against rotated 4 bits 0.080 .*; from 31% .* plain quantisation loses less"),
        ((0.2, 0.19), "^from 25% of the dense bytes .* plain quantisation loses less"),
        ((0.081, 0.0201), "^plain quantisation wins at no bytes"),
    ],
)
def test_who_wins_is_told_from_cells(low_rank, expected):
    """One quantiser loses 0.08 at a quarter of the bytes, another 0.02 at 5 / 16. One at more bytes that loses more
    says nothing; nor does a difference within two standard errors."""
    (rotated, kivi), (first, second) = (quantised(name, 4)[0] for name in ("rotated", "kivi-32")), low_rank
    dense = points(rotated, (0.25, 0.08), (0.4, 0.5)) + points(kivi, (5 / 16, 0.02))
    own = points(replace(JOINT, bits="auto"), (0.24, first), (0.3, second))
    assert re.search(expected, quality_frontier.verdict(dense + own))
    assert quality_frontier.verdict(dense) == quality_frontier.verdict(own) == ""


@pytest.fixture(scope="module")
def full(measured):
    """The cells as of the plan's length and window."""
    near, far = dict(zip(("recent", "sinks"), quality_plan.NEAR, strict=True)), {"far": list(quality_plan.NEAR)}
    own = (c | {"length": quality_plan.LENGTH} | (near if c["recent"] else {}) for c in measured)
    return [c | (far if any(c["far"]) else {}) for c in own]


def test_the_frontier_renders_from_whatever_cells_there_are(full):
    assert "frontier" not in quality_table.sections({"cells": full[:10]})
    assert "frontier" not in quality_plot.shown({"cells": full[:10]})
    sections = quality_table.sections({"cells": full})
    for cell in full[10:]:
        window = f"{cell['recent']}+{cell['sinks']}" if cell["recent"] else ""
        name = f"{row_of(cell).label:<{quality_table.LABEL}}{window:<6}"
        line = next(line for line in sections["frontier"].splitlines() if line.startswith(name))
        assert f"{cell['bytes_per_token']:.0f}" in line and f"±{cell['texts']['news']['error']:.3f}" in line
    for near, field in ((False, lambda c: c["bytes_per_token"]), (True, lambda c: c["bytes_at"]["8192"])):
        found = quality_frontier.points(full, "smollm2", near)
        assert found and all(bool(p.cell["recent"]) == near for p in found)
        assert [p.share for p in found] == sorted(field(p.cell) / 1536 for p in found)
    assert row_of(full[10]).label not in sections["predicted"]
    assert sections["frontier-words"].startswith("* SmolLM2-135M-Instruct, 3 kv heads, without a dense window: ")
    for some in (full[10:11], full[12:13], full[13:14]):
        assert "frontier" in quality_table.sections({"cells": some})
        quality_plot.PLOTS["frontier"].draw(some)


def test_tables_and_plots_hold_what_was_measured(full, tmp_path):
    shown, beyond = quality_table.table(full, "smollm2"), quality_table.window(full, "smollm2")
    for cell in full[2:4]:
        for found in cell["texts"].values():
            assert f"{found['excess']:.3f} ±{found['error']:.3f}" in shown
    for cell in full[4:6]:
        assert f"{cell['whole_keep']:.3f}" in beyond and f"{cell['texts']['news']['excess']:.3f} ±" in beyond
    results, page = {"cells": full}, "a\n<!-- bench.quality: smollm2 -->\n{}<!-- end -->\nb\n"
    pasted = page.format(f"\n```text\n{shown}\n```\n\n")
    assert all(quality_table.pasted(before, results) == pasted for before in (page.format("old\n"), pasted))
    quality_plot.plot(results, tmp_path / "quality.json")
    sizes = {path.stem.removeprefix("quality-"): path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(sizes) == set(quality_plot.shown(results)) >= {*texts.TEXTS, "window", "layers", "split", "frontier"}
    assert min(sizes.values()) > 10_000


def test_what_is_trained_for_every_keep_is_trained_once(tmp_path, monkeypatch):
    subject, cell = Tokens(tmp_path), cell_of(NESTED, 0.5)
    made = subject.factors(cell)
    monkeypatch.setattr(lrattn, "refine", lambda *_, **__: pytest.fail("trained again"))
    again, wider = subject.factors(cell), subject.factors(cell | {"keep": 0.75})
    assert quality.digest_of(made) == quality.digest_of(again) and wider.keep == 0.75


def test_a_window_of_a_cell_is_the_window_of_attention(measured, tmp_path):
    subject, half, beside = Tokens(tmp_path), measured[2], measured[4]
    moments = subject.moments("0", PALU)
    factors = lrattn.compress(subject.model, [], "palu", 0.5, 2, ranks="fisher", moments=moments, progress=False)
    assert quality.digest_of(factors) == half["factors"]
    with latent_attention(subject.model, factors, recent=8, sinks=2):
        found = losses(subject.model, subject.evaluation("news", 40, 3), progress=False)
    assert found == pytest.approx(beside["texts"]["news"]["losses"], abs=1e-5)


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
            begin = max(t - self.reach, 0)
            for earlier in (row[begin:t] == row[t]).nonzero()[-1:, 0]:
                logits[0, t, row[begin + earlier + 1]] = 40.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


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
