"""What is read out of a mask is what transformers' own mask says: one rule for all models and all ways to pad."""

import architectures
import pytest
import torch
from architectures import with_image
from given import watching
from slowly import slow_unless
from transformers import DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from lrattn.models.interface import attending, cache_argument, exact_attention, is_causal
from lrattn.models.masks import FAR, Said, mask_function, said, slides

T = 40
LEFT, RIGHT, HOLES = (torch.ones(3, T, dtype=torch.int64) for _ in range(3))
LEFT[0, :9] = LEFT[2, : T - 1] = 0
RIGHT[1, 25:] = 0
HOLES[0, :4] = HOLES[1, 12:20] = HOLES[2, 35:] = 0
BAND = torch.ones(T, T, dtype=torch.bool).tril() & (torch.arange(T) % 3 != 1) | torch.eye(T, dtype=torch.bool)
PACKED = torch.cat((torch.arange(15), torch.arange(25)))[None]
WAYS = {
    "nothing": {},
    "left": {"attention_mask": LEFT},
    "right": {"attention_mask": RIGHT},
    "holes": {"attention_mask": HOLES},
    "all live": {"attention_mask": torch.ones(3, T, dtype=torch.int64)},
    "4-D bool": {"attention_mask": BAND.expand(3, 1, T, T)},
    "4-D float": {"attention_mask": torch.zeros(T, T).masked_fill(~BAND, -torch.inf).expand(3, 1, T, T)},
    "packed": {"position_ids": PACKED.expand(3, T)},
}
MODELS = ("Llama", "Mistral", "Gemma-2", "Qwen2, windows", "Llama-4", "Gemma-3n", "GPT-2")
QUICK = {"Llama", "Gemma-2", "Llama-4"}
SPLITS = ((T,), (17, 16, 1, 6))
CASES = [
    (name, way, split)
    for name in MODELS
    for way in WAYS
    for split in SPLITS
    if not (name == "Gemma-3n" and way.startswith("4-D"))  # which takes one for each kind of its layers
    and not (way == "packed" and split != (T,))  # beside a cache transformers does not look for packed texts
]


@torch.no_grad()
def run(model, arguments, split):
    """A text of T tokens through the model in one pass, or in several with a cache."""
    cache, begin = DynamicCache(), 0
    for length in split:
        own, end = dict(arguments), begin + length
        if (mask := own.get("attention_mask")) is not None:
            own["attention_mask"] = mask[:, :end] if mask.dim() == 2 else mask[:, :, begin:end, :end]
        own |= {"use_cache": False} if len(split) == 1 else {"use_cache": True, **cache_argument(cache)}
        model(input_ids=architectures.tokens(3, T)[:, begin:end], **own)
        begin = end


def told(model, do):
    """What every layer's mask says in each pass, of how many queries and columns."""
    found = []

    def watch(module, query, key, value, mask, *args, **kwargs):
        if is_causal(module, kwargs.get("is_causal")):
            columns = key.shape[2]
            found.append((said(mask, kwargs.get("sliding_window"), len(query), columns), query.shape[2], columns))
        return exact_attention(module, query, key, value, mask, *args, **kwargs)

    with attending(model, watch):
        do()
    return found


def wanted(model, do):
    """What transformers' own masks let each query see, [B or 1, S, T]."""
    found = []

    def watch(module, query, key, value, mask):
        queries, columns = query.shape[2], key.shape[2]
        if is_causal(module, None):
            if mask is None:
                mask = torch.ones(1, 1, columns, columns, dtype=torch.bool).tril()[:, :, -queries:]
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            found.append(seen[:, 0, :, :columns])
        return key, value

    with watching(model, watch):
        do()
    return found


def drawn(what, queries, columns):
    """What a mask says as the whole of it, [B or 1, S, T]."""
    if what.full is not None:
        return what.full
    i, j = torch.arange(columns)[-queries:, None], torch.arange(columns)
    seen = (j <= i)[None]
    if what.window is not None:
        seen = seen & (j > i - what.window)
    if what.pads is not None:
        seen = seen & (j >= what.pads[:, None, None])
    return seen if what.live is None else seen & what.live[:, None]


def assert_same(found, masks, live=None):
    """What live queries see."""
    assert found and len(found) == len(masks)
    for (what, queries, columns), want in zip(found, masks, strict=True):
        wrong = (drawn(what, queries, columns) != want).any(2)
        assert not (wrong if live is None else wrong & live[:, columns - queries : columns]).any()


@pytest.mark.parametrize("name, way, split", slow_unless(lambda case: case[0] in QUICK, CASES))
def test_a_mask_says_what_transformers_own_says(name, way, split):
    model, arguments = architectures.model(name), WAYS[way]
    masks, found = (of(model, lambda: run(model, arguments, split)) for of in (wanted, told))
    mask = arguments.get("attention_mask")
    assert_same(found, masks, mask.bool() if mask is not None and mask.dim() == 2 else None)
    plain = way in ("nothing", "left", "right", "holes", "all live") and name != "Llama-4"
    for what, _, columns in found:
        assert not plain or what.full is None  # nothing of queries times columns
        assert what.live is None or way in ("right", "holes") or len(split) > 1  # nor more than a number a row
        assert what.pads is None or way not in ("nothing", "all live") or what.full is not None
        assert what.window is None or what.window < columns or len(split) > 1
    assert len({id(what) for what, *_ in found}) <= 2 * len(split) or not plain  # read once a pass, not once a layer


def test_images_see_themselves_from_both_sides():
    model, inputs = architectures.model("Gemma-3, images"), with_image()
    masks, found = (of(model, lambda: model(**inputs, use_cache=False)) for of in (wanted, told))
    assert_same(found, masks)
    (first, *_), image = found, slice(6, 10)
    assert first[0].full[0, image, image].all() and not first[0].full[0, 5, image].any()


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT, HOLES], ids=["none", "left", "right", "holes"])
def test_reach_says_the_same_when_it_was_copied(mask, window):
    """As to another device: what was read of it once does not travel. So do masks of others, of any dtype."""
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    live = torch.ones(3, T, dtype=torch.bool) if mask is None else mask.bool()
    given = None if mask is None else live
    reach = mask_function(3, T, T, mask_function=rule, attention_mask=given, local_size=window)
    assert reach.dtype == torch.int32 and reach.shape == (3, T) and int(reach.max()) == (window or FAR)
    assert torch.equal(reach > 0, live)
    whole, of_layer = said(reach, None, 3, T), said(given, window, 3, T)
    for same in (said(reach.clone(), window if window == 1 else 99, 3, T), said(mask, window, 3, T), of_layer):
        assert same.window == whole.window == window and torch.equal(drawn(same, T, T), drawn(whole, T, T))
    assert whole.full is None


def test_nothing_hidden_is_nothing_said():
    for nothing in (None, torch.ones(3, T), torch.ones(3, T, dtype=torch.bool)):
        assert said(nothing, 5, 3, T) == Said(5)
    assert said(torch.zeros(2, 8, dtype=torch.int32), 5, 2, 8).live is not None  # rows of padding alone


def test_a_whole_mask_tells_where_each_row_begins():
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    mask[..., :3] = False
    what = said(mask, 5, 3, T - 2)  # of a cache that has more room than columns
    assert what.window is None and what.pads.tolist() == [3, 3, 3] and what.full.shape == (1, T, T - 2)
    as_float = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(said(as_float, None, 3, T - 2).full, what.full)


@pytest.mark.parametrize("shape", [(3, 9), (2, T), (3, 2, T, T), (3, T, T), (3, 1, T, 9), (T,)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[3, 40\] or \[3, 1, queries, 40\], got \["):
        said(torch.ones(shape, dtype=torch.bool), None, 3, T)


@pytest.mark.parametrize("window", [1, 2, 16])
def test_a_window_is_told_from_chunks_by_what_is_seen(window):
    assert slides(sliding_window_causal_mask_function(window), window)
    assert window == 1 or not slides(chunked_causal_mask_function(window, torch.zeros(1, dtype=torch.int64)), window)
    assert not slides(sliding_window_causal_mask_function(window + 1), window)
    assert not slides(causal_mask_function, window)
    assert not slides(lambda b, h, q, k: (k <= q + 1) & (k > q - window), window)  # sees what is to come
