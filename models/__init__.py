"""Strip-MLP as PyTorch modules; knows nothing of data, training or devices."""

from .build import build_model
from .checkpoint_compat import from_published, to_published
from .strip_mlp import StripMLPNet

__all__ = ["StripMLPNet", "build_model", "from_published", "to_published"]
