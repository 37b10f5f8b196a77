"""The best low-rank map in a metric on the outputs: what every closed form here comes down to."""

from __future__ import annotations

import torch
from torch import Tensor

INPUT_DAMPING = 1e-6  # of the mean diagonal of the moment
METRIC_DAMPING = 1e-3  # of the mean diagonal of the metric


def low_rank(
    weight: Tensor,
    moment: Tensor | None,
    metric: Tensor | None = None,
    *,
    deficient: bool = False,
    damping: float = METRIC_DAMPING,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of every rank that minimise tr(G dW C dW^T), dW = W - up^T down^T.

    With A = G^1/2 W and A C A^T = Q L Q^T the best map of rank r is G^-1/2 Q_r Q_r^T A (Eckart-Young), which loses the
    eigenvalues cut. One eigenproblem of n outputs gives all ranks, and the latents come out sorted and uncorrelated.
    Where W has not the rank of its outputs, Q are the left singular vectors of A C^1/2: there small values are still
    told from zeros, and full rank is exact. C is damped by a millionth of its mean diagonal, so that directions the
    calibration never saw are ranked by the weights alone; G by a thousandth, since it is inverted. Rows of `up` have
    length 1, which gives latents the size of the outputs: within the range of 16-bit numbers.

    Args:
        weight: W, [n, E] float64. moment: C, [E, E]; None is the identity. metric: G, [n, n]; None is the identity.
        deficient: W may have a smaller rank than n; so it has with n > E.
        damping: of G, as a share of its mean diagonal.

    Returns: energies [m], descending; up [m, n]; down [E, m]; m = min(n, E).
    """
    root, inverse = (None, None) if metric is None else roots(metric, damping)
    a = weight if root is None else root @ weight
    n, inputs = a.shape
    if deficient or n > inputs:
        q, singular, _ = torch.linalg.svd(a if moment is None else a @ factor(moment), full_matrices=False)
        energies = singular.square()
    else:
        energies, q = torch.linalg.eigh(a @ a.T if moment is None else a @ damped(moment) @ a.T)
        energies, q = energies.flip(0).clamp_min(0), q.flip(1)
    up, down = (q if inverse is None else inverse @ q).T, a.T @ q
    size = up.norm(dim=1).clamp_min(torch.finfo(up.dtype).tiny)
    return energies, up / size[:, None], down * size


def deviations(down: Tensor, moment: Tensor) -> Tensor:
    """Root mean squares of the latents x @ down, [m]: down [inputs, m], moment [inputs, inputs], damped: a latent that
    the text never saw keeps within a thousand times what it is. 1 for a latent that is always zero."""
    size = (down * (damped(moment) @ down)).sum(0).clamp_min(0).sqrt()
    return torch.where(size > 0, size, 1.0)


def damped(moment: Tensor, by: float = INPUT_DAMPING) -> Tensor:
    """A second moment [E, E] with `by` times its mean diagonal added to the diagonal."""
    return moment + by * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def factor(moment: Tensor) -> Tensor:
    """L with L L^T the damped second moment [E, E]."""
    return torch.linalg.cholesky(damped(moment))


def roots(metric: Tensor, damping: float = METRIC_DAMPING) -> tuple[Tensor, Tensor]:
    """G^1/2 and G^-1/2 of a metric [n, n], damped."""
    values, q = torch.linalg.eigh(damped(metric, damping))
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    return (q * values.sqrt()) @ q.T, (q / values.sqrt()) @ q.T
