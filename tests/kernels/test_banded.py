"""Keys before RoPE by a band: against the reference in float64, no worse than PyTorch but for the band's own error."""

import math
from dataclasses import replace
from functools import cache
from itertools import zip_longest

import pytest
import torch
import triton
from cases import YARN, Case, make, make_layer, reach
from checks import attend, attend_densely, exact, on
from checks import check as check_kernels
from closeness import assert_no_worse
from packing import plain, segments
from pairwise import covering_rows, covering_some
from slowly import slow_unless

import lrattn
from lrattn.factors import band
from lrattn.kernels import plan
from lrattn.kernels.pieces import powers

HALF, SINGLE = torch.float16, torch.float32
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 1024}


def way(case, dtype, device="sm90"):
    """How a case's keys go by a band, or None."""
    keys, values = (side.sizes for side in make_layer(case, dtype).operands)
    size = plan.cut(1, case.S, case.M * case.Hkv, dtype, device, 4, keys, values, case.positions, 300, 0, 0, 1 << 28)
    return size.banded


@pytest.fixture
def ran(monkeypatch, request):
    """Names of the kernels that ran."""
    names = []
    if request.config.getoption("--gpu"):
        kind, name = triton.JITFunction, "run"
    else:
        kind, name = triton.runtime.interpreter.GridExecutor, "__call__"
    call = getattr(kind, name)

    def counted(self, *args, **kwargs):
        names.append(getattr(self, "fn", self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, name, counted)
    return names


def check(case, dtype, device, ran, **expected):
    """That these kernels run, in the form expected, and are right."""
    found = way(case, dtype)
    assert found is not None and {n: getattr(found, n) for n in expected} == expected
    check_kernels(case, dtype, device)
    others = {"attend_rebuilt_kernel", "absorb_packed_kernel"}
    seen = any(begin < end for begin, end in (reach(case, b) for b in range(len(case.lens))))
    assert not others & set(ran) and (not seen or {"absorb_kernel", "attend_kernel"} <= set(ran))
    second = "attend_packed_kernel" if make_layer(case, dtype).values.formats else "latent_values_kernel"
    assert (second in ran) == (not found.one_pass) or not seen


# ------------------------------------------------------------------------------------- every two values of an option
COLUMNS = {
    "lens": [(0, 1, 63), (64, 65), (127, 128), (129,), (255,), (256,), (257,)],
    "starts": ["none", "in a tile", "in a block", "last"],
    "P": [16, 32, 48, 64, 80, 128],
    "C": [2, 3, 4, 6, 8],
    "groups": [1, 2, 3],
    "M": [1, 2, 4, 8],
    "S": [1, 2, 3, 4],
    "D": [64, 80, 96, 128, 256],
    "key_ranks": [(32, 112, 48), (48, 32, 112), (128, 16, 96)],
    "wide": ["no", "keys", "both"],  # beyond 128: 16 bits only
    "bits": ["no", "8 4 2", "4", "16 2", "8 4 2, values", "values"],  # of packed rows
    "values": ["paired", "riding", "joint row", "joint", "each head"],
    "order": [False, True],
    "rope": ["1e4", "5e5", "1e6 interleaved", "eighth", "half interleaved", "yarn", "llama3", "linear", "longrope"],
    "offset": [False, True],
    "who": ["causal", "not causal", "window 5", "window 70", "window 257"],
    "softcap": [0.0, 4.0],
    "sinks": [False, True],
    "project": ["heads", "latent", "hidden"],
    "num_splits": [0, 1, 3, 9],
    "workspace_limit": [256 << 20, 1, 1 << 18],
    "strided": [False, True],
    "near": [None, (20, 4, 2, True, True), (1, 0, 0, False, False)],
    "dtype": [HALF, SINGLE],
}
ROPES = {
    "1e4": {},
    "5e5": {"theta": 5e5},
    "1e6 interleaved": {"theta": 1e6, "interleaved": True},
    "eighth": {"partial_rotary_factor": 0.125},
    "half interleaved": {"partial_rotary_factor": 0.5, "interleaved": True},
    "yarn": YARN,
    "llama3": {"theta": 5e5, "scaling": LLAMA3},
    "linear": {"scaling": {"rope_type": "linear", "factor": 4.0}},
    "longrope": {},
}
WIDER = {32: 176, 112: 240, 48: 208, 128: 256, 16: 144, 96: 160}
KINDS = {n: [[value] for value in values] for n, values in COLUMNS.items()} | {
    "lens": [[(0, 1, 63), (64, 65), (127, 128), (129,), (255,), (256,)], [(257,)]],
    "starts": [["none"], ["in a tile", "in a block", "last"]],
    "P": [[16, 32, 64, 128], [48, 80]],
    "C": [[2, 4, 8], [3, 6]],
    "groups": [[1], [2, 3]],
    "M": [[1], [2, 4, 8]],
    "S": [[1], [2, 3, 4]],
    "D": [[64, 128], [80, 96, 256]],
    "key_ranks": [COLUMNS["key_ranks"]],
    "bits": [["no"], ["8 4 2", "4", "16 2", "8 4 2, values"], ["values"]],
    "values": [["paired"], ["riding", "joint row"], ["joint", "each head"]],
    "rope": [["1e4", "5e5", "linear", "yarn", "llama3", "longrope"], ["1e6 interleaved", "eighth", "half interleaved"]],
    "who": [["causal", "not causal"], ["window 5", "window 70", "window 257"]],
    "project": [["heads"], ["latent", "hidden"]],
    "num_splits": [[0, 1], [3, 9]],
    "near": [[None], [(20, 4, 2, True, True), (1, 0, 0, False, False)]],
}


def rope_of(row):
    """Arguments of Rope, beside those that a case has."""
    rope, pairs = dict(ROPES[row["rope"]]), row["D"] // 2
    if row["rope"] == "longrope":
        stretch = {"long_factor": [1 + j / pairs for j in range(pairs)], "short_factor": [1.0] * pairs}
        rope["scaling"] = LONGROPE | stretch
    return rope


@cache
def terms(rope, head_dim, dtype):
    """Of the band."""
    rope = rope_of({"rope": rope, "D": head_dim})
    found = lrattn.Rope(**{"theta": 1e4, "dim": head_dim, "max_position": 4096, **rope}).band(head_dim, dtype)
    return 0 if isinstance(found, str) else found.terms


def ranks_of(row):
    """Of keys."""
    keys = row["key_ranks"][: row["groups"]]
    return tuple(map(WIDER.get, keys)) if row["wide"] != "no" else keys


def bits_of(row):
    """Of keys."""
    words = row["bits"].removesuffix(", values")
    return () if words in ("no", "values") else tuple(map(int, words.split()))


def columns(row):
    """Of keys, in pieces of powers of two to 128; of packed rows those of segments as long as any group's."""
    if not bits_of(row):
        return max(ranks_of(row))
    held = zip_longest(*(segments(rank, bits_of(row)) for rank in ranks_of(row)), fillvalue=(0, 0))
    return sum(sum(powers(max(n for n, _ in own), 128)) for own in held)


def allowed(row):
    """The rule of plan.banded, too, in words of a row."""
    rows, rotary = row["M"] * row["S"], row["D"] * {"eighth": 0.125, "half interleaved": 0.5}.get(row["rope"], 1)
    fast = 16 * math.ceil(3 * rotary / 128)
    least = 3 if row["C"] == 3 else 2
    if least * rows > 16 or (4 if least == 3 else 2) * fast > 192 or row["C"] * row["groups"] * rows > 32:
        return False
    if columns(row) > (128 if row["dtype"] == SINGLE else 256) or (row["strided"] and bits_of(row)):
        return False
    if bits_of(row) and len({len(segments(rank, bits_of(row))) for rank in ranks_of(row)}) > 1:
        return False  # formats of a side have as many segments each
    if row["near"] and (row["project"] == "latent" or row["who"] == "not causal"):
        return False
    tiles = sum(row["lens"]) / 64 * row["C"] * row["groups"]
    if row["workspace_limit"] == 1 and (tiles > 4 or row["num_splits"] > 1):
        return False
    if tiles > 10 or tiles * row["num_splits"] > 18:
        return False
    absorbed = 16 * terms(row["rope"], row["D"], row["dtype"]) if rows > 1 else 0
    return absorbed <= (128 if row["dtype"] == HALF and columns(row) <= 160 else 64)


def case_of(i, row):
    heads = row["C"] * row["groups"]
    keys = ranks_of(row)
    values = {"paired": (64, 16, 112)[: row["groups"]], "each head": (16, 48, 32, 16)[: heads] * (heads // 4 + 1),
              "riding": tuple(r + 16 if r % 128 else r for r in keys), "joint row": keys, "joint": (96,)}  # fmt: skip
    values = values[row["values"]][:heads]
    if row["wide"] == "both" and row["values"] == "paired":
        values = tuple(r + 128 for r in values)
    shared = row["values"] in ("riding", "joint row")
    order = tuple((5 * h + 3) % heads for h in range(heads)) if row["order"] and heads % 5 else None
    starts = {"none": None, "in a tile": [7, 40, 0], "in a block": [70, 200, 1], "last": [n - 1 for n in row["lens"]]}
    starts = starts[row["starts"]] and tuple(starts[row["starts"]][: len(row["lens"])])
    call = {n: row[n] for n in ("softcap", "project", "num_splits", "workspace_limit")}
    call |= {"causal": False} if row["who"] == "not causal" else {}
    call |= {"window_size": int(row["who"].split()[1])} if row["who"].startswith("window") else {}
    bits = {"key_bits": bits_of(row), "value_bits": (8, 4) if "values" in row["bits"] and not shared else ()}
    same = {n: row[n] for n in ("M", "S", "D", "P", "lens", "offset", "sinks", "strided", "near", "dtype")}
    return Case(str(i), Hkv=heads, key_ranks=keys, value_ranks=values, shared=shared, key_order=order,
                value_order=order if shared or row["values"] == "paired" else None, starts=starts,
                rope={**rope_of(row), "max_position": 4096}, call=call, **bits, **same)  # fmt: skip


def kinds_of(row):
    return {n: next(i for i, kind in enumerate(KINDS[n]) if value in kind) for n, value in row.items()}


ROWS = covering_rows(COLUMNS, allowed, seed=1, tries=12)
QUICK = covering_some([kinds_of(row) for row in ROWS])
MATRIX = [case_of(i, row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("case", slow_unless([MATRIX[i] for i in QUICK], MATRIX), ids=str)
def test_every_two_options(case, device, ran):
    check(case, case.dtype, device, ran)


# ------------------------------------------------------------------------------------------------------- named forms
def two(name, **changes):
    """Two groups of two heads, ragged; of float16 four terms."""
    shape = {
        "Hkv": 4,
        "rope": {"theta": 5e6},
        "key_ranks": (32, 112),
        "value_ranks": (48, 16),
        "key_order": (2, 0, 3, 1),
        "lens": (150, 3),
    }
    return Case(name, **{**shape, "value_order": (0, 2, 1, 3), "dtype": HALF, **changes})


JOINT = {"value_ranks": (96,), "value_order": None}
TERMS = {4: {"theta": 5e6}, 8: {"theta": 5e5}, 16: "default"}  # of float16
FOUR = {"Hkv": 8, "key_order": (5, 0, 3, 6, 1, 4, 7, 2), "value_order": (0, 3, 6, 5, 2, 7, 4, 1)}  # heads of a group


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "terms, rows, passes",
    [*((terms, 1, passes) for terms in TERMS for passes in ({}, JOINT)), (4, 2, {}), (4, 2, JOINT), (8, 2, JOINT)],
    ids=str,
)
def test_every_form(terms, rows, passes, device, ran):
    """Terms of a row, that are summed by lane or not, and what comes of them; a start and an end inside blocks."""
    shape = {"D": 128, "M": rows, "lens": (400, 3), "starts": (90, 0), "offset": bool(passes), "rope": TERMS[terms]}
    case = two("form", **shape | (FOUR if rows == 1 else {}) | passes)
    assert make_layer(case, HALF).operands.keys.sizes.terms == terms
    check(case, HALF, device, ran, by_lane=rows == 1, one_pass=not passes)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "why, changes",
    [("a bias", {"offset": True}), ("more than 64 absorbed queries", {"M": 2, "D": 128, "rope": {"theta": 5e5}}),
     ("two rows", {"Hkv": 4, "key_order": None, "value_order": None}), ("one row serves both", {"shared": True})],
    ids=str,
)  # fmt: skip
def test_what_would_spill_takes_two_passes(why, changes, device, ran):
    even = {"value_ranks": (32, 112), "value_order": FOUR["key_order"]}
    assert way(two("whole", **FOUR | even), HALF).one_pass
    check(two("apart", **FOUR | even | changes), HALF, device, ran, one_pass=False)


@pytest.mark.every(12)
@pytest.mark.parametrize("P", [16, 48, 64, 128])
@pytest.mark.parametrize("ranks", [(160, 32), (240, 48), (256, 176)], ids=str)
@pytest.mark.parametrize("form", [FOUR, {}, {"M": 2}, {"M": 2, **JOINT}], ids=["lanes", "few", "rows", "scores"])
def test_tiles_of_64_and_of_128_tokens(ranks, P, form, device, ran):
    """Pages that are parts of a tile, hold whole ones, or neither; ranks that pieces do not add up to."""
    sizes = {"P": P, "key_ranks": ranks, "value_ranks": ranks[::-1], "lens": (300, 129), "starts": (70, 128)}
    case = two("tiles", strided=True, **sizes | form)
    assert way(case, HALF).launch.block_t == (64 if max(ranks) <= 160 else 128)
    check(case, HALF, device, ran)


RIDING = {"shared": True, "value_ranks": (48, 128)}


@pytest.mark.every(2)
@pytest.mark.parametrize("form", [{}, {"M": 3}, RIDING, JOINT], ids=["lanes", "rows", "riding", "scores"])
def test_three_heads_of_a_program(form, device, ran):
    """Rows that are none beside theirs; each program has a head that its neighbour has not."""
    changes = {"Hkv": 6, "value_order": None, "key_order": (5, 0, 3, 1, 4, 2)} | form
    changes["value_order"] = changes["key_order"] if len(changes.get("value_ranks", (1, 2))) == 2 else None
    check(two("three", **changes), HALF, device, ran, heads=3)


@pytest.mark.every(5)
@pytest.mark.parametrize("bits", [(8,), (4,), (2,), (8, 4, 2), (16, 2)], ids=str)
@pytest.mark.parametrize(
    "form",
    [FOUR, {"M": 2, "S": 2}, RIDING | {"offset": True, "value_order": (2, 0, 3, 1)}],
    ids=["lanes", "rows", "riding"],
)
def test_packed_rows(form, bits, device, ran):
    """Unpacked once for the heads of a program; groups have formats of their own."""
    packed = {"key_bits": bits, "value_bits": () if "shared" in form else (8, 4), "lens": (150, 3), "P": 32}
    check(two("packed", **packed | form), HALF, device, ran, one_pass=False)


@pytest.mark.every(3)
@pytest.mark.parametrize("P", [16, 48, 128])
@pytest.mark.parametrize("M", [1, 2])
def test_packed_rows_of_wide_ranks(M, P, device, ran):
    """Tiles of 128 tokens, keys' and values'."""
    sizes = {"P": P, "key_ranks": (208, 176), "value_ranks": (176, 208), "lens": (300, 129), "starts": (70, 128)}
    case = two("wide", M=M, key_bits=(8, 4, 2), value_bits=(4, 2), **sizes)
    assert way(case, HALF).launch.block_t == 128
    check(case, HALF, device, ran)


# --------------------------------------------------------------------------------------------------------- numbers
def keys_of(problem, b):
    """Of sequence b, each token's keys as attention is given them: [n, Hkv, D] float64, 0 where they are poisoned."""
    layer, _, *caches, kwargs = plain(on("cpu", *problem))
    table, lens = kwargs["block_table"][b : b + 1].clamp(0, len(caches[0]) - 1), kwargs["seq_lens"][b : b + 1]
    k, v = lrattn.rebuild(*caches, layer, table, lens, backend="reference")
    return k.nan_to_num(0.0), v.nan_to_num(0.0)


def bound_of(problem):
    """The largest error of any score that the band makes (factors/band.py), and the largest value."""
    layer, q, *_, kwargs = problem
    found, most, largest = layer.rope.band(layer.head_dim, layer.dtype), 0.0, 0.0
    pairs = layer.pairs[found.fast :].cpu()
    for b in kwargs["seq_lens"].nonzero().flatten().tolist():
        k, v = keys_of(problem, b)
        size = k[..., pairs].unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(q.shape[2] // k.shape[1], 1)
        own = q[b].cpu().double()[..., pairs].unflatten(-1, (-1, 2)).norm(dim=-1)
        most = max(most, torch.einsum("shj,thj->sht", own, size).max().item())
        largest = max(largest, v.abs().max().item())
    scale = kwargs.get("softmax_scale", layer.head_dim**-0.5)
    return found.error * scale * most, largest


def check_bounded(problem):
    """As checks.check, but for the band's bound."""
    (out, lse), (true, true_lse) = ([x.cpu() for x in f(problem)] for f in (attend, exact))
    own, own_lse = (x.cpu() for x in attend_densely(problem))
    error, largest = bound_of(problem)
    assert_no_worse(out, own, true, slack=math.expm1(2 * error) * largest)
    some = true_lse.isfinite()
    assert torch.equal(lse == -torch.inf, ~some)
    assert_no_worse(lse[some], own_lse[some], true_lse[some], problem[0].dtype, slack=error)
    return error


@pytest.fixture
def of_bfloat16(monkeypatch):
    """Bands of float16 as bfloat16 would have them, which the interpreter does not know."""
    monkeypatch.setitem(band.TOLERANCE, HALF, band.TOLERANCE[torch.bfloat16])
    band.find.cache_clear()
    yield
    band.find.cache_clear()


@pytest.mark.every(3)
@pytest.mark.parametrize("theta, terms", [(1e4, 8), (5e5, 4)])
@pytest.mark.parametrize("rows", [1, 2], ids=["by lane", "rows"])
def test_the_band_of_bfloat16(theta, terms, rows, of_bfloat16, device):
    case = two("coarse", D=128, M=rows, rope={"theta": theta}, lens=(300, 70), starts=(40, 0), offset=True, **JOINT)
    problem = on(device, *make(case, HALF))
    assert problem[0].operands.keys.sizes.terms == terms and problem[0].operands.keys.sizes.fast == 48
    check_bounded(problem)


@pytest.mark.every(4)
@pytest.mark.parametrize("loud", [1.0, 8.0])
@pytest.mark.parametrize("rows", [1, 2], ids=["by lane", "rows"])
def test_queries_along_a_key_whose_slow_channels_are_loud(loud, rows, kernel_dtype, device):
    """Where scores are largest, and what the band makes of them."""
    case = two("along", D=128, M=rows, lens=(290, 150), key_ranks=(48,), value_ranks=(48,), key_order=None,
               value_order=None)  # fmt: skip
    layer, q, *caches, kwargs = make(case, kernel_dtype)
    keys = replace(layer.keys, up=layer.keys.up.clone())
    keys.up[..., layer.pairs[layer.operands.keys.sizes.fast :]] *= loud
    layer = replace(layer, keys=keys)
    problem = layer, q, *caches, kwargs
    for b, t in enumerate((130, 149)):
        own = keys_of(problem, b)[0][t].repeat_interleave(rows, 0)
        q[b, 0] = (own * (20 * case.D**0.5 / own.square().sum(-1, keepdim=True).clamp(min=1.0))).to(q.dtype)
    problem = on(device, *problem)
    assert exact(problem)[1].max() > 15
    check_bounded(problem)


@pytest.mark.every(2)
@pytest.mark.parametrize("rows", [1, 2], ids=["by lane", "rows"])
@pytest.mark.parametrize("start", slow_unless({5_000}, [5_000, 130_000]))
def test_far_positions(start, rows, kernel_dtype, device):
    """Queries are turned back by block: tokens far out are as near to each other as any."""
    case = two("far", M=rows, lens=(90,), rope={"max_position": start + 128})
    layer, q, *caches, kwargs = make(case, kernel_dtype)
    table, shift = kwargs["block_table"], start // case.P
    kwargs["block_table"] = torch.cat((table.new_full((1, shift), 2_000_000_000), table), 1)
    kwargs["seq_lens"] += shift * case.P
    kwargs["seq_starts"] = torch.tensor([shift * case.P + 3], dtype=torch.int32)
    problem = on(device, layer, q, *caches, kwargs)
    (out, lse), (true, true_lse) = (
        [x.cpu().double() for x in pair] for pair in (attend(problem, num_splits=1), exact(problem))
    )
    close = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[kernel_dtype]
    torch.testing.assert_close(out, true, rtol=0, atol=close)
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=close)


# ------------------------------------------------------------------------- what bench.gpu_check asks of a GPU first
JOINED = {"value_order": None, "rope": {"theta": 5e5}}  # values of all heads: scores, then values
FORMS = {
    "lanes": {**FOUR, "rope": {"theta": 1e4}},
    "rows": {"M": 2, "rope": {"theta": 5e5}},
    "lanes, scores": {**FOUR, **JOINED},
    "rows, scores": {"M": 2, **JOINED},
}
SHORT, LONG = (0, 1, 63, 64, 300), (65, 129, 256, 257, 299)  # tokens
STARTS = {SHORT: (0, 0, 5, 63, 70), LONG: (0, 70, 200, 256, 90)}  # in tiles and in blocks
FIRST = [
    ("lanes", 160, 64, SHORT, None), ("lanes", 256, 16, LONG, 70), ("rows", 160, 128, SHORT, 70),
    ("rows", 256, 64, LONG, None), ("lanes, scores", 160, 16, LONG, None), ("lanes, scores", 256, 128, SHORT, None),
    ("rows, scores", 160, 64, LONG, None), ("rows, scores", 256, 16, SHORT, 70),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form, rank, P, lens, window", FIRST, ids=lambda x: str(x) if type(x) in (str, int) else "")
def test_first_that_llamas_ranks_are_right(form, rank, P, lens, window, of_bfloat16, device):
    """In bfloat16, or of its band: pages shuffled, a NaN in every slot that is not seen."""
    dtype = torch.bfloat16 if device.type == "cuda" else HALF
    values = (rank,) if "scores" in form else (rank - 48, rank)
    sizes = {"D": 128, "P": P, "lens": lens, "key_ranks": (rank, rank - 48), "value_ranks": values}
    seen = {"call": {"window_size": window}} if window else {"starts": STARTS[lens]}
    case = two("first", **sizes, **FORMS[form], **seen)
    found, terms = way(case, dtype), make_layer(case, dtype).operands.keys.sizes.terms
    assert (found.by_lane, found.one_pass, terms) == (
        "lanes" in form,
        "scores" not in form,
        8 if form == "lanes" else 4,
    )
    check_bounded(on(device, *make(case, dtype)))


# --------------------------------------------------------------------------------------------- what meets what
@pytest.mark.every(3)
@pytest.mark.parametrize("passes", [{}, JOINT], ids=["one pass", "scores alone"])
@pytest.mark.parametrize("rows", [1, 2], ids=["by lane", "rows"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_with_its_own(wrong, rows, passes, device):
    """In a latent of a group: with its heads. In a query: with its row."""
    case = two("nan", M=rows, lens=(150, 70), **passes)
    layer, q, k_cache, v_cache, kwargs = make(case, HALF)
    page = kwargs["block_table"][0, 4].item()
    k_cache[page, 3, 5] = wrong  # of the first group, that of heads 2 and 0
    q[1, 0, 2, 7] = wrong
    (out, lse), (true, _) = ([x.cpu() for x in f(on(device, layer, q, k_cache, v_cache, kwargs))]
                                    for f in (attend, exact))  # fmt: skip
    own = torch.zeros(lse.shape, dtype=torch.bool)
    own[0, 0, :rows], own[0, 0, 2 * rows : 3 * rows], own[1, 0, 2] = True, True, True
    bad = ~out.isfinite().any(-1) if wrong == torch.inf else out.isnan().all(-1)
    assert not (bad & ~own).any() and out[~own].isfinite().all() and lse[~own].isfinite().all()
    assert wrong == torch.inf or (torch.equal(bad, own) and torch.equal(lse.isnan(), own))
    assert torch.equal(out.isfinite() | true.isfinite(), true.isfinite())
    torch.testing.assert_close(out[~own].double(), true[~own], rtol=0, atol=4e-3)


@pytest.mark.every(8)
@pytest.mark.parametrize(
    "form", [{}, {"M": 2, "S": 2}, JOINT, {"Hkv": 6, "key_order": None, "value_order": None}], ids=str
)
@pytest.mark.parametrize("num_splits, limit", [(2, 1 << 28), (5, 1 << 28), (0, 1), (0, 1 << 17)])
def test_results_do_not_depend_on_splits_or_workspace(num_splits, limit, form, device):
    case = two("cut", lens=(260, 0, 1), starts=(200, 0, 0), **form)
    problem = on(device, *make(case, SINGLE))
    whole = attend(problem, num_splits=1)
    got = attend(problem, num_splits=num_splits, workspace_limit=limit)
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", slow_unless([{}], [{}, {"M": 2, "S": 2}, JOINT]), ids=["lanes", "rows", "scores"])
def test_bits_do_not_depend_on_the_batch(form, device):
    """Alone or in another place, under a wider table: with a fixed number of splits. As in test_ways.py."""
    call = {"num_splits": 3, "project": "latent"}
    layer, q, *caches, kwargs = on(device, *make(two("bits", lens=(70, 100, 3), call=call, **form), HALF))
    whole = attend((layer, q, *caches, kwargs))
    for rows in ([1], [2, 0]):
        some = {n: x[rows] if n in ("block_table", "seq_lens") else x for n, x in kwargs.items()}
        some["block_table"] = torch.nn.functional.pad(some["block_table"], (0, 5), value=2_000_000_000)
        got = attend((layer, q[rows], *caches, some))
        assert torch.equal(got[0], whole[0][rows]) and torch.equal(got[1], whole[1][rows])


# ------------------------------------------------------------------------------------------------- when, and when not
@pytest.mark.parametrize(
    "why, changes, dtype, device",
    [
        ("one head a group", {"key_ranks": (32,) * 4}, HALF, "sm90"),
        ("no rope", {"rope": None}, HALF, "sm90"),
        ("chunks", {"chunk": 64}, HALF, "sm90"),
        ("positions are given", {"positions": True}, HALF, "sm90"),
        ("more rows of two heads than 16", {"M": 3, "S": 3}, HALF, "sm90"),
        ("each token's own angle", {"rope": {"fp32_angles": True}}, SINGLE, "sm90"),
        ("no functions", {"rope": {"theta": 10.0}}, HALF, "sm90"),
        ("all dims are fast", {"D": 16, "rope": {"dim": 16}}, HALF, "sm90"),
        ("packed rows elsewhere", {"key_bits": (8,)}, HALF, "sm100"),
        ("a packed row beyond 256", {"key_ranks": (272, 32), "key_bits": (8,)}, HALF, "sm90"),
        ("a rank beyond 256", {"key_ranks": (272, 32)}, HALF, "sm90"),
        ("a rank beyond 128 of float32", {"key_ranks": (144, 32)}, SINGLE, "sm90"),
        ("more than 128 absorbed queries", {"M": 2, "D": 128, "rope": {}}, HALF, "sm90"),
        ("more than 64 of float32", {"M": 2, "rope": {}}, SINGLE, "sm90"),
        ("float32 where memory on chip is small", {}, SINGLE, "gfx9"),
        ("more than 64, of a rank beyond 160", {"M": 2, "rope": {}, "key_ranks": (176, 32)}, HALF, "sm90"),
        ("another device", {}, HALF, "sm80"),
    ],
)
def test_what_does_not_go_by_a_band(why, changes, dtype, device):
    assert way(two("refused"), dtype) is not None
    assert way(two("refused", **changes), dtype, device) is None, why


def test_programs_take_what_fits_of_a_group():
    """Heads: the most that divide the group, with 16 rows and 192 columns."""
    for C, M, D, heads in (
        (8, 1, 128, 4),
        (8, 1, 64, 4),
        (8, 4, 64, 4),
        (8, 8, 64, 2),
        (6, 2, 128, 3),
        (4, 1, 256, 2),
        (6, 1, 64, 3),
    ):
        found = way(Case("fits", Hkv=C, M=M, D=D, rope={"theta": 5e6}), HALF)
        assert (found.heads, found.by_lane) == (heads, M == 1), (C, M, D)
