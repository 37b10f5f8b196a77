"""LatentCache that selects tokens: what it holds, what attention then sees, and all that a cache goes through."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from architectures import padded
from drawn import drawn
from latents import random_factors
from passes import defined, exact_ropes, fed, same, window
from slowly import slow_unless

import lrattn
from lrattn import Selection
from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.models.interface import cache_argument
from lrattn.selection import POLICIES

FORMS = {
    "as given": {},
    "before RoPE": {"ropes": True},
    "one row": {"shared": True, "ropes": True},
    "packed": {"bits": 4, "ropes": True},
    "in chunks": {"ropes": True, "chunk": 64},
    "packed row in chunks": {"bits": 4, "shared": True, "ropes": True, "chunk": 64},
}
COUNTED = [name for name, policy in POLICIES.items() if policy.counted]


def made(form="in chunks", near=(5, 2), dtype=torch.float64, family="llama3", keep=0.4):
    """A model that attends by "lrattn", and random factors of it."""
    model = tiny.model(family, 0, dtype)
    kind = FORMS[form] | ({"ropes": exact_ropes(model)} if "ropes" in FORMS[form] else {})
    factors = random_factors(model, keep, near, 0, **kind)
    model.set_attn_implementation("lrattn")
    return model, factors


PLANS = [((90, 3, *[1] * 9, 12, 6), 64, 0), ((90, 3, *[1] * 9, 12, 6), 64, 7), ((88, 2, 1, 2, 11, 16), 4, 5)]


@pytest.mark.parametrize("at", [None, 70], ids=["columns", "told"])
@pytest.mark.parametrize("near", [(0, 0), (5, 2), (0, 3), (40, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.every(6)
def test_attention_is_to_what_is_kept_and_to_nothing_else(form, near, at, monkeypatch):
    """By tokens, by a few and densely; once or again and again; with padding; positions are those of the text. The
    queries of the pass that is chosen from see all of it, later ones what each layer has kept of each row."""
    model, factors = made(form, near)
    begins = 0, 25, 87  # the last one in what is left of the first pass
    ids, mask = padded([120 - n for n in begins], "left")
    told = None if at is None else (mask.cumsum(1) - 1).clamp_min(0) + at
    for chunks, rows, every in PLANS:
        monkeypatch.setattr(integration, "DECODE_ROWS", rows)
        policy = drawn(monkeypatch, begins)
        cache = LatentCache(factors, select=Selection("drawn", every=every, recent=6, sinks=3))
        got = fed(model, ids, chunks, cache, mask, told)
        layers = range(len(factors.layers))
        lives = [policy.seen(i, 3, 120) & mask.bool()[:, None] for i in layers]
        assert all(len(policy.held[i, b]) < (90, 65)[b] for i in layers for b in range(2))
        same(got, defined(model, factors, ids, window(120, *near, begins=begins), lives, told), mask)
        later = 120 - max([0, *policy.ends.values()])
        cache.settle()
        held = [torch.tensor([len(policy.held[i, b]) + later for b in range(3)]) for i in layers]
        assert all(torch.equal(a, b) for a, b in zip(cache.tokens, held, strict=True))


@pytest.mark.parametrize("near", [(5, 2), (40, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.every(3)
def test_what_is_not_kept_is_seen_by_fewer_bytes(form, near, monkeypatch):
    """By what other factors make of its latents, from the pass on that it was not kept in; made once."""
    model, factors = made(form, near)
    kind = FORMS[form] | ({"ropes": exact_ropes(model)} if "ropes" in FORMS[form] else {})
    rest = random_factors(model, 0.2, (0, 0), 1, **kind)
    begins = 0, 25, 87
    ids, mask = padded([120 - n for n in begins], "left")
    live = mask.bool()[:, None]
    for chunks, rows, every in PLANS:
        monkeypatch.setattr(integration, "DECODE_ROWS", rows)
        policy = drawn(monkeypatch, begins)
        select = Selection("drawn", every=every, recent=6, sinks=3)
        cache = LatentCache(replace(factors, select=select, rest=rest))
        got = fed(model, ids, chunks, cache, mask)
        thin = [~policy.seen(i, 3, 120) & live for i in range(len(factors.layers))]
        exact = window(120, *near, begins=begins)
        same(got, defined(model, factors, ids, exact, mask, rest=(rest, thin)), mask)
        cache.settle()
        assert all(torch.equal(own, mask.sum(1)) for own in cache.tokens)  # none is gone
        copied = copy.deepcopy(cache)
        copied.reorder_cache(torch.tensor([1, 0, 1]))
        assert copied.tokens[0].tolist() == [95, 120, 95]


@pytest.mark.parametrize("name", POLICIES)
def test_at_full_rank_nothing_is_lost_to_fewer_bytes(name):
    model, factors = made(keep=1.0)
    ids, mask = padded((100, 64), "left")
    want = fed(model, ids, (90, 1, 4, 1, 4), LatentCache(factors), mask)
    own = replace(factors, select=next(x for x in policies(every=2, recent=8) if x.policy == name), rest=factors)
    same(fed(model, ids, (90, 1, 4, 1, 4), LatentCache(own), mask), want, mask)


def test_salient_tokens_have_twice_the_bytes(tmp_path):
    """keep is met by both together, of one calibration; files and moves keep them."""
    model, texts = tiny.model("llama"), [tiny.tokens(2, 90, seed) for seed in range(3)]
    model.set_attn_implementation("sdpa")
    factors = lrattn.compress(model, texts, keep=0.2, salient=0.25, far=(8, 1), progress=False)
    assert factors.select == Selection("zipcache", 0.25, 512) and factors.near == factors.rest.near == (8, 1)
    assert 0.15 < 0.25 * factors.keep + 0.75 * factors.rest.keep <= 0.2
    assert 0.35 < factors.keep <= 0.4
    state = tmp_path / "state"
    again = lrattn.compress(model, texts, keep=0.2, salient=0.25, far=(8, 1), state=state, progress=False)
    again.save(tmp_path / "f")
    read = lrattn.Factors.load(tmp_path / "f").to(dtype=torch.bfloat16)
    assert read.select == factors.select and read.rest.keep == factors.rest.keep
    assert read.rest.layers[0].dtype == torch.bfloat16
    assert torch.equal(read.rest.layers[2].values.up, factors.rest.layers[2].values.up.bfloat16())
    for wrong, told in (
        ({"salient": 0.5}, r"salient: expected None or a share of the tokens in \(0, 0.5\), got 0.5"),
        ({"salient": True}, "salient: expected None or a share"),
        ({"salient": 0.1, "select": "curdkv"}, "select: expected none with salient=0.1"),
        ({"salient": 0.1, "method": "curdkv", "far": None}, "salient: expected none with method 'curdkv'"),
    ):
        with pytest.raises(ValueError, match=told):
            lrattn.compress(model, texts, **{"far": (8, 1)} | wrong)
    plain = random_factors(model, 0.2)
    fewer = replace(factors.rest, layers=factors.rest.layers[:2], predicted=(), samples=())
    blind = [replace(x, values=replace(x.values, down=None)) for x in factors.rest.layers]
    for wrong, said in (
        ({"select": None}, "expected plain factors"),
        ({"rest": factors}, "expected plain factors"),
        ({"rest": "x"}, "expected plain factors, .*got 'x'"),
        ({"rest": plain}, "expected the form of"),
        ({"rest": fewer}, "expected factors of 3 layers, got 2"),
        ({"rest": replace(factors.rest, layers=blind)}, "expected a write side"),
    ):
        with pytest.raises(ValueError, match=f"rest: {said}"):
            replace(factors, **wrong)


def test_salient_tokens_are_refused_before_any_work(monkeypatch):
    """As they are without; and methods that refit have the text."""
    model, texts = tiny.model("llama"), [tiny.tokens(2, 90)]
    model.set_attn_implementation("sdpa")
    refitted = lrattn.compress(model, texts, "recalkv", 0.4, salient=0.2, progress=False)
    assert refitted.rest.method == "recalkv"
    for keep in (0.3, 0.7, 1.0):
        made_so = lrattn.compress(model, texts, keep=keep, salient=0.2, far=(8, 1), progress=False)
        assert keep - 0.03 < 0.2 * made_so.keep + 0.8 * made_so.rest.keep <= keep + 1e-9
        assert made_so.layers[0].packed == made_so.rest.layers[0].packed == (keep < 0.5)
    monkeypatch.setattr("lrattn.compression.compress.calibrate", lambda *_, **__: 1 / 0)
    for wrong, told in (
        ({"shards": 3}, "shards: expected a divisor"),
        ({"group_size": 0}, "group_size: expected"),
        ({"bits": 5}, "bits: expected"),
        ({"nested": True}, "nested: expected False"),
        ({"bytes_per_token": 300}, "bytes_per_token: expected none with salient=0.2, got 300"),
        ({"keep": 0.04}, "salient: expected a share that leaves more for the others than keep: expected at least"),
        ({"method": "lrattn-rotated", "positions": 10}, "positions: expected"),
    ):
        with pytest.raises(ValueError, match=told):
            lrattn.compress(model, texts, salient=0.2, progress=False, **{"far": (8, 1)} | wrong)


def policies(keep=0.4, every=0, **more):
    for name, policy in POLICIES.items():
        share = max(keep, 0.8 if policy.whole else 0) if policy.counted else None
        yield Selection(name, share, every, **more)


QUICK = [("as given", "curdkv"), ("before RoPE", "l2norm"), ("in chunks", "refreekv"), ("packed", "chunkkv")]


@pytest.mark.parametrize("form, name", slow_unless(QUICK, product(FORMS, POLICIES)))
def test_triton_and_reference_agree(form, name):
    """Every policy, on latents of every form, by decode_attention of both backends, after two choices."""
    model, factors = made(form, (5, 2), torch.float32)
    ids, select = tiny.tokens(1, 82), next(x for x in policies(every=1, recent=8) if x.policy == name)
    a, b = (
        fed(model, ids, (80, 1, 1), LatentCache(factors, select=select, backend=backend))
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * a.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_all_tokens_kept_are_all_tokens(form):
    model, factors = made(form)
    ids, mask = padded((100, 64), "left")
    want = fed(model, ids, (90, 1, 4, 1, 4), LatentCache(factors), mask)
    got = fed(model, ids, (90, 1, 4, 1, 4), LatentCache(factors, select="curdkv:1"), mask)
    same(got, want, mask)


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_and_tokens_are_the_share(name):
    """Of the tensors held, once tokens are chosen: a page more for each layer, and what the tables take."""
    model, factors = made("as given", (0, 0))
    share = 0.8 if POLICIES[name].whole else 0.3
    ids = tiny.tokens(2, 320)
    whole, cache = LatentCache(factors), LatentCache(factors, select=Selection(name, share))
    for own in (whole, cache):
        fed(model, ids, 320, own)
        assert torch.stack(own.tokens).eq(320).all()
        own.settle()
    tokens = torch.stack(cache.tokens)
    assert tokens.sum() <= share * 320 * 2 * 3 and tokens.sum() >= (share * 320 - 10) * 2 * 3
    assert torch.stack(whole.tokens).eq(320).all()
    page = 16 * (factors.layers[0].k_width + factors.layers[0].v_width) * 8
    assert abs(cache.nbytes - whole.nbytes * share) <= 2 * 3 * (2 * page + 200)
    assert f"columns=320, nbytes={cache.nbytes:,}" in repr(cache) and f"select='{share} by {name}'" in repr(cache)
    assert cache.get_seq_length() == 320


def test_chunks_are_those_of_the_layer_before():
    model, factors = made()
    cache = LatentCache(factors, select=Selection("chunkkv", 0.6, 4, recent=8))
    for part in ((100,), (2, 2, 1)):
        fed(model, tiny.tokens(1, sum(part)), part, cache)
        cache.settle()
        assert len({id(layer.kept.choice) for layer in cache.layers}) == 2
        kept = [layer.kept.positions[0] for layer in cache.layers]
        assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


# ------------------------------------------------------------------------------------- what a cache goes through


def begun(every=0, form="in chunks", name="curdkv", begins=25):
    """A cache of two texts that has chosen, and what comes next, with all of their mask."""
    model, factors = made(form)
    ids, mask = padded((120, 120 - begins), "left")
    cache = LatentCache(factors, select=Selection(name, None if name == "refreekv" else 0.4, every, recent=8))
    fed(model, ids[:, :100], (96, 4), cache, mask)
    return model, cache, ids, mask


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("form", ["before RoPE", "in chunks"])
def test_copies_and_rows_go_on_as_the_cache_does(form, every):
    model, cache, ids, mask = begun(every, form)
    twin, other, rows = (copy.deepcopy(cache) for _ in range(3))
    want = fed(model, ids[:, 100:], (1, 3, 16), cache, mask)
    same(fed(model, ids[:, 100:], (1, 3, 16), twin, mask), want)
    other.reorder_cache(torch.tensor([1, 0, 1]))
    order = [1, 0, 1]
    same(fed(model, ids[order][:, 100:], (1, 3, 16), other, mask[order]), want[order])
    rows.batch_select_indices(torch.tensor([0]))
    same(fed(model, ids[:1, 100:], (1, 3, 16), rows, mask[:1]), want[:1])


@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_row_is_chosen_and_read_as_if_it_were_alone(name):
    model, factors = made("in chunks")
    ids, mask = padded((120, 85), "left")
    select = next(x for x in policies(every=3, recent=8) if x.policy == name)
    both, alone = LatentCache(factors, select=select), LatentCache(factors, select=select)
    at = (mask.cumsum(1) - 1).clamp_min(0)
    want = fed(model, ids[1:, 35:], (70, *[1] * 8, 7), alone)
    same(fed(model, ids, (105, *[1] * 8, 7), both, mask, at)[1:, 35:], want)
    for cache in (both, alone):
        cache.settle()
    assert [int(a[1]) for a in both.tokens] == [int(a[0]) for a in alone.tokens]


def test_columns_are_taken_back_as_far_as_none_was_chosen_from():
    """The dense window's last ones come back from latents, as without a selection, so it is held by latents here."""
    model, factors = made("before RoPE", (0, 2))
    ids, select = tiny.tokens(1, 110), Selection("curdkv", 0.4, recent=8)
    cache = LatentCache(factors, select=select)
    fed(model, ids[:, :90], (80, 10), cache)
    before = copy.deepcopy(cache)
    fed(model, ids[:, 90:], 20, cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 90
    same(fed(model, ids[:, 90:], (1, 19), cache), fed(model, ids[:, 90:], (1, 19), before))
    cache.crop(-38)  # as far as the 8 recent ones of then
    with pytest.raises(
        ValueError, match="tokens_to_remove: expected to keep 72, of which tokens were selected, got 71"
    ):
        cache.crop(-1)
    assert cache.get_seq_length() == 72 and fed(model, ids[:, 72:], 38, cache).isfinite().all()
    cache.crop(-200)
    assert not cache and cache.nbytes == 0
    same(
        fed(model, ids[:, :90], (80, 10), cache), fed(model, ids[:, :90], (80, 10), LatentCache(factors, select=select))
    )


def test_a_selection_may_be_set_between_passes():
    """Before the last part of a prompt; later parts then choose no more, or every so many columns."""
    model, factors = made()
    ids = tiny.tokens(1, 110)
    cache, once = LatentCache(factors), LatentCache(factors, select=Selection("curdkv", 0.4))
    fed(model, ids[:, :60], (40, 20), cache)
    cache.selection = "curdkv:0.4"
    got = fed(model, ids[:, 60:], (40, 10), cache)
    want = fed(model, ids, (100, 10), once)
    assert torch.equal(torch.stack(cache.tokens), torch.stack(once.tokens))
    same(got[:, 40:], want[:, 100:])
    cache.selection = None
    fed(model, ids[:, :5], 5, cache)
    assert cache.tokens[0] == once.tokens[0] + 5


def test_a_pass_that_fails_chooses_nothing(monkeypatch):
    model, cache, ids, mask = begun(every=3)
    twin, seen = copy.deepcopy(cache), []

    def broken(*args):
        seen.append(args)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(integration, "choose", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        fed(model, ids[:, 100:110], 10, cache, mask)
    monkeypatch.undo()
    assert seen and cache.get_seq_length() == 100
    want = fed(model, ids[:, 100:], (1, 3, 16), twin, mask)
    same(fed(model, ids[:, 100:], (1, 3, 16), cache, mask), want)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_goes_on_from_what_is_kept(beams):
    """A prompt, beams, and a second turn on the same cache, by generate and by hand."""
    model, factors = made("in chunks")
    cache, ids = LatentCache(factors, select="curdkv:0.4:6"), tiny.tokens(1, 90)
    out = model.generate(ids, max_new_tokens=20, num_beams=beams, do_sample=False, **cache_argument(cache))
    assert out.shape == (1, 110) and all(int(n[0]) < 70 for n in cache.tokens)
    if beams > 1:
        return
    by_hand, told = LatentCache(factors, select="curdkv:0.4:6"), ids
    with torch.no_grad():
        for i in range(20):
            part = told if not i else told[:, -1:]
            logits = model(part, **cache_argument(by_hand)).logits
            told = torch.cat((told, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, told)
    turn = torch.cat((out, tiny.tokens(1, 30, seed=9)), 1)
    again = model.generate(turn, max_new_tokens=5, do_sample=False, **cache_argument(cache))
    assert again.shape == (1, 145) and cache.get_seq_length() == 144


def test_what_was_kept_stays_so_once_nothing_more_is_chosen():
    """No policy any more, right after the pass that chose and later: masks and positions are of all columns still."""
    model, cache, ids, mask = begun()
    other = copy.deepcopy(cache)
    other.selection = None
    want = fed(model, ids[:, 100:], (1, 3, 16), cache, mask)
    same(fed(model, ids[:, 100:], (1, 3, 16), other, mask), want)
    cache = LatentCache(cache.factors, select="curdkv:0.4")
    fed(model, ids[:1, :90], 90, cache)
    cache.selection = None
    assert fed(model, ids[:1, 90:], (10, 20), cache).isfinite().all() and int(cache.tokens[0]) == 36 + 30


@pytest.mark.parametrize("form", FORMS)
def test_a_crop_leaves_a_column_beside_what_is_kept(form):
    """Without one, nothing would say any more that the cache holds a text."""
    model, factors = made(form, (0, 0))
    cache, ids = LatentCache(factors, select=Selection("curdkv", 0.4, recent=8)), tiny.tokens(2, 110)
    fed(model, ids[:, :100], 100, cache)
    with pytest.raises(
        ValueError, match="tokens_to_remove: expected to keep 93, of which tokens were selected, got 92"
    ):
        cache.crop(-8)
    cache.crop(-7)
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.tensor([1, 0]))
    want = fed(model, ids[:, 93:], (1, 16), cache)
    same(fed(model, ids[[1, 0], 93:], (1, 16), other), want[[1, 0]])


def test_rows_of_which_nothing_is_kept():
    """Short rows of a padded batch, on their own; memory of long ones is given back."""
    model, factors = made("in chunks")
    ids, mask = padded((120, 20), "left")
    cache = LatentCache(factors, select="curdkv:0.4")
    fed(model, ids[:, :110], 110, cache, mask)
    twin = copy.deepcopy(cache)
    twin.settle()
    held = twin.nbytes
    want = fed(model, ids[:, 110:], (1, 9), twin, mask)
    cache.batch_select_indices(torch.tensor([1]))
    assert all(layer.kept is None for layer in cache.layers) and cache.nbytes < 0.5 * held
    same(fed(model, ids[1:, 110:], (1, 9), cache, mask[1:]), want[1:])


def test_looking_at_a_cache_within_a_pass_changes_nothing():
    """Layers that read another's come after the last one that holds its own."""
    model, factors = made("as given")
    factors, ids = replace(factors, donors=(0, 1, 0)), tiny.tokens(1, 110)
    want = fed(model, ids, (90, 1, 19), LatentCache(factors, select="curdkv:0.4"))
    cache = LatentCache(factors, select="curdkv:0.4")
    looked = []
    hook = model.model.layers[2].register_forward_pre_hook(
        lambda *_: looked.append((cache.nbytes, cache.tokens, repr(cache)))
    )
    same(fed(model, ids, (90, 1, 19), cache), want)
    hook.remove()


# --------------------------------------------------------------------------------------------------- wrong uses


def test_what_selection_cannot_do_is_told():
    model, factors = made()
    with pytest.raises(ValueError, match="max_tokens: expected None where tokens are selected, got 50"):
        LatentCache(factors, select="curdkv", max_tokens=50)
    with pytest.raises(ValueError, match="select: expected a policy out of"):
        LatentCache(factors, select="none")
    with pytest.raises(ValueError, match="keep: expected more than 2 of 3 layers"):
        LatentCache(factors, select="l2norm:0.5")
    ids = tiny.tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, 5] = 0
    cache = LatentCache(factors, select="curdkv")
    with pytest.raises(
        ValueError,
        match="attention_mask: expected a causal one with padding on the left alone and a token in every row",
    ):
        fed(model, ids, 30, cache, mask)
    assert not cache
    fed(model, ids, 30, cache)
    mask[0, 5], mask[1, :3] = 1, 0
    cache = LatentCache(factors, select="curdkv:0.4")
    fed(model, tiny.tokens(2, 60), 60, cache)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[0, 0\] columns of padding, .* got \[0, 3\]"):
        model(ids[:, :1], attention_mask=torch.cat((mask, mask[:, :1].expand(-1, 31) ** 0), 1), **cache_argument(cache))


def test_sliding_windows_are_told():
    model, factors = made("as given", (0, 0), family="mistral")
    with pytest.raises(ValueError, match=r"sliding_window: expected attention to all columns, .* got 12 of them"):
        fed(model, tiny.tokens(1, 30), 30, LatentCache(factors, select="curdkv"))


def test_a_pass_without_a_cache_selects_nothing_and_says_so():
    model, factors = made()
    factors = replace(factors, select=Selection("curdkv"))
    with latent_attention(model, factors), pytest.raises(ValueError, match=r"select: .*curdkv.*LatentCache"):
        model(tiny.tokens(1, 20), use_cache=False)
    model.set_attn_implementation(bind(factors))
    with pytest.raises(ValueError, match=r"select: .*curdkv.*LatentCache"):
        model(tiny.tokens(1, 20), use_cache=False)


@pytest.mark.parametrize("name", [name for name, method in lrattn.methods.METHODS.items() if method.select])
def test_a_method_that_selects_is_one_name(name, tmp_path):
    """Exact latents, and a cache that keeps what its policy says, of all that is dense otherwise; also from a file."""
    model = tiny.model("llama")
    share = None if name == "refreekv" else 0.8
    factors = lrattn.compress(model, None, name, share)
    assert factors.select == replace(lrattn.methods.METHODS[name].select, keep=share) and factors.keep == 1.0
    ids = tiny.tokens(1, 120)
    with torch.no_grad():
        want = model(ids).logits
    model.set_attn_implementation("lrattn")
    factors.save(tmp_path / "f.safetensors")
    for own in (factors, lrattn.Factors.load(tmp_path / "f.safetensors")):
        cache = LatentCache(own)
        first = fed(model, ids[:, :100], 100, cache)
        cache.settle()
        torch.testing.assert_close(first, want[:, :100], rtol=0, atol=1e-4 * want.abs().max().item())
        assert sum(int(n) for n in cache.tokens) < 300
        assert fed(model, ids[:, 100:], (1, 19), cache).isfinite().all()
    whole = LatentCache(replace(factors, select=None))
    got = fed(model, ids, (100, 1, 19), whole)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_choices_of_methods_that_compress_no_heads_are_refused():
    model = tiny.model("llama")
    for more in ({"bits": 4}, {"ranks": "uniform"}, {"select": "curdkv"}, {"far": (0, 0)}, {"refine": 2}):
        (name,) = more
        with pytest.raises(ValueError, match=f"{name}: expected none with method 'curdkv', which compresses no heads"):
            lrattn.compress(model, None, "curdkv", 0.5, **more)
    with pytest.raises(ValueError, match=r"keep: expected None with 'refreekv', which finds it, got 0.5"):
        lrattn.compress(model, None, "refreekv", 0.5)
    assert lrattn.compress(model, None, "curdkv", 0.5, bits=16).select.keep == 0.5
    assert lrattn.compress(model, None, "curdkv").select.keep == 0.5
    with pytest.raises(ValueError, match="keep: expected more than 2 of 3 layers"):
        lrattn.compress(model, [tiny.tokens(1, 90)], "palu", select="l2norm:0.4")
