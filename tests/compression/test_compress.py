"""Methods and compress: exact where exactness is known, optimal where optimality is known."""

import sys
from contextlib import nullcontext
from itertools import cycle

import numpy as np
import pytest
import tiny
import torch

import lrattn
from lrattn.compression import methods
from lrattn.compression.methods.palu import decompose
from lrattn.compression.ranks import RULES
from lrattn.factors.parts import attention_parts
from lrattn.integrations.transformers import LatentCache, latent_attention

FAMILIES = tuple(tiny.CONFIGS)


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


def dense(up, down, rank=None):
    """The map [C * D, E] of factors cut at a rank."""
    return up[:, :rank].transpose(0, 1).flatten(1).T @ down[:, :rank].T


def test_palu_is_the_whitened_svd_and_loses_its_tail_energy():
    weight, x = problem()
    energies, up, down = decompose(weight, x.T @ x)
    for rank in (1, 16, 31):
        expected, tail = whitened_svd(weight, x, rank)
        torch.testing.assert_close(dense(up, down, rank), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss(weight, x, up[:, :rank], down[:, :rank]), tail, rtol=1e-4, atol=0)
        torch.testing.assert_close(energies[rank:].sum(), tail, rtol=1e-4, atol=0)
    _, flat_up, flat_down = decompose(weight, None)
    assert loss(weight, x, up[:, :16], down[:, :16]) < loss(weight, x, flat_up[:, :16], flat_down[:, :16])


def test_svd_is_the_best_map_of_the_weights():
    weight, _ = problem()
    energies, up, down = decompose(weight, None)
    left = (weight.flatten(0, 1) - dense(up, down, 16)).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(weight.flatten(0, 1))[16:].square().sum())
    torch.testing.assert_close(left, energies[16:].sum())


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("inputs", [40, 24])  # wider and narrower than the 32 outputs
def test_full_rank_is_exact(whitened, inputs):
    weight, x = problem(inputs=inputs)
    energies, up, down = decompose(weight, x.T @ x if whitened else None)
    n = min(32, inputs)
    assert energies.shape == (n,) and up.shape == (2, n, 16) and down.shape == (inputs, n)
    assert (energies.diff() <= 1e-9 * energies[0]).all()
    torch.testing.assert_close(dense(up, down), weight.flatten(0, 1))


@pytest.mark.parametrize("inputs", [40, 24])
def test_directions_the_calibration_never_saw_are_ranked_by_the_weights(inputs):
    weight, x = problem(inputs=inputs)
    _, up, down = decompose(weight, x[:8].T @ x[:8])
    torch.testing.assert_close(dense(up, down), weight.flatten(0, 1))
    up, down = up[:, :16], down[:, :16]
    assert loss(weight, x[:8], up, down) < 1e-6 * loss(weight, x[:8], up * 0, down)  # 8 tokens, 16 directions
    best = torch.linalg.svdvals(weight.flatten(0, 1))[16:].square().sum()
    left = (weight.flatten(0, 1) - dense(up, down)).square().sum()
    assert left < 2 * best


def least_squares(weight, x, down):
    """OVC as printed, on rows of real inputs: lstsq for L, the pseudo-inverse for R."""
    w = weight.flatten(0, 1)
    left = torch.linalg.lstsq(x @ down, x @ w.T, driver="gelsd").solution.T
    return left, torch.linalg.pinv(left) @ w


def test_ovc_is_the_paper_s_least_squares():
    weight, x = problem()
    _, _, down = decompose(weight, x.T @ x)
    other = x * torch.linspace(0.1, 3, 40, dtype=torch.float64)
    left, right = least_squares(weight, other, down[:, :16])
    up, refitted = methods.recalkv.calibrate_values(weight, down[:, :16], other.T @ other)
    torch.testing.assert_close(up.transpose(0, 1).flatten(1).T, left, rtol=1e-3, atol=1e-3 * left.abs().max().item())
    torch.testing.assert_close(refitted.T, right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


def test_ovc_changes_nothing_on_the_data_it_was_whitened_with_and_lowers_the_loss_on_other_data():
    weight, x = problem()
    _, up, down = decompose(weight, x.T @ x)
    up, down = up[:, :16], down[:, :16]
    again = methods.recalkv.calibrate_values(weight, down, x.T @ x)
    torch.testing.assert_close(dense(*again), dense(up, down), rtol=1e-3, atol=1e-3)
    other = x * torch.linspace(0.1, 3, 40, dtype=torch.float64)
    refitted = methods.recalkv.calibrate_values(weight, down, other.T @ other)
    _, best_up, best_down = decompose(weight, other.T @ other)
    before, after = loss(weight, other, up, down), loss(weight, other, *refitted)
    assert after < 0.9 * before
    assert loss(weight, other, best_up[:, :16], best_down[:, :16]) <= after * (1 + 1e-9)  # re-whitening is the limit


def test_ovc_keeps_full_rank_exact():
    for inputs in (40, 24):
        weight, x = problem(inputs=inputs)
        _, _, down = decompose(weight, x.T @ x)
        padded = torch.cat((down, down.new_zeros(len(down), 16)), 1)  # ranks are multiples of 16
        up, refitted = methods.recalkv.calibrate_values(weight, padded, x.T @ x)
        torch.testing.assert_close(dense(up, refitted), weight.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_reads_every_family(family):
    model = tiny.model(family)
    factors = lrattn.compress(model, [tiny.tokens(4, 40)], keep=0.3, group_size=4, far=(0, 0), progress=False)
    assert len(factors.layers) == 3 and factors.method == "lrattn" and len(factors.predicted) == 3
    full = all(layer.row_width == 96 for layer in factors.layers)  # a row of E latents is exact
    assert (full or 0.3 - 32 / factors.dense_bytes_per_token < factors.keep) and factors.keep <= 0.3
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
    batches = [tiny.tokens(2, 40)]
    a, b = (lrattn.compress(m, batches, "palu", progress=False).layers[0] for m in (plain, biased))
    assert torch.equal(a.keys.up, b.keys.up) and torch.equal(a.keys.down, b.keys.down)
    assert (b.keys.bias == 211.0).all()


def test_compress_does_not_change_the_model_and_repeats_exactly():
    model, ids = tiny.model("llama"), tiny.tokens(2, 40)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first, second = (lrattn.compress(model, [ids], far=(0, 0), progress=False) for _ in range(2))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(first.layers, second.layers, strict=True))
    moments = lrattn.calibrate(model, [ids], gather=["metric"], progress=False)
    third = lrattn.compress(model, moments=moments, far=(0, 0), progress=False)
    assert all(torch.equal(a.values.down, b.values.down) for a, b in zip(first.layers, third.layers, strict=True))


CHOICES = [(name, False) for name in methods.METHODS] + [("lrattn", "ride"), ("lrattn", True)]


def dense_weights(factors):
    return [side.dense() for layer in factors.layers for side in layer.sides]


def model_weights(model, rotated):
    """What `dense_weights` are at full rank: rotated keys are written from themselves."""
    for part in attention_parts(model):
        heads, dim = part.num_kv_heads, part.head_dim
        yield torch.eye(heads * dim).unflatten(0, (heads, dim)) if rotated else part.weight("k_proj")
        yield part.weight("v_proj")


def least_keep(method):
    """A share of this model's bytes that leaves room: a step of 16 a group of one head of 32 is half of it."""
    return 0.8 if method.whole_values else 0.6 if method.groups == methods.HEAD else 0.4


RULED = [(*choice, rule) for rule in RULES for choice in CHOICES if methods.METHODS[choice[0]].ruled_by(rule)]
# Each meets several families, and every rule all of them.
TURNS = [(*ruled, family) for ruled, family in zip(RULED, cycle(["mha", "qwen3", "qwen2"]))]


@pytest.mark.parametrize("method, shared, ranks, family", TURNS)
def test_every_method_meets_the_budget_and_is_exact_at_full_rank(method, shared, ranks, family):
    model, batches, keep = tiny.model(family), [tiny.tokens(4, 40)], least_keep(methods.METHODS[method])
    factors = lrattn.compress(model, batches, method, keep, 2, ranks=ranks, shared=shared, far=(0, 0), progress=False)
    full = lrattn.compress(model, batches, method, 1.0, 2, ranks=ranks, shared=shared, far=(0, 0), progress=False)
    least = min(keep - 32 / factors.dense_bytes_per_token, full.keep - 1e-9)
    assert least < factors.keep <= keep
    assert (factors.method, factors.rule) == (method, ranks)
    weights = model_weights(model, methods.METHODS[method].rotated)
    for got, expected in zip(dense_weights(full), weights, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def shuffled_mha(seed=0):
    """A model whose 8 kv heads are 4, each twice, shuffled. Also which head is a copy of which."""
    narrow, wide = tiny.model("llama"), tiny.model("mha")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    weights = narrow.state_dict()
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in ("k_proj", "v_proj"):
            weights[name] = weight.unflatten(0, (-1, 32)).repeat_interleave(2, 0)[order].flatten(0, 1)
        elif kind == "q_proj":
            weights[name] = weight.unflatten(0, (-1, 32))[order].flatten(0, 1)
        elif kind == "o_proj":
            weights[name] = weight.unflatten(1, (-1, 32))[:, order].flatten(1)
    wide.load_state_dict(weights)
    return wide, narrow, order


@pytest.mark.parametrize("method", ["recalkv-hsr", "recalkv-greedy"])
def test_copies_of_a_head_share_a_latent_at_no_loss(method):
    """Groups of two, one head's rank each: with copies together nothing is lost; in the model's order half of it is."""
    model, narrow, order = shuffled_mha()
    ids = tiny.tokens(4, 40)
    torch.testing.assert_close(model(ids).logits, narrow(ids).logits, rtol=0, atol=1e-4)
    factors = lrattn.compress(model, [ids], method, 0.5, 2, ranks="uniform", far=(0, 0), progress=False)
    for layer, part in zip(factors.layers, attention_parts(model), strict=True):
        assert all(len({order[h] // 2 for h in heads}) == 1 for heads in layer.keys.groups)
        torch.testing.assert_close(layer.keys.dense(), part.weight("k_proj"), rtol=0, atol=1e-4)
        assert len(layer.values.ranks) == 1 and len(layer.keys.ranks) == 4  # one value latent
    apart = lrattn.compress(model, [ids], "recalkv-neither", 0.5, 2, ranks="uniform", progress=False)
    assert any(
        (layer.keys.dense() - part.weight("k_proj")).norm() > 0.1 * part.weight("k_proj").norm()
        for layer, part in zip(apart.layers, attention_parts(model), strict=True)
    )


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
def test_groups_stay_within_a_shard(shards):
    """What each tensor-parallel rank holds attends as its heads of the whole do."""
    model, _, _ = shuffled_mha()
    factors = lrattn.compress(model, [tiny.tokens(4, 40)], "recalkv-hsr", 0.5, 4, shards=shards, progress=False)
    layer, width = factors.layers[0], max(8 // shards, 1)
    assert all(len({h // width for h in heads}) == 1 for heads in layer.keys.groups)
    x, positions = torch.randn(5, 96), torch.arange(5)
    whole = layer.rebuild(*layer.project(x), positions)
    for rank in range(shards):
        part = layer.shard(rank, shards)
        first = rank * 8 // shards
        for got, expected in zip(part.rebuild(*part.project(x), positions), whole, strict=True):
            torch.testing.assert_close(got, expected[:, first : first + width], rtol=0, atol=1e-5)


def test_each_part_of_recalkv_does_its_own_thing():
    """HSR changes the grouping of keys, OVC the values, from layer 1 on: layer 0 is whitened with what it sees."""
    model, _, _ = shuffled_mha()
    batches = [tiny.tokens(4, 40)]
    neither, hsr, ovc, both = (
        lrattn.compress(model, batches, f"recalkv{name}", 0.4, 2, ranks="uniform", progress=False).layers
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


def test_ovc_fits_the_values_on_what_the_compressed_model_sees():
    """Against each layer's inputs in a model that really is compressed up to there."""
    model = tiny.model("gemma3")
    ids = tiny.tokens(4, 40)
    plain = lrattn.compress(model, [ids], "recalkv-neither", 0.4, ranks="uniform", progress=False)
    refitted = lrattn.compress(model, [ids], "recalkv-ovc", 0.4, ranks="uniform", progress=False)
    twin = tiny.model("gemma3")
    for i, part in enumerate(attention_parts(twin)):
        seen = []
        hook = part.linear("v_proj").register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            twin(ids)
        hook.remove()
        x, weight = seen[0].flatten(0, 1), part.weight("v_proj")
        losses = [(x @ (weight - f.layers[i].values.dense()).flatten(0, 1).T).square().sum() for f in (plain, refitted)]
        assert losses[1] < losses[0] * (1 + 1e-4)
        assert i == 0 or losses[1] < 0.999 * losses[0]
        with torch.no_grad():
            for name, side in (("k_proj", refitted.layers[i].keys), ("v_proj", refitted.layers[i].values)):
                part.linear(name).weight.copy_(side.dense().flatten(0, 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ovc_leaves_padding_out(side):
    """A padded batch gives the factors of its sequences alone, and padding that is attended to would not."""
    model, ids, filler = tiny.model("llama"), tiny.tokens(2, 40), tiny.tokens(2, 9, seed=3)
    mask = torch.ones(2, 49, dtype=torch.int64)
    mask[:, slice(0, 9) if side == "left" else slice(40, 49)] = 0
    padded = torch.cat((filler, ids) if side == "left" else (ids, filler), 1)
    alone, batch, seen = (
        lrattn.compress(model, [b], "recalkv", 0.4, 2, ranks="uniform", progress=False)
        for b in (ids, {"input_ids": padded, "attention_mask": mask}, padded)
    )
    for a, b, c in zip(dense_weights(alone), dense_weights(batch), dense_weights(seen), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
        assert (a - c).abs().max() > 1e-2


def test_a_forward_of_the_model_s_own_comes_back():
    """As wrappers such as accelerate's leave on a module; also after an error halfway."""
    model, ids = tiny.model("llama"), [tiny.tokens(2, 20)]
    layers = model.model.layers
    own = layers[1].forward
    layers[1].forward = own
    for fails in (False, True):
        hook = layers[2].register_forward_pre_hook(lambda *_: 1 / 0) if fails else None
        moments = None if hook is None else lrattn.Moments([torch.eye(96).double()] * 3, 1)
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            lrattn.compress(model, ids, "recalkv-ovc", ranks="uniform", moments=moments, progress=False)
        assert layers[1].__dict__["forward"] is own
        assert all("forward" not in layers[i].__dict__ for i in (0, 2))
    hook.remove()


def test_compress_refuses_with_the_reason():
    model, ids = tiny.model("llama"), [tiny.tokens(1, 8)]
    refused = {
        r"method: expected one of \[.*'lrattn', .*\], got 'pca'": {"batches": ids, "method": "pca"},
        r"ranks: expected one of .* got 'best'": {"batches": ids, "ranks": "best"},
        "batches: method 'palu' needs calibration batches": {"method": "palu"},
        r"recent: expected a number of tokens": {"batches": ids, "method": "palu", "far": (-8, 1)},
        "shared: expected None or False with method 'palu'": {"batches": ids, "method": "palu", "shared": True},
        "shared: expected None or one of": {"batches": ids, "shared": "joint"},
        "batches: method 'recalkv' runs the compressed model on batches": {
            "method": "recalkv",
            "moments": lrattn.calibrate(model, ids, progress=False),
        },
        r"moments: expected batches, or moments of calibrate\(gather=\['fisher'\]\), got none": {
            "method": "svd",
            "ranks": "fisher",
        },
        r"moments of calibrate\(gather=\['fisher', 'metric'\]\), got moments with \[\]": {
            "ranks": "fisher",
            "moments": lrattn.calibrate(model, ids, progress=False),
        },
        "keep: expected": {"batches": ids, "keep": 2.0},
        "state: expected None where nothing is calibrated or distilled": {"method": "svd", "state": "s"},
        "sequences of at most 512 tokens, the model's positions": {"batches": [ids[0], tiny.tokens(1, 513)]},
        "shards: expected a divisor or a multiple of Hkv=4, got 3": {"batches": ids, "shards": 3},
        "batches: expected token batches, got Moments": {"batches": lrattn.calibrate(model, ids, progress=False)},
        "moments: expected those of this model": {
            "moments": lrattn.calibrate(tiny.model("llama", seed=1), ids, gather=["metric"], progress=False)
        },
    }
    for reason, arguments in refused.items():
        with pytest.raises(ValueError, match=reason):
            lrattn.compress(model, **arguments, progress=False)
    assert lrattn.compress(model, method="svd", progress=False).method == "svd"
    other = lrattn.calibrate(tiny.model("qwen3"), ids, progress=False)
    with pytest.raises(ValueError, match="moments: expected 3 layers"):
        lrattn.compress(model, method="palu", moments=lrattn.Moments(other.inputs[:2], other.tokens), progress=False)


WRONG = {
    "method": (None, 3, ["svd"]),
    "keep": ("0.5", True, float("nan"), 0, -0.5, 1.5, None),
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
    model = tiny.model("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for value in WRONG[name]:
        if name == "keep" and value is None:
            continue  # the default
        with pytest.raises(ValueError, match=rf"^{name}: expected [^\n]*, got "):
            lrattn.compress(model, **{"batches": [tiny.tokens(9, 90)], name: value}, progress=False)


@pytest.mark.parametrize("shared", [False, "ride", True])
@pytest.mark.parametrize("bits", [8, "auto"])
def test_a_budget_too_small_is_refused_before_any_work(shared, bits):
    """Up to a keep whose least row can be made, no model runs; from there on factors are made."""
    model, runs = tiny.model("qwen3"), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    refused = []
    for keep in (0.02, 0.05, 0.08, 0.1, 0.11):
        runs.clear()
        try:
            made = lrattn.compress(
                model, [tiny.tokens(1, 12)], keep=keep, bits=bits, shared=shared, far=(0, 0), progress=False
            )
            assert made.keep <= keep
        except ValueError as error:
            assert not runs and str(error).startswith("keep: expected at least")
            refused.append(keep)
    assert 0.02 in refused and 0.11 not in refused


def test_numbers_of_other_kinds_are_numbers():
    """As numpy gives them; and what cuts factors asks for the same share as what makes them."""
    model = tiny.model("llama")
    factors = lrattn.compress(model, method="svd", keep=np.float32(0.5), progress=False)
    assert factors.keep == lrattn.compress(model, method="svd", keep=0.5, progress=False).keep
    assert lrattn.narrowed(factors, np.float32(0.25)).keep == lrattn.narrowed(factors, 0.25).keep
    for keep in WRONG["keep"]:
        with pytest.raises(ValueError, match=rf"keep: expected a share in \(0, 1\], got {keep!r}"):
            lrattn.narrowed(factors, keep)
    with pytest.raises(ValueError, match=r"bytes_per_token: expected more, got 10 \(keep: expected at least"):
        lrattn.compress(model, method="svd", bytes_per_token=10, progress=False)


@pytest.mark.parametrize("method", ["svd", "lrattn", "kq-svd"])
@pytest.mark.parametrize("part", ["k_proj.weight", "v_proj.weight", "k_proj.bias"])
def test_a_weight_that_is_not_finite_is_refused_by_name(part, method):
    """Of the last layer, whose keys and values no other layer sees."""
    model = tiny.model("qwen2")
    name = f"model.layers.2.self_attn.{part}"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = torch.nan
    linear, kind = part.split(".")
    with pytest.raises(ValueError, match=f"model: expected a finite {kind} of model.layers.2.self_attn.{linear}, got"):
        lrattn.compress(model, [tiny.tokens(2, 90)], method, progress=False)


def test_progress_is_shown_and_can_be_turned_off(capsys):
    model, ids = tiny.model("llama"), tiny.tokens(2, 8)
    lrattn.compress(model, [ids], far=(0, 0))
    shown = capsys.readouterr().err
    assert "calibrate" in shown and "factor" in shown
    lrattn.compress(model, [ids], far=(0, 0), progress=False)
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
        moments = lrattn.calibrate(model, [ids], gather=["metric"], far=far, progress=False)
        assert lrattn.compress(model, moments=moments, progress=False).near == far
    moments = lrattn.calibrate(model, [ids], gather=["fisher"], far=(8, 1), progress=False)
    assert lrattn.compress(model, method="palu", ranks="fisher", moments=moments, progress=False).near == (8, 1)
    state = tmp_path / "state"
    for method in ("lrattn", "palu", "cskv"):
        lrattn.compress(model, [ids], method, state=state, progress=False)
    cache = LatentCache(model, factors)
    assert (cache.recent, cache.sinks) == (64, 4)
    cache = LatentCache(model, factors, sinks=0)
    assert (cache.recent, cache.sinks) == (64, 0)
    logits = []
    for near in ({}, {"recent": 64, "sinks": 4}, {"recent": 0, "sinks": 0}):
        with torch.no_grad(), latent_attention(model, factors, **near):
            logits.append(model(ids, use_cache=False).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=1e-3)
    for wrong in ((64, -1), (64,), (True, 0)):
        with pytest.raises(ValueError, match="near: expected two numbers of tokens"):
            lrattn.Factors(factors.layers, near=wrong)


def test_layers_whose_window_hides_far_tokens_cost_nothing():
    """Local layers of 12 tokens see nothing that a dense window of 64 does not hold: the bytes go to the others."""
    model, ids = tiny.model("gemma3"), tiny.tokens(2, 100)
    factors = lrattn.compress(model, [ids], keep=0.25, shared=False, progress=False)
    local = [part.window is not None for part in attention_parts(model)]
    widths = [layer.values.width for layer in factors.layers]
    assert any(local) and not all(local)
    felt, unfelt = ([w for w, own in zip(widths, local, strict=True) if own is near] for near in (False, True))
    assert max(unfelt) < min(felt)
    with torch.no_grad(), latent_attention(model, factors):
        got = model(ids, use_cache=False).logits
    assert got.isfinite().all()


def predicted(model, ids, **choice):
    moments = lrattn.calibrate(model, [ids], gather=["metric"], progress=False)
    return lrattn.compress(model, moments=moments, progress=False, **choice)


@pytest.mark.parametrize("shared", [False, "ride", True])
def test_the_predicted_loss_is_about_what_it_costs(shared):
    """Divergence from the model's own predictions on the calibration text, where little is cut: to a factor of 3."""
    model, ids = tiny.model("llama"), tiny.tokens(8, 60)
    factors = predicted(model, ids, keep={False: 0.6, "ride": 0.33, True: 0.33}[shared], shared=shared)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
        with latent_attention(model, factors):
            got = model(ids, use_cache=False).logits.log_softmax(-1)
    measured = (expected.exp() * (expected - got)).sum(-1).mean().item()
    assert measured / 3 < sum(factors.predicted) < measured * 3


def test_sharing_a_row_is_foreseen_to_lose_less():
    model, ids = tiny.model("mha"), tiny.tokens(8, 60)
    apart, ride, joint = (
        sum(predicted(model, ids, keep=0.16, shared=form).predicted) for form in (False, "ride", True)
    )
    assert max(ride, joint) < apart


def test_the_form_is_joint_where_keys_are_rebuilt_in_time(monkeypatch):
    """A group's row of up to so many latents; beyond it values ride on the key latent."""
    monkeypatch.setattr(sys.modules["lrattn.compression.compress"], "JOINT_WITHIN", 64)
    model, ids = tiny.model("mha"), [tiny.tokens(2, 20)]  # 8 heads of 32: 512 numbers in one group of 8
    for keep, group_size, joint in ((0.125, 8, True), (0.16, 8, False), (0.16, 4, True)):
        factors = lrattn.compress(
            model, ids, keep=keep, group_size=group_size, ranks="uniform", far=(0, 0), progress=False
        )
        assert all(layer.shared and (layer.keys.ranks == layer.values.ranks) == joint for layer in factors.layers)


def test_copies_of_a_head_share_rows_at_no_loss():
    """Clustered under the gradients' metric, keys and values at once."""
    model, _, order = shuffled_mha()
    factors = lrattn.compress(
        model, [tiny.tokens(4, 40)], keep=0.5, group_size=2, ranks="uniform", far=(0, 0), progress=False
    )
    for layer, part in zip(factors.layers, attention_parts(model), strict=True):
        assert all(len({order[h] // 2 for h in heads}) == 1 for heads in layer.keys.groups)
        for side, name in zip(layer.sides, ("k_proj", "v_proj"), strict=True):
            torch.testing.assert_close(side.dense(), part.weight(name), rtol=0, atol=1e-4)


def test_latents_are_of_the_size_of_keys_and_values():
    """Whatever the scale of the gradients: 16-bit numbers hold them."""
    model, ids = tiny.model("llama"), tiny.tokens(4, 40)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)  # gradients of 1e-8
    x = torch.randn(100, 96)
    for form in (False, "ride", True):
        layer = predicted(model, ids, keep=0.3, shared=form).layers[1]
        latents = [z for z in layer.project(x) if z is not None]
        assert all(1e-2 < z.square().mean().sqrt() < 1e2 for z in latents)


def test_refinement_follows_and_is_refused_where_it_cannot():
    model, ids = tiny.model("llama"), tiny.tokens(4, 20)
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
    assert 0.18 < cut.keep <= 0.2


def files(folder):
    return sorted(p.name.split(".")[0] + "".join(p.suffixes[-1:]) for p in folder.iterdir())


def test_a_distillation_goes_on_from_a_state_beside_the_calibration_s(tmp_path, monkeypatch):
    """Stopped half-way it comes to the same factors, bit for bit, with no text calibrated on twice."""
    model, ids, state = tiny.model("llama"), tiny.tokens(9, 20), tmp_path / "state"
    choice = {"keep": 0.3, "refine": 12, "far": (0, 0), "progress": False}
    whole = lrattn.compress(model, [ids], **choice)
    run = sys.modules["lrattn.compression.refine"]._Run
    learn, ran = run.learn, []

    def until(own, *args):
        if own.step == 5:
            raise KeyboardInterrupt
        learn(own, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "learn", until)
        lrattn.compress(model, [ids], **choice, state=state)
    assert files(tmp_path) == ["state", "state.refine"] and lrattn.Moments.load(state).sequences == 7
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    again = lrattn.compress(model, [ids], **choice, state=state)
    hook.remove()
    for a, b in zip(again.layers, whole.layers, strict=True):
        assert torch.equal(a.values.up, b.values.up) and torch.equal(a.values.down, b.values.down)
    assert again.method == whole.method == "lrattn, refined"
    assert len(ran) == 7 * 2 + 2 * 2 * 2  # steps 5 .. 11, two passes each; two judgements of two sequences
    model.register_forward_pre_hook(lambda *_: pytest.fail("of a finished run nothing is left to do"))
    done = lrattn.compress(model, [ids], **choice, state=state)
    assert torch.equal(done.layers[1].values.down, whole.layers[1].values.down)


def test_each_distillation_has_a_state_of_its_own(tmp_path):
    """Another share, other steps or more text: none meets the file of another, and the calibration serves them all."""
    model, ids, state = tiny.model("llama"), tiny.tokens(10, 20), tmp_path / "state"
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
    model, name = tiny.model("llama"), "n" * 250  # a name with room for no ending
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(OSError, match=r"^state: expected a place to write to, got .*\.refine \(File name too long\)$"):
        lrattn.compress(model, [tiny.tokens(9, 90)], refine=1, state=tmp_path / name, progress=False)


def test_what_judges_a_refinement_is_not_calibrated_on(monkeypatch):
    """Other text in the first of eight sequences leaves the factors that training starts from as they are."""
    model, ids = tiny.model("llama"), tiny.tokens(9, 20)
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
