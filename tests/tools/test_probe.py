"""k-NN and logistic regression on frozen features."""

import numpy as np
import pytest
import timm
import torch

from models import build_model
from tools import probe
from tools.classifiers import draw, knn, logistic
from tools.common import run_tool
from utils.checkpoint.files import load_checkpoint


def run(*words: object) -> int:
    return run_tool(probe.command, [str(word) for word in words])


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features in three directions, and their labels."""
    labels = np.repeat(np.arange(3), count)
    noise = np.random.RandomState(seed).normal(size=(len(labels), 8)).astype(np.float32)
    return 4 * np.eye(8, dtype=np.float32)[labels] + noise, labels


def test_a_checkpoint_is_enough_and_features_are_kept(tiny, checkpoint, tmp_path, capsys, monkeypatch):
    words = (checkpoint, "--data-path", tiny.data, "--cache", tmp_path / "cache", "--shots", 2, "--seeds", 2)
    assert run(*words) == 0
    first = capsys.readouterr().out
    assert "64 features, 3 classes" in first
    assert first.count("logistic regression") == 2
    assert " ± " in first
    assert len(list((tmp_path / "cache").iterdir())) == 2  # of training and of validation images
    monkeypatch.setattr(probe, "build_features", None)
    assert run(*words) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(TypeError):
        run(*words, "--weights", "model")  # other weights have features of their own
    with pytest.raises(TypeError):
        run(*words, "--opts", "TEST.CROP", "False", "DATA.IMG_SIZE", 64)  # so has another preprocessing


def test_features_are_what_the_classifier_gets(tiny, checkpoint, tmp_path):
    run(checkpoint, "--data-path", tiny.data, "--cache", tmp_path)
    config = probe.checkpoint_config(checkpoint, overrides={"DATA.DATA_PATH": tiny.data})
    loader = probe.build_val_loader(config, device="cpu", of_train=True)
    file = probe.cache_file(tmp_path, config, None, loader)
    model = build_model(config).eval()
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    transform = probe.build_batch_transform(config, is_train=False, device="cpu")
    with torch.no_grad():
        images = torch.cat([transform(*batch)[0] for batch in loader])
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(torch.from_numpy(np.load(file)), expected, rtol=1e-4, atol=1e-5)


def test_models_of_timm_and_files_without_a_configuration(tiny, tmp_path, capsys):
    torch.save(timm.create_model("test_convnext", num_classes=7).state_dict(), tmp_path / "weights.pth")
    words = (tmp_path / "weights.pth", "--data-path", tiny.data, "--cache", tmp_path / "cache")
    assert run(*words) == 2
    assert "Name the config file of its model, such as --cfg" in capsys.readouterr().err
    timm_model = ("MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "test_convnext", "MODEL.NUM_CLASSES", 7)
    assert run(*words, "--cfg", tiny.cfg, "--opts", *timm_model) == 0
    assert "64 features, 3 classes" in capsys.readouterr().out


def test_more_shots_than_images(tiny, checkpoint, tmp_path, capsys):
    assert run(checkpoint, "--data-path", tiny.data, "--cache", tmp_path, "--shots", 9) == 2
    assert "error: --shots 9: the smallest class has 8 training images" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), (("--shots", 0), ("--shots", -1), ("--seeds", 0)))
def test_numbers_that_make_no_draw(tiny, checkpoint, capsys, flag, value):
    with pytest.raises(SystemExit):
        run(checkpoint, "--data-path", tiny.data, flag, value)
    assert f"argument {flag}" in capsys.readouterr().err


def test_both_classifiers_learn_what_is_easy():
    train, labels = clusters(20, seed=0)
    test, expected = clusters(10, seed=1)
    for predicted in (*knn(train, labels, test).values(), logistic(train, labels, test, 0)[1]):
        assert (predicted == expected).mean() > 0.9
    assert logistic(train[::20], labels[::20], test, 0)[0] == 1.0  # one image a class: nothing to choose C on


def test_neighbours_vote_by_similarity():
    angles = np.array([0.0, 0.5, 0.6, 0.7])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([0, 1, 1, 1])
    weights = np.exp(np.cos(angles - 0.1) / 0.07)
    near = np.array([[2 * np.cos(0.1), 2 * np.sin(0.1)]], dtype=np.float32)  # lengths do not count
    expected = int(weights[1:].sum() > weights[0])
    assert knn(train, labels, near)["k-NN, k 4"].tolist() == [expected] == [0]
    assert knn(train, labels, train[1:2])["k-NN, k 4"].tolist() == [1]


def test_few_images_are_drawn_by_the_seed():
    labels = np.repeat([0, 1], (5, 7))
    drawn = draw(labels, 3, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [3, 3]
    assert draw(labels, 3, seed=0).tolist() == drawn.tolist() != draw(labels, 3, seed=1).tolist()
