"""vLLM on latents answers as vLLM's dense attention with exact factors, and as transformers on latents with others."""

import copy

import pytest

pytest.importorskip("vllm")

import tiny
import torch
from engines import ids_of, run_jobs
from latents import random_factors
from passes import exact_ropes
from transformers import Gemma2Config

from lrattn.integrations.transformers import LatentCache
from lrattn.models.interface import cache_argument

pytestmark = pytest.mark.vllm

GEMMA2 = Gemma2Config(**tiny.SIZES, sliding_window=12, query_pre_attn_scalar=32, attn_logit_softcapping=3.0)
CHUNKS, BEFORE = {"ropes": True, "chunk": 64}, {"ropes": True}
NO_HITS = {"enable_prefix_caching": False}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
TOKENS = (12, 9, 15, 10, 14, 11, 9, 13)
# Family, form of the factors, share of the numbers, the dense window, and what the engine is told.
CASES = {
    "exact": ("llama3", CHUNKS, 1.0, (0, 0), {}),
    "exact, windows": ("gemma3", BEFORE, 1.0, (0, 0), {}),
    "exact, as given": ("qwen2", {}, 1.0, (6, 2), {}),
    "chunks": ("llama3", CHUNKS, 0.4, (0, 0), {}),
    "chunks, window": ("llama3", CHUNKS, 0.4, (8, 2), NO_HITS),
    "packed, window": ("qwen2", CHUNKS | {"bits": 4}, 0.5, (5, 4), NO_HITS),
    "packed row": ("llama3", CHUNKS | {"bits": 4, "shared": True}, 0.4, (20, 4), NO_HITS),
    "before RoPE": ("qwen3", BEFORE, 0.5, (0, 0), {}),
    "before RoPE, window": ("qwen3", BEFORE, 0.5, (16, 4), NO_HITS),
    "one row": ("qwen2", {"shared": True}, 0.5, (0, 3), NO_HITS),
    "as given": ("qwen3", {}, 0.5, (0, 0), {"block_size": 48}),
    "sliding": ("mistral", BEFORE, 0.5, (0, 0), {}),
    "sliding, window": ("mistral", CHUNKS, 0.5, (5, 2), NO_HITS),
    "sliding and not": ("gemma3", CHUNKS, 0.5, (0, 0), {}),
    "sliding and not, window": ("gemma3", BEFORE, 0.5, (5, 2), NO_HITS),
    "softcap": ("gemma2", CHUNKS, 0.5, (6, 2), NO_HITS),
    "one head": ("mqa", CHUNKS, 0.5, (6, 2), NO_HITS),
    "few pages": ("llama3", CHUNKS, 0.5, (0, 0), {"num_gpu_blocks_override": 19}),
    "few pages, window": ("llama3", CHUNKS, 0.5, (8, 2), {"num_gpu_blocks_override": 19} | NO_HITS),
    "drafts": ("llama3", CHUNKS, 0.5, (8, 2), {"speculative_config": NGRAM} | NO_HITS),
}  # fmt: skip
LONG = 90  # tokens of an answer
DENSE = ("llama3", "gemma3")


def prompts():
    """3 to 150 tokens; three of them begin alike, two go round in circles."""
    shared = tiny.tokens(1, 70, seed=5)[0]
    made = [tiny.tokens(1, n, seed=n)[0] for n in (3, 40, 64, 150)]
    made += [torch.cat((shared, tiny.tokens(1, n, seed=n)[0])) for n in (1, 30, 20)]
    return [x.tolist() for x in [*made, tiny.tokens(1, 6, seed=9)[0].repeat(8)]]


def built(family):
    config = copy.deepcopy(GEMMA2 if family == "gemma2" else tiny.CONFIGS[family])
    if family == "qwen2":  # whose heads vLLM takes to share out the hidden size
        config.hidden_size = config.num_attention_heads * config.head_dim
    return tiny.built(config, 0)


def factors_of(model, form, keep, near):
    told = form | ({"ropes": exact_ropes(model)} if "ropes" in form else {})
    return random_factors(model, keep, near, **told)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of every case, and of dense engines; the models, and the factors by case."""
    folder = tmp_path_factory.mktemp("engines")
    models, factors, jobs = {}, {}, []
    for family in sorted({case[0] for case in CASES.values()}):
        models[family] = built(family)
        models[family].save_pretrained(folder / family)
    common = {"rounds": [prompts()], "tokens": TOKENS}
    for family in DENSE:
        jobs.append({"name": f"dense {family}", "model": str(folder / family), "engine": {"block_size": 32}} | common)
    for name, (family, form, keep, near, engine) in CASES.items():
        factors[name] = factors_of(models[family], form, keep, near)
        path = folder / f"{len(factors)}.safetensors"
        factors[name].save(path)
        told = {"attention_backend": "CUSTOM", "additional_config": {"lrattn": str(path)}}
        jobs.append({"name": name, "model": str(folder / family), "engine": told | engine} | common)
    few = next(job for job in jobs if job["name"] == "few pages, window")
    long = few | {"name": "long answers", "rounds": [short()], "tokens": [LONG] * 4}
    jobs.insert(-1, long)  # an engine after one with drafts does not start in this process
    return run_jobs(folder, jobs), models, factors


def short():
    return [prompt[:20] for prompt in prompts()[1:5]]


def expected(model, factors, asked=None, tokens=TOKENS):
    """Greedy tokens of transformers: on latents, or dense where there are no factors."""
    model.set_attn_implementation("sdpa" if factors is None else "lrattn")
    out = []
    for prompt, n in zip(prompts() if asked is None else asked, tokens):
        cache = {} if factors is None else cache_argument(LatentCache(factors))
        ids = torch.tensor([prompt])
        told = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out.append(model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **told)[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(found, name):
    results, models, factors = found
    assert ids_of(results[name]) == expected(models[CASES[name][0]], factors[name])


@pytest.mark.parametrize("family", DENSE)
def test_exact_factors_give_the_tokens_of_dense_attention(found, family):
    results, models, _ = found
    exact = next(name for name, case in CASES.items() if case[0] == family and case[2] == 1.0)
    assert ids_of(results[exact]) == ids_of(results[f"dense {family}"]) == expected(models[family], None)


def test_requests_that_were_put_off_far_behind_their_prompts_go_on(found):
    """What they had answered is read again, in chunks."""
    results, models, factors = found
    result, name = results["long answers"], "few pages, window"
    assert result["preemptions"] > 0
    assert ids_of(result) == expected(models[CASES[name][0]], factors[name], short(), [LONG] * 4)


def test_what_was_meant_to_happen_happened(found):
    """Hits of the prefix cache, requests that were preempted, and wide pools."""
    results = found[0]
    assert sum(sum(part) for part in results["chunks"]["cached"]) >= 2 * 64
    assert results["few pages"]["preemptions"] > 0 and results["few pages, window"]["preemptions"] > 0
    assert results["exact"]["pool"] < results["packed, window"]["pool"] / 7
