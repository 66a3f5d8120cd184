"""The same functions in less time or memory, attached from outside; without this folder everything computes the same.

``accelerate(model)`` gives the blocks of a network hand-written gradients for training; ``InferenceStripMLP`` is the
folded form that ``StripMLPNet.to_inference()`` returns.
"""

from .autograd import DEVICES
from .blocks import accelerate
from .inference import InferenceStripMLP

__all__ = ["DEVICES", "InferenceStripMLP", "accelerate"]
