"""Whether factors are of the model that attends by them."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.models.layers import sample

# Modules whose weights were held against factors: a comparison is made once.
_COMPARED: WeakKeyDictionary[nn.Module, WeakSet[LayerFactors]] = WeakKeyDictionary()


def near_of(factors: Factors, recent: int | None, sinks: int | None) -> tuple[int, int]:
    """The two as given, or as the factors say where they are None. Raises ValueError unless they count columns."""
    if not isinstance(factors, Factors):
        raise ValueError(f"factors: expected Factors, got {type(factors).__name__}")
    return factors.near_or(recent, sinks)


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
    own = getattr(module, "layer_idx", i) == i  # not where layers share keys
    if factors.samples and own and not torch.compiler.is_compiling():
        _compare(factors, i, module)


def _compare(factors: Factors, i: int, module: nn.Module) -> None:
    compared = _COMPARED.setdefault(module, WeakSet())
    if factors.layers[i] in compared:
        return
    compared.add(factors.layers[i])
    own = sample(module)
    if own is not None and not _alike(own, factors.samples[i].cpu()):
        warnings.warn(
            f"factors: these are factors of other weights than {type(module).__name__} layer {i} has; a fine-tune, an "
            "adapter or another model?",
            stacklevel=2,
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two samples are of the same weights, each rounded to a dtype of its own."""
    if a.shape != b.shape:
        return False
    narrower = max(a.dtype, b.dtype, key=lambda kind: torch.finfo(kind).eps)
    twice = a.dtype != b.dtype and a.dtype.itemsize == b.dtype.itemsize  # bfloat16 and float16: neither holds the other
    slack = torch.finfo(narrower).eps if twice else 0.0
    a, b = (x.to(narrower).double() for x in (a, b))
    return torch.allclose(a, b, rtol=slack, atol=slack * 1e-5, equal_nan=True)
