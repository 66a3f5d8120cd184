"""Training and evaluation from the command line, in this process."""

import json
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

import main
import main_eval
from models import to_published
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint
from utils.config import load_config


@pytest.fixture(scope="module")
def trained(tiny: TinyRun) -> Path:
    """Output folder of a finished run of two epochs."""
    return tiny.train(tag="trained")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def test_a_run_leaves_everything_behind(tiny: TinyRun, trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {
        "checkpoint_last.pth",
        "checkpoint_best.pth",
        "ckpt_epoch_2.pth",
        "checkpoint_step_000000012.pth",
        "config.yaml",
        "deviations.json",
        "metrics.jsonl",
        "curves.png",
        "log_rank0.txt",
        "status.json",
    } <= names
    assert not [name for name in names if "tmp" in name]
    first, second = rows(trained)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["step"] == 12
    for key in (
        "train_loss",
        "grad_norm",
        "lr",
        "val_loss",
        "val_acc1",
        "images_per_second",
        "data_wait",
        "memory_mib",
    ):
        assert isinstance(second[key], float), key
    assert second["val_samples"] == 9
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((trained / "status.json").read_text())["state"] == "completed"
    deviations = json.loads((trained / "deviations.json").read_text())
    assert deviations["TRAIN.BASE_LR"] == {"published": 5e-4, "actual": 1e-3}
    log = (trained / "log_rank0.txt").read_text()
    for word in ("deviations from the published recipe", "images/s", "data_wait", "eta", "learning rate"):
        assert word in log


def test_the_stored_config_repeats_the_run(tiny: TinyRun, trained: Path) -> None:
    stored = load_config(trained / "config.yaml")
    assert stored == load_config(
        tiny.cfg, overrides={"DATA.DATA_PATH": str(tiny.data), "OUTPUT": str(tiny.output), "TAG": "trained"}
    )
    main.main(["--cfg", str(trained / "config.yaml"), "--tag", "again"])
    first, again = weights(trained / "checkpoint_last.pth"), weights(tiny.output / "tiny/again/checkpoint_last.pth")
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_evaluation_reproduces_the_logged_accuracy(tiny: TinyRun, trained: Path) -> None:
    best = max(rows(trained), key=lambda row: row["val_acc1"])
    result = tiny.evaluate(trained / "checkpoint_best.pth")
    assert {"acc1", "acc5", "loss", "num_samples"} <= set(result)
    assert (result["acc1"], result["num_samples"]) == (best["val_acc1"], 9)
    assert result["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert result["acc5"] == 100.0  # three classes


def test_eval_flag_of_main_does_the_same(tiny: TinyRun, trained: Path, capsys: pytest.CaptureFixture) -> None:
    main.main(tiny.argv("--eval", "--resume", trained / "checkpoint_best.pth", tag="flag"))
    assert "top-1" in capsys.readouterr().out
    assert (tiny.output / "tiny/flag/eval.json").exists()


def test_evaluation_without_checkpoint_fails(tiny: TinyRun, trained: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main_eval.main(tiny.argv(tag="trained"))  # the folder has checkpoints: they are not taken
    assert exit_info.value.code == 1
    assert "--resume" in capsys.readouterr().out


def test_evaluation_refuses_other_classes(
    tiny: TinyRun, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = TinyRun(tmp_path)
    (other.data / "train/emu").rename(other.data / "train/owl")
    (other.data / "val/emu").rename(other.data / "val/owl")
    with pytest.raises(SystemExit):
        other.evaluate(trained / "checkpoint_best.pth")
    assert "class 2 is 'emu' there and 'owl' here" in capsys.readouterr().out


def test_throughput_needs_no_data(
    tiny: TinyRun, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_eval, "THROUGHPUT_SECONDS", 0.1)
    main_eval.main(["--cfg", str(tiny.cfg), "--output", str(tiny.output), "--throughput"])
    assert "images/s" in capsys.readouterr().out


def test_extending_a_finished_run_needs_permission(tiny: TinyRun, trained: Path, capsys: pytest.CaptureFixture) -> None:
    resume = ("--resume", trained / "checkpoint_last.pth", "--epochs", 3)
    with pytest.raises(SystemExit):
        tiny.train(*resume, tag="longer")
    assert (
        "TRAIN.EPOCHS: 2 in the checkpoint, 3 now (allow with --allow-change TRAIN.EPOCHS)" in capsys.readouterr().out
    )
    folder = tiny.train(*resume, "--allow-change", "TRAIN.EPOCHS", tag="longer")
    assert [row["epoch"] for row in rows(folder)] == [3]


def test_fine_tuning_replaces_the_head(
    tiny: TinyRun, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = TinyRun(tmp_path)
    for split in ("train", "val"):
        (other.data / split / "fox").mkdir()
        for file in (other.data / split / "cat").iterdir():
            (other.data / split / "fox" / file.name).write_bytes(file.read_bytes())
    source = trained / "checkpoint_last.pth"
    words = (
        "--pretrained",
        source,
        "--epochs",
        1,
        "--opts",
        "MODEL.NUM_CLASSES",
        4,
        "TRAIN.BASE_LR",
        1e-12,
        "TRAIN.MIN_LR",
        0,
        "TRAIN.WARMUP_LR",
        0,
    )
    tuned = weights(other.train(*words) / "checkpoint_last.pth")
    out = capsys.readouterr().out
    assert "2 of another shape" in out
    assert "keeps its fresh values" in out
    source_weights = weights(source)
    assert tuned["head.weight"].shape[0] == 4
    for key, value in source_weights.items():
        if not key.startswith("head.") and "running_" not in key and "num_batches" not in key:
            torch.testing.assert_close(tuned[key], value, rtol=0, atol=1e-9)


def test_published_checkpoint_is_evaluated_and_fine_tuned(tiny: TinyRun, trained: Path, tmp_path: Path) -> None:
    published = tmp_path / "published.pth"
    config = CfgNode({"MODEL": CfgNode({"NAME": "theirs"})})
    renamed = {f"module.{key}": value for key, value in to_published(weights(trained / "checkpoint_best.pth")).items()}
    torch.save(
        {"model": renamed, "optimizer": {}, "lr_scheduler": {}, "max_accuracy": 1.0, "epoch": 3, "config": config},
        published,
    )
    ours, theirs = tiny.evaluate(trained / "checkpoint_best.pth"), tiny.evaluate(published, tag="published")
    assert (ours["acc1"], ours["loss"]) == (theirs["acc1"], theirs["loss"])
    tiny.train("--pretrained", published, "--epochs", 1, tag="tuned")


def test_weights_of_another_architecture_are_refused(
    tiny: TinyRun, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tiny.train(
            "--pretrained", trained / "checkpoint_last.pth", "--opts", "MODEL.STRIP_MLP.EMBED_DIM", 16, tag="other"
        )
    out = capsys.readouterr().out
    assert "of another shape" in out
    assert "does not fit the model" in out
    assert "Traceback" not in out


def test_moving_average_is_ranked_saved_and_selectable(tiny: TinyRun) -> None:
    folder = tiny.train("--opts", "TRAIN.EMA_DECAY", 0.5, tag="ema")
    payload = load_checkpoint(folder / "checkpoint_last.pth")
    assert not torch.equal(payload["ema"]["head.weight"], payload["model"]["head.weight"])
    last = rows(folder)[-1]
    averaged = tiny.evaluate(folder / "checkpoint_last.pth", tag="e1")
    plain = tiny.evaluate(folder / "checkpoint_last.pth", "--weights", "model", tag="e2")
    assert averaged["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert plain["loss"] != averaged["loss"]


@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_mixed_precision(tiny: TinyRun, amp: str) -> None:
    row = rows(tiny.train("--amp", amp, tag=amp))[-1]
    assert 0.0 < row["train_loss"] < 3.0  # ln 3 is chance
    assert row["skipped"] <= 4  # float16 skips while its scale settles: it starts at 65,536 and halves with each


def test_accumulation_equals_a_larger_batch(tiny: TinyRun) -> None:
    """Without BatchNorm and mixup, two batches of four give the update of one batch of eight."""
    model = (
        "MODEL.TYPE",
        "timm",
        "MODEL.TIMM_NAME",
        "test_convnext",
        "AUG.MIXUP",
        0.0,
        "AUG.CUTMIX",
        0.0,
        "MODEL.DROP_PATH_RATE",
        0.0,
        "AUG.REPROB",
        0.0,
    )
    large = tiny.train("--batch-size", 8, "--opts", *model, tag="large")
    small = tiny.train("--batch-size", 4, "--accumulation-steps", 2, "--opts", *model, tag="small")
    assert rows(large)[-1]["step"] == rows(small)[-1]["step"] == 6
    expected, actual = weights(large / "checkpoint_last.pth"), weights(small / "checkpoint_last.pth")
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=2e-4)


def test_incomplete_last_group_is_an_update(tiny: TinyRun) -> None:
    assert rows(tiny.train("--accumulation-steps", 4, tag="groups"))[-1]["step"] == 4  # 6 batches: 4 + 2, two epochs


def test_activation_checkpointing_gives_the_same_weights(tiny: TinyRun, trained: Path) -> None:
    folder = tiny.train("--use-checkpoint", tag="recompute")
    plain, recomputed = weights(trained / "checkpoint_last.pth"), weights(folder / "checkpoint_last.pth")
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_evaluation_interval(tiny: TinyRun) -> None:
    table = rows(tiny.train("--epochs", 3, "--opts", "TEST.INTERVAL", 2, tag="interval"))
    assert ["val_acc1" in row for row in table] == [False, True, True]


def test_data_problems_are_found_before_training(tiny: TinyRun, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        tiny.train("--opts", "MODEL.NUM_CLASSES", 7, tag="classes")
    assert exit_info.value.code == 1
    out = capsys.readouterr().out
    assert "MODEL.NUM_CLASSES" in out
    assert "Traceback" not in out
