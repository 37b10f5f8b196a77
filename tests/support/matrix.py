"""The shapes a serving engine brings, as columns of values; every two values meet in some case.

Every value is in one of the first QUICK cases.
"""

import torch
from cases import FAR, YARN, Case
from pairwise import covering_rows, covering_some

COLUMNS = {
    "P": [16, 32, 48, 64, 128],
    "lens": ["edges", "long", "one"],
    "C": [1, 2, 3, 4, 8],
    "groups": [1, 2],
    "M": [1, 2, 3, 4, 7, 8],
    "S": [1, 2, 5],
    "D": [64, 80, 96, 128, 256],
    "key_rank": ["one chunk", "two chunks", "ragged", "streamed"],
    "value_rank": ["one tile", "odd", "ragged", "tiles"],
    "value_groups": ["heads", "keys", "joint"],
    "shared": ["no", "joint", "riding"],
    "order": [False, True],
    "rope": ["default", "interleaved", "partial", "partial interleaved", "yarn", "fp32 angles", "none"],
    "chunk": ["none", "64", "192, offsets"],
    "positions": [False, True],
    "offset": [False, True],
    "causal": [True, False],
    "window": [0, 5, 70],
    "starts": [False, True],
    "softcap": [0.0, 4.0],
    "sinks": [False, True],
    "project": ["heads", "latent", "hidden"],
    "num_splits": [0, 1, 3],
    "max_seq_len": [None, 33],
    "workspace_limit": [256 << 20, 1],
    "strided": [False, True],
    "bits": [(), (8,), (4, 2), (16, 8, 2)],
    "dtype": [torch.float32, torch.float16],
}
KEY_RANKS = {"one chunk": (32, 32), "two chunks": (96, 96), "ragged": (16, 80), "streamed": (528, 528)}
VALUE_RANKS = {"one tile": (32, 32), "odd": (48, 48), "ragged": (80, 16), "tiles": (272, 272)}
ROPES = {
    "default": "default",
    "interleaved": {"interleaved": True},
    "partial": {"partial_rotary_factor": 0.25},
    "partial interleaved": {"partial_rotary_factor": 0.5, "interleaved": True},
    "yarn": YARN,
    "fp32 angles": {"fp32_angles": True},
    "none": None,
}
CHUNKS = {  # tokens of a chunk, and offsets
    "none": (None, None),
    "64": (64, None),
    "192, offsets": (192, (-100, FAR + 7, 700, 64, 37)),
}


def allowed(row):
    heads, queries = row["C"] * row["groups"] * row["M"], row["S"]
    if heads > 16 or heads * queries > (8 if row["workspace_limit"] == 1 else 32):
        return False
    if row["window"] and not row["causal"]:
        return False
    if row["chunk"] != "none" and (row["positions"] or row["rope"] == "none"):
        return False
    if row["key_rank"] == "ragged" and row["groups"] == 1:
        return False
    if row["shared"] != "no":
        return row["value_groups"] == "keys" and row["value_rank"] == "one tile"
    return row["value_rank"] != "ragged" or row["value_groups"] == "heads" or row["groups"] == 2


def case_of(i, row):
    heads, size = row["C"] * row["groups"], row["P"]
    key_ranks = KEY_RANKS[row["key_rank"]][: row["groups"]]
    count = {"heads": heads, "keys": row["groups"], "joint": 1}[row["value_groups"]]
    value_ranks = tuple(VALUE_RANKS[row["value_rank"]][g % 2] for g in range(count))
    if row["shared"] != "no":
        value_ranks = tuple(r + (16 if row["shared"] == "riding" else 0) for r in key_ranks)
    order = tuple((5 * h + 3) % heads for h in range(heads)) if row["order"] and heads % 5 else None
    lens = {"edges": (0, 1, size - 1, size, size + 1), "long": (150, 65), "one": (37,)}[row["lens"]]
    chunk, offsets = CHUNKS[row["chunk"]]
    call = {"softcap": row["softcap"], "causal": row["causal"], "project": row["project"]}
    call |= {n: row[n] for n in ("num_splits", "max_seq_len", "workspace_limit") if row[n] is not None}
    call |= {"window_size": row["window"]} if row["window"] else {}
    same = ("M", "D", "S", "P", "offset", "positions", "sinks", "strided", "dtype")
    return Case(
        f"{i}",
        Hkv=heads,
        key_ranks=key_ranks,
        value_ranks=value_ranks,
        lens=lens,
        rope=ROPES[row["rope"]],
        chunk=chunk,
        offsets=offsets and offsets[: len(lens)],
        shared=row["shared"] != "no",
        key_order=order,
        value_order=order if row["shared"] != "no" or order is None else order[::-1],
        starts=tuple((3, 40, 0, 7, 1)[: len(lens)]) if row["starts"] else None,
        key_bits=row["bits"],
        value_bits=row["bits"],
        call=call,
        **{name: row[name] for name in same},
    )


_ROWS = covering_rows(COLUMNS, allowed, seed=9)
_FIRST = covering_some(_ROWS)
QUICK = len(_FIRST)
ROWS = [_ROWS[i] for i in (*_FIRST, *sorted(set(range(len(_ROWS))) - set(_FIRST)))]
MATRIX = [case_of(i, row) for i, row in enumerate(ROWS)]
