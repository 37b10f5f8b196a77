"""What the kernels give against the reference in float64, no worse than PyTorch in their own dtype."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace

import dense
import torch
from cases import Case, in_one, latents, make, make_layer, there
from closeness import assert_no_worse
from packing import plain, poison, read_cache, sections

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
    with unwritten() if q.device.type == "cpu" else nullcontext():
        return lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)


@contextmanager
def unwritten():
    """Inside, a new tensor holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills them, too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
    # exp2 of a GPU takes x log2(e), rounded: in float32 that is |x| times as much as PyTorch's exp is off by. So are
    # scores of packed rows anywhere, of which the codes' middle is taken away after the sum
    steps = 0 if dtype != torch.float32 else 16 if device.type == "cuda" else 4 if problem[0].packed else 0
    rounding = steps * torch.finfo(dtype).eps
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


def check_broken_scales(dtype, device):
    """A broken scale reaches, as NaN, the queries and heads that meet it, and no others: as in the reference."""
    case = Case("broken scales", M=2, S=2, D=64, chunk=64, P=32, lens=(100, 70, 20), key_ranks=(32, 48),
                value_ranks=(48, 32), key_bits=(8, 2), value_bits=(4, 2))  # fmt: skip
    layer, q, k_cache, v_cache, kwargs = make(case, dtype)
    pages = kwargs["block_table"][:, 0].tolist()
    sections(k_cache, layer.keys.format)[1][pages[0], 3, 5] = 255  # of the second group, 2 bits
    sections(v_cache, layer.values.format)[1][pages[1], 9, 0] = 255
    problem = on(device, layer, q, k_cache, v_cache, kwargs)
    (out, lse), (true, true_lse) = ([x.cpu().isnan() for x in f(problem)] for f in (attend, exact))
    assert torch.equal(out, true) and out[0, :, 4:].all() and out[1, :, :4].all() and not out[2].any()
    assert torch.equal(lse & true_lse, true_lse) and torch.equal(lse | out.all(-1), out.all(-1))


def check_turned(device):
    """Queries that are all but orthogonal to a key's basis once they are turned back: only what rounding them to 16
    bits leaves is seen of that."""
    case = Case("turned", chunk=64, Hkv=1, lens=(128,), starts=(64,), key_ranks=(16,), value_ranks=(16,), key_bits=(8,),
                value_bits=(8,), dtype=torch.float16)  # fmt: skip
    layer, q, *caches, kwargs = make(case, case.dtype)
    q.zero_()[..., 0], q[..., 32] = 900, 300  # the pair of frequency 1; the chunk's first position is 64
    x = (
        q[0, 0, 0, [0, 32]].double()
        @ torch.tensor([[math.cos(64), -math.sin(64)], [math.sin(64), math.cos(64)]]).double()
    )
    up = torch.zeros_like(layer.keys.up)
    up[..., 0], up[..., 32] = -x[1] / x.norm(), x[0] / x.norm()
    problem = on(device, replace(layer, keys=replace(layer.keys, up=up)), q, *caches, {**kwargs, "softmax_scale": 1.0})
    (_, lse), (_, true_lse) = attend(problem), exact(problem)
    torch.testing.assert_close(lse.double().cpu(), true_lse, rtol=0, atol=2e-3)


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
    ways = layer, replace(layer, rope=None)
    for way in ways:
        expected = attend((way, q, k_cache, v_cache, kwargs))
        got = attend((way, q, *far, kwargs))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    tables = {name: kwargs[name] for name in ("block_table", "seq_lens")}
    near, apart = (lrattn.rebuild(*caches, layer, **tables, backend="triton") for caches in ((k_cache, v_cache), far))
    assert all(torch.equal(x, y) for x, y in zip(near, apart, strict=True))
    pool = torch.empty(2 * step + 128, dtype=torch.float16, device=device)
    queries = pool.as_strided((1, 3, 2, 64), (1, step, 64, 1))
    for i in range(3):
        queries[:, i] = q[:, 0] * (i + 1)
    for way in ways:
        near, apart = (attend((way, x, k_cache, v_cache, kwargs)) for x in (queries.contiguous(), queries))
        assert torch.equal(near[0], apart[0])
    slots = torch.tensor([used[0] * P, max(used) * P + 3], device=device)
    lrattn.write_latents(layer, k_cache[0, :2] * 0, v_cache[0, :2] * 0, *far, slots, backend="triton")
    assert all((pool[page, i] == 0).all() for pool in far for page, i in ((used[0], 0), (max(used), 3)))
