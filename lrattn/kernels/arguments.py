"""What a call of the kernels is given beside a layer: where tokens lie, by latents or as they are, and the softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from lrattn.factors.operands import Keys, Values


@dataclass(frozen=True, eq=False)
class Near:
    """The dense window: a few tokens of each sequence as attention is given them, keys rotated, beside their latents.

    The first `sinks` tokens of a sequence lie in its first rows and stay there. Token t behind them, counted from the
    sequence's begin, lies in row sinks + t % slots, where it takes the place of token t - slots.

    Args:
        keys, values: [n, sinks + slots, Hkv, D] in the layer's dtype, for decode_attention and write_near. The last
            axis is contiguous; they may be slices of one tensor. No row is read before it was written.
        recent: tokens that a query sees as they are beside the first, the last ones, its own included. Slots that are
            more take several queries a call, and tokens that are taken back.
        rows: [B] int32, which of the n each sequence of the batch has; of a number outside 0 .. n nothing is read or
            written. Default 0 .. B.
        firsts: [B] int32, the token in each sequence's first row, before which none is seen. Default seq_starts.
    """

    keys: Tensor
    values: Tensor
    sinks: int
    recent: int
    rows: Tensor | None = None
    firsts: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.keys.shape[1] - self.sinks

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.values, self.rows, self.firsts

    @classmethod
    def of_lists(cls, tensors: Any, numbers: Any) -> Near:
        """From what `tensors` gives, and sinks and recent."""
        return cls(*tensors[:2], *numbers, *tensors[2:])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, for all n."""
        return self.keys.nbytes + self.values.nbytes

    def of(self, some: slice) -> Near:
        """That of some of the sequences."""
        rows, firsts = (None if x is None else x[some] for x in (self.rows, self.firsts))
        keys, values = (self.keys[some], self.values[some]) if rows is None else (self.keys, self.values)
        return replace(self, keys=keys, values=values, rows=rows, firsts=firsts)


@dataclass(eq=False)
class Tokens:
    """Where the tokens of each sequence lie, and how kernels are told: once a call, not at each launch."""

    pages: Tensor  # [B, pages] int32
    lens: Tensor  # [B] int32
    starts: Tensor | None  # [B] int32
    positions: Tensor | None  # [N, P] int32
    bound: int  # lengths are clamped to it
    offsets: Tensor | None = None  # [B] int32: the position of token t is t - offset, where keys go by chunks
    near: Near | None = None  # some of them as they are

    def __post_init__(self) -> None:
        near = self.near
        self.paged = self.pages, self.pages.stride()[0]
        self.seen = self.lens, self.lens.stride()[0], self.starts, stride(self.starts)
        self.lag = self.offsets, stride(self.offsets)
        self.placed = self.positions, (0, 0) if self.positions is None else self.positions.stride()
        self.placed_apart = self.positions is not None or self.offsets is not None  # not by index in the sequence
        self.recent = 0 if near is None else min(near.recent, self.bound)  # last tokens a query sees as they are
        # The first tokens from `starts` on that are seen as they are; 0 where `latents` has them in starts.
        self.skipped = 0 if near is None or near.firsts is not None else near.sinks

    @property
    def latents(self) -> Tokens:
        """With starts behind the first rows, where these do not begin with the sequence."""
        if self.near is None or self.near.firsts is None:
            return self
        begins = self.near.firsts.clamp(0, self.bound) + self.near.sinks
        return replace(self, starts=begins if self.starts is None else begins.maximum(self.starts))

    def of(self, some: slice) -> Tokens:
        """The tokens of some of the sequences."""
        starts, offsets = (None if x is None else x[some] for x in (self.starts, self.offsets))
        near = None if self.near is None else self.near.of(some)
        return Tokens(self.pages[some], self.lens[some], starts, self.positions, self.bound, offsets, near)


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


class Form(NamedTuple):
    """Of a call, what its launches are chosen and compiled by, beside a layer's sizes."""

    num_queries: int  # S
    query_heads: int  # Hq
    page_size: int  # P
    causal: bool
    windowed: bool
    capped: bool


@dataclass(eq=False)
class Call:
    """What is attended with, and to."""

    q: Tensor  # [B, S, Hq, D]
    ck: Tensor  # [N, P, width]
    cv: Tensor | None  # [N, P, width]; None: a row serves both
    keys: Keys
    values: Values
    tokens: Tokens
    rule: Rule

    def __post_init__(self) -> None:
        """limits: bound, S and window, which kernels of the latents take in this order, most behind scale and softcap.

        window: tokens that a query sees back by their latents; how many, the last, it sees as they are; how many more
        from where each sequence starts. None, not 0, of the last two: kernels are then compiled without.
        """
        rule, tokens, (_, num_queries, heads, _) = self.rule, self.tokens, self.q.shape
        window = rule.window - tokens.recent, tokens.recent or None, tokens.skipped or None
        self.limits = tokens.bound, num_queries, window
        self.numbers = rule.scale, rule.softcap, *self.limits
        self.form = Form(num_queries, heads, self.ck.shape[1], rule.causal, rule.window > 0, rule.softcap > 0)

    @property
    def far(self) -> tuple[int, int]:
        """A bound of the tokens that are seen by their latents, 0 where none is, and their window, 0 without one."""
        return far(self.tokens.bound, self.rule.window, self.tokens.recent, self.tokens.skipped)

    @property
    def latents(self) -> Call:
        """As kernels of the latents take it."""
        tokens = self.tokens.latents
        return self if tokens is self.tokens else replace(self, tokens=tokens)

    def of(self, some: slice) -> Call:
        """The same for some of the sequences."""
        return replace(self, q=self.q[some], tokens=self.tokens.of(some))


def stride(x: Tensor | None) -> int:
    """Of the first axis."""
    return 0 if x is None else x.stride()[0]


def strides_of(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Of an operand of so many axes that may be missing."""
    return (0,) * axes if x is None else x.stride()


def far(bound: int, window: int, recent: int, skipped: int) -> tuple[int, int]:
    """As Call.far, where a query sees its last `recent` tokens as they are, and the first `skipped` of the sequence."""
    recent = min(recent, bound)
    if bound - recent <= skipped or 0 < window <= recent:
        return 0, 0
    return bound - recent, max(window - recent, 0)
