"""Fewer latents of the same factors: prefixes are factors of their own, meet their budget, and train together."""

import pytest
import tiny
import torch
from test_refine import divergence, refined, started, text

import lrattn
from lrattn.compression.refine import SHARES, _Run, parted
from lrattn.compression.substitute import Window
from lrattn.factors.layer import sides_of
from lrattn.models.layers import attention_layers


@pytest.mark.parametrize("method", ["svd", "palu", "svd-llm", "kq-svd", "matryoshka", "matryoshka-pca"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prefix_is_the_factors_of_its_rank(family, method):
    model, ids, found = tiny.model(family), text(), 0
    wide, made = (started(model, ids, method, keep, ranks="uniform") for keep in (0.8, 0.5))
    for a, b in zip(lrattn.narrowed(wide, 0.5).layers, made.layers, strict=True):
        for one, other in zip(sides_of(a.keys, a.values), sides_of(b.keys, b.values), strict=True):
            if one.ranks == other.ranks:
                torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-4, atol=1e-5)
                found += 1
    assert found


@pytest.mark.every(3)
@pytest.mark.parametrize("shared", [False, "ride", True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_budget_is_met_from_below(family, shared, tmp_path):
    model, ids = tiny.model(family), text()
    wide = started(model, ids, keep=0.9, shared=shared)
    for keep in (0.9 * wide.keep, 0.7 * wide.keep, 0.5 * wide.keep):
        cut = lrattn.narrowed(wide, keep)
        assert keep - 32 / wide.dense_bytes_per_token < cut.keep <= keep
        for a, b in zip(cut.layers, wide.layers, strict=True):
            assert all(n <= rank for n, rank in zip(a.values.ranks, b.values.ranks, strict=True))
    cut.save(tmp_path / "cut.safetensors")
    assert lrattn.Factors.load(tmp_path / "cut.safetensors").keep == cut.keep
    whole = lrattn.narrowed(wide, 0.9)  # what was asked of `compress`, which can make less where groups are full
    assert whole.keep == wide.keep
    assert divergence(model, whole, ids) == pytest.approx(divergence(model, wide, ids), abs=1e-6)
    assert divergence(model, cut, ids) > divergence(model, wide, ids)


def test_rows_that_values_ride_on_are_cut_in_both_runs():
    """What keys read stays first in the row, and values read what they read of it before, and their own."""
    wide = started(tiny.model("llama"), text(), shared="ride")
    cut = lrattn.narrowed(wide, 0.2)
    layer, other = next((a, b) for a, b in zip(wide.layers, cut.layers, strict=True) if a.keys.ranks != a.values.ranks)
    k, row, rank, cut_row = layer.keys.width, layer.values.width, other.keys.width, other.values.width
    assert 0 < rank < k and 0 < cut_row - rank <= row - k
    kept = [*range(rank), *range(k, k + cut_row - rank)]
    assert torch.equal(other.values.down, layer.values.down[:, kept])
    assert torch.equal(other.values.up, layer.values.up[:, kept])
    assert torch.equal(other.keys.up, layer.keys.up[:, :rank])


@pytest.mark.every(3)
@pytest.mark.parametrize("method, keep", [("lrattn-rebuilt", 0.36), ("lrattn", 0.7), ("matryoshka", 0.9)])
def test_prefixes_are_trained_together(method, keep):
    """Cuts lose less after nested training than before, and than after training of the whole alone."""
    model, ids = tiny.model("llama"), text(8)
    start = started(model, ids, method, keep)  # nearly all: little to learn alone
    nested, alone = (refined(model, start, ids, steps=64, nested=nested) for nested in (True, False))
    for share in (0.6, 0.8):
        cuts = [lrattn.narrowed(f, share * start.keep) for f in (nested, start, alone)]
        lost = [divergence(model, f, ids[::8]) for f in cuts]
        assert lost[0] < 0.97 * lost[1] and lost[0] < lost[2]


@pytest.mark.parametrize("sequences", [4, 7, 8, 24])
def test_every_lesson_meets_every_share(sequences, monkeypatch):
    model, ids = tiny.model("llama"), tiny.tokens(sequences, 6)
    start = started(model, ids, "svd", 0.9)
    _, lessons = parted([ids])
    run = _Run(model, attention_layers(model), start, Window(), SHARES)
    at, met = run.begun(lessons[:1]), {tuple(lesson.tolist()): [] for lesson in lessons}

    def divergence(ids, expected, tensors, share):
        met[tuple(ids.tolist())].append(share)
        return sum(x.square().sum() for x in tensors.values())

    monkeypatch.setattr(run, "divergence", divergence)
    for _ in range(len(SHARES) * len(lessons)):
        at = run.learned(at, lessons, 0.0)
    assert all(sorted(shares) == sorted(SHARES) for shares in met.values())
