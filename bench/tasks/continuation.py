"""How a model goes on: 1,000 tokens that it wrote on a dense cache, scored token by token on others.

Six texts were written greedily and six drawn from the model's own distribution. Of each token, seen after all the dense
model's before it: the divergence KL(dense || cache) of what comes next, in nats, and whether both hold the same token
likeliest. The first place where they do not, in a greedy text, is where the cache's own text would leave the dense one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.evaluation.quantised import attending_quantised
from bench.support import models
from bench.tasks.rows import Row, Subject
from lrattn.integrations.transformers.either import attending

NEW, BIN = 1000, 100  # tokens; and of those over which a mean is taken
WISHES = (
    "Write a Python module for two-dimensional geometry: points, vectors, segments, polygons, with tests.",
    "Explain how a relational database executes a query, from the parser to the disk, in detail.",
    "Write a Python implementation of a text adventure with rooms, items, a parser and a saved state.",
    "Describe the history of programming languages from 1950 to today, decade by decade.",
    "Write a small interpreter for a Lisp dialect in Python, with comments that explain each part.",
    "Tell a long story about a lighthouse keeper who finds a letter in a bottle.",
    "Write a Python library that reads and writes CSV, JSON and INI files without other packages.",
    "Explain the main sorting algorithms, with code in Python and the cost of each.",
    "Write a command line program in Python that keeps a list of tasks in a file, with subcommands.",
    "Give a week of lessons on statistics for beginners, with exercises and their solutions.",
    "Write a Python simulation of an elevator in a building of ten floors, with a log of what happens.",
    "Describe how a letter travels from sender to receiver, and what may go wrong at every step.",
)
GREEDY = 6


def measure(subject: Subject, row: Row) -> dict[str, Any]:
    divergences, agree = [], []
    for i, ids in enumerate(tqdm(texts(subject), desc=f"continuation, {row.name}", unit="text")):
        dense = expected(subject, i, ids)
        if row.dense:
            own = dense
        else:
            with inside(subject, row):
                own = scores(subject, ids)
        divergences.append((dense.exp() * (dense - own)).sum(-1))
        agree.append((dense.argmax(-1) == own.argmax(-1)).float())
    same = torch.stack(agree)
    return {
        "divergence": binned(torch.stack(divergences)),
        "agreement": binned(same),
        "first": [int(x.argmin()) if not x.all() else NEW for x in same],
    }


def inside(subject: Subject, row: Row) -> AbstractContextManager[object]:
    if row.quantiser:
        return attending_quantised(subject.model, row.quantiser, row.bits, *row.near)
    return attending(subject.model, subject.factors(row), *row.near)


def scores(subject: Subject, ids: Tensor) -> Tensor:
    """[NEW, vocabulary]: log of the distribution of each of the last NEW tokens."""
    logits = subject.model(input_ids=ids[None], use_cache=False, logits_to_keep=NEW + 1).logits[0, :-1]
    return logits.float().log_softmax(-1)


def expected(subject: Subject, number: int, ids: Tensor) -> Tensor:
    """The dense model's; kept in a file."""
    path = subject.folder / f"tasks-continuation-{number}.scores"
    if not path.is_file():
        with models.written_once(path) as partial:
            torch.save(scores(subject, ids), partial)
    return torch.load(path, mmap=True)


def texts(subject: Subject) -> list[Tensor]:
    """Of each text its tokens [t], the prompt's and NEW more; kept in a file."""
    path = subject.folder / "tasks-continuation.texts"
    if not path.is_file():
        chats = [[{"role": "user", "content": wish}] for wish in WISHES]
        found = []
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0}
        for part, more in ((chats[:GREEDY], {"do_sample": False}), (chats[GREEDY:], drawn)):
            torch.manual_seed(0)
            subject.tokenizer.padding_side = "left"
            inputs = subject.tokenizer.apply_chat_template(
                part, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            )
            choice = {"max_new_tokens": NEW, "min_new_tokens": NEW, "repetition_penalty": 1.0, "top_p": 1.0}
            ids = subject.model.generate(**inputs, **choice, **more)
            for row, mask in zip(ids, inputs["attention_mask"], strict=True):
                found.append(row[int((mask == 0).sum()) :])
        with models.written_once(path) as partial:
            torch.save(found, partial)
    return torch.load(path)


def binned(x: Tensor) -> list[list[float]]:
    """[texts, NEW] -> of each text the means over BIN tokens each."""
    return [[float(f"{part.mean():.4g}") for part in row.split(BIN)] for row in x]


def at_end(cell: dict[str, Any], what: str = "divergence") -> float:
    """Mean over the texts of the last BIN tokens."""
    return fmean(row[-1] for row in cell[what])
