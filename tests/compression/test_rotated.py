"""Methods whose latents are of keys as attention is given them: nothing of a model's rotation is asked or kept."""

from itertools import product

import architectures
import pytest
import tiny
import torch
from given import eager, served
from slowly import slow_unless
from test_calibrate import near, refused, running
from test_substitute import logits, on_latents

import lrattn
from lrattn.compression import methods
from lrattn.compression.moments import about, mean_of
from lrattn.compression.substitute import Window
from lrattn.factors.summary import headline, summarize

ROTATED = [name for name, method in methods.METHODS.items() if method.rotated and not method.exact]
OTHERS = [name for name, method in methods.METHODS.items() if not method.rotated]
NAMES = served(
    ("Llama, yarn", "Phi-3", "Gemma-2", "gpt-oss", "Gemma-3n", "Cohere", "SmolLM3", "Llama-4", "OPT", "Qwen2.5-VL")
)
QUICK = [("lrattn-rotated", name) for name in NAMES] + [(name, "gpt-oss") for name in ROTATED if name != "kq-svd"]
PAIRS = set(product(ROTATED, NAMES)) - {("kq-svd", "OPT")}  # it reads output projections, called otherwise there
IN_NATS = ("lrattn-channels", "lrattn-rotated")


def texts():
    return [architectures.tokens(6, 40)]


def compressed(model, method, keep=0.3, **given):
    """Plain latents, where nothing else is asked for."""
    return lrattn.compress(model, texts(), method, keep, **{"far": (0, 0), "bits": 16, "progress": False} | given)


def moments_of(model):
    return lrattn.calibrate(model, texts(), gather=("rotated", "rotated-metric"), progress=False)


@pytest.mark.parametrize("method, name", slow_unless(QUICK, sorted(PAIRS)))
def test_any_architecture_attends_on_them_exactly_at_full_rank(method, name):
    model, ids = eager(name), architectures.tokens(2, 30)
    factors = compressed(model, method, 1.0)
    assert factors.keep == 1.0 and all(layer.rope is None and not layer.shared for layer in factors.layers)
    for window in (Window(), Window(5, 2)):
        near(on_latents(model, factors, ids, window), logits(model, ids), 1e-3)


@pytest.mark.parametrize("name, biased", [("Qwen2", True), ("Llama", False)])
@pytest.mark.parametrize("method", ROTATED)
def test_their_offsets_stand_for_biases_and_means(method, name, biased):
    """Of a model with biases all are about the mean, else those of centred methods alone; the mean is exact then."""
    model = architectures.model(name)
    moments = lrattn.calibrate(model, texts(), gather=["rotated"], progress=False)
    for i, layer in enumerate(compressed(model, method, 1.0).layers):
        for side in ("keys", "values"):
            offset = getattr(layer, side).offset
            assert (offset is not None) == (biased or side in methods.METHODS[method].centred)
            if offset is not None:
                near(offset.flatten().double(), mean_of(moments.sum(f"rotated.{side}", i)), 1e-5)


@pytest.mark.parametrize(
    "before, after, keep", [("svd-llm", "kv-heads", 0.5), ("lrattn-rebuilt", "lrattn-rotated", 1.0)]
)
def test_where_keys_are_not_turned_both_families_are_one(before, after, keep):
    """Of learned positions nothing is left to turn back: the same components, or the same metric."""
    model = architectures.model("GPT-2")
    a, b = (compressed(model, method, keep, shared=False, group_size=1).layers for method in (before, after))
    for x, y in zip(a, b, strict=True):
        assert x.rope is None
        for one, other in ((x.keys, y.keys), (x.values, y.values)):
            assert one.ranks == other.ranks
            near(one.dense().double(), other.dense().double(), 1e-3)
            assert keep == 1.0 or min(one.ranks) < len(one.dense())


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


@pytest.mark.parametrize("family", slow_unless(["llama3"], ["llama", "llama3", "gemma3", "mqa"]))
@pytest.mark.parametrize("method", ROTATED)
def test_no_config_is_asked_how_keys_are_turned(method, family):
    """Exact at full rank; at less, the better the more is near and exact."""
    model, ids = faster(tiny.model(family)), tiny.tokens(2, 30)
    whole, less = compressed(model, method, 1.0), compressed(model, method, 0.8)
    want = logits(model, ids)
    near(on_latents(model, whole, ids), want, 1e-3)
    errors = [(on_latents(model, less, ids, Window(n)) - want).norm() / want.norm() for n in (0, 15, 30)]
    assert less.keep <= 0.8
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2 and errors[2] < 1e-5


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_ask_before_the_work(method):
    model = faster(architectures.model("Llama"))
    running(model, 40, lambda ids: pytest.fail("the model ran"))
    told = r"^model: the keys of .* are turned in a way that its config does not tell"
    refused(told, compressed, model, method, 1.0)


# In lrattn's metric


def test_gradients_by_rotated_keys_are_gathered_alone():
    model = tiny.model("llama")
    for other in ("fisher", "metric"):
        told = "gather: expected no other gradients beside 'rotated-metric', got"
        refused(told, lrattn.calibrate, model, texts(), gather=["rotated-metric", other])
    told = r"ranks: expected one of \['spectrum', 'uniform', 'condition'\] with method"
    refused(told, compressed, model, "lrattn-channels", ranks="fisher")
    for form in ("ride", True):
        told = "shared: expected None or False with method 'lrattn-rotated', got"
        refused(told, compressed, model, "lrattn-rotated", shared=form)


@pytest.mark.parametrize("family", slow_unless(["llama3"], ["llama", "llama3", "qwen3", "gemma3"]))
def test_channels_are_those_whose_cut_costs_most_and_nothing_is_mixed(family):
    model = tiny.model(family)
    moments = moments_of(model)
    factors = compressed(model, "lrattn-channels", moments=moments, group_size=2)
    for i, layer in enumerate(factors.layers):
        metric, moment = moments.metric(i, "keys", rotated=True)
        own = about(moment, None if layer.keys.offset is None else layer.keys.offset.flatten().double())
        cost, kept = (metric * own).diagonal().unflatten(0, (4, 32)), layer.keys.dense()
        assert torch.equal(kept, kept.diagonal().diag()) and set(kept.unique().tolist()) == {0.0, 1.0}
        kept = kept.diagonal().bool().unflatten(0, (4, 32))
        for heads, rank in zip(layer.keys.groups, layer.keys.ranks, strict=True):
            of_group, chosen = cost[list(heads)], kept[list(heads)]
            assert chosen.sum() == rank and of_group[chosen].min() >= of_group[~chosen].max()


def test_more_bytes_foresee_less_loss_and_a_basis_less_than_channels():
    model = tiny.model("llama")
    given = {"model": model, "moments": moments_of(model), "bits": (2, 4, 8), "progress": False}
    for method in IN_NATS:
        lost = [sum(lrattn.compress(method=method, keep=keep, **given).predicted) for keep in (0.1, 0.2, 0.3, 0.5)]
        assert lost == sorted(lost, reverse=True) and lost[-1] < 0.01 * lost[0]
    channels, rotated = (sum(lrattn.compress(method=m, keep=0.2, **given).predicted) for m in IN_NATS)
    assert rotated < channels  # a channel is one of the bases that latents are chosen from


@pytest.mark.parametrize("family", ["llama3", "mqa"])
@pytest.mark.parametrize("method", IN_NATS)
def test_bits_are_spent_to_the_last_block(method, family):
    """Bytes met from below, formats that every group shares, and rows of their sizes."""
    model, keep = tiny.model(family), 0.45 if family == "mqa" else 0.3  # of one head, a step a row takes 0.32
    factors, fine = compressed(model, method, keep, bits="auto"), compressed(model, method, 1.0, bits=8)
    least = keep * factors.dense_bytes_per_token - 2 * 16 * max(len(factors.layers[0].keys.ranks), 2)
    assert least < factors.bytes_per_token <= keep * factors.dense_bytes_per_token
    for layer in (*factors.layers, *fine.layers):
        assert layer.packed and layer.rope is None and layer.k_dtype == layer.v_dtype == torch.uint8
        assert layer.bytes_per_token == layer.k_width + layer.v_width
    assert sum(fine.predicted) < 0.5 * sum(factors.predicted)
