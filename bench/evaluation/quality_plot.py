"""Plots of bench.quality's cells: small files, each with one question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.evaluation.quality_frontier import PLACES, family, is_frontier, points
from bench.evaluation.quality_plan import (
    APART,
    BEYOND,
    JOINT,
    LENGTH,
    NEAR,
    NESTED,
    PALU,
    PLANS,
    RECALKV,
    RIDE,
    Row,
    Settings,
    find,
    plain,
    row_of,
    settings_of,
)

CURVES: dict[Row, tuple[str, str]] = {  # colour and marker of the rows that layers and split show
    RECALKV: ("tab:orange", "s"),
    PALU: ("tab:blue", "o"),
    Row("palu", "spectrum"): ("tab:cyan", "^"),
    APART: ("goldenrod", "v"),
    RIDE: ("yellowgreen", "D"),
    JOINT: ("darkgreen", "P"),
}
AGAINST_BYTES: dict[Row, tuple[str, str]] = CURVES | {
    replace(JOINT, refine=32): ("limegreen", "X"),
    Row("kv-heads"): ("tab:olive", "p"),
    NESTED: ("tab:purple", "H"),
    Row("matryoshka-pca"): ("plum", "h"),
    Row("eigen"): ("tab:pink", "*"),
    Row("kq-svd", "uniform"): ("tab:red", "d"),
    Row("think"): ("black", "8"),
    Row("asvd"): ("tab:brown", ">"),
    Row("lorc", "condition"): ("0.35", "<"),
    Row("svd", "uniform"): ("0.65", "x"),
}
BITS: dict[str, dict[str, Any]] = {
    "": {"marker": "o", "ls": "-", "lw": 0.9},
    " 8 bits": {"marker": "v", "ls": "--", "lw": 0.9},
    " 4 bits": {"marker": "<", "ls": ":", "lw": 1.2},
    " auto": {"marker": "P", "ls": "-", "lw": 2.2},
}
COLOURS = ("tab:blue", "tab:orange", "yellowgreen", "darkgreen")
LOW_RANK = dict(zip(map(family, (PALU, RECALKV, RIDE, JOINT)), COLOURS, strict=True))
FRONTIER: dict[str, dict[str, Any]] = {  # what is drawn of each family
    **{
        f"{name}{bits}": {"color": colour, **style} for name, colour in LOW_RANK.items() for bits, style in BITS.items()
    },
    "lrattn apart auto": {"color": "goldenrod", "marker": "X", "lw": 2.2},
    "lrattn joint auto": {"color": "saddlebrown", "marker": "X", "lw": 2.2},
    "lrattn-channels auto": {"color": "tab:cyan", "marker": "v", "lw": 1.5},
    "lrattn-rotated auto": {"color": "teal", "marker": "^", "lw": 1.5},
    "kivi-32": {"color": "tab:red", "marker": "s", "lw": 2},
    "kivi-64": {"color": "salmon", "marker": "D", "lw": 1},
    "rotated": {"color": "tab:purple", "marker": "^", "lw": 1.5},
    "quanto": {"color": "black", "marker": "*", "lw": 1},
    "half": {"color": "0.5", "marker": "x", "lw": 1},
}
LOSS = "loss over the dense model, nats a token"
FLOOR = 2e-3  # nats, about the error of a few windows: the axis is linear below
KEEP = "keep: bytes of the latent cache / dense"


class Plot(NamedTuple):
    """about: for a page. shows: whether it has a use for a cell. draw: all cells -> the figure."""

    about: str
    shows: Callable[[Settings], bool]
    draw: Callable[[list[Settings]], Figure]


def plot(results: dict[str, Any], path: Path) -> None:
    """A file beside the JSON for each plot that has something to show."""
    for name in shown(results):
        target = path.with_name(f"{path.stem}-{name}.png")
        figure = PLOTS[name].draw(results["cells"])
        figure.savefig(target, dpi=130)
        plt.close(figure)
        print(f"wrote {target}")


def shown(results: dict[str, Any]) -> list[str]:
    """The plots that have something to show."""
    return [name for name, p in PLOTS.items() if any(map(p.shows, results["cells"]))]


def is_plain(cell: Settings) -> bool:
    """Measured, on the first sample, without a dense window."""
    return "texts" in cell and plain(cell["model"]).items() <= cell.items()


def is_point(cell: Settings) -> bool:
    """Of CURVES."""
    return is_plain(cell) and row_of(cell) in CURVES


def is_near(cell: Settings) -> bool:
    shown = {"recent": NEAR[0], "sinks": NEAR[1], "length": LENGTH}
    return "texts" in cell and row_of(cell) in BEYOND and shown.items() <= cell.items()


def is_probed(cell: Settings) -> bool:
    return bool(cell.get("probe_at")) and cell["method"] != "dense" and not row_of(cell).packed


def has_prediction(cell: Settings) -> bool:
    return is_point(cell) and bool(cell["predicted_layers"])


def curves(cells: list[Settings], text: str) -> Figure:
    """Excess loss against keep, one panel a model. On a log axis the dense model lies below every line, at keep 1."""
    names = models_of(cells, is_point)
    figure, axes = panels(1, len(names), 4.6, 4.8)
    for axis, name in zip(axes, names, strict=True):
        for row, (colour, marker) in AGAINST_BYTES.items():
            points = [c for c in cells if is_plain(c) and c["model"] == name and row_of(c) == row]
            points = sorted((c for c in points if c["texts"][text]["excess"] > 0), key=lambda c: c["keep"])
            if points:
                keeps = [c["keep"] for c in points]
                excess, error = ([c["texts"][text][of] for c in points] for of in ("excess", "error"))
                style = {"marker": marker, "markersize": 4, "color": colour, "lw": 1.3 if row in CURVES else 0.9}
                axis.errorbar(keeps, excess, error, capsize=2, label=row.label, **style)
        log_scale(axis, "y")
        axis.set(xlabel=KEEP, xlim=(None, 1.02), xticks=[*PLANS[name].keeps, 1.0])
        axis.axvline(1, color="black", lw=1)
        axis.annotate(
            "dense: no loss",
            (0.99, 0.03),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            fontsize="small",
        )
        axis.set_title(f"{PLANS[name].title}\n{text}", fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(LOSS)
    one_legend(figure, axes, "outside right center")
    return figure


def window(cells: list[Settings]) -> Figure:
    """Excess loss without a dense window, with one beside the same latents, and with its bytes counted."""
    names = models_of(cells, is_near)
    kinds = (
        ("no window", "o", "0.5", {"recent": 0, "counted": False}),
        ("counted in the kept share", "D", "tab:green", {"recent": NEAR[0], "counted": True}),
        ("beside the latents: more bytes", "s", "tab:blue", {"recent": NEAR[0], "counted": False}),
    )
    figure, axes = panels(1, len(names), 6.2, 3.4)
    for axis, name in zip(axes, names, strict=True):
        keep = keep_of([c for c in cells if is_near(c) and c["model"] == name])
        for label, marker, colour, settings in kinds:
            at, losses, errors = [], [], []
            for i, row in enumerate(BEYOND):
                far = row.far if settings["recent"] else (0, 0)
                made = settings_of(Row(row.method, row.ranks, row.shared, far, row.refine))
                cell = find(cells, model=name, sample="0", keep=keep, length=LENGTH, **made, **settings)
                if cell is not None and "texts" in cell:
                    own = cell["texts"]["wikipedia"]
                    at, losses, errors = [*at, i], [*losses, own["excess"]], [*errors, own["error"]]
            if at:
                axis.errorbar(losses, at, xerr=errors, fmt=marker, color=colour, label=label, markersize=5, capsize=2)
        log_scale(axis, "x")
        axis.set_yticks(range(len(BEYOND)), [row.label for row in BEYOND])
        axis.invert_yaxis()
        axis.set_xlabel(f"{LOSS} (wikipedia)")
        about = f"keep {keep}, the last {NEAR[0]} and first {NEAR[1]} tokens dense"
        axis.set_title(f"{PLANS[name].title}\n{about}", fontsize="medium")
        axis.grid(alpha=0.3, which="both", axis="x")
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def probe(cells: list[Settings]) -> Figure:
    """What a passage gains when it comes again, against the distance; the dense model is the line to reach."""
    name = models_of(cells, is_probed)[0]
    dense = find(cells, model=name, method="dense", probe=True)
    probed = [c for c in cells if is_probed(c) and c["model"] == name and c["counted"] == bool(c["recent"])]
    kinds = sorted({(-c["keep"], c["recent"], c["sinks"]) for c in probed})
    figure, axes = panels(1, len(kinds), 4.4, 3.8, sharey=True)
    for axis, (minus_keep, recent, sinks) in zip(axes, kinds, strict=True):
        shown_here = [(c, row_of(c)) for c in probed if (-c["keep"], c["recent"]) == (minus_keep, recent)]
        own = [(c, row) for c, row in shown_here if recent == 0 or any(row.far) or not row.method.startswith("lrattn")]
        for cell, row in own:
            colour, marker = CURVES.get(Row(row.method, row.ranks, row.shared), ("0.6", "x"))
            line = "--" if row.refine else "-"
            draw_gains(axis, cell["probe_at"], color=colour, marker=marker, ls=line, label=row.label)
        if dense is not None:
            draw_gains(axis, dense["probe_at"], color="black", marker="", lw=2, label="dense")
        window = f"\ndense window {recent} + {sinks}" if recent else "\nno dense window"
        axis.set_title(f"keep {-minus_keep}{window}", fontsize="medium")
        axis.set_xscale("log", base=2)
        distances = [p["distance"] for p in own[0][0]["probe_at"]]
        axis.set_xticks(distances, distances)
        axis.minorticks_off()
        axis.set(xlabel="tokens between a passage and its repetition", ylim=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gain of reading it again, nats a token")
    one_legend(figure, axes[:1], "outside right center")
    figure.suptitle(PLANS[name].title, fontsize="medium")
    return figure


def draw_gains(axis: Axes, rows: Sequence[dict[str, float]], **style: Any) -> None:
    places, gains, errors = ([row[of] for row in rows] for of in ("distance", "gain", "error"))
    axis.errorbar(places, gains, errors, markersize=4, capsize=2, **style)


def layers(cells: list[Settings]) -> Figure:
    """Where the loss is predicted to arise, layer by layer, at the least kept share that has one."""
    names = models_of(cells, has_prediction)
    figure, axes = panels(1, len(names), 5.2, 3.6)
    for axis, name in zip(axes, names, strict=True):
        own = [c for c in cells if has_prediction(c) and c["model"] == name]
        keep = keep_of(own)
        for cell in (c for c in own if c["keep"] == keep):
            colour, marker = CURVES[row_of(cell)]
            lost = cell["predicted_layers"]
            label = f"{row_of(cell).label}: {sum(lost):.3f} in all"
            axis.plot(range(len(lost)), lost, color=colour, marker=marker, markersize=4, lw=1.2, label=label)
        axis.set(xlabel="layer", ylim=(0, 1.35 * axis.get_ylim()[1]))
        axis.set_title(f"{PLANS[name].title}, keep {keep}", fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper left")
    axes[0].set_ylabel("predicted loss, nats a token")
    return figure


def split(cells: list[Settings]) -> Figure:
    """Latents of keys and values by layer, at keep 0.3 or the least there is: where the bytes went."""
    name = models_of(cells, is_point)[0]
    own = [c for c in cells if is_point(c) and c["model"] == name]
    keep = keep_of(own)
    chosen = sorted((c for c in own if c["keep"] == keep), key=lambda c: list(CURVES).index(row_of(c)))
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = panels(rows, columns, 4.2, 2.5, sharey=True, sharex=True)
    for axis, cell in zip(axes, chosen, strict=False):
        keys, values = zip(*cell["widths"], strict=True)
        places = range(len(keys))
        if cell["rows_shared"]:  # a row is as wide as the values' latents, and keys read its beginning
            rest = [v - k for k, v in cell["widths"]]
            axis.bar(places, keys, color="tab:purple", label="keys and values", width=0.9)
            axis.bar(places, rest, bottom=keys, color="tab:orange", label="values alone", width=0.9)
        else:
            axis.bar(places, keys, color="tab:blue", label="keys alone", width=0.9)
            axis.bar(places, values, bottom=keys, color="tab:orange", label="values alone", width=0.9)
        axis.set_title(row_of(cell).label, fontsize="medium")
        axis.grid(alpha=0.3, axis="y")
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    for row in range(rows):
        axes[row * columns].set_ylabel("latents a token")
    for axis in axes[max(len(chosen) - columns, 0) : len(chosen)]:
        axis.set_xlabel("layer")
        axis.tick_params(labelbottom=True)
    one_legend(figure, axes, "outside upper right", ncols=3)
    figure.suptitle(f"{PLANS[name].title}, keep {keep}", fontsize="medium", x=0.02, ha="left")
    return figure


def frontier(cells: list[Settings]) -> Figure:
    """Excess loss, of both texts together, against bytes, both logarithmic; a row for each model, and a panel without
    and one with a dense window."""
    names = models_of(cells, is_frontier)
    figure, axes = panels(len(names), len(PLACES), 5.6, 4.6, sharex=True, sharey=True)
    for axis, (name, near) in zip(axes, itertools.product(names, PLACES), strict=True):
        found = points(cells, name, near)
        axis.set_visible(bool(found))
        for label, style in FRONTIER.items():
            if own := [p for p in found if family(p.row) == label]:
                x, y, error = ([getattr(p, of) for p in own] for of in ("share", "excess", "error"))
                axis.errorbar(x, y, error, label=label, capsize=2, markersize=4, **style)
        log_scale(axis, "x")
        axis.set_yscale("symlog", linthresh=FLOOR, linscale=0.5)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel="bytes of the cache / dense 16-bit", ylim=(-2 * FLOOR, None))
        axis.set_title(PLACES[near], fontsize="medium")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3, which="both")
    for name, axis in zip(names, axes[:: len(PLACES)], strict=True):
        axis.set_ylabel(f"{PLANS[name].title}\n{LOSS}")
    one_legend(figure, axes, "outside right center")
    return figure


def one_legend(figure: Figure, axes: Sequence[Axes], place: str, ncols: int = 1) -> None:
    """Of these panels, each name once."""
    found = [axis.get_legend_handles_labels() for axis in axes]
    named = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc=place, ncols=ncols, fontsize="small")


def log_scale(axis: Axes, name: str) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    own = {"x": axis.xaxis, "y": axis.yaxis}[name]
    axis.set(**{f"{name}scale": "log"})
    own.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    own.set_major_formatter("{x:g}")
    own.set_minor_formatter(NullFormatter())


def keep_of(cells: list[Settings]) -> float:
    """The share where most is measured, or else the least there is."""
    keeps = {c["keep"] for c in cells}
    return 0.3 if 0.3 in keeps else min(keeps)


def models_of(cells: list[Settings], shows: Callable[[Settings], bool]) -> list[str]:
    """Those with a cell to show, in the order of the plans."""
    return [name for name in PLANS if any(c["model"] == name and shows(c) for c in cells)]


def panels(rows: int, columns: int, width: float, height: float, **shared: bool) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False, **shared
    )
    return figure, list(axes.flat)


PLOTS = {
    "wikipedia": Plot("loss against keep on wikipedia", is_point, partial(curves, text="wikipedia")),
    "news": Plot("loss against keep on news", is_point, partial(curves, text="news")),
    "window": Plot("loss with a dense window", is_near, window),
    "probe": Plot("gain of a passage read again, against distance", is_probed, probe),
    "layers": Plot("predicted loss by layer", has_prediction, layers),
    "split": Plot("latents of keys and values by layer", is_point, split),
    "frontier": Plot("loss against bytes, by fewer latents and by fewer bits", is_frontier, frontier),
}
