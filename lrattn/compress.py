"""A model and some text -> Factors: calibrate, share out the ranks, factor every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn import methods, ranks
from lrattn.calibrate import Moments, calibrate
from lrattn.factors import Factors, LayerFactors
from lrattn.parts import AttentionParts, attention_parts
from lrattn.projection import Projection
from lrattn.shapes import pad_rank


@torch.inference_mode(False)  # the factors outlive the caller's mode
def compress(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]] | Moments | None = None,
    method: str = methods.DEFAULT,
    keep: float = 0.5,
    group_size: int = 4,
    *,
    progress: bool = True,
) -> Factors:
    """Factors of a model's key and value projections; the model itself is not changed.

    Args:
        model: a transformers causal language model (see attention_parts for what is needed of it).
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask, to calibrate on; or the
            Moments of an earlier `calibrate`. "svd" needs none.
        method: one of lrattn.methods.METHODS.
        keep: bytes of the latent cache / bytes of the dense 16-bit cache, in (0, 1]. 1 is full rank: exact.
        group_size: kv heads per group; the largest divisor of Hkv not above it is used.
        progress: show bars on stderr.

    Returns: Factors in the model's dtype, on its device.
    Raises: ValueError naming the argument, what was expected and what came.
    """
    if method not in methods.METHODS:
        raise ValueError(f"method: expected one of {sorted(methods.METHODS)}, got {method!r}")
    parts = attention_parts(model)
    shapes = [
        ranks.LayerShape(
            heads=p.num_kv_heads,
            head_dim=p.head_dim,
            group_size=ranks.group_size_within(p.num_kv_heads, group_size),
            inputs=p.linear("k_proj").in_features,
            key_norm=p.key_norm is not None,
        )
        for p in parts
    ]
    chosen = ranks.uniform(shapes, keep)
    moments: Moments | None = None
    if isinstance(batches, Moments):
        moments = batches
    elif batches is not None and method not in methods.NEEDS_NO_DATA:
        moments = calibrate(model, batches, progress=progress)
    _check_moments(moments, parts)
    layers = []
    for i, part in enumerate(tqdm(parts, desc="factor", unit="layer", disable=not progress)):
        moment = None if moments is None else moments.inputs[i]
        keys, values = (
            _factor(part, name, moment, r, method) for name, r in zip(("k_proj", "v_proj"), chosen[i], strict=True)
        )
        layers.append(LayerFactors(keys, values, part.rope, key_norm=part.key_norm))
    return Factors(tuple(layers), method, str(getattr(model.config, "_name_or_path", "")))


def _check_moments(moments: Moments | None, parts: list[AttentionParts]) -> None:
    expected = [p.linear("k_proj").in_features for p in parts]
    if moments is not None and [len(x) for x in moments.inputs] != expected:
        raise ValueError(
            f"batches: expected moments of {len(parts)} layers of {expected[0]} inputs, got {len(moments.inputs)} of "
            f"{[len(x) for x in moments.inputs[:1]]}"
        )


def _factor(
    part: AttentionParts,
    name: str,
    moment: Tensor | None,
    group_ranks: tuple[int, ...],
    method: str,
) -> Projection:
    weight = part.weight(name)
    groups = weight.double().cpu().chunk(len(group_ranks))
    pairs = [methods.METHODS[method](w, moment, r) for w, r in zip(groups, group_ranks, strict=True)]
    widest = max(group_ranks)
    up = torch.cat([pad_rank(up, 1, widest) for up, _ in pairs])
    down = torch.cat([down for _, down in pairs], 1)
    return Projection(
        up=up.to(weight).contiguous(),
        ranks=group_ranks,
        down=down.to(weight).contiguous(),
        bias=part.bias(name),
    )
