"""What several kernels do with one tile: find its tokens, read its rows, rotate it."""

import triton
import triton.language as tl


@triton.jit
def reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED: tl.constexpr):
    """First token that some query of sequence i_b sees by its latents, and the end of these; 0, 0 where there are none.

    window: as Call.numbers has it. The last query sees the token before the end, and each one before it one less.
    """
    end = tl.minimum(tl.maximum(tl.load(lens + i_b * lens_stride), 0), bound)
    if window[1] is not None:
        end = tl.maximum(end - window[1], 0)
    begin = 0
    if starts is not None:
        begin = tl.maximum(tl.load(starts + i_b * starts_stride), 0)
    if window[2] is not None:
        begin = tl.minimum(begin, end) + window[2]
    if WINDOWED:
        begin = tl.maximum(begin, end - S - window[0] + 1)
    end = tl.where(begin < end, end, 0)
    return tl.minimum(begin, end), end


@triton.jit
def lag_of(offsets, offsets_stride, i_b, BLOCK_T: tl.constexpr):
    """How far the positions of sequence i_b lie behind its tokens, and its shift: where tiles that begin at multiples
    of BLOCK_T in position begin, in -BLOCK_T + 1 .. 0. Both are 0 without offsets."""
    lag, shift = 0, 0
    if offsets is not None:
        lag = tl.load(offsets + i_b * offsets_stride)
        shift = lag % BLOCK_T  # of the sign of lag
        shift = tl.where(shift > 0, shift - BLOCK_T, shift)
    return lag, shift


@triton.jit
def part_of(begin, end, first_tile, tiles, i, n, BLOCK_T: tl.constexpr, shift=0):
    """Tokens [t0, t1) of the i-th of n equal parts of tiles first_tile .. first_tile + tiles; origin: first tile's t.

    Tiles are counted from the one that holds `begin`, and lie on multiples of BLOCK_T from `shift` on.
    """
    origin = ((begin - shift) // BLOCK_T + first_tile) * BLOCK_T + shift
    held = tl.minimum(tl.cdiv(tl.maximum(end - origin, 0), BLOCK_T), tiles)
    return origin, origin + held * i // n * BLOCK_T, tl.minimum(origin + held * (i + 1) // n * BLOCK_T, end)


@triton.jit
def chunk_of(t0, lag, CHUNK: tl.constexpr):
    """Chunk of the position of token t0, and how far behind the chunk's first it lies: negative before position 0."""
    at = t0.to(tl.int64) - lag
    chunk = tl.maximum(at, 0) // CHUNK
    return chunk.to(tl.int32), tl.maximum(at - chunk * CHUNK, -(1 << 31)).to(tl.int32)


@triton.jit
def blocks_of(lens, lens_stride, starts, starts_stride, offsets, offsets_stride, i_b, bound, S, window, first_tile,
              tiles, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """First block of BLOCK positions that tiles first_tile .. first_tile + tiles of sequence i_b are in, how many they
    are in, and the end of their tokens. With BLOCK 0 there is one."""
    first, blocks, t_end = 0, 1, 1
    if BLOCK:
        lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
        begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
        origin, _, t_end = part_of(begin, end, first_tile, tiles, 0, 1, BLOCK_T, shift)
        first, before = chunk_of(origin, lag, BLOCK)
        blocks = tl.where(t_end > origin, tl.maximum(before + t_end - 1 - origin, 0) // BLOCK + 1, 0)
    return first, blocks, t_end


@triton.jit
def slots(pages, t0, t, live, P: tl.constexpr, BLOCK_T: tl.constexpr):
    """Page and offset of the tokens t of the tile from t0 on, int64; pages: one sequence's row of the table.

    Pages that hold whole tiles are looked up once a tile.
    """
    if P % BLOCK_T == 0:
        page = tl.load(pages + t0 // P).to(tl.int64)
    else:
        page = tl.load(pages + t // P, mask=live, other=0).to(tl.int64)
    return page, (t % P).to(tl.int64)


@triton.jit
def tile_pages(pages, t0, begin, t_end, P: tl.constexpr, BLOCK_T: tl.constexpr, offsets=None):
    """Pages of the tile from token t0 on: a number each where they meet its ends, else [BLOCK_T], of each token.

    In the place of those whose tokens are all out of begin .. t_end stand others that are not. pages: one sequence's
    row of the table.
    """
    first, last = begin // P, (t_end - 1) // P
    if offsets is None and P % BLOCK_T == 0:  # of a tile in reach it is
        found = (tl.load(pages + t0 // P),)
    elif offsets is None and BLOCK_T % P == 0:
        found = ()  # type: ignore[assignment]
        for n in tl.static_range(BLOCK_T // P):
            found = found + (tl.load(pages + tl.minimum(tl.maximum(t0 // P + n, first), last)),)  # type: ignore
    else:
        t = t0 + tl.arange(0, BLOCK_T)
        found = (tl.load(pages + tl.minimum(tl.maximum(t // P, first), last)),)
    return found


@triton.jit
def load_run(runs, g):
    """Of group g: first column in a cache row, rank, first row of the basis. All are multiples of 16."""
    column = tl.multiple_of(tl.load(runs + g * 3), 16)
    rank = tl.multiple_of(tl.load(runs + g * 3 + 1), 16)
    return column, rank, tl.multiple_of(tl.load(runs + g * 3 + 2), 16)


@triton.jit
def load_latents(cache, column, rank, live, r):
    """Columns column + r (r < rank) of the rows `cache` points at: [BLOCK_T, len(r)]; dead tokens give zeros where
    `live` is given."""
    mask = (r < rank)[None, :]
    if live is not None:
        mask = live[:, None] & mask
    return tl.load(cache[:, None] + (column + r)[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(rows, width, r0, rank, c, d, D, r):
    """Basis rows r0 + r (r < rank), columns c + d (d < D): [len(r), len(d)]. rows: [sum ranks, width]."""
    return tl.load(
        rows + (r0 + r)[:, None] * width + (c + d)[None, :],
        mask=(r < rank)[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_last",
    )


@triton.jit
def pair_columns(j, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the two dimensions of pairs j lie in a head of D in the model's order. Past D, where 2 j is, they may be
    those of other pairs.

    Dimensions from ROTARY on are not rotated; they make pairs as they come.
    """
    if INTERLEAVED:
        return 2 * j, 2 * j + 1
    if ROTARY == D:
        return j, j + ROTARY // 2  # in runs, which a choice would hide
    return tl.where(j < ROTARY // 2, j, 2 * j), tl.where(j < ROTARY // 2, j + ROTARY // 2, 2 * j + 1)


@triton.jit
def load_turns(turns, at, rows, d, ROTARY: tl.constexpr):
    """cos, sin [len(at), len(d) / 2] of table rows `at` and consecutive dimensions d.

    Pairs that are not rotated get 1, 0; rows outside 0 .. rows give NaN.
    """
    inside = (at >= 0) & (at < rows)
    x = tl.load(
        turns + at.to(tl.int64)[:, None] * ROTARY + d[None, :],
        mask=inside[:, None] & (d < ROTARY)[None, :],
        other=0.0,
        eviction_policy="evict_last",
    )
    cos, sin = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    pair, _ = tl.split(tl.reshape(d, [d.shape[0] // 2, 2]))
    cos = tl.where((pair < ROTARY)[None, :], cos, 1.0)
    return tl.where(inside[:, None], cos, float("nan")), sin


@triton.jit
def load_pairs(q, d, WIDE: tl.constexpr, in_q, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both dimensions of the pairs in dims d .. d + WIDE of the rows that `q` points at: [len(q), WIDE / 2] float32
    each; zeros past D."""
    j = d // 2 + tl.arange(0, WIDE // 2)
    low, high = pair_columns(j, D, ROTARY, INTERLEAVED)
    x_low = tl.load(q[:, None] + low[None, :], mask=in_q[:, None] & (2 * j < D)[None, :], other=0.0)
    x_high = tl.load(q[:, None] + high[None, :], mask=in_q[:, None] & (high < D)[None, :], other=0.0)
    return x_low.to(tl.float32), x_high.to(tl.float32)


@triton.jit
def turned_back(low, high, turns, at, rows, d, WIDE: tl.constexpr, ROTARY: tl.constexpr):
    """Pairs in dims d .. d + WIDE turned back by rows `at` of the table; as they are where `at` is None."""
    if at is not None:
        cos, sin = load_turns(turns, at, rows, d + tl.arange(0, WIDE), ROTARY)
        low, high = low * cos + high * sin, high * cos - low * sin
    return low, high


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap), exact to rounding for small x too."""
    y = x * (1.0 / cap)
    z = y * y
    e = tl.exp(-2.0 * tl.abs(y))
    large = tl.where(y < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    small = y * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
    return cap * tl.where(tl.abs(y) < 0.2, small, large)


@triton.jit
def softmax_step(score, peak, total, AXIS: tl.constexpr):
    """A tile of the online softmax, tokens on AXIS: its weights, and how the sums before it fade.

    peak, total [BLOCK_Q]: the largest score so far and the sum of exp(score - peak); total as the score is, where each
    lane sums its own.
    """
    above = tl.maximum(peak, tl.max(score, AXIS))
    base = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp(score - tl.expand_dims(base, AXIS))
    fade = tl.exp(peak - base)
    if len(total.shape) == 1:
        total = total * fade + tl.sum(p, AXIS)
    else:
        total = total * tl.expand_dims(fade, AXIS) + p
    return p, fade, above, total


@triton.jit
def store_lse(p_lse, peak, total, in_q):
    """log(sum_t exp(score)) of each row; -inf where no token was seen."""
    tl.store(p_lse, tl.where(total != 0, peak + tl.log(total), float("-inf")), mask=in_q)  # a NaN stays one


@triton.jit
def scaled(score, scale, softcap, CAPPED: tl.constexpr):
    """softcap(scale * score)."""
    score *= scale
    if CAPPED:
        score = soft_cap(score, softcap)
    return score


@triton.jit
def seen(t, live, s, begin, end, S, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which tokens t [BLOCK_T] the queries s [BLOCK_Q] see by their latents: [BLOCK_T, BLOCK_Q]."""
    own = end - S + s
    mask = live[:, None] & (s >= 0)[None, :]
    if CAUSAL:
        mask &= t[:, None] <= own[None, :]
    if WINDOWED:
        mask &= t[:, None] > (own - window[0])[None, :]
    return mask
