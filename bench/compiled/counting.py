"""Every load and store of the kernels that run in Triton's interpreter, counted byte by byte.

    with counting() as seen:
        lrattn.decode_attention(..., backend="triton")
    seen.reads(k_cache)        # how often each element was read, in the shape of k_cache
    seen.rows()                # bytes by kernel and argument

For tensors on a CPU the interpreter hands kernels the tensors' own addresses, so every access has its place in the
storage of an argument; one that has none is an error. All loads end in `create_masked_load`, all stores in
`create_masked_store`, the others in two atomics: those are what is watched.

What runs is the kernel's source. A GPU may ask for less (lanes that meet in a line of L1 or L2) or for more (spills,
loads that a compiler repeats): neither is seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

SECTOR = 32  # bytes that DRAM moves at once
NOBODY = 0


class Access(NamedTuple):
    """Who asked for bytes, and what for."""

    kernel: str
    name: str  # of the argument
    kind: str  # "reads" | "writes"
    itemsize: int


class Region:
    """The storage of some tensors, and how often an access began at each of its bytes."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage  # held, so that its addresses stay its own
        self.begin, self.size = storage.data_ptr(), storage.nbytes()
        self.starts: dict[Access, NDArray[np.int32]] = {}
        self.written = np.zeros(self.size, bool)
        self.early: dict[Access, int] = {}  # reads of numbers that no kernel had written

    def count(self, access: Access, offsets: NDArray[np.int64]) -> None:
        if access not in self.starts:
            self.starts[access] = np.zeros(self.size, np.int32)
        np.add.at(self.starts[access], offsets, np.int32(1))
        if access.kind == "writes":
            self.written[offsets] = True
        else:
            self.early[access] = self.early.get(access, 0) + int((~self.written[offsets]).sum())

    def counts(self, kind: str, kernel: str | None = None, name: str | None = None) -> NDArray[np.int64]:
        """How often each byte was read or written."""
        total = np.zeros(self.size, np.int64)
        for access, starts in self.starts.items():
            if access.kind == kind and kernel in (None, access.kernel) and name in (None, access.name):
                for i in range(access.itemsize):
                    total[i:] += starts[: self.size - i]
        return total


class Launch:
    """A kernel that is running: its arguments, and whose each byte of their storages is."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor], regions: dict[int, Region]) -> None:
        self.kernel, self.tensors, self.names = kernel, tensors, ["", *tensors]
        self.owners: dict[Region, NDArray[np.uint8]] = {}
        for name, x in reversed(tensors.items()):  # of two that share bytes the first owns them
            storage = x.untyped_storage()
            region = regions.setdefault(storage.data_ptr(), Region(storage))
            owner = self.owners.setdefault(region, np.full(region.size, NOBODY, np.uint8))
            each(x, owner, itemsize=x.element_size())[...] = self.names.index(name)

    def region_of(self, address: int) -> Region | None:
        return next((r for r in self.owners if r.begin <= address < r.begin + r.size), None)

    def outside(self, address: int, what: str, program: tuple[int, ...]) -> IndexError:
        """The error of an access that belongs to no argument; names the argument that lies next to it."""

        def distance(x: Tensor) -> int:
            first = x.data_ptr()
            last = first + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) * x.element_size()
            return max(first - address, address - last, 0)

        name = min((n for n, x in self.tensors.items() if x.numel()), key=lambda n: distance(self.tensors[n]))
        x = self.tensors[name]
        return IndexError(
            f"{self.kernel}, program {program}: {what} of no argument, "
            f"nearest is {name} {list(x.shape)}, {distance(x)} bytes away"
        )


class Traffic:
    """What kernels asked of memory."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self.running: Launch | None = None

    def reads(self, x: Tensor, kernel: str | None = None) -> NDArray[np.int64]:
        """How often each element of x was read, by all kernels or by one: an array of x's shape."""
        return self._elements(x, "reads", kernel)

    def writes(self, x: Tensor, kernel: str | None = None) -> NDArray[np.int64]:
        return self._elements(x, "writes", kernel)

    def sectors(self, x: Tensor) -> int:
        """How many sectors hold an element of x that was read."""
        region = self.regions.get(x.untyped_storage().data_ptr())
        if region is None:
            return 0
        read = np.zeros(region.size, np.int64)
        each(x, read)[...] = self.reads(x)
        return sectors(read)

    def rows(self) -> list[dict[str, Any]]:
        """By kernel, argument and kind: bytes that its lanes asked for, and bytes of the sectors they lie in."""
        found: dict[tuple[str, str, str], NDArray[np.int64]] = {}
        for region in self.regions.values():
            for kernel, name, kind in dict.fromkeys(access[:3] for access in region.starts):
                counts = region.counts(kind, kernel, name)
                both = np.array([counts.sum(), SECTOR * sectors(counts)])
                found[kernel, name, kind] = found.get((kernel, name, kind), 0) + both
        return [
            {"kernel": kernel, "argument": name, "kind": kind, "requested": int(both[0]), "unique": int(both[1])}
            for (kernel, name, kind), both in found.items()
        ]

    def early(self) -> list[tuple[str, str]]:
        """Kernels and arguments that were read before they were written, of all that the kernels write to."""
        regions = [r for r in self.regions.values() if r.written.any()]
        return [(access.kernel, access.name) for r in regions for access, n in r.early.items() if n]

    def _elements(self, x: Tensor, kind: str, kernel: str | None) -> NDArray[np.int64]:
        region = self.regions.get(x.untyped_storage().data_ptr())
        return np.zeros(x.shape, np.int64) if region is None else each(x, region.counts(kind, kernel))

    def launch(self, executor: GridExecutor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        named = ((n, getattr(given[n], "base", given[n])) for n in executor.arg_names if n in given)
        tensors = {n: x for n, x in named if isinstance(x, Tensor)}  # base: of a tensor descriptor
        for name, x in tensors.items():
            if x.device.type != "cpu":
                raise ValueError(f"{name}: expected a tensor on the CPU, got one on {x.device}, which would be copied")
        self.running = Launch(executor.fn.__name__, tensors, self.regions)

    def access(self, kind: str, pointers: Any, mask: Any, program: tuple[int, ...]) -> None:
        """Counts one load or store of a tile. Masked lanes ask for nothing."""
        launch = self.running
        assert launch is not None
        itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        at = at.reshape(-1)
        while at.size:
            region = launch.region_of(int(at[0]))
            if region is None:
                raise launch.outside(int(at[0]), f"{kind} {itemsize} bytes", program)
            offsets = at - np.uint64(region.begin)  # below the beginning it wraps to a large number
            inside = offsets < region.size
            offsets = offsets[inside].astype(np.int64)
            owner = launch.owners[region][offsets]
            for index in np.flatnonzero(np.bincount(owner)):
                some = offsets[owner == index]
                if index == NOBODY:
                    raise launch.outside(region.begin + int(some[0]), f"{kind} {itemsize} bytes", program)
                region.count(Access(launch.kernel, launch.names[index], kind, itemsize), some)
            at = at[~inside]


def each(x: Tensor, array: NDArray[Any], itemsize: int = 0) -> NDArray[Any]:
    """The bytes of x's storage in x's shape: the first byte of every element, or `itemsize` of them on a last axis."""
    size, first = x.element_size(), x.storage_offset() * x.element_size()
    strides = [s * size for s in x.stride()]
    tail = ([itemsize], [1]) if itemsize else ([], [])
    return as_strided(
        array[first:],
        [*x.shape, *tail[0]],
        [s * array.itemsize for s in strides + tail[1]],
    )


def sectors(counts: NDArray[np.int64]) -> int:
    """How many sectors hold a byte that was asked for. counts: of all bytes of a storage."""
    return int(np.logical_or.reduceat(counts > 0, np.arange(0, len(counts), SECTOR)).sum()) if len(counts) else 0


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts the kernels run inside. Needs Triton's interpreter and tensors on the CPU.

    Raises: what the interpreter makes of an IndexError naming kernel, program and the nearest argument, where an
        unmasked lane leaves all arguments.
    """
    seen = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    swap, modify = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw
    call = GridExecutor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        seen.access("reads", pointers, mask, self.grid_idx)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        seen.access("writes", pointers, mask, self.grid_idx)
        return store(self, pointers, value, mask, *rest, **named)

    def counted_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        for kind in ("reads", "writes"):
            seen.access(kind, pointers, None, self.grid_idx)
        return swap(self, pointers, *rest)

    def counted_modify(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for kind in ("reads", "writes"):
            seen.access(kind, pointers, mask, self.grid_idx)
        return modify(self, operation, pointers, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.launch(self, args, kwargs)
        return call(self, *args, **kwargs)

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        patch.object(InterpreterBuilder, "create_atomic_cas", counted_swap),
        patch.object(InterpreterBuilder, "create_atomic_rmw", counted_modify),
        patch.object(GridExecutor, "__call__", counted_call),
    ):
        yield seen
