"""Packed latents: the bits of each, and the bytes of a row.

A format gives the latents of a group, in their order, to segments of one width each: 16, 8, 4 or 2 bits. One token's
latents of one group are then a run of bytes,

    | segment | segment | .. | a byte of scale for each segment below 16 bits | zeros up to a multiple of 4 |

and a segment of r latents at b bits is r b / 8 bytes: each holds the next 8 / b latents, the first in its lowest bits.

    latent = (code - (2^b - 1) / 2) * scale,   code in 0 .. 2^b - 1,   scale = (1 + f / 8) 2^(e - 16),   byte = 8 e + f

A byte of scale is a small float, exact in every dtype. The quantiser is uniform and symmetric, with no code for zero.
Each token has scales of its own. At 8 and 4 bits a segment's scale is the least that cuts nothing: cut outliers cost
more than anything else there. At 2 bits it is the one next to the root mean square of its latents, the best step for a
Gaussian (docs/decisions.md). Latents that are not finite come back as NaN, all of the segment: byte 255. Segments of 16
bits are numbers of the layer's dtype (float16 in wider layers), and have no scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lrattn.factors.shapes import RANK_STEP, accumulator, round_up

WIDTHS = (16, 8, 4, 2)  # bits
BROKEN = 255  # the scale of a segment that is not finite
FRACTION = 20  # bits of a float32 below those that a scale has
LEAST = (127 - 16) << 23  # the smallest scale, 2^-16, as a float32's bits
MEAN_BITS = 2  # up to so many bits the scale is the root mean square
# Mean squared error over the variance of Gaussian latents, 64 to a segment; 0 bits are a latent left out.
ERRORS = {0: 1.0, 2: 0.12, 4: 0.01, 8: 4e-5, 16: 4e-8}
ALIGNMENT = 4  # bytes: a run is loaded in words of 32 bits


@dataclass(frozen=True)
class Format:
    """Bits of the latents of one group.

    Args:
        segments: (rank, bits) of each, in the order of the latents; ranks are multiples of 16, bits 16, 8, 4 or 2.

    Raises: ValueError for anything else.
    """

    segments: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        try:
            segments = tuple((rank, bits) for rank, bits in self.segments)
        except (TypeError, ValueError):
            raise ValueError(f"segments: expected (rank, bits) of each, got {self.segments!r}") from None
        object.__setattr__(self, "segments", segments)
        if not segments:
            raise ValueError("segments: expected one or more of (rank, bits), got none")
        for rank, bits in segments:
            if not _counts(rank) or rank < RANK_STEP or rank % RANK_STEP:
                raise ValueError(f"segments: expected ranks that are positive multiples of {RANK_STEP}, got {rank!r}")
            if not _counts(bits) or bits not in WIDTHS:
                raise ValueError(f"segments: expected bits out of {WIDTHS}, got {bits!r}")

    @property
    def rank(self) -> int:
        """Latents of a token."""
        return sum(rank for rank, _ in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of a token's run, scales and padding included."""
        return self.scales + round_up(sum(bits < 16 for _, bits in self.segments), ALIGNMENT)

    @property
    def scales(self) -> int:
        """Where the bytes of scale begin in a run: behind the codes."""
        return sum(rank * bits // 8 for rank, bits in self.segments)

    def encode(self, z: Tensor) -> Tensor:
        """Latents [.., rank] -> runs [.., nbytes] uint8."""
        runs = z.new_zeros(*z.shape[:-1], self.nbytes, dtype=torch.uint8)
        for bits, latents, codes, scale_at in self._places():
            part = z[..., latents]
            if bits == 16:
                runs[..., codes] = part.to(half(z.dtype)).contiguous().view(torch.uint8)
            else:
                wide = part.to(accumulator(z.dtype))
                scale = scale_bytes(wide, bits)
                runs[..., codes] = _joined(_codes(wide, scale_of(scale, wide.dtype), bits), bits)
                runs[..., scale_at] = scale[..., 0]
        return runs

    def decode(self, runs: Tensor, dtype: torch.dtype) -> Tensor:
        """Runs [.., nbytes] of a layer of `dtype` -> latents [.., rank], exact, in the dtype of its sums."""
        acc, parts = accumulator(dtype), []
        for bits, _, place, scale_at in self._places():
            held = runs[..., place]
            if bits == 16:
                parts.append(held.contiguous().view(half(dtype)).to(acc))
            else:
                shifts = torch.arange(0, 8, bits, device=runs.device, dtype=torch.uint8)
                codes = (held[..., None] >> shifts) & (2**bits - 1)
                scale = scale_of(runs[..., scale_at, None], acc)
                parts.append((codes.flatten(-2).to(acc) - (2**bits - 1) / 2) * scale)
        return torch.cat(parts, -1)

    def _places(self) -> Iterator[tuple[int, slice, slice, int]]:
        """Of each segment: its bits, its latents, the bytes of its codes and the one of its scale."""
        latent, at, scale_at = 0, 0, self.scales
        for rank, bits in self.segments:
            end = at + rank * bits // 8
            yield bits, slice(latent, latent + rank), slice(at, end), scale_at
            latent, at, scale_at = latent + rank, end, scale_at + (bits < 16)


def table(formats: tuple[Format, ...]) -> list[list[int]]:
    """Where each group's segments lie in a row: its first byte, its latents, the first of them and its byte of scale;
    the four of one segment after those of another."""
    rows, begin = [], 0
    for own in formats:
        places = ((begin + codes.start, r.stop - r.start, r.start, begin + at) for _, r, codes, at in own._places())
        rows.append(list(chain(*places)))
        begin += own.nbytes
    return rows


def widest(formats: tuple[Format, ...]) -> tuple[int, ...]:
    """Bits of each segment and the most latents that it has in a group: bits, latents, bits, latents, .."""
    segments = zip(*(f.segments for f in formats), strict=True)
    return tuple(n for parts in segments for n in (parts[0][1], max(rank for rank, _ in parts)))


def uniform(rank: int, bits: int) -> Format:
    """All latents of a group at one width."""
    return Format(((rank, bits),))


def half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit numbers in packed rows of a layer."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16


def scale_of(held: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales that bytes stand for; NaN for BROKEN."""
    bits = (held.int() << FRACTION) + LEAST
    return bits.view(torch.float32).to(dtype).masked_fill(held == BROKEN, torch.nan)


def scale_bytes(z: Tensor, bits: int) -> Tensor:
    """Of a segment's latents z [.., r]: [.., 1] uint8; BROKEN where they are not finite."""
    if bits <= MEAN_BITS:
        size, up = z.square().mean(-1, keepdim=True).sqrt(), 1 << (FRACTION - 1)
    else:
        size, up = z.abs().amax(-1, keepdim=True) / 2 ** (bits - 1), (1 << FRACTION) - 1
    held = (size.float().contiguous().view(torch.int32) + up - LEAST) >> FRACTION
    return held.clamp(0, BROKEN - 1).where(z.isfinite().all(-1, keepdim=True), BROKEN).to(torch.uint8)


def _codes(z: Tensor, scale: Tensor, bits: int) -> Tensor:
    """0 .. 2^bits - 1, as floating-point numbers."""
    middle = 2 ** (bits - 1)
    return ((z / scale).floor() + middle).nan_to_num(middle).clamp(0, 2 * middle - 1)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Codes [.., r] -> bytes [.., r bits / 8]."""
    parts = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    return sum((parts[..., i] << (i * bits) for i in range(1, 8 // bits)), parts[..., 0])


def _counts(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
