"""Codes of packed rows as operands of products (lrattn/factors/formats.py has the layout).

Bits 0 .. 9 of a float16 without an exponent are the number bits * 2^-24: what one `and` leaves of a row's halfwords is
a plane of codes in float16, exact, two to an instruction:

    plane i of halfwords x = x & mask = code * unit,   unit = 2^(position - 24)

Planes that would pass bit 9 are moved down first. MAGIC is for tensor cores that take no subnormal numbers: the codes
are moved into the fraction of 1024, which is then taken away, and unit = 2^position.

ASM is for NVIDIA's compiler, which does not pack two halfwords by itself. Without it the same is said in plain terms.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SCALE_UNIT = tl.constexpr(2.0**-8)  # of the float16 that a scale is


@triton.constexpr_function
def position(bits, i):
    """The bit at which plane i stands in its float16."""
    return 0 if bits >= 8 else 4 * (i % 2) if bits == 4 else 2 * i % 10


@triton.constexpr_function
def unit(bits, i, magic):
    """What code 1 of plane i is."""
    return 2.0 ** (position(bits, i) - (0 if magic else 24))


@triton.constexpr_function
def middle(bits):
    """Taken from every code."""
    return (2**bits - 1) / 2


@triton.constexpr_function
def mask(bits, i):
    return ((1 << bits) - 1) << position(bits, i)


@triton.constexpr_function
def planes_asm(bits, magic):
    """$0 .. $n-1: the planes of word $n, two halfwords of it."""
    n, lines = 16 // bits, []
    lines.append(f"prmt.b32 t, ${n}, 0, 0x4341;" if bits == 8 else f"shr.b32 t, ${n}, {10 if bits == 2 else 8};")
    for i in range(n):
        moved = bits * i != position(bits, i)
        source, keep = "t" if moved else f"${n}", f"0x{mask(bits, i) * 0x10001:08X}"
        if magic:
            lines.append(f"lop3.b32 ${i}, {source}, {keep}, 0x64006400, 0xEA; add.rn.f16x2 ${i}, ${i}, m;")
        elif bits == 8 and moved:
            lines.append(f"mov.b32 ${i}, t;")
        else:
            lines.append(f"and.b32 ${i}, {source}, {keep};")
    return "{.reg .b32 t, m; mov.b32 m, 0xE400E400; " + " ".join(lines) + "}"


@triton.constexpr_function
def outputs(bits):
    return ",".join(["=&r"] * (16 // bits)) + ",r"


@triton.jit
def planes(x, BITS: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):
    """Halfwords [.., n] int16 -> their planes, float16 of the same shape each."""
    z = ()
    if BITS == 16:
        z = (x.to(tl.float16, bitcast=True),)
    elif not ASM:
        for i in tl.static_range(16 // BITS):
            z = z + (_plane(x, BITS, i, MAGIC),)
    elif BITS == 8:
        z = tl.inline_asm_elementwise(planes_asm(8, MAGIC), outputs(8), [x], (tl.float16,) * 2, is_pure=True, pack=2)
    elif BITS == 4:
        z = tl.inline_asm_elementwise(planes_asm(4, MAGIC), outputs(4), [x], (tl.float16,) * 4, is_pure=True, pack=2)
    else:
        z = tl.inline_asm_elementwise(planes_asm(2, MAGIC), outputs(2), [x], (tl.float16,) * 8, is_pure=True, pack=2)
    return z


@triton.jit
def _plane(x, BITS: tl.constexpr, N: tl.constexpr, MAGIC: tl.constexpr):
    z = (x >> BITS * N - position(BITS, N)) & mask(BITS, N)
    if MAGIC:
        return (z | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    return z.to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def scale_asm(n):
    """Bytes n of two words, whose last bytes are 0, to the top of two float16, under the sign."""
    return "{.reg .b32 t; prmt.b32 t, $1, $2, " + str(3 | n << 4 | 7 << 8 | (4 + n) << 12) + "; shr.b32 $0, t, 1;}"


@triton.jit
def scale_of(word, N: tl.constexpr, ASM: tl.constexpr):
    """Scale N (0 .. 2) of words int32, times 2^8: float16."""
    if ASM:
        return tl.inline_asm_elementwise(scale_asm(N), "=r,r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    return (((word >> 8 * N) & 255) << 7).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def weighed(p, scale, ASM: tl.constexpr):
    """p * scale, in the dtype of p; float16 with ASM."""
    if ASM:
        p, scale = tl.broadcast(p, scale)
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [p, scale], dtype=tl.float16, is_pure=True, pack=2
        )
    return p * scale.to(p.dtype)
