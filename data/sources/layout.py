"""What a folder looks like, for the message that says that it does not hold the wanted data set."""

from pathlib import Path

from data.sources.listing import class_folders
from data.sources.ranges import is_address
from data.sources.shards import INDEX, SAMPLES
from utils.config import CIFAR_DATASETS, FOLDER_DATASETS

CIFAR_FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}  # torchvision's
_OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation")}


def check_layout(folder: str | Path, dataset: str, *, zip_mode: bool, part: str) -> None:
    """Refuse a folder that holds the data in a form that another setting reads, or that only has to be renamed.

    Args:
        folder: ``DATA.DATA_PATH``.
        dataset: ``DATA.DATASET``, one that is read from files.
        zip_mode: ``DATA.ZIP_MODE``.
        part: ``train`` or ``val``.

    Raises:
        FileNotFoundError: the data are not where ``dataset`` has them; says what is there and what reads it.
    """
    if is_address(str(folder)):
        return
    folder = Path(folder)
    if dataset != "shards" and all((folder / part / name).is_file() for name in (INDEX, SAMPLES)):
        raise FileNotFoundError(f"DATA.DATASET is {dataset}, but {folder / part} holds shards: use --dataset shards")
    if dataset in CIFAR_DATASETS:
        wanted = folder / CIFAR_FOLDERS[dataset]
    else:
        names = {"csv": f"{part}.csv", "shards": f"{part}/{INDEX}"}
        wanted = folder / (f"{part}.zip" if zip_mode else names.get(dataset, part))
    if wanted.exists() or not folder.is_dir():
        return
    hint = _hint(folder, part, is_folder_set=dataset in FOLDER_DATASETS and not zip_mode)
    if hint:
        raise FileNotFoundError(f"DATA.DATASET {dataset} looks for {wanted}, which is not there; {hint}")


def _hint(folder: Path, part: str, *, is_folder_set: bool) -> str:
    """Return what the folder holds instead, and what to do; an empty text if it is nothing known."""
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return "train/ and val/ are: use --dataset folder, without --zip"
    if (folder / "train.zip").is_file():
        return "train.zip is: use --dataset folder --zip"
    if is_folder_set and (folder / "train.csv").is_file():
        return "train.csv is: use --dataset csv"
    for dataset, name in CIFAR_FOLDERS.items():
        if (folder / name).is_dir():
            return f"{name} is: use --dataset {dataset}"
    if not is_folder_set:
        return ""
    for name in _OTHER_NAMES[part]:
        if (folder / name).is_dir():
            return f"{name}/ is: rename it to {part}"
    if folder.name in _OTHER_NAMES and (folder.parent / part).is_dir():
        return f"give the folder above: --data-path {folder.parent}"
    if part == "val" and (folder / "train").is_dir():
        return "only train/ is: hold out a part of it with --opts DATA.HOLDOUT 0.2"
    names = class_folders(folder)
    if not names or {"train", "val"} & set(names):
        return ""
    return (
        f"folders such as {names[0]!r} are. If these are classes, hold out a part of their images with --opts "
        "DATA.HOLDOUT 0.2, or divide them: "
        f"python categories101_train_val_split.py --source {folder} --target NEW_FOLDER"
    )
