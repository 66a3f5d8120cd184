"""What the README says exists: files, flags, commands, code."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from utils.config import load_config
from utils.config.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("main.py", "main_eval.py")


def blocks(page: Path, language: str = "") -> list[str]:
    """Fenced code blocks of ``page`` in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Words from the program on of every command line of main.py and main_eval.py in the page's plain blocks."""
    found = []
    for block in [text for language in ("", "bash", "sh") for text in blocks(page, language)]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
            for program in PROGRAMS:
                if program in words and "..." not in words:
                    found.append(words[words.index(program) :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"\b(?:configs|models|data|utils|tests|tools|docs)/[\w/.-]*[\w/]", text))
    named |= {match for match in re.findall(r"[\w/.-]+\.py\b", text) if not match.startswith((".", "/"))}
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    missing = [name for name in sorted(named - tests) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("words", commands(ROOT / "README.md"), ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    program, *rest = (word.replace("<", "").replace(">", "") for word in words)
    args = build_parser(takes_checkpoint=program == "main_eval.py").parse_args(rest)
    if args.cfg:  # evaluation needs none: a checkpoint holds it
        load_config(ROOT / args.cfg, args.opts)


def test_there_are_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 5


@pytest.mark.parametrize("code", [code for code in blocks(ROOT / "README.md", "python") if "logits" in code])
def test_code_runs(code: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "snippet.py"))
    assert tuple(names["logits"].shape) == (2, 10)
    assert tuple(names["features"].shape) == (2, 640, 8, 8)


def test_the_pyramid_of_the_documentation_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (code,) = [code for code in blocks(ROOT / "docs/USE.md", "python") if "FeaturePyramidNetwork" in code]
    (tmp_path / "snippet.py").write_text(code.replace("224", "64"))
    runpy.run_path(str(tmp_path / "snippet.py"))
    assert "'32': (1, 256, 2, 2)" in capsys.readouterr().out
