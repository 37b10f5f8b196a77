"""The counter of loads and stores, on kernels whose traffic is known by hand."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from bench.compiled.counting import counting


@pytest.fixture(autouse=True)
def interpreted(request):
    if request.config.getoption("--gpu"):
        pytest.skip("accesses are counted in the interpreter")


@triton.jit
def copy_kernel(x, x_stride, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * x_stride, mask=i < n, other=0).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def sum_kernel(x, y, n, BLOCK: tl.constexpr):
    """Every program adds to the one number of y, and reads x past n."""
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + i)))


def rows(seen):
    return {(r["argument"], r["kind"]): (r["requested"], r["unique"]) for r in seen.rows()}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.int64])
def test_masked_lanes_ask_for_nothing(dtype):
    x, y, size = torch.arange(100).to(dtype), torch.zeros(100), dtype.itemsize
    with counting() as seen:
        copy_kernel[3,](x, 1, y, 70, BLOCK=32)
    assert (seen.reads(x) == (np.arange(100) < 70)).all() and (seen.writes(y) == (np.arange(100) < 70)).all()
    assert not seen.writes(x).any() and not seen.reads(y).any()
    assert rows(seen) == {("x", "reads"): (70 * size, -(-70 * size // 32) * 32), ("y", "writes"): (280, 288)}
    assert torch.equal(y[:70], x[:70].float()) and not y[70:].any()  # results are the same when counted


def test_slices_of_one_buffer_are_told_apart():
    pool = torch.arange(80, dtype=torch.float32).reshape(10, 8)
    x, y, expected = pool[:, 2], pool.view(-1)[75:], np.zeros((10, 8))
    with counting() as seen:
        copy_kernel[1,](x, 8, y, 5, BLOCK=8)
    expected[:5, 2] = 1
    assert (seen.reads(pool) == expected).all() and (seen.reads(x) == expected[:, 2]).all()
    assert seen.writes(pool).sum() == 5 and (seen.writes(y)[:5] == 1).all()
    assert rows(seen) == {("x", "reads"): (20, 5 * 32), ("y", "writes"): (20, 32)}
    assert seen.sectors(x) == 5 and seen.sectors(pool) == 5 and seen.sectors(y) == 0


def test_every_program_and_call_counts():
    x, y = torch.ones(8), torch.zeros(1)
    with counting() as seen:
        for _ in range(2):
            sum_kernel[3,](x, y, 8, BLOCK=8)
    assert (seen.reads(x) == 6).all() and seen.reads(y) == seen.writes(y) == 6 and y == 48
    assert (seen.reads(x, "sum_kernel") == 6).all() and not seen.reads(x, "copy_kernel").any()


@pytest.mark.parametrize("read, early", [(4, []), (5, [("copy_kernel", "x")])])
def test_reads_before_writes_are_told(read, early):
    x, y, z = torch.ones(8), torch.zeros(8), torch.zeros(8)
    with counting() as seen:
        copy_kernel[1,](x, 1, y, 4, BLOCK=8)
        copy_kernel[1,](y, 1, z, read, BLOCK=8)
    assert seen.early() == early


ONES = torch.ones(64)


@pytest.mark.parametrize(("x", "y", "n", "told"), [
    (ONES[:16], ONES[32:], 32, "program (1, 0, 0): reads 4 bytes of no argument, nearest is x [16], 4 bytes away"),
    (ONES[:16:2], ONES[32:], 8, "program (0, 0, 0): reads 4 bytes of no argument, nearest is x [8], 0 bytes away"),
    (ONES[:16], ONES[32:36], 16, "program (0, 0, 0): writes 4 bytes of no argument, nearest is y [4], 4 bytes away"),
], ids=["past the end", "between slices", "a wild store"])  # fmt: skip
def test_an_access_outside_all_arguments_is_an_error(x, y, n, told):
    with counting(), pytest.raises(InterpreterError) as error:
        copy_kernel[2,](x, 1, y, n, BLOCK=16)
    assert f"copy_kernel, {told}" in str(error.value)


def test_nothing_stays_patched_even_after_an_error():
    def patched():
        return InterpreterBuilder.create_masked_load, InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__

    before = patched()
    with pytest.raises(RuntimeError), counting():
        assert not {*before} & {*patched()}
        raise RuntimeError
    assert patched() == before
