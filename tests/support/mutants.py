"""Copies of the kernels with one fault each, in the place of the real ones for one test."""

import importlib
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import lrattn.kernels
from lrattn.attention import operators

KERNELS = Path(lrattn.kernels.__file__).parent


class Mutant(NamedTuple):
    """A fault: in `file`, `old` becomes `new`. killer: the name of what sees it."""

    file: str
    old: str
    new: str
    killer: str

    def __str__(self):
        return f"{self.file}: {self.old} -> {self.new}"


def copy_with(mutant, folder):
    """The kernels with the fault in, or with none, as files of their own."""
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path = folder / mutant.file
        text = path.read_text()
        assert mutant.old in text, f"{mutant.file} no longer holds {mutant.old!r}"
        path.write_text(text.replace(mutant.old, mutant.new))


@pytest.fixture
def swap(monkeypatch, tmp_path, request):
    """Makes `lrattn.kernels` a copy with a fault, for one test."""
    if request.config.getoption("--gpu"):
        pytest.skip("faults are shown in the interpreter")

    for path in KERNELS.glob("[!_]*.py"):  # so that all of them are put back
        importlib.import_module(f"lrattn.kernels.{path.stem}")

    def use(mutant):
        copy_with(mutant, tmp_path / "kernels")
        for name in [n for n in sys.modules if n.startswith("lrattn.kernels.")]:
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(lrattn.kernels, name.rpartition(".")[2])
        monkeypatch.setattr(lrattn.kernels, "__path__", [str(tmp_path / "kernels")])
        monkeypatch.setattr(operators, "_kernels", operators._kernels.__wrapped__)

    return use
