"""What this machine lacks for the settings of a run is known at its start."""

import pytest
import torch

from utils.config import parse_config
from utils.training import build_precision, check_compiler

CPU = torch.device("cpu")


def test_compiling_without_a_compiler(monkeypatch, tmp_path):
    config = parse_config("TRAIN: {COMPILE: true}", "a test")
    monkeypatch.setenv("PATH", str(tmp_path))
    for compiler in ("", "/nonexistent/c++", "no-such-compiler -O2"):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(ValueError, match=r"TRAIN.COMPILE is True, but no compiler.*variable CXX"):
            check_compiler(config, CPU)
    check_compiler(parse_config("", "a test"), CPU)
    (tmp_path / "mine").write_text("")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", "mine -O2")
    check_compiler(config, CPU)


@pytest.mark.parametrize(("amp", "able"), [("bf16", "amx_bf16"), ("fp16", "avx512_fp16")])
def test_a_cpu_without_the_format_is_warned_about(monkeypatch, caplog, amp, able):
    config = parse_config(f"TRAIN: {{AMP: {amp}}}", "a test")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    build_precision(config, CPU)
    assert caplog.messages == []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    build_precision(config, CPU)
    assert [f"TRAIN.AMP is {amp}" in text and "--amp off" in text for text in caplog.messages] == [True]
