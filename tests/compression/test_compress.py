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
from test_calibrate import refused, running
from test_refine import divergence, stopped_at
from test_refine import same_bits as same_factors

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


def problem(inputs=40):
    """Weights that make two heads of 16 of inputs, and inputs of a text."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(32, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(500, inputs, generator=g, dtype=torch.float64) @ torch.randn(inputs, inputs, generator=g).double()
    return w, x


def heads_made(w, x):
    """Which input each of two heads is, [C, D, C * D], and the heads' second moment, as a method is given them."""
    h = x @ w.T
    return torch.eye(len(w), dtype=w.dtype).unflatten(0, (2, -1)), h.T @ h


def loss(h, up, down):
    return (h - h @ dense(up, down).T).square().sum()


def dense(up, down):
    """The map [C * D, C * D] of factors, from the left."""
    return up.transpose(0, 1).flatten(1).T @ down.T


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


def test_ovc_is_the_paper_s_least_squares():
    """lstsq for L, the pseudo-inverse for R. In the paper latents are maps of inputs, R x; here of values, with
    R = down^T W. Nothing changes on the data that values were whitened with; to whiten again is the limit."""
    w, x = problem()
    selects, moment = heads_made(w, x)
    _, up, down = (y if y.dim() < 2 else y[:, :16] for y in decompose(selects, moment))
    again = methods.recalkv.calibrate_values(selects, down, moment)
    torch.testing.assert_close(dense(*again), dense(up, down), rtol=1e-3, atol=1e-3)
    other = x * torch.linspace(0.1, 3, 40, dtype=torch.float64)
    moment = heads_made(w, other)[1]
    left = torch.linalg.lstsq(other @ w.T @ down, other @ w.T, driver="gelsd").solution.T
    right = torch.linalg.pinv(left) @ w
    refitted = methods.recalkv.calibrate_values(selects, down, moment)
    for got, want in ((refitted[0].transpose(0, 1).flatten(1).T, left), (refitted[1].T @ w, right)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    best = (y[:, :16] for y in decompose(selects, moment)[1:])
    lost = [loss(other @ w.T, *maps) for maps in (best, refitted, (up, down))]
    assert lost[0] <= lost[1] * (1 + 1e-9) and lost[1] < 0.9 * lost[2]


def test_ovc_keeps_full_rank_exact():
    w, x = problem()
    selects, moment = heads_made(w, x)
    _, _, down = decompose(selects, moment)
    padded = torch.cat((down, down.new_zeros(len(down), 16)), 1)  # ranks are multiples of 16
    refitted = methods.recalkv.calibrate_values(selects, padded, moment)
    torch.testing.assert_close(dense(*refitted), torch.eye(32, dtype=w.dtype), rtol=1e-5, atol=1e-5)


@cache
def unchanged(name):
    """A model that no test changes."""
    return (tiny if name in tiny.CONFIGS else architectures).model(name)


def compressed(model, *args, **kwargs):
    """Plain latents, where nothing else is asked for."""
    return lrattn.compress(model, *args, **{"far": (0, 0), "bits": 16, "progress": False} | kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_reads_every_family(family):
    """The mean stands for biases, of models that have some."""
    model, ids = unchanged(family), tiny.tokens(4, 40)
    factors = compressed(model, [ids], "lrattn-rebuilt", 0.3, 4)
    assert len(factors.layers) == 3 and factors.method == "lrattn-rebuilt" and len(factors.predicted) == 3
    assert 0.3 - 32 / factors.dense_bytes_per_token < factors.keep <= 0.3
    for layer, own, sample, (k, v) in zip(
        factors.layers, attention_layers(model), factors.samples, heads_of(model, ids), strict=True
    ):
        assert layer.keys.group_size == min(4, own.num_kv_heads)
        assert all((sample == p.detach().flatten()[0]).any() for p in own.module.parameters())
        for side, x in ((layer.keys, layer.rope.turn_back(k, positions_for(layer, k))), (layer.values, v)):
            assert (side.offset is not None) == (family in ("llama3", "qwen2", "qwen2-window"))
            if side.offset is not None:
                torch.testing.assert_close(side.offset, x.flatten(0, 1).mean(0), rtol=0, atol=1e-4)


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


def test_compress_does_not_change_the_model_and_repeats_exactly():
    model, ids = tiny.model("llama"), tiny.tokens(2, 40)
    before, attention = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    first, second = (compressed(model, [ids]) for _ in range(2))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config._attn_implementation == attention
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    for other in (second, compressed(model, moments=moments)):
        same_factors(first, other)


SHARING = [("lrattn", True), ("lrattn-rebuilt", "ride"), ("lrattn-rebuilt", True)]
OWN = [("lrattn", False), ("lrattn-rebuilt", False), *SHARING]
CHOICES = [(name, method.span > 1) for name, method in methods.METHODS.items() if not method.exact] + SHARING


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
    """From below, to a step of 16 latents, at a share that leaves room: such a step is half of a group of one head."""
    recipe = methods.METHODS[method]
    keep = 0.8 if recipe.whole_values else 0.6 if recipe.groups == methods.HEAD else 0.4
    factors = compressed(narrow(family), [tiny.tokens(4, 40)], method, keep, 2, ranks=ranks, shared=shared)
    assert keep - 32 / factors.dense_bytes_per_token < factors.keep <= keep
    assert (factors.method, factors.rule) == (method, ranks)


@pytest.mark.parametrize("method, shared, ranks, family", [x for x in turns() if x[2] == methods.METHODS[x[0]].ranks])
def test_every_method_is_exact_at_full_rank(method, shared, ranks, family):
    """With groups of two of four heads, clustered by some; also where the calibration never looked."""
    model, ids = unchanged(family), tiny.tokens(4, 40)
    factors = compressed(model, [ids], method, 1.0, 2, shared=shared)
    assert (factors.method, factors.rule, factors.keep) == (method, ranks, 1.0)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        n = layer.num_kv_heads * layer.head_dim
        for side, columns in zip(sides_of(layer.keys, layer.values), (slice(n), slice(-n, None)), strict=True):
            got = side.dense()
            torch.testing.assert_close(got, torch.eye(len(got))[:, columns], rtol=0, atol=1e-4)
        assert max(errors(layer, *heads)) < 1e-5


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


FORMS = cycle([*OWN, ("lrattn-rotated", False), ("palu", False)])
LOADED = [("Llama, yarn", "lrattn", True), ("GLM-4", "palu", False), ("gpt-oss", "kv-heads", False)]
FULL = [(name, *next(FORMS), torch.float32) for name in ARCHITECTURES]
FULL += [(*own, dtype) for own in LOADED for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("architecture, method, shared, dtype", FULL)
def test_every_architecture_is_exact_at_full_rank(architecture, method, shared, dtype):
    """With the layers it has keys in, the ropes it has, and whatever its attention does to scores. In 16 bits, as of a
    model that was loaded so, rounding is all that is lost."""
    model, ids = copy.deepcopy(unchanged(architecture)), architectures.tokens(2, 40)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    factors = compressed(model, [ids], method, 1.0, shared=shared)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        assert layer.dtype == dtype and layer.shared == bool(shared)
        assert max(errors(layer, *heads)) < max(1e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loses_less_than_by_second_moments_and_those_less_than_by_random_maps(architecture):
    """In the metric of the loss: at half of the rank of each side."""
    model, ids = unchanged(architecture), architectures.tokens(4, 40)
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    choice = {"keep": 0.5, "ranks": "uniform", "moments": moments}
    own, palu = (compressed(model, method=name, shared=False, **choice) for name in ("lrattn-rebuilt", "palu"))
    random, lost = random_factors(model, 0.5, ropes=[layer.rope for layer in own.layers]), [0.0, 0.0, 0.0]
    for i, layers in enumerate(zip(own.layers, palu.layers, random.layers, strict=True)):
        sides = [replace(getattr(layers[2], x), offset=getattr(layers[0], x).offset) for x in ("keys", "values")]
        for j, layer in enumerate((*layers[:2], lrattn.LayerFactors(*sides, layers[0].rope))):
            assert layer.values.width == layer.keys.width == layer.num_kv_heads * layer.head_dim // 2
            lost[j] += metric_lost(moments, layer, i)
    assert lost[0] < lost[1] < 0.8 * lost[2]


@pytest.mark.parametrize("form, keep", [(False, 2 * 96 / 256), ("ride", 96 / 256), (True, 96 / 256)])
def test_what_is_made_of_fewer_inputs_takes_no_more_latents(form, keep):
    """128 keys and 128 values that are maps of 96 inputs: a row of 96 latents says them all, or two of 96 apart."""
    model, ids = unchanged("llama"), tiny.tokens(8, 40)
    enough, fewer = (
        compressed(model, [ids], "lrattn-rebuilt", share, ranks="uniform", shared=form).layers
        for share in (keep, keep * 2 / 3)
    )
    for layer, less, heads in zip(enough, fewer, heads_of(model, ids), strict=True):
        assert layer.values.ranks == (96,) and max(errors(layer, *heads)) < 2e-3 and max(errors(less, *heads)) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("form", [False, "ride", True])
def test_packed_latents_are_of_one_size(form, family):
    """On the text, about what is taken from the heads: a segment has one scale."""
    model, ids = unchanged(family), tiny.tokens(4, 60)
    factors = compressed(model, [ids], "lrattn-rebuilt", 0.08, bits="auto", shared=form)
    for layer, heads in zip(factors.layers, heads_of(model, ids), strict=True):
        assert layer.packed
        for z in latents_of(layer, *heads):
            assert z is None or (z.flatten(0, 1).double().square().mean(0).sqrt() - 1).abs().max() < 1e-2


SIZED = [
    *(("lrattn", shared, "auto", 0.15) for shared in (False, True)),
    *(("lrattn-rebuilt", shared, "auto", 0.15) for shared in (False, "ride", True)),
    ("lrattn-rotated", False, "auto", 0.15),
    *((method, False, 4, 0.2) for method in ("palu", "recalkv", "svd", "asvd")),
    *((method, False, 4, 0.32) for method in ("kq-svd", "matryoshka-pca")),
]


@pytest.mark.every(5)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("method, shared, bits, keep", SIZED)
def test_packed_latents_are_as_good_of_keys_and_values_of_any_size(method, shared, bits, keep, side):
    """Scales reach from 2^-22 to 240; what is larger or smaller by 1e4 is brought there by the factors."""
    ids, lost = tiny.tokens(4, 60), []
    made, read = {"keys": ("k_proj", "q_proj"), "values": ("v_proj", "o_proj")}[side]
    for size in (1.0, 1e4, 1e-4):
        model = tiny.model("qwen2")
        with torch.no_grad():
            for name, x in model.named_parameters():
                x *= size if made in name else 1 / size if read in name else 1.0
            expected = model(ids).logits
        factors = compressed(model, [ids], method, keep, bits=bits, shared=shared)
        assert all(layer.packed for layer in factors.layers)
        with torch.no_grad(), latent_attention(model, factors):
            lost.append((model(ids).logits - expected).square().mean().sqrt())
    torch.testing.assert_close(torch.stack(lost), lost[0].expand(3), rtol=0.02, atol=0)


NORMED = "keys that are what model.layers.0.self_attn.k_proj makes, got others, as where they are normed"
UNREADABLE = dict.fromkeys(("qwen3", "gemma3", "OLMo-2"), NORMED) | {
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
    model, ids = never_read((tiny if name in tiny.CONFIGS else architectures).model(name)), [tiny.tokens(9, 90)]
    told, wo = f"^model: expected {UNREADABLE[name]}", r"transformer\.h\.0\.attn\.o_proj to be a torch\.nn\.Linear"
    for method in ("svd", "lorc", "asvd"):
        refused(told, compressed, model, ids, method)
    for method, ranks in (("lrattn", "fisher"), ("palu", "condition")):
        refused(told, compressed, model, ids, method, ranks=ranks)
    if name == "GPT-2":
        refused(f"expected {wo}", compressed, model, ids, "kq-svd", 1.0)
    state = tmp_path / "none" / "state"
    refused("state: expected an existing folder", compressed, model, ids, "palu", state=state, error=OSError)


@cache
def shuffled_mha():
    """A model whose 8 kv heads are 4, each twice, shuffled. Also which head is a copy of which."""
    narrow, wide = tiny.model("llama"), tiny.model("mha")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    weights = narrow.state_dict()
    for name, x in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = x.unflatten(0, (-1, 32)).repeat_interleave(2, 0)[order].flatten(0, 1)
        elif name.endswith("q_proj.weight"):
            weights[name] = x.unflatten(0, (-1, 32))[order].flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            weights[name] = x.unflatten(1, (-1, 32))[:, order].flatten(1)
    wide.load_state_dict(weights)
    return wide, narrow, order


@pytest.mark.parametrize("method", ["recalkv-hsr", "recalkv-greedy", "lrattn", "lrattn-rebuilt"])
def test_copies_of_a_head_share_a_latent_at_no_loss(method):
    """Groups of two, one head's rank each: with copies together nothing is lost; in the model's order half of it is.
    lrattn clusters under the gradients' metric, rows that both share by keys and values at once."""
    model, narrow, order = shuffled_mha()
    ids = tiny.tokens(4, 40)
    torch.testing.assert_close(model(ids).logits, narrow(ids).logits, rtol=0, atol=1e-4)
    made, apart = (compressed(model, [ids], x, 0.5, 2, ranks="uniform").layers for x in (method, "recalkv-neither"))
    for layer, other, heads in zip(made, apart, heads_of(model, ids), strict=True):
        assert all(len({order[h] // 2 for h in members}) == 1 for members in layer.keys.groups)
        assert max(errors(layer, *heads)) < 2e-3
        assert len(layer.values.ranks) == (4 if method.startswith("lrattn") else 1) and len(layer.keys.ranks) == 4
        assert errors(other, *heads)[0] > 0.1


SHARDED = [
    *(("recalkv-hsr", n, 0.5, 16) for n in (1, 2, 4, 8, 16)),
    *((name, 2, 0.8, 16) for name, method in methods.METHODS.items() if method.rotated and not method.exact),
    *((name, 2, 0.5, 16) for name in ("recalkv", "lrattn", "lrattn-rebuilt", "asvd")),
    *((name, 2, 0.3, "auto") for name in ("lrattn", "lrattn-channels", "lrattn-rotated")),
]


@pytest.mark.parametrize("method, shards, keep, bits", SHARDED)
def test_groups_stay_within_a_shard(method, shards, keep, bits):
    """What each tensor-parallel rank writes and reads of its own heads is what the whole makes of them."""
    (model, _, _), ids, width = shuffled_mha(), tiny.tokens(4, 40), max(8 // shards, 1)
    layer = compressed(model, [ids], method, keep, 4, shards=shards, bits=bits).layers[1]
    k, v = heads_of(model, ids)[1]
    assert all(len({h // width for h in members}) == 1 for x in (layer.keys, layer.values) for members in x.groups)
    whole = rebuilt(layer, k, v)
    for rank in range(shards):
        part, first = layer.shard(rank, shards), rank * 8 // shards
        own = slice(first, first + width)
        assert bits == 16 or part.keys.formats == layer.keys.formats[rank : rank + 1]
        for got, expected in zip(rebuilt(part, k[:, :, own], v[:, :, own]), whole, strict=True):
            torch.testing.assert_close(got, expected[:, :, own], rtol=0, atol=1e-4 if bits == 16 else 1e-3)


def test_each_part_of_recalkv_does_its_own_thing():
    """HSR changes the grouping of keys, OVC the values, with both to what better keys make of them."""
    model, _, _ = shuffled_mha()
    neither, hsr, ovc, both = (
        compressed(model, [tiny.tokens(4, 40)], f"recalkv{name}", 0.3, 2, ranks="uniform").layers
        for name in ("-neither", "-hsr", "-ovc", "")
    )
    for n, h, o, b in zip(neither, hsr, ovc, both, strict=True):
        for one, same in ((n.keys, o.keys), (h.keys, b.keys), (n.values, h.values)):
            assert torch.equal(one.dense(), same.dense())
    assert any(h.keys.groups != n.keys.groups for h, n in zip(hsr, neither))
    for other in (neither, ovc):
        assert (both[2].values.dense() - other[2].values.dense()).norm() > 1e-2 * both[2].values.dense().norm()


def test_compress_refuses_with_the_reason():
    model, ids = tiny.model("llama"), [tiny.tokens(1, 8)]
    before = lrattn.calibrate(model, ids, progress=False)
    fewer = replace(before, sums={name: xs[:2] for name, xs in before.sums.items()})
    other = lrattn.calibrate(tiny.model("llama", seed=1), ids, progress=False)
    never_read(model)

    def refuses(told, batches=None, method="lrattn", **arguments):
        refused(told, lrattn.compress, model, batches, method, progress=False, **arguments)

    refuses(r"method: expected one of \[.*'lrattn', .*\], got 'pca'", ids, "pca")
    refuses("shared: expected None or False with method 'palu'", ids, "palu", shared=True)
    refuses("shards: expected a divisor or a multiple of Hkv=4, got 3", ids, shards=3)
    refuses("recent: expected a number of tokens", ids, "palu", far=(-8, 1))
    refuses("sequences of at most 512 tokens, the model's positions", [ids[0], tiny.tokens(1, 513)])
    refuses("batches: expected token batches, got Moments", before)
    refuses("batches: method 'palu' needs calibration batches", None, "palu")
    refuses("state: expected None where nothing is calibrated or distilled", None, "svd", state="s")
    for method, batches in (("recalkv", None), ("recalkv-ovc", [ids[0][:0]])):
        told = f"batches: method '{method}' runs the compressed model on batches, got no tokens"
        refuses(told, batches, method, moments=before)
    told = r"moments of calibrate\(gather=\[%s\]\), got %s"
    refuses("moments: expected batches, or " + told % ("'fisher'", "none"), None, "svd", ranks="fisher")
    has = r"moments with \['before'\]"
    refuses(told % ("'fisher', 'metric'", has), moments=before, ranks="fisher")
    refuses(told % ("'rotated', 'rotated-metric'", has), None, "lrattn-rotated", moments=before)
    refuses("moments: expected those of 3 layers, got 2", None, "palu", moments=fewer)
    refuses("moments: expected those of this model", None, "palu", moments=other)
    refuses("refine: expected 0 without batches", None, "svd", refine=2)
    refuses("nested: expected False without refine=", ids, nested=True)
    for method, bits in (("lrattn", "auto"), ("palu", 4)):
        told = f"nested: expected False with bits={bits!r}: prefixes are of plain latents"
        refuses(told, ids, method, refine=2, nested=True, bits=bits)
    refuses("shared: expected None or False or True with method 'lrattn', got 'ride'", ids, shared="ride")
    refuses("chunk: expected None with method 'lrattn-rebuilt', got 512", ids, "lrattn-rebuilt", chunk=512)
    refuses("positions: expected None with method 'palu', which is for any", ids, "palu", positions=4096)
    refused("^model: expected a model of transformers, got Linear", compressed, torch.nn.Linear(2, 2), ids)
    assert compressed(model, method="svd").method == "svd"
    with pytest.raises(pytest.fail.Exception, match="a text was read"):
        compressed(model, [tiny.tokens(9, 90)])


WRONG = {
    "method": (None, 3, ["svd"]),
    "keep": ("0.5", True, float("nan"), 0, -0.5, 1.5),
    "bytes_per_token": (1.5, "300", True, 0, 10**9, 10),
    "bits": ("8", True, 8.0, [8.0], [], 3, (16, None)),
    "chunk": (100, 32, "512", True, 0, 512.0),
    "positions": (0, 4096),
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
        given = {"batches": [tiny.tokens(9, 90)], name: value, "progress": False}
        refused(rf"^{name}: expected [^\n]*, got ", lrattn.compress, model, **given)


@pytest.mark.parametrize("method, shared", OWN)
@pytest.mark.parametrize("bits", [8, "auto"])
def test_a_budget_too_small_is_refused_before_any_work(method, shared, bits):
    """Up to a keep whose least row can be made, no text is read; from there on factors are made."""
    model, runs = copy.deepcopy(narrow("qwen3")), []
    model.register_forward_pre_hook(lambda _, __, kwargs: runs.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    told = []
    for keep in (0.01, 0.04, 0.1, 0.2):
        runs.clear()
        try:
            assert compressed(model, [tiny.tokens(1, 12)], method, keep, bits=bits, shared=shared).keep <= keep
            assert max(runs) == 12
        except ValueError as error:
            assert max(runs) <= SHORT and str(error).startswith("keep: expected at least")
            told.append(keep)
    assert 0.01 in told and 0.2 not in told


def test_numbers_of_other_kinds_are_numbers():
    """As numpy gives them; and what cuts factors asks for the same share as what makes them."""
    model = tiny.model("llama")
    factors = compressed(model, method="svd", keep=np.float32(0.5))
    assert factors.keep == compressed(model, method="svd", keep=0.5).keep
    assert lrattn.narrowed(factors, np.float32(0.25)).keep == lrattn.narrowed(factors, 0.25).keep
    for keep in (*WRONG["keep"], None):
        refused(rf"keep: expected a share in \(0, 1\], got {keep!r}", lrattn.narrowed, factors, keep)
    refused("keep: expected at least", lrattn.narrowed, factors, 0.01)
    told = r"bytes_per_token: expected more, got 10 \(keep: expected at least"
    refused(told, compressed, model, method="svd", bytes_per_token=10)


@pytest.mark.parametrize("method", ["svd", "lrattn", "kq-svd"])
@pytest.mark.parametrize("part", ["k_proj.weight", "v_proj.weight", "k_proj.bias"])
def test_a_weight_that_is_not_finite_is_refused_by_name(part, method):
    """Of the last layer, whose keys and values no other layer sees."""
    model, name = never_read(tiny.model("qwen2")), f"model.layers.2.self_attn.{part}"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = torch.nan
    refused(f"model: expected a finite {name}, got", compressed, model, [tiny.tokens(2, 90)], method)


def test_progress_is_shown_and_can_be_turned_off(capsys):
    model, ids = tiny.model("llama"), tiny.tokens(2, 8)
    compressed(model, [ids], "recalkv", progress=True)
    shown = capsys.readouterr().err
    assert "calibrate" in shown and "factor" in shown and "refit" in shown
    compressed(model, [ids], "recalkv")
    assert capsys.readouterr().err == ""


def test_factors_say_which_window_they_are_for(tmp_path):
    """The method's own or the one asked for, or the moments'; caches and distillation hold it unless told otherwise."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 90)
    factors = compressed(model, [ids], keep=0.25, far=None)
    factors.save(tmp_path / "f.safetensors")
    same = lrattn.Factors.load(tmp_path / "f.safetensors")
    refined = lrattn.refine(model, factors, [ids], steps=1, progress=False)
    for found in (factors, same, lrattn.narrowed(factors, 0.2), refined, factors.to(dtype=torch.float64)):
        assert found.near == (64, 4)
    for method, far, near in (("palu", None, (0, 0)), ("palu", (8, 1), (8, 1)), ("cskv", None, (32, 0))):
        assert compressed(model, [ids], method, far=far).near == near
    for far, own, choice in (
        ((0, 0), "metric", {}),
        ((6, 2), "metric", {}),
        ((8, 1), "fisher", {"method": "palu", "ranks": "fisher"}),
    ):
        moments = lrattn.calibrate(model, [ids], gather=["before", own], far=far, progress=False)
        assert compressed(model, moments=moments, far=None, **choice).near == far
    for held, near in ((LatentCache(factors), (64, 4)), (LatentCache(factors, sinks=0), (64, 0))):
        assert (held.recent, held.sinks) == near
    logits = []
    for near in ({}, {"recent": 64, "sinks": 4}, {"recent": 0, "sinks": 0}):
        with torch.no_grad(), latent_attention(model, factors, **near):
            logits.append(model(ids, use_cache=False).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=1e-3)
    for wrong in ((64, -1), (64,), (True, 0)):
        refused("near: expected two numbers of tokens", lrattn.Factors, factors.layers, near=wrong)


@pytest.mark.parametrize("method, keep", [("lrattn", 0.25), ("lrattn-rebuilt", 0.25), ("lrattn-channels", 0.1)])
def test_layers_whose_window_hides_far_tokens_cost_nothing(method, keep):
    """Local layers of 12 tokens see nothing that a dense window of 64 does not hold: the bytes go to the others."""
    model, ids, bits = unchanged("gemma3"), tiny.tokens(2, 100), "auto" if method == "lrattn-channels" else 16
    factors = compressed(model, [ids], method, keep, shared=False, bits=bits, far=None)
    felt = [kind == "full_attention" for kind in model.config.layer_types]
    assert bits == 16 or [lost > 1e-12 for lost in factors.predicted] == felt
    sizes = {own: [x.bytes_per_token for x, of in zip(factors.layers, felt) if of is own] for own in (False, True)}
    assert max(sizes[False]) < min(sizes[True])
    with torch.no_grad(), latent_attention(model, factors):
        assert model(ids, use_cache=False).logits.isfinite().all()


def predicted(model, ids, method="lrattn", **choice):
    gather = methods.METHODS[method].gather
    moments = lrattn.calibrate(model, [ids], gather=gather, progress=False)
    return compressed(model, method=method, moments=moments, **choice)


LITTLE = [(method, shared, 0.33 if shared else 0.6) for method, shared in OWN if method == "lrattn-rebuilt"]
LITTLE += [("lrattn", False, 0.6), ("lrattn", True, 0.6), ("lrattn-rotated", False, 0.6)]


@pytest.mark.parametrize("method, shared, keep", [*LITTLE, ("lrattn-channels", False, 0.7)])
def test_the_predicted_loss_is_about_what_it_costs(method, shared, keep):
    """Divergence from the model's own predictions on the calibration text, where little is cut: to a factor of 3."""
    model, ids = unchanged("llama"), tiny.tokens(8, 60)
    factors = predicted(model, ids, method, keep=keep, shared=shared)
    measured = divergence(model, factors, ids)
    assert measured / 3 < sum(factors.predicted) < measured * 3


def test_sharing_a_row_is_foreseen_to_lose_less():
    model, ids = unchanged("llama"), tiny.tokens(8, 60)
    for method in ("lrattn", "lrattn-rebuilt"):
        made = (predicted(model, ids, method, keep=0.16, shared=form) for form in methods.METHODS[method].forms)
        apart, *shared = (sum(factors.predicted) for factors in made)
        assert max(shared) < apart


def test_the_form_is_joint_where_keys_are_rebuilt_in_time(monkeypatch):
    """A group's row of up to so many latents; beyond it values ride on the key latent."""
    monkeypatch.setattr("lrattn.compression.recipe.JOINT_WITHIN", 64)
    model, ids = unchanged("mha"), [tiny.tokens(2, 20)]  # 8 heads of 32: 512 numbers in one group of 8
    for keep, group_size, joint in ((0.125, 8, True), (0.16, 8, False), (0.16, 4, True)):
        factors = compressed(model, ids, "lrattn-rebuilt", keep, group_size, ranks="uniform")
        assert all(layer.shared and (layer.keys.ranks == layer.values.ranks) == joint for layer in factors.layers)


@pytest.mark.parametrize("method, form", OWN)
def test_latents_are_of_the_size_of_keys_and_values(method, form):
    """Whatever the scale of the gradients: 16-bit numbers hold them."""
    model, ids = tiny.model("llama"), tiny.tokens(4, 40)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)  # gradients of 1e-8
    for z in latents_of(predicted(model, ids, method, keep=0.3, shared=form).layers[1], *heads_of(model, ids)[1]):
        assert z is None or 1e-2 < z.square().mean().sqrt() < 1e2


def files(folder):
    return sorted(p.name.split(".")[0] + "".join(p.suffixes[-1:]) for p in folder.iterdir())


def test_a_distillation_goes_on_from_a_state_beside_the_calibration_s(tmp_path):
    """Stopped half-way it comes to the same factors, bit for bit, with no text calibrated on twice."""
    model, ids, state = copy.deepcopy(narrow("llama")), tiny.tokens(9, 20), tmp_path / "state"
    choice, ran = {"keep": 0.3, "refine": 12}, []
    whole = compressed(model, [ids], **choice)
    with stopped_at(5):
        refused(None, compressed, model, [ids], **choice, state=state, error=KeyboardInterrupt)
    assert files(tmp_path) == ["state", "state.refine"] and lrattn.Moments.load(state).sequences == 7
    hook = running(model, 20, ran.append)
    again = compressed(model, [ids], **choice, state=state)
    hook.remove()
    assert again.method == whole.method == "lrattn, refined"
    assert len(ran) == 7 * 2 + 2 * 2 * 2  # steps 5 .. 11, two passes each; two judgements of two sequences
    done = compressed(never_read(model), [ids], **choice, state=state)  # of a finished run nothing is left to do
    for found in (again, done):
        same_factors(found, whole)


def test_each_distillation_has_a_state_of_its_own(tmp_path):
    """Another share, other steps or more text: none meets the file of another, and the calibration serves them all."""
    model, ids, state = narrow("llama"), tiny.tokens(10, 20), tmp_path / "state"
    choice = {"keep": 0.3, "refine": 1}
    for n, other in enumerate(({}, {"keep": 0.4}, {"refine": 2}, {"nested": True}, {})):
        same_factors(*(compressed(model, [ids[:9]], **choice | other, state=to) for to in (state, None)))
        assert files(tmp_path) == ["state", *["state.refine"] * min(n + 1, 4)]
    compressed(model, [ids], **choice, state=state)
    moments = lrattn.Moments.load(state)
    assert moments.sequences == 8 and len(files(tmp_path)) == 6
    compressed(model, [ids], moments=moments, **choice, state=tmp_path / "other")
    compressed(model, [ids], "svd", **choice, state=tmp_path / "third")
    assert files(tmp_path)[:2] == ["other.refine", "state"] and files(tmp_path)[-1] == "third.refine"


def test_a_distillation_s_state_that_cannot_be_written_is_found_before_the_work(tmp_path):
    model, state = never_read(tiny.model("llama")), tmp_path / ("n" * 250)  # a name with room for no ending
    told = r"^state: expected a place to write to, got .*\.refine \(File name too long\)$"
    refused(told, compressed, model, [tiny.tokens(9, 90)], refine=1, state=state, error=OSError)


def test_what_judges_a_refinement_is_not_calibrated_on(monkeypatch):
    """Other text in the first of eight sequences leaves the factors that training starts from as they are."""
    model, ids, starts = narrow("llama"), tiny.tokens(9, 20), []
    monkeypatch.setattr(package, "distil", lambda _, factors, *__, **___: starts.append(factors))
    for rows in ([], [0, 8], [1]):
        changed = ids.clone()
        changed[rows] = tiny.tokens(len(rows), 20, seed=7)
        compressed(model, changed.split(2), keep=0.3, refine=1)
    downs = [f.layers[1].values.down for f in starts]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])
