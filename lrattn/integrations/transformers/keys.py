"""New keys on their way from a LatentCache to attention, and what attention finds there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lrattn.attention.dense import Pair
from lrattn.integrations.transformers.kept import Latents

if TYPE_CHECKING:
    from lrattn.integrations.transformers.layer import LatentLayer

# Asked of a tensor without computing on it. torch.compile asks by names with one underscore, too.
METADATA = {
    "__get__", "__set__", "__hash__", "__repr__", "__setstate__", "as_subclass", "data_ptr", "detach", "dim",
    "element_size", "is_complex", "is_conj", "is_contiguous", "is_floating_point", "is_inference", "is_neg", "numel",
    "requires_grad_", "size", "storage_offset", "stride", "untyped_storage",
}  # fmt: skip
MOVES = {"to", "contiguous", "cpu", "cuda"}  # fine where they change nothing: some models move what layers share


class Written(NamedTuple):
    """A pass's columns in one layer, as attention reads them.

    begin: columns before it. latents: [B, S, width] each; None of rows of several layers, which are not whole yet.
    positions: [B, S], as keys were turned from them, or None.
    keys: its keys and values, [B, Hkv, S, D] each. near: what `near_pairs` gives, where it has to be known before the
    pass is over.
    """

    begin: int
    latents: Latents | None
    positions: Tensor | None
    keys: Pair
    near: tuple[Pair | None, Pair | None] | None


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
