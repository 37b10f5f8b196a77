"""Files are written whole or not at all, where they are asked for; where none can be, that is found before the work."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lrattn.factors import safefile

save_file = safefile.save_file


def write(path, value=1.0):
    safefile.write(path, "factors", {}, {"x": torch.full((3,), value)})


def held(path):
    return safefile.read(path, "factors")[1]["x"][0].item()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def places(tmp_path):
    """Where no file can be written, by what is wrong."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none" / "f")
    os.mkfifo(tmp_path / "pipe")
    return {
        "a file system without files": Path("/proc/x"),
        "another": Path("/sys/x"),
        "below a file": tmp_path / "file" / "f",
        "a folder": tmp_path / "folder",
        "no such folder": tmp_path / "none" / "f",
        "a name too long": tmp_path / ("n" * 300),
        "links in a circle": tmp_path / "circle",
        "a link to no folder": tmp_path / "nowhere",
        "a pipe": tmp_path / "pipe",
    }


def test_what_cannot_be_written_is_found_before_the_work(places, tmp_path):
    """By check_target, whose error names the argument, as by a write; both leave everything as it was."""
    before = names(tmp_path)
    for what, path in places.items():
        for attempt in (lambda path=path: safefile.check_target("out", path), lambda path=path: write(path)):
            with pytest.raises(OSError, match=r"^(out|factors): expected [^\n]*$"):
                attempt()
                pytest.fail(f"{what} was written")
    for what, kind in (("a folder", IsADirectoryError), ("no such folder", FileNotFoundError)):
        with pytest.raises(kind):
            write(places[what])
    assert names(tmp_path) == before and (tmp_path / "file").read_text() == "a file"
    assert (tmp_path / "circle").is_symlink() and (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="out: expected a file, got /dev/null, which is none"):
        safefile.check_target("out", os.devnull)  # a write that root was let do would take it away
    for wrong in (5, None, True, b"f"):
        with pytest.raises(ValueError, match="out: expected a path, got"):
            safefile.check_target("out", wrong)


def test_a_file_system_that_is_read_only_is_found_by_trying(tmp_path, monkeypatch):
    """Permissions do not tell, to root least of all: a file is really made, and gone again."""
    safefile.check_target("out", tmp_path / "f")
    assert names(tmp_path) == []

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OSError, match=r"^out: expected a place to write to, got .*/f \(Read-only file system\)$"):
        safefile.check_target("out", tmp_path / "f")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_or_a_file_that_may_not_be_written_is_found(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "f")
    (tmp_path / "f").chmod(0o444)
    (tmp_path / "folder").chmod(0o555)
    for path in (tmp_path / "folder" / "f", tmp_path / "f"):
        with pytest.raises(PermissionError, match="out: expected"):
            safefile.check_target("out", path)


def test_a_protected_file_is_not_replaced(tmp_path, monkeypatch):
    write(tmp_path / "f")
    monkeypatch.setattr(safefile.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match=r"factors: expected a file that may be written, got .*/f, which is prot"):
        write(tmp_path / "f", 2.0)
    assert held(tmp_path / "f") == 1 and names(tmp_path) == ["f"]


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """One writes while another is half-way: both come to their end, the file is whole, the last one's."""
    calls = []

    def slow(tensors, path, **header):
        save_file(tensors, path, **header)
        calls.append(Path(path))
        if len(calls) == 1:
            write(tmp_path / "f", 2.0)
            assert held(tmp_path / "f") == 2

    monkeypatch.setattr(safefile, "save_file", slow)
    write(tmp_path / "f", 1.0)
    assert held(tmp_path / "f") == 1 and names(tmp_path) == ["f"] and len(set(calls)) == 2
    assert all(path.parent == tmp_path for path in calls)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write(tmp_path / "f", float(i)), range(8)))
    assert len(calls) == len(set(calls)) == 10 and held(tmp_path / "f") in range(8) and names(tmp_path) == ["f"]


STOPS = [KeyboardInterrupt, MemoryError, OSError("disk full"), SafetensorError("disk full")]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
def test_what_stops_a_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, stop):
    write(tmp_path / "f")

    def half(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise stop

    monkeypatch.setattr(safefile, "save_file", half)
    disk = isinstance(stop, Exception)
    with pytest.raises(OSError if disk else stop, match="disk full" if disk else None):
        write(tmp_path / "f", 2.0)
    assert held(tmp_path / "f") == 1 and names(tmp_path) == ["f"]


def test_a_link_is_followed_and_stays_one(tmp_path):
    """Relative or absolute, to a file, to another link, or to one that is not there yet, in another folder too."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(Path("there") / "f")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    for value, path in enumerate(("link", "second", "link")):
        write(tmp_path / path, value)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
        assert held(tmp_path / "there" / "f") == value and not (tmp_path / "there" / "f").is_symlink()
    assert names(tmp_path) == ["link", "second", "there"] and names(tmp_path / "there") == ["f"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "f"
    write(path)
    path.chmod(mode)
    write(path, 2.0)
    assert held(path) == 2 and path.stat().st_mode & 0o777 == mode
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_a_partial_file_has_the_ending_of_its_target(tmp_path):
    """What draws a plot goes by it; and any name that a file may have can be written."""
    (tmp_path / "link.png").symlink_to(tmp_path / "f")
    with safefile.replacing("plot", tmp_path / "link.png") as partial:
        assert partial.suffix == ".png" and partial.parent == tmp_path
        partial.write_text("drawn")
    assert (tmp_path / "f").read_text() == "drawn" and (tmp_path / "link.png").is_symlink()
    for name in ("n" * 255, "a." + "b" * 253, "é" * 127, " "):
        write(tmp_path / name)
        assert held(tmp_path / name) == 1
