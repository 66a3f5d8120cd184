"""Data that break during a run, and evaluation over uneven shares."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.harness import LAST, VAL_IMAGES, assert_same_state

pytestmark = pytest.mark.faults


@pytest.fixture
def images(starter, tmp_path) -> Path:
    """The data set with one training image cut in half."""
    shutil.copytree(starter.folder / "images", tmp_path / "images")
    broken = tmp_path / "images" / "train" / "a" / "003.png"
    os.truncate(broken, broken.stat().st_size // 2)
    return tmp_path / "images"


@pytest.mark.parametrize(("world", "workers"), ((1, 0), (2, 1)))
def test_broken_image(starter, images, tmp_path, world, workers):
    """A truncated training image: the run ends, naming the file, its index and the tool that lists such files."""
    opts = ("--data-path", str(images), f"DATA.NUM_WORKERS={workers}", "TRAIN.DIST_TIMEOUT=1800")
    job = starter.run(*opts, out=tmp_path / "out", world=world, seconds=120)
    job.assert_failed(str(images / "train" / "a" / "003.png"), "index 1", "tools/check_data.py")
    job.assert_no_orphans()
    assert "out of memory" not in job.text()
    assert "lack of memory" not in job.text()


@pytest.mark.parametrize("workers", (0, 1))
def test_image_that_becomes_a_fifo(starter, tmp_path, workers):
    """An image that turns into a FIFO while the run goes on: an error that names it, no waiting."""
    shutil.copytree(starter.folder / "images", tmp_path / "images")
    image = tmp_path / "images" / "train" / "a" / "003.png"
    fault = [("replaced_image", {"index": 1, "path": str(image)})]
    opts = ("--data-path", str(tmp_path / "images"), f"DATA.NUM_WORKERS={workers}")
    job = starter.run(*opts, out=tmp_path / "out", seconds=120, faults=fault)
    job.assert_failed(str(image), "a FIFO")
    job.assert_no_orphans()


def test_skipped_image_and_exact_resume(starter, images, tmp_path):
    """DATA.BAD_IMAGES skip: the run completes, logs the file, and resumes exactly."""
    opts = ("--data-path", str(images), "DATA.BAD_IMAGES=skip", "DATA.NUM_WORKERS=1")
    whole = starter.run(*opts, out=tmp_path / "whole").assert_ok()
    assert str(images / "train" / "a" / "003.png") in whole.text()
    stop = [("send", {"number": signal.SIGTERM, "step": 7})]
    starter.run(*opts, out=tmp_path / "parts", faults=stop).assert_ok("preempted")
    parts = starter.run(*opts, out=tmp_path / "parts").assert_ok()
    assert_same_state(parts.folder / LAST, whole.folder / LAST)


def test_evaluation_over_uneven_shares(starter, reference, tmp_path):
    """21 images over 1, 2 and 3 processes and odd batches: the same exact result."""
    results = []
    for world in (1, 2, 3):
        job = starter.run(
            "--resume",
            str(reference()),
            "TEST.BATCH_SIZE=5",
            "--tag",
            str(world),
            out=tmp_path,
            world=world,
            program="main_eval",
        )
        assert job.codes == [0] * world, job.text()
        results.append(json.loads((job.folder / "eval.json").read_text()))
    assert {result["num_samples"] for result in results} == {VAL_IMAGES}
    assert {result["acc1"] for result in results} == {results[0]["acc1"]}
    assert all(result["loss"] == pytest.approx(results[0]["loss"], abs=1e-2) for result in results)  # bf16
