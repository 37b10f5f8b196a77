"""No worse than PyTorch: the tolerance of every result in a 16-bit or 32-bit dtype."""

import torch


def assert_no_worse(got, plain, exact, dtype=None, slack=0.0):
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus 2 eps of the largest.

    dtype: of the products behind it, where that is not the result's own (lse). slack: what rounding may move the result
    by; given where results are so few that PyTorch's own error may be small by luck.
    """
    assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape
    assert got.isfinite().all(), "not finite"
    if not exact.numel():
        return
    slack += 2 * torch.finfo(dtype or got.dtype).eps * exact.abs().max().item()
    error, allowed = (got.double() - exact).abs().max().item(), 2 * (plain.double() - exact).abs().max().item() + slack
    assert error <= allowed, f"error {error:.2e}, PyTorch's own allows {allowed:.2e}"
