"""What a set of factors holds, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.factors.selection import Selection


def summarize(factors: Factors) -> dict[str, Any]:
    """Where the bytes go: keep, the split between keys and values, the ranks of every layer, and the loss foreseen.

    Bytes are those of a token, plain latents at 16 bits a number, packed ones with their scales. Rows that keys and
    values share count as the values'. key_bits, value_bits: (latents, bits) of the segments of each
    packed group. key_rank is the mean rank of a key group: what queries meet, or what rebuilding keys takes time for.
    absorbed: whether queries meet the latents; rotated: whether those are of keys as attention is given them, and
    max_position for how many positions, None where that is not known; chunk: of how many positions keys are turned to
    their place in. band: how keys before RoPE are rebuilt in part, or why they are rebuilt whole; None of others.
    Predicted losses are nats a token, to second order; None where the method foresees none.
    """
    keys = sum(layer.keys.latent_bytes for layer in factors.held if not layer.shared)
    values = sum(layer.values.latent_bytes for layer in factors.held)
    groups = sum(len(layer.keys.ranks) for layer in factors.held)
    return {
        "method": factors.method,
        "ranks": factors.rule,
        "model": factors.model,
        "dtype": str(factors.layers[0].dtype).removeprefix("torch."),
        "keep": factors.keep,
        "bytes_per_token": factors.bytes_per_token,
        "dense_bytes_per_token": factors.dense_bytes_per_token,
        "key_share": keys / factors.bytes_per_token,
        "value_share": values / factors.bytes_per_token,
        "shared": all(layer.shared for layer in factors.layers),
        "key_rank": sum(layer.keys.width for layer in factors.held) / groups,
        "predicted_loss": sum(factors.predicted) if factors.predicted else None,
        "residual": factors.residual,
        "near": factors.near,
        "select": factors.select and asdict(factors.select),
        "rest": factors.rest and factors.rest.keep,
        "donors": factors.donors,
        "span": factors.span,
        "layers": [
            {
                "kv_heads": layer.num_kv_heads,
                "head_dim": layer.head_dim,
                "key_groups": layer.keys.groups,
                "key_ranks": layer.keys.ranks,
                "value_groups": layer.values.groups,
                "value_ranks": layer.values.ranks,
                "key_bits": [f.segments for f in layer.keys.formats],
                "value_bits": [f.segments for f in layer.values.formats],
                "predicted_loss": factors.predicted[i] if factors.predicted else None,
                "absorbed": layer.absorbed,
                "rotated": layer.rope is None,
                "chunk": layer.chunk,
                "max_position": layer.max_position,
                "band": band_of(layer),
                "keep": layer.bytes_per_token / len(factors.run(i)) / (4 * layer.num_kv_heads * layer.head_dim),
            }
            for i, layer in enumerate(factors.layers)
        ],
    }


def headline(summary: dict[str, Any]) -> str:
    """The whole in six lines, one more of keys before RoPE, and with a dense window."""
    count, first = len(summary["layers"]), summary["layers"][0]
    made = summary["method"] + (f", ranks {summary['ranks']}" if summary["ranks"] else "")
    split = f"keys {summary['key_share']:.1%}, values {summary['value_share']:.1%}"
    if summary["shared"]:
        split = f"rows that keys and values share {summary['value_share']:.1%}"
    how = "queries meet a key group's" if _absorbed(summary) else "a key group is rebuilt from"
    size = f"{summary['bytes_per_token']:,} of {summary['dense_bytes_per_token']:,} bytes a token"
    bits = f", {16 * summary['keep']:.2f} bits a number" if _packed(summary) else " at 16 bits a number"
    loss, (recent, sinks) = summary["predicted_loss"], summary["near"]
    lines = [
        made + (f", of {summary['model']}" if summary["model"] else ""),
        f"{count} layers of {first['kv_heads']} kv heads of {first['head_dim']}, {summary['dtype']}",
        f"keep {summary['keep']:.3f}: {size}{bits}",
        split,
        f"{how} {summary['key_rank']:.0f} latents"
        + ("" if loss is None else f"; predicted loss {loss:.2g} nats a token"),
        f"{_keys(summary)}: {_positions(summary)}",
        *_rebuilt(summary),
        *([f"tokens that a cache keeps: {_kept(summary)}"] if summary["select"] else []),
        *([f"layers that read another's: {_donors(summary)}"] if summary["donors"] else []),
        *([f"a row is of {summary['span']} layers, and read by each of them"] if summary["span"] > 1 else []),
        *([f"beside them, dense: the last {recent} and the first {sinks} tokens"] if recent or sinks else []),
    ]
    return "\n".join(lines)


def table(summary: dict[str, Any]) -> str:
    """The headline, and a line for each layer."""
    packed, foreseen = _packed(summary), summary["predicted_loss"] is not None
    rows = [
        {
            "layer": str(i),
            "key ranks": _ranks(x["key_ranks"]),
            "row ranks" if summary["shared"] else "value ranks": _ranks(x["value_ranks"]),
            **({"latents x bits": _bits(x["key_bits"], x["value_bits"])} if packed else {}),
            "keep": f"{x['keep']:.3f}",
            **({"loss": f"{x['predicted_loss']:.1e}"} if foreseen else {}),
            "heads sharing a key latent": " | ".join(" ".join(map(str, heads)) for heads in x["key_groups"]),
        }
        for i, x in enumerate(summary["layers"])
    ]
    return f"{headline(summary)}\n\n{aligned(rows)}"


def comparison(summaries: Mapping[str, dict[str, Any]]) -> str:
    """A line for each of several sets of factors, by name: bytes, what keys take time for, and the loss foreseen."""
    return aligned(
        [
            {
                "method": x["method"],
                "bytes a token": f"{x['bytes_per_token']:,}",
                "keep": f"{x['keep']:.3f}",
                "bits a number": f"{16 * x['keep']:.2f}",
                "key rank": f"{x['key_rank']:.0f}",
                "keys": "absorbed" if _absorbed(x) else "rebuilt",
                "positions": _positions(x).removeprefix("for positions "),
                "predicted loss": "-" if x["predicted_loss"] is None else f"{x['predicted_loss']:.1e}",
                "window": " + ".join(map(str, x["near"])) if any(x["near"]) else "-",
                "file": name,
            }
            for name, x in summaries.items()
        ]
    )


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Lines of columns under their names, flush right, the last one flush left."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def _kept(summary: dict[str, Any]) -> str:
    select, rest = Selection(**summary["select"]), summary["rest"]
    if rest is None:
        return str(select)
    share = select.keep or 0.0
    over_all = f", {share * summary['keep'] + (1 - share) * rest:.3f} over all" if share else ""
    return f"{select}; the others are held at keep {rest:.3f}{over_all}"


def _donors(summary: dict[str, Any]) -> str:
    return ", ".join(f"{i} of {d}" for i, d in enumerate(summary["donors"]) if i != d)


def _absorbed(summary: dict[str, Any]) -> bool:
    """Whether no layer rebuilds keys."""
    return all(x["absorbed"] for x in summary["layers"])


def _keys(summary: dict[str, Any]) -> str:
    """How keys are stored, of the layers that turn them."""
    chunks = {x["chunk"] for x in summary["layers"] if x["chunk"]}
    if chunks:
        return f"keys turned to their place in chunks of {' or '.join(map(str, sorted(chunks)))}"
    return "keys before RoPE" if any(not x["rotated"] for x in summary["layers"]) else "keys as attention is given them"


def band_of(layer: LayerFactors) -> dict[str, Any] | str | None:
    """How keys before RoPE are rebuilt in part, or why they are rebuilt whole; None of others."""
    if layer.absorbed or layer.rope is None:
        return None
    if layer.keys.group_size == 1:
        return "no two heads share a latent"
    found = layer.rope.band(layer.head_dim, layer.dtype)
    return found if isinstance(found, str) else {n: getattr(found, n) for n in ("fast", "terms", "block", "error")}


def _rebuilt(summary: dict[str, Any]) -> list[str]:
    """How keys before RoPE are: a line for each way there is."""
    told = []
    for dims, band in ((x["head_dim"], x["band"]) for x in summary["layers"] if x["band"] is not None):
        if isinstance(band, str):
            told.append(f"keys are rebuilt whole: {band}")
        else:
            rest = f"the others absorbed in {band['terms']} terms for each {band['block']} tokens"
            told.append(f"{band['fast']} of {dims} dims of a key are rebuilt, {rest} (within {band['error']:.0e})")
    return list(dict.fromkeys(told))


def _positions(summary: dict[str, Any]) -> str:
    """Where the factors hold."""
    if any(not x["rotated"] for x in summary["layers"]):
        return "any position"
    known = [x["max_position"] for x in summary["layers"] if x["max_position"]]
    return f"for positions 0..{min(known) - 1:,}" if known else "positions not recorded"


def _packed(summary: dict[str, Any]) -> bool:
    return any(x["key_bits"] or x["value_bits"] for x in summary["layers"])


def _bits(*sides: list[tuple[tuple[int, int], ...]]) -> str:
    """16x8 64x4 for 16 latents of 8 bits and 64 of 4; keys and values, and groups that differ, apart."""
    groups = [dict.fromkeys(" ".join(f"{rank}x{bits}" for rank, bits in group) for group in side) for side in sides]
    return " | ".join(" / ".join(side) for side in groups if side)


def _ranks(ranks: tuple[int, ...]) -> str:
    """128 x 4 for four groups of one rank, else every rank."""
    if len(set(ranks)) == 1:
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} x {len(ranks)}"
    return " ".join(map(str, ranks))


def used(factors: Factors | None, recent: int | None, sinks: int | None) -> dict[str, Any]:
    """What a model attended on: factors with this dense window; None: a dense cache."""
    if factors is None:
        return {"method": "dense", "ranks": "", "keep": 1.0, "recent": 0, "sinks": 0, "select": ""}
    near = dict(zip(("recent", "sinks"), factors.near_or(recent, sinks), strict=True))
    what = {"method": factors.method, "ranks": factors.rule, "keep": factors.keep, **near}
    return what | {"select": "" if factors.select is None else str(factors.select)}


def made(what: Mapping[str, Any]) -> str:
    """`used` in some words."""
    near = "".join(f", {name} {what[name]}" for name in ("recent", "sinks") if what[name])
    tokens = f", tokens {what['select']}" if what["select"] else ""
    return f"{what['method']}, keep {what['keep']:.3f}{near}{tokens}"
