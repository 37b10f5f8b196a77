"""What bench.evaluation.quantisers and bench.evaluation.quantised give back, and count."""

from contextlib import nullcontext
from itertools import product

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from bench.evaluation import quantised, quantisers
from bench.evaluation.quantisers import QUANTISERS
from lrattn.compression.substitute import substituted
from lrattn.models.layers import attention_layers

QUANTISED = [("kivi-32", 2), ("kivi-32", 4), ("kivi-64", 3), ("rotated", 2), ("rotated", 4)]
# Mean squared errors of a unit Gaussian's levels. Max (1960); 43.87 dB at 8 bits, a hundredth below the limit
# sqrt(3) pi / 2 / 4^bits of Panter and Dite.
GAUSSIAN = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 4.105e-5}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(model, ids, attention=None, **changes):
    with torch.no_grad(), attention or nullcontext():
        return model(input_ids=ids, use_cache=False, **changes).logits


@pytest.mark.parametrize("bits, error", GAUSSIAN.items())
def test_gaussian_levels_are_those_of_the_tables(bits, error):
    levels = quantisers.gaussian_levels(bits)
    assert torch.allclose(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    x = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20))
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert (nearest - x).square().mean().item() == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n", [32, 64])
def test_what_comes_back_is_the_nearest_level_of_its_group(n, bits):
    """2^bits of them from the least number to the largest, of n tokens of a key's channel or n channels of a value."""
    quantiser, x = QUANTISERS[f"kivi-{n}"], normal(256, 2, 64)
    x[:n] = x[:1]  # groups of one number
    for side, axis in ((quantiser.keys, 0), (quantiser.values, 2)):
        groups, found = (y.unflatten(axis, (-1, n)).movedim(axis + 1, -1) for y in (x, side(x, bits)))  # [..., n]
        low, high = groups.amin(-1, True), groups.amax(-1, True)
        levels = low.half() + ((high - low) / (2**bits - 1)).half().float() * torch.arange(2**bits)  # [..., 2^bits]
        least = (groups[..., None] - levels[..., None, :]).abs().amin(-1)
        assert torch.allclose((found - groups).abs(), least, atol=1e-6)


def test_a_head_of_one_direction_keeps_its_length_and_turns_back():
    quantiser, turn = QUANTISERS["rotated"], quantisers.rotation(64)
    x = normal(100, 3, 64) * torch.logspace(-3, 3, 100)[:, None, None]
    assert ((quantiser.keys(x, 8) - x).norm(dim=-1) / x.norm(dim=-1)).max() < 0.02
    assert torch.allclose(turn @ turn.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
    assert not quantiser.keys(torch.zeros(2, 1, 64), 4).any()
    x = normal(2048, 2, 64)
    for side, bits in product((quantiser.keys, quantiser.values), (2, 4)):
        assert (side(x, bits) - x).square().mean().item() == pytest.approx(GAUSSIAN[bits], rel=0.06)


def test_bits_are_counted_by_hand():
    """32 numbers of 4 bits with a scale and a zero are 20 bytes; 64 of 3 with both 28, and with a scale alone 26."""
    for name, bits, numbers, nbytes in (("kivi-32", 4, 32, 20), ("kivi-64", 3, 64, 28), ("rotated", 3, 64, 26)):
        assert QUANTISERS[name].bits_per_number(bits, 64) * numbers == 8 * nbytes
    assert QUANTISERS["half"].bits_per_number(16, 64) == 16
    # The tiny model: 3 layers of 4 kv heads of 32, 768 numbers a token.
    each, at = quantised.bytes_held(tiny.model("llama"), "kivi-32", 4, 64, 4, (100, 1000))
    assert each == 768 * 5 / 8
    assert at == pytest.approx({n: (68 * 768 * 2 + (n - 68) * each) / n for n in (100, 1000)})


@pytest.mark.parametrize("near", [(0, 0), (64, 4)])
@pytest.mark.parametrize("name, bits", QUANTISED)
def test_no_later_token_changes_what_a_query_reads(name, bits, near):
    """One token after another, and all at once. kv heads of 64: groups of 64 channels."""
    model, ids = tiny.model("llama"), tiny.tokens(1, 150)
    if name == "kivi-64":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny.SIZES | {"head_dim": 64})).eval()
    changed = torch.cat((ids[:, :100], tiny.tokens(1, 50, seed=2)), 1)
    one, other, short = (
        logits(model, x, quantised.quantised(model, name, bits, *near)) for x in (ids, changed, ids[:, :100])
    )
    assert torch.allclose(one[:, :100], other[:, :100], atol=1e-4) and torch.allclose(one[:, :100], short, atol=1e-4)
    assert not torch.allclose(one[:, 100:], other[:, 100:], atol=1e-2)


def test_groups_that_grow_are_those_of_the_tokens_so_far():
    quantiser, k = quantisers.Kivi(8), normal(21, 2, 16)
    growing = quantiser.growing_keys(k, 2)
    for t in range(len(k)):
        assert torch.equal(growing[t, : t % 8 + 1], quantiser.keys(k[t - t % 8 : t + 1], 2))


def test_quantised_attention_is_attention_on_what_comes_back():
    """16 bits are the dense model, few bits are not; and the last query, whose group is complete, sees whole groups."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 96)

    def found(*words):
        return logits(model, ids, quantised.quantised(model, *words))

    def whole(_, __, k, v):
        sides = zip((k, v), (QUANTISERS["kivi-32"].keys, QUANTISERS["kivi-32"].values))
        return tuple(torch.stack([side(s, 3) for s in x.transpose(1, 2)]).transpose(1, 2) for x, side in sides)

    dense = logits(model, ids)
    gaps = {bits: (found("kivi-32", bits) - dense).abs().mean().item() for bits in (2, 4, 8, 16)}
    assert gaps[2] > 2 * gaps[4] > 20 * gaps[8] > 20 * gaps[16]
    assert (found("half", 16) - dense).abs().max() < 0.02
    assert torch.allclose(found("kivi-32", 2, 96, 0), dense, atol=1e-4)
    model.model.layers = model.model.layers[:1]  # beyond, what differs before reaches the last query, too
    gaps = (found("kivi-32", 3) - logits(model, ids, substituted(model, attention_layers(model), whole))).abs()
    assert gaps[:, 31::32].max() < 1e-4 and gaps.max() > 1e-2


def test_groups_begin_behind_the_sinks(monkeypatch):
    given = []

    class Spy(quantisers.Kivi):
        def keys(self, k, bits):
            given.append(len(k))
            return super().keys(k, bits)

    monkeypatch.setitem(QUANTISERS, "kivi-32", Spy(32))
    model = tiny.model("llama")
    logits(model, tiny.tokens(2, 100), quantised.quantised(model, "kivi-32", 4, 64, 4))
    assert given == [96] * 6  # 3 layers, 2 sequences


def test_quantisers_that_cannot_be_are_refused():
    model, windowed, ids = tiny.model("llama"), tiny.model("mistral"), tiny.tokens(1, 40)
    for near in ((8, 0), (0, 4)):
        with pytest.raises(ValueError, match="recent: expected"):
            logits(model, ids, quantised.quantised(model, "kivi-32", 4, *near))
    with pytest.raises(ValueError, match="whole texts"):
        logits(windowed, ids, quantised.quantised(windowed, "kivi-32", 4))
    with pytest.raises(ValueError, match="bits: expected 16"):
        QUANTISERS["half"].keys(torch.zeros(1, 1, 1), 8)
    with pytest.raises(ValueError, match="sinks: expected 0"):
        quantised.attending_quantised(model, "quanto", 4, 64, 4)


def test_chunks_through_a_cache_are_the_whole(monkeypatch):
    model, ids, made = tiny.model("llama"), tiny.tokens(1, 80), []
    monkeypatch.setattr(quantised, "new_cache", lambda *_: made.append(DynamicCache()) or made[-1])
    dense = logits(model, ids)
    with quantised.attending_quantised(model, "quanto", 4, 128, 0):
        assert torch.allclose(logits(model, ids), dense, atol=1e-4)
        assert torch.allclose(logits(model, ids, logits_to_keep=50), dense[:, -50:], atol=1e-4)
    assert len(made) == 3 and "forward" not in model.__dict__


def test_the_quantised_cache_of_transformers():
    """The real one, where optimum-quanto is installed: 4.5 bits a number, and what it holds besides."""
    pytest.importorskip("optimum.quanto")
    model, ids = tiny.model("llama"), tiny.tokens(1, 200)
    each, at = quantised.bytes_held(model, "quanto", 4, 128, 0, (1024, 2048))
    assert each * 8 == 768 * (4 + 32 / 64)
    assert at[1024] * 1024 == each * 928 + 96 * 768 * 2  # flushed at 32 and every 128 after
    found = logits(model, ids, quantised.attending_quantised(model, "quanto", 4, 128, 0))
    gaps = (found - logits(model, ids)).abs().amax(-1)[0]
    assert gaps[: quantised.CHUNK].max() < 1e-4 < gaps[quantised.CHUNK :].mean()
