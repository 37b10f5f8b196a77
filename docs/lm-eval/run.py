"""The tasks of this folder by lm-eval, on a dense cache and on latents.

python docs/lm-eval/run.py MODEL FACTORS TEXT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrattn
from lrattn.integrations.transformers import LatentCache, latent_attention

HERE = Path(__file__).parent


def main(name: str, path: str, text: str) -> None:
    words = Path(text).read_text().split(" ")
    parts = [" ".join(words[i : i + 500]) for i in range(0, 4000, 500)]
    (HERE / "articles.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))

    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer, factors = AutoTokenizer.from_pretrained(name), lrattn.Factors.load(path)
    print(f"dense\n{evaluated(model, tokenizer)}\n")
    generate = model.generate
    # lm-eval makes no cache for `generate`: each batch gets a new one of latents.
    # Before transformers 5.24 the argument is past_key_values.
    model.generate = lambda *args, **given: generate(*args, cache=LatentCache(factors), **given)
    with latent_attention(model, factors):
        print(f"latents, keep {factors.keep:.3f}\n{evaluated(model, tokenizer)}")


def evaluated(model, tokenizer) -> str:
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=1024, device="cpu")
    tasks = TaskManager(include_path=str(HERE), include_defaults=False)
    return make_table(simple_evaluate(harness, tasks=["articles", "capitals"], task_manager=tasks))


if __name__ == "__main__":
    main(*sys.argv[1:])
