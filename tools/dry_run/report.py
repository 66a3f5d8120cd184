"""What a check of a run found: findings with their remedies, rows for people, figures for programs."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tools.common import USER_ERRORS, printable
from utils.errors import message_text

# Of PyTorch; about whole epochs, of which a trial has none; about single images, which are counted here.
_UNHEARD = ("py.warnings", "utils.training.records", "data.dataset")


@dataclass(frozen=True)
class Finding:
    """What is wrong with a part of a run; ``fails``: the run would, else it is a warning."""

    part: str
    text: str
    fails: bool


class Report(logging.Handler):
    """Collects figures, the errors of the parts of a check, and the warnings that the run's own code logs meanwhile.

    Attributes:
        findings: without repetitions.
        figures: for programs.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.findings: list[Finding] = []
        self.figures: dict[str, Any] = {}
        self._rows: list[tuple[str, str]] = []
        self._part = "configuration"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note an error from inside as a failure of the part ``name``, and go on after it."""
        before, self._part = self._part, name
        try:
            yield
        except Exception as error:  # whatever would stop the run is a finding, and the other parts are checked too
            self.error(error)
        finally:
            self._part = before

    def error(self, error: Exception) -> None:
        """Add an error; a message that lists several problems gives as many findings."""
        text = message_text(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = (
                f"{text.splitlines()[0]} Lower DATA.BATCH_SIZE and raise TRAIN.ACCUMULATION_STEPS, or recompute "
                "activations (--use-checkpoint)"
            )
        elif not isinstance(error, USER_ERRORS):
            text = f"{type(error).__name__}: {text}"
        first, *lines = text.split("\n  - ")
        for line in lines or [first]:
            self.add(line)

    def add(self, text: str, *, fails: bool = True) -> None:
        """Add a finding about the part in progress."""
        finding = Finding(self._part, text, fails)
        if finding not in self.findings:
            self.findings.append(finding)

    def emit(self, record: logging.LogRecord) -> None:
        """Add a warning that is logged."""
        if record.name not in _UNHEARD:
            self.add(record.getMessage(), fails=record.levelno >= logging.ERROR)

    def mentions(self, name: str) -> bool:
        """Return whether a finding contains ``name``."""
        return any(name in finding.text for finding in self.findings)

    def failed(self, *parts: str) -> bool:
        """Return whether one of the parts has failed; without names, whether anything has."""
        return any(finding.fails and (not parts or finding.part in parts) for finding in self.findings)

    def row(self, name: str, text: str) -> None:
        """Add a row to the table."""
        self._rows.append((name, text))

    def table(self) -> str:
        """Return the rows, the findings, and the verdict."""
        lines = [f"{name:<12}  {printable(text)}" for name, text in self._rows]
        ordered = sorted(self.findings, key=lambda finding: not finding.fails)
        for finding in ordered:
            text = printable(finding.text, keep_lines=True).replace("\n", "\n  ")
            lines += ["", f"{'FAILS' if finding.fails else 'warning'}  {finding.part}: {text}"]
        failures = sum(finding.fails for finding in self.findings)
        verdict = f"the run would fail: {failures} problem(s)" if failures else "the run can start"
        return "\n".join([*lines, "", f"{verdict}, {len(self.findings) - failures} warning(s)"])

    def json(self) -> str:
        """Return findings and figures as a JSON object."""
        rows = {"fails": self.failed(), "findings": [asdict(finding) for finding in self.findings]}
        return json.dumps({**rows, "figures": self.figures}, indent=1)
