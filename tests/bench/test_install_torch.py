"""Which build of torch `make` installs: decided by what pip would choose and by whether there is an NVIDIA GPU."""

import json
import subprocess

import pytest

from bench.support import install_torch

CUDA = ["filelock", "nvidia-cublas==13.1; platform_system == 'Linux'", "triton==3.9.0; platform_system == 'Linux'"]
CPU = ["filelock", "networkx", "nvidia-cublas; extra == 'test'"]


@pytest.mark.parametrize(
    ("needs", "gpu", "by_uv"), [(CUDA, None, True), (CUDA, "/usr/bin/nvidia-smi", False), (CPU, None, False)]
)
def test_the_cpu_build_is_taken_only_instead_of_a_cuda_build_without_a_gpu(monkeypatch, needs, gpu, by_uv):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        report = {"install": [{"metadata": {"name": "torch", "requires_dist": needs}}]}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(report))

    monkeypatch.setattr(install_torch.subprocess, "run", run)
    monkeypatch.setattr(install_torch.shutil, "which", lambda name: gpu)
    install_torch.main("torch==2.13.0")
    assert commands[-1][-1] == "torch==2.13.0"
    assert ("uv" in commands[-1]) is by_uv
    assert not by_uv or commands[-1][-3:-1] == ["--torch-backend", "cpu"]
