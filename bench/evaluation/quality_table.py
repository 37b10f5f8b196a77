"""Tables of bench.quality's cells, and the page they are pasted into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from bench.evaluation import quality_frontier, quality_plot
from bench.evaluation.quality_plan import (
    CONTEXTS,
    LENGTH,
    PLANS,
    SAMPLES,
    Row,
    Settings,
    find,
    plain,
    row_of,
    settings_of,
)
from bench.support import report
from lrattn.compression.methods import METHODS

MARKED = report.marks("bench.quality")
TEXTS = ("wikipedia", "news")
LABEL = 29  # characters of a row's name


def sections(results: dict[str, Any]) -> dict[str, str]:
    """Markdown by name, for the cells that are there: a model's table, and each question's with its plot."""
    cells = results["cells"]
    found = {name: [table(cells, name)] for name in PLANS if dense_of(cells, name)}
    found |= {
        "window": [window(cells, name) for name in PLANS],
        "samples": [samples(cells, name) for name in PLANS],
        "probe": [probe(cells, name) for name in PLANS],
        "predicted": [predicted(cells, name) for name in PLANS],
    }
    if any(map(quality_frontier.is_frontier, cells)):
        found["frontier"] = [made(cells, name) for name in PLANS for made in (frontier, partial(probe, packed=True))]
    said = quality_frontier.words(cells)
    return {name: "\n\n".join(f"```text\n{t}\n```" for t in made if t) for name, made in found.items() if any(made)} | (
        {"frontier-words": said} if said else {}
    )


def pasted(page: str, results: dict[str, Any]) -> str:
    """The page with everything between its marks made anew: <!-- bench.quality: NAME --> .. <!-- end -->.

    NAME is a section's, or plot-NAME for a plot of `quality_plot.PLOTS` that has something to show.
    """
    made = sections(results) | {
        f"plot-{name}": f"![{quality_plot.PLOTS[name].about}](../bench/results/quality-{name}.png)"
        for name in quality_plot.shown(results)
    }
    return report.pasted(page, MARKED, made)


def dense_of(cells: list[Settings], name: str, length: int = LENGTH) -> Settings | None:
    return find(cells, model=name, method="dense", length=length)


def table(cells: list[Settings], name: str) -> str:
    """Perplexity and excess loss of both texts by row and keep, without a dense window."""
    plan, dense = PLANS[name], dense_of(cells, name)
    assert dense is not None
    lines = [f"{plan.title}: {dense['windows']} windows of {dense['length']} tokens a text"]
    notes: list[str] = []
    for text, own in dense["texts"].items():
        head = "".join(f"{f'keep {keep}':>9}{'excess':>14}" for keep in plan.keeps)
        lines += ["", f"{text}: dense {own['perplexity']:.2f}", f"{'':<{LABEL}}{head}"]
        for row in plan.rows:
            found = [find(cells, **plain(name), **settings_of(row), keep=keep) for keep in plan.keeps]
            if any(found):
                lines.append(f"{row.label:<{LABEL}}" + "".join(both(cell, text) for cell in found))
    for row in plan.rows:
        notes += [
            f"{row.label} at keep {keep}: not possible ({cell['impossible']})"
            for keep in plan.keeps
            if (cell := find(cells, **plain(name), **settings_of(row), keep=keep)) and "impossible" in cell
        ]
    notes += [f"{one.label}: the same factors as {other.label}" for one, other in twins(cells, name)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def twins(cells: list[Settings], name: str) -> Iterator[tuple[Row, Row]]:
    """Rows whose factors are those of an earlier row at every keep measured."""
    made: dict[tuple[str, ...], Row] = {}
    for row in PLANS[name].rows:
        found = [find(cells, **plain(name), **settings_of(row), keep=keep) for keep in PLANS[name].keeps]
        digests = tuple(f"{c['keep']} {c['factors']}" for c in found if c and "factors" in c)
        if digests in made:
            yield row, made[digests]
        elif digests:
            made[digests] = row


def window(cells: list[Settings], name: str) -> str:
    """What a dense window mends, at the same latents, and at the same bytes in all; by length of the windows read."""
    found: dict[int, list[str]] = {}
    for keep in PLANS[name].keeps:
        for length, (recent, sinks), row in PLANS[name].beyond:
            own = {"model": name, "sample": "0", "keep": keep, "length": length}
            near = {"recent": recent, "sinks": sinks, **settings_of(row)}
            bare = {"recent": 0, "counted": False, **settings_of(replace(row, far=(0, 0)))}
            three = [
                find(cells, **own, **bare),
                find(cells, **own, **near, counted=False),
                find(cells, **own, **near, counted=True),
            ]
            if any(three[1:]):
                bytes_ = "".join(f"{c['whole_keep']:>6.3f}" if c and held(c) else f"{'-':>6}" for c in three)
                losses = "".join(excess(c, text) for text in TEXTS for c in three)
                kind = f"{row.label:<{LABEL}}{f'{recent}+{sinks}':<6}"
                found.setdefault(length, []).append(f"{keep:<5}{kind}{bytes_}{losses}")
    if not found:
        return ""
    head = [
        f"{PLANS[name].title}: excess loss with a window of recent + first tokens dense.",
        "bytes: of latents and window over the dense cache's, at this length; no: without a window, of factors made",
        "for none; +: with it beside the latents; =: counted in the kept share; far: gradients taken beyond the window",
    ]
    for length, lines in found.items():
        dense = dense_of(cells, name, length)
        about = [f"{text}: dense {dense['texts'][text]['perplexity']:.2f}" if dense else text for text in TEXTS]
        head += [
            "",
            f"{f'{length} tokens':<{LABEL + 11}}{'bytes':<20}{about[0]:<42}{about[1]}",
            f"{'keep':<5}{'':<{LABEL}}{'':<6}{'no':>6}{'+':>6}{'=':>6}" + f"{'no':>14}{'+':>14}{'=':>14}" * 2,
            *lines,
        ]
    return "\n".join(head)


def samples(cells: list[Settings], name: str) -> str:
    """What another calibration sample changes."""
    lines = []
    for keep in PLANS[name].keeps:
        for row in PLANS[name].rows:
            found = [find(cells, **plain(name, sample), **settings_of(row), keep=keep) for sample in SAMPLES]
            if any(found[1:]):
                for text in TEXTS:
                    lines.append(
                        f"{keep:<5}{row.label:<{LABEL}}{text:<10}" + "".join(f"{excess(c, text):>16}" for c in found)
                    )
    if not lines:
        return ""
    names = [f"{s.text} {s.first}-{s.first + s.windows - 1}" for s in SAMPLES.values()]
    head = [
        f"{PLANS[name].title}: excess loss by what was calibrated on (text, windows)",
        "",
        f"{'keep':<5}{'':<{LABEL}}{'text':<10}" + "".join(f"{n:>16}" for n in names),
    ]
    return "\n".join([*head, *lines])


def frontier(cells: list[Settings], name: str) -> str:
    """Bytes a token and both texts' losses, by what is curved together; without a dense window, then with one."""
    lines = []
    for near, place in quality_frontier.PLACES.items():
        found = quality_frontier.points(cells, name, near)
        order = list(dict.fromkeys(quality_frontier.family(row) for b in PLANS[name].frontier for row in b.rows))
        if found:
            lines += ["", place]
        for p in sorted(found, key=lambda p: (order.index(quality_frontier.family(p.row)), -p.share)):
            window = f"{p.cell['recent']}+{p.cell['sinks']}" if near else ""
            each, dense = p.cell["bytes_per_token"], p.cell["dense_bytes_per_token"]
            bytes_ = "".join(f"{n:>7.0f}" for n in (each, *p.cell["bytes_at"].values()))
            shares = f"{p.share:>7.3f}{16 * each / dense:>6.2f}{keys(p.cell):>7}  "
            lines.append(f"{p.row.label:<{LABEL}}{window:<6}{bytes_}{shares}" + "".join(both(p.cell, t) for t in TEXTS))
    if not lines:
        return ""
    names = "".join(f"{text:>9}{'excess':>14}" for text in TEXTS)
    contexts = "".join(f"{f'{n // 1024}K':>7}" for n in CONTEXTS)
    head = [
        f"{PLANS[name].title}: perplexity and excess loss by bytes a token, scales and padding included.",
        "bytes: of a cache without end, and with its window at so many tokens of context; share: of the dense cache of",
        "16 bits, with a window at the last of them; bits: for each number of the dense cache, without end; keys: mean",
        "latents that the keys of a group are rebuilt from, r, or that queries meet as they are, a",
        "",
        f"{'':<{LABEL + 6}}{'bytes':>7}{contexts}{'share':>7}{'bits':>6}{'keys':>7}  {names}",
    ]
    return "\n".join([*head, *lines])


def keys(cell: Settings) -> str:
    """Mean rank of a key group, and whether its keys are rebuilt or absorbed; nothing for a quantiser."""
    if cell["quantiser"]:
        return ""
    rank = sum(width for width, _ in cell["widths"]) / len(cell["widths"]) / cell["key_groups"]
    return f"{rank:.0f} {'a' if METHODS[cell['method']].absorbed else 'r'}"


def probe(cells: list[Settings], name: str, *, packed: bool = False) -> str:
    """Gain of a passage read again, by distance; the dense model's first, then of latents of 16 bits by kept share, or
    of what is packed by the share of its bytes."""
    probed = [c for c in cells if c["model"] == name and c.get("probe_at")]
    share = {id(c): round(c["achieved_keep"], 3) if row_of(c).packed else c["keep"] for c in probed}
    probed = [c for c in probed if c["method"] == "dense" or row_of(c).packed == packed]
    lines = []
    for cell in sorted(probed, key=lambda c: (-share[id(c)], c["recent"], c["counted"])):
        near = f"{cell['recent']} + {cell['sinks']}" if cell["recent"] else ""
        gains = "".join(f"{p['gain']:>7.2f} ±{p['error']:.2f}{p['again_right']:>6.0%}" for p in cell["probe_at"])
        lines.append(f"{row_of(cell).label:<{LABEL}}{share[id(cell)]:>5}  {near:<8}{gains}")
    if not lines or (packed and len(lines) < 2):
        return ""
    distances = [p["distance"] for p in probed[0]["probe_at"]]
    head = [
        f"{PLANS[name].title}: nats a token that a passage of 64 tokens gains when it comes again",
        "after so many others, ± the standard error of 4 passages; and the share of its tokens that are the likeliest",
        "",
        f"{'':<{LABEL}}{'share' if packed else ' keep':<7}{'window':<8}"
        + "".join(f"{d:>7}{'':<6}right" for d in distances),
    ]
    return "\n".join([*head, *lines])


def predicted(cells: list[Settings], name: str) -> str:
    """Loss that the factors' own second order predicts, beside the loss measured. Both in nats a token."""
    lines = []
    for cell in sorted(cells, key=lambda c: -c["keep"]):
        if cell.get("predicted") and find([cell], **plain(name), bits=16):
            measured = "".join(excess(cell, text) for text in TEXTS)
            lines.append(f"{cell['keep']:<5}{row_of(cell).label:<{LABEL}}{cell['predicted']:>10.3f}{measured}")
    if not lines:
        return ""
    head = f"{'keep':<5}{'':<{LABEL}}{'predicted':>10}{'wikipedia':>14}{'news':>14}"
    return "\n".join([f"{PLANS[name].title}: loss predicted and measured", "", head, *lines])


def held(cell: Settings | None) -> bool:
    return cell is not None and "texts" in cell


def shown(cell: Settings | None, text: str, form: Callable[[dict[str, Any]], str], width: int) -> str:
    """`form` of a cell's text, - where it was not measured, no where there are no such factors."""
    if cell is None or not held(cell):
        return f"{'-' if cell is None else 'no':>{width}}"
    return f"{form(cell['texts'][text]):>{width}}"


def excess(cell: Settings | None, text: str) -> str:
    return shown(cell, text, lambda t: f"{t['excess']:.3f} ±{t['error']:.3f}", 14)


def both(cell: Settings | None, text: str) -> str:
    return shown(cell, text, lambda t: number(t["perplexity"]), 9) + excess(cell, text)


def number(x: float) -> str:
    """In at most eight characters."""
    return f"{x:.2f}" if x < 1e4 else f"{x:.0f}" if x < 1e6 else f"{x:.1e}"
