"""What the processor of this machine can do, as far as PyTorch makes use of it."""

import torch

# what the log calls it -> PyTorch's names, of which one is enough
_FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f", "avx512"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
    "AMX": ("amx_bf16", "amx_tile"),
}


def cpu_features() -> dict[str, bool] | None:
    """Return which of AVX2, AVX-512, bf16, fp16 and AMX this CPU has; None where this PyTorch does not tell.

    bf16 and fp16 mean that the CPU multiplies in that format itself. Without it PyTorch converts every number to
    float32 and back, which takes several times as long as computing in float32.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch before 2.12
        return None
    able = torch.cpu.get_capabilities()
    return {feature: any(able.get(name) for name in names) for feature, names in _FEATURES.items()}


def describe_cpu() -> str:
    """Return one phrase for the log: the instruction sets that matter for speed, and what they mean for ``--amp``."""
    features = cpu_features()
    if features is None:
        return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    advice = "--amp bf16 is native" if features["bf16"] else "no native bf16: train in float32"
    return f"CPU with {', '.join(name for name, has in features.items() if has) or 'no vector units'} ({advice})"
