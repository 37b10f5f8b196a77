"""All of a text through a model at once, layer by layer: what reaches a layer when those before it run on factors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lrattn.compression.batches import Batch, positions_in, tokens_of
from lrattn.compression.substitute import substituted
from lrattn.compression.sums import second_moment, with_one
from lrattn.factors.layer import LayerFactors
from lrattn.models.interface import decoder_of, device_of
from lrattn.models.layers import AttentionLayer
from lrattn.models.states import evaluating


def propagate(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    batches: Iterable[Batch],
    factor: Callable[[int, Tensor], LayerFactors],
) -> None:
    """Calls factor(i, moment of [v, 1]) once for each layer in turn, when the values v of all tokens have reached it.

    Every batch is a pass of its own in a thread of its own, which waits at each layer for the others; one runs at a
    time. What waits is kept: a few numbers E a token. The model is not changed.

    Args:
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask.
        factor: (layer, [n + 1, n + 1] float64) -> the factors that the layer runs on.

    Raises: what a pass or `factor` raises.
    """
    device, decoder = device_of(model), decoder_of(model)
    passes = [
        (ids.to(device), None if live is None else live.to(device)) for ids, live in map(tokens_of, batches) if len(ids)
    ]
    totals = [torch.zeros(layer.dense + 1, layer.dense + 1, dtype=torch.float64) for layer in layers]
    made: list[LayerFactors] = []
    own = threading.local()  # .live and .positions of a thread's batch
    turn = threading.Semaphore(1)

    def arrived() -> None:
        made.append(factor(len(made), totals[len(made)]))

    together = threading.Barrier(len(passes), action=arrived)

    def replace(i: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        rows = values.flatten(2)
        rows = rows.flatten(0, 1) if own.live is None else rows[own.live.to(rows.device)]
        totals[i] += second_moment(with_one(rows))
        turn.release()
        together.wait()
        turn.acquire()
        layer = made[i]
        at = None if layer.rope is None else own.positions.to(k.device)
        found = layer.rebuild(*layer.project(keys, values, at), at)
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    def run(ids: Tensor, live: Tensor | None) -> None:
        own.live, own.positions = live, positions_in(ids, live)
        arguments = {} if live is None else {"attention_mask": live.long(), "position_ids": own.positions}
        turn.acquire()
        try:
            with torch.no_grad():
                decoder(input_ids=ids, use_cache=False, **arguments)
        except BaseException:
            together.abort()
            raise
        finally:
            turn.release()

    with evaluating(model), substituted(model, layers, replace), ThreadPoolExecutor(len(passes)) as pool:
        try:
            _finish([pool.submit(run, *batch) for batch in passes])
        except BaseException:
            together.abort()
            raise


def _finish(passes: Sequence[Future[None]]) -> None:
    """Waits for all; what one raised is raised, and not that others waited for it in vain."""
    errors = [error for error in (one.exception() for one in passes) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
