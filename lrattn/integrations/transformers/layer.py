"""One layer of a LatentCache: pages of latents, and a dense window; and new keys on their way from it to attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from lrattn.attention.cache import allocate_cache, sections, unpack
from lrattn.attention.dense import Pair
from lrattn.attention.ops import write_latents
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.integrations.transformers.columns import PAGE, Columns
from lrattn.integrations.transformers.fit import check_fit, layer_of, warn_beyond, warn_untold
from lrattn.models.masks import Said

Latents = tuple[Tensor, Tensor | None]  # of them; None: the first row serves both

# Asked of a tensor without computing on it. torch.compile asks by names with one underscore, too.
METADATA = {
    "__get__", "__set__", "__hash__", "__repr__", "__setstate__", "as_subclass", "data_ptr", "detach", "dim",
    "element_size", "is_complex", "is_conj", "is_contiguous", "is_floating_point", "is_inference", "is_neg", "numel",
    "requires_grad_", "size", "storage_offset", "stride", "untyped_storage",
}  # fmt: skip
MOVES = {"to", "contiguous", "cpu", "cuda"}  # fine where they change nothing: some models move what layers share


class Written(NamedTuple):
    """A pass's columns in one layer, as attention reads them.

    begin: columns before it. latents: [B, S, width] each. positions: [B, S], as keys were turned from them, or None.
    recent: exact keys and values [B, Hkv, n, D] of the last columns before the pass and of its own; None: recent=0.
    first: of each row's first live columns, [B, Hkv, sinks, D]; None: sinks=0.
    """

    begin: int
    latents: Latents
    positions: Tensor | None
    recent: Pair | None
    first: Pair | None


class LatentKeys(Tensor):
    """New keys [B, Hkv, S, D] as LatentCache.update hands them on: they lead attention to the columns before them.

    Raises: ValueError for any computation: who computes on them does not know of those.
    """

    plain_keys: Tensor  # the tensors themselves
    plain_values: Tensor
    layer: LatentLayer
    written: Written | None  # once attention has them

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, layer: LatentLayer) -> LatentKeys:
        new = keys.as_subclass(cls)
        new.plain_keys, new.plain_values, new.layer, new.written = keys, values, layer, None
        return new

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in METADATA or name in MOVES or (name.startswith("_") and not name.startswith("__")):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if name not in MOVES or result is args[0]:
                return result
        raise ValueError(
            f"keys: expected the attention function 'lrattn', which alone reads a LatentCache, got {name!r}: "
            "call model.set_attn_implementation('lrattn') first (models that change keys after their cache, as MLA "
            "does, cannot attend on latents)"
        )


class LatentLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a LatentCache: pages of latents, [batch * pages, 16, width] each, and a dense window.

    Args:
        near: its columns, recent and sinks. held: False for one that is thrown away after its pass: it has no pages.
    """

    is_croppable = True

    def __init__(
        self,
        factors: Factors,
        index: int,
        near: tuple[int, int],
        columns: Columns,
        backend: str | None = None,
        held: bool = True,
    ) -> None:
        super().__init__()
        self.whole, self.index, self.factors = factors, index, layer_of(factors, index)
        (self.recent, self.sinks), self.columns, self.backend, self.held = near, columns, backend, held
        self.reset()

    @torch.inference_mode(False)
    def reset(self) -> None:
        self.pages: Latents = allocate_cache(self.factors, 0, PAGE)
        self.ring: Pair | None = None  # the last `recent` columns
        self.first: Pair | None = None  # the first `sinks` of each row
        self.next: tuple[Pair | None, Pair | None] | None = None  # the two, once every layer holds the pass under way

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `write` makes room."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys as a handle for the attention function, which writes them, and values as they are."""
        return LatentKeys.of(key_states, value_states, self), value_states

    def write(self, keys: Pair, position_ids: Tensor | None, said: Said, module: nn.Module) -> Written:
        """Holds a pass's keys and values [B, Hkv, S, D] of an attention module.

        Raises: ValueError if they do not fit, or positions are beyond the rope; the cache is then as it was.
        """
        check_fit(self.whole, self.index, *keys, module)
        layer, columns, begin, new = self.factors, self.columns, self.columns.count, keys[0].shape[2]
        if not columns.written:
            if columns.turned or columns.chunked:
                warn_untold(self.whole, module, position_ids is not None)
            columns.start(len(keys[0]), new, layer.device, position_ids, said)
        if layer.turns is not None and columns.last >= (most := len(layer.turns) * (layer.chunk or 1)):
            raise ValueError(f"position_ids: expected at most {most - 1}, as the rope has it, got {columns.last}")
        if layer.max_position is not None and columns.last >= layer.max_position:
            warn_beyond(self.whole, layer.max_position, columns.last)
        positions = columns.positions_of(layer, begin, begin + new)
        k, v = (x.transpose(1, 2) for x in keys)
        latents = layer.project(k, v, positions)
        recent, first = self._with_ring(keys), self._with_first(keys)
        if self.held:
            self._store(latents)
            ring = None if recent is None else (self._kept(recent[0]), self._kept(recent[1]))
            self.next = ring, None if first is None else (first[0].detach(), first[1].detach())
            columns.wrote(new)
        return Written(begin, latents, positions, recent, first)

    @torch.no_grad()
    def _store(self, latents: Latents) -> None:
        """Latents into the pass's slots, in pages that are as many as the columns have by now."""
        columns, layer = self.columns, self.factors
        if len(self.pages[0]) != columns.batch * columns.pages:
            with torch.inference_mode(False):
                grown = allocate_cache(layer, columns.batch * columns.pages, PAGE)
                for new, old in zip(grown, self.pages, strict=True):
                    if new is not None and old is not None and columns.count:
                        rows = old.unflatten(0, (columns.batch, -1))
                        new.unflatten(0, (columns.batch, -1))[:, : rows.shape[1]] = rows
                self.pages = grown
        assert columns.slots is not None
        write_latents(layer, *latents, *self.pages, columns.slots.to(layer.device), backend=self.backend)

    def _with_ring(self, keys: Pair) -> Pair | None:
        """As many columns before the pass as its first query sees exactly, and its own."""
        if not self.recent or self.ring is None:
            return keys if self.recent else None
        last = max(self.ring[0].shape[2] - (self.recent - 1), 0)
        return torch.cat((self.ring[0][:, :, last:], keys[0]), 2), torch.cat((self.ring[1][:, :, last:], keys[1]), 2)

    def _kept(self, x: Tensor) -> Tensor:
        """The last columns of what `_with_ring` gave, in memory of their own."""
        last = x[:, :, -self.recent :].detach()
        return last if self.ring is not None and last.shape == x.shape else last.clone()

    def _with_first(self, keys: Pair) -> Pair | None:
        """Each row's first live columns, those of the pass included."""
        columns, new = self.columns, keys[0].shape[2]
        if not self.sinks or (columns.firm is not None and columns.count >= columns.firm):
            return self.first
        at = torch.arange(self.sinks, device=keys[0].device)[None] - columns.count
        at = at if columns.base is None else at + columns.base[:, None].to(at.device)
        inside, at = ((x[:, None, :, None]) for x in ((at >= 0) & (at < new), at.clamp(0, new - 1)))
        sides = []
        for i, x in enumerate(keys):
            found = x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))
            sides.append(torch.where(inside, found, 0.0 if self.first is None else self.first[i]))
        return sides[0], sides[1]

    def places(self, columns: int) -> dict[str, Any]:
        """Where its first `columns` columns lie, as the ops on a cache take it."""
        held, layer, device = self.columns, self.factors, self.factors.device
        assert held.table is not None
        by_column = layer.rope is not None and layer.chunk is None
        positions = held.positions.view(-1, PAGE).to(device) if by_column and held.positions is not None else None
        offsets = held.offsets.to(device) if layer.chunk is not None and held.offsets is not None else None
        return {
            "block_table": held.table.to(device),
            "seq_lens": torch.full((held.batch,), columns, dtype=torch.int32, device=device),
            "positions": positions,
            "offsets": offsets,
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, columns: int) -> None:
        """To its first columns. What is near again but no longer held comes from latents."""
        if self.ring is not None:
            low, begin = max(columns - self.recent, 0), self.columns.count - self.ring[0].shape[2]
            held = slice(max(low - begin, 0), max(columns - begin, 0))
            lost = self._rebuilt(low, max(min(begin, columns), low))
            k, v = (torch.cat((x, own[:, :, held]), 2) for x, own in zip(lost, self.ring, strict=True))
            self.ring = k, v

    def _rebuilt(self, begin: int, end: int) -> Pair:
        """Keys and values of some columns from their latents, [B, Hkv, n, D] each."""
        layer, held = self.factors, self.columns

        def latents(side: Projection, pages: Tensor) -> Tensor:
            rows = [x.unflatten(0, (held.batch, -1)).flatten(1, 2)[:, begin:end] for x in sections(side, pages)]
            return unpack(side, rows).to(layer.dtype)

        zk, zv = latents(layer.row_side, self.pages[0]), None
        if self.pages[1] is not None:
            zv = latents(layer.values, self.pages[1])
        positions = held.positions_of(layer, begin, end)
        k, v = layer.rebuild(zk, zv, positions)
        return k.transpose(1, 2), v.transpose(1, 2)

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Rows `rows` of the batch, as the columns still know it, become the new one."""
        rows, shape = rows.to(self.factors.device), (self.columns.batch, -1)
        k, v = (None if x is None else x.unflatten(0, shape)[rows].flatten(0, 1) for x in self.pages)
        assert k is not None
        self.pages = k, v
        self.ring, self.first = (None if x is None else (x[0][rows], x[1][rows]) for x in (self.ring, self.first))

    @property
    def tensors(self) -> list[Tensor]:
        pairs = self.pages, self.ring, self.first, *(self.next or ())
        return [x for pair in pairs if pair is not None for x in pair if x is not None]

    def get_seq_length(self) -> int:
        return self.columns.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, also where a window slides: masks are then of columns."""
        return self.columns.count + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.5
