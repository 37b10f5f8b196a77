"""The parts of a model's attention layers: what is factored, and what is computed around it.

Duck-typed on modules as transformers writes them; nothing is imported from there. A model whose attention has
other parts is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.factors.projection import KeyNorm
from lrattn.factors.rope import Rope

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """One attention layer.

    Args:
        name: its path in the model. module: holds q_proj, k_proj, v_proj, o_proj and maybe q_norm, k_norm.
        rope: rotation of queries and keys, in float32 angles as the model computes them.
        key_norm: RMS norm of each key head before the rotation, or None.
        window: tokens a query sees, or None. scale: multiplies the scores.
    """

    name: str
    module: nn.Module
    head_dim: int
    rope: Rope
    key_norm: KeyNorm | None
    window: int | None
    scale: float

    @property
    def num_kv_heads(self) -> int:
        return int(self.linear("k_proj").out_features) // self.head_dim

    def linear(self, name: str) -> nn.Linear:
        found: nn.Linear = getattr(self.module, name)
        return found

    def weight(self, name: str) -> Tensor:
        """Weight of k_proj or v_proj by head, [Hkv, D, E]."""
        return self.linear(name).weight.detach().unflatten(0, (-1, self.head_dim))

    def bias(self, name: str) -> Tensor | None:
        """Bias of k_proj or v_proj by head, [Hkv, D]."""
        bias = self.linear(name).bias
        return None if bias is None else bias.detach().unflatten(0, (-1, self.head_dim)).clone()

    def heads(self, side: str, x: Tensor) -> Tensor:
        """The outputs of a projection ("q", "k" or "v") of x [B, S, E], by head: [B, S, H, D]."""
        out: Tensor = self.linear(f"{side}_proj")(x)
        return out.unflatten(-1, (-1, self.head_dim))

    def rotated(self, side: str, x: Tensor, positions: Tensor) -> Tensor:
        """The model's own queries (side "q") or keys ("k") of x [B, S, E], normed and rotated: [B, S, H, D]."""
        return self.turned(side, self.heads(side, x), positions)

    def turned(self, side: str, heads: Tensor, positions: Tensor) -> Tensor:
        """Heads of q_proj (side "q") or k_proj ("k"), [B, S, H, D], normed and rotated as the model does it."""
        norm = getattr(self.module, f"{side}_norm", None)
        return self.rope.rotate(heads if norm is None else norm(heads), positions)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on exit every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter costs a gradient inside; on exit those that did do again."""
    weights = [p for p in model.parameters() if p.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def shadowed(module: nn.Module, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Another method on this instance inside; on exit it has what it had before, or nothing of its own."""
    had = name in module.__dict__
    own = module.__dict__.get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if had:
            setattr(module, name, own)
        else:
            delattr(module, name)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that runs the layers: the text decoder of a transformers model."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    return decoder if isinstance(decoder, nn.Module) else model


def attention_parts(model: nn.Module) -> list[AttentionParts]:
    """The attention layers of a model, in order.

    Raises: ValueError naming the module and the part that is missing or not understood.
    """
    decoder = decoder_of(model)
    config = decoder.config
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise ValueError(f"model: expected a decoder with `layers`, got {type(decoder).__name__}")
    names = {module: name for name, module in model.named_modules()}
    found = []
    for i, layer in enumerate(layers):
        module = getattr(layer, "self_attn", None)
        if module is None:
            raise ValueError(f"model: expected layer {i} ({type(layer).__name__}) to have `self_attn`")
        found.append(_read(names[module], module, config, i))
    return found


def _read(name: str, module: nn.Module, config: Any, index: int) -> AttentionParts:
    def refuse(reason: str) -> ValueError:
        return ValueError(f"model: {name} ({type(module).__name__}) cannot attend on latents: {reason}")

    for part in LINEARS:
        linear = getattr(module, part, None)
        if not isinstance(linear, nn.Linear):
            raise refuse(f"expected {part} to be a Linear layer, got {type(linear).__name__}")
        if not linear.weight.is_floating_point():
            raise refuse(f"expected {part} to have a floating-point weight, got {linear.weight.dtype}")
    extra = {n.split(".")[0] for n, _ in module.named_parameters()} - {*LINEARS, *NORMS}
    if extra:
        raise refuse(f"it has parameters that lrattn does not know: {', '.join(sorted(extra))}")
    for attribute in ("attn_logit_softcapping", "logit_cap", "clip_qkv", "sinks"):
        if getattr(module, attribute, None) or getattr(config, attribute, None):
            raise refuse(f"it uses {attribute}")
    head_dim = int(getattr(module, "head_dim", 0))
    keys, values = (getattr(module, part).weight for part in ("k_proj", "v_proj"))
    if not head_dim or len(keys) % head_dim:
        raise refuse(f"expected head_dim to divide k_proj's {len(keys)} outputs, got {head_dim}")
    if keys.shape != values.shape:
        raise refuse("expected keys and values of one shape")
    types = getattr(config, "layer_types", None)
    return AttentionParts(
        name=name,
        module=module,
        head_dim=head_dim,
        rope=Rope.from_config(config, types[index] if types else None, dim=head_dim, fp32_angles=True),
        key_norm=_key_norm(module, head_dim, refuse),
        window=getattr(module, "sliding_window", getattr(config, "sliding_window", None)),
        scale=float(getattr(module, "scaling", head_dim**-0.5)),
    )


def _key_norm(module: nn.Module, head_dim: int, refuse: Any) -> KeyNorm | None:
    """k_norm as weight and eps, checked against the module itself on random keys."""
    norm = getattr(module, "k_norm", None)
    if norm is None:
        return None
    eps = next((float(getattr(norm, n)) for n in ("variance_epsilon", "eps") if hasattr(norm, n)), None)
    weight = getattr(norm, "weight", None)
    if eps is None or weight is None or weight.shape != (head_dim,):
        raise refuse(f"expected k_norm to be an RMS norm over head_dim={head_dim}, got {type(norm).__name__}")
    keys = torch.randn(4, head_dim, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = norm(keys).float()
    for offset in (0.0, 1.0):  # Gemma stores the weight as an offset from one
        candidate = KeyNorm((weight.detach().float() + offset).to(weight.dtype), eps)
        got = keys.float() * candidate.inverse_rms(keys.float())[:, None] * candidate.weight.float()
        if torch.allclose(
            got,
            expected,
            rtol=0,
            atol=8 * torch.finfo(weight.dtype).eps * expected.abs().max().item(),
        ):
            return candidate
    raise refuse(f"k_norm ({type(norm).__name__}) is not weight * k / rms(k)")
