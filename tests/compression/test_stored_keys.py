"""Where factors hold: keys turned to their place in a chunk at any position, rotated ones where they were averaged."""

from dataclasses import replace

import architectures
import pytest
import tiny
import torch
from heads import heads_of, latents_of
from test_calibrate import refused
from test_compress import never_read
from test_rotated import faster

import lrattn
from lrattn.compression import methods
from lrattn.compression.averages import Turns
from lrattn.compression.moments import about, mean_of
from lrattn.factors.formats import STEPS
from lrattn.factors.layer import sides_of
from lrattn.factors.summary import comparison, headline, summarize, table
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of

ROTATED = [name for name, method in methods.METHODS.items() if method.rotated and not method.exact]


def model_of(name):
    return (tiny if name in tiny.CONFIGS else architectures).model(name)


def compressed(model, *args, **choice):
    return lrattn.compress(model, *args, **{"far": (0, 0), "progress": False} | choice)


CHOICES = [
    ({}, 0.125, True),
    ({"method": "lrattn-rebuilt"}, 0.125, True),
    ({"method": "lrattn-rotated"}, 0.125, True),
    ({"keep": 0.3}, 0.3, True),
    ({"keep": 0.5}, 0.5, False),
    ({"keep": 1.0}, 1.0, False),
    ({"bits": 16}, 0.5, False),
    ({"bits": (8, 2)}, 0.125, True),
    ({"ranks": "uniform"}, 0.5, False),
    ({"refine": 1, "nested": True}, 0.5, False),
    ({"refine": 1}, 0.125, True),
    ({"method": "palu"}, 0.5, False),
    ({"method": "palu", "bits": 4}, 0.266, True),  # all latents there are, and their scales
    ({"bytes_per_token": 300}, 300 / 1536, True),
]


@pytest.mark.parametrize("choice, keep, packed", CHOICES)
def test_what_is_made_where_nothing_is_named(choice, keep, packed):
    factors = lrattn.compress(tiny.model("llama"), [tiny.tokens(4, 90)], **choice, progress=False)
    assert keep - 40 / factors.dense_bytes_per_token < factors.keep <= keep
    own = choice.get("method", "lrattn")
    assert factors.method.split(",")[0] == own and factors.near == methods.METHODS[own].near
    for layer in factors.layers:
        assert layer.packed == packed and layer.shared == (own == "lrattn-rebuilt")
        assert layer.chunk == (512 if own == "lrattn" else None)
        assert layer.absorbed == (own in ("lrattn", "lrattn-rotated"))
        assert layer.max_position == (90 if own == "lrattn-rotated" else None)
        for made in (*layer.keys.formats, *layer.values.formats) if layer.absorbed else ():
            widths = [bits for _, bits in made.segments]
            assert widths == sorted(set(widths), reverse=True) and set(widths) <= {8, 4, 2}
            assert all(rank % STEPS[bits] == 0 for rank, bits in made.segments)


def at(layer, rope, k, v, first):
    """Relative error of the keys of heads [b, t, Hkv, D] as if their text began at this position."""
    here = torch.arange(k.shape[1]).expand(k.shape[:2])
    moved = k if rope is None else rope.rotate(rope.turn_back(k, here), here + first).to(k.dtype)
    positions = None if layer.rope is None else here + first
    got, _ = layer.rebuild(*layer.project(moved, v, positions), positions)
    return ((got - moved).norm() / moved.norm()).item()


@pytest.mark.parametrize("name", ["llama3", "Llama, yarn", "GPT-NeoX", "Cohere"])
def test_what_is_lost_at_any_position_is_what_is_lost_at_the_first(name):
    """In chunks wherever it is; of rotated keys up to where they were averaged, and as published only as calibrated."""
    model, ids = model_of(name), architectures.tokens(6, 40)
    ropes, heads = ropes_of(model, attention_layers(model)), heads_of(model, ids)
    last = 360

    def lost(method, **choice):
        made = compressed(model, [ids], method, 0.5, ranks="uniform", **choice).layers
        return [
            torch.tensor([at(layer, rope, *kv, first) for layer, rope, kv in zip(made, ropes, heads, strict=True)])
            for first in (0, 64, last)
        ]

    for shared in (False, True):
        near, next_chunk, far = lost("lrattn", chunk=64, shared=shared)
        torch.testing.assert_close(next_chunk, near, rtol=1e-3, atol=1e-3)
        assert (far < near + 0.02).all()
    near, _, far = lost("kv-heads", positions=last + 40)
    assert (far < near + 0.02).all()
    as_published, _, beyond = lost("kv-heads")
    assert (as_published < near).any() and beyond.mean() > 1.1 * far.mean()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "Llama, yarn", "SmolLM3", "GPT-2"])
def test_keys_in_chunks_are_about_their_mean_and_packed_latents_of_one_size(name, shared):
    """By moments averaged over the places in a chunk; layers that are not turned have none. Values of models without
    biases are as they come. What no text has seen is damped by a millionth of its own side's size."""
    model, ids, chunk = model_of(name), tiny.tokens(4, 60), 128
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    factors = compressed(model, moments=moments, keep=0.35, chunk=chunk, shared=shared)
    ropes = ropes_of(model, attention_layers(model))
    assert (name in ("SmolLM3", "GPT-2")) == any(rope is None for rope in ropes)
    for i, (layer, rope) in enumerate(zip(factors.layers, ropes, strict=True)):
        assert (layer.rope, layer.chunk) == ((None, None) if rope is None else (rope, chunk)) and layer.packed
        seen = moments.seen(i, "keys")
        if rope is not None:
            seen = Turns.in_chunks(rope, chunk).moment(seen, layer.num_kv_heads, layer.head_dim)
        n, offset = layer.num_kv_heads * layer.head_dim, mean_of(seen)
        assert (layer.values.offset is not None) == (name in ("llama3", "qwen2", "GPT-2"))
        if layer.values.offset is None:
            offset[n:] = 0.0
        else:
            torch.testing.assert_close(layer.values.offset.flatten().double(), offset[n:], rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.keys.offset.flatten().double(), offset[:n], rtol=0, atol=1e-5)
        own = about(seen, offset)
        sides = {"values": own} if shared else {"keys": own[:n, :n], "values": own[n:, n:]}
        for side, second in sides.items():
            down = getattr(layer, side).down.double()
            unseen = second.diagonal().unflatten(0, (-1, n)).mean(1).repeat_interleave(n) * 1e-6
            size = (down * ((second + unseen.diag()) @ down)).sum(0)
            torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=2e-2)


@pytest.mark.parametrize("method, choice", [("lrattn", {"chunk": 64}), ("lrattn-rotated", {"positions": 400})])
def test_what_is_foreseen_is_by_moments_and_metrics_that_are_averaged(method, choice):
    model, ids = tiny.model("llama3"), tiny.tokens(6, 50)
    moments = lrattn.calibrate(model, [ids], gather=methods.METHODS[method].gather, progress=False)
    factors = compressed(model, moments=moments, method=method, keep=0.3, bits=16, **choice)
    rotated = method == "lrattn-rotated"
    for i, (layer, rope) in enumerate(zip(factors.layers, ropes_of(model, attention_layers(model)), strict=True)):
        turns = Turns(rope, 351) if rotated else Turns.in_chunks(rope, 64)
        lost, own = 0.0, (layer.num_kv_heads, layer.head_dim)
        for name, side in (("keys", layer.keys), ("values", layer.values)):
            metric, moment = moments.metric(i, name, rotated=rotated)
            n = len(metric)
            if not rotated:
                kept = [*range(n), 2 * n] if name == "keys" else [*range(n, 2 * n + 1)]
                moment = moment[kept][:, kept]
            if name == "keys":
                metric, moment = turns.metric(metric, *own), turns.moment(moment, *own)
            off = torch.eye(n, dtype=torch.float64) - side.dense().double()
            lost += torch.trace(metric @ off.T @ about(moment, side.offset.flatten().double()) @ off).item() / 2
        assert lost == pytest.approx(factors.predicted[i], rel=0.02)


def test_keys_in_chunks_are_turned_back_to_them_before_they_are_mapped():
    """Of a text that ends in its second chunk, by the record alone."""
    model, ids = tiny.model("llama3"), tiny.tokens(2, 100)
    factors = compressed(model, [ids], keep=1.0, chunk=64)
    for layer, (k, v) in zip(factors.layers, heads_of(model, ids), strict=True):
        positions = torch.arange(100).expand(2, 100)
        turned = layer.rope.rotate(layer.rope.turn_back(k, positions), positions % 64)
        z, _ = latents_of(layer, k, v)
        expected = (turned - layer.keys.offset).flatten(2) @ sides_of(layer.keys, layer.values)[0].down
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)


def test_shorter_chunks_and_one_row_are_foreseen_to_lose_less():
    """Down to keys before the rotation, which are those of chunks of one; rotated ones lose most, of a long context."""
    model, ids = tiny.model("llama"), tiny.tokens(8, 60)
    moments = lrattn.calibrate(model, [ids], gather=["before", "metric"], progress=False)
    rotated = lrattn.calibrate(model, [ids], gather=["rotated", "rotated-metric"], progress=False)
    for bits in (16, "auto"):
        choice = {"keep": 0.2, "bits": bits, "group_size": 4}
        lost = [
            [sum(compressed(model, moments=moments, chunk=n, shared=form, **choice).predicted) for n in (64, 512, 4096)]
            for form in (False, True)
        ]
        assert all(own == sorted(own) for own in lost)
        assert all(one < apart for apart, one in zip(*lost, strict=True))
        far = (
            sum(compressed(model, moments=rotated, method="lrattn-rotated", positions=n, **choice).predicted)
            for n in (60, 500, 4096)
        )
        assert (found := list(far)) == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize("method", ROTATED)
def test_rotated_factors_say_for_which_positions_they_are(method, tmp_path):
    model, ids = tiny.model("llama"), [tiny.tokens(4, 40)]
    recipe = methods.METHODS[method]
    keep = 0.75 if recipe.whole_values else 0.6 if recipe.groups == methods.HEAD else 0.3
    made = [compressed(model, ids, method, keep, bits=16, positions=n) for n in (None, 40, 300)]
    assert [{layer.max_position for layer in factors.layers} for factors in made] == [{40}, {40}, {300}]
    changed = False
    for a, b, c in zip(*(factors.layers for factors in made), strict=True):
        torch.testing.assert_close(a.keys.dense(), b.keys.dense(), rtol=0, atol=1e-4)
        torch.testing.assert_close(a.values.dense(), b.values.dense(), rtol=0, atol=1e-6)
        changed |= not torch.allclose(b.keys.dense(), c.keys.dense(), atol=1e-2)
    assert changed
    unknown = replace(lrattn.calibrate(model, ids, gather=recipe.gather, progress=False), longest=0)
    assert compressed(model, moments=unknown, method=method, keep=keep).layers[0].max_position is None
    told = "positions: expected None, the moments do not know"
    refused(told, compressed, model, moments=unknown, method=method, keep=keep, positions=99)
    told = "positions: expected as many as the calibration's longest sequence, 40, or more, got 39"
    refused(told, compressed, never_read(model), ids, method, keep, positions=39)
    if method != "kq-svd":  # it reads output projections, called otherwise there
        still = compressed(architectures.model("GPT-2"), ids, method, 1.0, positions=60)
        assert {layer.max_position for layer in still.layers} == {None}
    told = "^model: the keys of .* are turned in a way that its config does not tell"
    refused(told, compressed, faster(tiny.model("llama")), ids, method, keep, positions=99)


def test_info_says_where_factors_hold():
    model, ids = tiny.model("llama"), [tiny.tokens(4, 40)]
    makes = {
        "a": ({}, "keys turned to their place in chunks of 512: any position"),
        "b": ({"method": "lrattn-rebuilt"}, "keys before RoPE: any position"),
        "c": ({"method": "kv-heads", "positions": 4096}, "keys as attention is given them: for positions 0..4,095"),
        "d": ({"method": "lrattn-channels"}, "keys as attention is given them: for positions 0..39"),
    }
    found = {name: summarize(compressed(model, ids, **choice)) for name, (choice, _) in makes.items()}
    for name, (_, told) in makes.items():
        assert told in headline(found[name]).splitlines() and told in table(found[name])
    assert [x["chunk"] for x in found["a"]["layers"]] == [512] * 3
    assert [x["max_position"] for x in found["c"]["layers"]] == [4096] * 3
    unknown = summarize(lrattn.Factors([replace(x, max_position=None) for x in _layers(model, ids)]))
    lines = comparison(found | {"e": unknown}).splitlines()
    where = ["any position", "any position", "0..4,095", "0..39", "not recorded"]
    read = ["absorbed", "rebuilt", *["absorbed"] * 3]
    assert "positions" in lines[0].split()
    assert all(told in line and keys in line for line, told, keys in zip(lines[1:], where, read, strict=True))


def _layers(model, ids):
    return compressed(model, ids, "kv-heads").layers
