"""What a GPU is asked first, asked of Triton's interpreter, which is exact, and of tensor cores that are not."""

import json
import math
import sys

import pytest
import torch
import triton
import triton.language as tl

from bench import gpu_check
from bench.decode import subnormals, timing
from lrattn.kernels.planes import planes, position

CPU = torch.device("cpu")


@triton.jit
def flushed(x, BITS: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):
    """Planes as tensor cores see them that flush subnormal numbers to zero."""
    z = ()
    for own in planes(x, BITS, MAGIC, ASM):
        z += (tl.where(tl.abs(own) < 2.0**-14, 0.0, own).to(tl.float16),)
    return z


@triton.jit
def one_bit_less(x, BITS: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):
    """Of subnormal numbers, as if they were held in nine bits."""
    return planes(x if MAGIC else x & 0x7EFE, BITS, MAGIC, ASM)


def asked(folder, monkeypatch):
    """Exit status, JSON."""
    monkeypatch.setattr(sys, "argv", ["subnormals", "--dry", "--out", str(folder)])
    code = subnormals.main()
    return code, json.loads((folder / "subnormals_dry.json").read_text())


def test_exact_products_are_no_fault_and_are_timed(tmp_path, monkeypatch, capsys):
    code, found = asked(tmp_path, monkeypatch)
    assert code == 0 and found["faults"] == {} and found["dry"] and {"gpu", "triton", "commit"} <= set(found["machine"])
    assert len(found["ways"]) == 12 and set(found["times"]) == {"normal", "subnormal"}
    assert found["ratio"] > 0 and found["slow"] == "" and "12 of 12 ways" in capsys.readouterr().out


@pytest.mark.parametrize("fault, told", [(flushed, "of them zero"), (one_bit_less, "wrong")])
def test_planes_that_are_not_what_they_should_be_are_found_where_they_are(fault, told, tmp_path, monkeypatch, capsys):
    """As subnormal numbers in every product; as normal ones nowhere, so that those are what is to be taken."""
    monkeypatch.setattr(subnormals, "planes", fault)
    code, found = asked(tmp_path, monkeypatch)
    assert code == 1 and set(found["faults"]) == {way for way in found["ways"] if "of subnormal" in way}
    assert all(told in why for why in found["faults"].values()) and "times" not in found
    assert "magic=True" in capsys.readouterr().out


def test_a_flush_makes_every_sum_zero():
    got, true = torch.zeros(4, 2), torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]], dtype=torch.float64)
    assert subnormals.wrong("sums", got, true).startswith("7 of 8 sums are wrong, 7 of them zero")
    assert subnormals.wrong("sums", true.float(), true) == ""
    for x in (math.nan, math.inf):
        assert f"8 of 8 sums are wrong, 0 of them zero: expected 0.0, got {x}" in subnormals.wrong(
            "sums", got + x, true
        )


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_sums_are_exact_in_float32(bits):
    """In units of the smallest product no partial sum reaches 2^24, whatever its order."""
    longest = max(subnormals.SIZE, subnormals.WARPS * subnormals.TOKENS)
    assert subnormals.LARGEST * (2**bits - 1) * longest < 2**24
    assert max((2**bits - 1) << position(bits, i) for i in range(16 // bits)) < 2**10, "a subnormal float16"


def test_slow_products_are_told_with_what_to_do():
    assert subnormals.slow(1.0) == subnormals.slow(1.1) == ""
    assert "magic=True" in subnormals.slow(1.2)


def test_a_wrong_product_is_not_timed(monkeypatch):
    monkeypatch.setattr(subnormals, "UNROLLED", 2)
    own = subnormals.rate_kernel
    monkeypatch.setattr(subnormals, "rate_kernel", {(1,): lambda *a, **k: own[(1,)](*a, **k | {"UNROLLED": 1})})
    with pytest.raises(timing.WrongResult):
        subnormals.times(CPU, timing.WallClock(), dry=True)


def test_it_is_asked_first(tmp_path):
    step = gpu_check.steps(tmp_path, dry=False)[0]
    assert "bench.decode.subnormals" in step.command(1.0) and step.share <= 0.1
