"""Train a detector and a segmentation head on a Strip-MLP backbone for a few updates: an example to copy from.

    torchrun --nproc_per_node=2 tools/train_dense.py detection --updates 10
    torchrun --nproc_per_node=2 tools/train_dense.py segmentation --updates 10 --weights checkpoint.pth

The images are made here: coloured rectangles on noise. docs/DETECTION.md explains the parts.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import timm
import torch
import torch.distributed as dist
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN
from torchvision.models.segmentation.fcn import FCNHead

from models import DenseBackbone, with_pyramid

COLOURS = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.1, 1.0]])  # one row a class

Targets = list[dict[str, Tensor]]


def synthetic_images(count: int, size: tuple[int, int], generator: torch.Generator) -> tuple[list[Tensor], Targets]:
    """Return images (3, H, W) in [0, 1] with one rectangle each, and its box, label (from 1) and mask."""
    images, targets = [], []
    height, width = size
    for number in range(count):
        label = number % len(COLOURS)
        sides = [int(torch.randint(side // 4, side // 2, (), generator=generator)) for side in size]
        top, left = (int(torch.randint(0, a - b, (), generator=generator)) for a, b in zip(size, sides, strict=True))
        image = 0.3 + 0.4 * torch.rand(3, height, width, generator=generator)
        mask = torch.zeros(height, width, dtype=torch.long)
        mask[top : top + sides[0], left : left + sides[1]] = label + 1
        images.append(torch.where(mask > 0, COLOURS[label][:, None, None], image))
        box = torch.tensor([[left, top, left + sides[1], top + sides[0]]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([label + 1]), "mask": mask})
    return images, targets


def build_backbone(args: argparse.Namespace, out_indices: tuple[int, ...]) -> DenseBackbone:
    """Return the backbone for images of any size, with the statistics and the scale of its BatchNorms frozen."""
    body = timm.create_model(
        args.model, features_only=True, out_indices=out_indices, checkpoint_path=args.weights, **args.options
    )
    return DenseBackbone(freeze_batch_norm_2d(body), mode=args.mode)


class Detector(nn.Module):
    """Faster R-CNN with a feature pyramid; returns the sum of its losses."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        backbone = with_pyramid(build_backbone(args, (0, 1, 2, 3)), out_channels=64)
        sides = {"min_size": min(args.size), "max_size": max(args.size)}
        self.detector = FasterRCNN(backbone, num_classes=len(COLOURS) + 1, **sides)

    def forward(self, images: list[Tensor], targets: Targets) -> Tensor:
        return sum(self.detector(images, targets).values())


class Segmenter(nn.Module):
    """A fully convolutional head on the map of stage 3, which is 16 times smaller than the image; returns its loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.backbone = build_backbone(args, (2,))
        self.head = FCNHead(self.backbone.channels[-1], len(COLOURS) + 1)

    def forward(self, images: list[Tensor], targets: Targets) -> Tensor:
        x = torch.stack(images)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in self.normalisation())
        scores = self.head(self.backbone((x - mean) / std)["0"])
        scores = F.interpolate(scores, size=x.shape[2:], mode="bilinear")
        return F.cross_entropy(scores, torch.stack([target["mask"] for target in targets]))

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and the standard deviation of the images that the backbone was trained on."""
        cfg = self.backbone.body.pretrained_cfg
        return cfg["mean"], cfg["std"]


TASKS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {"detection": Detector, "segmentation": Segmenter}


def train(task: str, args: argparse.Namespace, device: torch.device) -> list[float]:
    """Train for ``args.updates`` updates on this process's share of the images; return the loss of each."""
    torch.manual_seed(0)
    model = DistributedDataParallel(TASKS[task](args).to(device).train())  # every parameter is used
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(dist.get_rank())
    images, targets = synthetic_images(args.batch, args.size, generator)
    images = [image.to(device) for image in images]
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    losses = []
    for _ in range(args.updates):
        loss = model(images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("tasks", nargs="+", choices=tuple(TASKS), help="what is trained, one after the other")
    parser.add_argument("--model", default="strip_mlp_tiny_light", help="timm's name of the model")
    parser.add_argument("--weights", default="", help="checkpoint of a classifier (default: random weights)")
    parser.add_argument("--small", action="store_true", help="a very small network for images of 64 x 64, for a try")
    parser.add_argument("--mode", choices=("window", "resize"), default="window", help="how any image size is reached")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("H", "W"), help="size of the images")
    parser.add_argument("--batch", type=int, default=2, help="images of each process")
    parser.add_argument("--updates", type=int, default=10, help="updates of the weights")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    return parser


def main() -> None:
    """Train each task and print its losses."""
    parser = build_parser()
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start this with torchrun, e.g. torchrun --nproc_per_node=2 tools/train_dense.py detection")
    if args.weights and not Path(args.weights).is_file():
        parser.error(f"--weights {args.weights}: there is no such file")
    args.size = tuple(args.size)
    args.options = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1)} if args.small else {}
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    try:
        for task in args.tasks:
            losses = train(task, args, device)
            if dist.get_rank() == 0:
                print(f"{task}: loss {losses[0]:.3f} -> {losses[-1]:.3f} after {args.updates} updates")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
