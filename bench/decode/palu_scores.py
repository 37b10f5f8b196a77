"""The scores of Palu's published kernel, by its description: arXiv 2407.21118 and the limits of its released code.

ReCalKV ships the same kernel. It scores one query of one sequence against rebuilt keys and stops there: softmax and
values are left to PyTorch. Written anew with its limits kept, so that we can be compared inside them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

HEADS, HEAD_DIM, THETA = 32, 128, 1e4
BLOCK_R = 32  # latents of a step


class Launch(NamedTuple):
    """How many tokens a program scores, and how."""

    block_t: int = 64
    warps: int = 4
    stages: int = 1


PUBLISHED = Launch()  # the one configuration its tuner is left with
FOR_FOURS = Launch(128, 4, 3)  # what its comments name for groups of four heads


class Unfit(ValueError):
    """Outside the published kernel's limits."""


# fmt: off
@triton.jit
def palu_scores_kernel(
    q,                       # [32, 128]        query, rotated
    ck,                      # [G, T, R]        key latents, contiguous
    uk,                      # [32, R, 128]     key basis of each query head
    s,                       # [32, T]          out, dtype of q
    T,
    R: tl.constexpr, GROUP: tl.constexpr, FREQUENCY: tl.constexpr, FAST: tl.constexpr,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """s[h, t] = q[h] . Rot(t) (ck[h // GROUP, t] @ uk[h])

    Grid: (32, T / BLOCK_T). A program owns one query head and BLOCK_T tokens: each latent is read GROUP times. The two
    halves of the head are rebuilt apart, rounded, and turned by sin and cos computed here from the position.
    Needs: T a multiple of BLOCK_T, R of BLOCK_R; nothing is masked.
    """
    h = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    r, j = tl.arange(0, BLOCK_R), tl.arange(0, HALF)
    p_ck = ck + (h // GROUP) * T * R + t[:, None] * R + r[None, :]
    p_uk = uk + h * R * 2 * HALF + r[:, None] * 2 * HALF + j[None, :]
    first = tl.zeros([BLOCK_T, HALF], tl.float32)
    second = tl.zeros([BLOCK_T, HALF], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        z = tl.load(p_ck + r0)
        first = tl.dot(z, tl.load(p_uk + r0 * 2 * HALF), first)
        second = tl.dot(z, tl.load(p_uk + r0 * 2 * HALF + HALF), second)
    kind: tl.constexpr = q.dtype.element_ty
    first, second = first.to(kind), second.to(kind)
    angle = t.to(tl.float32)[:, None] * tl.exp2(j.to(tl.float32) * FREQUENCY)[None, :]
    if FAST:
        cos, sin = libdevice.fast_cosf(angle).to(kind), libdevice.fast_sinf(angle).to(kind)
    else:
        cos, sin = tl.cos(angle).to(kind), tl.sin(angle).to(kind)
    q_first, q_second = tl.load(q + h * 2 * HALF + j)[None, :], tl.load(q + h * 2 * HALF + HALF + j)[None, :]
    products = (first * cos - second * sin) * q_first + (second * cos + first * sin) * q_second
    tl.store(s + h * T + t, tl.sum(products.to(tl.float32), 1).to(kind))
# fmt: on


def palu_scores(q: Tensor, ck: Tensor, uk: Tensor, launch: Launch = PUBLISHED) -> Tensor:
    """Scores of one query, not scaled: q [32, 128] rotated, ck [G, T, R], uk [32, R, 128] -> [32, T] in q's dtype.

    Raises: Unfit for anything the published kernel would compute wrongly.
    """
    groups, tokens, rank = ck.shape
    require(q.shape == (HEADS, HEAD_DIM), f"{HEADS} query heads of {HEAD_DIM} dimensions, one sequence")
    require(uk.shape == (HEADS, rank, HEAD_DIM), "one basis for each query head")
    require(HEADS % groups == 0, f"a number of groups that divides {HEADS}")
    require(tokens % launch.block_t == 0, f"a multiple of {launch.block_t} tokens")
    require(rank % BLOCK_R == 0, f"ranks that are multiples of {BLOCK_R}")
    require(all(x.is_contiguous() and x.dtype == q.dtype for x in (q, ck, uk)), "contiguous tensors of one dtype")
    require(ck.numel() < 1 << 31, "fewer than 2^31 latents")
    s = q.new_empty(HEADS, tokens)
    palu_scores_kernel[HEADS, tokens // launch.block_t](
        q, ck, uk, s, tokens,
        R=rank, GROUP=HEADS // groups, FREQUENCY=-math.log2(THETA) / (HEAD_DIM // 2),
        FAST=not triton.knobs.runtime.interpret, HALF=HEAD_DIM // 2, BLOCK_T=launch.block_t, BLOCK_R=BLOCK_R,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return s


def require(fits: bool, what: str) -> None:
    if not fits:
        raise Unfit(f"the published kernel takes {what}")
