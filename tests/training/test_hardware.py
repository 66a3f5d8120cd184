"""What this machine lacks for the settings of a run is known at its start."""

import pytest
import torch

from utils.config import parse_config
from utils.runtime import crowding_advice, describe_cpu, free_memory
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
    assert [f"TRAIN.AMP is {amp}" in text and "--amp auto" in text for text in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("able", "expected"), [({"amx_bf16": True}, "autocast bfloat16"), ({"avx2": True}, "float32"), (None, "float32")]
)
def test_auto_is_bf16_where_it_is_native(monkeypatch, caplog, able, expected):
    if able is None:  # a PyTorch that does not tell
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    precision = build_precision(parse_config("TRAIN: {AMP: auto}", "a test"), CPU)
    with precision.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert (precision.description, product.dtype == torch.bfloat16) == (expected, "bfloat16" in expected)
    assert caplog.messages == []


def test_the_log_tells_what_the_cpu_can_do(monkeypatch):
    for able, expected in (
        (
            {"avx2": True, "avx512_f": True, "amx_bf16": True},
            "CPU with AVX2, AVX-512, bf16, AMX (--amp bf16 is native)",
        ),
        ({"avx2": True}, "CPU with AVX2 (no native bf16: train in float32)"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert describe_cpu() == expected


def test_the_page_cache_of_a_container_is_free_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.runtime.hardware._CGROUP", tmp_path)
    monkeypatch.setattr("utils.runtime.hardware.available_memory", lambda: 5000)
    assert free_memory() == 5000  # no container
    for name, text in (("memory.max", "max"), ("memory.current", "900")):
        (tmp_path / name).write_text(f"{text}\n")
    assert free_memory() == 5000  # a container without a limit
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory() == 100
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_anon 7\nactive_file 100\ninactive_file 600\n")
    assert free_memory() == 700


@pytest.mark.parametrize(
    ("threads", "load", "policy", "advised"),
    [(4, 3.0, None, True), (4, 0.4, None, False), (1, 9.0, None, False), (4, 3.0, "PASSIVE", False)],
)
def test_advice_on_a_busy_machine(monkeypatch, threads, load, policy, advised):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    assert ("OMP_WAIT_POLICY=PASSIVE" in crowding_advice()) == advised
