"""What the kernels read and write, element by element: every live latent as often as meant, nothing else at all.

Rows whose codes are operands of products (kernels/attend_packed.py) are read by whole tiles without a mask, tokens out
of reach from the first page in reach or the last: those two pages are read at least as often as meant, and others as
said above.

Counted in Triton's interpreter (compiled/counting.py). The numbers below are lanes that ask. Where several programs ask
for the same latent, heads of a group or blocks of 64 query rows, a GPU can serve all but the first from L2.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import mutants
import numpy as np
import packing
import pytest
import torch
from cases import Case, make, make_layer, reach
from checks import attend
from mutants import Mutant
from triton.runtime.errors import InterpreterError

import lrattn
from bench.compiled import traffic
from bench.compiled.counting import SECTOR, counting
from bench.decode.ways import two_passes
from lrattn.kernels import plan
from lrattn.kernels.pieces import PLANES, columns, pieces

swap = mutants.swap

PLAIN = Case("plain", M=2, D=128, key_ranks=(128, 160), value_ranks=(160, 128), lens=(100, 64, 1, 0),
             key_order=(2, 0, 3, 1), dtype=torch.float16, strided=True)  # fmt: skip


class Way(NamedTuple):
    """A way to run a call: how often it reads each live latent of the keys and of the values.

    In a shared row key columns are read for the keys and for the values. A way that reads them once for both reads
    keys 0 times. rebuilds: keys and values, instead of attending to them.
    """

    case: Case
    keys: int
    values: int = 1
    rebuilds: bool = False

    def __str__(self):
        return self.case.name


def by_a_band(layer, case):
    """Whether packed keys go by a band: read by whole tiles, a tile ahead."""
    keys, values = (side.sizes for side in layer.operands)
    turned = plan.turns_queries(keys, layer.dtype, case.positions)
    return turned and bool(keys.packed and plan.banded(case.M * case.S, layer.dtype, "sm90", keys, values))


def streamed(layer, case):
    """Whether plain keys that queries are absorbed for go piece by piece."""
    keys, values = (side.sizes for side in layer.operands)
    return (
        layer.absorbed
        and not keys.packed
        and plan.absorbed(case.M * case.S, layer.dtype, "sm90", keys, values).streamed
    )


def read_by_tiles(layer, case):
    """Of keys and of values, the tokens of a tile where it is read without a mask, else 0."""
    keys, values = (side.sizes for side in layer.operands)
    codes = plan.planes(layer.dtype, "sm90", keys, values)
    return tuple(0 if x is None else x.block_t for x in codes)


def edges(case, table, tile):
    """[B, width] of the table: pages of a tile that is not all in reach."""
    found = np.zeros(table.shape, bool)
    for b in range(len(table)):
        begin, end = reach(case, b)
        shift = 0 if case.offsets is None else case.offsets[b]
        if begin < end:
            found[b, begin // case.P] |= (begin - shift) % tile > 0
            found[b, (end - 1) // case.P] |= (end - shift) % tile > 0
    return found


def way(name, keys, values=1, rebuilds=False, **changes):
    return Way(replace(PLAIN, name=name, **changes), keys, values, rebuilds)


ONE = {"Hkv": 2, "key_ranks": (128,), "value_ranks": (160,), "key_order": None}  # group of two heads
JOINT = {"shared": True, "value_ranks": (128, 160), "value_order": PLAIN.key_order}
RIDING = {"shared": True, "value_ranks": (192, 160), "value_order": PLAIN.key_order}
NARROW = {"shared": True, "key_ranks": (128, 96), "value_ranks": (128, 96), "value_order": PLAIN.key_order}
EACH = {"key_ranks": (128, 96, 128, 80), "value_ranks": (128, 96, 64, 128), "value_order": PLAIN.key_order}
MANY = {"S": 40, "lens": (70, 0), **ONE}  # 80 rows a head, 160 a group: 2 and 3 blocks of 64
PARTS = {"S": 3, "call": {"window_size": 40, "project": "latent"}}
PACKED = {"strided": False, "key_bits": (8, 4, 2)}
BOTH = {**PACKED, "value_bits": (8, 4, 2)}
WAYS = [
    # Rebuilt keys: a head is a program, so the 2 heads of a group each read its latents.
    way("positions, offset", 2, positions=True, offset=True),
    way("one head a group", 1, key_ranks=(128, 160, 128, 144), value_ranks=(128,) * 4),
    way("many queries", 2 * 2, 3, **MANY),
    # Of values a tile of columns is a program, so each latent is read once however wide they are.
    way("streamed rank, joint values", 4, key_ranks=(336,), value_ranks=(528,), lens=(70, 0)),
    # Absorbed keys: a group is a program.
    way("absorbed, offset, many queries", 3, 3, offset=True, rope=None, **MANY),
    way("absorbed, streamed rank", 1, rope=None, key_ranks=(336,), lens=(70, 0)),
    # Keys in chunks: the same, wherever tiles begin.
    way("chunks, two passes", 1, chunk=64, offset=True, P=64, offsets=(37, 0, -100, 0)),
    way("chunks, packed, piecemeal", 1, chunk=64, lens=(150, 0), offsets=(-30, 0), value_order=PLAIN.key_order,
        call={"num_splits": 2, "workspace_limit": 1}, **PACKED),
    way("one pass, chunks, joint row, window, starts", 0, chunk=64, offset=True, lens=(150, 64, 1, 0),
        starts=(30, 0, 0, 0), offsets=(-90, 700, 64, 0), S=3, call={"window_size": 90}, **JOINT),
    # Shared rows, read for the keys and for the values.
    way("riding row, offset", 2, offset=True, **RIDING),
    way("joint row, wide head", 2 * 2, D=256, lens=(70, 0), **JOINT),  # 128 dimensions at a time
    # One pass: a row that serves both is read once; where a head is a program, once by each of its group.
    way("one pass, absorbed", 1, rope=None, value_order=PLAIN.key_order),
    way("one pass, absorbed, riding row", 0, rope=None, **RIDING),
    way("one pass, rebuilt, joint row", 0, 2, **NARROW),
    way("one pass, rebuilt, positions", 0, 2, D=64, positions=True, **NARROW),
    way("one pass, window, starts, queries", 0, rope=None, starts=(90, 0, 0, 0), **JOINT,
        **PARTS | {"call": {"num_splits": 3, **PARTS["call"]}}),
    # Packed rows: bytes of codes are read as latents are, and a scale with every tile of its segment.
    way("packed", 2, value_bits=(4, 2), **PACKED),
    way("packed, streamed rank", 2 * 2, key_ranks=(336,), value_ranks=(96, 112), value_bits=(8,), lens=(70, 0),
        **PACKED | {"key_bits": (16, 8, 2)}),
    way("packed, absorbed", 1, rope=None, value_bits=(4,), **PACKED | {"dtype": torch.float32}),
    way("packed values, nine scales", 2, value_ranks=(144, 160), value_bits=(8, 4) * 4 + (2,), **PACKED),
    way("packed, rebuilt, joint row", 2, **PACKED, **NARROW),
    way("packed, band", 1, D=64, value_bits=(8,), value_order=PLAIN.key_order, **PACKED),
    way("packed, band, lanes, bias", 1, M=1, D=64, offset=True, lens=(150, 64, 0), starts=(70, 0, 0), **PACKED),
    way("packed, band, joint row", 1, D=64, **PACKED, **NARROW),
    # By tiles: keys and values a time each, one row for both too.
    way("by tiles, one pass", 1, chunk=128, lens=(300, 129, 0), offsets=(37, -100, 0), value_order=PLAIN.key_order,
        **BOTH),
    way("by tiles, even groups, big pages", 1, rope=None, key_ranks=(128, 128), P=256, lens=(300, 129),
        **BOTH | {"key_order": None, "value_ranks": (128, 128)}),
    way("by tiles, riding row", 1, rope=None, **PACKED, **RIDING),
    way("by tiles, window, starts, queries, splits", 1, chunk=64, lens=(300, 150, 64), starts=(250, 30, 0),
        **BOTH, S=3, call={"num_splits": 3, "window_size": 90}, value_order=PLAIN.key_order),
    way("by tiles, many queries", 4, 4, rope=None, S=13, value_order=PLAIN.key_order, **BOTH),
    way("by tiles, a pass each", 1, chunk=64, **BOTH | {"value_ranks": (336, 400)}),
    way("by tiles, keys alone", 1, chunk=64, **PACKED),
    way("by tiles, values alone", 1, rope=None, strided=True, value_bits=(8, 4)),
    # Parts of the tokens, in space and in time.
    way("window, starts, queries", 2, lens=(150, 64), starts=(120, 0), **ONE, **PARTS),
    way("big pages", 2, P=48),
    way("splits", 2, lens=(200, 64, 0), call={"num_splits": 3, "project": "hidden"}, **ONE),
    way("piecemeal, absorbed", 1, rope=None, lens=(150, 0), call={"num_splits": 2, "workspace_limit": 1}, **ONE),
    way("bounded", 2, call={"max_seq_len": 70}, **ONE),
    way("empty", 2, lens=(0, 0)),
    # Every token is rebuilt once a head, and each row written once.
    way("rebuild, offset, positions", 2, 2, rebuilds=True, offset=True, positions=True),
    way("rebuild, joint values", 2, 4, rebuilds=True, value_ranks=(528,), lens=(70, 0)),
    way("rebuild, riding row", 2, 2, rebuilds=True, lens=(70, 0), **RIDING),
    way("rebuild, chunks", 2, 2, rebuilds=True, chunk=64, offsets=(37, 0, -100, 0)),
    way("rebuild, 80 dimensions", 2, 2, rebuilds=True, D=80, lens=(70, 0)),
    way("rebuild, no rope", 2, 2, rebuilds=True, rope=None, P=48, **ONE),
]  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted(request):
    if request.config.getoption("--gpu"):
        pytest.skip("accesses are counted in the interpreter")


def reads_of(side, ranks, times, by_tiles):
    """How often each column of a live row is read where of each group the first `ranks` latents are, `times` times; or
    each byte of its run and of its words, where it is packed. NaN: it may be read or not, as padding, words of scales
    and a segment that ends beyond them; by tiles also 16 bytes beyond a segment where groups are alike, or segments
    that only other groups need where they are not."""
    if not side.formats:
        return [np.concatenate([times * (np.arange(n) < rank) for n, rank in zip(side.ranks, ranks)]).astype(float)]
    runs, ragged = [], len(set(side.formats)) > 1
    for own, rank in zip(side.formats, ranks):
        runs.append(np.full(packing.sizes(own)[0], np.nan))
        first = 0
        for held, bits, at, _ in packing.places(own):
            read = times if first + held <= rank else np.nan if first < rank or (by_tiles and ragged) else 0
            runs[-1][at : at + held * bits // 8] = read
            first += held
    runs = np.concatenate(runs)
    if by_tiles and not ragged:
        ends = np.cumsum([-(-rank * bits // 128) * 16 for own in side.formats for rank, bits in own.segments])
        runs[(ends[:, None] + np.arange(16)) % len(runs)] = np.nan
    return [runs, np.full(sum(packing.sizes(own)[1] for own in side.formats), np.nan)]


def parts_of(counts, side):
    """Of what is counted of a cache [N, P, width]: its rows, or the runs and words of packed ones, [N, P, ..] each."""
    if not side.formats:
        return [counts]
    pages, size, _ = counts.shape
    runs = size * sum(packing.sizes(own)[0] for own in side.formats)
    return [x.reshape(pages, size, -1) for x in np.split(counts.reshape(pages, -1), [runs], 1)]


def scales_of(side):
    """Which bytes of a token's words are scales."""
    held = []
    for own in side.formats:
        held.append(np.zeros(packing.sizes(own)[1], bool))
        held[-1][[at for *_, at in packing.places(own) if at is not None]] = True
    return np.concatenate(held)


def check_plain_tiles(layer, way, sides, seen, slots, firsts):
    """Of rows that are loaded without a mask on columns: pages in reach alone, and of these values' live rows, as often
    as the way says. Keys are loaded a tile ahead: once more where a program ends, and in the place of a tile's pages
    out of reach; where values are among them, live rows alone. Columns past a group's rank are its first sixteen again,
    which are read as often at least. firsts: pages of first tokens, whose rows stand for those of none before them."""
    case = way.case
    for cache, side, (times,), _ in sides:
        got, first = seen.reads(cache), np.concatenate([np.arange(n) % 64 < 16 for n in side.ranks])
        some, keys = slots.any(1), side is layer.keys or layer.shared
        assert (got[slots] >= 1).all() and not got[~some].any(), "read less often, or out of reach"
        most = 2 * max(128 // case.P, 1) if keys else 1
        if keys and way.keys == 0:
            most = 2
            assert not got[~slots].any(), "read more often"
        elif keys and case.offsets is not None:  # tiles that begin inside a page meet two
            most *= 2
            got[firsts, 0] = np.minimum(got[firsts, 0], most)
        assert (got[..., ~first] <= most * times[~first]).all(), "read more often"
        if not keys:
            np.testing.assert_array_equal(got[~slots], 0)
            np.testing.assert_array_equal(got[slots][:, ~first], np.broadcast_to(times, got.shape)[slots][:, ~first])


def check(way):
    """Runs a way: every latent, entry of the table and position that some query sees is read as meant, none beside."""
    case = way.case
    layer, q, k_cache, v_cache, kwargs = make(case, case.dtype)
    table, positions = kwargs["block_table"], kwargs["positions"]
    with counting() as seen:
        if way.rebuilds:
            tables = {n: kwargs[n] for n in ("block_table", "seq_lens", "positions", "offsets")}
            results = lrattn.rebuild(k_cache, v_cache, layer, **tables, backend="triton")
        else:
            results = attend((layer, q, k_cache, v_cache, kwargs))
    tiles = (0, 0) if way.rebuilds else read_by_tiles(layer, case)
    slots, entries = np.zeros(k_cache.shape[:2], bool), np.zeros(table.shape, bool)
    for b in range(len(table)):
        t = np.arange(*reach(case, b))
        slots[table[b].numpy()[t // case.P], t % case.P] = True
        entries[b, t // case.P] = True

    keys = reads_of(layer.row_side, layer.keys.ranks, way.keys, tiles[0])
    values = reads_of(layer.values, layer.values.ranks, way.values, tiles[1])
    both = [a + b for a, b in zip(keys, values)] if layer.shared else []
    sides = [(k_cache, layer.keys, keys, tiles[0]), (v_cache, layer.values, values, tiles[1])]
    if both:
        sides = [(k_cache, layer.values, both, max(tiles))]
    band = not way.rebuilds and by_a_band(layer, case)
    assert band == case.name.startswith("packed, band")
    if not way.rebuilds:
        tiled = [x for x in sides if not x[1].formats and not x[3]]
        tiled = [x for x in tiled if not (streamed(layer, case) and x[1] is layer.keys)]
        sides = [x for x in sides if not any(x is own for own in tiled)]
        check_plain_tiles(layer, way, tiled, seen, slots, table[kwargs["seq_lens"] > 0, 0].numpy())
    for cache, side, reads, tile in sides:
        parts, some, whole = parts_of(seen.reads(cache), side), slots.any(1), np.ones(len(cache), bool)
        ahead = band and cache is k_cache
        if tile:
            whole[table[torch.from_numpy(edges(case, table, tile))].numpy()] = False
        for got, times in zip(parts, reads, strict=True):
            known = ~np.isnan(times)
            meant = slots[..., None] * times[known]
            assert (got[..., known] >= meant).all(), "read less often"
            if ahead:  # dead rows of a tile too, and the last tile once more
                assert (got[..., known] <= max(64 // case.P, 1) * (1 + times[known])).all(), "read more often"
                assert not got[..., known][..., times[known] == 0].any(), "read more often"
            else:
                np.testing.assert_array_equal(got[whole][..., known], meant[whole])
            np.testing.assert_array_equal(got[~some if tile or ahead else ~slots], 0)
        if side.formats:
            assert (parts[1][slots][:, scales_of(side)] > 0).all(), "every scale is read"
    np.testing.assert_array_equal(seen.reads(table) > 0, entries)
    if positions is not None:
        np.testing.assert_array_equal(seen.reads(positions) > 0, slots)
    assert set(seen.early()) <= {("combine_kernel", "y")}, "read before it was written"
    assert not any(x.isnan().any() for x in results), "NaN, of what was not yet written, in a result"

    for cache, *_, tile in sides:  # latents fill the sectors they are read from
        read = slots.any(1).sum() * case.P if tile or (band and cache is k_cache) else slots.sum()
        least = int(read) * cache.shape[2] * cache.itemsize
        ends = 4 * SECTOR * int(slots.any(1).sum()) * layer.packed  # runs and words of a page may end inside a sector
        assert SECTOR * seen.sectors(cache) <= 1.02 * least + ends
    for x in results:
        assert (seen.writes(x) == 1).all(), "every number of a result is written once"
    for x in (q, k_cache, v_cache, *kwargs.values(), layer.keys.up, layer.values.up):
        assert not isinstance(x, torch.Tensor) or not seen.writes(x).any(), "what is given is not written"


@pytest.mark.every(6)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_live_latent_is_read_as_often_as_the_way_says_and_a_dead_one_never(way):
    check(way)


QUERIES = replace(PLAIN, chunk=128, offset=True, value_order=PLAIN.key_order, offsets=(37, 0, -100, 0))


def asked(case, two, tile):
    """Bytes by kernel, argument and kind, and of how many rows of queries they are: of all chunks that hold a token in
    reach, and of all tiles."""
    problem = make(case, case.dtype)
    with two_passes() if two else nullcontext(), counting() as seen:
        attend(problem)
    tiles = chunks = 0
    for length, offset in zip(case.lens, case.offsets):
        positions = [t - offset for t in range(length)]
        tiles += len({at // tile for at in positions})
        chunks += len({max(at, 0) // case.chunk for at in positions})
    rows = case.Hkv * case.M
    counts = {(row["kernel"], row["argument"], row["kind"]): row["requested"] for row in seen.rows()}
    return problem[0], counts, chunks * rows, tiles * rows


@pytest.mark.parametrize("two", [False, True])
def test_absorbed_queries_are_written_once_and_read_once_a_tile(two):
    _, counts, written, read = asked(QUERIES, two, 64)
    for name, size in (("a", QUERIES.dtype.itemsize * max(QUERIES.key_ranks)), ("terms", 4)):
        assert counts["absorb_kernel", name, "writes"] == written * size
        assert counts["attend_kernel", name, "reads"] == read * size


@pytest.mark.parametrize("two", [False, True])
def test_absorbed_queries_by_plane_too_and_their_terms(two):
    """One term for each piece of a row, the factor and the bias' share; the factor is read once a program."""
    case = replace(
        QUERIES, M=8, **BOTH | {"key_ranks": (96, 96), "value_ranks": (128, 128)}, call={"num_splits": 1}
    )  # 16 query rows a group
    layer, counts, written, read = asked(case, two, 128)
    keys = layer.operands.keys.sizes
    width, terms = columns(keys), len(pieces(keys, PLANES))
    assert counts["absorb_packed_kernel", "a", "writes"] == written * 2 * width
    assert counts["attend_packed_kernel", "a", "reads"] == read * 2 * width
    assert counts["absorb_packed_kernel", "terms", "writes"] == written * 4 * (terms + 2)
    factors = sum(n > 0 for n in case.lens) * case.Hkv * case.M  # a sequence's tiles are one program's
    assert counts["attend_packed_kernel", "terms", "reads"] == read * 4 * (terms + 1) + factors * 4


def check_write(case):
    layer = make_layer(case, case.dtype)
    k_cache, v_cache = lrattn.allocate_cache(layer, 4, case.P)
    g = torch.Generator().manual_seed(0)
    zk = torch.randn(40, layer.row_width, generator=g).to(case.dtype)
    zv = None if case.shared else torch.randn(40, layer.v_width, generator=g).to(case.dtype)
    slots = torch.randperm(4 * case.P, generator=g)[:40]
    slots[3], slots[20], slots[39] = -1, 4 * case.P, 10_000
    with counting() as seen:
        lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots, backend="triton")
    kept = ((slots >= 0) & (slots < 4 * case.P)).numpy()
    written = np.zeros(4 * case.P, int)
    written[slots[kept]] = 1
    for cache, z in ((k_cache, zk), (v_cache, zv)):
        if cache is not None:
            times = np.broadcast_to(written.reshape(4, case.P, 1), cache.shape)
            np.testing.assert_array_equal(seen.writes(cache), times)
            assert not seen.reads(cache).any() and (seen.reads(z) == kept[:, None]).all()


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, name="riding row", **RIDING)], ids=str)
def test_a_live_slot_is_written_once_and_nothing_else(case):
    check_write(case)


SHORT = {
    "splits": way("splits", 2, lens=(150,), call={"num_splits": 2}, **ONE | {"M": 1}),
    "page": way("page", 2, lens=(70,), P=48, **ONE | {"M": 1}),
    "starts": way("starts", 2, lens=(70,), starts=(20,), **ONE | {"M": 1}),
    "empty split": way("empty split", 2, lens=(40,), call={"num_splits": 2}, **ONE | {"M": 1}),
    "one pass": way("one pass", 0, rope=None, lens=(70,), starts=(20,), shared=True, **ONE),
    "one pass, rebuilt": way("one pass, rebuilt", 1, lens=(70,), P=48, **EACH),
    "rebuild": way("rebuild", 2, 2, rebuilds=True, lens=(70,), **ONE),
    "by tiles": way("by tiles", 1, rope=None, lens=(96,), starts=(40,), **ONE | BOTH),
    "by tiles, empty": way("by tiles, empty", 1, chunk=64, lens=(0, 20), offsets=(-30, 37), **ONE | BOTH),
}
LIVE = "live = (t >= begin) & (t < t_end)"

# Most of these leave the results as they are.
MUTANTS = [
    Mutant("tiles.py", "tl.minimum(origin + held * (i + 1) // n * BLOCK_T, end)",
           "tl.minimum(origin + held * (i + 1) // n * BLOCK_T + 1, end)", "splits"),
    Mutant("values.py", LIVE, "live = t < t_end", "starts"),
    Mutant("values.py", "        acc = add_weighted(",
           "        load_tile(cv, cv_stride, page, t0, columns, TOKEN, P, BLOCK_T, WARPS, live)\n"
           "        acc = add_weighted(", "splits"),
    Mutant("tiles.py", "tl.load(pages + t // P, mask=live, other=0)",
           "tl.load(pages + t // P, mask=live | (t % P == P - 1), other=0)", "rebuild"),
    Mutant("values.py", 'tl.store(p_lse, tl.full([BLOCK_Q], float("-inf")', "tl.store(p_lse, tl.full([BLOCK_Q], -1e30",
           "empty split"),
    Mutant("rows.py", "(t >= begin) & (t < t_end))", "t < t_end)", "one pass"),
    Mutant("attend.py", "            v = z\n",
           "            v = load_tile(ck, ck_stride, here, t0, value_columns, KEY_TOKEN, P, BLOCK_T, WARPS, live)\n",
           "one pass"),
    Mutant("attend_rebuilt.py", LIVE, "live = (t >= begin) & (t < tl.cdiv(t_end, P) * P)", "one pass, rebuilt"),
    Mutant("rows.py", "ROW[i][FIRST] + tl.arange(0, ROW[i][SIZE])\n        found",
           "ROW[i][FIRST] // 2 + tl.arange(0, ROW[i][SIZE])\n        found", "one pass"),
    Mutant("attend_packed.py", "tl.minimum(at // P, last_page)", "at // P", "by tiles"),
    Mutant("attend_packed.py", "(t_end - 1) // P", "t_end // P", "by tiles"),
    Mutant("attend_packed.py", "k = tl.maximum(k, first_page)", "k = k", "by tiles"),
    Mutant("attend_packed.py", "begin // P, (", "begin // P - 1, (", "by tiles"),
    Mutant("attend_packed.py", "at = tl.maximum(t, 0)", "at = t", "by tiles, empty"),
    Mutant("attend_packed.py", "t_begin >= t_end or t_end <= begin", "t_begin >= t_end", "by tiles, empty"),
    Mutant("write.py", "(slot >= 0) & (slot < num_slots)", "(slot >= -1) & (slot < num_slots)", "write"),
]  # fmt: skip
SEEN = "Arrays are not equal|of no argument|before it was written|not yet written|read more often|read less often"


@pytest.mark.every(3)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_seen(mutant, swap):
    swap(mutant)
    with pytest.raises((AssertionError, InterpreterError), match=SEEN):
        check_write(PLAIN) if mutant.killer == "write" else check(SHORT[mutant.killer])


def test_without_a_fault_nothing_is_seen(swap):
    swap(None)
    for way in SHORT.values():
        check(way)


RESULTS = json.loads(traffic.PATH.read_text())


def test_the_committed_traffic_is_of_these_sources_and_ways():
    assert RESULTS["sources"] == traffic.sources_hash(), "the kernels changed: run make traffic"
    found = [(row["shape"], row["way"], row["passes"], row["ranks"]) for row in RESULTS["rows"]]
    assert found == [(w.shape.name, w.name, w.passes, [w.key_rank, max(w.value_ranks)]) for w in traffic.WAYS]


def test_every_way_moves_fewer_bytes_than_a_dense_cache_holds():
    """Partial results apart: a fixed number of splits, which a short sequence has too few tiles to outweigh."""
    for row in RESULTS["rows"]:
        moved = traffic.shares(row, "unique")
        assert moved["latents"] <= 1.02 * (row["passes"] if row["shared"] else 1), row  # a shared row once a pass
        assert moved["all"] - moved["partial"] < row["dense_bytes"] / row["latent_bytes"], row
        bits = 4 if "packed" in row["way"] else 16  # of a latent: partial results are as large whatever they are
        assert moved["partial"] < 1.1 * 16 / bits, row
