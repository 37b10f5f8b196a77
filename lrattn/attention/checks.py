"""What the public ops ask of their arguments, by metadata alone: shape, dtype, device, stride, and host numbers."""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lrattn.factors.formats import ALIGNMENT
from lrattn.factors.layer import LayerFactors
from lrattn.factors.shapes import RANK_STEP, check, check_tensors
from lrattn.kernels.arguments import Near

PROJECTIONS = ("latent", "heads", "hidden")
BACKENDS = ("reference", "triton")
MAX_HEAD_DIM = 256  # of the kernels
LARGEST = 2**63 - 1  # integer that an operator takes


def accumulator_types(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float64) if dtype == torch.float64 else (torch.float32,)


def check_caches(layer: LayerFactors, k_cache: Tensor, v_cache: Tensor | None, *, writable: bool = False) -> None:
    dims: dict[str, int] = {}
    kind: dict[str, Any] = {"device": layer.device, "contiguous": True, "writable": writable}
    _check_cache("k_cache", k_cache, layer.k_width, layer.k_dtype, dims, kind)
    if dims["P"] % RANK_STEP or not dims["P"]:
        raise ValueError(f"k_cache: expected a page size that is a multiple of {RANK_STEP}, got {dims['P']}")
    layer.check_presence("v_cache", v_cache)
    if v_cache is not None:
        _check_cache("v_cache", v_cache, layer.v_width, layer.v_dtype, dims, kind)


def _check_cache(
    name: str, cache: Tensor, width: int, dtype: torch.dtype, dims: dict[str, int], kind: dict[str, Any]
) -> None:
    """The dtype before the width: a cache of another format says so."""
    check_tensors(**{name: cache})
    if cache.dtype != dtype:
        what = "uint8 for the layer's packed latents" if dtype == torch.uint8 else f"the layer's dtype {dtype}"
        raise ValueError(f"{name}: expected {what}, got {cache.dtype}")
    check(name, cache, f"N P {width}", dims, **kind)
    begin = 0 if torch.compiler.is_compiling() else cache.storage_offset()  # which dynamo does not trace
    steps = cache.stride()
    if dtype == torch.uint8 and (begin % ALIGNMENT or steps[0] % ALIGNMENT or steps[1] != width):
        raise ValueError(
            f"{name}: expected pages at multiples of {ALIGNMENT} bytes, whose {width} bytes a token lie together, got "
            f"strides {steps} from {begin} on"
        )


def check_tables(
    layer: LayerFactors,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
) -> None:
    """Positions go with keys before RoPE, offsets with keys in chunks: ValueError for those of another form."""
    dims = {"N": k_cache.shape[0], "P": k_cache.shape[1]}
    kind: dict[str, Any] = {"dtype": torch.int32, "device": k_cache.device}
    check("block_table", block_table, "B pages", dims, contiguous=True, **kind)
    check("seq_lens", seq_lens, "B", dims, **kind)
    if seq_starts is not None:
        check("seq_starts", seq_starts, "B", dims, **kind)
    if positions is not None:
        check("positions", positions, "N P", dims, **kind)
    if offsets is not None:
        check("offsets", offsets, "B", dims, **kind)
    if layer.chunk is not None and positions is not None:
        raise ValueError(
            f"positions: expected None for keys in chunks of {layer.chunk}, whose tokens follow one another (offsets "
            "say from where on), got a tensor"
        )
    if layer.rope is not None and layer.chunk is None and offsets is not None:
        raise ValueError("offsets: expected None for keys before RoPE, which go by positions, got a tensor")


def check_near(near: Near, batch: int, dims: dict[str, int], *, writable: bool = False, **kind: Any) -> None:
    """Of any dtype and device, or that of `kind`; for a batch of so many sequences, with letters of `dims`."""
    check_integer("near.sinks", near.sinks, 0)
    check_integer("near.recent", near.recent, 0)
    own = {"contiguous": True, "writable": writable, **kind}
    check("near.keys", near.keys, "n W Hkv D", dims, **own)
    check("near.values", near.values, "n W Hkv D", dims, **own | {"dtype": near.keys.dtype, "device": near.keys.device})
    if near.slots < 0:
        raise ValueError(f"near.keys: expected rows of its sinks={near.sinks} tokens at least, got {dims['W']}")
    for name, x in (("near.rows", near.rows), ("near.firsts", near.firsts)):
        if x is not None:
            check(name, x, "B", {"B": batch}, dtype=torch.int32, device=near.keys.device)
    if near.rows is None and len(near.keys) < batch:
        raise ValueError(f"near.keys: expected those of {batch} sequences (or near.rows), got {len(near.keys)}")


def check_slots(near: Near, num_queries: int, bound: int) -> None:
    """Raises ValueError where a query's recent tokens have lost their places to later ones of the call."""
    needed = min(near.recent + num_queries - 1, bound) if near.recent else 0
    if near.slots < needed:
        raise ValueError(
            f"near.keys: expected at least {needed} slots, for recent={near.recent} of each of {num_queries} queries, "
            f"or max_seq_len, got {near.slots}"
        )


def check_integer(name: str, value: Any, least: int, most: int = LARGEST, *, optional: bool = False) -> None:
    """Raises ValueError for a value that is no integer within its bounds; None is fine where optional."""
    if not (optional and value is None) and not (isinstance(value, int) and least <= value <= most):
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value}")


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Raises ValueError for a value that is no finite number of at least its bound."""
    number: Any = value if isinstance(value, (float, int, Real)) else math.nan  # Real alone is slow to ask
    if not (number >= least and abs(number) <= sys.float_info.max):
        raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")


def check_write(
    layer: LayerFactors, zk: Tensor, zv: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    backend: str | None,
) -> str:  # fmt: skip
    """Holds the tensors of write_latents against each other, by metadata alone. Returns the backend."""
    backend = backend_of(backend, layer)
    check_caches(layer, k_cache, v_cache, writable=True)
    layer.check_presence("zv", zv)
    check_tensors(zk=zk, zv=zk if zv is None else zv, slot_mapping=slot_mapping)
    lead = zk.shape[:-1]
    kind: dict[str, Any] = {"dtype": layer.dtype, "device": k_cache.device, "contiguous": True}
    for name, x, width in (("zk", zk, layer.row_width), ("zv", zv, layer.values.width)):
        if x is None:
            continue
        if not x.dim() or x.shape[-1] != width or x.shape[:-1] != lead:
            raise ValueError(f"{name}: expected shape {[*lead, width]}, got {list(x.shape)}")
        check(name, x.reshape(-1, width), f"n {width}", {}, **kind)
    if slot_mapping.shape != lead or slot_mapping.dtype not in (torch.int32, torch.int64):
        got = f"{list(slot_mapping.shape)} {slot_mapping.dtype}"
        raise ValueError(f"slot_mapping: expected shape {list(lead)}, int32 or int64, got {got}")
    check("slot_mapping", slot_mapping.reshape(-1), "n", {}, device=k_cache.device)
    return backend


def check_decode(
    layer: LayerFactors, q: Tensor, k_cache: Tensor, v_cache: Tensor | None, block_table: Tensor, seq_lens: Tensor,
    positions: Tensor | None, offsets: Tensor | None, seq_starts: Tensor | None, sinks: Tensor | None,
    out: Tensor | None, *rest: Any,
) -> str:  # fmt: skip
    """Holds the tensors of decode_attention against each other, by metadata alone. Returns the backend.

    rest: of near keys, values, rows and firsts, where it is given; sinks and recent, or None; project; backend.
    """
    *held, numbers, project, backend = rest
    backend = backend_of(backend, layer)
    check_caches(layer, k_cache, v_cache)
    check_tables(layer, k_cache, block_table, seq_lens, seq_starts, positions, offsets)
    check_tensors(q=q)
    flat = q.dim() == 3
    q4 = q[:, None] if flat else q
    dims = {"B": block_table.shape[0], "D": layer.head_dim, "Hkv": layer.num_kv_heads}
    check("q", q4, "B S Hq D", dims, dtype=layer.dtype, device=k_cache.device, contiguous=True)
    if not dims["Hq"] or dims["Hq"] % dims["Hkv"]:
        raise ValueError(f"q: expected a multiple of Hkv={dims['Hkv']} query heads, got {dims['Hq']}")
    if sinks is not None:
        check("sinks", sinks, "Hq", dims, dtype=accumulator_types(q.dtype), device=q.device, contiguous=True)
    if held:
        of: dict[str, Any] = {"dtype": layer.dtype, "device": k_cache.device}
        check_near(Near.of_lists(held, numbers), dims["B"], {n: dims[n] for n in ("D", "Hkv")}, **of)
    if project not in PROJECTIONS:
        raise ValueError(f"project: expected one of {PROJECTIONS}, got {project!r}")
    if project == "hidden":
        if layer.wo is None:
            raise ValueError("layer.wo: expected [Hq, D, E] for project='hidden', got None")
        check("layer.wo", layer.wo, "Hq D E", dims)
    dims["Rv"] = max(layer.values.ranks)
    if out is not None:
        axes = {"latent": "Hq Rv", "heads": "Hq D", "hidden": "E"}[project]
        kind: dict[str, Any] = {"dtype": q.dtype, "device": q.device, "contiguous": True, "writable": True}
        check("out", out, f"B {'' if flat else 'S '}{axes}", dims, **kind)
    return backend


def check_kind(near: Any) -> None:
    if not isinstance(near, Near):
        raise ValueError(f"near: expected Near, got {type(near).__name__}")


def backend_of(backend: str | None, layer: LayerFactors) -> str:
    """The backend of a call: what was asked for, or what fits the layer."""
    check_backend(backend)
    if not isinstance(layer, LayerFactors):
        raise ValueError(f"layer: expected LayerFactors, got {type(layer).__name__}")
    return backend_for(backend, layer.dtype, layer.device, layer.head_dim)


def backend_for(
    backend: str | None, dtype: torch.dtype, device: torch.device, head_dim: int, name: str = "layer"
) -> str:
    check_backend(backend)
    fits = dtype != torch.float64 and head_dim <= MAX_HEAD_DIM
    if backend is None:
        return "triton" if device.type == "cuda" and fits else "reference"
    if backend == "triton" and dtype == torch.float64:
        raise ValueError("backend: expected 'reference' for float64 tensors, got 'triton'")
    if backend == "triton" and not fits:
        raise ValueError(f"{name}: expected at most {MAX_HEAD_DIM} dimensions a head, got {head_dim}")
    return backend


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {backend!r}")
