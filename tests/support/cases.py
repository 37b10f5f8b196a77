"""Seeded decode problems: shuffled pages, NaN in every slot that must not be read, garbage in unused table entries.

Unused slots are those past a sequence's length (or max_seq_len) and those before every query's reach (seq_starts,
window).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from packing import fill, poison, segments

import lrattn

GARBAGE = 2_000_000_000
MAX_POSITION = 4096


@dataclass(frozen=True)
class Case:
    """One shape of decode_attention; `call` holds its scalar arguments."""

    name: str
    Hkv: int = 4
    M: int = 1
    D: int = 64
    S: int = 1
    P: int = 16
    key_ranks: tuple[int, ...] = (32,)
    value_ranks: tuple[int, ...] = (48,)
    lens: tuple[int, ...] = (37,)
    E: int = 24
    rope: Any = "default"
    chunk: int | None = None
    shared: bool = False
    offset: bool = False  # of keys and of values
    key_order: tuple[int, ...] | None = None
    value_order: tuple[int, ...] | None = None
    positions: bool = False
    offsets: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    sinks: bool | str = False  # "partly": the first head's is -inf
    near: tuple[int, int, int, bool, bool] | None = None  # recent, sinks, more slots; rows, firsts
    pages: int | None = None  # width of the block table, to which lengths are clamped; None: a page more than needed
    size: float = 1.0  # of queries and latents
    strided: bool = False
    key_bits: tuple[int, ...] = ()  # widths of packed latents, in segments of each; (): plain. Of the row when shared
    value_bits: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32  # the interpreter's; a GPU gets all
    call: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return self.name


def rope_of(case):
    if case.rope is None:
        return None
    extra = {} if case.rope == "default" else dict(case.rope)
    return lrattn.Rope(**{"theta": 1e4, "dim": case.D, "max_position": MAX_POSITION, **extra})


def make_layer(case, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    def loose(x):
        return x.mT.contiguous().mT if case.strided else x

    def up(ranks, order):
        x = normal(case.Hkv, max(ranks), case.D, scale=max(ranks) ** -0.5)
        order = order or range(case.Hkv)
        for place, head in enumerate(order):
            x[head, ranks[place // (case.Hkv // len(ranks))] :] = 0
        return loose(x)

    def side(ranks, order, bits, spread, read):
        """`read` sides are written from: a group's latents read its own heads of them."""
        made = lrattn.Projection(
            up=up(ranks, order),
            ranks=ranks,
            offset=normal(case.Hkv, case.D, scale=spread) if case.offset else None,
            head_order=order,
            format=formats(ranks, bits),
        )
        if not read:
            return made
        down = torch.zeros(read, case.Hkv, case.D, made.width, dtype=dtype)
        for heads, columns in zip(made.groups, made.columns):
            down[:, list(heads), :, columns] = normal(read, len(heads), case.D, columns.stop - columns.start)
        return replace(made, down=down.flatten(0, 2))

    bits = ((), case.key_bits) if case.shared else (case.key_bits, case.value_bits)
    return lrattn.LayerFactors(
        keys=side(case.key_ranks, case.key_order, bits[0], 2.0, int(not case.shared)),
        values=side(case.value_ranks, case.value_order, bits[1], 1.0, 1 + case.shared),
        rope=rope_of(case),
        shared=case.shared,
        chunk=case.chunk,
        wo=loose(normal(case.Hkv * case.M, case.D, case.E, scale=case.D**-0.5)),
    )


def latents(layer, *lead, generator=None):
    """Random ones of some tokens, [*lead, width] each, None for what a shared row has no side of."""
    g = generator or torch.Generator().manual_seed(3)
    widths = layer.row_width, None if layer.shared else layer.values.width
    drawn = [None if n is None else torch.randn(*lead, n, generator=g, dtype=torch.float64) for n in widths]
    return [None if z is None else z.to(layer.device, layer.dtype) for z in drawn]


def there(*things):
    return [x for x in things if x is not None]


def formats(ranks, widths):
    """One for each group, with the last of the widths that the smallest group has latents for."""
    widths = widths[-(min(ranks) // 16) :]
    return tuple(lrattn.Format(segments(rank, widths)) for rank in ranks) if widths else None


def held(case, b):
    """Tokens of row b that the table has room for."""
    return max(0, case.lens[b] if case.pages is None else min(case.lens[b], case.pages * case.P))


def clamped(case, b):
    """Tokens of row b up to the end of the table and max_seq_len."""
    return min(held(case, b), case.call.get("max_seq_len", case.lens[b]))


def begins(case, b):
    """First token of row b that is attended to, and the token in the first row of its dense window."""
    start = 0 if case.starts is None else max(0, case.starts[b])
    return start, start if case.near is None or not case.near[4] else [3, 0, start][b % 3]


def reach(case, b):
    """The tokens that some query of row b sees by their latents; all others are out of reach, and so poisoned."""
    end, (first, row), window = clamped(case, b), begins(case, b), case.call.get("window_size")
    if case.near is not None:
        recent, sinks, *_ = case.near
        end, first, window = end - recent, max(first, row + sinks), window and window - recent
        if window is not None and window <= 0:
            end = 0
    if window is not None:
        first = max(first, end - case.S - window + 1)
    end = max(end, 0)
    return min(first, end) if case.S else end, end


def make_near(case, layer, g, bound):
    """Exact keys and values, a number for each token that some query sees so, in places as Near says; others NaN."""
    recent, sinks, more, rows, firsts = case.near
    batch, slots = len(case.lens), min(recent + case.S - 1, bound) + more if recent else more
    shape = (batch + 2 * rows, sinks + slots, 2, case.Hkv, case.D)
    pool = torch.full(shape, torch.nan, dtype=layer.dtype)
    order = torch.randperm(len(pool), generator=g)[:batch] if rows else torch.arange(batch)
    begun = [begins(case, b) for b in range(batch)]
    window = case.call.get("window_size", recent)
    for b, (start, first) in enumerate(begun):
        end = clamped(case, b)
        for t in range(max(start, first), end):
            if t >= first + sinks and t <= end - case.S - min(recent, window):
                continue
            if t < first + sinks or recent:
                place = t - first if t < first + sinks else sinks + t % slots
                drawn = torch.randn(2, case.Hkv, case.D, generator=g, dtype=torch.float64) * case.size
                pool[order[b], place] = drawn.to(layer.dtype)
    told = torch.tensor([first for _, first in begun], dtype=torch.int32) if firsts else None
    keys, values = (x if case.strided else x.contiguous() for x in pool.unbind(2))
    return lrattn.Near(keys, values, sinks, recent, order.int() if rows else None, told)


def make(case, dtype=torch.float64, seed=0):
    """Layer, query, caches and the keyword arguments of decode_attention."""
    layer = make_layer(case, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * case.size).to(dtype)

    counts = [held(case, b) for b in range(len(case.lens))]
    used = [-(-n // case.P) for n in counts]
    width = max(used, default=0) + 1 if case.pages is None else case.pages
    num_pages = sum(used) + 3
    order = torch.randperm(num_pages, generator=g).tolist()
    table = torch.full((len(case.lens), width), GARBAGE, dtype=torch.int32)
    k_cache, v_cache = lrattn.allocate_cache(layer, num_pages, case.P)
    for cache in there(k_cache, v_cache):
        cache.fill_(poison(cache.dtype))
    positions = torch.full((num_pages, case.P), -1, dtype=torch.int32) if case.positions else None
    last = MAX_POSITION if layer.rope is None else layer.rope.max_position
    for b, n in enumerate(counts):
        for i in range(used[b]):
            table[b, i] = order.pop()
        t = torch.arange(n)
        slots = table[b, t // case.P].long() * case.P + t % case.P
        zk, zv = normal(n, layer.row_width), None if case.shared else normal(n, layer.values.width)
        lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots)
        first, end = reach(case, b)
        unseen = (t < first) | (t >= end)
        if positions is not None:
            chosen = torch.randint(last, (n,), generator=g, dtype=torch.int32)
            positions.view(-1)[slots] = chosen.masked_fill(unseen, -1)
        for side, cache in ((layer.row_side, k_cache), (layer.values, v_cache)):
            if cache is not None:
                fill(cache, side.format, slots[unseen], poison(cache.dtype))
        table[b, : first // case.P] = GARBAGE
        table[b, (end + case.P - 1) // case.P :] = GARBAGE
    q = normal(len(case.lens), case.S, case.Hkv * case.M, case.D)
    sinks = torch.randn(case.Hkv * case.M, generator=g)
    if case.sinks == "partly":
        sinks[0] = -torch.inf
    kwargs = {
        "block_table": table,
        "seq_lens": torch.tensor(case.lens, dtype=torch.int32),
        "positions": positions,
        "offsets": None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32),
        "seq_starts": None if case.starts is None else torch.tensor(case.starts, dtype=torch.int32),
        "sinks": sinks if case.sinks else None,
        **case.call,
    }
    if case.near is not None:
        kwargs["near"] = make_near(case, layer, g, min(width * case.P, case.call.get("max_seq_len", width * case.P)))
    return (layer, *strided(q, k_cache, v_cache, kwargs)) if case.strided else (layer, q, k_cache, v_cache, kwargs)


def strided(q, k_cache, v_cache, kwargs):
    """The same problem in slices of wider tensors: both caches in one with room between, q and tables cut out."""
    k_cache, v_cache = in_one(k_cache, v_cache)
    wide = q.new_full((*q.shape[:2], 3, *q.shape[2:]), torch.nan)
    wide[:, :, 1] = q
    cut = {n: torch.stack((x, x), 1)[:, 1] for n in ("block_table", "seq_lens", "seq_starts", "positions", "offsets")
           if (x := kwargs[n]) is not None}  # fmt: skip
    return wide[:, :, 1], k_cache, v_cache, kwargs | cut


def in_one(k_cache, v_cache):
    """Both caches as slices of one tensor, or each of its own where their dtypes differ; poison between. Slices of
    rows, or of pages where they are packed."""
    if v_cache is not None and v_cache.dtype != k_cache.dtype:
        return in_one(k_cache, None)[0], in_one(v_cache, None)[0]
    caches, size = there(k_cache, v_cache), k_cache.shape[1]
    widths = [*(x.shape[-1] for x in caches), 16]
    pool = k_cache.new_full((len(k_cache), 2, size, sum(widths)), poison(k_cache.dtype))[:, 1]
    cut = pool.split(widths, -1)
    if k_cache.dtype == torch.uint8:
        pages = pool.flatten(1).split([size * width for width in widths], 1)
        cut = [x.unflatten(1, (size, -1)) for x in pages]
    for held, x in zip(cut, caches):
        held.copy_(x)
    return cut[0], cut[1] if v_cache is not None else None


FAR = -1_000_000  # an offset: positions of a million
PLAIN = Case("plain")
SIDES = {"key_ranks": (32, 16), "value_ranks": (64, 16)}
RAGGED = Case("ragged", M=2, S=2, lens=(70, 33, 1, 0), offset=True, sinks=True, **SIDES)
YARN = {"scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}
CASES = [
    PLAIN,
    Case("gqa", M=3, key_ranks=(32, 48), lens=(33, 1)),
    Case("mqa", Hkv=1, M=8, key_ranks=(16,), value_ranks=(32,), lens=(16, 17, 15)),
    Case("ragged ranks and batch", M=2, key_ranks=(16, 48, 32, 64), value_ranks=(64, 16), lens=(0, 1, 15, 40)),
    Case("head order", Hkv=6, M=2, D=80, key_ranks=(32, 48), key_order=(4, 0, 2, 5, 1, 3),
         value_order=(5, 4, 3, 2, 0, 1)),
    Case("three heads a group", Hkv=3, M=3, key_ranks=(96,), value_ranks=(80,), lens=(50,)),
    Case("offset", M=2, offset=True, key_ranks=(32, 16), lens=(20, 9)),
    Case("no rope", rope=None, M=2, key_ranks=(32, 16), lens=(30, 2)),
    Case("no rope, offset", rope=None, offset=True, key_order=(2, 0, 3, 1), key_ranks=(32, 16)),
    Case("interleaved", rope={"interleaved": True}, M=2, D=96),
    Case("partial rotary", rope={"partial_rotary_factor": 0.25}, D=80, M=2),
    Case("partial interleaved", rope={"partial_rotary_factor": 0.5, "interleaved": True}, D=128),
    Case("yarn", rope=YARN, D=128, positions=True),
    Case("joint row", shared=True, key_ranks=(48, 64), value_ranks=(48, 64), M=2, lens=(33, 5)),
    Case("riding row", shared=True, key_ranks=(32, 16), value_ranks=(48, 64), M=2, lens=(33, 5)),
    Case("riding row, head order", shared=True, key_ranks=(32, 16), value_ranks=(48, 64), key_order=(3, 0, 2, 1),
         value_order=(3, 0, 2, 1)),
    Case("shared without rope", shared=True, rope=None, key_ranks=(32,), value_ranks=(64,)),
    Case("chunks", chunk=64, M=2, S=3, lens=(200, 65, 2), offsets=(37, 700, FAR), offset=True, key_ranks=(32, 16)),
    Case("chunks, interleaved, joint row", chunk=64, shared=True, key_ranks=(48,), value_ranks=(48,), lens=(140, 33),
         rope={"partial_rotary_factor": 0.5, "interleaved": True}, call={"window_size": 90, "num_splits": 2}),
    Case("positions", positions=True, M=2, lens=(40, 17)),
    Case("starts", starts=(5, 0, 20), lens=(40, 17, 20), M=2),
    Case("many queries", S=5, M=2, lens=(40, 5, 3, 0)),
    Case("not causal", S=3, lens=(20, 2), starts=(4, 0), call={"causal": False}),
    Case("window", lens=(60, 5), call={"window_size": 20}),
    Case("window and queries", S=4, M=2, lens=(60, 5, 2), starts=(0, 2, 0), call={"window_size": 7}),
    Case("softcap", call={"softcap": 3.0}, M=2),
    Case("sinks", sinks=True, offset=True, M=2, lens=(20, 0, 1)),
    Case("scale", call={"softmax_scale": 0.3}),
    Case("strided", strided=True, M=2, S=2, lens=(40, 17), offset=True, positions=True),
    Case("clamped to the table", lens=(48, 20), pages=2),
    Case("clamped to a number", lens=(48, 20), call={"max_seq_len": 32}),
    Case("splits", M=2, S=2, lens=(70, 3, 0), call={"num_splits": 5}),
    Case("splits, window, sinks", sinks=True, S=2, lens=(70, 33), call={"num_splits": 3, "window_size": 40}),
    Case("small workspace", S=4, M=2, lens=(70, 40), call={"workspace_limit": 1}),
    Case("big pages", P=64, lens=(130, 64, 63), M=2),
    Case("wide head", D=256, Hkv=2, key_ranks=(64,), value_ranks=(32,)),
    Case("everything", M=2, S=3, D=80, Hkv=4, key_ranks=(32, 16), value_ranks=(64,), key_order=(2, 1, 3, 0),
         offset=True, positions=True, starts=(3, 0), sinks=True, lens=(50, 21), P=32,
         rope={"partial_rotary_factor": 0.5}, call={"softcap": 5.0, "window_size": 30, "num_splits": 2}),
]  # fmt: skip


PACKED = [
    Case("bytes", key_bits=(8,), value_bits=(8,), M=2, lens=(33, 5)),
    Case("nibbles, ragged", key_bits=(4,), value_bits=(4,), key_ranks=(16, 48), value_ranks=(32, 96), lens=(0, 1, 40)),
    Case("two bits", key_bits=(2,), value_bits=(2,), key_ranks=(64,), value_ranks=(80,), lens=(50,)),
    Case("all widths", key_bits=(16, 8, 4, 2), value_bits=(8, 4, 2), key_ranks=(96, 80), value_ranks=(112,), M=2),
    Case("sixteen last", key_bits=(8, 16), value_bits=(2, 4, 8, 16), value_ranks=(112,), lens=(20,)),
    Case("keys alone", key_bits=(8, 2), lens=(20, 3), strided=True),
    Case("values alone", value_bits=(4, 2), lens=(20, 3), M=2, strided=True),
    Case("strided", key_bits=(8, 4), value_bits=(4, 2), lens=(20, 3), strided=True),
    Case("joint row", key_bits=(8, 4, 2), shared=True, key_ranks=(112, 128), value_ranks=(112, 128), M=3, lens=(33, 5)),
    Case("riding row", key_bits=(8, 4, 8, 2), shared=True, key_ranks=(32,), value_ranks=(96,), M=2, lens=(33, 5)),
    Case("five scales", key_bits=(8, 4, 2, 8, 4), shared=True, key_ranks=(48,), value_ranks=(80,), lens=(18,)),
    Case("offset", key_bits=(8, 4), value_bits=(8,), offset=True, key_ranks=(32, 48), M=2, lens=(21, 3)),
    Case("no rope", rope=None, key_bits=(8, 4), value_bits=(4, 2), key_ranks=(32,), M=2, lens=(30, 2), offset=True),
    Case("chunks", chunk=64, key_bits=(8, 4), value_bits=(4, 2), M=2, lens=(150, 3), offsets=(-90, 1), offset=True),
    Case("no rope, joint", rope=None, key_bits=(16, 4), shared=True, key_ranks=(64,), value_ranks=(64,)),
    Case("everything", M=2, S=3, D=80, key_ranks=(32, 48), value_ranks=(64,), key_order=(2, 1, 3, 0),
         offset=True, positions=True, starts=(3, 0), sinks=True, lens=(50, 21), P=32, key_bits=(4, 2),
         value_bits=(8, 2), rope={"partial_rotary_factor": 0.5},
         call={"softcap": 5.0, "window_size": 30, "num_splits": 2, "workspace_limit": 1}),
]  # fmt: skip
