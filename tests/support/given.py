"""What a model's attention is given, by transformers' own eager attention and autograd: nothing here is of lrattn."""

import sys
from contextlib import contextmanager

import architectures
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
WATCH = []


def eager(name, dtype=torch.float32, **changes):
    """A model that attends as its config says: sdpa of some releases leaves softcaps and sinks out."""
    model = architectures.model(name, dtype, **changes)
    model.set_attn_implementation("eager")
    return model


def served(names):
    """Those that this release runs without a cache as with one: Gemma-3n's layers shared no keys before 5.19."""
    return tuple(name for name in names if name != "Gemma-3n" or RELEASE >= (5, 19))


def _watched(module, query, key, value, mask, **kwargs):
    key, value = WATCH[-1](module, query, key, value, mask)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("watched", _watched)
AttentionMaskInterface.register("watched", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def watching(model, watch):
    """Inside, attention is eager, on what watch(module, q, k, v, mask) returns in the place of k and v."""
    before = model.config._attn_implementation
    model.set_attn_implementation("watched")
    WATCH.append(watch)
    try:
        yield
    finally:
        WATCH.pop()
        model.set_attn_implementation(before)


class Given:
    """Of one text, what a layer with keys of its own is given: q [T, Hq, D]; k, v and u [T, Hkv, D] and the gradients
    of these three, all float64. u: keys before their rotation, as what makes them returns them; None where `_source`
    does not know. x: what k_proj reads, [T, E], or None."""

    def __init__(self, q, k, v, read, made, own):
        self.q, self.k, self.v = (x.detach()[0].transpose(0, 1).double() for x in (q, k, v))
        self.dk, self.dv = (_gradient(x)[0].transpose(0, 1).double() for x in (k, v))
        self.u, self.du = None, None
        if made is not None:
            self.u, self.du = (_heads(x[0].double(), self.k.shape, own) for x in (made.detach(), _gradient(made)))
        self.x = None if read is None else read[0].detach().double()


def given(model, ids, labels=None):
    """Layer by layer, of one text [T]. labels [T - 1]: the summed loss of these tokens is what gradients are of."""
    found, made, reads, hooks = [], {}, {}, []

    def keep(module, _, out):
        made[module] = out if out.requires_grad else out.requires_grad_()
        out.retain_grad()

    def watch(module, q, k, v, mask):
        if not any(k is other for _, _, other, _ in found):  # the layers that attend on another's keys
            for x in (k, v):
                x.retain_grad() if x.requires_grad else x.requires_grad_()
            found.append((module, q, k, v))
        return k, v

    for module in model.modules():
        if (source := _source(module)[0]) is not None:
            hooks.append(source.register_forward_hook(keep))
        if hasattr(module, "k_proj"):
            hooks.append(module.k_proj.register_forward_pre_hook(lambda m, args: reads.update({m: args[0]})))
    try:
        with watching(model, watch), torch.enable_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            if labels is not None:
                nn.functional.cross_entropy(logits[:-1].float(), labels, reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for module, q, k, v in found:
        source, own = _source(module)
        layers.append(Given(q, k, v, reads.get(getattr(module, "k_proj", None)), made.get(source), own))
    model.zero_grad()
    return layers


def _gradient(x):
    return torch.zeros_like(x) if x.grad is None else x.grad


def _heads(x, shape, own):
    """[T, Hkv, D] of [T, n], [T, Hkv, D] or [Hkv, T, D], of which columns `own` are theirs."""
    x = x.transpose(0, 1) if x.dim() == 3 and len(x) == shape[1] else x
    return x.flatten(1)[:, own].reshape(shape)


def _source(attention):
    """The module whose output is an attention's keys before their rotation, and where in it they are."""
    if hasattr(attention, "qkv_proj"):  # Phi-3
        width = attention.head_dim * attention.num_key_value_heads
        return attention.qkv_proj, slice(-2 * width, -width)
    norm = getattr(attention, "k_norm", None)
    return norm if norm is not None else getattr(attention, "k_proj", None), slice(None)
