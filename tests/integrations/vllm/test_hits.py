"""Prefix hits beside a dense window: the last of a hit's tokens come again, the rest is seen by latents."""

import pytest

pytest.importorskip("vllm")

import tiny
import torch
from engines import ids_of, run_jobs
from test_tokens import BEFORE, CHUNKS, built, factors_of

from lrattn.integrations.transformers import LatentCache
from lrattn.integrations.vllm.window import REPLAY
from lrattn.models.interface import cache_argument

pytestmark = pytest.mark.vllm

N = 12
CASES = {  # family, form, dense window, what the engine is told
    "chunks": ("llama3", CHUNKS, (8, 2), {}),
    "before RoPE, norms": ("qwen3", BEFORE, (24, 4), {}),
    "sliding and not": ("gemma3", CHUNKS, (8, 3), {}),
    "no recent ones": ("llama3", CHUNKS, (0, 4), {}),
    "whole prompts": ("llama3", CHUNKS, (8, 2), {"max_num_batched_tokens": 512}),
    "small steps": ("llama3", BEFORE, (8, 2), {"max_num_batched_tokens": 9, "max_num_seqs": 2}),
}


def rounds():
    """A long prompt; then some that begin like it, two of them together, and the same again; three that are new, of
    which two begin like one that may be read in the same step."""
    long = tiny.tokens(1, 130, seed=3)[0]
    ends = [tiny.tokens(1, n, seed=n)[0] for n in (1, 33, 20, 50)]
    first = [long, tiny.tokens(1, 100, seed=4)[0]]
    second = [torch.cat((long[:113], ends[0])), torch.cat((long[:80], ends[1])), torch.cat((first[1][:70], ends[2]))]
    third = [long, torch.cat((long[:128], ends[3])), torch.cat((second[1], ends[2]))]
    new = tiny.tokens(1, 100, seed=8)[0]
    fourth = [new, new, torch.cat((new[:90], ends[1]))]
    return [[x.tolist() for x in part] for part in (first, second, third, fourth)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hits")
    jobs, made = [], {}
    for name, (family, form, near, engine) in CASES.items():
        model = built(family)
        model.save_pretrained(folder / name)
        factors = factors_of(model, form, 0.5, near)
        factors.save(folder / f"{name}.factors")
        told = {"attention_backend": "CUSTOM", "additional_config": {"lrattn": str(folder / f"{name}.factors")}}
        job = {"name": name, "model": str(folder / name), "engine": told | engine}
        jobs.append(job | {"rounds": rounds(), "tokens": [N] * 3})
        made[name] = model, factors
    jobs.append(jobs[0] | {"name": "numbered", "numbered": True})
    made["numbered"] = made[jobs[0]["name"]]
    return run_jobs(folder, jobs), made


def stepped(model, cache, ids):
    """Logits of the last of these tokens, behind what a cache holds."""
    with torch.no_grad():
        return model(torch.tensor([ids]), **cache_argument(cache), use_cache=True).logits[0, -1]


def continued(model, factors, prompt, hit):
    """Greedy tokens where the first `hit` tokens came from a prefix cache.

    Their latents and first tokens stay as they are; the last ones of them come again, a window at a time so that what
    is far of each is what was held, and are exact from then on.
    """
    model.set_attn_implementation("lrattn")
    cache, (recent, _) = LatentCache(factors), factors.near
    begin = hit - REPLAY * recent
    if hit:
        stepped(model, cache, prompt[:hit])
        held = [[x.clone() for x in layer.pages if x is not None] for layer in cache.layers]
        if recent:
            cache.crop(begin - hit)
        for a in range(begin, hit, max(recent, 1)):
            stepped(model, cache, prompt[a : min(a + recent, hit)])
            for layer, pages in zip(cache.layers, held):
                for x, old in zip(layer.pages, pages):
                    x.flatten(0, 1)[:hit] = old.flatten(0, 1)[:hit]
    out, ids = [], prompt[hit:]
    for _ in range(N):
        out.append(int(stepped(model, cache, ids).argmax()))
        ids = out[-1:]
    return out


@pytest.mark.parametrize("name", [*CASES, "numbered"])
def test_hits_go_by_the_rule(found, name):
    results, made = found
    result, (model, factors) = results[name], made[name]
    got = ids_of(result)
    hits = [n for part in result["cached"] for n in part]
    told = [prompt for part in rounds() for prompt in part]
    least = max(REPLAY * factors.near[0], 16)
    assert sum(hit >= least for hit in hits) >= 4, hits
    assert got == [continued(model, factors, prompt, hit) for prompt, hit in zip(told, hits)], hits
