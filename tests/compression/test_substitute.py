"""Other keys and values in a model's attention: its own change nothing, others are seen by queries far from them."""

from contextlib import contextmanager

import architectures
import pytest
import tiny
import torch
import transformers
from given import eager, served
from heads import rebuilt
from slowly import slow_unless
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lrattn.compression.substitute import Window, substituted
from lrattn.models.interface import attention_set, cache_argument
from lrattn.models.layers import attention_layers

WINDOWS = [Window(), Window(5, 1), Window(0, 3), Window(60, 0)]
NAMES = served(architectures.ARCHITECTURES)
QUICK = ("Gemma-2", "gpt-oss", "Llama-4", "Gemma-3n", "GPT-2")
BATCHES = {"whole": (architectures.tokens(2, 40), None)} | {
    side: architectures.padded((37, 21, 5), side) for side in ("left", "right")
}


@torch.no_grad()
def logits(model, ids, mask=None):
    """Of live tokens."""
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found if mask is None else found[mask.bool()]


def on_latents(model, factors, ids, window=WINDOWS[0]):
    """Logits of texts without padding, whose keys and values are what latents rebuild of them."""

    def replace(i, q, k, v):
        made = rebuilt(factors.layers[i], *(x.transpose(1, 2) for x in (k, v)))
        return tuple(x.transpose(1, 2) for x in made)

    with substituted(model, attention_layers(model), replace, window):
        return logits(model, ids)


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", slow_unless(QUICK, NAMES))
def test_the_model_s_own_change_nothing(name, window):
    """Nor others that are equal to them."""
    model = eager(name)
    for batch in BATCHES.values():
        want = logits(model, *batch)
        for replace in (lambda i, q, k, v: (k, v), lambda i, q, k, v: (k.clone(), v.clone())):
            with substituted(model, attention_layers(model), replace, window):
                assert_close(logits(model, *batch), want)
        assert torch.equal(logits(model, *batch), want)


def turned(i, k, v):
    """Other keys and values, of each layer in its own way."""
    return k.roll(1 + i, -1) * 0.7, v.flip(-1) - 0.1 * i


@contextmanager
def by_hand(model, window, turn, begins):
    """Attention with other keys and values for what is far, every score of every query, by transformers' own masks.

    begins: [B], the first column of each row that is not padding.
    """
    layers, made = {layer.module: i for i, layer in enumerate(attention_layers(model))}, []

    def attend(module, q, k, v, mask, scaling=None, **_):
        if not any(k is other for other, _ in made):
            made.append((k, turn(layers[module], k, v)))
        far = next(pair for other, pair in made if other is k)
        more, (i, j) = q.shape[1] // k.shape[1], (torch.arange(k.shape[2])[:, None], torch.arange(k.shape[2]))
        first = begins[:, None, None, None]
        close = (j > i - window.recent) | ((j >= first) & (j < first + window.sinks))
        (k, v), (far_k, far_v) = ([x.repeat_interleave(more, 1) for x in pair] for pair in ((k, v), far))
        scores = torch.where(close, q @ k.mT, q @ far_k.mT) * scaling
        p = scores.masked_fill(mask < -1, -torch.inf).softmax(-1).nan_to_num()
        return ((p * close) @ v + (p * ~close) @ far_v).transpose(1, 2), None

    AttentionInterface.register("by hand", attend)
    AttentionMaskInterface.register("by hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    with attention_set(model, "by hand"):
        yield


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", served(["Llama", "Qwen2, windows", "Gemma-3n", "GPT-2"]))
def test_others_are_in_the_place_of_what_is_far_alone(name, window):
    """In layers that attend on the keys of another, too; each layer that has its own is asked once a pass, in order."""
    model, calls = architectures.model(name), []
    layers = attention_layers(model)

    def replace(i, q, k, v):
        calls.append(i)
        assert q.shape[2] == k.shape[2] and k.shape[1:] == (layers[i].num_kv_heads, k.shape[2], layers[i].head_dim)
        return turned(i, k, v)

    for side in ("whole", "left"):
        ids, mask = BATCHES[side]
        mask = torch.ones_like(ids) if mask is None else mask
        with substituted(model, layers, replace, window):
            got = logits(model, ids, mask)
        assert calls == list(range(len(layers)))
        calls.clear()
        with by_hand(model, window, turned, mask.argmax(1)):
            want = logits(model, ids, mask)
        assert_close(got, want)
        changed = (want - logits(model, ids, mask)).norm() / want.norm()
        assert changed < 1e-5 if window.recent >= 40 else changed > 0.05


@pytest.mark.parametrize("window", WINDOWS[:3], ids=str)
def test_gradients_pass_through_near_ones_and_far_ones(window):
    """Through the model's own keys and values and through those in their place: nothing is cut off."""
    model, ids, found = tiny.model("qwen2-window", dtype=torch.float64), tiny.tokens(2, 24), []
    leaves = [torch.zeros(2, 4, 24, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    wanted = [*leaves, *(model.model.layers[i].self_attn.k_proj.weight for i in (0, 2))]

    def turn(i, k, v):
        return (k * 1.1 + leaves[0], v * 0.9 + leaves[1]) if i == 1 else (k, v)

    for block in (
        substituted(model, attention_layers(model), lambda i, q, k, v: turn(i, k, v), window),
        by_hand(model, window, turn, torch.zeros(2, dtype=torch.int64)),
    ):
        with block:
            loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
        found.append(torch.autograd.grad(loss, wanted))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm() and want.norm() > 0
    seen = found[0][1].abs().sum((0, 1, 3))  # of values, by token
    assert seen[: window.sinks].max() == 0 if window.sinks else seen[0] > 0
    assert seen[24 - window.recent + 1 :].max() == 0 if window.recent else seen[-1] > 0


def test_passes_with_a_cache_are_refused_where_they_go_on():
    model, cache, ids = tiny.model("llama"), transformers.DynamicCache(), tiny.tokens(1, 20)
    told = r"^model: expected a pass of whole texts through LlamaAttention, got another$"
    with substituted(model, attention_layers(model), lambda i, q, k, v: (k, v)), torch.no_grad():
        first = model(input_ids=ids[:, :12], use_cache=True, **cache_argument(cache)).logits
        torch.testing.assert_close(first[0], logits(model, ids)[0, :12], rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match=told):
            model(input_ids=ids[:, 12:], use_cache=True, **cache_argument(cache))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -2), (1.5, 0), (True, 0)])
def test_windows_are_numbers_of_tokens(numbers):
    for run in (lambda: Window(*numbers), lambda: Window.of(numbers)):
        with pytest.raises(ValueError, match="expected a number of tokens"):
            run()
    assert Window.of([5, 2]) == Window(5, 2)
