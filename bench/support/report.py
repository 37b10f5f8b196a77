"""Results: JSON first, with what it was measured on; plots are drawn from the JSON."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lrattn

NONE = "No cells yet."
RESULTS = Path(__file__).parents[1] / "results"


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "lrattn": lrattn.__version__,
        "commit": commit(),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.split("\n")[0].strip() or None


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(path: Path, results: dict[str, Any]) -> None:
    write(path, {"machine": machine(), **results})
    print(f"wrote {path}")


def write(path: Path, results: dict[str, Any]) -> None:
    """The same for results that grow: they come with their machine. Nobody reads half of it.

    Cells are a line each: a change to one is a line of a difference.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(written(results))
    partial.replace(path)


def written(results: Mapping[str, Any]) -> str:
    """JSON, whose "cells", if there are any, are a line each."""
    cells = results.get("cells")
    if not cells:
        return json.dumps(results, indent=1) + "\n"
    mark = "cells to come"
    head, tail = json.dumps({**results, "cells": mark}, indent=1).split(json.dumps(mark))
    lines = ",\n".join(f"  {json.dumps(cell)}" for cell in cells)
    return f"{head}[\n{lines}\n ]{tail}\n"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process that asks for it changes these results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


def marks(source: str) -> re.Pattern[str]:
    """Where a page has what a source makes: <!-- SOURCE: NAME --> .. <!-- end -->; NAME is the second group."""
    return re.compile(rf"(<!-- {re.escape(source)}: ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.S)


def pasted(page: str, marked: re.Pattern[str], made: Mapping[str, str]) -> str:
    """The page with everything between its marks made anew, by name."""
    return marked.sub(lambda m: f"{m[1]}\n{made.get(m[2], NONE)}\n\n{m[4]}", page)


def shown(page: str, source: str, table: str, plot: Path, about: str) -> str:
    """The page with the table and the plot of a source made anew."""
    figure = f"![{about}](../bench/results/{plot.stem}.png)"
    return pasted(page, marks(source), {"table": f"```text\n{table}\n```", "plot": figure})


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def commit() -> str:
    """The commit, with a + if the tree differs from it (results apart).

    Without git or outside a checkout it is what LRATTN_COMMIT says, for a copy of a tree; else empty.
    """
    given = os.environ.get("LRATTN_COMMIT", "")
    if given or shutil.which("git") is None:
        return given

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        return found.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)bench/results") else ""
    )
