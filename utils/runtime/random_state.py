"""Random numbers that depend on what is computed, not on who computes it or when.

The augmentation of a sample is a function of ``(seed, epoch, index)``, the mixing of a batch one of
``(seed, epoch, rank, update)``. Neither the number of workers nor an interruption changes them, and the global random
streams of the process stay where they were. Exact resume rests on this.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_process(seed: int) -> None:
    """Seed the global streams of Python, NumPy and PyTorch, accelerators included, at the start of a run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def streams_restored() -> Iterator[None]:
    """Put the global streams of Python, NumPy and PyTorch (CPU) back where they were, after a block that uses them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_streams(*entropy: int) -> None:
    """Seed the three global streams from non-negative integers; every combination gives streams of its own."""
    words = np.random.SeedSequence(entropy).generate_state(3, np.uint64).tolist()
    random.seed(words[0])
    np.random.seed(words[1] >> 32)  # a 32-bit number is five times as fast as an array
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed would also reseed the accelerators


@contextmanager
def seeded_streams(*entropy: int) -> Iterator[None]:
    """Run a block with the global streams seeded from ``entropy``; put them back afterwards."""
    with streams_restored():
        seed_streams(*entropy)
        yield


def integer_seed(*entropy: int) -> int:
    """Return one 63-bit seed derived from the non-negative integers ``entropy``, for a ``torch.Generator``."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's global generators as plain types and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    numpy_state = (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss)
    return {"python": random.getstate(), "numpy": numpy_state, **torch_random_state()}


def torch_random_state() -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's global generators: the CPU's, and the GPU's if there is one."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` or ``torch_random_state`` returned."""
    if "python" in state:
        random.setstate(state["python"])
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
