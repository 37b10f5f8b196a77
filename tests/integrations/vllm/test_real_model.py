"""A real model, SmolLM2, on prompts of 3 to 700 tokens: the tokens of vLLM's dense attention, and of transformers."""

import pytest

pytest.importorskip("vllm")

import torch
from engines import ids_of, run_jobs
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lrattn
from bench.support import models, texts
from lrattn.attention.cache import pack
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.models.interface import cache_argument

pytestmark = pytest.mark.vllm

CASES = {  # how the factors are made, and what the engine is told
    "exact": ({"method": "svd", "keep": 1.0, "far": (0, 0)}, {}),
    "16 bits": ({"keep": 0.5, "bits": 16}, {"enable_prefix_caching": False}),
    "default": ({}, {"enable_prefix_caching": False}),
}
ENGINE = {"max_model_len": 1024, "block_size": 32, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 28}
PARTS = (3, 40, 64, 257, 700, 31, 200)
TAILS = (30, 100, 1)
TOKENS = tuple(24 + i % 5 for i in range(len(PARTS) + len(TAILS)))
ROUNDING = 1e-4  # of keys and values, relative to the largest


@pytest.fixture(scope="module")
def setting():
    """The model, prompts, ten of them, three of which begin with the same 300 tokens, and a text to calibrate on."""
    model, _ = models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(models.CACHE / "smollm2")
    ids, text = (
        tokenizer(texts.wikipedia(which), add_special_tokens=False).input_ids for which in ("evaluation", "calibration")
    )
    begin, prompts, shared = 1000, [], ids[:300]
    for n in PARTS:
        prompts.append(ids[begin : begin + n])
        begin += 1000
    prompts += [shared + ids[begin + 100 * n : begin + 101 * n] for n in TAILS]
    return model, prompts, torch.tensor(text[:2048]).view(4, 1, 512)


@pytest.fixture(scope="module")
def found(setting, tmp_path_factory):
    model, prompts, text = setting
    folder, factors = tmp_path_factory.mktemp("real"), {}
    common = {"model": str(models.CACHE / "smollm2"), "rounds": [prompts], "tokens": TOKENS}
    jobs = [common | {"name": "dense", "engine": ENGINE}]
    recipe = lrattn.methods.METHODS[lrattn.methods.DEFAULT]
    moments = lrattn.calibrate(model, list(text), gather=recipe.gather, far=recipe.near, progress=False)
    for name, (form, engine) in CASES.items():
        told = {"batches": list(text[:1])} if "method" in form else {"moments": moments}
        factors[name] = lrattn.compress(model, **told, **form, progress=False)
        factors[name].save(folder / name)
        jobs.append(common | {"name": name, "engine": ENGINE | engine | latents(folder / name)})
    return run_jobs(folder, jobs), factors, folder


def latents(path):
    return {"attention_backend": "CUSTOM", "additional_config": {"lrattn": str(path)}}


def expected(model, factors, prompts):
    model.set_attn_implementation("lrattn")
    out = []
    for prompt, n in zip(prompts, TOKENS):
        ids = torch.tensor([prompt])
        told = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cache = cache_argument(LatentCache(factors))
        out.append(model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **told)[0, len(prompt) :].tolist())
    return out


def test_exact_factors_give_the_tokens_of_dense_attention(found):
    results, _, _ = found
    assert ids_of(results["exact"]) == ids_of(results["dense"])
    assert sum(results["exact"]["cached"][0]) == sum(results["dense"]["cached"][0]) == 2 * 288


def test_plain_latents_give_the_tokens_of_transformers(setting, found):
    model, prompts, _ = setting
    results, factors, _ = found
    assert ids_of(results["16 bits"]) == expected(model, factors["16 bits"], prompts)


def test_packed_latents_differ_by_flipped_codes_alone(setting, found):
    """From transformers': of prompts whose tokens differ, keys and values agree to rounding up to the layer in which a
    code is another one; the tokens before it make the prompt."""
    model, prompts, _ = setting
    results, factors, folder = found
    packed = factors["default"]
    got, want = ids_of(results["default"]), expected(model, packed, prompts)
    other = [(p, a, b) for p, a, b in zip(prompts, got, want) if a != b]
    assert len(other) < len(prompts) / 2
    other = other or [(prompts[3], got[3], want[3])]
    told = [p + a[: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))] for p, a, b in other]
    record, engine = (
        folder / "heads.safetensors",
        ENGINE | latents(folder / "default") | {"enable_prefix_caching": False},
    )
    job = {"name": "heads", "model": str(models.CACHE / "smollm2"), "record": str(record), "tokens": [1]}
    run_jobs(folder, [job | {"engine": engine | {"max_num_batched_tokens": 1024}, "rounds": [[p] for p in told]}])
    heads, begin = load_file(record), 0
    for prompt, a, b in zip(told, *zip(*[(x, y) for _, x, y in other])):
        end = begin + len(prompt)
        theirs = [(heads[f"{i}.k"][begin:end], heads[f"{i}.v"][begin:end]) for i in range(len(packed.layers))]
        flipped = first_flip(packed, theirs, heads_in_transformers(model, packed, prompt))
        assert a == b or flipped < len(packed.layers), "tokens differ, and no code does"
        begin = end


def heads_in_transformers(model, factors, prompt):
    """Keys and values [t, Hkv, D] that each layer's attention is given."""
    kept, attend = {}, integration._attend

    def keeping(module, query, key, value, *rest, **more):
        kept[module.layer_idx] = key.plain_keys[0].transpose(0, 1), value[0].transpose(0, 1)
        return attend(module, query, key, value, *rest, **more)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), latent_attention(model, factors):
        patch.setattr(integration, "_attend", keeping)
        model(torch.tensor([prompt]), use_cache=False)
    return [kept[i] for i in range(len(factors.layers))]


def first_flip(factors, theirs, ours):
    """The first layer in which a byte of codes or scales differs; up to it, keys and values agree to rounding."""
    for i, (layer, a, b) in enumerate(zip(factors.layers, theirs, ours)):
        for x, y in zip(a, b):
            assert (x - y).abs().max() <= ROUNDING * y.abs().max(), f"layer {i}, before any code flipped"
        at = torch.arange(len(a[0]))
        rows = [layer.project(*side, at if layer.rope is not None else None) for side in (a, b)]
        sides = zip((layer.row_side, layer.values), *rows)
        if any(not torch.equal(x, y) for side, p, q in sides for x, y in zip(pack(side, p), pack(side, q))):
            return i
    return len(factors.layers)
