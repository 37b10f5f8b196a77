"""How a decode call is run: in one pass or two, and cut into what sequences, tiles and splits; from shapes alone."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from lrattn.factors.operands import KeySizes, ValueSizes
from lrattn.factors.shapes import MAX_SPLITS, cdiv, round_up
from lrattn.kernels import launch
from lrattn.kernels.pieces import PLANES, Pieces, columns, next_power_of_2, parts, pieces, powers, streamed, width

WAVES, WARPS = 2, 4  # programs a multiprocessor should get at least, and warps of one; of fewer warps more programs
PART_TILES = 32  # most tiles of one program where the workspace allows, so that ragged batches balance
COMBINED = 8  # most splits that are combined 16 rows at a time: of more a program takes one row
BAND_ROWS, BAND_COLUMNS = 16, 192  # most query rows and columns of fast pairs of a program
BAND_LEAST = 4  # query rows of one pass
LARGEST_AXIS = 65535  # of a CUDA grid, but for the first
MOST_TILES = 32767  # at a time: times a number of parts they stay below 2^31


class Planes(NamedTuple):
    """How packed rows are attended to whose codes are operands of products; None of plain rows and of rebuilt keys."""

    keys: launch.Launch | None
    values: launch.Launch | None

    def one_pass(self, values: ValueSizes) -> launch.Launch | None:
        """That of both; None where scores and values take a pass each."""
        whole = self.keys is not None and self.values is not None and values.paired
        return self.keys if whole and len(parts(values)) == 1 else None


class Way(NamedTuple):
    """How rows are attended to but in planes: absorbed queries meet latents, see attend.py, or keys are rebuilt, see
    attend_rebuilt.py."""

    launch: launch.Launch
    row: Pieces  # of keys
    one_pass: bool  # over keys and values; else scores alone
    heads: int  # kv heads of a program, a divisor of the group's
    rows: int  # query rows of a program, padded
    block: int  # tokens that queries are made ready for; 0: all
    banded: bool = False  # keys before RoPE, by a band: slow pairs alone are absorbed
    by_lane: bool = False  # one query row a head
    fast: tuple[int, ...] = ()  # pieces of the dimensions that are rebuilt
    terms: int = 1  # T; 0: keys are rebuilt
    streamed: bool = False  # a piece goes along a row


class Workspace(NamedTuple):
    """Temporaries of the sequences taken at a time, B of them, or their shapes; None of what a call does without."""

    x: Any  # [B, tiles, owners, rows, F] queries by tile, or their fast pairs by a band, in q's dtype, float32 by lane;
    # for rows in planes absorbed ones [B, chunks, Hq S, columns], float16 of 16-bit layers
    a: Any  # [B, blocks, owners, rows T, LONG] in q's dtype: absorbed queries, or their slow pairs by a band
    terms: Any  # float32, what goes with absorbed queries: [B, blocks, owners, rows T]; for rows in planes
    # [B, chunks, n, Hq S padded]
    s: Any  # [B, Hq S, tokens] float32 scores
    y: Any  # [B, slots, Hq S, Rv] float32 partial results, a slot each; two more for several spans
    lse: Any  # [B, slots, Hq S padded] float32
    near: Any  # [B, Hq S, D] float32 heads of the tokens that are held as they are
    near_lse: Any  # [B, Hq S padded] float32

    def of(self, n: int) -> "Workspace":
        return Workspace._make(None if x is None else x[:n] for x in self)


class Cut(NamedTuple):
    """Sizes of one call; every number is a bound from shapes, never from lengths on the device."""

    batch: int  # sequences at a time
    total: int  # tiles that a sequence can have
    tiles: int  # tiles at a time
    parts: int  # of those tiles: one to a program of the scores
    splits: int  # of those tiles: one to a program of the values, or of the one pass
    block_t: int  # tokens of a tile
    fused: launch.Launch | None  # of the one pass
    planes: Planes  # of packed rows
    way: Way | None  # None of keys in planes
    block: int  # tokens that queries are made ready for; 0: all
    shapes: Workspace
    nbytes: int  # of temporaries

    @property
    def banded(self) -> Way | None:
        """Of keys that go by a band."""
        return self.way if self.way is not None and self.way.banded else None


@lru_cache(maxsize=256)
def planes(dtype: torch.dtype, device: str, keys: KeySizes, values: ValueSizes, tile: int = launch.BLOCK_T) -> Planes:
    """Of either side whose codes are operands. Tiles lie in one chunk, and are as the other side's.

    tile: tokens of the other side's, where its codes are no operands.
    """
    own, other = bool(keys.packed and keys.absorbed), bool(values.packed)
    tile = keys.chunk if own and other else tile
    sides = [side for side, there in ((keys, own), (values, other)) if there]
    shape = {"wide": any(16 in side.packed[::2] for side in sides), "uneven": not all(side.even for side in sides)}
    long = other and sum(piece[3] for piece in pieces(values, PLANES)) > PLANES
    return Planes(
        launch.attend_packed(device, dtype.itemsize, tile, biased=bool(keys.biased), **shape) if own else None,
        launch.packed_values(device, dtype.itemsize, tile, **shape | {"wide": shape["wide"] or long})
        if other
        else None,
    )


@lru_cache(maxsize=256)
def rebuilt(
    turned: bool, rows: int, dtype: torch.dtype, device: str, keys: KeySizes, values: ValueSizes
) -> Way:  # fmt: skip
    """How keys are rebuilt: a program for each head. One pass would read a group's value latents again for each, unless
    rows are shared.

    turned: queries are turned back by tile. rows: M S, query rows of a kv head.
    """
    shape: dict[str, Any] = {"head": keys.head_dim, "rows": rows, "turned": turned}
    found, packed = None, bool(keys.packed)
    if values.paired and not packed and not values.packed and (keys.group_size == 1 or values.shared):
        found = launch.fused_rebuilt(
            device, dtype.itemsize, rank=0 if values.shared else keys.rank, values=values.rank,
            biased=bool(keys.biased), **shape,
        )  # fmt: skip
    choice = found or launch.latent_scores(device, dtype.itemsize, rank=columns(keys), packed=packed, **shape)
    if found is not None:
        row = pieces(values if values.shared else keys, choice.block_r)
    else:
        row = launch.scored(keys, choice)
    head = (launch.block_d(keys.head_dim),)
    return Way(choice, row, found is not None, 1, choice.block_q, launch.BLOCK_T * turned, fast=head, terms=0)


@lru_cache(maxsize=256)
def absorbed(rows: int, dtype: torch.dtype, device: str, keys: KeySizes, values: ValueSizes) -> Way:
    """How plain rows go whose queries are absorbed whole: all heads of a group in a program.

    rows: M S, query rows of a kv head.
    """
    rows *= keys.group_size
    shape, found = {"rows": rows, "chunked": bool(keys.chunk)}, None
    if values.paired and not values.packed:
        found = launch.fused_absorbed(
            device, dtype.itemsize, rank=0 if values.shared else keys.rank, values=values.rank,
            biased=bool(keys.biased), **shape,
        )  # fmt: skip
    whole = found is not None
    choice = found or launch.absorbed_scores(device, dtype.itemsize, rank=keys.rank, **shape)
    if whole or choice.resident:
        row = pieces(values if whole and values.shared else keys, choice.block_r)
    else:
        row = streamed(keys, choice.block_r)
    streams = not (whole or choice.resident)
    return Way(choice, row, whole, keys.group_size, choice.block_q, keys.chunk, streamed=streams)


@lru_cache(maxsize=256)
def banded(rows: int, dtype: torch.dtype, device: str, keys: KeySizes, values: ValueSizes) -> Way | None:
    """How keys go by a band, where that has less work than to rebuild them: at least two heads a program.

    rows: M S, query rows of a kv head.
    """
    if not keys.terms:
        return None
    fast = powers(keys.fast, 128)
    fits = [n for n in range(2, keys.group_size + 1) if keys.group_size % n == 0 and n * rows <= BAND_ROWS]
    fits = [n for n in fits if next_power_of_2(n) * sum(fast) <= BAND_COLUMNS]
    if not fits:
        return None
    heads, by_lane = fits[-1], rows == 1
    padded = next_power_of_2(heads) if by_lane else BAND_ROWS
    shape = {"rank": width(pieces(keys, 128, True)) if keys.packed else keys.rank, "packed": bool(keys.packed)}
    shape |= {"absorbed": padded * keys.terms, "biased": bool(keys.biased)}
    found, whole = None, values.paired and not values.shared and padded >= BAND_LEAST
    whole = whole and not keys.packed and not values.packed
    if whole:
        found = launch.attend(device, dtype.itemsize, values=values.rank, **shape)
    if found is None:
        found, whole = launch.attend_scores(device, dtype.itemsize, **shape), False
    if found is None:
        return None
    second = planes(dtype, device, keys, values, found.block_t).values
    if second is not None and second.block_t != found.block_t:
        return None
    row = pieces(keys, found.block_r, True)
    return Way(found, row, bool(whole), heads, padded, keys.block, True, by_lane, fast, keys.terms)


def turns_queries(keys: KeySizes, dtype: torch.dtype, placed: bool) -> bool:
    """Whether queries are turned back by tile: not where each token must have its own row of the rope's table.

    placed: positions are given.
    """
    return not keys.absorbed and not placed and not (keys.exact_turns and dtype == torch.float32)


@lru_cache(maxsize=4096)
def cut(
    batch: int, num_queries: int, query_heads: int, dtype: torch.dtype, device: str, processors: int, keys: KeySizes,
    values: ValueSizes, placed: bool, bound: int, window: int, num_splits: int, limit: int, near: bool = False,
) -> Cut:  # fmt: skip
    """The cut of a call with tokens up to `bound`, within `limit` bytes if one tile of one sequence is.

    processors: multiprocessors of the device. placed: positions are given, or offsets, where keys go by chunks.
    near: heads of a dense window are held, too.

    How the tiles of a sequence are cut into splits depends on the batch only where num_splits is 0.
    """
    rows = query_heads * num_queries
    padded = round_up(rows, 16)  # at multiples of 16, whatever the number of splits or chunks: one compilation
    turned = turns_queries(keys, dtype, placed)
    way, each_head = None, rows // keys.num_heads
    given = each_head, dtype, device, keys, values
    if not keys.absorbed:
        way = (banded(*given) if turned else None) or rebuilt(turned, *given)
    elif not keys.packed:
        way = absorbed(*given)
    grouped = way if way is not None and way.terms else None  # whose programs have several heads
    block_t = launch.BLOCK_T if way is None else way.launch.block_t
    codes = planes(dtype, device, keys, values, block_t)
    if way is not None:
        one_pass = way.launch if way.one_pass else None
        value_programs = score_programs = keys.num_heads // way.heads * cdiv(each_head * way.heads, way.rows)
    else:
        one_pass = codes.one_pass(values)
        value_programs = score_programs = cdiv(rows // keys.groups, 16) * keys.groups
        if codes.keys is not None and codes.values is not None:
            block_t = codes.keys.block_t
    if one_pass is None and codes.values is not None:
        value_programs = cdiv(rows // values.groups, 16) * values.groups
    elif one_pass is None:
        block_r = launch.latent_values(device, dtype.itemsize, rank=values.rank, rows=rows // values.groups).block_r
        value_programs = cdiv(values.rank, block_r) * _blocks(rows, values.groups)

    begin = 1 - block_t if keys.chunk and placed else 0  # of the first tile at the earliest
    total = cdiv(bound - begin, block_t)
    if window:  # a window may begin and end inside a tile
        total = min(total, cdiv(window + num_queries - 2, block_t) + 1)
    fill = _fill(processors, one_pass if grouped is not None else codes.values if one_pass is None else codes.keys)
    per_split = (rows * values.rank + padded) * 4  # a partial result and its lse
    ready = plane_ready(rows, dtype, keys) if way is None else way_ready(rows, dtype, keys, way)
    per_tile = 0 if one_pass is not None else rows * block_t * 4
    fixed = rows * keys.head_dim * dtype.itemsize  # heads before the output projection
    fixed += near * (rows * keys.head_dim + padded) * 4
    if ready.block != block_t:  # n tiles can be in (n - 2) BLOCK_T / block + 2 blocks
        fixed += (2 if ready.block else 1) * ready.nbytes
    if ready.block:
        per_tile += cdiv(ready.nbytes * block_t, ready.block)
    room = min((limit - fixed - per_tile) // per_split - 2, limit // (2 * per_split))  # splits
    balanced = min(cdiv(total, PART_TILES), room // max(batch, 1))
    wanted = max(cdiv(fill, max(batch, 1) * value_programs), balanced)
    if (codes.keys or grouped) is not None and one_pass is not None:
        each = max(batch, 1) * value_programs
        if grouped is not None:  # whose queries may leave room for some of the sequences at a time
            each = _at_a_time(batch, limit // (fixed + total * per_tile)) * value_programs
            wanted = max(cdiv(fill, each), balanced)
        if grouped is not None and each * COMBINED >= fill:
            wanted = min(wanted, COMBINED)  # of more a query row would be combined by a program of its own
        wanted = _whole(wanted, each, fill, total)
    splits = num_splits or max(1, min(wanted, total, room, MAX_SPLITS))
    fixed += (splits + 2) * per_split
    tiles = max(1, min(total, (limit - fixed) // per_tile if per_tile else total, MOST_TILES))
    held = fixed + tiles * per_tile
    at_once = _at_a_time(batch, min(limit // held, LARGEST_AXIS))
    fill, each = _fill(processors, grouped.launch if grouped else codes.keys), at_once * score_programs
    parts = min(tiles, max(cdiv(fill, each), cdiv(tiles, PART_TILES)))
    if grouped is not None:
        parts = _whole(parts, each, fill, tiles)
    blocks = cdiv(tiles - 1, ready.block // block_t) + 1 if ready.block else 1
    slots = splits + (0 if tiles >= total else 2)
    x, a, terms = (None if own is None else (at_once, blocks * own[0], *own[1:]) for own in ready.shapes)
    shapes = Workspace(
        x,
        a,
        terms,
        None if one_pass else (at_once, rows, tiles * block_t),
        (at_once, slots, rows, values.rank),
        (at_once, slots, padded),
        (at_once, rows, keys.head_dim) if near else None,
        (at_once, padded) if near else None,
    )
    return Cut(at_once, total, tiles, parts, splits, block_t, one_pass, codes, way, ready.block, shapes, at_once * held)


class Ready(NamedTuple):
    """What the queries of a call are made ready to, for each block of tokens."""

    block: int  # tokens of a block, whole tiles; 0: one is for all
    shapes: tuple[tuple[int, ...] | None, ...]  # of one block, those of Workspace: x, a, terms
    nbytes: int


def way_ready(rows: int, dtype: torch.dtype, keys: KeySizes, way: Way) -> Ready:
    """Those of `attend` and attend_rebuilt. rows: Hq S."""
    owners = keys.num_heads // way.heads
    own = round_up(rows // owners, way.rows) if way.banded else rows // owners
    x = (way.block // way.launch.block_t or 1, owners, own, sum(way.fast)) if way.fast else None
    a = terms = None
    if way.terms:
        a = 1, owners, own * way.terms, round_up(keys.rank, way.row[0][3]) if way.streamed else width(way.row)
        terms = (1, owners, round_up(own * way.terms, 16)) if keys.biased else None
    sizes = zip((x, a, terms), (4 if way.by_lane else dtype.itemsize, dtype.itemsize, 4), strict=True)
    return Ready(way.block, (x, a, terms), sum(size * math.prod(shape) for shape, size in sizes if shape))


def plane_ready(rows: int, dtype: torch.dtype, keys: KeySizes) -> Ready:
    """Those of rows in planes. rows: Hq S."""
    width, count = plane_queries(keys)
    padded = round_up(rows, 16)
    nbytes = rows * width * dtype.itemsize + padded * count * 4
    return Ready(keys.chunk, ((1, rows, width), None, (1, count, padded)), nbytes)


def plane_queries(keys: KeySizes) -> tuple[int, int]:
    """Of an absorbed query for rows in planes: its columns, and the float32 numbers that go with it."""
    return columns(keys), len(pieces(keys, PLANES)) + 1 + keys.biased


def _fill(processors: int, choice: launch.Launch | None) -> int:
    """Programs for all multiprocessors."""
    return WAVES * processors * WARPS // (choice.warps if choice else WARPS)


def _at_a_time(batch: int, most: int) -> int:
    """Sequences, no more than fit, so that the last time has about as many."""
    return cdiv(batch, cdiv(batch, max(most, 1))) if batch else 1


def _whole(wanted: int, each: int, fill: int, tiles: int) -> int:
    """Parts of the tiles of each of so many owners, about as wanted: programs without a last wave that is not full, and
    as few as take no more tiles each."""
    programs = wanted * each // fill * fill or wanted * each
    return cdiv(tiles, cdiv(tiles, max(programs // each, 1))) if tiles else 1


def _blocks(rows: int, owners: int) -> int:
    """Programs for so many query rows, of which each head or group owns its share."""
    return cdiv(rows // owners, launch.block_q(rows // owners)) * owners
