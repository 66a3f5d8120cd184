"""Open a checkpoint and use it: the model with its configuration, class names and preprocessing.

    from inference import load_predictor
    predict = load_predictor("checkpoint_best.pth")
    print(predict(["cat.jpg", "dog.jpg"])[0])

A checkpoint of this project's training says all that is needed. Weights of other origin need ``cfg``, the config file
of their model. No file is ever executed.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import (
    build_batch_transform,
    build_transform,
    check_data,
    check_transform,
    collate,
    convert_image,
    decode_image,
    held_out_images,
    read_image_file,
)
from models import build_model, check_model, fit_weights, from_published, inference_form
from utils.checkpoint import (
    check_held_out,
    class_columns,
    class_names,
    load_weights,
    named_classes,
    preprocessing,
    resolve_source,
    stored_classes,
    stored_config,
    warn_preprocessing,
    weight_options,
)
from utils.config import input_shape, load_config, load_stored_config, with_values
from utils.errors import ImageReadError
from utils.runtime import select_device, usable_cores
from utils.training import EvalResult, build_precision, class_scores, evaluate

BATCH_SIZE = 64  # images that a predictor decodes and scores at once
Picture = str | os.PathLike | Image.Image | Tensor


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened.

    Attributes:
        model: in evaluation mode, on ``device``, in the trainable form (``models.inference_form`` makes it faster).
        config: frozen configuration of the model and of the preprocessing.
        classes: class names in the order of the scores, of TEST.CLASS_NAMES or else of the file; empty if neither has
            them.
        preprocessing: what evaluation does to an image: ``img_size``, ``short_side``, ``crop``, ``interpolation``,
            ``mean``, ``std``.
        metadata: the file's other entries, such as ``progress`` and ``versions``.
        path: the local file.
        device: where the model is.
    """

    model: nn.Module
    config: CfgNode
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    metadata: dict[str, Any]
    path: Path
    device: torch.device

    @property
    def model_name(self) -> str:
        """Name of the model: timm's for MODEL.TYPE timm, else MODEL.NAME."""
        return self.config.MODEL.TIMM_NAME if self.config.MODEL.TYPE == "timm" else self.config.MODEL.NAME

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, or ``class 0``, ``class 1``, ... where the file has none."""
        return self.classes or tuple(f"class {number}" for number in range(self.model.num_classes))


def open_checkpoint(
    source: str | Path,
    cfg: str | Path | None = None,
    *,
    opts: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    device: torch.device | str | None = None,
) -> Opened:
    """Open a checkpoint: build the model that its configuration describes and load the weights.

    Args:
        source: a path, or ``https://...#sha256=...``.
        cfg: config file to use instead of the configuration in the file; needed for files that have none.
        opts: ``KEY=VALUE`` or ``KEY, VALUE``, as after ``--opts``; they win over either.
        overrides: ``{'SECTION.KEY': value}`` of highest precedence.
        weights: 'ema' or 'model'; None takes the averaged weights where the file has them.
        device: None takes the GPU if there is one.

    Raises:
        ValueError: the configuration has problems.
        CheckpointError, FileNotFoundError: the file cannot be used, or holds no configuration and ``cfg`` is None.
        RunError: there is no such device.
    """
    config = checkpoint_config(source, cfg, opts=opts, overrides=overrides)
    device = select_device(device)
    check_transform(config)
    check_model(config, device, training=False)
    return load_model(config, device, weights=weights)


def checkpoint_config(
    source: str | Path,
    cfg: str | Path | None = None,
    *,
    opts: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> CfgNode:
    """Return the configuration for evaluating ``source``, with MODEL.RESUME set to it; see ``open_checkpoint``."""
    overrides = {**(overrides or {}), "MODEL.RESUME": str(source), "EVAL_MODE": True}
    if cfg is not None:
        return load_config(cfg, opts, overrides)
    stored = stored_config(source), str(source), opts
    config, origins = load_stored_config(*stored, overrides)
    if origins.get("DATA.NUM_WORKERS") == str(source) and config.DATA.NUM_WORKERS > usable_cores():
        config = load_stored_config(*stored, {**overrides, "DATA.NUM_WORKERS": -1})[0]  # trained on a larger machine
    return config


def load_model(config: CfgNode, device: torch.device, *, weights: str | None = None, num_classes: int = 0) -> Opened:
    """Build the model of a configuration and load the weights of MODEL.RESUME, else of MODEL.PRETRAINED.

    Warns where the file was trained with other preprocessing. For ``weights`` and errors see ``open_checkpoint``.
    ``num_classes``: of the data, for MODEL.NUM_CLASSES 0 and a file without class names.
    """
    source = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not config.MODEL.NUM_CLASSES:
        config = with_values(config, {"MODEL.NUM_CLASSES": len(class_names(source)) or num_classes})
    model = build_model(config).to(device)
    _, metadata = load_weights(
        model,
        source,
        remap=from_published,
        fit=fit_weights,
        prefer_ema=weights != "model",
        require_ema=weights == "ema",
        **weight_options(config),
    )
    warn_preprocessing(config, metadata, source, model)
    return Opened(
        model=model.eval(),
        config=config,
        classes=named_classes(config.TEST.CLASS_NAMES, model.num_classes) or stored_classes(metadata, source),
        preprocessing=preprocessing(config),
        metadata=metadata,
        path=resolve_source(source),
        device=device,
    )


def evaluate_opened(
    opened: Opened,
    loader: DataLoader,
    *,
    rank: int = 0,
    observe: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    quiet: bool = False,
) -> EvalResult:
    """Evaluate on the validation data in the inference form. Collective.

    Args:
        opened: the checkpoint.
        loader: ``data.build_val_loader`` of its configuration.
        rank: of this process.
        observe: see ``utils.training.evaluate``.
        quiet: do not log how the classes were matched.

    Raises:
        ValueError: the data do not fit the configuration.
        CheckpointError: the checkpoint was trained on other classes.
    """
    config, source = opened.config, opened.config.MODEL.RESUME or opened.config.MODEL.PRETRAINED
    named = {**opened.metadata, "classes": list(opened.classes)}
    columns = class_columns(loader.dataset.classes, named, source, opened.model.num_classes, quiet=quiet)
    held_out = held_out_images(config, loader.dataset)
    check_held_out(held_out and held_out.digest, opened.metadata, source)
    check_data(config, None, loader.dataset, subset=columns is not None)
    return evaluate(
        inference_form(opened.model),
        loader,
        device=opened.device,
        batch_transform=build_batch_transform(config, is_train=False, device=opened.device, rank=rank),
        autocast=build_precision(config, opened.device).autocast,
        columns=columns,
        flip=config.TEST.FLIP,
        observe=observe,
    )


@dataclass(frozen=True)
class Prediction:
    """The best classes of an image, the most probable first.

    Attributes:
        source: the path, or ``image 0``, ``image 1``, ... by position for images without one.
        names: class names.
        indices: their positions among the scores.
        probabilities: softmax over all classes, in 0..1.
        error: why the image could not be read; the others are empty then.
    """

    source: str
    names: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


class Predictor:
    """Predict the classes of images, preprocessed as in evaluation; ``load_predictor`` makes one.

    Args:
        opened: the checkpoint.
        top_k: classes per image, at most all.
        batch_size: images per forward pass.
    """

    def __init__(self, opened: Opened, *, top_k: int = 5, batch_size: int = BATCH_SIZE) -> None:
        self.opened = opened
        self.top_k = min(top_k, opened.model.num_classes)
        self._names = opened.names
        self._batch_size = batch_size
        self._model = inference_form(opened.model)
        self._transform = build_transform(opened.config, is_train=False)
        self._batch_transform = build_batch_transform(opened.config, is_train=False, device=opened.device)
        self._autocast = build_precision(opened.config, opened.device).autocast

    def __call__(self, images: Picture | Iterable[Picture]) -> list[Prediction]:
        """Return one prediction per image, in order.

        Args:
            images: one image, or several. An image is a path, a PIL image of any size and mode, a uint8 tensor
                (3, H, W) of RGB values of any size, or a float tensor (3, S, S) that is already preprocessed and
                normalised, with S = DATA.IMG_SIZE.

        Raises:
            ImageReadError: an image cannot be read; names it.
            TypeError, ValueError: something else than an image.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, Tensor) and images.ndim == 3):
            images = [images]
        predictions = []
        for prediction in self.stream(images):
            if prediction.error:
                raise ImageReadError(f"cannot read {prediction.source}: {prediction.error}")
            predictions.append(prediction)
        return predictions

    def stream(self, images: Iterable[Picture]) -> Iterator[Prediction]:
        """Yield predictions batch by batch; an image that cannot be read yields one with ``error``."""
        numbered = enumerate(images)
        with ThreadPoolExecutor(usable_cores()) as pool:
            while batch := list(islice(numbered, self._batch_size)):
                prepared = list(pool.map(self._prepare, (image for _, image in batch)))
                scored = iter(self._score([pixels for pixels in prepared if not isinstance(pixels, ImageReadError)]))
                for (number, image), pixels in zip(batch, prepared, strict=True):
                    source = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {number}"
                    if isinstance(pixels, ImageReadError):
                        yield Prediction(source, error=str(pixels))
                    else:
                        yield Prediction(source, *next(scored))

    def _prepare(self, image: Picture) -> Any:
        """Return what the evaluation transform makes of an image, or why it cannot be read."""
        channels, *size = input_shape(self.opened.config)
        try:
            if isinstance(image, (str, os.PathLike)):
                data = read_image_file(os.fspath(image))
                return self._transform(decode_image(data, as_array=True, channels=channels))
            if isinstance(image, Image.Image):
                return self._transform(convert_image(image, channels))
        except ImageReadError as error:
            return error
        if not isinstance(image, Tensor):
            raise TypeError(f"a {type(image).__name__} is not a path, PIL image or tensor")
        if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            return self._transform(convert_image(picture, channels))
        if image.is_floating_point() and image.shape == (channels, *size):
            return image.float()
        raise ValueError(
            f"a tensor of shape {list(image.shape)} and type {image.dtype} is neither a uint8 RGB image [3, H, W] nor "
            f"a preprocessed float image {[channels, *size]}"
        )

    @torch.inference_mode()
    def _score(self, pictures: list[Any]) -> Iterator[tuple[tuple, tuple, tuple]]:
        """Yield names, indices and probabilities of the best classes of each picture."""
        ready: list[Any] = [None] * len(pictures)
        for kind in (True, False):  # float images are already normalised, uint8 images are not: they cannot be stacked
            places = [n for n, picture in enumerate(pictures) if isinstance(picture, Tensor) is kind]
            if places:
                batch = collate([(pictures[n].cpu() if kind else pictures[n], 0, 0) for n in places])
                images, _ = self._batch_transform(*batch)
                scores = class_scores(self._model, images, autocast=self._autocast, flip=self.opened.config.TEST.FLIP)
                best = scores.softmax(dim=1).topk(self.top_k, dim=1)
                for n, indices, probabilities in zip(places, best.indices.tolist(), best.values.tolist(), strict=True):
                    ready[n] = (tuple(self._names[i] for i in indices), tuple(indices), tuple(probabilities))
        yield from ready


def load_predictor(checkpoint: str | Path, cfg: str | Path | None = None, *, top_k: int = 5, **how: Any) -> Predictor:
    """Return the predictor of a checkpoint.

    Args:
        checkpoint, cfg: see ``open_checkpoint``.
        top_k: classes per image.
        how: further arguments of ``open_checkpoint``.
    """
    return Predictor(open_checkpoint(checkpoint, cfg, **how), top_k=top_k)
