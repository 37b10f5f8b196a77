"""No worse than PyTorch: the tolerance of every result in a 16-bit or 32-bit dtype."""

import torch


def assert_no_worse(got, plain, exact):
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus 2 eps of the largest."""
    assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape
    assert got.isfinite().all()
    slack = 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    error, allowed = (got.double() - exact).abs().max().item(), 2 * (plain.double() - exact).abs().max().item() + slack
    assert error <= allowed, f"error {error:.2e}, PyTorch's own allows {allowed:.2e}"
