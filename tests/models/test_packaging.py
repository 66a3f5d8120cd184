"""What is shipped: configs, requirements, the installable package, the Makefile and the CI script."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from utils.config import load_config, recipe_deviations

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LEAVES = [path for path in CONFIGS if path.parent.name == "configs"]
PUBLISHED_LEAVES = [path for path in LEAVES if path.stem.startswith("smlp_")]
FINETUNING = [path for path in CONFIGS if path.parent.name == "finetune"]
BASELINES = [path for path in CONFIGS if path.parent.name == "baselines"]

VARIANTS = {
    "tiny_light": (80, [2, 2, 6, 2]),
    "tiny": (80, [2, 2, 12, 2]),
    "small": (96, [2, 2, 18, 2]),
    "base": (112, [2, 2, 18, 2]),
}
DATASETS = {
    "imagenet1k": ("imagenet-1k", 1000),
    "cifar10": ("CIFAR10", 10),
    "cifar100": ("CIFAR100", 100),
    "caltech101": ("101_ObjectCategories", 101),
}


def requirements(name: str) -> dict[str, str]:
    """Return {package: version specifier} of a requirements file."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pairs = [re.fullmatch(r"([A-Za-z0-9_.-]+)((?:>=|==)[0-9.]+)", line) for line in lines if line]
    assert all(pairs), name
    return {pair[1].lower(): pair[2] for pair in pairs}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("<>=").split("."))


def test_four_models_times_four_data_sets():
    expected = {f"smlp_{model}_alpha3_patch4_224_{data}" for model in VARIANTS for data in DATASETS}
    assert {path.stem for path in PUBLISHED_LEAVES} == expected
    assert {path.stem for path in LEAVES} == expected | {"quickstart_digits"}


def test_four_data_sets_times_three_ways_to_fine_tune():
    data_sets, recipes = ("cifar10", "cifar100", "caltech101", "folder"), ("head", "layer_decay", "all")
    assert {path.stem for path in FINETUNING} == {
        f"smlp_tiny_{data}_{recipe}" for data in data_sets for recipe in recipes
    }


@pytest.mark.parametrize(
    ("recipe", "expected"),
    (
        ("head", {"TRAIN.FREEZE": "head_only", "TRAIN.BASE_LR": 1e-3, "TRAIN.WEIGHT_DECAY": 0.0}),
        ("layer_decay", {"TRAIN.LAYER_DECAY": 0.8, "MODEL.HEAD_INIT_SCALE": 1e-3, "TRAIN.BASE_LR": 5e-5}),
        ("all", {"TRAIN.BASE_LR": 2e-4, "TRAIN.WEIGHT_DECAY": 1e-4, "TRAIN.EMA_DECAY": 0.995}),
    ),
)
def test_a_fine_tuning_preset_on_every_data_set(recipe, expected):
    for path in FINETUNING:
        if path.stem.endswith(f"_{recipe}"):
            deviations = recipe_deviations(load_config(path))
            assert {name: deviations[name][1] for name in expected} == expected, path.stem
            assert deviations["AUG.MIXUP"][1] == 0.0


def test_baselines_run_their_own_recipe():
    resmlp, convnext = (load_config(path) for path in sorted(BASELINES, reverse=True))
    optimizer = resmlp.TRAIN.OPTIMIZER
    assert (resmlp.MODEL.TIMM_NAME, optimizer.NAME, resmlp.TRAIN.BASE_LR) == ("resmlp_12_224", "lamb", 5e-3)
    assert (resmlp.AUG.REPEATS, resmlp.TRAIN.WEIGHT_DECAY, resmlp.TRAIN.EPOCHS) == (3, 0.2, 400)
    assert 8 * resmlp.DATA.BATCH_SIZE == 2048
    assert (convnext.MODEL.TIMM_NAME, convnext.TRAIN.BASE_LR, convnext.TRAIN.EMA_DECAY) == (
        "convnext_tiny",
        4e-3,
        0.9999,
    )
    assert 8 * convnext.DATA.BATCH_SIZE * convnext.TRAIN.ACCUMULATION_STEPS == 4096


@pytest.mark.parametrize("path", [*LEAVES, *FINETUNING, *BASELINES], ids=lambda path: path.stem)
def test_a_leaf_loads_under_its_own_name(path):
    assert load_config(path).MODEL.NAME == path.stem


@pytest.mark.parametrize("path", PUBLISHED_LEAVES, ids=lambda path: path.stem)
def test_a_published_leaf_is_the_published_recipe(path):
    model, data = re.fullmatch(r"smlp_(\w+)_alpha3_patch4_224_(\w+)", path.stem).groups()
    config = load_config(path)
    assert (config.MODEL.STRIP_MLP.EMBED_DIM, config.MODEL.STRIP_MLP.LAYERS) == VARIANTS[model]
    assert (config.DATA.DATASET, config.MODEL.NUM_CLASSES) == DATASETS[data]
    assert (config.MODEL.ALPHA, config.MODEL.STRIP_MLP.PATCH_SIZE, config.DATA.IMG_SIZE) == (3, 4, 224)
    assert (config.MODEL.DROP, config.MODEL.DROP_RATE) == (False, 0.2)
    assert recipe_deviations(config) == {}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_config_file_is_plain_and_portable(path):
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    assert text.startswith("# "), "the first line says what it is"
    assert not re.search(r"[\s'\"\[](/|~/|[A-Z]:\\)\w", text), "absolute path"


def test_bases_hold_what_they_are_named_after():
    for path in CONFIGS:
        content = yaml.safe_load(path.read_text())
        if path.parent.name == "models":
            assert set(content) == {"MODEL"}
        if path.parent.name == "datasets":
            assert set(content) == {"DATA", "MODEL"}
            assert set(content["MODEL"]) == {"NUM_CLASSES"}


def test_requirements_are_ranges_and_constraints_exact():
    needed, extra, exact = map(requirements, ("requirements.txt", "requirements-extra.txt", "constraints.txt"))
    assert needed["torch"] == ">=2.11"
    assert needed["torchvision"] == ">=0.26"
    assert all(spec.startswith(">=") for spec in [*needed.values(), *extra.values()])
    assert all(spec.startswith("==") for spec in exact.values())
    assert not needed.keys() & extra.keys()
    for name, spec in {**needed, **extra}.items():
        assert version(exact[name]) >= version(spec), name
    assert {"pytest", "ruff"} <= exact.keys()


def test_the_package_is_the_network_alone():
    project = pyproject()
    folders = sorted(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "models").rglob("__init__.py"))
    packages = [folder.replace("models", "strip_mlp", 1).replace("/", ".") for folder in folders]
    folder_of = dict(zip(packages, folders, strict=True))
    assert project["tool"]["setuptools"] == {"packages": packages, "package-dir": folder_of}
    assert project["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    needed = requirements("requirements.txt")
    assert project["project"]["dependencies"] == [f"torch{needed['torch']}", f"timm{needed['timm']}"]


def test_the_network_imports_under_its_installed_name():
    """In a process of its own, far from the repository, so that neither models nor utils can be found."""
    init = ROOT / "models" / "__init__.py"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('strip_mlp', {str(init)!r}, "
        f"submodule_search_locations=[{str(init.parent)!r}])\n"
        "module = sys.modules['strip_mlp'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "model = module.StripMLPNet(img_size=32, embed_dim=16, depths=(1, 1, 1, 1), num_classes=3)\n"
        "assert model.num_classes == 3\n"
        "assert type(module.inference_form(model)).__module__ == 'strip_mlp.fast.inference'\n"
        "assert not {'models', 'utils', 'data', 'yacs'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.anchor, timeout=120)


def test_pytest_leaves_the_long_fault_tests_out():
    options = pyproject()["tool"]["pytest"]["ini_options"]
    assert "not faults" in options["addopts"]
    assert options["markers"][0].startswith("faults:")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("help", ["make quickstart", "make test", "make lint", "make faults", "make clean"]),
        (
            "quickstart",
            [
                "-r requirements.txt",
                "main.py --cfg configs/quickstart_digits.yaml",
                "main_eval.py",
                "checkpoint_best.pth",
                "curves.png",
            ],
        ),
        ("tour", ["requirements-extra.txt", "main.py", "tools/predict.py", "tools/report.py", "tools/export.py"]),
        ("test", ["-c constraints.txt", "requirements-extra.txt", "ruff check", "-m pytest"]),
        ("faults", ["tests/faults"]),
    ],
)
def test_make_targets(tmp_path, target, parts):
    """What make would run in a copy without an environment, with its order kept under -j."""
    for name in ("Makefile", "requirements.txt", "requirements-extra.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-j4", "--dry-run", target],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert all(part in done.stdout for part in parts), done.stdout


def test_the_ci_script_is_bash_and_strict():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "make test" in text
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


def test_code_under_data_is_not_ignored():
    patterns = (ROOT / ".gitignore").read_text().splitlines()
    assert "/output/" in patterns
    assert not {"data", "data/", "/data/", "*.yaml"} & set(patterns)
    assert importlib.util.find_spec("data") is not None
