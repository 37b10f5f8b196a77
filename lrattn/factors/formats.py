"""Packed latents: the bits of each, and the bytes of a row.

A format gives the latents of a group, in their order, to segments of one width each: 16, 8, 4 or 2 bits. A segment of r
latents at b bits is n = r b / 16 halfwords, little-endian, in planes:

    bits b i .. b (i + 1) of halfword h are latent i n + h,   i in 0 .. 16 / b,   h in 0 .. n

so that what one `and` takes of a row's halfwords are neighbouring latents. One token's latents of one group are a run:
its segments, each with zeros up to a multiple of 16 bytes. Apart from the runs are words of scales, four bytes each: a
byte for each of up to three segments below 16 bits, then zeros.

    latent = (code - (2^b - 1) / 2) * scale,   code in 0 .. 2^b - 1

A scale is 2^-8 times the float16 that has its byte at the top, under the sign: five bits of exponent and three of
fraction, 2^-22 to 240, exact in every dtype. Each token has scales of its own. The quantiser is uniform and symmetric,
with no code for zero. At 8 and 4 bits a segment's scale is the least that cuts nothing: cut outliers cost more than
anything else there. At 2 bits it is the one next to the root mean square of its latents, the best step for a Gaussian
(docs/decisions.md). Latents that are not finite come back as NaN, all of the segment: byte 255. Segments of 16 bits are
numbers in float16, and have no scale.

Where runs and words lie in a cache: lrattn/attention/cache.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lrattn.factors.shapes import RANK_STEP, accumulator, cdiv, round_up

LAYOUT = 2  # of rows: what is said above; a cache written by another one is not read
WIDTHS = (16, 8, 4, 2)  # bits
BROKEN = 255  # the scale of a segment that is not finite
SMALLEST, LARGEST = 8, 247  # bytes of scale: normal float16 numbers
FRACTION = 20  # bits of a float32 below those that a scale has
LEAST = (127 - 23) << 23  # what byte 0 would be as a float32's bits
SCALE_UNIT = 2.0**-8  # of a scale's float16
MEAN_BITS = 2  # up to so many bits the scale is the root mean square
# Mean squared error over the variance of Gaussian latents, 64 to a segment; 0 bits are a latent left out.
ERRORS = {0: 1.0, 2: 0.12, 4: 0.01, 8: 4e-5, 16: 4e-8}
ALIGNMENT = 16  # bytes: a run is loaded 16 at a time
WORD = 4  # bytes of scales
SCALES = 3  # in a word
STEPS = {bits: max(8 * ALIGNMENT // bits, RANK_STEP) for bits in WIDTHS}  # latents that fill those bytes


@dataclass(frozen=True)
class Format:
    """Bits of the latents of one group.

    Args:
        segments: (rank, bits) of each, in the order of the latents; ranks are multiples of 16, bits 16, 8, 4 or 2.
        layout: of rows, LAYOUT.

    Raises: ValueError for anything else.
    """

    segments: tuple[tuple[int, int], ...]
    layout: int = LAYOUT

    def __post_init__(self) -> None:
        if self.layout != LAYOUT:
            raise ValueError(f"layout: expected {LAYOUT}, the one that rows are written in, got {self.layout!r}")
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
    def run(self) -> int:
        """Bytes of a token's codes, padding included."""
        return sum(_padded(rank, bits) for rank, bits in self.segments)

    @property
    def scales(self) -> int:
        """Segments that have one."""
        return sum(bits < 16 for _, bits in self.segments)

    @property
    def words(self) -> int:
        """Bytes of its words of scales."""
        return words_of(self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of a token: codes, scales and padding."""
        return self.run + self.words

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [.., rank] -> runs [.., run] and words [.., words], uint8."""
        runs, words = (z.new_zeros(*z.shape[:-1], n, dtype=torch.uint8) for n in (self.run, self.words))
        for bits, latents, codes, scale_at in self._places():
            part = z[..., latents]
            if bits == 16:
                runs[..., codes] = part.to(torch.float16).contiguous().view(torch.uint8)
            else:
                wide = part.to(accumulator(z.dtype))
                scale = scale_bytes(wide, bits)
                runs[..., codes] = _joined(_codes(wide, scale_of(scale, wide.dtype), bits), bits)
                words[..., scale_at] = scale[..., 0]
        return runs, words

    def decode(self, runs: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
        """Runs [.., run] and words [.., words] -> latents [.., rank], exact, in the dtype of sums of `dtype`."""
        acc, parts = accumulator(dtype), []
        for bits, _, place, scale_at in self._places():
            held = runs[..., place]
            if bits == 16:
                parts.append(held.view(torch.float16).to(acc))
            else:
                shifts = torch.arange(0, 16, bits, device=runs.device, dtype=torch.int16)[:, None]
                codes = (held.view(torch.int16)[..., None, :] >> shifts) & (2**bits - 1)
                scale = scale_of(words[..., scale_at, None], acc)
                parts.append((codes.flatten(-2).to(acc) - (2**bits - 1) / 2) * scale)
        return torch.cat(parts, -1)

    def _places(self) -> Iterator[tuple[int, slice, slice, int]]:
        """Of each segment: its bits, its latents, the bytes of its codes in a run and the one of its scale in words."""
        latent, at, scale = 0, 0, 0
        for rank, bits in self.segments:
            yield bits, slice(latent, latent + rank), slice(at, at + rank * bits // 8), scale_place(scale)
            latent, at, scale = latent + rank, at + _padded(rank, bits), scale + (bits < 16)


def words_of(scales: int) -> int:
    """Bytes of the words that hold so many scales of a group."""
    return WORD * cdiv(scales, SCALES)


def scale_place(n: int) -> int:
    """Byte of the n-th scale among a group's words."""
    return n // SCALES * WORD + n % SCALES


def table(formats: tuple[Format, ...]) -> list[list[int]]:
    """Where each group's segments lie in a row's runs: its first byte, its latents and the first of them; the three of
    one segment after those of another."""
    rows, begin = [], 0
    for own in formats:
        places = ((begin + codes.start, r.stop - r.start, r.start) for _, r, codes, _ in own._places())
        rows.append(list(chain(*places)))
        begin += own.run
    return rows


def widest(formats: tuple[Format, ...]) -> tuple[int, ...]:
    """Bits of each segment and the most latents that it has in a group: bits, latents, bits, latents, .."""
    segments = zip(*(f.segments for f in formats), strict=True)
    return tuple(n for parts in segments for n in (parts[0][1], max(rank for rank, _ in parts)))


def uniform(rank: int, bits: int) -> Format:
    """All latents of a group at one width."""
    return Format(((rank, bits),))


def scale_of(held: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales that bytes stand for; NaN for BROKEN."""
    return (held.to(torch.int16) << 7).view(torch.float16).to(dtype) * SCALE_UNIT


def scale_bytes(z: Tensor, bits: int) -> Tensor:
    """Of a segment's latents z [.., r]: [.., 1] uint8; BROKEN where they are not finite."""
    if bits <= MEAN_BITS:
        size, up = z.square().mean(-1, keepdim=True).sqrt(), 1 << (FRACTION - 1)
    else:
        size, up = z.abs().amax(-1, keepdim=True) / 2 ** (bits - 1), (1 << FRACTION) - 1
    held = (size.float().contiguous().view(torch.int32) + up - LEAST) >> FRACTION
    return held.clamp(SMALLEST, LARGEST).where(z.isfinite().all(-1, keepdim=True), BROKEN).to(torch.uint8)


def _codes(z: Tensor, scale: Tensor, bits: int) -> Tensor:
    """0 .. 2^bits - 1, as floating-point numbers."""
    middle = 2 ** (bits - 1)
    return ((z / scale).floor() + middle).nan_to_num(middle).clamp(0, 2 * middle - 1)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Codes [.., r] -> bytes [.., r bits / 8]."""
    planes = codes.to(torch.int32).unflatten(-1, (16 // bits, -1))
    halfwords = sum((planes[..., i, :] << (i * bits) for i in range(1, 16 // bits)), planes[..., 0, :])
    return halfwords.to(torch.int16).view(torch.uint8)


def _padded(rank: int, bits: int) -> int:
    """Bytes of a segment in a run."""
    return round_up(rank * bits // 8, ALIGNMENT)


def _counts(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
