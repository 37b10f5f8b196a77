"""Model and token batches -> Moments: what the attention inputs of each layer look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.parts import attention_parts, evaluating


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the attention inputs: sum of x x^T over tokens, uncentred, biases play no part.

    Args:
        inputs: per layer [E, E] float64 on the CPU.
        tokens: how many tokens were summed; padding is left out.
    """

    inputs: tuple[Tensor, ...]
    tokens: int


def calibrate(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], *, progress: bool = True) -> Moments:
    """Runs the model over token batches and streams the moments of every layer.

    Args:
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask.
        progress: show a bar on stderr.

    Products are float32 at least, sums float64. Memory is O(E^2) a layer, whatever the number of tokens.
    Raises: ValueError if there are no tokens, or a layer sees numbers that are not finite.
    """
    parts = attention_parts(model)
    sums = [
        torch.zeros(p.linear("k_proj").in_features, p.linear("k_proj").in_features, dtype=torch.float64) for p in parts
    ]
    live: Tensor | None = None
    tokens = 0

    def watch(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = x.flatten(0, -2) if live is None else x[live]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[i] += (x.T @ x).cpu()

        return hook

    device = next(model.parameters()).device
    hooks = [p.linear("k_proj").register_forward_pre_hook(watch(i)) for i, p in enumerate(parts)]
    try:
        with evaluating(model), torch.no_grad():
            for batch in tqdm(batches, desc="calibrate", unit="batch", disable=not progress):
                ids, mask = _tokens(batch)
                live = None if mask is None else mask.to(device).bool()
                tokens += ids.numel() if live is None else int(live.sum())
                arguments = {} if mask is None else {"attention_mask": mask.to(device)}
                model(input_ids=ids.to(device), use_cache=False, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("batches: expected at least one token to calibrate on, got none")
    for p, total in zip(parts, sums, strict=True):
        if not bool(total.isfinite().all()):
            raise ValueError(f"batches: the inputs of {p.name} are not all finite; calibrate a model of a wider dtype")
    return Moments(tuple(sums), tokens)


def _tokens(batch: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batches: expected integer token ids [b, t], got {got}")
    return ids, mask
