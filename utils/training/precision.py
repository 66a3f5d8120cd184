"""The numerical precision of a run, decided in one place: autocast, gradient scaling, TF32."""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.amp import GradScaler
from yacs.config import CfgNode

logger = logging.getLogger(__name__)

# instruction sets, as PyTorch names them
_NATIVE = {"bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith")}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How the forward pass and the loss are computed.

    Attributes:
        autocast: makes a fresh context for the forward pass; a no-op in float32.
        scaler: scales the loss in float16; otherwise disabled, which makes it a no-op.
        description: one phrase for the log.
    """

    autocast: Callable[[], AbstractContextManager]
    scaler: GradScaler
    description: str


def build_precision(config: CfgNode, device: torch.device) -> Precision:
    """Build the precision that ``TRAIN.AMP`` (off, bf16, fp16) and ``TRAIN.TF32`` ask for.

    TF32 is set explicitly for matrix products and convolutions, because PyTorch's own defaults for the two differ:
    without this, float32 convolutions on an NVIDIA GPU would silently run in TF32.
    """
    amp = config.TRAIN.AMP
    tf32 = config.TRAIN.TF32 and device.type == "cuda"
    if device.type == "cuda":
        mode = "tf32" if tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = mode
        torch.backends.cudnn.conv.fp32_precision = mode
    scaler = GradScaler(device.type, enabled=amp == "fp16")
    float32 = "float32 with TF32" if tf32 else "float32"
    if amp == "off":
        return Precision(contextlib.nullcontext, scaler, float32)
    dtype = _DTYPES[amp]
    if device.type == "cpu" and not _native_on_cpu(amp):
        logger.warning(
            "TRAIN.AMP is %s, but this CPU has no native %s: training will be several times slower than in float32; "
            "set TRAIN.AMP off (--amp off)",
            amp,
            amp,
        )
    return Precision(
        lambda: torch.autocast(device.type, dtype=dtype), scaler, f"autocast {dtype}".replace("torch.", "")
    )


def _native_on_cpu(amp: str) -> bool:
    """Return whether this CPU computes in the 16-bit format itself; True where PyTorch does not tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in _NATIVE[amp])
