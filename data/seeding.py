"""Random numbers that depend on what is computed, not on who computes it or when.

The augmentation of a sample is a function of ``(seed, epoch, index)`` and the mixing of a batch a function of
``(seed, epoch, rank, update)``. Neither the number of workers nor an interruption changes them, and the global random
streams of the process stay where they were. Exact resume stands on this.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded_streams(*entropy: int, restore: bool = True) -> Iterator[None]:
    """Run a block with Python's, numpy's and torch's (CPU) global streams seeded from ``entropy``.

    Args:
        entropy: non-negative integers; every combination gives streams of its own (``numpy.random.SeedSequence``).
        restore: put the previous states back afterwards. Data workers, where nothing else draws, save the time.
    """
    words = np.random.SeedSequence(entropy).generate_state(4, np.uint64)
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if restore else None
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    torch.default_generator.manual_seed(int(words[3]))  # torch.manual_seed would also reseed the accelerators
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def integer_seed(*entropy: int) -> int:
    """Return one 63-bit seed derived from the non-negative integers ``entropy``, for a ``torch.Generator``."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
