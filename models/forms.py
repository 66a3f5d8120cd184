"""The forms of a model that are only faster: attached where they pay, left out where ``models/fast`` is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn


def has_fast_forms() -> bool:
    """Return whether the folder ``models/fast`` is there."""
    spec = find_spec(".fast", __package__)
    return spec is not None and spec.has_location


def accelerate(model: nn.Module, device: torch.device, *, lean: str = "auto") -> nn.Module:
    """Attach the faster training forms for ``device`` in place; return the model.

    Args:
        model: a model; one without Strip-MLP's blocks, e.g. a timm baseline, is left alone.
        device: where it will be trained.
        lean: hand-written gradients, which keep less for the backward pass: ``"on"``, ``"off"``, or ``"auto"``, on
            where they were measured to be faster.
    """
    if has_fast_forms():
        from . import fast

        fast.accelerate(model, device.type, lean=lean == "on" or (lean == "auto" and device.type in fast.DEVICES))
    return model


def inference_form(model: nn.Module) -> nn.Module:
    """Return the folded form of the model for inference where it has one (the same scores, faster), else the model."""
    return model.to_inference() if hasattr(model, "to_inference") and has_fast_forms() else model


@contextmanager
def gpu_path() -> Iterator[None]:
    """Let the models take the path of a GPU for tensors on the CPU, to count or to test on a machine without one."""
    if not has_fast_forms():
        yield
        return
    from .fast import ops

    cpu_types = ops.CPU_TYPES
    try:
        ops.CPU_TYPES = frozenset()
        yield
    finally:
        ops.CPU_TYPES = cpu_types
