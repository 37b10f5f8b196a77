"""Kernels with one fault each: some test must see it. A test that no fault can fail proves nothing."""

import importlib
import os
import subprocess
import sys

import checks
import mutants
import pytest
import torch
import written
from cases import Case
from mutants import KERNELS, Mutant, copy_with
from slowly import slow_unless

CPU = torch.device("cpu")
swap = mutants.swap


def paired(name, **changes):
    """Two groups of two heads, in an order of their own."""
    order = (2, 0, 3, 1)
    return Case(name, **{"M": 2, "key_order": order, "value_order": order, "lens": (70, 3)} | changes)


def two(name, **changes):
    """Two heads, and small ranks."""
    return Case(name, **{"Hkv": 2, "key_ranks": (32,)} | changes)


CUT = {"num_splits": 2}
REBUILT = {"S": 5}  # more rows of two heads than go by a band
HEADS = {"M": 2, "value_ranks": (16, 32), "value_order": (3, 1, 0, 2)}
RAGGED = {"offset": True, "key_ranks": (32, 112), "call": CUT}
ALONE = {"key_ranks": (32, 96, 16, 48), "value_ranks": (16, 48, 96, 32)}
SMALL = {"key_ranks": (32, 32), "value_ranks": (16, 16)}
MANY = (8, 4, 2, 8, 4)
HALF = torch.float16
FEW = {"theta": 5e6}  # of the rope: four terms of a band
PLANES = {"dtype": HALF, "key_bits": (8, 4, 2), "value_bits": (8, 4, 2), "chunk": 64, "value_order": (2, 0, 3, 1)}
EVEN = {**PLANES, "value_order": None, "chunk": None, "rope": None}
UNLIKE = {"key_ranks": (48, 112), "value_ranks": (112, 48)}
WIDER = {"key_ranks": (96, 48), "value_ranks": (400, 64)}
RIDING = {"key_ranks": (48, 32), "value_ranks": (96, 112)}
WINDOW = {"window_size": 30, "num_splits": 1}
SHORT = {"key_ranks": (32, 48), "lens": (37, 3)}
BAND = {"key_ranks": (32, 48), "value_ranks": (48, 16), "value_order": (0, 2, 1, 3), "M": 1, "offset": True}
LARGE = {"key_ranks": (320, 400), "value_ranks": (320, 400)}
WIDE = {"key_ranks": (96, 112), "value_ranks": (96, 112)}
KILLERS = {
    case.name: case
    for case in [
        paired("groups", key_ranks=(32, 48), value_ranks=(64, 16), value_order=None, **REBUILT),
        two("batch", value_ranks=(32,), lens=(100, 20, 40), call=CUT),
        two("pages", rope=None, P=48, lens=(100, 97), strided=True, call={"num_splits": 1}),
        two("whole tiles", rope=None, P=64, lens=(130, 3)),
        two("padded", rope=None, key_ranks=(112,), value_ranks=(112,), shared=True, lens=(20,), strided=True),
        Case("streamed", Hkv=1, key_ranks=(528,), value_ranks=(32,), lens=(20,), P=48, strided=True, dtype=HALF),
        two("wide", D=256, lens=(20,), offset=True, S=9),
        two("queries", M=3, S=4, lens=(40, 9), call={"project": "hidden"}),
        two("window", S=3, lens=(150, 40), starts=(0, 25), call={"window_size": 20}),
        two("interleaved", rope={"interleaved": True}),
        two("partial", rope={"partial_rotary_factor": 0.5}, lens=(70,)),
        two("positions", positions=True),
        paired("absorbed", rope=None, offset=True, key_ranks=(32, 48), value_order=None, lens=(37,)),
        paired("shared absorbed", rope=None, shared=True, value_ranks=(64, 112), **SHORT),
        two("many rows", rope=None, M=11, S=7, lens=(37, 3)),
        two("long absorbed", rope=None, key_ranks=(272,), lens=(70, 3)),
        two("softcap", call={"softcap": 2.0}),
        Case("sinks", sinks=True, offset=True, **HEADS),
        paired("one pass", rope=None, lens=(200, 3), value_ranks=(112, 16), value_order=(0, 2, 1, 3), **RAGGED),
        paired("one pass, rebuilt", lens=(150, 3), value_ranks=(48, 112), shared=True, **RAGGED, **REBUILT),
        paired("one pass, alone", S=3, lens=(70, 40, 0), **ALONE),
        two("one pass, positions", positions=True, **SMALL),
        two("one pass, strided", lens=(40, 3), strided=True, call=CUT, **SMALL),
        Case(
            "many splits", lens=(180, 3), starts=(126, 0), call={"num_splits": 40}, **HEADS | {"value_ranks": (96, 16)}
        ),
        paired("packed", lens=(100, 3), shared=True, key_bits=(8, 4, 2), dtype=HALF, **WIDE, **REBUILT),
        two("wide values", lens=(150, 20), value_ranks=(400, 272)),
        two("packed, five scales", lens=(20,), key_bits=MANY, value_bits=MANY, **WIDE),
        two("packed, streamed", lens=(20, 3), key_bits=(8, 4, 2), value_bits=(8, 2), **LARGE),
        two("piecemeal", lens=(300,), call={"workspace_limit": 1} | CUT),
        two("chunks", chunk=64, offset=True, M=2, S=2, lens=(250, 70), offsets=(100, -300), call=CUT),
        paired(
            "chunks, two passes",
            chunk=64,
            offset=True,
            key_ranks=(32, 48),
            value_order=None,
            lens=(250, 70),
            offsets=(37, -300),
            P=64,
            call=CUT,
        ),
        two("chunks by index", chunk=64, P=64, lens=(250, 70), call=CUT),
        two("chunks, whole pages", chunk=64, P=64, lens=(150,), starts=(40,), offsets=(37,)),
        two("chunks, piecemeal", chunk=64, lens=(200,), offsets=(-30,), call={"workspace_limit": 1, "num_splits": 1}),
        two(
            "near", M=3, S=4, lens=(90, 20, 3), starts=(10, 0, 0), near=(70, 3, 1, True, False), sinks=True, offset=True
        ),
        two(
            "near and window",
            S=2,
            lens=(45, 30),
            near=(20, 4, 0, False, True),
            starts=(5, 2),
            strided=True,
            call={"window_size": 40, "softcap": 2.0},
        ),
        two(
            "near, piecemeal",
            S=2,
            lens=(200, 30, 70),
            near=(20, 4, 0, True, True),
            starts=(5, 2, 40),
            call={"workspace_limit": 1},
        ),
        two("near all", S=3, lens=(40, 6), near=(64, 2, 0, False, False), call={"window_size": 20}),
        two("write", P=32),
        two("pack", key_bits=MANY, value_bits=(16, 2, 8), key_ranks=(80, 112), value_ranks=(432, 96)),
        paired("planes", offset=True, lens=(250, 3), offsets=(37, -300), call=CUT, **PLANES | UNLIKE),
        paired("planes, a pass each", S=2, lens=(200, 9), P=48, starts=(70, 0), call=WINDOW, **PLANES | WIDER),
        two("planes, even", lens=(300,), offset=True, **EVEN | {"key_ranks": (272,), "value_ranks": (224,)}),
        two("planes, wide", lens=(20,), **EVEN | {"value_bits": (4,), "value_ranks": (320,)}),
        two("planes, shared", lens=(70,), S=3, offset=True, shared=True, call={"softcap": 2.0}, **EVEN | RIDING),
        two("planes, five scales", lens=(20,), **EVEN | {"key_bits": MANY, "value_bits": MANY, **WIDE}),
        two("planes, sixteen bits", lens=(20,), **EVEN | {"key_bits": (16, 8), "value_bits": (4, 16), **WIDE}),
        two("planes, magic", lens=(20,), **EVEN | {"key_ranks": (96, 96), "value_ranks": (96, 96)}),
        paired("band", lens=(300, 3), starts=(70, 0), call={"num_splits": 9}, **BAND),
        paired(
            "band, rows",
            lens=(300, 3),
            starts=(70, 1),
            S=2,
            P=48,
            strided=True,
            call=CUT,
            **BAND | {"M": 2, "rope": FEW},
        ),
        paired("band, far", lens=(340,), starts=(270,), strided=True, **BAND),
        paired("band, far rows", lens=(340,), starts=(270,), P=128, **BAND | {"M": 4, "rope": FEW}),
        paired("band, four terms", rope=FEW, lens=(70,), **BAND),
        paired("band, pieces", D=128, P=128, lens=(140,), dtype=HALF, **BAND | {"key_ranks": (48, 176)}),
        two("band, three", Hkv=3, lens=(37,), P=32, offset=True, key_ranks=(112,)),
        two("band, three rows", Hkv=3, M=3, rope=FEW, lens=(37,)),
        two("band, owners", Hkv=4, M=4, S=2, rope=FEW, lens=(70,), offset=True),
        two(
            "band, lanes", Hkv=4, key_ranks=(48,), value_ranks=(48,), lens=(320,), starts=(70,), call={"num_splits": 1}
        ),
        paired("band, riding", rope=FEW, lens=(70, 3), shared=True, **RIDING),
        two(
            "band, wide scores",
            Hkv=4,
            key_ranks=(176, 48),
            lens=(300,),
            starts=(70,),
            value_ranks=(48,),
            dtype=HALF,
            rope=FEW,
        ),
        paired("band, packed", lens=(100, 3), P=32, key_bits=(8, 4, 2), dtype=HALF, key_ranks=(96, 48), M=1),
        two("band, scores", Hkv=4, key_ranks=(32, 48), lens=(150,), starts=(70,), value_ranks=(48,)),
        two("long parts", S=9, lens=(300,), key_ranks=(16,), value_ranks=(16,)),
    ]
}


MUTANTS = [
    Mutant("attend_rebuilt.py", "k_low * cos - k_high * sin", "k_low * cos + k_high * sin", "groups"),
    Mutant("tiles.py", "high * cos - low * sin", "high * cos + low * sin", "groups"),
    Mutant("absorb.py", "(kv if T == 0 else owner)", "owner", "groups"),
    Mutant("absorb.py", "to + FAST[m] // 2, high", "to + 1, high", "groups"),
    Mutant("absorb.py", "t0 = first * BLOCK", "t0 = 0 * first", "window"),
    Mutant("attend_rebuilt.py", "(t0 - origin) // BLOCK_T", "(t0 - t_begin) // BLOCK_T", "long parts"),
    Mutant("attend_rebuilt.py", "place % C * D", "0", "groups"),
    Mutant("attend_rebuilt.py", "load_run(key_runs, place // C)", "load_run(key_runs, 0)", "groups"),
    Mutant("packed.py", "cache + page * strides[0]", "cache + page * strides[1] * P", "packed, streamed"),
    Mutant("rows.py", "segs[4 * i + 1], ROW", "segs[4 * i + 1] - 16, ROW", "streamed"),
    Mutant("attend_rebuilt.py", "tl.load(p_q + d0 // 2)", "tl.load(p_q)", "wide"),
    Mutant("attend_rebuilt.py", "bias + place * D + d0 + d", "bias + place * D + d", "wide"),
    Mutant("attend_rebuilt.py", "tl.where(in_q, i % S, -1)", "tl.where(in_q, i // S, -1)", "queries"),
    Mutant("attend_rebuilt.py", "at = tl.load(positions + token_page", "at = tl.load(positions + 0 * token_page",
           "positions"),
    Mutant("tiles.py", "(t % P).to", "(t % 16).to", "streamed"),
    Mutant("tiles.py", "tl.load(pages + t0 // P)", "tl.load(pages)", "whole tiles"),
    Mutant("tiles.py", "end - S - window[0] + 1)", "end - window[0])", "window"),
    Mutant("tiles.py", "t[:, None] <= own[None, :]", "t[:, None] < own[None, :]", "queries"),
    Mutant("tiles.py", "(own - window[0])", "(own - window[0] + 1)", "window"),
    Mutant("tiles.py", "held * i // n", "held * (i + 1) // n", "batch"),
    Mutant("tiles.py", "mask = (r < rank)[None, :]", "mask = (r >= 0)[None, :]", "streamed"),
    Mutant("tiles.py", "mask=(r < rank)[:, None] & (d < D)[None, :]", "mask=(r >= 16)[:, None] & (d < D)[None, :]",
           "absorbed"),
    Mutant("tiles.py", "return 2 * j, 2 * j + 1", "return j, j + ROTARY // 2", "interleaved"),
    Mutant("tiles.py", "(pair < ROTARY)", "(pair < 2 * ROTARY)", "partial"),
    Mutant("tiles.py", "-1.0 / 3", "1.0 / 3", "softcap"),
    Mutant("attend.py", "load_run(key_runs, g)", "load_run(key_runs, 0)", "absorbed"),
    Mutant("attend.py", "i % (M * S)).to", "i // HEADS).to", "absorbed"),
    Mutant("attend.py", "k += load_terms(", "k -= load_terms(", "absorbed"),
    Mutant("attend.py", "row_rank = value_rank", "row_rank = key_rank", "shared absorbed"),
    Mutant("attend.py", "cdiv(a.shape[3], way.rows * way.terms)", "1", "many rows"),
    Mutant("rows.py", "(t >= begin) & (t < t_end))", "t < 0)", "padded"),
    Mutant("rows.py", "(t >= begin) & (t < t_end))", "t > -1000)", "padded"),
    Mutant("absorb.py", "(r < LONG)[None, :]", "(r < rank)[None, :]", "shared absorbed"),
    Mutant("absorb.py", "head * (M * S) + m", "(C - 1 - head) * (M * S) + m", "absorbed"),
    Mutant("absorb.py", "owner.to(tl.int64) * a_strides[2]", "0 * a_strides[2]", "absorbed"),
    Mutant("absorb.py", "owner * terms_strides[2]", "0 * terms_strides[2]", "absorbed"),
    Mutant("scores.py", "range(0, rank, SIZE_R)", "range(0, SIZE_R, SIZE_R)", "long absorbed"),
    Mutant("scores.py", "load_latents(rows, column, rank, live, r)", "load_latents(rows, column, rank - 16, live, r)",
           "long absorbed"),
    Mutant("absorb.py", "step * BLOCK_R", "0 * BLOCK_R", "long absorbed"),
    Mutant("values.py", "range(t_begin, t_end, BLOCK_T,", "range(t_begin, t_end - BLOCK_T, BLOCK_T,", "wide values"),
    Mutant("values.py", "load_run(runs, g)", "load_run(runs, 0)", "groups"),
    Mutant("tiles.py", "total * fade + tl.sum(p, AXIS)", "total + tl.sum(p, AXIS)", "one pass"),
    Mutant("rows.py", "acc[n] * fade[:, None]", "acc[n]", "one pass"),
    Mutant("rows.py", "tl.static_range(1, len(z))", "tl.static_range(1, 1)", "one pass"),
    Mutant("packed.py", "r < segs[4 * N + 3]", "r < segs[4 * N + 3] - 16", "packed"),
    Mutant("attend.py", "load_run(value_runs, g)", "load_run(key_runs, g)", "one pass"),
    Mutant("attend.py", "i_s * y_strides[1]", "0 * y_strides[1]", "one pass"),
    Mutant("attend_rebuilt.py", "k_low * cos - k_high * sin", "k_low * cos + k_high * sin", "one pass, alone"),
    Mutant("attend_rebuilt.py", "(t0 - origin) // BLOCK_T", "(t0 - t_begin) // BLOCK_T", "one pass, rebuilt"),
    Mutant("attend_rebuilt.py", "place % C * D\n", "0\n", "one pass, rebuilt"),
    Mutant("attend_rebuilt.py", "load_run(value_runs, place // C)", "load_run(value_runs, 0)", "one pass, alone"),
    Mutant("attend_rebuilt.py", "bias + place * D + d0 + d", "bias + head * D + d0 + d", "one pass, rebuilt"),
    Mutant("attend_rebuilt.py", "tl.where(in_q, i % S, -1)", "tl.where(in_q, i // S, -1)", "one pass, alone"),
    Mutant("attend_rebuilt.py", "+ offset * pos_strides[1]", "+ 0 * offset", "one pass, positions"),
    Mutant("attend_rebuilt.py", 'p_lse, tl.full([BLOCK_Q], float("-inf")', "p_lse, tl.full([BLOCK_Q], 0.0",
           "one pass, strided"),
    Mutant("attend.py", 'p_lse, tl.full([BLOCK_Q], float("-inf")', "p_lse, tl.full([BLOCK_Q], 0.0", "one pass"),
    Mutant("combine.py", "tl.max(result, 0)[None, :]", "tl.sum(result, 0)[None, :]", "many splits"),
    Mutant("combine.py", "(part, peak, total, 1)", "(part, peak, 0 * total, 1)", "many splits"),
    Mutant("combine.py", '(part != float("-inf"))[:, :, None] & ', "", "many splits"),
    Mutant("combine.py", "& (r < rank)[None, None, :], x", ", x", "many splits"),
    Mutant("combine.py", "sums = sums * fade[:, None] +", "sums = sums +", "many splits"),
    Mutant("combine.py", "for r0 in range(0, RANK, BLOCK_R)", "for r0 in range(0, BLOCK_R, BLOCK_R)",
           "many splits"),
    Mutant("combine.py", "place // C", "head // C", "sinks"),
    Mutant("combine.py", "bias + place * D", "bias + head * D", "sinks"),
    Mutant("combine.py", "result *= mass[:, None]", "result *= 1", "sinks"),
    Mutant("combine.py", "j = (j0 +", "j = (j0 - first +", "piecemeal"),
    Mutant("combine.py", "(p_y[:, None] + j[None, :] * y_stride)", "(p_y[:, None] + 0 * j[None, :])", "batch"),
    Mutant("decode.py", "range(0, splits + 1) if after", "range(1, splits + 1) if after", "piecemeal"),
    Mutant("decode.py", "size.block or not first", "not first", "chunks, piecemeal"),
    Mutant("tiles.py", "low * cos + high * sin", "low * cos - high * sin", "chunks"),
    Mutant("absorb.py", "at = first + c", "at = c", "chunks"),
    Mutant("tiles.py", "// BLOCK + 1, 0)", "// BLOCK, 0)", "chunks"),
    Mutant("tiles.py", "before + t_end", "t_end", "band"),
    Mutant("absorb.py", "block.to(tl.int64) * a_strides[1]", "0 * block", "chunks"),
    Mutant("absorb.py", "block.to(tl.int64) * terms_strides[1]", "0 * block", "chunks"),
    Mutant("attend.py", "p_s = s + i_b * s_strides[0]", "p_s = s", "chunks, two passes"),
    Mutant("attend.py", "p_terms += block * terms_strides[1]", "p_terms += 0 * block", "chunks"),
    Mutant("attend.py", "first -= before", "first -= 0 * before", "chunks"),
    Mutant("attend.py", "tl.maximum(t0 - first, 0)", "tl.maximum(t0 - t_begin, 0)", "chunks"),
    Mutant("attend.py", "tl.maximum(t0 - first, 0)", "(t0 - first)", "chunks"),
    Mutant("attend.py", "t0 // BLOCK - first // BLOCK", "t0 // BLOCK - t_begin // BLOCK", "chunks by index"),
    Mutant("attend.py", "t_next, begin, t_end, P, BLOCK_T, offsets)", "t_next, begin, t_end, P, BLOCK_T)", "chunks"),
    Mutant("tiles.py", "t0.to(tl.int64) - lag", "t0.to(tl.int64) + lag", "chunks"),
    Mutant("tiles.py", "tl.maximum(at, 0) // CHUNK", "at // CHUNK", "chunks"),
    Mutant("tiles.py", "tl.where(shift > 0, shift - BLOCK_T, shift)", "0", "chunks"),
    Mutant("tiles.py", "tl.where(shift > 0, shift - BLOCK_T, shift)", "shift", "chunks"),
    Mutant("tiles.py", "offsets is None and P % BLOCK_T == 0", "P % BLOCK_T == 0", "chunks, whole pages"),
    Mutant("values.py", "splits, TILE_T, shift)", "splits, TILE_T)", "chunks, two passes"),
    Mutant("values.py", "splits, TILE_T, shift)", "splits, BLOCK_T, shift)", "band, wide scores"),
    Mutant("rebuild.py", "t.to(tl.int64) - lag", "t.to(tl.int64) + lag", "rebuild chunks"),
    Mutant("rebuild.py", "tl.maximum(t.to(tl.int64) - lag, 0)", "tl.abs(t.to(tl.int64) - lag)", "rebuild chunks"),
    Mutant("project.py", "+ k % D)[None, :]", "+ 0 * k)[None, :]", "queries"),
    Mutant("write.py", "slot % P * cv_strides[1]", "slot % 16 * cv_strides[1]", "write"),
    Mutant("write.py", "(slot >= 0) & (slot < num_slots)", "(slot >= 0) & (slot < num_slots - 1)", "write"),
    Mutant("write.py", "(r < k_width)[None, :]", "(r < k_width - 1)[None, :]", "write"),
    Mutant("rebuild.py", "tl.load(ends + i_b) - length + t", "t", "rebuild"),
    Mutant("rebuild.py", "k_low * sin + k_high * cos", "k_low * sin - k_high * cos", "rebuild"),
    Mutant("rebuild.py", "head * x_strides[1]", "place * x_strides[1]", "rebuild"),
    Mutant("rebuild.py", "(at < rows)", "(at < rows - 1)", "known rows"),
    Mutant("rows.py", "acc[i] * weight[:, None]", "acc[0] * weight[:, None]", "one pass"),
    Mutant("rows.py", "(load_scale(located[1], live, ROW[i][SCALE]),)", "(load_scale(located[1], live, 0),)", "packed"),
    Mutant("rows.py", "range(0, segs[4 * i + 1], ROW[i][SIZE])", "range(0, 1)", "packed, streamed"),
    Mutant("rows.py", "load_piece(located[0], segs, live, ROW, i, first)", "load_piece(located[0], segs, live, ROW, i)",
           "packed, streamed"),
    Mutant("tiles.py", "end = tl.maximum(end - window[1], 0)", "end = tl.maximum(end - window[1] + 1, 0)", "near"),
    Mutant("tiles.py", "begin = tl.minimum(begin, end) + window[2]", "begin = tl.minimum(begin, end)", "near"),
    Mutant("near.py", "head * M + i // S).to", "i // S * Hkv + head).to", "near"),
    Mutant("near.py", "tl.where(leading, first + u,", "tl.where(leading, start + u + 1,", "near"),
    Mutant("near.py", "leading | (t >= first + sinks)", "leading | (t >= first)", "near"),
    Mutant("near.py", "sinks + t % slots).to", "t % slots).to", "near"),
    Mutant("near.py", "t[:, None] <= own[None, :]", "t[:, None] < own[None, :]", "near"),
    Mutant("near.py", "(own - recent)[None, :]", "(own - recent + 1)[None, :]", "near"),
    Mutant("near.py", "(own - window)[None, :]", "(own - window + 1)[None, :]", "near and window"),
    Mutant("near.py", "recent + S - 1, 0)", "recent, 0)", "near"),
    Mutant("near.py", "acc * fade[:, None]", "acc", "near"),
    Mutant("near.py", "p_v + place[:, None] * value_strides[1]", "p_v + place[:, None] * Hkv * D", "near and window"),
    Mutant("near.py", "row = tl.load(rows + i_b * rows_stride).to(tl.int64)", "row = i_b", "near"),
    Mutant("near.py", "min(tokens.recent, rule.window or tokens.recent)", "tokens.recent", "near all"),
    Mutant("near.py", "leading | (t >= length - slots)", "leading | (t >= 0)", "write near"),
    Mutant("near.py", "t = length - S + i\n", "t = length - S + i + 1\n", "write near"),
    Mutant("near.py", "leading = t - first < sinks", "leading = t < sinks", "write near"),
    Mutant("near.py", "held & (i < S) & (t >= first)", "held & (i < S) & (t >= 0)", "write near"),
    Mutant("near.py", "s[:, None] * v_strides[1]", "s[:, None] * Hkv * D", "write near"),
    Mutant("combine.py", "tl.exp(beside - joined)", "tl.exp(beside - merged_lse)", "near"),
    Mutant("combine.py", "mass = tl.where(some, tl.exp(merged_lse - joined), 0.0)\n    if sinks",
           "mass = tl.where(some, 1.0, 0.0)\n    if sinks", "near and window"),
    Mutant("combine.py", "tl.exp(joined - base) + tl.exp(sink", "tl.exp(merged_lse - base) + tl.exp(sink", "near"),
    Mutant("combine.py", "row * near_strides[1]", "i * near_strides[1]", "near"),
    Mutant("decode.py", "_attend(own.latents,", "_attend(own,", "near and window"),
    Mutant("packed.py", "23 - BITS - BITS * M", "23 - BITS - BITS * (1 - M)", "packed"),
    Mutant("packed.py", "(2**BITS + middle(BITS))", "2**BITS", "packed"),
    Mutant("packed.py", ".to(tl.float32) * SCALE_UNIT", ".to(tl.float32)", "packed"),
    Mutant("packed.py", "word, N % 3, False", "word, N % 2, False", "packed"),
    Mutant("packed.py", "N // 3 * 4", "0 * N", "packed, five scales"),
    Mutant("packed.py", "g * (strides[2] // G)", "0 * g", "packed"),
    Mutant("planes.py", "& 255) << 7", "& 127) << 7", "broken"),
    Mutant("packed.py", "m * segs[4 * N + 1] + h", "h", "packed"),
    Mutant("packed.py", "return segs[4 * N + 2] + r,", "return r,", "packed"),
    Mutant("packed.py", "packs += g * 3", "packs += 0 * g", "packed"),
    Mutant("values.py", "column + i_r * BLOCK_R", "column", "wide values"),
    Mutant("values.py", "row * y_strides[2] + i_r * BLOCK_R", "row * y_strides[2]", "wide values"),
    Mutant("attend_packed.py", " - VALUES[0][SCALE]).to(DTYPE)", ").to(DTYPE)", "planes, a pass each"),
    Mutant("attend_packed.py", "COLUMN] + m * KEYS[n][SIZE]", "COLUMN]", "planes"),
    Mutant("attend_packed.py", "x = tl.load(p_a[:, None]", "x = tl.load(a + row[:, None] * a_strides[2]", "planes"),
    Mutant("attend_packed.py", "c * terms_strides[1]", "0 * c", "planes"),
    Mutant("attend_packed.py", "before + t0 - origin", "before + t0 - t_begin", "planes"),
    Mutant("attend_packed.py", "part -= tl.load", "part += tl.load", "planes"),
    Mutant("attend_packed.py", "if KEYS[n][OPENS]:", "if n == 0:", "planes"),
    Mutant("attend_packed.py", "score += part * scale", "score = part * scale", "planes"),
    Mutant("attend_packed.py", "kw[KEYS[n][SCALE] // 3]", "kw[0]", "planes, five scales"),
    Mutant("attend_packed.py", "KEYS[n][SCALE] % 3", "0", "planes"),
    Mutant("attend_packed.py", "24 * MAGIC - 16", "24 * MAGIC - 15", "planes, sixteen bits"),
    Mutant("attend_packed.py", "g, KEY_WORDS // G", "0, KEY_WORDS // G", "planes"),
    Mutant("attend_packed.py", "place * KEY_WORDS", "0 * KEY_WORDS", "planes"),
    Mutant("attend_packed.py", "g * KEY_RUN", "0 * g", "planes, magic"),
    Mutant("attend_packed.py", "p_page + P * VALUE_ROW", "p_page + 16 * VALUE_ROW", "planes, a pass each"),
    Mutant("attend_packed.py", "W * T % P != 0 or offsets is not None", "W * T % P != 0", "planes"),
    Mutant("attend_packed.py", "W * T % P != 0 or offsets is not None", "offsets is not None", "planes, a pass each"),
    Mutant("attend_packed.py", "(terms + n_terms *", "(terms + (n_terms - 1) *", "planes"),
    Mutant("attend_packed.py", "(n_terms + 1) * terms_strides[2]", "n_terms * terms_strides[2]", "planes"),
    Mutant("attend_packed.py", "factor[None, :, None] + share", "factor[None, :, None] - share", "planes, shared"),
    Mutant("attend_packed.py", "share[None, :, None]) * LN_2", "share[None, :, None])", "planes, shared"),
    Mutant("attend_packed.py", "soft_cap(score, softcap)", "score", "planes, shared"),
    Mutant("attend_packed.py", "score * LOG2_E - above", "score - above", "planes, shared"),
    Mutant("attend_packed.py", "(above - share[None, :])", "(above + share[None, :])", "planes"),
    Mutant("attend_packed.py", "<= seen_to[", "< seen_to[", "planes, shared"),
    Mutant("attend_packed.py", "row % S  # last", "row // S  # last", "planes, shared"),
    Mutant("attend_packed.py", "(seen_to - window[0])", "(seen_to - window[0] + 1)", "planes, a pass each"),
    Mutant("attend_packed.py", "live &= t >= begin", "live &= t >= begin - 1", "planes, a pass each"),
    Mutant("attend_packed.py", "live = t < t_end", "live = t <= t_end", "planes"),
    Mutant("attend_packed.py", "sums * fade)", "sums)", "planes"),
    Mutant("attend_packed.py", "acc[n][m] * fade", "acc[n][m]", "planes"),
    Mutant("attend_packed.py", "tl.where(live[:, :, None], z[0], 0.0)", "z[0]", "planes, sixteen bits"),
    Mutant("attend_packed.py", "tl.where(live, vw[VALUES[n][SCALE] // 3], 0)", "vw[VALUES[n][SCALE] // 3]", "planes"),
    Mutant("attend_packed.py", "vw[VALUES[n][SCALE] // 3]", "vw[0]", "planes, five scales"),
    Mutant("attend_packed.py", "VALUES[n][SCALE] % 3", "0", "planes"),
    Mutant("attend_packed.py", "eight == 1 + VALUES[n][SCALE]", "eight == 1", "planes"),
    Mutant("attend_packed.py", "elif VALUES[n][OPENS]", "elif n == 0", "planes"),
    Mutant("attend_packed.py", "range(t_begin, t_end, W * T)", "range(t_begin, t_end - BLOCK_T, W * T)", "planes"),
    Mutant("attend_packed.py", 'tl.full([16], float("-inf")', "tl.full([16], 0.0", "planes"),
    Mutant("attend_packed.py", "share = tl.exp2(peak - top[None])", "share = tl.exp2(peak - peak)", "planes"),
    Mutant("attend_packed.py", "tl.log2(whole) + top", "tl.log(whole) + top", "planes"),
    Mutant("attend_packed.py", "(tl.log2(whole) + top) * LN_2", "tl.log2(whole) + top", "planes"),
    Mutant("attend_packed.py", "y + i_b * y_strides[0] + i_s * y_strides[1]", "y + i_b * y_strides[0]", "planes"),
    Mutant("attend_packed.py", "latent = value_segs[3 * n + 1], ", "latent = held, ", "planes"),
    Mutant("attend_packed.py", ", value_segs[3 * n + 2]", ", latent", "planes"),
    Mutant("attend_packed.py", "if VALUES[n][OPENS] and", "if n == 0 and", "planes"),
    Mutant("attend_packed.py", "/ unit(VALUES[n][BITS], m,", "/ unit(VALUES[n][BITS], 0,", "planes"),
    Mutant("attend_packed.py", "- less[:, :, None]", "+ less[:, :, None]", "planes"),
    Mutant("attend_packed.py", "(latent + m * held + h)", "(latent + h)", "planes"),
    Mutant("attend_packed.py", "heads + g * C", "heads + g", "planes"),
    Mutant("attend_packed.py", "packs += g * 3", "packs += 0 * g", "planes"),
    Mutant("attend_packed.py", "mask=h < padded(segs[3 * N + 1])", "mask=h < 8", "planes"),
    Mutant("attend_packed.py", "(PIECES[N][FIRST] + tl", "(0 * PIECES[N][FIRST] + tl", "planes, even"),
    Mutant("planes.py", "2 * i % 10", "2 * i % 8", "planes"),
    Mutant("planes.py", "4 * (i % 2)", "0 * i", "planes"),
    Mutant("planes.py", "(1 << bits) - 1)", "(1 << bits - 1) - 1)", "planes"),
    Mutant("planes.py", "BITS * N - position(BITS, N)", "BITS * N", "planes"),
    Mutant("planes.py", "0 if magic else 24", "0 if magic else 23", "planes"),
    Mutant("planes.py", "0 if magic else 24", "24", "planes, magic"),
    Mutant("planes.py", "bitcast=True) - 1024.0", "bitcast=True) - 1023.0", "planes, magic"),
    Mutant("planes.py", "& 255) << 7", "& 255) << 6", "planes"),
    Mutant("planes.py", "return p * scale.to(p.dtype)", "return scale + p * 0", "planes"),
    Mutant("planes.py", "(2**bits - 1) / 2", "2**bits / 2", "planes"),
    Mutant("absorb_packed.py", "at = first + c", "at = c", "planes"),
    Mutant("absorb_packed.py", "m * 2 % 10", "m * 2 % 8", "planes"),
    Mutant("absorb_packed.py", "m % 2 * 4", "m * 0", "planes"),
    Mutant("absorb_packed.py", "middles += tl.sum", "middles = tl.sum", "planes"),
    Mutant("absorb_packed.py", "((1 << bits) - 1) * 0.5", "(1 << bits) * 0.5", "planes"),
    Mutant("absorb_packed.py", "tl.exp2((14 - exponent)", "tl.exp2((13 - exponent)", "planes"),
    Mutant("absorb_packed.py", "tl.load(norms + place)", "0.001", "planes"),
    Mutant("absorb_packed.py", "2 - 24 * MAGIC", "2", "planes, magic"),
    Mutant("absorb_packed.py", "tl.where(MAGIC, 1.0, 2.0**-24)", "2.0**-24", "planes, magic"),
    Mutant("absorb_packed.py", "latent + m * halfwords + h", "latent + h", "planes"),
    Mutant("absorb_packed.py", "latent + m * halfwords + h", "m * halfwords + h", "planes"),
    Mutant("absorb_packed.py", "(h < halfwords) & (r < rank)", "(h < halfwords)", "planes, shared"),
    Mutant("absorb_packed.py", "begin + j % size", "j % size", "planes, even"),
    Mutant("absorb_packed.py", "place // C * 3 * KEYS", "0 * place * KEYS", "planes"),
    Mutant("absorb_packed.py", "c * terms_strides[1]", "0 * c", "planes"),
    Mutant("absorb_packed.py", "tl.dot(rest, u, got", "tl.dot(0 * rest, u, got", "turned"),
    Mutant("pieces.py", "() if rest <= first else", "() if rest else", "band, pieces"),
    Mutant("pieces.py", "(widest,) * (n // widest)", "(widest,) * 0", "planes, wide"),
    Mutant("pieces.py", "round_up(2 * held, ALIGNMENT)", "2 * held", "planes, even"),
    Mutant("pieces.py", "latent + rank, scale", "latent, scale", "planes, even"),
    Mutant("pieces.py", "scale + (0 < bits < 16)", "scale + 1", "planes, sixteen bits"),
    Mutant("pieces.py", "column + size * (16 // bits if bits else 1)", "column + size", "planes"),
    Mutant("pieces.py", "if p[2] == 0", "if p[0] == 0", "packed, streamed"),
    Mutant("pack.py", "(j % 2 * (8", "((1 - j % 2) * (8", "pack"),
    Mutant("pack.py", "+ k) * halfwords", "+ k) * 8", "pack"),
    Mutant("pack.py", "scale // SCALES * WORD + scale % SCALES", "scale", "pack"),
    Mutant("pack.py", "tl.num_programs(1) + g) * WORDS", "tl.num_programs(1)) * WORDS", "pack"),
    Mutant("pack.py", "if not holds(BITS, i_word):", "if i_word < 0:", "pack"),
    Mutant("pack.py", "byte = tl.where((j < 2 * halfwords)[None, :], byte, 0)", "byte = byte", "pack"),
    Mutant("pack.py", "(j < padded)[None, :]", "(j < 2 * halfwords)[None, :]", "pack"),
    Mutant("pack.py", "+ UPWARDS", "+ NEAREST", "pack"),
    Mutant("pack.py", "+ NEAREST", "+ UPWARDS", "pack"),
    Mutant("pack.py", "<< (k * BITS[s])", "<< (k * 2)", "pack"),
    Mutant("pack.py", "size = tl.maximum(size, tl.max(tl.abs(x), 1))", "size = tl.max(tl.abs(x), 1)", "pack"),
    Mutant("pack.py", "tl.where(bad > 0, BROKEN, held)", "held", "pack what is not finite"),
    Mutant("scores.py", "cos * along + sin * across", "cos * along - sin * across", "band"),
    Mutant("scores.py", "low * cos - high * sin", "low * cos + high * sin", "band, rows"),
    Mutant("attend.py", "((t0 - first) // BLOCK_T)", "((t0 - t_begin) // BLOCK_T)", "band"),
    Mutant("attend.py", "p_a += block * a_strides[1]", "p_a += 0 * block", "band"),
    Mutant("attend.py", "p_terms += block * terms_strides[1]", "p_terms += 0 * block", "band, rows"),
    Mutant("attend.py", "(t0 % BLOCK + tl.arange", "((t0 - origin) % BLOCK + tl.arange", "band"),
    Mutant("attend.py", "== (i // (M * S))[None, :]", "== (i // S % BLOCK_H)[None, :]", "band, rows"),
    Mutant("attend.py", "g = owner * HEADS // C", "g = owner * HEADS // Hkv", "band"),
    Mutant("attend.py", "owner * HEADS % C", "0 * owner", "band, owners"),
    Mutant("attend.py", "heads + owner * HEADS", "heads + 0 * owner", "band"),
    Mutant("attend.py", "left = HEADS * M * S - first_row", "left = HEADS * M * S - first_row - 1", "band, three"),
    Mutant("attend.py", "left = HEADS * M * S - first_row", "left = HEADS * M * S - first_row - 1", "band, three rows"),
    Mutant("scores.py", "n < left * T", "n < left", "band, three"),
    Mutant("scores.py", "n % Q < left", "n // T < left", "band, three rows"),
    Mutant("attend.py", "VALUE_TOKEN, P, BLOCK_T, WARPS, live)", "VALUE_TOKEN, P, BLOCK_T, WARPS)", "band, rows"),
    Mutant("tiles.py", "total * fade + tl.sum(p, AXIS)", "total + tl.sum(p, AXIS)", "band, rows"),
    Mutant("attend.py", "if MASKED:", "if False:", "band, rows"),
    Mutant("attend.py", "load_run(value_runs, g)", "load_run(key_runs, g)", "band, rows"),
    Mutant("tiles.py", "total * tl.expand_dims(fade, AXIS) + p", "total + p", "band, lanes"),
    Mutant("rows.py", "acc[n] * fade[:, None]", "acc[n]", "band, rows"),
    Mutant("attend.py", "even * phi_even + odd * phi_odd", "even * phi_odd + odd * phi_even", "band"),
    Mutant("attend.py", "tl.sum(score, 2) + tl.sum(tl", "tl.sum(score, 2) - tl.sum(tl", "band, four terms"),
    Mutant("attend.py", "tl.reshape(k, [BLOCK_T, T, BLOCK_Q]) * phi[:, :, None], 1)",
           "tl.trans(tl.reshape(k, [BLOCK_T, BLOCK_Q, T]), (0, 2, 1)) * phi[:, :, None], 1)", "band, rows"),
    Mutant("attend.py", "i = first_row + n // EACH", "i = first_row + n % EACH", "band, lanes"),
    Mutant("scores.py", "r = ROW[i][COLUMN] + ", "r = ", "band, pieces"),
    Mutant("attend.py", "d += FAST[n]", "d += 0", "band, pieces"),
    Mutant("scores.py", "tl.permute(tl.reshape(own, [Q, 4, F // 8, 2]), (0, 2, 1, 3))",
           "tl.reshape(own, [Q, F // 8, 4, 2])", "band"),
    Mutant("attend.py", "i_s * y_strides[1]", "0 * i_s", "band, rows"),
    Mutant("attend.py", 'p_lse, tl.full([BLOCK_Q], float("-inf")', "p_lse, tl.full([BLOCK_Q], 0.0", "band, rows"),
    Mutant("attend.py", "k += tl.reshape(tl.load(p_bias)", "k -= tl.reshape(tl.load(p_bias)", "band"),
    Mutant("attend.py", "(g * C + place)[:, None] * D + d", "(g * C + place)[:, None] * D + 0 * d", "band, pieces"),
    Mutant("attend.py", "t - origin, BLOCK_T", "t - t_begin, BLOCK_T", "band, scores"),
    Mutant("absorb.py", "tl.join(low, high).to(x", "tl.join(high, low).to(x", "band"),
    Mutant("absorb.py", "alpha * low + beta * high, alpha", "beta * low + alpha * high, alpha", "band"),
    Mutant("absorb.py", "alpha * high - beta * low", "alpha * high + beta * low", "band, rows"),
    Mutant("absorb.py", "(0, 2, 1, 3)", "(0, 1, 2, 3)", "band"),
    Mutant("absorb.py", "t0 = first * BLOCK + tile * BLOCK_T", "t0 = tile * BLOCK_T", "band, far rows"),
    Mutant("absorb.py", "tile = c * TILES + n % TILES", "tile = c * TILES", "band, far"),
    Mutant("absorb.py", "at = (first + c) * BLOCK", "at = c * BLOCK", "band, far"),
    Mutant("absorb.py", "head * (M * S) + m", "m", "band, rows"),
    Mutant("absorb.py", "p * ROWS + w % ROWS", "w % ROWS * T + p", "band, rows"),
    Mutant("absorb.py", "(i // S).to", "(i % M).to", "band, rows"),
    Mutant("absorb.py", "bias + place * D", "bias + 0 * place", "band"),
    Mutant("absorb.py", "place % C * D", "0 * place", "band"),
    Mutant("absorb.py", "load_run(runs, place // C)", "load_run(runs, 0)", "band"),
    Mutant("tiles.py", "// BLOCK + 1, 0)", "// BLOCK, 0)", "band"),
    Mutant("absorb.py", "(head * (M * S) + i)", "i", "band, rows"),
    Mutant("absorb.py", "None] + ROW[n][COLUMN] +", "None] +", "band, pieces"),
    Mutant("absorb.py", "uk, C * D, r0, segs", "uk, C * D, 0, segs", "band, packed"),
    Mutant("rows.py", "P * TOKEN + g * (WORDS // G)", "P * TOKEN", "band, packed"),
    Mutant("rows.py", "(P * TOKEN + g", "(16 * TOKEN + g", "band, packed"),
    Mutant("rows.py", "held[1][ROW[i][SCALE]]", "held[1][0]", "band, packed"),
    Mutant("packed.py", "(z[m], z[m + HALF])", "(z[m + HALF], z[m])", "band, packed"),
    Mutant("packed.py", "(z[m], z[m + HALF])", "(z[2 * m], z[2 * m + 1])", "band, packed"),
    Mutant("packed.py", "column // PLANES, column % PLANES", "column // PLANES, 0 * column", "band, packed"),
    Mutant("tiles.py", "tl.maximum(t0 // P + n, first)", "tl.maximum(t0 // P, first)", "band"),
    Mutant("tiles.py", "tl.maximum(t // P, first)", "tl.maximum(t // BLOCK_T, first)", "band, rows"),
    Mutant("rows.py", "tl.where(r < rank, r, r % 16)", "r", "band, three"),
    Mutant("rows.py", "tl.multiple_of(column + tl.where", "tl.multiple_of(tl.where", "band"),
    Mutant("rows.py", "ROW[i][FIRST] + tl.arange(0, ROW[i][SIZE])\n        found",
           "tl.arange(0, ROW[i][SIZE])\n        found", "band, pieces"),
    Mutant("rows.py", "tl.maximum(t0 + t, 0) % P", "tl.maximum(t0 + t, 0) % 16", "band, rows"),
    Mutant("rows.py", "+ t0 % P * TOKEN)", ")", "band, far rows"),
    Mutant("rows.py", "(STEP * TOKEN) + t % STEP", "TOKEN + t % STEP", "band, far rows"),
    Mutant("rows.py", "tl.where(t // P >= n,", "tl.where(t // P > n,", "band"),
    Mutant("rows.py", "(PART * TOKEN) + t % P", "TOKEN + t % P", "band, three"),
    Mutant("rows.py", "None], other=0.0),)\n    return z", "None] | True, other=0.0),)\n    return z", "band"),
]  # fmt: skip
# These reach for memory that is not theirs: a process of its own sees what happens. With the page size of the killer.
WILD = [
    Mutant("tiles.py", "other=0).to(tl.int64)\n", "other=0)\n", "16"),
    Mutant("tiles.py", "(pages + t0 // P).to(tl.int64)", "(pages + t0 // P)", "64"),
    Mutant("tiles.py", "begin // P, (t_end - 1) // P", "begin // P, t_end // P + 1", "16"),
    Mutant("tiles.py", "tl.minimum(tl.maximum(t0 // P + n, first), last)", "t0 // P + n", "16"),
    Mutant("rows.py", "pages[n].to(tl.int64) * stride", "pages[n] * stride", "16"),
    Mutant("rows.py", "(pages[0].to(tl.int64) * stride + t0", "(pages[0] * stride + t0", "64"),
    Mutant("write.py", "mask=i < n, other=-1).to(tl.int64)", "mask=i < n, other=-1).to(tl.int32)", "16"),
]  # fmt: skip
FIRST = {m.file: m for m in reversed(MUTANTS)}  # of each file: these are quick
FIRST_KILLERS = sorted({m.killer for m in FIRST.values()})


def run(killer):
    """Raises AssertionError where the kernels in use are wrong."""
    if killer == "write":
        checks.check_write(KILLERS["write"], torch.int64, torch.float32, CPU)
    elif killer == "write near":
        for seed in range(12):
            written.check(seed, "triton", CPU)
    elif killer == "pack":
        checks.check_write(KILLERS["pack"], torch.int64, torch.float32, CPU)
    elif killer == "pack what is not finite":
        checks.check_broken(CPU)
    elif killer == "broken":
        checks.check_broken_scales(torch.float32, CPU)
    elif killer == "turned":
        checks.check_turned(CPU)
    elif killer == "rebuild":
        checks.check_rebuild(KILLERS["groups"], torch.float32, CPU)
    elif killer == "rebuild chunks":
        checks.check_rebuild(KILLERS["chunks"], torch.float32, CPU)
    elif killer == "known rows":
        checks.check_known_rows("triton", CPU)
    else:
        if killer == "planes, magic":
            launch = importlib.import_module("lrattn.kernels.launch")  # the copy
            found = launch.attend_packed
            launch.attend_packed = lambda *tile, **shape: found(*tile, **shape)._replace(magic=True)
        checks.check(KILLERS[killer], KILLERS[killer].dtype, CPU)


def test_every_file_of_kernels_has_a_mutant():
    assert set(FIRST) >= {path.name for path in KERNELS.glob("*.py") if "triton.language" in path.read_text()}


def test_every_fault_has_its_place():
    texts = {path.name: path.read_text() for path in KERNELS.glob("*.py")}
    assert not [str(m) for m in (*MUTANTS, *WILD) if m.old not in texts[m.file]]


@pytest.mark.parametrize("mutant", slow_unless(set(FIRST.values()), MUTANTS), ids=str)
def test_a_fault_is_seen(mutant, swap):
    swap(mutant)
    with pytest.raises(AssertionError):
        run(mutant.killer)


@pytest.mark.parametrize("killer", slow_unless(FIRST_KILLERS[::5], sorted({m.killer for m in MUTANTS})))
def test_without_a_fault_nothing_is_seen(killer, swap):
    swap(None)
    run(killer)


def far_pages(mutant, page_size, folder):
    """A process that checks offsets beyond 32 bits with a copy of the kernels."""
    copy_with(mutant, folder / "kernels")
    code = (
        f"import lrattn.kernels; lrattn.kernels.__path__ = [{str(folder / 'kernels')!r}]\n"
        f"import checks, torch; checks.check_far_pages({page_size}, torch.device('cpu')); print('well')\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, *WILD], ids=str)
def test_a_wild_fault_is_seen(mutant, tmp_path, request):
    """As an access outside all memory, or a wrong result; without a fault there is neither."""
    if request.config.getoption("--gpu"):
        pytest.skip("faults are shown in the interpreter")
    done = far_pages(mutant, mutant.killer if mutant else "16", tmp_path)
    if mutant is None:
        assert done.stdout == "well\n", done.stderr
    else:
        assert done.returncode < 0 or "AssertionError" in done.stderr, done.stderr
