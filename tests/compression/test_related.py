"""Rows of the related work: each is the system it names, by the identities that define it."""

from dataclasses import replace

import pytest
import tiny
import torch
from given import given
from test_calibrate import near, refused
from test_substitute import on_latents

import lrattn
from lrattn.compression import methods
from lrattn.compression.methods import kq_svd, think
from lrattn.compression.methods.lorc import log_condition
from lrattn.compression.substitute import Window
from lrattn.models.layers import attention_layers
from lrattn.models.weights import weight

D = 16
BEST = [(method, "mha") for method in ("svd-llm", "cskv")] + [("kv-heads", "mistral")]
BEST += [(method, family) for method in ("palu", "matryoshka-pca") for family in ("llama3", "qwen3")]


def gram(x):
    return x.mT @ x


def random(*shape, seed=0):
    """Rows whose directions differ in size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.logspace(0, -1, shape[-1], dtype=torch.float64)


def compressed(model, method, keep, **arguments):
    choice = {"ranks": "uniform", "far": (0, 0), "progress": False} | arguments
    return lrattn.compress(model, [tiny.tokens(4, 40)], method, keep, **choice)


def seen(model):
    """Of every layer, over the calibration tokens: inputs x [T, E], keys before RoPE u and rotated k, values v, and
    queries q [T, heads, D]; float64."""
    texts = [given(model, row) for row in tiny.tokens(4, 40)]
    return [{name: torch.cat([getattr(x, name) for x in own]) for name in "xukvq"} for own in zip(*texts, strict=True)]


def mapped(heads, side):
    """What the latents of a side make of heads [T, Hkv, D] less its offset."""
    return (heads.flatten(1) @ side.dense().double()).view(heads.shape)


def modules(model):
    return [layer.self_attn for layer in model.model.layers]


def rank_of(side):
    (rank,) = set(side.ranks)
    return rank


def assert_best(error, x, rank):
    """A squared error is that of the best approximation of x of this rank, its tail energy."""
    energies = torch.linalg.svdvals(x).square()
    torch.testing.assert_close(error, energies[rank:].sum(), rtol=1e-3, atol=1e-6 * energies.sum().item())


# KQ-SVD


def test_energies_of_kq_svd_are_those_of_the_scores_and_of_think_what_each_channel_adds_to_them():
    keys, queries = random(300, D), random(500, D, seed=1).flip(1)
    given, whole = (torch.eye(D).double()[None], gram(keys), gram(queries)), torch.eye(D).double()
    energies, up, down = kq_svd.decompose(*given)
    want = torch.linalg.svdvals(keys @ queries.T)[:D].square()
    torch.testing.assert_close(energies, want, rtol=1e-3, atol=0)
    torch.testing.assert_close(up[0] @ down, whole, rtol=0, atol=1e-9)
    energies, up, down = think.decompose(*given)
    order = up[0].argmax(1)
    torch.testing.assert_close(energies, (gram(queries) * gram(keys)).diagonal()[order])
    assert (energies.diff() <= 0).all() and torch.equal(up[0], whole[order])
    torch.testing.assert_close(keys @ down[:, :5], keys[:, order[:5]])  # a product with 0 and 1 is a gather


def test_kq_svd_of_a_model_is_of_its_scores_and_of_what_values_add_to_the_output():
    """Per kv head, its query heads stacked; output projections are not averaged, their Gram matrices are."""
    model = tiny.model("qwen3")
    factors = compressed(model, "kq-svd", 0.6)
    for layer, module, x in zip(factors.layers, modules(model), seen(model), strict=True):
        keys, values = mapped(x["k"], layer.keys), mapped(x["v"], layer.values)
        wo = module.o_proj.weight.detach().double().T.unflatten(0, (-1, 32))  # [Hq, D, E]
        for h in range(4):
            queries, out = x["q"][:, 2 * h : 2 * h + 2].flatten(0, 1), wo[2 * h : 2 * h + 2]
            scores = x["k"][:, h] @ queries.T
            assert_best((scores - keys[:, h] @ queries.T).square().sum(), scores, layer.keys.ranks[h])
            added, got = (torch.cat([v[:, h] @ w for w in out], 1) for v in (x["v"], values))
            assert_best((added - got).square().sum(), added, layer.values.ranks[h])


# EigenAttention


@pytest.mark.parametrize("rule", ["uniform", "spectrum"])
def test_eigen_attention_has_one_key_basis_a_layer(rule):
    model = tiny.model("llama")
    for layer, x in zip(compressed(model, "eigen", 0.63, ranks=rule).layers, seen(model), strict=True):
        assert max(layer.keys.ranks) - min(layer.keys.ranks) <= 16 and len(layer.keys.ranks) == 4
        low, widest = min(layer.keys.ranks), max(layer.keys.up, key=lambda up: up.abs().sum())
        assert layer.rope is not None and all(torch.equal(up[:low], widest[:low]) for up in layer.keys.up)
        basis = widest[:low].double()
        torch.testing.assert_close(basis @ basis.T, torch.eye(low).double(), rtol=0, atol=1e-5)
        error = (x["u"] - x["u"] @ basis.T @ basis).square().sum()
        assert_best(error, x["u"].flatten(0, 1), low)


# Whole layers: SVD-LLM, ASVD, CSKV, LoRC


@pytest.mark.parametrize("method, family", [("palu", "llama"), ("palu", "mqa"), ("asvd", "llama3")])
def test_palu_and_asvd_are_the_scaled_svd_of_the_weights(method, family):
    """As published, W S = U D V^T, cut, times S^-1; as a map of the keys it is the same. Of Palu S S^T is the moment of
    the inputs, of ASVD S the root of their mean size, alpha = 0.5, and biases are outside, as offsets."""
    model = tiny.model(family)
    factors = compressed(model, method, 0.5, group_size=2)
    for layer, own, module, x in zip(factors.layers, attention_layers(model), modules(model), seen(model), strict=True):
        moment = gram(x["x"])
        root = torch.linalg.cholesky(moment + 1e-9 * moment.trace() * torch.eye(96).double())
        root = root if method == "palu" else x["x"].abs().mean(0).sqrt().diag()
        for name, heads, projection in (("keys", x["u"], module.k_proj), ("values", x["v"], module.v_proj)):
            side, bias = getattr(layer, name), 0.0
            if method == "asvd":
                bias = projection.bias.detach().view(-1, 32)
                assert torch.equal(side.offset, bias)
            rebuilt = mapped(heads - bias, side)
            for members, rank in zip(side.groups, side.ranks, strict=True):
                rows = weight(own, name).unflatten(0, (-1, 32))[list(members)].flatten(0, 1)
                u, d, v = torch.linalg.svd(rows @ root, full_matrices=False)
                map_of_inputs = u[:, :rank] * d[:rank] @ v[:rank] @ torch.linalg.inv(root)
                near(rebuilt[:, list(members)].flatten(1), x["x"] @ map_of_inputs.T, 1e-3)


@pytest.mark.parametrize("method, family", BEST)
def test_what_is_whitened_is_the_best_map_of_each_group_s_heads(method, family):
    """About the mean, of models with biases and where the method says so; of SVD-LLM, CSKV and merged heads a layer is
    one group, whatever is asked. Of rotated keys maps are principal components, in an orthogonal basis."""
    model, recipe = tiny.model(family), methods.METHODS[method]
    for layer, x in zip(compressed(model, method, 0.5, group_size=2).layers, seen(model), strict=True):
        for heads, side in ((x["k" if recipe.rotated else "u"], layer.keys), (x["v"], layer.values)):
            assert (side.offset is not None) == (bool(recipe.centred) or family == "llama3")
            assert (len(side.groups) == 1) == (recipe.groups == methods.LAYER)
            if side.offset is not None:
                torch.testing.assert_close(side.offset.double(), heads.mean(0), rtol=0, atol=1e-4)
                heads = heads - heads.mean(0)
            left = heads - mapped(heads, side)
            for g, (members, rank) in enumerate(zip(side.groups, side.ranks, strict=True)):
                of_group = list(members)
                assert_best(left[:, of_group].square().sum(), heads[:, of_group].flatten(1), rank)
                basis = side.block(g)[:rank]
                if recipe.rotated:
                    torch.testing.assert_close(basis @ basis.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_lorc_looks_at_weights_alone_and_early_layers_keep_more():
    model = tiny.model("mistral")
    factors = lrattn.compress(model, method="lorc", keep=0.5, progress=False)
    sizes = [layer.keys.width + layer.values.width for layer in factors.layers]
    assert factors.rule == "condition" and sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for layer, own in zip(factors.layers, attention_layers(model), strict=True):
        rows = weight(own, "keys")
        left = (rows - layer.keys.dense().double().T @ rows).square().sum()
        assert_best(left, rows, rank_of(layer.keys))
        conditions = [torch.linalg.cond(weight(own, side)) for side in ("keys", "values")]
        assert log_condition(own) == pytest.approx(sum(c.log().item() for c in conditions))
    chosen = compressed(model, "lorc", 0.5)
    assert chosen.rule == "uniform" and len({layer.keys.width for layer in chosen.layers}) <= 2


# KV heads merged, MatryoshkaKV's start, ThinK


def test_the_mean_key_counts_only_where_exact_keys_stand_beside_rebuilt_ones():
    """The same number is added to every score of a query: softmax does not see it. What is lost of the mean is the
    offset's own part, along no latent."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 30)
    factors, layers = compressed(model, "matryoshka-pca", 0.5), []
    for layer in factors.layers:
        kept = layer.keys.offset.flatten() @ layer.keys.dense()
        layers.append(replace(layer, keys=replace(layer.keys, offset=kept.view(4, 32))))
    both = factors, replace(factors, layers=tuple(layers))
    for window, seen in ((Window(), False), (Window(5, 0), True)):
        a, b = (on_latents(model, held, ids, window) for held in both)
        assert (a - b).abs().max() > 1e-2 if seen else (a - b).abs().max() < 1e-4


def test_think_leaves_the_values_whole_or_says_what_keep_it_needs():
    model = tiny.model("llama")
    factors = compressed(model, "think", 0.8)
    for layer in factors.layers:
        assert torch.equal(layer.values.dense(), torch.eye(128))
        assert torch.equal(layer.keys.dense().sum(1).view(4, 32).sum(1), torch.tensor(layer.keys.ranks).float())
        assert set(layer.keys.dense().unique().tolist()) == {0.0, 1.0}
    told = r"keep: expected at least 0\.750, all of the values, one step of 16 a group"
    refused(told, compressed, model, "think", 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["matryoshka-pca", "kv-heads", "lrattn-rotated"])
def test_factors_of_16_bits_are_those_of_32_rounded(method, dtype):
    """Means are sums in float64, and of 16-bit heads: no digit of an offset is lost to the size of a sum."""
    rounded, exact = (compressed(tiny.model("llama3", dtype=d), method, 0.5).layers for d in (dtype, torch.float32))
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == dtype
        for side, other in ((a.keys, b.keys), (a.values, b.values)):
            near(side.offset.float(), other.offset, 8 * torch.finfo(dtype).eps)
