"""Which tokens a cache keeps, as a record: the name of a policy and its numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lrattn.factors.shapes import check_tokens


@dataclass(frozen=True)
class Selection:
    """What a cache drops of what it has read, and when. The same tokens are kept for all heads of a layer.

    Args:
        policy: of lrattn.selection.POLICIES; it says which.
        keep: share of the tokens that are kept, in (0, 1], over all layers, recent and first ones included. None: as
            many as the policy finds, which some do without.
        every: 0: once, after the first pass. n: after it, and again whenever n more tokens have come.
        recent, sinks: the last and the first tokens of a text, always kept; as many as the dense window holds at least.

    Raises: ValueError for numbers that make no sense.
    """

    policy: str
    keep: float | None = None
    every: int = 0
    recent: int = 32
    sinks: int = 4

    @classmethod
    def of(cls, select: Selection | str | None) -> Selection | None:
        """Given as it is, or in words: "curdkv", "curdkv:0.5", "curdkv:0.5:256", a policy, `keep` and `every`.

        Raises: ValueError for anything else.
        """
        if select is None or isinstance(select, Selection):
            return select
        if not isinstance(select, str):
            raise ValueError(f"select: expected None, a Selection or its words, got {type(select).__name__}")
        if not (found := re.fullmatch(r"([^:]+)(?::(\d+\.?\d*|\.\d+|))?(?::(\d+))?", select)):
            raise ValueError(f"select: expected a policy, or policy:share or policy:share:every, got {select!r}")
        name, keep, every = found.groups()
        return cls(name, float(keep) if keep else None, int(every or 0))

    def __str__(self) -> str:
        share = "" if self.keep is None else f"{self.keep:g} "
        return f"{share}by {self.policy}" + (f", every {self.every}" if self.every else "")

    def __post_init__(self) -> None:
        if self.keep is not None and not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise ValueError(f"keep: expected None or a share of the tokens in (0, 1], got {self.keep!r}")
        check_tokens(every=self.every, recent=self.recent, sinks=self.sinks)
