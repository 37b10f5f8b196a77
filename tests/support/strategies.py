"""Hypothesis strategies: decode problems of every shape and argument that is accepted."""

from cases import Case
from hypothesis import strategies as st

DIMS = [1, 2, 15, 16, 20, 32, 48, 64, 72, 80, 96, 128, 160, 256]
RANKS = [16, 32, 48, 64, 80, 96, 112, 128, 160, 272]
FAR = [-(2**31), 2**31 - 1]
OFFSETS = [0, 0, 1, 37, 64, -5, -100, -8192, 700, -1_000_000, 2**31 - 1]
LONGEST = 300  # tokens
PLAIN = st.just(())  # widths of latents
PACKED = st.lists(st.sampled_from([16, 8, 4, 2]), min_size=1, max_size=9).map(tuple)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def rarely(values):
    """None in most cases, and in the simplest."""
    return st.sampled_from([False] * 3 + [True]).flatmap(lambda given: values if given else st.none())


@st.composite
def ropes(draw, head_dim):
    """None, or the arguments of a Rope by which some dimensions of a head are rotated."""
    if head_dim % 2 or draw(st.sampled_from([False, False, False, True])):
        return None
    rotary = draw(st.sampled_from([head_dim, 2, head_dim // 4 * 2 or 2]))
    halved = rotary % 4 == 0 and draw(st.booleans())
    pairs = rotary // 4 if halved else rotary // 2
    factor, original = draw(st.sampled_from([1.0, 2.0, 8.0])), draw(st.sampled_from([32, 100, 4096]))
    known = {"factor": factor, "original_max_position_embeddings": original}
    stretch = tuple(draw(st.lists(st.floats(1.0, 8.0), min_size=2, max_size=2))[i % 2] for i in range(pairs))
    scaling = draw(
        st.sampled_from(
            [
                None,
                {"rope_type": "linear", "factor": factor},
                {"rope_type": "yarn", **known},
                {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, **known},
                {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **known},
                {"rope_type": "longrope", "long_factor": stretch, "short_factor": stretch[::-1], **known},
            ]
        )
    )
    return {
        "theta": draw(st.sampled_from([1e4, 5e5, 50.0])),
        "dim": rotary,
        "partial_rotary_factor": 0.5 if halved else 1.0,
        "max_position": draw(st.sampled_from([LONGEST, 1024])),
        "scaling": scaling,
        "interleaved": draw(st.booleans()),
        "fp32_angles": draw(st.booleans()),
    }


@st.composite
def layers(draw, heads=8, dims=DIMS, ranks=RANKS, most_heads=16, chunks=(None, None, 64, 192)):
    """The fields of a Case that say what the layer is."""
    kv_heads = draw(st.integers(1, heads))
    values = draw(st.sampled_from(["grouped apart", "grouped as keys", "in the row of keys"]))
    orders = st.none() | st.permutations(range(kv_heads)).map(tuple)
    head_dim = draw(st.sampled_from(dims))
    rank = st.sampled_from(ranks)

    def ranked(groups):
        return tuple(draw(st.lists(rank, min_size=groups, max_size=groups)))

    key_ranks, key_order = ranked(draw(st.sampled_from(divisors(kv_heads)))), draw(orders)
    value_order = key_order
    if values == "in the row of keys":
        riding = draw(st.sampled_from([0, 16, 48]))
        value_ranks = tuple(r + riding for r in key_ranks)
    elif values == "grouped as keys":
        value_ranks = ranked(len(key_ranks))
    else:
        value_ranks, value_order = ranked(draw(st.sampled_from(divisors(kv_heads)))), draw(orders)
    rope = draw(ropes(head_dim))
    return {
        "Hkv": kv_heads,
        "M": draw(st.sampled_from([m for m in (1, 2, 3, 4, 7, 8) if m * kv_heads <= most_heads])),
        "D": head_dim,
        "E": draw(st.sampled_from([1, 24, 40])),
        "key_ranks": key_ranks,
        "value_ranks": value_ranks,
        "key_order": key_order,
        "value_order": value_order,
        "shared": values == "in the row of keys",
        "rope": rope,
        "chunk": rope and draw(st.sampled_from(chunks)),
        "offset": draw(st.booleans()),
        "size": draw(st.sampled_from([1.0] * 7 + [30.0, 1e-3, 0.0])),
    }


@st.composite
def calls(draw, page_size, most_splits):
    """The scalar arguments of decode_attention."""
    choices = {
        "max_seq_len": st.sampled_from([LONGEST, 2 * page_size + 5, page_size, page_size + 3, 2**63 - 1, 0]),
        "softmax_scale": st.sampled_from([1.0, 0.02, -0.3, 0.0]),
        "softcap": st.sampled_from([0.5, 4.0, 50.0]),
        "num_splits": st.sampled_from([n for n in (1, 2, 3, 5, 9, 17, 1024) if n <= most_splits]),
        "workspace_limit": st.sampled_from([1, 10_000, 200_000, 2**63 - 1]),
        "project": st.sampled_from(["heads", "latent", "hidden"]),
    }
    call = {name: value for name, values in choices.items() if (value := draw(rarely(values))) is not None}
    visible = draw(st.sampled_from(["causal", "causal", "window", "all"]))
    if visible == "window":
        call["window_size"] = draw(st.sampled_from([7, 1, 2, 16, 30, 64, 100, 2**31, 2**63 - 1]))
    return call | ({"causal": False} if visible == "all" else {})


@st.composite
def nears(draw, starts):
    """Sizes of a dense window, as a Case has them."""
    recent = draw(st.sampled_from([1, 5, 16, 64, 70, 0, LONGEST, 2**40]))
    sinks, more = draw(st.sampled_from([0, 1, 3, 5, 70])), draw(st.sampled_from([0, 0, 1, 9]))
    return recent, sinks, more, draw(st.booleans()), starts is not None and draw(st.booleans())


@st.composite
def cases(
    draw,
    *,
    longest=LONGEST,
    most_queries=6,
    most_splits=1024,
    widths=PLAIN | PLAIN | PACKED,
    near=(False, False, True),
    **sizes,
):
    """A Case of any shape and any arguments that decode_attention takes."""
    layer = draw(layers(**sizes))
    page_size = draw(st.sampled_from([16, 16, 32, 48, 64, 80, 128]))
    odd = [n for n in (1, 0, 15, 16, 17, 63, 64, 65, 127, 128, 129, page_size - 1, page_size + 1) if n <= longest]
    lengths = [*[st.integers(longest // 4, longest)] * 3, st.sampled_from(odd)]
    pages = draw(rarely(st.sampled_from([longest // page_size, 1, 0])))
    if pages is not None:
        lengths.append(st.sampled_from(FAR))
    lens = tuple(draw(st.lists(st.one_of(lengths), min_size=draw(st.sampled_from([1, 1, 1, 0])), max_size=3)))
    starts = None
    if draw(st.booleans()):
        ends = [min(max(n, 0), longest) for n in lens]
        starts = tuple(
            draw(st.sampled_from([0, 1, n // 4, n // 3, n // 3, n // 2, n // 2, n - 1, -3, n + 7, *FAR])) for n in ends
        )
    offsets = None
    if layer["chunk"] and draw(st.booleans()):
        offsets = tuple(draw(st.sampled_from(OFFSETS)) for _ in lens)
    call = draw(calls(page_size, most_splits))
    fits = draw(st.sampled_from(near)) and call.get("causal", True) and call.get("project") != "latent"
    return Case(
        "drawn",
        near=draw(nears(starts)) if fits else None,
        P=page_size,
        S=draw(st.sampled_from([1, 1, 1, 1, 2, 2, 3, most_queries, 0])),
        lens=lens,
        pages=pages,
        starts=starts,
        positions=draw(st.booleans()) and not layer["chunk"],
        offsets=offsets,
        sinks=draw(st.sampled_from([False, True, "partly"])),
        strided=draw(st.booleans()),
        key_bits=draw(widths),
        value_bits=draw(widths),
        call=call,
        **layer,
    )
