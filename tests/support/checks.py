"""What the kernels give against the reference in float64, no worse than PyTorch in their own dtype."""

from dataclasses import fields, replace

import dense
import torch
from cases import Case, in_one, latents, make, make_layer, there
from closeness import assert_no_worse
from packing import plain, poison, read_cache

import lrattn


def on(device, *things):
    """Tensors, layers and dictionaries of them, moved; the rest as it is. A problem of cases.make, say."""
    return [
        dict(zip(x, on(device, *x.values())))
        if isinstance(x, dict)
        else lrattn.Near(*on(device, *(getattr(x, field.name) for field in fields(x))))
        if isinstance(x, lrattn.Near)
        else x.to(device)
        if hasattr(x, "to")
        else x
        for x in things
    ]


def dtypes(case, device):
    return [case.dtype] if device.type == "cpu" else [torch.bfloat16, torch.float16, torch.float32]


def attend(problem, **changes):
    """Result and lse of the kernels."""
    layer, q, k_cache, v_cache, kwargs = problem
    kwargs = {"return_lse": True, "backend": "triton", **kwargs, **changes}
    return lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)


def exact(problem):
    """The reference in float64, whose truth is tests/attention/test_reference.py."""
    layer, q, k_cache, v_cache, kwargs = plain(on("cpu", *problem))
    return lrattn.decode_attention(q, k_cache, v_cache, layer, return_lse=True, backend="reference", **kwargs)


def attend_densely(problem):
    """PyTorch in the problem's dtype, on latents as they are or as their bits say."""
    layer, *tensors, kwargs = problem
    if layer.packed:
        wide, *tensors, _ = plain(on("cpu", *problem))
        tensors = on(layer.device, *(None if x is None else x.to(layer.dtype) for x in tensors))
        layer = wide.to(layer.device, layer.dtype)
    return dense.attend(*tensors, layer, **kwargs)


def check(case, dtype, device):
    problem = on(device, *make(case, dtype))
    out, lse = (x.cpu() for x in attend(problem))
    true, true_lse = exact(problem)
    own, own_lse = (x.cpu() for x in attend_densely(problem))
    some = true_lse.isfinite()
    assert torch.equal(lse == -torch.inf, ~some)
    # exp2 of a GPU takes x log2(e), rounded: in float32 that is |x| times as much as PyTorch's exp is off by
    rounding = 16 * torch.finfo(dtype).eps if device.type == "cuda" and dtype == torch.float32 else 0.0
    assert_no_worse(out, own, true, slack=rounding * true.abs().max().item())
    assert_no_worse(lse[some], own_lse[some], true_lse[some], dtype, slack=rounding)


def check_rebuild(case, dtype, device):
    """Every token in reach, so that none is poisoned."""
    call = {n: x for n, x in case.call.items() if n not in ("window_size", "max_seq_len")}
    layer, _, k_cache, v_cache, kwargs = on(device, *make(replace(case, starts=None, call=call), dtype))
    tables = {name: kwargs[name] for name in ("block_table", "seq_lens", "positions", "offsets")}
    got = lrattn.rebuild(k_cache, v_cache, layer, **tables, backend="triton")
    own = lrattn.rebuild(k_cache, v_cache, layer, **tables, backend="reference")
    wide, _, *caches, _ = plain(on("cpu", layer, k_cache, k_cache, v_cache, {}))
    true = lrattn.rebuild(*caches, wide, **on("cpu", tables)[0], backend="reference")
    for side in range(2):
        assert_no_worse(got[side].cpu(), own[side].cpu(), true[side])


def check_write(case, slots, dtype, device):
    """The reference's bits, everything else untouched."""
    layer = make_layer(case, dtype).to(device)
    caches = lrattn.allocate_cache(layer, 3, case.P)
    for cache in there(*caches):
        cache.fill_(poison(cache.dtype))
    k_cache, v_cache = in_one(*caches)
    g = torch.Generator().manual_seed(0)
    zk, zv = latents(layer, 4, 9, generator=g)
    chosen = torch.randperm(3 * case.P, generator=g)[:36].to(slots)
    last = 3 * case.P - 1
    chosen[(chosen == last).int().argmax()], chosen[5], chosen[7] = last, -1, last + 1
    chosen = torch.stack((chosen, chosen), 1)[:, 0].view(4, 9).to(device)  # not contiguous
    lrattn.write_latents(layer, zk, zv, *caches, chosen, backend="reference")
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, chosen, backend="triton")
    for got, expected in zip(there(k_cache, v_cache), caches):
        assert torch.equal(got.nan_to_num(9.0), expected.nan_to_num(9.0))


def check_known_rows(backend, device):
    """Of a known number of tokens as many rows are rebuilt."""
    case = Case("known", Hkv=2, lens=(20, 0, 5), key_ranks=(32,))
    layer, _, k_cache, v_cache, kwargs = on(device, *make(case, torch.float32))
    arguments = (k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"])
    whole = lrattn.rebuild(*arguments, backend=backend)
    for n in (25, 7, 0):
        k, v = lrattn.rebuild(*arguments, num_tokens=n, backend=backend)
        assert torch.equal(k, whole[0][:n]) and torch.equal(v, whole[1][:n])


def check_broken(device):
    """Latents that are not finite are packed as NaN: all of their segment of their token, and nothing else."""
    layer = make_layer(Case("broken", key_bits=(8, 2), value_bits=(4,)), torch.float32).to(device)
    zk, zv = torch.randn(3, 32, device=device), torch.randn(3, 48, device=device)
    zk[1, 3], zv[2, 9] = torch.inf, torch.nan
    caches, expected = ([x.fill_(7) for x in lrattn.allocate_cache(layer, 1, 16)] for _ in range(2))
    lrattn.write_latents(layer, zk, zv, *caches, torch.arange(3, device=device), backend="triton")
    lrattn.write_latents(layer, zk, zv, *expected, torch.arange(3, device=device), backend="reference")
    (zk, zv), (own, _) = (
        [read_cache(x.cpu(), side.format)[0, :3] for x, side in zip(pair, (layer.keys, layer.values))]
        for pair in (caches, expected)
    )
    assert torch.equal(zk.isnan(), own.isnan()) and zk[1, :16].isnan().all() and zk.isnan().sum() == 16
    assert zv[2].isnan().all() and zv.isnan().sum() == 48


def check_far_pages(P, device):
    """Pages and queries two billion elements apart: most of the memory is never touched."""
    case = Case("far pages", Hkv=2, P=P, key_ranks=(16,), value_ranks=(16,), lens=(3 * P - 8,),
                rope={"max_position": 4 * P})  # fmt: skip
    layer, q, k_cache, v_cache, kwargs = make(case, torch.float16)
    step = 2**30 + 16
    pools = [torch.empty(step * (len(k_cache) - 1) + P * 16, dtype=torch.float16, device=device) for _ in range(2)]
    far = [p.as_strided(k_cache.shape, (step, 16, 1)) for p in pools]
    layer, q, k_cache, v_cache, kwargs = on(device, layer, q, k_cache, v_cache, kwargs)
    used = kwargs["block_table"][0, :3].tolist()
    assert max(used) * step > 2**31
    for page in used:
        for pool, near in zip(far, (k_cache, v_cache)):
            pool[page] = near[page]
    expected = attend((layer, q, k_cache, v_cache, kwargs))
    got = attend((layer, q, *far, kwargs))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    pool = torch.empty(2 * step + 128, dtype=torch.float16, device=device)
    queries = pool.as_strided((1, 3, 2, 64), (1, step, 64, 1))
    for i in range(3):
        queries[:, i] = q[:, 0] * (i + 1)
    for way in (layer, replace(layer, rope=None)):
        near, apart = (attend((way, x, k_cache, v_cache, kwargs)) for x in (queries.contiguous(), queries))
        assert torch.equal(near[0], apart[0])
    slots = torch.tensor([used[0] * P, max(used) * P + 3], device=device)
    lrattn.write_latents(layer, k_cache[0, :2] * 0, v_cache[0, :2] * 0, *far, slots, backend="triton")
    assert all((pool[page, i] == 0).all() for pool in far for page, i in ((used[0], 0), (max(used), 3)))
