"""The model's distributed wrapper, its compilation, and the passes that bring both into their steady state."""

import inspect
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_conv2d_weight_memory_format
from yacs.config import CfgNode

from utils.config import input_shape
from utils.errors import RunError, one_line
from utils.runtime import get_world_size, random_state, set_random_state
from utils.training.batchnorm import BufferBackup, batchnorm_buffers

logger = logging.getLogger(__name__)

# PyTorch's default, 8, is reached by two batch sizes; beyond it blocks silently run uncompiled.
MAX_GRAPHS_PER_BLOCK = 64


def wrap_for_training(
    model: nn.Module,
    device: torch.device,
    *,
    sync_bn: bool = False,
    grad_compression: str = "none",
    group: dist.ProcessGroup | None = None,
) -> DistributedDataParallel:
    """Wrap ``model`` (on ``device``) for training on all processes; parameters become those of rank 0.

    Every process keeps its own BatchNorm statistics: they are averaged where they are used, for evaluation and saving
    (``averaged_batchnorm``).

    Args:
        model: the bare model; with ``sync_bn`` its BatchNorms are replaced in place.
        device: this process's device.
        sync_bn: normalise by the statistics of all processes' batches (``TRAIN.SYNC_BN``).
        grad_compression: ``bf16`` sends and adds the gradients of several processes in that format
            (``TRAIN.GRAD_COMPRESSION``); the optimizer still gets float32.
        group: the processes; None for all.

    Raises:
        ValueError: ``sync_bn`` on the CPU.
    """
    if sync_bn and device.type == "cpu":
        raise ValueError("TRAIN.SYNC_BN is True, but PyTorch synchronises BatchNorm on GPUs only; switch it off")
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    # Feature maps are in channels_last order, so the gradients of convolutions are too: weights in the same order let
    # DDP reduce them in place.
    convert_conv2d_weight_memory_format(model, torch.channels_last)
    # What is left to differ are the strides of axes of size 1, as in the gradients of 1x1 kernels for maps of a single
    # position: the same memory. Autograd itself copies a gradient that differs in any other stride.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # The switch was renamed: newer releases warn about the old name, older ones do not know the new one.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    unsynced = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    ddp_model = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=group,
        gradient_as_bucket_view=True,
        **unsynced,
    )
    if grad_compression == "bf16" and get_world_size() > 1:
        ddp_model.register_comm_hook(group, bf16_compress_hook)
    return ddp_model


def check_compiler(config: CfgNode, device: torch.device) -> None:
    """Look for the compiler that ``TRAIN.COMPILE`` needs.

    Raises:
        ValueError: there is none; what was looked for is named.
    """
    if not config.TRAIN.COMPILE:
        return
    cpp = ("clang++",) if sys.platform == "darwin" else ("g++",)
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", cpp)
    named = shlex.split(os.environ.get(variable, ""))
    wanted = named[:1] or usual
    if not any(shutil.which(name) for name in wanted):
        raise ValueError(
            f"TRAIN.COMPILE is True, but no compiler was found ({' or '.join(wanted)}): install one, name one in the "
            f"environment variable {variable}, or set TRAIN.COMPILE False"
        )


def compile_model(model: nn.Module, **options: Any) -> None:
    """Compile ``model`` in place with ``torch.compile``; the next forward and backward pass do the work.

    A network that offers ``compile_blocks`` compiles its repeated blocks, which share graphs; any other is compiled as
    a whole. Names in the state dict stay as they are. Shapes are fixed: another batch size compiles again.

    Args:
        model: the model.
        options: of ``torch.compile``, such as ``mode``.
    """
    # The instances of a block share one cache of graphs: for each stage one for training, one for evaluation, ...
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS_PER_BLOCK)
    compile_in_place = getattr(model, "compile_blocks", model.compile)
    compile_in_place(dynamic=False, **options)


def compiler_cache() -> str:
    """Return the folder in which compiled code is kept between runs; without the user's choice, one of the user's."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strip_mlp" / "torchinductor"
    return os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default))


def compile_and_warm_up(
    model: DistributedDataParallel,
    config: CfgNode,
    *,
    averaged: nn.Module | None,
    device: torch.device,
    world_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Compile the model if ``TRAIN.COMPILE`` says so, and warm it up where that changes speed or bits.

    All compiling happens here, for training and evaluation, so that it slows down no update of the run. Call this
    before any state is restored.

    Args:
        model: the wrapped model.
        config: frozen config.
        averaged: the model that holds the averaged weights and is evaluated instead, if there is one; it shares the
            compiled code.
        device, world_size: where and in how many processes the run computes.
        autocast: makes the context of the forward pass.

    Raises:
        RunError: the model cannot be compiled on this machine.
    """
    compiles, on_gpu = config.TRAIN.COMPILE, device.type == "cuda"
    if not (compiles or on_gpu or world_size > 1):
        return
    start = time.perf_counter()
    image = input_shape(config)
    batch = config.DATA.BATCH_SIZE if compiles or on_gpu else 2
    if compiles:
        torch._functorch.config.activation_memory_budget = config.TRAIN.MEMORY_BUDGET
        logger.info("compiling the model; this takes minutes the first time. Cache: %s", compiler_cache())
        for each in (model.module, averaged):
            if each is not None:
                compile_model(each, mode=config.TRAIN.COMPILE_MODE)
    try:
        warm_up(model, (batch, *image), device=device, autocast=autocast)
        if compiles:
            evaluated = model.module if averaged is None else averaged
            warm_up_evaluation(evaluated, (config.TEST.BATCH_SIZE or batch, *image), device=device, autocast=autocast)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            logger.info("compiled and warmed up in %.1f s, %d graphs", time.perf_counter() - start, graphs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise RunError(
            f"TRAIN.COMPILE: the model cannot be compiled here: {one_line(error)}; install what is missing, or set "
            "TRAIN.COMPILE False"
        ) from error


def warm_up(
    model: DistributedDataParallel,
    shape: tuple[int, int, int, int],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Run two forward and backward passes on random images and remove every trace of them.

    DDP reorders its buckets after the first backward pass. Without this, the first update after a resume would sum
    gradients in an order that differs from the same update of an uninterrupted run, and three or more processes would
    not end in the same bits. It also keeps kernel selection and compilation out of the first update's time.

    Args:
        model: the wrapped model, before any state is restored.
        shape: (B, C, H, W) of the images.
        device: this process's device.
        autocast: makes the context of the forward pass.
    """
    backup = BufferBackup(list(batchnorm_buffers(model.module).values()))
    backup.save()
    streams = random_state()
    model.train()
    for _ in range(2):
        images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
        with autocast():
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad()
    backup.restore_where(torch.ones((), dtype=torch.bool, device=device))
    set_random_state(streams)


@torch.inference_mode()
def warm_up_evaluation(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Run one forward pass as evaluation does; the model's mode is restored."""
    images = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
    was_training = model.training
    model.eval()
    with autocast():
        model(images)
    model.train(was_training)
