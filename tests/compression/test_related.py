"""Rows of the related work: each is the system it names, by the identities that define it."""

from dataclasses import replace

import pytest
import tiny
import torch
from given import given
from slowly import slow_unless
from test_substitute import logits, on_latents

import lrattn
from lrattn.compression import methods
from lrattn.compression.methods import kq_svd, think
from lrattn.compression.methods.lorc import log_condition
from lrattn.compression.substitute import Window
from lrattn.models.layers import attention_layers
from lrattn.models.weights import weight

ROTATED = [name for name, method in methods.METHODS.items() if method.rotated]
D = 16


def gram(x):
    return x.mT @ x


def random(*shape, seed=0):
    """Rows whose directions differ in size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.logspace(0, -1, shape[-1], dtype=torch.float64)


def compressed(model, method, keep, **arguments):
    ids = [tiny.tokens(4, 40)]
    return lrattn.compress(model, ids, method, keep, ranks="uniform", far=(0, 0), progress=False, **arguments)


def seen(model):
    """Of every layer, over the calibration tokens: inputs x [T, E], keys before RoPE u and rotated k, values v, and
    queries q [T, heads, D]; float64."""
    texts = [given(model, row) for row in tiny.tokens(4, 40)]
    return [{name: torch.cat([getattr(x, name) for x in own]) for name in "xukvq"} for own in zip(*texts, strict=True)]


def mapped(heads, side):
    """What the latents of a side without an offset make of its heads [T, Hkv, D]."""
    assert side.offset is None
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


def kq(keys, queries, rank):
    """A [D, r], which writes latents, and B [D, r], which queries are multiplied by, of one head."""
    _, up, down = kq_svd.decompose(torch.eye(D).double()[None], gram(keys), gram(queries))
    return down[:, :rank], up[0, :rank].T


def test_kq_svd_is_the_best_approximation_of_the_scores():
    keys, queries = random(300, D), random(500, D, seed=1).flip(1)
    scores = keys @ queries.T
    energies, _, _ = kq_svd.decompose(torch.eye(D).double()[None], gram(keys), gram(queries))
    stacked = torch.linalg.svd(torch.cat((keys, queries)), full_matrices=False)[2].T  # the basis of EigenAttention
    own = torch.linalg.svd(keys, full_matrices=False)[2].T
    for rank in (1, 5, 12):
        a, b = kq(keys, queries, rank)
        error = (scores - keys @ a @ b.T @ queries.T).square().sum()
        assert_best(error, scores, rank)
        torch.testing.assert_close(energies[rank:].sum(), error, rtol=1e-3, atol=0)
        for basis in (own[:, :rank], stacked[:, :rank]):  # K-SVD, and that of keys and queries stacked
            assert error < 0.99 * (scores - keys @ basis @ basis.T @ queries.T).square().sum()
        torch.testing.assert_close(b.T @ a, torch.eye(rank).double(), rtol=0, atol=1e-9)
    a, b = kq(keys, queries, D)
    torch.testing.assert_close(a @ b.T, torch.eye(D).double(), rtol=0, atol=1e-9)


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


def test_eigen_attention_has_one_key_basis_a_layer():
    model = tiny.model("llama")
    for rule in ("uniform", "spectrum"):
        factors = lrattn.compress(model, [tiny.tokens(4, 40)], "eigen", 0.63, ranks=rule, far=(0, 0), progress=False)
        for layer, x in zip(factors.layers, seen(model), strict=True):
            assert max(layer.keys.ranks) - min(layer.keys.ranks) <= 16 and len(layer.keys.ranks) == 4
            low, widest = min(layer.keys.ranks), max(layer.keys.up, key=lambda up: up.abs().sum())
            assert all(torch.equal(up[:low], widest[:low]) for up in layer.keys.up)
            basis = widest[:low].double()
            torch.testing.assert_close(basis @ basis.T, torch.eye(low).double(), rtol=0, atol=1e-5)
            error = (x["u"] - x["u"] @ basis.T @ basis).square().sum()
            assert_best(error, x["u"].flatten(0, 1), low)
    assert not any(layer.rope is None for layer in factors.layers)


# Whole layers: SVD-LLM, ASVD, CSKV, LoRC


def losses(model, factors, layer=0):
    """Squared error of keys before RoPE and of values on the calibration tokens; layer 0 sees the same whatever the
    factors."""
    x, made = seen(model)[layer], factors.layers[layer]
    return [(h - mapped(h, side)).square().sum() for h, side in ((x["u"], made.keys), (x["v"], made.values))]


def test_svd_llm_is_palu_with_one_group_and_cskv_its_optimum():
    model = tiny.model("mha")
    one, cskv, palu = (compressed(model, m, 0.25, group_size=8) for m in ("svd-llm", "cskv", "palu"))
    for a, b, c in zip(one.layers, cskv.layers, palu.layers, strict=True):
        assert len(a.keys.ranks) == len(a.values.ranks) == 1
        for side in ("keys", "values"):
            torch.testing.assert_close(getattr(a, side).dense(), getattr(c, side).dense())
            torch.testing.assert_close(getattr(b, side).dense(), getattr(a, side).dense())
    for i, (layer, x) in enumerate(zip(one.layers, seen(model), strict=True)):
        for heads, side, error in zip((x["u"], x["v"]), (layer.keys, layer.values), losses(model, one, i), strict=True):
            assert_best(error, heads.flatten(1), rank_of(side))
    small = compressed(model, "svd-llm", 0.25, group_size=1)
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(small.layers, one.layers, strict=True))


@pytest.mark.parametrize("family", ["llama", "mqa"])
def test_palu_is_the_whitened_svd_of_the_weights(family):
    """As published, W S = U D V^T with S S^T the moment of the inputs; as a map of the keys it is the same."""
    model = tiny.model(family)
    factors = compressed(model, "palu", 0.5, group_size=2)
    for layer, own, x in zip(factors.layers, attention_layers(model), seen(model), strict=True):
        root = torch.linalg.cholesky(gram(x["x"]) + 1e-9 * gram(x["x"]).trace() * torch.eye(96).double())
        for side, name, heads in ((layer.keys, "keys", x["u"]), (layer.values, "values", x["v"])):
            rebuilt = mapped(heads, side)
            for members, rank in zip(side.groups, side.ranks, strict=True):
                rows = weight(own, name).unflatten(0, (-1, 32))[list(members)].flatten(0, 1)
                u, d, v = torch.linalg.svd(rows @ root, full_matrices=False)
                map_of_inputs = u[:, :rank] * d[:rank] @ v[:rank] @ torch.linalg.inv(root)
                got, want = rebuilt[:, list(members)].flatten(1), x["x"] @ map_of_inputs.T
                assert (got - want).norm() < 1e-3 * want.norm()


def test_with_biases_palu_is_the_best_map_about_the_mean():
    """Which is no worse than about the bias, whose part is the same for every token, and needs no weights."""
    model = tiny.model("llama3")
    factors = compressed(model, "palu", 0.5, group_size=2)
    for layer, x in zip(factors.layers, seen(model), strict=True):
        for side, heads in ((layer.keys, x["u"]), (layer.values, x["v"])):
            mean = heads.mean(0)
            torch.testing.assert_close(side.offset.double(), mean, rtol=0, atol=1e-4)
            left = heads - mean - ((heads - mean).flatten(1) @ side.dense().double()).view(heads.shape)
            for members, rank in zip(side.groups, side.ranks, strict=True):
                error = left[:, list(members)].square().sum()
                assert_best(error, (heads - mean)[:, list(members)].flatten(1), rank)


def test_asvd_scales_its_inputs_and_undoes_that():
    """A model with biases: they are outside, as offsets."""
    model = tiny.model("llama3")
    factors = compressed(model, "asvd", 0.5, group_size=2)
    for layer, own, module, x in zip(factors.layers, attention_layers(model), modules(model), seen(model), strict=True):
        scale = x["x"].abs().mean(0).sqrt()  # alpha = 0.5
        assert torch.equal(layer.keys.offset.flatten(), module.k_proj.bias)
        heads = (x["u"].flatten(1) - module.k_proj.bias.detach().double()) @ layer.keys.dense().double()
        for g, members in enumerate(layer.keys.groups):
            rows = weight(own, "keys").unflatten(0, (-1, 32))[list(members)].flatten(0, 1)
            u, s, v = torch.linalg.svd(rows * scale, full_matrices=False)
            rank = layer.keys.ranks[g]
            want = x["x"] @ (u[:, :rank] * s[:rank] @ v[:rank] / scale).T
            got = heads.view(-1, 4, 32)[:, list(members)].flatten(1)
            assert (got - want).norm() < 1e-3 * want.norm()


def test_lorc_looks_at_weights_alone_and_early_layers_keep_more():
    model = tiny.model("mistral")
    factors = lrattn.compress(model, method="lorc", keep=0.5, far=(0, 0), progress=False)
    assert factors.rule == "condition" and 0.5 - 32 / factors.dense_bytes_per_token < factors.keep <= 0.5
    sizes = [layer.keys.width + layer.values.width for layer in factors.layers]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for layer, own in zip(factors.layers, attention_layers(model), strict=True):
        rows = weight(own, "keys")
        left = (rows - layer.keys.dense().double().T @ rows).square().sum()
        assert_best(left, rows, rank_of(layer.keys))
        conditions = [torch.linalg.cond(weight(own, side)) for side in ("keys", "values")]
        assert log_condition(own) == pytest.approx(sum(c.log().item() for c in conditions))
    chosen = lrattn.compress(model, method="lorc", keep=0.5, ranks="uniform", far=(0, 0), progress=False)
    assert chosen.rule == "uniform" and len({layer.keys.width for layer in chosen.layers}) <= 2


# KV heads merged, MatryoshkaKV's start, ThinK


def test_merged_heads_are_the_principal_components_of_a_layer_s_rotated_keys():
    model = tiny.model("mistral")
    for layer, x in zip(compressed(model, "kv-heads", 0.5).layers, seen(model), strict=True):
        keys = x["k"].flatten(1)
        down, up = layer.keys.down.double(), layer.keys.block(0).double()
        torch.testing.assert_close(up, down.T, rtol=0, atol=1e-5)
        error = (keys - keys @ down @ up).square().sum()
        assert_best(error, keys, rank_of(layer.keys))
        assert layer.keys.offset is None and len(layer.values.ranks) == 1


@pytest.mark.parametrize("family", ["llama3", "qwen3"])  # with biases and without
def test_matryoshka_starts_from_principal_components_about_the_mean(family):
    model = tiny.model(family)
    factors = compressed(model, "matryoshka-pca", 0.5)
    for layer, x in zip(factors.layers, seen(model), strict=True):
        k, v = x["k"], x["v"]
        latents = layer.project(k.float(), v.float())
        for heads, rebuilt, ranks in zip((k, v), layer.rebuild(*latents), (layer.keys.ranks, layer.values.ranks)):
            for h, rank in enumerate(ranks):
                y = heads[:, h]
                error = (y - rebuilt[:, h]).square().sum()
                assert_best(error, y - y.mean(0), rank)
                assert rank == 32 or error < 0.999 * torch.linalg.svdvals(y)[rank:].square().sum()
        latents = layer.project(k.mean(0, True).float(), v.mean(0, True).float())
        for rebuilt, heads in zip(layer.rebuild(*latents), (k, v), strict=True):  # the mean is exact at every rank
            torch.testing.assert_close(rebuilt[0].double(), heads.mean(0), rtol=0, atol=1e-4)


def test_latents_of_matryoshka_are_nested_in_an_orthogonal_basis():
    model = tiny.model("qwen3")
    half, whole = (compressed(model, "matryoshka-pca", keep).layers for keep in (0.5, 1.0))
    for a, b in zip(half, whole, strict=True):
        for up in b.keys.up.double():
            torch.testing.assert_close(up @ up.T, torch.eye(32).double(), rtol=0, atol=1e-5)
        assert torch.equal(a.keys.up, b.keys.up[:, :16]) and torch.equal(a.values.up, b.values.up[:, :16])
        torch.testing.assert_close(a.keys.offset, b.keys.offset)


def test_the_mean_key_counts_only_where_exact_keys_stand_beside_rebuilt_ones():
    """The same number is added to every score of a query: softmax does not see it. What is lost of the mean is the
    offset's own part, along no latent."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 30)
    factors = compressed(model, "matryoshka-pca", 0.5)
    layers = []
    for layer in factors.layers:
        lost = layer.keys.offset.flatten() - layer.keys.offset.flatten() @ layer.keys.dense()
        keys = replace(layer.keys, offset=layer.keys.offset - lost.view(4, 32))
        layers.append(replace(layer, keys=keys))
    without = replace(factors, layers=tuple(layers))
    changes = []
    for window in (Window(), Window(5, 0)):
        a, b = (on_latents(model, held, ids, window) for held in (factors, without))
        changes.append((a - b).abs().max())
    assert changes[0] < 1e-4 and changes[1] > 1e-2


def test_think_keeps_whole_channels_by_what_each_adds_to_the_scores():
    keys, queries = random(300, D), random(500, D, seed=1).flip(1)
    energies, up, down = think.decompose(torch.eye(D).double()[None], gram(keys), gram(queries))
    order = up[0].argmax(1)
    for energy, j in zip(energies, order, strict=True):
        torch.testing.assert_close(energy, torch.outer(queries[:, j], keys[:, j]).square().sum())
    assert (energies.diff() <= 0).all() and torch.equal(up[0].T @ up[0], torch.eye(D).double())
    torch.testing.assert_close(keys @ down[:, :5], keys[:, order[:5]])  # a product with 0 and 1 is a gather


def test_think_leaves_the_values_whole_or_says_what_keep_it_needs():
    model = tiny.model("llama")
    factors = compressed(model, "think", 0.8)
    for layer in factors.layers:
        assert torch.equal(layer.values.dense(), torch.eye(128))
        assert torch.equal(layer.keys.dense().sum(1).view(4, 32).sum(1), torch.tensor(layer.keys.ranks).float())
        assert set(layer.keys.dense().unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"keep: expected at least 0\.750, all of the values, one step of 16 a group"):
        compressed(model, "think", 0.7)


# All of rotated keys


@pytest.mark.parametrize("family", slow_unless(["llama3"], ["llama", "llama3", "gemma3", "mqa"]))
@pytest.mark.parametrize("method", ROTATED)
def test_models_attend_on_latents_of_rotated_keys(method, family):
    """Exactly at full rank; at less, the better the more is near and exact."""
    model, ids = tiny.model(family), tiny.tokens(2, 30)
    want = logits(model, ids)
    whole, factors = compressed(model, method, 1.0), compressed(model, method, 0.8)
    errors = [(on_latents(model, factors, ids, Window(n, 0)) - want).norm() / want.norm() for n in (0, 15, 30)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2 and errors[2] < 1e-5
    assert all(layer.rope is None and not layer.shared for layer in factors.layers) and factors.keep <= 0.8
    assert (on_latents(model, whole, ids) - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["matryoshka-pca", "kv-heads", "lrattn-rotated"])
def test_factors_of_16_bits_are_those_of_32_rounded(method, dtype):
    """Means are sums in float64, and of 16-bit heads: no digit of an offset is lost to the size of a sum."""
    rounded, exact = (compressed(tiny.model("llama3", dtype=d), method, 0.5).layers for d in (dtype, torch.float32))
    eps = torch.finfo(dtype).eps
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == dtype
        for side in ("keys", "values"):
            one, other = getattr(a, side).offset, getattr(b, side).offset
            assert (one.float() - other).norm() < 8 * eps * other.norm()
