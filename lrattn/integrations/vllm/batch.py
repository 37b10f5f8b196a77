"""What layers are told of a batch: where its tokens lie, which requests decode, and their rows of the dense window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from lrattn.integrations.vllm.window import Came, Rows, Window


class Chunk(NamedTuple):
    """A request that is no decode: tokens first .. last of the batch, begin .. end of its own; its row of the window.

    prefills: whether the host knows begin and end; else it only knows how many they are, as of drafts.
    """

    index: int
    first: int
    last: int
    begin: int
    end: int
    row: int
    prefills: bool


@dataclass(eq=False)
class Batch(AttentionMetadata):
    """Requests that decode come first.

    Args:
        tokens: of the batch. decodes: requests that decode, `queries` tokens each. chunks: the others.
        table, lens, positions: of requests, of requests and of tokens. slots: [tokens] int64, where to write latents.
        most: bound of lens.
        rows: [requests] int32, places: [tokens] int64, of the dense window; None without one.
        settled: tokens [n, sinks] of the batch that are the first of their sequence, and their homes [n]; or None.
    """

    tokens: int
    decodes: int
    queries: int
    chunks: list[Chunk]
    table: Tensor
    lens: Tensor
    positions: Tensor
    slots: Tensor
    most: int
    rows: Tensor | None = None
    places: Tensor | None = None
    settled: tuple[Tensor, Tensor] | None = None
    came: Came | None = None
    twins: Sequence[tuple[int, int]] = ()


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """One for each width of rows; those whose layers share a block table are given the same batch, and share it."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]
        self.engine = self.layers[0].impl.engine
        self.rows: Rows | None = None
        scheduler = vllm_config.scheduler_config
        self.row_buffer = torch.zeros(scheduler.max_num_seqs + 1, dtype=torch.int32, device=device)
        self.token_buffers = torch.zeros(2, scheduler.max_num_batched_tokens + 1, dtype=torch.int64, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        engine, m = self.engine, common_attn_metadata
        if engine.common is not m:
            engine.common, engine.batch = m, self._batch(m)
        batch: Batch = engine.batch
        for layer in self.layers if batch.twins or batch.came is not None else ():
            layer.impl.window.copy(batch.twins)
            if batch.came is not None:
                layer.impl.window.fill(batch.came, layer.impl.pages(layer.kv_cache), batch.table)
        return batch

    def _batch(self, m: CommonAttentionMetadata) -> Batch:
        starts: list[int] = m.query_start_loc_cpu.tolist()
        decodes = split_decodes_and_prefills(m, self.reorder_batch_threshold or 1, require_uniform=True)[0]
        queries = max((b - a for a, b in pairwise(starts[: decodes + 1])), default=0)
        window = self.layers[0].impl.window
        rows = self._rows_of(m, starts) if window is not None else [0] * (len(starts) - 1)
        ends, told = padded(m.seq_lens_cpu_upper_bound, m.seq_lens, len(rows)), padded(m.is_prefilling, None, len(rows))
        chunks = [
            Chunk(b, starts[b], starts[b + 1], ends[b] - starts[b + 1] + starts[b], ends[b], rows[b], told[b])
            for b in range(decodes, len(rows))
            if starts[b] < starts[b + 1]
        ]
        assert m.positions is not None
        n = m.num_actual_tokens
        positions = m.positions[..., :n]
        batch = Batch(
            n, decodes, queries, chunks, m.block_table_tensor, m.seq_lens, positions, m.slot_mapping[:n], m.max_seq_len
        )
        if window is not None:
            self._place(batch, m, window, rows, starts, ends, told)
        return batch

    def _rows_of(self, m: CommonAttentionMetadata, starts: list[int]) -> list[int]:
        if self.rows is None:
            pages, _, size, _ = self.layers[0].kv_cache.shape
            self.rows = Rows(self.engine.rows, pages, size, self.engine.drafts, self.device)
        return self.rows.of(m, starts)

    def _place(
        self,
        batch: Batch,
        m: CommonAttentionMetadata,
        window: Window,
        rows: list[int],
        starts: list[int],
        ends: list[int],
        told: list[bool],
    ) -> None:
        """Rows of the window, and where the batch's tokens go in them; which latents are held already; who came."""
        assert self.rows is not None and m.positions is not None
        n, count, sinks, slots, device = batch.tokens, len(rows), window.sinks, window.slots, self.device
        batch.rows = self.row_buffer[:count]
        batch.rows.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
        own = batch.rows.long()
        lens = m.query_start_loc[1:] - m.query_start_loc[:-1]
        computed = m.seq_lens.long() - lens
        self.rows.hit[torch.where(computed > 0, self.rows.count, own)] = 0
        before = [end - b + a for end, (a, b) in zip(ends, pairwise(starts), strict=True)]
        live = (b for b in range(count) if starts[b] < starts[b + 1] and before[b] > 0)
        index = [b for b in live if told[b] or rows[b] in self.rows.new]
        if index:
            replay = [self.engine.replay if told[b] else 0 for b in index]
            batch.came = self.rows.came(m, index, own, computed, replay)
        fresh = [c for c in batch.chunks if not c.begin and c.end >= sinks and c.prefills] if sinks else []
        if fresh:
            first = torch.tensor([c.first for c in fresh], device=device)
            pages = m.block_table_tensor[torch.tensor([c.index for c in fresh], device=device), 0].long()
            batch.settled = first[:, None] + torch.arange(sinks, device=device), self.rows.settle(pages)
        at = torch.arange(n, device=device)
        of = torch.searchsorted(m.query_start_loc[1:].contiguous(), at, right=True).clamp_max(count - 1)
        row_of = torch.where(batch.slots < 0, self.rows.count, own[of])
        t = computed[of] + at - m.query_start_loc[of]
        kept = (t < sinks) | (t >= m.seq_lens.long()[of] - slots)
        place = torch.where(t < sinks, t, sinks + t % max(slots, 1))
        batch.places, held = self.token_buffers[:, :n]
        batch.places.copy_(torch.where(kept, row_of * (sinks + slots) + place, self.rows.count * (sinks + slots)))
        held.copy_(torch.where(t < self.rows.hit[row_of], -1, batch.slots))
        batch.slots, batch.twins = held, self.rows.twins
        self.rows.wrote(m, own, held)


def padded(x: Tensor | None, instead: Tensor | None, count: int) -> list[Any]:
    """Of each request, on the host; of those that only pad a batch 0."""
    x = instead if x is None else x
    assert x is not None
    return x.tolist()[:count] + [0] * (count - len(x))
