"""One safetensors file with a versioned, hashed header: read whole and right, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 7


def write(path: str | os.PathLike[str], kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes beside `path` and renames, see `replacing`.

    Raises: OSError if the file cannot be written; ValueError for what is no path.
    """
    own: dict[str, Tensor] = {}
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        alone = x.untyped_storage().nbytes() == x.nbytes and all(x.data_ptr() != y.data_ptr() for y in own.values())
        own[name] = x if alone else x.clone()  # the format has no views; what is no view is not copied
    text = json.dumps(record, sort_keys=True)
    header = {"format": f"lrattn.{kind}", "version": str(VERSION), "record": text, "sha256": _digest(text, own)}
    with replacing(kind, path) as partial:
        try:
            save_file(own, partial, metadata=header)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error


@contextmanager
def replacing(name: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside, a file to write; at the end it takes the place of the one at `path`, or is gone where that fails.

    A reader meets the old file or the new one, whole, and writers do not meet. What a symbolic link leads to is
    replaced, not the link. A file that is replaced keeps its permissions, a new one has those of any other.

    Raises: as `check_target`.
    """
    with _partial(name, path) as (partial, target):
        mode = (target if target.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(stat.S_IMODE(mode))  # whatever made the file anew: save_file makes a private one
        os.replace(partial, target)


def check_target(name: str, path: str | os.PathLike[str]) -> None:
    """Tries to write beside `path`, before long work and not after it; nothing is left there.

    Raises: OSError, which says so of `name`, if no file can be written there; ValueError for what is no path.
    """
    with _partial(name, path):
        pass


@contextmanager
def _partial(name: str, path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """An empty file of this call's own, gone at the end, and beside it the file that `path` leads to."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name}: expected a path, got {path!r}")
    path = Path(path)
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    partial = target.parent / f"{target.stem[:32]}.{uuid4().hex}.partial{path.suffix[:16]}"  # plots go by the suffix
    try:
        _check_kind(name, target)
        partial.touch(exist_ok=False)
        yield partial, target
    except OSError as error:
        if error.errno is None:  # it says what of
            raise
        raise type(error)(f"{name}: expected a place to write to, got {path} ({error.strerror})") from error
    finally:
        with suppress(OSError):  # where none could be made there is none
            partial.unlink()


def _check_kind(name: str, target: Path) -> None:
    """Raises OSError if what is at `target` is nothing that another file may take the place of."""
    if target.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got the folder {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected an existing folder, got {target.parent}")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise OSError(f"{name}: expected a file, got {target}, which is none")  # a circle of links, a device, a pipe
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{name}: expected a file that may be written, got {target}, which is protected")


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """The record, the tensors, on the CPU, and the version that was written.

    Raises: FileNotFoundError; ValueError if the file is damaged, truncated, foreign, of another kind or newer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(path, kind, header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got a damaged or foreign one ({error})"
        ) from error
    text = header.get("record", "")
    if header.get("sha256") != _digest(text, tensors):
        raise ValueError(f"{path}: damaged: the contents do not match the sha256 in the header")
    return json.loads(text), tensors, int(header["version"])


def _check_header(path: Path, kind: str, header: Mapping[str, str]) -> None:
    if header.get("format") != f"lrattn.{kind}":
        raise ValueError(f"{path}: expected a file of format 'lrattn.{kind}', got {header.get('format')!r}")
    version = header.get("version", "")
    if not version.isdigit() or int(version) < 1:
        raise ValueError(f"{path}: damaged: version is {version!r}")
    if int(version) > VERSION:
        raise ValueError(f"{path}: expected version {VERSION} or older, got {version}; a newer lrattn wrote this file")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
