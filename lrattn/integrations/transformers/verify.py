"""Does a model's attention compute what its parts say? Tried once, before anything relies on it."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lrattn.integrations.transformers.dense import causal_attention
from lrattn.parts import AttentionParts, decoder_of

TOKENS = 8
_VERIFIED: WeakSet[nn.Module] = WeakSet()


@torch.no_grad()
def verify(model: nn.Module, parts: list[AttentionParts]) -> None:
    """Runs each attention module, and plain attention built from its parts, on the same random inputs.

    Inputs are scaled so that scores are of order one: a rotation in other pairs, a missing norm or a scale would
    show. Once per model.

    Raises: ValueError naming the first module that computes something else.
    """
    if model in _VERIFIED:
        return
    calls: dict[int, dict[str, Any]] = {}

    def watch(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[i] = {n: v for n, v in kwargs.items() if n != "hidden_states"}

        return hook

    device = next(model.parameters()).device
    hooks = [p.module.register_forward_pre_hook(watch(i), with_kwargs=True) for i, p in enumerate(parts)]
    training = model.training
    model.eval()
    try:
        decoder_of(model)(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64, device=device), use_cache=False)
        for hook in hooks:
            hook.remove()
        for i, part in enumerate(parts):
            _compare(part, calls[i])
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    _VERIFIED.add(model)


def _compare(part: AttentionParts, call: dict[str, Any]) -> None:
    q_weight = part.linear("q_proj").weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, q_weight.shape[1], generator=generator).to(q_weight)
    q, k, _ = _heads(part, x)
    groups = q.shape[2] // k.shape[2]
    spread = (
        torch.einsum("bshd,bthd->bhst", q.float(), k.float().repeat_interleave(groups, 2)).std().item() * part.scale
    )
    if 0 < spread < 2:
        x = x * (2 / spread) ** 0.5
    q, k, v = _heads(part, x)
    expected = part.module(x, **call)[0]
    got = part.linear("o_proj")(causal_attention(q[0], k[0], v[0], part.scale, part.window).flatten(1))[None]
    error = ((got - expected).float().norm() / expected.float().norm()).item()
    if not error < 4 * torch.finfo(x.dtype).eps ** 0.5:
        raise ValueError(
            f"model: {part.name} ({type(part.module).__name__}) cannot attend on latents: plain attention made of its "
            f"parts differs from it by {error:.1e} (other pairs of RoPE, a layer without it, or a step of its own)"
        )


def _heads(part: AttentionParts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, T, H, D] of the uncompressed layer, rotated."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    q, k, v = (part.linear(f"{n}_proj")(x).unflatten(-1, (-1, part.head_dim)) for n in "qkv")
    q, k = (
        x if (norm := getattr(part.module, f"{n}_norm", None)) is None else norm(x) for n, x in (("q", q), ("k", k))
    )
    return part.rope.rotate(q, positions), part.rope.rotate(k, positions), v
