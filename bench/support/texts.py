"""Real text that installs as a package, inside gensim's test data: Wikipedia articles (CC BY-SA), and news.

news: the Lee background corpus, 300 short documents of the Australian Broadcasting Corporation. code: the modules of
networkx (BSD), which torch brings. Every second article, document or module is for calibration, the others for
evaluation.
"""

from __future__ import annotations

import ast
import bz2
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import mwparserfromhell
import torch
from torch import Tensor
from tqdm import tqdm

from bench.support.models import CACHE, package_dir, written_once

ABOUT = "Wikipedia articles of 2016: even ones to calibrate, odd ones to evaluate"
DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "test/test_data/lee_background.cor"
WISHES = (
    "Finish this function.",
    "Please complete the Python function below.",
    "Write the body of this function.",
    "Here is the beginning of a function. Go on with it.",
)
NOT_PROSE = ("ref", "table", "gallery", "math")


def wikipedia(half: str) -> str:
    """Clean prose of every second article: half "calibration" has the even ones, "evaluation" the odd ones."""
    saved = CACHE / f"wikipedia-{half}.txt"
    if not saved.is_file():
        articles = _articles()
        for i, name in enumerate(("calibration", "evaluation")):
            chosen = tqdm(articles[i::2], desc=f"cleaning {name} articles", unit="article")
            with written_once(CACHE / f"wikipedia-{name}.txt") as text:
                text.write_text("\n\n".join(map(_prose, chosen)))
    return saved.read_text()


def news(half: str) -> str:
    """Every second document: half "calibration" has the even ones, "evaluation" the odd ones. None comes twice."""
    lines = (package_dir("gensim") / NEWS).read_text().splitlines()
    documents = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return "\n\n".join(documents[("calibration", "evaluation").index(half) :: 2])


def code(half: str) -> str:
    """Every second module of Python: half "calibration" has the even ones, "evaluation" the odd ones."""
    return "\n\n".join(path.read_text() for path in modules(half))


def modules(half: str) -> list[Path]:
    folder = package_dir("networkx") / "algorithms"
    found = sorted(path for path in folder.rglob("*.py") if "tests" not in path.parts and path.name != "__init__.py")
    return found[("calibration", "evaluation").index(half) :: 2]


def functions(half: str) -> list[tuple[str, str]]:
    """Of the functions of `code` that have a docstring and are neither short nor long: signature and docstring, and the
    whole."""
    found = []
    for module in modules(half):
        source = module.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                head = "\n".join(lines[: node.body[0].end_lineno - node.lineno + 1])
                if len(head) > 300 and len("\n".join(lines)) < 3000:
                    found.append((head, "\n".join(lines)))
    return found


def chats(tokenizer: Any, half: str, count: int, most: int = 1024) -> list[Tensor]:
    """Token ids [1, t], t <= most: a user asks for a function of `functions` to be finished, and the whole follows."""
    found = functions(half)
    random.Random(0).shuffle(found)
    made = []
    for i, (head, whole) in enumerate(found[:count]):
        asks = {"role": "user", "content": f"{WISHES[i % len(WISHES)]}\n\n```python\n{head}\n```"}
        answers = {"role": "assistant", "content": f"```python\n{whole}\n```"}
        text = tokenizer.apply_chat_template([asks, answers], tokenize=False)
        made.append(torch.tensor(tokenizer.encode(text, add_special_tokens=False)[:most])[None])
    return made


TEXTS = {"wikipedia": wikipedia, "news": news}


def _articles() -> list[str]:
    """Markup of the articles that are not redirects, in the order of the dump."""
    found = []
    with bz2.open(package_dir("gensim") / DUMP) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}text"):
                markup = element.text or ""
                if markup and not markup.lstrip().lower().startswith("#redirect"):
                    found.append(markup)
                element.clear()
    return found


def _prose(markup: str) -> str:
    code = mwparserfromhell.parse(markup)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in NOT_PROSE):
        if code.contains(tag):
            code.remove(tag)
    text = code.strip_code(normalize=True, collapse=True)
    lines = (line for line in text.splitlines() if not line.startswith(("thumb", "File:", "Category:", "Image:")))
    return "\n".join(lines).strip()
