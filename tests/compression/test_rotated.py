"""Latents of rotated keys: the record, its shards and files, and models on them."""

from dataclasses import replace

import pytest
import tiny
import torch

import lrattn
from lrattn.factors.parts import attention_parts
from lrattn.factors.summary import summarize, table
from lrattn.integrations.transformers import LatentCache, latent_attention

HKV, D, E = 4, 8, 24


def layer_of(order=(2, 0, 3, 1), ranks=(16, 32), dtype=torch.float64, **changes):
    """Random factors of rotated keys; each group's latents are of the keys of its own heads."""
    g = torch.Generator().manual_seed(0)
    up = torch.randn(HKV, max(ranks), D, generator=g, dtype=torch.float64)
    size = HKV // len(ranks)
    down = torch.zeros(HKV, D, sum(ranks), dtype=torch.float64)
    for i, rank in enumerate(ranks):
        heads, start = list(order[i * size : (i + 1) * size]), sum(ranks[:i])
        up[heads, rank:] = 0
        down[heads, :, start : start + rank] = torch.randn(size, D, rank, generator=g, dtype=torch.float64)
    keys = lrattn.Projection(
        up, ranks, down.flatten(0, 1), bias=torch.randn(HKV, D, generator=g).double(), head_order=order
    )
    values = lrattn.Projection(
        up=torch.randn(HKV, 16, D, generator=g).double(), ranks=(16,), down=torch.randn(E, 16, generator=g).double()
    )
    fields = {"keys": keys, "values": values, "rope": None, "rotated": True} | changes
    return lrattn.LayerFactors(**fields).to(dtype=dtype)


def inputs(*lead):
    g = torch.Generator().manual_seed(1)
    return torch.randn(*lead, E, generator=g).double(), torch.randn(*lead, HKV, D, generator=g).double()


def test_latents_are_of_the_keys_and_rebuild_to_them():
    layer = layer_of()
    x, keys = inputs(2, 3)
    zk, zv = layer.project(x, keys)
    torch.testing.assert_close(zk, keys.flatten(-2) @ layer.keys.down)
    torch.testing.assert_close(zv, x @ layer.values.down)
    weight = layer.keys.dense().flatten(0, 1)  # [Hkv * D, Hkv * D]: rebuilt keys of keys
    expected = (keys.flatten(-2) @ weight.T).unflatten(-1, (HKV, D)) + layer.keys.bias
    torch.testing.assert_close(layer.rebuild(zk, zv)[0], expected)
    assert layer.k_width == 48 and layer.v_width == 16


def test_what_rotated_keys_cannot_have_is_refused_by_name():
    layer = layer_of()
    keys, values = layer.keys, layer.values
    for message, changes in {
        "rope: expected none for rotated keys": {"rope": lrattn.Rope(1e4, D, 16)},
        "key_norm: expected none for rotated keys": {"key_norm": lrattn.KeyNorm(torch.ones(D))},
        "shared: expected none for rotated keys": {"shared": True},
        r"keys\.down: expected shape \[32, sumRk\], got \[24, 48\]": {"keys": replace(keys, down=keys.down[:24])},
        r"values\.down: expected shape \[32, sumRv\], got \[24, 16\]": {"rotated": False},
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(layer, **changes)
    assert layer_of(keys=replace(keys, down=None)).keys.down is None  # an engine may write latents of its own
    x, k = inputs(3)
    plain = replace(layer, keys=replace(keys, down=torch.randn(E, 48).double()), rotated=False)
    for message, layer_, arguments in (
        (r"keys: expected \[\.\., Hkv, D\], the layer is rotated, got None", layer, (x,)),
        ("keys: expected None, the layer is not rotated, got a tensor", plain, (x, k)),
        (r"keys: expected shape \[3, 4, 8\], got \[3, 32\]", layer, (x, k.flatten(1))),
        (r"keys: expected shape \[3, 4, 8\], got \[2, 4, 8\]", layer, (x, k[:2])),
        (r"keys: expected \[\.\., 32\] torch.float64 on cpu, got .* torch.float32", layer, (x, k.float())),
        (r"x: expected \[\.\., 24\]", layer, (x[:, :5], k)),
        (r"keys\.down: expected \[Hkv \* D, 48\] to write", replace(layer, keys=replace(keys, down=None)), (x, k)),
        (r"values\.down: expected \[E, 16\]", replace(layer, values=replace(values, down=None)), (x, k)),
    ):
        with pytest.raises(ValueError, match=message):
            layer_.project(*arguments)


@pytest.mark.parametrize("world, ranks", [(1, (16, 32)), (2, (16, 32)), (4, (16, 32, 16, 16)), (8, (16, 32, 16, 16))])
def test_shards_together_are_the_layer(world, ranks):
    """Each is given the keys of its own heads only."""
    layer = layer_of((1, 0, 2, 3) if len(ranks) == 2 else (2, 0, 3, 1), ranks)
    x, keys = inputs(5)
    expected = layer.rebuild(*layer.project(x, keys))
    rebuilt = []
    for rank in range(world):
        part, own = layer.shard(rank, world), slice(rank * HKV // world, -(-(rank + 1) * HKV // world))
        assert part.rotated and part.keys.down.shape[0] == part.num_kv_heads * D
        rebuilt.append(part.rebuild(*part.project(x, keys[:, own])))
    for got, whole in zip(zip(*rebuilt, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(got, 1), whole.repeat_interleave(max(world // HKV, 1), 1))


def test_latents_that_need_the_keys_of_another_shard_are_not_cut():
    with pytest.raises(ValueError, match=r"whole key groups, whose latents need all heads, got \(2, 0\) cut"):
        layer_of((2, 0, 3, 1)).shard(0, 2)
    with pytest.raises(ValueError, match="whole key groups"):
        layer_of((0, 1, 2, 3)).shard(1, 4)
    layer = layer_of((0, 1, 2, 3))
    mixed = replace(layer, keys=replace(layer.keys, down=torch.randn(HKV * D, 48).double()))
    with pytest.raises(ValueError, match=r"keys\.down to read heads \[0, 1\] only"):
        mixed.shard(0, 2)


def test_the_file_says_which_layers_are_rotated(tmp_path):
    plain = layer_of()
    plain = replace(plain, keys=replace(plain.keys, down=torch.randn(E, 48).double()), rotated=False)
    lrattn.Factors((layer_of(), plain)).save(tmp_path / "f")
    loaded = lrattn.Factors.load(tmp_path / "f")
    assert [layer.rotated for layer in loaded.layers] == [True, False]
    assert torch.equal(loaded.layers[0].keys.down, layer_of().keys.down)
    summary = summarize(loaded)
    assert [x["rotated"] for x in summary["layers"]] == [True, False] and "keep" in table(summary)
    assert loaded.to(dtype=torch.float32).layers[0].rotated


def test_a_file_from_before_is_of_keys_that_are_not_rotated(tmp_path, monkeypatch):
    write = lrattn.factors.safefile.write

    def older(path, kind, record, tensors):
        for entry in record["layers"]:
            del entry["rotated"]
        write(path, kind, record, tensors)

    monkeypatch.setattr(lrattn.factors.safefile, "write", older)
    layer = layer_of()
    plain = replace(layer, keys=replace(layer.keys, down=torch.randn(E, 48).double()), rotated=False)
    lrattn.Factors((plain,)).save(tmp_path / "f")
    assert lrattn.Factors.load(tmp_path / "f").layers[0].rotated is False


@torch.no_grad()
def rotated_factors(model, share=1.0, group_size=2):
    """Principal directions of the model's own rotated keys, group by group, about their mean; at share 1 the identity.
    Values are of the exact product."""
    whole = lrattn.compress(model, [tiny.tokens(4, 40)], "svd", keep=1.0, progress=False)
    layers = []
    for part, layer in zip(attention_parts(model), whole.layers, strict=True):
        heads, dim = part.num_kv_heads, part.head_dim
        size = min(group_size, heads)
        order = (*range(0, heads, 2), *range(1, heads, 2))
        x = torch.randn(200, part.linear("k_proj").in_features, generator=torch.Generator().manual_seed(0))
        keys = part.rotated("k", x[None], torch.arange(200)[None])[0]  # [200, Hkv, D]
        rank = 16 * round(share * size * dim / 16)
        up, down = torch.zeros(heads, rank, dim), torch.zeros(heads, dim, rank * heads // size)
        bias = torch.zeros(heads, dim)
        for g in range(heads // size):
            members = list(order[g * size : (g + 1) * size])
            rows = keys[:, members].flatten(1)
            mean = rows.mean(0) if share < 1 else torch.zeros(size * dim)
            axes = torch.eye(size * dim) if share == 1 else torch.linalg.svd(rows - mean, full_matrices=False)[2]
            axes = axes[:rank]  # [rank, C * D]
            up[members] = axes.unflatten(1, (size, dim)).transpose(0, 1)
            down[members, :, g * rank : (g + 1) * rank] = axes.T.unflatten(0, (size, dim))
            bias[members] = (mean - mean @ axes.T @ axes).unflatten(0, (size, dim))
        side = lrattn.Projection(
            up, (rank,) * (heads // size), down.flatten(0, 1), bias=bias if share < 1 else None, head_order=order
        )
        layers.append(lrattn.LayerFactors(side, layer.values, None, rotated=True))
    return lrattn.Factors(layers)


def generate(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, **kwargs)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_full_rank_is_the_original_model(family):
    model = tiny.model(family)
    factors, ids = rotated_factors(model), tiny.tokens(2, 30)
    with torch.no_grad():
        expected, tokens = model(ids).logits, generate(model, ids)
        with latent_attention(model, factors):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-3)
            assert torch.equal(generate(model, ids), tokens)
            cache = LatentCache(model, factors, recent=4)
            model(ids, past_key_values=cache)
            cache.crop(-6)  # refills the window from latents
            last = model(ids[:, -6:], past_key_values=cache).logits
            torch.testing.assert_close(last, expected[:, -6:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("recent, sinks", [(0, 0), (5, 2)])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_way_to_extend_is_the_scoring_pass(family, recent, sinks):
    """At half the rank, with a constant added to the rebuilt keys."""
    model = tiny.model(family)
    factors, ids = rotated_factors(model, 0.5), tiny.tokens(2, 60)
    cache = LatentCache(model, factors, recent=recent, sinks=sinks)
    with torch.no_grad(), latent_attention(model, factors, recent=recent, sinks=sinks):
        expected = model(ids, use_cache=False).logits
        got = [model(part, past_key_values=cache).logits for part in ids.split((7, 1, 3, 40, 1, 8), 1)]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)
        assert torch.equal(generate(model, ids[:, :9]), generate(model, ids[:, :9], use_cache=False))
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() > 0.05


@pytest.mark.slow
def test_the_kernels_generate_the_same(request):
    if request.config.getoption("--gpu"):
        pytest.skip("the model is on the CPU, where kernels are interpreted only")
    model = tiny.model("qwen3")
    factors, ids, logits = rotated_factors(model, 0.5), tiny.tokens(2, 14), []
    for backend in ("reference", "triton"):
        cache = LatentCache(model, factors, recent=3)
        with torch.no_grad(), latent_attention(model, factors, backend):
            logits.append(torch.cat([model(x, past_key_values=cache).logits for x in ids.split((9, 3, 1, 1), 1)], 1))
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


def test_factors_that_do_not_fit_the_model_are_refused():
    model = tiny.model("qwen3")
    factors = rotated_factors(model, 0.5)
    layer = factors.layers[0]
    LatentCache(model, factors)
    permuted = layer.keys.down.unflatten(0, (4, 32))[[1, 0, 3, 2]].flatten(0, 1)
    bias = torch.ones(4, 32)
    for message, changed in {
        r"low-rank map of model\.layers\.0\.self_attn\.k_proj": replace(layer, keys=replace(layer.keys, down=permuted)),
        "the value bias of": replace(layer, values=replace(layer.values, bias=bias)),
        r"keys\.down in layer 0, to write latents": replace(layer, keys=replace(layer.keys, down=None)),
    }.items():
        with pytest.raises(ValueError, match=message):
            LatentCache(model, lrattn.Factors((changed, *factors.layers[1:])))
    with pytest.raises(ValueError, match=r"\(Hkv, D, E\) = \(4, 32, 96\) in layer 0"):
        LatentCache(model, rotated_factors(tiny.model("mha")))
    with pytest.raises(ValueError, match=r"self_attn\.v_proj, got that of other weights"):
        LatentCache(model, rotated_factors(tiny.model("qwen3", seed=1), 0.5))
    with (
        pytest.raises(ValueError, match="max_position=512 tokens, got 513"),
        latent_attention(model, factors),
        torch.no_grad(),
    ):
        model(tiny.tokens(1, 513))
