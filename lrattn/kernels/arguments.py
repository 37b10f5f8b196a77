"""What a call of the kernels is given beside a layer: where the tokens lie, and the softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lrattn.factors.operands import Keys, Values


class Tokens(NamedTuple):
    """Where the tokens of each sequence lie."""

    pages: Tensor  # [B, pages] int32
    lens: Tensor  # [B] int32
    starts: Tensor | None  # [B] int32
    positions: Tensor | None  # [N, P] int32
    bound: int  # lengths are clamped to it
    offsets: Tensor | None = None  # [B] int32: the position of token t is t - offset, where keys go by chunks

    @property
    def held(self) -> tuple[Any, ...]:
        """pages, lens and starts as kernels take them, each with its stride."""
        starts_stride = 0 if self.starts is None else self.starts.stride(0)
        return self.pages, self.pages.stride(0), self.lens, self.lens.stride(0), self.starts, starts_stride

    @property
    def lag(self) -> tuple[Any, ...]:
        """offsets and their stride."""
        return self.offsets, 0 if self.offsets is None else self.offsets.stride(0)

    @property
    def placed_apart(self) -> bool:
        """Whether positions are not the indices in the sequence."""
        return self.positions is not None or self.offsets is not None

    @property
    def placed(self) -> tuple[Any, ...]:
        """positions and their strides."""
        return self.positions, (0, 0) if self.positions is None else self.positions.stride()

    def of(self, some: slice) -> Tokens:
        """The tokens of some of the sequences."""
        starts, offsets = (None if x is None else x[some] for x in (self.starts, self.offsets))
        return self._replace(pages=self.pages[some], lens=self.lens[some], starts=starts, offsets=offsets)


class Rule(NamedTuple):
    """How scores become probabilities, and who sees what."""

    scale: float
    softcap: float  # 0: none
    causal: bool
    window: int  # 0: none


class Span(NamedTuple):
    """Tiles of every sequence, and in how many equal parts they are cut: one to a program."""

    first_tile: int
    tiles: int
    parts: int


class Call(NamedTuple):
    """What is attended with, and to."""

    q: Tensor  # [B, S, Hq, D]
    ck: Tensor  # [N, P, width]
    cv: Tensor | None  # [N, P, width]; None: a row serves both
    keys: Keys
    values: Values
    tokens: Tokens
    rule: Rule

    @property
    def numbers(self) -> tuple[float, float, int, int, int]:
        """scale, softcap, bound, S and window, which kernels take in this order."""
        rule = self.rule
        return rule.scale, rule.softcap, self.tokens.bound, self.q.shape[1], rule.window

    def of(self, some: slice) -> Call:
        """The same for some of the sequences."""
        return self._replace(q=self.q[some], tokens=self.tokens.of(some))
