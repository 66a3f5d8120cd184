"""tools/check_data.py: finds what training could not read, writes the list, tells by its exit code."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import picture, write_splits

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_data.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_data_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the worker processes find its functions
    spec.loader.exec_module(module)
    return module


def test_good_folder(tool, tmp_path, capsys):
    write_splits(tmp_path / "set")
    output = tmp_path / "bad.txt"
    assert tool.main([str(tmp_path / "set"), "--output", str(output), "--workers", "2"]) == 0
    assert output.read_text() == ""
    assert "24 images: 0 bad, 0 suspicious" in capsys.readouterr().out


def test_bad_files_are_listed_with_the_reason(tool, tmp_path, capsys):
    folder = write_splits(tmp_path / "set")
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")
    (folder / "val" / "dog" / "1.jpg").write_text("<html>")
    (folder / "val" / "dog" / "notes.txt").write_text("not an image, and not named like one")
    with open(folder / "train" / "emu" / "2.jpg", "r+b") as file:
        file.truncate(700)
    (folder / "train" / "emu" / "link.jpg").symlink_to("nowhere.jpg")
    output = tmp_path / "bad.txt"
    assert tool.main([str(folder), "--output", str(output), "--workers", "2"]) == 1
    listed = dict(line.split("\t") for line in output.read_text().splitlines())
    names = {str(Path(path).relative_to(folder)): reason for path, reason in listed.items()}
    assert set(names) == {"train/cat/0.jpg", "train/emu/2.jpg", "train/emu/link.jpg", "val/dog/1.jpg"}
    assert "empty" in names["train/cat/0.jpg"]
    assert "truncated" in names["train/emu/2.jpg"]
    assert "link to nothing" in names["train/emu/link.jpg"]
    assert "25 images: 4 bad" in capsys.readouterr().out


def test_damaged_but_readable_files_are_suspicious_not_bad(tool, tmp_path, capsys):
    pytest.importorskip("simplejpeg")
    picture(0, (256, 256)).save(tmp_path / "a.jpg", quality=95)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = b"\xff\xd0" + b"\x5a" * 58
    (tmp_path / "a.jpg").write_bytes(bytes(data))
    assert tool.main([str(tmp_path), "--output", str(tmp_path / "bad.txt"), "--workers", "1"]) == 0
    assert "suspicious" in capsys.readouterr().out


def test_nothing_to_check(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path / "absent")]) == 2
    assert "absent is not a folder; name the one" in capsys.readouterr().err
    assert tool.main([str(tmp_path)]) == 2
    assert "no image files" in capsys.readouterr().err
    write_splits(tmp_path / "set")
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "set"), "--output", str(tmp_path / "none" / "x.txt")])
    assert "does not exist; make it first" in capsys.readouterr().err


def test_names_reach_the_terminal_as_escapes(tool, tmp_path, capsys):
    (tmp_path / "\x1b[31m\nred\udcff.png").write_bytes(b"junk")
    assert tool.main([str(tmp_path), "--output", str(tmp_path / "bad.txt"), "--workers", "1"]) == 1
    assert "\\x1b[31m\\nred\\udcff.png: " in capsys.readouterr().out


def test_runs_as_a_program_from_anywhere(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"junk")
    done = subprocess.run([sys.executable, str(TOOL), "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "bad_images.txt").read_text().startswith("./b.png\t")
