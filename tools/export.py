"""Write the model of a checkpoint in a form that other programs read, and check what was written.

    python tools/export.py checkpoint_best.pth --format onnx

safetensors   a folder that ``--pretrained``, ``main_eval.py``, the tools here and timm (``local-dir:FOLDER``) read
hub           the same folder with a model card; ``--push OWNER/NAME`` uploads it to the Hugging Face hub
published     a file with the key names of the released code
onnx          the inference form with a dynamic batch, compared with PyTorch by onnxruntime
torch-export  the same as a ``.pt2`` file for ``torch.export.load``
aoti          the same, compiled for this machine, for ``torch._inductor.aoti_load_package``
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import safetensors.torch
import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme
from torch import Tensor, nn

from data import build_val_loader
from inference import Opened, evaluate_opened
from models import StripMLPNet, inference_form, timm_kwargs, to_published
from tools.common import checkpoint_parser, make_folder, open_from, progress, run_tool
from utils.checkpoint import FORMAT_VERSION, METADATA_KEY
from utils.config import dump_config, recipe_deviations
from utils.errors import RunError
from utils.runtime import atomic_file
from utils.training import metrics_rows

BATCHES = (1, 2, 5)  # that an exported graph is compared at
TOLERANCE = 1e-3  # largest difference, relative to the largest score
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": "_aoti.pt2", "published": "_published.pth"}


def export(opened: Opened, kind: str, target: Path, *, accuracy: dict[str, Any] | None = None) -> None:
    """Write the model as ``kind`` to ``target``, a folder for 'safetensors' and 'hub', else a file.

    Raises:
        RunError: a package or a compiler is missing; or what was written computes something else.
    """
    if kind in ("safetensors", "hub"):
        write_folder(opened, target, accuracy=accuracy, card=kind == "hub")
    elif kind == "published":
        if not isinstance(opened.model, StripMLPNet):
            raise RunError(f"the released code has no {opened.config.MODEL.TIMM_NAME}; export to safetensors")
        with atomic_file(target) as temporary:
            torch.save({"model": to_published(opened.model.state_dict())}, temporary)
    else:
        write_graph(inference_form(opened.model), opened, kind, target)


def description(opened: Opened, accuracy: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a file says about itself, as plain types: a checkpoint's entries, and how it was trained."""
    config = opened.config
    return {
        "format_version": FORMAT_VERSION,
        "variant": architecture(opened)[0],
        "config": dump_config(config),
        "classes": list(opened.classes),
        "preprocessing": opened.preprocessing,
        "num_samples": opened.metadata.get("num_samples"),
        "deviations": {key: list(pair) for key, pair in recipe_deviations(config).items()},
        "accuracy": accuracy,
        "versions": opened.metadata.get("versions", {}),
        "exported_with": {"torch": str(torch.__version__), "timm": timm.__version__},
    }


def architecture(opened: Opened) -> tuple[str, dict[str, Any]]:
    """Return the timm name of the model and the arguments that ``timm.create_model`` needs to build it again."""
    model, strip = opened.model, opened.config.MODEL.STRIP_MLP
    args: dict[str, Any] = {"num_classes": opened.config.MODEL.NUM_CLASSES, "in_chans": strip.IN_CHANS}
    if not isinstance(model, StripMLPNet):
        if model.pretrained_cfg.get("fixed_input_size"):
            args["img_size"] = opened.config.DATA.IMG_SIZE
        return model.pretrained_cfg["architecture"], args | timm_kwargs(opened.config.MODEL.TIMM_KWARGS)
    args |= {"img_size": opened.config.DATA.IMG_SIZE, "patch_size": strip.PATCH_SIZE, "embed_dim": strip.EMBED_DIM}
    args |= {"depths": list(strip.LAYERS), "mlp_ratio": opened.config.MODEL.ALPHA}
    args |= {"num_patches": strip.NUM_PATCHES or None}
    variants = {(80, 6): "tiny_light", (80, 12): "tiny", (96, 18): "small", (112, 18): "base"}
    return f"strip_mlp_{variants.get((strip.EMBED_DIM, strip.LAYERS[2]), 'tiny')}", args


def timm_form(opened: Opened) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model as timm builds it, with the same weights, and the arguments of timm's writers."""
    name, args = architecture(opened)
    model = timm.create_model(name, **args)
    model.load_state_dict(opened.model.state_dict())
    steps = opened.preprocessing
    size, short = steps["img_size"], steps["short_side"]
    cfg = {
        "input_size": (args["in_chans"], size, size),
        "interpolation": steps["interpolation"],
        "crop_pct": size / short if short else 1.0,
        "crop_mode": "center" if short else "squash",
        "mean": tuple(steps["mean"]),
        "std": tuple(steps["std"]),
        "num_classes": args["num_classes"],
    }
    labels = {"label_names": list(opened.classes)} if opened.classes else {}
    return model, {"model_config": {"pretrained_cfg": cfg, **labels}, "model_args": args}


def write_folder(opened: Opened, folder: Path, *, accuracy: dict[str, Any] | None, card: bool) -> None:
    """Write timm's folder, whose weight file also says everything that a checkpoint of this project says."""
    model, options = timm_form(opened)
    save_for_hf(model, folder, safe_serialization=True, **options)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    about = json.dumps(description(opened, accuracy), default=list)
    with atomic_file(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", METADATA_KEY: about})
    if card:
        text = generate_readme(model_card(opened, accuracy), folder.name)
        (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(opened: Opened, accuracy: dict[str, Any] | None) -> dict[str, Any]:
    """Return timm's description of a model card; class names stay out of it, they are in ``config.json``."""
    config = opened.config
    known = accuracy and f"{accuracy['acc1']:.2f} % top-1 on {accuracy['num_samples']} validation images"
    return {
        "license": "other",
        "description": f"{config.MODEL.NAME}, an image classifier trained by a reproduction of Strip-MLP (ICCV 2023).",
        "details": {
            "Architecture": architecture(opened)[0],
            "Image size": config.DATA.IMG_SIZE,
            "Classes": config.MODEL.NUM_CLASSES,
            "Data": config.DATA.DATASET,
            "Accuracy": known or "not known",
            "Deviations from the published recipe": [
                f"`{key}`: published {published}, here {here}"
                for key, (published, here) in recipe_deviations(config).items()
            ],
        },
        "usage": "`timm.create_model('hf-hub:OWNER/NAME', pretrained=True)`, for Strip-MLP after `import strip_mlp`.",
    }


def write_graph(model: nn.Module, opened: Opened, kind: str, target: Path) -> None:
    """Write the forward pass with a dynamic batch, and compare it with PyTorch at the batch sizes ``BATCHES``."""
    for package in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        if find_spec(package) is None:
            raise RunError(f"--format onnx needs the package {package}; see requirements-extra.txt")
    if kind == "aoti" and opened.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise RunError("--format aoti compiles C++ and finds no compiler; install g++, or choose torch-export")
    size = opened.config.DATA.IMG_SIZE
    images = torch.randn(2, opened.config.MODEL.STRIP_MLP.IN_CHANS, size, size, device=opened.device)
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
    with open(path, "wb") as file:
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


def known_accuracy(opened: Opened, weights: str | None) -> dict[str, Any] | None:
    """Return the accuracy that the run noted for this very state in ``metrics.jsonl``, None if it noted none."""
    if "accuracy" in opened.metadata:  # of a file that was exported before
        return opened.metadata["accuracy"]
    state, metrics = opened.metadata.get("progress") or {}, opened.path.resolve().parent / "metrics.jsonl"
    if state.get("samples_seen") != 0 or weights == "model" or not metrics.exists():
        return None
    for row in metrics_rows(metrics):
        if row["epoch"] == state["epoch"] and row.get("val_samples"):
            return {"acc1": row["val_acc1"], "acc5": row["val_acc5"], "num_samples": row["val_samples"]}
    return None


def measured_accuracy(opened: Opened) -> dict[str, Any]:
    """Return the accuracy on the validation set, with a digest of the set's files and labels."""
    with closing(build_val_loader(opened.config, device=opened.device)) as loader:
        digest = hashlib.sha256()
        for index, label in enumerate(loader.dataset.targets.tolist()):
            name = "/".join(Path(loader.dataset.sample_name(index)).parts[-2:])  # class and file, wherever the set is
            digest.update(f"{name}\0{label}\n".encode(errors="replace"))
        with progress(total=len(loader.dataset), desc="evaluating") as bar:
            result = evaluate_opened(opened, loader, observe=lambda scores, *_: bar.update(len(scores)))
    return {**asdict(result), "split_sha256": digest.hexdigest()}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--format", required=True, choices=("safetensors", "hub", "published", *WRITERS))
    parser.add_argument("--output", type=Path, metavar="PATH", help="file or folder (default: beside the checkpoint)")
    parser.add_argument("--evaluate", action="store_true", help="measure the accuracy that the files state")
    parser.add_argument("--data-path", metavar="FOLDER", help="data set, for --evaluate")
    parser.add_argument("--push", metavar="OWNER/NAME", help="with --format hub: upload to this repository")
    return parser


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.push and args.format != "hub":
        parser.error("--push needs --format hub")
    opened = open_from(args, **({"DATA__DATA_PATH": args.data_path} if args.data_path else {}))
    name = f"{opened.path.stem}{SUFFIX.get(args.format, f'_{args.format}')}"
    target = args.output or opened.path.with_name(name)
    make_folder(target.parent if args.format in SUFFIX else target)
    accuracy = measured_accuracy(opened) if args.evaluate else known_accuracy(opened, args.weights)
    export(opened, args.format, target, accuracy=accuracy)
    print(f"written to {target}")
    if args.push:
        model, options = timm_form(opened)
        push_to_hf_hub(model, args.push, model_card=model_card(opened, accuracy), safe_serialization=True, **options)
        print(f"uploaded to {args.push}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(command))
