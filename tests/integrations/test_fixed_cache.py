"""LatentCache(max_tokens=): the tokens of one that grows; no step waits for the device or changes a shape."""

import copy

import architectures
import pytest
import tiny
import torch
from latents import random_factors
from passes import exact_ropes, fed
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig
from waits import Waits

from lrattn.integrations.transformers import LatentCache
from lrattn.models.interface import cache_argument

SIZES = tiny.SIZES | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
FORMS = {"as given": {}, "before RoPE": {"ropes": True}, "in chunks": {"ropes": True, "chunk": 64}}
NEAR = (5, 2)
MOST = 70
of_each_form = pytest.mark.parametrize("form", FORMS)


def made(form, family=None, dtype=torch.float32, near=NEAR):
    model = tiny.model(family, 0, dtype) if family else tiny.built(LlamaConfig(**SIZES), 0).to(dtype)
    kind = FORMS[form] | ({"ropes": exact_ropes(model)} if "ropes" in FORMS[form] else {})
    model.set_attn_implementation("lrattn")
    return model, random_factors(model, 0.5, near, **kind)


@torch.no_grad()
def begun(form, padded):
    """A model and a cache of a fixed size after 28 of 34 columns; ids, positions, the mask for all of the cache; and
    the logits that a cache gives which grows."""
    model, factors = made(form)
    ids, mask = architectures.padded((34, 20 if padded else 34), "left")
    at = (mask.cumsum(1) - 1).clamp_min(0)
    live = torch.cat((mask, torch.ones(2, MOST - 34, dtype=torch.int64)), 1)
    want = fed(model, ids, (28, *[1] * 6), LatentCache(factors), mask, at)
    cache = LatentCache(factors, max_tokens=MOST, backend="triton")
    fed(model, ids[:, :28], 28, cache, mask, at)
    return model, cache, ids, at, live, want


def alike(got, want, live=None):
    """Up to what a rounding in the last place becomes in the float32 of norms: the ways to attend differ."""
    got, want = (got, want) if live is None else (got[live.bool()], want[live.bool()])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def addresses(cache):
    held = [*cache.columns.tensors, *(x for layer in cache.layers for x in layer.tensors)]
    return [(x.data_ptr(), x.shape, x.stride()) for x in held]


# ------------------------------------------------------------------------------------------- what a growing one gives


@pytest.mark.every(8)
@pytest.mark.parametrize("near", [(0, 0), NEAR, (40, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("family", ["llama3", "qwen2-window", "gemma3"])
@of_each_form
def test_passes_of_every_length_give_the_same(form, family, near):
    """With padding and without; by tokens, by a few, by more than are taken in place; and after a crop."""
    model, factors = made(form, family, torch.float64, near)
    ids, mask = architectures.padded((60, 44), "left")
    for given in (None, mask):
        at = None if given is None else (mask.cumsum(1) - 1).clamp_min(0) + 30
        caches = LatentCache(factors), LatentCache(factors, max_tokens=MOST)
        want, got = (fed(model, ids, (20, 1, 3, 20, 1, 1, 14), cache, given, at) for cache in caches)
        alike(got, want, given)
        before = addresses(caches[1])
        for cache in caches:
            cache.crop(-7)
            cache.reorder_cache(torch.tensor([1, 0]))
        flipped = [None if x is None else x.flip(0) for x in (given, at)]
        want, got = (fed(model, ids.flip(0)[:, 53:], (1, 1, 5), cache, *flipped) for cache in caches)
        alike(got, want)
        assert addresses(caches[1]) == before and int(caches[1].get_seq_length()) == 60


@pytest.mark.every(3)
@of_each_form
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 9}], ids=str)
def test_generation_gives_the_same_tokens(form, options):
    model, factors = made(form, "llama3")
    ids, mask = architectures.padded((30, 12, 21), "left")
    found = []
    for most in (None, MOST):
        torch.manual_seed(0)
        cache = LatentCache(factors, max_tokens=most)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=20, **options, **cache_argument(cache)))
    assert torch.equal(*found)
    assert cache.layers[0].get_max_cache_shape() == MOST and cache.get_mask_sizes(1, 0) == (MOST, 0)


def test_a_pass_that_fails_counts_for_nothing():
    model, factors = made("before RoPE", "llama3", torch.float64)
    ids = tiny.tokens(2, 30)
    cache = LatentCache(factors, max_tokens=MOST)
    got = [fed(model, ids[:, :15], 15, cache)]
    for new in (1, 9, 40):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fed(model, tiny.tokens(2, new, seed=new), new, cache)
        handle.remove()
        assert int(cache.get_seq_length()) == cache.columns.count == 15
    got.append(fed(copy.deepcopy(model), ids[:, 15:], (1, 4, 10), copy.deepcopy(cache)))
    alike(torch.cat(got, 1), fed(model, ids, (15, 1, 4, 10), LatentCache(factors)))


# ---------------------------------------------------------------------------------------------- nothing is waited for


@pytest.mark.every(4)
@torch.no_grad()
@of_each_form
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_reads_nothing_from_the_device_and_stays_where_it_is(form, padded):
    model, factors = made(form)
    ids, mask = architectures.padded((30, 12 if padded else 30), "left")
    cache = LatentCache(factors, max_tokens=MOST, backend="triton")
    fed(model, ids[:, :20], 20, cache, mask)
    before, at = addresses(cache), (mask.cumsum(1) - 1).clamp_min(0)
    for i in range(20, 30):
        with Waits() as waits:
            given = {"attention_mask": mask[:, : i + 1], "position_ids": at[:, i : i + 1]}
            model(ids[:, i : i + 1], **given, **cache_argument(cache))
        assert not waits.found and addresses(cache) == before
    grows = LatentCache(factors, backend="triton")
    fed(model, ids[:, :20], 20, grows, mask)
    with Waits() as waits:
        model(ids[:, 20:21], attention_mask=mask[:, :21], **cache_argument(grows))
    assert waits.found, "what a growing cache reads is seen"


@pytest.mark.every(4)
@torch.no_grad()
@of_each_form
@pytest.mark.parametrize("padded", [False, True])
def test_a_captured_step_is_right_for_the_next(form, padded):
    """As a CUDA graph has it: the operations of one step, with every number of the host as it was, run again."""
    model, cache, ids, at, live, want = begun(form, padded)

    def step(token, place, live):
        placed = {"position_ids": place} if padded else {}  # else by the cache's length
        return model(token, attention_mask=live, **placed, **cache_argument(cache)).logits

    spare = copy.deepcopy([x for layer in cache.layers for x in layer.tensors]), cache.columns.lens.clone()
    captured = make_fx(step)(ids[:, 28:29], at[:, 28:29], live)
    for x, y in zip([x for layer in cache.layers for x in layer.tensors], spare[0]):
        x.copy_(y)  # tracing has run it
    cache.columns.lens.copy_(spare[1])
    cache.columns.count = 28
    for i in range(28, 34):
        cache.replayed()
        got = captured(ids[:, i : i + 1], at[:, i : i + 1], live)
        torch.testing.assert_close(got, want[:, i : i + 1], rtol=0, atol=2e-5)
    assert int(cache.get_seq_length()) == cache.columns.count == 34


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_step_is_one_graph_for_all(form, padded, fresh_dynamo):
    model, cache, ids, at, live, want = begun(form, padded)
    run, graphs = torch.compile(model, fullgraph=True, backend="eager"), []
    for i in range(28, 34):
        with torch.no_grad():
            given = {"attention_mask": live, "position_ids": at[:, i : i + 1]}
            got = run(ids[:, i : i + 1], **given, **cache_argument(cache)).logits
        torch.testing.assert_close(got, want[:, i : i + 1], rtol=0, atol=2e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] <= 3 and graphs[3:] == [graphs[-1]] * 3, graphs


# --------------------------------------------------------------------------------------------------- what is refused


def test_more_columns_than_there_is_room_for():
    model, factors = made("before RoPE")
    ids, cache = tiny.tokens(2, 90), LatentCache(factors, max_tokens=40)
    told = "max_tokens: expected at most 40 columns, got {} and {} more"
    with pytest.raises(ValueError, match=told.format(0, 41)):
        fed(model, ids[:, :41], 41, cache)
    fed(model, ids[:, :39], 39, cache)
    nbytes = cache.nbytes
    with pytest.raises(ValueError, match=told.format(39, 2)):
        fed(model, ids[:, :2], 2, cache)
    fed(model, ids[:, :1], 1, cache)
    for full in (lambda: fed(model, ids[:, :1], 1, cache), cache.replayed):
        with pytest.raises(ValueError, match=told.format(40, 1)):
            full()
    assert cache.nbytes == nbytes and int(cache.get_seq_length()) == 40
    for wrong in (0, -1, 2.0, "9"):
        with pytest.raises(ValueError, match="max_tokens: expected an integer from 1"):
            LatentCache(factors, max_tokens=wrong)


def test_masks_that_a_step_cannot_follow():
    """A row that has not begun, at once; columns hidden or shown later, by NaN in their rows."""
    model, factors = made("as given")
    ids, mask, cache = tiny.tokens(3, 12), torch.ones(3, 12, dtype=torch.int64), LatentCache(factors, max_tokens=40)
    late = mask.clone()
    late[1, :9] = 0
    with pytest.raises(ValueError, match="attention_mask: expected a column in every row of the first pass"):
        fed(model, ids[:, :8], 8, cache, late)
    mask[1, :4] = 0
    fed(model, ids[:, :10], 10, cache, mask)
    for row, column, value in ((0, 2, 0), (1, 1, 1), (2, 10, 0)):
        other = mask.clone()
        other[row, column] = value
        logits = fed(model, ids[:, 10:11], 1, copy.deepcopy(cache), other)
        assert logits.isnan().flatten(1).all(1).tolist() == [i == row for i in range(3)]
        assert logits.isnan().flatten(1).any(1).tolist() == [i == row for i in range(3)]
