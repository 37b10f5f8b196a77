"""Tokens of a LatentCache are selected: each layer chooses in the pass that is due, and what it does not keep is gone
before the next pass begins."""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.attention.cache import pack
from lrattn.integrations.transformers.columns import Columns
from lrattn.integrations.transformers.kept import Kept, Rows, cached_sides, gathered, latents_of, moved, rows_of
from lrattn.integrations.transformers.layer import LatentLayer
from lrattn.models.masks import Said
from lrattn.selection import Held, policy_of, shares


def remaining(layer: LatentLayer, said: Said) -> Said:
    """What a mask says of all columns, of those that remain.

    Raises: ValueError where tokens are selected and it says more than where rows begin, or another beginning.
    """
    columns = layer.columns
    if columns.selection is None and not columns.gone:
        return said
    where = f"as selected tokens need in layer {layer.index}"
    if said.window is not None:
        raise ValueError(f"sliding_window: expected attention to all columns, {where}, got {said.window} of them")
    if said.live is not None or said.full is not None:
        expected = "a causal one with padding on the left alone and a token in every row"
        raise ValueError(f"attention_mask: expected {expected}, {where}, got another")
    if not columns.gone:
        return said
    if not columns.written:  # read once a pass
        begun = torch.zeros(columns.batch, dtype=torch.int64) if columns.begun is None else columns.begun.cpu()
        pads = torch.zeros_like(begun) if said.pads is None else said.pads.cpu()
        if not torch.equal(pads, begun):
            raise ValueError(
                f"attention_mask: expected {begun.tolist()} columns of padding, {where}, got {pads.tolist()}"
            )
    return said._replace(pads=None if columns.base is None else columns.base.to(layer.factors.device))


@torch.no_grad()
def choose(layer: LatentLayer, end: int, probabilities: Tensor | None) -> None:
    """layer.chosen: which of its kept tokens and its columns 0 .. end the policy keeps, [B, n + end] bool.

    Layers that share rows choose together, when the last of them has run: by the probabilities of all their heads, and
    by the keys and values of the last. probabilities: [B, Hq, s, n + end] of the last queries, where the policy asks
    for them.
    """
    columns, selection = layer.columns, layer.columns.selection
    assert selection is not None
    given = [] if layer.index == layer.whole.run(layer.index)[0] else layer.holder.given  # none of a pass that failed
    layer.holder.given = given if probabilities is None else [*given, probabilities]
    if layer.holder is not layer:
        return
    holders: list[LatentLayer] = columns.holders
    index, probabilities = holders.index(layer), torch.cat(layer.given, 1) if layer.given else None
    layer.given = []
    live, key = _entries(layer, end)
    order = torch.where(live, key, key.max() + 1).argsort(dim=1, stable=True)
    if probabilities is not None:  # those of tokens that are held otherwise stand before them
        probabilities = probabilities[..., -live.shape[1] :]
        probabilities = probabilities.gather(3, order[:, None, None].expand_as(probabilities))
    lengths = live.sum(1)
    share = shares(selection, len(holders))[index]
    begins = torch.zeros_like(lengths) if columns.first is None else columns.first.to(lengths.device)
    total = end + columns.gone - begins
    zk, zv = latents_of(layer.factors, _rows(layer, end))
    before = holders[index - 1] if index else None
    same = before is not None and before.chosen is not None and _choice(before.kept) is _choice(layer.kept)
    held = Held(
        layer.factors,
        index,
        gathered(zk, order),
        None if zv is None else gathered(zv, order),
        lengths,
        (share * total).floor().long().clamp(max=lengths),
        max(selection.sinks, layer.sinks),
        max(selection.recent, layer.recent, 1),
        probabilities,
        before.chosen.to(order.device).gather(1, order) if same else None,  # type: ignore[union-attr]
    )
    kept = policy_of(selection).kept(held)
    layer.choice = before.choice if before is not None and kept is held.before else object()
    kept = held.live & (kept | held.fixed)
    layer.chosen = torch.zeros_like(live).scatter(1, order, kept)


@torch.inference_mode(False)
@torch.no_grad()
def settle(columns: Columns) -> None:
    """What the last pass chose is kept, and the rest is gone, if it is over and every layer has chosen."""
    layers: list[LatentLayer] = columns.layers
    holders: list[LatentLayer] = columns.holders
    if columns.written or not layers or any(layer.chosen is None for layer in holders):
        return
    assert columns.selection is not None
    columns.chosen_at = columns.count + columns.gone
    count, sinks = columns.count, layers[0].sinks
    cut = count - max(columns.selection.recent, layers[0].recent, 1)
    if cut > sinks:
        kept = [(_kept(layer, cut), _rest(layer)) for layer in holders]
        batch, at = columns.batch, columns.leave(cut)
        for layer, own in zip(holders, kept, strict=True):
            layer.kept, layer.rest = own
            rows = rows_of(layer.factors, layer.pages, batch, 0, count)
            layer.pages = moved(layer.factors, rows, at.to(layer.factors.device), columns.pages)
        for layer in layers:
            layer.moved_back(count, cut, cut - sinks)
    for layer in holders:
        layer.chosen = None


def _kept(layer: LatentLayer, cut: int) -> Kept | None:
    """Of the tokens chosen, those that were kept before and those of columns before `cut` but the window's first."""
    assert layer.chosen is not None
    at, counts = _first(layer.chosen & _older(layer, cut))
    if not at.shape[1]:
        return None
    positions = _positions(layer)
    own = None if positions is None else positions.gather(1, at)
    made = Kept(layer.factors, _rows(layer, layer.columns.count), at, counts, own)
    made.choice = layer.choice
    return made


def _rest(layer: LatentLayer) -> Kept | None:
    """The tokens that were not chosen, now and before, by the factors for them: made of the latents they had. Those of
    the dense window always are chosen."""
    if layer.whole.rest is None:
        return None
    assert layer.chosen is not None
    live, held, others = _entries(layer, layer.columns.count)[0], layer.rest, layer.whole.rest.layers
    factors, run = others[layer.index], [x for x in layer.columns.layers if x.holder is layer]
    at, counts = _first(live & ~layer.chosen)
    positions = _positions(layer)
    own = None if positions is None else positions.gather(1, at)
    zk, zv = latents_of(layer.factors, _rows(layer, layer.columns.count))
    zk, zv = gathered(zk, at), None if zv is None else gathered(zv, at)
    wide = len(run) > 1
    parts = [others[x.index].project(*x.factors.rebuild(zk, zv, own), own, wide=wide) for x in run]
    latents = (torch.stack([z for z, _ in parts]).sum(0).to(factors.dtype), None) if wide else parts[0]
    made = [pack(side, z) for side, z in zip(cached_sides(factors), latents, strict=False) if z is not None]
    if held is None and not at.shape[1]:
        return None
    if held is None:
        return Kept(factors, made, torch.arange(at.shape[1], device=at.device).expand_as(at), counts, own)
    rows = [[torch.cat(pair, 1) for pair in zip(*sides, strict=True)] for sides in zip(held.rows, made, strict=True)]
    there = torch.arange(at.shape[1], device=at.device) < counts[:, None]
    at, counts = _first(torch.cat((held.live, there), 1))
    if own is not None and held.positions is not None:  # in the order of the text
        own = torch.cat((held.positions[:, : held.most].to(own.dtype), own), 1).gather(1, at)
        dead = torch.arange(at.shape[1], device=at.device) >= counts[:, None]
        order = own.masked_fill(dead, torch.iinfo(own.dtype).max).argsort(dim=1, stable=True)
        at, own = at.gather(1, order), own.gather(1, order)
    return Kept(factors, rows, at, counts, own)


def _first(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row is true, in order, [B, most], and how often, [B]."""
    counts = wanted.sum(1)
    return (~wanted).int().argsort(dim=1, stable=True)[:, : int(counts.max())], counts


def _older(layer: LatentLayer, cut: int) -> Tensor:
    """Which of kept tokens and columns are those kept and the columns before `cut`, but for the window's first."""
    columns, n, device = layer.columns, 0 if layer.kept is None else layer.kept.most, layer.factors.device
    place = torch.arange(-n, columns.count, device=device)
    base = 0 if columns.base is None else columns.base.to(device)[:, None]
    return (place < 0) | ((place >= base + layer.sinks) & (place < cut))


def _positions(layer: LatentLayer) -> Tensor | None:
    """Of kept tokens and columns, [B, n + count], as their keys were turned to; None: they are not."""
    positions = layer.columns.positions_of(layer.factors, 0, layer.columns.count)
    if positions is None or layer.kept is None or layer.kept.positions is None:
        return positions
    return torch.cat((layer.kept.positions[:, : layer.kept.most].to(positions.dtype), positions), 1)


def _entries(layer: LatentLayer, end: int) -> tuple[Tensor, Tensor]:
    """Of kept tokens and then of columns: which are there, [B, n + end] bool, and their order, [1, n + end].

    Between the first columns of the dense window and the others lie those that were kept.
    """
    columns, device = layer.columns, layer.factors.device
    place = torch.arange(end, device=device)[None]
    live = (place >= 0).expand(columns.batch, -1)
    if columns.base is not None:
        live = place >= columns.base.to(device)[:, None]
    if layer.kept is None:
        return live, place
    n = layer.kept.most
    key = torch.cat((layer.sinks + torch.arange(n, device=device)[None], place + n * (place >= layer.sinks)), 1)
    return torch.cat((layer.kept.live, live), 1), key


def _rows(layer: LatentLayer, end: int) -> Rows:
    """Of kept tokens and then of columns 0 .. end."""
    rows = rows_of(layer.factors, layer.pages, layer.columns.batch, 0, end)
    if layer.kept is None:
        return rows
    return [
        [torch.cat(pair, 1) for pair in zip(*sides, strict=True)] for sides in zip(layer.kept.rows, rows, strict=True)
    ]


def _choice(kept: Kept | None) -> object:
    return None if kept is None else kept.choice
