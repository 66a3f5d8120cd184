"""Strip-MLP as PyTorch modules; knows nothing of data, training or devices."""

from .build import build_model
from .checkpoint_compat import from_published, to_published
from .strip_mlp import StripMLPNet


def accelerate(model, device) -> None:
    """Attach the forms of ``models.fast`` that pay on ``device`` (in this version of the code: built in)."""


__all__ = ["StripMLPNet", "accelerate", "build_model", "from_published", "to_published"]
