"""Pages: what is written where, what is skipped, and that bad input leaves a cache as it was."""

import pytest
import torch
from cases import CASES, PACKED, PLAIN, Case, held, latents, make, make_layer
from packing import plain

import lrattn
from lrattn.attention.cache import read_rows


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


@pytest.mark.parametrize("case", [c for c in CASES + PACKED if c.starts is None and not c.call], ids=str)
def test_rebuild_reads_back_what_was_written(case):
    """Packed latents as what their bits say."""
    problem = make(case)
    layer, _, *caches, kwargs = problem
    table, positions = kwargs["block_table"], kwargs["positions"]
    k, v = lrattn.rebuild(*caches, layer, table, kwargs["seq_lens"], positions)
    lens = [held(case, b) for b in range(len(case.lens))]
    assert k.shape == v.shape == (sum(lens), case.Hkv, case.D)
    own, _, *caches, _ = plain(problem)
    start = 0
    for b, n in enumerate(lens):
        t = torch.arange(n)
        page, offset = table[b, t // case.P].long(), t % case.P
        rows = (x if x is None else x[page, offset] for x in caches)
        expected = own.rebuild(*rows, t if positions is None else positions[page, offset])
        torch.testing.assert_close((k[start : start + n], v[start : start + n]), expected, rtol=0, atol=1e-9)
        start += n


def bad_writes(layer, zk, zv, k_cache, v_cache, slots):
    """Messages, and which arguments are changed to what; tests/support/faults.py makes each wrong in every way."""
    overlapping = k_cache.flatten().as_strided((2, 16, 32), (16, 31, 1))
    wrong = {
        r"zk: expected shape \[3, 32\]": {"zk": zk[:, :-1]},
        r"zk: expected shape \[32\], got \[\]": {"zk": zk[0, 0]},
        "zk: expected dtype": {"zk": zk.float()},
        "zk: expected a tensor, got list": {"zk": zk.tolist()},
        r"zv: expected shape \[3, 48\], got \[2, 48\]": {"zv": zv[1:]},
        "zv: expected a tensor": {"zv": None},
        r"slot_mapping: expected shape \[3\], int32 or int64, got \[2\]": {"slot_mapping": slots[:2]},
        r"slot_mapping: expected .* got \[3\] torch.float32": {"slot_mapping": slots.float()},
        "k_cache: expected shape": {"k_cache": k_cache[..., 1:]},
        "k_cache: expected the layer's dtype": {"k_cache": k_cache.float()},
        "k_cache: expected a page size": {"k_cache": k_cache[:, :15]},
        "k_cache: expected a contiguous last axis": {"k_cache": k_cache.mT.contiguous().mT},
        r"k_cache: expected memory of its own for every element, got strides \(16, 31, 1\)": {"k_cache": overlapping},
        r"v_cache: expected shape \[N=2": {"v_cache": v_cache[:1]},
        "v_cache: expected a tensor": {"v_cache": None},
        "v_cache: expected memory of its own": {"v_cache": v_cache[:1].expand(2, -1, -1)},
    }
    given = {"zk": zk, "zv": zv, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots}
    return {message: given | changes for message, changes in wrong.items()}


def test_bad_input_names_the_tensor_and_leaves_the_cache():
    layer = make_layer(PLAIN)
    k_cache, v_cache = lrattn.allocate_cache(layer, 2, 16)
    k_cache.fill_(7.0), v_cache.fill_(7.0)
    zk, zv = latents(layer, 3)
    for message, arguments in bad_writes(layer, zk, zv, k_cache, v_cache, torch.arange(3)).items():
        with pytest.raises(ValueError, match=message):
            lrattn.write_latents(layer, **arguments)
    assert (k_cache == 7.0).all() and (v_cache == 7.0).all()
    with pytest.raises(ValueError, match="page_size: expected a positive multiple of 16, got 24"):
        lrattn.allocate_cache(layer, 2, 24)
    with pytest.raises(ValueError, match="backend: expected"):
        lrattn.write_latents(layer, zk, zv, k_cache, v_cache, torch.arange(3), backend="cuda")


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("order", [(2, 3, 4), (2, 4, 3), (4, 3, 2), (2, 4, 5), (7, 7, 7)], ids=str)
def test_rows_of_pages_that_follow_one_another_are_read_where_they_lie(order, page_size):
    cache = torch.arange(8 * page_size * 3).view(8, page_size, 3)
    own = torch.cat([cache[page] for page in order])
    for begin, end in ((0, 3 * page_size), (7, 2 * page_size + 9), (page_size, page_size)):
        rows = read_rows(cache, torch.tensor(order, dtype=torch.int32), begin, end)
        assert torch.equal(rows, own[begin:end])
        in_place = rows.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        assert begin == end or in_place == (order == (2, 3, 4))
