"""Installs what a lock says into the environment that runs this, torch in the build the machine can use.

    python locks/install.py locks/main.txt [--with transformers==5.19.0 ...] [--cpu]

On Linux the common index serves the CUDA build of torch, several gigabytes. pip is asked what it would install; only
if that needs NVIDIA's libraries, and no GPU is here or --cpu is said, does uv fetch PyTorch's CPU build instead.
Everything else comes at exactly the versions of the lock, with what data.txt names, and lrattn itself as this folder,
to be edited.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "locks" / "data.txt"
PIP = [sys.executable, "-m", "pip", "install", "--quiet"]
WITH_TORCH = re.compile(r"(torch|nvidia-|cuda-)")  # these come with the build of torch that is chosen


def pinned(lock: Path) -> list[str]:
    """Its lines, `name==version` and maybe a marker."""
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line]


def install_torch(requirement: str, lock: Path, cpu: bool) -> None:
    """As the lock has it and what it needs, in the index's build or PyTorch's own for CPUs."""
    constraint = ["-c", str(lock)] if requirement in pinned(lock) else []
    if (cpu or shutil.which("nvidia-smi") is None) and wants_cuda(requirement):
        print(f"installing the CPU build of {requirement}{'' if cpu else ': no NVIDIA GPU here'}", flush=True)
        subprocess.run([*PIP, *(line for line in pinned(lock) if line.startswith("uv=="))], check=True)
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu"]
        subprocess.run([*uv, *constraint, requirement], check=True)
    else:
        print(f"installing {requirement}", flush=True)
        subprocess.run([*PIP, *constraint, requirement], check=True)


def wants_cuda(requirement: str) -> bool:
    """Whether the build pip would choose depends on NVIDIA's libraries."""
    question = [*PIP, "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", requirement]
    report = json.loads(subprocess.run(question, check=True, capture_output=True, text=True).stdout)
    needs = [n for package in report["install"] for n in package["metadata"].get("requires_dist", [])]
    return any(n.startswith(("nvidia-", "cuda-")) and "extra ==" not in n for n in needs)


def install(lock: Path, instead: Sequence[str] = (), cpu: bool = False) -> None:
    """instead: `name==version` of packages that come at another version than the lock's. cpu: beside a GPU too."""
    lines = {line.split("==")[0]: line for line in instead}
    if unknown := lines.keys() - {line.split("==")[0] for line in pinned(lock)}:
        raise ValueError(f"--with: expected packages of {lock}, got {sorted(unknown)}")
    chosen = [line for line in pinned(lock) if line.split("==")[0] not in lines] + list(instead)
    install_torch(next(line for line in chosen if line.startswith("torch==")), lock, cpu)
    others = [line for line in chosen if not WITH_TORCH.match(line)] + pinned(DATA)
    print(f"installing {len(others)} packages of {lock.name} and {DATA.name}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(others))
        file.flush()
        subprocess.run([*PIP, "--no-deps", "-r", file.name], check=True)
    subprocess.run([*PIP, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--with", dest="instead", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("--cpu", action="store_true", help="torch's CPU build also where a GPU is")
    args = parser.parse_args()
    install(args.lock, args.instead, args.cpu)
