"""Files that appear whole or not at all, and JSON that is read: what stands on the disk after a
failure, what is never replaced, one line per error."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.files import parse_json, read_json, read_text, replacing, replacing_folder, write_json

from support import PACKAGE


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    """While it is written, the old one stands, beside a new one of another name."""
    path = tmp_path / "x"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with replacing(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
            (partial,) = tmp_path.glob("x.*.partial")
            assert partial.read_bytes() == content
        assert path.read_bytes() == content
    assert names(tmp_path) == ["x"]


def test_it_may_stand_elsewhere_until_then(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    with replacing(tmp_path / "x", tmp_path / "unfinished") as file:
        file.write(b"1")
        assert names(tmp_path) == ["unfinished"]
        assert len(names(tmp_path / "unfinished")) == 1
    assert names(tmp_path / "unfinished") == []


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")

    def fail() -> None:
        with replacing(tmp_path / "x") as file:
            file.write(b"new")
            raise error

    def fail_in_a_folder() -> None:
        with replacing_folder(tmp_path / "y") as folder:
            (folder / "z").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"
    with pytest.raises(error):
        fail_in_a_folder()
    assert names(tmp_path) == ["x"]


def test_no_name_is_used_twice(tmp_path: Path) -> None:
    """Two writers of one file do not meet; the last to end is what stands."""
    with replacing(tmp_path / "x") as first, replacing(tmp_path / "x") as second:
        first.write(b"1")
        second.write(b"2")
        assert len(names(tmp_path)) == 2
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_new_file_is_as_readable_as_others(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_json(tmp_path / "x", {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    """No folder, pipe or link, wherever it leads; the line names none of our files."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for name in ("folder", "link", "dangling", "pipe"):
        with pytest.raises(OSError, match="not a regular file") as raised:
            write_json(tmp_path / name, {})
        assert raised.value.filename == str(tmp_path / name)
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    """Where there is nothing or an empty folder; a full one stays as it is."""
    for place in (tmp_path / "new" / "x", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with replacing_folder(place) as folder:
            (folder / "a").touch()
        assert names(place) == ["a"]
    with pytest.raises(OSError, match="not empty"), replacing_folder(tmp_path / "empty") as folder:
        (folder / "b").touch()
    assert names(tmp_path) == ["empty", "new"]
    assert names(tmp_path / "empty") == ["a"]


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"α": [1, 2.5, None, True, "x"], "b": {}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff", "{}".encode("utf-16"), b"[" * 100_000, b"9" * 5000, b"\xef\xbb\xbf{}"],
    ids=["empty", "cut", "no UTF-8", "UTF-16", "deep", "large number", "BOM"],
)
def test_what_is_not_json(text: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "x.json").write_bytes(text)
    for name, shown in ((None, str(path)), ("--tokens x.json", "--tokens x.json")):
        with pytest.raises(CouldNotRun) as raised:
            read_json(path, name)
        assert str(raised.value).startswith(f"{shown} is not JSON: ")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("depth", [64, 65, 900, 10**6])
def test_depth(depth: int) -> None:
    """Newer Pythons read JSON deeper than their own recursion follows; brackets in strings do not
    count."""
    text = b"[" * (depth - 1) + rb'["]]\"[["]' + b"]" * (depth - 1)
    if depth <= 64:
        assert parse_json(text, "x")
        assert parse_json(b'["' + b"[" * 100 + b'"]', "x") == ["[" * 100]
        return
    for brackets in (text, b'{"a":' * depth + b"1" + b"}" * depth):
        with pytest.raises(CouldNotRun, match=r"^x is not JSON: it nests deeper than 64$"):
            parse_json(brackets, "x")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe is not waited for, a device not read, a file that would fill the memory neither."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**33)  # sparse
    descriptors = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (read_json, lambda path: read_text(path, str(path))):
            with pytest.raises(CouldNotRun) as raised:
                read(path)
            assert str(raised.value) == f"{path} can't be read: not a regular file"
    with pytest.raises(CouldNotRun, match=r"at most 25,000,000 bytes, got 8,589,934,592$"):
        read_json(tmp_path / "large")
    with pytest.raises(CouldNotRun, match=r"n can't be read: File name too long"):
        read_json(tmp_path / ("n" * 300))
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_is_written_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it has its name, the name before the block ends."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert (tmp_path / "x").exists() == (len(synced) == 2)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "x", {})
    assert len(synced) == 2
    assert synced[0].endswith(".partial")
    assert synced[1] == tmp_path.name


def test_a_key_given_twice() -> None:
    """At any depth: nobody can say which of the two is meant."""
    for text in (b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "c": 2, "a": 3}}]'):
        with pytest.raises(CouldNotRun, match=r'^x: "a" is given twice$'):
            parse_json(text, "x")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "x", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(CouldNotRun) as raised:
            read_json(path)
        assert str(raised.value) == f"{path} can't be read: {why}"


def test_all_that_is_written_goes_through_here() -> None:
    """No other module opens a file to write, but the one of the kernels' cache, which writes into a
    folder of its own, the benchmark's worker, to Linux's own counters in /proc, and what grows by
    lines: the metrics of a run, which a resumed one cuts back, and the logs of a recipe's jobs."""
    writes = re.compile(r"\.write_(text|bytes)\(|open\([^)\n]*[\"'][wxa]b?[\"']|np\.savez?\(")
    allowed = {"files.py", "kernels/kept.py", "bench/cpu/worker.py"}
    allowed |= {"train/save.py", "train/graph.py"}
    found = {
        path.relative_to(PACKAGE).as_posix(): line.strip()
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line) and "os.devnull" not in line
    }
    assert found.keys() <= allowed, found
    assert found.keys() == allowed
