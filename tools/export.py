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
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import torch
from huggingface_hub import HfApi

from data import build_val_loader
from inference import Opened, evaluate_opened
from models import StripMLPNet, inference_form, to_published
from tools.common import checkpoint_parser, keep_inputs, make_folder, open_from, progress, run_tool, working
from tools.graphs import WRITERS, write_graph
from tools.model_folder import FILES, write_folder
from utils.errors import RunError
from utils.runtime import atomic_file
from utils.training import metrics_rows

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
            raise RunError(f"the released code has no {opened.model_name}; export to safetensors")
        with atomic_file(target) as temporary:
            torch.save({"model": to_published(opened.model.state_dict())}, temporary)
    else:
        with working(f"exporting to {kind}"):
            write_graph(inference_form(opened.model), opened, kind, target)


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


def push(folder: Path, repository: str) -> None:
    """Upload the files of ``write_folder`` to a repository of the hub; a card that is there already stays.

    Raises:
        RunError: the hub cannot be reached, or does not take them.
    """
    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        kept = ["README.md"] if hub.file_exists(repository, "README.md") else []
        files = {"folder_path": folder, "allow_patterns": FILES, "ignore_patterns": kept}
        with working("uploading"):
            hub.upload_folder(repo_id=repository, commit_message="Add model", **files)
    except Exception as error:  # of the network, of the hub, of a login: the client has dozens of kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"cannot upload to {repository}: {lines[0]}; check network and name, or log in with `hf auth login`"
        ) from error


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
    keep_inputs([opened.path], [target, *(target / name for name in FILES)])
    accuracy = measured_accuracy(opened) if args.evaluate else known_accuracy(opened, args.weights)
    export(opened, args.format, target, accuracy=accuracy)
    print(f"written to {target}")
    if args.push:
        push(target, args.push)
        print(f"uploaded to {args.push}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(command))
