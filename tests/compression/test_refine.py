"""Distillation of factors: it lowers the divergence, is never worse than its start, goes on where it was."""

import copy
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace

import architectures
import pytest
import tiny
import torch
from test_calibrate import StoppedAt, refused

import lrattn
from lrattn.attention.cache import pack, unpack
from lrattn.compression.substitute import Window
from lrattn.factors import safefile
from lrattn.integrations.transformers import latent_attention
from lrattn.models.layers import attention_layers

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


def started(model, ids, method="lrattn-rebuilt", keep=0.3, **choice):
    """Plain latents, where nothing else is asked for."""
    return lrattn.compress(model, [ids], method, keep, **{"far": (0, 0), "bits": 16, "progress": False} | choice)


def refined(model, start, ids, **choice):
    return lrattn.refine(model, start, [ids], **choice, progress=False)


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


def test_exact_factors_stay_exact():
    model, ids = tiny.model("llama"), text(8)
    assert abs(divergence(model, started(model, ids, keep=1.0, refine=2), ids)) < 1e-5


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "family, method, shared, keep, near",
    [
        ("llama", "kq-svd", False, 0.5, (0, 0)),
        ("qwen3", "kv-heads", False, 0.5, (6, 3)),
        ("qwen2", "matryoshka-pca", False, 0.5, (0, 0)),
        ("gemma3", "palu", False, 0.5, (0, 0)),
        ("gemma3", "lrattn", False, 0.3, (0, 0)),
        ("qwen2", "lrattn-rebuilt", "ride", 0.2, (6, 3)),
        ("mistral", "lrattn-rebuilt", True, 0.2, (0, 0)),
        ("gpt-oss", "palu", False, 0.5, (6, 3)),
        ("Gemma-2", "kv-heads", False, 0.5, (0, 0)),
        ("SmolLM3", "lrattn", True, 0.3, (6, 3)),
        *((family, "lrattn-rebuilt", False, 0.6, (0, 0)) for family in ("llama", "qwen2")),
    ],
)
def test_training_lowers_the_divergence_by_attention_on_the_latents(family, method, shared, keep, near):
    """Of maps of rotated keys and of others, with biases, means, sinks, softcaps, windows and a dense window; also of
    those so near the model that steps of the longest kind overshoot."""
    model = (tiny if family in tiny.CONFIGS else architectures).model(family)
    close = keep == 0.6
    ids = text(8 if close else 4)
    start = started(model, ids, method, keep, shared=shared, far=near)
    end = refined(model, start, ids, steps=24 if close else 32)
    assert end.keep == start.keep and [x.keys.ranks for x in end.layers] == [x.keys.ranks for x in start.layers]
    assert end.method == f"{method}, refined" and end.predicted == ()
    before, after = (divergence(model, factors, ids[::8]) for factors in (start, end))
    run = refining._Run(model, attention_layers(model), start, Window(*near), (1.0,))
    assert run.begun(list(ids[::8])).least == pytest.approx(before, rel=1e-3)
    assert after < 0.9 * before and (not close or 1e-3 < before < 0.03)


PACKED = [
    ("llama", "lrattn", False, {"bits": "auto"}, 0.1),
    ("Llama, yarn", "lrattn", True, {"bits": "auto", "chunk": 64}, 0.17),
    ("qwen2", "lrattn-rebuilt", "ride", {"bits": "auto"}, 0.08),
    ("qwen3", "lrattn-rebuilt", True, {"bits": (16, 2)}, 0.06),
    ("gpt-oss", "kv-heads", False, {"bits": 2}, 0.32),
]


@pytest.mark.every(5)
@pytest.mark.parametrize("family, method, shared, choice, keep", PACKED)
def test_what_is_trained_is_what_is_stored(family, method, shared, choice, keep):
    """Few bits, over several chunks: the divergence is that of attention on caches of them, and falls."""
    model, ids = (tiny if family in tiny.CONFIGS else architectures).model(family), text(4, 100)
    start = started(model, ids, method, keep, shared=shared, **choice)
    end = refined(model, start, ids, steps=32)
    assert all(x.packed for x in start.layers)
    for x, y in zip(start.layers, end.layers, strict=True):
        assert (x.values.formats, x.chunk, x.max_position) == (y.values.formats, y.chunk, y.max_position)
    before, after = (divergence(model, factors, ids[::8]) for factors in (start, end))
    run = refining._Run(model, attention_layers(model), start, Window(), (1.0,))
    assert run.begun(list(ids[::8])).least == pytest.approx(before, rel=1e-2) and after < 0.95 * before


def test_rounding_is_passed_straight_through():
    """The gradient by what is stored is that by what was to be stored."""
    start = started(tiny.model("llama"), text(), keep=0.1, bits=2)
    side = start.layers[0].values
    x = torch.randn(5, side.down.shape[0], generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = refining._written(side, x, side)
    plain = x @ side.down
    assert 0.05 < (z - plain).norm() / plain.norm() < 0.8 and torch.equal(z, unpack(side, pack(side, plain)))
    weight = torch.randn_like(z)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (z, plain)))


def test_the_window_is_exact_in_training_too():
    """What was trained beyond a window does better with it than what was trained without."""
    model, ids, near = tiny.model("llama"), text(), {"recent": 6, "sinks": 1}
    start = started(model, ids, keep=0.2, far=(6, 1))
    with_window, without = (refined(model, start, ids, steps=24, **own) for own in (near, {"recent": 0, "sinks": 0}))
    assert start.near == with_window.near == (6, 1) and without.near == (0, 0)
    losses = [divergence(model, f, ids, **near) for f in (with_window, without, start)]
    assert losses[0] < min(losses[1:])


@pytest.mark.every(3)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recent", [20, 64])
def test_texts_no_longer_than_the_window_leave_nothing_to_learn(recent, family):
    model, ids = tiny.model(family), text(4, 20)
    start = started(model, ids, keep=0.2)
    same_bits(refined(model, start, ids, steps=2, recent=recent), start)


def test_never_worse_than_its_start(monkeypatch):
    """Steps so long that they ruin the factors: the ones given come back."""
    monkeypatch.setattr(refining, "RATE", 30.0)
    model, ids = tiny.model("llama"), text()
    start = started(model, ids)
    same_bits(refined(model, start, ids, steps=8), start)


def test_an_interrupted_run_goes_on(tmp_path):
    model, ids, path = tiny.model("llama"), text(), tmp_path / "run.safetensors"
    start, other = (started(model, x, shared=False) for x in (ids, tiny.tokens(4, 48, seed=9)))
    whole = refined(model, start, ids, steps=20)
    with stopped_at(13), pytest.raises(KeyboardInterrupt):
        refined(model, start, ids, steps=20, state=path)
    assert safefile.read(path, "refinement")[0]["step"] == 13
    early = shutil.copy(path, tmp_path / "early.safetensors")
    same_bits(refined(model, start, ids, steps=20, state=path), whole)
    same_bits(refined(model, recomputed(start), ids, steps=20, state=early), whole)
    for wrong in ({"start": other}, {"steps": 21}, {"recent": 3}, {"ids": ids + 1}, {"nested": True}):
        given = {"model": model, "start": start, "ids": ids, "steps": 20, "state": path} | wrong
        refused("state: expected a run of these factors, steps and text", refined, **given)


def test_a_step_whose_judgement_was_stopped_is_taken_again(tmp_path, monkeypatch):
    """A judgement that would have been the best is not lost: it belongs to its step."""
    model, ids, path = tiny.model("llama"), text(), tmp_path / "run.safetensors"
    start = started(model, ids)
    judged, stops = refining._Run.judged, [False, True, False]

    def stopped(run, at, judges):
        if at.step == 8 and stops.pop(0):
            raise KeyboardInterrupt
        return at._replace(least=-1.0, best=at.now) if at.step == 8 else judged(run, at, judges)

    monkeypatch.setattr(refining._Run, "judged", stopped)
    whole = refined(model, start, ids, steps=12)
    with pytest.raises(KeyboardInterrupt):
        refined(model, start, ids, steps=12, state=path)
    assert safefile.read(path, "refinement")[0]["step"] == 7
    same_bits(refined(model, start, ids, steps=12, state=path), whole)
    assert not stops


@pytest.mark.every(2)
@pytest.mark.parametrize("nested", [False, True])
def test_ctrl_c_at_any_line_leaves_whole_steps(nested, tmp_path):
    """In a step, in a judgement or between them: what is saved goes on to the same factors, bit for bit."""
    config = copy.deepcopy(tiny.CONFIGS["llama"])
    config.num_hidden_layers = 1
    model, ids, path = tiny.built(config, 0), text(3, 12), tmp_path / "run.safetensors"
    start, choice = started(model, ids, keep=0.2), {"steps": 10, "nested": nested}
    expected = refined(model, start, ids, **choice)
    with StoppedAt("refine.py", 0) as whole:
        refined(model, start, ids, **choice, state=path)
    found = []
    for n in range(1, whole.lines, whole.lines // 12):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), StoppedAt("refine.py", n):
            refined(model, start, ids, **choice, state=path)
        found.append(safefile.read(path, "refinement")[0]["step"] if path.exists() else -1)
        same_bits(refined(model, start, ids, **choice, state=path), expected)
    assert found == sorted(found) and len(set(found)) > 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_padding_takes_no_part():
    model, ids = tiny.model("llama"), text(8)
    start = started(model, ids)
    mask = torch.cat((torch.zeros(8, 5, dtype=torch.int64), torch.ones_like(ids)), 1)
    padded = {"input_ids": torch.cat((tiny.tokens(8, 5, seed=4), ids), 1), "attention_mask": mask}
    a, b = (refined(model, start, batch, steps=6) for batch in (ids, padded))
    for x, y in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(x.values.down, y.values.down, rtol=1e-5, atol=1e-6)


def test_dropout_takes_no_part():
    model, ids = architectures.model("GPT-2"), architectures.tokens(4, 30)
    assert model.config.resid_pdrop > 0
    start = started(model, ids, shared=False)
    same_bits(*(refined(model.train(mode), start, ids, steps=2) for mode in (False, True)))


def test_the_model_is_left_alone():
    model, ids = tiny.model("llama"), text(4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        made = refined(model.train(), started(model, ids), ids, steps=2)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(side.up.requires_grad for layer in made.layers for side in (layer.keys, layer.values))


def test_bad_input_is_refused():
    model, ids = tiny.model("llama"), text(4)
    start = started(model, ids, "svd")
    older = replace(start, layers=[replace(x, values=replace(x.values, of_inputs=True)) for x in start.layers])

    def refuses(told, factors=start, batches=(ids,), **choice):
        refused(told, lrattn.refine, model, factors, batches, **choice, progress=False)

    for steps in (0, True, "8", 1.5, None):
        refuses("steps: expected an integer of at least 1, got", steps=steps)
    for recent in (True, -1):
        refuses("recent: expected", recent=recent)
    refuses("nested: expected True or False, got 'yes'", nested="yes")
    refuses("state: expected a path, got 5", state=5)
    refuses("batches: expected two sequences", batches=[ids[:1]])
    refuses("batches: expected several of token ids", batches={"input_ids": ids})
    long = [ids, tiny.tokens(1, 513)]
    refuses("batches: expected sequences of at most 512 tokens, the model's positions", batches=long)
    refuses("nested: expected False with packed latents", started(model, ids, "svd", bits=8), nested=True)
    refuses("factors: expected maps of heads, .* before version 3: use in_kv_space", older)
    refuses("factors: expected 3 layers as in the model, got 2", replace(start, layers=start.layers[:2], samples=()))
    refuses("factors: expected torch.float32 on cpu", start.to(dtype=torch.float64))
