"""The Caltech-101 split: deterministic, complete, careful with what exists."""

import random

import pytest

from categories101_train_val_split import list_classes, main, split_classes
from tests.images import write_folder

FILES = {"emu": [f"image_{n:04}.jpg" for n in range(31)], "ant": [f"image_{n:04}.jpg" for n in range(10)]}


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def source(tmp_path):
    root = write_folder(tmp_path / "101_ObjectCategories", ("ant", "emu", "BACKGROUND_Google"), count=6)
    (root / ".cache").mkdir()
    (root / "ant" / "notes.txt").write_text("no image")
    return root


def test_each_class_goes_four_to_one():
    split = split_classes(FILES)
    assert {name: len(files) for name, files in split["train"].items()} == {"ant": 8, "emu": 24}  # int(0.8 * n)
    for name, files in FILES.items():
        assert sorted(split["train"][name] + split["val"][name]) == files


def test_split_does_not_depend_on_the_listing_order():
    shuffled = {name: random.Random(5).sample(files, len(files)) for name, files in reversed(FILES.items())}
    assert split_classes(shuffled) == split_classes(FILES)
    assert split_classes({"emu": FILES["emu"]})["val"]["emu"] == split_classes(FILES)["val"]["emu"]


def test_split_is_the_documented_one():
    names = sorted(FILES["ant"])
    random.Random(1024).shuffle(names)
    assert split_classes(FILES)["train"]["ant"] == sorted(names[:8])
    assert split_classes(FILES, seed=1) != split_classes(FILES)


def test_small_classes_and_ratios_are_refused():
    with pytest.raises(ValueError, match="'lonely' has 1 images"):
        split_classes({"lonely": ["a.jpg"]})
    with pytest.raises(ValueError, match=r"ratio is 1\.0"):
        split_classes(FILES, ratio=1.0)


def test_background_and_hidden_folders_are_not_classes(source):
    assert list(list_classes(source)) == ["ant", "emu"]
    assert "BACKGROUND_Google" in list_classes(source, keep_background=True)
    assert "notes.txt" not in list_classes(source)["ant"]


def test_command_line_copies_and_summarises(source, tmp_path, capsys):
    target = tmp_path / "split"
    assert main(["--source", str(source), "--target", str(target)]) == 0
    out = capsys.readouterr().out
    assert "2 classes, 12 images (seed 1024, ratio 0.8)" in out
    assert "BACKGROUND_Google is not a category" in out
    assert len(files_below(target / "train")) == 8
    assert len(files_below(target / "val")) == 4
    copy = next((target / "val" / "ant").iterdir())
    assert copy.read_bytes() == (source / "ant" / copy.name).read_bytes()
    assert {path.name for path in target.iterdir()} == {"train", "val"}


def test_existing_split_is_kept_without_force(source, tmp_path, capsys):
    command = ["--source", str(source), "--target", str(tmp_path / "split")]
    assert main(command) == 0
    marker = tmp_path / "split" / "train" / "ant" / "precious.txt"
    marker.write_text("mine")
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert marker.exists()
    before = [f for f in files_below(tmp_path / "split") if not f.endswith("precious.txt")]
    assert main([*command, "--force"]) == 0
    assert files_below(tmp_path / "split") == before


def test_symbolic_links(source, tmp_path):
    target = tmp_path / "links"
    assert main(["--source", str(source), "--target", str(target), "--symlink", "--keep-background"]) == 0
    links = list(target.rglob("*.jpg"))
    assert len(links) == 18
    assert all(path.is_symlink() and path.resolve().parent.parent == source for path in links)


def test_interrupted_run_leaves_no_split(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "split"
    assert main(["--source", str(source), "--target", str(target)]) == 0
    before = files_below(target)
    monkeypatch.setattr("shutil.copy2", full)
    assert main(["--source", str(source), "--target", str(target), "--force"]) == 1
    assert [f for f in files_below(target) if ".unfinished" not in f] == before


@pytest.mark.parametrize(("source_name", "message"), (("absent", "is not a folder"), ("empty", "no class folders")))
def test_useless_sources_are_refused(tmp_path, capsys, source_name, message):
    (tmp_path / "empty").mkdir()
    assert main(["--source", str(tmp_path / source_name), "--target", str(tmp_path / "split")]) == 1
    assert message in capsys.readouterr().err


def test_target_inside_the_source_is_refused(source, capsys):
    assert main(["--source", str(source), "--target", str(source / "split")]) == 1
    assert "lies in --source" in capsys.readouterr().err
