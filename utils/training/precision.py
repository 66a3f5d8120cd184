"""The numerical precision of a run, decided in one place: autocast, gradient scaling, TF32."""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.amp import GradScaler
from yacs.config import CfgNode

from utils.runtime import cpu_features

logger = logging.getLogger(__name__)

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
    """Build the precision that ``TRAIN.AMP`` (off, auto, bf16, fp16) and ``TRAIN.TF32`` ask for.

    ``auto`` is bf16 where the device computes in it natively (NVIDIA GPUs since Ampere, CPUs with AVX-512 bf16 or AMX),
    else off.

    TF32 is set explicitly for matrix products and convolutions, because PyTorch's own defaults for the two differ:
    without this, float32 convolutions on an NVIDIA GPU would silently run in TF32.
    """
    amp = config.TRAIN.AMP
    if amp == "auto":
        amp = "bf16" if _is_native("bf16", device) else "off"
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
    if device.type == "cpu" and _is_native(amp, device) is False:
        logger.warning(
            "TRAIN.AMP is %s, but this CPU has no native %s: training will be slower than in float32, with bf16 "
            "9 times where it was measured; set TRAIN.AMP off or auto (--amp auto)",
            amp,
            amp,
        )
    return Precision(
        lambda: torch.autocast(device.type, dtype=dtype), scaler, f"autocast {dtype}".replace("torch.", "")
    )


def _is_native(amp: str, device: torch.device) -> bool | None:
    """Return whether the device computes in the 16-bit format itself; None where PyTorch does not tell."""
    if device.type == "cuda":
        return amp == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    features = cpu_features()
    return features and features[amp]
