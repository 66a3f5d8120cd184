"""Strip-MLP as PyTorch modules; knows nothing of data or training."""

from . import baselines  # noqa: F401 (registers them with timm)
from .build import build_model, timm_kwargs
from .checkpoint_compat import from_published, to_published
from .checks import check_model
from .features import DenseBackbone, with_pyramid
from .forms import accelerate, gpu_path, inference_form
from .freezing import frozen_parts
from .resample import fit_weights
from .strip_mlp import StripMLPNet

__all__ = [
    "DenseBackbone",
    "StripMLPNet",
    "accelerate",
    "build_model",
    "check_model",
    "fit_weights",
    "from_published",
    "frozen_parts",
    "gpu_path",
    "inference_form",
    "timm_kwargs",
    "to_published",
    "with_pyramid",
]
