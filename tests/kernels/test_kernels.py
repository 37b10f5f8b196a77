"""The kernels against the reference in float64, no worse than PyTorch in their own dtype; on the CPU interpreted."""

import random
from dataclasses import replace

import dense
import pytest
import torch
from cases import CASES, FAR, PACKED, RAGGED, Case, latents, make
from checks import (
    attend,
    check,
    check_broken,
    check_far_pages,
    check_known_rows,
    check_rebuild,
    check_write,
    dtypes,
    exact,
    on,
)
from matrix import COLUMNS, MATRIX, QUICK, ROWS, allowed
from pairwise import uncovered
from slowly import slow_unless

import lrattn


@pytest.mark.parametrize("case", slow_unless(MATRIX[:QUICK], MATRIX), ids=str)
def test_every_shape_an_engine_brings(case, device):
    for dtype in dtypes(case, device):
        check(case, dtype, device)


def test_every_two_values_meet():
    """All but those that no allowed row holds: none is found among thousands drawn with the pair in."""
    draw = random.Random(0)
    for a, x, b, y in uncovered(ROWS, COLUMNS):
        tries = ({n: draw.choice(values) for n, values in COLUMNS.items()} | {a: x, b: y} for _ in range(4000))
        assert not any(map(allowed, tries)), f"{a}={x} and {b}={y} meet nowhere"


def test_every_value_is_quick():
    quick = ROWS[:QUICK]
    assert not [(n, x) for n, values in COLUMNS.items() for x in values if x not in [row[n] for row in quick]]


FORMS = {"rebuilt": {}, "absorbed": {"rope": None}, "chunks": {"chunk": 64}}
LONG = [
    Case("rebuilt", Hkv=2, M=2, lens=(1100, 1029), key_ranks=(48,), rope={"max_position": 2048}),
    Case("absorbed", Hkv=2, M=2, lens=(1100, 1029), key_ranks=(48,), rope=None),
    Case("joint", Hkv=2, lens=(1100,), key_ranks=(160,), value_ranks=(160,), shared=True),
    Case("chunks", Hkv=2, M=2, lens=(1100, 1029), key_ranks=(48,), value_ranks=(48,), shared=True, offset=True,
         chunk=512, offsets=(700, FAR)),
]  # fmt: skip


@pytest.mark.every(8)
@pytest.mark.parametrize("case", CASES + PACKED + LONG, ids=str)
def test_the_cases_of_the_reference_and_a_thousand_tokens(case, kernel_dtype, device):
    check(case, kernel_dtype, device)


@pytest.mark.every(3)
@pytest.mark.parametrize("form", FORMS)
def test_peaked_softmax_by_rms(form, kernel_dtype, device):
    """Queries along a key: scores are large, and the rounding of one of them decides."""
    case = Case("aligned", M=2, Hkv=2, lens=(200,) * 12, key_ranks=(32,), **FORMS[form])
    layer, q, k_cache, v_cache, kwargs = make(case, kernel_dtype)
    k, _ = lrattn.rebuild(k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"])
    q = k[torch.arange(12) * 200 + 61].repeat_interleave(2, 1)[:, None] * 2
    problem = on(device, layer, q, k_cache, v_cache, kwargs)
    true, _ = exact(problem)
    plain, _ = dense.attend(*problem[1:4], problem[0], **problem[4])
    rms, own = ((x.double().cpu() - true).square().mean().sqrt() for x in (attend(problem)[0], plain))
    assert rms <= 2 * own + torch.finfo(kernel_dtype).eps * true.square().mean().sqrt()


@pytest.mark.every(2)
@pytest.mark.parametrize("positions", [False, True])
def test_far_positions(positions, kernel_dtype, device):
    """A head of the sequence is attended to elsewhere, so the tokens here are far out; or their positions say so."""
    t0 = 130_000
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


@pytest.mark.every(3)
@pytest.mark.parametrize("form", FORMS)
def test_a_start_beyond_the_sequence(form, kernel_dtype, device):
    """Tiles are counted from where a row begins, in 32 bits: a start near 2^31 must not wrap round to a token."""
    case = Case("far start", Hkv=1, key_ranks=(16,), value_ranks=(16,), lens=(1, 130), starts=(2**31 - 1, 0))
    case = replace(case, **FORMS[form])
    for limit in (1, 256 << 20):  # piecemeal, and whole
        check(replace(case, call={"workspace_limit": limit}), kernel_dtype, device)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("cause", ["past the table", "a position", "a chunk", "the query", "a value"])
def test_what_is_no_number_stays_none(cause, num_splits, device):
    """A GPU does not know the lengths before it runs: where it cannot be right it must not look right."""
    rope = {"max_position": 64} if cause == "past the table" else "default"
    form = {"chunk": 64, "offsets": (0,)} if cause == "a chunk" else {"positions": cause == "a position"}
    case = Case("nan", Hkv=2, lens=(200,), rope=rope, **form)
    layer, q, k_cache, v_cache, kwargs = on(device, *make(replace(case, lens=(60,)), torch.float32))
    page = kwargs["block_table"][0, 1].item()
    if cause == "past the table":
        kwargs["seq_lens"] += 10
        used = kwargs["block_table"][0, :4].tolist()
        kwargs["block_table"][0, 4] = next(page for page in range(len(k_cache)) if page not in used)
        k_cache.nan_to_num_(0.0), v_cache.nan_to_num_(0.0)
    elif cause == "a position":
        kwargs["positions"][page, 3] = 5000
    elif cause == "a chunk":
        kwargs["offsets"] -= 2**20 - 30  # the last tokens are past the table of turns
    elif cause == "the query":
        q[..., 5] = torch.nan
    else:
        v_cache[page, 3] = torch.nan
    out, lse = attend((layer, q, k_cache, v_cache, kwargs), num_splits=num_splits)
    assert out.isnan().all() and (lse.isnan().all() or cause == "a value")


@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_a_window_wider_than_everything(window, device):
    problem = on(device, *make(Case("wide window", Hkv=2, S=3, lens=(40, 2)), torch.float32))
    expected = attend(problem)
    for got, want in zip(attend(problem, window_size=window), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.every(3)
@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_splits_or_workspace(form, device):
    case = Case("cut", M=2, S=2, Hkv=2, lens=(280, 130, 0, 1), key_ranks=(32,), **FORMS[form])
    problem = on(device, *make(case, torch.float32))
    whole = attend(problem, num_splits=1)
    for changes in ({"num_splits": 2}, {"num_splits": 9}, {"workspace_limit": 1}, {"workspace_limit": 200_000}):
        torch.testing.assert_close(attend(problem, **changes), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_out_is_written_whatever_its_strides(backend, device):
    problem = on(device, *make(RAGGED, torch.float16))
    for project, last in (("heads", (8, 64)), ("latent", (8, 64)), ("hidden", (24,))):
        expected, lse = attend(problem, project=project, backend=backend)
        out = torch.full((4, 3, 2, *last), torch.nan, dtype=torch.float16, device=device).transpose(1, 2)[:, :, 1]
        got, got_lse = attend(problem, project=project, out=out, backend=backend)
        assert got is out and torch.equal(out, expected) and torch.equal(lse, got_lse)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_query_without_the_axis_of_queries(backend, device):
    case = Case("flat", M=2, lens=(20, 3))
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float32))
    out, lse = attend((layer, q, k_cache, v_cache, kwargs), backend=backend)
    flat = torch.full_like(out[:, 0], torch.nan)
    got, got_lse = attend((layer, q[:, 0], k_cache, v_cache, kwargs), out=flat, backend=backend)
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
    before, slots = k_cache.clone(), torch.empty(0, dtype=torch.int64, device=device)
    lrattn.write_latents(layer, *latents(layer, 0), k_cache, v_cache, slots, backend="triton")
    torch.testing.assert_close(k_cache, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", slow_unless([*MATRIX[:QUICK:5], *PACKED[::4]], [*MATRIX[::5], *PACKED]), ids=str)
def test_rebuild(case, device):
    for dtype in dtypes(case, device):
        check_rebuild(case, dtype, device)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rebuild_of_a_known_number_of_tokens(backend, device):
    check_known_rows(backend, device)


@pytest.mark.every(6)
@pytest.mark.parametrize("slots", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "case",
    [*MATRIX[::4], *PACKED, *(replace(c, dtype=torch.float16) for c in PACKED)],
    ids=str,
)
def test_write_latents(case, slots, device):
    for dtype in dtypes(case, device):
        check_write(case, slots, dtype, device)


def test_latents_that_are_not_finite_are_packed_as_such(device):
    check_broken(device)


@pytest.mark.parametrize("P", [16, 64])
def test_offsets_beyond_32_bits(P, device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GiB of GPU memory")
    check_far_pages(P, device)
