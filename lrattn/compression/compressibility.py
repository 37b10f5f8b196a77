"""How compressible keys and values are on a text: the normalised effective rank of KV-CoRE (arXiv 2602.05929)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.compression.calibrate import calibrate
from lrattn.compression.moments import SIDES, Moments, about
from lrattn.factors import safefile


def effective_rank(singular: Tensor) -> float:
    """exp(- sum p ln p) / n, p = singular / sum singular: in (0, 1].

    It is 1 where all n singular values are equal and k / n where k are equal and the others zero. A low one means that
    few directions hold most: compressible.
    """
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.special.entr(p).sum().exp().item() / len(singular)


def compressibility(moments: Moments) -> list[dict[str, float]]:
    """Per layer, the effective rank of its keys, before RoPE, and of its values on the text of `moments`.

    Singular values of the keys K [tokens, n], n = Hkv * D, are the roots of the eigenvalues of K^T K: no key is kept.
    On fewer than n tokens ranks come out too low.

    Raises: ValueError for moments without "before".
    """
    if "before" not in moments.gathered:
        raise ValueError(f"moments: expected those of calibrate(gather=['before']), got {list(moments.gathered)}")
    found = []
    for i in range(moments.layers):
        both = about(moments.sum("before", i), None)
        n = len(both) // 2
        sides = zip(SIDES, (both[:n, :n], both[n:, n:]), strict=True)
        found.append({side: effective_rank(torch.linalg.eigvalsh(x).clamp_min(0).sqrt()) for side, x in sides})
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


def measured(model: nn.Module, windows: Tensor, figure: Any, path: Path | None) -> tuple[str, dict[str, Any]]:
    """Of a model on windows [n, length], as lines and as numbers. figure: of `canvas`, to be drawn to `path`; or None.

    Raises: ValueError as `calibrate`; OSError if the image cannot be written.
    """
    layers = compressibility(calibrate(model, windows.split(1)))
    what = f"normalised effective ranks over {windows.shape[0]} windows of {windows.shape[1]} tokens"
    lines = [what, "", table(layers)]
    if figure is not None and path is not None:
        with safefile.replacing("plot", path) as partial:
            draw(figure, layers, partial)
        lines.append(f"wrote {path}")
    return "\n".join(lines), {"windows": list(windows.shape), "layers": layers}
