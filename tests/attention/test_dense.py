"""Dense attention, with keys and values of their own for near tokens and in parts: against a softmax written out."""

import pytest
import torch

from lrattn import merge_attention
from lrattn.attention import dense


def plain(q, k, v, near_k, near_v, recent, sinks, scale, window):
    """Every query and head on its own: which of the two keys it sees, one softmax."""
    out = torch.zeros_like(q)
    for s in range(len(q)):
        i = len(k) - len(q) + s
        tokens = [j for j in range(i + 1) if window is None or j > i - window]
        chosen = [(near_k[j], near_v[j]) if j > i - recent or j < sinks else (k[j], v[j]) for j in tokens]
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            p = torch.softmax(torch.stack([q[s, h] @ x[g] for x, _ in chosen]) * scale, 0)
            out[s, h] = sum(w * y[g] for w, (_, y) in zip(p, chosen, strict=True))
    return out


@pytest.mark.parametrize("queries", [1, 3, 21])
@pytest.mark.parametrize("recent, sinks", [(0, 0), (1, 0), (5, 2), (0, 4), (40, 1), (3, 40)])
@pytest.mark.parametrize("window", [None, 7])
def test_near_tokens_have_keys_of_their_own(queries, recent, sinks, window, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", 8)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(queries, 4, 8, generator=g, dtype=torch.float64)
    k, v, near_k, near_v = (torch.randn(21, 2, 8, generator=g, dtype=torch.float64) for _ in range(4))
    expected = plain(q, k, v, near_k, near_v, recent, sinks, 0.3, window)
    first = 21 - queries
    at = torch.tensor([j for j in range(21) if j < sinks or j > first - recent], dtype=torch.int64)
    near = dense.Near(near_k[at], near_v[at], at, recent, sinks)
    got = dense.causal_attention(q, k, v, 0.3, window, near)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    if not recent and not sinks:
        torch.testing.assert_close(dense.causal_attention(q, k, v, 0.3, window), expected, rtol=0, atol=1e-12)


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


def test_gradients_pass_to_far_and_near_tokens_apart():
    g = torch.Generator().manual_seed(0)
    q, k, v, near_k, near_v = (torch.randn(12, 2, 8, generator=g, dtype=torch.float64) for _ in range(5))
    leaves = [x.requires_grad_() for x in (k, v, near_k, near_v)]
    near = dense.Near(near_k, near_v, torch.arange(12), 4, 1)
    dense.causal_attention(q, k, v, 0.3, near=near).square().sum().backward()
    far = [bool(x) for x in k.grad.abs().sum((1, 2)) > 0]
    assert far == [0 < j < 8 for j in range(12)]  # the last query is near to tokens 8 and on, all to token 0
    assert all((x.grad.abs().sum((1, 2)) > 0).all() for x in leaves[2:])
