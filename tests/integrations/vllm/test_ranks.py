"""Several ranks: heads shared out by tensor parallelism, layers by pipeline parallelism, in processes of their own."""

import pytest

pytest.importorskip("vllm")

import tiny
from engines import ids_of, run_jobs
from latents import random_factors
from passes import exact_ropes
from test_tokens import TOKENS, expected, prompts

import lrattn

pytestmark = pytest.mark.vllm

SEVERAL = {"distributed_executor_backend": "mp", "enable_prefix_caching": False}
# Stages make room for what they are sent in a first pass, which vLLM leaves out on a CPU unless it compiles and sizes
# the pool itself.
COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
SIZED = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.1}
RANKS = {"heads": {"tensor_parallel_size": 2}, "layers": {"pipeline_parallel_size": 2} | COMPILED | SIZED}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    made = tiny.model("llama3")
    made.save_pretrained(folder / "model")
    return made, folder


def sharded(model, near):
    """Compressed so that no group of heads is of two of two ranks."""
    batches = tiny.tokens(4, 64, seed=3).split(2)
    return lrattn.compress(model, batches, keep=0.5, bits=16, far=near, shards=2, progress=False)


def test_ranks_answer_as_one(model):
    made, folder = model
    factors = sharded(made, (8, 2))
    factors.save(folder / "factors")
    told = {"attention_backend": "CUSTOM", "additional_config": {"lrattn": str(folder / "factors")}}
    common = {"model": str(folder / "model"), "rounds": [prompts()], "tokens": TOKENS}
    jobs = [common | {"name": name, "engine": told | SEVERAL | more} for name, more in RANKS.items()]
    results = run_jobs(folder, jobs, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    want = expected(made, factors)
    assert {name: ids_of(results[name]) == want for name in RANKS} == dict.fromkeys(RANKS, True)


def test_a_group_that_two_ranks_would_share_is_refused(model):
    made, folder = model
    random_factors(made, 0.5, ropes=exact_ropes(made), chunk=64).save(folder / "one group")
    told = {"attention_backend": "CUSTOM", "additional_config": {"lrattn": str(folder / "one group")}}
    with pytest.raises(ValueError, match="shard: expected latents that are written from heads"):
        lrattn.Factors.load(folder / "one group").layers[0].shard(0, 2)
    engine = told | SEVERAL | RANKS["heads"]
    job = {"name": "cut", "model": str(folder / "model"), "engine": engine, "rounds": [], "tokens": []}
    result = run_jobs(folder, [job], VLLM_ENABLE_V1_MULTIPROCESSING="1")["cut"]
    log = (folder / "engines.log").read_text()
    assert "error" in result and "lrattn: tensor_parallel_size=2: shard: expected" in log
