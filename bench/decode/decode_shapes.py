"""Attention layers of known models, and what one decode step of each has to read and multiply: plain arithmetic.

Counts are per token and step. bytes: what must be read of the cache, once. temporaries: what a way writes and reads
again. flops: products alone, 2 a multiplication with its sum; rotation and softmax are left out.

    way                     bytes w       temporaries                    flops
    dense                   2 Hkv D       0                              4 Hq D
    rebuild all, attend     Wk + Wv       2 * 2 Hkv D w                  2 Hkv D (Rk + Rv) + 4 Hq D
    lrattn, two passes      Wk + Wv       2 * 4 Hq + 2 * Hq D w / 64     2 Hkv D Rk + 2 Hq D + 2 Hq Rv
    lrattn, position-free   Wk + Wv       (2 * 4 Hq) + 2 * Hq Rk w / N   2 Hq Rk + 2 Hq Rv + 2 Hq D Rk / N

w is 2, the bytes of a number; Wk and Wv are all columns of a cache row, Rk and Rv the rank one head uses. Of packed
rows the bytes are those of their runs. Two passes keep float32 scores and the queries turned back for every 64 tokens;
position-free keys, in chunks of N = 512 positions, keep queries absorbed for every chunk, and scores only where values
are not grouped as keys are: else they take one pass. The bases, read once a step whatever the length, are counted
apart: (Rk + Rv) Hkv D w. Where a joint value latent is cut into column tiles, each tile reads the scores again; that is
left out, as are partial results of splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lrattn.factors.formats import Format
from lrattn.factors.shapes import RANK_STEP

GROUP = 4  # kv heads that share a latent
TILE = 64  # tokens for which a query is turned back once
CHUNK = 512  # positions for which it is absorbed once
GROUPINGS = ("ReCalKV", "Palu")
KEEPS = (0.5, 0.3)
PACKINGS = ((), (8, 4, 2), (4,))  # bits of the segments of latents; () is plain
ITEMSIZE = 2


class Model(NamedTuple):
    """One attention layer as a model's configuration gives it."""

    name: str
    query_heads: int
    kv_heads: int
    theta: float
    head_dim: int = 128
    scaling: tuple[tuple[str, Any], ...] = ()  # as in its configuration
    offset: bool = False  # of keys and values


LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 8192),
)
LLAMA_31 = Model("Llama-3.1-8B", 32, 8, 5e5, scaling=LLAMA3)
LLAMA_2 = Model("Llama-2-7B", 32, 32, 1e4)
QWEN_3 = Model("Qwen3-8B", 32, 8, 1e6)
QWEN_25 = Model("Qwen2.5-7B", 28, 4, 1e6, offset=True)
MODELS = (LLAMA_31, LLAMA_2, QWEN_3, QWEN_25)


class Shape(NamedTuple):
    """A layer factored: keys in groups of four heads; values too (Palu) or as one latent for all heads (ReCalKV).

    keep: of the numbers. bits: of the segments of packed latents, the last half of them all; none where latents are
    plain.
    """

    model: Model
    grouping: str
    keep: float
    bits: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        packed = f", {'/'.join(map(str, self.bits))} bits" if self.bits else ""
        return f"{self.model.name}, {self.grouping} groups{packed}"

    @property
    def key_ranks(self) -> tuple[int, ...]:
        groups = self.model.kv_heads // min(GROUP, self.model.kv_heads)
        return (self._rank(self.model.kv_heads // groups),) * groups

    @property
    def value_ranks(self) -> tuple[int, ...]:
        return self.key_ranks if self.grouping == "Palu" else (self._rank(self.model.kv_heads),)

    @property
    def paired(self) -> bool:
        """Whether values are grouped as keys are."""
        return len(self.key_ranks) == len(self.value_ranks)

    def _rank(self, heads: int) -> int:
        """The multiple of 16 nearest to the kept share of these heads' dimensions."""
        return max(RANK_STEP, round(self.keep * heads * self.model.head_dim / RANK_STEP) * RANK_STEP)

    def formats(self, ranks: tuple[int, ...]) -> tuple[Format, ...] | None:
        """Of packed groups."""
        return tuple(packing(rank, self.bits) for rank in ranks) if self.bits else None

    @property
    def row_bytes(self) -> int:
        """Of a token's rows in both caches."""
        ranks = self.key_ranks + self.value_ranks
        formats = self.formats(ranks)
        return ITEMSIZE * sum(ranks) if formats is None else sum(f.nbytes for f in formats)

    @property
    def kept(self) -> float:
        """Bytes of the latent cache over those of the dense one, after rounding."""
        return self.row_bytes / (2 * self.model.kv_heads * self.model.head_dim * ITEMSIZE)

    @property
    def basis_bytes(self) -> int:
        """Of both bases."""
        rank = self.key_ranks[0] + self.value_ranks[0]
        return rank * self.model.kv_heads * self.model.head_dim * ITEMSIZE


def packing(rank: int, bits: tuple[int, ...]) -> Format:
    """A rank in segments of these widths, the last half of it."""
    steps, first = rank // RANK_STEP, len(bits) - 1  # segments but the last
    parts = [steps // (2 * first or 1)] * first
    parts.append(steps - sum(parts))
    return Format(tuple((RANK_STEP * part, width) for part, width in zip(parts, bits, strict=True)))


class Count(NamedTuple):
    """Per token and step of one sequence."""

    bytes: int
    temporaries: float
    flops: int

    @property
    def intensity(self) -> float:
        """Flops per byte, temporaries included."""
        return self.flops / (self.bytes + self.temporaries)


def counts(shape: Shape) -> dict[str, Count]:
    """The table above for one shape."""
    model = shape.model
    heads, queries, dim = model.kv_heads, model.query_heads, model.head_dim
    rk, rv = shape.key_ranks[0], shape.value_ranks[0]
    dense, latents = 2 * heads * dim * ITEMSIZE, shape.row_bytes
    scores, turned, absorbed = 2 * 4 * queries, 2 * queries * dim * ITEMSIZE / TILE, 2 * queries * rk * ITEMSIZE / CHUNK
    return {
        "dense": Count(dense, 0, 4 * queries * dim),
        "rebuild all, attend": Count(latents, 2 * dense, 2 * heads * dim * (rk + rv) + 4 * queries * dim),
        "lrattn, two passes": Count(
            latents, scores + turned, 2 * heads * dim * rk + 2 * queries * dim + 2 * queries * rv
        ),
        "lrattn, position-free": Count(
            latents,
            absorbed + (0 if shape.paired else scores),
            2 * queries * (rk + rv) + 2 * queries * dim * rk // CHUNK,
        ),
    }


def all_shapes() -> Iterator[Shape]:
    """Every model, grouping and share kept; with one group of heads (Qwen2.5-7B) the groupings are the same. Packed
    latents of the Llamas are grouped as Palu's."""
    for model in MODELS:
        for grouping in GROUPINGS if model.kv_heads > GROUP else GROUPINGS[:1]:
            for keep in KEEPS:
                yield Shape(model, grouping, keep)
    for model in (LLAMA_31, LLAMA_2):
        for bits in PACKINGS[1:]:
            yield Shape(model, GROUPINGS[1], KEEPS[0], bits)


def count_rows() -> list[dict[str, Any]]:
    """Every shape and way, for a JSON; a model's dense cache once."""
    return [
        {"shape": shape.name, "keep": shape.keep, "bits": shape.bits, "kept": shape.kept, "key_ranks": shape.key_ranks,
         "value_ranks": shape.value_ranks, "basis_bytes": shape.basis_bytes, "way": way,
         "bytes": count.bytes, "temporaries": count.temporaries, "flops": count.flops}
        for shape in all_shapes()
        for way, count in counts(shape).items()
        if way != "dense" or (shape.grouping, shape.keep, shape.bits) == (GROUPINGS[0], KEEPS[0], ())
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Counted per token of context, not measured."""
    line = "{:<39} {:>5} {:<22} {:>11} {:>11} {:>8} {:>10}"
    lines = [line.format("shape", "kept", "way", "must read B", "temporary B", "kflop", "flop/byte")]
    for row in rows:
        count = Count(row["bytes"], row["temporaries"], row["flops"])
        dense = row["way"] == "dense"
        shape, kept = (row["shape"].split(",")[0], "1.000") if dense else (row["shape"], f"{row['kept']:.3f}")
        numbers = (count.bytes, round(count.temporaries), f"{count.flops / 1e3:.0f}", f"{count.intensity:.0f}")
        lines.append(line.format(shape, kept, row["way"], *numbers))
    return "\n".join(lines)
