"""Write the validation images of a data set under the 15 corruptions of ImageNet-C, for TEST.CORRUPTIONS.

    python tools/corrupt.py CHECKPOINT --data-path <folder> --output <new folder>
    python main_eval.py CHECKPOINT --opts TEST.CORRUPTIONS <new folder> TEST.CROP_RATIO 1.0

Needs ``pip install imagecorruptions-imaug``. The images are corrupted as evaluation crops them and saved as JPEG files
of quality 85, as those of ImageNet-C were; the random numbers depend on SEED, corruption, severity and image. Files
that are there already are kept, so that a call that was stopped can be repeated. These are not the images of
ImageNet-C, which another version of the same code made.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import ImageDataset, build_dataset, expanded_path
from inference import checkpoint_config
from tools.common import checkpoint_parser, make_folder, progress, run_tool
from utils.errors import RunError
from utils.runtime import atomic_file, integer_seed, seeded_streams, usable_cores
from utils.training import ALEXNET_ERRORS, SEVERITIES

JPEG_QUALITY = 85  # ImageNet-C's


class CorruptedImages(Dataset):
    """Write an image under all corruptions and severities when its index is asked for; return how many were missing.

    Args:
        dataset: validation images as uint8 arrays (H, W, 3) of at least 32 pixels.
        corrupt: ``imagecorruptions.corrupt``.
        folder: where to write CORRUPTION/SEVERITY/CLASS/IMAGE.
        seed: of the random numbers.
    """

    def __init__(self, dataset: ImageDataset, corrupt: Callable[..., np.ndarray], folder: Path, seed: int) -> None:
        self._dataset, self._corrupt, self._folder, self._seed = dataset, corrupt, folder, seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> int:
        name = Path(self._dataset.classes[self._dataset.targets[index]]) / f"{index:08d}.jpg"
        wanted = [
            (number, corruption, severity, self._folder / corruption / str(severity) / name)
            for number, corruption in enumerate(ALEXNET_ERRORS)
            for severity in SEVERITIES
        ]
        missing = [each for each in wanted if not each[-1].exists()]
        picture = Image.fromarray(self._dataset[index][0]) if missing else None
        for number, corruption, severity, file in missing:
            entropy = (self._seed, number, severity, index)
            own_seed = {"seed": integer_seed(*entropy) % 2**31} if corruption == "glass_blur" else {}
            with seeded_streams(*entropy):
                pixels = self._corrupt(np.asarray(picture), severity, corruption, **own_seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary:
                Image.fromarray(np.uint8(pixels)).save(temporary, format="JPEG", quality=JPEG_QUALITY, optimize=True)
        return len(missing)


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    try:
        from imagecorruptions import corrupt  # imported here: only this tool needs it
    except ImportError as error:
        raise RunError(f"corruptions need another package ({error}): pip install imagecorruptions-imaug") from error
    overrides = {"DATA.PIPELINE": "fast", **({"DATA.DATA_PATH": args.data_path} if args.data_path else {})}
    config = checkpoint_config(args.checkpoint, args.cfg, opts=args.opts, overrides=overrides)
    channels = config.MODEL.STRIP_MLP.IN_CHANS
    if channels != 3:
        raise ValueError(f"MODEL.STRIP_MLP.IN_CHANS is {channels}; the corruptions are for RGB images")
    images = CorruptedImages(build_dataset(config, is_train=False), corrupt, make_folder(args.output), config.SEED)
    loader = DataLoader(images, batch_size=None, num_workers=usable_cores())
    written = sum(progress(loader, total=len(images), desc="corrupting"))
    each = len(ALEXNET_ERRORS) * len(SEVERITIES)
    print(f"{args.output}: {written} new files; {each} for each of {len(images)} images")
    return 0


def build_parser() -> Any:
    """Return the parser of the command line."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--data-path", metavar="DIR", help="data set with val/, as in evaluation")
    parser.add_argument("--output", required=True, type=expanded_path, metavar="DIR", help="folder to write to")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
