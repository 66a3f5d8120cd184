"""What the benchmark compares: networks by name, in a form and a precision, as something that can be run and timed."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import timm
import torch
from torch import nn
from torch.nn import functional as F

import models
from tests.reference_model import ReferenceStripMLP
from utils.training import compile_model

FORMS = ("eager", "compiled", "graphed", "inference", "inference-compiled", "inference-graphed")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# (embed_dim, depths) of the variants, for the plain formulation
_SIZES = {
    "tiny_light": (80, (2, 2, 6, 2)),
    "tiny": (80, (2, 2, 12, 2)),
    "small": (96, (2, 2, 18, 2)),
    "base": (112, (2, 2, 18, 2)),
}


@dataclass(frozen=True)
class Candidate:
    """One contestant.

    Attributes:
        name: a timm model (``strip_mlp_tiny``, ``resnet50``, ...), or ``reference`` / ``reference_base`` / ...: the
            plain formulation of the published description (``tests/reference_model.py``).
        form: ``eager``; ``compiled``; ``graphed``, compiled as a whole into a CUDA graph; ``inference``, what
            ``to_inference()`` gives, or that compiled or graphed.
        precision: ``fp32``, ``tf32`` (GPU), ``bf16`` or ``fp16`` autocast.
    """

    name: str
    form: str = "eager"
    precision: str = "fp32"

    @classmethod
    def parse(cls, text: str, *, precision: str = "fp32") -> "Candidate":
        """Read ``NAME[:FORM][:PRECISION]``.

        Raises:
            ValueError: a part is unknown; says which.
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
        if not is_reference(name) and not timm.is_model(name):
            raise ValueError(
                f"{text!r}: timm {timm.__version__} knows no model {name!r}; ours are "
                f"{', '.join(timm.list_models('strip_mlp*'))} and reference"
            )
        return found

    @property
    def label(self) -> str:
        """Name, with form and precision unless they are eager and fp32."""
        return ":".join([self.name, *(word for word in (self.form, self.precision) if word not in ("eager", "fp32"))])


@dataclass(frozen=True)
class Setting:
    """What all candidates of a table have in common.

    Attributes:
        mode: ``train`` (forward, backward, optimizer) or ``infer`` (forward).
        batch, img_size: of the random images (batch, 3, img_size, img_size).
        device: where.
        channels_last: memory order of images and, for other networks than ours, of the weights.
    """

    mode: str
    batch: int
    img_size: int
    device: torch.device
    channels_last: bool = False


@dataclass(frozen=True)
class Workload:
    """A candidate ready to run: each call of ``run`` is one training step or one forward pass on a batch."""

    candidate: Candidate
    run: Callable[[], None]


def is_reference(name: str) -> bool:
    """Whether ``name`` means the plain formulation."""
    return name == "reference" or name.removeprefix("reference_") in _SIZES


def build_network(name: str, img_size: int) -> nn.Module:
    """The network of a candidate, on the CPU, in training mode; DropPath at each family's own default."""
    if is_reference(name):
        embed_dim, depths = _SIZES[name.removeprefix("reference").lstrip("_") or "tiny"]
        return ReferenceStripMLP(img_size=img_size, embed_dim=embed_dim, depths=depths)
    known = timm.get_pretrained_cfg(name)
    return timm.create_model(name, **({"img_size": img_size} if known is not None and known.fixed_input_size else {}))


def build_workload(candidate: Candidate, setting: Setting) -> Workload:
    """Build a candidate for a setting.

    Raises:
        ValueError: the form or the precision does not exist there.
    """
    network = _in_form(build_network(candidate.name, setting.img_size), candidate, setting)
    _check_precision(candidate.precision, setting.device)
    order = torch.channels_last if setting.channels_last else torch.contiguous_format
    images = torch.randn(setting.batch, 3, setting.img_size, setting.img_size, device=setting.device)
    images = images.contiguous(memory_format=order)
    prepare = _step if setting.mode == "train" else _forward
    return Workload(candidate, prepare(network, images, candidate))


def _in_form(network: nn.Module, candidate: Candidate, setting: Setting) -> nn.Module:
    network = models.accelerate(network.to(setting.device), setting.device)
    network.train(setting.mode == "train")
    if setting.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if candidate.form.startswith("inference"):
        if setting.mode == "train" or not hasattr(network, "to_inference"):
            raise ValueError(
                f"{candidate.label}: the form 'inference' is for inference with a network that has to_inference()"
            )
        network = network.eval().to_inference()
    if candidate.form.endswith("compiled"):
        compile_model(network)
    elif candidate.form.endswith("graphed"):
        network.compile(dynamic=False, mode="reduce-overhead")
    return network


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("tf32 is a format of NVIDIA GPUs; on the CPU take fp32 or bf16")


def _numerics(precision: str, device: torch.device) -> AbstractContextManager:
    """Set the GPU's treatment of float32 and return the autocast context."""
    if device.type == "cuda":
        mode = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = mode
        torch.backends.cudnn.conv.fp32_precision = mode
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    return contextlib.nullcontext()


def _step(network: nn.Module, images: torch.Tensor, candidate: Candidate) -> Callable[[], None]:
    """A training step: cross-entropy and AdamW, fused except for the plain formulation, which is as published."""
    device = images.device
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, weight_decay=0.05, fused=not is_reference(candidate.name)
    )
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
