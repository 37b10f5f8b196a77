"""KVSharer (arXiv 2410.18517): layers that read what another layer holds, found by a few passes of the model.

Pairs of layers are tried from the most unlike to the most alike: the later one is to read the keys and values of the
earlier. A pair is taken if the model's last hidden states, over what was shared before and it, stay within an angle
whose cosine is above 1/2 of the model's own.

    unlike(i, j) = (mean ||K_i - K_j|| + mean ||V_i - V_j||) / 2,   K, V: the mean over texts, at each head and place
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.arguments import check_count
from lrattn.compression.batches import Batch, check_batches, tokens_of, unpadded
from lrattn.compression.substitute import Replace, substituted
from lrattn.models.interface import decoder_of, device_of
from lrattn.models.layers import AttentionLayer, attention_layers
from lrattn.models.states import evaluating

TEXTS, TOKENS, ALIKE = 30, 64, 0.5


@torch.no_grad()
def donors(model: nn.Module, batches: Iterable[Batch], count: int, *, progress: bool = True) -> tuple[int, ...]:
    """Of each layer the one whose keys and values it reads, itself or one before it: `count` layers read another's.

    Args:
        model: as of `compress`. progress: show a bar on stderr.
        batches: as of `compress`: the first 64 tokens of the first 30 sequences that are as long are read.

    For Factors.donors: `dataclasses.replace(factors, donors=...)`.
    Raises: ValueError for no such text, or where not so many layers can share.
    """
    check_batches(batches)
    layers = attention_layers(model)
    check_count("count", count, 0, len(layers) - 1)
    texts = [x[:TOKENS] for batch in batches for x in unpadded(*tokens_of(batch)) if len(x) >= TOKENS][:TEXTS]
    if not texts:
        raise ValueError(f"batches: expected a text of {TOKENS} tokens or more, got none")
    ids, found = torch.stack(texts).to(device_of(model)), list(range(len(layers)))
    with evaluating(model):
        own, sides = _passed(model, layers, ids, found)
        bar = tqdm(_pairs(layers, sides), desc="share layers", unit="pair", disable=not progress)
        for later, earlier in bar:
            if sum(d != i for i, d in enumerate(found)) == count:
                break
            if found[later] != later:
                continue
            tried = resolved([earlier if i == later else d for i, d in enumerate(found)])
            if _alike(own, _passed(model, layers, ids, tried)[0]) > ALIKE:
                found = tried
    if (got := sum(d != i for i, d in enumerate(found))) < count:
        raise ValueError(f"count: expected at most {got} layers, which can read another's here, got {count}")
    return tuple(found)


def resolved(read: Sequence[int]) -> list[int]:
    """Chains of layers that read what another reads, each to their first: resolving again changes nothing."""
    found: list[int] = []
    for i, d in enumerate(read):
        found.append(i if d == i else found[d])
    return found


def _pairs(layers: Sequence[AttentionLayer], sides: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """Later and earlier of all pairs of layers of the same heads, the most unlike ones first."""
    means = [[x.float().mean(0) for x in pair] for pair in sides]  # [Hkv, T, D] each
    unlike = {}
    for i, j in combinations(range(len(layers)), 2):
        if means[i][0].shape == means[j][0].shape:
            apart = [(a - b).norm(dim=-1).mean().item() for a, b in zip(means[i], means[j], strict=True)]
            unlike[j, i] = sum(apart) / 2
    return sorted(unlike, key=lambda pair: -unlike[pair])


def _passed(
    model: nn.Module, layers: Sequence[AttentionLayer], ids: Tensor, read: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Last hidden states [n, T, E], and each layer's own keys and values, of a pass in which layers read as said."""
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def replace(i: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        held[i] = key, value
        return held[read[i]]

    shared: Replace = replace
    with substituted(model, layers, shared):
        states: Tensor = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return states, [held[i] for i in range(len(layers))]


def _alike(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(1).float(), b.flatten(1).float()).mean().item()
