"""The frozen records: latents and back, shards, folds, and a file that is read whole or not at all."""

import json
import re
import struct

import pytest
import safetensors
import torch
from cases import CASES, Case, make_layer
from oracle import dense_kv

import lrattn
from lrattn.factors import safefile

BY_NAME = {case.name: case for case in CASES}
RICH = Case(
    "rich",
    M=2,
    key_ranks=(32, 16),
    value_ranks=(64,),
    key_order=(2, 1, 3, 0),
    bias=True,
    key_norm=True,
    rope={"partial_rotary_factor": 0.5, "scaling": {"rope_type": "linear", "factor": 2.0, "unused": [1, 2]}},
)


@pytest.mark.parametrize(
    "name", ["head order", "key norm, groups", "bias", "riding row", "no rope, bias and norm", "interleaved"]
)
def test_rebuild_is_the_documented_map(name):
    layer = make_layer(BY_NAME[name])
    rows = torch.randn(2, 3, layer.row_width, dtype=torch.float64)
    values = None if layer.shared else torch.randn(2, 3, layer.v_width, dtype=torch.float64)
    positions = torch.tensor([[0, 7, 4000], [1, 2, 3]])
    k, v = layer.rebuild(rows, values, positions)
    for i in range(2):
        for t in range(3):
            row = None if values is None else values[i, t]
            expected = dense_kv(layer, rows[i, t], row, int(positions[i, t]))
            torch.testing.assert_close((k[i, t], v[i, t]), expected, rtol=0, atol=1e-12)


def test_project_is_the_write_side():
    layer = make_layer(RICH)
    x = torch.randn(5, 2, RICH.E, dtype=torch.float64)
    zk, zv = layer.project(x)
    torch.testing.assert_close((zk, zv), (x @ layer.keys.down, x @ layer.values.down))
    shared = make_layer(BY_NAME["joint row"])
    row, none = shared.project(x)
    assert none is None
    torch.testing.assert_close(row, x @ shared.values.down)


def test_project_refuses_other_inputs():
    layer = make_layer(RICH)
    with pytest.raises(ValueError, match=r"x: expected \[\.\., 24\] torch.float64"):
        layer.project(torch.randn(5, 23, dtype=torch.float64))
    with pytest.raises(ValueError, match="x: expected"):
        layer.project(torch.randn(5, 24))


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
def test_shards_together_are_the_layer(world, shared):
    case = Case("tp", M=2, key_ranks=(32, 16, 48, 16), value_ranks=(64,), bias=True, key_norm=True)
    if shared:
        case = Case("tp", M=2, key_ranks=(32, 16, 48, 16), value_ranks=(32, 32, 64, 48), shared=True)
    layer = make_layer(case)
    x = torch.randn(3, case.E, dtype=torch.float64)
    k, v = layer.rebuild(*layer.project(x), torch.arange(3))
    parts = [layer.shard(r, world) for r in range(world)]
    rebuilt = [p.rebuild(*p.project(x), torch.arange(3)) for p in parts]
    heads = k.repeat_interleave(max(world // 4, 1), 1), v.repeat_interleave(max(world // 4, 1), 1)
    torch.testing.assert_close(torch.cat([k for k, _ in rebuilt], 1), heads[0])
    torch.testing.assert_close(torch.cat([v for _, v in rebuilt], 1), heads[1])
    assert torch.equal(torch.cat([p.wo for p in parts]), layer.wo)
    if not shared and world == 4:
        assert [p.keys.ranks for p in parts] == [(32,), (16,), (48,), (16,)]
        assert all(p.values.ranks == (64,) for p in parts)  # one value latent serves every head: each rank holds it


def test_shard_keeps_head_order_and_refuses_uneven_cuts():
    layer = make_layer(Case("order", key_ranks=(32, 16), key_order=(0, 3, 2, 1), value_ranks=(48,)))
    x = torch.randn(3, 24, dtype=torch.float64)
    k, _ = layer.rebuild(*layer.project(x), torch.arange(3))
    part = layer.shard(1, 2)  # heads 2 and 3: one of each group, the later first
    torch.testing.assert_close(part.rebuild(*part.project(x), torch.arange(3))[0], k[:, 2:])
    uneven = make_layer(Case("uneven", Hkv=6, key_ranks=(32, 16), key_order=(0, 1, 3, 2, 4, 5), value_ranks=(48,)))
    with pytest.raises(ValueError, match="cut into equal parts"):
        uneven.shard(0, 2)
    with pytest.raises(ValueError, match="Hkv=4"):
        layer.shard(0, 3)


def test_fold_output_is_two_products_in_one():
    layer = make_layer(RICH)
    latent = torch.randn(3, 8, 64, dtype=torch.float64)
    two = torch.einsum("thr,hrd,hde->te", latent, layer.values.up.repeat_interleave(2, 0), layer.wo)
    torch.testing.assert_close(torch.einsum("thr,hre->te", latent, layer.fold_output()), two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(4, 32)}, r"up: expected shape \[Hkv, R, D\], got \[4, 32\]"),
        ({"up": torch.zeros(4, 32, 8, dtype=torch.int32)}, "up: expected dtype"),
        ({"ranks": (24,)}, "ranks: expected positive multiples of 16"),
        ({"ranks": ()}, "ranks: expected positive multiples"),
        ({"ranks": (32.0,)}, "ranks: expected positive multiples"),
        ({"up": torch.zeros(0, 32, 8)}, "up: expected heads and dimensions"),
        ({"ranks": (48,)}, "up: expected 48 rows"),
        ({"ranks": (32, 32, 32)}, "number of groups that divides Hkv=4"),
        ({"down": torch.zeros(7, 31)}, r"down: expected shape \[E, 32\]"),
        ({"bias": torch.zeros(4, 9)}, "bias: expected shape"),
        ({"bias": torch.zeros(4, 8, dtype=torch.float16)}, "bias: expected dtype"),
        ({"head_order": (0, 1, 2, 2)}, "head_order: expected a permutation"),
        ({"format": "int4"}, "format: expected None"),
    ],
)
def test_projection_errors_name_the_tensor(change, message):
    with pytest.raises(ValueError, match=message):
        lrattn.Projection(**{"up": torch.zeros(4, 32, 8), "ranks": (32,), **change})


def test_layer_errors_name_the_tensor():
    def side(heads=4, rank=32, **kwargs):
        return lrattn.Projection(up=torch.zeros(heads, rank, 8), ranks=(rank,), **kwargs)

    rope = lrattn.Rope(1e4, 8, 16)
    for message, arguments in {
        "values.up: expected shape": {"values": side(2)},
        "rope: expected an even D of at least 16, got D=8": {"rope": lrattn.Rope(1e4, 16, 16)},
        "rope: expected an even D of at least 8, got D=9": {
            "keys": lrattn.Projection(torch.zeros(4, 32, 9), (32,)),
            "values": lrattn.Projection(torch.zeros(4, 32, 9), (32,)),
            "rope": rope,
        },
        "key_norm.weight: expected": {"key_norm": lrattn.KeyNorm(torch.ones(7))},
        "wo: expected a multiple of Hkv=4": {"wo": torch.zeros(6, 8, 3)},
        "shared: expected key ranks within": {"keys": side(rank=48), "shared": True},
        "shared: expected keys.down to be None": {"keys": side(down=torch.zeros(3, 32)), "shared": True},
        "shared: expected equal groups": {"keys": side(head_order=(1, 0, 2, 3)), "shared": True},
        "values.down: expected": {"keys": side(down=torch.zeros(3, 32)), "values": side(down=torch.zeros(4, 32))},
    }.items():
        with pytest.raises(ValueError, match=message):
            lrattn.LayerFactors(**{"keys": side(), "values": side(), "rope": rope, **arguments})


def test_to_moves_every_tensor():
    layer = make_layer(RICH).to(dtype=torch.float32)
    tensors = [layer.keys.up, layer.keys.down, layer.keys.bias, layer.values.up, layer.key_norm.weight, layer.wo]
    assert {x.dtype for x in (*tensors, layer.key_basis.rows, layer.value_basis.rows)} == {torch.float32}
    assert layer.turns.dtype == torch.complex64


def factors(dtype=torch.float32):
    cases = [RICH, BY_NAME["riding row"], BY_NAME["no rope"], BY_NAME["plain"]]
    return lrattn.Factors(tuple(make_layer(case, dtype) for case in cases), method="palu", model="a model")


def same(a, b):
    return (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def test_a_record_is_one_readable_line():
    """In a notebook, in a list too: what it is and how large, no numbers of its tensors."""
    whole = factors()
    told = {
        whole: r"Factors\(method='palu', layers=4, keep=\d\.\d{3}, bytes_per_token=[\d,]+, near=\(0, 0\), "
        r"torch\.float32 on cpu\)",
        whole.layers[0]: r"LayerFactors\(heads=4, head_dim=\d+, keys=48 latents in 2 groups, values=64 latents, "
        r"torch\.float32 on cpu\)",
        whole.layers[0].keys: r"Projection\(heads=4, head_dim=\d+, 48 latents in 2 groups, down, bias, .*\)",
        whole.layers[0].key_norm: r"KeyNorm\(head_dim=\d+, eps=1e-06, torch\.float32 on cpu\)",
        lrattn.Moments([torch.eye(96).double()] * 3, 1180, 4, far=(64, 4)): r"Moments\(layers=3, inputs=96, "
        r"tokens=1,180, sequences=4, gathered=\(\), far=\(64, 4\)\)",
    }
    for record, expected in told.items():
        for text in (repr(record), str(record), f"{[record]}"[1:-1]):
            assert re.fullmatch(expected, text), text
    for layer in whole.layers:
        assert all(len(repr(x).splitlines()) == 1 and len(repr(x)) < 160 for x in (layer, layer.keys, layer.values))
        assert ("shared" in repr(layer), "rotated" in repr(layer)) == (layer.shared, layer.rotated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_give_the_same_record(dtype, tmp_path):
    saved = factors(dtype)
    saved.save(tmp_path / "f.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    loaded = lrattn.Factors.load(tmp_path / "f.safetensors")
    assert (loaded.method, loaded.model, loaded.keep) == (saved.method, saved.model, saved.keep)
    for a, b in zip(saved.layers, loaded.layers, strict=True):
        assert (a.rope, a.shared) == (b.rope, b.shared)
        assert same(a.wo, b.wo)
        assert (a.key_norm is None) == (b.key_norm is None)
        if a.key_norm is not None:
            assert same(a.key_norm.weight, b.key_norm.weight) and a.key_norm.eps == b.key_norm.eps
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert (x.ranks, x.head_order, x.format) == (y.ranks, y.head_order, y.format)
            assert same(x.up, y.up) and same(x.down, y.down) and same(x.bias, y.bias)


def test_tensors_that_share_memory_are_saved(tmp_path):
    layer = make_layer(BY_NAME["plain"], torch.float32)
    lrattn.Factors((layer, layer)).save(tmp_path / "f.safetensors")
    assert len(lrattn.Factors.load(tmp_path / "f.safetensors").layers) == 2


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


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    factors().save(path)
    before = path.read_bytes()

    for error in (OSError("disk full"), safetensors.SafetensorError("disk full")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(safefile, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            factors().save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    path, plain = tmp_path / "f.safetensors", tmp_path / "plain"
    factors().save(path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    for place, kind in ((tmp_path, IsADirectoryError), (tmp_path / "no" / "f", FileNotFoundError)):
        with pytest.raises(kind, match="factors: expected"):
            factors().save(place)


def test_tensors_that_share_memory_are_saved_whole(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    safefile.write(tmp_path / "f", "factors", {}, {"a": whole, "b": whole, "c": whole[1], "d": whole.T})
    read = safefile.read(tmp_path / "f", "factors")[1]
    assert all(torch.equal(read[n], x) for n, x in (("a", whole), ("b", whole), ("c", whole[1]), ("d", whole.T)))
