"""The first question to a GPU: do its tensor cores take codes as subnormal float16 numbers, exactly and at full rate?

    python -m bench.decode.subnormals --out FOLDER [--dry]

Packed rows are attended to by products of their planes (lrattn/kernels/planes.py), whose numbers are subnormal. Every
halfword there is goes through such products, as attend_packed makes them, a stack with an entry for each warp, and as
plain ones; sums are of integers times a power of two, exact in float32, and compared with float64 bit by bit. Then
products alone are timed, of codes as subnormal and as normal numbers. subnormals.json; the exit status is 1 if a sum is
wrong. --dry does the same in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.decode import timing
from bench.support import report
from lrattn.kernels import launch
from lrattn.kernels.planes import planes, unit

WARPS, ROWS, TOKENS, SIZE = 4, 16, 32, 64  # of a stack of products, halfwords of a token
LARGEST = 255  # of what planes are multiplied by: sums are integers below 2^24
SUBNORMAL = 2.0**-24  # the smallest float16
REPEATS, UNROLLED, WAVES = 256, 16, 2  # of a product in a program, in its loop, of programs
SLOW = 1.1  # times the normal numbers' time
SECONDS, TOLERANCE = 1.0, 1e-2  # of timing, of what is timed
TO_DO = "give the rows of ATTEND_PACKED and PACKED_VALUES in lrattn/kernels/launch.py magic=True"


class Way(NamedTuple):
    """How products are made. stacked: as in attend_packed; magic: of normal numbers; asm: planes by assembly."""

    bits: int
    stacked: bool
    magic: bool
    asm: bool

    def __str__(self) -> str:
        numbers, made = "normal" if self.magic else "subnormal", "by assembly" if self.asm else "in plain terms"
        return f"{self.bits} bits, {'stacked' if self.stacked else 'plain'} products of {numbers} numbers {made}"


@triton.jit
def products_kernel(
    a, p, halfwords, s, y,
    BITS: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr,
    W: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """s[i, m, w] = a[w] @ z[m, w]^T,  y[i, m, w] = p[w] @ z[m, w],  z[m] = plane m of halfwords[i] [W, T, N]

    a: [W, R, N], p: [W, R, T], float16; s: [.., W, R, T], y: [.., W, R, N], float32. One of W is no stack.
    Grid: (problems,).
    """
    i = tl.program_id(0)
    w, r = tl.arange(0, W)[:, None, None], tl.arange(0, R)[None, :, None]
    t, n = tl.arange(0, T)[None, None, :], tl.arange(0, N)[None, None, :]
    row, token = w * R + r, (i * W + w) * T + tl.arange(0, T)[None, :, None]
    x, ps = tl.load(a + row * N + n), tl.load(p + row * T + t)
    z = planes(tl.load(halfwords + token * N + n), BITS, MAGIC, ASM)
    for m in tl.static_range(16 // BITS):
        at = (i * (16 // BITS) + m) * W * R + row
        if W == 1:
            plane = tl.reshape(z[m], [T, N])
            score = tl.reshape(tl.dot(tl.reshape(x, [R, N]), tl.trans(plane)), [1, R, T])
            value = tl.reshape(tl.dot(tl.reshape(ps, [R, T]), plane), [1, R, N])
        else:
            score, value = tl.dot(x, tl.permute(z[m], (0, 2, 1))), tl.dot(ps, z[m])
        tl.store(s + at * T + t, score)
        tl.store(y + at * N + n, value)


@triton.jit
def rate_kernel(
    x, z, out, repeats,
    UNROLLED: tl.constexpr, W: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[i] = UNROLLED * repeats * x @ z, by products and nothing else: x [W, R, T], z [W, T, N], out [.., W, R, N].

    Operands are read from shared memory once for so many products. Grid: (programs,).
    """
    w, r, n = tl.arange(0, W)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, N)[None, None, :]
    left = tl.load(x + (w * R + r) * T + tl.arange(0, T)[None, None, :])
    right = tl.load(z + (w * T + tl.arange(0, T)[None, :, None]) * N + n)
    acc = tl.zeros([W, R, N], tl.float32)
    for _ in range(repeats):
        for _ in tl.static_range(UNROLLED):
            acc = tl.dot(left, right, acc)
    tl.store(out + ((tl.program_id(0) * W + w) * R + r) * N + n, acc)


def exact(way: Way, device: torch.device) -> str:
    """What is wrong with the products; "" if nothing is. Every second row of what planes meet is subnormal, too."""
    warps, rows, tokens = (WARPS, ROWS, TOKENS) if way.stacked else (1, WARPS * ROWS, WARPS * TOKENS)
    g, count = torch.Generator().manual_seed(0), 16 // way.bits
    halfwords = (torch.randperm(1 << 16, generator=g) - (1 << 15)).view(-1, warps, tokens, SIZE)
    a, p = (torch.randint(-LARGEST, LARGEST + 1, (warps, rows, n), generator=g).half() for n in (SIZE, tokens))
    if not way.magic:
        for x in (a, p):
            x[:, 1::2] *= SUBNORMAL
    codes = torch.stack([(halfwords >> way.bits * m) & (1 << way.bits) - 1 for m in range(count)], 1)
    units = torch.tensor([unit(way.bits, m, way.magic) for m in range(count)], dtype=torch.float64)
    z = codes.double() * units[:, None, None, None]  # [problems, planes, W, T, N]
    s, y = (torch.empty(*z.shape[:3], rows, n, dtype=torch.float32, device=device) for n in (tokens, SIZE))
    products_kernel[len(z),](
        a.to(device), p.to(device), halfwords.short().to(device), s, y,
        BITS=way.bits, MAGIC=way.magic, ASM=way.asm, W=warps, R=rows, T=tokens, N=SIZE, num_warps=WARPS,
    )  # fmt: skip
    told = [wrong("scores", s, a.double() @ z.mT), wrong("values", y, p.double() @ z)]
    return "; ".join(filter(None, told))


def wrong(name: str, got: Tensor, true: Tensor) -> str:
    """How sums differ from the true ones; "" if they do not."""
    got = got.cpu().double()
    differ = got != true
    if not (count := int(differ.sum())):
        return ""
    zeros, first = int((differ & (got == 0)).sum()), int(differ.flatten().nonzero()[0])
    return (
        f"{count} of {true.numel()} {name} are wrong, {zeros} of them zero: expected {true.flatten()[first].item()!r}, "
        f"got {got.flatten()[first].item()!r} first"
    )


def times(device: torch.device, clock: timing.Clock, dry: bool) -> dict[str, dict[str, float]]:
    """Microseconds of the same products of codes as normal and as subnormal numbers."""
    programs = 1 if dry else WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    g, repeats = torch.Generator().manual_seed(0), 2 if dry else REPEATS
    x = torch.randint(-LARGEST, LARGEST + 1, (WARPS, ROWS, TOKENS), generator=g).half()
    codes = torch.randint(1, 256, (WARPS, TOKENS, SIZE), generator=g).half()
    out, runs = torch.empty(programs, WARPS, ROWS, SIZE, dtype=torch.float32, device=device), {}
    left = x.to(device)
    for name, size in (("normal", 1.0), ("subnormal", SUBNORMAL)):
        right = (codes * size).to(device)

        def run(right: Tensor = right) -> Tensor:
            rate_kernel[programs,](
                left, right, out, repeats, UNROLLED=UNROLLED, W=WARPS, R=ROWS, T=TOKENS, N=SIZE, num_warps=WARPS
            )
            return out

        runs[name] = clock.prepare(run)
        true = (repeats * UNROLLED * size * (x.double() @ codes.double())).expand(out.shape)
        timing.gate(runs[name].result.cpu(), true, TOLERANCE)
    return timing.microseconds(clock, runs, SECONDS, (1, 1) if dry else timing.ROUNDS)


def check(dry: bool) -> dict[str, Any]:
    """What goes to the JSON. faults: what is wrong, by way; only without any, times, their ratio, and `slow`."""
    device = torch.device("cpu" if dry else "cuda")
    by = (True, False) if launch.assembles(device) else (False,)
    ways = [Way(*own) for own in product((8, 4, 2), (True, False), (False, True), by)]
    found = {str(way): exact(way, device) for way in ways}
    results: dict[str, Any] = {"dry": dry, "ways": list(found), "faults": {w: why for w, why in found.items() if why}}
    if not results["faults"]:
        results["times"] = times(device, timing.WallClock() if dry else timing.GraphClock(device), dry)
        medians = {name: t["median_us"] for name, t in results["times"].items()}
        results["ratio"] = medians["subnormal"] / medians["normal"]
        results["slow"] = "" if dry else slow(results["ratio"])
    return results


def slow(ratio: float) -> str:
    """What to do where subnormal numbers are slower than normal ones; "" where they are not."""
    return f"SLOW: the kernels for packed rows assume that they take as long: {TO_DO}" if ratio > SLOW else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    timing.check_device(parser, args.dry)
    results = check(args.dry)
    report.save(args.out / f"subnormals{'_dry' if args.dry else ''}.json", results)
    print(*lines(results), sep="\n")
    return 1 if results["faults"] else 0


def lines(results: dict[str, Any]) -> list[str]:
    """What was found, and what to do about it."""
    ways, faults = results["ways"], results["faults"]
    text = [f"WRONG: {way}: {why}" for way, why in faults.items()]
    text.append(f"{len(ways) - len(faults)} of {len(ways)} ways to multiply planes are exact")
    if faults and all("subnormal" in way for way in faults):
        text.append(f"These tensor cores do not take subnormal numbers as they are: {TO_DO}")
    if not faults:
        text.append(f"products of subnormal numbers take {results['ratio']:.2f} of the time of those of normal ones")
        text += filter(None, [results["slow"]])
    return text


if __name__ == "__main__":
    raise SystemExit(main())
