"""Installs torch in the build this machine can use: the index's own, or the CPU build where there is no NVIDIA GPU.

On Linux the common index serves the CUDA build, several gigabytes. pip is asked what it would install; only if that
needs NVIDIA's libraries, and no GPU is here, does uv fetch PyTorch's CPU build instead.
"""

import json
import shutil
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "install", "--quiet"]


def wants_cuda(requirement: str) -> bool:
    """Whether the build pip would choose depends on NVIDIA's libraries."""
    question = [*PIP, "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", requirement]
    report = json.loads(subprocess.run(question, check=True, capture_output=True, text=True).stdout)
    needs = [n for package in report["install"] for n in package["metadata"].get("requires_dist", [])]
    return any(n.startswith(("nvidia-", "cuda-")) and "extra ==" not in n for n in needs)


def main(requirement: str) -> None:
    if shutil.which("nvidia-smi") is None and wants_cuda(requirement):
        print(f"no NVIDIA GPU here: installing the CPU build of {requirement}", flush=True)
        subprocess.run([*PIP, "uv"], check=True)
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu"]
        subprocess.run([*uv, requirement], check=True)
    else:
        print(f"installing {requirement}", flush=True)
        subprocess.run([*PIP, requirement], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
