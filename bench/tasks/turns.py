"""Ten turns of a chat on one cache, and then a question about each.

In every turn the user shows a paragraph of Wikipedia, says somebody's badge number, and asks for a sentence on the
paragraph. The model answers greedily, and its answers stay in the cache. After the last turn the user asks for the
number of each turn, each time on a copy of the cache. A number is right if greedy decoding would write it.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from tqdm import tqdm

from bench.support import texts
from bench.tasks.retrieval import answered, encoded
from bench.tasks.rows import Row, Subject

CHATS, TURNS, MOST = 10, 10, 24  # MOST: tokens of an answer
NAMES = (
    "Ada Bruno Clara Dmitri Elena Farid Greta Hugo Ines Jonas Karin Luca Mira Nils Olga Pavel Rosa Sven Tara Umberto"
)
WISH = "In one short sentence, what is the text about?"
WORDS = (50, 90)  # of a paragraph


def chats() -> list[list[tuple[str, str, str]]]:
    """Of each chat, of each turn: a paragraph, a name and a number."""
    rng = random.Random(0)
    blocks = [block.strip() for block in texts.wikipedia("evaluation").split("\n")]
    blocks = [block for block in blocks if WORDS[0] <= len(block.split()) <= WORDS[1]]
    paragraphs = rng.sample(blocks, CHATS * TURNS)
    found = []
    for i in range(CHATS):
        names = rng.sample(NAMES.split(), TURNS)
        own = paragraphs[i * TURNS : (i + 1) * TURNS]
        found.append([(p, name, str(rng.randrange(1000, 10000))) for p, name in zip(own, names, strict=True)])
    return found


def measure(subject: Subject, row: Row) -> dict[str, Any]:
    using, found, lengths, said = subject.using(row), [], [], []
    with using.inside:
        for turns in tqdm(chats(), desc=f"turns, {row.name}", unit="chat"):
            cache = using.cache()
            messages, read, answers = [], "", []
            for paragraph, name, number in turns:
                says = f"{paragraph}\n\nThe badge number of {name} is {number}. {WISH}"
                messages.append({"role": "user", "content": says})
                text = rendered(subject, messages)
                answer = spoken(subject, cache, text[len(read) :])
                messages.append({"role": "assistant", "content": answer})
                read, answers = text + answer, [*answers, answer]
            own = []
            for _, name, number in turns:
                question = {"role": "user", "content": f"What is the badge number of {name}?"}
                asks = rendered(subject, [*messages, question])[len(read) :] + f"The badge number of {name} is"
                own.append(answered(subject, copy.deepcopy(cache), asks, f" {number}"))
            found.append(own)
            lengths.append(len(encoded(subject, read)))
            said.append(answers)
    return {"right": found, "tokens": lengths, "said": said}


def rendered(subject: Subject, messages: list[dict[str, str]]) -> str:
    """Up to where the model speaks."""
    return subject.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def spoken(subject: Subject, cache: Any, text: str) -> str:
    """What the model says after it, greedily; the cache has then read all of it but the end of the turn."""
    ids, ends, tokens = encoded(subject, text), set(subject.tokenizer.all_special_ids), []
    while len(tokens) < MOST:
        token = int(subject.passed(cache, ids).argmax(-1))
        if token in ends:
            return subject.tokenizer.decode(tokens)
        tokens.append(token)
        ids = torch.tensor([token])
    subject.passed(cache, ids)
    return subject.tokenizer.decode(tokens)
