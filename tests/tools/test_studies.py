"""tools/studies.py: a plan is run once, what is kept is enough for its tables, and docs/RESULTS.md holds them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import main
from tests.images import write_splits
from tests.tiny_run import CONFIG
from tools import compare, studies
from tools.common import run_tool
from tools.measures import paired_difference, paired_test
from tools.predictions import read_predictions
from tools.runs import read_run
from utils.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PLAN = """
small:
  title: Small
  data: pictures
  configs: [one]
  opts: {TRAIN.EPOCHS: 1}
  rates: ['1e-3', '2e-3']
  seeds: 2
later:
  title: Later
  tag: small
  data: pictures
  configs: [one, two]
  opts: {TRAIN.EPOCHS: 1}
  rates_of: small
  rate_of: one
  seeds: 1
  pretrained: {two: small/one}
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("studies")
    (folder / "plan.yaml").write_text(PLAN)
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(CONFIG.replace("DATASET: imagenet", "DATASET: folder"))
        with open(folder / f"{name}.yaml", "a") as file:
            file.write(f"OUTPUT: unused\nTAG: {name}\n")
        text = (folder / f"{name}.yaml").read_text().replace("NAME: tiny", f"NAME: {name}")
        (folder / f"{name}.yaml").write_text(text)
    data = write_splits(folder / "pictures", train=5, val=2)
    places = ("--plan", folder / "plan.yaml", "--output", folder / "out", "--kept", folder / "kept")
    return [str(word) for word in (*places, "--data", f"pictures={data}")]


def test_a_plan_is_run_once_and_kept(words, monkeypatch, capsys, tmp_path):
    trained = []

    def train(arguments, _processes):
        trained.append(arguments)
        return main.main(list(arguments)) or 0

    monkeypatch.setattr(studies, "train", train)
    monkeypatch.chdir(tmp_path)
    assert run_tool(studies.command, ["list", *words]) == 0
    assert capsys.readouterr().out.count("# open") == 2 + 2 + 2
    output = Path(words[words.index("--output") + 1])
    early = output / "two" / "small-seed0" / "report" / "predictions.npz"
    early.parent.mkdir(parents=True)
    early.write_text("a report from before the end of the training")
    assert run_tool(studies.command, ["run", *words]) == 0
    assert len(trained) == 5
    assert run_tool(studies.command, ["run", *words]) == 0
    assert len(trained) == 5
    assert run_tool(studies.command, ["keep", *words]) == 0
    kept = Path(words[words.index("--kept") + 1])
    rates = json.loads((kept / "small" / "rates.json").read_text())
    assert {config: set(found) for config, found in rates.items()} == {"one": {"1e-3", "2e-3"}}
    best = max(rates["one"], key=rates["one"].get)
    assert load_config(kept / "small" / "two-seed0" / "config.yaml").TRAIN.BASE_LR == float(best)
    assert "small-seed0" in " ".join(next(run for run in trained if run[0] == "--pretrained"))
    pairs = [str(kept / "small" / name) for name in ("one-seed0", "two-seed0")]
    assert run_tool(compare.command, [*pairs, "--curves", str(tmp_path / "curves.png")]) == 0
    assert str(kept.parent) not in (kept / "small" / "one-seed0" / "config.yaml").read_text()

    results = shutil.ignore_patterns("small-seed*")  # rates are chosen before the first result
    shutil.copytree(output, tmp_path / "rates", ignore=results)
    places = ["--output", str(tmp_path / "rates"), "--kept", str(tmp_path / "early")]
    assert run_tool(studies.command, ["keep", *words, *places]) == 0
    assert [path.name for path in (tmp_path / "early" / "small").iterdir()] == ["rates.json"]

    report = tmp_path / "rates" / "one" / "small-seed0" / "report" / "predictions.npz"
    shutil.copytree(output / "one" / "small-seed0", report.parents[1])
    found = read_predictions(report)
    most_are_right = found.correct.mean() > 0.5  # now all are wrong, or otherwise all right
    report.write_bytes(replace(found, labels=(found.top[:, 0] + most_are_right) % 3).npz())
    assert run_tool(studies.command, ["keep", *words, *places]) == 2
    assert "0.00 % right, but the run ended with" in capsys.readouterr().err  # 0.00 or 100.00

    nowhere = ["--output", str(tmp_path / "nowhere")]  # the tables need what is kept, and nothing else
    assert run_tool(studies.command, ["tables", *words, *nowhere, "--pictures", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("| `one` |", "| `two` |", "**"))
    assert (tmp_path / "new" / "study_later.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_said_in_one_line(words, tmp_path, capsys):
    assert run_tool(studies.command, ["list", "other", *words]) == 2
    assert "no study 'other'" in capsys.readouterr().err
    assert run_tool(studies.command, ["run", *words[:-2]]) == 2
    assert "--data pictures=FOLDER" in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text("small: {titel: Small}")
    assert run_tool(studies.command, ["list", "--plan", str(tmp_path / "plan.yaml")]) == 2
    assert "'small' is not understood" in capsys.readouterr().err


def test_a_difference_over_seeds():
    random = np.random.default_rng(0)
    first, second = random.random((3, 2000)) < 0.5, random.random((3, 2000)) < 0.6
    difference, (low, high) = paired_difference(first, second)
    assert difference == pytest.approx(second.mean() - first.mean())
    assert low < 0.1 < high
    single = paired_test(first[0], second[0]).interval
    assert high - low < single[1] - single[0], "three seeds say more than one"


def test_the_results_page_holds_the_tables_of_what_is_kept(capsys):
    page = (ROOT / "docs" / "RESULTS.md").read_text()
    assert run_tool(studies.command, ["tables"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert rows, "docs/results holds no run"
    assert [row for row in rows if row not in page] == []
    for folder in (path.parent for path in (ROOT / "docs" / "results").rglob("predictions.npz")):
        run = read_run(folder, folder.name)
        assert 100 * run.predictions.correct.mean() == pytest.approx(run.rows[-1]["val_acc1"], abs=0.05), folder
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "results").rglob("*")) < 2 * 2**20
