"""One layer of vLLM's and its builder, without an engine: a scheduler's steps are written down by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from lrattn.integrations.vllm import source
from lrattn.integrations.vllm.batch import BatchBuilder
from lrattn.integrations.vllm.layer import Engine, LatentImpl, row_bytes
from lrattn.integrations.vllm.window import Window

PAGES, SIZE, REQUESTS, WIDTH = 40, 16, 4, 12


class Step(NamedTuple):
    """What a request does in a step: its pages, tokens before, new ones, whether it prefills, its number."""

    pages: list[int]
    computed: int
    new: int
    prefills: bool = True
    number: int | None = None


def stub(layer, near, drafts=0, *, replay=True, sliding=None, softcap=0.0, sinks=None):
    """A layer of these factors, and the builder of its batches."""
    told = SimpleNamespace(
        num_speculative_tokens=drafts, cache_config=SimpleNamespace(enable_prefix_caching=replay),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
    )  # fmt: skip
    with mock.patch.object(source, "load", lambda _: SimpleNamespace(near=near)):
        engine = Engine(told)
    impl = object.__new__(LatentImpl)
    vars(impl).update(
        factors=layer, scale=layer.head_dim**-0.5, sliding_window=sliding, softcap=softcap, sinks=sinks,
        engine=engine, window=Window(layer, near, engine.slots, engine.rows) if any(near) else None,
    )  # fmt: skip
    width = row_bytes(layer.row_side) + (0 if layer.shared else row_bytes(layer.values))
    owner = SimpleNamespace(impl=impl, kv_cache=torch.zeros(PAGES, 1, SIZE, width, dtype=torch.uint8))
    builder = object.__new__(BatchBuilder)
    vars(builder).update(
        engine=impl.engine, layers=[owner], rows=None, device=torch.device("cpu"), reorder_batch_threshold=1 + drafts,
        row_buffer=torch.zeros(REQUESTS + 1, dtype=torch.int32), token_buffers=torch.zeros(2, 512, dtype=torch.int64),
    )  # fmt: skip
    return owner, builder


def common(steps: list[Step], padding: int = 0) -> CommonAttentionMetadata:
    """As vLLM tells of them; padding: requests that only fill up a batch, a token each."""
    lens = [step.new for step in steps]
    table = torch.zeros(len(steps) + padding, WIDTH, dtype=torch.int32)
    for row, step in zip(table, steps):
        row[: len(step.pages)] = torch.tensor(step.pages)
    at = [torch.arange(step.computed, step.computed + step.new) for step in steps]
    slots = [table[b, t // SIZE].long() * SIZE + t % SIZE for b, t in enumerate(at)]
    empty = torch.full((padding,), -1)
    starts = torch.tensor([0, *np.cumsum(lens + [0] * padding)], dtype=torch.int32)
    ends = torch.tensor([step.computed + step.new for step in steps] + [0] * padding, dtype=torch.int32)
    numbers = [step.number for step in steps]
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=ends, num_reqs=len(steps) + padding,
        num_actual_tokens=sum(lens) + padding, max_query_len=max(lens), max_seq_len=WIDTH * SIZE,
        block_table_tensor=table, slot_mapping=torch.cat([*slots, empty]),
        positions=torch.cat([*at, empty.clamp_min(0)]),
        is_prefilling=torch.tensor([step.prefills for step in steps]), seq_lens_cpu_upper_bound=ends[: len(steps)],
        req_idx=None if None in numbers else np.array(numbers),
    )  # fmt: skip


def passed(owner, builder, steps, heads, padding=0):
    """Output [n, Hq, D] of one step on q [n, Hq, D], k and v [n, Hkv, D]."""
    batch = builder.build(0, common(steps, padding))
    out = torch.full_like(heads[0], torch.nan)
    return owner.impl.forward(owner, *heads, owner.kv_cache, batch, out)
