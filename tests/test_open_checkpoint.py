"""A checkpoint is enough: opening it, predicting with it, evaluating it without its config file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import main_eval
from inference import load_predictor, open_checkpoint
from tests.images import picture, write_splits
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint
from utils.errors import CheckpointError, ImageReadError


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyRun) -> Path:
    return tiny.train("--epochs", 1, "--opts", "DATA.VAL_CACHE", tiny.folder / "cache") / "checkpoint_last.pth"


@pytest.fixture(scope="module")
def bare(tiny: TinyRun, checkpoint: Path) -> Path:
    torch.save({"model": load_checkpoint(checkpoint)["model"], "config": "x"}, tiny.folder / "bare.pth")
    return tiny.folder / "bare.pth"


def test_a_checkpoint_says_all_that_is_needed(checkpoint):
    opened = open_checkpoint(checkpoint)
    assert opened.classes == ("cat", "dog", "emu")
    assert opened.preprocessing["img_size"] == 32
    assert not opened.model.training
    assert opened.config.MODEL.NAME == "tiny"
    assert opened.metadata["progress"]["epoch"] == 1


def test_places_of_that_run_are_not_taken(checkpoint):
    config = open_checkpoint(checkpoint).config
    assert (config.DATA.DATA_PATH, config.DATA.VAL_CACHE, config.OUTPUT) == ("", "", "")
    assert open_checkpoint(checkpoint, opts=["DATA.DATA_PATH=/data"]).config.DATA.DATA_PATH == "/data"


def test_a_file_without_configuration_needs_one(tiny, bare):
    with pytest.raises(CheckpointError, match=r"bare.pth holds weights, but not the configuration.*--cfg configs/"):
        open_checkpoint(bare)
    opened = open_checkpoint(bare, tiny.cfg)
    assert (opened.classes, opened.names) == ((), ("class 0", "class 1", "class 2"))


def test_main_eval_takes_the_checkpoint_alone(tiny, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main_eval.main([str(checkpoint), "--data-path", str(tiny.data)])
    alone = json.loads((tmp_path / "output/tiny/default/eval.json").read_text())
    named = tiny.evaluate(checkpoint)
    assert {key: alone[key] for key in ("acc1", "loss", "num_samples")} == {
        key: named[key] for key in ("acc1", "loss", "num_samples")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    (
        ((), "name a CHECKPOINT, or a config file with --cfg"),
        (("--resume", "a.pth"), "name it without --resume"),
        (("{checkpoint}", "--resume", "a.pth"), "name one file to evaluate"),
        (("{bare}",), "--cfg configs/"),
        (("/no/such.pth",), "does not exist"),
        (("{checkpoint}", "--opts", "DATA.IMG_SIZE", "33"), "not a multiple of"),
    ),
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_mistakes_end_with_status_2(words, message, checkpoint, bare, capsys):
    with pytest.raises(SystemExit) as stopped:
        main_eval.main([word.format(checkpoint=checkpoint, bare=bare) for word in words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_paths_pictures_and_tensors_give_the_same_prediction(tiny, checkpoint, tmp_path):
    predict = load_predictor(checkpoint, top_k=2)
    image = picture(7)
    image.save(tmp_path / "a.png")
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    several = predict([tmp_path / "a.png", image, tensor, image.convert("RGBA")])
    assert len({(p.names, p.indices) for p in several}) == 1
    assert all(p.probabilities == pytest.approx(several[0].probabilities, rel=1e-5) for p in several)
    assert [p.source for p in several] == [str(tmp_path / "a.png"), "image 1", "image 2", "image 3"]
    assert len(several[0].names) == 2
    assert predict(image)[0].names == several[0].names
    assert sum(load_predictor(checkpoint)(image)[0].probabilities) == pytest.approx(1.0)


def test_predictions_are_those_of_evaluation(tiny, checkpoint):
    predict = load_predictor(checkpoint, top_k=1)
    paths = sorted((tiny.data / "val").rglob("*.jpg"))
    hits = sum(p.names[0] == Path(p.source).parent.name for p in predict(paths))
    assert tiny.evaluate(checkpoint)["acc1"] == pytest.approx(100 * hits / len(paths))


def test_normalised_tensors_are_taken_as_they_are(checkpoint):
    opened = open_checkpoint(checkpoint)
    images = torch.randn(3, 3, 32, 32)
    found = load_predictor(checkpoint, top_k=3)(images)
    with torch.inference_mode():
        expected = opened.model(images).softmax(1)
    for row, prediction in zip(expected, found, strict=True):
        torch.testing.assert_close(row[list(prediction.indices)], torch.tensor(prediction.probabilities))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    (
        ("/no/such.png", ImageReadError, "/no/such.png"),
        (3, TypeError, "a int is not a path"),
        (torch.zeros(3, 5, 5), ValueError, r"preprocessed float image \[3, 32, 32\]"),
        (Image.new("F", (4, 4)), ImageReadError, "image 0"),
    ),
    ids=str,
)
def test_what_is_not_an_image(image, error, message, checkpoint):
    with pytest.raises(error, match=message):
        load_predictor(checkpoint)([image])


def test_timm_models_are_opened_alike(tmp_path):
    run = TinyRun(tmp_path)
    run.data = write_splits(tmp_path / "timm", train=8, val=1)
    folder = run.train("--epochs", 1, "--opts", "MODEL.TYPE=timm", "MODEL.TIMM_NAME=test_resnet")
    assert len(load_predictor(folder / "checkpoint_last.pth")(picture(1))[0].names) == 3


def test_workers_of_a_larger_machine_are_not_taken(checkpoint, monkeypatch):
    stored = inference.stored_config(checkpoint).replace("NUM_WORKERS: 0", "NUM_WORKERS: 1000")
    assert inference.checkpoint_config(checkpoint).DATA.NUM_WORKERS == 0
    monkeypatch.setattr(inference, "stored_config", lambda _source: stored)
    assert inference.checkpoint_config(checkpoint).DATA.NUM_WORKERS == -1
    assert inference.checkpoint_config(checkpoint, opts=["DATA.NUM_WORKERS=99"]).DATA.NUM_WORKERS == 99
