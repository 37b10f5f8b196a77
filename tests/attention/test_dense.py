"""Dense attention, with keys and values of their own for near tokens and in parts: against a softmax written out."""

import pytest
import torch

from lrattn import merge_attention
from lrattn.attention import dense


def plain(q, far, near, sees, is_near, softcap=0.0, extra=None):
    """Every row, query and head on its own: which of the two keys it sees of each column, one softmax.

    sees, is_near: of a row, a query and a column.
    """
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for s in range(q.shape[2]):
            columns = [j for j in range(far[0].shape[2]) if sees(b, s, j)]
            pick = [near if is_near(b, s, j) else far for j in columns]
            for h in range(q.shape[1] if columns else 0):
                g = h * far[0].shape[1] // q.shape[1]
                scores = torch.stack([x[0][b, g, j] @ q[b, h, s] for x, j in zip(pick, columns)]) * 0.3
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                joined = scores if extra is None else torch.cat((scores, extra[h : h + 1]))
                p = torch.softmax(joined, 0)[: len(columns)]
                out[b, h, s] = sum(w * x[1][b, g, j] for w, x, j in zip(p, pick, columns))
    return out


def heads(seed=0, columns=21, queries=21, heads=4):
    g = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(2, 2, columns, 8, generator=g, dtype=torch.float64) for _ in range(4)]
    return torch.randn(2, heads, queries, 8, generator=g, dtype=torch.float64), tuple(pairs[:2]), tuple(pairs[2:])


def dense_of(q, far, near, begin, recent, sinks, window=None, pads=None, live=None, softcap=0.0, extra=None):
    """`dense_attention` as a cache calls it: the last columns, and each row's first live ones, beside all of them."""
    end = far[0].shape[2]
    own = None if pads is None else torch.tensor(pads)
    sight = dense.Sight(begin, end, recent, sinks, window, own, live)
    held = slice(max(begin - recent + 1, 0), end)
    last = tuple(x[:, :, held] for x in near) if recent else None
    first = None
    if sinks:
        at = (torch.zeros(2, 1, dtype=torch.int64) if own is None else own[:, None]) + torch.arange(sinks)
        at = at.clamp_max(end - 1)[:, None, :, None].expand(-1, 2, -1, 8)
        first = tuple(x.gather(2, at) for x in near)
    return dense.dense_attention(q, sight, far, last, first, scale=0.3, softcap=softcap, sinks=extra)


@pytest.mark.parametrize("queries", [1, 3, 21])
@pytest.mark.parametrize("recent, sinks", [(0, 0), (1, 0), (5, 2), (0, 4), (40, 1), (3, 40)])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["whole", "padded", "holes", "capped"])
def test_near_columns_have_keys_of_their_own(queries, recent, sinks, window, kind, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", 8)
    monkeypatch.setattr(dense, "SMALL_BLOCK", 5)
    q, far, near = heads(queries=queries)
    pads, live, softcap, extra = [0, 0], None, 0.0, None
    if kind in ("padded", "holes"):
        pads = [5, 0]
    if kind == "holes":
        live = torch.arange(21).expand(2, -1) >= torch.tensor(pads)[:, None]
        live = live & (torch.arange(21) != 9)
    if kind == "capped":
        softcap, extra = 2.0, torch.tensor([0.5, -torch.inf, 1.0, 0.0], dtype=torch.float64)
    seen = torch.ones(2, 21, dtype=torch.bool) if live is None else live
    begin = 21 - queries

    def sees(b, s, j):
        return pads[b] <= j <= begin + s and (window is None or j > begin + s - window) and seen[b, j]

    def is_near(b, s, j):
        return j > begin + s - recent or j < pads[b] + sinks

    expected = plain(q, far, near, sees, is_near, softcap, extra)
    given = None if pads == [0, 0] else pads
    got = dense_of(q, far, near, begin, recent, sinks, window, given, live, softcap, extra)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_mask_in_full_says_what_is_seen():
    """Columns after the query too, as between image tokens; near ones are those within `near` columns before it."""
    q, far, near = heads()
    g = torch.Generator().manual_seed(1)
    full = torch.rand(2, 21, 21, generator=g) < 0.5
    full[0, 3] = False  # a query that sees nothing
    sight = dense.Sight(0, 21, 4, 0, full=full)
    got = dense.dense_attention(q, sight, far, near, scale=0.3)
    expected = plain(q, far, near, lambda b, s, j: full[b, s, j], lambda b, s, j: j > s - 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert not got[0, :, 3].any()


def test_parts_of_the_tokens_with_their_lse_are_the_whole():
    """Parts cut anywhere, ones that no query sees too, merge to one softmax; queries that see nothing give zeros."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 9, 2, 8, generator=g, dtype=torch.float64) for _ in range(2))
    seen = torch.rand(2, 3, 9, generator=g) < 0.6
    seen[:, :, 4:6], seen[1, 2] = False, False
    cuts = [slice(0, 0), slice(0, 4), slice(4, 6), slice(6, 9)]
    parts = [dense.masked_attention(q, k[:, c], v[:, c], seen[..., c], 0.3) for c in cuts]
    out, lse = merge_attention(*zip(*parts, strict=True))
    for b, s, h in ((0, 0, 1), (1, 1, 3), (0, 2, 2)):
        scores = 0.3 * k[b, seen[b, s], h // 2] @ q[b, s, h]
        torch.testing.assert_close(
            out[b, s, h], torch.softmax(scores, 0) @ v[b, seen[b, s], h // 2], rtol=0, atol=1e-12
        )
        torch.testing.assert_close(lse[b, s, h], scores.logsumexp(0), rtol=0, atol=1e-12)
    assert not out[1, 2].any() and (lse[1, 2] == -torch.inf).all()


def test_gradients_pass_to_far_and_near_columns_apart():
    """And stay finite where a query sees nothing, also under a softcap."""
    for softcap in (0.0, 2.0):
        q, far, near = heads(columns=12, queries=12)
        leaves = [x.requires_grad_() for x in (*far, *near)]
        dense_of(q, far, near, 0, 4, 1, pads=[0, 3], softcap=softcap).square().sum().backward()
        moved = [bool(x) for x in far[0].grad[0].abs().sum((0, 2)) > 0]
        assert moved == [0 < j < 8 for j in range(12)]  # the last query is near to columns 8 and on, all to column 0
        assert all(x.grad.isfinite().all() for x in leaves)
        assert all((x.grad[0].abs().sum((0, 2)) > 0).all() for x in leaves[2:])
        assert not any(x.grad[1, :, :3].any() for x in leaves)  # padding
