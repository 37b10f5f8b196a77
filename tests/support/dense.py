"""What a user would write without lrattn: rebuild, rotate and attend in the dtype of the query, densely."""

import torch
from oracle import dense_values, exact_tokens

import lrattn


def attend(q, k_cache, v_cache, layer, *, block_table, seq_lens, project="heads", **call):
    """Result and lse of dense PyTorch attention; products in q's dtype, softmax in float32 (float64 for float64)."""
    starts, causal, window = call.get("seq_starts"), call.get("causal", True), call.get("window_size")
    scale, softcap, sinks = call.get("softmax_scale"), call.get("softcap", 0.0), call.get("sinks")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size, limit = k_cache.shape[1], block_table.shape[1] * k_cache.shape[1]
    lens = seq_lens.clamp(0, min(call.get("max_seq_len", limit), limit))
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for b, n in enumerate(lens.tolist()):
        pages = (n + size - 1) // size
        used = block_table[b : b + 1, :pages].clamp(0, len(k_cache) - 1)  # pages before the reach hold anything
        one = torch.tensor([n], dtype=torch.int32, device=q.device)
        at = call.get("positions")
        at = at if at is None else at.clamp(min=0)
        offsets = call.get("offsets")
        placed = {"positions": at, "offsets": None if offsets is None else offsets[b : b + 1]}
        k, v = lrattn.rebuild(k_cache, v_cache, layer, used, one, **placed, backend="reference")
        t, own = torch.arange(n, device=q.device), torch.arange(n - q.shape[1], n, device=q.device)[:, None]
        start = 0 if starts is None else max(int(starts[b]), 0)
        near = call.get("near")
        first = start if near is None or near.firsts is None else max(int(near.firsts[b]), 0)
        seen = t >= max(start, first)
        seen = seen & (t <= own) if causal else seen.expand(q.shape[1], -1)
        seen = seen & (t > own - window) if window else seen
        if project == "latent":
            rows = k_cache if v_cache is None else v_cache
            v = dense_values(layer, rows[used[0].long()].flatten(0, 1)[:n], project)
        if near is not None:
            exact = seen & ((t > own - near.recent) | (t < first + near.sinks))
            t_near = t[exact.any(0)]
            seen = torch.cat((seen & ~exact, exact[:, t_near]), 1)
            k, v = (torch.cat((x, y.to(x.dtype))) for x, y in zip((k, v), exact_tokens(near, b, t_near, first)))
        k, v = (x.masked_fill(~seen.any(0)[:, None, None], 0.0).repeat_interleave(q.shape[2] // x.shape[1], 1)
                for x in (k, v))  # fmt: skip
        scores = (torch.einsum("shd,thd->sht", q[b], k) * scale).to(wide)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(wide)[:, None].expand(len(scores), -1, 1)), -1)
        p = torch.softmax(scores, -1).nan_to_num(0.0)[..., : len(k)].to(q.dtype)
        out = torch.einsum("sht,thd->shd", p, v)
        outs.append(out.flatten(1) @ layer.wo.flatten(0, 1) if project == "hidden" else out)
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outs), torch.stack(lses)
