"""Whether factors are of the model that attends by them."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lrattn.attention.checks import check_backend
from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.models.layers import alike, sample

# Modules whose weights were held against factors: a comparison is made once.
_COMPARED: WeakKeyDictionary[nn.Module, WeakSet[LayerFactors]] = WeakKeyDictionary()
# Those that warned of positions they do not hold for, and of positions that attention does not know.
_BEYOND: WeakSet[Factors] = WeakSet()
_UNTOLD: WeakSet[Factors] = WeakSet()


def near_of(factors: Factors, recent: int | None, sinks: int | None, backend: str | None) -> tuple[int, int]:
    """recent and sinks, or what the factors say where they are None. Raises ValueError for what is none of the four."""
    if not isinstance(factors, Factors):
        raise ValueError(f"factors: expected Factors, got {type(factors).__name__}")
    check_backend(backend)
    return factors.near_or(recent, sinks)


def layer_of(factors: Factors, i: int) -> LayerFactors:
    """Raises ValueError for a layer that the factors do not have."""
    if not 0 <= i < len(factors.layers):
        raise ValueError(f"factors: expected factors of layer {i}, got those of {len(factors.layers)} layers")
    return factors.layers[i]


def check_fit(factors: Factors, i: int, key: Tensor, value: Tensor, module: nn.Module) -> None:
    """Holds keys and values [B, Hkv, S, D] of an attention module against layer i of the factors.

    Raises: ValueError for other heads, another dtype or device, or a model of fewer layers. Warns once a module where
    its weights are not those that the factors were made of.
    """
    layer, name = factors.layers[i], type(module).__name__
    expected = layer.num_kv_heads, layer.head_dim
    for what, x in (("keys", key), ("values", value)):
        if (got := (x.shape[1], x.shape[3])) != expected:
            raise ValueError(f"factors: expected (Hkv, D) = {got} in layer {i}, as {what} of {name}, got {expected}")
    if (key.dtype, key.device) != (layer.dtype, layer.device):
        raise ValueError(
            f"factors: expected {key.dtype} on {key.device} in layer {i}, as {name}, got {layer.dtype} on "
            f"{layer.device}; use factors.to(device, dtype)"
        )
    most = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if isinstance(most, int) and most < len(factors.layers):
        raise ValueError(f"factors: expected at most {most} layers, as in the model, got {len(factors.layers)}")
    if not factors.samples or torch.compiler.is_compiling() or getattr(module, "layer_idx", i) != i:
        return  # also where layers share keys
    compared = _COMPARED.setdefault(module, WeakSet())
    if layer not in compared:
        compared.add(layer)
        own = sample(module)
        if own is not None and not alike(own, factors.samples[i].cpu()):
            warnings.warn(
                f"factors: these are factors of other weights than {name} layer {i} has; a fine-tune, an adapter or "
                "another model?",
                stacklevel=2,
            )


def warn_beyond(factors: Factors, most: int, last: int) -> None:
    """Warns, once for these factors, that attention goes on at a position `last` beyond the first `most`."""
    if not torch.compiler.is_compiling() and factors not in _BEYOND:
        _BEYOND.add(factors)
        warnings.warn(
            f"position_ids: these factors hold for positions 0 .. {most - 1}, and attention goes on at {last}, where "
            f"it may be wrong: make them by compress(positions={last + 1}) or more, or by method 'lrattn', whose "
            "factors hold at any position",
            stacklevel=2,
        )


def warn_untold(factors: Factors, module: nn.Module, told: bool) -> None:
    """Warns, once for these factors, that an attention module is not told the positions that keys are turned to: of
    models that give it none, and of those that turn keys of images by several."""
    axes = "mrope_section" in (getattr(getattr(module, "config", None), "rope_parameters", None) or {})
    if (told and not axes) or torch.compiler.is_compiling() or factors in _UNTOLD:
        return
    _UNTOLD.add(factors)
    warnings.warn(
        f"position_ids: {type(module).__name__} is not told every position that its keys are turned to: those of "
        "padded batches, of texts that begin further on and of images may be turned back from others, and at low rank "
        "lose more; factors of method 'lrattn-rotated' turn none",
        stacklevel=2,
    )
