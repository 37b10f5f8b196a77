"""Pages: what is written where, what is skipped, and that bad input leaves a cache as it was."""

import pytest
import torch
from cases import CASES, PLAIN, Case, make, make_layer

import lrattn

BY_NAME = {case.name: case for case in CASES}


def latents(layer, n, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    zk = torch.randn(n, layer.row_width, generator=g, dtype=torch.float64).to(dtype)
    zv = None if layer.shared else torch.randn(n, layer.v_width, generator=g, dtype=torch.float64).to(dtype)
    return zk, zv


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows_land_in_their_slots_and_no_others(kind):
    layer = make_layer(PLAIN)
    k_cache, v_cache = lrattn.allocate_cache(layer, 3, 16)
    k_cache.fill_(7.0), v_cache.fill_(7.0)
    zk, zv = latents(layer, 6)
    slots = torch.tensor([-1, 5, 47, 48, 16, -(2**31)], dtype=kind)
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots)
    for cache, rows in ((k_cache, zk), (v_cache, zv)):
        flat = cache.view(48, -1)
        assert torch.equal(flat[[5, 47, 16]], rows[[1, 2, 4]])
        others = torch.ones(48, dtype=torch.bool)
        others[[5, 47, 16]] = False
        assert (flat[others] == 7.0).all()


def test_caches_may_be_slices_of_one_tensor():
    layer, q, k_cache, v_cache, kwargs = make(Case("slices", M=2, lens=(40, 17)))
    whole = torch.full((len(k_cache) * 2, 3, 20, 200), torch.nan, dtype=torch.float64)
    k_view = whole[::2, 1, 2:18, 8 : 8 + layer.k_width]
    v_view = whole[::2, 1, 2:18, 100 : 100 + layer.v_width]
    expected = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    slots = torch.arange(len(k_cache) * 16)
    rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    lrattn.write_latents(layer, *rows, k_view, v_view, slots)
    assert torch.equal(lrattn.decode_attention(q, k_view, v_view, layer, **kwargs), expected)
    assert whole.isnan().sum() == whole.numel() - (~k_cache.isnan()).sum() - (~v_cache.isnan()).sum()


@pytest.mark.parametrize("name", ["ragged ranks and batch", "offset", "positions", "riding row", "no rope"])
def test_rebuild_reads_back_what_was_written(name):
    case = BY_NAME[name]
    layer, _, k_cache, v_cache, kwargs = make(case)
    table, lens, positions = kwargs["block_table"], kwargs["seq_lens"], kwargs["positions"]
    k, v = lrattn.rebuild(k_cache, v_cache, layer, table, lens, positions)
    assert k.shape == v.shape == (sum(case.lens), case.Hkv, case.D)
    start = 0
    for b, n in enumerate(case.lens):
        t = torch.arange(n)
        slots = table[b, t // case.P].long() * case.P + t % case.P
        zk = k_cache.flatten(0, 1)[slots]
        zv = None if v_cache is None else v_cache.flatten(0, 1)[slots]
        at = t if positions is None else positions.view(-1)[slots]
        torch.testing.assert_close((k[start : start + n], v[start : start + n]), layer.rebuild(zk, zv, at))
        start += n


def bad_writes(layer, zk, zv, k_cache, v_cache, slots):
    return {
        r"zk: expected shape \[3, 32\]": (zk[:, :-1], zv, k_cache, v_cache, slots),
        "zk: expected dtype": (zk.float(), zv, k_cache, v_cache, slots),
        r"zv: expected shape \[3, 48\]": (zk, zv[:, 1:], k_cache, v_cache, slots),
        r"zv: expected shape \[3, 48\], got \[2, 48\]": (zk, zv[1:], k_cache, v_cache, slots),
        "zv: expected a tensor": (zk, None, k_cache, v_cache, slots),
        r"slot_mapping: expected shape \[3\], int32 or int64, got \[2\]": (zk, zv, k_cache, v_cache, slots[:2]),
        r"slot_mapping: expected .* got \[3\] torch.float32": (zk, zv, k_cache, v_cache, slots.float()),
        "k_cache: expected shape": (zk, zv, k_cache[..., 1:], v_cache, slots),
        "k_cache: expected the layer's dtype": (zk.float(), zv.float(), k_cache.float(), v_cache.float(), slots),
        "k_cache: expected a page size": (zk, zv, k_cache[:, :15], v_cache[:, :15], slots),
        "k_cache: expected a contiguous last axis": (zk, zv, k_cache.mT.contiguous().mT, v_cache, slots),
        r"v_cache: expected shape \[N=2": (zk, zv, k_cache, v_cache[:1], slots),
        "v_cache: expected memory of its own": (zk, zv, k_cache, v_cache[:1].expand(2, -1, -1), slots),
        r"zk: expected shape \[32\], got \[\]": (zk[0, 0], zv, k_cache, v_cache, slots),
        "v_cache: expected a tensor": (zk, zv, k_cache, None, slots),
        "zk: expected a tensor, got list": (zk.tolist(), zv, k_cache, v_cache, slots),
        "slot_mapping: expected a tensor, got NoneType": (zk, zv, k_cache, v_cache, None),
        r"k_cache: expected memory of its own for every element, got strides \(16, 31, 1\)": (
            (zk, zv, k_cache.flatten().as_strided((2, 16, 32), (16, 31, 1)), v_cache, slots)
        ),
    }


def test_bad_input_names_the_tensor_and_leaves_the_cache():
    layer = make_layer(PLAIN)
    k_cache, v_cache = lrattn.allocate_cache(layer, 2, 16)
    k_cache.fill_(7.0), v_cache.fill_(7.0)
    zk, zv = latents(layer, 3)
    for message, arguments in bad_writes(layer, zk, zv, k_cache, v_cache, torch.arange(3)).items():
        with pytest.raises(ValueError, match=message):
            lrattn.write_latents(layer, *arguments)
    assert (k_cache == 7.0).all() and (v_cache == 7.0).all()
    with pytest.raises(ValueError, match="page_size: expected a positive multiple of 16, got 24"):
        lrattn.allocate_cache(layer, 2, 24)
    with pytest.raises(ValueError, match="backend: expected"):
        lrattn.write_latents(layer, zk, zv, k_cache, v_cache, torch.arange(3), backend="cuda")
