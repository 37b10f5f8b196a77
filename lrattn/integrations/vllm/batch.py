"""What layers are told of a batch: where its tokens lie, which requests decode, and their rows of the dense window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backend import CommonAttentionMetadata as Common
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from lrattn.integrations.vllm.window import Came, Rows, Window


class Chunk(NamedTuple):
    """A request's tokens first .. last of a batch, begin .. end of its own; its row of the window.

    known: whether the host knows begin and end; else it only knows how many they are, as of drafts.
    """

    request: int
    first: int
    last: int
    begin: int
    end: int
    row: int
    known: bool


@dataclass(eq=False)
class Batch(AttentionMetadata):  # type: ignore[misc]
    """Requests that decode come first.

    Args:
        tokens: of the batch. decodes: requests that decode, `queries` tokens each. chunks: the others.
        table, lens, positions: of requests, of requests and of tokens. slots: [tokens] int64, where to write latents.
        most: bound of lens.
        rows: [requests] int32, places: [tokens] int64, of the dense window; None without one.
        settled: tokens [n, sinks] of the batch that are the first of their sequence, and their homes [n]; or None.
        came, twins: whose rows have to be filled or copied before.
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


class BatchBuilder(AttentionMetadataBuilder[Batch]):  # type: ignore[misc]
    """One for each width of rows. Those whose layers share a block table are told of the same batch, and share what the
    first of them makes of it."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers, scheduler = vllm_config.compilation_config.static_forward_context, vllm_config.scheduler_config
        self.layers = [layers[name] for name in layer_names]
        self.engine = self.layers[0].impl.engine
        self.rows: Rows | None = None
        self.row_buffer = torch.zeros(scheduler.max_num_seqs + 1, dtype=torch.int32, device=device)
        self.token_buffers = torch.zeros(2, scheduler.max_num_batched_tokens + 1, dtype=torch.int64, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Common, fast_build: bool = False) -> Batch:
        engine, m = self.engine, common_attn_metadata
        if engine.common is not m:
            engine.common, engine.batch = m, self._batch(m)
        batch: Batch = engine.batch
        for layer in self.layers if batch.twins or batch.came is not None else ():
            layer.impl.window.copy(batch.twins)
            if batch.came is not None and not batch.chunks:
                layer.impl.window.fill(batch.came, layer.impl.pages(layer.kv_cache), batch.table)
        return batch

    def _batch(self, m: Common) -> Batch:
        starts: list[int] = m.query_start_loc_cpu.tolist()
        spans, window, n = list(pairwise(starts)), self.layers[0].impl.window, m.num_actual_tokens
        decodes = split_decodes_and_prefills(m, self.reorder_batch_threshold or 1, require_uniform=True)[0]
        queries = max((b - a for a, b in spans[:decodes]), default=0)
        rows = [0] * len(spans) if window is None else self._rows().of(m, starts)
        ends = padded(m.seq_lens if m.seq_lens_cpu_upper_bound is None else m.seq_lens_cpu_upper_bound, len(rows))
        exact = not self.engine.drafts or self.device.type == "cpu"
        each = zip(spans, ends, rows, padded(m.is_prefilling, len(rows)), strict=True)
        chunks = [Chunk(i, a, b, t - b + a, t, row, exact or told) for i, ((a, b), t, row, told) in enumerate(each)]
        live = [c for c in chunks if c.first < c.last]
        positions: Any = m.positions
        where = m.block_table_tensor, m.seq_lens, positions[..., :n], m.slot_mapping[:n], m.max_seq_len
        batch = Batch(n, decodes, queries, [c for c in live if c.request >= decodes], *where)
        if window is not None:
            self._place(batch, m, window, rows, live)
        return batch

    def _rows(self) -> Rows:
        if self.rows is None:
            pages, _, size, _ = self.layers[0].kv_cache.shape
            self.rows = Rows(self.engine.rows, pages, size, self.engine.drafts, self.device)
        return self.rows

    def _place(self, batch: Batch, m: Common, window: Window, rows: list[int], live: list[Chunk]) -> None:
        """Rows of the window, and where the tokens go in them; who came, and which latents are there already."""
        held, n, sinks, device = self._rows(), batch.tokens, window.sinks, self.device
        batch.rows = self.row_buffer[: len(rows)]
        batch.rows.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
        lens, last = m.seq_lens.long(), (m.query_start_loc[1:] - 1).clamp_min(0)
        own = torch.where(m.slot_mapping[last] < 0, held.count, batch.rows.long())  # of a dummy batch: nobody's
        computed = lens - m.query_start_loc[1:] + m.query_start_loc[:-1]
        held.hit[torch.where(computed > 0, held.count, own)] = 0
        held.home[torch.where(computed > 0, -1, m.block_table_tensor[:, 0].long())] = -1
        if behind := [c.request for c in live if c.begin > 0 and c.row in held.new]:
            batch.came = held.came(m, behind, own, computed, self.engine.replay)
        if sinks and (fresh := [c for c in batch.chunks if not c.begin and c.end >= sinks]):
            index, first = torch.tensor([(c.request, c.first) for c in fresh], device=device).T
            homes = held.settle(m.block_table_tensor[index, 0].long())
            batch.settled = first[:, None] + torch.arange(sinks, device=device), homes
            if batch.came is not None:
                batch.came = batch.came._replace(homes=held.home[m.block_table_tensor[batch.came.requests, 0].long()])
        at = torch.arange(n, device=device)
        of = torch.searchsorted(m.query_start_loc[1:].contiguous(), at, right=True).clamp_max(len(rows) - 1)
        row, t = torch.where(batch.slots < 0, held.count, own[of]), computed[of] + at - m.query_start_loc[of]
        kept, width = (t < sinks) | (t >= lens[of] - window.slots), sinks + window.slots
        batch.places, slots = self.token_buffers[:, :n]  # whose address a captured step knows
        batch.places.copy_(torch.where(kept, row * width + window.place(t), held.count * width))
        slots.copy_(torch.where(t < held.hit[row], -1, batch.slots))
        batch.slots, batch.twins = slots, held.twins
        held.wrote(m, own, slots)


def padded(x: Tensor | None, count: int) -> list[Any]:
    """Of each request, on the host; of those that only pad a batch 0."""
    found = [] if x is None else x.tolist()[:count]
    return found + [0] * (count - len(found))
