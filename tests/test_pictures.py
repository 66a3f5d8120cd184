"""Pictures in the documentation that are drawn from the code."""

import runpy
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "docs/images"


def test_the_architecture_is_drawn_as_it_is_now():
    drawing = runpy.run_path(str(IMAGES / "architecture.py"))["drawing"]
    assert (IMAGES / "architecture.svg").read_text(encoding="utf-8") == drawing(), "run docs/images/architecture.py"
