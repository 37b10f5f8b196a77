"""Calibration, ranks, methods and compress: exact where exactness is known, optimal where optimality is known."""

import pytest
import tiny
import torch

import lrattn
from lrattn import methods, ranks
from lrattn.parts import attention_parts

FAMILIES = tuple(tiny.CONFIGS)


def inputs_of(model, ids, **kwargs):
    """What k_proj of every layer really sees, [tokens, E]."""
    seen = []
    hooks = [
        p.linear("k_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for p in attention_parts(model)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def test_moments_are_sums_over_the_tokens_seen():
    model, ids = tiny.model("llama"), tiny.tokens(4, 20)
    moments = lrattn.calibrate(model, [ids], progress=False)
    assert moments.tokens == 80
    for got, x in zip(moments.inputs, inputs_of(model, ids), strict=True):
        torch.testing.assert_close(got, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_moments_do_not_depend_on_the_batch_size():
    model, ids = tiny.model("llama"), tiny.tokens(6, 20)
    whole, *others = (lrattn.calibrate(model, ids.split(n), progress=False) for n in (6, 1, 4))
    for other in others:
        assert other.tokens == whole.tokens
        for a, b in zip(whole.inputs, other.inputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_padding_is_left_out_of_the_moments():
    model, ids = tiny.model("llama"), tiny.tokens(1, 20)
    padded = torch.cat((tiny.tokens(1, 5, seed=2), ids), 1)
    mask = torch.cat((torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)), 1)
    alone = lrattn.calibrate(model, [ids], progress=False)
    batch = lrattn.calibrate(model, [{"input_ids": padded, "attention_mask": mask}], progress=False)
    assert batch.tokens == alone.tokens == 20
    for a, b in zip(alone.inputs, batch.inputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_calibration_leaves_the_model_alone():
    model = tiny.model("qwen3").train()
    model.model.layers[1].eval()
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ValueError, match="batches: expected integer token ids"):
        lrattn.calibrate(model, [tiny.tokens(1, 4), torch.zeros(3)], progress=False)
    assert model.training and not model.model.layers[1].training
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    with pytest.raises(ValueError, match="expected at least one token"):
        lrattn.calibrate(model, [], progress=False)


SHAPES = [
    [ranks.LayerShape(3, 64, 3, 576)] * 30,
    [ranks.LayerShape(8, 128, 4, 4096)] * 3,
    [ranks.LayerShape(4, 64, 2, 512, key_norm=True)] * 5,
    [ranks.LayerShape(8, 128, 4, 1024), ranks.LayerShape(4, 256, 4, 1024)],
]


@pytest.mark.parametrize("keep", [0.16, 0.3, 1 / 3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("shapes", SHAPES)
def test_uniform_meets_the_budget_from_below(shapes, keep):
    chosen = ranks.uniform(shapes, keep)
    used = sum(sum(k) + sum(v) + s.norm_width for (k, v), s in zip(chosen, shapes, strict=True))
    budget = keep * sum(s.dense for s in shapes)
    full = all(r == s.full_rank for (k, v), s in zip(chosen, shapes, strict=True) for r in k + v)
    assert used <= budget + 1e-6 and (full or budget - used < 16)
    shares = [r / s.full_rank for (k, v), s in zip(chosen, shapes, strict=True) for r in k + v]
    steps = [16 / s.full_rank for s in shapes]
    assert max(shares) - min(shares) <= 2 * max(steps)  # uniform up to rounding
    assert all(r % 16 == 0 and 16 <= r <= s.full_rank for (k, v), s in zip(chosen, shapes, strict=True) for r in k + v)


def test_keep_outside_its_range_is_refused():
    for keep in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"keep: expected a share in \(0, 1\]"):
            ranks.uniform(SHAPES[0], keep)
    with pytest.raises(ValueError, match=r"keep: expected at least 0\.083, one step of 16 a group"):
        ranks.uniform(SHAPES[0], 0.05)


def test_group_size_is_the_largest_divisor_not_above():
    assert [ranks.group_size_within(h, 4) for h in (1, 2, 3, 8, 12, 7, 6)] == [1, 2, 3, 4, 4, 1, 3]
    with pytest.raises(ValueError, match="group_size"):
        ranks.group_size_within(8, 0)


def problem(heads=2, head_dim=16, inputs=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(heads, head_dim, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(500, inputs, generator=g, dtype=torch.float64) @ torch.randn(inputs, inputs, generator=g).double()
    return weight, x


def loss(weight, x, up, down):
    return (x @ weight.flatten(0, 1).T - x @ down @ up.transpose(0, 1).flatten(1)).square().sum()


def whitened_svd(weight, x, rank):
    """As Palu's paper does it: SVD of W S with S S^T = C, and S^-1 on the way back."""
    w = weight.flatten(0, 1)
    s = torch.linalg.cholesky(x.T @ x)
    u, d, vt = torch.linalg.svd(w @ s, full_matrices=False)
    return u[:, :rank] * d[:rank] @ vt[:rank] @ torch.linalg.inv(s), d[rank:].square().sum()


def test_palu_is_the_whitened_svd_and_loses_its_tail_energy():
    weight, x = problem()
    up, down = methods.palu.factorize(weight, x.T @ x, 16)
    expected, tail = whitened_svd(weight, x, 16)
    torch.testing.assert_close(up.transpose(0, 1).flatten(1).T @ down.T, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(weight, x, up, down), tail, rtol=1e-6, atol=0)
    assert loss(weight, x, up, down) < loss(weight, x, *methods.svd.factorize(weight, None, 16))


def test_svd_is_the_best_map_of_the_weights():
    weight, _ = problem()
    up, down = methods.svd.factorize(weight, None, 16)
    left = (weight.flatten(0, 1) - up.transpose(0, 1).flatten(1).T @ down.T).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(weight.flatten(0, 1))[16:].square().sum())


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("inputs", [40, 24])  # wider and narrower than the 32 outputs
def test_full_rank_is_exact(method, inputs):
    weight, x = problem(inputs=inputs)
    up, down = methods.METHODS[method](weight, x.T @ x, 32)
    assert up.shape == (2, 32, 16) and down.shape == (inputs, 32)
    torch.testing.assert_close(up.transpose(0, 1).flatten(1).T @ down.T, weight.flatten(0, 1))


@pytest.mark.parametrize("inputs", [40, 24])
def test_directions_the_calibration_never_saw_are_ranked_by_the_weights(inputs):
    weight, x = problem(inputs=inputs)
    few = x[:8].T @ x[:8]
    up, down = methods.palu.factorize(weight, few, 32)
    torch.testing.assert_close(up.transpose(0, 1).flatten(1).T @ down.T, weight.flatten(0, 1))
    up, down = methods.palu.factorize(weight, few, 16)
    assert loss(weight, x[:8], up, down) < 1e-6 * loss(weight, x[:8], up * 0, down)  # 8 tokens, 16 directions
    best = torch.linalg.svdvals(weight.flatten(0, 1))[16:].square().sum()
    left = (weight.flatten(0, 1) - up.transpose(0, 1).flatten(1).T @ down.T).square().sum()
    assert left < 2 * best


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_reads_every_family(family):
    model = tiny.model(family)
    factors = lrattn.compress(model, [tiny.tokens(4, 40)], keep=0.5, group_size=4, progress=False)
    assert len(factors.layers) == 3 and factors.method == "palu"
    assert 0.5 - 16 / factors.dense_numbers_per_token < factors.keep <= 0.5
    for layer, part in zip(factors.layers, attention_parts(model), strict=True):
        assert layer.keys.group_size == min(4, part.num_kv_heads)
        assert (layer.key_norm is not None) == (family in ("qwen3", "gemma3"))
        assert (layer.keys.bias is not None) == (family in ("llama3", "qwen2", "qwen2-window"))


def test_bias_takes_no_part_in_the_low_rank_map():
    """Twin models that differ in the k and v bias only, and see the same inputs in layer 0."""
    plain, biased = tiny.model("qwen2"), tiny.model("qwen2")
    with torch.no_grad():
        for part in attention_parts(biased):
            part.linear("k_proj").bias.fill_(211.0)
    a, b = (lrattn.compress(m, [tiny.tokens(2, 40)], progress=False).layers[0] for m in (plain, biased))
    assert torch.equal(a.keys.up, b.keys.up) and torch.equal(a.keys.down, b.keys.down)
    assert (b.keys.bias == 211.0).all()


def test_compress_does_not_change_the_model_and_repeats_exactly():
    model, ids = tiny.model("llama"), tiny.tokens(2, 40)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first, second = (lrattn.compress(model, [ids], progress=False) for _ in range(2))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(first.layers, second.layers, strict=True))
    moments = lrattn.calibrate(model, [ids], progress=False)
    third = lrattn.compress(model, moments, progress=False)
    assert all(torch.equal(a.values.down, b.values.down) for a, b in zip(first.layers, third.layers, strict=True))


def test_compress_refuses_with_the_reason():
    model = tiny.model("llama")
    with pytest.raises(ValueError, match=r"method: expected one of \['palu', 'svd'\], got 'pca'"):
        lrattn.compress(model, [tiny.tokens(1, 8)], method="pca", progress=False)
    with pytest.raises(ValueError, match="method 'palu' needs calibration batches"):
        lrattn.compress(model, method="palu", progress=False)
    with pytest.raises(ValueError, match="keep: expected"):
        lrattn.compress(model, [tiny.tokens(1, 8)], keep=2.0, progress=False)
    assert lrattn.compress(model, method="svd", progress=False).method == "svd"
    other = lrattn.calibrate(tiny.model("qwen3"), [tiny.tokens(1, 8)], progress=False)
    wrong = lrattn.Moments(other.inputs[:2], other.tokens)
    with pytest.raises(ValueError, match="batches: expected moments of 3 layers"):
        lrattn.compress(model, wrong, progress=False)


def test_progress_is_shown_and_can_be_turned_off(capsys):
    model, ids = tiny.model("llama"), tiny.tokens(2, 8)
    lrattn.compress(model, [ids])
    shown = capsys.readouterr().err
    assert "calibrate" in shown and "factor" in shown
    lrattn.compress(model, [ids], progress=False)
    assert capsys.readouterr().err == ""
