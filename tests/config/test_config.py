"""The configuration: defaults, files and their bases, types, all problems at once, and what a run deviates in."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from utils.config import (
    config_notices,
    default_config,
    dump_config,
    load_config,
    parse_config,
    recipe_deviations,
    recipe_differences,
    require_known_key,
    run_folder,
)
from utils.config.keys import flatten


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a config file and returns its path."""

    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def problems_of(path, opts=(), overrides=None) -> list[str]:
    """Load a faulty config and return the lines of its error."""
    with pytest.raises(ValueError, match="in the configuration of") as info:
        load_config(path, opts, overrides)
    return [line.removeprefix("  - ") for line in str(info.value).splitlines()[1:]]


def test_an_empty_file_is_the_default_configuration(write):
    assert load_config(write("")) == default_config()


def test_values_take_the_type_of_their_key(write):
    config = load_config(
        write(
            "TRAIN: {AMP: off, BASE_LR: 1e-3, MIN_LR: 0, CLIP_GRAD: 1, OPTIMIZER: {BETAS: [0.9, 0.95]}}\n"
            "DATA: {CACHE_MODE: no, ZIP_MODE: yes, DATASET: caltech101}\n"
            "MODEL: {NAME: 007, STRIP_MLP: {LAYERS: '(1, 1, 2, 1)'}}\n"
            "AUG: {CUTMIX_MINMAX: [0.2, 0.8], AUTO_AUGMENT: null}\n"
            "TAG: 2026-01-02\n"
        )
    )
    assert (config.TRAIN.AMP, config.DATA.CACHE_MODE, config.DATA.ZIP_MODE) == ("off", "no", True)
    assert (config.TRAIN.BASE_LR, config.TRAIN.MIN_LR, config.TRAIN.CLIP_GRAD) == (1e-3, 0.0, 1.0)
    assert isinstance(config.TRAIN.MIN_LR, float)
    assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.95)
    assert config.MODEL.STRIP_MLP.LAYERS == [1, 1, 2, 1]
    assert config.AUG.CUTMIX_MINMAX == (0.2, 0.8)
    assert (config.MODEL.NAME, config.TAG, config.AUG.AUTO_AUGMENT) == ("007", "2026-01-02", "")


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["TRAIN.EPOCHS", "50"], 50),
        (["TRAIN.EPOCHS=50"], 50),
        (["TRAIN.EPOCHS", "40", "TRAIN.EPOCHS=50"], 50),
    ],
)
def test_opts_as_pairs_or_assignments(write, opts, expected):
    assert load_config(write(""), opts).TRAIN.EPOCHS == expected


def test_precedence(write):
    write("TRAIN: {EPOCHS: 100, WARMUP_EPOCHS: 9}\nMODEL: {ALPHA: 2}", "_base_/first.yaml")
    write("TRAIN: {EPOCHS: 110}\nSEED: 1", "_base_/second.yml")
    path = write("BASE: ['_base_/first.yaml', '_base_/second.yml']\nSEED: 2")
    config = load_config(path)
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.MODEL.ALPHA, config.SEED) == (110, 9, 2, 2)
    assert load_config(path, ["SEED", "3"]).SEED == 3
    assert load_config(path, ["SEED", "3"], {"SEED": 4}).SEED == 4


def test_a_base_is_relative_to_the_file_that_names_it(write):
    write("SEED: 5", "a/b/deep.yaml")
    write("BASE: b/deep.yaml", "a/middle.yaml")
    assert load_config(write("BASE: a/middle.yaml")).SEED == 5


def test_a_dump_of_the_published_code_names_an_empty_base(write):
    assert load_config(write("BASE: ['']\nSEED: 6")).SEED == 6


def test_the_result_is_frozen(write):
    config = load_config(write(""))
    for node, name in ((config, "SEED"), (config.TRAIN.OPTIMIZER, "EPS")):
        with pytest.raises(AttributeError):
            setattr(node, name, 1)


def test_dump_is_complete_and_loads_again(write):
    write("MODEL: {NAME: überall}", "base.yaml")
    path = write("BASE: base.yaml\nTRAIN: {AMP: off}\nAUG: {CUTMIX_MINMAX: [0.1, 0.3]}\nAMP_OPT_LEVEL: O0")
    config = load_config(path, ["TRAIN.BASE_LR", "3e-4"])
    text = dump_config(config)
    copy = load_config(write(text, "copy.yaml"))
    assert copy == config
    assert parse_config(text, "checkpoint") == config
    assert dump_config(copy) == text
    assert set(flatten(copy)) == set(flatten(default_config()))
    assert not any(isinstance(value, tuple) for value in yaml.safe_load(text)["AUG"].values())


def test_all_problems_are_reported_at_once(write):
    path = write(
        "MODEL: {NAEM: x, NUM_CLASSES: -1}\nTRAIN:\n  EPOHCS: 3\n  EPOCHS: 10\nBATCHSIZE: 2\n"
        "DATA: {IMG_SIZE: 100, BATCH_SIZE: 33, DATASET: cifa10}\nBASE: missing.yaml"
    )
    found = problems_of(path, ["TRAIN.AMP", "bf15", "SEED"], {"TRAIN.SAVE_KEEP": "1"})
    expected = [
        ("missing.yaml", "does not exist"),
        ("--opts", "SEED has no value"),
        (str(path), "MODEL.NAEM", "MODEL.NAME?"),
        ("TRAIN.EPOHCS", "TRAIN.EPOCHS?"),
        ("BATCHSIZE", "BATCH_SIZE?"),
        ("cifa10", "known: imagenet", "CIFAR10"),
        ("bf15", "off, auto, bf16, fp16"),
        ("MODEL.NUM_CLASSES is -1", "[0, 100000000]"),
        ("TRAIN.SAVE_KEEP is 1", "[2, inf)"),
        ("DATA.IMG_SIZE is 100", "96 or 128"),
        ("TRAIN.EPOCHS is 10", "TRAIN.WARMUP_EPOCHS, which is 20", str(path)),
        ("DATA.BATCH_SIZE is 33", "even"),
    ]
    for parts in expected:
        assert any(all(part in line for part in parts) for line in found), (parts, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("TRAIN: {EPOCHS: ten}", ["TRAIN.EPOCHS", "'ten' is not a whole number"]),
        ("TRAIN: {EPOCHS: 30.5}", ["not a whole number"]),
        ("TRAIN: {BASE_LR: fast}", ["TRAIN.BASE_LR", "not a number"]),
        ("TRAIN: {BASE_LR: nan}", ["TRAIN.BASE_LR is nan", "(0, 1e30]"]),
        ("TRAIN: {BASE_LR: .inf}", ["not a number"]),
        ("TRAIN: {BASE_LR: 1e-6}", ["TRAIN.MIN_LR", "larger than TRAIN.BASE_LR"]),
        ("TRAIN: {COMPILE: maybe}", ["not true or false"]),
        ("TRAIN: {OPTIMIZER: {BETAS: [0.9]}}", ["1 entries instead of 2"]),
        ("TRAIN: {OPTIMIZER: adamw}", ["TRAIN.OPTIMIZER is a section", "TRAIN.OPTIMIZER.NAME"]),
        ("TRAIN: {START_EPOCH: 3}", ["TRAIN.START_EPOCH is not a key here", "--resume"]),
        ("MODEL: {NAME: {a: b}}", ["MODEL.NAME", "is not text"]),
        ("MODEL: {STRIP_MLP: {LAYERS: 2}}", ["1 entries instead of 4"]),
        ("MODEL: {STRIP_MLP: {EMBED_DIM: 30}}", ["MODEL.STRIP_MLP.EMBED_DIM is 30", "multiple of 8"]),
        ("MODEL: {TYPE: timm}", ["MODEL.TIMM_NAME"]),
        ("MODEL: {RESUME: a.pth, PRETRAINED: b.pth}", ["give one of them"]),
        ("TAG: ../elsewhere", ["TAG is '../elsewhere'", "folder"]),
        ("DATA: {ZIP_MODE: true, DATASET: CIFAR10}", ["DATA.ZIP_MODE", "CIFAR10"]),
        ("DATA: {FAST_RESIZE: true, PIPELINE: reference}", ["DATA.FAST_RESIZE needs DATA.PIPELINE fast", "reference"]),
        (
            "DATA: {FAST_RESIZE: true, INTERPOLATION: lanczos}\nAUG: {AUTO_AUGMENT: none}",
            ["bicubic or bilinear", "lanczos"],
        ),
        ("DATA: {VAL_CACHE: folder, PIPELINE: reference}", ["DATA.VAL_CACHE", "take fast"]),
        ("AUG: {SCALE: [0.9, 0.1]}", ["AUG.SCALE", "larger than the second"]),
        ("AUG: {AUTO_AUGMENT: rand-m9}", []),
        ("DATA: {INTERPOLATION: lanczos}", ["DATA.INTERPOLATION is lanczos", "AUG.AUTO_AUGMENT none"]),
        ("AUG: {AUTO_AUGMENT: randm9}", ["AUG.AUTO_AUGMENT is 'randm9'", "did you mean rand?"]),
        ("AUG: {AUTO_AUGMENT: auto}", ["AUG.AUTO_AUGMENT is 'auto'", "rand"]),
        ("SEED: 1\nSEED: 2", ["given twice: SEED in line 2"]),
        ("- a\n- b", ["sections"]),
        ("TRAIN: [", ["cannot be read as YAML"]),
        ("TRAIN: &a {LR_SCHEDULER: *a}", ["unknown key TRAIN.LR_SCHEDULER.LR_SCHEDULER"]),
    ],
)
def test_one_problem(write, text, parts):
    path = write(text)
    if not parts:
        load_config(path)
        return
    found = problems_of(path)
    assert len(found) == 1
    assert all(part in found[0] for part in parts), found


def test_evaluation_takes_odd_batches(write):
    path = write("DATA: {BATCH_SIZE: 33}")
    assert load_config(path, overrides={"EVAL_MODE": True}).DATA.BATCH_SIZE == 33
    assert load_config(path, overrides={"THROUGHPUT_MODE": True}).DATA.BATCH_SIZE == 33
    assert len(problems_of(path)) == 1


def test_missing_file_names_the_nearest(write):
    write("", "smlp_tiny.yaml")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*smlp_tiny\.yaml\?"):
        load_config(write("", "other.yaml").parent / "smlp_tinny.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "BASE: evil.py",
        "SEED: !!python/object/apply:os.mkdir [CANARY]",
        "SEED: !!python/name:os.system",
    ],
)
def test_a_config_never_runs_python(write, tmp_path, text):
    canary = tmp_path / "canary"
    write(f"import os\nos.mkdir({str(canary)!r})\ncfg = {{}}\n", "evil.py")
    found = problems_of(write(text.replace("CANARY", str(canary))))
    assert "never runs Python" in found[0] or "python/" in found[0]
    assert not canary.exists()
    assert "evil" not in sys.modules


def test_python_as_the_config_itself(write):
    assert "never runs Python" in problems_of(write("raise SystemExit", "evil.py"))[0]


def test_circle_of_bases_names_the_chain(write):
    write("BASE: b.yaml", "a.yaml")
    write("BASE: a.yaml", "b.yaml")
    found = problems_of(write("BASE: a.yaml"))
    assert len(found) == 1
    assert "circle" in found[0]
    assert [found[0].count(name) for name in ("run.yaml ->", "a.yaml ->", "b.yaml ->")] == [1, 1, 1]


def test_deep_chain_of_bases(write):
    for i in range(50):
        write(f"BASE: c{i + 1}.yaml", f"c{i}.yaml")
    found = problems_of(write("BASE: c0.yaml"))
    assert len(found) == 1
    assert "longer than 8 files" in found[0]


@pytest.mark.parametrize("absolute", [True, False])
def test_a_base_outside_the_config_folder_is_refused(write, tmp_path, absolute):
    write("SEED: 1", "outside.yaml")
    name = tmp_path / "outside.yaml" if absolute else "../outside.yaml"
    found = problems_of(write(f"BASE: {name}", "configs/run.yaml"))
    assert "has to lie in" in found[0]


@pytest.mark.parametrize(("level", "amp"), [("O0", "off"), ("o1", "fp16"), ("O2", "fp16")])
def test_amp_opt_level_is_translated(write, level, amp):
    config = load_config(write(""), overrides={"AMP_OPT_LEVEL": level})
    assert config.TRAIN.AMP == amp
    assert any("AMP_OPT_LEVEL" in notice and f"--amp {amp}" in notice for notice in config_notices(config))
    assert parse_config(dump_config(config), "dump") == config


@pytest.mark.parametrize(("level", "amp"), [("O1", "bf16"), ("O1", "off"), ("O0", "bf16")])
def test_amp_opt_level_against_amp(write, level, amp):
    found = problems_of(write(f"AMP_OPT_LEVEL: {level}"), overrides={"TRAIN.AMP": amp})
    assert len(found) == 1
    assert all(part in found[0] for part in (level, amp, "run.yaml", "the command line"))


def test_notices_name_changed_keys_without_effect(write):
    assert config_notices(load_config(write(""))) == []
    config = load_config(write("MODEL: {PATCH_NORM: false, DROP_RATE: 0.5}\nAUG: {COLOR_JITTER: 0.1}"))
    names = [notice.split(" is ")[0] for notice in config_notices(config)]
    assert names == ["MODEL.DROP_RATE", "MODEL.PATCH_NORM", "AUG.COLOR_JITTER"]
    assert config_notices(load_config(write("MODEL: {DROP: true, DROP_RATE: 0.5}"))) == []


def test_the_published_run_deviates_in_nothing(write):
    assert recipe_deviations(default_config()) == {}
    config = load_config(
        write(
            "DATA: {DATASET: CIFAR100, DATA_PATH: d, BATCH_SIZE: 128, NUM_WORKERS: 3, PIPELINE: reference}\n"
            "OUTPUT: o\nTAG: t\n"
            "MODEL: {NAME: n, NUM_CLASSES: 100, STRIP_MLP: {EMBED_DIM: 112, LAYERS: [2, 2, 18, 2]}}\n"
            "TRAIN: {ACCUMULATION_STEPS: 1, SAVE_KEEP: 5, OPTIMIZER: {MOMENTUM: 0.5}}"
        )
    )
    assert recipe_deviations(config) == {}


def test_deviations_are_listed_in_the_order_of_the_tree(write):
    config = load_config(
        write(
            "SEED: 1\nTEST: {CROP: false}\nTRAIN: {BASE_LR: 1e-3, EMA_DECAY: 0.999}\n"
            "MODEL: {NUM_CLASSES: 10, PRETRAINED: w.pth, STRIP_MLP: {EMBED_DIM: 80, LAYERS: [2, 2, 18, 2]}}\n"
            "DATA: {BATCH_SIZE: 32, DATASET: digits}"
        )
    )
    assert recipe_deviations(config) == {
        "DATA.BATCH_SIZE": (64, 32),
        "DATA.DATASET": ("imagenet, imagenet-1k, 101_ObjectCategories, caltech101, CIFAR10, CIFAR100", "digits"),
        "MODEL.PRETRAINED": ("", "w.pth"),
        "MODEL.STRIP_MLP.LAYERS": ("[2, 2, 6, 2] or [2, 2, 12, 2]", [2, 2, 18, 2]),
        "TRAIN.BASE_LR": (5e-4, 1e-3),
        "TRAIN.EMA_DECAY": (0.0, 0.999),
        "TEST.CROP": (True, False),
        "SEED": (0, 1),
    }
    assert list(recipe_deviations(config))[-1] == "SEED"
    assert recipe_deviations(load_config(write("MODEL: {NUM_CLASSES: 37}"))) == {"MODEL.NUM_CLASSES": (1000, 37)}


def test_differences_between_two_runs(write):
    before = load_config(write("TRAIN: {EPOCHS: 100}\nMODEL: {PRETRAINED: w.pth}\nDATA: {DATA_PATH: here}"))
    after = load_config(write("TRAIN: {EPOCHS: 90, ACCUMULATION_STEPS: 1}\nDATA: {PIPELINE: reference}"))
    assert recipe_differences(before, before) == {}
    assert recipe_differences(before, after) == {"DATA.PIPELINE": ("fast", "reference"), "TRAIN.EPOCHS": (100, 90)}


def test_parse_config_names_its_source():
    with pytest.raises(ValueError, match=r"of x\.pth:\n.*no folder\n.*unknown key SEAD; did you mean SEED\?"):
        parse_config("SEAD: 1\nBASE: [a.yaml]", "x.pth")


def test_parse_config_takes_overrides():
    text = dump_config(default_config())
    config = parse_config(text, "x.pth", {"DATA.DATA_PATH": "elsewhere", "SEED": "4"})
    assert (config.DATA.DATA_PATH, config.SEED, config.TRAIN) == ("elsewhere", 4, default_config().TRAIN)
    with pytest.raises(ValueError, match=r"of x\.pth:\n  - the command line: SEED: 'four' is not a whole number"):
        parse_config(text, "x.pth", {"SEED": "four"})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TRAIN.BASE_LRR", "; did you mean TRAIN.BASE_LR?"),
        ("train.base_lr", "; did you mean TRAIN.BASE_LR?"),  # another case
        ("train.optimizer.name", "; did you mean TRAIN.OPTIMIZER.NAME?"),
        ("TEST.EPOCHS", "; did you mean TRAIN.EPOCHS?"),  # another section
        ("BATCH_SIZE", "; did you mean DATA.BATCH_SIZE or TEST.BATCH_SIZE?"),
        ("EVALUATION.HFLIPP", "; did you mean AUG.HFLIP?"),  # both
        ("NOTHING.LIKE_IT", ""),
    ],
)
def test_an_unknown_key_gets_the_nearest_known_one(name, hint):
    require_known_key("TRAIN.BASE_LR")
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} is not a known key{re.escape(hint)}$"):
        require_known_key(name)


def test_run_folder(write):
    config = load_config(write("MODEL: {NAME: n}\nTAG: t"))
    assert run_folder(config) == Path("output/n/t")
    assert run_folder(load_config(write("OUTPUT: /o"))) == Path("/o/strip_mlp/default")
