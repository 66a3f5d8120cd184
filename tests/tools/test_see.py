"""predict, report, compare and seeds on a tiny run, with names that try to become markup."""

import base64
import csv
import hashlib
import html
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.images import picture, write_splits
from tests.tiny_run import TinyRun
from tests.tools.browser import CHROMIUM, Browser
from tools import common, compare, predict, probe, report, seeds, show_batch, visualize
from tools.common import run_tool
from tools.measures import calibration, paired_test, wilson_interval
from tools.predictions import Predictions, read_predictions
from tools.report_parts import class_rows, confused_pairs, confusion_figure
from utils.runtime import printable

NASTY = ('<b>"x"', "$a$\n\x1b[31m", "plain")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("see"))
    run.data = write_splits(run.folder / "nasty", NASTY, train=8, val=3)
    return run


@pytest.fixture(scope="module")
def run(tiny: TinyRun) -> Path:
    return tiny.train("--epochs", 2)


@pytest.fixture(scope="module")
def reported(tiny: TinyRun, run: Path) -> Path:
    assert run_tool(report.command, [str(run / "checkpoint_last.pth"), "--data-path", str(tiny.data)]) == 0
    return run / "report"


def predictions(labels: list[int], best: list[int], classes: int = 3, shares: float = 0.8) -> Predictions:
    top = np.stack([best, (np.array(best) + 1) % classes], axis=1)
    label_share = np.where(top[:, 0] == labels, shares, 1 - shares).astype(np.float32)
    names = np.array([f"c{i}" for i in range(classes)])
    paths = np.array([f"{i}.png" for i in range(len(labels))])
    probabilities = np.tile(np.float32([shares, 1 - shares]), (len(labels), 1))
    return Predictions(paths, np.array(labels), names, top, probabilities, label_share)


def test_predict_lists_names_files_and_what_cannot_be_read(run, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(1).save(folder / "a<b>\n\x1b.png")
    (folder / "bad.png").write_bytes(b"no image")
    outputs = [tmp_path / name for name in ("o.csv", "o.jsonl", "o.png")]
    words = [str(run / "checkpoint_last.pth"), str(folder), "--top", "2", "--csv", outputs[0], "--jsonl", outputs[1]]
    assert run_tool(predict.command, [*map(str, words), "--sheet", str(outputs[2])]) == 1
    shown = capsys.readouterr()
    assert "a<b>\\n\\x1b.png" in shown.out
    assert "\x1b" not in shown.out
    assert "unreadable: " in shown.err
    rows = list(csv.DictReader(outputs[0].open(newline="")))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert rows[0]["class"] in NASTY
    good, bad = map(json.loads, outputs[1].read_text().splitlines())
    assert [one["class"] for one in good["classes"]] == [row["class"] for row in rows]
    assert "known format" in bad["error"]
    assert outputs[2].read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_has_ended_is_no_error(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run_tool(lambda _argv: print("a line", flush=True)) == 1
    assert capsys.readouterr().err == ""


def test_predict_takes_patterns_and_refuses_what_names_nothing(run, tiny, tmp_path, capsys):
    checkpoint = str(run / "checkpoint_last.pth")
    assert run_tool(predict.command, [checkpoint, f"{tiny.data}/val/plain/*.jpg"]) == 0
    assert run_tool(predict.command, [checkpoint, str(tmp_path)]) == 2
    assert "no images in" in capsys.readouterr().err
    assert run_tool(predict.command, [checkpoint, "nothing*"]) == 2
    (tmp_path / "other.pth").write_bytes(b"PK\x03\x04")
    assert run_tool(predict.command, [str(tmp_path / "other.pth"), str(tiny.data)]) == 2


def test_the_report_holds_no_markup_from_names_and_no_links(reported):
    page = (reported / "report.html").read_text()
    assert "<b>&#34;x&#34;" not in page
    assert html.escape('<b>"x"', quote=False)[:9] in page
    assert "\x1b" not in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" in html.unescape(page)
    assert "Wilson" in page
    assert "loss, accuracy and learning rate over the epochs" in page


def test_the_report_agrees_with_evaluation_and_stores_predictions(reported, tiny, run):
    found = read_predictions(reported / "predictions.npz")
    accuracy = tiny.evaluate(run / "checkpoint_last.pth")["acc1"]
    assert 100 * found.correct.mean() == pytest.approx(accuracy)
    assert sorted(found.classes) == sorted(NASTY)
    rows = list(csv.DictReader((reported / "predictions.csv").open(newline="")))
    assert [row["path"] for row in rows] == found.paths.tolist()
    assert rows[0]["path"].startswith("val/")


def test_an_output_folder_that_cannot_be_made(run, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [str(run / "checkpoint_last.pth"), "--data-path", str(tiny.data), "--output", str(tmp_path / "file")]
    assert run_tool(report.command, words) == 2
    assert "name a folder with --output" in capsys.readouterr().err


def test_output_is_refused_before_the_work(run, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    checkpoint, data = str(run / "checkpoint_last.pth"), ["--data-path", str(tiny.data)]
    words = [checkpoint, *data, "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        show_batch.command(words)
    assert "name another file" in capsys.readouterr().err
    assert run_tool(probe.command, [checkpoint, *data, "--cache", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder with --cache" in capsys.readouterr().err
    words = [checkpoint, "--images", str(tmp_path / "none"), "--show", "cam", "--output", str(tmp_path)]
    assert run_tool(visualize.command, words) == 2
    assert "none is not a folder" in capsys.readouterr().err


def test_a_single_class_is_reported_but_not_probed(run, tmp_path, capsys):
    data = write_splits(tmp_path / "one", ("plain",), train=4, val=2)
    words = [str(run / "checkpoint_last.pth"), "--data-path", str(data)]
    assert run_tool(report.command, [*words, "--output", str(tmp_path / "report")]) == 0
    assert run_tool(probe.command, [*words, "--cache", str(tmp_path / "cache")]) == 2
    assert "a single class, 'plain'" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:99"])
def test_a_device_that_is_not_there(run, tiny, device, capsys):
    words = [str(run / "checkpoint_last.pth"), str(tiny.data / "val"), "--device", device]
    assert run_tool(predict.command, words) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: device '{device}' cannot be used: ")
    assert message.count("\n") == 1


def test_long_work_says_that_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(common, "QUIET_SECONDS", 0.01)
    with common.working("compiling"):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("compiling ... 0 s\n")


def test_a_thousand_classes_and_one():
    many = predictions(list(range(1000)), [*range(999), 5], classes=1000)
    assert len(class_rows(many)) == 1000
    assert class_rows(many)[3] == {"name": "c3", "images": 1, "shares": [1.0, 1.0, 1.0]}
    assert all(isinstance(row["images"], int) for row in class_rows(many))
    matrix = np.eye(1000, dtype=int)
    matrix[999, 999], matrix[999, 5] = 0, 1
    assert confused_pairs(matrix, many.classes) == [{"label": "c999", "predicted": "c5", "images": 1, "share": 100.0}]
    assert confusion_figure(matrix, many.classes).startswith(b"\x89PNG")
    assert class_rows(predictions([0, 0], [0, 0], classes=1))[0]["shares"] == [1.0, 1.0, 1.0]
    assert confusion_figure(np.array([[2]]), ["only"]).startswith(b"\x89PNG")


def test_statistics():
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    found = calibration(predictions([0, 1, 2, 0], [0, 1, 2, 1]))  # 75 % right at a confidence of 80 %
    assert found.ece == pytest.approx(0.05, abs=1e-6)
    first, second = (
        np.array([True] * 60 + [False] * 40),
        np.array([True] * 50 + [False] * 10 + [True] * 25 + [False] * 15),
    )
    test = paired_test(first, second)
    assert (test.only_first, test.only_second, test.difference) == (10, 25, pytest.approx(0.15))
    assert test.p_value == pytest.approx(2 * sum(math.comb(35, k) for k in range(11)) / 2**35)
    assert test.interval[0] < 0.15 < test.interval[1]
    assert paired_test(first, first).p_value == 1.0


def test_compare_shows_differences_and_refuses_other_images(reported, run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text().replace("SEED: 0", "SEED: 7")
    (other / "config.yaml").write_text(text)
    words = [str(run), str(other), "--curves", str(tmp_path / "c.png"), "--csv", str(tmp_path / "d.csv")]
    assert run_tool(compare.command, words) == 0
    shown = capsys.readouterr().out
    assert "SEED: 0 | 7" in shown
    assert "McNemar p = 1" in shown
    assert re.search(r"default +[\d.]+ +[\d.]+  [\d.]+ \([\d.]+ to [\d.]+\) of 9 images", shown)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "d.csv").read_text().splitlines() == ["path,label,default,other"]
    (other / "report/predictions.npz").write_bytes(predictions([0, 1], [0, 1]).npz())
    assert run_tool(compare.command, words) == 2
    assert "not evaluated on the same" in capsys.readouterr().err
    (other / "report/predictions.npz").write_bytes(b"x")
    assert run_tool(compare.command, words) == 2
    assert "is not a predictions.npz" in capsys.readouterr().err
    assert run_tool(compare.command, [str(run), str(run)]) == 2


def test_seeds_run_once_each_and_are_summarised(tiny, monkeypatch, capsys):
    def train_here(words, _processes):
        started.append(words[-1])
        from main import main

        main(words)
        return 0

    started: list[str] = []
    monkeypatch.setattr(seeds, "train", train_here)
    words = [*tiny.argv("--epochs", 1, tag="s"), "--seeds", "2"]
    assert seeds.command(words) == 0
    assert seeds.command(words) == 0
    assert started == ["s-seed0", "s-seed1"]
    shown = capsys.readouterr().out
    assert re.search(r"\| tiny \| imagenet \| 2 \| 0, 1 \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|", shown)
    assert "chosen on the set" in shown


def test_seeds_refuses_runs_that_are_not_finished(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "half")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half/metrics.jsonl").write_text(rows[0])
    assert run_tool(seeds.command, ["--runs", str(run), str(tmp_path / "half")]) == 2
    assert "half is not finished" in capsys.readouterr().err
    assert run_tool(seeds.command, ["--runs", str(run)]) == 0
    with pytest.raises(SystemExit):
        seeds.command(["--runs", str(run), "--epochs", "1"])


def test_printable():
    assert printable("a\x1b[31m\n\u202eb é") == "a\\x1b[31m\\n\\u202eb é"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_click_in_a_browser_sorts_the_classes(reported, tmp_path):
    """The page's own script passes its content policy, sorts both ways, and puts what is not defined last."""
    with Browser(reported / "report.html", tmp_path) as page:

        def column(number: int) -> list[str]:
            rows = "[...document.querySelectorAll('.sortable tbody tr')]"
            return page.evaluate(f"{rows}.map((row) => row.cells[{number}].textContent)")

        names, recalls = column(0), column(3)
        page.evaluate(
            "Object.assign(document.querySelector('.sortable td:nth-child(3)'), {textContent: '–'}).dataset.value = ''"
        )
        page.click(".sortable th:nth-child(4) button")
        assert column(3) == sorted(recalls, key=float)
        page.click(".sortable th:nth-child(4) button")
        assert column(3) == sorted(recalls, key=float, reverse=True)
        page.click(".sortable th:nth-child(3) button")
        assert column(2)[-1] == "–"
        page.click(".sortable th:nth-child(3) button")
        assert column(2)[-1] == "–"
        page.click(".sortable th:nth-child(1) button")
        assert sorted(column(0)) == sorted(names) != []
        assert page.evaluate("document.querySelector('.sortable th').ariaSort") == "ascending"
        assert page.complaints == []


def test_titles_of_the_sheet_stand_at_one_height(run, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(predict, "png_bytes", lambda figure: figures.append(figure) or b"")
    for number, size in enumerate([(40, 20), (20, 40)]):
        picture(number, size).save(tmp_path / f"{number}.png")
    words = [str(run / "checkpoint_last.pth"), str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]
    assert run_tool(predict.command, words) == 0
    figures[0].canvas.draw()
    heights = [axes.title.get_window_extent().y0 for axes in figures[0].axes]
    assert heights[0] == pytest.approx(heights[1], abs=1)
