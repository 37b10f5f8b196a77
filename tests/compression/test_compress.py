"""Methods and compress: exact where exactness is known, optimal where optimality is known."""

import copy
import sys
from dataclasses import replace
from functools import cache
from itertools import cycle

import architectures
import numpy as np
import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from heads import errors, heads_of, latents_of, positions_for, rebuilt
from latents import random_factors
from test_refine import stopped_at

import lrattn
from lrattn.compression import methods
from lrattn.compression.methods.palu import decompose
from lrattn.compression.moments import about
from lrattn.compression.ranks import RULES
from lrattn.factors.layer import sides_of
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.models.layers import attention_layers
from lrattn.models.weights import bias

FAMILIES = tuple(tiny.CONFIGS)
SHORT = 8  # tokens of the longest pass that is made to know a model
package = sys.modules["lrattn.compression.compress"]  # lrattn.compress is the function


def problem(heads=2, head_dim=16, inputs=40, seed=0):
    """Weights that make heads of inputs, and inputs of a text."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(heads * head_dim, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(500, inputs, generator=g, dtype=torch.float64) @ torch.randn(inputs, inputs, generator=g).double()
    return w, x


def heads_made(w, x, heads=2):
    """Which input each head is, [C, D, C * D], and the second moment of the heads, as a method is given them."""
    h = x @ w.T
    return torch.eye(len(w), dtype=w.dtype).unflatten(0, (heads, -1)), h.T @ h


def loss(h, up, down):
    return (h - h @ down @ up.transpose(0, 1).flatten(1)).square().sum()


def dense(up, down, rank=None):
    """The map [C * D, C * D] of factors cut at a rank, from the left."""
    return up[:, :rank].transpose(0, 1).flatten(1).T @ down[:, :rank].T


@pytest.mark.parametrize("inputs", [40, 24])  # more and fewer than the 32 numbers they make
@pytest.mark.parametrize("tokens", [500, 8])
def test_full_rank_is_exact_also_where_the_calibration_never_looked(tokens, inputs):
    w, x = problem(inputs=inputs)
    x = x[:tokens]
    energies, up, down = decompose(*heads_made(w, x))
    assert energies.shape == (32,) and up.shape == (2, 32, 16) and down.shape == (32, 32)
    assert (energies.diff() <= 1e-9 * energies[0]).all()
    torch.testing.assert_close(dense(up, down), torch.eye(32, dtype=w.dtype))
    seen = min(tokens, inputs, 32)
    assert loss(x @ w.T, up[:, :seen], down[:, :seen]) < 1e-4 * loss(x @ w.T, up * 0, down)


def least_squares(w, x, down):
    """OVC as printed, on rows of real inputs: lstsq for L, the pseudo-inverse for R."""
    left = torch.linalg.lstsq(x @ down, x @ w.T, driver="gelsd").solution.T
    return left, torch.linalg.pinv(left) @ w


def test_ovc_is_the_paper_s_least_squares():
    """In the paper latents are maps of inputs, R x; here of values, with R = down^T W."""
    w, x = problem()
    selects, moment = heads_made(w, x)
    down = decompose(selects, moment)[2][:, :16]
    other = x * torch.linspace(0.1, 3, 40, dtype=torch.float64)
    left, right = least_squares(w, other, w.T @ down)
    up, refitted = methods.recalkv.calibrate_values(selects, down, heads_made(w, other)[1])
    torch.testing.assert_close(up.transpose(0, 1).flatten(1).T, left, rtol=1e-3, atol=1e-3 * left.abs().max().item())
    torch.testing.assert_close(refitted.T @ w, right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


def test_ovc_changes_nothing_on_the_data_it_was_whitened_with_and_lowers_the_loss_on_other_data():
    w, x = problem()
    selects, moment = heads_made(w, x)
    _, up, down = decompose(selects, moment)
    up, down = up[:, :16], down[:, :16]
    again = methods.recalkv.calibrate_values(selects, down, moment)
    torch.testing.assert_close(dense(*again), dense(up, down), rtol=1e-3, atol=1e-3)
    other = x * torch.linspace(0.1, 3, 40, dtype=torch.float64)
    moment = heads_made(w, other)[1]
    refitted = methods.recalkv.calibrate_values(selects, down, moment)
    _, best_up, best_down = decompose(selects, moment)
    before, after = loss(other @ w.T, up, down), loss(other @ w.T, *refitted)
    assert after < 0.9 * before
    assert loss(other @ w.T, best_up[:, :16], best_down[:, :16]) <= after * (1 + 1e-9)  # re-whitening is the limit


def test_ovc_keeps_full_rank_exact():
    w, x = problem()
    selects, moment = heads_made(w, x)
    _, _, down = decompose(selects, moment)
    padded = torch.cat((down, down.new_zeros(len(down), 16)), 1)  # ranks are multiples of 16
    up, refitted = methods.recalkv.calibrate_values(selects, padded, moment)
    torch.testing.assert_close(dense(up, refitted), torch.eye(32, dtype=w.dtype), rtol=1e-5, atol=1e-5)


@cache
def unchanged(name):
    """A model that no test changes."""
    return (tiny if name in tiny.CONFIGS else architectures).model(name)


def compressed(model, *args, **kwargs):
    return lrattn.compress(model, *args, **{"far": (0, 0), "progress": False} | kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_reads_every_family(family):
    model = unchanged(family)
    factors = compressed(model, [tiny.tokens(4, 40)], keep=0.3, group_size=4)
    assert len(factors.layers) == 3 and factors.method == "lrattn" and len(factors.predicted) == 3
    assert 0.3 - 32 / factors.dense_bytes_per_token < factors.keep <= 0.3
    for layer, own, sample in zip(factors.layers, attention_layers(model), factors.samples, strict=True):
        assert layer.keys.group_size == min(4, own.num_kv_heads) and layer.rope is not None
        assert (layer.keys.offset is not None) == (family in ("llama3", "qwen2", "qwen2-window"))
        assert all((sample == p.detach().flatten()[0]).any() for p in own.module.parameters())


@pytest.mark.parametrize("method, keep", [("svd", 0.3), ("asvd", 0.3), ("palu", 0.3), ("eigen", 0.5)])
def test_bias_takes_no_part_in_the_low_rank_map(method, keep):
    """Twin models that differ in the k bias only, and see the same inputs in layer 0: what is mapped is the rest."""
    plain, biased = (tiny.model("qwen2", dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for layer in attention_layers(biased):
            layer.module.k_proj.bias += 8.0
    a, b = (compressed(m, [tiny.tokens(2, 40)], method, keep).layers[0] for m in (plain, biased))
    torch.testing.assert_close(a.keys.dense(), b.keys.dense(), rtol=0, atol=1e-3)
    torch.testing.assert_close(a.keys.offset + 8.0, b.keys.offset, rtol=0, atol=1e-4)
    if methods.METHODS[method].reads_weights:
        assert torch.equal(a.keys.offset, bias(attention_layers(plain)[0], "keys"))


@pytest.mark.parametrize("method, rotated", [("palu", False), ("kv-heads", True), ("lrattn", False)])
def test_the_mean_stands_for_biases(method, rotated):
    """Of models that have some, of the keys as they are stored, and of the values."""
    model, ids = unchanged("qwen2"), tiny.tokens(4, 40)
    factors = compressed(model, [ids], method, 0.4)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        stored = [*heads] if rotated else [layer.rope.turn_back(heads[0], positions_for(layer, heads[0])), heads[1]]
        for side, x in zip((layer.keys, layer.values), stored, strict=True):
            torch.testing.assert_close(side.offset, x.flatten(0, 1).mean(0), rtol=0, atol=1e-4)
    assert all(x.keys.offset is x.values.offset is None for x in compressed(unchanged("llama"), [ids], method).layers)


def test_compress_does_not_change_the_model_and_repeats_exactly():
    model, ids = tiny.model("llama"), tiny.tokens(2, 40)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attention = model.config._attn_implementation
    first, second = (compressed(model, [ids]) for _ in range(2))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config._attn_implementation == attention
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(first.layers, second.layers, strict=True))
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    third = compressed(model, moments=moments)
    assert all(torch.equal(a.values.down, b.values.down) for a, b in zip(first.layers, third.layers, strict=True))


CHOICES = [(name, False) for name in methods.METHODS] + [("lrattn", "ride"), ("lrattn", True)]


def maps(factors):
    """Of each layer's keys and values, [inputs, n]."""
    return [side.dense() for layer in factors.layers for side in sides_of(layer.keys, layer.values)]


def selecting(layer):
    """What the two of a layer are at full rank."""
    n = layer.num_kv_heads * layer.head_dim
    eye = torch.eye(2 * n if layer.shared else n)
    return [eye[:, :n], eye[:, -n:]]


def least_keep(method):
    """A share of this model's bytes that leaves room: a step of 16 a group of one head of 32 is half of it."""
    return 0.8 if method.whole_values else 0.6 if method.groups == methods.HEAD else 0.4


@cache
def narrow(family):
    """Two kv heads of the four; to be left as it is."""
    config = copy.deepcopy(tiny.CONFIGS[family])
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return tiny.built(config, 0)


def turns():
    """Each method and form of rows with its own rule, and by thirds with others; with families in turn, all that any
    rule can serve."""
    readable, others = cycle(["llama", "mistral", "qwen2"]), cycle(["gemma3", "qwen2", "qwen3"])
    for i, rule in enumerate(RULES):
        for j, (method, shared) in enumerate(CHOICES):
            recipe = methods.METHODS[method]
            if rule == recipe.ranks or ((i + j) % 3 == 0 and recipe.ruled_by(rule)):
                reads = recipe.reads_weights or rule in ("fisher", "condition")
                yield method, shared, rule, next(readable if reads else others)


@pytest.mark.parametrize("method, shared, ranks, family", list(turns()))
def test_every_method_and_every_rule_meets_the_budget(method, shared, ranks, family):
    """From below, to a step of 16 latents."""
    model, keep = narrow(family), least_keep(methods.METHODS[method])
    factors = compressed(model, [tiny.tokens(4, 40)], method, keep, 2, ranks=ranks, shared=shared)
    assert keep - 32 / factors.dense_bytes_per_token < factors.keep <= keep
    assert (factors.method, factors.rule) == (method, ranks)


@pytest.mark.parametrize("method, shared, ranks, family", [x for x in turns() if x[2] == methods.METHODS[x[0]].ranks])
def test_every_method_is_exact_at_full_rank(method, shared, ranks, family):
    """With groups of two of four heads, clustered by some."""
    model, ids = unchanged(family), tiny.tokens(4, 40)
    factors = compressed(model, [ids], method, 1.0, 2, shared=shared)
    assert (factors.method, factors.rule, factors.keep) == (method, ranks, 1.0)
    for got, expected in zip(maps(factors), (x for layer in factors.layers for x in selecting(layer)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        assert max(errors(layer, *heads)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "architecture, method", [("Llama, yarn", "lrattn"), ("GLM-4", "palu"), ("gpt-oss", "kv-heads")]
)
def test_in_16_bits_rounding_is_all_that_is_lost_at_full_rank(architecture, method, dtype):
    """The rotation that is found, and the factors, are those of a model that was loaded so."""
    model, ids = copy.deepcopy(unchanged(architecture)), architectures.tokens(2, 40)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    for layer, heads in zip(compressed(model, [ids], method, 1.0).layers, heads_of(model, ids), strict=True):
        assert layer.dtype == dtype and (layer.rope is None) == (method == "kv-heads")
        assert max(errors(layer, *heads)) < torch.finfo(dtype).eps


def metric_lost(moments, layer, i):
    """What a layer's low-rank keys and values cost, by the metric of moments with "metric"."""
    total, n = 0.0, layer.num_kv_heads * layer.head_dim
    sides = layer.keys, layer.values
    offset = torch.cat([torch.zeros(n) if x.offset is None else x.offset.flatten() for x in sides]).double()
    for name, side, own in zip(("keys", "values"), sides, (slice(n), slice(n, None)), strict=True):
        g, c = moments.metric(i, name)
        off = torch.eye(n, dtype=torch.float64) - side.dense().double()
        total += torch.trace(g @ off.T @ about(c, offset)[own, own] @ off).item()
    return total


FORMS = cycle([("lrattn", False), ("lrattn", "ride"), ("lrattn", True), ("lrattn-rotated", False), ("palu", False)])


@pytest.mark.parametrize("architecture, method, shared", [(name, *next(FORMS)) for name in ARCHITECTURES])
def test_every_architecture_is_exact_at_full_rank(architecture, method, shared):
    """With the layers it has keys in, the ropes it has, and whatever its attention does to scores."""
    model, ids = unchanged(architecture), architectures.tokens(2, 40)
    factors = compressed(model, [ids], method, 1.0, shared=shared)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        assert max(errors(layer, *heads)) < 1e-5
        assert layer.shared == bool(shared)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loses_less_than_by_second_moments_and_those_less_than_by_random_maps(architecture):
    """In the metric of the loss: at half of the rank of each side."""
    model, ids = unchanged(architecture), architectures.tokens(4, 40)
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    choice = {"keep": 0.5, "ranks": "uniform", "moments": moments}
    own, palu = compressed(model, **choice, shared=False), compressed(model, method="palu", **choice)
    random, lost = random_factors(model, 0.5, ropes=[layer.rope for layer in own.layers]), [0.0, 0.0, 0.0]
    for i, layers in enumerate(zip(own.layers, palu.layers, random.layers, strict=True)):
        sides = [replace(getattr(layers[2], x), offset=getattr(layers[0], x).offset) for x in ("keys", "values")]
        for j, layer in enumerate((*layers[:2], lrattn.LayerFactors(*sides, layers[0].rope))):
            assert layer.values.width == layer.keys.width == layer.num_kv_heads * layer.head_dim // 2
            lost[j] += metric_lost(moments, layer, i)
    assert lost[0] < lost[1] < 0.8 * lost[2]


@pytest.mark.parametrize("form", [False, "ride", True])
def test_what_is_made_of_fewer_inputs_takes_no_more_latents(form):
    """128 keys and 128 values that are maps of 96 inputs: a row of 96 latents says them all, or two of 96 apart."""
    model, ids = unchanged("llama"), tiny.tokens(8, 40)
    keep = 96 / 256 if form else 2 * 96 / 256
    factors = compressed(model, [ids], keep=keep, ranks="uniform", shared=form)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        assert layer.values.ranks == (96,)
        assert max(errors(layer, *heads)) < 2e-3
    fewer = compressed(model, [ids], keep=keep * 2 / 3, ranks="uniform", shared=form)
    assert max(errors(fewer.layers[1], *heads_of(model, ids)[1])) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("form", [False, "ride", True])
def test_packed_latents_are_of_one_size(form, family):
    """On the text, about what is taken from the heads: a segment has one scale."""
    model, ids = unchanged(family), tiny.tokens(4, 60)
    factors = compressed(model, [ids], keep=0.06, bits="auto", shared=form)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        assert layer.packed
        for z in latents_of(layer, *heads):
            size = None if z is None else z.flatten(0, 1).double().square().mean(0).sqrt()
            assert size is None or (size - 1).abs().max() < 1e-2


UNREADABLE = {
    "qwen3": "keys that are what model.layers.0.self_attn.k_proj makes, got others, as where they are normed",
    "gemma3": "keys that are what model.layers.0.self_attn.k_proj makes, got others, as where they are normed",
    "OLMo-2": "keys that are what model.layers.0.self_attn.k_proj makes, got others, as where they are normed",
    "Phi-3": "model.layers.0.self_attn.k_proj to be a torch.nn.Linear, whose weights can be read, got none",
    "GPT-2": "transformer.h.0.attn.k_proj to be a torch.nn.Linear, whose weights can be read, got none",
}


def never_read(model):
    """The model, which fails where more than it takes to know it is read."""

    def check(_, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] > SHORT:
            pytest.fail("a text was read")

    for module in {model, model.get_decoder()}:
        module.register_forward_pre_hook(check, with_kwargs=True)
    return model


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_reads_weights_refuses_models_whose_keys_are_not_what_weights_make_before_any_work(name, tmp_path):
    model = never_read((tiny if name in tiny.CONFIGS else architectures).model(name))
    for choice in (
        {"method": "svd"},
        {"method": "lorc"},
        {"method": "asvd"},
        {"ranks": "fisher"},
        {"method": "palu", "ranks": "condition"},
    ):
        with pytest.raises(ValueError, match=f"^model: expected {UNREADABLE[name]}"):
            compressed(model, [tiny.tokens(9, 90)], **choice)
    if name == "GPT-2":
        with pytest.raises(ValueError, match=r"expected transformer\.h\.0\.attn\.o_proj to be a torch\.nn\.Linear"):
            compressed(model, [tiny.tokens(9, 90)], "kq-svd", 1.0)
    with pytest.raises(OSError, match="state: expected an existing folder"):
        compressed(model, [tiny.tokens(9, 90)], "palu", state=tmp_path / "none" / "state")


@cache
def shuffled_mha(seed=0):
    """A model whose 8 kv heads are 4, each twice, shuffled. Also which head is a copy of which."""
    narrow, wide = tiny.model("llama"), tiny.model("mha")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    weights = narrow.state_dict()
    for name, x in weights.items():
        kind = name.split(".")[-2]
        if kind in ("k_proj", "v_proj"):
            weights[name] = x.unflatten(0, (-1, 32)).repeat_interleave(2, 0)[order].flatten(0, 1)
        elif kind == "q_proj":
            weights[name] = x.unflatten(0, (-1, 32))[order].flatten(0, 1)
        elif kind == "o_proj":
            weights[name] = x.unflatten(1, (-1, 32))[:, order].flatten(1)
    wide.load_state_dict(weights)
    return wide, narrow, order


@pytest.mark.parametrize("method", ["recalkv-hsr", "recalkv-greedy", "lrattn"])
def test_copies_of_a_head_share_a_latent_at_no_loss(method):
    """Groups of two, one head's rank each: with copies together nothing is lost; in the model's order half of it is.

    lrattn clusters under the gradients' metric, keys and values at once.
    """
    model, narrow, order = shuffled_mha()
    ids = tiny.tokens(4, 40)
    torch.testing.assert_close(model(ids).logits, narrow(ids).logits, rtol=0, atol=1e-4)
    factors = compressed(model, [ids], method, 0.5, 2, ranks="uniform")
    apart = compressed(model, [ids], "recalkv-neither", 0.5, 2, ranks="uniform")
    for layer, other, heads in zip(factors.layers, apart.layers, heads_of(model, ids), strict=True):
        assert all(len({order[h] // 2 for h in members}) == 1 for members in layer.keys.groups)
        assert max(errors(layer, *heads)) < 2e-3
        assert len(layer.values.ranks) == (4 if method == "lrattn" else 1) and len(layer.keys.ranks) == 4
        assert errors(other, *heads)[0] > 0.1


SHARDED = [
    *(("recalkv-hsr", n, 0.5, 16) for n in (1, 2, 4, 8, 16)),
    *((name, 2, 0.8, 16) for name, method in methods.METHODS.items() if method.rotated),
    *((name, 2, 0.5, 16) for name in ("recalkv", "lrattn", "asvd")),
    *((name, 2, 0.3, "auto") for name in ("lrattn-channels", "lrattn-rotated")),
]


@pytest.mark.parametrize("method, shards, keep, bits", SHARDED)
def test_groups_stay_within_a_shard(method, shards, keep, bits):
    """What each tensor-parallel rank writes and reads of its own heads is what the whole makes of them."""
    model, _, _ = shuffled_mha()
    ids = tiny.tokens(4, 40)
    factors = compressed(model, [ids], method, keep, 4, shards=shards, bits=bits)
    width = max(8 // shards, 1)
    layer, (k, v) = factors.layers[1], heads_of(model, ids)[1]
    assert all(len({h // width for h in members}) == 1 for x in (layer.keys, layer.values) for members in x.groups)
    whole = rebuilt(layer, k, v)
    for rank in range(shards):
        part, first = layer.shard(rank, shards), rank * 8 // shards
        own = slice(first, first + width)
        assert bits == 16 or part.keys.formats == layer.keys.formats[rank : rank + 1]
        for got, expected in zip(rebuilt(part, k[:, :, own], v[:, :, own]), whole, strict=True):
            torch.testing.assert_close(got, expected[:, :, own], rtol=0, atol=1e-4 if bits == 16 else 1e-3)


def test_each_part_of_recalkv_does_its_own_thing():
    """HSR changes the grouping of keys, OVC the values, from layer 1 on: layer 0 is whitened with what it sees."""
    model, _, _ = shuffled_mha()
    batches = [tiny.tokens(4, 40)]
    neither, hsr, ovc, both = (
        compressed(model, batches, f"recalkv{name}", 0.3, 2, ranks="uniform").layers
        for name in ("-neither", "-hsr", "-ovc", "")
    )
    for i in range(3):
        assert torch.equal(neither[i].keys.dense(), ovc[i].keys.dense())
        assert torch.equal(hsr[i].keys.dense(), both[i].keys.dense())
        assert torch.equal(neither[i].values.dense(), hsr[i].values.dense())
        moved = (ovc[i].values.dense() - neither[i].values.dense()).norm() / neither[i].values.dense().norm()
        assert moved < 1e-3 if i == 0 else moved > 1e-2
    assert any(h.keys.groups != n.keys.groups for h, n in zip(hsr, neither))
    assert (both[2].values.dense() - ovc[2].values.dense()).norm() > 0  # better keys, other inputs


def test_compress_refuses_with_the_reason():
    model, ids = tiny.model("llama"), [tiny.tokens(1, 8)]
    before = lrattn.calibrate(model, ids, progress=False)
    never_read(model)
    refused = {
        r"method: expected one of \[.*'lrattn', .*\], got 'pca'": {"batches": ids, "method": "pca"},
        "batches: method 'palu' needs calibration batches": {"method": "palu"},
        r"recent: expected a number of tokens": {"batches": ids, "method": "palu", "far": (-8, 1)},
        "shared: expected None or False with method 'palu'": {"batches": ids, "method": "palu", "shared": True},
        "batches: method 'recalkv' runs the compressed model on batches, got no tokens": {
            "method": "recalkv",
            "moments": before,
        },
        "batches: method 'recalkv-ovc' runs the compressed model on batches, got no tokens": {
            "method": "recalkv-ovc",
            "batches": [ids[0][:0]],
            "moments": before,
        },
        r"moments: expected batches, or moments of calibrate\(gather=\['fisher'\]\), got none": {
            "method": "svd",
            "ranks": "fisher",
        },
        r"moments of calibrate\(gather=\['fisher', 'metric'\]\), got moments with \['before'\]": {
            "ranks": "fisher",
            "moments": before,
        },
        r"moments of calibrate\(gather=\['rotated', 'rotated-metric'\]\), got moments with \['before'\]": {
            "method": "lrattn-rotated",
            "moments": before,
        },
        "state: expected None where nothing is calibrated or distilled": {"method": "svd", "state": "s"},
        "sequences of at most 512 tokens, the model's positions": {"batches": [ids[0], tiny.tokens(1, 513)]},
        "shards: expected a divisor or a multiple of Hkv=4, got 3": {"batches": ids, "shards": 3},
        "batches: expected token batches, got Moments": {"batches": before},
        "moments: expected those of 3 layers, got 2": {
            "method": "palu",
            "moments": replace(before, sums={name: xs[:2] for name, xs in before.sums.items()}),
        },
        "moments: expected those of this model": {
            "method": "palu",
            "moments": lrattn.calibrate(tiny.model("llama", seed=1), ids, progress=False),
        },
        "model: expected a model of transformers, got Linear": {"model": torch.nn.Linear(2, 2), "batches": ids},
    }
    for reason, arguments in refused.items():
        with pytest.raises(ValueError, match=reason):
            compressed(**{"model": model, "far": None} | arguments)
    assert compressed(model, method="svd").method == "svd"


WRONG = {
    "method": (None, 3, ["svd"]),
    "keep": ("0.5", True, float("nan"), 0, -0.5, 1.5),
    "bytes_per_token": (1.5, "300", True, 0, 10**9, 10),
    "bits": (None, "8", True, 8.0, [8.0], [], 3, (16, None)),
    "group_size": ("4", True, 0, 4.0, None),
    "shards": ("1", True, 0, 1.0, None),
    "ranks": (3, "best", ["spectrum"]),
    "shared": (1, 0, "joint", "no", ["ride"]),
    "far": ("x", "64", 64, (64,), (64, 4, 1)),
    "refine": (True, "8", 1.5, -1, None),
    "nested": ("yes", 1, None),
    "moments": ("moments", 5),
    "batches": (5, "text", {"input_ids": torch.ones(1, 90, dtype=torch.int64)}, ["text"]),
    "state": (5, True),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_choice_is_told_before_any_work(name):
    """Of the wrong type as of the wrong size: a ValueError that names the argument, what was expected and what came."""
    model = never_read(tiny.model("llama"))
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=rf"^{name}: expected [^\n]*, got "):
            lrattn.compress(model, **{"batches": [tiny.tokens(9, 90)], name: value}, progress=False)


def test_a_text_is_read_where_nothing_is_wrong():
    with pytest.raises(pytest.fail.Exception, match="a text was read"):
        compressed(never_read(tiny.model("llama")), [tiny.tokens(9, 90)])


@pytest.mark.parametrize("shared", [False, "ride", True])
@pytest.mark.parametrize("bits", [8, "auto"])
def test_a_budget_too_small_is_refused_before_any_work(shared, bits):
    """Up to a keep whose least row can be made, no text is read; from there on factors are made."""
    model, runs = copy.deepcopy(narrow("qwen3")), []
    model.register_forward_pre_hook(lambda _, __, kwargs: runs.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    refused = []
    for keep in (0.01, 0.04, 0.1, 0.2):
        runs.clear()
        try:
            assert compressed(model, [tiny.tokens(1, 12)], keep=keep, bits=bits, shared=shared).keep <= keep
            assert max(runs) == 12
        except ValueError as error:
            assert max(runs) <= SHORT and str(error).startswith("keep: expected at least")
            refused.append(keep)
    assert 0.01 in refused and 0.2 not in refused


def test_numbers_of_other_kinds_are_numbers():
    """As numpy gives them; and what cuts factors asks for the same share as what makes them."""
    model = tiny.model("llama")
    factors = lrattn.compress(model, method="svd", keep=np.float32(0.5), progress=False)
    assert factors.keep == lrattn.compress(model, method="svd", keep=0.5, progress=False).keep
    assert lrattn.narrowed(factors, np.float32(0.25)).keep == lrattn.narrowed(factors, 0.25).keep
    for keep in (*WRONG["keep"], None):
        with pytest.raises(ValueError, match=rf"keep: expected a share in \(0, 1\], got {keep!r}"):
            lrattn.narrowed(factors, keep)
    with pytest.raises(ValueError, match=r"bytes_per_token: expected more, got 10 \(keep: expected at least"):
        lrattn.compress(model, method="svd", bytes_per_token=10, progress=False)


@pytest.mark.parametrize("method", ["svd", "lrattn", "kq-svd"])
@pytest.mark.parametrize("part", ["k_proj.weight", "v_proj.weight", "k_proj.bias"])
def test_a_weight_that_is_not_finite_is_refused_by_name(part, method):
    """Of the last layer, whose keys and values no other layer sees."""
    model = never_read(tiny.model("qwen2"))
    name = f"model.layers.2.self_attn.{part}"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = torch.nan
    with pytest.raises(ValueError, match=f"model: expected a finite {name}, got"):
        lrattn.compress(model, [tiny.tokens(2, 90)], method, progress=False)


def test_progress_is_shown_and_can_be_turned_off(capsys):
    model, ids = tiny.model("llama"), tiny.tokens(2, 8)
    lrattn.compress(model, [ids], "recalkv", far=(0, 0))
    shown = capsys.readouterr().err
    assert "calibrate" in shown and "factor" in shown and "refit" in shown
    lrattn.compress(model, [ids], "recalkv", far=(0, 0), progress=False)
    assert capsys.readouterr().err == ""


def test_factors_say_which_window_they_are_for(tmp_path):
    """The method's own or the one asked for, or the moments'; caches and distillation hold it unless told otherwise."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 90)
    factors = lrattn.compress(model, [ids], keep=0.25, progress=False)
    factors.save(tmp_path / "f.safetensors")
    same = lrattn.Factors.load(tmp_path / "f.safetensors")
    cut = lrattn.narrowed(factors, 0.2)
    refined = lrattn.refine(model, factors, [ids], steps=1, progress=False)
    for found in (factors, same, cut, refined, factors.to(dtype=torch.float64)):
        assert found.near == (64, 4)
    for method, far, near in (
        ("palu", None, (0, 0)),
        ("palu", (8, 1), (8, 1)),
        ("cskv", None, (32, 0)),
        ("lrattn", (0, 0), (0, 0)),
    ):
        assert lrattn.compress(model, [ids], method, far=far, progress=False).near == near
    for far in ((0, 0), (6, 2)):
        moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], far=far, progress=False)
        assert lrattn.compress(model, moments=moments, progress=False).near == far
    moments = lrattn.calibrate(model, [ids], gather=["before", "fisher"], far=(8, 1), progress=False)
    assert lrattn.compress(model, method="palu", ranks="fisher", moments=moments, progress=False).near == (8, 1)
    cache = LatentCache(factors)
    assert (cache.recent, cache.sinks) == (64, 4)
    cache = LatentCache(factors, sinks=0)
    assert (cache.recent, cache.sinks) == (64, 0)
    logits = []
    for near in ({}, {"recent": 64, "sinks": 4}, {"recent": 0, "sinks": 0}):
        with torch.no_grad(), latent_attention(model, factors, **near):
            logits.append(model(ids, use_cache=False).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=1e-3)
    for wrong in ((64, -1), (64,), (True, 0)):
        with pytest.raises(ValueError, match="near: expected two numbers of tokens"):
            lrattn.Factors(factors.layers, near=wrong)


@pytest.mark.parametrize("method, keep", [("lrattn", 0.25), ("lrattn-channels", 0.1), ("lrattn-rotated", 0.1)])
def test_layers_whose_window_hides_far_tokens_cost_nothing(method, keep):
    """Local layers of 12 tokens see nothing that a dense window of 64 does not hold: the bytes go to the others."""
    model, ids = unchanged("gemma3"), tiny.tokens(2, 100)
    bits = 16 if method == "lrattn" else "auto"
    factors = lrattn.compress(model, [ids], method, keep, shared=False, bits=bits, progress=False)
    felt = [kind == "full_attention" for kind in model.config.layer_types]
    assert set(felt) == {True, False} and (bits == 16 or [lost > 1e-12 for lost in factors.predicted] == felt)
    near, far = (
        [x.values.width for x, own in zip(factors.layers, felt, strict=True) if own is f] for f in (False, True)
    )
    assert max(near) < min(far)
    with torch.no_grad(), latent_attention(model, factors):
        assert model(ids, use_cache=False).logits.isfinite().all()


def predicted(model, ids, **choice):
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    return lrattn.compress(model, moments=moments, progress=False, **choice)


@pytest.mark.parametrize("shared", [False, "ride", True])
def test_the_predicted_loss_is_about_what_it_costs(shared):
    """Divergence from the model's own predictions on the calibration text, where little is cut: to a factor of 3."""
    model, ids = unchanged("llama"), tiny.tokens(8, 60)
    factors = predicted(model, ids, keep={False: 0.6, "ride": 0.33, True: 0.33}[shared], shared=shared)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
        with latent_attention(model, factors):
            got = model(ids, use_cache=False).logits.log_softmax(-1)
    measured = (expected.exp() * (expected - got)).sum(-1).mean().item()
    assert measured / 3 < sum(factors.predicted) < measured * 3


def test_sharing_a_row_is_foreseen_to_lose_less():
    model, ids = unchanged("llama"), tiny.tokens(8, 60)
    apart, ride, joint = (
        sum(predicted(model, ids, keep=0.16, shared=form).predicted) for form in (False, "ride", True)
    )
    assert max(ride, joint) < apart


def test_the_form_is_joint_where_keys_are_rebuilt_in_time(monkeypatch):
    """A group's row of up to so many latents; beyond it values ride on the key latent."""
    monkeypatch.setattr(package, "JOINT_WITHIN", 64)
    model, ids = unchanged("mha"), [tiny.tokens(2, 20)]  # 8 heads of 32: 512 numbers in one group of 8
    for keep, group_size, joint in ((0.125, 8, True), (0.16, 8, False), (0.16, 4, True)):
        factors = compressed(model, ids, keep=keep, group_size=group_size, ranks="uniform")
        assert all(layer.shared and (layer.keys.ranks == layer.values.ranks) == joint for layer in factors.layers)


def test_latents_are_of_the_size_of_keys_and_values():
    """Whatever the scale of the gradients: 16-bit numbers hold them."""
    model, ids = tiny.model("llama"), tiny.tokens(4, 40)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)  # gradients of 1e-8
    heads = heads_of(model, ids)[1]
    for form in (False, "ride", True):
        layer = predicted(model, ids, keep=0.3, shared=form).layers[1]
        latents = [z for z in latents_of(layer, *heads) if z is not None]
        assert all(1e-2 < z.square().mean().sqrt() < 1e2 for z in latents)


def test_refinement_follows_and_is_refused_where_it_cannot():
    model, ids = narrow("llama"), tiny.tokens(4, 20)
    assert lrattn.compress(model, [ids], keep=0.3, refine=2, far=(0, 0), progress=False).method == "lrattn, refined"
    for arguments in (
        {"batches": [ids], "refine": -1},
        {"method": "svd", "refine": 2},
        {"batches": [ids], "refine": 1.5},
        {"batches": [ids], "refine": 2, "bits": 8},
        {"batches": [ids], "refine": 2, "bits": "auto"},
    ):
        with pytest.raises(ValueError, match="refine: expected"):
            lrattn.compress(model, **arguments, progress=False)
    with pytest.raises(ValueError, match="nested: expected False without refine="):
        lrattn.compress(model, [ids], nested=True, progress=False)
    cut = lrattn.narrowed(
        lrattn.compress(model, [ids], keep=0.3, refine=2, nested=True, far=(0, 0), progress=False), 0.2
    )
    assert 0.15 < cut.keep <= 0.2


def files(folder):
    return sorted(p.name.split(".")[0] + "".join(p.suffixes[-1:]) for p in folder.iterdir())


def test_a_distillation_goes_on_from_a_state_beside_the_calibration_s(tmp_path):
    """Stopped half-way it comes to the same factors, bit for bit, with no text calibrated on twice."""
    model, ids, state = copy.deepcopy(narrow("llama")), tiny.tokens(9, 20), tmp_path / "state"
    choice = {"keep": 0.3, "refine": 12, "far": (0, 0), "progress": False}
    whole = lrattn.compress(model, [ids], **choice)
    ran = []
    with stopped_at(5), pytest.raises(KeyboardInterrupt):
        lrattn.compress(model, [ids], **choice, state=state)
    assert files(tmp_path) == ["state", "state.refine"] and lrattn.Moments.load(state).sequences == 7
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: ran.append(1) if kwargs["input_ids"].shape[1] > SHORT else None, with_kwargs=True
    )
    again = lrattn.compress(model, [ids], **choice, state=state)
    hook.remove()
    for a, b in zip(again.layers, whole.layers, strict=True):
        assert torch.equal(a.values.up, b.values.up) and torch.equal(a.values.down, b.values.down)
    assert again.method == whole.method == "lrattn, refined"
    assert len(ran) == 7 * 2 + 2 * 2 * 2  # steps 5 .. 11, two passes each; two judgements of two sequences
    done = lrattn.compress(never_read(model), [ids], **choice, state=state)  # of a finished run nothing is left to do
    assert torch.equal(done.layers[1].values.down, whole.layers[1].values.down)


def test_each_distillation_has_a_state_of_its_own(tmp_path):
    """Another share, other steps or more text: none meets the file of another, and the calibration serves them all."""
    model, ids, state = narrow("llama"), tiny.tokens(10, 20), tmp_path / "state"
    choice = {"keep": 0.3, "refine": 1, "far": (0, 0), "progress": False}
    for n, other in enumerate(({}, {"keep": 0.4}, {"refine": 2}, {"nested": True}, {})):
        made, same = (lrattn.compress(model, [ids[:9]], **choice | other, **to) for to in ({"state": state}, {}))
        assert files(tmp_path) == ["state", *["state.refine"] * min(n + 1, 4)]
        assert torch.equal(made.layers[1].values.down, same.layers[1].values.down)
    lrattn.compress(model, [ids], **choice, state=state)
    assert lrattn.Moments.load(state).sequences == 8 and len(files(tmp_path)) == 6
    moments = lrattn.Moments.load(state)
    lrattn.compress(model, [ids], moments=moments, **choice, state=tmp_path / "other")
    lrattn.compress(model, [ids], "svd", **choice, state=tmp_path / "third")
    assert files(tmp_path)[:2] == ["other.refine", "state"] and files(tmp_path)[-1] == "third.refine"


def test_a_distillation_s_state_that_cannot_be_written_is_found_before_the_work(tmp_path):
    model, name = never_read(tiny.model("llama")), "n" * 250  # a name with room for no ending
    with pytest.raises(OSError, match=r"^state: expected a place to write to, got .*\.refine \(File name too long\)$"):
        lrattn.compress(model, [tiny.tokens(9, 90)], refine=1, state=tmp_path / name, progress=False)


def test_what_judges_a_refinement_is_not_calibrated_on(monkeypatch):
    """Other text in the first of eight sequences leaves the factors that training starts from as they are."""
    model, ids = narrow("llama"), tiny.tokens(9, 20)
    starts = []
    monkeypatch.setattr(
        sys.modules["lrattn.compression.compress"], "distil", lambda _, factors, *__, **___: starts.append(factors)
    )
    for rows in ([], [0, 8], [1]):
        changed = ids.clone()
        changed[rows] = tiny.tokens(len(rows), 20, seed=7)
        lrattn.compress(model, changed.split(2), keep=0.3, refine=1, far=(0, 0), progress=False)
    downs = [f.layers[1].values.down for f in starts]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])
