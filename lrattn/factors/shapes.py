"""The alphabet of shapes, and the check that speaks it.

B     sequences in the batch            ck, cv    key / value latents in the cache
S     query tokens of a sequence        uk, uv    bases [Hkv, R, D]: latent -> head
T     cached tokens of a sequence       q         query [B, S, Hq, D], already rotated
Hq    query heads                       wo        output projection [Hq, D, E]
Hkv   key / value heads                 lse       log-sum-exp of the scores [B, S, Hq]
M     query heads per kv head
D     head dimension                    keep      bytes of the latent cache divided by
E     hidden size                                 bytes of the dense 16-bit cache,
G     groups (clusters) of kv heads               scales included
C     kv heads per group
R     rank of a group (Rk, Rv)
P     tokens per page
N     pages of a cache
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
RANK_STEP = 16  # ranks are multiples of this: one tensor-core step, one 32-byte sector of 16-bit latents
CHUNK_STEP = 64  # chunks are multiples of this: a tile of tokens lies in one
MAX_SPLITS = 1024  # parts of a sequence's tokens that are attended to apart


def cdiv(n: int, step: int) -> int:
    return -(-n // step)


def round_up(n: int, step: int) -> int:
    return cdiv(n, step) * step


def check(
    name: str,
    x: Tensor,
    spec: str,
    dims: dict[str, int],
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    contiguous: bool = False,
    writable: bool = False,
) -> None:
    """Holds a tensor against a spec such as "B S Hq D"; letters met first are bound in `dims`.

    Args:
        name: what the caller calls the tensor; errors begin with it.
        spec: one glossary letter or one number per axis.
        dims: sizes known so far; new letters are added.
        dtype, device: required when given. contiguous: the last axis must have stride 1. writable: no two elements
            may share memory, as in an expanded tensor; axes may be in any order, but not interlock.

    Raises: ValueError naming the tensor, what was expected and what came. Reads metadata only.
    """
    check_tensors(**{name: x})
    letters = spec.split()
    sizes = [int(s) if s.isdigit() else dims.get(s) for s in letters]
    shape = tuple(x.shape)
    fits = len(shape) == len(sizes) and all(w is None or w == n for w, n in zip(sizes, shape, strict=True))
    if not fits:
        known = ", ".join(s if w is None or s.isdigit() else f"{s}={w}" for s, w in zip(letters, sizes, strict=True))
        raise ValueError(f"{name}: expected shape [{known}], got {list(shape)}")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if x.dtype not in allowed:
            raise ValueError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")
    if contiguous and x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last axis, got strides {x.stride()}")
    if writable and not own_memory(x):
        raise ValueError(f"{name}: expected memory of its own for every element, got strides {x.stride()}")
    dims.update({s: n for s, n in zip(letters, shape, strict=True) if not s.isdigit()})


def check_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_tokens(**counts: object) -> None:
    """Raises ValueError for what does not count tokens."""
    for name, n in counts.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ValueError(f"{name}: expected a number of tokens, 0 or more, got {n!r}")


def own_memory(x: Tensor) -> bool:
    """Whether each step along an axis leaves behind all that the axes of smaller steps reach."""
    if not x.numel():
        return True
    axes = [(i, step, n) for i, (step, n) in enumerate(zip(x.stride(), x.shape, strict=True)) if n > 1]
    return all(step > sum(s * (n - 1) for j, s, n in axes if j != i and s <= step) for i, step, _ in axes)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply matrices in: x's own; float32 for float16 on a CPU, where PyTorch is 80 times slower."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def pad_rank(x: Tensor, axis: int, rank: int) -> Tensor:
    """Zeros appended along an axis up to `rank`: ranks are multiples of 16, matrices need not be."""
    missing = rank - x.shape[axis]
    return x if missing <= 0 else torch.cat((x, x.new_zeros(*x.shape[:axis], missing, *x.shape[axis + 1 :])), axis)
