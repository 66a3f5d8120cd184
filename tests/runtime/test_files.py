"""Files that are replaced as a whole, what is left after an error, and file systems that cannot do everything."""

import errno
import os
import stat
from pathlib import Path

import pytest

from utils.runtime import atomic_file, free_bytes, link_or_copy, write_text_atomic
from utils.runtime.files import try_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_is_there_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def write_and_fail(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        raise ValueError("inside")


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="inside"):
        write_and_fail(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_leftover_of_the_same_process_does_no_harm(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.txt") as temporary:
        name = temporary
    name.write_text("left by a crash")
    with atomic_file(tmp_path / "a.txt") as temporary:
        assert not temporary.exists()
        temporary.touch()
    assert names(tmp_path) == ["a.txt"]


def test_text_names_its_file_in_errors(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    with pytest.raises(OSError, match=r"nowhere/a\.txt"):
        write_text_atomic(tmp_path / "nowhere" / "a.txt", "x")


def no_folder_flush(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def no_link(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("number", (errno.EINVAL, errno.EBADF, errno.ENOTSUP), ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch, caplog, number: int) -> None:
    """CIFS and FUSE: the file is written, and one warning says what a power cut may cost."""
    no_folder_flush(monkeypatch, number)
    for text in ("a", "b"):
        write_text_atomic(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text() == "b"
    [record] = caplog.records
    assert f"{tmp_path} cannot flush a folder to disk" in record.message
    assert "power cut" in record.message


def test_a_failing_disk_is_an_error(tmp_path: Path, monkeypatch, caplog) -> None:
    no_folder_flush(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_text_atomic(tmp_path / "a.txt", "a")
    assert caplog.records == []


@pytest.mark.parametrize("number", (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP), ids=errno.errorcode.get)
def test_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch, number: int) -> None:
    no_link(monkeypatch, number)
    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


def test_a_link_on_a_failing_disk_is_an_error(tmp_path: Path, monkeypatch) -> None:
    no_link(monkeypatch, errno.EIO)
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match="Input/output error"):
        link_or_copy(tmp_path / "a", tmp_path / "b")


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch) -> None:
    try_folder(tmp_path)
    no_link(monkeypatch, errno.EINVAL)
    try_folder(tmp_path)
    assert names(tmp_path) == []
    no_link(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        try_folder(tmp_path)
    assert names(tmp_path) == []


def test_free_space_is_unknown_where_the_file_system_does_not_tell(tmp_path: Path, monkeypatch) -> None:
    assert free_bytes(tmp_path) > 0
    assert free_bytes(tmp_path / "nowhere") is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 0, "free": 0}))
    assert free_bytes(tmp_path) is None
