"""decode_attention against dense attention on keys and values rebuilt head by head (oracle.py)."""

from dataclasses import replace

import dense
import oracle
import pytest
import torch
from cases import CASES, PACKED, PLAIN, RAGGED, Case, make, make_layer
from closeness import assert_no_worse
from live import LiveBytes
from packing import plain

import lrattn


@pytest.mark.parametrize("case", CASES + PACKED, ids=str)
def test_decode_attention_equals_dense_attention(case):
    """Packed latents are attended to as what their bits say."""
    problem = make(case)
    layer, q, k_cache, v_cache, kwargs = problem
    out, lse = lrattn.decode_attention(q, k_cache, v_cache, layer, return_lse=True, **kwargs)
    own, *tensors, _ = plain(problem)
    expected, expected_lse, _ = oracle.attend(*tensors, own, **kwargs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)


def test_project_modes_are_one_result_in_three_spaces():
    layer, q, k_cache, v_cache, kwargs = make(RAGGED)
    latent, heads, hidden = (
        lrattn.decode_attention(q, k_cache, v_cache, layer, project=p, **kwargs) for p in ("latent", "heads", "hidden")
    )
    _, lse = lrattn.decode_attention(q, k_cache, v_cache, layer, return_lse=True, **kwargs)
    assert latent.shape[-1] == 64
    assert (latent[:, :, 4:, 16:] == 0).all()  # heads of the second value group have rank 16
    assert (latent[:2, :, :4, 16:].abs().amax(-1) > 0).all()
    mass = 1 - (kwargs["sinks"].double() - lse).exp()  # what the sinks leave to tokens
    up, offset = layer.values.up.repeat_interleave(2, 0), layer.values.offset.repeat_interleave(2, 0)
    torch.testing.assert_close(heads, torch.einsum("bshr,hrd->bshd", latent, up) + mass[..., None] * offset)
    torch.testing.assert_close(hidden, torch.einsum("bshd,hde->bse", heads, layer.wo))


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(splits, dtype):
    layer, q, k_cache, v_cache, kwargs = make(RAGGED, dtype)
    whole = lrattn.decode_attention(q, k_cache, v_cache, layer, num_splits=splits, **kwargs)
    for b in range(len(q)):
        row = dict(kwargs, block_table=kwargs["block_table"][b : b + 1], seq_lens=kwargs["seq_lens"][b : b + 1])
        alone = lrattn.decode_attention(q[b : b + 1], k_cache, v_cache, layer, num_splits=splits, **row)
        assert torch.equal(alone, whole[b : b + 1])


@pytest.mark.parametrize("project", ["heads", "latent"])
def test_any_partition_of_the_tokens_merges_exactly(project):
    case = replace(RAGGED, S=1, lens=(70, 33, 12))
    layer, q, k_cache, v_cache, kwargs = make(case)
    sinks = kwargs.pop("sinks")
    parts = []
    for begin, end in ((0, 5), (5, 12), (12, 40), (40, 80)):
        bounds = {
            "seq_starts": torch.full((3,), begin, dtype=torch.int32),
            "seq_lens": kwargs["seq_lens"].clamp(max=end),
            "sinks": sinks if begin == 5 else None,
        }
        part = dict(kwargs, **bounds, causal=False, project=project, return_lse=True)
        parts.append(lrattn.decode_attention(q, k_cache, v_cache, layer, **part))
    merged = lrattn.merge_attention(*zip(*parts))
    whole = lrattn.decode_attention(
        q, k_cache, v_cache, layer, **dict(kwargs, seq_starts=None, sinks=sinks, project=project, return_lse=True)
    )
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-12)


def test_merge_of_nothing_is_nothing_and_hidden_is_refused():
    empty = torch.full((2, 1, 3), -torch.inf)
    for parts in (1, 2):
        out, lse = lrattn.merge_attention([torch.full((2, 1, 3, 8), torch.nan)] * parts, [empty] * parts)
        assert (out == 0).all() and (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="project='hidden' cannot be merged"):
        lrattn.merge_attention([torch.zeros(2, 1, 24)] * 2, [empty] * 2)
    with pytest.raises(ValueError, match=r"outs\[1\]: expected"):
        lrattn.merge_attention([torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 9)], [empty] * 2)
    with pytest.raises(ValueError, match="lses: expected one for each"):
        lrattn.merge_attention([], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gqa", "offset", "no rope, offset", "no rope", "riding row", "positions", "aligned"])
def test_no_worse_than_pytorch_in_the_same_dtype(name, dtype):
    case = next((c for c in CASES if c.name == name), Case("aligned", M=2, lens=(300, 300)))
    layer, q, k_cache, v_cache, kwargs = make(replace(case, lens=(300, 301)), dtype)
    if name == "aligned":  # queries along a key: large scores, a peaked softmax
        k, _ = lrattn.rebuild(k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"])
        q = k[[150, 450]].repeat_interleave(2, 1)[:, None] * 3
    exact, _, _ = oracle.attend(q, k_cache, v_cache, layer, **kwargs)
    got = lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs)
    own, _ = dense.attend(q, k_cache, v_cache, layer, **kwargs)
    assert_no_worse(got, own, exact)


@pytest.mark.parametrize("rope", [{"max_position": 40960}, None], ids=["rope", "no rope"])
@pytest.mark.parametrize("limit, tokens", [(256 << 20, 20480), (200_000, 8192)])
def test_memory_does_not_grow_with_the_tokens(limit, tokens, rope):
    peaks = []
    for n in (tokens, 2 * tokens):
        case = Case("long", M=2, Hkv=8, D=64, key_ranks=(64, 64), value_ranks=(128,), lens=(n,), rope=rope)
        layer, q, k_cache, v_cache, kwargs = make(case, torch.float32)
        with LiveBytes() as live:
            lrattn.decode_attention(q, k_cache, v_cache, layer, workspace_limit=limit, **kwargs)
        peaks.append(live.peak)
        bound = lrattn.workspace_bytes(layer, query_heads=16, workspace_limit=limit)
        assert live.peak <= bound <= limit
    assert peaks[1] <= 1.05 * peaks[0], peaks


@pytest.mark.parametrize("changes", [{"P": 4096}, {"rope": None, "key_ranks": (256,), "value_ranks": (16,), "S": 64}])
def test_workspace_counts_large_pages_and_absorbed_queries(changes):
    case = Case("wide", **{"M": 2, "lens": (4096,), "key_ranks": (64,), "value_ranks": (64,), **changes})
    layer, q, k_cache, v_cache, kwargs = make(case, torch.float32)
    sizes = {"query_heads": 8, "num_queries": case.S, "page_size": case.P, "workspace_limit": 1 << 19}
    with LiveBytes() as live:
        lrattn.decode_attention(q, k_cache, v_cache, layer, workspace_limit=1 << 19, **kwargs)
    results = 4 * q.numel() + 4 * q[..., 0].numel()
    assert live.peak - results <= lrattn.workspace_bytes(layer, **sizes) <= 1 << 19


def bad_calls(q, kwargs):
    """One of each message; tests/support/faults.py makes every argument wrong in every way."""
    table, lens = kwargs["block_table"], kwargs["seq_lens"]
    overlapping = torch.zeros(256, dtype=torch.float64).as_strided((1, 1, 4, 64), (256, 256, 63, 1))
    return {
        r"q: expected shape \[B=1, S, Hq, D=64\], got \[2, 1, 4, 64\]": {"q": q.expand(2, -1, -1, -1)},
        "q: expected dtype torch.float64, got torch.float32": {"q": q.float()},
        "q: expected a contiguous last axis": {"q": q.mT.contiguous().mT},
        "q: expected a multiple of Hkv=4 query heads, got 3": {"q": q[:, :, :3]},
        "q: expected a multiple of Hkv=4 query heads, got 0": {"q": q[:, :, :0]},
        "q: expected a tensor, got list": {"q": q.tolist()},
        "block_table: expected dtype torch.int32": {"block_table": table.long()},
        r"block_table: expected shape \[B, pages\]": {"block_table": table[0]},
        "seq_starts: expected shape": {"seq_starts": lens.repeat(2)},
        "positions: expected shape": {"positions": torch.zeros(1, 16, dtype=torch.int32)},
        "sinks: expected shape": {"sinks": torch.zeros(5)},
        "sinks: expected dtype torch.float32 or torch.float64": {"sinks": torch.zeros(4, dtype=torch.float16)},
        "project: expected one of": {"project": "logits"},
        r"out: expected memory of its own for every element, got strides \(256, 256, 63, 1\)": {"out": overlapping},
        "softmax_scale: expected a finite number of at least -inf, got nan": {"softmax_scale": float("nan")},
        "softcap: expected a finite number of at least 0.0, got -1.0": {"softcap": -1.0},
        "window_size: expected an integer from 1 to 9223372036854775807, got 5.5": {"window_size": 5.5},
        "window_size: expected None with causal=False": {"window_size": 4, "causal": False},
        "num_splits: expected an integer from 0 to 1024, got 1025": {"num_splits": 1025},
        "workspace_limit: expected an integer from 1 .*, got 0": {"workspace_limit": 0},
        "max_seq_len: expected an integer from 0 .*, got -1": {"max_seq_len": -1},
        "causal: expected True or False, got None": {"causal": None},
        "backend: expected None or one of": {"backend": "flash"},
    }


def test_errors_name_the_argument():
    layer, q, k_cache, v_cache, kwargs = make(PLAIN)
    for message, changes in bad_calls(q, kwargs).items():
        arguments = {"q": q, **kwargs, **changes}
        with pytest.raises(ValueError, match=message):
            lrattn.decode_attention(arguments.pop("q"), k_cache, v_cache, layer, **arguments)
    with pytest.raises(ValueError, match=r"layer\.wo: expected"):
        lrattn.decode_attention(q, k_cache, v_cache, replace(layer, wo=None), project="hidden", **kwargs)
    with pytest.raises(ValueError, match="layer: expected LayerFactors, got NoneType"):
        lrattn.decode_attention(q, k_cache, v_cache, None, **kwargs)
    with pytest.raises(ValueError, match="v_cache: expected None, the layer is shared"):
        shared = make_layer(Case("shared", shared=True, key_ranks=(32,), value_ranks=(32,)))
        lrattn.decode_attention(q, k_cache, k_cache, shared, **kwargs)


def test_tokens_past_the_rope_table_are_refused():
    case = Case("short table", rope={"max_position": 32}, lens=(33,))
    layer, q, k_cache, v_cache, kwargs = make(case)
    for run in (
        lambda: lrattn.decode_attention(q, k_cache, v_cache, layer, **kwargs),
        lambda: lrattn.rebuild(k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"]),
    ):
        with pytest.raises(ValueError, match="seq_lens: expected at most max_position=32 of the rope, got 33"):
            run()


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("wrong", [-1, 5000, 2_000_000_000])
def test_pages_and_positions_that_do_not_exist_are_refused(wrong, page_size):
    layer, q, k_cache, v_cache, kwargs = make(Case("wrong", P=page_size, lens=(37,), positions=True))
    kwargs["block_table"][0, 0] = 0
    for message, changes in {
        rf"block_table: expected pages 0 \.\. {len(k_cache) - 1} where tokens are read": {
            "block_table": kwargs["block_table"].index_fill(1, torch.tensor([0]), wrong),
        },
        r"positions: expected 0 \.\. 4095 of the rope": {"positions": torch.full_like(kwargs["positions"], wrong)},
    }.items():
        arguments = {**kwargs, **changes}
        tables = arguments["block_table"], arguments["seq_lens"], arguments["positions"]
        with pytest.raises(ValueError, match=message):
            lrattn.decode_attention(q, k_cache, v_cache, layer, **arguments)
        with pytest.raises(ValueError, match=message):
            lrattn.rebuild(k_cache, v_cache, layer, *tables)
