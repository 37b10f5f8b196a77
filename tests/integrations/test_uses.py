"""What people do with a model and a cache, at full rank: what the untouched model gives."""

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import architectures
import pytest
import torch
import uses
from architectures import padded, tokens
from slowly import slow_unless
from uses import assert_equal, check_filled, made

from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.models.interface import attention_set, cache_argument

# Biases; and windows, of keys before RoPE or in chunks, whose positions a cache must know.
KINDS = (("Qwen2", "as given"), ("Gemma-3", "before RoPE"), ("Gemma-3", "in chunks"))
PADDED = padded((60, 9, 54), "left")
of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=", ".join)


def generated(model, ids, cache=None, mask=None, max_new_tokens=8, **options):
    """Tokens, the prompt included; without a cache of ours the model makes one."""
    options |= {} if cache is None else cache_argument(cache)
    mask = torch.ones_like(ids) if mask is None else mask  # else generate takes the padding token for padding
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)


# ------------------------------------------------------------------------------------------------ generation

ONE, FIFTY = (tokens(2, 1), None), (tokens(1, 50), None)
GENERATIONS = {  # prompts and their mask, and options; of an assistant, how much its weights differ
    "sampling, several returned": (PADDED, {"do_sample": True, "num_return_sequences": 3, "top_k": 20}),
    "beams, several returned": (PADDED, {"num_beams": 4, "num_return_sequences": 2}),
    "sampled beams": (PADDED, {"num_beams": 3, "do_sample": True}),
    "a prompt in parts": (FIFTY, {"prefill_chunk_size": 7}),
    "penalties": (PADDED, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "rows that end early": (PADDED, {"eos_token_id": list(range(2, 40))}),
    "a prompt of one token": (ONE, {}),
    "a prompt looked up": (  # 5.5 needs an end for it
        (tokens(1, 8).repeat(1, 3), None), {"prompt_lookup_num_tokens": 4, "eos_token_id": 159},
    ),
    "an assistant": (FIFTY, {"assistant_model": 0.002}),
    "an assistant that is often wrong": (FIFTY, {"assistant_model": 0.05}),
}  # fmt: skip


@pytest.mark.every(4)
@of_each_kind
@pytest.mark.parametrize("way", GENERATIONS)
def test_every_way_to_generate_gives_the_untouched_model_s_tokens(way, kind):
    untouched, latent, factors = made(*kind)
    (ids, mask), options = GENERATIONS[way]
    if differs := options.get("assistant_model"):
        assistant = architectures.model(kind[0])
        options = options | {"assistant_model": assistant}
        for p in assistant.parameters():
            p.data.add_(torch.randn_like(p) * differs)
    found = []
    for model, new in ((untouched, None), (latent, LatentCache(factors))):
        torch.manual_seed(0)
        found.append(generated(model, ids, new, mask, 24, **options))
    assert_equal(found[1], found[0])
    assert new.get_seq_length() >= found[0].shape[1] - 1


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_given_and_returned_by_each_name_that_transformers_has_for_it(name):
    if name == "cache" and uses.RELEASE < (5, 24):
        pytest.skip("transformers knows it from 5.24 on")
    untouched, latent, factors = made()
    (ids, mask), cache = PADDED, LatentCache(factors)
    more = {"return_dict_in_generate": True, "output_logits": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older name, from 5.24 on
        got = generated(latent, ids, mask=mask, **more, **{name: cache})
    check_filled(cache, 67)
    assert cache in (got.get("cache"), got.get("past_key_values"))
    assert_equal(torch.stack(got.logits), torch.stack(generated(untouched, ids, mask=mask, **more).logits))


# --------------------------------------------------------------------------------------------------- threads


def scored(model, batch):
    with torch.no_grad():
        return model(input_ids=batch[0], attention_mask=batch[1]).logits[batch[1].bool()]


@pytest.mark.parametrize("way", slow_unless(["bind"], ["latent_attention", "bind"]))
def test_four_threads_score_at_once(way):
    """In one context, or by a bound name: texts of one length with other padding, left and right."""
    untouched, latent, factors = made()
    sides = ("left", "right")
    batches = [padded((37, 21 + i % 5, 5 + i % 3), sides[i % 2], seed=i) for i in range(192)]
    want = [scored(untouched, batch) for batch in batches]
    entered = latent_attention(latent, factors) if way == "latent_attention" else attention_set(latent, bind(factors))
    with entered, ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: scored(latent, batch), batches))
    assert sum(uses.compared(g, w) != "equal" for g, w in zip(got, want)) == 0


@pytest.mark.slow
def test_four_threads_generate_at_once_on_a_cache_each():
    untouched, latent, factors = made()
    prompts = [tokens(1, 10 + i % 7, seed=i) for i in range(64)]
    want = [generated(untouched, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda ids: generated(latent, ids, LatentCache(factors)), prompts))
    assert sum(not torch.equal(g, w) for g, w in zip(got, want)) == 0


# ----------------------------------------------------------------------------------------------------- masks


def refused_of(kind):
    """Around positions that do not follow one another, which keys in chunks need."""
    told = "position_ids: expected those of a row to follow one another"
    return pytest.raises(ValueError, match=told) if kind[1] == "in chunks" else nullcontext()


@of_each_kind
def test_the_second_turn_of_a_batch_in_which_one_answer_ended_early(kind):
    untouched, latent, factors = made(*kind)
    ids, mask, cache = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64), LatentCache(factors)
    mask[0, 15:22] = mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    latent(ids[:, :21], attention_mask=mask[:, :21], position_ids=positions[:, :21], **cache_argument(cache))
    with refused_of(kind):
        assert_equal(generated(latent, ids, cache, mask), generated(untouched, ids, None, mask))


@torch.no_grad()
@of_each_kind
def test_packed_texts_do_not_see_one_another(kind):
    """By their positions, without a cache: with one transformers does not look for them."""
    untouched, latent, factors = made(*kind)
    texts = tokens(1, 12), tokens(1, 18, seed=2)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in texts])[None]
    with latent_attention(latent, factors), refused_of(kind):
        got = latent(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
        assert_equal(got, torch.cat([untouched(ids, use_cache=False).logits for ids in texts], 1), 5e-5)


# --------------------------------------------------------------------------------------- the life of a cache


@of_each_kind
def test_a_conversation_on_one_cache(kind):
    untouched, latent, factors = made(*kind)
    cache, said = LatentCache(factors), tokens(1, 9)
    for turn in range(4):
        want = generated(untouched, said)
        said = generated(latent, said, cache)
        assert_equal(said, want)
        check_filled(cache, said.shape[1] - 1)
        said = torch.cat((said, tokens(1, (5, 1, 23)[turn % 3], seed=turn)), 1)


def through_a_file(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copier", [copy.deepcopy, through_a_file])
def test_a_prefix_serves_many_texts(copier):
    """transformers' recipe: fill a cache once, go on from copies of it; the cache itself stays as it was."""
    untouched, latent, factors = made("Gemma-3", "before RoPE")
    prefix, cache = tokens(1, 30), LatentCache(factors)
    with torch.no_grad():
        latent(prefix, **cache_argument(cache))
    for seed in (4, 5):
        ids = torch.cat((prefix, tokens(1, 6, seed)), 1)
        other = copier(cache)
        assert_equal(generated(latent, ids, other), generated(untouched, ids))
        check_filled(other, 43)
        check_filled(cache, 30)
