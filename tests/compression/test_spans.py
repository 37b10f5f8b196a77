"""Rows that several layers share: what is summed for them, and the factors that lose least."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import lrattn
from lrattn.compression.moments import SIDES
from lrattn.compression.problem import Problem
from lrattn.models.layers import attention_layers, runs_of
from lrattn.models.weights import weight

FAR = {"far": (8, 1), "progress": False}
GATHER = ("before", "metric")


def texts():
    return [tiny.tokens(2, 60, seed) for seed in range(3)]


def gathered(model, span, **more):
    return lrattn.calibrate(model, texts(), gather=GATHER, far=(8, 1), span=span, progress=False, **more)


def test_sums_of_a_run_are_those_of_its_layers_side_by_side():
    """What a layer has alone stands in the run's: of what is held all, of gradients as they are weighed by the run."""
    model = tiny.model("qwen2")
    one, two = gathered(model, 1), gathered(model, 2)
    assert (one.layers, two.layers, two.span) == (3, 2, 2)
    n = attention_layers(model)[0].dense
    for i in range(3):
        own, run, place = one.sum("before", i), two.sum("before", i // 2), i % 2
        parts = 2 if i < 2 else 1
        at = [torch.arange(n) + n * place, torch.arange(n) + n * (parts + place), torch.tensor([2 * n * parts])]
        at = torch.cat(at)
        torch.testing.assert_close(run[at][:, at], own, rtol=1e-6, atol=1e-6 * own.abs().max().item())
    for side in SIDES:  # |g|^2 of a run is the sum of its layers': the trace of g g^T / |g| is its |g|
        sizes = [one.sum(f"metric.{side}", i).trace() for i in range(2)]
        assert max(sizes) < two.sum(f"metric.{side}", 0).trace() < sum(sizes)
        torch.testing.assert_close(two.sum(f"metric.{side}", 1), one.sum(f"metric.{side}", 2), rtol=1e-5, atol=1e-9)
        run, own = two.sum(f"metric.{side}", 0), [one.sum(f"metric.{side}", i).flatten() for i in range(2)]
        for i in range(2):  # a layer's block is like its own, where that of another layer is not
            block = run[i * n : i * n + n, i * n : i * n + n].flatten()
            like = [torch.cosine_similarity(block, x, dim=0) for x in own]
            assert like[i] > 0.95 and like[i] > like[1 - i] + 0.1


def test_a_run_loses_less_than_its_layers_apart_at_equal_bytes():
    """One joint row holds what the layers' own rows would, and chooses among all of their directions."""
    model = tiny.model("llama")
    for method in ("lrattn", "lrattn-rebuilt"):
        lost = []
        for span in (1, 3):
            factors = lrattn.compress(
                model, None, method, 0.25, bits=16, shared=True, moments=gathered(model, span), span=span, **FAR
            )
            assert factors.keep <= 0.25 and factors.span == span
            lost.append(sum(factors.predicted))
        assert lost[1] < lost[0]


def test_factors_of_a_run_are_the_optimum_of_the_run_as_one_layer():
    """Parts of the layers add up to the row of one layer that has all their heads."""
    model, moments = tiny.model("llama"), gathered(tiny.model("llama"), 3)
    factors = lrattn.compress(model, None, "lrattn-rebuilt", 0.2, bits=16, moments=moments, span=3, **FAR)
    (run,) = runs_of(attention_layers(model), 3)
    shape = lrattn.compression.recipe.shape_of(run, lrattn.methods.METHODS["lrattn-rebuilt"], 4, 1)
    problem = Problem(
        run,
        replace(shape, shared=True),
        lrattn.methods.METHODS["lrattn-rebuilt"],
        True,
        moments,
        0,
        factors.layers[0].rope,
    )
    rank = factors.layers[0].values.width
    whole = problem.factor(((rank,), (rank,)), None)
    assert problem.lost == pytest.approx(sum(factors.predicted))
    k, v = (torch.randn(3, 5, 4, 32) for _ in range(2))  # [layers, T, Hkv, D]
    at = torch.arange(5)
    parts = [x.project(k[i], v[i], at)[0] for i, x in enumerate(factors.layers)]
    row, _ = whole.project(*(torch.cat(list(x), 1) for x in (k, v)), at)
    torch.testing.assert_close(sum(parts), row, rtol=1e-4, atol=1e-4 * row.abs().max().item())
    heads = whole.rebuild(row, None, at)
    for i, layer in enumerate(factors.layers):
        for got, want in zip(layer.rebuild(row, None, at), heads, strict=True):
            torch.testing.assert_close(got, want[:, 4 * i : 4 * i + 4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_groups_of_a_run_have_heads_of_every_layer(group_size):
    model = tiny.model("llama")
    factors = lrattn.compress(model, texts(), "lrattn", 1.0, group_size, bits=16, span=3, **FAR)
    for layer in factors.layers:
        assert layer.keys.groups == tuple(tuple(range(a, a + group_size)) for a in range(0, 4, group_size))
        assert layer.values.ranks == (2 * 3 * group_size * 32,) * (4 // group_size)


def test_rows_of_keys_before_rope_are_joint_too():
    """No value rides where several layers read a row, however wide it is."""
    factors = lrattn.compress(tiny.model("llama"), texts(), "lrattn-rebuilt", 0.4, span=2, **FAR)
    assert all(layer.keys.ranks == layer.values.ranks for layer in factors.layers)


def test_biases_and_offsets_are_of_each_layer():
    """At full rank a layer's own part gives its own heads back."""
    model = tiny.model("llama3")
    factors = lrattn.compress(model, texts(), "lrattn-rebuilt", 1.0, bits=16, span=2, **FAR)
    k, v, at = torch.randn(5, 4, 32), torch.randn(5, 4, 32), torch.arange(5)
    for layer in factors.layers:
        assert layer.keys.offset.shape == (4, 32)
        for got, want in zip(layer.rebuild(*layer.project(k, v, at), at), (k, v), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


def test_commonkv_is_one_svd_and_merges_by_weights_that_add_up_to_one():
    """A row of layers whose latents are alike is each one's latent, at any rank; with rank for all it is exact."""
    model = tiny.model("llama")
    first, second, _ = (layer.self_attn for layer in model.model.layers)
    for name in ("k_proj", "v_proj"):
        getattr(second, name).weight.data = getattr(first, name).weight.data.clone()
    layers = attention_layers(model)
    w = torch.cat([weight(layer, side) for side in SIDES for layer in layers[:2]])
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    factors = lrattn.compress(model, None, "commonkv", 0.25, span=2, progress=False)
    rank = factors.layers[0].values.width
    x = torch.randn(7, 96)
    for layer in factors.layers[:2]:  # both read the same x: what one SVD of both makes of it
        rows = 0.0
        for own, source in zip(factors.layers[:2], layers, strict=False):
            heads = [(x.double() @ weight(source, side).T).float().unflatten(1, (4, 32)) for side in SIDES]
            heads[0] = own.rope.rotate(heads[0], torch.arange(7))
            rows = rows + own.project(*heads, torch.arange(7))[0]
        got = torch.cat([h.flatten(1) for h in layer.rebuild(rows, None, torch.arange(7))], 1)
        best = (x.double() @ vt[:rank].T * s[:rank]) @ u[:, :rank].T
        keys, values = best.chunk(2, 1)
        keys = layer.rope.rotate(keys.chunk(2, 1)[0].float().unflatten(1, (4, 32)), torch.arange(7)).flatten(1)
        torch.testing.assert_close(got, torch.cat((keys, values.chunk(2, 1)[0].float()), 1), rtol=0, atol=1e-3)
    q = u.split(len(u) // 4)  # keys of both, values of both
    torch.testing.assert_close(sum(part.T @ part for part in q), torch.eye(len(s), dtype=torch.float64))
    assert factors.near == (128, 4) and lrattn.compress(model, None, "commonkv", progress=False).span == 4


def test_a_state_goes_on_with_its_own_runs(tmp_path):
    model = tiny.model("llama")
    whole = gathered(model, 2)
    state = tmp_path / "state"
    lrattn.calibrate(model, texts()[:1], gather=GATHER, far=(8, 1), span=2, state=state, progress=False)
    again = gathered(model, 2, state=state)
    assert again.span == 2 and again.tokens == whole.tokens
    torch.testing.assert_close(again.sum("before", 0), whole.sum("before", 0))
    with pytest.raises(ValueError, match=r"state: expected sums over runs of 3 layers in .*, as span=3 needs, got 2"):
        gathered(model, 3, state=state)
    with pytest.raises(ValueError, match=r"moments: expected those of calibrate\(span=3\), got span=2"):
        lrattn.compress(model, None, moments=whole, span=3, **FAR)
    with pytest.raises(ValueError, match=r"moments: expected those of calibrate\(span=1\), got span=2"):
        lrattn.compress(model, None, moments=whole, **FAR)


def test_runs_that_cannot_be_are_refused_before_any_work():
    model = tiny.model("llama")
    for more, told in (
        ({"span": 0}, "span: expected an integer of at least 1, got 0"),
        ({"span": 2, "shared": False}, "span: expected 1, as rows of several layers are of keys and values together"),
        ({"span": 2, "method": "palu"}, "span: expected 1, .*with method 'palu'"),
        ({"span": 2, "method": "lrattn-rotated"}, "span: expected 1, .*with method 'lrattn-rotated'"),
        ({"span": 2, "method": "l2norm"}, "span: expected none with method 'l2norm', which compresses no heads"),
        ({"span": 2, "refine": 2}, "span: expected 1 with refine="),
        ({"span": 2, "ranks": "condition"}, "span: expected 1 with refine= or ranks"),
        ({"method": "commonkv", "ranks": "condition"}, "ranks: expected one of .'spectrum', 'uniform'."),
        ({"span": 2, "ranks": "fisher"}, "span: expected 1 with refine= or ranks"),
        ({"method": "commonkv", "shared": False}, "shared: expected None or True with method 'commonkv'"),
    ):
        with pytest.raises(ValueError, match=told):
            lrattn.compress(model, texts(), progress=False, **more)
    with pytest.raises(ValueError, match="gather: expected 'before' and 'metric' with span=2"):
        lrattn.calibrate(model, texts(), gather=("before", "fisher"), span=2, progress=False)
    with pytest.raises(ValueError, match="span: expected the rope of layer 0 in layer 1, which shares its rows"):
        lrattn.compress(tiny.model("gemma3"), texts(), span=2, **FAR)


def test_a_thirty_second_takes_rows_of_8_layers():
    """Nothing else said of rows, and where layers are alike; salient tokens may be asked for beside it."""
    model, text = tiny.model("llama"), [tiny.tokens(2, 90)]
    factors = lrattn.compress(model, text, keep=1 / 32, progress=False)
    assert factors.span == 8 and factors.select is None and factors.near == (64, 4) and 1 / 50 < factors.keep <= 1 / 32
    salient = lrattn.compress(model, text, keep=1 / 32, salient=0.2, progress=False)
    assert salient.span == 8 and salient.select == lrattn.Selection("zipcache", 0.2, 512)
    assert 1 / 40 < 0.2 * salient.keep + 0.8 * salient.rest.keep <= 1 / 32
    assert lrattn.compress(model, text, keep=0.045, span=1, shared=True, progress=False).span == 1
    assert lrattn.compress(model, text, keep=0.08, progress=False).span == 1
    assert lrattn.compress(model, text, keep=np.float32(1 / 32), progress=False).span == 8
    with pytest.raises(ValueError, match=r"bytes_per_token: expected None beside keep=0.03125"):
        lrattn.compress(model, text, keep=1 / 32, bytes_per_token=300, progress=False)
    with pytest.raises(ValueError, match="keep: expected at least"):
        lrattn.compress(tiny.model("gemma3"), text, keep=1 / 32, progress=False)
