"""The key and value projections of Linear models, for what reads weights or the inputs of attention.

Most of lrattn reads neither: these are for baselines (svd, lorc, asvd, ranks by Fisher, the values of kq-svd) and for
factors of a version before 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lrattn.factors.rope import Rope
from lrattn.models.layers import AttentionLayer, heads_given

NAMES = {"keys": "k_proj", "values": "v_proj"}
TOKENS = 4
ALIKE = 5e-2  # relative difference of heads: more than 16 bits round


def linear(layer: AttentionLayer, name: str) -> nn.Linear:
    """A projection of an attention layer.

    Raises: ValueError if it is none with floating-point weights of its own.
    """
    found = getattr(layer.module, name, None)
    kind = type(found)
    if not isinstance(found, nn.Linear) or not found.weight.is_floating_point() or found.weight.is_meta:
        told = "none" if found is None else f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(found, nn.Linear):
            told = f"weights of {found.weight.dtype} on {found.weight.device}"
        raise ValueError(
            f"model: expected {layer.name}.{name} to be a torch.nn.Linear, whose weights can be read, got {told}; "
            "methods that read no weights, such as 'lrattn', need none"
        )
    return found


def weight(layer: AttentionLayer, side: str) -> Tensor:
    """Of "keys" or "values", [Hkv * D, E] float64 on the CPU. Raises: ValueError as `linear`."""
    return linear(layer, NAMES[side]).weight.detach().double().cpu()


def bias(layer: AttentionLayer, side: str) -> Tensor | None:
    """Of "keys" or "values", [Hkv, D] in the model's dtype; None where there is none."""
    found = linear(layer, NAMES[side]).bias
    return None if found is None else found.detach().unflatten(0, (-1, layer.head_dim)).clone()


@torch.no_grad()
def check_readable(model: nn.Module, layers: Sequence[AttentionLayer], ropes: Sequence[Rope | None]) -> None:
    """Holds what the projections make, turned by the ropes, against the keys and values that attention is given.

    Raises: ValueError as `linear`, and where they differ: a norm, a clip or a step of its own lies between.
    """
    inputs: dict[nn.Module, Tensor] = {}

    def watch(projection: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[projection] = args[0][0]

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(linear(layer, "k_proj").register_forward_pre_hook(watch).remove)
        at = torch.arange(TOKENS)
        (given,) = heads_given(model, layers, [at])
    for layer, rope, pair in zip(layers, ropes, given, strict=True):
        for side, x in zip(NAMES, pair, strict=True):
            own = linear(layer, NAMES[side])
            made = nn.functional.linear(inputs[linear(layer, "k_proj")], own.weight, own.bias)
            made = made.unflatten(1, (-1, layer.head_dim)).float().cpu()
            made = rope.rotate(made, at) if rope is not None and side == "keys" else made
            if made.shape != x.shape or not (made - x).norm() <= ALIKE * x.norm():
                raise ValueError(
                    f"model: expected {side} that are what {layer.name}.{NAMES[side]} makes, got others, as where they "
                    "are normed after it; methods that read no weights, such as 'lrattn', serve them"
                )


def check_finite(layers: Sequence[AttentionLayer]) -> None:
    """Raises ValueError if a weight of the model's attention is not."""
    for layer in layers:
        for name, x in layer.module.named_parameters():
            if x.is_floating_point() and not x.is_meta and not bool(x.isfinite().all()):
                raise ValueError(f"model: expected a finite {layer.name}.{name}, got one that is not")
