"""What is measured on each model: blocks of rows, each a way to make factors, at some kept shares.

A new row is one line in one of the tuples below. Stages say what is measured first, over all models: a run may be
stopped anytime.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bench.support import models
from lrattn.compression.methods import METHODS
from lrattn.compression.problem import Form

LENGTH = 1024  # tokens of a window
LONG = 4096
CONTEXTS = (1024, 8192)  # tokens at which the bytes of a dense window are counted, too
NEAR = (64, 4)  # recent tokens and sinks of the dense window
SHORT = {"lrattn-rebuilt": "rebuilt"}  # of a method, in tables and plots


@dataclass(frozen=True)
class Sample:
    """What calibration reads: windows of a text's calibration half, from the `first` on."""

    text: str
    first: int
    windows: int


SAMPLES = {
    "0": Sample("wikipedia", 0, 24),
    "1": Sample("wikipedia", 24, 24),
    "2": Sample("wikipedia", 48, 24),
    "16": Sample("wikipedia", 0, 16),
    "64": Sample("wikipedia", 0, 64),
    "news": Sample("news", 0, 24),
}
AFTER = {"0": "1"}  # windows that distillation reads, after those of a sample


@dataclass(frozen=True)
class Row:
    """A way to make factors: arguments of lrattn.compress. Or, of method "quantised", a quantiser of dense keys and
    values, of bench/evaluation/quantisers.py or bench/evaluation/quantised.py, at `bits`; every number is kept.

    refine: steps of distillation, on the windows after the sample's. nested: once at full rank, for cuts to every keep.
    """

    method: str
    ranks: str = "spectrum"
    shared: Form | None = None
    far: tuple[int, int] = (0, 0)
    refine: int = 0
    nested: bool = False
    bits: int | str = 16
    quantiser: str = ""

    @property
    def packed(self) -> bool:
        """Whether anything else is stored than latents of 16 bits."""
        return self.bits != 16 or bool(self.quantiser)

    @property
    def label(self) -> str:
        """Some words for a table or a curve."""
        if self.quantiser:
            return f"{self.quantiser} {self.bits} bits"
        form = {None: "", False: " apart", "ride": " ride", True: " joint"}[self.shared]
        ranks = f" {self.ranks}" if self.shared is None and self.ranks and self.bits != "auto" else ""
        trained = f" {'nested' if self.nested else 'refined'} {self.refine}" if self.refine else ""
        bits = {16: "", "auto": " auto"}.get(self.bits, f" {self.bits} bits")
        method = SHORT.get(self.method, self.method)
        return f"{method}{form}{ranks}{trained}{bits}{' far' if any(self.far) else ''}"


@dataclass(frozen=True)
class Block:
    """Every row at every kept share, of every calibration sample.

    near: recent tokens and sinks of a dense window. counted: its bytes at `length` tokens are within the kept share,
    else beside it. probe: probe.py, too. length: tokens of an evaluation window. windows: instead of the plan's.
    """

    stage: int
    rows: tuple[Row, ...]
    keeps: tuple[float, ...]
    samples: tuple[str, ...] = ("0",)
    near: tuple[int, int] = (0, 0)
    counted: bool = False
    probe: bool = False
    length: int = LENGTH
    windows: int | None = None


@dataclass(frozen=True)
class Plan:
    """windows: of each evaluation text. frontier: loss against bytes, by fewer latents and by fewer bits."""

    title: str
    load: Callable[[], Any]
    windows: int
    blocks: tuple[Block, ...]
    group_size: int = 4
    frontier: tuple[Block, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of `blocks` of plain windows without a dense window, each once."""
        plain = (b for b in self.blocks if not any(b.near) and b.length == LENGTH)
        return tuple(dict.fromkeys(row for b in plain for row in b.rows))

    @property
    def beyond(self) -> tuple[tuple[int, tuple[int, int], Row], ...]:
        """Length, dense window and row of those of `blocks` that have such a window, each once."""
        near = (b for b in sorted(self.blocks, key=lambda b: b.length) if any(b.near))
        return tuple(dict.fromkeys((b.length, b.near, row) for b in near for row in b.rows))

    @property
    def keeps(self) -> tuple[float, ...]:
        """Of `blocks`, from the largest."""
        return tuple(sorted({keep for b in self.blocks for keep in b.keeps}, reverse=True))


APART, RIDE, JOINT = (Row("lrattn-rebuilt", shared=form) for form in (False, "ride", True))
PALU, RECALKV = Row("palu", "fisher"), Row("recalkv", "fisher")
TOP = (PALU, RECALKV, APART, RIDE, JOINT)
REST = (
    Row("palu", "spectrum"),
    Row("palu", "uniform"),
    Row("recalkv-hsr", "spectrum"),
    Row("svd", "uniform"),
    Row("kq-svd", "uniform"),  # its own rule
    *(Row(name) for name in ("kq-svd", "eigen", "asvd", "svd-llm", "cskv", "kv-heads", "matryoshka-pca", "think")),
    Row("lorc", "condition"),
)
ABLATION = (
    Row("recalkv-neither", "fisher"),
    Row("recalkv-hsr", "fisher"),
    Row("recalkv-ovc", "fisher"),
    Row("recalkv-greedy", "fisher"),
    Row("recalkv-neither", "spectrum"),
    Row("recalkv-hsr", "spectrum"),
)
FAR_JOINT = replace(JOINT, far=NEAR)
BEYOND = (PALU, RECALKV, *(replace(row, far=NEAR) for row in (APART, RIDE)), FAR_JOINT, JOINT)  # beside a dense window
UNTRAINED = Row("matryoshka", "uniform")
NESTED = replace(UNTRAINED, refine=64, nested=True)
REFINED = (Row("palu", "spectrum", refine=32), replace(JOINT, refine=32))
SAMPLED = (Row("palu", "spectrum"), Row("kq-svd"), APART, RIDE, JOINT)  # which take one backward pass together


def quantised(quantiser: str, *bits: int) -> tuple[Row, ...]:
    return tuple(Row("quantised", "", bits=b, quantiser=quantiser) for b in bits)


def at_bits(bits: int | str, *rows: Row) -> tuple[Row, ...]:
    return tuple(replace(row, bits=bits) for row in rows)


def per_number(*bits: float) -> tuple[float, ...]:
    """Kept shares that are so many bits for each number of the dense cache."""
    return tuple(b / 16 for b in bits)


DENSE_DATA: dict[str, Any] = {
    "keeps": (1.0,),
    "samples": ("",),
}  # of quantised rows
FAR_RIDE = replace(RIDE, far=NEAR)
LOW_RANK, FAR_LOW_RANK = (PALU, RECALKV, RIDE, JOINT), (PALU, RECALKV, FAR_RIDE, FAR_JOINT)
AUTO, FAR_AUTO = at_bits("auto", JOINT), at_bits("auto", FAR_JOINT)
CHUNKED = tuple(Row("lrattn", shared=form, bits="auto") for form in (False, True))  # no key is rebuilt
UNROTATED = tuple(Row(f"lrattn-{keys}", bits="auto") for keys in ("channels", "rotated"))  # nor here
DEFAULT = (Row("lrattn", shared=False, far=NEAR, bits="auto"),)  # compress(model, batches)
FAR_CHUNKED, FAR_UNROTATED = (tuple(replace(row, far=NEAR) for row in rows) for rows in (CHUNKED, UNROTATED))
UNIFORM, FAR_UNIFORM = (PALU, RECALKV, JOINT), (PALU, RECALKV, FAR_JOINT)
FRONTIER = (
    Block(1, AUTO, per_number(2, 1.5), probe=True),
    Block(1, AUTO, per_number(4), probe=True),
    Block(1, AUTO, per_number(5, 3, 1)),
    Block(1, quantised("kivi-32", 4, 3, 2), **DENSE_DATA, probe=True),
    Block(1, quantised("kivi-32", 8), **DENSE_DATA),
    Block(1, quantised("rotated", 4, 3, 2), **DENSE_DATA),
    Block(1, FAR_AUTO, per_number(2, 1.5), near=NEAR, probe=True),
    Block(1, FAR_CHUNKED, per_number(2, 1.5, 1), near=NEAR, probe=True),
    Block(1, DEFAULT, per_number(4, 3, 2, 1.5, 1), samples=("1", "2"), near=NEAR),
    Block(1, DEFAULT, per_number(4, 3), near=NEAR, probe=True),
    Block(2, quantised("kivi-32", 4, 3, 2), **DENSE_DATA, near=NEAR, probe=True),
    Block(2, quantised("rotated", 4, 3, 2), **DENSE_DATA, near=NEAR),
    Block(2, quantised("quanto", 4, 2), **DENSE_DATA, near=(128, 0), probe=True),
    Block(2, FAR_AUTO, per_number(1), near=NEAR, probe=True),
    Block(2, FAR_AUTO, per_number(4, 3, 5, 2.5), near=NEAR),
    Block(2, quantised("kivi-64", 4, 3, 2), **DENSE_DATA),
    Block(2, AUTO, per_number(2.5)),
    Block(3, LOW_RANK, (0.5,)),
    Block(3, LOW_RANK, (0.3,), probe=True),
    Block(3, LOW_RANK, (0.2, 0.7)),
    Block(3, at_bits(4, *UNIFORM), (0.25, 0.15, 0.1)),
    Block(3, at_bits("auto", RIDE), per_number(2, 1.5, 4, 3, 1)),
    Block(3, UNROTATED, per_number(2, 4, 3)),
    Block(3, FAR_UNROTATED, per_number(2, 1.5), near=NEAR),
    Block(3, FAR_LOW_RANK, (0.3,), near=NEAR),
    Block(3, at_bits(8, *UNIFORM), (0.25,)),
    Block(3, at_bits(8, PALU, JOINT), (0.15,)),
    Block(3, at_bits(4, *FAR_UNIFORM), (0.15,), near=NEAR),
    Block(3, at_bits(4, PALU, FAR_JOINT), (0.1,), near=NEAR),
    Block(4, FAR_UNIFORM, (0.5,), near=NEAR),
    Block(4, (PALU, FAR_JOINT), (0.2,), near=NEAR),
    Block(4, at_bits("auto", FAR_RIDE), per_number(2, 1.5), near=NEAR),
    Block(4, at_bits(8, PALU, FAR_JOINT), (0.15,), near=NEAR),
    Block(4, (*quantised("half", 16), *quantised("rotated", 8)), **DENSE_DATA),
)
SHORT_FRONTIER = (
    Block(2, AUTO, per_number(2, 1.5, 4, 3, 1)),
    Block(2, quantised("kivi-32", 4, 3, 2, 8), **DENSE_DATA),
    Block(2, quantised("rotated", 4, 3, 2), **DENSE_DATA),
    Block(2, (PALU, JOINT), (0.5, 0.3)),
)

PLANS = {
    "smollm2": Plan(
        "SmolLM2-135M-Instruct, 3 kv heads",
        models.smollm2,
        6,
        (
            Block(1, TOP, (0.5,)),
            Block(1, TOP, (0.3,), probe=True),
            Block(2, BEYOND, (0.3,), near=NEAR, counted=True, probe=True),
            Block(2, (PALU, JOINT, FAR_JOINT), (0.3,), near=NEAR, counted=True, length=LONG, windows=2),
            Block(2, (PALU, JOINT), (0.3,), length=LONG, windows=2),
            Block(2, (FAR_JOINT,), (0.3,)),
            Block(3, REFINED, (0.3,), probe=True),
            Block(3, (replace(FAR_JOINT, refine=32),), (0.3,), near=NEAR, counted=True, probe=True),
            Block(3, TOP, (0.5, 0.3), samples=("1", "2")),
            Block(4, REST, (0.3,)),
            Block(5, REST, (0.5,)),
            Block(5, (UNTRAINED, NESTED), (0.5, 0.3)),
            Block(5, REST, (0.3,), near=NEAR, counted=True),
            Block(5, (Row("cskv"),), (0.5, 0.3), near=(32, 0), counted=True),
            Block(5, (Row("cskv"),), (0.3,), near=(32, 4), counted=True),
            Block(5, (Row("cskv"),), (0.3,), near=(64, 0), counted=True),
            Block(6, BEYOND, (0.3,), near=NEAR),
            Block(6, (FAR_JOINT, PALU, Row("palu", "spectrum")), (0.5, 0.2), near=NEAR, counted=True),
            Block(6, SAMPLED, (0.3,), samples=("16", "64", "news")),
            Block(7, TOP + REST, (0.2, 0.7)),
        ),
        frontier=FRONTIER,
    ),
    "qwen2.5-coder": Plan(
        "Qwen2.5-Coder-0.5B-Instruct, 2 kv heads, biases",
        models.qwen25_coder,
        4,
        (
            Block(1, TOP, (0.5, 0.3)),
            Block(5, (PALU, JOINT, FAR_JOINT), (0.3,), near=NEAR, counted=True),
            Block(6, (Row("palu", "spectrum"),), (0.5, 0.3)),
        ),
        frontier=SHORT_FRONTIER,
    ),
    "smollm2-mha": Plan(
        "SmolLM2 as 9 shuffled kv heads, groups of 3",
        models.smollm2_mha,
        6,
        (
            Block(4, (PALU, RECALKV, *ABLATION, APART, JOINT), (0.3,)),
            Block(7, (PALU, RECALKV, *ABLATION, APART, JOINT), (0.2,)),
        ),
        group_size=3,
    ),
}
DENSE = Row("dense", "")

Settings = dict[str, Any]


def cells(name: str, *, frontier: bool = False) -> Iterator[tuple[int, Settings]]:
    """Stage and settings of every cell of a model, or of its frontier, the dense model's first; each once, at its first
    stage."""
    plan = PLANS[name]
    dense = Block(0, (DENSE,), **DENSE_DATA)
    sizes = dict.fromkeys((b.length, b.windows) for b in plan.blocks)
    probed = any(b.probe for b in plan.blocks)
    own = (replace(dense, length=n, windows=w, probe=probed and n == LENGTH) for n, w in sizes)
    blocks = (*own, *(plan.frontier if frontier else (*plan.blocks, *plan.frontier)))
    seen = []
    for b in sorted(blocks, key=lambda b: b.stage):
        for sample, keep, row in itertools.product(b.samples, b.keeps, b.rows):
            settings = {
                "model": name,
                "sample": sample,
                **settings_of(row),
                "keep": keep,
                "recent": b.near[0],
                "sinks": b.near[1],
                "counted": b.counted,
                "group_size": plan.group_size,
                "length": b.length,
                "windows": b.windows or plan.windows,
                "probe": b.probe,
            }
            if settings not in seen:
                seen.append(settings)
                yield b.stage, settings


def settings_of(row: Row) -> Settings:
    return asdict(row) | {"far": list(row.far)}


def row_of(settings: Settings) -> Row:
    return Row(**{f.name: settings[f.name] for f in fields(Row)} | {"far": tuple(settings["far"])})


def gathered(name: str, sample: str, row: Row) -> list[str]:
    """What a row, and those of the model's plan that take gradients as it does, need of a calibration sample: names of
    moments."""

    def kind(row: Row) -> tuple[tuple[int, int], bool]:
        return row.far, "rotated-metric" in METHODS[row.method].gather

    blocks = (*PLANS[name].blocks, *PLANS[name].frontier)
    rows = {other for b in blocks if sample in b.samples for other in b.rows if kind(other) == kind(row)}
    return sorted(set().union(*(METHODS[row.method].gathered(row.ranks) for row in rows)))


def plain(name: str, sample: str = "0") -> Settings:
    """Of cells without a dense window."""
    return {"model": name, "sample": sample, "recent": 0, "counted": False, "length": LENGTH}


def find(cells: list[Settings], **wanted: Any) -> Settings | None:
    """The first cell with these settings."""
    return next((c for c in cells if wanted.items() <= c.items()), None)
