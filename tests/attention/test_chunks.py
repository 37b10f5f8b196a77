"""Keys in chunks: at full rank attention is dense attention, wherever a text lies, however its tokens are held."""

from dataclasses import replace

import pytest
import torch

import lrattn

HEADS, M, DIM, CHUNK, PAGE = 2, 2, 32, 64, 16
N = HEADS * DIM
ROPES = {"halves": {}, "partial, interleaved": {"partial_rotary_factor": 0.5, "interleaved": True}}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(shared=False, rope="halves", rank=None):
    """One group of all heads, of orthogonal latents, with offsets; rank None: all of them."""
    rows = 2 * N if shared else N
    q = torch.linalg.qr(random(rows, rows))[0][:, :rank]
    offsets = random(2, HEADS, DIM, seed=1)

    def side(own, down, offset):
        up = own.T.unflatten(1, (HEADS, DIM)).transpose(0, 1).contiguous()
        return lrattn.Projection(up, (q.shape[1],), down, offset)

    keys = side(q[:N], None if shared else q, offsets[0])
    values = side(q[N:] if shared else q, q, offsets[1])
    return lrattn.LayerFactors(keys, values, lrattn.Rope(1e4, DIM, 4096, **ROPES[rope]), shared, chunk=CHUNK)


def cached(layer, k, v, offset, before=0):
    """Caches of k, v [T, Hkv, D], token t at position t - offset, in pages of any order behind `before` pages."""
    pages = before + -(-len(k) // PAGE)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(2)).int()[None]
    caches = lrattn.allocate_cache(layer, pages, PAGE)
    for cache in caches:
        if cache is not None:
            cache.fill_(torch.nan)
    t = torch.arange(len(k))
    slots = table[0, before + t // PAGE].long() * PAGE + t % PAGE
    lrattn.write_latents(layer, *layer.project(k, v, t - offset), *caches, slots)
    return caches, table[:, before:]


def dense(q, k, v, seen):
    """q [S, Hq, D], k and v [T, Hkv, D], seen [S, T] -> [S, Hq, D]."""
    k, v = (x.repeat_interleave(M, 1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) * DIM**-0.5
    return torch.einsum("hst,thd->shd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.every(5)
@pytest.mark.parametrize("offset", [None, 0, 37, 64, 700, -5, -1_000_000])
@pytest.mark.parametrize(("shared", "rope"), [(False, "halves"), (True, "partial, interleaved")])
def test_at_full_rank_attention_is_dense_attention(shared, rope, offset):
    """Queries and keys as an engine hands them over, turned to positions of any size: of which nothing is asked here
    but that chunks cancel."""
    tokens, queries = 333, 70  # queries of three chunks
    layer, k, v = layer_of(shared, rope), *random(2, tokens, HEADS, DIM, seed=3)
    q = random(queries, HEADS * M, DIM, seed=4)
    caches, table = cached(layer, k, v, offset or 0)
    given = {"block_table": table, "seq_lens": torch.tensor([tokens], dtype=torch.int32)}
    given |= {} if offset is None else {"offsets": torch.tensor([offset], dtype=torch.int32)}
    i, t = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)
    for changes, seen in (
        ({}, t <= i),
        ({"window_size": 90}, (t <= i) & (t > i - 90)),
        ({"seq_starts": torch.tensor([75], dtype=torch.int32), "num_splits": 4}, (t <= i) & (t >= 75)),
        ({"causal": False, "workspace_limit": 1}, (t >= 0).expand(queries, -1)),
    ):
        out = lrattn.decode_attention(q[None], *caches, layer, **given, **changes)
        torch.testing.assert_close(out[0], dense(q, k, v, seen), rtol=0, atol=1e-12)
    back = lrattn.rebuild(*caches, layer, *given.values()) if offset is None else lrattn.rebuild(
        *caches, layer, table, given["seq_lens"], offsets=given["offsets"]
    )  # fmt: skip
    torch.testing.assert_close(back, (k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_a_text_behind_700_tokens_of_padding_is_the_text(shared):
    """Latents bit for bit; attention beside one without padding, at a rank that loses something."""
    layer, tokens, pad = layer_of(shared, rank=32), 150, 700
    k, v, q = *random(2, tokens, HEADS, DIM, seed=5), random(2, 1, HEADS * M, DIM, seed=6)
    q[1] = q[0]
    caches, table = cached(layer, k, v, 0)
    padded = [torch.cat((random(pad, HEADS, DIM, seed=7), x)) for x in (k, v)]
    behind, wide = cached(layer, *padded, pad)
    t = torch.arange(tokens)
    for a, b in zip(caches, behind, strict=True):
        if a is not None:
            own = a[table[0, t // PAGE].long(), t % PAGE]
            assert torch.equal(own, b[wide[0, (pad + t) // PAGE].long(), (pad + t) % PAGE])
    out = []
    for cache, pages, offset, row in ((caches, table, 0, 0), (behind, wide, pad, 1)):
        places = {"seq_lens": offset + tokens, "seq_starts": offset, "offsets": offset}
        given = {name: torch.tensor([n], dtype=torch.int32) for name, n in places.items()}
        out.append(lrattn.decode_attention(q[row : row + 1], *cache, layer, block_table=pages, **given))
    torch.testing.assert_close(*out, rtol=0, atol=1e-13)


def test_positions_of_another_form_are_refused():
    chunked = layer_of()
    rebuilt, as_given = replace(chunked, chunk=None), replace(chunked, chunk=None, rope=None)
    q, table = random(1, HEADS * M, DIM), torch.zeros(1, 1, dtype=torch.int32)
    lens, at = torch.tensor([3], dtype=torch.int32), torch.zeros(1, PAGE, dtype=torch.int32)
    for layer, given, message in (
        (chunked, {"positions": at}, "positions: expected None for keys in chunks of 64, whose tokens follow .*"),
        (rebuilt, {"offsets": lens}, "offsets: expected None for keys before RoPE, which go by positions, .*"),
        (chunked, {"offsets": lens.long()}, "offsets: expected dtype torch.int32, got torch.int64"),
        (chunked, {"offsets": lens.repeat(2)}, r"offsets: expected shape \[B=1\], got \[2\]"),
    ):
        caches = [x.zero_() for x in lrattn.allocate_cache(layer, 1, PAGE)]
        with pytest.raises(ValueError, match=message):
            lrattn.decode_attention(q, *caches, layer, block_table=table, seq_lens=lens, **given)
        with pytest.raises(ValueError, match=message):
            lrattn.rebuild(*caches, layer, table, lens, **given)
    caches = [x.zero_() for x in lrattn.allocate_cache(chunked, 1, PAGE)]
    plain = lrattn.decode_attention(q, *caches, as_given, block_table=table, seq_lens=lens)
    placed = lrattn.decode_attention(q, *caches, as_given, block_table=table, seq_lens=lens, offsets=lens)
    assert torch.equal(plain, placed)  # which know no positions
    far = torch.tensor([3 - (1 << 20) - 1], dtype=torch.int32)
    told = "offsets: expected at least -1048573 of a sequence of 3 tokens, .* max_position=1048576 .*, got -1048574"
    with pytest.raises(ValueError, match=told):
        lrattn.decode_attention(q, *caches, chunked, block_table=table, seq_lens=lens, offsets=far)
    none = torch.zeros_like(lens)  # tokens, whose positions are beyond nothing
    assert not lrattn.decode_attention(q, *caches, chunked, block_table=table, seq_lens=none, offsets=far).any()


def test_memory_stays_within_the_limit_as_contexts_grow():
    layer, heads = layer_of(), HEADS * M
    for queries in (1, 64):
        held = {
            n: lrattn.workspace_bytes(
                layer, query_heads=heads, num_queries=queries, max_seq_len=n, workspace_limit=1 << 22
            )
            for n in (1 << 10, 1 << 14, 1 << 20)
        }
        assert max(held.values()) <= 1 << 22
