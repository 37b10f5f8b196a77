"""What is measured on each model: blocks of rows, each a way to make factors, at some kept shares.

A new row is one line in one of the tuples below. Stages say what is measured first, over all models: a run may be
stopped anytime.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bench import models
from lrattn.methods import METHODS
from lrattn.problem import Form

LENGTH = 1024  # tokens of a window
LONG = 4096
NEAR = (64, 4)  # recent tokens and sinks of the dense window


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
    """A way to make factors: arguments of lrattn.compress.

    refine: steps of distillation, on the windows after the sample's. nested: once at full rank, for cuts to every keep.
    """

    method: str
    ranks: str = "spectrum"
    shared: Form | None = None
    far: tuple[int, int] = (0, 0)
    refine: int = 0
    nested: bool = False

    @property
    def label(self) -> str:
        """Two words or three, for a table or a curve."""
        form = {None: "", False: " apart", "ride": " ride", True: " joint"}[self.shared]
        ranks = f" {self.ranks}" if self.shared is None and self.ranks else ""
        trained = f" {'nested' if self.nested else 'refined'} {self.refine}" if self.refine else ""
        return f"{self.method}{form}{ranks}{trained}{' far' if any(self.far) else ''}"


@dataclass(frozen=True)
class Block:
    """Every row at every kept share, of every calibration sample.

    near: recent tokens and sinks of a dense window. counted: its bytes at `length` tokens are within the kept share,
    else beside it. probe: bench.probe, too. length: tokens of an evaluation window. windows: instead of the plan's.
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
    """windows: of each evaluation text."""

    title: str
    load: Callable[[], Any]
    windows: int
    blocks: tuple[Block, ...]
    group_size: int = 4

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of all blocks of plain windows without a dense window, each once."""
        plain = (b for b in self.blocks if not any(b.near) and b.length == LENGTH)
        return tuple(dict.fromkeys(row for b in plain for row in b.rows))

    @property
    def beyond(self) -> tuple[tuple[int, tuple[int, int], Row], ...]:
        """Length, dense window and row of all blocks that have such a window, each once."""
        near = (b for b in sorted(self.blocks, key=lambda b: b.length) if any(b.near))
        return tuple(dict.fromkeys((b.length, b.near, row) for b in near for row in b.rows))

    @property
    def keeps(self) -> tuple[float, ...]:
        """Of all blocks, from the largest."""
        return tuple(sorted({keep for b in self.blocks for keep in b.keeps}, reverse=True))


APART, RIDE, JOINT = (Row("lrattn", shared=form) for form in (False, "ride", True))
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


def cells(name: str) -> Iterator[tuple[int, Settings]]:
    """Stage and settings of every cell of a model, the dense model's first; each once, at its first stage."""
    plan = PLANS[name]
    dense = Block(0, (DENSE,), (1.0,), samples=("",))
    sizes = dict.fromkeys((b.length, b.windows) for b in plan.blocks)
    probed = any(b.probe for b in plan.blocks)
    own = (replace(dense, length=n, windows=w, probe=probed and n == LENGTH) for n, w in sizes)
    blocks = (*own, *plan.blocks)
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


def gathered(name: str, sample: str) -> list[str]:
    """What the rows of a model's plan without a dense window need of a calibration sample: names of moments."""
    rows = {row for b in PLANS[name].blocks if sample in b.samples for row in b.rows if not any(row.far)}
    return sorted(set().union(*(METHODS[row.method].gathered(row.ranks) for row in rows)))


def plain(name: str, sample: str = "0") -> Settings:
    """Of cells without a dense window."""
    return {"model": name, "sample": sample, "recent": 0, "counted": False, "length": LENGTH}


def find(cells: list[Settings], **wanted: Any) -> Settings | None:
    """The first cell with these settings."""
    return next((c for c in cells if wanted.items() <= c.items()), None)
