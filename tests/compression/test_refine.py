"""Distillation of factors: it lowers the divergence, is never worse than its start, goes on where it was."""

import math
import sys

import pytest
import tiny
import torch

import lrattn
from lrattn.compression.substitute import Window
from lrattn.integrations.transformers import latent_attention


def divergence(model, factors, ids, **near):
    """Of the predictions on latents from the model's own, nats a token, by attention on the latents themselves."""
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
        with latent_attention(model, factors, **near):
            got = model(ids, use_cache=False).logits.log_softmax(-1)
    return (expected.exp() * (expected - got)).sum(-1).mean().item()


def text(sequences=4, length=48):
    """Random tokens teach nothing about others: the sequences that judge are copies of some that are trained on."""
    ids = tiny.tokens(sequences, length)
    ids[::8] = ids[1::8]
    return ids


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "llama"])
@pytest.mark.parametrize("shared", [False, "ride", True])
def test_the_divergence_falls(family, shared):
    model, ids = tiny.model(family), text()
    start = lrattn.compress(model, [ids], keep=0.3, shared=shared, far=(0, 0), progress=False)
    end = lrattn.refine(model, start, [ids], steps=40, progress=False)
    assert end.keep == start.keep and [x.keys.ranks for x in end.layers] == [x.keys.ranks for x in start.layers]
    assert divergence(model, end, ids[::8]) < 0.9 * divergence(model, start, ids[::8])
    assert end.method == "lrattn, refined" and end.predicted == ()


@pytest.mark.parametrize("method", ["kq-svd", "kv-heads", "matryoshka-pca"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_factors_of_rotated_keys_are_trained_on_rotated_keys(family, method):
    """What training divides by is what attention on the latents does; and it falls."""
    model, ids = tiny.model(family), text()
    start = lrattn.compress(model, [ids], method, 0.5, far=(0, 0), progress=False)
    run = sys.modules["lrattn.compression.refine"]._Run(model, start, Window(), (1.0,))
    with torch.no_grad():
        assert run.divergence(ids[0], run.expected(ids[0]), 1.0).item() == pytest.approx(
            divergence(model, start, ids[:1]), rel=1e-3
        )
    end = lrattn.refine(model, start, [ids], steps=40, progress=False)
    assert divergence(model, end, ids[::8]) < 0.9 * divergence(model, start, ids[::8])


def test_the_window_is_exact_in_training_too():
    """What was trained beyond a window does better with it than what was trained without."""
    model, ids = tiny.model("llama"), text()
    start = lrattn.compress(model, [ids], keep=0.2, far=(6, 1), progress=False)
    near = {"recent": 6, "sinks": 1}
    assert start.near == (6, 1)
    with_window = lrattn.refine(model, start, [ids], steps=24, **near, progress=False)
    without = lrattn.refine(model, start, [ids], steps=24, recent=0, sinks=0, progress=False)
    assert with_window.near == (6, 1) and without.near == (0, 0)
    losses = [divergence(model, f, ids, **near) for f in (with_window, without, start)]
    assert losses[0] < losses[1] and losses[0] < losses[2]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_factors_near_the_model_take_steps_short_enough_to_gain(family):
    """Steps of the longest kind overshoot here, and give back the start. None are needed from an exact one."""
    model, ids = tiny.model(family), text(8)
    start = lrattn.compress(model, [ids], keep=0.6, shared=False, far=(0, 0), progress=False)
    assert 1e-3 < divergence(model, start, ids[::8]) < 0.03
    end = lrattn.refine(model, start, [ids], steps=24, progress=False)
    assert divergence(model, end, ids[::8]) < 0.9 * divergence(model, start, ids[::8])
    exact = lrattn.compress(model, [ids], keep=1.0, far=(0, 0), refine=2, progress=False)
    assert abs(divergence(model, exact, ids)) < 1e-5


def test_never_worse_than_its_start(monkeypatch):
    """Steps so long that they ruin the factors: the ones given come back."""
    monkeypatch.setattr(sys.modules["lrattn.compression.refine"], "RATE", 30.0)
    model, ids = tiny.model("llama"), text()
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    end = lrattn.refine(model, start, [ids], steps=8, progress=False)
    for a, b in zip(start.layers, end.layers, strict=True):
        assert torch.equal(a.values.up, b.values.up) and torch.equal(a.values.down, b.values.down)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    module = sys.modules["lrattn.compression.refine"]
    model, ids = tiny.model("llama"), text()
    start = lrattn.compress(model, [ids], keep=0.3, shared=False, far=(0, 0), progress=False)
    whole = lrattn.refine(model, start, [ids], steps=20, progress=False)
    learn, path = module._Run.learn, tmp_path / "run.safetensors"

    def until(run, *args):
        if run.step == 13:
            raise KeyboardInterrupt
        learn(run, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Run, "learn", until)
        lrattn.refine(model, start, [ids], steps=20, state=path, progress=False)
    again = lrattn.refine(model, start, [ids], steps=20, state=path, progress=False)
    for a, b in zip(whole.layers, again.layers, strict=True):
        torch.testing.assert_close(a.keys.down, b.keys.down, rtol=1e-5, atol=1e-6)
    for wrong in ({"steps": 21}, {"steps": 20, "recent": 3}):
        with pytest.raises(ValueError, match="state: expected a run of these factors, steps and text"):
            lrattn.refine(model, start, [ids], state=path, progress=False, **wrong)
    with pytest.raises(ValueError, match="state: expected a run of these factors, steps and text"):
        lrattn.refine(model, start, [text() + 1], steps=20, state=path, progress=False)


def test_padding_takes_no_part():
    model, ids = tiny.model("llama"), text(8)
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    mask = torch.cat((torch.zeros(8, 5, dtype=torch.int64), torch.ones_like(ids)), 1)
    padded = {"input_ids": torch.cat((tiny.tokens(8, 5, seed=4), ids), 1), "attention_mask": mask}
    a, b = (lrattn.refine(model, start, [batch], steps=6, progress=False) for batch in (ids, padded))
    for x, y in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(x.values.down, y.values.down, rtol=1e-5, atol=1e-6)


def test_the_model_is_left_alone_and_bad_input_refused():
    model, ids = tiny.model("llama"), text(4)
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        refined = lrattn.refine(model.train(), start, [ids], steps=2, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(side.up.requires_grad for layer in refined.layers for side in (layer.keys, layer.values))
    for arguments, reason in (
        ({"batches": [ids[:1]]}, "batches: expected two sequences"),
        ({"batches": [ids], "steps": 0}, "steps: expected at least 1"),
        ({"batches": [ids], "recent": -1}, "recent: expected"),
        ({"batches": [ids], "factors": start.to(dtype=torch.float64)}, "factors: expected torch.float32 on cpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            lrattn.refine(model, **{"factors": start} | arguments, progress=False)
    assert math.isfinite(divergence(model.eval(), refined, ids))
