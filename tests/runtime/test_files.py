"""Files that are replaced as a whole, and what is left after an error."""

from pathlib import Path

import pytest

from utils.runtime import atomic_file, write_text_atomic


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
