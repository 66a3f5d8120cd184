"""docs/RELIABILITY.md names tests that exist."""

import re

from tests.faults.harness import ROOT


def test_every_named_test_exists():
    """docs/RELIABILITY.md: each test that it names exists."""
    text = (ROOT / "docs" / "RELIABILITY.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for word in set(re.findall(r"test_\w+\.py", text)):
        assert word in files, word
    everything = "\n".join(files.values())
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", text))
    assert len(named) > 40
    for name in named:
        assert re.search(rf"def {name}", everything), name
