"""Random factors of any model that can have some: orthogonal maps of the keys and values its attention is given."""

import torch

from lrattn.factors.formats import Format
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.models.layers import attention_layers

STEP = 16


def random_factors(model, keep=1.0, near=(0, 0), seed=0, ropes=None, bits=None, shared=False, chunk=None):
    """Factors of `keep` of the numbers of each token, all of them at keep=1 and exact then; with offsets.

    ropes: a Rope or None for each layer; None: keys are stored as attention is given them. chunk: of layers with ropes;
    None: their keys are stored before RoPE. bits: of packed latents. shared: one row for keys and values, of which keys
    use all but the last 16 latents.
    """
    g = torch.Generator().manual_seed(seed)
    found = attention_layers(model)
    ropes = [None] * len(found) if ropes is None else ropes
    layers = []
    for layer, rope in zip(found, ropes, strict=True):
        shape = layer.num_kv_heads, layer.head_dim
        rank = _rank(keep, layer.dense)
        if shared:
            most = 2 * rank if keep < 1 else _rank(1.0, 2 * layer.dense)
            whole = _orthogonal(2 * layer.dense, most, g)
            keys = _side(whole[: layer.dense, : most - STEP if keep < 1 else most], None, shape, g, None)
            values = _side(whole[layer.dense :], whole, shape, g, bits)
        else:
            keys, values = (_side(m, m, shape, g, bits) for m in (_orthogonal(layer.dense, rank, g) for _ in range(2)))
        made = LayerFactors(keys, values, rope, shared, chunk=rope and chunk)
        layers.append(made.to(layer.device, layer.dtype))
    return Factors(layers, method="random", near=near)


def joined_factors(model, span, keep=1.0, near=(8, 2), seed=0, ropes=None, bits=None, chunk=None):
    """Factors of rows that runs of `span` layers share: one random orthogonal map of all their keys and values."""
    g = torch.Generator().manual_seed(seed)
    found = attention_layers(model)
    ropes, layers = [None] * len(found) if ropes is None else ropes, []
    for begin in range(0, len(found), span):
        run = found[begin : begin + span]
        n = run[0].dense
        whole = _orthogonal(2 * n * len(run), _rank(keep, 2 * n * len(run)), g)
        for layer, rope, own in zip(run, ropes[begin:], whole.split(2 * n), strict=False):
            shape = layer.num_kv_heads, layer.head_dim
            keys, values = _side(own[:n], None, shape, g, None), _side(own[n:], own, shape, g, bits)
            made = LayerFactors(keys, values, rope, True, chunk=rope and chunk)
            layers.append(made.to(layer.device, layer.dtype))
    return Factors(layers, method="random", near=near, span=span)


def _rank(keep, n):
    """A multiple of 16: the next above n for all, else the nearest to its share."""
    return -(-n // STEP) * STEP if keep == 1 else max(round(keep * n / STEP), 1) * STEP


def _orthogonal(n, rank, g):
    """[n, rank], columns orthogonal; those beyond n are zeros."""
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0][:, :rank]
    return torch.cat((q, q.new_zeros(n, rank - q.shape[1])), 1)


def _side(up, down, shape, g, bits):
    """One group of all heads; up: [Hkv * D, rank], of which the heads are what `down` was."""
    heads = up.T.unflatten(1, shape).transpose(0, 1).contiguous()
    offset = torch.randn(shape, generator=g, dtype=torch.float64) / 4
    return Projection(heads, (up.shape[1],), down, offset, format=bits and Format(((up.shape[1], bits),)))
