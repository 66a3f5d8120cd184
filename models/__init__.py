"""Strip-MLP as PyTorch modules; knows nothing of data or training."""

from .build import build_model
from .checkpoint_compat import from_published, to_published
from .checks import check_model
from .forms import accelerate, gpu_path, inference_form
from .resample import fit_weights
from .strip_mlp import StripMLPNet

__all__ = [
    "StripMLPNet",
    "accelerate",
    "build_model",
    "check_model",
    "fit_weights",
    "from_published",
    "gpu_path",
    "inference_form",
    "to_published",
]
