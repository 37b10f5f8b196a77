"""The ways of a decode call: which one is taken, and that a row's bits do not depend on what it shares a call with."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import FAR, Case, make, make_layer
from checks import attend, check, on

import lrattn
from bench.decode.ways import two_passes
from lrattn.kernels import attend_packed, launch, plan

H100 = "sm90"


def paired(name, **changes):
    """Two groups of two heads, ragged; keys and values order the heads of a group each in its own way."""
    shape = {"M": 2, "key_ranks": (80, 112), "value_ranks": (128, 16), "lens": (130, 0, 3, 64),
             "key_order": (2, 0, 3, 1), "value_order": (0, 2, 1, 3)}  # fmt: skip
    return Case(name, **{**shape, **changes})


JOINT = {"shared": True, "value_ranks": (80, 112), "value_order": (2, 0, 3, 1)}
RIDING = {"shared": True, "value_ranks": (96, 128), "value_order": (2, 0, 3, 1)}
ALONE = {"key_ranks": (32, 96, 48, 16), "value_ranks": (64, 16, 128, 48), "value_order": (2, 0, 3, 1)}
EVERYTHING = {"sinks": True, "starts": (70, 0, 1, 3), "S": 3, "call": {"softcap": 4.0, "window_size": 50}}
ABSORBED = [
    paired("absorbed", rope=None),
    paired("absorbed, offset", rope=None, offset=True, strided=True),
    paired("absorbed, everything", rope=None, P=48, **EVERYTHING),
    paired("absorbed, joint row", rope=None, **JOINT),
    paired("absorbed, riding row", rope=None, call={"num_splits": 3, "project": "latent"}, **RIDING),
    paired("absorbed, piecemeal", rope=None, lens=(200, 70), call={"workspace_limit": 1, "num_splits": 2}),
    paired("absorbed, not causal", rope=None, S=2, call={"causal": False, "project": "hidden"}),
]
PLACES = {"lens": (280, 0, 3, 130), "offsets": (37, 0, -1, -700)}
CHUNKED = [
    paired("chunks", chunk=64),
    paired("chunks, everything", chunk=64, offset=True, offsets=(-1, -90, -64, FAR), **EVERYTHING | {"S": 5}),
    paired("chunks, joint row, whole pages", chunk=128, P=64, offset=True, strided=True, **JOINT, **PLACES),
    paired("chunks, riding row, partial", chunk=64, rope={"partial_rotary_factor": 0.5, "interleaved": True}, **RIDING,
           **PLACES, call={"num_splits": 3, "project": "latent"}),
    paired("chunks, piecemeal", chunk=192, lens=(150, 70, 1), offsets=(60, -170, 0), offset=True,
           call={"workspace_limit": 1, "num_splits": 2}),
    paired("chunks, not causal", chunk=64, D=80, S=70, M=1, lens=(150, 71), call={"causal": False}),
]  # fmt: skip
MANY_SPLITS = paired("many splits", S=2, sinks=True, value_ranks=(96, 16), call={"num_splits": 9})
REBUILT = [
    paired("rebuilt, one head a group", strided=True, **ALONE),
    paired("rebuilt, interleaved", D=80, rope={"interleaved": True}, **ALONE),
    paired("rebuilt, offset", offset=True, **ALONE),
    paired("rebuilt, partial", rope={"partial_rotary_factor": 0.25}, positions=True, **ALONE),
    paired("rebuilt, everything", P=48, **ALONE, **EVERYTHING),
    paired("rebuilt, joint row", S=5, **JOINT),
    paired("rebuilt, joint row, wider head", D=128, S=5, strided=True, **JOINT),
    paired("rebuilt, riding row", S=5, call={"num_splits": 3, "project": "latent"}, **RIDING),
    paired("rebuilt, piecemeal", lens=(200, 70), call={"workspace_limit": 1, "num_splits": 2}, **ALONE),
]
HALF_ONLY = [  # what fits 16-bit numbers alone
    paired("absorbed, wide", rope=None, key_ranks=(160, 240), value_ranks=(256, 144)),
    paired("absorbed, wide joint row", rope=None, shared=True, key_ranks=(400, 512), value_ranks=(400, 512),
           value_order=(2, 0, 3, 1), lens=(70, 3)),
    paired("absorbed, 32 rows", rope=None, M=8, S=2, lens=(70, 2)),
    paired("absorbed, 64 rows", rope=None, M=8, S=4, lens=(70, 3)),
    paired("absorbed, two blocks of rows", rope=None, M=8, S=5, lens=(70, 3)),
    paired("chunks, wide joint row", chunk=64, shared=True, key_ranks=(400, 512), value_ranks=(400, 512),
           value_order=(2, 0, 3, 1), lens=(150, 3), offset=True, offsets=(-50, 1)),
    paired("chunks, 64 rows", chunk=64, M=8, S=4, lens=(100, 3)),
    paired("rebuilt, wide joint row", D=128, S=5, shared=True, key_ranks=(160, 256), value_ranks=(160, 256),
           value_order=(2, 0, 3, 1), lens=(130, 3)),
    paired("rebuilt, wide", **ALONE | {"key_ranks": (160, 32, 240, 16), "value_ranks": (256, 32, 48, 16)}),
    paired("rebuilt, 32 rows", M=8, S=4, lens=(70, 3), **ALONE),
]  # fmt: skip
NOT_FUSED = [
    paired("joint values", value_ranks=(96,), value_order=None),
    paired("two heads a group", S=5),
    paired("other groups", rope=None, value_order=(0, 1, 2, 3)),
    paired("finer groups of values", rope=None, value_ranks=(16, 32, 48, 64)),
    paired("chunks, other groups", chunk=64, value_order=(0, 1, 2, 3), offset=True, P=64, **PLACES),
    paired("chunks, joint values", chunk=128, key_ranks=(336, 272), value_ranks=(96,), value_order=None, S=20, M=1,
           lens=(150, 30), offsets=(-100, 60), call={"window_size": 80, "workspace_limit": 1, "num_splits": 2}),
    paired("two heads a group, positions", positions=True),
]  # fmt: skip


BANDED = {"joint values"}  # but these


def taken(case, dtype, device=H100):
    """The launch of the one pass that a case takes, or None. No case here goes by a band."""
    keys, values = make_layer(case, dtype).operands
    placed = case.positions or case.offsets is not None
    size = plan.cut(
        1, case.S, case.M * case.Hkv, dtype, device, 4, keys.sizes, values.sizes, placed, 300, 0, 0, 1 << 28
    )
    assert size.banded is None or case.name in BANDED
    return size.fused


def skip_unless_taken(case, dtype, device):
    """On an H100, and so in the interpreter, each of these is one pass; another device may have no row for it."""
    assert taken(case, dtype)
    if not taken(case, dtype, launch.name(device)):
        pytest.skip("two passes on this device")


@pytest.mark.every(6)
@pytest.mark.parametrize("case", ABSORBED + REBUILT + CHUNKED, ids=str)
def test_one_pass(case, kernel_dtype, device):
    skip_unless_taken(case, kernel_dtype, device)
    check(case, kernel_dtype, device)


@pytest.mark.every(3)
@pytest.mark.parametrize("case", HALF_ONLY, ids=str)
def test_one_pass_in_16_bits(case, device):
    skip_unless_taken(case, torch.float16, device)
    check(case, torch.float16, device)


@pytest.mark.every(3)
@pytest.mark.parametrize("form", [{"call": {"num_splits": 20}}, {"rope": None}, {"chunk": 64}], ids=str)
def test_many_splits_are_merged_first(form, kernel_dtype, device):
    check(replace(MANY_SPLITS, **form), kernel_dtype, device)


@pytest.mark.every(3)
@pytest.mark.parametrize("case", NOT_FUSED, ids=str)
def test_what_takes_two(case, device):
    assert not taken(case, torch.float16)
    check(case, torch.float16, device)


@pytest.mark.every(3)
@pytest.mark.parametrize("case", [ABSORBED[0], ABSORBED[3], REBUILT[0], REBUILT[5], *CHUNKED[1:5]], ids=str)
def test_two_passes_can_stand_in(case, device):
    with two_passes():
        assert not taken(case, torch.float16)
        check(case, torch.float16, device)
    assert taken(case, torch.float16)


@pytest.mark.every(5)
@pytest.mark.parametrize(
    "case",
    [ABSORBED[2], ABSORBED[3], REBUILT[4], REBUILT[5], REBUILT[8], *CHUNKED[1:5:3], MANY_SPLITS, *NOT_FUSED[:3]],
    ids=str,
)
def test_bits_do_not_depend_on_the_batch(case, device):
    """With a fixed number of splits: alone, in another place, beside longer rows under a wider table; and again.

    The interpreter multiplies with NumPy, where a row's rounding depends on its place: latents come without a product.
    """
    project = "latent" if device.type == "cpu" else case.call.get("project", "heads")
    call = {"num_splits": 3} | case.call | {"project": project}
    offsets = case.offsets and case.offsets[:3]
    case = replace(case, lens=(130, 40, 150), starts=case.starts and (70, 0, 1), offsets=offsets, call=call)
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float16))
    whole = attend((layer, q, k_cache, v_cache, kwargs))
    per_row = ("block_table", "seq_lens", "seq_starts", "offsets")
    for rows in ([1], [2, 1, 0], *([[0, 1, 2]] * (device.type == "cuda"))):
        some = {n: x[rows] if n in per_row and x is not None else x for n, x in kwargs.items()}
        width = -(-max(case.lens[b] for b in rows) // case.P)
        some["block_table"] = some["block_table"][:, :width]
        got = attend((layer, q[rows], k_cache, v_cache, some))
        assert torch.equal(got[0], whole[0][rows]) and torch.equal(got[1], whole[1][rows])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 1 << 16, 256 << 20])
@pytest.mark.parametrize("chunk", [None, 64])
def test_bits_do_not_depend_on_whether_a_table_goes_piecemeal(chunk, limit, device):
    """With sinks too: they join what was merged."""
    call = {"num_splits": 3, "project": "latent"}
    case = paired("piecemeal or not", S=2, sinks=True, lens=(130, 60), chunk=chunk, call=call)
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float16))
    wider = torch.nn.functional.pad(kwargs["block_table"], (0, 40), value=2_000_000_000)
    whole = attend((layer, q, k_cache, v_cache, kwargs), workspace_limit=limit)
    again = attend((layer, q, k_cache, v_cache, kwargs | {"block_table": wider}), workspace_limit=limit)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])


@cache
def operands_of(form, heads, query_heads, values):
    """Of a Llama-3.1-8B layer, or one of other heads."""
    case = Case("size", Hkv=heads, M=query_heads // heads, D=128, key_ranks=(256, 256), value_ranks=values, offset=True)
    return make_layer(replace(case, **WAYS[form]), torch.float16).operands


NO_BAND = {"theta": 100.0}  # too fast
BAND = {"rope": {"theta": 5e6}, "offset": False}
WAYS = {"two passes": {"rope": NO_BAND}, "band": BAND, "one pass": {"rope": None}, "chunks": {"chunk": 512}}


def size_of(batch, bound, form, heads=8, query_heads=32, values=(256, 256), placed=False, **call):
    """How a call is cut on an H100."""
    keys, values = operands_of(form, heads, query_heads, values)
    wanted = {"num_splits": 0, "limit": 256 << 20, **call}
    size = plan.cut(batch, 1, query_heads, torch.float16, H100, 132, keys.sizes, values.sizes, placed, bound, 0,
                    wanted["num_splits"], wanted["limit"])  # fmt: skip
    return size, keys.sizes, values.sizes


@pytest.mark.parametrize("form", WAYS)
@pytest.mark.parametrize("bound", [4096, 32_768, 131_072])
def test_a_single_sequence_fills_the_device_twice(bound, form):
    """As far as tiles divide; by a band of eight warps, of which one program fits on a multiprocessor, once."""
    size, keys, values = size_of(1, bound, form)
    assert bool(size.fused) == (form != "two passes") and bool(size.banded) == (form == "band")
    fill = 128 if size.banded else 2 * 128
    assert size.splits * values.groups >= min(fill, size.total * values.groups)
    assert size.fused or size.parts * keys.num_heads >= min(fill, size.total * keys.num_heads)
    assert max(size.splits, size.parts) <= size.total


@pytest.mark.parametrize("form", WAYS)
def test_a_large_batch_is_cut_for_balance_within_the_workspace(form):
    size, _, _ = size_of(64, 131_072, form)
    assert 1 < size.splits <= size.total and size.nbytes <= 256 << 20
    assert size_of(256, 1024, form)[0].splits == 1
    small, _, _ = size_of(64, 131_072, form, limit=16 << 20)
    assert small.splits * small.batch <= size.splits * size.batch and small.nbytes <= 16 << 20


@pytest.mark.parametrize("form", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_keeps_within_any_limit_that_holds_a_tile(batch, form):
    """Splits may not take the room of the one tile that they are splits of."""
    least = size_of(batch, 131_072, form, limit=1)[0].nbytes  # one tile and one split of one sequence
    for limit in range(least, 6 * least, max(1, least // 150)):
        assert size_of(batch, 131_072, form, limit=limit)[0].nbytes <= limit


@pytest.mark.parametrize("form", WAYS)
def test_what_is_allocated_is_within_what_was_said(form):
    """Blocks that are begun and not filled, too; of a band's kernels floats by lane."""
    for bound in (1, 64, 65, 130, 300, 1000, 30_000):
        for limit in (1, 1 << 16, 1 << 20, 4 << 20, 256 << 20):
            for heads, splits in ((32, 0), (32, 1), (8, 1), (8, 3)):
                size, _, _ = size_of(1, bound, form, query_heads=heads, num_splits=splits, limit=limit)
                lanes = size.banded is not None and size.banded.by_lane
                sizes = (4 if lanes else 2, 2, *[4] * (len(size.shapes) - 2))
                held = sum(n * math.prod(shape) for n, shape in zip(sizes, size.shapes) if shape is not None)
                assert held <= size.nbytes, (bound, limit, heads, splits)


@pytest.mark.parametrize("values", [(16,), (64,), (256,), (320, 16), (48, 112)], ids=str)
@pytest.mark.parametrize("rank", [16, 128, 176, 256])
def test_tiles_of_scores_by_a_band_are_whole_ones_of_the_values(rank, values):
    """What one pass writes the other reads; packed values have tiles as long."""
    for device in (H100, "sm100", "sm80", "gfx9"):
        for dtype in (torch.float16, torch.float32):
            case = Case("tiles", Hkv=4, D=128, key_ranks=(rank, rank), value_ranks=values)
            keys, values_of = (side.sizes for side in make_layer(case, dtype).operands)
            size = plan.cut(1, 1, 4, dtype, device, 132, keys, values_of, False, 1000, 0, 0, 1 << 28)
            assert size.block_t % launch.BLOCK_T == 0
            packed = values_of._replace(paired=0, packed=(8, max(values)))
            size = plan.cut(1, 1, 4, dtype, device, 132, keys, packed, False, 1000, 0, 0, 1 << 28)
            assert size.planes.values.block_t == size.block_t


def chunks_met(first, tiles, chunk):
    """Chunks that `tiles` tiles from position `first` on are in."""
    return len({max(first + 64 * i, 0) // chunk for i in range(tiles)})


@pytest.mark.parametrize("chunk", [64, 192, 512])
@pytest.mark.parametrize("limit", [1, 1 << 20, 4 << 20, 256 << 20])
def test_there_is_room_for_every_chunk_that_tiles_can_be_in(chunk, limit, monkeypatch):
    """And the workspace counts it."""
    monkeypatch.setitem(WAYS, chunk, {"chunk": chunk})
    for bound in (1, 64, 65, 100, 1000, 30_000):
        for placed in (False, True):
            size, keys, values = size_of(1, bound, chunk, placed=placed, limit=limit)
            assert 64 * size.total >= bound + 63 * placed > 64 * (size.total - 1)
            most = max(chunks_met(first, size.tiles, chunk) for first in range(-64, 2 * chunk, 64))
            assert size.shapes.a[1] == most
            held = 32 * keys.rank * 2 * most + (size.splits + 1) * 32 * (values.rank + 1) * 4
            assert held <= size.nbytes


def test_a_layer_remembers_what_it_checked(monkeypatch):
    """A second call of a kind is not checked again; a call of another kind is."""
    layer, q, k_cache, v_cache, kwargs = make(Case("again", lens=(20,)), torch.float32)
    z = torch.zeros(1, layer.row_width), torch.zeros(1, layer.values.width)
    none = torch.tensor([-1])  # a slot that is skipped

    def write(zk=z[0], slots=none):
        lrattn.write_latents(layer, zk, z[1], k_cache, v_cache, slots)

    write()
    expected = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    monkeypatch.setattr("lrattn.attention.ops.check_caches", lambda *a, **k: pytest.fail("checked again"))
    write()
    again = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    assert torch.equal(again, expected)
    monkeypatch.undo()
    for wrong in (q[..., :-1], q.double(), q[:, :, :3], q.expand(2, -1, -1, -1)):
        with pytest.raises(ValueError, match="q: expected"):
            lrattn.decode_attention(wrong, k_cache, v_cache, layer, **kwargs)
    for wrong in (z[0][:, :-1], z[0].double(), z[0].expand(2, -1)):
        with pytest.raises(ValueError, match=r"(zk|zv|slot_mapping): expected"):
            write(wrong)
    with pytest.raises(ValueError, match="slot_mapping: expected"):
        write(slots=none.float())
    with pytest.raises(ValueError, match="num_splits: expected"):
        lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs, num_splits=-1)


def test_steps_of_other_lengths_are_compiled_for_nothing_new():
    """What is kept of a launch does not follow what changes from step to step, and does not grow with it."""
    packed = {"key_bits": (8, 4), "value_bits": (8, 4), "key_ranks": (64,), "value_ranks": (64,), "Hkv": 2}
    kept = launch.constants, attend_packed._constants
    for case in (paired("chunks", chunk=64), paired("rebuilt"), Case("packed", chunk=128, lens=(130,), **packed)):
        layer, q, k_cache, v_cache, kwargs = make(case, torch.float16)
        held = []
        for bound in (1, 64, 65, 130):
            lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs, max_seq_len=bound, backend="triton")
            held.append([known.cache_info().misses for known in kept])
        assert held[0] == held[-1], case.name


def test_packed_rows_that_begin_elsewhere_are_another_kind_of_call():
    """Of the same shape and strides, at no multiple of 16 bytes."""
    layer, q, k_cache, v_cache, kwargs = make(Case("again", lens=(20,), key_bits=(8,)), torch.float32)
    held = torch.zeros(k_cache.numel() + 4, dtype=torch.uint8)

    def at(offset):
        return held[offset : offset + k_cache.numel()].view(k_cache.shape)

    lrattn.decode_attention(q, at(0), v_cache, layer, **kwargs)
    with pytest.raises(ValueError, match="k_cache: expected pages at multiples of 16 bytes"):
        lrattn.decode_attention(q, at(1), v_cache, layer, **kwargs)
