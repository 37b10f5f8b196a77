"""Rows that several layers share: what a LatentCache holds of them, and what attention sees."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from architectures import padded
from drawn import drawn
from latents import joined_factors, random_factors
from passes import defined, defined_in_passes, exact_ropes, fed, same

import lrattn
from lrattn import Selection
from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.integrations.transformers import layer as cache_layer
from lrattn.integrations.transformers.perplexity import losses
from lrattn.selection import POLICIES

FORMS = {
    "as given": {},
    "before RoPE": {"ropes": True},
    "in chunks": {"ropes": True, "chunk": 64},
    "packed in chunks": {"ropes": True, "chunk": 64, "bits": 4},
}
CUTS = [(90, 3, *[1] * 9, 12, 6), (50, 70), 120, 1]


def made(form="packed in chunks", span=2, near=(8, 2), dtype=torch.float64, family="llama3", keep=0.4):
    """A model that attends by "lrattn", and random factors of it. Three layers: the last run is short."""
    model = tiny.model(family, 0, dtype)
    kind = FORMS[form] | ({"ropes": exact_ropes(model)} if "ropes" in FORMS[form] else {})
    factors = joined_factors(model, span, keep, near, 0, **kind)
    model.set_attn_implementation("lrattn")
    return model, factors


@pytest.fixture(autouse=True)
def unwritten(monkeypatch):
    """Pages are NaN before they are written: rows that are not whole are read by nobody."""

    def allocated(*args, real=cache_layer.allocate_cache):
        found = real(*args)
        for x in found:
            if x is not None:
                x.fill_(torch.nan if x.is_floating_point() else 255)
        return found

    monkeypatch.setattr(cache_layer, "allocate_cache", allocated)


@pytest.mark.parametrize("at", [None, 70], ids=["columns", "told"])
@pytest.mark.parametrize("near", [(1, 0), (8, 2), (20, 0)], ids=str)
@pytest.mark.parametrize("span", [2, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.every(4)
def test_attention_is_to_rows_that_all_layers_of_a_run_have_added_to(form, span, near, at):
    """However a text is cut: by single tokens, by a few and densely, with padding."""
    model, factors = made(form, span, near)
    begins = 0, 25
    ids, mask = padded([120 - n for n in begins], "left")
    told = None if at is None else (mask.cumsum(1) - 1).clamp_min(0) + at
    for chunks in CUTS:
        got = fed(model, ids, chunks, LatentCache(factors), mask, told)
        same(got, defined_in_passes(model, factors, ids, chunks, begins, told), mask)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "mha", "mqa"])
def test_full_rank_is_the_model_itself(family):
    """Made by compress, in one run of all layers; sliding windows too."""
    model, ids = tiny.model(family), tiny.tokens(2, 150)
    want = model(ids).logits
    for method in ("lrattn", "lrattn-rebuilt", "commonkv"):
        more = {} if method == "commonkv" else {"far": (8, 1)}
        factors = lrattn.compress(model, [tiny.tokens(2, 90)], method, 1.0, bits=16, span=3, progress=False, **more)
        model.set_attn_implementation("lrattn")
        got = fed(model, ids, (100, *[1] * 20, 20, 10), LatentCache(factors))
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.every(2)
def test_tokens_are_kept_by_all_layers_of_a_run(form, monkeypatch):
    """One choice a run. At full rank attention is to what is kept; and to all, where the rest is held by other rows."""
    form = form.removeprefix("packed ")
    model, factors = made(form, 2, keep=1.0)
    begins = 0, 25
    ids, mask = padded([120 - n for n in begins], "left")
    everything = torch.ones(1, 120, 120, dtype=torch.bool)
    for chunks, every in (((90, 3, *[1] * 9, 12, 6), 0), ((90, 3, *[1] * 9, 12, 6), 7), ((88, 2, 1, 2, 11, 16), 5)):
        policy = drawn(monkeypatch, begins, probes=4)
        select = Selection("drawn", every=every, recent=9, sinks=3)
        cache = LatentCache(factors, select=select)
        got = fed(model, ids, chunks, cache, mask)
        lives = [policy.seen(i // 2, 2, 120) & mask.bool()[:, None] for i in range(3)]
        assert len({index for index, _ in policy.held}) == 2 and not lives[0].equal(lives[2])
        same(got, defined(model, factors, ids, everything, lives), mask)
        drawn(monkeypatch, begins, probes=4)
        cache = LatentCache(replace(factors, select=select, rest=factors))
        same(fed(model, ids, chunks, cache, mask), defined(model, factors, ids, everything, mask), mask)
        cache.settle()
        assert all(torch.equal(own, mask.sum(1)) for own in cache.tokens)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_chooses_for_a_run(name):
    """By the probabilities of all its heads; what is not kept is held by fewer bytes, which at full rank are enough."""
    model, factors = made("in chunks", 3, keep=1.0)
    ids = tiny.tokens(2, 120)
    share = 0.4 if POLICIES[name].counted else None
    own = replace(factors, select=Selection(name, share, 3, recent=9), rest=factors)
    want = fed(model, ids, (90, 1, 4, 1, 4, 20), LatentCache(factors))
    cache = LatentCache(own)
    same(fed(model, ids, (90, 1, 4, 1, 4, 20), cache), want)
    assert cache.layers[2].rest is not None and cache.layers[0].rest is None  # one holds, and all read


@pytest.mark.parametrize("form", ["before RoPE", "packed in chunks"])
def test_triton_and_reference_agree(form):
    model, factors = made(form, 2, dtype=torch.float32)
    ids = tiny.tokens(1, 83)
    a, b = (fed(model, ids, (80, 1, 2), LatentCache(factors, backend=name)) for name in ("reference", "triton"))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * a.abs().max().item())


def test_bytes_are_those_of_one_row_a_run():
    model, factors = made("packed in chunks", 3)
    cache = LatentCache(factors)
    fed(model, tiny.tokens(2, 64), 64, cache)
    row, window = factors.layers[0].bytes_per_token, 2 * 3 * 2 * 2 * 4 * 32 * 8
    assert factors.bytes_per_token == row and len(factors.held) == 1
    dense = window // 2 * (8 + 2 + 1)  # recent, sinks and a slot to write in
    tables = sum(x.nbytes for x in cache.columns.tensors)
    assert cache.nbytes == 2 * 64 * row + dense + tables


def test_copies_rows_crops_and_failed_passes():
    """At full rank: what a crop brings back comes from rows."""
    model, factors = made("before RoPE", keep=1.0)
    ids = tiny.tokens(2, 120)
    cache = LatentCache(factors)
    fed(model, ids[:, :100], (96, 4), cache)
    want = fed(model, ids[:, 100:], (1, 3, 16), copy.deepcopy(cache))
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0, 1]))
    order = [1, 0, 1]
    same(fed(model, ids[order][:, 100:], (1, 3, 16), swapped), want[order])
    cropped = copy.deepcopy(cache)
    fed(model, tiny.tokens(2, 3, 5), 3, cropped)
    cropped.crop(-3)
    same(fed(model, ids[:, 100:], (1, 3, 16), cropped), want)
    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(model, ids[:, 100:101], 1, cache)
    hook.remove()
    same(fed(model, ids[:, 100:], (1, 3, 16), cache), want)


def test_a_cache_of_a_fixed_size_goes_on_as_another():
    model, factors = made("packed in chunks")
    ids = tiny.tokens(2, 60)
    want = fed(model, ids, (40, 1, 4, 15), LatentCache(factors))
    same(fed(model, ids, (40, 1, 4, 15), LatentCache(factors, max_tokens=64)), want)


def test_passes_as_short_as_the_window_are_scored_as_rows_of_one_layer_are():
    """`losses` in steps: no query has an exact token that its window does not hold."""
    model, factors = made("before RoPE", 2, (8, 2))
    ids = tiny.tokens(2, 60)
    logits = defined_in_passes(model, factors, ids, 8)[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none").mean(1)
    found = losses(model, ids, step=8, cache=lambda: LatentCache(factors), progress=False)
    torch.testing.assert_close(torch.tensor(found), want)
    read = losses(model, ids, read=20, step=8, cache=lambda: LatentCache(factors), progress=False)
    parts = fed(model, ids, (8, 8, 4, 8, 8, 8, 8, 8), LatentCache(factors))[:, 19:-1]
    want = torch.nn.functional.cross_entropy(parts.transpose(1, 2).float(), ids[:, 20:], reduction="none").mean(1)
    torch.testing.assert_close(torch.tensor(read), want)


def test_a_prompt_in_steps_is_chosen_from_by_its_last():
    """`losses` of factors that select: what is not kept is gone once the prompt is read, not once a step is."""
    model, factors = made("in chunks", 3, (8, 2))
    own = replace(
        factors,
        select=Selection("zipcache", 0.3, recent=8),
        rest=joined_factors(model, 3, 0.2, (8, 2), 1, exact_ropes(model), chunk=64),
    )
    ids, held = tiny.tokens(1, 100), []
    found = losses(model, ids, read=60, step=8, cache=lambda: held.append(LatentCache(own)) or held[-1], progress=False)
    assert held[0].columns.gone > 40 and held[0].layers[2].rest.counts.min() > 20
    cache = LatentCache(own)
    cache.selection = None
    fed(model, ids[:, :56], 8, cache)
    cache.selection = own.select
    parts = fed(model, ids[:, 56:], (4, *[8] * 5), cache)[:, 3:-1]
    want = torch.nn.functional.cross_entropy(parts.transpose(1, 2).float(), ids[:, 60:], reduction="none").mean(1)
    torch.testing.assert_close(torch.tensor(found), want)


def test_a_pass_that_fails_in_the_last_layer_leaves_no_probabilities_behind(monkeypatch):
    model, factors = made("in chunks", 3, (4, 1), keep=1.0)
    ids, whole = tiny.tokens(1, 80), integration.dense_attention
    cache = LatentCache(replace(factors, select=Selection("zipcache", 0.3, recent=4), rest=factors))
    calls = []

    def failing(*args, **kwargs):
        calls.append(0)
        return 1 / 0 if len(calls) == 3 else whole(*args, **kwargs)

    monkeypatch.setattr(integration, "dense_attention", failing)
    with pytest.raises(ZeroDivisionError):
        fed(model, ids[:, :50], 50, cache)
    assert len(cache.layers[2].given) == 2 and cache.get_seq_length() == 50  # every layer had written it
    want = fed(model, ids, (50, 5, 25), LatentCache(factors))[:, 50:]
    same(fed(model, ids[:, 50:], (5, 25), cache), want)
    assert cache.layers[2].rest is not None


def test_copies_share_the_factors_of_the_rest():
    model, factors = made("in chunks", 3, keep=1.0)
    rest = joined_factors(model, 3, 0.2, seed=1, ropes=exact_ropes(model), chunk=64)
    cache = LatentCache(replace(factors, select=Selection("zipcache", 0.3, recent=8), rest=rest))
    fed(model, tiny.tokens(1, 80), 80, cache)
    cache.settle()
    assert copy.deepcopy(cache).layers[2].rest.layer is cache.layers[2].rest.layer


def test_what_rows_of_several_layers_do_not_serve_is_refused():
    model, factors = made()
    ids = tiny.tokens(1, 20)
    with pytest.raises(ValueError, match="recent: expected 1 or more, as the newest"):
        LatentCache(factors, recent=0)
    told = r"span: rows of 2 layers are whole after a pass: .*=LatentCache"
    with pytest.raises(ValueError, match=told), latent_attention(model, factors):
        model(ids, use_cache=False)
    model.set_attn_implementation(bind(factors))
    with pytest.raises(ValueError, match="span: rows of 2 layers"):
        model(ids, use_cache=False)
    with pytest.raises(ValueError, match="expected some without span"):
        lrattn.refine(model, factors, [ids], steps=1)
    with pytest.raises(ValueError, match="expected some of a row for every token and layer, got span"):
        lrattn.narrowed(joined_factors(model, 2), 0.5)


def test_a_record_of_runs_is_of_layers_that_can_share_rows():
    model = tiny.model("llama")
    factors = joined_factors(model, 2, 0.4)
    for wrong, told in (
        ({"span": 0}, "span: expected layers that share a row, 1 or more, got 0"),
        ({"span": True}, "span: expected layers that share a row"),
        ({"donors": (0, 0, 2)}, "span: expected 1 with donors, got 2"),
        ({"select": Selection("curdkv"), "rest": joined_factors(model, 3, 0.2)}, "rest: expected plain factors"),
        ({"layers": random_factors(model, 0.4).layers}, "span: expected layers that share a row of keys and values"),
        ({"layers": (*factors.layers[:1], *factors.layers[2:], factors.layers[0])}, "got .* in layer 1"),
    ):
        with pytest.raises(ValueError, match=told):
            replace(factors, **wrong)


def test_files_hold_runs(tmp_path):
    _, factors = made("packed in chunks", 2, dtype=torch.float32)
    factors.save(tmp_path / "f")
    again = lrattn.Factors.load(tmp_path / "f")
    assert again.span == 2 and again.keep == factors.keep
    assert torch.equal(again.layers[1].values.down, factors.layers[1].values.down)
    assert again.to(dtype=torch.bfloat16).span == 2
