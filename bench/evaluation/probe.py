"""What attention still reads from far away: a passage that comes again after other text.

python -m bench.evaluation.probe [--model smollm2]   the dense model's own

A model that copies predicts a passage much better when it reads it again. Sequences come in pairs with the same text
and the same tail of passages. Half of the passages are planted earlier in the one sequence, the others in the other: so
each is read again in one and for the first time in the other, at the same place after the same text.

    gain(distance) = NLL(first reading) - NLL(reading again)   nats a token

distance: tokens between the planted passage and its repetition. A passage's first token is not counted: nothing says
which passage comes next.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.evaluation.quality_plan import PLANS
from bench.support import texts
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.states import evaluating

DISTANCES = (128, 512, 1024, 2048)
PASSAGE = 64
PAIRS = 2
BLOCK = 4096  # tokens between passages of the text they are cut from: other articles
LEAD = 64  # tokens before the first passage: none is an attention sink
SKIP = 2 * BLOCK  # tokens at the text's beginning, where the evaluation windows are


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PLANS, default="smollm2")
    model, tokenizer = PLANS[parser.parse_args().model].load()
    print("distance   first   again    gain   of tokens right: first   again")
    for p in measure(model, sequences(passages_text(tokenizer))):
        print("{distance:>8} {first:>7.3f} {again:>7.3f} {gain:>7.3f}".format(**p), end="")
        print("{first_right:>25.2f} {again_right:>7.2f}".format(**p))


def passages_text(tokenizer: Any) -> Tensor:
    """Token ids [n] for `sequences`, from articles that nobody calibrates on."""
    needed = SKIP + BLOCK * PAIRS * (1 + 2 * len(DISTANCES))
    return read_windows(tokenizer, texts.wikipedia("evaluation"), needed, 1)[0]


def places(distances: tuple[int, ...] = DISTANCES) -> tuple[int, list[tuple[int, int]]]:
    """Where the tail begins; and of its passages in order, two a distance, where each is planted.

    The shortest distance stands first in the tail, so that no passage is planted inside it.
    Raises: ValueError if passages of these distances would be planted one over another.
    """
    order = [(2 * i + m) * PASSAGE for i in range(len(distances)) for m in (0, 1)]
    back = [d + PASSAGE for d in sorted(distances) for _ in (0, 1)]
    tail = LEAD + max(b - at for b, at in zip(back, order, strict=True))
    where = [(tail + at, tail + at - b) for b, at in zip(back, order, strict=True)]
    begins = sorted([planted for _, planted in where] + [tail])
    if min(after - before for before, after in pairwise(begins)) < PASSAGE:
        raise ValueError(f"distances: expected two passages of {PASSAGE} tokens to lie between them, got {distances}")
    return tail, where


def sequences(ids: Tensor, distances: tuple[int, ...] = DISTANCES, pairs: int = PAIRS) -> Tensor:
    """[2 * pairs, length] token ids: sequence 2 p + m has the passages of number m of each distance planted."""
    tail, where = places(distances)
    blocks = ids[SKIP:].unfold(0, BLOCK, BLOCK)
    made = []
    for p in range(pairs):
        own = blocks[p * (len(where) + 1) :]
        text, passages = own[0, :tail], own[1 : len(where) + 1, :PASSAGE]
        for m in (0, 1):
            whole = torch.cat((text, passages.flatten()))
            for (_, planted), passage in list(zip(where, passages, strict=True))[m::2]:
                whole[planted : planted + PASSAGE] = passage
            made.append(whole)
    return torch.stack(made)


@torch.no_grad()
def measure(
    model: Any, ids: Tensor, label: str = "", distances: tuple[int, ...] = DISTANCES, *, progress: bool = True
) -> list[dict[str, float]]:
    """Per distance: mean loss of a token at first and again, the gain and its standard error over passages, and the
    share of tokens that the model holds likeliest. ids: of `sequences`."""
    count = 2 * len(distances)
    nll, right = (torch.empty(len(ids), count, PASSAGE - 1) for _ in "ab")
    with evaluating(model):
        for i, row in enumerate(tqdm(ids, desc=f"probe, {label}", unit="sequence", disable=not progress)):
            tail = row[-count * PASSAGE :]
            logits = model(input_ids=row[None], use_cache=False, logits_to_keep=len(tail) + 1).logits[0, :-1].float()
            lost = torch.nn.functional.cross_entropy(logits, tail, reduction="none")
            nll[i] = lost.view(count, PASSAGE)[:, 1:]
            right[i] = (logits.argmax(-1) == tail).float().view(count, PASSAGE)[:, 1:]
    return gains_of(nll, right, distances)


def gains_of(nll: Tensor, right: Tensor, distances: tuple[int, ...] = DISTANCES) -> list[dict[str, float]]:
    """What `measure` returns, of the loss of each token of the passages in each sequence, and of where the model's
    likeliest token is the right one, [sequences, passages, PASSAGE - 1]."""
    found = []
    for i, distance in enumerate(sorted(distances)):
        again = [(s, 2 * i + s % 2) for s in range(len(nll))]  # sequence and place of each passage that was planted
        first = [(s ^ 1, place) for s, place in again]  # the other of the pair
        gains = [(nll[f] - nll[a]).mean().item() for f, a in zip(first, again, strict=True)]
        found.append(
            {
                "distance": distance,
                "first": fmean(nll[f].mean().item() for f in first),
                "again": fmean(nll[a].mean().item() for a in again),
                "gain": fmean(gains),
                "error": stdev(gains) / math.sqrt(len(gains)),
                "first_right": fmean(right[f].mean().item() for f in first),
                "again_right": fmean(right[a].mean().item() for a in again),
            }
        )
    return found


if __name__ == "__main__":
    main()
