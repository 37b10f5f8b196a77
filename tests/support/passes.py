"""Passes of a model on latents, and what they have to give: attention written out from its definition, in float64."""

from dataclasses import replace

import torch
from oracle import rotate

from lrattn.models.interface import attending, cache_argument
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of


def same(got, want, live=None):
    """Up to a rounding of cosines, float32 in the models and on some machines not of the same bits in long passes and
    in short ones; live: what to look at."""
    got, want = (got, want) if live is None else (got[live.bool()], want[live.bool()])
    size = want.abs().amax().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7 * size)


@torch.no_grad()
def fed(model, ids, chunks, cache, mask=None, positions=None):
    """Logits of chunks run one after the other on a cache; positions [B or 1, T] are given where there are some."""
    out, end = [], cache.get_seq_length()
    for part in ids.split(chunks, 1):
        begin, end = end, end + part.shape[1]
        more = {} if positions is None else {"position_ids": positions[:, begin:end]}
        more |= {} if mask is None else {"attention_mask": mask[:, :end]}
        out.append(model(part, **more, **cache_argument(cache)).logits)
    return torch.cat(out, 1)


@torch.no_grad()
def defined(model, factors, ids, exact, live=None, positions=None, rest=None):
    """Logits of a whole text: query i sees column j as it is where exact[b, i, j], else as its latents say.

    exact: [B or 1, T, T] bool. live: [B, T], what is no padding; or [B, T, T], what each query may see; or
        a list of these, for each layer. rest: factors, and [B, T, T] for each layer of which query sees which column by
        what they make of its latents.
    """
    live = torch.ones_like(ids) if live is None else live
    lives = [x.bool() for x in (live if isinstance(live, list) else [live] * len(factors.layers))]
    with attending(model, attention(factors, exact, lives, rest)):
        return model(ids, position_ids=positions, use_cache=False).logits


def window(columns, recent, sinks, begins=(0,)):
    """exact: the `recent` last columns of each query, and the first `sinks` of each row from where it begins."""
    i, j = torch.arange(columns)[:, None], torch.arange(columns)
    begins = torch.tensor(begins)[:, None, None]
    return (j > i - recent) | ((j >= begins) & (j < begins + sinks))


def exact_ropes(model):
    """A model's ropes, but of angles in float64."""
    return [rope and replace(rope, fp32_angles=False) for rope in ropes_of(model, attention_layers(model))]


def attention(factors, exact, lives, rest=None):
    def attend(module, query, key, value, mask, scaling, sliding_window=None, position_ids=None, **kwargs):
        layer, live = factors.layers[module.layer_idx], lives[module.layer_idx]
        batch, columns = len(query), query.shape[2]
        at = torch.arange(columns)[None] if position_ids is None else position_ids
        far_key, far_value = through_latents(layer, key, value, at.expand(batch, -1))
        i, j = torch.arange(columns)[:, None], torch.arange(columns)
        seen = (j <= i) if sliding_window is None else (j <= i) & (j > i - sliding_window)
        seen, own = (
            (seen & (live if live.dim() == 3 else live[:, None]))[:, None],
            exact[:, None].expand(batch, 1, -1, -1),
        )
        rest_key, rest_value, thin = far_key, far_value, torch.zeros_like(own)
        if rest is not None:
            rest_key, rest_value = through_latents(
                rest[0].layers[module.layer_idx], far_key, far_value, at.expand(batch, -1)
            )
            thin = rest[1][module.layer_idx][:, None]
            own = own & ~thin
        key, value, far_key, far_value, rest_key, rest_value = (
            x.repeat_interleave(query.shape[1] // key.shape[1], 1)
            for x in (key, value, far_key, far_value, rest_key, rest_value)
        )
        scores = torch.where(own, query @ key.mT, query @ far_key.mT) * scaling
        scores = torch.where(thin, query @ rest_key.mT * scaling, scores)
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = (p * own) @ value + (p * ~(own | thin)) @ far_value + (p * thin) @ rest_value
        return out.transpose(1, 2).contiguous(), None

    return attend


@torch.no_grad()
def defined_in_passes(model, factors, ids, chunks, begins=(0,), positions=None):
    """Logits of passes, where the rows of a run of layers are the sum of all their parts: query i sees column j as it
    is within its window, or if j is of its own pass, else as the rows say. Rows begin at `begins`, after padding."""
    at = torch.arange(ids.shape[1]).expand(len(ids), -1) if positions is None else positions.expand(len(ids), -1)
    live = torch.arange(ids.shape[1]) >= torch.tensor(begins)[:, None]
    exact, span, state, out, end = window(ids.shape[1], *factors.near, begins=begins), factors.span, {}, [], 0

    def attend(module, query, key, value, mask, scaling, sliding_window=None, **kwargs):
        i = module.layer_idx
        heads, far = state.get(i, ((key[:, :, :0], value[:, :, :0]), (key[:, :, :0], value[:, :, :0])))
        heads = [torch.cat(pair, 2) for pair in zip(heads, (key, value), strict=True)]
        far = [torch.cat((x, own), 2) for x, own in zip(far, (key, value), strict=True)]
        new, columns = key.shape[2], heads[0].shape[2]
        begin = columns - new
        rows, j = torch.arange(begin, columns)[:, None], torch.arange(columns)
        seen = (j <= rows) if sliding_window is None else (j <= rows) & (j > rows - sliding_window)
        seen = (seen & live[:, None, :columns])[:, None]
        own = (exact[:, begin:columns, :columns] | (j >= begin))[:, None]
        near_k, near_v, far_k, far_v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (*heads, *far))
        scores = torch.where(own, query @ near_k.mT, query @ far_k.mT) * scaling
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        result = (p * own) @ near_v + (p * ~own) @ far_v
        state[i], first = (heads, [x[:, :, :begin] for x in far]), i - i % span
        if i + 1 == min(first + span, len(factors.layers)):
            whole_run(range(first, i + 1), begin, columns)
        return result.transpose(1, 2).contiguous(), None

    def whole_run(run, begin, columns):
        """Of columns begin .. columns: their row, and what it stands for in each layer."""
        z = 0.0
        for i in run:
            layer, (k, v) = factors.layers[i], (x[:, :, begin:] for x in state[i][0])
            sides = (turned(layer, k, at[:, begin:columns], -1), layer.keys), (v, layer.values)
            parts = [(x - s.offset[:, None]).transpose(1, 2).flatten(2) for x, s in sides]
            z = z + torch.cat(parts, -1) @ layer.values.down
        for i in run:
            layer, row = factors.layers[i], held(factors.layers[i].values, z)
            k, v = (torch.einsum("btr,hrd->bhtd", row, s.up) + s.offset[:, None] for s in (layer.keys, layer.values))
            heads, far = state[i]
            new = turned(layer, k, at[:, begin:columns], 1), v
            state[i] = heads, [torch.cat(pair, 2) for pair in zip(far, new, strict=True)]

    with attending(model, attend):
        for part in ids.split(chunks, 1):
            begin, end = end, end + part.shape[1]
            out.append(model(part, position_ids=at[:, begin:end], use_cache=False).logits)
    return torch.cat(out, 1)


def through_latents(layer, key, value, at):
    """Keys and values [B, Hkv, T, D] -> latents -> what they stand for, as LayerFactors says; one group a side."""
    k, v = turned(layer, key, at, -1), value
    k, v = (x if s.offset is None else x - s.offset[:, None] for x, s in ((k, layer.keys), (v, layer.values)))
    rows = [x.transpose(1, 2).flatten(2) for x in (k, v)]
    if layer.shared:
        zv = held(layer.values, torch.cat(rows, -1) @ layer.values.down)
        zk = zv[..., : layer.keys.width]
    else:
        zk, zv = (held(s, x @ s.down) for x, s in zip(rows, (layer.keys, layer.values)))
    k, v = (torch.einsum("btr,hrd->bhtd", z, s.up) for z, s in ((zk, layer.keys), (zv, layer.values)))
    k, v = (x if s.offset is None else x + s.offset[:, None] for x, s in ((k, layer.keys), (v, layer.values)))
    return turned(layer, k, at, 1), v


def held(side, z):
    if not side.formats:
        return z
    (own,) = side.formats
    return own.decode(*own.encode(z), z.dtype)


def turned(layer, x, at, sign):
    """x [B, Hkv, T, D] turned to positions at [B, T], or to their chunks' first; or back."""
    if layer.rope is None:
        return x
    factor = layer.rope.frequencies()[1]
    at, factor = (at, factor ** (1 - sign)) if layer.chunk is None else (at // layer.chunk * layer.chunk, factor)
    return rotate(x.transpose(1, 2), at * sign, layer.rope).transpose(1, 2) / factor
