"""Factors with packed latents: bytes met, folds exact; caches, files, models and bad input."""

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from cases import PACKED, Case, make, make_layer
from packing import POISON, plain, read_cache

import lrattn
from lrattn.__main__ import main
from lrattn.attention.cache import stored, unpack
from lrattn.factors.formats import uniform
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.models.interface import cache_argument

FAMILIES = tuple(tiny.CONFIGS)
FORMS = (False, "ride", True)


def compressed(family="llama", **kwargs):
    model = tiny.model(family)
    given = {"keep": 0.3, "bits": "auto", "far": (0, 0), "progress": False} | kwargs
    return model, lrattn.compress(model, [tiny.tokens(4, 40)], **given)


def heads_of(model, ids):
    """Keys and values of each layer as attention is given them, two lists of [B, T, Hkv, D]."""
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    return [layer.keys.transpose(1, 2) for layer in layers], [layer.values.transpose(1, 2) for layer in layers]


def formats_of(factors):
    return [f for layer in factors.layers for side in (layer.keys, layer.values) for f in side.formats]


@pytest.mark.every(3)
@pytest.mark.parametrize("shared", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_from_below(family, shared):
    _model, factors = compressed(family, shared=shared)
    caches = [x for layer in factors.layers for x in lrattn.allocate_cache(layer, 1, 16) if x is not None]
    assert sum(x.nbytes for x in caches) == 16 * factors.bytes_per_token  # scales and padding included
    assert all(x.dtype == torch.uint8 for x in caches)
    step = 2 * max(layer.keys.num_heads for layer in factors.layers) * 16  # of a block in every group, and scales
    assert 0.3 * factors.dense_bytes_per_token - step < factors.bytes_per_token <= 0.3 * factors.dense_bytes_per_token
    assert len(set(formats_of(factors))) > 1
    assert len(factors.predicted) == len(factors.layers) and all(x > 0 for x in factors.predicted)


@pytest.mark.parametrize("nbytes", [150, 231, 400])
def test_bytes_a_token_instead_of_a_share(nbytes):
    _, factors = compressed(keep=None, bytes_per_token=nbytes)
    assert nbytes - 16 < factors.bytes_per_token <= nbytes


@pytest.mark.parametrize("shared", FORMS)
def test_more_bytes_foresee_less_loss(shared):
    model, _ = compressed()
    moments = lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=["before", "metric"], progress=False)
    lost = [
        sum(lrattn.compress(model, moments=moments, keep=k, bits="auto", shared=shared, progress=False).predicted)
        for k in (0.1, 0.2, 0.4, 0.7, 1.0)
    ]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-3 * lost[0]


def test_bits_lose_less_than_ranks_at_the_same_bytes():
    """And every width the ladder has lowers what is foreseen."""
    model, _ = compressed()
    moments = lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=["before", "metric"], progress=False)
    lost = {
        bits: sum(lrattn.compress(model, moments=moments, keep=0.08, bits=bits, shared=True, progress=False).predicted)
        for bits in (16, 8, 4, (2, 4), "auto")
    }
    assert lost["auto"] <= lost[2, 4] <= lost[4] < lost[8] < lost[16]


@pytest.mark.parametrize("shared", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mqa"])
def test_the_fold_changes_nothing_but_bits(family, shared):
    """The deviations went from one side of the factors to the other."""
    _, factors = compressed(family, shared=shared)
    for layer in factors.layers:
        assert layer.packed
        for side in (layer.keys, layer.values):
            assert (side.up.norm(dim=2).sum(0) > 0).all()
    model, whole = compressed(family, keep=1.0, bits=8, shared=shared)
    for layer, k, v in zip(whole.layers, *heads_of(model, tiny.tokens(1, 40)), strict=True):
        positions = None if layer.rope is None else torch.arange(40)[None]
        back = layer.rebuild(*layer.project(k, v, positions), positions)
        torch.testing.assert_close(back, (k, v), rtol=0, atol=2e-4)


def test_deviations_are_folded_in():
    """Latents of the calibration text have a mean square of one; those past the 96 that it has are no larger."""
    model, factors = compressed(shared=True)
    for layer, k, v in zip(factors.layers, *heads_of(model, tiny.tokens(4, 40)), strict=True):
        z, _ = layer.project(k, v, None if layer.rope is None else torch.arange(40).expand(4, -1))
        sizes = z.square().mean((0, 1))
        torch.testing.assert_close(sizes[:96], torch.ones(96), rtol=1e-3, atol=0)
        assert (sizes < 1.001).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("method", "keep"), [("palu", 0.2), ("recalkv", 0.2), ("svd", 0.2), ("kq-svd", 0.32), ("matryoshka-pca", 0.32)]
)
def test_other_methods_take_uniform_bits(method, keep, bits):
    model, factors = compressed(method=method, bits=bits, keep=keep)
    assert {b for f in formats_of(factors) for _, b in f.segments} == {bits}
    full = all(side.width >= 128 for layer in factors.layers for side in (layer.keys, layer.values))
    least = keep * factors.dense_bytes_per_token - 2 * bits
    assert (full or least < factors.bytes_per_token) and factors.bytes_per_token <= keep * factors.dense_bytes_per_token
    with torch.no_grad(), latent_attention(model, factors):
        assert model(tiny.tokens(1, 30)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, r"bits: expected 'auto', one of \(16, 8, 4, 2\) or some of them, got 5"),
        ({"bits": "auto", "method": "palu"}, "bits: expected one number with method 'palu' and ranks 'spectrum'"),
        ({"bits": (4, 2), "ranks": "uniform"}, "bits: expected one number with method 'lrattn' and ranks 'uniform'"),
        ({"bytes_per_token": 100, "keep": 0.5}, "bytes_per_token: expected None beside keep=0.5, got 100"),
        ({"bytes_per_token": 0, "keep": None}, "bytes_per_token: expected an integer from 1 to 1536, got 0"),
        ({"bytes_per_token": 9999, "keep": None}, "bytes_per_token: expected an integer from 1 to 1536, got 9999"),
        ({"keep": 0.001}, "keep: expected at least"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(given, message, monkeypatch):
    monkeypatch.setattr(sys.modules["lrattn.compression.compress"], "calibrate", None)
    with pytest.raises(ValueError, match=message):
        compressed(**given)


# Caches.


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_a_cache_holds_what_the_page_layout_says(case):
    layer = make_layer(replace(case, strided=False), torch.float32)
    caches = lrattn.allocate_cache(layer, 2, 16)
    zk = torch.randn(20, layer.row_width)
    zv = None if case.shared else torch.randn(20, layer.values.width)
    for cache in caches:
        if cache is not None:
            cache.fill_(POISON if cache.dtype == torch.uint8 else torch.nan)
    lrattn.write_latents(layer, zk, zv, *caches, torch.arange(20))
    assert sum(x[0, 0].nbytes for x in caches if x is not None) >= layer.bytes_per_token
    k_cache, v_cache = caches
    back = unpack(layer.row_side, k_cache.flatten(0, 1)[:20])
    if layer.row_side.formats:
        read = read_cache(k_cache, layer.row_side.formats, torch.float32).flatten(0, 1)
        torch.testing.assert_close(back.double(), read[:20], rtol=1e-6, atol=1e-9)
        assert read[20:].isnan().all()
    k, v = stored(layer, zk, zv)
    assert torch.equal(k, back.float())
    if v_cache is not None:
        assert torch.equal(v, unpack(layer.values, v_cache.flatten(0, 1)[:20]).float())


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_rebuild_of_packed_latents(case):
    whole = replace(case, starts=None, call={n: x for n, x in case.call.items() if n != "window_size"})
    problem = make(whole)
    layer, _, k_cache, v_cache, kwargs = problem
    rest = kwargs["block_table"], kwargs["seq_lens"], kwargs["positions"]
    got = lrattn.rebuild(k_cache, v_cache, layer, *rest)
    own, _, *caches, _ = plain(problem)
    expected = lrattn.rebuild(*caches, own, *rest)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_layers_are_as_good_as_wide_ones(dtype):
    case = Case("both", key_bits=(8, 4), value_bits=(8, 4), M=2, lens=(60, 33))
    problem = make(case, dtype)
    layer, q, k_cache, v_cache, kwargs = problem
    out = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    own, *tensors, _ = plain(problem)
    true = lrattn.decode_attention(*tensors, own, **kwargs)
    assert (out.double() - true).abs().max() <= 8 * torch.finfo(dtype).eps * true.abs().max() + 1e-4


def test_a_shard_writes_the_runs_of_its_heads():
    layer = make_layer(Case("groups", key_ranks=(32, 64), value_ranks=(48, 16), key_bits=(8, 4), value_bits=(4,)))
    for rank in range(2):
        part = layer.shard(rank, 2)
        assert part.keys.format == (layer.keys.format[rank],) and part.values.format == (layer.values.format[rank],)
        assert part.k_width == layer.keys.format[rank].nbytes


def test_a_layer_moved_keeps_its_formats():
    layer = make_layer(PACKED[3])
    assert layer.to(dtype=torch.float16).keys.format == layer.keys.format


@pytest.mark.parametrize(
    ("side", "given", "message"),
    [
        ("keys", uniform(48, 8), r"format: expected segments of the ranks \(32,\), got ranks \(48,\)"),
        (
            "values",
            (uniform(48, 8), uniform(48, 8)),
            r"format: expected segments of the ranks \(48,\), got ranks \(48, ",
        ),
        ("keys", 8, "format: expected None, a Format or one for each group, got 8"),
        ("keys", (8,), r"format: expected None, a Format or one for each group, got \(8,\)"),
    ],
)
def test_formats_that_do_not_fit_are_refused(side, given, message):
    layer = make_layer(Case("plain"))
    with pytest.raises(ValueError, match=message):
        replace(getattr(layer, side), format=given)


def test_groups_of_different_widths_are_refused():
    layer = make_layer(Case("groups", key_ranks=(32, 48)))
    with pytest.raises(ValueError, match=r"format: expected the same widths in every group, got \[\(4,\), \(8,\)\]"):
        replace(layer.keys, format=(uniform(32, 8), uniform(48, 4)))


def test_keys_that_read_a_shared_row_have_no_format():
    layer = make_layer(Case("joint", shared=True, key_ranks=(32,), value_ranks=(32,)))
    with pytest.raises(ValueError, match=r"shared: expected keys\.format to be None"):
        replace(layer, keys=replace(layer.keys, format=uniform(32, 8)))


def test_a_cache_of_another_format_is_refused_and_untouched():
    plain_layer = make_layer(Case("plain"), torch.float32)
    layer = make_layer(Case("packed", key_bits=(8,), value_bits=(4,)), torch.float32)
    wider = make_layer(Case("wider", key_bits=(4, 2), value_bits=(4,)), torch.float32)
    zk, zv, slots = torch.randn(3, 32), torch.randn(3, 48), torch.arange(3)
    caches = [x.fill_(7) for x in lrattn.allocate_cache(plain_layer, 2, 16)]
    with pytest.raises(ValueError, match=r"k_cache: expected uint8 for the layer's packed latents, got torch\.float32"):
        lrattn.write_latents(layer, zk, zv, *caches, slots)
    packed = [x.fill_(7) for x in lrattn.allocate_cache(layer, 2, 16)]
    with pytest.raises(ValueError, match=r"k_cache: expected the layer's dtype torch\.float32, got torch\.uint8"):
        lrattn.write_latents(plain_layer, zk, zv, *packed, slots)
    with pytest.raises(ValueError, match=rf"k_cache: expected shape \[N, P, {wider.k_width}\], got \[2, 16, 36\]"):
        lrattn.write_latents(wider, zk, zv, *packed, slots)
    with pytest.raises(ValueError, match=r"v_cache: expected uint8 for the layer's packed latents, got torch\.float32"):
        lrattn.write_latents(layer, zk, zv, packed[0], caches[1], slots)
    assert all((x == 7).all() for x in (*caches, *packed))


def test_rows_that_do_not_begin_at_words_are_refused():
    layer = make_layer(Case("packed", key_bits=(8,), value_bits=(4,)), torch.float32)
    _, v_cache = lrattn.allocate_cache(layer, 2, 16)
    odd = torch.empty(2, 16, layer.k_width + 3, dtype=torch.uint8)[..., 3:]
    with pytest.raises(ValueError, match=r"k_cache: expected rows at multiples of 4 bytes, got strides"):
        lrattn.write_latents(layer, torch.randn(1, 32), torch.randn(1, 48), odd, v_cache, torch.arange(1))


def test_packed_factors_are_not_narrowed():
    _, factors = compressed()
    with pytest.raises(ValueError, match="format: expected plain latents to take some of"):
        lrattn.narrowed(factors, 0.1)


def test_info_shows_bits_and_bytes(tmp_path, capsys):
    _, factors = compressed(shared="ride", keep=0.2)
    factors.save(tmp_path / "f")
    main(["info", str(tmp_path / "f")])
    shown = capsys.readouterr().out
    assert f"{factors.bytes_per_token:,} of 1,536 bytes a token, {16 * factors.keep:.2f} bits a number" in shown
    for layer in factors.layers:
        assert " ".join(f"{rank}x{bits}" for rank, bits in layer.values.formats[0].segments) in shown


# Files.


def test_formats_are_saved_with_the_factors(tmp_path):
    _, factors = compressed(shared="ride")
    factors.save(tmp_path / "f")
    again = lrattn.Factors.load(tmp_path / "f")
    assert [x.values.format for x in again.layers] == [x.values.format for x in factors.layers]
    assert again.keep == factors.keep and again.predicted == factors.predicted


# Models.


def scored(model, factors, ids):
    with torch.no_grad(), latent_attention(model, factors):
        return model(ids, use_cache=False).logits


@pytest.mark.every(3)
@pytest.mark.parametrize("shared", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_from_a_packed_cache_is_scoring(family, shared):
    """Prefill attends on what the cache will give back, not on what it was given."""
    model, factors = compressed(family, shared=shared)
    ids = tiny.tokens(2, 40)
    expected = scored(model, factors, ids)
    cache = LatentCache(factors)
    with torch.no_grad(), latent_attention(model, factors):
        got = [model(part, **cache_argument(cache)).logits for part in ids.split((20, 1, 1, 12, 6), 1)]
    error = torch.cat(got, 1) - expected  # where a sum is rounded another way, a code may be the next one
    assert error.abs().max() < 0.03 and error.square().mean().sqrt() < 2e-3
    unpacked = [
        replace(x, keys=replace(x.keys, format=None), values=replace(x.values, format=None)) for x in factors.layers
    ]
    assert (scored(model, replace(factors, layers=unpacked), ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bytes_of_a_packed_cache(family):
    model, factors = compressed(family)
    cache = LatentCache(factors)
    with torch.no_grad(), latent_attention(model, factors):
        model(tiny.tokens(2, 64), **cache_argument(cache))
    assert cache.nbytes == 128 * factors.bytes_per_token + 2 * 4 * 4  # and the block table
    assert f"keep={factors.keep:.3f}" in repr(cache)


def test_crop_and_go_on():
    model, factors = compressed("qwen2")
    ids = tiny.tokens(1, 30)
    expected = scored(model, factors, ids)
    cache = LatentCache(factors, recent=4)
    with torch.no_grad(), latent_attention(model, factors):
        model(ids, **cache_argument(cache))
        cache.crop(-10)
        got = model(ids[:, 20:], **cache_argument(cache)).logits
    assert cache.get_seq_length() == 30 and got.isfinite().all() and got.shape == expected[:, 20:].shape


def test_sixteen_bits_everywhere_is_plain():
    model, factors = compressed(keep=1.0, bits=16, shared=True)
    given = [tuple(lrattn.Format(((rank, 16),)) for rank in x.values.ranks) for x in factors.layers]
    layers = [replace(x, values=replace(x.values, format=f)) for x, f in zip(factors.layers, given, strict=True)]
    factors = replace(factors, layers=layers)
    ids = tiny.tokens(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(scored(model, factors, ids), model(ids).logits, rtol=0, atol=0.05)
