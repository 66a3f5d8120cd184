"""Repeat the update at which a run gave up because losses were not finite, and say where the first bad value arises.

    python tools/replay.py output/NAME/TAG/nonfinite_step_000001234.pth [--data-path DIR] [--device cpu|cuda]

The file holds the weights that the update met, each process's random streams, and the indices of its samples; the
images are read again from where the run read them. The shares of several processes are computed one after another, by
the function that training uses and with the same augmentation, mixing, stochastic depth and precision, and their
gradients are averaged.

Exit code: 0 if loss and gradient norm are those of the run, 1 if they are not, 2 if the file cannot be used.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, convert_conv2d_weight_memory_format
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import ImageDataset, build_batch_transform, build_dataset, collate
from main import accumulate_gradients
from models import accelerate, build_model, from_published
from tools.common import run_tool, whole_number, working
from utils.checkpoint import load_teacher, read_training_state
from utils.config import parse_config
from utils.errors import CheckpointError
from utils.runtime import printable, select_device, set_random_state, torch_random_state
from utils.session import Objective
from utils.training import Progress, build_criterion, build_precision, class_weights


@dataclass
class Share:
    """What one process's part of the update gave.

    Attributes:
        loss: mean over its micro-batches.
        samples: (index, name, loss) of each sample.
        suspect: sentence about the first module with a non-finite output, or ''.
    """

    loss: float
    samples: list[tuple[int, str, float]]
    suspect: str


class FirstNonFinite:
    """Watches the outputs of all innermost modules and remembers the first one that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self._handles = [
            module.register_forward_hook(self._look(name))
            for name, module in model.named_modules()
            if not any(module.children())
        ]
        self.found = ""

    def __enter__(self) -> "FirstNonFinite":
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if self.found or not isinstance(output, Tensor) or torch.isfinite(output).all():
                return
            lines = [f"first module with a non-finite output: {name} ({type(module).__name__}): {describe(output)}"]
            lines += [f"  its input: {describe(value)}" for value in inputs if isinstance(value, Tensor)]
            lines += [f"  its {key}: {describe(value)}" for key, value in module.named_parameters()]
            self.found = "\n    ".join(lines)

        return hook


class Observer:
    """Stands between an update and its model, and notes the samples' losses and the first bad micro-batch.

    Args:
        config: of the run.
        dataset: its training images.
        device: where the update is repeated.
        rank: whose share of the update.

    Attributes:
        losses: of the samples so far.
        bad_images: the first images that are not finite, or whose scores are not; None if there are none.
        random_state: the random streams when the model met them; None if the images themselves are not finite.
    """

    def __init__(self, config: CfgNode, dataset: ImageDataset, *, device: torch.device, rank: int) -> None:
        num_classes = len(dataset.classes)
        self._transform = build_batch_transform(
            config, is_train=True, device=device, rank=rank, num_classes=num_classes
        )
        weights = class_weights(config, dataset.targets, num_classes)
        self._criterion = build_criterion(config, soft_targets=self._transform.mixes, weights=weights).to(device)
        self._smoothing = 0.0 if self._transform.mixes else config.MODEL.LABEL_SMOOTHING
        self._met: tuple[Tensor, dict[str, Tensor]] | None = None
        self.losses: list[float] = []
        self.bad_images: Tensor | None = None
        self.random_state: dict[str, Tensor] | None = None

    def transform(self, *batch: Tensor, **position: int) -> tuple[Tensor, Tensor]:
        """Return what the batch transform returns."""
        images, targets = self._transform(*batch, **position)
        if self.bad_images is None and not torch.isfinite(images).all():
            self.bad_images = images
        self._met = images, torch_random_state()
        return images, targets

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return what the criterion returns."""
        if self.bad_images is None and not torch.isfinite(logits).all():
            self.bad_images, self.random_state = self._met
        scores = logits.detach().float()
        self.losses += F.cross_entropy(scores, targets, reduction="none", label_smoothing=self._smoothing).tolist()
        return self._criterion(logits, targets)


class Replay:
    """Model, data and precision of a dump, ready to repeat its update.

    Args:
        path: the dump.
        data_path: where the data are now; None takes the run's place.
        device: 'cpu' or 'cuda'; None takes the GPU if there is one.

    Raises:
        RunError, CheckpointError, ValueError, FileNotFoundError: the file or its data cannot be used.
    """

    def __init__(self, path: Path, *, data_path: str | None, device: str | None) -> None:
        self.device = select_device(device)
        self.payload = read_training_state(path)
        self.records = self.payload.get("update")
        if not self.records:
            raise CheckpointError(f"{path} is a checkpoint, not the dump of an update (nonfinite_step_N.pth)")
        overrides = {"MODEL.RESUME": str(path), "MODEL.PRETRAINED": ""}  # the list of held-out images lies beside it
        if data_path:
            overrides["DATA.DATA_PATH"] = data_path
        self.config = parse_config(self.payload["config"], str(path), overrides)
        if self.config.TRAIN.SYNC_BN and len(self.records) > 1:
            raise ValueError(
                "TRAIN.SYNC_BN was on: the processes' shares depend on each other and cannot be repeated "
                "one after another"
            )
        self.dataset = build_dataset(self.config, is_train=True)
        self.model = accelerate(build_model(self.config, len(self.dataset.classes)).to(self.device), self.device)
        self.model.no_sync = nullcontext  # as of the distributed wrapper; one process has nothing to reduce
        convert_conv2d_weight_memory_format(self.model, torch.channels_last)  # as in training: the order of sums
        self.teacher = load_teacher(self.config, self.device, self.payload, build=build_model, remap=from_published)
        self.precision = build_precision(self.config, self.device)
        self.scaler = self.precision.scaler
        if self.scaler.is_enabled():
            scale = self.payload["scaler"]["scale"]
            if not math.isfinite(self.records[0]["grad_norm"]):  # the update was skipped, which has lowered the scale
                scale /= self.scaler.get_backoff_factor()
            self.scaler.load_state_dict({**self.payload["scaler"], "scale": scale})

    def run(self) -> tuple[list[Share], float]:
        """Repeat the update; return each process's share and the gradient norm over all processes."""
        exchanged = {"none": None, "bf16": torch.bfloat16}[self.config.TRAIN.GRAD_COMPRESSION]
        dtype = exchanged if len(self.records) > 1 else None
        total = [torch.zeros_like(p, dtype=dtype) for p in self.model.parameters()]
        shares = []
        for rank in range(len(self.records)):
            shares.append(self._repeat(rank))
            for summed, parameter in zip(total, self.model.parameters(), strict=True):
                if parameter.grad is not None:
                    summed += parameter.grad.to(summed.dtype) / len(self.records)
        for summed, parameter in zip(total, self.model.parameters(), strict=True):
            parameter.grad = summed.to(parameter.dtype)
        self.scaler.unscale_(torch.optim.SGD(self.model.parameters(), lr=0.0))
        return shares, float(clip_grad_norm_(self.model.parameters(), math.inf))

    def _repeat(self, rank: int) -> Share:
        """Run forward and backward over one process's micro-batches, as training did."""
        record, own = self.records[rank], self.payload["rank_state"][rank]
        self.model.load_state_dict({**self.payload["model"], **own["buffers"]})
        self.model.train()
        self.model.zero_grad()
        group = [
            collate([self.dataset[record["epoch"], index] for index in micro.tolist()]) for micro in record["indices"]
        ]
        observer = Observer(self.config, self.dataset, device=self.device, rank=rank)
        objective = Objective(
            config=self.config,
            precision=self.precision,
            transform=observer.transform,
            criterion=observer.criterion,
            teacher=self.teacher,
        )
        set_random_state(record["rng"])
        progress = Progress(global_step=record["step"], epoch=record["epoch"])
        loss = accumulate_gradients(self.model, group, progress, objective)
        indices = [index for micro in record["indices"] for index in micro.tolist()]
        names = [name for micro in record["names"] for name in micro]
        samples = list(zip(indices, names, observer.losses, strict=True))
        return Share(float(loss), samples, self._suspect(observer))

    @torch.no_grad()
    def _suspect(self, observer: Observer) -> str:
        """Say where values stopped being finite, by a second forward pass: hooks change the order of sums."""
        if observer.bad_images is None:
            return ""
        if observer.random_state is None:
            return f"the images themselves are not finite: {describe(observer.bad_images)}"
        set_random_state(observer.random_state)
        with FirstNonFinite(self.model) as watch, self.precision.autocast():
            self.model(observer.bad_images)
        return watch.found


def describe(tensor: Tensor) -> str:
    """Return how many values of a tensor are not finite and how large the others are, as text."""
    values = tensor.detach().float()
    finite = torch.isfinite(values)
    bad = int((~finite).sum())
    largest = float(values[finite].abs().max()) if bool(finite.any()) else math.nan
    count = f"{bad} of {values.numel()} values are not finite" if bad else "finite"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, {count}, largest magnitude {largest:.3g}"


def compare(recorded: float, repeated: float) -> tuple[str, bool]:
    """Return whether two numbers agree, and how: to the last bit, both not finite, or up to the order of a sum."""
    if recorded == repeated or (math.isnan(recorded) and math.isnan(repeated)):
        return "identical", True
    if not math.isfinite(recorded) and not math.isfinite(repeated):
        return "neither is finite", True
    close = math.isclose(recorded, repeated, rel_tol=1e-4)
    return ("equal up to rounding", True) if close else ("DIFFERENT", False)


def report(replay: Replay, shares: list[Share], norm: float, *, shown: int) -> bool:
    """Print what happened; return whether the update was repeated."""
    records, first = replay.records, replay.records[0]
    images = sum(len(share.samples) for share in shares)
    print(
        f"update {first['step']} (epoch {first['epoch'] + 1}): {len(records)} process(es), {images} images, "
        f"{replay.precision.description}"
    )
    repeated = True
    for rank, (record, share) in enumerate(zip(records, shares, strict=True)):
        verdict, same = compare(record["loss"], share.loss)
        repeated &= same
        print(f"process {rank}: loss {share.loss!r}, in the run {record['loss']!r}: {verdict}")
        if share.suspect:
            print(f"    {share.suspect}")
        worst = sorted(share.samples, key=lambda sample: -sample[2] if math.isfinite(sample[2]) else -math.inf)
        for index, name, loss in worst[:shown]:
            print(f"    loss {loss:10.4g}  {printable(name)} (index {index})")
    verdict, same = compare(first["grad_norm"], norm)
    print(f"gradient norm: {norm!r}, in the run {first['grad_norm']!r}: {verdict}")
    bad = [name for name, parameter in replay.model.named_parameters() if not torch.isfinite(parameter.grad).all()]
    if bad:
        print(f"    {len(bad)} parameters with a non-finite gradient, the last of them {bad[-1]}")
    name, parameter = max(replay.model.named_parameters(), key=lambda item: float(item[1].detach().abs().max()))
    print(f"largest weight: {name}, magnitude {float(parameter.detach().abs().max()):.3g}")
    return repeated and same


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    replay = Replay(args.dump, data_path=args.data_path, device=args.device)
    with working("repeating the update"):
        shares, norm = replay.run()
    return 0 if report(replay, shares, norm, shown=args.samples) else 1


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("dump", type=Path, help="nonfinite_step_N.pth in the run's output folder")
    parser.add_argument("--data-path", help="where the data are now (default: where the run read them)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: the GPU if there is one; only the run's kind of device repeats it to the last bit",
    )
    parser.add_argument(
        "--samples", type=whole_number(0, 1_000_000), default=4, metavar="N", help="samples to name (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
