"""Networks by name, each with a default width and depth; a file in this folder that registers one is found by itself.

A builder takes a `Wanted` and, as keyword-only arguments, its options; it refuses what its family cannot be.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...errors import ConfigurationError, UnknownName
from ...gates import Granularity


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a builder is asked for; the example is a batch of inputs, of which only shape and type matter."""

    name: str
    example: Tensor
    outputs: int
    width: int
    depth: int
    granularity: Granularity

    def error(self, found: str, expected: str) -> ConfigurationError:
        return ConfigurationError(f"network {self.name!r}: found {found}, expected {expected}")

    def positive(self, setting: str, value: int) -> int:
        """The value, which must be a whole number of at least 1."""
        if type(value) is not int or value < 1:
            raise self.error(f"{setting}={value!r}", "a whole number of at least 1")
        return value

    def features(self) -> int:
        """Numbers per sample."""
        if self.example.dim() < 2:
            raise self.error(f"inputs of shape {list(self.example.shape)}", "[samples, features or further axes]")
        return self.example[0].numel()

    def images(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        if self.example.dim() != 4:
            raise self.error(
                f"inputs of shape {list(self.example.shape)}",
                "images [samples, channels, height, width]; flat inputs fit network 'mlp'",
            )
        _, channels, height, width = self.example.shape
        return channels, height, width

    def small(self) -> bool:
        """Whether the images are of the size of CIFAR and not of ImageNet: below 64 pixels on a side."""
        return min(self.images()[1:]) < 64


@dataclass(frozen=True)
class NetworkEntry:
    """A registered network.

    width, depth: the defaults, in the units that the builder's docstring states.  options: name -> default.
    description: first line of the builder's docstring.
    """

    build: Callable[..., nn.Module]
    width: int
    depth: int

    @property
    def options(self) -> Mapping[str, object]:
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def description(self) -> str:
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


_NETWORKS: dict[str, NetworkEntry] = {}
NETWORKS: Mapping[str, NetworkEntry] = _NETWORKS


def network(name: str, *, width: int, depth: int) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register the decorated function(wanted, *, options) as the builder of a network, with its defaults.

    Raises: ConfigurationError: the name is taken.
    """

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _NETWORKS:
            first = _NETWORKS[name].build
            raise ConfigurationError(
                f"network {name!r} is registered twice: {first.__module__}.{first.__name__} and "
                f"{build.__module__}.{build.__name__}; rename one"
            )
        _NETWORKS[name] = NetworkEntry(build, width, depth)
        return build

    return register


def build_network(
    name: str,
    example: Tensor,
    outputs: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    granularity: Granularity = "channel",
    options: Mapping[str, object] | None = None,
) -> nn.Module:
    """Build a network by name at its initial weights, drawn from torch's global generator.

    Args:
        name: one of NETWORKS.
        example: a batch of inputs, floating point; only its shape matters.
        outputs: number of outputs.
        width, depth: what they count is the network's own; default NETWORKS[name].width and .depth.
        granularity: of the gates, as in Gate.
        options: of this network; NETWORKS[name].options are their defaults.

    Raises: UnknownName: no such network.  ConfigurationError: a width, depth, option or shape of inputs that the
        network cannot have.

    >>> import torch
    >>> build_network("mlp", torch.zeros(8, 12), 3, width=5, depth=2)(torch.zeros(4, 12)).shape
    torch.Size([4, 3])
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownName(f"network {name!r} is unknown, expected one of {', '.join(sorted(NETWORKS))}{meant}")
    entry = NETWORKS[name]
    wanted = Wanted(
        name=name,
        example=example,
        outputs=outputs,
        width=entry.width if width is None else width,
        depth=entry.depth if depth is None else depth,
        granularity=granularity,
    )
    for setting in ("width", "depth", "outputs"):
        wanted.positive(setting, getattr(wanted, setting))
    if not example.is_floating_point():
        raise wanted.error(f"inputs of type {str(example.dtype).removeprefix('torch.')}", "floating point")
    given = dict(options or {})
    for option in given:
        if option not in entry.options:
            raise wanted.error(f"option {option!r}", f"one of {', '.join(entry.options)}" if entry.options else "none")
    return entry.build(wanted, **given)
