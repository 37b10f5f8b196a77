"""What a model finds again in 4K, 8K and 16K tokens of real code, read once and asked about many times.

The text is modules of mpmath (BSD), which torch brings, with lines planted between their functions, evenly:

    keys        a comment says the pass key of something; asked for at the end
    pairs       five names and numbers in a dictionary; one number is asked for
    functions   of the text itself, defined once, with three parameters or more; these are asked for by its name

A question is answered if every token of the answer is the likeliest after those before it: what greedy decoding would
write. Every question is asked of a copy of the cache that has read the text. `distance` is tokens from what is asked
for to the end of the text. `unread`: of functions, how many are right with no text at all.

A cache of latents has read the text itself. Dense ones, and those that are quantised, have what one pass of the model
as it is gave them: quantised when it was over, as KIVI does.
"""

from __future__ import annotations

import copy
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from bench.support import models
from bench.tasks.rows import DENSE, Row, Subject

LENGTHS = (4096, 8192, 16384)
EACH, TABLE = 50, 5  # questions of a kind at most; pairs in a dictionary
THINGS = """
anchor apple arrow badge basket beacon bell bicycle blanket bottle bridge bucket button cabin camera candle canoe
carpet castle cellar chapel chimney circus clock compass cradle crown curtain desert diamond dragon drum eagle elbow
engine falcon feather ferry fiddle forest fountain garage garden glacier glove guitar hammer harbour helmet hotel
island jacket jungle kettle kiosk kitchen ladder lantern lemon library lighthouse lizard magnet market meadow mirror
monkey mountain museum needle notebook orchard oyster palace parrot pencil pepper piano pigeon pillow pirate planet
pumpkin rabbit rocket saddle sailor school shadow shovel spider station statue sugar temple theatre ticket tiger
tractor trumpet tunnel turtle umbrella valley violin volcano wagon walnut whistle window wizard zebra
"""
DEFINED = re.compile(r"^def (\w+)\(([^()]*)\):", re.M)
BETWEEN = re.compile(r"\n\n(?=\w|@)")  # where a line may be planted


@dataclass(frozen=True)
class Question:
    """kind; the text that asks, and what is to follow; place: characters of the text before the end of what it asks."""

    kind: str
    asks: str
    answer: str
    place: int


def planted(seed: int) -> tuple[list[tuple[str, list[Question]]], random.Random]:
    """Lines to plant, in order, with the questions about each, whose places count from the line's beginning."""
    rng = random.Random(seed)
    names = THINGS.split()
    rng.shuffle(names)
    found = []
    for name in names[:EACH]:
        number = rng.randrange(10000, 100000)
        line = f"# The pass key of the {name} is {number}.\n"
        asks = f"\n\n\n# The pass key of the {name} is"
        found.append((line, [Question("keys", asks, f" {number}", len(line))]))
    pairs = [(name, rng.randrange(10000, 100000)) for name in names[EACH : 2 * EACH]]
    for i in range(0, len(pairs), TABLE):
        title, own = f"TABLE_{i // TABLE}", list[Question]()
        text = f"{title} = {{\n"
        for name, number in pairs[i : i + TABLE]:
            text += f'    "{name}": {number},\n'
            own.append(Question("pairs", f'\n\n\nassert {title}["{name}"] ==', f" {number}", len(text)))
        found.append((text + "}\n", own))
    rng.shuffle(found)
    return found, rng


def written(tokenizer: Any, length: int) -> tuple[str, list[Question]]:
    """A text of at most so many tokens, as long as it can be, and the questions about it."""
    code = "\n\n\n".join(
        path.read_text().strip() for path in sorted((models.package_dir("mpmath") / "libmp").glob("lib*.py"))
    )
    low, high = 0, 8 * length
    while high - low > 64:  # characters of code
        middle = (low + high) // 2
        if len(tokenizer.encode(_with(code[:middle], length)[0], add_special_tokens=False)) <= length:
            low = middle
        else:
            high = middle
    return _with(code[:low], length)


def _with(code: str, seed: int) -> tuple[str, list[Question]]:
    """Code with lines planted, evenly among the places between its functions, and questions about all."""
    lines, rng = planted(seed)
    places = [m.start() + 1 for m in BETWEEN.finditer(code)] or [0]
    text, questions, at = "", [], 0
    for i, (line, own) in enumerate(lines):
        place = places[min(int((i + 0.5) / len(lines) * len(places)), len(places) - 1)]
        text, at = text + code[at:place] + ("\n" if at < place else ""), place
        questions += [Question(q.kind, q.asks, q.answer, len(text) + q.place) for q in own]
        text += line
    text += code[at:]
    functions = []
    for found in DEFINED.finditer(text):
        name, given = found.groups()
        if given.count(",") >= 2 and "\n" not in given and text.count(f"def {name}(") == 1:
            asks = f"\n\n\n# The parameters of {name}: def {name}"
            answer = f"({given}"  # without the parenthesis, which is one token with what follows
            functions.append(Question("functions", asks, answer, found.end()))
    return text, questions + rng.sample(functions, min(EACH, len(functions)))


def measure(subject: Subject, row: Row) -> dict[str, Any]:
    using, found = subject.using(row), {}
    with using.inside:
        for length in LENGTHS:
            text, questions = written(subject.tokenizer, length)
            cache = using.cache()
            if using.factors is None:
                for i, pair in enumerate(as_read(subject, length, text)):
                    cache.update(*pair, i)
            else:
                subject.passed(cache, encoded(subject, text))
            found[str(length)] = [
                {"kind": q.kind, "distance": distance(subject, text, q), "right": right(subject, cache, q)}
                for q in tqdm(questions, desc=f"retrieval, {row.name}, {length} tokens", unit="question")
            ]
    if row == DENSE:
        functions = [q for q in questions if q.kind == "functions"]
        found["unread"] = sum(right(subject, DynamicCache(), q) for q in functions) / len(functions)
    return {"answers": found}


def encoded(subject: Subject, text: str) -> Tensor:
    """[t]"""
    return torch.tensor(subject.tokenizer.encode(text, add_special_tokens=False))


def as_read(subject: Subject, length: int, text: str) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [1, Hkv, t, D], of one pass of the model as it is; kept in a file."""
    path = subject.folder / f"tasks-retrieval-{length}.prompt"
    if not path.is_file():
        cache = DynamicCache()
        subject.passed(cache, encoded(subject, text))
        with models.written_once(path) as partial:
            torch.save([(layer.keys, layer.values) for layer in cache.layers], partial)
    return torch.load(path)


def distance(subject: Subject, text: str, question: Question) -> int:
    return len(encoded(subject, text[question.place :]))


def right(subject: Subject, cache: Any, question: Question) -> bool:
    """Whether a copy of the cache answers it."""
    return answered(subject, copy.deepcopy(cache), question.asks, question.answer)


def answered(subject: Subject, cache: Any, asks: str, answer: str) -> bool:
    """Whether greedy decoding after `asks` would write the answer; the cache reads both."""
    asked, wanted = encoded(subject, asks), encoded(subject, answer)
    logits = subject.passed(cache, torch.cat((asked, wanted[:-1])), len(wanted))
    return bool((logits.argmax(-1) == wanted).all())
