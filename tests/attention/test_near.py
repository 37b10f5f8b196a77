"""The dense window inside a call: each query sees its last tokens and the first ones as they are, the others by their
latents; tests/attention/test_fuzz.py draws it among all other arguments. And what is written to it, and taken back."""

from dataclasses import replace

import oracle
import packing
import pytest
import torch
import written
from cases import Case, make
from checks import attend, check, on
from fuzzing import fuzz
from hypothesis import strategies as st
from slowly import slow_unless
from torch import library

import lrattn

FORMS = {"rebuilt": {}, "absorbed": {"rope": None}, "chunks": {"chunk": 64}}
SIZES = {"recent": st.integers(0, 70), "sinks": st.integers(0, 5), "more": st.integers(0, 3)}


@st.composite
def windows(draw):
    """Cases of one small layer: what they vary in is the window, lengths and who sees what."""
    lens = tuple(draw(st.lists(st.integers(0, 80), min_size=1, max_size=3)))
    starts = draw(st.none() | st.tuples(*(st.integers(-1, n + 2) for n in lens)))
    near = *(draw(n) for n in SIZES.values()), draw(st.booleans()), starts is not None and draw(st.booleans())
    window = draw(st.none() | st.integers(1, 90))
    call = {"project": draw(st.sampled_from(["heads", "hidden"])), "softcap": draw(st.sampled_from([0.0, 3.0]))}
    call |= {} if window is None else {"window_size": window}
    form = FORMS[draw(st.sampled_from(list(FORMS)))]
    shape = {"Hkv": 2, "M": 2, "D": 32, "S": draw(st.integers(1, 5)), "sinks": draw(st.booleans()), "offset": True}
    return Case("drawn", lens=lens, starts=starts, near=near, call=call, **shape, **form)


def exact(problem):
    layer, q, k_cache, v_cache, kwargs = packing.plain(on("cpu", *problem))
    return oracle.attend(q, k_cache, v_cache, layer, **kwargs)


def check_mixed(case, dtype, backend, close, seed=0, device="cpu"):
    problem = on(device, *make(case, dtype, seed))
    got, lse = (x.cpu() for x in attend(problem, backend=backend))
    want, want_lse, _ = exact(problem)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=close * (1 + want.abs().max().item()))
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=close * 10)


@fuzz(2, case=windows(), seed=st.integers(0, 99))
def test_the_reference_mixes_exact_and_far_tokens_by_query(case, seed, device):
    check_mixed(case, torch.float64, "reference", 1e-12, seed)


@fuzz(16, case=windows(), seed=st.integers(0, 99))
def test_the_kernels_mix_exact_and_far_tokens_by_query(case, seed, device):
    check_mixed(case, torch.float32, "triton", 2e-5, seed, device)


@pytest.mark.every(5)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("near", [(6, 3, 0, False, False), (70, 2, 1, True, True), (0, 4, 0, False, False)], ids=str)
def test_the_kernels_are_no_worse_than_pytorch(form, near, device):
    """Lengths below, at and beyond the window; windows that end within it; more query rows than a program owns."""
    shape = {"near": near, "offset": True, "sinks": True, **FORMS[form]}
    lens = (150, 70 + near[0], near[0] + near[1], 3, 0)
    case = Case("near", Hkv=2, M=2, S=3, lens=lens, starts=(70, 0, 0, 1, 0), **shape)
    check(case, torch.float32, device)
    check(replace(case, M=8, S=9, lens=(100,), starts=(7,)), torch.float16, device)
    for window in (2, near[0] + 30):
        check(replace(case, call={"window_size": window, "project": "hidden", "num_splits": 2}), torch.float32, device)
    check(replace(case, call={"workspace_limit": 1, "softcap": 4.0}, strided=True), torch.float32, device)


@pytest.mark.every(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [7, 8, 69, 70])
def test_one_far_token_more_than_fits(length, form, device):
    """None and one, a tile of them and one more: the host's bound counts them, too."""
    case = Case("one more", Hkv=1, lens=(length,), near=(5, 2, 0, False, False), call={"max_seq_len": length})
    for backend in ("triton", "reference"):
        check_mixed(replace(case, **FORMS[form]), torch.float32, backend, 2e-5, device=device)


def test_without_a_window_of_any_size_it_is_a_call_without_one(device):
    case = Case("none", M=2, S=2, lens=(40, 3), starts=(5, 0))
    problem = on(device, *make(case, torch.float32))
    keys, values = torch.full((2, 2, 7, 4, 64), torch.nan, device=device)
    for backend in ("triton", "reference"):
        for near in (lrattn.Near(keys, values, 0, 0), lrattn.Near(keys[:, :0], values[:, :0], 0, 0)):
            for got, want in zip(attend(problem, backend=backend, near=near), attend(problem, backend=backend)):
                assert torch.equal(got, want)


def test_all_in_the_window_is_dense_attention_and_no_latent_is_read(device):
    """Also under a window that is none wider."""
    case = Case("all", M=2, S=2, lens=(40, 3), near=(64, 2, 0, False, False), call={"num_splits": 3})
    for changes in ({}, {"near": (20, 0, 0, False, False), "call": {"window_size": 20}}):
        layer, q, k_cache, v_cache, kwargs = on(device, *make(replace(case, **changes), torch.float32))
        for cache in (k_cache, v_cache):
            cache.fill_(torch.nan)
        problem = (layer, q, k_cache, v_cache, kwargs)
        want = exact(problem)[0]
        for backend in ("triton", "reference"):
            torch.testing.assert_close(attend(problem, backend=backend)[0].cpu().double(), want, rtol=0, atol=1e-5)


def test_a_sequence_without_a_row_has_far_tokens_alone(device):
    """Nothing is read or written of a number that is none of the rows, before the first or after the last."""
    case = Case("dead", M=2, lens=(40, 30, 9), near=(5, 2, 0, True, False))
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float32))
    near = kwargs["near"]
    dead = replace(near, rows=torch.tensor([-1, near.rows[1], len(near.keys)], dtype=torch.int32, device=device))
    want = exact((layer, q, k_cache, v_cache, kwargs))
    for backend in ("triton", "reference"):
        got, lse = attend((layer, q, k_cache, v_cache, kwargs | {"near": dead}), backend=backend)
        torch.testing.assert_close(got[1].cpu().double(), want[0][1], rtol=0, atol=1e-5)
        far = {"seq_lens": kwargs["seq_lens"] - 5, "seq_starts": torch.full((3,), 2, dtype=torch.int32, device=device)}
        alone, alone_lse = attend((layer, q, k_cache, v_cache, kwargs | far | {"near": None}), backend=backend)
        torch.testing.assert_close(got[::2], alone[::2], rtol=0, atol=1e-6)
        torch.testing.assert_close(lse[::2], alone_lse[::2], rtol=0, atol=1e-6)
        held, values = near.keys.clone(), near.values.clone()
        k = torch.ones(3, 1, 4, 64, device=device)
        lrattn.write_near(dead, k, k, kwargs["seq_lens"], backend=backend)
        changed = (near.keys != held).nan_to_num(0).flatten(1).any(1) & ~held.isnan().flatten(1).all(1)
        assert changed.nonzero().flatten().tolist() == [int(near.rows[1])]
        near.keys.copy_(held), near.values.copy_(values)


# ------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("seed", slow_unless(range(12).__contains__, range(100)))
def test_written_and_taken_back(seed, backend, device):
    written.check(seed, backend, device)


def test_the_operator_is_what_it_says(device):
    keys, values = torch.randn(2, 3, 9, 2, 32, device=device)
    k, v = torch.randn(2, 2, 4, 2, 32, device=device)
    lens = torch.tensor([3, 40], dtype=torch.int32, device=device)
    library.opcheck(torch.ops.lrattn.write_near.default, (k, v, keys, values, None, lens, None, 2))


# ----------------------------------------------------------------------------------------------- what is refused


def test_what_is_refused_by_name():
    case = Case("refused", S=3, lens=(40, 9), near=(16, 2, 0, True, True))
    layer, q, k_cache, v_cache, kwargs = make(case, torch.float32)
    near = kwargs["near"]
    assert near.slots == 18 and near.nbytes == 2 * 4 * 20 * 4 * 64 * 4
    k = torch.zeros(2, 1, 4, 64)
    for changes, told in (
        ({"near": replace(near, recent=17)}, r"near.keys: expected at least 19 slots, .* or max_seq_len, got 18"),
        ({"near": near.keys}, "near: expected Near, got Tensor"),
        ({"causal": False}, "near: expected None with causal=False, where no token is recent, got Near"),
        ({"project": "latent"}, "near: expected None with project='latent', as it holds no latents, got Near"),
    ):
        with pytest.raises(ValueError, match=told):
            attend((layer, q, k_cache, v_cache, kwargs | changes))
    for wrong, told in (
        ({"keys": near.keys.double()}, r"near.keys: expected dtype torch.float32, got torch.float64"),
        ({"keys": near.keys[..., :3, :]}, r"near.keys: expected shape \[n, W, Hkv=4, D=64\], got \[4, 20, 3, 64\]"),
        ({"values": near.values[:, 1:]}, r"near.values: expected shape \[n=4, W=20, Hkv=4, D=64\], got"),
        ({"values": near.values.half()}, r"near.values: expected dtype torch.float32, got torch.float16"),
        ({"keys": near.keys.mT.contiguous().mT}, "near.keys: expected a contiguous last axis"),
        ({"sinks": 21}, "near.keys: expected rows of its sinks=21 tokens at least, got 20"),
        ({"sinks": -1}, "near.sinks: expected an integer from 0"),
        ({"recent": 2.0}, "near.recent: expected an integer from 0"),
        ({"rows": near.rows.long()}, "near.rows: expected dtype torch.int32"),
        ({"rows": near.rows[:1]}, r"near.rows: expected shape \[B=2\], got \[1\]"),
        ({"firsts": near.firsts[:1]}, r"near.firsts: expected shape \[B=2\], got \[1\]"),
        ({"rows": None, "keys": near.keys[:1], "values": near.values[:1]}, "near.keys: expected those of 2 sequences"),
    ):
        bad = replace(near, **wrong)
        with pytest.raises(ValueError, match=told):
            attend((layer, q, k_cache, v_cache, kwargs | {"near": bad}))
        if wrong.keys() == {"keys"} and "shape" in told:
            continue  # it is for heads of another number
        with pytest.raises(ValueError, match=told if "float64" not in told else "near.values: expected dtype"):
            lrattn.write_near(bad, k, k, kwargs["seq_lens"])
    for arguments, told in (
        ((near, k[0], k, kwargs["seq_lens"]), r"k: expected shape \[B, S, Hkv, D\], got \[1, 4, 64\]"),
        ((near, k, k[:, :0], kwargs["seq_lens"]), r"v: expected shape \[B=2, S=1, Hkv=4, D=64\], got \[2, 0, 4, 64\]"),
        ((near, k.half(), k, kwargs["seq_lens"]), "k: expected dtype torch.float32"),
        ((near, k, k, kwargs["seq_lens"][:1]), "seq_lens: expected shape"),
        ((near, k, k, None), "seq_lens: expected a tensor, got NoneType"),
        ((near, k, k, kwargs["seq_lens"], kwargs["seq_lens"].long()), "seq_starts: expected dtype torch.int32"),
        ((replace(near, keys=near.keys[:1].expand(4, -1, -1, -1)), k, k, kwargs["seq_lens"]), "memory of its own"),
    ):
        with pytest.raises(ValueError, match=told):
            lrattn.write_near(*arguments)
