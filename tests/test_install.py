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

import lrattn

ROOT = Path(lrattn.__file__).parents[1]
sys.path.append(str(ROOT / "locks"))
import install  # noqa: E402
import versions  # noqa: E402

CUDA = ["filelock", "nvidia-cublas==13.1; platform_system == 'Linux'", "triton==3.9.0; platform_system == 'Linux'"]
CPU = ["filelock", "networkx", "nvidia-cublas; extra == 'test'"]
LOCKS = sorted({lock for lock, _ in versions.ENVIRONMENTS.values()})


def asked():
    """What pyproject.toml asks for, optional or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *chain(*project["optional-dependencies"].values())]


def commands_of(monkeypatch, needs, gpu, instead=()):
    """The commands that install locks/main.txt where torch has these needs; requirement files as their lines."""
    commands, metadata = [], {"name": "torch", "requires_dist": needs}

    def run(command, **_):
        lists = "-c" not in command
        commands.append([Path(w).read_text().splitlines() if lists and w.endswith(".txt") else w for w in command])
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps({"install": [{"metadata": metadata}]}))

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.shutil, "which", lambda name: gpu)
    install.install(ROOT / "locks" / "main.txt", instead)
    return commands


@pytest.mark.parametrize(
    ("needs", "gpu", "by_uv"), [(CUDA, None, True), (CUDA, "/usr/bin/nvidia-smi", False), (CPU, None, False)]
)
def test_the_cpu_build_is_taken_only_instead_of_a_cuda_build_without_a_gpu(monkeypatch, needs, gpu, by_uv):
    *_, torch, rest, own = commands_of(monkeypatch, needs, gpu)
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


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_one_version_of_everything_asked_for(name):
    lines = install.pinned(ROOT / "locks" / name)
    assert all(re.match(r"[a-z0-9._-]+==[^ ]+( ; .*)?$", line) for line in lines)
    of_lock, of_project = ({re.match(r"[a-z0-9-]+", line)[0] for line in found} for found in (lines, asked()))
    assert of_project - {"lrattn"} <= of_lock
    plain = [line.split("==")[0] for line in lines if ";" not in line]
    assert len(plain) == len(set(plain))


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
    env = {**os.environ, **names, "PATH": f"{make.parent}:{os.environ['PATH']}"}

    def run(words):
        done = subprocess.run(words.split(), cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(file):
        (tmp_path / file).write_text("more")
        run("git add -A")
        run(f"git commit -qm {file}")
        return run("git rev-parse HEAD")

    run("git init -q")
    base = commit("lrattn/code.py")
    assert run("bash .ci/run").endswith("make test-all")  # no origin
    assert run(f"bash .ci/run {base}").endswith("make test-all")  # itself: nothing is known
    commit("docs/page.md")
    said = run(f"bash .ci/run {base}")
    assert said.endswith("make test") and "they do not run" in said
    run(f"git update-ref refs/remotes/origin/main {base}")
    assert run("bash .ci/run").endswith("make test")
    commit("lrattn/other.py")
    assert run("bash .ci/run").endswith("make test-all")
