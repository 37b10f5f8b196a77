"""Runs vLLM engines one after the other: python engine_jobs.py JOBS.json RESULTS.json

A job is {name, model, engine: arguments of LLM, rounds: [prompts, ..], tokens: of each prompt of a round}. Its result:
ids of each round, cached tokens, preemptions, the pool's tokens; or error, its message. Prompts of a round are lists of
ids, and run together. With `record`, a file, it keeps the keys and values that attention was given, by layer; with
`numbered` builders are told each request's number, as by vLLM's newer model runner, which needs a GPU.
"""

from __future__ import annotations

import gc
import json
import sys
from contextlib import contextmanager
from pathlib import Path

ALWAYS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "block_size": 16,
    "max_num_batched_tokens": 64, "enable_prefix_caching": True, "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 1 << 26, "distributed_executor_backend": "uni", "skip_tokenizer_init": True,
    "disable_log_stats": False,
}  # fmt: skip


def run(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    if job.get("numbered"):
        with numbered():
            return run({**job, "numbered": False})
    llm = LLM(model=job["model"], **ALWAYS | job["engine"])
    heads = recorded() if job.get("record") else None
    ids, cached = [], []
    for prompts in job["rounds"]:
        limits = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n, _ in zip(job["tokens"], prompts)
        ]
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], limits, use_tqdm=False)
        ids.append([list(out.outputs[0].token_ids) for out in outs])
        cached.append([out.num_cached_tokens for out in outs])
    counts = {x.name: x.value for x in llm.get_metrics() if x.name == "vllm:num_preemptions"}
    if heads is not None:
        save(heads, job["record"])
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "ids": ids,
        "cached": cached,
        "preemptions": int(counts.get("vllm:num_preemptions", -1)),
        "pool": cache.num_gpu_blocks * cache.block_size,
    }


@contextmanager
def numbered():
    """Inside, each request has a number while it runs; the one that became free last is given first."""
    import numpy as np
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from lrattn.integrations.vllm.batch import BatchBuilder

    build, start, runners, numbers = BatchBuilder.build, GPUModelRunner.__init__, [], {}
    free = list(range(ALWAYS["max_num_seqs"]))

    def started(self, *args, **kwargs):
        runners.append(self)
        start(self, *args, **kwargs)

    def told(self, common_prefix_len, m, fast_build=False):
        runner = runners[-1]
        for gone in [name for name in numbers if name not in runner.requests]:
            free.append(numbers.pop(gone))
        for name in runner.input_batch.req_ids[: m.num_reqs]:
            if name not in numbers:
                numbers[name] = free.pop()
        m.req_idx = np.array([numbers[name] for name in runner.input_batch.req_ids[: m.num_reqs]])
        return build(self, common_prefix_len, m, fast_build)

    BatchBuilder.build, GPUModelRunner.__init__ = told, started
    try:
        yield
    finally:
        BatchBuilder.build, GPUModelRunner.__init__ = build, start


def recorded() -> dict[int, list]:
    """What layers are given from now on: keys and values of each pass."""
    from vllm.model_executor.models.utils import extract_layer_index

    from lrattn.integrations.vllm.layer import LatentImpl

    found: dict[int, list] = {}
    forward = LatentImpl.forward

    def keeping(self, layer, query, key, value, kv_cache, attn_metadata, output, **more):
        if attn_metadata is not None:
            found.setdefault(extract_layer_index(layer.layer_name), []).append((key.clone(), value.clone()))
        return forward(self, layer, query, key, value, kv_cache, attn_metadata, output=output, **more)

    LatentImpl.forward = keeping
    return found


def save(heads: dict[int, list], path: str) -> None:
    import torch
    from safetensors.torch import save_file

    sides = {
        f"{i}.{side}": torch.cat([x[s] for x in parts]) for i, parts in heads.items() for s, side in enumerate("kv")
    }
    save_file(sides, path)


def main() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    jobs, out = json.loads(Path(sys.argv[1]).read_text()), {}
    for job in jobs:
        try:
            out[job["name"]] = run(job)
        except Exception as error:  # the other jobs are other tests
            out[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
        print(f"done: {job['name']}", file=sys.stderr, flush=True)
        Path(sys.argv[2]).write_text(json.dumps(out))


if __name__ == "__main__":
    main()
