"""How compressible keys and values are on a text: the normalised effective rank of KV-CoRE (arXiv 2602.05929)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.compression.moments import Moments
from lrattn.factors.parts import attention_parts

SIDES = {"keys": "k_proj", "values": "v_proj"}


def effective_rank(singular: Tensor) -> float:
    """exp(- sum p ln p) / n, p = singular / sum singular: in (0, 1].

    It is 1 where all n singular values are equal and k / n where k are equal and the others zero. A low one means that
    few directions hold most: compressible.
    """
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.special.entr(p).sum().exp().item() / len(singular)


@torch.no_grad()
def compressibility(model: nn.Module, moments: Moments) -> list[dict[str, float]]:
    """Per layer, the effective rank of its keys and of its values on the text that `moments` were calibrated on.

    Singular values of the outputs X W^T [tokens, n], n = Hkv * D, before norm, rotation and bias, are the roots of the
    eigenvalues of W C W^T, C = sum x x^T: no output is kept. On fewer than n tokens ranks come out too low.
    """
    found = []
    for part, moment in zip(attention_parts(model), moments.inputs, strict=True):
        ranks = {}
        for side, name in SIDES.items():
            weight = part.linear(name).weight.detach().double().cpu()
            energies = torch.linalg.eigvalsh(weight @ moment @ weight.T)
            ranks[side] = effective_rank(energies.clamp_min(0).sqrt())
        found.append(ranks)
    return found


def table(layers: list[dict[str, float]]) -> str:
    """A line for each layer, and their mean."""
    mean = {side: sum(x[side] for x in layers) / len(layers) for side in SIDES}
    rows = [(str(i), x) for i, x in enumerate(layers)] + [("mean", mean)]
    lines = [f"{name:>5}  {x['keys']:.3f}   {x['values']:.3f}" for name, x in rows]
    return "\n".join(["layer   keys  values", *lines])


def canvas(path: Path) -> Any:
    """An empty figure that can be saved to this path.

    Raises: ModuleNotFoundError without matplotlib; ValueError if it writes no such files.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: expected matplotlib, which the extras bench and demo bring, got none"
        ) from error
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    endings = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"plot: expected a file name that ends in one of {endings}, got {path}")
    return figure


def draw(figure: Any, layers: list[dict[str, float]], path: Path) -> None:
    """Effective ranks over layers, saved."""
    axes = figure.subplots()
    for side, marker in zip(SIDES, "os", strict=True):
        axes.plot([x[side] for x in layers], marker=marker, markersize=4, label=side)
    axes.set(xlabel="layer", ylabel="normalised effective rank", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
