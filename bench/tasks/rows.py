"""The caches that tasks are done on: dense, latents by the default form, and quantised ones, with one dense window."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import lrattn
from bench.evaluation.quality_plan import LENGTH, NEAR, PLANS
from bench.evaluation.quantised import bytes_held
from bench.evaluation.reader import Reader
from bench.support import models, texts
from bench.tasks.held import held_cache
from lrattn import Factors
from lrattn.integrations.transformers import LatentCache
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import attention_set
from lrattn.models.layers import attention_layers

MODEL = "qwen2.5-coder"
USE = "code and chats"  # what the tasks are about: code, and chats in which functions are finished
WINDOWS, CHATS = {USE: 6, "code": 12, "wikipedia": 6}, {USE: 24}  # of LENGTH tokens; and chats of as many at most


@dataclass(frozen=True)
class Row:
    """keep: bytes of a token over a dense cache's, of latents made by the default, calibrated on `text`; shared: in one
    row for keys and values. quantiser: of evaluation/quantisers.py, at `bits`. window: whether the dense window is
    beside. Without keep and quantiser: a dense cache."""

    name: str
    keep: float | None = None
    text: str = USE
    shared: bool = False
    quantiser: str = ""
    bits: int = 16
    window: bool = True

    @property
    def near(self) -> tuple[int, int]:
        return NEAR if self.window else (0, 0)

    @property
    def dense(self) -> bool:
        return self.keep is None and not self.quantiser


DENSE = Row("dense")
ROWS = (
    DENSE,
    Row("lrattn 1/8", 1 / 8),
    Row("lrattn 1/16, one row", 1 / 16, shared=True),
    Row("kivi 2 bits", quantiser="kivi-32", bits=2),
    Row("rotated 3 bits", quantiser="rotated", bits=3),
    Row("lrattn 1/8, one row", 1 / 8, shared=True),
    Row("lrattn 1/8, calibrated on code", 1 / 8, "code"),
    Row("lrattn 1/8, calibrated on Wikipedia", 1 / 8, "wikipedia"),
    Row("kivi 4 bits", quantiser="kivi-32", bits=4),
    Row("rotated 4 bits", quantiser="rotated", bits=4),
    Row("lrattn 1/4", 1 / 4),
    Row("kivi 3 bits", quantiser="kivi-32", bits=3),
    Row("lrattn 1/8, no window", 1 / 8, window=False),
    Row("lrattn 1/4, no window", 1 / 4, window=False),
    Row("kivi 3 bits, no window", quantiser="kivi-32", bits=3, window=False),
    Row("rotated 4 bits, no window", quantiser="rotated", bits=4, window=False),
    Row("rotated 3 bits, no window", quantiser="rotated", bits=3, window=False),
)


class Subject(Reader):
    """The model, at a dtype, and the caches it reads in. Its logits are float32: at 16 bits many tokens are equal."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model, self.tokenizer = PLANS[MODEL].load()
        self.model.to(dtype)
        self.dtype = dtype
        self.model.lm_head.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
        self.layers = attention_layers(self.model)
        self.folder = models.kept()

    @cached_property
    def dense_bytes(self) -> int:
        """Of a token, 16-bit."""
        return sum(4 * layer.dense for layer in self.layers)

    def factors(self, row: Row) -> Factors:
        """Kept in a file; the calibration too."""
        name = f"tasks-{MODEL}-{row.text.replace(' ', '-')}-{'+'.join(map(str, row.near))}"
        path = self.folder / f"{name}-{row.keep:.5f}{'-shared' * row.shared}.factors"
        if not path.is_file():
            if self.dtype != torch.float32:
                raise ValueError(f"row {row.name!r}: expected its factors to be there, made by a float32 model")
            state = self.folder / f"{name}.moments"
            more: dict[str, Any] = {"keep": row.keep, "shared": row.shared, "far": row.near, "state": state}
            made = lrattn.compress(self.model, self.calibration(row.text), **more)
            with models.written_once(path) as partial:
                made.save(partial)
        return Factors.load(path).to(dtype=self.dtype)

    def calibration(self, name: str) -> list[Tensor]:
        """Token ids [1, t], none of which a task reads."""
        read = {"wikipedia": texts.wikipedia}.get(name, texts.code)
        windows = read_windows(self.tokenizer, read("calibration"), LENGTH, WINDOWS[name])
        return [*windows.split(1), *texts.chats(self.tokenizer, "calibration", CHATS.get(name, 0), LENGTH)]

    def bytes_per_token(self, row: Row) -> float:
        """Of all layers, the window aside."""
        if row.dense:
            return self.dense_bytes
        if row.quantiser:
            return bytes_held(self.model, row.quantiser, row.bits, 0, 0, ())[0]
        return self.factors(row).bytes_per_token

    def using(self, row: Row) -> Using:
        return Using(self, row)


class Using:
    """A row's caches; `inside` is what the model is used in."""

    def __init__(self, subject: Subject, row: Row) -> None:
        self.subject, self.row = subject, row
        self.factors = None if row.keep is None else subject.factors(row)

    @property
    def inside(self) -> AbstractContextManager[object]:
        return nullcontext() if self.factors is None else attention_set(self.subject.model, "lrattn")

    def cache(self, starts: Tensor | None = None) -> Any:
        """An empty one; starts: of rows with padding on their left."""
        if self.factors is not None:
            return LatentCache(self.factors)
        if self.row.quantiser:
            near = self.row.near
            return held_cache(len(self.subject.layers), self.row.quantiser, self.row.bits, *near, starts)
        return DynamicCache()
