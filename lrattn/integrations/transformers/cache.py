"""LatentCache: a transformers Cache of latents, with the nearest columns dense beside them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lrattn.attention.checks import check_integer
from lrattn.factors.record import Factors
from lrattn.factors.selection import Selection
from lrattn.integrations.transformers.columns import Columns
from lrattn.integrations.transformers.fit import layer_of, near_of
from lrattn.integrations.transformers.layer import LatentLayer
from lrattn.integrations.transformers.selecting import settle
from lrattn.selection import selection_of, shares

KEEPS_LENGTH = "max_length" in inspect.signature(Cache.crop).parameters  # as in 5.5; not in 5.19


class LatentCache(Cache):  # type: ignore[misc]
    """Latents of a batch of texts, for a model that attends by "lrattn", by bind(factors) or inside latent_attention.

    Args:
        factors: of that model, in its dtype and on its device. The cache carries them; its copies share them.
        recent, sinks: each query sees its `recent` last columns, its own included, and the first `sinks` columns of
            its row, padding aside, by their exact keys and values, and the others by their latents. Those are held
            dense too, as many bytes as in an ordinary cache. None: as the factors say (Factors.near); 0 and 0 for
            latents alone.
        max_tokens: columns that all memory is made for, in the first pass. Later passes of a few columns read nothing
            from the device and change no shape, so that torch.compile and CUDA graphs may take them (`replayed`).
            Every row has a column in the first pass, and no later mask may hide or show another one: NaN where it
            does, and ValueError for more columns. None: it grows.
        select: which tokens are kept, a Selection or its words, such as "curdkv:0.5"; None: as the factors say
            (Factors.select). Each layer chooses after the first pass, which is to be the whole prompt, and again every
            so many columns; the memory of what it drops is given back. Attention is then to all columns but padding on
            the left: a ValueError for sliding windows and other masks, for `max_tokens`, and for taking columns back
            that were chosen from.
        backend: of lrattn.decode_attention.

    It grows as tokens come; padding is held as in a DynamicCache. Every column has its latents: what `crop` brings back
    into the window, which holds it no longer, is taken from them. A pass that fails counts for nothing. Where keys are
    in chunks (LayerFactors.chunk) the positions of a row follow one another, padding aside, from any first one on.
    Where layers share rows (Factors.span) a row is whole once the last of them has run, so that a pass sees its own
    tokens exactly, however many: a prompt that comes in parts of `recent` columns sees them as others do.
    Raises: ValueError for a negative number or an unknown backend.
    """

    def __init__(
        self,
        factors: Factors,
        *,
        recent: int | None = None,
        sinks: int | None = None,
        max_tokens: int | None = None,
        select: Selection | str | None = None,
        backend: str | None = None,
    ) -> None:
        near = near_of(factors, recent, sinks, backend)
        check_integer("max_tokens", max_tokens, 1, optional=True)
        self.factors, (self.recent, self.sinks) = factors, near
        self.columns = Columns(factors.layers, self.sinks, max_tokens)
        self.selection = factors.select if select is None else select
        layers = [LatentLayer(factors, i, near, self.columns, backend) for i in range(len(factors.layers))]
        super().__init__(layers=layers)
        for i, donor in enumerate(factors.donors):
            if donor != i:
                layers[i].read_from(layers[donor])
        if factors.span > 1 and not self.recent:
            raise ValueError("recent: expected 1 or more, as the newest token's row is not whole yet, got 0")
        for i, layer in enumerate(layers):
            layer.holder = layers[factors.run(i)[-1]]
        self.columns.layers = [layer for layer in layers if layer.donor is None]

    @property
    def selection(self) -> Selection | None:
        """Which tokens are kept; None: all that are held from now on. It may be set between two passes, as before the
        last part of a long prompt: the next pass chooses, of all that is held.

        Raises: ValueError for what no policy can do, or with max_tokens.
        """
        return self.columns.selection

    @selection.setter
    def selection(self, select: Selection | str | None) -> None:
        select = selection_of(select)
        if select is not None:
            shares(select, len(self.factors.held))
            if self.columns.most is not None:
                raise ValueError(f"max_tokens: expected None where tokens are selected, got {self.columns.most}")
        self.settle()
        self.columns.selection, self.columns.chosen_at = select, 0

    def settle(self) -> None:
        """Between two passes: what the last one did not keep is gone at once. The next pass begins with that."""
        settle(self.columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As LatentLayer.update. Raises: ValueError for a layer that the factors do not have."""
        layer_of(self.factors, layer_idx)
        if not self.columns.written and self.layers[layer_idx].donor is None:
            self.settle()
        if self.layers[layer_idx].next is not None:  # its last pass is not over, and another one begins
            self.columns.undo()
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    def reset(self) -> None:
        """Forgets every column and gives the memory back."""
        self.columns.reset()
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; a negative number says how many, as in transformers.

        Columns that are near the end again but had left the dense window come back to it rebuilt from their latents:
        until as many new ones came, attention is not that of a text that was never longer.

        In releases of transformers whose caches are told the length to keep, 0 or a positive number is that length.
        Raises: ValueError for a positive number in the others.
        """
        if tokens_to_remove > 0 and not KEEPS_LENGTH:
            raise ValueError(f"tokens_to_remove: expected 0 or a negative number of tokens, got {tokens_to_remove}")
        self.settle()
        count, gone = self.columns.count, self.columns.gone
        kept = tokens_to_remove if KEEPS_LENGTH and tokens_to_remove >= 0 else count + gone + tokens_to_remove
        self.columns.undo()
        if kept <= 0:
            self.reset()
            return
        least = gone + max(self.sinks, 1) if gone else 0
        if kept < least:
            raise ValueError(f"tokens_to_remove: expected to keep {least}, of which tokens were selected, got {kept}")
        if (kept := kept - gone) < count:
            for layer in self.columns.layers:
                layer.crop(kept)
            self.columns.crop(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` of the batch become the new one."""
        self.settle()
        self.columns.undo()
        if self.columns.count:
            for layer in self.columns.layers:
                layer.select(beam_idx)
            self.columns.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.columns.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self.columns.batch, device=indices.device)[indices])

    def replayed(self, tokens: int = 1) -> None:
        """Counts the columns of a pass that a CUDA graph has run, or is about to: the host does not see them.

        Raises: ValueError where there is no room for them.
        """
        self.columns.check_room(tokens)
        self.columns.count += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Columns that every layer holds; with max_tokens a tensor once there are some."""
        return self.columns.length

    def __bool__(self) -> bool:
        """Whether it holds columns: models that change their rope with the length throw a cache away that does."""
        return self.columns.count > 0

    @property
    def is_initialized(self) -> bool:
        return bool(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held: pages, free room in them included, the dense window, and where they lie. What the
        last pass did not keep is among them until the next one begins, or `settle`."""
        return sum(x.untyped_storage().nbytes() for x in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds, of all layers and of what they share."""
        return [*self.columns.tensors, *(x for layer in self.columns.layers for x in layer.tensors)]

    def __repr__(self) -> str:
        batch = self.columns.batch if self.columns.count else 0
        held = f"batch={batch}, columns={self.columns.count + self.columns.gone}, nbytes={self.nbytes:,}"
        near = f"recent={self.recent}, sinks={self.sinks}"
        chosen = "" if self.selection is None else f", select={str(self.selection)!r}"
        return f"LatentCache({held}, keep={self.factors.keep:.3f}, {near}{chosen})"

    @property
    def tokens(self) -> list[Tensor]:
        """Of each layer that does not read another's tokens, how many of each row, [B] int64, until the next pass
        begins."""
        return [layer.tokens for layer in self.columns.layers]

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCache:
        """Factors never change, and are shared."""
        for own in (self.factors, *([] if self.factors.rest is None else [self.factors.rest])):
            memo.update((id(x), x) for x in (own, *own.layers))
        memo.update((id(layer.latest), None) for layer in self.layers if layer.latest is not None)  # of a pass
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other
