"""Rows of the related work: each is the system it names, by the identities that define it."""

import pytest
import tiny
import torch

import lrattn
from lrattn.compression import methods
from lrattn.compression.methods import eigen, kq_svd, think
from lrattn.compression.methods.lorc import log_condition
from lrattn.factors.parts import attention_parts
from lrattn.integrations.transformers import LatentCache, latent_attention

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
    """Of every layer: inputs [T, E], rotated queries [T, Hq, D] and keys [T, Hkv, D], values [T, Hkv, D]: float64."""
    ids, found = tiny.tokens(4, 40), []
    for part in attention_parts(model):
        inputs = []
        hook = part.linear("k_proj").register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(ids)
        hook.remove()
        x, at = inputs[0], torch.arange(40).expand(4, 40)
        with torch.no_grad():
            heads = part.rotated("q", x, at), part.rotated("k", x, at), part.heads("v", x)
        found.append([y.flatten(0, 1).double() for y in (x, *heads)])
    return found


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


def test_kq_svd_does_not_see_how_scale_is_divided_between_keys_and_queries():
    keys, queries = random(300, D), random(500, D, seed=1).flip(1)
    a, b = kq(keys, queries, 5)
    for scale in (1e-3, 30.0):
        c, d = kq(keys * scale, queries / scale, 5)
        torch.testing.assert_close(c @ d.T, a @ b.T, rtol=0, atol=1e-8)


def test_kq_svd_from_grams_is_that_from_the_tokens():
    """A = K^+ U_r and B = K^T U_r of K Q^T = U S V^T, as printed."""
    keys, queries = random(300, D), random(500, D, seed=1).flip(1)
    u = torch.linalg.svd(keys @ queries.T, full_matrices=False)[0][:, :6]
    a, b = kq(keys, queries, 6)
    expected = u @ u.T @ keys @ queries.T
    left = keys @ a @ b.T @ queries.T - expected
    assert left.norm() < 1e-4 * expected.norm()
    torch.testing.assert_close((keys @ a) @ torch.linalg.pinv(keys @ a), u @ u.T, rtol=0, atol=1e-2)


def test_kq_svd_of_a_model_is_of_its_scores_and_of_what_values_add_to_the_output():
    """Per kv head, its query heads stacked; output projections are not averaged, their Gram matrices are."""
    model = tiny.model("qwen3")
    factors = compressed(model, "kq-svd", 0.6)
    for layer, part, (x, q, k, v) in zip(factors.layers, attention_parts(model), seen(model), strict=True):
        read, written = layer.keys.dense().double(), layer.values.dense().double()
        wo = part.linear("o_proj").weight.detach().double().T.unflatten(0, (-1, 32))  # [Hq, D, E]
        for h in range(4):
            queries, out = q[:, 2 * h : 2 * h + 2].flatten(0, 1), wo[2 * h : 2 * h + 2]
            scores = k[:, h] @ queries.T
            got = (scores - k.flatten(1) @ read[h].T @ queries.T).square().sum()
            assert_best(got, scores, layer.keys.ranks[h])
            added = torch.cat([v[:, h] @ w for w in out], 1)
            got = torch.cat([(v[:, h] - x @ written[h].T) @ w for w in out], 1).square().sum()
            assert_best(got, added, layer.values.ranks[h])


# EigenAttention


def test_eigen_attention_has_one_key_basis_a_layer():
    model = tiny.model("llama")
    for rule in ("uniform", "spectrum"):
        factors = lrattn.compress(model, [tiny.tokens(4, 40)], "eigen", 0.63, ranks=rule, far=(0, 0), progress=False)
        for layer, part, (x, *_) in zip(factors.layers, attention_parts(model), seen(model), strict=True):
            assert max(layer.keys.ranks) - min(layer.keys.ranks) <= 16 and len(layer.keys.ranks) == 4
            low, widest = min(layer.keys.ranks), max(layer.keys.up, key=lambda up: up.abs().sum())
            assert all(torch.equal(up[:low], widest[:low]) for up in layer.keys.up)
            keys = torch.einsum("te,hde->htd", x, part.weight("k_proj").double())
            basis = widest[:low].double()
            torch.testing.assert_close(basis @ basis.T, torch.eye(low).double(), rtol=0, atol=1e-5)
            error = (keys - keys @ basis.T @ basis).square().sum()
            assert_best(error, keys.flatten(0, 1), low)
    assert not any(layer.rotated for layer in factors.layers)


def test_eigen_attention_on_one_head_is_its_whitened_svd():
    weight, x = random(1, D, 40, seed=2), random(300, 40)
    ((energies, up, down),) = eigen.decompose_keys(weight, gram(x))
    expected, palu_up, palu_down = methods.palu.decompose(weight, gram(x))
    torch.testing.assert_close(energies, expected)
    torch.testing.assert_close(down[:, :5] @ up[0, :5], palu_down[:, :5] @ palu_up[0, :5])


# Whole layers: SVD-LLM, ASVD, CSKV, LoRC


def losses(model, factors, layer=0):
    """Squared error of keys and of values on the calibration tokens, before the rotation; layer 0 sees the same."""
    x = seen(model)[layer][0]
    part, made = attention_parts(model)[layer], factors.layers[layer]
    pairs = (("k_proj", made.keys), ("v_proj", made.values))
    return [(x @ (part.weight(n) - side.dense()).double().flatten(0, 1).T).square().sum() for n, side in pairs]


def test_svd_llm_is_palu_with_one_group_and_cskv_its_optimum():
    model = tiny.model("mha")
    one, cskv, palu = (compressed(model, m, 0.25, group_size=8) for m in ("svd-llm", "cskv", "palu"))
    for a, b, c in zip(one.layers, cskv.layers, palu.layers, strict=True):
        assert len(a.keys.ranks) == len(a.values.ranks) == 1
        for side in ("keys", "values"):
            torch.testing.assert_close(getattr(a, side).dense(), getattr(c, side).dense())
            torch.testing.assert_close(getattr(b, side).dense(), getattr(a, side).dense())
    for part, layer, (x, *_) in zip(attention_parts(model), one.layers, seen(model), strict=True):
        y = x @ part.weight("k_proj").double().flatten(0, 1).T
        error = (y - x @ layer.keys.dense().double().flatten(0, 1).T).square().sum()
        assert_best(error, y, rank_of(layer.keys))
    small = compressed(model, "svd-llm", 0.25, group_size=1)
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(small.layers, one.layers, strict=True))


def test_cskv_s_training_ends_at_its_closed_form():
    """Alternating least squares of the layer's own outputs, from ASVD's factors as published."""
    model = tiny.model("mha")
    start, end = (compressed(model, m, 0.125, group_size=8) for m in ("asvd", "cskv"))
    x = seen(model)[1][0]
    y = x @ attention_parts(model)[1].weight("v_proj").double().flatten(0, 1).T
    down = start.layers[1].values.down.double()
    for _ in range(300):
        up = torch.linalg.lstsq(x @ down, y).solution
        down = torch.linalg.lstsq(x, y).solution @ torch.linalg.pinv(up)
    expected = losses(model, end, 1)[1]
    assert losses(model, start, 1)[1] > 1.02 * expected
    torch.testing.assert_close((y - x @ down @ up).square().sum(), expected, rtol=1e-2, atol=0)


def test_asvd_scales_its_inputs_and_undoes_that():
    model = tiny.model("llama3")
    factors = compressed(model, "asvd", 0.5, group_size=2)
    for layer, part, (x, *_) in zip(factors.layers, attention_parts(model), seen(model), strict=True):
        scale = x.abs().mean(0).sqrt()  # alpha = 0.5
        for g, heads in enumerate(layer.keys.groups):
            u, s, v = torch.linalg.svd(part.weight("k_proj")[list(heads)].double().flatten(0, 1) * scale)
            rank = layer.keys.ranks[g]
            expected = u[:, :rank] * s[:rank] @ v[:rank] / scale
            got = layer.keys.dense()[list(heads)].double().flatten(0, 1)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_no_other_scaling_loses_less_than_whitening():
    model = tiny.model("mha")
    best, *others = (losses(model, compressed(model, m, 0.2, group_size=8)) for m in ("svd-llm", "asvd", "lorc"))
    for other in others:
        assert all(a < 0.999 * b for a, b in zip(best, other, strict=True))


def test_lorc_looks_at_weights_alone_and_early_layers_keep_more():
    model = tiny.model("qwen3")
    factors = lrattn.compress(model, method="lorc", keep=0.5, far=(0, 0), progress=False)
    assert factors.rule == "condition" and 0.5 - 32 / factors.dense_bytes_per_token < factors.keep <= 0.5
    sizes = [layer.keys.width + layer.values.width for layer in factors.layers]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for layer, part in zip(factors.layers, attention_parts(model), strict=True):
        weight = part.weight("k_proj").flatten(0, 1)
        left = (weight - layer.keys.dense().flatten(0, 1)).square().sum()
        assert_best(left, weight, rank_of(layer.keys))
        conditions = [torch.linalg.cond(part.weight(name).double().flatten(0, 1)) for name in ("k_proj", "v_proj")]
        assert log_condition(part) == pytest.approx(sum(c.log().item() for c in conditions))
    chosen = lrattn.compress(model, method="lorc", keep=0.5, ranks="uniform", far=(0, 0), progress=False)
    assert chosen.rule == "uniform" and len({layer.keys.width for layer in chosen.layers}) <= 2


# KV heads merged, MatryoshkaKV's start, ThinK


def test_merged_heads_are_the_principal_components_of_a_layer_s_rotated_keys():
    model = tiny.model("qwen2")
    for layer, (*_, k, _) in zip(compressed(model, "kv-heads", 0.5).layers, seen(model), strict=True):
        keys = k.flatten(1)
        down, up = layer.keys.down.double(), layer.keys.block(0).double()
        torch.testing.assert_close(up, down.T, rtol=0, atol=1e-5)
        error = (keys - keys @ down @ up).square().sum()
        assert_best(error, keys, rank_of(layer.keys))
        assert layer.keys.bias is None and len(layer.values.ranks) == 1


def test_matryoshka_starts_from_principal_components_about_the_mean():
    model = tiny.model("llama3")  # it has biases
    factors = compressed(model, "matryoshka-pca", 0.5)
    for layer, (x, _, k, v) in zip(factors.layers, seen(model), strict=True):
        zk, zv = layer.project(x.float(), k.float())
        for heads, rebuilt, ranks in zip((k, v), layer.rebuild(zk, zv), (layer.keys.ranks, layer.values.ranks)):
            for h, rank in enumerate(ranks):
                y = heads[:, h]
                error = (y - rebuilt[:, h]).square().sum()
                assert_best(error, y - y.mean(0), rank)
                assert rank == 32 or error < 0.999 * torch.linalg.svdvals(y)[rank:].square().sum()
        zk, zv = layer.project(x.mean(0, True).float(), k.mean(0, True).float())
        for rebuilt, heads in zip(layer.rebuild(zk, zv), (k, v), strict=True):  # the mean is exact at every rank
            torch.testing.assert_close(rebuilt[0].double(), heads.mean(0), rtol=0, atol=1e-4)


def test_latents_of_matryoshka_are_nested_in_an_orthogonal_basis():
    model = tiny.model("qwen3")
    half, whole = (compressed(model, "matryoshka-pca", keep).layers for keep in (0.5, 1.0))
    for a, b in zip(half, whole, strict=True):
        for up in b.keys.up.double():
            torch.testing.assert_close(up @ up.T, torch.eye(32).double(), rtol=0, atol=1e-5)
        assert torch.equal(a.keys.up, b.keys.up[:, :16]) and torch.equal(a.values.up, b.values.up[:, :16])
        torch.testing.assert_close(b.keys.bias, torch.zeros(4, 32), rtol=0, atol=1e-6)  # nothing of the mean is lost


def test_the_mean_key_counts_only_where_exact_keys_stand_beside_rebuilt_ones():
    """The same number is added to every score of a query: softmax does not see it."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 30)
    factors = compressed(model, "matryoshka-pca", 0.5)
    bare = lrattn.Factors(
        tuple(
            lrattn.LayerFactors(lrattn.Projection(x.keys.up, x.keys.ranks, x.keys.down), x.values, None, rotated=True)
            for x in factors.layers
        )
    )
    changes = []
    for recent in (0, 5):
        outputs = []
        for held in (factors, bare):
            with torch.no_grad(), latent_attention(model, held, recent=recent):
                outputs.append(model(ids, use_cache=False).logits)
        changes.append((outputs[0] - outputs[1]).abs().max())
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
    for layer, part in zip(factors.layers, attention_parts(model), strict=True):
        assert torch.equal(layer.values.dense(), part.weight("v_proj"))
        assert torch.equal(layer.keys.dense().sum((1, 2)), torch.tensor(layer.keys.ranks).float())
        assert set(layer.keys.dense().unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"keep: expected at least 0\.750, all of the values, one step of 16 a group"):
        compressed(model, "think", 0.7)


# All of rotated keys


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mqa"])
@pytest.mark.parametrize("method", ROTATED)
def test_models_attend_on_latents_of_rotated_keys(method, family):
    """Exactly at full rank; at less, token by token as in one pass."""
    model, ids = tiny.model(family), tiny.tokens(2, 30)
    whole, factors = compressed(model, method, 1.0), compressed(model, method, 0.8)
    with torch.no_grad():
        expected = model(ids).logits
        with latent_attention(model, whole):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=2e-3)
        with latent_attention(model, factors, recent=4):
            once, cache = model(ids, use_cache=False).logits, LatentCache(model, factors, recent=4)
            split = [model(part, past_key_values=cache).logits for part in ids.split((17, 1, 1, 11), 1)]
        torch.testing.assert_close(torch.cat(split, 1), once, rtol=0, atol=1e-4)
    assert all(layer.rotated and layer.rope is None for layer in factors.layers)


@pytest.mark.parametrize("method", ROTATED)
def test_rotated_keys_are_divided_over_shards(method):
    model = tiny.model("mha")
    layer = compressed(model, method, 0.8, shards=2).layers[0]
    x, keys = torch.randn(5, 96), torch.randn(5, 8, 32)
    whole = layer.rebuild(*layer.project(x, keys))
    for rank in range(2):
        part, own = layer.shard(rank, 2), slice(4 * rank, 4 * rank + 4)
        for got, expected in zip(part.rebuild(*part.project(x, keys[:, own])), whole, strict=True):
            torch.testing.assert_close(got, expected[:, own], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_value_bias_may_hold_what_latents_lose_of_the_mean_and_nothing_else(dtype):
    model = tiny.model("llama3", dtype=dtype)
    factors = compressed(model, "matryoshka-pca", 0.5)
    LatentCache(model, factors)
    LatentCache(model, compressed(model, "matryoshka-pca", 1.0))
    layer = factors.layers[0]
    other = layer.values.bias + layer.values.up[:, 0]  # along a direction that a latent spans
    values = lrattn.Projection(layer.values.up, layer.values.ranks, layer.values.down, other)
    changed = lrattn.LayerFactors(layer.keys, values, None, rotated=True)
    with pytest.raises(ValueError, match="the value bias of"):
        LatentCache(model, lrattn.Factors((changed, *factors.layers[1:])))
