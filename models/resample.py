"""Weights for one input turned into weights for another: another image size, other channels.

Three things in a block belong to a size: a matrix M per group and tap of its row and of its column mixing, the biases b
of these layers, and the position tables. With U the resize of a row (or column) from its old to its new length,

- ``M' = U M V`` and ``b' = U b``, where V goes back from the new length to the old: the pseudo-inverse of U when
  enlarging, so that ``M' (U x) + b' = U (M x + b)`` for every row x; the resize in the other direction when shrinking,
  which holds for constant rows. The pseudo-inverse is FlexiViT's choice for patch embeddings (arXiv 2212.08013).
- A table is a function of w - h. The new one is the mean, over all positions of the new map with one w' - h', of the
  old one at these positions scaled so that the corners of the two maps meet. For squares this is linear interpolation
  at ``(w' - h') (H - 1) / (H' - 1)``.

What is lost: a tap still reaches the neighbouring row, and a depthwise convolution as many tokens as before, which are
another part of the image.

The stem is adapted to other channels by timm's ``adapt_input_conv``.
"""

from collections.abc import Mapping

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import CGSMM

Size = tuple[int, int]  # rows H, columns W

STEM_CHANNELS = 3  # of the stems that timm's rule adapts
_WEIGHT, _BIAS, _TABLE = "{}_mix.mix.weight", "{}_mix.mix.bias", "{}_position.table"


def resize_matrix(old: int, new: int) -> Tensor:
    """Return U, float64 (new, old): linear resize of a row, with antialiasing when shrinking; its rows sum to 1."""
    rows = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(rows, size=(new, old), mode="bilinear", antialias=True)[0, 0]


def _back(old: int, new: int) -> Tensor:
    """Return V, float64 (old, new)."""
    return torch.linalg.pinv(resize_matrix(old, new)) if new >= old else resize_matrix(new, old)


def resample_mixing(weight: Tensor, bias: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a Strip MLP layer's convolution for rows (or columns) of ``new`` tokens.

    Shape: (G * S, S, 1, taps), (G * S,) -> the same with S = ``new``.
    """
    old = weight.shape[1]
    forth, back = (matrix.to(weight.device) for matrix in (resize_matrix(old, new), _back(old, new)))
    matrices = weight.double().unflatten(0, (-1, old))  # (G * S, S, 1, taps) -> (G, S, S, 1, taps)
    matrices = torch.einsum("ao,goikt,ib->gabkt", forth, matrices, back)
    biases = bias.double().unflatten(0, (-1, old)) @ forth.T  # (G * S,) -> (G, S) -> (G, S')
    return matrices.flatten(0, 1).to(weight.dtype).contiguous(), biases.flatten().to(bias.dtype)


def table_matrix(old: Size, new: Size) -> Tensor:
    """Return the matrix, float64 (H' + W' - 1, H + W - 1), that resamples a position table without its outer rows."""
    with torch.device("cpu"):
        rows, columns = (torch.linspace(0, o - 1, n, dtype=torch.float64) for o, n in zip(old, new, strict=True))
        number = torch.arange(new[1]) - torch.arange(new[0])[:, None] + new[0] - 1  # (H', W'), row of the new table
        matrix = torch.zeros(sum(new) - 1, sum(old) - 1, dtype=torch.float64)
    place = columns - rows[:, None] + old[0] - 1  # (H', W'), where the old table is read, between two of its rows
    last = sum(old) - 2
    low = place.long().clamp(0, last)
    matrix.index_put_((number, low), 1 - (place - low), accumulate=True)
    matrix.index_put_((number, (low + 1).clamp(max=last)), place - low, accumulate=True)
    return matrix / matrix.sum(dim=1, keepdim=True)


def resample_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """Return a position table for maps of another size, (H + W + 1, D) -> (H' + W' + 1, D)."""
    read = table_matrix(old, new).to(table.device) @ table[1:-1].double()
    return torch.cat([table[:1], read.to(table.dtype), table[-1:]])


def resample_cgsmm(state: Mapping[str, Tensor], new: Size) -> dict[str, Tensor]:
    """Return the entries of a ``CGSMM``'s state dict that belong to a size, for maps of the size ``new``."""
    old = state[_WEIGHT.format("column")].shape[1], state[_WEIGHT.format("row")].shape[1]
    resampled = {}
    for axis, length in (("column", new[0]), ("row", new[1])):
        weight, bias, table = (name.format(axis) for name in (_WEIGHT, _BIAS, _TABLE))
        if state[weight].shape[1] != length:
            resampled[weight], resampled[bias] = resample_mixing(state[weight], state[bias], length)
        if old != new:
            resampled[table] = resample_table(state[table], old, new)
    return resampled


@torch.no_grad()
def set_map_size(module: nn.Module, height: int, width: int) -> None:
    """Make each ``CGSMM`` in ``module`` one for maps of another size; resampled weights are new parameters."""
    for cgsmm in (m for m in module.modules() if isinstance(m, CGSMM)):
        _set_map_size(cgsmm, height, width)


def _set_map_size(cgsmm: CGSMM, height: int, width: int) -> None:
    for name, value in resample_cgsmm(dict(cgsmm.named_parameters()), (height, width)).items():
        owner, _, leaf = name.rpartition(".")
        module = cgsmm.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))
    for layer, length in ((cgsmm.row_mix, width), (cgsmm.column_mix, height)):
        layer.mix.in_channels = layer.mix.out_channels = layer.mix.groups * length
    cgsmm.row_position.size = cgsmm.column_position.size = (height, width)


def resample_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for ``model``: entries of another image size are resampled, all others stay as they are.

    Entries that do not make a strip mixing block of any size stay too, for the comparison of shapes that follows.

    Args:
        weights: named as the model's; tensors on the meta device give the shapes alone.
        model: a ``StripMLPNet``; in any other, nothing is found to resample.
    """
    resampled = dict(weights)
    for name, module in model.named_modules():
        if not isinstance(module, CGSMM):
            continue
        own = {k: weights[f"{name}.{k}"] for k, _ in module.named_parameters() if f"{name}.{k}" in weights}
        if _has_a_size(own):
            found = resample_cgsmm(own, module.row_position.size)
            resampled.update({f"{name}.{key}": value for key, value in found.items()})
    return resampled


def _has_a_size(state: Mapping[str, Tensor]) -> bool:
    """Return whether the shapes of a ``CGSMM``'s entries fit each other."""
    names = [name.format(axis) for name in (_WEIGHT, _BIAS, _TABLE) for axis in ("column", "row")]
    if any(name not in state for name in names):
        return False
    weights, biases, tables = ([state[name] for name in names[i : i + 2]] for i in (0, 2, 4))
    if any(weight.dim() != 4 or 0 in weight.shape or weight.shape[0] % weight.shape[1] for weight in weights):
        return False
    length = 1 + sum(weight.shape[1] for weight in weights)
    return all(table.dim() == 2 and len(table) == length for table in tables) and all(
        bias.shape == weight.shape[:1] for weight, bias in zip(weights, biases, strict=True)
    )


def fit_weights(weights: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict fitted to the input of ``model``, and a sentence for each thing that was changed.

    Strip mixing weights are resampled to the model's image size; a stem for RGB images is adapted to other channels,
    in any timm model that names its stem. Everything else stays as it is.

    Args:
        weights: named as the model's; tensors on the meta device give the shapes alone.
        model: a ``StripMLPNet``, or any other module.
    """
    fitted, changes = _adapt_stem(weights, model)
    resampled = resample_weights(fitted, model)
    changed = [name for name, value in resampled.items() if value is not fitted[name]]
    if changed:
        old, new = (_image_size(state, model) for state in (weights, model.state_dict()))
        changes.append(f"{len(changed)} weights of {old} images resampled to {new}")
    return resampled, changes


def _image_size(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """Return the size of the images that a state dict is for, from its first strip mixing block."""
    first = next(name for name, module in model.named_modules() if isinstance(module, CGSMM))
    patch_size = model.patch_embed.kernel_size[0]
    return " x ".join(str(state[f"{first}.{_WEIGHT.format(axis)}"].shape[1] * patch_size) for axis in ("column", "row"))


def _adapt_stem(weights: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return ``weights`` with RGB stems adapted to the channels of the model's, and a sentence for each."""
    adapted, changes = dict(weights), []
    names = (getattr(model, "pretrained_cfg", None) or {"first_conv": "patch_embed"}).get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        key = f"{name}.weight"
        own, theirs = model.state_dict().get(key), weights.get(key)
        if own is None or theirs is None or not own.dim() == theirs.dim() == 4:
            continue
        if own.shape[1] == theirs.shape[1] or theirs.shape[1] != STEM_CHANNELS:
            continue
        adapted[key] = adapt_input_conv(own.shape[1], theirs)
        changes.append(f"stem {key} adapted from {STEM_CHANNELS} to {own.shape[1]} channels")
    return adapted, changes
