"""Where texts lie: behind padding, from a late position on, beyond what factors hold for; by each layer's own form."""

import copy
import warnings
from dataclasses import replace

import architectures
import pytest
import tiny
import torch
from latents import random_factors
from packing import sections
from passes import defined, exact_ropes, fed, same, window
from transformers import AttentionInterface, LlamaConfig

from lrattn.factors.record import Factors
from lrattn.integrations.transformers import LatentCache, latent_attention

CHUNK = 64


def made(kind="apart", near=(5, 2), **changes):
    """A model of turns that float32 holds at any position, 2^-j of a radian a token, and factors in chunks of it."""
    rope = {"rope_type": "default", "rope_theta": 2.0**16}
    model = tiny.built(LlamaConfig(**tiny.SIZES, rope_parameters=rope), 0).double()
    form = {"shared": True, "bits": 4} if kind == "one packed row" else {}
    factors = random_factors(model, 0.4, near, **form | {"ropes": exact_ropes(model), "chunk": CHUNK} | changes)
    model.set_attn_implementation("lrattn")
    return model, factors


# -------------------------------------------------------------------------------------------------- padding


def attended(module, cache, heads, mask, at):
    """Attention [B, S, Hq, D] of the last columns of q [B, Hq, T, D], k and v, as many as the cache has not yet."""
    begin = cache.get_seq_length()
    q, k, v = (x[:, :, begin:] for x in heads)
    key, value = cache.update(k, v, 0)
    return AttentionInterface()["lrattn"](module, q, key, value, mask, position_ids=at[:, begin:])[0]


@pytest.mark.parametrize("near", [(0, 0), (5, 2)], ids=str)
@pytest.mark.parametrize("kind", ["apart", "one packed row"])
def test_a_text_behind_padding_is_held_bit_for_bit_as_one_without(kind, near):
    """700 columns of padding, which are no multiple of a chunk; by a long pass, one token and three across a border."""
    model, factors = made(kind, near)
    first, module = Factors(factors.layers[:1], near=near), model.model.layers[0].self_attn
    caches, pad, g = [LatentCache(first) for _ in range(2)], 700, torch.Generator().manual_seed(0)
    heads = [torch.randn(1, n, pad + 200, 32, generator=g, dtype=torch.float64) for n in (8, 4, 4)]
    at = torch.arange(-pad, 200)[None]
    for end in (150, 190, 191, 194, 200):
        columns = at[:, : pad + end]
        padded = attended(module, caches[0], [x[:, :, : pad + end] for x in heads], columns >= 0, columns)
        alone = attended(module, caches[1], [x[:, :, pad : pad + end] for x in heads], None, columns[:, pad:])
        same(padded[:, -alone.shape[1] :], alone)
    assert caches[0].columns.offsets.tolist() == [pad] and caches[1].columns.offsets is None
    sides = first.layers[0].row_side, first.layers[0].values
    for side, *pages in zip(sides, *(cache.layers[0].pages for cache in caches)):
        if pages[1] is not None:
            for padded, alone in zip(*(sections(x, side.format) for x in pages)):
                assert torch.equal(padded.flatten(0, 1)[pad : pad + 200], alone.flatten(0, 1)[:200])


def test_a_row_has_its_offset_from_its_first_live_column_on():
    """Before that it has none; rows keep theirs when they are chosen, copied, or a pass has failed; 0s are not held."""
    model, factors = made()
    ids, mask = tiny.tokens(3, 90), torch.ones(3, 90, dtype=torch.int64)
    mask[0, :9] = mask[1, :20] = 0
    at, cache = (mask.cumsum(1) - 1).clamp_min(0) + torch.tensor([[0], [55], [0]]), LatentCache(factors)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(model, ids[:2, :15], 15, cache, mask[:2], at[:2])
    handle.remove()
    got = [fed(model, ids[:, :15], 15, cache, mask, at)]
    assert cache.columns.offsets[[0, 2]].tolist() == [9, 0]  # nobody sees what the other row has
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(model, ids[:, 15:40], 25, cache, mask, at + torch.tensor([[0], [7], [0]]))
    handle.remove()
    cache = copy.deepcopy(cache)
    got.append(fed(model, ids[:, 15:], (8, 1, 30, 36), cache, mask, at))
    assert cache.columns.offsets.tolist() == [9, -35, 0]
    want = defined(model, factors, ids, window(90, 5, 2, begins=(9, 20, 0)), mask, at)
    same(torch.cat(got, 1), want, mask)
    cache.batch_select_indices(torch.tensor([2, 1, 2]))
    assert cache.columns.offsets.tolist() == [0, -35, 0]
    cache.batch_select_indices(torch.tensor([0]))
    fed(model, ids[:1, :1], 1, cache, positions=torch.arange(91)[None])
    assert cache.columns.offsets is None


SHOWN = {  # the window; columns of a first pass, of which a row's first 8 are padding; how many a crop leaves
    "before the row has begun": ((4, 3), 8, 8),
    "where no first columns are held": ((4, 0), 12, 12),
    "after a crop to where the row had not begun": ((4, 3), 12, 6),
}


@pytest.mark.parametrize("story", SHOWN)
@pytest.mark.parametrize("hidden", [0, 1])
def test_padding_that_a_later_mask_shows(story, hidden):
    """It is none of a row's first columns, which are the next ones; where no first ones are held, it is seen."""
    near, end, kept = SHOWN[story]
    model, factors = made(near=near)
    ids, mask, later = tiny.tokens(2, 30), *torch.ones(2, 2, 30, dtype=torch.int64)
    at, cache = torch.arange(30)[None] + torch.tensor([[0], [50]]), LatentCache(factors)
    mask[1, :8] = later[0, :hidden] = 0  # with hidden=0 it shows all, as no mask does
    got = [fed(model, ids[:, :end], end, cache, mask, at)[:, :kept]]
    if kept < end:
        cache.crop(kept - end)
    got.append(fed(model, ids[:, kept:], (1, 14, 15 - kept), cache, later, at))
    seen = mask.bool()[:, None].repeat(1, 30, 1)
    seen[:, kept:] = later.bool()[:, None]
    begin = min(kept, 8)
    if near[1]:
        seen[1, :, :begin] = False
    exact = window(30, *near, begins=(0, begin))
    if kept < end:
        exact[:, kept:, kept - near[0] + 1 : kept] = False  # what a crop brings back is of latents
    want = defined(model, factors, ids, exact, seen, at)
    same(torch.cat(got, 1), want, seen.diagonal(0, 1, 2))


# --------------------------------------------------------------------------------------------- late positions


@pytest.mark.every(3)
@torch.no_grad()
@pytest.mark.parametrize("near", [(0, 0), (5, 2)], ids=str)
@pytest.mark.parametrize("begin", [4096, 65536, 4096 + 24])
def test_a_text_is_at_late_positions_as_it_is_at_the_first(begin, near):
    """At low rank: where the shift is of whole chunks; elsewhere, and of keys as given, latents lose something else."""
    model, factors = made(near=near)
    given = random_factors(model, 0.4, near)
    ids, plan = tiny.tokens(2, 150), (50, 1, 1, 20, 1, 1, 76)  # a few across a border, too
    for own in (factors, given):
        first, late = (torch.arange(150)[None] + shift for shift in (0, begin))
        want, got = (fed(model, ids, plan, LatentCache(own), positions=at) for at in (first, late))
        with latent_attention(model, own):
            whole = model(ids, position_ids=late, use_cache=False).logits
        same(whole, got)
        off = ((got - want).norm() / want.norm()).item()
        assert off < 2e-6 if own is factors and begin % CHUNK == 0 else off > 1e-2


OTHERS = {  # positions of 30 columns of two rows that do not follow one another, and what is said of the first
    "packed texts": (torch.arange(30) % 18, "18 in column 18 of row 0, as keys in chunks need, got 0"),
    "a turn from another place": (torch.arange(30) + 5 * (torch.arange(30) >= 20), "20 in column 20 of row 0, as"),
    "one row only": (torch.stack((torch.arange(30), torch.arange(30) // 29)), "1 in column 1 of row 1, as"),
}


@torch.no_grad()
@pytest.mark.parametrize("way", OTHERS)
def test_positions_that_do_not_follow_one_another_are_refused(way):
    """In a pass, or by a later one, after which the cache is as it was; in padding they may be any."""
    model, factors = made()
    at, told = OTHERS[way]
    at, ids, mask = at.expand(2, -1), tiny.tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    for chunks, hidden in ((30, 0), (20, 0), (20, 1), (1, 0)):
        cache = LatentCache(factors)
        mask[0, 0] = 1 - hidden
        with pytest.raises(ValueError, match=told) as raised:
            fed(model, ids, chunks, cache, mask, at)
        said, held = str(raised.value), cache.get_seq_length()
        assert said.endswith("use factors of method 'lrattn-rebuilt' (any positions) or 'lrattn-rotated'")
        assert "\n" not in said and len(said) < 300
        plain = torch.arange(30)[None]
        fed(model, ids[:, held:], 30, cache, mask, plain)
        assert cache.get_seq_length() == 30
    with latent_attention(model, factors), pytest.raises(ValueError, match=told):
        model(ids, position_ids=at, use_cache=False)
    mask[:, : 1 + int(told.split(" in column ")[1].split()[0])] = 0
    shown = torch.where(mask.bool(), torch.arange(30), at)
    fed(model, ids, (25, 5), LatentCache(factors), mask, shown)
    for other in (random_factors(model, 0.4), random_factors(model, 0.4, ropes=exact_ropes(model))):
        fed(model, ids, 30, LatentCache(other), positions=at)


def test_keys_in_chunks_end_with_the_table_of_their_turns():
    model, factors = made()
    at = torch.arange(2**20 - 12, 2**20)[None]
    fed(model, tiny.tokens(1, 12), 12, LatentCache(factors), positions=at)
    with pytest.raises(ValueError, match="position_ids: expected at most 1048575, as the rope has it, got 1048576"):
        fed(model, tiny.tokens(1, 12), 12, LatentCache(factors), positions=at + 1)


# ------------------------------------------------------------------------------------- each layer by its form


@torch.no_grad()
@pytest.mark.parametrize("near", [(0, 0), (5, 2)], ids=str)
def test_layers_of_every_form_in_one_model(near):
    """In chunks, without a rope, before RoPE and as given: padded, cropped, and rows chosen."""
    model = architectures.model("SmolLM3", torch.float64, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1])
    ropes = exact_ropes(model)
    kinds = ({"ropes": ropes, "chunk": CHUNK}, {"ropes": ropes}, {})
    layers = [random_factors(model, 0.5, **kinds[which]).layers[i] for i, which in enumerate((0, 0, 1, 2))]
    assert [(x.chunk, x.rope is None) for x in layers] == [(64, False), (None, True), (None, False), (None, True)]
    factors = Factors(layers, near=near)
    model.set_attn_implementation("lrattn")
    ids, mask = architectures.padded((80, 31), "left")
    at, cache = (mask.cumsum(1) - 1).clamp_min(0) + 40, LatentCache(factors)
    want = defined(model, factors, ids, window(80, *near, begins=(0, 49)), mask, at)
    same(fed(model, ids, (60, 1, 1, 18), cache, mask, at), want, mask)
    assert cache.columns.positions is not None and cache.columns.offsets.tolist() == [-40, 9]
    cache.crop(-10 + near[0])  # what is near again is exact
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    begin = cache.get_seq_length()
    ids, mask, at, want = (x[[1, 0, 1]] for x in (ids, mask, at, want))
    if near == (0, 0):
        same(fed(model, ids[:, begin:], (1, 9), cache, mask, at), want[:, begin:])


# ------------------------------------------------------------------------------- beyond what factors hold for


@torch.no_grad()
def test_attention_beyond_the_positions_of_its_factors_warns_once():
    """Of factors, not of a layer, a step, a cache or a pass without one; by columns, or by the positions told."""
    model, _ = made()
    given = random_factors(model, 0.4)
    ids = tiny.tokens(1, 40)

    def held_for(most):
        return replace(given, layers=[replace(layer, max_position=most) for layer in given.layers])

    def told_by(factors, *passes):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for at in passes:
                fed(model, ids, (36, *[1] * 4), LatentCache(factors), positions=at)
                with latent_attention(model, factors):
                    model(ids, position_ids=at, use_cache=False)
        return [str(x.message) for x in found]

    late = torch.arange(600, 640)[None]
    assert not told_by(held_for(40), None) and not told_by(given, late) and not told_by(held_for(640), late)
    for most, passes, got in ((38, (None, None, late), 38), (639, (None, late, late), 639)):
        (said,) = told_by(held_for(most), *passes)
        assert said.startswith(f"position_ids: these factors hold for positions 0 .. {most - 1}, and attention goes on")
        assert f"at {got}, " in said and f"compress(positions={got + 1})" in said and "'lrattn'" in said
        assert "\n" not in said and len(said) < 300
