"""LatentCache: a transformers Cache that holds pages of latents, and the nearest tokens dense where asked to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lrattn.attention.cache import allocate_cache, key_rows, value_rows
from lrattn.factors.record import Factors
from lrattn.integrations.transformers.verify import check_fit
from lrattn.integrations.transformers.window import DenseWindow, Places, near_of

KEEPS_LENGTH = "max_length" in inspect.signature(Cache.crop).parameters  # as in 5.5; not in 5.19


class Span(NamedTuple):
    """Where the tokens of one forward pass go.

    live: [B, S] bool, False on padding; None if there is none. begins: per sequence its first live column.
    counts: live tokens. lengths: tokens held once they are written. slots: [sum counts] int64, row by row.
    """

    live: Tensor | None
    begins: list[int]
    counts: list[int]
    lengths: list[int]
    slots: Tensor = torch.empty(0, dtype=torch.int64)
    next_positions: list[int] | None = None


class LatentCache(Cache):  # type: ignore[misc]
    """The latents of a batch of sequences, in pages shared by all layers' block tables. Padding is not stored.

    Args:
        model: the model whose attention fills it. factors: of that model, in its dtype and on its device.
        page_size: tokens per page, a multiple of 16.
        recent, sinks: each query sees its `recent` last tokens, its own included, and the sequence's first `sinks`
            by their exact keys and values, and the others by their latents. Those tokens are held dense too, as many
            bytes as in an ordinary cache. With recent as long as the sequence attention is the original model's.
            None: as the factors say (Factors.near), for "lrattn" 64 and 4 by default; 0 and 0 for latents alone.

    It grows as tokens come, and works inside `latent_attention(model, factors)` only. Every token has its latents:
    what `crop` brings back into the window, which holds it no longer, is taken from them.
    Raises: ValueError if the factors do not fit the model, or for a negative number.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        page_size: int = 16,
        *,
        recent: int | None = None,
        sinks: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.recent, self.sinks = near_of(factors, recent, sinks)
        check_fit(model, factors)
        self.factors = factors
        self.page_size = page_size
        self.reset()

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forgets every token and gives the pages back."""
        self.caches = [allocate_cache(layer, 0, self.page_size) for layer in self.factors.layers]
        self.window = DenseWindow(self.factors.layers, self.recent, self.sinks)
        self.block_table = torch.empty(0, 0, dtype=torch.int32, device=self.factors.layers[0].device)
        self.pages: list[list[int]] = []  # page ids of each sequence
        self.lengths: list[int] = []
        self.seen = 0  # columns of the attention mask so far, padding included
        self.next_positions: list[int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held: pages, free room in them included, the dense window and the block table."""
        pages = [x for pair in self.caches for x in pair if x is not None]
        return sum(x.untyped_storage().nbytes() for x in (*pages, *self.window.tensors, self.block_table))

    @property
    def num_tokens(self) -> int:
        """Tokens stored, over all sequences."""
        return sum(self.lengths)

    def reserve(self, span: Span) -> Span:
        """Pages for the tokens of a span, and their slots. Lengths change only at `commit`."""
        size = self.page_size
        if not self.lengths:
            self.pages = [[] for _ in span.counts]
        need = [-(-length // size) for length in span.lengths]
        missing = sum(max(n - len(pages), 0) for n, pages in zip(need, self.pages, strict=True))
        if missing:
            used = {page for pages in self.pages for page in pages}
            self._grow(len(used) + missing)
            free = (page for page in range(self._num_pages) if page not in used)
            for n, pages in zip(need, self.pages, strict=True):
                pages.extend(next(free) for _ in range(n - len(pages)))
        if missing or len(self.block_table) != len(self.pages):
            self._publish()
        self.window.reserve(span.begins, span.counts, span.lengths)
        slots = self._slots(
            (b, t)
            for b, (count, length) in enumerate(zip(span.counts, span.lengths, strict=True))
            for t in range(length - count, length)
        )
        return span._replace(slots=slots)

    def _slots(self, tokens: Iterable[tuple[int, int]]) -> Tensor:
        """Where (sequence, index) of each token lies in the pages, [n] int64."""
        size = self.page_size
        slots = [self.pages[b][t // size] * size + t % size for b, t in tokens]
        return torch.tensor(slots, dtype=torch.int64, device=self.block_table.device)

    def commit(self, span: Span, columns: int) -> None:
        """The tokens of a span were written to every layer."""
        self.window.commit()
        self.lengths = list(span.lengths)
        self.next_positions = span.next_positions
        self.seen += columns

    @property
    def _num_pages(self) -> int:
        return self.caches[0][0].shape[0]

    def _publish(self) -> None:
        """The page lists as the block table of decode_attention, [B, pages] int32, -1 padded."""
        width = max(map(len, self.pages), default=0)
        rows = [pages + [-1] * (width - len(pages)) for pages in self.pages]
        table = torch.tensor(rows, dtype=torch.int32).view(len(rows), width)
        self.block_table = table.to(self.block_table.device)

    @torch.inference_mode(False)  # pages outlive the caller's mode
    def _grow(self, pages: int) -> None:
        """Room for `pages` pages; a pool that has to move grows by an eighth at least, so that appending is cheap."""
        have = self._num_pages
        if pages <= have:
            return
        pages = max(pages, have + have // 8)
        for i, layer in enumerate(self.factors.layers):
            grown = allocate_cache(layer, pages, self.page_size)
            for new, old in zip(grown, self.caches[i], strict=True):
                if new is not None and old is not None:
                    new[:have] = old
            self.caches[i] = grown

    @torch.inference_mode(False)
    def _select(self, rows: Tensor) -> None:
        """Sequences rows[i] of the old batch become the new batch; every sequence owns copies of its pages."""
        if not self.lengths:
            return
        order = rows.tolist()
        copied = [page for i in order for page in self.pages[i]]
        index = torch.tensor(copied, dtype=torch.int64, device=self.block_table.device)
        self.caches = [
            (k.index_select(0, index), None if v is None else v.index_select(0, index)) for k, v in self.caches
        ]
        ids = iter(range(len(copied)))
        self.pages = [[next(ids) for _ in self.pages[i]] for i in order]
        self._publish()
        self.window.select(rows)
        self.lengths = [self.lengths[i] for i in order]
        if self.next_positions is not None:
            self.next_positions = [self.next_positions[i] for i in order]

    @torch.no_grad()
    def _refill(self, places: Places) -> None:
        """Tokens of the dense window, from their latents."""
        slots = self._slots(zip(places.rows.tolist(), places.tokens.tolist(), strict=True))
        for i, (layer, (k_cache, v_cache)) in enumerate(zip(self.factors.layers, self.caches, strict=True)):
            zk = key_rows(layer, k_cache.flatten(0, 1)[slots])[0].to(layer.dtype)
            zv = None if v_cache is None else value_rows(layer, v_cache.flatten(0, 1)[slots]).to(layer.dtype)
            self.window.put(i, places, *layer.rebuild(zk, zv, places.tokens))

    # What transformers asks of a Cache.

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of every sequence; a negative number says how many, as in transformers.

        Tokens that are near the end again but had left the dense window come back to it rebuilt from their latents:
        until as many new tokens came, attention is not that of a sequence that was never longer.

        In releases of transformers whose caches are told the length to keep, 0 or a positive number is that length.
        Raises: ValueError for a positive number in the others.
        """
        if tokens_to_remove > 0 and not KEEPS_LENGTH:
            raise ValueError(f"tokens_to_remove: expected 0 or a negative number of tokens, got {tokens_to_remove}")
        keeps = KEEPS_LENGTH and tokens_to_remove >= 0
        removed = min(self.seen - tokens_to_remove if keeps else -tokens_to_remove, self.seen)
        if removed <= 0:
            return
        before, self.lengths = self.lengths, [max(n - removed, 0) for n in self.lengths]
        if self.next_positions is not None:
            self.next_positions = [p - removed for p in self.next_positions]
        self.seen -= removed
        self.pages = [pages[: -(-n // self.page_size)] for pages, n in zip(self.pages, self.lengths, strict=True)]
        self._publish()
        self._refill(self.window.crop(before, self.lengths))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.lengths), device=indices.device)[indices])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "LatentCache holds latents, not keys and values: use it inside latent_attention(model, factors)"
        )

    def __len__(self) -> int:
        return len(self.factors.layers)

    def __repr__(self) -> str:
        near = "".join(f", {name}={n}" for name, n in (("recent", self.recent), ("sinks", self.sinks)) if n)
        return f"LatentCache(lengths={self.lengths}, nbytes={self.nbytes}, keep={self.factors.keep:.3f}{near})"

    @property
    def batch_size(self) -> int:
        return len(self.lengths) or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.lengths)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)
