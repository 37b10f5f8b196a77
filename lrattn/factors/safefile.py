"""One safetensors file with a versioned, hashed header: read whole and right, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 2


def write(
    path: str | os.PathLike[str],
    kind: str,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes beside `path` and renames, so that a reader meets the old file or the new one.

    Raises: OSError if the file cannot be written.
    """
    path = Path(path)
    check_target(kind, path)
    own: dict[str, Tensor] = {}
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        alone = x.untyped_storage().nbytes() == x.nbytes and all(x.data_ptr() != y.data_ptr() for y in own.values())
        own[name] = x if alone else x.clone()  # the format has no views; what is no view is not copied
    text = json.dumps(record, sort_keys=True)
    header = {
        "format": f"lrattn.{kind}",
        "version": str(VERSION),
        "record": text,
        "sha256": _digest(text, own),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # the caller's umask; save_file makes a private file
        save_file(own, partial, metadata=header)
        partial.chmod(mode)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def check_target(name: str, path: str | os.PathLike[str]) -> None:
    """Raises OSError, and says so of `name`, if no file can be written at `path`: before long work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected an existing folder, got {path.parent}")


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors, on the CPU.

    Raises: FileNotFoundError; ValueError if the file is damaged, truncated, foreign, of another kind or newer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
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
    return json.loads(text), tensors


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
