"""What bench.evaluation.quantisers and bench.evaluation.quantised give back, and count."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from bench.evaluation import quantised, quantisers
from lrattn.compression.substitute import substituted
from lrattn.models.layers import attention_layers

QUANTISED = [("kivi-32", 2), ("kivi-32", 4), ("kivi-64", 3), ("rotated", 2), ("rotated", 4)]


@pytest.mark.parametrize("bits, error", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (8, 4.105e-5)])
def test_gaussian_levels_are_those_of_the_tables(bits, error):
    """Max (1960); 43.87 dB at 8 bits, a hundredth below the limit sqrt(3) pi / 2 / 4^bits of Panter and Dite."""
    levels = quantisers.gaussian_levels(bits)
    assert torch.allclose(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    x = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20))
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert (nearest - x).square().mean().item() == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("name, bits", QUANTISED)
def test_quantisers_err_as_their_steps_say(name, bits):
    """On Gaussian numbers: a twelfth of the squared step, where the range of N of them is 2^bits - 1 steps."""
    quantiser = quantisers.QUANTISERS[name]
    x = torch.randn(4 * 64 * 8, 2, 64, generator=torch.Generator().manual_seed(0))
    for side in (quantiser.keys, quantiser.values):
        found = (side(x, bits) - x).square().mean().item()
        if name == "rotated":
            assert found == pytest.approx({2: 0.1175, 4: 0.009497}[bits], rel=0.06)
        else:
            n = quantiser.tokens
            spread = x.unfold(0, n, n) if side == quantiser.keys else x.unfold(-1, n, n)
            steps = (spread.amax(-1) - spread.amin(-1)) / (2**bits - 1)
            assert found == pytest.approx(steps.square().mean().item() / 12, rel=0.15)


@pytest.mark.parametrize("name", ["kivi-32", "kivi-64"])
def test_groups_of_one_number_come_back_and_others_have_scales_of_their_own(name):
    quantiser, n = quantisers.QUANTISERS[name], quantisers.QUANTISERS[name].tokens
    per_channel = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half().float()
    keys = torch.stack([per_channel * 2**g for g in range(3) for _ in range(n)])
    assert torch.equal(quantiser.keys(keys, 2), keys)
    per_token = torch.randn(50, 2, 64 // n, 1, generator=torch.Generator().manual_seed(1)).half().float()
    values = per_token.expand(-1, -1, -1, n).flatten(2)
    assert torch.equal(quantiser.values(values, 2), values)
    ends = torch.tensor([0.0, 3.0])[torch.arange(2 * n) % 2][:, None, None].expand(-1, 2, 64)
    assert torch.equal(quantiser.keys(ends, 2), ends) and not torch.equal(quantiser.keys(ends + 1e-3, 2), ends + 1e-3)


def test_a_head_of_one_direction_keeps_its_length_and_turns_back():
    x = torch.randn(100, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 100)[:, None, None]
    found = quantisers.QUANTISERS["rotated"].keys(x, 8)
    assert ((found - x).norm(dim=-1) / x.norm(dim=-1)).max() < 0.02
    turn = quantisers.rotation(64)
    assert torch.allclose(turn @ turn.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
    assert not quantisers.QUANTISERS["rotated"].keys(torch.zeros(2, 1, 64), 4).any()


def test_bits_are_counted_by_hand():
    """32 numbers of 4 bits with a scale and a zero are 20 bytes; 64 of 3 with both 28, and with a scale alone 26."""
    for name, bits, numbers, nbytes in (("kivi-32", 4, 32, 20), ("kivi-64", 3, 64, 28), ("rotated", 3, 64, 26)):
        assert quantisers.QUANTISERS[name].bits_per_number(bits, 64) * numbers == 8 * nbytes
    assert quantisers.QUANTISERS["half"].bits_per_number(16, 64) == 16
    model = tiny.model("llama")  # 3 layers of 4 kv heads of 32: 768 numbers a token
    each, at = quantised.bytes_held(model, "kivi-32", 4, 64, 4, (100, 1000))
    assert each == 768 * 5 / 8
    assert at == pytest.approx({n: (68 * 768 * 2 + (n - 68) * each) / n for n in (100, 1000)})


@pytest.mark.parametrize("recent, sinks", [(0, 0), (64, 4)])
@pytest.mark.parametrize("name, bits", QUANTISED)
def test_no_later_token_changes_what_a_query_reads(name, bits, recent, sinks):
    """One token after another, and all at once. kv heads of 64: groups of 64 channels."""
    model, ids = tiny.model("llama"), tiny.tokens(1, 150)
    if name == "kivi-64":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny.SIZES | {"head_dim": 64})).eval()
    changed = ids.clone()
    changed[:, 100:] = tiny.tokens(1, 50, seed=2)
    with torch.no_grad(), quantised.quantised(model, name, bits, recent, sinks):
        one, other, short = (model(input_ids=x, use_cache=False).logits for x in (ids, changed, ids[:, :100]))
    assert torch.allclose(one[:, :100], other[:, :100], atol=1e-4) and torch.allclose(one[:, :100], short, atol=1e-4)
    assert not torch.allclose(one[:, 100:], other[:, 100:], atol=1e-2)


def test_groups_that_grow_are_those_of_the_tokens_so_far():
    quantiser, k = quantisers.Kivi(8), torch.randn(21, 2, 16, generator=torch.Generator().manual_seed(0))
    growing = quantiser.growing_keys(k, 2)
    for t in range(len(k)):
        begin = t - t % 8
        assert torch.equal(growing[t, : t % 8 + 1], quantiser.keys(k[begin : t + 1], 2))


def test_quantised_attention_is_attention_on_what_comes_back():
    """16 bits are the dense model, few bits are not; and the last query, whose group is complete, sees whole groups."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 96)

    def logits(attention):
        with torch.no_grad(), attention:
            return model(input_ids=ids, use_cache=False).logits

    def whole(_, __, k, v):
        quantiser = quantisers.QUANTISERS["kivi-32"]
        sides = zip((k, v), (quantiser.keys, quantiser.values), strict=True)
        return tuple(torch.stack([side(s, 3) for s in x.transpose(1, 2)]).transpose(1, 2) for x, side in sides)

    dense = logits(nullcontext())
    found = {bits: logits(quantised.quantised(model, "kivi-32", bits)) for bits in (2, 4, 8, 16)}
    gaps = {bits: (x - dense).abs().mean().item() for bits, x in found.items()}
    assert gaps[2] > 2 * gaps[4] > 20 * gaps[8] > 20 * gaps[16]
    assert (logits(quantised.quantised(model, "half", 16)) - dense).abs().max() < 0.02
    near = logits(quantised.quantised(model, "kivi-32", 2, 96, 0))
    assert torch.allclose(near, dense, atol=1e-4)
    model.model.layers = model.model.layers[:1]  # beyond, what differs before reaches the last query, too
    found = logits(quantised.quantised(model, "kivi-32", 3))
    expected = logits(substituted(model, attention_layers(model), whole))
    ends = torch.arange(31, 96, 32)
    assert torch.allclose(found[:, ends], expected[:, ends], atol=1e-4)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_groups_begin_behind_the_sinks(monkeypatch):
    given = []

    class Spy(quantisers.Kivi):
        def keys(self, k, bits):
            given.append(len(k))
            return super().keys(k, bits)

    monkeypatch.setitem(quantisers.QUANTISERS, "kivi-32", Spy(32))
    model = tiny.model("llama")
    with torch.no_grad(), quantised.quantised(model, "kivi-32", 4, 64, 4):
        model(input_ids=tiny.tokens(2, 100), use_cache=False)
    assert given == [96] * 6  # 3 layers, 2 sequences


def test_quantisers_that_cannot_be_are_refused():
    model = tiny.model("llama")
    for near in ((8, 0), (0, 4)):
        with pytest.raises(ValueError, match="recent: expected"), quantised.quantised(model, "kivi-32", 4, *near):
            pass
    windowed = tiny.model("mistral")
    with pytest.raises(ValueError, match="whole texts"), quantised.quantised(windowed, "kivi-32", 4), torch.no_grad():
        windowed(input_ids=tiny.tokens(1, 40), use_cache=False)
    with pytest.raises(ValueError, match="bits: expected 16"):
        quantisers.QUANTISERS["half"].keys(torch.zeros(1, 1, 1), 8)
    with pytest.raises(ValueError, match="sinks: expected 0"):
        quantised.attending_quantised(model, "quanto", 4, 64, 4)


def test_chunks_through_a_cache_are_the_whole(monkeypatch):
    model, ids = tiny.model("llama"), tiny.tokens(1, 80)
    made = []
    monkeypatch.setattr(quantised, "new_cache", lambda *_: made.append(DynamicCache()) or made[-1])
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        with quantised.attending_quantised(model, "quanto", 4, 128, 0):
            assert torch.allclose(model(input_ids=ids, use_cache=False).logits, dense, atol=1e-4)
            last = model(input_ids=ids, use_cache=False, logits_to_keep=50).logits
        assert torch.allclose(last, dense[:, -50:], atol=1e-4) and len(made) == 3
    assert "forward" not in model.__dict__


def test_the_quantised_cache_of_transformers():
    """The real one, where optimum-quanto is installed: 4.5 bits a number, and what it holds besides."""
    pytest.importorskip("optimum.quanto")
    model, ids = tiny.model("llama"), tiny.tokens(1, 200)
    each, at = quantised.bytes_held(model, "quanto", 4, 128, 0, (1024, 2048))
    assert each * 8 == 768 * (4 + 32 / 64)
    assert at[1024] * 1024 == each * 928 + 96 * 768 * 2  # flushed at 32 and every 128 after
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        with quantised.attending_quantised(model, "quanto", 4, 128, 0):
            found = model(input_ids=ids, use_cache=False).logits
    gaps = (found - dense).abs().amax(-1)[0]
    assert gaps[: quantised.CHUNK].max() < 1e-4 < gaps[quantised.CHUNK :].mean()
