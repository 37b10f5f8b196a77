"""Valid calls with one thing made wrong: what is refused, and which arguments the error may name.

A fault is (label, arguments that may be named, what the call gets instead).
"""

from dataclasses import replace

import torch

DECODE = {
    "q": "B S Hq D",
    "k_cache": "N P k_width",
    "v_cache": "N P v_width",
    "block_table": "B pages",
    "seq_lens": "B",
    "seq_starts": "B",
    "positions": "N P",
    "offsets": "B",
    "sinks": "Hq",
}
RESULTS = {"heads": "Hq D", "latent": "Hq Rv", "hidden": "E"}
LAST_AXIS_CONTIGUOUS = {"q", "k_cache", "v_cache", "block_table", "sinks", "out"}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def of_decode(call):
    """Faults of a call of decode_attention that gives every tensor, `out` among them."""
    layer, project = call["layer"], call.get("project", "heads")
    flat = call["q"].dim() == 3
    axes = {**DECODE, "out": f"B S {RESULTS[project]}"}
    axes = {name: (spec.replace("S ", "") if flat else spec).split() for name, spec in axes.items()}
    fixed = {"P", "k_width", "v_width", "D", "Rv", "E"} | ({"Hq"} if project == "hidden" else set())
    yield from of_tensors(call, axes, fixed)
    yield from of_presence(call, ("q", "k_cache", "block_table", "seq_lens"), "v_cache")
    yield from of_layer(call)
    for name, bad in NUMBERS.items():
        for value in bad:
            yield f"{name}={str(value)[:20]!r}", {name}, {name: value}
    yield "window_size with causal=False", {"window_size"}, {"window_size": 3, "causal": False}
    yield "hidden without wo", {"layer"}, {"project": "hidden", "layer": replace(layer, wo=None)}
    kv_heads, heads = layer.num_kv_heads, call["q"].shape[-2]
    for wrong in {0, heads + 1} if kv_heads > 1 else {0}:
        q = call["q"].new_zeros(*call["q"].shape[:-2], wrong, layer.head_dim)
        yield f"{wrong} query heads", {"q", "sinks", "out", "layer"}, {"q": q}
    if layer.dtype == torch.float64:
        yield "float64 kernels", {"backend"}, {"backend": "triton"}
    if layer.head_dim > 256:
        yield "wide head kernels", {"layer"}, {"backend": "triton"}


def of_write(call):
    """Faults of a call of write_latents."""
    lead = [f"lead{i}" for i in range(call["slot_mapping"].dim())]
    axes = {
        "zk": [*lead, "row_width"],
        "zv": [*lead, "v_width"],
        "k_cache": ["N", "P", "k_width"],
        "v_cache": ["N", "P", "v_width"],
        "slot_mapping": lead,
    }
    yield from of_tensors(call, axes, {"P", "row_width", "k_width", "v_width"})
    yield from of_presence(call, ("zk", "k_cache", "slot_mapping"), "v_cache", "zv")
    yield from of_layer(call)
    yield from ((f"backend={bad!r}", {"backend"}, {"backend": bad}) for bad in NUMBERS["backend"])
    for name in {"k_cache", "v_cache"} & {n for n, x in call.items() if x is not None}:
        yield from of_memory(name, call[name])


NUMBERS = {
    "softmax_scale": [float("nan"), float("inf"), -float("inf"), "1", 1j, torch.tensor([1.0, 2.0]), 10**400],
    "softcap": [-1.0, float("nan"), float("inf"), None, "1", torch.tensor([1.0, 2.0]), 10**400],
    "causal": [None, "no", 2, torch.tensor([True, False])],
    "max_seq_len": [-1, 2**63, 1.5, "9", float("nan"), torch.tensor([1, 2])],
    "window_size": [0, -1, 2**63, 1.5, "9", float("inf"), [1]],
    "num_splits": [-1, 1025, 2.0, "2", None, 2**70],
    "workspace_limit": [0, -1, 2**63, 1e6, "1", None],
    "project": ["logits", "", None, 3, ["heads"], b"heads"],
    "backend": ["cuda", "Triton", "", 3, ["triton"], b"triton"],
}


def of_tensors(call, axes, fixed):
    """Every given tensor with a wrong rank, size, dtype, device, layout or kind."""
    given = {name: letters for name, letters in axes.items() if call.get(name) is not None}

    def sharing(letter):
        return {name for name, letters in given.items() if letter in letters}

    for name, letters in given.items():
        x = call[name]
        around = {name, "out"} if name == "q" else set().union({name}, *map(sharing, letters))
        around |= {"zk", "zv", "slot_mapping"} & set(axes) if name.startswith("z") else set()
        yield f"{name} with an axis more", around, {name: x[None]}
        if x.dim():
            yield f"{name} with an axis less", around, {name: x.new_zeros(x.shape[1:])}
        for axis, letter in enumerate(letters):
            if letter in fixed or len(sharing(letter)) > 1:
                named = {name, *sharing(letter)} | ({"layer"} if letter == "Hq" else set())  # of layer.wo
                for size in {x.shape[axis] + 1, x.shape[axis] - 1} - {-1}:
                    shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
                    yield f"{name} with {letter}={size}", named, {name: x.new_zeros(shape)}
        wrong = [torch.int16, torch.bool, torch.complex64, *(FLOATS if x.is_floating_point() else [torch.float32])]
        wrong += [] if name == "slot_mapping" else [torch.int64]
        accepted = {x.dtype}
        if name == "sinks" and call["q"].dtype == torch.float64:
            accepted |= {torch.float32, torch.float64}
        for dtype in sorted(set(wrong) - accepted, key=str):
            yield f"{name} of {dtype}", {name}, {name: x.to(dtype)}
        yield f"{name} on meta", {name}, {name: x.to("meta")}
        if name in LAST_AXIS_CONTIGUOUS and x.dim() and x.shape[-1] > 1:
            yield f"{name} with a strided last axis", {name}, {name: torch.stack((x, x), -1)[..., 0]}
        for kind, value in {"a list": x.tolist(), "numpy": x.float().numpy(), "text": "x", "a number": 1.0}.items():
            yield f"{name} as {kind}", {name}, {name: value}
    if call.get("out") is not None:
        yield from of_memory("out", call["out"])


def of_memory(name, x):
    """Buffers some of whose elements share memory."""
    for axis, n in enumerate(x.shape):
        if n > 1 and x.numel():
            yield f"{name} expanded along axis {axis}", {name}, {name: x.narrow(axis, 0, 1).expand(x.shape)}
    strides = [1] * x.dim()
    for axis in range(x.dim() - 2, -1, -1):  # each row begins at the last element of the one before
        strides[axis] = max(strides[axis + 1] * (x.shape[axis + 1] - 1), 1)
    places = torch.arange(x.numel() + x.shape[-1]).as_strided(x.shape, strides)
    if places.unique().numel() < x.numel():  # rows of one element each lie apart
        wide = x.new_zeros(x.numel() + x.shape[-1])
        yield f"{name} overlapping", {name}, {name: wide.as_strided(x.shape, strides)}


def of_presence(call, required, *values):
    for name in required:
        yield f"no {name}", {name}, {name: None}
    for name in values:
        given = call.get(name) is not None
        like = call["k_cache"] if name == "v_cache" else call.get("zk")
        yield f"{name} {'missing' if given else 'extra'}", {name}, {name: None if given else like}


def of_layer(call):
    layer = call["layer"]
    for wrong in (None, "layer", {"keys": layer.keys}):
        yield f"layer={type(wrong).__name__}", {"layer"}, {"layer": wrong}
    for dtype in set(FLOATS) - {layer.dtype}:
        yield f"layer of {dtype}", {"layer", "k_cache", "backend"}, {"layer": layer.to(dtype=dtype)}
    yield "layer on meta", {"layer", "k_cache"}, {"layer": layer.to("meta")}
