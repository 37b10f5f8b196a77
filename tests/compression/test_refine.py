"""Distillation of factors: it lowers the divergence, is never worse than its start, goes on where it was."""

import copy
import math
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace

import architectures
import pytest
import tiny
import torch
from test_calibrate import StoppedAt

import lrattn
from lrattn.compression.substitute import Window
from lrattn.factors import safefile
from lrattn.integrations.transformers import latent_attention

refining = sys.modules["lrattn.compression.refine"]  # lrattn.refine is the function


def divergence(model, factors, ids, **near):
    """Of the predictions on latents from the model's own, nats a token, by attention on the latents themselves."""
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
        with latent_attention(model, factors, **near):
            got = model(ids, use_cache=False).logits.log_softmax(-1)
    return (expected.exp() * (expected - got)).sum(-1).mean().item()


def same_bits(a, b):
    for x, y in zip(a.layers, b.layers, strict=True):
        assert torch.equal(x.keys.up, y.keys.up) and torch.equal(x.values.down, y.values.down)


def recomputed(factors):
    """The same factors as another machine may find them: other signs, other roundings."""

    def side(x):
        return replace(x, up=x.up * -(1 + 1e-6), down=None if x.down is None else -x.down)

    layers = [replace(x, keys=side(x.keys), values=side(x.values)) for x in factors.layers]
    return replace(factors, layers=tuple(layers))


@contextmanager
def stopped_at(step):
    """Ctrl-C in the step after so many."""
    learned = refining._Run.learned

    def until(run, at, *args):
        if at.step == step:
            raise KeyboardInterrupt
        return learned(run, at, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(refining._Run, "learned", until)
        yield


def text(sequences=4, length=48):
    """Random tokens teach nothing about others: the sequences that judge are copies of some that are trained on."""
    ids = tiny.tokens(sequences, length)
    ids[::8] = ids[1::8]
    return ids


@pytest.mark.parametrize(
    "family, method, shared, keep, steps",
    [
        *(("qwen2", "lrattn", form, 0.3, 40) for form in (False, "ride")),
        ("gemma3", "lrattn", False, 0.3, 40),
        *((family, "lrattn", True, 0.3, 40) for family in ("gemma3", "llama")),
        ("llama", "kq-svd", False, 0.5, 40),  # rotated keys
        ("qwen3", "kv-heads", False, 0.5, 40),
        ("qwen2", "matryoshka-pca", False, 0.5, 40),
        *((family, "lrattn", False, 0.6, 24) for family in ("llama", "qwen2")),  # so near that longer steps overshoot
    ],
)
def test_the_divergence_falls(family, method, shared, keep, steps):
    """Also of factors of rotated keys, and of those so near the model that steps of the longest kind overshoot."""
    model, ids = tiny.model(family), text(4 if keep < 0.6 else 8)
    start = lrattn.compress(model, [ids], method, keep, shared=shared, far=(0, 0), progress=False)
    end = lrattn.refine(model, start, [ids], steps=steps, progress=False)
    assert end.keep == start.keep and [x.keys.ranks for x in end.layers] == [x.keys.ranks for x in start.layers]
    before, after = (divergence(model, factors, ids[::8]) for factors in (start, end))
    assert after < 0.9 * before and (keep < 0.6 or 1e-3 < before < 0.03)
    assert end.method == f"{method}, refined" and end.predicted == ()


def test_exact_factors_stay_exact():
    model, ids = tiny.model("llama"), text(8)
    exact = lrattn.compress(model, [ids], keep=1.0, far=(0, 0), refine=2, progress=False)
    assert abs(divergence(model, exact, ids)) < 1e-5


@pytest.mark.parametrize(
    "family, method, shared, keep, near",
    [
        ("llama", "kq-svd", False, 0.5, (0, 0)),
        ("qwen3", "kv-heads", False, 0.5, (6, 3)),
        ("qwen2", "matryoshka-pca", False, 0.5, (0, 0)),
        ("gemma3", "palu", False, 0.5, (0, 0)),
        ("qwen2", "lrattn", "ride", 0.2, (6, 3)),
        ("mistral", "lrattn", True, 0.2, (0, 0)),
        ("gpt-oss", "palu", False, 0.5, (6, 3)),
        ("Gemma-2", "kv-heads", False, 0.5, (0, 0)),
        ("SmolLM3", "lrattn", True, 0.3, (6, 3)),
    ],
)
def test_what_training_lowers_is_what_attention_on_the_latents_does(family, method, shared, keep, near):
    """Maps of rotated keys and of others, with biases, means, sinks, softcaps, windows and a dense window."""
    model, ids = (tiny if family in tiny.CONFIGS else architectures).model(family), text()
    start = lrattn.compress(model, [ids], method, keep, shared=shared, far=near, progress=False)
    run = refining._Run(model, start, Window(*near), (1.0,))
    assert run.begun([ids[0]]).least == pytest.approx(divergence(model, start, ids[:1]), rel=1e-3)


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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_window_that_holds_the_whole_text_leaves_nothing_to_learn(family):
    model, ids = tiny.model(family), text(4, 20)
    start = lrattn.compress(model, [ids], keep=0.2, far=(0, 0), progress=False)
    same_bits(lrattn.refine(model, start, [ids], steps=2, recent=20, progress=False), start)


def test_never_worse_than_its_start(monkeypatch):
    """Steps so long that they ruin the factors: the ones given come back."""
    monkeypatch.setattr(refining, "RATE", 30.0)
    model, ids = tiny.model("llama"), text()
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    same_bits(lrattn.refine(model, start, [ids], steps=8, progress=False), start)


def test_an_interrupted_run_goes_on(tmp_path):
    model, ids = tiny.model("llama"), text()
    start = lrattn.compress(model, [ids], keep=0.3, shared=False, far=(0, 0), progress=False)
    whole = lrattn.refine(model, start, [ids], steps=20, progress=False)
    path = tmp_path / "run.safetensors"

    with stopped_at(13), pytest.raises(KeyboardInterrupt):
        lrattn.refine(model, start, [ids], steps=20, state=path, progress=False)
    assert safefile.read(path, "refinement")[0]["step"] == 13
    early = shutil.copy(path, tmp_path / "early.safetensors")
    same_bits(lrattn.refine(model, start, [ids], steps=20, state=path, progress=False), whole)
    same_bits(lrattn.refine(model, recomputed(start), [ids], steps=20, state=early, progress=False), whole)
    other = lrattn.compress(model, [tiny.tokens(4, 48, seed=9)], keep=0.3, far=(0, 0), shared=False, progress=False)
    for wrong in ({"factors": other}, {"steps": 21}, {"recent": 3}, {"batches": [ids + 1]}):
        with pytest.raises(ValueError, match="state: expected a run of these factors, steps and text"):
            lrattn.refine(**{"model": model, "factors": start, "batches": [ids], "steps": 20} | wrong, state=path)


def test_a_step_whose_judgement_was_stopped_is_taken_again(tmp_path, monkeypatch):
    """A judgement that would have been the best is not lost: it belongs to its step."""
    model, ids, path = tiny.model("llama"), text(), tmp_path / "run.safetensors"
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    judged, stops = refining._Run.judged, [False, True, False]

    def stopped(run, at, judges):
        if at.step == 8 and stops.pop(0):
            raise KeyboardInterrupt
        return at._replace(least=-1.0, best=at.now) if at.step == 8 else judged(run, at, judges)

    monkeypatch.setattr(refining._Run, "judged", stopped)
    whole = lrattn.refine(model, start, [ids], steps=12, progress=False)
    with pytest.raises(KeyboardInterrupt):
        lrattn.refine(model, start, [ids], steps=12, state=path, progress=False)
    assert safefile.read(path, "refinement")[0]["step"] == 7
    same_bits(lrattn.refine(model, start, [ids], steps=12, state=path, progress=False), whole)
    assert not stops


@pytest.mark.parametrize("nested", [False, True])
def test_ctrl_c_at_any_line_leaves_whole_steps(nested, tmp_path):
    """In a step, in a judgement or between them: what is saved goes on to the same factors, bit for bit."""
    config = copy.deepcopy(tiny.CONFIGS["llama"])
    config.num_hidden_layers = 1
    model, ids, path = tiny.built(config, 0), text(3, 12), tmp_path / "run.safetensors"
    start = lrattn.compress(model, [ids], keep=0.2, far=(0, 0), progress=False)
    choice = {"steps": 10, "nested": nested, "progress": False}
    expected = lrattn.refine(model, start, [ids], **choice)
    with StoppedAt("refine.py", 0) as whole:
        lrattn.refine(model, start, [ids], **choice, state=path)
    found = []
    for n in range(1, whole.lines, whole.lines // 12):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), StoppedAt("refine.py", n):
            lrattn.refine(model, start, [ids], **choice, state=path)
        found.append(safefile.read(path, "refinement")[0]["step"] if path.exists() else -1)
        same_bits(lrattn.refine(model, start, [ids], **choice, state=path), expected)
    assert found == sorted(found) and len(set(found)) > 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_padding_takes_no_part():
    model, ids = tiny.model("llama"), text(8)
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    mask = torch.cat((torch.zeros(8, 5, dtype=torch.int64), torch.ones_like(ids)), 1)
    padded = {"input_ids": torch.cat((tiny.tokens(8, 5, seed=4), ids), 1), "attention_mask": mask}
    a, b = (lrattn.refine(model, start, [batch], steps=6, progress=False) for batch in (ids, padded))
    for x, y in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(x.values.down, y.values.down, rtol=1e-5, atol=1e-6)


def test_dropout_takes_no_part():
    model, ids = architectures.model("GPT-2"), architectures.tokens(4, 30)
    assert model.config.resid_pdrop > 0
    start = lrattn.compress(model, [ids], keep=0.3, shared=False, far=(0, 0), progress=False)
    same_bits(*(lrattn.refine(model.train(mode), start, [ids], steps=2, progress=False) for mode in (False, True)))


def test_the_model_is_left_alone_and_bad_input_refused():
    model, ids = tiny.model("llama"), text(4)
    start = lrattn.compress(model, [ids], keep=0.3, far=(0, 0), progress=False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        refined = lrattn.refine(model.train(), start, [ids], steps=2, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(side.up.requires_grad for layer in refined.layers for side in (layer.keys, layer.values))
    packed = lrattn.compress(model, [ids], "svd", bits=8, progress=False)
    older = replace(start, layers=[replace(x, values=replace(x.values, of_inputs=True)) for x in start.layers])
    fewer = replace(start, layers=start.layers[:2], predicted=(), samples=())
    for arguments, reason in (
        ({"batches": [ids[:1]]}, "batches: expected two sequences"),
        *(({"steps": steps}, "steps: expected an integer of at least 1, got") for steps in (0, True, "8", 1.5, None)),
        ({"nested": "yes"}, "nested: expected True or False, got 'yes'"),
        ({"recent": True}, "recent: expected"),
        ({"factors": packed}, "factors: expected plain latents"),
        ({"batches": [ids], "factors": older}, "factors: expected maps of heads, .* before version 3: use in_kv_space"),
        ({"batches": [ids], "factors": fewer}, "factors: expected 3 layers as in the model, got 2"),
        ({"state": 5}, "state: expected a path, got 5"),
        ({"batches": {"input_ids": ids}}, "batches: expected several of token ids"),
        ({"batches": [ids, tiny.tokens(1, 513)]}, "batches: expected sequences of at most 512 tokens, the model's pos"),
        ({"batches": [ids], "recent": -1}, "recent: expected"),
        ({"batches": [ids], "factors": start.to(dtype=torch.float64)}, "factors: expected torch.float32 on cpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            lrattn.refine(model, **{"factors": start, "batches": [ids]} | arguments, progress=False)
    assert math.isfinite(divergence(model.eval(), refined, ids))
