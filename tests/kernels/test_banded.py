"""Keys before RoPE by a band: against the reference in float64, no worse than PyTorch but for the band's own error."""

import math
from dataclasses import replace

import pytest
import torch
import triton
from cases import YARN, Case, make, make_layer, reach
from checks import attend, attend_densely, exact, on
from checks import check as check_kernels
from closeness import assert_no_worse
from packing import plain
from pairwise import covering_rows, covering_some
from slowly import slow_unless

import lrattn
from lrattn.factors import band
from lrattn.kernels import plan

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
    others = {"attend_rebuilt_kernel", "turn_queries_kernel", "attend_absorbed_kernel", "absorb_queries_kernel"}
    seen = any(begin < end for begin, end in (reach(case, b) for b in range(len(case.lens))))
    assert not others & set(ran) and (not seen or {"absorb_band_kernel", "attend_kernel"} <= set(ran))
    assert ("latent_values_kernel" in ran) == (not found.one_pass) or not seen


# ------------------------------------------------------------------------------------- every two values of an option
COLUMNS = {
    "lens": [(0, 1, 63), (64, 65), (127, 128), (129, 255), (256, 257), (300,), (513,)],
    "starts": ["none", "in a tile", "in a block", "last"],
    "P": [16, 32, 48, 64, 80, 128],
    "C": [2, 3, 4, 6, 8],
    "groups": [1, 2, 3],
    "M": [1, 2, 4, 8],
    "S": [1, 2, 3, 4],
    "D": [64, 80, 96, 128, 256],
    "key_ranks": [(32, 112, 48), (48, 32, 112), (128, 16, 96)],
    "wide": ["no", "keys", "both"],  # beyond 128: 16 bits only
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
    "lens": [[(0, 1, 63), (64, 65), (127, 128), (129, 255)], [(256, 257), (300,), (513,)]],
    "starts": [["none"], ["in a tile", "in a block", "last"]],
    "P": [[16, 32], [48, 80], [64, 128]],
    "C": [[2, 4, 8], [3, 6]],
    "groups": [[1], [2, 3]],
    "M": [[1], [2, 4, 8]],
    "S": [[1], [2, 3, 4]],
    "D": [[64, 128], [80, 96, 256]],
    "key_ranks": [COLUMNS["key_ranks"]],
    "values": [["paired"], ["riding", "joint row"], ["joint", "each head"]],
    "rope": [["1e4", "5e5", "linear"], ["1e6 interleaved", "eighth", "half interleaved"], ["yarn", "llama3", "longrope"]],
    "who": [["causal"], ["not causal"], ["window 5", "window 70", "window 257"]],
    "project": [["heads"], ["latent", "hidden"]],
    "num_splits": [[0, 1], [3, 9]],
    "near": [[None], [(20, 4, 2, True, True), (1, 0, 0, False, False)]],
}


def allowed(row):
    """The rule of plan.banded, too, in words of a row."""
    rows, rotary = row["M"] * row["S"], row["D"] * {"eighth": 0.125, "half interleaved": 0.5}.get(row["rope"], 1)
    fast = 16 * math.ceil(3 * rotary / 128)
    least = 3 if row["C"] == 3 else 2
    if least * rows > 16 or (4 if least == 3 else 2) * fast > 192 or row["C"] * row["groups"] * rows > 32:
        return False
    if row["dtype"] == SINGLE and row["wide"] != "no":
        return False
    if row["near"] and (row["project"] == "latent" or row["who"] == "not causal"):
        return False
    tiles = sum(row["lens"]) / 64 * row["C"] * row["groups"]
    if row["workspace_limit"] == 1 and (tiles > 16 or row["num_splits"] > 1):
        return False
    return tiles <= 40 and tiles * row["num_splits"] <= 100


def case_of(i, row):
    heads = row["C"] * row["groups"]
    keys = row["key_ranks"][: row["groups"]]
    if row["wide"] != "no":
        keys = tuple(map(WIDER.get, keys))
    values = {"paired": (64, 16, 112)[: row["groups"]], "each head": (16, 48, 32, 16)[: heads] * (heads // 4 + 1),
              "riding": tuple(r + 16 if r % 128 else r for r in keys), "joint row": keys, "joint": (96,)}  # fmt: skip
    values = values[row["values"]][:heads]
    if row["wide"] == "both" and row["values"] == "paired":
        values = tuple(r + 128 for r in values)
    shared = row["values"] in ("riding", "joint row")
    order = tuple((5 * h + 3) % heads for h in range(heads)) if row["order"] and heads % 5 else None
    starts = {"none": None, "in a tile": [7, 40, 0], "in a block": [70, 200, 1], "last": [n - 1 for n in row["lens"]]}
    starts = starts[row["starts"]] and tuple(starts[row["starts"]][: len(row["lens"])])
    rope, last = dict(ROPES[row["rope"]]), 4096
    if row["rope"] == "longrope":
        pairs = row["D"] // 2
        stretch = {"long_factor": [1 + j / pairs for j in range(pairs)], "short_factor": [1.0] * pairs}
        rope["scaling"] = LONGROPE | stretch
    call = {n: row[n] for n in ("softcap", "project", "num_splits", "workspace_limit")}
    call |= {"causal": False} if row["who"] == "not causal" else {}
    call |= {"window_size": int(row["who"].split()[1])} if row["who"].startswith("window") else {}
    same = {n: row[n] for n in ("M", "S", "D", "P", "lens", "offset", "sinks", "strided", "near", "dtype")}
    return Case(str(i), Hkv=heads, key_ranks=keys, value_ranks=values, shared=shared, key_order=order,
                value_order=order if shared or row["values"] == "paired" else None, starts=starts,
                rope={**rope, "max_position": last}, call=call, **same)  # fmt: skip


def kinds_of(row):
    return {n: next(i for i, kind in enumerate(KINDS[n]) if value in kind) for n, value in row.items()}


ROWS = covering_rows(COLUMNS, allowed, seed=1, tries=30)
QUICK = covering_some([kinds_of(row) for row in ROWS])
MATRIX = [case_of(i, row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("case", slow_unless([MATRIX[i] for i in QUICK], MATRIX), ids=str)
def test_every_two_options(case, device, ran):
    check(case, case.dtype, device, ran)
