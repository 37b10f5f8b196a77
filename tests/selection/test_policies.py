"""Policies on tokens: what their papers and the algebra of latents say of them, on random latents."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lrattn
from lrattn.attention.dense import Sight, probability_rows
from lrattn.compression.whole import exact
from lrattn.selection import (
    POLICIES,
    Held,
    Selection,
    chunkkv,
    curdkv,
    l2norm,
    policy_of,
    refreekv,
    selection_of,
    shares,
    zipcache,
)

HEADS, SIZE = 4, 32
ROPE = lrattn.Rope(theta=1e4, dim=SIZE, max_position=4096)
FORMS = {
    "as given": {},
    "before RoPE": {"rope": ROPE},
    "in chunks": {"rope": ROPE, "chunk": 64},
    "one row": {"shared": True, "rope": ROPE},
}


def layer_of(form="as given", offset=True, groups=2):
    """Two groups of two heads, their order shuffled, of ranks 32 and 48."""
    g = torch.Generator().manual_seed(0)
    choice = FORMS[form]
    ranks = (32, 48)[:groups]

    def side(ranks, down):
        up = torch.zeros(HEADS, max(ranks), SIZE, dtype=torch.float64)
        order = (2, 0, 3, 1)
        for i, rank in enumerate(ranks):
            for h in order[2 * i : 2 * i + 2]:
                up[h, :rank] = torch.randn(rank, SIZE, generator=g, dtype=torch.float64)
        base = torch.randn(HEADS, SIZE, generator=g, dtype=torch.float64) if offset else None
        return lrattn.Projection(up, ranks, None, base, order)

    keys = side(ranks, None)
    values = side(tuple(rank + 16 for rank in ranks) if choice.get("shared") else ranks, None)
    return lrattn.LayerFactors(
        keys, values, choice.get("rope"), shared=choice.get("shared", False), chunk=choice.get("chunk")
    )


def latents_of(layer, batch=2, tokens=90, seed=1):
    g = torch.Generator().manual_seed(seed)
    zk = torch.randn(batch, tokens, layer.row_width, generator=g, dtype=torch.float64)
    zk = zk * torch.rand(batch, tokens, 1, generator=g, dtype=torch.float64).exp()
    zv = None if layer.shared else torch.randn(batch, tokens, layer.values.width, generator=g, dtype=torch.float64)
    return zk, zv


def probabilities_of(batch=2, heads=8, queries=5, tokens=90, seed=2):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, heads, queries, tokens, generator=g)).softmax(-1)


def held_of(form="as given", budget=40, lengths=(90, 90), sinks=4, recent=10, layer=None, latents=None, **more):
    layer = layer_of(form) if layer is None else layer
    zk, zv = latents_of(layer) if latents is None else latents
    lengths = torch.tensor(lengths)
    more = {"probabilities": probabilities_of(), "index": 0} | more
    budget = torch.full_like(lengths, budget)
    return Held(layer, zk=zk, zv=zv, lengths=lengths, budget=budget, sinks=sinks, recent=recent, **more)


@pytest.mark.parametrize("form", FORMS)
def test_norms_by_gram_matrices_are_those_of_the_heads(form):
    """Of keys and values as attention is given them: rotated to any position, in chunks or not, offsets included."""
    layer = layer_of(form)
    zk, zv = latents_of(layer)
    at = (
        None if layer.rope is None else torch.randint(0, 4000, zk.shape[:2], generator=torch.Generator().manual_seed(3))
    )
    k, v = layer.rebuild(zk, zv, at)
    held = held_of(layer=layer, latents=(zk, zv))
    for got, heads in ((held.key_norms(), k), (held.value_norms(), v)):
        want = heads.square().sum(-1).float()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.max().item())


def turned(side, latents):
    """The same heads in other bases of the latents: each group's turned by an orthogonal matrix."""
    g, up, z = torch.Generator().manual_seed(7), side.up.clone(), latents.clone()
    for heads, rank, columns in zip(side.groups, side.ranks, side.columns, strict=True):
        q = torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64))[0]
        up[list(heads), :rank] = q.T @ up[list(heads), :rank]
        z[..., columns] = z[..., columns] @ q
    return replace(side, up=up), z


@pytest.mark.parametrize("policy", [l2norm, curdkv])
def test_no_basis_of_the_latents_changes_what_is_kept(policy):
    layer = layer_of()
    zk, zv = latents_of(layer)
    keys, other_k = turned(layer.keys, zk)
    values, other_v = turned(layer.values, zv)
    other = held_of(layer=replace(layer, keys=keys, values=values), latents=(other_k, other_v))
    want = policy.kept(held_of(layer=layer, latents=(zk, zv)))
    assert torch.equal(policy.kept(other), want) and 0 < want.sum() < want.numel()


def by_policy(**more):
    for name, policy in POLICIES.items():
        yield name, policy.kept(held_of(**more))


@pytest.mark.parametrize("lengths", [(90, 90), (90, 37), (12, 3), (0, 60)], ids=str)
def test_first_and_recent_tokens_are_kept_and_the_budget_is_met(lengths):
    """Of rows of any length: no token beyond it; as many as the budget, or up to a chunk fewer."""
    held = held_of(lengths=lengths)
    for name, kept in by_policy(lengths=lengths):
        kept = held.live & (kept | held.fixed)
        for row, n in zip(kept, lengths, strict=True):
            fixed = min(4, n) + min(10, max(n - 4, 0))
            assert not row[n:].any() and row[: min(4, n)].all() and row[max(n - 10, 0) : n].all()
            if POLICIES[name].counted:
                most = max(min(40, n), fixed)
                assert most - (chunkkv.CHUNK - 1 if name == "chunkkv" else 0) <= row.sum() <= most


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_chosen_as_if_it_were_alone(name):
    """Whatever stands in the places beyond its length, and beside it."""
    both = POLICIES[name].kept(held_of(lengths=(90, 37)))
    layer = layer_of()
    zk, zv = (x[1:, :37] for x in latents_of(layer))
    given = probabilities_of()
    given[1, ..., 37:] = 0
    dirty = POLICIES[name].kept(held_of(lengths=(90, 37), probabilities=given))
    alone = held_of(layer=layer, latents=(zk, zv), lengths=(37,), probabilities=given[1:, ..., :37])
    assert torch.equal(POLICIES[name].kept(alone)[0], dirty[1, :37])
    assert both.shape == dirty.shape


def test_l2norm_keeps_the_shortest_keys():
    held = held_of()
    k, _ = held.layer.rebuild(held.zk, held.zv)
    lengths = k.norm(dim=-1).sum(-1)
    kept = l2norm.kept(held)
    for row, own, fixed in zip(lengths, kept, held.fixed, strict=True):
        free = ~fixed
        assert row[own & free].max() < row[~own & free].min() and own.sum() == 40


def test_curdkv_scores_are_those_of_its_definition():
    """Leverage of keys times that of values, each over its window of 16, summed over heads of equal weight, of which
    some have a few long keys and values, and others all alike."""
    layer = exact(SimpleNamespace(num_kv_heads=HEADS, head_dim=SIZE, dtype=torch.float64, device="cpu"))
    g = torch.Generator().manual_seed(6)
    sizes = torch.rand(2, 2, 90, HEADS, 1, generator=g, dtype=torch.float64) ** torch.tensor([[0.1], [0.1], [4], [9]])
    latents = (torch.randn(2, 2, 90, HEADS, SIZE, generator=g, dtype=torch.float64) * sizes).flatten(3)
    held = held_of(layer=layer, latents=tuple(latents))
    k, v = held.layer.rebuild(held.zk, held.zv)
    score = torch.zeros(2, 90, dtype=torch.float64)
    for b in range(2):
        for h in range(HEADS):
            own = torch.ones(90, dtype=torch.float64)
            for heads in (k, v):
                lev = heads[b, :, h].square().sum(-1)
                for at in range(0, 90, curdkv.WINDOW):
                    own[at : at + 16] *= lev[at : at + 16] / lev[at : at + 16].sum()
            score[b] += own / own.sum()
    for row, own, fixed in zip(score, curdkv.kept(held), held.fixed, strict=True):
        assert row[own & ~fixed].min() > row[~own & ~fixed].max()


def test_chunks_of_one_are_the_likeliest_tokens():
    held = held_of()
    given = held.probabilities.mean(2).sum(1)
    assert torch.equal(chunkkv.kept(held, chunk=1), held.highest(given))


def test_chunks_are_kept_whole_whatever_the_order_in_them():
    """Chunks lie from the first free token on; tokens that change places in one change nothing."""
    held, order = held_of(budget=50, recent=16), torch.arange(90)
    for at in range(4, 74, 10):
        order[at : at + 10] = order[at : at + 10].flip(0)
    kept = chunkkv.kept(held)
    other = chunkkv.kept(replace(held, probabilities=held.probabilities[..., order]))
    assert torch.equal(kept, other)
    whole = kept[:, 4:74].unflatten(1, (7, 10))
    assert torch.equal(whole.all(-1), whole.any(-1)) and torch.equal(whole.any(-1).sum(1), torch.tensor([3, 3]))
    scores = held.probabilities.mean(2).sum(1)[:, 4:74].unflatten(1, (7, 10)).mean(-1)
    for row, own in zip(scores, whole.any(-1), strict=True):
        assert row[own].min() > row[~own].max()


def test_every_second_layer_keeps_what_the_one_before_it_chose():
    before = torch.rand(2, 90, generator=torch.Generator().manual_seed(4)) < 0.5
    assert chunkkv.kept(held_of(index=3, before=before)) is before
    for held in (held_of(index=2, before=before), held_of(index=3)):
        assert not torch.equal(chunkkv.kept(held), before)


def lost(held, kept):
    """Share of the mean norm of the last query's rows, recent tokens aside, that is gone."""
    rows = held.probabilities[:, :, -1].double() * (torch.arange(90) < held.lengths[:, None] - held.recent)[:, None]
    whole, left = rows.norm(dim=-1).mean(1), (rows * kept[:, None]).norm(dim=-1).mean(1)
    return 1 - left / whole


def test_refreekv_drops_as_much_as_it_may_and_no_more():
    """With one more of the least tokens gone, the norm loses more than a twentieth."""
    held = held_of()
    kept = refreekv.kept(held)
    assert (lost(held, kept) <= refreekv.LOSS).all() and (kept | held.fixed).sum() < kept.numel()
    given = held.probabilities.sum((1, 2))
    for b in range(2):
        free = kept[b] & ~held.fixed[b]
        least = int(given[b].masked_fill(~free, torch.inf).argmin())
        assert given[b][~kept[b] & ~held.fixed[b]].max() <= given[b][least]
        one_less = kept.clone()
        one_less[b, least] = False
        assert lost(held, one_less)[b] > refreekv.LOSS


def test_refreekv_without_a_budget_keeps_all_that_has_mass():
    given = probabilities_of()
    given[:, :, -1, 30:50] = 0
    given[:, :, :-1, 30:50] = 0
    kept = refreekv.kept(held_of(probabilities=given), loss=0.0)
    mass = given[:, :, -1].sum(1) > 0
    assert torch.equal(kept[:, :80], mass[:, :80])


SIGHTS = {
    "all far": (0, 0, False),
    "a window": (8, 3, False),
    "kept ones before": (8, 3, True),
    "all near": (64, 0, False),
}


@pytest.mark.parametrize("softcap, logits", [(0.0, False), (2.0, True)])
@pytest.mark.parametrize("sight", SIGHTS)
def test_probability_rows_are_those_of_dense_attention(sight, softcap, logits):
    """Of the last queries, over far, near and kept columns, each once: they sum to 1, with sinks to what is left."""
    near, first, older = SIGHTS[sight]
    g = torch.Generator().manual_seed(5)
    batch, heads, kv, columns, queries, size = 2, 4, 2, 40, 6, 16
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    q, exact, far = draw(batch, heads, queries, size), draw(batch, kv, columns, size), draw(batch, kv, columns, size)
    pads = torch.tensor([0, 7])
    told = Sight(columns - queries, columns, near, first, pads=pads)
    recent = (exact[:, :, -near - queries :],) * 2 if near else None  # as many as are held
    firsts = None
    if first:
        at = (pads[:, None] + torch.arange(first))[:, None, :, None].expand(-1, kv, -1, size)
        firsts = exact.gather(2, at), exact.gather(2, at)
    kept = ((draw(batch, kv, 5, size),) * 2, torch.tensor([[True] * 5, [True] * 3 + [False] * 2])) if older else None
    sinks = draw(heads) if logits else None
    far_pair = None if told.all_near else (far, far)
    got = probability_rows(q, 4, told, far_pair, recent, firsts, kept, scale=0.3, softcap=softcap, sinks=sinks)
    i, j = torch.arange(columns - 4, columns)[:, None], torch.arange(columns)
    own = (j > i - near) | ((j >= pads[:, None, None]) & (j < pads[:, None, None] + first))
    live = (j <= i) & (j >= pads[:, None, None])
    wide = lambda x: x.repeat_interleave(heads // kv, 1)  # noqa: E731
    scores = torch.where(own[:, None], q[:, :, 2:] @ wide(exact).mT, q[:, :, 2:] @ wide(far).mT) * 0.3
    before = 0
    if kept is not None:
        scores = torch.cat((q[:, :, 2:] @ wide(kept[0][0]).mT * 0.3, scores), 3)
        live, before = torch.cat((kept[1][:, None].expand(-1, 4, -1), live), 2), 5
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~live[:, None], -torch.inf)
    total = scores.exp().sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    assert got.shape == (batch, heads, 4, before + columns)
    torch.testing.assert_close(got, scores.exp() / total, rtol=1e-4, atol=1e-6)
    if sinks is None:
        torch.testing.assert_close(got.sum(-1), torch.ones(batch, heads, 4))


def test_zipcache_keeps_what_is_given_most_by_those_that_see_it():
    """A token that one query alone can see, and gives all it has, goes before one that many see and give little."""
    given = torch.full((2, HEADS, 8, 90), 0.01)
    given[..., 0] = 0.1  # in all, more than the last token is given
    for i in range(8):  # query i sees tokens 0 .. 82 + i
        given[:, :, i, 83 + i :] = 0.0
    given[:, :, 7, 89] = 0.7
    held = replace(held_of(sinks=0, recent=0), probabilities=given, budget=torch.tensor([1, 2]))
    kept = zipcache.kept(held)
    assert kept[0].nonzero().flatten().tolist() == [89] and kept[1].nonzero().flatten().tolist() == [0, 89]


def test_shares_of_layers_are_the_share_of_all():
    assert shares(Selection("curdkv", 0.3), 5) == [0.3] * 5
    found = shares(Selection("l2norm", 0.5), 8)
    assert found[:2] == [1.0, 1.0] and sum(found) == pytest.approx(4.0) and len(set(found[2:])) == 1
    assert shares(Selection("refreekv"), 3) == [1.0] * 3
    with pytest.raises(
        ValueError, match=r"keep: expected more than 2 of 8 layers, which 'l2norm' leaves whole, got 0.2"
    ):
        shares(Selection("l2norm", 0.2), 8)


def test_a_selection_in_words():
    assert selection_of("curdkv") == Selection("curdkv")
    assert selection_of("chunkkv:0.5:64") == Selection("chunkkv", 0.5, 64) and selection_of(None) is None
    assert selection_of("refreekv::8") == Selection("refreekv", None, 8)
    assert str(Selection("chunkkv", 0.5, 64)) == "0.5 by chunkkv, every 64"


WRONG = {
    "nothing": "select: expected a policy out of",
    "curdkv:x": "select: expected a policy, or policy:share or policy:share:every, got 'curdkv:x'",
    "curdkv:0.5:1:2": "got 'curdkv:0.5:1:2'",
    "curdkv:1.5": r"keep: expected None or a share of the tokens in \(0, 1\], got 1.5",
    "curdkv:0.5:-1": "got 'curdkv:0.5:-1'",
    ":0.5": "got ':0.5'",
    "curdkv:1.2.3": "got 'curdkv:1.2.3'",
    "refreekv:0.5": "keep: expected None with 'refreekv', which finds it, got 0.5",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_selection_that_is_none_is_refused(words):
    with pytest.raises(ValueError, match=WRONG[words]):
        selection_of(words)
    with pytest.raises(ValueError, match="select: expected None, a Selection or its words, got int"):
        Selection.of(3)


def test_a_policy_of_one_s_own():
    assert policy_of(Selection("l2norm")).whole == 2 and POLICIES["chunkkv"].probes == POLICIES["refreekv"].probes == 32
