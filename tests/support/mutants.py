"""Copies of the kernels with one fault each, in the place of the real ones for one test."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import lrattn.kernels

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

    def use(mutant):
        copy_with(mutant, tmp_path / "kernels")
        forget()
        monkeypatch.setattr(lrattn.kernels, "__path__", [str(tmp_path / "kernels")])

    def forget():
        for name in modules():
            del sys.modules[name]
            delattr(lrattn.kernels, name.rpartition(".")[2])

    def modules():
        return [n for n in sys.modules if n.startswith("lrattn.kernels.")]

    before = {name: sys.modules[name] for name in modules()}
    yield use
    forget()
    for name, module in before.items():
        sys.modules[name] = module
        setattr(lrattn.kernels, name.rpartition(".")[2], module)
