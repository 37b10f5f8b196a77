"""The kernels against the reference in float64, no worse than PyTorch in their own dtype; on the CPU interpreted."""

import random
from dataclasses import replace

import dense
import pytest
import torch
from cases import CASES, PACKED, Case, in_one, make, make_layer
from closeness import assert_no_worse
from matrix import COLUMNS, MATRIX, ROWS, allowed
from packing import plain, poison
from pairwise import uncovered

import lrattn
from lrattn.attention.cache import key_rows, value_rows

RAGGED = Case("ragged", M=2, S=2, lens=(70, 33, 1, 0), key_ranks=(32, 16), value_ranks=(64, 16), bias=True, sinks=True)


def on(device, *things):
    """Tensors, layers and dictionaries of them, moved; the rest as it is. A problem of cases.make, say."""
    return [
        dict(zip(x, on(device, *x.values()))) if isinstance(x, dict) else x.to(device) if hasattr(x, "to") else x
        for x in things
    ]


def attend(problem, **changes):
    layer, q, k_cache, v_cache, kwargs = problem
    kwargs = {"return_lse": True, "backend": "triton", **kwargs, **changes}
    return lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)


def exact(problem):
    """The reference in float64, whose truth is tests/attention/test_reference.py."""
    layer, q, k_cache, v_cache, kwargs = plain(on("cpu", *problem))
    return lrattn.decode_attention(q, k_cache, v_cache, layer, return_lse=True, backend="reference", **kwargs)


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


def attend_densely(problem):
    """PyTorch in the problem's dtype, on latents as they are or as their bits say."""
    layer, *tensors, kwargs = problem
    if layer.packed:
        wide, *tensors, _ = plain(on("cpu", *problem))
        tensors = on(layer.device, *(None if x is None else x.to(layer.dtype) for x in tensors))
        layer = wide.to(layer.device, layer.dtype)
    return dense.attend(*tensors, layer, **kwargs)


def dtypes(case, device):
    return [case.dtype] if device.type == "cpu" else [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_shape_an_engine_brings(case, device):
    for dtype in dtypes(case, device):
        check(case, dtype, device)


@pytest.mark.parametrize("case", CASES + PACKED, ids=str)
def test_the_cases_of_the_reference(case, kernel_dtype, device):
    check(case, kernel_dtype, device)


def test_every_two_values_meet():
    """All but those that no allowed row holds: none is found among thousands drawn with the pair in."""
    draw = random.Random(0)
    for a, x, b, y in uncovered(ROWS, COLUMNS):
        tries = ({n: draw.choice(values) for n, values in COLUMNS.items()} | {a: x, b: y} for _ in range(4000))
        assert not any(map(allowed, tries)), f"{a}={x} and {b}={y} meet nowhere"


LONG = {
    "rebuilt": Case("rebuilt", Hkv=2, M=2, lens=(1100, 1029), key_ranks=(48,), rope={"max_position": 2048}),
    "absorbed": Case("absorbed", Hkv=2, M=2, lens=(1100, 1029), key_ranks=(48,), rope=None),
    "joint": Case("joint", Hkv=2, lens=(1100,), key_ranks=(160,), value_ranks=(160,), shared=True),
}


@pytest.mark.parametrize("name", LONG)
def test_a_thousand_tokens(name, kernel_dtype, device):
    check(LONG[name], kernel_dtype, device)


@pytest.mark.parametrize("rope", ["default", None], ids=["rebuilt", "absorbed"])
def test_peaked_softmax_by_rms(rope, kernel_dtype, device):
    """Queries along a key: scores are large, and the rounding of one of them decides."""
    case = Case("aligned", M=2, Hkv=2, lens=(200,) * 12, key_ranks=(32,), rope=rope)
    layer, q, k_cache, v_cache, kwargs = make(case, kernel_dtype)
    k, _ = lrattn.rebuild(k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"])
    q = k[torch.arange(12) * 200 + 61].repeat_interleave(2, 1)[:, None] * 2
    problem = on(device, layer, q, k_cache, v_cache, kwargs)
    true, _ = exact(problem)
    plain, _ = dense.attend(*problem[1:4], problem[0], **problem[4])
    rms, own = ((x.double().cpu() - true).square().mean().sqrt() for x in (attend(problem)[0], plain))
    assert rms <= 2 * own + torch.finfo(kernel_dtype).eps * true.square().mean().sqrt()


@pytest.mark.parametrize("t0, positions", [(2000, False), (130_000, False), (2000, True), (130_000, True)])
def test_far_positions(t0, positions, kernel_dtype, device):
    """A head of the sequence is attended to elsewhere, so the tokens here are far out; or their positions say so."""
    case = Case("far", M=2, Hkv=2, D=128, lens=(90,), rope={"max_position": t0 + 128, "fp32_angles": True})
    layer, q, k_cache, v_cache, kwargs = make(case, kernel_dtype)
    if positions:
        kwargs["positions"] = torch.full(k_cache.shape[:2], -1, dtype=torch.int32)
        t = torch.arange(90)
        kwargs["positions"][kwargs["block_table"][0, t // case.P].long(), t % case.P] = (t + t0).int()
    else:
        table, shift = kwargs["block_table"], t0 // case.P
        kwargs["block_table"] = torch.cat((table.new_full((1, shift), 2_000_000_000), table), 1)
        kwargs["seq_lens"] += t0
        kwargs["seq_starts"] = torch.tensor([t0], dtype=torch.int32)
    problem = on(device, layer, q, k_cache, v_cache, kwargs)
    out, lse = (x.cpu() for x in attend(problem, num_splits=1))
    true, true_lse = exact(problem)
    close = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[kernel_dtype]
    torch.testing.assert_close(out.double(), true, rtol=0, atol=close)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=close)


@pytest.mark.parametrize("rope", ["default", None], ids=["rebuilt", "absorbed"])
def test_a_start_beyond_the_sequence(rope, kernel_dtype, device):
    """Tiles are counted from where a row begins, in 32 bits: a start near 2^31 must not wrap round to a token."""
    case = Case("far start", Hkv=1, key_ranks=(16,), value_ranks=(16,), lens=(1, 130), starts=(2**31 - 1, 0), rope=rope)
    for limit in (1, 256 << 20):  # in chunks of tokens, and whole
        check(replace(case, call={"workspace_limit": limit}), kernel_dtype, device)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("cause", ["past the table", "a position", "the query", "a value"])
def test_what_is_no_number_stays_none(cause, num_splits, device):
    """A GPU does not know the lengths before it runs: where it cannot be right it must not look right."""
    rope = {"max_position": 64} if cause == "past the table" else "default"
    case = Case("nan", Hkv=2, lens=(200,), rope=rope, positions=cause == "a position")
    layer, q, k_cache, v_cache, kwargs = on(device, *make(replace(case, lens=(60,)), torch.float32))
    if cause == "past the table":
        kwargs["seq_lens"] += 10
    elif cause == "a position":
        kwargs["positions"][kwargs["block_table"][0, 1].item(), 3] = 5000
    elif cause == "the query":
        q[..., 5] = torch.nan
    else:
        v_cache[kwargs["block_table"][0, 1].item(), 3] = torch.nan
    if cause == "past the table":
        used = kwargs["block_table"][0, :4].tolist()
        kwargs["block_table"][0, 4] = next(page for page in range(len(k_cache)) if page not in used)
        k_cache.nan_to_num_(0.0), v_cache.nan_to_num_(0.0)
    out, lse = attend((layer, q, k_cache, v_cache, kwargs), num_splits=num_splits)
    assert out.isnan().all() and (lse.isnan().all() or cause == "a value")


@pytest.mark.parametrize("rope", ["default", None], ids=["rebuilt", "absorbed"])
def test_large_keys_before_their_norm(rope, device):
    """A raw key may be too large for float16; its norm is not."""
    case = Case("large", Hkv=2, key_norm=True, key_ranks=(32,), lens=(40,), rope=rope)
    layer = make_layer(case, torch.float32)
    keys = replace(layer.keys, up=layer.keys.up * 1000)
    layer = replace(layer, keys=keys).to(dtype=torch.float16)
    k_cache, v_cache = lrattn.allocate_cache(layer, 3, 16)
    g = torch.Generator().manual_seed(0)
    zk, zv = (torch.randn(40, n, generator=g).half() for n in (layer.row_width, layer.v_width))
    lrattn.write_latents(layer, zk * 100, zv, k_cache, v_cache, torch.arange(40))
    q = torch.randn(1, 1, 2, 64, generator=g).half()
    kwargs = {
        "block_table": torch.arange(3, dtype=torch.int32)[None],
        "seq_lens": torch.tensor([40], dtype=torch.int32),
    }
    problem = on(device, layer, q, k_cache, v_cache, kwargs)
    out, lse = (x.cpu() for x in attend(problem))
    expected, expected_lse = exact(problem)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-2)


@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_a_window_wider_than_everything(window, device):
    problem = on(device, *make(Case("wide window", Hkv=2, S=3, lens=(40, 2)), torch.float32))
    expected = attend(problem)
    for got, want in zip(attend(problem, window_size=window), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rope", ["default", None], ids=["rebuilt", "absorbed"])
def test_results_do_not_depend_on_splits_or_workspace(rope, device):
    case = Case("cut", M=2, S=2, Hkv=2, lens=(500, 130, 0, 1), key_ranks=(32,), rope=rope)
    problem = on(device, *make(case, torch.float32))
    whole = attend(problem, num_splits=1)
    for changes in ({"num_splits": 2}, {"num_splits": 9}, {"workspace_limit": 1}, {"workspace_limit": 200_000}):
        torch.testing.assert_close(attend(problem, **changes), whole, rtol=0, atol=2e-6)


def test_a_row_does_not_depend_on_its_batch(device):
    """With a fixed number of splits, bit for bit; also run after run."""
    case = Case("batch", M=2, Hkv=2, lens=(150, 33, 70), key_ranks=(32,))
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float16))
    whole = attend((layer, q, k_cache, v_cache, kwargs), num_splits=3)
    again = attend((layer, q, k_cache, v_cache, kwargs), num_splits=3)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    for b in range(3):
        one = {n: x[b : b + 1] if n in ("block_table", "seq_lens") else x for n, x in kwargs.items()}
        alone = attend((layer, q[b : b + 1], k_cache, v_cache, one), num_splits=3)
        assert torch.equal(alone[0][0], whole[0][b]) and torch.equal(alone[1][0], whole[1][b])


def test_out_is_written_whatever_its_strides(kernel_dtype, device):
    problem = on(device, *make(RAGGED, kernel_dtype))
    for project, last in (("heads", (8, 64)), ("latent", (8, 64)), ("hidden", (24,))):
        expected, lse = attend(problem, project=project)
        out = torch.full((4, 3, 2, *last), torch.nan, dtype=kernel_dtype, device=device).transpose(1, 2)[:, :, 1]
        got, got_lse = attend(problem, project=project, out=out)
        assert got is out and torch.equal(out, expected) and torch.equal(lse, got_lse)


def test_a_query_without_the_axis_of_queries(device):
    case = Case("flat", M=2, lens=(20, 3))
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float32))
    out, lse = attend((layer, q, k_cache, v_cache, kwargs))
    flat = torch.full_like(out[:, 0], torch.nan)
    got, got_lse = attend((layer, q[:, 0], k_cache, v_cache, kwargs), out=flat)
    assert got is flat and torch.equal(flat, out[:, 0]) and torch.equal(got_lse, lse[:, 0])


@pytest.mark.parametrize("shape", ["no sequences", "no queries", "no pages", "empty table"])
def test_nothing_to_do(shape, device):
    layer, q, k_cache, v_cache, kwargs = on(device, *make(Case("none", lens=(0, 0)), torch.float32))
    if shape == "no sequences":
        q, kwargs = q[:0], kwargs | {n: kwargs[n][:0] for n in ("block_table", "seq_lens")}
    elif shape == "no queries":
        q = q[:, :0]
    elif shape == "no pages":
        k_cache, v_cache = k_cache[:0], v_cache[:0]
    else:
        kwargs["block_table"] = kwargs["block_table"][:, :0]
    out, lse = attend((layer, q, k_cache, v_cache, kwargs))
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("case", MATRIX[::4] + PACKED, ids=str)
def test_rebuild(case, device):
    for dtype in dtypes(case, device):
        check_rebuild(case, dtype, device)


def check_rebuild(case, kernel_dtype, device):
    layer, _, k_cache, v_cache, kwargs = on(device, *make(_whole(case), kernel_dtype))
    arguments = (k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"], kwargs["positions"])
    got = lrattn.rebuild(*arguments, backend="triton")
    own = lrattn.rebuild(*arguments, backend="reference")
    wide, _, *caches, _ = plain(on("cpu", layer, k_cache, k_cache, v_cache, {}))
    true = lrattn.rebuild(*caches, wide, *on("cpu", *arguments[3:]), backend="reference")
    for side in range(2):
        assert_no_worse(got[side].cpu(), own[side].cpu(), true[side])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rebuild_of_a_known_number_of_tokens(backend, device):
    case = Case("known", Hkv=2, lens=(20, 0, 5), key_ranks=(32,))
    layer, _, k_cache, v_cache, kwargs = on(device, *make(case, torch.float32))
    arguments = (k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"])
    whole = lrattn.rebuild(*arguments, backend=backend)
    for n in (25, 7, 0):
        k, v = lrattn.rebuild(*arguments, num_tokens=n, backend=backend)
        assert torch.equal(k, whole[0][:n]) and torch.equal(v, whole[1][:n])


def _whole(case):
    """The same shape with every token in reach, so that none is poisoned."""
    call = {n: x for n, x in case.call.items() if n not in ("window_size", "max_seq_len")}
    return Case(**{**vars(case), "starts": None, "call": call})


@pytest.mark.parametrize("slots", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "case",
    [*MATRIX[::4], *PACKED, *(replace(c, dtype=torch.float16) for c in CASES + PACKED if c.key_norm or c.key_bits)],
    ids=str,
)
def test_write_latents(case, slots, device):
    for dtype in dtypes(case, device):
        check_write(case, slots, dtype, device)


def check_write(case, slots, kernel_dtype, device):
    """Latents bit for bit, the norm as precise as two numbers are, everything else untouched."""
    layer = make_layer(case, kernel_dtype).to(device)
    caches = lrattn.allocate_cache(layer, 3, case.P)
    for cache in caches:
        if cache is not None:
            cache.fill_(poison(cache.dtype))
    k_cache, v_cache = in_one(*caches)
    g = torch.Generator().manual_seed(0)
    zk = torch.randn(4, 9, layer.row_width, generator=g).to(device, kernel_dtype)
    zv = None if case.shared else torch.randn(4, 9, layer.values.width, generator=g).to(device, kernel_dtype)
    chosen = torch.randperm(3 * case.P, generator=g)[:36].to(slots)
    last = 3 * case.P - 1
    chosen[(chosen == last).int().argmax()], chosen[5], chosen[7] = last, -1, last + 1
    chosen = torch.stack((chosen, chosen), 1)[:, 0].view(4, 9).to(device)  # not contiguous
    lrattn.write_latents(layer, zk, zv, *caches, chosen, backend="reference")
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, chosen, backend="triton")
    width = layer.k_width - layer.norm_bytes if layer.row_side.formats else layer.row_width
    assert torch.equal(k_cache[..., :width].nan_to_num(9.0), caches[0][..., :width].nan_to_num(9.0))
    assert v_cache is None or torch.equal(v_cache.nan_to_num(9.0), caches[1].nan_to_num(9.0))
    if layer.key_norm is not None:
        held, expected = (key_rows(layer, x.flatten(0, 1))[1].double() for x in (k_cache, caches[0]))
        bound = 4 * torch.finfo(kernel_dtype).eps ** 2 + 1e-6
        torch.testing.assert_close(held, expected, rtol=bound, atol=0, equal_nan=True)
        tail = layer.k_width if layer.row_side.formats else width + 2 * layer.num_kv_heads
        assert torch.equal(k_cache[..., tail:].nan_to_num(9.0), caches[0][..., tail:].nan_to_num(9.0))


def test_latents_that_are_not_finite_are_packed_as_such(device):
    """As NaN, all of their segment of their token, and nothing else."""
    layer = make_layer(Case("broken", key_bits=(8, 2), value_bits=(4,)), torch.float32).to(device)
    zk, zv = torch.randn(3, 32, device=device), torch.randn(3, 48, device=device)
    zk[1, 3], zv[2, 9] = torch.inf, torch.nan
    caches, expected = ([x.fill_(7) for x in lrattn.allocate_cache(layer, 1, 16)] for _ in range(2))
    lrattn.write_latents(layer, zk, zv, *caches, torch.arange(3, device=device), backend="triton")
    lrattn.write_latents(layer, zk, zv, *expected, torch.arange(3, device=device), backend="reference")
    back, own = (key_rows(layer, x[0].flatten(0, 1)[:3])[0] for x in (caches, expected))
    assert torch.equal(back.isnan(), own.isnan()) and back[1, :16].isnan().all() and back.isnan().sum() == 16
    assert value_rows(layer, caches[1].flatten(0, 1)[:3]).isnan().sum() == 48


def test_nothing_is_written_for_no_tokens(device):
    layer = make_layer(Case("none"), torch.float32).to(device)
    k_cache, v_cache = (x.fill_(7.0) for x in lrattn.allocate_cache(layer, 1, 16))
    empty = torch.empty(0, dtype=torch.int64, device=device)
    lrattn.write_latents(layer, k_cache[0, :0], v_cache[0, :0], k_cache, v_cache, empty, backend="triton")
    assert (k_cache == 7.0).all() and (v_cache == 7.0).all()


@pytest.mark.parametrize("P", [16, 64])
def test_offsets_beyond_32_bits(P, device):
    """Pages and queries two billion elements apart: most of the memory is never touched."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GiB of GPU memory")
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
