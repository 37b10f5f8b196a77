"""The frozen records: keys and values to latents and back, shards, folds, and a file that is read whole or not at
all."""

import copy
import json
import pickle
import re
import struct
from dataclasses import replace

import pytest
import torch
from cases import CASES, PACKED, YARN, Case, make_layer
from oracle import dense_kv, group_of, rotate

import lrattn
from lrattn.factors import safefile
from lrattn.factors.layer import sides_of

BY_NAME = {case.name: case for case in CASES}
RICH = Case(
    "rich",
    M=2,
    key_ranks=(32, 16),
    value_ranks=(64,),
    key_order=(2, 1, 3, 0),
    offset=True,
    rope={"partial_rotary_factor": 0.5, "scaling": {"rope_type": "linear", "factor": 2.0, "unused": [1, 2]}},
)
ROPES = {
    "no rope": None,
    "halves": {},
    "interleaved": {"interleaved": True},
    "partial": {"partial_rotary_factor": 0.5},
    "partial, interleaved": {"partial_rotary_factor": 0.25, "interleaved": True},
    "yarn": YARN,
    "float32 angles": YARN | {"fp32_angles": True},
}
FORMS = ("apart", "ride", "joint")
HEADS, DIM = 4, 32


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads_for(layer, *lead, seed=0):
    """Keys and values, and where the keys were rotated to."""
    shape = (*lead, layer.num_kv_heads, layer.head_dim)
    g = torch.Generator().manual_seed(seed)
    positions = None if layer.rope is None else torch.randint(layer.rope.max_position, lead, generator=g)
    return random(*shape, seed=seed, dtype=layer.dtype), random(*shape, seed=seed + 1, dtype=layer.dtype), positions


def turned_back(layer, k, positions):
    """By the oracle: turned the other way, the factor taken out of what was turned; or to the place in a chunk."""
    if layer.rope is None:
        return k
    if layer.chunk is not None:
        return turned_by(k, -(positions // layer.chunk * layer.chunk), layer.rope)
    n, (_, factor) = layer.rope.rotary_dim, layer.rope.frequencies()
    back = rotate(k.flatten(0, -3), -positions.flatten(), layer.rope).view(k.shape)
    return torch.cat((back[..., :n] / factor**2, back[..., n:]), -1)


def turned_by(x, positions, rope):
    """x [.., Hkv, D] turned on by positions [..], without the attention factor."""
    plain = replace(rope, fp32_angles=False)
    n, (_, factor) = rope.rotary_dim, rope.frequencies()
    turned = rotate(x.double().flatten(0, -3), positions.flatten(), plain).view(x.shape)
    return torch.cat((turned[..., :n] / factor, turned[..., n:]), -1)


def written(layer, k, v, positions):
    """The latents that heads should become, as the record's fields are documented."""
    heads = []
    for side, x in ((layer.keys, turned_back(layer, k, positions)), (layer.values, v)):
        heads.append((x if side.offset is None else x - side.offset).flatten(-2))
    if layer.shared:
        return torch.cat(heads, -1) @ layer.values.down, None
    return heads[0] @ layer.keys.down, heads[1] @ layer.values.down


MAPPED = ["head order", "ragged ranks and batch", "offset", "riding row, head order", "no rope, offset", "interleaved"]


@pytest.mark.parametrize("name", [*MAPPED, "partial interleaved", "yarn"])
def test_what_is_written_and_read_back_is_the_documented_map(name):
    layer = make_layer(BY_NAME[name])
    k, v, positions = heads_for(layer, 2, 3)
    rows, values = layer.project(k, v, positions)
    torch.testing.assert_close((rows, values), written(layer, k, v, positions), rtol=0, atol=1e-11)
    back = layer.rebuild(rows, values, positions)
    for i in range(2):
        for t in range(3):
            row = None if values is None else values[i, t]
            expected = dense_kv(layer, rows[i, t], row, 0 if positions is None else int(positions[i, t]))
            torch.testing.assert_close((back[0][i, t], back[1][i, t]), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["riding row, head order", "joint row", "head order"])
def test_the_map_of_a_side_is_down_and_up_of_each_head(name):
    layer = make_layer(BY_NAME[name])
    for side in sides_of(layer.keys, layer.values):
        made = side.dense().unflatten(1, (layer.num_kv_heads, layer.head_dim))
        for h, (column, rank) in group_of(side).items():
            torch.testing.assert_close(made[:, h], side.down[:, column : column + rank] @ side.up[h, :rank])


def whole(form, rope=None, order=None, dtype=torch.float64, chunk=None):
    """A layer of two groups that loses nothing; in a ride values have what the key latent leaves of them."""
    g = torch.Generator().manual_seed(0)
    size, n, apart = 2 * DIM, HEADS * DIM, form == "apart"
    key_rank, value_rank = {"apart": (size, size), "ride": (size, 2 * size), "joint": (2 * size, 2 * size)}[form]
    key_up, value_up = (torch.zeros(HEADS, rank, DIM, dtype=torch.float64) for rank in (key_rank, value_rank))
    key_down, value_down = [], []

    def orthogonal(m):
        return torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]

    order = order or tuple(range(HEADS))
    for heads in (order[:2], order[2:]):
        q, p, m = orthogonal(size), orthogonal(size), torch.randn(size, size, generator=g, dtype=torch.float64) / 8
        if form == "joint":
            row = orthogonal(2 * size)
            keys, values = row[:size].T, row[size:].T
        else:  # latents [k q, (v - k m) p], m = 0 apart
            m = m * (form == "ride")
            row = torch.cat((torch.cat((q, -m @ p), 1), torch.cat((torch.zeros_like(q), p), 1)))
            keys, values = q.T, p.T if apart else torch.cat((q.T @ m, p.T))
        at = torch.cat([torch.arange(h * DIM, (h + 1) * DIM) for h in heads])
        placed = torch.zeros(2 * n, 2 * size, dtype=torch.float64)
        placed[torch.cat((at, n + at))] = row
        key_down.append(placed[:n, :size])
        value_down.append(placed[n:, size:] if apart else placed)
        for i, h in enumerate(heads):
            key_up[h], value_up[h] = (up[:, i * DIM : (i + 1) * DIM] for up in (keys, values))
    offsets = [random(HEADS, DIM, seed=i) * 2 for i in range(2)]
    down = torch.cat(key_down, 1) if apart else None
    sides = (
        lrattn.Projection(key_up, (key_rank,) * 2, down, offsets[0], order),
        lrattn.Projection(value_up, (value_rank,) * 2, torch.cat(value_down, 1), offsets[1], order),
    )
    made = None if rope is None else lrattn.Rope(**{"theta": 1e4, "dim": DIM, "max_position": 4096, **rope})
    return lrattn.LayerFactors(*sides, made, shared=not apart, chunk=None if made is None else chunk).to(dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float64, 32), (torch.float32, 12), (torch.bfloat16, 2), (torch.float16, 2)]
)
@pytest.mark.parametrize("order", [None, (3, 0, 2, 1)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rope", "chunk"), [*((rope, None) for rope in ROPES), ("partial", 64), ("yarn", 128)])
def test_at_full_rank_rounding_is_all_that_is_lost(rope, chunk, form, order, dtype, slack):
    """Of what is written, of latents and of what is rebuilt; and of sums, in float32 alone below float64."""
    layer = whole(form, ROPES[rope], order, dtype, chunk)
    k, v, positions = heads_for(layer, 25, 2)
    rows = layer.project(k, v, positions)
    assert all(z is None or z.dtype == dtype for z in rows)
    for got, expected in zip(layer.rebuild(*rows, positions), (k, v), strict=True):
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert got.dtype == dtype and error < slack * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rope", ["halves", "interleaved", "partial", "yarn"])
def test_latents_of_chunks_are_the_same_a_chunk_later(rope, form):
    """A key at place t of any chunk is stored as it would be at position t; what is before position 0 is of the first
    chunk, and so is read back as it was written."""
    layer = whole(form, ROPES[rope], dtype=torch.float64, chunk=64)
    k, v, _ = heads_for(layer, 3, 64)
    place = torch.arange(64).expand(3, 64)
    far = place + torch.tensor([[64], [15 * 64], [16_000 * 64]])
    later = turned_by(k, far - place, layer.rope)
    assert (layer.project(k, v, place)[0] - layer.project(later, v, far)[0]).abs().max() < 1e-9
    torch.testing.assert_close(layer.project(k, v, place - 100), layer.project(k, v, 0 * place))
    rows = layer.project(later, v, far)
    torch.testing.assert_close(layer.rebuild(*rows, far), (later, v), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"positions: expected 0 \.\. 1048575 of the rope, got 64 .. 1048576"):
        layer.project(k[:1, :2], v[:1, :2], torch.tensor([[64, 1 << 20]]))


def on_grid(x):
    """Numbers that add up exactly."""
    return x.mul(64).round().div(64)


@pytest.mark.parametrize("rope", ["no rope", "yarn"])
@pytest.mark.parametrize("form", FORMS)
def test_latents_do_not_change_with_a_constant_of_heads_and_offset(form, rope):
    """And so neither do their codes, where they are packed: bit for bit, where no rotation rounds."""
    layer = whole(form, ROPES[rope], dtype=torch.float32)
    k, v, positions = heads_for(layer, 16)
    rows, caches = [], []
    for c in (0.0, 32.25):
        sides = [
            replace(side, offset=on_grid(side.offset) + c, format=(lrattn.Format(((side.ranks[0], 4),)),) * 2)
            for side in (layer.keys, layer.values)
        ]
        keys = replace(sides[0], format=None) if layer.shared else sides[0]
        other = replace(layer, keys=keys, values=sides[1])
        moved = [on_grid(x) + c for x in (k, v)]
        turned = moved[0] if layer.rope is None else layer.rope.rotate(moved[0], positions)
        rows.append(other.project(turned, moved[1], positions))
        caches.append(lrattn.allocate_cache(other, 1, 16))
        lrattn.write_latents(other, *rows[-1], *caches[-1], torch.arange(16))
        back = other.rebuild(*rows[-1], positions)
        torch.testing.assert_close(back, (turned, moved[1]), rtol=0, atol=1e-4)
    for a, b in [*zip(*rows), *(zip(*caches) if layer.rope is None else ())]:
        assert (a is b is None) or (torch.equal(a, b) if layer.rope is None else (a - b).abs().max() < 1e-3)


def test_project_refuses_what_does_not_fit():
    layer, free, joint = (make_layer(c) for c in (RICH, BY_NAME["no rope"], BY_NAME["joint row"]))
    k, v, at = heads_for(layer, 5)
    old = replace(layer, keys=replace(layer.keys, of_inputs=True), values=replace(layer.values, of_inputs=True))
    read_only = replace(layer, keys=replace(layer.keys, down=None), values=replace(layer.values, down=None))
    for message, (own, *arguments) in {
        r"k: expected \[\.\., 4, 64\] torch.float64 on cpu, got \[5, 4, 63\] torch.float64": (layer, k[..., 1:], v, at),
        r"k: expected \[\.\., 4, 64\] torch.float64 on cpu, got \[5, 3, 64\]": (layer, k[:, 1:], v[:, 1:], at),
        r"k: expected \[\.\., 4, 64\] torch.float64 on cpu, got \[64\]": (layer, k[0, 0], v, at),
        r"k: expected .* on cpu, got \[5, 4, 64\] torch.float32": (layer, k.float(), v, at),
        "k: expected a tensor, got NoneType": (layer, None, v, at),
        r"v: expected \[5, 4, 64\] torch.float64 on cpu, got \[4, 4, 64\]": (layer, k, v[1:], at),
        r"v: expected \[4, 64\] torch.float64 on cpu, got \[3, 64\]": (layer, k[0], v[0, 1:], at[0]),
        "v: expected .* got .* torch.bfloat16": (layer, k, v.bfloat16(), at),
        "v: expected a tensor, got list": (joint, k, [v], at),
        r"positions: expected integers of shape \[5\], got None": (layer, k, v, None),
        r"positions: expected integers of shape \[5\], got \[4\] torch.int64": (layer, k, v, at[1:]),
        r"positions: expected integers of shape \[5\], got \[5\] torch.float64": (layer, k, v, at.double()),
        r"positions: expected integers of shape \[5\], got \[5\] torch.bool": (layer, k, v, at > 2),
        r"positions: expected integers of shape \[5\], got \[5\] torch.complex64": (layer, k, v, at * 1j),
        r"positions: expected integers of shape \[5\], got 7": (joint, k, v, 7),
        r"positions: expected 0 \.\. 4095 of the rope, got 4096 \.\. 4096": (layer, k, v, at * 0 + 4096),
        "positions: expected None, the layer has no rope, got a tensor": (free, k, v, at),
        r"keys.down: expected \[256, 48\] to write latents, got None": (read_only, k, v, at),
        r"keys.down: expected a map of heads, got one of attention inputs, .*: use lrattn.in_kv_space": (old, k, v, at),
    }.items():
        with pytest.raises(ValueError, match=message):
            own.project(*arguments)
    assert layer.project(k[:0], v[:0], at[:0])[0].shape == (0, 48)


def test_rebuild_refuses_what_does_not_fit():
    layer = make_layer(RICH)
    zk, zv, at = torch.randn(5, 48).double(), torch.randn(5, 64).double(), torch.arange(5)
    for message, arguments in {
        "zv: expected a tensor": (zk, None, at),
        r"zk: expected \[5, 48\] torch.float64 on cpu, got \[5, 96\]": (torch.cat((zk, zk), 1), zv, at),
        "zv: expected .* got .* torch.float32": (zk, zv.float(), at),
        r"zv: expected \[5, 64\]": (zk, zv[:3], at),
        "positions: expected integers": (zk, zv, at + 0.5),
        r"positions: expected integers of shape \[5\], got None": (zk, zv, None),
    }.items():
        with pytest.raises(ValueError, match=message):
            layer.rebuild(*arguments)
    with pytest.raises(ValueError, match=r"positions: expected 0 \.\. 4095 of the rope, got -1 \.\. -1"):
        layer.rope.rotate(torch.randn(1, 2, 64), torch.tensor([-1]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shards_write_from_their_own_heads_and_together_are_the_layer(world, shared):
    """Each holds the latents of its groups; a head that several ranks hold is written by each of them."""
    values = {1: (64,), 2: (32, 48)}.get(world, (32, 32, 64, 48))
    case = Case("tp", M=2, key_ranks=(32, 16, 48, 16), value_ranks=values, offset=True)
    if shared:
        case = replace(case, value_ranks=(32, 32, 64, 48), shared=True)
    layer = make_layer(case)
    k, v, at = heads_for(layer, 3)
    latents = layer.project(k, v, at)
    heads = layer.rebuild(*latents, at)
    parts = [layer.shard(r, world) for r in range(world)]
    rows, rebuilt = [], []
    for r, part in enumerate(parts):
        own = slice(r * 4 // world, max((r + 1) * 4 // world, r * 4 // world + 1))
        rows.append(part.project(k[:, own], v[:, own], at))
        rebuilt.append(part.rebuild(*rows[-1], at))
    for side in range(2):
        expected = heads[side].repeat_interleave(max(world // 4, 1), 1)
        torch.testing.assert_close(torch.cat([x[side] for x in rebuilt], 1), expected)
        if world <= 4 and latents[side] is not None:
            torch.testing.assert_close(torch.cat([z[side] for z in rows], 1), latents[side])
    assert torch.equal(torch.cat([p.wo for p in parts]), layer.wo)
    if not shared and world == 4:
        assert [p.keys.ranks for p in parts] == [(32,), (16,), (48,), (16,)]


def test_a_group_across_shards_is_refused_where_it_writes_and_held_by_all_where_it_only_reads():
    case = Case("order", key_ranks=(32, 16), key_order=(0, 3, 2, 1), value_ranks=(48,))
    layer = make_layer(case)
    told = (
        r"written from heads \[2, 3\] alone, got some that need others; compress\(shards=\) makes groups within shards"
    )
    with pytest.raises(ValueError, match=f"shard: expected latents that are {told}"):
        layer.shard(1, 2)
    k, v, at = heads_for(layer, 3)
    latents = layer.project(k, v, at)
    reads = replace(layer, keys=replace(layer.keys, down=None), values=replace(layer.values, down=None))
    part = reads.shard(1, 2)  # heads 2 and 3: one of each group, the later first
    torch.testing.assert_close(part.rebuild(*latents, at)[0], layer.rebuild(*latents, at)[0][:, 2:])
    uneven = make_layer(Case("uneven", Hkv=6, key_ranks=(32, 16), key_order=(0, 1, 3, 2, 4, 5), value_ranks=(48,)))
    with pytest.raises(ValueError, match="cut into equal parts"):
        uneven.shard(0, 2)
    with pytest.raises(ValueError, match="Hkv=4"):
        layer.shard(0, 3)


def test_projection_errors_name_the_tensor():
    up = torch.zeros(4, 32, 8)
    for message, change in {
        r"up: expected shape \[Hkv, R, D\], got \[4, 32\]": {"up": up[..., 0]},
        "up: expected dtype": {"up": up.int()},
        "up: expected heads and dimensions": {"up": up[:0]},
        "up: expected 48 rows": {"ranks": (48,)},
        r"ranks: expected positive multiples of 16, got \(24,\)": {"ranks": (24,)},
        r"ranks: expected positive multiples of 16, got \(\)": {"ranks": ()},
        r"ranks: expected positive multiples of 16, got \(32.0,\)": {"ranks": (32.0,)},
        "number of groups that divides Hkv=4": {"ranks": (32, 32, 32)},
        r"down: expected shape \[n, 32\]": {"down": torch.zeros(32, 31)},
        r"down: expected Hkv \* D = 32 rows, or twice .*, got 7": {"down": torch.zeros(7, 32)},
        "down: expected dtype": {"down": torch.zeros(32, 32).double()},
        "offset: expected shape": {"offset": torch.zeros(4, 9)},
        "offset: expected dtype": {"offset": torch.zeros(4, 8).half()},
        "head_order: expected a permutation": {"head_order": (0, 1, 2, 2)},
        "format: expected None": {"format": "int4"},
    }.items():
        with pytest.raises(ValueError, match=message):
            lrattn.Projection(**{"up": up, "ranks": (32,), **change})


def test_layer_errors_name_the_tensor():
    def side(heads=4, rank=32, **kwargs):
        return lrattn.Projection(up=torch.zeros(heads, rank, 8), ranks=(rank,), **kwargs)

    for chunk in (0, -64, 96, 64.0, True, "64"):
        with pytest.raises(ValueError, match=f"chunk: expected None or a positive multiple of 64, got {chunk!r}"):
            lrattn.LayerFactors(side(), side(), lrattn.Rope(1e4, 8, 16), chunk=chunk)
    with pytest.raises(ValueError, match="chunk: expected None without a rope, got 64"):
        lrattn.LayerFactors(side(), side(), None, chunk=64)
    with pytest.raises(ValueError, match="max_position: expected None with a rope, got 1024"):
        lrattn.LayerFactors(side(), side(), lrattn.Rope(1e4, 8, 16), max_position=1024)
    with pytest.raises(ValueError, match="max_position: expected None or a positive multiple of 1, got 0"):
        lrattn.LayerFactors(side(), side(), None, max_position=0)
    rope, down = lrattn.Rope(1e4, 8, 16), torch.zeros(32, 32)
    for message, arguments in {
        "values.up: expected shape": {"values": side(2)},
        "rope: expected an even D of at least 16, got D=8": {"rope": lrattn.Rope(1e4, 16, 16)},
        "rope: expected an even D of at least 8, got D=9": {
            "keys": lrattn.Projection(torch.zeros(4, 32, 9), (32,)),
            "values": lrattn.Projection(torch.zeros(4, 32, 9), (32,)),
            "rope": rope,
        },
        "wo: expected a multiple of Hkv=4": {"wo": torch.zeros(6, 8, 3)},
        "shared: expected key ranks within": {"keys": side(rank=48), "shared": True},
        "shared: expected keys.down to be None": {"keys": side(down=down), "shared": True},
        "shared: expected equal groups": {"keys": side(head_order=(1, 0, 2, 3)), "shared": True},
        r"keys.down: expected shape \[32, 32\], got \[64, 32\]": {"keys": side(down=torch.zeros(64, 32))},
        r"values.down: expected shape \[32, 32\], got \[64, 32\]": {"values": side(down=torch.zeros(64, 32))},
        r"values.down: expected shape \[64, 32\], got \[32, 32\]": {"values": side(down=down), "shared": True},
    }.items():
        with pytest.raises(ValueError, match=message):
            lrattn.LayerFactors(**{"keys": side(), "values": side(), "rope": rope, **arguments})


def test_layers_are_moved_whole_and_can_lie_on_devices_of_their_own():
    several = factors().to(["cpu", "meta", "cpu", "cpu"], torch.float16)
    assert [layer.device.type for layer in several.layers] == ["cpu", "meta", "cpu", "cpu"]
    for layer in several.layers:
        tensors = [x for side in (layer.keys, layer.values) for x in (side.up, side.down, side.offset) if x is not None]
        assert {x.dtype for x in (*tensors, layer.wo)} == {torch.float16}
        assert layer.turns is None or layer.turns.dtype == torch.complex64
    assert {layer.device.type for layer in several.to("meta").layers} == {"meta"}
    with pytest.raises(ValueError, match="device: expected one, or one for each of 4 layers, got 1"):
        several.to(["cpu"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("chunk", [None, 128])
def test_a_copy_of_a_layer_is_the_layer(copied, chunk):
    layer = replace(make_layer(RICH), chunk=chunk)
    k, v, at = heads_for(layer, 3)
    torch.testing.assert_close(copied(layer).project(k, v, at), layer.project(k, v, at), rtol=0, atol=0)
    assert copied(layer).turns is layer.turns  # equal ropes share a table


def factors(dtype=torch.float32, **more):
    packed = {case.name: case for case in PACKED}["joint row"]
    layers = [make_layer(case, dtype) for case in (RICH, BY_NAME["riding row"], BY_NAME["no rope"], packed)]
    layers[1], layers[2] = replace(layers[1], chunk=512), replace(layers[2], max_position=8192)
    return lrattn.Factors(tuple(layers), method="palu", model="a model", **more)


def same(a, b):
    return (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def test_a_record_is_one_readable_line():
    """In a notebook, in a list too: what it is and how large, no numbers of its tensors."""
    whole = factors()
    moments = lrattn.Moments({"before": (torch.eye(97).double(),) * 3}, 1180, 4, far=(64, 4))
    told = {
        whole: r"Factors\(method='palu', layers=4, keep=\d\.\d{3}, bytes_per_token=[\d,]+, near=\(0, 0\), "
        r"torch\.float32 on cpu\)",
        whole.layers[0]: r"LayerFactors\(heads=4, head_dim=\d+, keys=48 latents in 2 groups, values=64 latents, "
        r"before RoPE, torch\.float32 on cpu\)",
        whole.layers[0].keys: r"Projection\(heads=4, head_dim=\d+, 48 latents in 2 groups, down, offset, .*\)",
        moments: r"Moments\(layers=3, tokens=1,180, sequences=4, gathered=\('before',\), far=\(64, 4\)\)",
    }
    for record, expected in told.items():
        for text in (repr(record), str(record), f"{[record]}"[1:-1]):
            assert re.fullmatch(expected, text), text
    for layer in whole.layers:
        assert all(len(repr(x).splitlines()) == 1 and len(repr(x)) < 160 for x in (layer, layer.keys, layer.values))
        assert ("shared" in repr(layer), "before RoPE" in repr(layer)) == (layer.shared, not layer.absorbed)
        assert ("in chunks of 512" in repr(layer)) == (layer.chunk is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_give_the_same_record(dtype, tmp_path):
    samples = tuple(random(9, seed=i, dtype=dtype) for i in range(4))
    saved = factors(dtype, rule="fisher", predicted=(0.5, 0.25, 1.0, 0.0), near=(64, 4), samples=samples)
    saved.save(tmp_path / "f.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    loaded = lrattn.Factors.load(tmp_path / "f.safetensors")
    for name in ("method", "model", "rule", "predicted", "near", "keep"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert all(same(a, b) for a, b in zip(loaded.samples, samples, strict=True))
    for a, b in zip(saved.layers, loaded.layers, strict=True):
        assert (a.rope, a.shared, a.chunk, a.max_position) == (b.rope, b.shared, b.chunk, b.max_position)
        assert same(a.wo, b.wo)
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert (x.ranks, x.head_order, x.format, x.of_inputs) == (y.ranks, y.head_order, y.format, False)
            assert same(x.up, y.up) and same(x.down, y.down) and same(x.offset, y.offset)
        for z, own in zip(*(layer.project(*heads_for(a, 3)) for layer in (a, b)), strict=True):
            assert same(z, own)


SEGMENTS = ((16, 8), (16, 4), (16, 2), (16, 8))  # of blocks that had bits on their own, as in files of version 4


def rewritten(path, version, **changes):
    """The file with this said of the sides that are packed; None is not said."""
    record, tensors, _ = safefile.read(path, "factors")
    for layer in record["layers"]:
        for name in ("keys", "values"):
            if "format" in layer[name]:
                said = layer[name] | changes
                layer[name] = {part: x for part, x in said.items() if x is not None}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(safefile, "VERSION", version)
        safefile.write(path, "factors", record, tensors)


@pytest.fixture
def packed_file(tmp_path):
    """The file, and the layer in it, of one group of 64 packed values."""
    layer = make_layer(Case("packed", value_ranks=(64,)), torch.float32)
    layer = replace(layer, values=replace(layer.values, format=lrattn.Format(SEGMENTS)))
    lrattn.Factors((layer,)).save(tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors", layer


def test_files_of_version_4_mean_the_same_segments(packed_file):
    """They hold no codes, and say no layout: rows of theirs are written as all are."""
    path, layer = packed_file
    record, _, version = safefile.read(path, "factors")
    assert (
        version == safefile.VERSION
        and record["layers"][0]["values"]["layout"] == 2
        and "layout" not in record["layers"][0]["keys"]
    )
    rewritten(path, 4, layout=None)
    record, _, version = safefile.read(path, "factors")
    assert version == 4 and "layout" not in record["layers"][0]["values"]
    (loaded,) = lrattn.Factors.load(path).layers
    assert loaded.values.format == layer.values.format and loaded.values.formats[0].segments == SEGMENTS
    assert loaded.keys.format is None and loaded.v_width == layer.v_width == 4 * 16 + 8


@pytest.mark.parametrize("layout", [1, 3])
def test_a_file_of_another_layout_is_refused(layout, packed_file):
    path, _ = packed_file
    rewritten(path, safefile.VERSION, layout=layout)
    with pytest.raises(ValueError, match=rf"layout: expected 2, the one that rows are written in, got {layout}"):
        lrattn.Factors.load(path)


def test_what_is_known_of_layers_is_known_of_all():
    layers = factors().layers
    for name, some in (("predicted", (0.5,)), ("samples", (torch.zeros(3),) * 3)):
        with pytest.raises(ValueError, match=f"{name}: expected one for each of 4 layers, got {len(some)}"):
            lrattn.Factors(layers, **{name: some})
    with pytest.raises(ValueError, match="layers: expected at least one LayerFactors, got none"):
        lrattn.Factors(())
    for wrong in (-1, 1.5, True, "4"):
        for name in ("recent", "sinks"):
            with pytest.raises(ValueError, match=f"{name}: expected a number of tokens, 0 or more, got {wrong!r}"):
                factors().near_or(**{"recent": None, "sinks": None, name: wrong})


def damaged_copies(whole):
    """Name -> bytes: every kind of file that is not the one that was written."""
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])

    def with_header(**changes):
        new = dict(header)
        new["__metadata__"] = {**header["__metadata__"], **changes}
        text = json.dumps(new).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    flipped = bytearray(whole)
    flipped[-5] ^= 1
    record = json.loads(header["__metadata__"]["record"])
    record["layers"][0]["keys"]["ranks"] = [16, 32]
    return {
        "empty": b"",
        "no header": whole[:8],
        "truncated": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "one bit flipped": bytes(flipped),
        "text": b"these are not factors" * 99,
        "pickle": b"\x80\x04\x95" + bytes(500),
        "newer": with_header(version=str(safefile.VERSION + 1)),
        "no version": with_header(version="one"),
        "foreign": with_header(format="pt"),
        "other kind": with_header(format="lrattn.moments"),
        "changed record": with_header(record=json.dumps(record)),
        "no hash": with_header(sha256=""),
    }


def test_every_damaged_file_is_one_clear_error(tmp_path):
    factors().save(tmp_path / "f.safetensors")
    copies = damaged_copies((tmp_path / "f.safetensors").read_bytes())
    path = tmp_path / "bad.safetensors"
    for name, content in copies.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.safetensors: (expected|damaged)") as error:
            lrattn.Factors.load(path)
        if name == "newer":
            assert "a newer lrattn wrote this file" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        lrattn.Factors.load(tmp_path / "none.safetensors")


def test_tensors_that_share_memory_are_saved_whole(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    safefile.write(tmp_path / "f", "factors", {}, {"a": whole, "b": whole, "c": whole[1], "d": whole.T})
    read = safefile.read(tmp_path / "f", "factors")[1]
    assert all(torch.equal(read[n], x) for n, x in (("a", whole), ("b", whole), ("c", whole[1]), ("d", whole.T)))
