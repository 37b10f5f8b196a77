"""Factors with packed latents: bytes met, folds exact; caches, files, models and bad input."""

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from cases import PACKED, Case, latents, make, make_layer, there
from heads import heads_of, latents_of, rebuilt
from packing import plain, poison, read_cache

import lrattn
from lrattn.__main__ import main
from lrattn.attention.cache import stored
from lrattn.factors.formats import uniform
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.models.interface import cache_argument

FAMILIES = tuple(tiny.CONFIGS)
FORMS = (False, "ride", True)
KEEP = {"mqa": 0.45}  # a row of 32 latents has 16 bytes or 32


def compressed(family="llama", **kwargs):
    model, keep = tiny.model(family), KEEP.get(family, 0.3)
    given = {"method": "lrattn-rebuilt", "keep": keep, "bits": "auto", "far": (0, 0), "progress": False} | kwargs
    return model, lrattn.compress(model, [tiny.tokens(4, 40)], **given)


def formats_of(factors):
    return [f for layer in factors.layers for side in (layer.keys, layer.values) for f in side.formats]


@pytest.mark.every(5)
@pytest.mark.parametrize("shared", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_from_below(family, shared):
    _model, factors = compressed(family, shared=shared)
    caches = [x for layer in factors.layers for x in there(*lrattn.allocate_cache(layer, 1, 16))]
    assert sum(x.nbytes for x in caches) == 16 * factors.bytes_per_token  # scales and padding included
    assert all(x.dtype == torch.uint8 for x in caches)
    step = 20 * max(len(layer.values.ranks) for layer in factors.layers)  # in every group of a row, and a word
    most = KEEP.get(family, 0.3) * factors.dense_bytes_per_token
    assert most - step < factors.bytes_per_token <= most
    assert len(set(formats_of(factors))) > 1
    assert len(factors.predicted) == len(factors.layers) and all(x > 0 for x in factors.predicted)


@pytest.mark.parametrize("nbytes", [160, 231, 400])
def test_bytes_a_token_instead_of_a_share(nbytes):
    _, factors = compressed(keep=None, bytes_per_token=nbytes)
    assert nbytes - 16 < factors.bytes_per_token <= nbytes


@pytest.fixture(scope="module")
def foreseen():
    """The loss that is foreseen of factors of one model, made from the same moments."""
    model = tiny.model("llama")
    moments = lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=["before", "metric"], progress=False)
    fixed = {"method": "lrattn-rebuilt", "moments": moments, "progress": False}
    return lambda **given: sum(lrattn.compress(model, **fixed, **given).predicted)


@pytest.mark.parametrize("shared", FORMS)
def test_more_bytes_foresee_less_loss(shared, foreseen):
    """Until all latents have 8 bits."""
    lost = [foreseen(keep=keep, bits="auto", shared=shared) for keep in (0.1, 0.2, 0.4, 0.7, 1.0)]
    assert lost == sorted(lost, reverse=True) and lost[-1] == lost[-2] < 0.02 * lost[0]


def test_bits_lose_less_than_ranks_at_the_same_bytes(foreseen):
    """And every width the ladder has lowers what is foreseen."""
    lost = {bits: foreseen(keep=0.08, bits=bits, shared=True) for bits in (16, 8, 4, (2, 4), "auto")}
    assert lost["auto"] <= lost[2, 4] <= lost[4] < lost[8] < lost[16]


@pytest.mark.every(3)
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
    for layer, heads in zip(whole.layers, heads_of(model, tiny.tokens(1, 40)), strict=True):
        torch.testing.assert_close(rebuilt(layer, *heads), heads, rtol=0, atol=2e-4)


def test_deviations_are_folded_in():
    """Latents of the calibration text have a mean square of one; those past the 96 that it has are no larger."""
    model, factors = compressed(shared=True)
    for layer, heads in zip(factors.layers, heads_of(model, tiny.tokens(4, 40)), strict=True):
        sizes = latents_of(layer, *heads)[0].square().mean((0, 1))
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
    least = keep * factors.dense_bytes_per_token - 16
    assert (full or least < factors.bytes_per_token) and factors.bytes_per_token <= keep * factors.dense_bytes_per_token
    with torch.no_grad(), latent_attention(model, factors):
        assert model(tiny.tokens(1, 30)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, r"bits: expected 'auto', one of \(16, 8, 4, 2\) or some of them, got 5"),
        ({"bits": "auto", "method": "palu"}, "bits: expected one number with method 'palu' and ranks 'spectrum'"),
        ({"bits": (4, 2), "ranks": "uniform"}, "bits: expected one number with method 'lrattn-rebuilt' and ranks"),
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
    zk, zv = latents(layer, 20)
    for cache in there(*caches):
        cache.fill_(poison(cache.dtype))
    slots = torch.arange(20).flip(0) + 5
    lrattn.write_latents(layer, zk, zv, *caches, slots)
    assert sum(x[0, 0].nbytes for x in there(*caches)) >= layer.bytes_per_token
    for cache, side, expected in zip(caches, (layer.row_side, layer.values), stored(layer, zk, zv)):
        if cache is None:
            continue
        read = (read_cache(cache, side.formats) if side.formats else cache.double()).flatten(0, 1)
        torch.testing.assert_close(read[slots], expected.double(), rtol=1e-6, atol=1e-9)
        assert read[:5].isnan().all() and read[25:].isnan().all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_page_by_hand(bits):
    """The runs of all tokens, then their words: of two groups of 16 and 48 latents, padded, in pages of 16 tokens."""
    layer = make_layer(Case("two", key_ranks=(16, 48), key_bits=(bits,)), torch.float32)
    first, second = 16, -(-48 * bits // 128) * 16
    cache = torch.full((2, 16, first + second + 8), 7, dtype=torch.uint8)
    zk, zv = latents(layer, 2)
    zk[1] = torch.nan
    lrattn.write_latents(layer, zk, zv, cache, lrattn.allocate_cache(layer, 2, 16)[1], torch.tensor([19, 21]))
    assert (cache[0] == 7).all()
    page = cache[1].flatten()
    runs, words = page[: 16 * (first + second)].view(16, -1), page[16 * (first + second) :].view(16, 2, 4)
    others = [t for t in range(16) if t not in (3, 5)]
    assert (runs[others] == 7).all() and (words[others] == 7).all()
    assert (words[5] == torch.tensor([255, 0, 0, 0])).all()  # of nothing finite
    assert (words[3, :, 1:] == 0).all() and ((words[3, :, 0] >= 8) & (words[3, :, 0] < 255)).all()
    for begin, latent, rank in ((0, 0, 16), (first, 16, 48)):
        scale = int(words[3, latent // 16, 0])
        step = (1 + scale % 8 / 8) * 2.0 ** (scale // 8 - 23)
        halfwords = runs[3, begin : begin + rank * bits // 8].view(torch.int16).int() & 0xFFFF
        for i in range(rank):
            plane, h = divmod(i, len(halfwords))
            code = (int(halfwords[h]) >> (plane * bits)) & (2**bits - 1)
            cut = zk[0, latent + i].clamp(-step * 2 ** (bits - 1), step * 2 ** (bits - 1)).item()
            assert abs((code - (2**bits - 1) / 2) * step - cut) <= step / 2 * 1.0001
        assert (runs[3, begin + rank * bits // 8 : begin + -(-rank * bits // 128) * 16] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_layers_are_as_good_as_wide_ones(dtype):
    case = Case("both", key_bits=(8, 4), value_bits=(8, 4), M=2, lens=(60, 33))
    problem = make(case, dtype)
    layer, q, k_cache, v_cache, kwargs = problem
    out = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    own, *tensors, _ = plain(problem)
    true = lrattn.decode_attention(*tensors, own, **kwargs)
    assert (out.double() - true).abs().max() <= 8 * torch.finfo(dtype).eps * true.abs().max() + 1e-4


def test_a_part_of_a_layer_and_a_layer_moved_keep_their_formats():
    layer = make_layer(Case("groups", key_ranks=(32, 64), value_ranks=(48, 16), key_bits=(8, 4), value_bits=(4,)))
    for rank in range(2):
        part = layer.shard(rank, 2)
        assert part.keys.format == (layer.keys.format[rank],) and part.values.format == (layer.values.format[rank],)
        assert part.k_width == layer.keys.format[rank].nbytes
    assert layer.to(dtype=torch.float16).keys.format == layer.keys.format


def test_formats_that_do_not_fit_are_refused():
    layer = make_layer(Case("groups", key_ranks=(32, 48)))
    for message, given in {
        r"format: expected segments of the ranks \(32, 48\), got ranks \(48, 48\)": (uniform(48, 8),) * 2,
        r"format: expected segments of the ranks \(32, 48\), got ranks \(32, 32\)": uniform(32, 8),
        r"format: expected segments of the ranks \(32, 48\), got ranks \(32,\)": (uniform(32, 8),),
        "format: expected None, a Format or one for each group, got 8": 8,
        r"format: expected None, a Format or one for each group, got \(8,\)": (8,),
        r"format: expected the same widths in every group, got \[\(4,\), \(8,\)\]": (uniform(32, 8), uniform(48, 4)),
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(layer.keys, format=given)
    joint = make_layer(Case("joint", shared=True, key_ranks=(32,), value_ranks=(32,)))
    with pytest.raises(ValueError, match=r"shared: expected keys\.format to be None"):
        replace(joint, keys=replace(joint.keys, format=uniform(32, 8)))


def test_a_cache_of_another_format_is_refused_and_untouched():
    plain_layer = make_layer(Case("plain"), torch.float32)
    layer = make_layer(Case("packed", key_bits=(8,), value_bits=(4,)), torch.float32)
    narrower = make_layer(Case("narrower", key_bits=(4,), value_bits=(4,)), torch.float32)
    zk, zv, slots = torch.randn(3, 32), torch.randn(3, 48), torch.arange(3)
    caches = [x.fill_(7) for x in lrattn.allocate_cache(plain_layer, 2, 16)]
    packed = [x.fill_(7) for x in lrattn.allocate_cache(layer, 2, 16)]
    cut = torch.empty(2, 16, layer.k_width + 16, dtype=torch.uint8)[..., 16:]
    odd = torch.empty(2, 16 * layer.k_width + 8, dtype=torch.uint8)[:, :-8].unflatten(1, (16, -1))
    late = torch.empty(2 * 16 * layer.k_width + 8, dtype=torch.uint8)[8:].view(2, 16, -1)
    apart = rf"k_cache: expected pages at multiples of 16 bytes, whose {layer.k_width} bytes a token lie together, got "
    for message, (own, *given) in {
        r"k_cache: expected uint8 for the layer's packed latents, got torch\.float32": (layer, *caches),
        r"v_cache: expected uint8 for the layer's packed latents, got torch\.float32": (layer, packed[0], caches[1]),
        r"k_cache: expected the layer's dtype torch\.float32, got torch\.uint8": (plain_layer, *packed),
        rf"k_cache: expected shape \[N, P, {narrower.k_width}\], got \[2, 16, 36\]": (narrower, *packed),
        apart + r"strides \(832, 52, 1\) from 16 on": (layer, cut, packed[1]),
        apart + r"strides \(584, 36, 1\) from 0 on": (layer, odd, packed[1]),
        apart + r"strides \(576, 36, 1\) from 8 on": (layer, late, packed[1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            lrattn.write_latents(own, zk, zv, *given, slots)
    assert all((x == 7).all() for x in (*caches, *packed))


def test_packed_factors_are_not_narrowed():
    _, factors = compressed()
    with pytest.raises(
        ValueError, match=r"factors: expected plain latents to take 0\.1 of, got packed ones: make some"
    ):
        lrattn.narrowed(factors, 0.1)


def test_info_shows_bits_and_bytes(tmp_path, capsys):
    _, factors = compressed(shared="ride", keep=0.2)
    factors.save(tmp_path / "f")
    main(["info", str(tmp_path / "f")])
    shown = capsys.readouterr().out
    assert f"{factors.bytes_per_token:,} of 1,536 bytes a token, {16 * factors.keep:.2f} bits a number" in shown
    for layer in factors.layers:
        assert " ".join(f"{rank}x{bits}" for rank, bits in layer.values.formats[0].segments) in shown


# Models.


def scored(model, factors, ids):
    with torch.no_grad(), latent_attention(model, factors):
        return model(ids, use_cache=False).logits


@pytest.mark.every(6)
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
    assert error.abs().max() < 0.05 and error.square().mean().sqrt() < 2e-3
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
