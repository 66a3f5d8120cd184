"""How fast could it be? Arithmetic and memory traffic that no implementation avoids, over what the machine delivers.

The floor counts, for one image, the floating-point operations of all convolutions and matrix products, and the bytes
that these read and write if each reads its inputs once, writes its output once, and everything in between
(normalisation, activation, sums, copies) costs nothing. A training step is taken as three forward passes. The machine's
rates are measured in the same process: a large matrix product in the same precision, and a large copy.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tools.bench.candidates import build_network

_PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}
_TRAINING_FACTOR = 3  # forward, gradient of the input, gradient of the weights
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """Unavoidable work of a forward pass: operations and elements of maps an image, elements of weights a pass."""

    flops: int
    map_elements: int
    weight_elements: int


@dataclass(frozen=True)
class Roof:
    """What the machine delivers: floating-point operations and bytes per second."""

    flops: float
    bytes: float


class _Traffic(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products read and write, parameters apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            inputs = [a for a in args if isinstance(a, torch.Tensor) and not _is_weight(a)]
            self.elements += sum(t.numel() for t in inputs) + result.numel()
        return result


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a parameter or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


@cache
def work_of(name: str, img_size: int) -> Work:
    """Count the work of the network called ``name``, on one image, in its plain form."""
    network = build_network(name, img_size).eval()
    image = torch.randn(1, 3, img_size, img_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    with torch.no_grad(), _Traffic() as traffic:
        network(image)
    return Work(counter.get_total_flops(), traffic.elements, sum(p.numel() for p in network.parameters()))


def floor_seconds(work: Work, roof: Roof, *, train: bool, batch: int, precision: str) -> float:
    """Seconds for a batch at the roof: the longer of arithmetic and memory traffic."""
    size = 2 if precision in _DTYPES else 4
    factor = _TRAINING_FACTOR if train else 1
    arithmetic = batch * work.flops / roof.flops
    traffic = (batch * work.map_elements + work.weight_elements) * size / roof.bytes
    return factor * max(arithmetic, traffic)


def measure_roof(device: torch.device, precision: str) -> Roof:
    """Measure the roof of a device in a precision; about a second on a CPU."""
    on_gpu = device.type == "cuda"
    side, copied = (8192, 2**28) if on_gpu else (2048, 2**25)
    if on_gpu:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = _DTYPES.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source, target = (torch.ones(copied, device=device) for _ in range(2))
    return Roof(
        flops=2 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=product), device),
        bytes=2 * 4 * copied / _best_seconds(lambda: target.copy_(source), device),
    )


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
