"""Networks of the experiments, one file a family, and the user's own by ``file.py:function``."""

from .loading import load_network
from .mlp import GatedMLP
from .resnet import GatedResNet

__all__ = ["GatedMLP", "GatedResNet", "load_network"]
