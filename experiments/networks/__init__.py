"""Networks of the experiments by name, one file a family, and the user's own by ``file.py:function``.

All have a Gate in the place of every unit, with one slope a channel (hidden feature) or a layer.
"""

import importlib
import pkgutil

from .imagenet_resnet import ImageNetResNet
from .loading import load_network
from .mlp import GatedMLP
from .plain import PlainNet
from .registry import NETWORKS, NetworkEntry, Wanted, build_network, network
from .repvgg import RepVGG
from .resnet import GatedResNet
from .transformer import Transformer
from .vgg import VGG
from .vit import VisionTransformer

__all__ = [
    "NETWORKS",
    "VGG",
    "GatedMLP",
    "GatedResNet",
    "ImageNetResNet",
    "NetworkEntry",
    "PlainNet",
    "RepVGG",
    "Transformer",
    "VisionTransformer",
    "Wanted",
    "build_network",
    "load_network",
    "network",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
