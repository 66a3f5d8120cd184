"""The command line: every flag reaches its key, typos are refused, messages are readable."""

import os

import pytest
import torch.distributed as dist

import main
import main_eval
from utils.config import default_config, dump_config, load_config
from utils.config.cli import build_parser, parse
from utils.config.keys import KEYS, flatten


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
    ("--batch-size", "DATA.BATCH_SIZE", "128", 128),
    ("--data-path", "DATA.DATA_PATH", "some/where", "some/where"),
    ("--dataset", "DATA.DATASET", "cifar10", "CIFAR10"),
    ("--zip", "DATA.ZIP_MODE", None, True),
    ("--cache-mode", "DATA.CACHE_MODE", "full", "full"),
    ("--num-workers", "DATA.NUM_WORKERS", "-1", -1),
    ("--pretrained", "MODEL.PRETRAINED", "w.pth", "w.pth"),
    ("--resume", "MODEL.RESUME", "c.pth", "c.pth"),
    ("--weights-key", "MODEL.WEIGHTS_KEY", "teacher", "teacher"),
    ("--strip-prefix", "MODEL.STRIP_PREFIX", "model.", "model."),
    ("--epochs", "TRAIN.EPOCHS", "50", 50),
    ("--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", "4", 4),
    ("--global-batch", "TRAIN.GLOBAL_BATCH", "1024", 1024),
    ("--time-budget", "TRAIN.TIME_BUDGET", "1h30m", "1h30m"),
    ("--use-checkpoint", "TRAIN.USE_CHECKPOINT", None, True),
    ("--amp", "TRAIN.AMP", "bf16", "bf16"),
    ("--compile", "TRAIN.COMPILE", None, True),
    ("--amp-opt-level", "AMP_OPT_LEVEL", "O1", "O1"),
    ("--seed", "SEED", "0", 0),
    ("--output", "OUTPUT", "out", "out"),
    ("--tag", "TAG", "t", "t"),
    ("--eval", "EVAL_MODE", None, True),
    ("--throughput", "THROUGHPUT_MODE", None, True),
]


@pytest.mark.parametrize(("flag", "key", "word", "value"), CASES)
def test_a_flag_sets_its_key(cfg, flag, key, word, value):
    _, config = parse(["--cfg", cfg, flag, *([] if word is None else [word])])
    values = flatten(config)
    assert values[key] == value
    changed = {name for name, default in flatten(default_config()).items() if values[name] != default}
    assert changed <= {key, "MODEL.NAME", "SEED", *(["TRAIN.AMP"] if flag == "--amp-opt-level" else [])}


def test_all_flags_are_covered_and_explained(capsys):
    assert {(key.flag.split()[0], key.name) for key in KEYS.values() if key.flag} == {case[:2] for case in CASES}
    with pytest.raises(SystemExit) as info:
        build_parser("What it does.").parse_args(["--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text and f"[{key}]" in "".join(text.split()) for flag, key, _, _ in CASES)
    others = ("What it does.", "--cfg", "--opts", "--print-config", "--allow-change", "--weights", "--local_rank")
    assert all(
        part in text for part in (*others, "--local-rank", "CIFAR100", "no|part|full", "--amp off|auto|bf16|fp16")
    )


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


@pytest.mark.parametrize("value", ("-1", "-1e-4", "-.5", "-1.5E+3", "-inf"))
def test_negative_numbers_after_opts_are_values(cfg, capsys, value):
    message = stopped(capsys, "--cfg", cfg, "--opts", "TRAIN.BASE_LR", value, "TRAIN.EPOCHS", "3")
    assert f"TRAIN.BASE_LR is {float(value)}" in message


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


LINES = [line.split(":")[0].strip() for line in dump_config(default_config()).splitlines()]


def printed(capsys, *argv: str) -> str:
    """Parse words with --print-config, which must end with status 0; return what is printed."""
    with pytest.raises(SystemExit) as info:
        parse([*argv, "--print-config"])
    streams = capsys.readouterr()
    assert (info.value.code, streams.err) == (0, "")
    return streams.out


def test_print_config_names_the_source_of_what_is_not_the_default(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("TRAIN: {EPOCHS: 100}\nMODEL: {STRIP_MLP: {LAYERS: [1, 1, 2, 1]}}")
    run = tmp_path / "run.yaml"
    run.write_text("BASE: base.yaml\nMODEL: {NAME: run}\nTRAIN: {EPOCHS: 90}")
    words = ["--opts", "TRAIN.OPTIMIZER.BETAS", "0.9,0.95", "AMP_OPT_LEVEL=O1", "--tag", "t", "--num-workers", "-1"]
    lines = printed(capsys, "--cfg", str(run), *words).splitlines()
    commented = [line.strip() for line in lines if "#" in line]
    assert commented == [
        f"NAME: run  # {run}",
        f"LAYERS: [1, 1, 2, 1]  # {tmp_path / 'base.yaml'}",
        f"EPOCHS: 90  # {run}",
        "BETAS: [0.9, 0.95]  # --opts",
        "AMP: fp16  # AMP_OPT_LEVEL from --opts",
        "AMP_OPT_LEVEL: O1  # --opts",
        "TAG: t  # the command line",
    ]
    assert [line.split(":")[0].strip() for line in lines] == LINES


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--amp-opt-level", "O2", "--zip", "--opts", "AUG.CUTMIX_MINMAX", "0.2,0.4", "AUG.AUTO_AUGMENT", ""],
        [
            "--data-path",
            "a # b: c ü\u2028\x07 - off",
            "--pretrained",
            "two\nlines 'and' \"quotes\"",
            "--tag",
            "ü - off",
        ],
        ["--data-path", "word " * 50, "--tag", "null ", "--opts", "MODEL.NAME", "1e-3"],
    ],
)
def test_what_print_config_prints_is_a_config_file(tmp_path, capsys, words):
    folder = tmp_path / "with\na line # ü"
    folder.mkdir()
    (folder / "run.yaml").write_text("SEED: 3")
    argv = ["--cfg", str(folder / "run.yaml"), *words]
    copy = tmp_path / "copy.yaml"
    text = printed(capsys, *argv)
    copy.write_text(text)
    assert text.count("\n") == len(LINES)
    assert load_config(copy) == parse(argv)[1]


@pytest.mark.parametrize("program", [main.main, main_eval.main])
def test_print_config_starts_nothing(cfg, tmp_path, monkeypatch, capsys, program):
    monkeypatch.chdir(tmp_path)
    program(["--cfg", cfg, "--resume", "nowhere.pth", "--print-config"])  # torch's wrapper returns on exit status 0
    assert ("EVAL_MODE: true" in capsys.readouterr().out) == (program is main_eval.main)
    assert os.listdir() == ["run.yaml"]
    assert not dist.is_initialized()


def test_print_config_refuses_what_a_run_would(cfg, capsys):
    assert "DATA.BATCH_SIZE is 0" in stopped(capsys, "--cfg", cfg, "--print-config", "--batch-size", "0")
