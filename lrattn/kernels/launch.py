"""Block sizes, warps and stages: finite tables of rows, chosen by plain functions of shapes and device.

`make resources` compiles every row for every device it names, and fails where one does not fit. Nothing is tuned at run
time: the first row of a table that fits is taken; docs/kernels.md#launch says what each is for.
"""

from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton

from lrattn.factors.operands import KeySizes
from lrattn.kernels.arguments import Form
from lrattn.kernels.pieces import ANY, Pieces, next_power_of_2, pieces, streamed

BLOCK_T = 64  # tokens of a tile: 64 rows make one wgmma of 4 warps


class Launch(NamedTuple):
    """How one kernel is launched. Blocks that a kernel does not have are 0."""

    warps: int
    stages: int
    block_q: int = 0  # query rows
    block_r: int = 0  # latents, or the widest piece of a rank
    block_d: int = 0  # dimensions of a head
    block_n: int = 0  # tokens to write or to rebuild, of the dense window, or of a warp
    block_s: int = 0  # splits to merge
    block_t: int = BLOCK_T  # tokens of a tile
    resident: bool = False  # a program reads its basis, or its absorbed queries, once
    magic: bool = False  # codes become normal float16 numbers: for tensor cores that take no subnormal ones


class Row(NamedTuple):
    """A launch and the largest shapes it is for."""

    launch: Launch
    devices: tuple[str, ...]  # () is every device
    head: int = ANY  # padded head dim
    rank: int = ANY  # columns of a row, see `columns`
    queries: int = ANY  # padded query rows of a program, or those absorbed by a band
    itemsize: int = 2  # of the numbers; 4 runs without tensor cores and may spill
    least_itemsize: int = 2
    table: bool = True  # also where every token's own row of turns is read
    values: int = ANY  # columns of a value row, where `rank` is the keys'
    biased: bool = True  # also where keys have a bias
    shared: bool = True  # also where one row serves keys and values
    chunked: bool | None = None  # for keys in chunks, or for others; None: for both
    packed: bool = False  # for packed rows, or for plain ones
    wide: bool = True  # also where packed rows have segments of 16 bits, or values alone more halfwords than a piece
    uneven: bool = True  # also where groups have segments of their own


# Numbers that change from call to call: a kernel is not compiled anew for some of their values.
LENGTHS = (
    "bound", "window", "first_tile", "tiles", "splits", "first", "last", "rows", "n", "num_slots", "B",
    "pages_stride", "lens_stride", "starts_stride", "offsets_stride", "slots_stride", "firsts_stride", "recent",
)  # fmt: skip

# Rows of these are taken a few sequences at a time: where such a slice begins may not matter either.
SLICED = ("lens", "starts", "offsets", "pages", "part_lse", "lse", "near_lse", "firsts")

kernel = partial(triton.jit, do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)

HOPPER = ("sm90", "sm100")
BIG = ("sm80", "sm90", "sm100")  # more than 160 KiB of shared memory; gfx9 has 64

LATENT_SCORES = (
    Row(Launch(4, 2, block_d=64, resident=True), ("sm90",), head=64, rank=384, queries=16),
    Row(Launch(4, 1, block_d=64, resident=True), ("sm100",), head=64, rank=384, queries=16),
    Row(Launch(8, 2, block_d=64, resident=True), HOPPER, head=64, rank=384, table=False),
    Row(Launch(8, 2, block_d=64, resident=True), HOPPER, head=64, rank=288),
    Row(Launch(4, 2, block_d=64, resident=True), ("sm80",), head=64, rank=256, queries=32),
    Row(Launch(4, 2, block_d=128, resident=True), ("sm90",), head=128, rank=192, queries=16),  # two to a multiprocessor
    Row(Launch(8, 2, block_d=128, resident=True), ("sm90",), head=128, rank=128),
    Row(Launch(4, 1, block_d=128, resident=True), ("sm90",), head=128, rank=256, queries=16, table=False),  # also two
    Row(Launch(4, 2, block_d=128, resident=True), ("sm90",), head=128, rank=320, queries=16),
    Row(Launch(8, 3, block_r=64, block_d=128), ("sm90",)),
    Row(Launch(8, 3, block_r=64, block_d=128), ("sm100",), queries=16),
    Row(Launch(8, 2, block_r=64, block_d=128), ("sm80",), head=128, queries=16),
    Row(Launch(8, 1, block_r=64, block_d=128), ("sm80",), queries=16),
    Row(Launch(4, 2, block_r=64, block_d=128), ("gfx9",), queries=16),
    Row(Launch(8, 1, block_r=64, block_d=64), ()),
    Row(Launch(8, 1, block_r=32, block_d=64), (), itemsize=4),
    Row(Launch(4, 1, block_d=64, resident=True), ("sm90",), head=64, rank=384, queries=16, packed=True),
    Row(Launch(4, 1, block_d=128, resident=True), ("sm90",), head=128, rank=256, queries=16, table=False, packed=True),
    Row(Launch(8, 1, block_r=64, block_d=128), ("sm90",), queries=16, packed=True),
    Row(Launch(4, 1, block_r=32, block_d=32), ("sm100",), queries=16, packed=True),
    Row(Launch(4, 1, block_r=32, block_d=32), ("gfx9",), packed=True),
    Row(Launch(8, 1, block_r=16, block_d=64), ("sm80",), packed=True),
    Row(Launch(8, 1, block_r=32, block_d=64), (), queries=32, packed=True),
    Row(Launch(8, 1, block_r=16, block_d=64), ("sm100",), packed=True),
    Row(Launch(8, 1, block_r=32, block_d=32), (), packed=True),
    Row(Launch(8, 1, block_r=32, block_d=64), (), itemsize=4, packed=True),
)
ABSORBED_SCORES = (
    Row(Launch(4, 1, block_r=128, resident=True), ("sm90",), rank=512, queries=16),
    Row(Launch(4, 1, block_r=128, resident=True), ("sm100",), rank=256, queries=16),
    Row(Launch(8, 1, block_r=128, resident=True), ("sm80",), rank=256, queries=16),
    Row(Launch(8, 1, block_r=128, resident=True), ("sm90",), rank=256),
    Row(Launch(8, 1, block_r=64, resident=True), ("sm100",), rank=256),
    Row(Launch(8, 1, block_r=128, resident=True), ("sm80",), rank=256, chunked=False),
    Row(Launch(4, 3, block_r=128), BIG, queries=16),
    Row(Launch(8, 3, block_r=128), ("sm90",)),
    Row(Launch(8, 3, block_r=64), ("sm100",)),
    Row(Launch(8, 2, block_r=64), ("sm80",)),
    Row(Launch(4, 2, block_r=64), (), queries=16),
    Row(Launch(8, 1, block_r=64), ()),
    Row(Launch(4, 1, block_r=32), (), itemsize=4),
)
LATENT_VALUES = (
    Row(Launch(4, 3, block_r=64), (), rank=64, queries=16),
    Row(Launch(4, 3, block_r=256), BIG, rank=256, queries=16),
    Row(Launch(8, 1, block_r=256), ("sm90",), queries=16),
    Row(Launch(4, 3, block_r=128), ("sm80",), queries=16),
    Row(Launch(4, 2, block_r=128), ("sm100", "gfx9"), queries=16),
    Row(Launch(4, 3, block_r=128), ("sm90",)),
    Row(Launch(8, 3, block_r=128), ("sm80",)),
    Row(Launch(8, 2, block_r=64), ()),
    Row(Launch(4, 1, block_r=64), (), itemsize=4),
)
# One pass over keys and values; where no row fits there are two. rank: columns of keys, values: columns of values;
# rank 0: one row serves both.
FUSED_ABSORBED = (
    Row(Launch(4, 1, block_r=128), HOPPER, rank=256, values=256, queries=16),
    Row(Launch(8, 1, block_r=128), ("sm80",), rank=256, values=256, queries=16),
    Row(Launch(8, 1, block_r=128), ("sm90",), rank=256, values=512, queries=16),
    Row(Launch(8, 1, block_r=128), BIG, rank=256, values=256, queries=32),
    Row(Launch(8, 1, block_r=128), ("sm90",), rank=128, values=128, queries=64),
    Row(Launch(4, 1, block_r=128), ("gfx9",), rank=256, values=256, queries=16),
    Row(Launch(4, 1, block_r=128), (), rank=128, values=128, itemsize=4, least_itemsize=4),
)
# Packed rows by plane, 16 query rows a program.
ATTEND_PACKED = (
    Row(Launch(4, 2, block_t=128, block_n=32), ("sm80", "sm90"), wide=False, uneven=False),
    Row(Launch(4, 2, block_t=128, block_n=32), ("sm100",), wide=False, biased=False, uneven=False),
    Row(Launch(4, 2, block_t=128, block_n=16), BIG, uneven=False),
    Row(Launch(4, 1, block_t=128, block_n=16), BIG),
    Row(Launch(2, 2, block_t=64, block_n=32), ("sm80", "sm90"), wide=False, biased=False, uneven=False),
    Row(Launch(4, 2, block_t=64, block_n=16), BIG, uneven=False),
    Row(Launch(4, 1, block_t=64, block_n=16), BIG),
    Row(Launch(4, 1, block_t=64, block_n=16, magic=True), ("gfx9",)),
    Row(Launch(4, 1, block_t=64, block_n=16, magic=True), (), itemsize=4, least_itemsize=4),
)
PACKED_VALUES = tuple(row._replace(launch=row.launch._replace(stages=1)) for row in ATTEND_PACKED)  # of given scores
FUSED_REBUILT = (
    Row(Launch(4, 1, block_r=128), ("sm90",), head=64, rank=256, values=256, queries=16),
    Row(Launch(4, 1, block_r=128), ("sm90",), head=64, rank=128, values=128, queries=32),
    Row(Launch(4, 2, block_r=128), ("sm90",), head=128, rank=128, values=128, queries=16, table=False, biased=False),
    Row(Launch(4, 2, block_r=64), ("sm90",), head=128, rank=0, values=128, queries=16, table=False),
    Row(Launch(4, 2, block_r=64), ("sm90",), head=128, rank=0, values=256, queries=16, table=False, biased=False),
    Row(Launch(8, 1, block_r=128), ("sm100",), head=64, rank=256, values=256, queries=16, shared=False),
    Row(Launch(8, 1, block_r=128), ("sm100",), head=128, rank=128, values=128, queries=16),
    Row(Launch(8, 1, block_r=128), ("sm100",), head=128, rank=0, values=256, queries=16, table=False),
    Row(Launch(4, 1, block_r=128), HOPPER, head=128, rank=128, values=128, queries=16, itemsize=4, least_itemsize=4),
)
# Keys before RoPE by a band: some heads of a group in a program, to 16 query rows. queries: absorbed ones of a block.
ATTEND = (
    Row(Launch(4, 1, block_r=128), ("sm90",), rank=160, values=160, queries=64, biased=False),
    Row(Launch(8, 1, block_r=128, block_t=128), ("sm90",), rank=256, values=256, queries=64, biased=False),
    Row(Launch(8, 1, block_r=128), ("sm100",), rank=256, values=256, queries=64, biased=False),
    Row(Launch(4, 1, block_r=128), HOPPER, rank=128, values=128, queries=64, itemsize=4, least_itemsize=4),
)
ATTEND_SCORES = (
    Row(Launch(4, 1, block_r=128), ("sm90",), rank=160, queries=128),
    Row(Launch(8, 1, block_r=128, block_t=128), ("sm90",), rank=256, queries=64),
    Row(Launch(8, 1, block_r=128), ("sm100",), rank=256, queries=64),
    Row(Launch(4, 1, block_r=128), HOPPER, rank=128, queries=64, itemsize=4, least_itemsize=4),
    Row(Launch(4, 1, block_r=128), ("sm90",), rank=160, queries=128, packed=True),
    Row(Launch(8, 1, block_r=128, block_t=128), ("sm90",), rank=256, queries=64, packed=True),
    Row(Launch(4, 1, block_r=128), ("sm90",), rank=128, queries=64, itemsize=4, least_itemsize=4, packed=True),
)
ABSORB = (
    Row(Launch(4, 1, block_q=64, block_r=64), (), head=128),
    Row(Launch(8, 1, block_q=64, block_r=64), ()),
    Row(Launch(4, 1, block_q=16, block_r=32), (), itemsize=4),
)
ABSORB_PACKED = (
    Row(Launch(8, 1, block_q=64, block_r=64), ()),
    Row(Launch(4, 1, block_q=16, block_r=32), (), itemsize=4),
)
COMBINE = (
    Row(Launch(4, 2, block_q=16, block_s=8, block_r=64, block_d=64), ()),
    Row(Launch(4, 1, block_q=16, block_s=8, block_r=32, block_d=32), (), itemsize=4),
)
COMBINE_MANY = (  # splits: a program takes one row
    Row(Launch(8, 1, block_q=1, block_s=32, block_r=256, block_d=64), BIG),
    Row(Launch(8, 1, block_q=1, block_s=16, block_r=64, block_d=64), (), itemsize=4),
)
PROJECT = (
    Row(Launch(4, 4, block_q=16, block_r=128, block_d=32), BIG),
    Row(Launch(4, 2, block_q=16, block_r=64, block_d=32), ()),
    Row(Launch(4, 1, block_q=16, block_r=32, block_d=32), (), itemsize=4),
)
ATTEND_NEAR = (
    Row(Launch(4, 2, block_n=64), (), head=128, queries=16),
    Row(Launch(8, 2, block_n=64), BIG),
    Row(Launch(8, 1, block_n=64), ()),
    Row(Launch(8, 1, block_n=32), (), itemsize=4),
)
WRITE_NEAR = (Row(Launch(4, 1, block_n=16), (), itemsize=4),)
WRITE_LATENTS = (Row(Launch(4, 1, block_n=16, block_r=128), (), itemsize=4),)
REBUILD = (
    Row(Launch(8, 3, block_n=64, block_r=64), BIG, head=128),
    Row(Launch(8, 2, block_n=64, block_r=64), ("gfx9",), head=128),
    Row(Launch(8, 2, block_n=32, block_r=64), ()),
    Row(Launch(8, 1, block_n=32, block_r=32), (), itemsize=4),
    Row(Launch(8, 1, block_n=32, block_r=32), (), packed=True),
    Row(Launch(8, 1, block_n=32, block_r=32), (), itemsize=4, packed=True),
)


def find(
    table: tuple[Row, ...], device: str, itemsize: int, *, head: int = 0, rank: int = 0, rows: int = 0,
    turned: bool = True, values: int = 0, biased: bool = False, packed: bool = False, chunked: bool = False,
    absorbed: int = 0,
) -> Launch | None:  # fmt: skip
    """The first launch of a table whose row fits, or None. Blocks are no larger than it needs.

    head, rows: dimensions of a head and query rows of its programs; 0 where they do not matter. absorbed: see Row.
    """
    for row in table:
        if (
            row.least_itemsize <= itemsize <= row.itemsize
            and (not row.devices or device in row.devices)
            and (block_d(head) <= row.head and rank <= row.rank and (absorbed or block_q(rows)) <= row.queries)
            and (values <= row.values and row.packed == packed)
            and ((row.table or turned) and (row.shared or rank))
            and ((row.biased or not biased) and row.chunked in (None, chunked))
        ):
            found = row.launch._replace(block_q=block_q(rows)) if rows else row.launch
            return found._replace(block_d=min(found.block_d, block_d(head))) if head else found
    return None


def pick(table: tuple[Row, ...], device: str, itemsize: int, **shape: Any) -> Launch:
    """The first launch of a table that has one for every shape."""
    launch = find(table, device, itemsize, **shape)
    if launch is None:
        raise ValueError(f"no launch for {shape}, {itemsize} bytes on {device}")
    return launch


# launch of a kernel: device and itemsize, and what its table tells apart
absorb, absorb_packed, combine, combine_many, project, write_latents = (
    cache(partial(pick, table)) for table in (ABSORB, ABSORB_PACKED, COMBINE, COMBINE_MANY, PROJECT, WRITE_LATENTS)
)
rebuild, attend_near, write_near, latent_scores, absorbed_scores, latent_values = (
    cache(partial(pick, table))
    for table in (REBUILD, ATTEND_NEAR, WRITE_NEAR, LATENT_SCORES, ABSORBED_SCORES, LATENT_VALUES)
)
fused_absorbed, fused_rebuilt, attend, attend_scores = (
    cache(partial(find, table)) for table in (FUSED_ABSORBED, FUSED_REBUILT, ATTEND, ATTEND_SCORES)
)


def by_plane(table: tuple[Row, ...], device: str, itemsize: int, tile: int, **shape: bool) -> Launch:
    """The launch for packed rows by plane whose tiles divide so many tokens. shape: what a row must be for, too."""
    there = (row for row in table if row.least_itemsize <= itemsize <= row.itemsize)
    there = (row for row in there if not row.devices or device in row.devices)
    there = (row for row in there if all(getattr(row, name) for name, needed in shape.items() if needed))
    return next(row.launch for row in there if not tile % row.launch.block_t)


attend_packed, packed_values = (cache(partial(by_plane, table)) for table in (ATTEND_PACKED, PACKED_VALUES))


@cache
def assembles(device: torch.device) -> bool:
    """Whether kernels may hold NVIDIA's assembly there."""
    return device.type == "cuda" and torch.version.hip is None


@cache
def chained(device: torch.device) -> bool:
    """Whether a launch there may begin before the one before it has ended, and waits for it itself: `launch_pdl`."""
    return assembles(device) and name(device) in HOPPER


def pdl(device: torch.device) -> dict[str, bool]:
    """Words of a launch that waits."""
    return {"CHAINED": True, "launch_pdl": True} if chained(device) else {"CHAINED": False}


@cache
def block_d(head_dim: int) -> int:
    """A head dim padded to what a product takes."""
    return max(32, next_power_of_2(head_dim))


@cache
def block_q(rows: int) -> int:
    """Query rows of a program: all of them up to 64, padded to what a product takes."""
    return min(64, max(16, next_power_of_2(rows)))


def scored(side: KeySizes, choice: Launch) -> Pieces:
    """A row as the scores of a launch take it."""
    if not choice.resident:
        return streamed(side, choice.block_r)
    return pieces(side, 128, True) if side.packed else pieces(side, ANY)


@lru_cache(maxsize=1024)
def constants(names: str, form: Form, side: Any, choice: Launch, turned: bool = False) -> dict[str, Any]:
    """Those that a kernel names, as "C M Hkv", of the sizes of a side and of its launch; once for all calls."""
    known = {
        "C": side.group_size, "M": form.query_heads // side.num_heads, "Hkv": side.num_heads, "D": side.head_dim,
        "P": form.page_size, "CAUSAL": form.causal, "WINDOWED": form.windowed, "CAPPED": form.capped,
        "BLOCK_Q": choice.block_q, "BLOCK_R": choice.block_r, "BLOCK_D": choice.block_d or block_d(side.head_dim),
        "BLOCK_T": choice.block_t, "RESIDENT": choice.resident, "MAGIC": choice.magic, "TABLE": not turned,
    }  # fmt: skip
    if isinstance(side, KeySizes):
        known |= {"CHUNK": side.chunk, "ROTARY": side.rotary_dim, "INTERLEAVED": side.interleaved > 0}
    return {name: known[name] for name in names.split()} | {"num_warps": choice.warps, "num_stages": choice.stages}


@cache
def name(device: torch.device) -> str:
    """sm80, sm90, sm100 or gfx9: the family whose rows a device takes. A CPU interprets what an H100 would run.

    Raises: ValueError for a CPU outside Triton's interpreter."""
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise ValueError("backend: expected 'reference' on a CPU (or TRITON_INTERPRET=1 to debug), got 'triton'")
        return "sm90"
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx9"
    if target.arch < 80:
        raise ValueError(f"backend: expected compute capability 8.0 or newer for 'triton', got {target.arch / 10}")
    if target.arch >= 120:  # 99 KiB of shared memory and mma.sync, as sm86
        return "sm80"
    return "sm100" if target.arch >= 100 else "sm90" if target.arch >= 90 else "sm80"


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 4 for a CPU, where small problems then show programs of one tile and of several."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
