"""torch.hub entry points: ``torch.hub.load("<owner>/<repository>", "strip_mlp_tiny", num_classes=10)``.

Each takes the arguments of `models.StripMLPNet`; weights are loaded by the caller, published ones through
`models.from_published`.
"""

from models.strip_mlp import strip_mlp_base, strip_mlp_small, strip_mlp_tiny, strip_mlp_tiny_light

dependencies = ["torch", "timm"]

__all__ = ["strip_mlp_base", "strip_mlp_small", "strip_mlp_tiny", "strip_mlp_tiny_light"]
