"""Other keys and values in a model's attention: what its loss feels of them, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.attention.dense import Near, causal_attention
from lrattn.factors.parts import AttentionParts, attention_parts, shadowed

# (layer, attention inputs [b, t, E], keys and values [b, t, Hkv * D]) -> others in place of the two
Replace = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Window:
    """What a query is given exactly: its `recent` last tokens, itself included, and the first `sinks`."""

    recent: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        for name in ("recent", "sinks"):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise ValueError(f"{name}: expected a number of tokens, 0 or more, got {n!r}")

    @classmethod
    def of(cls, far: Sequence[int]) -> Window:
        """Of two numbers, recent and sinks. Raises: ValueError for anything else."""
        if not isinstance(far, Sequence) or isinstance(far, str) or len(far) != 2:
            raise ValueError(f"far: expected (recent, sinks), got {far!r}")
        return cls(*far)

    def __bool__(self) -> bool:
        return self.recent > 0 or self.sinks > 0


@contextmanager
def substituted(
    model: nn.Module, replace: Replace, window: Window = Window(), *, rotated: bool = False
) -> Iterator[None]:
    """Inside, every attention layer runs on the keys and values that `replace` returns, before norm and rotation.

    With a window, each query still has its own layer's exact keys and values of the tokens in it: only what is far
    from a query is replaced. rotated: keys are given and returned after norm and rotation. With either, sequences are
    whole and without padding. Gradients pass through all keys and values.
    """
    parts = attention_parts(model)
    with ExitStack() as stack:
        for i, part in enumerate(parts):
            if window or rotated:
                forward = _attention(part, i, replace, window, rotated)
                stack.enter_context(shadowed(part.module, "forward", forward))
            else:
                for hook in _hooks(part, i, replace):
                    stack.callback(hook.remove)
        yield


def _hooks(part: AttentionParts, i: int, replace: Replace) -> Iterator[Any]:
    """Replaces what k_proj and v_proj return, whatever the model does with it; the two are computed by either."""
    others: dict[str, Tensor] = {}
    k_proj, v_proj = part.linear("k_proj"), part.linear("v_proj")

    def keys(_: nn.Module, args: tuple[Tensor, ...], k: Tensor) -> Tensor:
        raw = nn.functional.linear(args[0], v_proj.weight, v_proj.bias)
        k, others["v"] = replace(i, args[0], k, raw)
        return k

    def values(_: nn.Module, __: tuple[Tensor, ...], ___: Tensor) -> Tensor:
        return others.pop("v")

    yield k_proj.register_forward_hook(keys)
    yield v_proj.register_forward_hook(values)


def _attention(
    part: AttentionParts, i: int, replace: Replace, window: Window, rotated: bool
) -> Callable[..., tuple[Tensor, None]]:
    """The attention module's forward, near tokens exact and far ones replaced."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, part.head_dim))

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        at = positions.expand(len(hidden_states), -1)
        q = part.rotated("q", hidden_states, at)
        k, v = (part.linear(f"{side}_proj")(hidden_states) for side in "kv")
        keys = part.turned("k", split(k), at)
        far_k, far_v = replace(i, hidden_states, keys.flatten(2) if rotated else k, v)
        far_keys = split(far_k) if rotated else part.turned("k", split(far_k), at)
        values, far_values = split(v), split(far_v)
        heads = [
            causal_attention(
                q[b],
                far_keys[b],
                far_values[b],
                part.scale,
                part.window,
                Near(keys[b], values[b], positions, window.recent, window.sinks) if window else None,
            )
            for b in range(len(q))
        ]
        return part.linear("o_proj")(torch.stack(heads).flatten(2)), None

    return forward
