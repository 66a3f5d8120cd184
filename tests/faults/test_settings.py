"""Random settings, one key or several: each is taken, or refused with a ValueError in a few lines that name a key."""

import random
import time
from typing import Any

import pytest
import torch

from data import check_transform
from models import check_model
from utils.config import load_config
from utils.config.keys import KEYS

TINY = ["DATA.IMG_SIZE=32", "DATA.BATCH_SIZE=4", "MODEL.STRIP_MLP.EMBED_DIM=8", "MODEL.STRIP_MLP.LAYERS=1,1,1,1"]
ODD = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "0.5",
    "1e-300",
    "1e300",
    "1e999",
    "-inf",
    "inf",
    "nan",
    "9223372036854775807",
    "9223372036854775808",
    "1_0",
    "0x10",
    "٣",
    "true",
    "off",
    "None",
    "null",
    "~",
    "~/x",
    "~nobody",
    "$HOME",
    "$NOT_SET",
    "${",
    "[]",
    "[1,2]",
    "(1,1)",
    "1,1,1,1",
    "[9999,1,1,1]",
    "/",
    "..",
    ".",
    "a/b",
    "https://a",
    "https://[",
    "none",
    "rand",
    "rand-m9",
    "rand-mnine",
    "rand-n100000",
    "augmix-m5-w4",
    "3augment",
    "original-mstd0.5",
    "v0-m9",
    "timm",
    "resnet50",
    "test_resnet",
    "resnet50.x",
    "lanczos",
    "nearest",
    "reference",
    "fast",
    "bf16",
    "64",
    "65536",
    "16384",
    "100000000",
] + ["", " ", "\0", "a" * 300, "ü" * 200, "\n"]
SECONDS = 60  # for the slowest check of one try, which takes 4 s of CPU time, on a machine that others use


def tries(count: int, seed: int) -> list[list[str]]:
    """Return words for ``--opts``: every third try sets several keys."""
    draw = random.Random(seed)
    names = list(KEYS)

    def word() -> str:
        key = KEYS[draw.choice(names)]
        return f"{key.name}={draw.choice(key.choices if key.choices and draw.random() < 0.3 else ODD)}"

    return [[word() for _ in range(draw.choice((1, 1, 1, 1, 2, 4)))] for _ in range(count)]


def verdict(file: Any, words: list[str]) -> bool:
    """Return whether the settings are taken; a refusal has to be one message that names a key."""
    try:
        config = load_config(file, [*TINY, *words])
        check_transform(config)
        check_model(config, torch.device("cpu"))
    except ValueError as error:
        text = str(error)
        assert any(name in text for name in KEYS), (words, text)
        assert len(text.splitlines()) <= 2 + 3 * len(words), (words, text)
        assert len(text) < 4000, (words, text)
        return False
    return True


@pytest.mark.parametrize(("count", "seed"), [(300, 0), pytest.param(4000, 1, marks=pytest.mark.faults)])
def test_random_settings(tmp_path, count, seed):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    taken = 0
    for words in tries(count, seed):
        started = time.monotonic()
        taken += verdict(file, words)
        assert time.monotonic() - started < SECONDS, words
    assert count // 10 < taken < count  # both kinds occur
