"""decode_attention against dense attention on keys and values rebuilt one by one (oracle.py)."""

import pytest
import torch
from cases import CASES, make
from oracle import attend

import lrattn

ORACLE_ARGUMENTS = (
    "block_table",
    "seq_lens",
    "positions",
    "seq_starts",
    "sinks",
    "causal",
    "window_size",
    "softcap",
    "softmax_scale",
)


def truth(q, k_cache, v_cache, layer, kwargs):
    return attend(q, k_cache, v_cache, layer, **{n: kwargs[n] for n in ORACLE_ARGUMENTS if n in kwargs})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_equals_dense_attention(case):
    layer, q, k_cache, v_cache, kwargs = make(case)
    out, lse = lrattn.decode_attention(q, k_cache, v_cache, layer, return_lse=True, **kwargs)
    expected, expected_lse = truth(q, k_cache, v_cache, layer, kwargs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)
