"""What the benchmark compares: a network by name, in a form and a precision, ready to run."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import timm
import torch
from torch import nn
from torch.nn import functional as F

import models  # also registers strip_mlp_* with timm
from tools.bench.reference import VARIANTS, ReferenceStripMLP
from utils.training import compile_model

FORMS = ("default", "plain", "lean", "compiled", "graphed", "inference", "inference-compiled", "inference-graphed")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """A network to measure.

    Attributes:
        name: a timm model (``strip_mlp_tiny``, ``resnet50``, ...), or ``reference``, ``reference_base``, ...: the plain
            published formulation (``tools/bench/reference.py``).
        form: ``default``, as ``main.py`` trains it on this device; ``plain``, without ``models.fast``; ``lean``, with
            its hand-written gradients also where they are not the default; ``compiled``; ``graphed``, compiled as a
            whole into a CUDA graph; ``inference``, the result of ``to_inference()``, as it is, compiled or graphed.
        precision: ``fp32``, ``tf32`` (GPU only), or ``bf16`` or ``fp16`` autocast.
    """

    name: str
    form: str = "default"
    precision: str = "fp32"

    @classmethod
    def parse(cls, text: str, *, precision: str = "fp32") -> "Candidate":
        """Return the candidate that ``NAME[:FORM][:PRECISION]`` describes.

        Raises:
            ValueError: a part is unknown.
        """
        name, *words = text.split(":")
        found = cls(name, precision=precision)
        for word in words:
            if word not in FORMS + PRECISIONS:
                raise ValueError(
                    f"{text!r}: {word!r} is neither a form ({', '.join(FORMS)}) nor a precision "
                    f"({', '.join(PRECISIONS)})"
                )
            found = replace(found, **{"form" if word in FORMS else "precision": word})
        if not found.is_reference and not timm.is_model(name):
            raise ValueError(
                f"{text!r}: timm {timm.__version__} has no model {name!r}; ours are "
                f"{', '.join(timm.list_models('strip_mlp*'))} and reference"
            )
        return found

    @property
    def is_reference(self) -> bool:
        """Whether this is the plain published formulation."""
        return self.name == "reference" or self.name.removeprefix("reference_") in VARIANTS

    @property
    def label(self) -> str:
        """Name, form and precision, the last two only where they are not ``default`` and ``fp32``."""
        return ":".join([self.name, *(word for word in (self.form, self.precision) if word not in ("default", "fp32"))])


@dataclass(frozen=True)
class Setting:
    """What all candidates of a table have in common.

    Attributes:
        mode: ``train`` (one update: forward, backward, optimizer) or ``infer`` (forward).
        batch, img_size: of the random images (batch, 3, img_size, img_size).
        device: where to run.
        channels_last: memory order of the images and, for other networks than ours, of the weights.
    """

    mode: str
    batch: int
    img_size: int
    device: torch.device
    channels_last: bool = False


@dataclass(frozen=True)
class Workload:
    """A candidate ready to run: each call of ``run`` is one update, or one forward pass, on a batch."""

    network: nn.Module
    run: Callable[[], None]


def build_network(candidate: Candidate, img_size: int) -> nn.Module:
    """Return the plain network of a candidate, on the CPU, in training mode, with its family's default DropPath."""
    if candidate.is_reference:
        return ReferenceStripMLP(img_size=img_size, **VARIANTS[candidate.name.removeprefix("reference")[1:] or "tiny"])
    known = timm.get_pretrained_cfg(candidate.name)
    sized = known is not None and known.fixed_input_size
    return timm.create_model(candidate.name, **({"img_size": img_size} if sized else {}))


def build_workload(candidate: Candidate, setting: Setting) -> Workload:
    """Return a candidate ready to run in a setting.

    Raises:
        ValueError: the form or the precision does not exist there.
    """
    if candidate.precision == "tf32" and setting.device.type != "cuda":
        raise ValueError(f"{candidate.label}: tf32 is a format of NVIDIA GPUs; on the CPU use fp32 or bf16")
    network = build_network(candidate, setting.img_size).to(setting.device)
    network = in_form(network, candidate, setting, mode=setting.mode)
    images = torch.randn(setting.batch, 3, setting.img_size, setting.img_size, device=setting.device)
    images = images.contiguous(memory_format=torch.channels_last if setting.channels_last else torch.contiguous_format)
    prepare = _update if setting.mode == "train" else _forward
    return Workload(network, prepare(network, images, candidate))


def in_form(network: nn.Module, candidate: Candidate, setting: Setting, *, mode: str) -> nn.Module:
    """Return ``network`` in the candidate's form for ``mode`` (``train`` or ``infer``) on the device of ``setting``.

    Raises:
        ValueError: the network does not have this form.
    """
    network = network.train(mode == "train")
    if setting.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if candidate.form != "plain":
        models.accelerate(network, setting.device, lean="on" if candidate.form == "lean" else "auto")
    if candidate.form.startswith("inference"):
        if mode == "train" or not hasattr(network, "to_inference"):
            raise ValueError(f"{candidate.label}: only Strip-MLP has an inference form, and only for --mode infer")
        network = network.to_inference()
    if candidate.form.endswith("compiled"):
        compile_model(network)
    elif candidate.form.endswith("graphed"):
        network.compile(dynamic=False, mode="reduce-overhead")
    return network


def _numerics(precision: str, device: torch.device) -> AbstractContextManager:
    """Set how a GPU multiplies float32 numbers; return the autocast context."""
    if device.type == "cuda":
        mode = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = mode
        torch.backends.cudnn.conv.fp32_precision = mode
    return autocast(precision, device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context of a precision."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    return contextlib.nullcontext()


def _update(network: nn.Module, images: torch.Tensor, candidate: Candidate) -> Callable[[], None]:
    """Return an update with cross-entropy and AdamW, fused except for the published formulation, as published."""
    device = images.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=not candidate.is_reference)
    scaler = torch.amp.GradScaler(device.type, enabled=candidate.precision == "fp16")
    targets = torch.arange(len(images), device=device) % 10

    def run() -> None:
        with _numerics(candidate.precision, device):
            loss = F.cross_entropy(network(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return run


def _forward(network: nn.Module, images: torch.Tensor, candidate: Candidate) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode(), _numerics(candidate.precision, images.device):
            network(images)

    return run
