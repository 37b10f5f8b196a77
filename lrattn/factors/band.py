"""Bands: within a block of tokens, the turns of all slow pairs as few functions of a token's place in it.

Token t = b + d is the d-th of the block that begins at b. Pair j of its key k is turned by e^(i t f_j), and x is the
query turned back by b, so that with pairs as complex numbers

    q . Rot(t) k = x . Rot(d) k = sum_j Re( conj(x_j) k_j e^(i d f_j) ).

The fast pairs, of the first dims in pair order, are rebuilt and turned exactly. Over a block the others turn so slowly
that a few functions phi_p make all of them:

    e^(i d f_j) = sum_p phi[d, p] (a[p, j] + i b[p, j]) + an error of at most `error`

    slow score  = sum_p phi[d, p] (w_p . k),   w_p = (a[p] - i b[p]) x,   of dims (low, high) of a pair:
                  low  = a[p, j] x_low  + b[p, j] x_high
                  high = a[p, j] x_high - b[p, j] x_low.

No w_p knows of d: it meets the latents of keys as an absorbed query does, once a block.

The bound, in exact arithmetic, with the attention factor of yarn and longrope (else 1):

    |score - its own| <= error * scale * attention factor * sum over slow pairs |q_j| |k_j|,

since the error of a turn e^(i d f_j) is multiplied by |x_j| |k_j| and |x_j| = factor |q_j|. It is reached where a pair
alone has a norm, at its worst place, in the phase of its error. Functions are the leading left singular vectors of the
turns: no others leave less in the mean square, and it does not matter where d counts from. Source: our derivation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lrattn.factors.shapes import cdiv

BLOCK = 256  # tokens
TERMS = (4, 8, 16)
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 2e-4, torch.float32: 1e-7}  # of the largest error of a turn
STEP = 16  # fast dims are a multiple of this


class Band(NamedTuple):
    """A band of a rope and a head dimension D, for layers of a dtype.

    Of layers of 16 bits the functions are numbers of float16. That rounding, 2^-12 of a number, and of float32 2^-25,
    is in `error` and not in `truncation`, which the tolerance is of: by itself it is 2e-4 to 5e-4 in 16 bits, beyond
    the tolerance of float16, and up to 1e-7 in float32, at its edge. More terms do not lessen it, and what functions
    are multiplied with is rounded as much.
    """

    fast: int  # F: of dims in pair order, so many first ones are rebuilt
    terms: int  # T
    block: int  # tokens
    truncation: float  # the largest error of a slow pair's turn, by so many functions in exact arithmetic
    error: float  # the same by functions and coefficients as they are below
    functions: Tensor  # [block, T] float32: phi, no larger than 1
    coefficients: Tensor  # [2, T, D / 2] float32: a and b, by pair; 0 for the fast ones


@lru_cache(maxsize=64)
def find(frequencies: tuple[float, ...], head_dim: int, dtype: torch.dtype) -> Band | str:
    """The band of pairs of these frequencies, or why there is none. Layers of equal ropes share one.

    F is 3/8 of the rotary dims, rounded up; T the first of TERMS that leaves no more than the dtype's tolerance.

    Args:
        frequencies: angles per token, of the rotated pairs, as they are scaled. They need not fall. Pairs beyond
            them are not turned: they are slow, of frequency 0.
        head_dim: D, even.
        dtype: of the layer.
    """
    fast = STEP * cdiv(3 * 2 * len(frequencies), 8 * STEP)
    if dtype not in TOLERANCE:
        return f"{str(dtype).removeprefix('torch.')} has no tolerance"
    if fast >= head_dim:
        return f"all {head_dim} dims are among the {fast} that are rebuilt"
    with torch.inference_mode(False), torch.device("cpu"):  # it outlives the caller's modes
        slow = torch.tensor(frequencies[fast // 2 :], dtype=torch.float64)
        angles = torch.zeros(BLOCK, head_dim // 2, dtype=torch.float64)
        angles[:, fast // 2 : len(frequencies)] = torch.arange(BLOCK)[:, None] * slow
        turns = torch.stack((angles.cos(), angles.sin()), 1)  # [block, 2, D / 2]
        turns[..., : fast // 2] = 0
        vectors = torch.linalg.svd(turns.flatten(1), full_matrices=False).U
        for terms in TERMS:
            basis = vectors[:, :terms]
            peaks = basis.abs().amax(0)
            functions, coefficients = basis / peaks, torch.einsum("dp,dcj->cpj", basis * peaks, turns)
            truncation = _error(functions, coefficients, turns)
            if truncation <= TOLERANCE[dtype]:
                functions = functions.to(torch.float32 if dtype == torch.float32 else torch.float16)
                held = functions.float().contiguous(), coefficients.float().contiguous()
                return Band(fast, terms, BLOCK, truncation, _error(*held, turns), *held)
    return f"{terms} terms leave {truncation:.0e} of the slow pairs' turns, {TOLERANCE[dtype]:.0e} wanted"


def _error(functions: Tensor, coefficients: Tensor, turns: Tensor) -> float:
    """The largest error of a turn, that of its cos and of its sin together."""
    made = torch.einsum("dp,cpj->dcj", functions.double(), coefficients.double())
    return float((made - turns).norm(dim=1).amax())
