"""What the kernels read and write, element by element: every live latent as often as meant, nothing else at all.

Counted in Triton's interpreter (compiled/counting.py). The numbers below are lanes that ask. Where several programs ask
for the same latent, heads of a group or blocks of 64 query rows, a GPU can serve all but the first from L2.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import mutants
import numpy as np
import pytest
import torch
from cases import Case, make, make_layer, reach
from checks import attend
from mutants import Mutant
from slowly import slow_unless
from triton.runtime.errors import InterpreterError

import lrattn
from bench.compiled import traffic
from bench.compiled.counting import SECTOR, counting

swap = mutants.swap

PLAIN = Case("rebuilt", M=2, D=128, key_ranks=(128, 160), value_ranks=(160, 128), lens=(100, 64, 1, 0),
             key_order=(2, 0, 3, 1), dtype=torch.float16, strided=True)  # fmt: skip


class Way(NamedTuple):
    """A way to run a call: how often it reads each live latent of the keys and of the values.

    In a shared row key columns are read for the keys and for the values. A way that reads them once for both reads
    keys 0 times.
    """

    case: Case
    keys: int
    values: int = 1

    def __str__(self):
        return self.case.name


def way(name, keys, values=1, **changes):
    return Way(replace(PLAIN, name=name, **changes), keys, values)


ONE = {"Hkv": 2, "key_ranks": (128,), "value_ranks": (160,), "key_order": None}  # group of two heads
JOINT = {"shared": True, "value_ranks": (128, 160), "value_order": PLAIN.key_order}
RIDING = {"shared": True, "value_ranks": (192, 160), "value_order": PLAIN.key_order}
MANY = {"S": 40, "lens": (70, 0), **ONE}  # 80 rows a head, 160 a group: 2 and 3 blocks of 64
CHUNKS = {"lens": (150, 0), "call": {"num_splits": 2, "workspace_limit": 1}, **ONE}
WAYS = [
    # Rebuilt keys: a head is a program, so the 2 heads of a group each read its latents.
    way("rebuilt", 2),
    way("rebuilt, positions", 2, positions=True),
    way("rebuilt, offset", 2, offset=True),
    way("rebuilt, one head a group", 1, key_ranks=(128, 160, 128, 144), value_ranks=(128,) * 4),
    way("rebuilt, many queries", 2 * 2, 3, **MANY),
    way("rebuilt, streamed rank", 4, key_ranks=(336,), lens=(70, 0)),
    way("rebuilt, wide head", 2 * 2, **ONE | {"D": 256, "lens": (70, 0)}),  # 128 dimensions at a time
    # Absorbed keys: a group is a program.
    way("absorbed", 1, rope=None),
    way("absorbed, offset", 1, offset=True, rope=None),
    way("absorbed, many queries", 3, 3, rope=None, **MANY),
    way("absorbed, streamed rank", 1, rope=None, key_ranks=(336,), lens=(70, 0)),
    # Values: a tile of columns is a program, so each latent is read once however wide they are.
    way("joint values", 2, value_ranks=(528,), lens=(70, 0)),
    # Shared rows, read for the keys and for the values.
    way("joint row, wider head", 2 * 2, **JOINT | {"D": 256, "lens": (70, 0)}),
    way("riding row, offset", 2, offset=True, **RIDING),
    # One pass: a row that serves both is read once; where a head is a program, once by each of its group.
    way("one pass, absorbed", 1, rope=None, value_order=PLAIN.key_order),
    way("one pass, absorbed, joint row", 0, rope=None, **JOINT),
    way("one pass, absorbed, riding row", 0, rope=None, **RIDING),
    way("one pass, rebuilt, one head a group", 1, key_ranks=(128, 96, 128, 80), value_ranks=(128, 96, 64, 128),
        value_order=PLAIN.key_order),
    way("one pass, rebuilt, joint row", 0, 2, shared=True, key_ranks=(128, 96), value_ranks=(128, 96),
        value_order=PLAIN.key_order),
    way("one pass, rebuilt, positions", 0, 2, D=64, positions=True, shared=True, key_ranks=(128, 96),
        value_ranks=(128, 96), value_order=PLAIN.key_order),
    way("one pass, window, starts, queries", 0, rope=None, S=3, starts=(90, 0, 0, 0),
        call={"window_size": 40, "project": "latent", "num_splits": 3}, **JOINT),
    # Packed rows: bytes of codes are read as latents are, and a scale with every tile of its segment.
    way("packed", 2, strided=False, key_bits=(8, 4, 2), value_bits=(4, 2)),
    way("packed, streamed rank", 2 * 2, key_ranks=(336,), value_ranks=(96, 112), strided=False, key_bits=(16, 8, 2),
        value_bits=(8,), lens=(70, 0)),
    way("packed, absorbed", 1, rope=None, strided=False, key_bits=(8, 2), value_bits=(4,), dtype=torch.float32),
    way("packed, riding row", 2, strided=False, key_bits=(8, 4, 2), **RIDING),
    way("packed, one pass, rebuilt, joint row", 0, 2, D=64, shared=True, key_ranks=(128, 96), value_ranks=(128, 96),
        value_order=PLAIN.key_order, strided=False, key_bits=(8, 4, 2), dtype=torch.float16),
    way("packed, one pass, absorbed", 1, rope=None, value_order=PLAIN.key_order, key_ranks=(96, 128),
        value_ranks=(112, 128), strided=False, key_bits=(4, 2), value_bits=(8, 4), dtype=torch.float16),
    way("packed, one pass, absorbed, riding row", 0, rope=None, strided=False, key_bits=(8, 2), dtype=torch.float16,
        **RIDING),
    # Parts of the tokens, in space and in time.
    way("window", 2, **ONE | {"lens": (150, 40), "call": {"window_size": 70}}),
    way("starts", 2, **ONE | {"lens": (150, 64, 1, 0), "starts": (70, 1, 1, 0)}),
    way("window, starts, queries", 2, S=3, lens=(150, 64), starts=(90, 0), **ONE,
        call={"window_size": 40, "project": "latent"}),
    way("big pages", 2, P=48),
    way("splits", 2, lens=(200, 64, 0), call={"num_splits": 3, "project": "hidden"}, **ONE),
    way("many splits", 2, lens=(200, 64, 0), call={"num_splits": 40}, **ONE),
    way("chunks", 2, **CHUNKS),
    way("chunks, absorbed", 1, rope=None, **CHUNKS),
    way("bounded", 2, call={"max_seq_len": 70}, **ONE),
    way("empty", 2, lens=(0, 0)),
]  # fmt: skip


def run(way):
    """The counted call of a way, with its tensors."""
    layer, q, k_cache, v_cache, kwargs = make(way.case, way.case.dtype)
    with counting() as seen:
        out, lse = attend((layer, q, k_cache, v_cache, kwargs))
    tensors = {"layer": layer, "q": q, "k_cache": k_cache, "v_cache": v_cache, "kwargs": kwargs}
    return SimpleNamespace(way=way, case=way.case, seen=seen, out=out, lse=lse, **tensors)


# What they say of a way, a quick one says of another that differs in one thing.
LONG = {"absorbed, many queries", "absorbed, offset", "joint row, wider head", "packed, absorbed",
        "packed, riding row", "packed, one pass, rebuilt, joint row", "packed, one pass, absorbed, riding row",
        "many splits", "chunks", "rebuilt, positions", "one pass, absorbed, joint row",
        "one pass, rebuilt, one head a group"}  # fmt: skip


@pytest.fixture(scope="module", params=slow_unless(lambda way: way.case.name not in LONG, WAYS), ids=str)
def call(request):
    if request.config.getoption("--gpu"):
        pytest.skip("accesses are counted in the interpreter")
    return run(request.param)


def live_slots(call):
    """Slots [N, P] that some query sees, entries [B, pages] of the table that lead there."""
    table = call.kwargs["block_table"]
    slots, entries = np.zeros(call.k_cache.shape[:2], bool), np.zeros(table.shape, bool)
    for b in range(len(table)):
        t = np.arange(*reach(call.case, b))
        slots[table[b].numpy()[t // call.case.P], t % call.case.P] = True
        entries[b, t // call.case.P] = True
    return slots, entries


def columns(call):
    """How often the columns of a live key row and of a live value row are read. Of packed rows those of their codes."""
    layer, way = call.layer, call.way
    if layer.packed:
        keys = packed_columns(layer.row_side, way.keys, layer.keys.ranks, layer.k_width)
        if layer.shared:
            return keys + packed_columns(layer.values, way.values, layer.values.ranks, layer.k_width), None
        return keys, packed_columns(layer.values, way.values, layer.values.ranks, layer.v_width)
    keys, values = np.zeros(layer.k_width, int), np.zeros(layer.v_width, int)
    if layer.shared:
        at = np.cumsum((0, *layer.values.ranks))
        for g, rank in enumerate(layer.keys.ranks):
            keys[at[g] : at[g] + rank] = way.keys
        keys += way.values
    else:
        keys[:] = way.keys
        values[:] = way.values
    return keys, values


def packed_columns(side, times, ranks, width):
    """Bytes of codes of each group's first latents, `ranks` of them, read so many times."""
    reads, begin = np.zeros(width, int), 0
    for own, rank in zip(side.formats, ranks):
        at, left = begin, rank
        for held, bits in own.segments:
            some = min(held, max(left, 0)) * bits // 8
            reads[at : at + some] = times
            at, left = at + held * bits // 8, left - held
        begin += own.nbytes
    return reads


def scales(call):
    """Which columns of the caches are scales or lie in a word with some, and may be read more often."""
    found = []
    for cache, side in ((call.k_cache, call.layer.row_side), (call.v_cache, call.layer.values)):
        if cache is not None:
            mask, begin = np.zeros(cache.shape[2], bool), 0
            for own in side.formats:
                mask[begin + own.scales : begin + own.nbytes] = True
                begin += own.nbytes
            found.append(mask)
    return found


def caches(call):
    """Each cache with how often its columns are read where a slot is live."""
    pairs = zip((call.k_cache, call.v_cache), columns(call))
    return [(cache, reads) for cache, reads in pairs if cache is not None]


def check_latents(call):
    slots, _ = live_slots(call)
    for (cache, reads), scale in zip(caches(call), scales(call)):
        got = call.seen.reads(cache)
        np.testing.assert_array_equal(got[..., ~scale], (slots[:, :, None] * reads)[..., ~scale])
        np.testing.assert_array_equal(got[..., scale] > 0, slots[:, :, None] & np.ones(scale.sum(), bool))


def test_a_live_latent_is_read_as_often_as_the_way_says_and_a_dead_one_never(call):
    check_latents(call)


def test_latents_fill_the_sectors_they_are_read_from(call):
    slots, _ = live_slots(call)
    for cache, _ in caches(call):
        least = int(slots.sum()) * cache.shape[2] * cache.itemsize
        ends = 2 * SECTOR * len(call.case.lens) * call.layer.packed  # a packed row may begin inside a sector
        assert SECTOR * call.seen.sectors(cache) <= 1.02 * least + ends


def check_table(call):
    slots, entries = live_slots(call)
    np.testing.assert_array_equal(call.seen.reads(call.kwargs["block_table"]) > 0, entries)
    if call.kwargs["positions"] is not None:
        np.testing.assert_array_equal(call.seen.reads(call.kwargs["positions"]) > 0, slots)


def test_no_entry_of_the_table_and_no_position_is_read_but_those_of_live_tokens(call):
    check_table(call)


def test_every_number_of_the_result_is_written_once(call):
    assert (call.seen.writes(call.out) == 1).all() and (call.seen.writes(call.lse) == 1).all()


def check_temporaries(call):
    assert not call.seen.early(), "read before it was written"


def test_temporaries_are_read_only_where_they_were_written(call):
    check_temporaries(call)


def test_what_is_given_is_not_written(call):
    given = (call.q, call.k_cache, call.v_cache, *call.kwargs.values(), call.layer.keys.up, call.layer.values.up)
    for x in given:
        assert not isinstance(x, torch.Tensor) or not call.seen.writes(x).any()


def check(way):
    """Everything that a fault in the kernels may change."""
    call = run(way)
    check_latents(call)
    check_table(call)
    check_temporaries(call)
    return call


WRITES = {"plain": PLAIN, "riding row": replace(PLAIN, **RIDING)}


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
    for cache in (k_cache, v_cache):
        if cache is not None:
            times = np.broadcast_to(written.reshape(4, case.P, 1), cache.shape)
            np.testing.assert_array_equal(seen.writes(cache), times)
            assert not seen.reads(cache).any()
    for z in (zk, zv):
        assert z is None or (seen.reads(z) == kept[:, None]).all()


@pytest.mark.parametrize("name", WRITES)
def test_a_live_slot_is_written_once_and_nothing_else(name, request):
    if request.config.getoption("--gpu"):
        pytest.skip("accesses are counted in the interpreter")
    check_write(WRITES[name])


REBUILDS = [way("keys and values", 2, 2), way("offset", 2, 2, offset=True, positions=True),
            way("joint values", 2, 4, value_ranks=(528,), lens=(70, 0)),
            way("riding row", 2, 2, lens=(70, 0), **RIDING), way("no rope", 2, 2, rope=None, P=48, **ONE)]  # fmt: skip


@pytest.mark.parametrize("way", REBUILDS, ids=str)
def test_rebuild_reads_its_tokens_once_a_head_and_writes_each_row_once(way, request):
    if request.config.getoption("--gpu"):
        pytest.skip("accesses are counted in the interpreter")
    layer, _, k_cache, v_cache, kwargs = make(way.case, way.case.dtype)
    arguments = (k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"], kwargs["positions"])
    with counting() as seen:
        k, v = lrattn.rebuild(*arguments, backend="triton")
    check_latents(call := SimpleNamespace(way=way, case=way.case, seen=seen, layer=layer, k_cache=k_cache,
                                          v_cache=v_cache, kwargs=kwargs))  # fmt: skip
    check_table(call)
    assert (seen.writes(k) == 1).all() and (seen.writes(v) == 1).all() and not seen.early()


SHORT = {n: way(n, 2, **ONE | {"M": 1}, **changes)
         for n, changes in {
             "splits": {"lens": (150,), "call": {"num_splits": 2}},
             "page": {"lens": (70,), "P": 48},
             "starts": {"lens": (70,), "starts": (20,)},
             "empty split": {"lens": (40,), "call": {"num_splits": 2}},
         }.items()}  # fmt: skip

SHORT["one pass"] = way("one pass", 0, rope=None, lens=(70,), starts=(20,), shared=True, **ONE)
SHORT["one pass, rebuilt"] = way("one pass, rebuilt", 1, lens=(70,), P=48, key_ranks=(128,) * 4, value_ranks=(128,) * 4,
                                 key_order=None)  # fmt: skip

# Most of these leave the results as they are.
MUTANTS = [
    Mutant("tiles.py", "tl.minimum(origin + held * (i + 1) // n * BLOCK_T, end)",
           "tl.minimum(origin + held * (i + 1) // n * BLOCK_T + 1, end)", "splits"),
    Mutant("values.py", "live = (t >= begin) & (t < t_end)", "live = t < t_end", "starts"),
    Mutant("values.py", "        acc = tl.dot(",
           "        z = load_latents(cv + page * cv_strides[0] + offset * cv_strides[1], column, rank, live, r)\n"
           "        acc = tl.dot(", "splits"),
    Mutant("scores.py", "live = (t >= begin) & (t < t_end)", "live = (t >= begin) & (t < tl.cdiv(t_end, P) * P)",
           "page"),
    Mutant("tiles.py", "tl.load(pages + t // P, mask=live, other=0)",
           "tl.load(pages + t // P, mask=live | (t % P == P - 1), other=0)", "empty split"),
    Mutant("values.py", 'tl.store(p_lse, tl.full([BLOCK_Q], float("-inf")', "tl.store(p_lse, tl.full([BLOCK_Q], -1e30",
           "empty split"),
    Mutant("fused_absorbed.py", "live = (t >= begin) & (t < t_end)", "live = t < t_end", "one pass"),
    Mutant("fused_absorbed.py", "if cv is not None:\n            p_cv = cv", "if True:\n            p_cv = ck",
           "one pass"),
    Mutant("fused_rebuilt.py", "live = (t >= begin) & (t < t_end)", "live = (t >= begin) & (t < tl.cdiv(t_end, P) * P)",
           "one pass, rebuilt"),
    Mutant("pieces.py", "r += SIZES[n]\n    return z", "r += SIZES[n] // 2\n    return z", "one pass"),
]  # fmt: skip
SEEN = "Arrays are not equal|of no argument|read before it was written"


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_seen(mutant, swap):
    swap(mutant)
    with pytest.raises((AssertionError, InterpreterError), match=SEEN):
        check(SHORT[mutant.killer])


@pytest.mark.parametrize("name", SHORT)
def test_without_a_fault_nothing_is_seen(name, swap):
    swap(None)
    check(SHORT[name])


def test_a_fault_in_writing_is_seen(swap):
    swap(Mutant("write.py", "(slot >= 0) & (slot < num_slots)", "(slot >= -1) & (slot < num_slots)", "write"))
    with pytest.raises((AssertionError, InterpreterError), match=SEEN):
        check_write(PLAIN)


RESULTS = json.loads(traffic.PATH.read_text())


def test_the_committed_traffic_is_of_these_sources_and_ways():
    assert RESULTS["sources"] == traffic.sources_hash(), "the kernels changed: run make traffic"
    found = [(row["shape"], row["way"], row["passes"], row["ranks"]) for row in RESULTS["rows"]]
    assert found == [(w.shape.name, w.name, w.passes, [w.key_rank, max(w.value_ranks)]) for w in traffic.WAYS]


@pytest.mark.parametrize(
    "row", RESULTS["rows"], ids=lambda r: f"{r['shape']}, {r['way']}, {r['ranks']}, {r.get('passes')}"
)
def test_every_way_moves_fewer_bytes_than_a_dense_cache_holds(row):
    """Partial results apart: a fixed number of splits, which a short sequence has too few tiles to outweigh."""
    moved = traffic.shares(row, "unique")
    assert moved["latents"] <= 1.02 * (row["passes"] if row["shared"] else 1)  # a shared row once a pass
    assert moved["all"] - moved["partial"] < row["dense_bytes"] / row["latent_bytes"]
    bits = 4 if "packed" in row["way"] else 16  # of a latent: partial results are as large whatever they are
    assert moved["partial"] < 1.1 * 16 / bits
