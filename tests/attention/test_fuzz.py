"""Every argument of decode_attention and write_latents, drawn by hypothesis.

Some cases and, slow, a few hundred, the same ones every time; `make fuzz` draws 10,000, others every time. A failure
prints the arguments of the test, the smallest found: as `@example(..)` under its `@fuzz` they are tried again.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor

import faults
import oracle
import packing
import pytest
import torch
from cases import Case, latents, make, make_layer, there
from checks import attend_densely, on
from closeness import assert_no_worse
from fuzzing import fuzz
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from strategies import PACKED, PLAIN, cases, layers

import lrattn
from lrattn.kernels import plan

SEEDS = st.integers(0, 2**32 - 1)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = [torch.float32, torch.float16]  # bfloat16 is computed wrongly there
FORMS = st.fixed_dictionaries(
    {"flat": st.booleans(), "out": st.booleans(), "return_lse": st.sampled_from([True, True, False])}
)
SIZES = {"heads": 4, "dims": [2, 32, 48, 64, 80], "ranks": [16, 32, 48, 80], "most_heads": 6}
SMALL = {**SIZES, "longest": 220, "most_queries": 3, "most_splits": 5}
BITS = {**SMALL, "ranks": [*SIZES["ranks"], 272], "chunks": [None, 64, 128, 192, 512],
        "widths": PACKED | PACKED | PACKED | PLAIN}  # fmt: skip
FAULTY = {**SMALL, "longest": 40, "widths": PLAIN, "near": [False]}


def decode(problem, backend, form):
    """Result and lse (None where not asked for) of a call in the form drawn; nothing but `out` may change."""
    layer, q, k_cache, v_cache, kwargs = problem
    flat = form["flat"] and q.shape[1] == 1
    given = there(q, k_cache, v_cache)
    held = [x.clone() for x in given]
    kwargs = {**kwargs, "return_lse": form["return_lse"], "backend": backend}
    if form["out"]:
        axes = result_axes(layer, q.shape[2], kwargs.get("project", "heads"))
        room = q.new_full((len(q), 3, *([] if flat else [q.shape[1]]), *axes[:-1], axes[-1] + 5), 7.0)
        kwargs["out"] = room[:, 1, ..., : axes[-1]].fill_(torch.nan)
    # On a stack of its own: CPython's grows by 16 KiB, and where a border lies in Triton's interpreter, as it may this
    # deep in hypothesis, most of the time goes to allocating and freeing the same piece.
    with ThreadPoolExecutor(1) as thread:
        queries = q[:, 0] if flat else q
        got = thread.submit(lrattn.decode_attention, queries, k_cache, v_cache, layer, **kwargs).result()
    result, lse = got if form["return_lse"] else (got, None)
    if form["out"]:
        assert result is kwargs["out"]
        assert (room[:, ::2] == 7).all() and (room[..., axes[-1] :] == 7).all(), "written beside out"
    assert all(map(same, given, held)), "an input was changed"
    result, lse = (None if x is None else (x[:, None] if flat else x).cpu() for x in (result, lse))
    return result, lse


def result_axes(layer, query_heads, project):
    """Axes of a result after B and S."""
    last = {"latent": max(layer.values.ranks), "heads": layer.head_dim, "hidden": layer.wo.shape[2]}[project]
    return [last] if project == "hidden" else [query_heads, last]


def same(x, y):
    """Bit for bit, NaN included."""
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))


def exact(problem):
    layer, q, k_cache, v_cache, kwargs = packing.plain(on("cpu", *problem))
    return oracle.attend(q, k_cache, v_cache, layer, **kwargs)


@fuzz(1, case=cases(), seed=SEEDS, form=FORMS)
def test_the_reference_is_dense_attention(case, seed, form, device):
    problem = make(case, torch.float64, seed)
    out, lse = decode(problem, "reference", form)
    expected, expected_lse, sway = exact(problem)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13 * (1 + largest + sum(sway[0])))
    if form["return_lse"]:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13 * (1 + sum(sway[1])))


def check_no_worse(case, dtype, seed, form, backend, device):
    problem = on(device, *make(case, dtype, seed))
    out, lse = decode(problem, backend, form)
    true, true_lse, sway = exact(problem)
    plain, plain_lse = (x.cpu() for x in attend_densely(problem)) if case.lens else (true.to(dtype), true_lse.float())
    eps, sum_eps = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    slack = [eps * by_key + sum_eps * by_sum for by_key, by_sum in sway]
    assert_no_worse(out, plain, true, slack=slack[0])
    if form["return_lse"]:
        some = true_lse.isfinite()
        assert torch.equal(lse == -torch.inf, ~some)
        assert_no_worse(lse[some], plain_lse[some], true_lse[some], dtype, slack[1])


@fuzz(4, case=cases(most_splits=17), seed=SEEDS, form=FORMS, dtype=st.sampled_from(FLOATS[1:]))
def test_the_reference_is_no_worse_than_pytorch(case, seed, form, dtype, device):
    check_no_worse(case, dtype, seed, form, "reference", "cpu")


@fuzz(6, case=cases(**SMALL), seed=SEEDS, form=FORMS, dtype=st.sampled_from(INTERPRETED))
def test_the_kernels_are_no_worse_than_pytorch(case, seed, form, dtype, device):
    check_no_worse(case, dtype, seed, form, "triton", device)


@fuzz(3, case=cases(**BITS), seed=SEEDS, form=FORMS, dtype=st.sampled_from([torch.float16] * 3 + [torch.float32]))
def test_the_kernels_are_no_worse_than_pytorch_on_packed_rows(case, seed, form, dtype, device):
    check_no_worse(case, dtype, seed, form, "triton", device)


def way_of(case):
    """How the kernels attend to a case's rows in float16: in one pass or two, whether codes of keys and of values are
    operands of products, and whether tokens go piecemeal."""
    call, placed = case.call, case.positions or case.offsets is not None
    keys, values = (side.sizes for side in make_layer(case, torch.float16).operands)
    size = plan.cut(
        len(case.lens), case.S, case.Hkv * case.M, torch.float16, "sm90", 4, keys, values, placed, 220,
        min(call.get("window_size", 0), 2**30), call.get("num_splits", 0), call.get("workspace_limit", 2**28),
    )  # fmt: skip
    return size.fused is not None, *(x is not None for x in size.planes), size.tiles < size.total


DRAWN = {
    "one pass": (True, True, True, False),
    "two passes": (False, True, True, False),
    "keys": (False, True, False, False),
    "values": (False, False, True, False),
    "piecemeal": (False, True, True, True),
}


@pytest.mark.parametrize("way", DRAWN.values(), ids=DRAWN)
def test_all_ways_of_packed_rows_are_drawn(way):
    """Within the examples that a failure would be looked for in."""

    def is_such(case):
        return case.lens and case.S and (case.key_bits or case.value_bits) and way_of(case) == way

    find(cases(**BITS), is_such, settings=settings(max_examples=3000, phases=[Phase.generate]))


# Where new tokens go: axes before the last, pages, how many slots lie outside, and how tensors are laid out.
WRITES = st.fixed_dictionaries(
    {
        "pages": st.integers(0, 3),
        "lead": st.lists(st.integers(0, 4), max_size=3).map(tuple),
        "outside": st.sampled_from([0.0, 0.3, 1.0]),
        "integer": st.sampled_from([torch.int32, torch.int64]),
        "strided": st.booleans(),
    }
)


def new_tokens(case, where, dtype, seed, device="cpu"):
    """Layer, latents, caches with a number in every element and slots; where strided, in slices of wider tensors, and
    what lies beside those of the caches."""
    layer = make_layer(case, dtype, seed).to(device)
    g = torch.Generator().manual_seed(seed)
    n, room, integer = math.prod(where["lead"]), where["pages"] * case.P, where["integer"]
    slots = torch.randperm(room + n, generator=g)[:n].to(integer)
    far = torch.tensor([-1, room, -room - 1, torch.iinfo(integer).min, torch.iinfo(integer).max], dtype=integer)
    away = (torch.rand(n, generator=g) < where["outside"]) | (slots >= room)
    slots = torch.where(away, far[torch.randint(len(far), (n,), generator=g)], slots).view(where["lead"]).to(device)
    zk, zv = (z if z is None else z * case.size for z in latents(layer, *where["lead"], generator=g))
    widths = [layer.k_width, layer.v_width, 16]
    pool = torch.randn(where["pages"], 2, case.P, sum(widths), generator=g).to(device, dtype)
    k_cache, v_cache, rest = pool[:, 1].split(widths, 2)
    if not where["strided"]:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    else:
        zk, slots = torch.stack((zk, zk), -2)[..., 1, :], torch.stack((slots, slots), -1)[..., 1]
    return layer, zk, zv, k_cache, None if layer.shared else v_cache, slots, (pool[:, 0], rest)


def written(zk, zv, k_cache, v_cache, slots):
    """The caches after a plain loop over the tokens."""
    caches = [None if x is None else x.clone() for x in (k_cache, v_cache)]
    num_pages, page_size, _ = k_cache.shape
    for i, slot in enumerate(slots.flatten().tolist()):
        if 0 <= slot < num_pages * page_size:
            page, offset = divmod(slot, page_size)
            for cache, z in zip(caches, (zk, zv)):
                if cache is not None:
                    cache[page, offset] = z.reshape(-1, z.shape[-1])[i]
    return caches


def check_write(case, where, dtype, seed, backend, device):
    layer, zk, zv, k_cache, v_cache, slots, beside = new_tokens(case, where, dtype, seed, device)
    expected, before = written(zk, zv, k_cache, v_cache, slots), [x.clone() for x in beside]
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots, backend=backend)
    assert same(k_cache, expected[0]) and (v_cache is None or same(v_cache, expected[1]))
    assert all(map(same, beside, before)), "written beside the caches"


@st.composite
def written_cases(draw, **limits):
    return Case("drawn", P=draw(st.sampled_from([16, 48])), **draw(layers(**limits)))


@fuzz(2, case=written_cases(), where=WRITES, seed=SEEDS, dtype=st.sampled_from(FLOATS))
def test_the_reference_writes_what_a_loop_writes(case, where, seed, dtype, device):
    check_write(case, where, dtype, seed, "reference", "cpu")


@fuzz(8, case=written_cases(heads=4), where=WRITES, seed=SEEDS, dtype=st.sampled_from(INTERPRETED))
def test_the_kernels_write_what_a_loop_writes(case, where, seed, dtype, device):
    check_write(case, where, dtype, seed, "triton", device)


def unchanged(call, run, wrong):
    """What one wrong argument leads to; nothing is written."""
    buffers = [x for n, x in call.items() if n in ("k_cache", "v_cache", "out") and x is not None]
    before = [x.clone() for x in buffers]
    try:
        result = run(**{**call, **wrong})
    except Exception as error:
        result = error
    assert all(map(same, buffers, before)), "something was written"
    return result


def refusals(call, run, found, backends):
    """Every fault that does not end in one clear line that names an argument."""
    for label, names, wrong in found:
        for backend in backends:
            got = unchanged(call, run, {"backend": backend, **wrong})
            line = re.fullmatch(r"(\w+)(\.\w+)?(?:, (\w+))?: expected .*, got .*", str(got))
            if type(got) is not ValueError or not line or not names & set(line.groups()):
                yield f"{label} ({backend}): {type(got).__name__}: {str(got)[:200]}"


@fuzz(20, case=cases(**FAULTY).filter(lambda c: c.lens and c.S and c.lens[0]), seed=SEEDS, flat=st.booleans(),
      dtype=st.sampled_from([torch.float64, torch.float32]))  # fmt: skip
def test_decode_attention_refuses_one_wrong_argument_by_name(case, seed, flat, dtype, device):
    layer, q, k_cache, v_cache, kwargs = make(case, dtype, seed)
    out = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    if flat and q.shape[1] == 1:
        q, out = q[:, 0], out[:, 0].clone()
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "layer": layer, "out": out, **kwargs}
    backends = [None, "reference"] + (["triton"] if dtype == torch.float32 and layer.head_dim <= 256 else [])
    unclear = list(refusals(call, lrattn.decode_attention, faults.of_decode(call), backends))
    assert not unclear, "\n".join(unclear)


@fuzz(20, case=written_cases(heads=4), where=WRITES, seed=SEEDS)
def test_write_latents_refuses_one_wrong_argument_by_name(case, where, seed, device):
    layer, zk, zv, k_cache, v_cache, slots, _ = new_tokens(case, {**where, "strided": False}, torch.float32, seed)
    names = "layer", "zk", "zv", "k_cache", "v_cache", "slot_mapping"
    call = dict(zip(names, (layer, zk, zv, k_cache, v_cache, slots)))
    unclear = list(refusals(call, lrattn.write_latents, faults.of_write(call), [None, "reference", "triton"]))
    assert not unclear, "\n".join(unclear)
