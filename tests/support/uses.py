"""What people do with any model, each by the same code on the untouched model and on latents.

At full rank both give the same: tokens exactly, logits up to rounding. `table` says so for one architecture.
"""

import copy
from functools import cache

import architectures
import torch
import transformers
from architectures import padded, tokens
from latents import random_factors

from lrattn.integrations.transformers import LatentCache, bind
from lrattn.models.interface import cache_argument
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
UNTOUCHED = "eager"  # sdpa of some releases leaves softcaps and sinks out
ROUNDING = 2e-5  # relative, of logits in float32
NEARS = ((0, 0), (6, 3))  # of tokens that are exact, the last and the first: less than the windows of the models
KEYS = ("as given", "before RoPE", "in chunks")  # what latents are of
CHUNK = 64  # the least there is: texts go on beyond it, by a few tokens and in generation, too
WITHOUT_ROPE = ("GPT-2", "OPT")
TEXT, LENGTHS, CHUNKS, NEW = tokens(2, 70), (68, 60, 5), (40, 23, 1, 6), 12


EXEMPT = {  # what releases below one do wrongly by themselves, and why
    ("Gemma-3n", use): (
        (5, 19),
        "without a cache the untouched model does not share keys, and answers otherwise than with one",
    )
    for use in ("scoring", "left padding", "right padding")
}


def exempt(architecture, use):
    """The reason in this release, or None."""
    below, reason = EXEMPT.get((architecture, use), (RELEASE, None))
    return reason if below > RELEASE else None


class Reader:
    """A model as it is used: untouched, or on latents of these factors. Every cached use has a cache of its own."""

    def __init__(self, model, factors=None):
        self.model, self.factors = model, factors

    @torch.no_grad()
    def score(self, ids, mask=None, cached=False, chunks=None, **given):
        """Logits of live tokens [n, vocabulary]; chunks, of latents: of texts without a mask."""
        new = self._new(cached)
        if new is None:
            parts = [self.model(input_ids=ids, attention_mask=mask, use_cache=cached, **given).logits]
        else:
            given |= cache_argument(new)
            split = ids.split(chunks or ids.shape[1], 1)
            parts = [self.model(input_ids=part, attention_mask=mask, **given).logits for part in split]
            check_filled(new, ids.shape[1])
        logits = torch.cat(parts, 1)
        return logits.flatten(0, 1) if mask is None else logits[mask.bool()]

    def generate(self, ids, mask=None, new_tokens=NEW, **options):
        """The tokens after the prompt [B, new_tokens]."""
        new = self._new(True)
        options |= {} if new is None else cache_argument(new)
        mask = torch.ones_like(ids) if mask is None else mask
        out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
        if new is not None:
            check_filled(new, ids.shape[1] + new_tokens - 1)
        return out[:, ids.shape[1] :]

    def _new(self, cached):
        """Sets the attention that the model needs; a new cache for it, or None."""
        of_factors = self.factors is not None
        self.model.set_attn_implementation(("lrattn" if cached else bind(self.factors)) if of_factors else UNTOUCHED)
        return LatentCache(self.factors) if of_factors and cached else None


def check_filled(cache, columns):
    """Raises AssertionError unless a LatentCache was used."""
    if (held := cache.get_seq_length()) != columns or not cache.nbytes:
        raise AssertionError(f"the cache holds {held} columns in {cache.nbytes} bytes, expected {columns} columns")


def _padded(reader, side):
    """Without a cache and with one."""
    return torch.cat([reader.score(*padded(LENGTHS, side), cached) for cached in (False, True)])


USES = {
    "scoring": lambda reader: reader.score(TEXT),
    "scoring with a cache": lambda reader: reader.score(TEXT, cached=True),
    "left padding": lambda reader: _padded(reader, "left"),
    "right padding": lambda reader: _padded(reader, "right"),
    "uneven chunks": lambda reader: reader.score(TEXT, cached=True, chunks=CHUNKS),
    "greedy": lambda reader: reader.generate(TEXT),
    "greedy, left padding": lambda reader: reader.generate(*padded(LENGTHS, "left")),
    "beams": lambda reader: reader.generate(TEXT, new_tokens=6, num_beams=3),
}


def table(architecture, near, keys, keep=1.0):
    """Each use: "equal" to the untouched model's, "exempt: reason", or what is wrong; {} where keys have no RoPE."""
    model, turned, wanted = _untouched(architecture)
    if keys != "as given" and not any(turned):
        return {}
    factors = random_factors(model, keep, near, **form(keys, turned))
    reader, found = Reader(model, factors), {}
    for use, do in USES.items():
        reason = exempt(architecture, use)
        found[use] = f"exempt: {reason}" if reason else compared(result(do, reader), wanted[use])
    return found


@cache
def _untouched(architecture):
    """A model, its ropes, and what it answers by itself."""
    model = architectures.model(architecture)
    reader = Reader(model)
    wanted = {use: result(do, reader) for use, do in USES.items()}
    return model, ropes(model), wanted


def form(keys, turned):
    """What random_factors is told of it; turned: a model's ropes."""
    return {} if keys == "as given" else {"ropes": turned, "chunk": CHUNK if keys == "in chunks" else None}


def ropes(model):
    return ropes_of(model, attention_layers(model))


def result(do, reader):
    """What a use gives, or what it raises."""
    try:
        return do(reader)
    except Exception as error:
        return error


def compared(got, want, rounding=ROUNDING):
    """ "equal", or in a line what is wrong."""
    for which, x in (("the untouched model: ", want), ("", got)):
        if isinstance(x, Exception):
            return f"{which}{type(x).__name__}: {' '.join(str(x).split())}"
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{list(got.shape)} {got.dtype}, expected {list(want.shape)} {want.dtype}"
    if not want.is_floating_point():
        wrong = int((got != want).sum())
        return f"{wrong} of {want.numel()} tokens differ" if wrong else "equal"
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return "equal" if error < rounding else f"differs by {error:.1e}"


def made(architecture="Qwen2", keys="as given", near=(6, 3), keep=1.0, **changes):
    """The untouched model, a copy that attends by "lrattn", and factors."""
    untouched = architectures.model(architecture, **changes)
    untouched.set_attn_implementation(UNTOUCHED)
    factors = random_factors(untouched, keep, near, **form(keys, keys != "as given" and ropes(untouched)))
    latent = copy.deepcopy(untouched)
    latent.set_attn_implementation("lrattn")
    return untouched, latent, factors


def assert_equal(got, want, rounding=ROUNDING):
    said = compared(got, want, rounding)
    assert said == "equal", said
