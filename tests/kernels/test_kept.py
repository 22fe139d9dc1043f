"""`refimpl.kernels.kept`: what is kept of a compiled kernel is whole, made by the right compilers,
and written by nobody else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels.kept import FILES, Kept, kept, kernels_folder

CONTENT = b"ptx", b"cubin", b"log"
POSIX = pytest.mark.skipif(os.name != "posix", reason="no owners and permissions as POSIX has them")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of kernels."""
    monkeypatch.setenv("REFIMPL_KERNELS", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def compiled(
    content: tuple[bytes, bytes, bytes] | None = CONTENT,
    enters: str = "all",
    by: str | None = "nvrtc1.2.3",
) -> Kept:
    """The entry of what ``by`` compiles to ``content``; None stands for no compiler, and for a
    content that must not be asked for."""

    def compilers() -> str:
        if by is None:
            raise CouldNotRun("there is no compiler")
        return by

    return kept("one", enters, compilers, lambda: content or pytest.fail("compiled again"))


def contents(found: Kept) -> tuple[bytes, bytes, bytes]:
    return found.ptx.encode(), found.cubin.read_bytes(), found.log.encode()


def test_where_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFIMPL_KERNELS", "here")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert kernels_folder() == Path("here")
    monkeypatch.setenv("REFIMPL_KERNELS", "")
    assert kernels_folder() == Path("there/refimpl/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernels_folder() == Path.home() / ".cache/refimpl/kernels"


def test_what_is_kept_is_read_back(kernels: Path) -> None:
    """Nothing is compiled twice; what enters and who compiles make the entry."""
    first = compiled()
    assert contents(first) == CONTENT
    assert compiled(None) == first
    assert first.cubin.parent.parent == kernels
    assert first.cubin.parent.name.endswith("-nvrtc1.2.3")
    assert compiled((b"other", b"", b""), enters="other").ptx == "other"
    assert compiled((b"newer", b"", b""), by="nvrtc1.2.4").ptx == "newer"
    assert len(list(kernels.iterdir())) == 3


def test_without_a_compiler(kernels: Path) -> None:
    """An entry that others made is taken, the last by its name, if it is whole; else it is said
    that there is no compiler."""
    with pytest.raises(CouldNotRun, match=r"^there is no compiler$"):
        compiled(None, by=None)
    first = compiled()
    newer = compiled((b"newer", b"newer", b""), by="nvrtc1.2.4")
    shutil.copytree(newer.cubin.parent, f"{newer.cubin.parent}.0123456789abcdef.partial")
    assert compiled(None, by=None) == newer
    newer.cubin.write_bytes(b"spoiled")
    assert compiled(None, by=None) == first
    with pytest.raises(CouldNotRun, match=r"^there is no compiler$"):
        compiled(None, enters="other", by=None)


def test_a_folder_of_kernels_moves(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere serves, even one that can't be written to."""
    first = compiled()
    copy = shutil.copytree(kernels, tmp_path / "copy")
    shutil.rmtree(kernels)
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("REFIMPL_KERNELS", str(copy))
    for by in ("nvrtc1.2.3", None):
        found = compiled(None, by=by)
        assert contents(found) == CONTENT
        assert found.cubin == copy / first.cubin.relative_to(kernels)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)


@POSIX
@pytest.mark.parametrize("which", ["..", ".", *FILES])
@pytest.mark.parametrize("by", ["nvrtc1.2.3", None])
def test_what_others_could_have_written_is_refused(
    which: str, by: str | None, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, the entry or a file of it: of another owner, or open to group or others. What
    root owns is taken."""
    path = (compiled().cubin.parent / which).resolve()
    mode = path.stat().st_mode
    for open_to in (0o020, 0o002):
        path.chmod(mode | open_to)
        with pytest.raises(
            CouldNotRun,
            match=rf"^kernels are not loaded from {path}, which can be written by other users: if "
            r"you trust its content, chmod -R go-w$",
        ):
            compiled(None, by=by)
    path.chmod(mode)
    compiled(None, by=by)
    real = Path.stat
    owner = 12345

    def foreign(self: Path, **options: bool) -> os.stat_result:
        status = real(self, **options)
        if self != path:
            return status
        return os.stat_result([owner if i == 4 else x for i, x in enumerate(status)])

    monkeypatch.setattr(Path, "stat", foreign)
    with pytest.raises(
        CouldNotRun,
        match=rf"^kernels are not loaded from {path}, which belongs to user 12345: copy the "
        r"kernels to a folder of your own$",
    ):
        compiled(None, by=by)
    owner = 0
    compiled(None, by=by)


@POSIX
def test_an_entry_reached_by_a_link_is_checked_where_it_is(kernels: Path, tmp_path: Path) -> None:
    folder = compiled().cubin.parent
    real = folder.rename(tmp_path / "real")
    folder.symlink_to(real)
    compiled(None)
    tmp_path.chmod(0o777)
    with pytest.raises(
        CouldNotRun, match=rf"^kernels are not loaded from {tmp_path}, which can be"
    ):
        compiled(None)


@POSIX
def test_nobody_else_may_write_what_is_kept(kernels: Path) -> None:
    """Whatever the umask, so that our own kernels are not refused."""
    before = os.umask(0)
    try:
        folder = compiled().cubin.parent
    finally:
        os.umask(before)
    assert [x.stat().st_mode & 0o022 for x in (kernels, folder, *folder.iterdir())] == [0] * 6
    compiled(None)


@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_entry_is_made_again(name: str, kernels: Path) -> None:
    """A file cut short, changed in one bit, empty or gone."""
    file = compiled().cubin.parent / name
    whole = file.read_bytes()
    for spoiled in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b"", None):
        file.unlink()
        if spoiled is not None:
            file.write_bytes(spoiled)
        assert contents(compiled()) == CONTENT
        assert file.read_bytes() == whole
        assert list(kernels.iterdir()) == [file.parent]


@pytest.mark.parametrize("where", ["a", "a/b"])
def test_a_folder_that_cannot_be_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFIMPL_KERNELS", str(tmp_path / "a" / "b"))
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / where).write_text("a file")
    with pytest.raises(
        CouldNotRun,
        match=r"^compiled kernels are kept in .*/a/b, which cannot be written \(.*\): set "
        r"REFIMPL_KERNELS or XDG_CACHE_HOME to a folder that can$",
    ):
        compiled()
    assert (tmp_path / where).read_text() == "a file"


def test_a_full_disk_leaves_nothing_half_written(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "log":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CouldNotRun, match=r"cannot be written \(No space left on device\)"):
        compiled()
    assert list(kernels.iterdir()) == []
