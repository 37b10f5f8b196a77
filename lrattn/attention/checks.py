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


def check_integer(name: str, value: Any, least: int, most: int = LARGEST, *, optional: bool = False) -> None:
    """Raises ValueError for a value that is no integer within its bounds; None is fine where optional."""
    if not (optional and value is None) and not (isinstance(value, int) and least <= value <= most):
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value}")


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Raises ValueError for a value that is no finite number of at least its bound."""
    number: Any = value if isinstance(value, (float, int, Real)) else math.nan  # Real alone is slow to ask
    if not (number >= least and abs(number) <= sys.float_info.max):
        raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")
