"""Runs of neighbouring layers that share rows: what they have to have in common, and what each has of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lrattn.factors.layer import LayerFactors
from lrattn.factors.rope import Rope
from lrattn.models.layers import AttentionLayer


def run_ropes(ropes: Sequence[Rope | None], span: int) -> list[Rope | None]:
    """Of each run of layers, whose keys turn alike. Raises: ValueError where they do not."""
    for i, rope in enumerate(ropes):
        if rope != ropes[i - i % span]:
            raise ValueError(f"span: expected the rope of layer {i - i % span} in layer {i}, which shares its rows")
    return list(ropes[::span])


def divided(made: Sequence[LayerFactors], runs: Sequence[AttentionLayer]) -> Iterator[LayerFactors]:
    """The factors of each layer of runs that share rows: its own heads of `up`, and its part of `down`, which adds up
    with the others'."""
    for whole, run in zip(made, runs, strict=True):
        parts = len(run.members)
        if parts == 1:
            yield whole
            continue
        downs = whole.values.down.unflatten(0, (2, parts, -1)).unbind(1)  # type: ignore[union-attr]
        ups = [[x.contiguous() for x in side.up.chunk(parts)] for side in (whole.keys, whole.values)]
        offsets = [
            [None] * parts if side.offset is None else [x.contiguous() for x in side.offset.chunk(parts)]
            for side in (whole.keys, whole.values)
        ]
        for i, down in enumerate(downs):
            keys, values = (
                replace(side, up=ups[s][i], offset=offsets[s][i], head_order=None, down=None)
                for s, side in enumerate((whole.keys, whole.values))
            )
            yield replace(whole, keys=keys, values=replace(values, down=down.flatten(0, 1).contiguous()))
