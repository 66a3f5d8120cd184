"""Strip-MLP as PyTorch modules; knows nothing of data or training."""

from .build import build_model
from .checkpoint_compat import from_published, to_published
from .checks import check_model
from .forms import accelerate, gpu_path, inference_form
from .strip_mlp import StripMLPNet

__all__ = [
    "StripMLPNet",
    "accelerate",
    "build_model",
    "check_model",
    "from_published",
    "gpu_path",
    "inference_form",
    "to_published",
]
