"""The command line: every flag reaches its key, typos are refused, messages are readable."""

import pytest

from utils.config import default_config
from utils.config.cli import FLAGS, build_parser, parse
from utils.config.defaults import flatten


@pytest.fixture
def cfg(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("MODEL: {NAME: run}\nSEED: 3\n")
    return str(path)


def stopped(capsys, *argv: str) -> str:
    """Parse words that must be refused with status 2; return the message."""
    with pytest.raises(SystemExit) as info:
        parse(argv)
    assert info.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "Traceback" not in streams.err
    return streams.err


CASES = [
    ("--batch-size", "128", 128),
    ("--data-path", "some/where", "some/where"),
    ("--dataset", "cifar10", "CIFAR10"),
    ("--zip", None, True),
    ("--cache-mode", "full", "full"),
    ("--num-workers", "-1", -1),
    ("--pretrained", "w.pth", "w.pth"),
    ("--resume", "c.pth", "c.pth"),
    ("--epochs", "50", 50),
    ("--accumulation-steps", "4", 4),
    ("--use-checkpoint", None, True),
    ("--amp", "bf16", "bf16"),
    ("--amp-opt-level", "O1", "O1"),
    ("--seed", "0", 0),
    ("--output", "out", "out"),
    ("--tag", "t", "t"),
    ("--eval", None, True),
    ("--throughput", None, True),
]


@pytest.mark.parametrize(("flag", "word", "value"), CASES)
def test_a_flag_sets_its_key(cfg, flag, word, value):
    key = next(row.key for row in FLAGS if row.name == flag)
    _, config = parse(["--cfg", cfg, flag, *([] if word is None else [word])])
    values = flatten(config)
    assert values[key] == value
    changed = {name for name, default in flatten(default_config()).items() if values[name] != default}
    assert changed <= {key, "MODEL.NAME", "SEED", *(["TRAIN.AMP"] if flag == "--amp-opt-level" else [])}


def test_all_flags_are_covered_and_explained(capsys):
    assert {flag for flag, _, _ in CASES} == {row.name for row in FLAGS}
    assert {row.key for row in FLAGS} <= set(flatten(default_config()))
    with pytest.raises(SystemExit) as info:
        build_parser("What it does.").parse_args(["--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert all(row.name in text and f"[{row.key}]" in "".join(text.split()) for row in FLAGS)
    others = ("What it does.", "--cfg", "--opts", "--allow-change", "--weights", "--local_rank", "--local-rank")
    assert all(part in text for part in others)


def test_without_flags_the_file_decides(cfg):
    args, config = parse(["--cfg", cfg])
    assert (config.SEED, config.MODEL.NAME, config.is_frozen()) == (3, "run", True)
    assert (args.cfg, args.opts, args.allow_change, args.weights, args.local_rank) == (cfg, [], [], None, None)


def test_words_of_this_process_are_the_default(cfg, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "--cfg", cfg, "--seed", "8"])
    assert parse()[1].SEED == 8


def test_opts_with_flags_around(cfg):
    words = ["--opts", "TRAIN.BASE_LR", "1e-3", "DATA.NUM_WORKERS=-1", "--seed", "5", "--opts", "SEED", "4"]
    config = parse(["--cfg", cfg, *words])[1]
    assert (config.TRAIN.BASE_LR, config.DATA.NUM_WORKERS, config.SEED) == (1e-3, -1, 5)


@pytest.mark.parametrize("spelling", ["--local_rank", "--local-rank"])
@pytest.mark.parametrize("form", ["{}=1", "{} 1"])
def test_local_rank_in_both_spellings(cfg, spelling, form):
    assert parse([*form.format(spelling).split(), "--cfg", cfg])[0].local_rank == 1


def test_flags_that_are_not_keys(cfg):
    args, _ = parse(["--cfg", cfg, "--allow-change", "TRAIN.EPOCHS", "--allow-change", "SEED", "--weights", "ema"])
    assert (args.allow_change, args.weights) == (["TRAIN.EPOCHS", "SEED"], "ema")


def test_an_evaluation_program_needs_no_eval_flag(cfg):
    _, config = parse(["--cfg", cfg, "--batch-size", "33"], evaluation=True)
    assert (config.EVAL_MODE, config.DATA.BATCH_SIZE) == (True, 33)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch-sze", "64"], ["--batch-sze", "did you mean --batch-size?"]),
        (["--epoch", "64"], ["--epoch", "did you mean --epochs?"]),  # no silent abbreviations
        (["--lokal_rank=1"], ["--lokal_rank=1", "did you mean --local"]),
        (["stray"], ["unknown: stray"]),
        (["--weights", "best"], ["--weights", "model", "ema"]),
        (["--allow-change", "TRAIN.BASELR"], ["TRAIN.BASELR", "did you mean TRAIN.BASE_LR?"]),
        (["--opts", "SEED"], ["SEED has no value"]),
        (["--opts", "TRAIN.EPOHCS", "3"], ["unknown key TRAIN.EPOHCS", "did you mean TRAIN.EPOCHS?"]),
        (
            ["--epochs", "ten", "--batch-size", "0"],
            ["2 problems", "'ten' is not a whole number", "DATA.BATCH_SIZE is 0"],
        ),
        (["--amp-opt-level", "O1", "--amp", "bf16"], ["AMP_OPT_LEVEL is O1", "TRAIN.AMP is bf16"]),
        (["--resume", "a.pth", "--pretrained", "b.pth"], ["--resume", "--pretrained", "give one of them"]),
    ],
)
def test_mistakes_are_named(cfg, capsys, words, parts):
    message = stopped(capsys, "--cfg", cfg, *words)
    assert all(part in message for part in parts), message


def test_the_config_is_required(capsys):
    assert "--cfg" in stopped(capsys, "--seed", "1")


def test_a_missing_config_names_the_nearest(cfg, capsys):
    assert f"did you mean {cfg}?" in stopped(capsys, "--cfg", cfg.replace("run.yaml", "runn.yaml"))
