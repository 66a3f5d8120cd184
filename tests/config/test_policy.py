"""Augmentation policies, paths, names and numbers: what is wrong is refused in words, before anything is built."""

import pytest

from data import check_transform
from utils.config import config_notices, parse_config
from utils.config.loading import load_config

GOOD = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-n3-mstd0.5",
    "rand-mstd1-tweights",
    "rand-m15-mmax20",
    "rand-p0.3",
    "rand",
    "rand-t3a",
    "rand-t3aw-n2",
    "augmix",
    "augmix-m5-w4-d2",
    "augmix-a0.5-b1-mstd1",
    "v0",
    "v0r",
    "original",
    "original-mstd0.5",
    "originalr",
    "3a",
]
BAD = [
    "randaug-m9",
    "3augment",
    "rand-m9-foo3",
    "rand-mnine",
    "rand-n100000",
    "rand-n0",
    "rand-p0",
    "rand-m9.5",
    "rand-m-",
    "rand--m9",
    "rand-m9-m5",
    "rand-m31",
    "rand-tfoo",
    "rand-mstdinf",
    "rand-m9x",
    "rand-inc2",
    "augmix-w0",
    "augmix-n3",
    "original-m9",
    "v1",
    "RAND-m9",
    "m9",
    "-",
    "rand-m٣",
]


def configured(**values):
    return parse_config("", "a test", {name.replace("__", "."): value for name, value in values.items()})


@pytest.mark.parametrize("policy", GOOD)
@pytest.mark.parametrize("pipeline", ["fast", "reference"])
def test_good_policies_are_taken_and_run(policy, pipeline):
    check_transform(configured(AUG__AUTO_AUGMENT=policy, DATA__PIPELINE=pipeline, DATA__IMG_SIZE=64))


@pytest.mark.parametrize("policy", [*BAD, "rand m9", "rand-m9\n"])
def test_bad_policies_are_refused_with_what_is_allowed(policy):
    with pytest.raises(ValueError, match="AUG.AUTO_AUGMENT is ") as info:
        configured(AUG__AUTO_AUGMENT=policy)
    assert "known: rand, augmix" in str(info.value) or "Sections of " in str(info.value)
    assert len(str(info.value).splitlines()) == 2


def test_a_clipped_magnitude_and_mixing_that_never_happens_are_noticed():
    notices = config_notices(configured(AUG__AUTO_AUGMENT="rand-m15-n2", AUG__MIXUP_PROB=0))
    assert ["clips magnitudes at 10; -mmax15" in notices[0], "no batch is ever mixed" in notices[1]] == [True, True]
    assert config_notices(configured(AUG__AUTO_AUGMENT="rand-m15-mmax20")) == []


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("pipeline", ["fast", "reference"])
@pytest.mark.parametrize("size", [32, 64])
def test_each_interpolation_runs_in_each_pipeline(interpolation, pipeline, size):
    values = {"DATA__INTERPOLATION": interpolation, "DATA__PIPELINE": pipeline, "DATA__IMG_SIZE": size}
    check_transform(configured(AUG__AUTO_AUGMENT="none", **values))


@pytest.mark.parametrize("key", ["DATA.DATA_PATH", "DATA.VAL_CACHE", "MODEL.PRETRAINED", "MODEL.RESUME", "OUTPUT"])
def test_paths_are_expanded_wherever_they_are_given(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    file = tmp_path / "run.yaml"

    def value(text: str) -> str:
        *sections, leaf = key.split(".")
        file.write_text(f"{sections[0]}: {{{leaf}: {text!r}}}" if sections else f"{leaf}: {text!r}")
        node = load_config(file)
        for name in key.split("."):
            node = node[name]
        assert load_config(file, [key, text]) == load_config(file, overrides={key: text}) == load_config(file)
        return node

    assert value("~/a") == "/home/me/a"
    assert value("$SCRATCH/a") == value("${SCRATCH}/a") == "/scratch/a"
    for text, complaint in (("$NOT_SET/a", "NOT_SET, which is not set"), ("~nobody-at-all/a", "known user")):
        with pytest.raises(ValueError, match=complaint) as info:
            value(text)
        assert key in str(info.value)


def test_the_config_file_itself_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("TAG: mine")
    assert load_config("~/run.yaml").TAG == "mine"
    address = "https://host/~me/$x.pth#sha256=" + 64 * "0"
    assert load_config("~/run.yaml", overrides={"MODEL.RESUME": address}).MODEL.RESUME == address


def test_a_stored_configuration_is_taken_as_it_is():
    assert parse_config("OUTPUT: /a/$NOT_SET", "a checkpoint").OUTPUT == "/a/$NOT_SET"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("TAG", "a" * 256, "at most 255 bytes"),
        ("MODEL.NAME", "ü" * 128, "at most 255 bytes"),
        ("TAG", "a\nb", "control characters"),
        ("TAG", "\udcff", "control characters"),
        ("OUTPUT", "a/" + "b" * 256, "at most 255"),
        ("OUTPUT", "a\0b", "null bytes"),
        ("MODEL.RESUME", "https://host/a b.pth", "spaces"),
        ("TRAIN.EPOCHS", str(2**64), "64 bits"),
        ("SAVE_FREQ", 2**63, "64 bits"),
        ("TRAIN.BASE_LR", 10**400, "64 bits"),
        ("TRAIN.BASE_LR", "1e999", "TRAIN.BASE_LR is inf"),
        ("TRAIN.DIST_TIMEOUT", "1e10", "whole number"),
        ("TRAIN.DIST_TIMEOUT", 10**12, "allowed"),
        ("MODEL.STRIP_MLP.LAYERS", [1, 1, 9999, 1], "allowed"),
    ],
)
def test_names_addresses_and_numbers(key, value, complaint):
    with pytest.raises(ValueError, match=complaint) as info:
        configured(**{key.replace(".", "__"): value})
    assert key in str(info.value)
