"""Random erasing of a batch on its device (Zhong et al., arXiv 1708.04896), with timm's parameters.

The same distribution as ``timm.data.random_erasing.RandomErasing``. Where and what is erased depends on
``(seed, epoch, index)`` of each image, not on the batch that it is in.
"""

import math

import numpy as np
import torch
from torch import Tensor

from utils.runtime import integer_seed

_MIN_AREA, _MAX_AREA = 0.02, 1 / 3  # of the image, timm's defaults
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_TRIES = 10
_DRAWS_PER_TRY = 4  # area, aspect, top, left

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RandomErasing:
    """Erase random boxes of normalised images, in place.

    Args:
        probability: share of the images that are erased.
        mode: content of a box: ``pixel`` a normal random number for each value, ``rand`` one for each channel,
            ``const`` zero.
        max_count: largest number of boxes per image, which share the area of one.
        seed: seed of the run.
    """

    def __init__(self, probability: float, *, mode: str = "pixel", max_count: int = 1, seed: int = 0) -> None:
        self.probability = probability
        self._fill = {"pixel": _fill_pixels, "rand": _fill_channels, "const": _fill_zero}[mode]
        self._max_count = max_count
        self._seed = seed

    def __call__(self, images: Tensor, indices: Tensor, *, epoch: int) -> Tensor:
        """Erase in ``images`` (B, C, H, W) and return them.

        Args:
            images: float, on any device.
            indices: int64 (B,) on the CPU, indices of the samples in their data set.
            epoch: number of the epoch.
        """
        keys = sample_keys(integer_seed(self._seed, epoch), indices.numpy())
        draws = uniform_numbers(keys, 2 + self._max_count * _TRIES * _DRAWS_PER_TRY)
        generator = torch.Generator(images.device)
        height, width = images.shape[-2:]
        for position in np.flatnonzero(draws[:, 0] < self.probability):
            generator.manual_seed(int(keys[position] >> np.uint64(1)))
            for top, left, box_height, box_width in self._boxes(draws[position, 1:].tolist(), height, width):
                self._fill(images[position, :, top : top + box_height, left : left + box_width], generator)
        return images

    def _boxes(self, draws: list[float], height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return (top, left, height, width) of each box of one image."""
        count = 1 + int(draws[0] * self._max_count)
        boxes = []
        for number in range(count):
            for attempt in range(_TRIES):
                start = 1 + (number * _TRIES + attempt) * _DRAWS_PER_TRY
                area, aspect, top, left = draws[start : start + _DRAWS_PER_TRY]
                area = (_MIN_AREA + area * (_MAX_AREA - _MIN_AREA)) * height * width / count
                aspect = math.exp(_LOG_ASPECT[0] + aspect * (_LOG_ASPECT[1] - _LOG_ASPECT[0]))
                box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if box_height < height and box_width < width:
                    place = int(top * (height - box_height + 1)), int(left * (width - box_width + 1))
                    boxes.append((*place, box_height, box_width))
                    break
        return boxes


def _fill_pixels(box: Tensor, generator: torch.Generator) -> None:
    box.normal_(generator=generator)


def _fill_channels(box: Tensor, generator: torch.Generator) -> None:
    box.copy_(torch.randn((box.shape[0], 1, 1), generator=generator, device=box.device, dtype=box.dtype))


def _fill_zero(box: Tensor, _: torch.Generator) -> None:
    box.zero_()


def sample_keys(base: int, indices: np.ndarray) -> np.ndarray:
    """Return a 64-bit key for each sample index, uint64 (B,)."""
    return _mix(np.uint64(base) ^ _mix(indices.astype(np.uint64)))


def uniform_numbers(keys: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` uniform numbers in [0, 1) for each key, float64 (B, count).

    Counter-based, hence without a loop over the samples: the SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014).
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN  # modulo 2**64, like everything here
    return (_mix(keys[:, None] + steps[None, :]) >> np.uint64(11)) * 2.0**-53


def _mix(words: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finaliser of ``words``: every bit of the input changes every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
