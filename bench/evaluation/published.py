"""Caches of three published systems as their papers and released code have them, for transformers' own attention.

A prompt is read in full precision and its keys and values are then compressed, as all three do. Tokens after it stay as
they are, which favours them: ZipCache compresses new ones every 100 tokens. What a cache holds is packed, and counted
as it is held, numbers of 16 bits at two bytes.

ZipCache    arXiv 2405.14256, as its released code is set. Salient tokens, 60 % by what probe queries give them, have 4
            bits, the others 2. Probes are the last 5 % and as many at random; a token counts what it is given over how
            many of them see it. Keys: a scale and a zero for each channel of either kind of tokens. Values: channels
            divided by the root of their largest size, then a scale and a zero for each token.
DecoQuant   arXiv 2405.12591. Keys, and values, of all tokens as rows of 16 numbers, X = U S V^T: U is held at `bits`,
            a 16-bit scale each row, S V^T [16, 16] in 16 bits. No rank is cut: V^T spreads outliers.
CommonKV    arXiv 2508.16134, as its released code merges. One SVD of all weights of keys and values of four
            neighbouring layers; a token's latents are those of each layer's input. They are replaced by their mean, but
            for the tokens whose first and last layer's differ most (a half in the second run of layers, then a tenth
            less in each), the first 4 and the last 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, QuantizedLayer

from bench.evaluation.quantisers import rounded
from lrattn.compression.moments import SIDES
from lrattn.models.layers import AttentionLayer
from lrattn.models.ropes import ropes_of
from lrattn.models.weights import linear, weight

SALIENT, PROBES = 0.6, 0.05  # ZipCache's shares: of tokens, and of queries, recent and random ones each
ROW = 16  # of DecoQuant: numbers in a row
SPAN, FIRST, LAST = 4, 4, 128  # of CommonKV
APART = (0.0, 0.5, 0.4, 0.3, 0.2, 0.1)  # share of tokens that a run of layers does not merge; 0 from there on


class Packed(NamedTuple):
    """Codes of `bits` bits, [n, ceil(m bits / 8)] uint8, of numbers [n, m], each (code + least) * scale + zero."""

    codes: Tensor
    bits: int
    least: int
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, bits: int, least: int, scale: Tensor, zero: Tensor | None = None) -> Packed:
        """x [n, m], scale and zero as they broadcast to it; codes are cut to what bits hold."""
        scale, zero = rounded(scale), None if zero is None else rounded(zero)
        unit = (x if zero is None else x - zero) / scale.clamp_min(torch.finfo(x.dtype).tiny)
        most = 2**bits - 1 if zero is not None else -2 * least
        codes = (unit.round() - least).nan_to_num(0).clamp(0, most).to(torch.uint8)
        each = 8 // bits
        codes = nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return cls((codes << shifts).sum(2).to(torch.uint8), bits, least, scale, zero, tuple(x.shape))

    def numbers(self) -> Tensor:
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        codes = (self.codes[..., None] >> shifts & 2**self.bits - 1).flatten(1)[:, : self.shape[1]]
        x = (codes.to(self.scale.dtype) + self.least) * self.scale
        return x if self.zero is None else x + self.zero

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 2 * (self.scale.numel() + (0 if self.zero is None else self.zero.numel()))


def zero_point(x: Tensor, axis: int, bits: int) -> Packed:
    low, high = x.amin(axis, True), x.amax(axis, True)
    return Packed.of(x, bits, 0, (high - low) / (2**bits - 1), low)


class DecoLayer(QuantizedLayer):
    """One layer of DecoQuant, by transformers' own class of quantised layers: a prompt's tokens once, later ones as
    they are."""

    def __init__(self, bits: int) -> None:
        super().__init__(nbits=bits, residual_length=1 << 30)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Packed, Tensor, torch.Size]:
        rows = tensor.transpose(1, 2).reshape(-1, ROW).float()  # [T * n / 16, 16]
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        most = 2 ** (self.nbits - 1) - 1
        return Packed.of(u, self.nbits, -most, u.abs().amax(1, True) / most), rounded(s[:, None] * v), tensor.shape

    def _dequantize(self, held: tuple[Packed, Tensor, torch.Size]) -> Tensor:
        packed, right, (batch, heads, _, dim) = held
        return (packed.numbers() @ right).view(batch, -1, heads, dim).transpose(1, 2)

    @property
    def nbytes(self) -> int:
        later = sum(2 * x.numel() for x in (self.keys, self.values))
        sides = self._quantized_keys, self._quantized_values
        return later + sum(packed.nbytes + 2 * right.numel() for packed, right, _ in sides)


@dataclass
class ZipHeads:
    """One layer of ZipCache: [1, Hkv, T, D] keys and values."""

    salient: Tensor
    keys: tuple[Packed, Packed]
    values: tuple[Packed, Packed]
    channels: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, k: Tensor, v: Tensor, saliency: Tensor) -> ZipHeads:
        count = len(saliency)
        salient = torch.ones(count, dtype=torch.bool)
        salient[saliency.topk(int((1 - SALIENT) * count), largest=False).indices] = False
        rows = [x[0].transpose(0, 1).flatten(1).float() for x in (k, v)]  # [T, n]
        channels = rounded(rows[1].abs().amax(0).sqrt())
        parts = [(x[salient], x[~salient]) for x in (rows[0], rows[1] / channels)]
        keys, values = (
            [zero_point(x, axis, bits) for x, bits in zip(p, (4, 2), strict=True)]
            for p, axis in zip(parts, (0, 1), strict=True)
        )
        return cls(salient, tuple(keys), tuple(values), channels, k.shape)

    def heads(self) -> tuple[Tensor, Tensor]:
        found = []
        for pair in (self.keys, self.values):
            x = torch.empty(len(self.salient), self.shape[1] * self.shape[3])
            x[self.salient], x[~self.salient] = (part.numbers() for part in pair)
            found.append(x)
        k, v = (
            x.view(1, -1, self.shape[1], self.shape[3]).transpose(1, 2) for x in (found[0], found[1] * self.channels)
        )
        return k, v

    @property
    def nbytes(self) -> int:
        """Which tokens are salient is a bit each."""
        return sum(x.nbytes for x in (*self.keys, *self.values)) + 2 * len(self.channels) + len(self.salient) // 8


@dataclass(frozen=True)
class Prompt:
    """What attention was given of a prompt, of each layer: queries and keys and values [H, T, D], inputs [T, E]."""

    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    inputs: Sequence[Tensor]

    def first(self, tokens: int) -> Prompt:
        heads = ([x[:, :tokens] for x in own] for own in (self.queries, self.keys, self.values))
        return Prompt(*heads, [x[:tokens] for x in self.inputs])


def dense(layers: Sequence[AttentionLayer], model: nn.Module, prompt: Prompt) -> Cache:
    """transformers' own cache."""
    pairs = [tuple(x[None].float() for x in pair) for pair in zip(prompt.keys, prompt.values, strict=True)]
    return filled(pairs, [4 * k.numel() for k, _ in pairs])


def decoquant(layers: Sequence[AttentionLayer], model: nn.Module, prompt: Prompt, bits: int) -> Cache:
    cache = Cache(layers=[DecoLayer(bits) for _ in layers])
    for i, pair in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        cache.update(*(x[None].float() for x in pair), i)
    return cache


def zipcache(layers: Sequence[AttentionLayer], model: nn.Module, prompt: Prompt) -> Cache:
    made = [
        ZipHeads.of(k[None], v[None], saliency(q, k))
        for q, k, v in zip(prompt.queries, prompt.keys, prompt.values, strict=True)
    ]
    return filled([x.heads() for x in made], [x.nbytes for x in made])


def commonkv(layers: Sequence[AttentionLayer], model: nn.Module, prompt: Prompt, keep: float) -> Cache:
    ropes, tokens, pairs, held = ropes_of(model, layers), len(prompt.inputs[0]), [], []
    shares = [APART[n] if n < len(APART) else 0.0 for n in range(-(-len(layers) // SPAN))]
    alike = 1 - sum(shares) / len(shares)
    for n, begin in enumerate(range(0, len(layers), SPAN)):
        run = layers[begin : begin + SPAN]
        whole = torch.cat([weight(layer, side) for side in SIDES for layer in run])  # [2 n of all, E]
        # keep is met over all runs: a token that is not merged holds a latent for each layer
        rank = min(int(keep * len(whole) / (alike + (1 - alike) * len(run))), *whole.shape)
        u, s, v = torch.linalg.svd(whole.float(), full_matrices=False)
        up, down = u[:, :rank] * s[:rank], v[:rank].T
        z = torch.stack([prompt.inputs[begin + i].float() @ down for i in range(len(run))])  # [layers, T, rank]
        apart = torch.zeros(tokens, dtype=torch.bool)
        unlike = torch.cosine_similarity(z[0], z[-1], dim=1)
        apart[unlike.topk(int(shares[n] * tokens), largest=False).indices] = True
        apart[:FIRST] = apart[-LAST:] = True
        z[:, ~apart] = z[:, ~apart].mean(0)
        rows = (~apart).sum().item() / len(run) + apart.sum().item()  # of latents, a layer
        keys, values = (side.chunk(len(run)) for side in up.chunk(2))
        for i, layer in enumerate(run):
            k, v = ((z[i] @ x.T).view(1, tokens, layer.num_kv_heads, -1) for x in (keys[i], values[i]))
            rope = ropes[begin + i]
            k = k if rope is None else rope.rotate(k, torch.arange(tokens)[None])
            pairs.append((k.transpose(1, 2), v.transpose(1, 2)))
            held.append(2 * rank * rows)
    return filled(pairs, held)


@contextmanager
def watched(layers: Sequence[AttentionLayer], inputs: dict[int, Tensor]) -> Iterator[None]:
    """Inside, what each layer's key projection reads is put to `inputs`, [T, E]."""

    def keep(i: int) -> Any:
        return lambda _, args: inputs.update({i: args[0][0].float()})

    hooks = [linear(layer, "k_proj").register_forward_pre_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def saliency(q: Tensor, k: Tensor) -> Tensor:
    """[T]: what probe queries give each token, over how many see it; q [Hq, T, D], k [Hkv, T, D]."""
    tokens = q.shape[1]
    count = max(int(PROBES * tokens), 1)
    random = torch.randperm(tokens - count, generator=torch.Generator().manual_seed(tokens))[:count]
    rows = torch.cat((random, torch.arange(tokens - count, tokens)))
    scores = q[:, rows].float() @ k.float().repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
    seen = torch.arange(tokens) <= rows[:, None]
    given = (scores * q.shape[2] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1).sum((0, 1))
    return given / seen.sum(0).clamp_min(1)


def filled(pairs: Sequence[tuple[Tensor, ...]], held: Sequence[float]) -> Cache:
    """transformers' own cache with these keys and values, [1, Hkv, T, D], in its layers.

    held: of each layer, the bytes that stand for them.
    """
    cache = DynamicCache()
    for i, (k, v) in enumerate(pairs):
        cache.update(k, v, i)
    for layer, each in zip(cache.layers, held, strict=True):
        layer.held, layer.at_first = each, layer.keys.shape[2]
    return cache


def nbytes(cache: Cache) -> float:
    """Of what a cache of these holds, of what came after its prompt at 16 bits."""
    total = 0.0
    for layer in cache.layers:
        if isinstance(layer, DecoLayer):
            total += layer.nbytes
        else:
            per_token = 4 * layer.keys.shape[1] * layer.keys.shape[3]
            total += layer.held + per_token * (layer.keys.shape[2] - layer.at_first)
    return total
