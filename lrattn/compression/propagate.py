"""Layer by layer through a model: what reaches a layer when all layers before it run on their factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.compression.batches import Batch, tokens_of
from lrattn.compression.calibrate import second_moment
from lrattn.factors.layer import LayerFactors
from lrattn.factors.parts import AttentionParts, attention_parts, decoder_of, evaluating, shadowed


class Propagation:
    """The calibration tokens on their way through a model: their hidden states between two layers.

    Call `moment` and then `advance` for each layer in turn. The hidden states are kept, tokens * E numbers in the
    model's dtype; layers other than the one asked for do not run. The model is not changed.

    Args:
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self.model, self.parts = model, attention_parts(model)
        self.decoder = decoder_of(model)
        self.layers: list[nn.Module] = list(self.decoder.layers)  # type: ignore[arg-type]
        self.batches = [tokens_of(batch) for batch in batches]
        self.hidden: list[Tensor | None] = [None] * len(self.batches)  # None: as the model embeds the tokens
        self.layer = 0

    def moment(self) -> Tensor:
        """Second moment of the attention inputs of the next layer, [E, E] float64 on the CPU."""
        linear = self.parts[self.layer].linear("k_proj")
        total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
        live: Tensor | None = None

        def reach(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(second_moment(args[0], live))
            raise _Reached

        hook = linear.register_forward_pre_hook(reach)
        try:
            for n in range(len(self.batches)):
                live = self.batches[n][1]
                with suppress(_Reached):  # what comes after the inputs is not needed
                    self._run(n)
        finally:
            hook.remove()
        return total

    def advance(self, factors: LayerFactors) -> None:
        """Runs the next layer on its factors."""
        with _rebuilt(self.parts[self.layer], factors):
            self.hidden = [self._run(n) for n in range(len(self.batches))]
        self.layer += 1

    @torch.no_grad()
    def _run(self, n: int) -> Tensor:
        """The next layer on batch n: hidden states [b, t, E] after it."""
        out: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden = self.hidden[n]
            return None if hidden is None else (hidden, *args[1:])

        def leave(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
            out.append(result[0] if isinstance(result, tuple) else result)

        ids, live = self.batches[n]
        device = next(self.model.parameters()).device
        arguments = {} if live is None else {"attention_mask": live.to(device).long()}
        layer = self.layers[self.layer]
        with ExitStack() as stack, evaluating(self.model):
            for other in self.layers:
                if other is not layer:
                    stack.enter_context(shadowed(other, "forward", lambda hidden, *_, **__: hidden))
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
            self.decoder(input_ids=ids.to(device), use_cache=False, **arguments)
        return out[0]


class _Reached(Exception):
    """The inputs of the layer are known."""


@contextmanager
def _rebuilt(part: AttentionParts, factors: LayerFactors) -> Iterator[None]:
    """Inside, the layer's key and value projections are the low-rank maps of its factors."""

    def low_rank(weight: Tensor) -> Any:
        def hook(linear: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            return nn.functional.linear(args[0], weight, linear.bias)  # type: ignore[arg-type]

        return hook

    with ExitStack() as stack:
        for name, side in zip(("k_proj", "v_proj"), factors.sides, strict=True):
            weight = side.dense().flatten(0, 1)
            stack.callback(part.linear(name).register_forward_hook(low_rank(weight)).remove)
        yield
