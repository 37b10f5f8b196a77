"""Packed rows whose codes are operands of products: assembly, every option, and how near the results are."""

import math
import re
from dataclasses import replace
from functools import partial

import cases
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import FAR, Case, make, make_layer
from checks import attend, check, check_broken_scales, check_turned, exact
from packing import plain

import lrattn
from lrattn.kernels import launch, pieces, plan, planes

HALF = {"dtype": torch.float16, "M": 2, "D": 64, "lens": (150, 64, 1, 0)}
MIXED = {"key_bits": (8, 4, 2), "value_bits": (8, 4, 2)}


def case(name, **changes):
    return Case(name, **{**HALF, "key_ranks": (128, 128), "value_ranks": (128, 128), "chunk": 512, **MIXED, **changes})


PLANES = [
    case("apart", lens=(300, 128, 129, 1, 0)),
    case("many chunks", chunk=128, lens=(700, 129), offsets=(FAR + 60, 5)),
    case("tiles of 64", chunk=192, lens=(400, 64), offsets=(-100, 37)),
    case("no rope", rope=None, chunk=None),
    case("offset", offset=True, lens=(200, 3)),
    case("ragged", key_ranks=(96, 176), value_ranks=(208, 48), offset=True),
    case("ragged, a pass each", key_ranks=(96, 176), value_ranks=(48, 416), lens=(70, 0)),
    case("ragged, keys rebuilt", chunk=None, key_ranks=(96, 48), value_ranks=(64, 48), lens=(70, 0)),
    case("segments that fill no piece", key_ranks=(16, 48), value_ranks=(48, 48), key_bits=(2,), value_bits=(4, 2)),
    case("one latent a bit", key_ranks=(16,), value_ranks=(16,), key_bits=(8,), value_bits=(2,), Hkv=1, M=8),
    case("sixteen bits", key_bits=(16, 8), value_bits=(4, 16)),
    case("five scales", key_bits=(8, 4, 2, 8, 4), value_bits=(2, 4, 2, 8, 4), key_ranks=(160,), value_ranks=(160,)),
    case("wide rows", key_ranks=(528,), value_ranks=(400,), lens=(150, 0), S=2),
    case("one row", shared=True, M=3),
    case("one row, wide", shared=True, key_ranks=(400,), value_ranks=(400,)),
    case("one row, fewer keys", shared=True, key_ranks=(48, 32), value_ranks=(128, 128), offset=True),
    case("values of other groups", value_ranks=(128,) * 4),
    case("values alone", chunk=None, key_bits=(), value_order=(3, 1, 0, 2)),
    case("keys alone", value_bits=()),
    case("many queries", S=5, Hkv=8, M=4, lens=(150, 5, 3, 0)),
    case("not causal", S=3, starts=(40, 0, 0, 0), call={"causal": False}),
    case("window, queries, starts", S=3, starts=(100, 0, 0, 0), call={"window_size": 40, "num_splits": 2}),
    case("softcap, sinks", sinks=True, offset=True, call={"softcap": 3.0}),
    case("negative scale", call={"softmax_scale": -0.3}),
    case("no scale", offset=True, call={"softmax_scale": 0.0}),
    case("small workspace", offset=True, lens=(700, 40), chunk=128, call={"workspace_limit": 1}),
    case("big pages", P=256, lens=(600, 255)),
    case("pages that divide no tile", P=48, lens=(300, 47), offsets=(-7, 3)),
    case("heads in another order", key_order=(2, 0, 3, 1), value_order=(0, 2, 1, 3)),
    case("one head a group", key_ranks=(64,) * 4, value_ranks=(64,) * 4, Hkv=4, M=7),
    case("slices of an engine's tensor", strided=True, S=2),
]  # fmt: skip


def by_planes(problem):
    layer, q = problem[:2]
    keys, values = layer.operands
    return plan.planes(q.dtype, "sm90", keys.sizes, values.sizes)


@pytest.mark.every(6)
@pytest.mark.parametrize("case", PLANES, ids=str)
def test_every_option(case, device):
    problem = make(case, case.dtype)
    assert any(by_planes(problem)), "this is what is tested"
    check(case, case.dtype, device)


@pytest.fixture
def magic(monkeypatch):
    """As a device is served whose tensor cores take no subnormal numbers."""
    for name in ("ATTEND_PACKED", "PACKED_VALUES"):
        table = tuple(row._replace(launch=row.launch._replace(magic=True)) for row in getattr(launch, name))
        monkeypatch.setattr(launch, name.lower(), partial(launch.by_plane, table))
    for found in (plan.planes, plan.cut):
        found.cache_clear()
    yield
    for found in (plan.planes, plan.cut):
        found.cache_clear()


@pytest.mark.every(4)
@pytest.mark.parametrize("case", PLANES[4:12], ids=str)
def test_codes_as_normal_numbers(case, magic, device):
    assert by_planes(make(case, case.dtype)).values.magic
    check(case, case.dtype, device)


def test_float32_is_not_rounded_to_sixteen_bits():
    """Codes are operands of products in float32."""
    problem = make(replace(PLANES[0], lens=(130, 1)), torch.float32)
    out, _ = attend(problem)
    true, _ = exact(problem)
    assert (out.double() - true).norm() < 2e-6 * true.norm()


@pytest.mark.parametrize("steps", [-1, 0])
def test_a_factor_is_the_same_in_all_chunks(steps, device):
    """Queries whose bound is a power of two, give or take what turning them back rounds."""
    own = case("at a power of two", chunk=64, Hkv=1, M=8, S=4, lens=(900,), key_ranks=(32,), value_ranks=(32,),
               key_bits=(8,), value_bits=(8,), call={"num_splits": 1})  # fmt: skip
    layer, q, k_cache, v_cache, kwargs = make(own, own.dtype)
    sign = torch.randint(2, q.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    q = q[:, :1, :1] * sign  # of one size
    bound = q[0, 0, 0].double().norm() * layer.operands.keys.norms[0] / math.log(2)
    kwargs["softmax_scale"] = (2 ** (bound / 8).log2().round() / bound).item() * (1 + steps * 2.0**-24)
    problem = layer, q, k_cache, v_cache, kwargs
    (_, lse), (_, true_lse) = attend(problem), exact(problem)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_broken_scale_is_seen_where_it_is_met(dtype, device):
    check_broken_scales(dtype, device)


def test_turning_queries_back_loses_nothing(device):
    check_turned(device)


@pytest.mark.every(3)
@pytest.mark.parametrize("scale", [1e8, -1e8, 0.0, 1e-30])
@pytest.mark.parametrize("chunk", [None, 512])
def test_queries_of_zeros_see_all_tokens_alike(scale, chunk, device):
    own = case("zeros", chunk=chunk, rope="default" if chunk else None, lens=(40,), offset=True)
    layer, q, k_cache, v_cache, kwargs = make(own, own.dtype)
    problem = layer, q * 0, k_cache, v_cache, {**kwargs, "softmax_scale": scale}
    (out, lse), (true, true_lse) = attend(problem), exact(problem)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-3)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=1e-6)


# Results against float64 on the same codes, beside those of latents unpacked to bfloat16 as they were before.


def unpacked_to_bfloat16(problem, scale):
    """softmax(a @ k) @ v with a, k, p and v rounded to bfloat16, in otherwise exact sums: the heads of one token."""
    layer, q, k_cache, v_cache, kwargs = plain(problem)

    def rounded(x):
        return x.float().bfloat16().double()

    table, length = kwargs["block_table"][0], int(kwargs["seq_lens"][0])
    t = torch.arange(length)
    rows = table[t // k_cache.shape[1]].long(), t % k_cache.shape[1]
    zk, zv, outs = k_cache[rows], v_cache[rows], []
    for h in range(q.shape[2]):
        k = h // (q.shape[2] // layer.num_kv_heads)
        g = k // layer.keys.group_size
        a = rounded(q[0, 0, h] @ layer.keys.up[k, : layer.keys.ranks[g]].T)
        score = a @ rounded(zk[:, layer.keys.columns[g]]).T * scale
        p = (score - score.max()).exp()
        mixed = rounded(p) @ rounded(zv[:, layer.values.columns[g]]) / p.sum()
        outs.append(mixed @ layer.values.up[k, : layer.values.ranks[g]])
    return torch.stack(outs)


def drawn(kind, *shape, g):
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    if kind == "heavy-tailed":  # Student's t of three degrees of freedom
        x /= torch.randn(*shape, 3, generator=g, dtype=torch.float64).square().mean(-1).sqrt()
    return x * torch.logspace(0, -1, shape[-1], dtype=torch.float64)  # latents fall in energy


@pytest.mark.every(4)
@pytest.mark.parametrize("size", [1.0, 2.0**-9], ids=["", "tiny"])
@pytest.mark.parametrize("kind", ["Gaussian", "heavy-tailed", "aligned"])
@pytest.mark.parametrize("bits", [(8, 4, 2), (4,)])
def test_a_third_of_the_error_that_unpacking_had(bits, kind, size, device):
    shape = Case("near", rope=None, Hkv=2, M=4, D=64, key_ranks=(256,), value_ranks=(256,), lens=(500,),
                 key_bits=bits, value_bits=bits, dtype=torch.float16)  # fmt: skip
    layer, q, k_cache, v_cache, kwargs = make(shape, torch.float16)
    g = torch.Generator().manual_seed(5)
    t = torch.arange(500)
    slots = kwargs["block_table"][0, t // 16].long() * 16 + t % 16
    zk, zv = (drawn(kind, 500, 256, g=g) for _ in range(2))
    if kind == "aligned":
        keys = zk[torch.randint(500, (8,), generator=g)] @ layer.keys.up[:1, :256].double().repeat(8, 1, 1)
        q = (4 * keys / keys.norm(dim=-1, keepdim=True)).transpose(0, 1)[None, :, :8].half()[:, :1]
    lrattn.write_latents(layer, (zk * size).half(), (zv * size).half(), k_cache, v_cache, slots)
    scale = 0.5 / size
    kwargs["softmax_scale"] = scale
    problem = layer, q, k_cache, v_cache, kwargs
    true, _ = exact(problem)
    out, _ = attend(problem)
    before = unpacked_to_bfloat16(problem, scale)
    error, old = ((x.double()[0, 0] - true[0, 0]).norm() / true.norm() for x in (out, before[None, None]))
    assert error < old / 3 and error < 1.5e-3, (error, old)


# The assembly, by a reader of its own.


def run(text, *inputs):
    """What PTX of `prmt`, `shr`, `and`, `mov`, `lop3`, `add` and `mul` in $n makes of uint32 words: its outputs."""
    names = {f"${i}": x for i, x in inputs}
    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        name, to, *given = re.split(r"[\s,]+", line.strip())
        values = [names[x] if x in names else np.uint32(int(x, 0)) for x in given]
        names[to] = EXECUTED[name](*values)
    return names


def prmt(a, b, selector):
    both = [(x >> np.uint32(8 * i)) & np.uint32(255) for x in (a, b) for i in range(4)]
    return sum(both[int(selector) >> 4 * i & 7].astype(np.uint32) << np.uint32(8 * i) for i in range(4))


def lop3(a, b, c, table):
    assert int(table) == 0xEA, "(a & b) | c"
    return (a & b) | c


def of_halves(operation):
    return lambda a, b: operation(
        np.broadcast_to(a, np.broadcast(a, b).shape).copy().view(np.float16),
        np.broadcast_to(b, np.broadcast(a, b).shape).copy().view(np.float16),
    ).view(np.uint32)


EXECUTED = {
    "prmt.b32": lambda a, b, s: prmt(a, np.broadcast_to(b, a.shape), s),
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "mov.b32": lambda a: a,
    "lop3.b32": lop3,
    "add.rn.f16x2": of_halves(np.add),
    "mul.rn.f16x2": of_halves(np.multiply),
}  # fmt: skip


@triton.jit
def planes_kernel(x, out, n, BITS: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr):
    """out[m] = plane m of halfwords x [N]."""
    i = tl.arange(0, N)
    z = planes.planes(tl.load(x + i), BITS, MAGIC, ASM)
    for m in tl.static_range(16 // BITS):
        tl.store(out + m * N + i, z[m])


@triton.jit
def scales_kernel(x, out, ASM: tl.constexpr, N: tl.constexpr):
    """out[n] = scale n of words x [N]."""
    i = tl.arange(0, N)
    word = tl.load(x + i)
    for n in tl.static_range(3):
        tl.store(out + n * N + i, planes.scale_of(word, n, ASM))


def drawn_words(count):
    return np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("magic", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_assembly_says_what_the_plain_expressions_say(bits, magic, device):
    words = drawn_words(64)
    x = torch.from_numpy(words.view(np.int16).copy()).to(device)
    out = torch.empty(16 // bits, 128, dtype=torch.float16, device=device)
    planes_kernel[(1,)](x, out, 0, BITS=bits, MAGIC=magic, ASM=False, N=128)
    found = run(planes.planes_asm(bits, magic), (16 // bits, words))
    for m in range(16 // bits):
        assert np.array_equal(found[f"${m}"].copy().view(np.uint16), out[m].cpu().numpy().view(np.uint16))
        codes = (words.view(np.uint16) >> bits * m) & (2**bits - 1)
        assert np.array_equal(out[m].cpu().double().numpy(), codes * planes.unit(bits, m, magic))
    if device.type == "cuda":
        own = torch.empty_like(out)
        planes_kernel[(1,)](x, own, 0, BITS=bits, MAGIC=magic, ASM=launch.assembles(device), N=128)
        assert torch.equal(own.view(torch.int16), out.view(torch.int16))


def test_scales_too(device):
    words = drawn_words(64) & np.uint32(0x00FFFFFF)  # the last byte is 0
    x = torch.from_numpy(words.view(np.int32).copy()).to(device)
    out = torch.empty(3, 64, dtype=torch.float16, device=device)
    scales_kernel[(1,)](x, out, ASM=False, N=64)
    pairs = words.reshape(32, 2)
    for n in range(3):
        found = run(planes.scale_asm(n), (1, pairs[:, 0].copy()), (2, pairs[:, 1].copy()))["$0"]
        assert np.array_equal(found.copy().view(np.uint16), out[n].cpu().numpy().view(np.uint16))
        held = ((words >> np.uint32(8 * n)) & np.uint32(255)).astype(np.int16)
        assert np.array_equal(out[n].cpu().numpy().view(np.int16), held << 7)
    if device.type == "cuda":
        own = torch.empty_like(out)
        scales_kernel[(1,)](x, own, ASM=launch.assembles(device), N=64)
        assert torch.equal(own.view(torch.int16), out.view(torch.int16))


def test_products_of_float16_are_weighed_alike():
    words = drawn_words(64) & np.uint32(0x3FFF3FFF)
    found = run("mul.rn.f16x2 $0, $1, $2;", (1, words), (2, words[::-1].copy()))["$0"]
    a, b = (torch.from_numpy(x.view(np.float16).copy()) for x in (words, words[::-1].copy()))
    assert np.array_equal(found.view(np.float16), (a * b).numpy())


@pytest.mark.parametrize("bits", [(8,), (4,), (2,), (8, 4, 2), (16, 2), (2, 4, 8)])
@pytest.mark.parametrize("rank", [16, 144, 528, 1024, 3072])
def test_a_launch_has_sums_for_as_many_columns_as_registers_hold(bits, rank):
    own = case("columns", value_bits=bits, value_ranks=(rank,))
    side = make_layer(own, own.dtype).operands.values.sizes
    found = pieces.parts(side)
    assert all(sum(p[3] * (16 // p[1]) for p in part) <= pieces.MOST_COLUMNS for part in found)
    assert [p[:9] for part in found for p in part] == [p[:9] for p in pieces.pieces(side, pieces.PLANES)]


def test_rows_of_more_scales_than_a_product_has_columns_take_several_passes(device, monkeypatch):
    monkeypatch.setattr(cases, "segments", lambda rank, widths: tuple((16, bits) for bits in widths))
    own = case("nine scales", key_bits=(8, 4) * 4 + (2,), value_bits=(8,) * 9, key_ranks=(144,), value_ranks=(144,))
    side = make_layer(own, own.dtype).operands.values.sizes
    assert [len({p[5] for p in part}) for part in pieces.parts(side)] == [pieces.MOST_SCALES, 2]
    check(own, own.dtype, device)
