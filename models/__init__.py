"""Strip-MLP as PyTorch modules; knows nothing of data or training."""

from .build import build_model, timm_kwargs
from .checkpoint_compat import from_published, to_published
from .checks import check_model
from .forms import accelerate, inference_form
from .strip_mlp import StripMLPNet

__all__ = [
    "StripMLPNet",
    "accelerate",
    "build_model",
    "check_model",
    "from_published",
    "inference_form",
    "timm_kwargs",
    "to_published",
]
