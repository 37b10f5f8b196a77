"""Methods whose latents are of keys as attention is given them: nothing of a model's rotation is asked or kept."""

import architectures
import pytest
import torch
from given import eager, served
from slowly import slow_unless
from test_calibrate import near, running
from test_substitute import logits, on_latents

import lrattn
from lrattn.compression import methods
from lrattn.compression.substitute import Window
from lrattn.factors.summary import headline, summarize

ROTATED = [name for name, method in methods.METHODS.items() if method.rotated]
OTHERS = [name for name, method in methods.METHODS.items() if not method.rotated]
NAMES = served(
    ("Llama, yarn", "Phi-3", "Gemma-2", "gpt-oss", "Gemma-3n", "Cohere", "SmolLM3", "Llama-4", "OPT", "Qwen2.5-VL")
)
QUICK = [("lrattn-rotated", name) for name in NAMES] + [(name, "gpt-oss") for name in ROTATED if name != "kq-svd"]
PAIRS = [(method, name) for method in ROTATED for name in NAMES]


def texts():
    return [architectures.tokens(6, 40)]


def compressed(model, method, keep, **given):
    return lrattn.compress(model, texts(), method, keep, far=(0, 0), progress=False, **given)


def readable(method, name):
    """kq-svd reads output projections, which some architectures call otherwise."""
    return method != "kq-svd" or name != "OPT"


@pytest.mark.parametrize("method, name", slow_unless(QUICK, [pair for pair in PAIRS if readable(*pair)]))
def test_any_architecture_attends_on_them_exactly_at_full_rank(method, name):
    model, ids = eager(name), architectures.tokens(2, 30)
    factors = compressed(model, method, 1.0)
    assert factors.keep == 1.0 and all(layer.rope is None and not layer.shared for layer in factors.layers)
    want = logits(model, ids)
    for window in (Window(), Window(5, 2)):
        got = on_latents(model, factors, ids, window)
        assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("method", ROTATED)
def test_their_offsets_stand_for_biases_and_means(method):
    """Of a model with biases all are about the mean, else those of centred methods alone; the mean is exact then."""
    for name, biased in (("Qwen2", True), ("Llama", False)):
        model = architectures.model(name)
        factors = compressed(model, method, 1.0)
        moments = lrattn.calibrate(model, texts(), gather=["rotated"], progress=False)
        for i, layer in enumerate(factors.layers):
            for side, made in (("keys", layer.keys), ("values", layer.values)):
                assert (made.offset is not None) == (biased or methods.METHODS[method].centred)
                if made.offset is not None:
                    mean = moments.sum(f"rotated.{side}", i)[:-1, -1] / 240
                    near(made.offset.flatten().double(), mean, 1e-5)


@pytest.mark.parametrize("before, after, keep", [("svd-llm", "kv-heads", 0.5), ("lrattn", "lrattn-rotated", 1.0)])
def test_where_keys_are_not_turned_both_families_are_one(before, after, keep):
    """Of learned positions nothing is left to turn back: the same components, or the same metric."""
    model = architectures.model("GPT-2")
    a, b = (compressed(model, method, keep, shared=False, group_size=1).layers for method in (before, after))
    for x, y in zip(a, b, strict=True):
        assert x.rope is None and x.keys.ranks == y.keys.ranks and x.values.ranks == y.values.ranks
        for side in ("keys", "values"):
            one, other = (getattr(layer, side).dense().double() for layer in (x, y))
            near(one, other, 1e-3)
            assert keep == 1.0 or (one - torch.eye(len(one))).norm() > 0.1 * one.norm()


def test_the_summary_says_that_queries_meet_them():
    factors = compressed(architectures.model("Phi-3"), "kv-heads", 0.5)
    summary = summarize(factors)
    assert [layer["rotated"] for layer in summary["layers"]] == [True] * 3
    assert "queries meet a key group's" in headline(summary)


def faster(model):
    """A model that turns keys twice as fast as its config says."""
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids, *rest: forward(x, position_ids * 2, *rest)
    return model


@pytest.mark.parametrize("method", ROTATED)
def test_no_config_is_asked_how_keys_are_turned(method):
    model, ids = faster(architectures.model("Llama")), architectures.tokens(2, 30)
    got, want = on_latents(model, compressed(model, method, 1.0), ids), logits(model, ids)
    assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_ask_before_the_work(method):
    model = faster(architectures.model("Llama"))
    running(model, 40, lambda ids: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"^model: the keys of .* are turned in a way that its config does not tell"):
        compressed(model, method, 1.0)
