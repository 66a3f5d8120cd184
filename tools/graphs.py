"""Exported graphs: the forward pass of a model with a dynamic batch, in a file, compared with PyTorch."""

import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from inference import Opened
from utils.config import input_shape
from utils.errors import RunError
from utils.runtime import atomic_file

BATCHES = (1, 2, 5)  # that an exported graph is compared at
TOLERANCE = 1e-3  # largest difference, relative to the largest score


def write_graph(model: nn.Module, opened: Opened, kind: str, target: Path) -> None:
    """Write the forward pass with a dynamic batch, and compare it with PyTorch at the batch sizes ``BATCHES``."""
    for package in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        if find_spec(package) is None:
            raise RunError(f"--format onnx needs the package {package}; see requirements-extra.txt")
    if kind == "aoti" and opened.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise RunError("--format aoti compiles C++ and finds no compiler; install g++, or choose torch-export")
    images = torch.randn(2, *input_shape(opened.config), device=opened.device)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with atomic_file(target) as temporary:
        run = WRITERS[kind](program, temporary)
        check(model, run, images)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file with input ``images`` and output ``scores``; return what runs it."""
    import onnxruntime

    names = {"input_names": ["images"], "output_names": ["scores"]}
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])


def write_program(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Write a program of ``torch.export``; return what runs it."""
    with open(path, "wb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # a folded constant in channels-last order
        torch.export.save(program, file)
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def write_compiled(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Compile a program for this machine and write the package; return what runs it."""
    package = path.with_name(path.name + ".pt2")  # the suffix that the compiler wants
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        run = torch._inductor.aoti_load_package(str(package))
        package.replace(path)
    finally:
        package.unlink(missing_ok=True)
    return run


WRITERS = {"onnx": write_onnx, "torch-export": write_program, "aoti": write_compiled}


@torch.inference_mode()
def check(model: nn.Module, run: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """Compare an exported graph with the model on random images.

    Raises:
        RunError: they differ by more than ``TOLERANCE``.
    """
    for batch in BATCHES:
        images = torch.randn(batch, *like.shape[1:], device=like.device)
        expected, got = model(images), run(images).to(like.device)
        error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
        if got.shape != expected.shape or not error <= TOLERANCE:
            raise RunError(f"the exported graph differs from PyTorch at batch {batch}, by {error:.1e} of the scores")
        print(f"batch {batch}: largest difference from PyTorch {error:.1e} of the largest score")
