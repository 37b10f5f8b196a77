"""What latents lose of a text: nothing where they hold all, as reckoned by hand where not, more of another text."""

from dataclasses import replace

import pytest
import tiny
import torch

import lrattn
from lrattn.attention.cache import stored
from lrattn.compression.residual import TOKENS, UNLIKE, residual, unlike
from lrattn.compression.substitute import substituted
from lrattn.models.layers import attention_layers

FAR = (8, 2)


def texts(seed=1, low=2, high=160, batch=3, length=90):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (batch, length), generator=g)


def heads_of(model, ids):
    """Keys and values [T, Hkv, D] of each layer."""
    found = []

    def take(_, __, k, v):
        found.append([x[0].transpose(0, 1) for x in (k, v)])
        return k, v

    with torch.no_grad(), substituted(model, attention_layers(model), take):
        model(ids[None], use_cache=False)
    return found


def lost(given, back, first):
    return ((back - given)[first:].square().sum() / given[first:].square().sum()).item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mqa", "gemma3"])
def test_it_is_the_energy_that_comes_back_missing(family):
    """Of keys and values, over the layers, but for the first tokens, which are held dense."""
    model, ids = tiny.model(family), texts()
    factors = lrattn.compress(model, [ids], keep=0.4, far=FAR, progress=False)
    assert factors.layers[0].packed
    shares = []
    for which in (0, 2):  # the first sequence and the last
        positions, parts = torch.arange(ids.shape[1]), []
        for layer, (k, v) in zip(factors.layers, heads_of(model, ids[which]), strict=True):
            back = layer.rebuild(*stored(layer, *layer.project(k, v, positions)), positions)
            parts.append([(y - x, x) for x, y in zip((k, v), back, strict=True)])
        shares.append(parts)
    expected = []
    for layer in zip(*shares, strict=True):
        for side in range(2):
            gone, whole = (sum(p[side][i][FAR[1] :].square().sum().item() for p in layer) for i in (0, 1))
            expected.append(gone / whole)
    assert factors.residual == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert 1e-4 < factors.residual < 1


@pytest.mark.parametrize("method", ["lrattn", "lrattn-rebuilt", "svd"])
def test_nothing_is_lost_at_full_rank(method):
    model = tiny.model("llama")
    factors = lrattn.compress(model, [texts()], method, keep=1.0, bits=16, progress=False)
    assert factors.residual < 1e-9


def test_of_a_text_of_other_tokens_more_is_lost_and_that_is_said():
    model = tiny.model("llama")
    own, like, other = texts(1, 2, 40, 8), texts(2, 2, 40), texts(3, 60, 160)
    factors = lrattn.compress(model, [own], keep=0.3, far=FAR, progress=False)
    near, far = residual(model, factors, [like]), residual(model, factors, [other])
    assert factors.residual <= near < UNLIKE * factors.residual < far
    line, numbers = unlike(model, factors, [like])
    assert line.startswith("\nlatents lose")
    assert numbers == {"residual": factors.residual, "residual_here": near, "unlike": False}
    line, numbers = unlike(model, factors, [other])
    assert line.startswith(f"\nwarning: latents lose {far:.1%} of this text's keys and values") and numbers["unlike"]
    assert unlike(model, None, [like]) == unlike(model, replace(factors, residual=None), [like]) == ("", {})


def test_rows_of_several_layers_are_whole_before_they_are_read():
    """Each layer of a run reads what all of them wrote; kept whole, nothing is lost."""
    model = tiny.model("llama")
    more = {"shared": True, "span": 3, "bits": 16, "far": FAR, "progress": False}
    whole, part = (lrattn.compress(model, [texts()], keep=keep, **more) for keep in (1.0, 0.25))
    assert whole.residual < 1e-8 and 0.05 < part.residual < 1
    positions, rows = torch.arange(90), None
    given = heads_of(model, texts()[0])
    for layer, heads in zip(part.layers, given, strict=True):
        own = layer.project(*heads, positions, wide=True)[0]
        rows = own if rows is None else rows + own
    shares = [
        lost(x, y, FAR[1])
        for layer, heads in zip(part.layers, given, strict=True)
        for x, y in zip(heads, layer.rebuild(rows.float(), None, positions), strict=True)
    ]
    assert residual(model, part, [texts()[:1]]) == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_layers_that_read_another_s_lose_what_differs():
    model = tiny.model("llama")
    factors = lrattn.compress(model, [texts()], keep=1.0, bits=16, far=FAR, progress=False)
    shared = replace(factors, donors=(0, 0, 2))
    (k0, v0), (k1, v1), _ = heads_of(model, texts()[0])
    expected = (lost(k1, k0, FAR[1]) + lost(v1, v0, FAR[1])) / 6
    assert residual(model, shared, [texts()[:1]]) == pytest.approx(expected, rel=1e-3)


def test_it_is_kept_in_the_file_and_forgotten_by_what_changes_factors(tmp_path):
    model = tiny.model("llama")
    factors = lrattn.compress(model, [texts()], keep=0.5, bits=16, progress=False)
    factors.save(tmp_path / "f")
    assert lrattn.Factors.load(tmp_path / "f").residual == factors.residual > 0
    assert lrattn.narrowed(factors, 0.3).residual is None
    refined = lrattn.refine(model, factors, [texts()], steps=1, progress=False)
    assert refined.residual is None
    assert factors.to(dtype=torch.bfloat16).residual == factors.residual
    made = lrattn.compress(model, [texts(1, 2, 160, 9)], keep=0.5, bits=16, refine=1, progress=False)
    assert made.residual is None
    moments = lrattn.calibrate(model, [texts()], gather=("before", "metric"), progress=False)
    assert lrattn.compress(model, moments=moments, keep=0.5, far=(0, 0), progress=False).residual is None


def test_padding_is_no_text_and_long_ones_are_cut():
    model, ids = tiny.model("llama"), texts(batch=1)
    factors = lrattn.compress(model, [ids], keep=0.3, far=FAR, progress=False)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 7), torch.ones(1, 90)), 1).long()
    batch = {"input_ids": padded, "attention_mask": mask}
    assert residual(model, factors, [batch]) == pytest.approx(factors.residual, rel=1e-6)
    assert TOKENS == 1024


@pytest.mark.parametrize("given", [[], [torch.zeros(1, 2, dtype=torch.long)]])
def test_no_tokens_are_refused(given):
    model = tiny.model("llama")
    factors = lrattn.compress(model, [texts()], keep=0.3, far=FAR, progress=False)
    with pytest.raises(ValueError, match="batches: expected"):
        residual(model, factors, given)


def test_wrong_ones_are_refused():
    factors = lrattn.compress(tiny.model("llama"), [texts()], keep=0.3, progress=False)
    for wrong in (-0.1, float("nan"), "0.1", True):
        with pytest.raises(ValueError, match="residual: expected"):
            replace(factors, residual=wrong)
