"""neural-tangents: three implementations of the empirical NTK on the same networks written in jax, jitted.

Weights are stored as [in, out] and [height, width, in, out] and images as [N, H, W, C], its fast layouts: with
``h @ W.T`` the structured mode is two hundred times slower. It has no structure for the gather of an embedding either
(a thousand times slower, 134 GB at n=64), so there it gets one-hot tokens times the matrix; the others gather.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kernel_cases import OUTPUTS, Case

TOOLS = {
    "neural-tangents structured": "STRUCTURED_DERIVATIVES",
    "neural-tangents Jacobian": "JACOBIAN_CONTRACTION",
    "neural-tangents products": "NTK_VECTOR_PRODUCTS",
}
SLOPE_NAMES = ("weight", "slope")


def _neural_tangents() -> Any:
    """Import neural-tangents 0.6.5 under jax 0.4.38, without TensorFlow, which only its `experimental` needs."""
    import jax
    import jax._src.source_info_util
    import jax.interpreters.ad

    sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")
    # Two names that left jax.interpreters.ad after the release of neural-tangents 0.6.5.
    jax.interpreters.ad.source_info_util = jax._src.source_info_util
    jax.interpreters.ad.config = jax.config
    import neural_tangents

    return neural_tangents


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {name: importlib.metadata.version(name) for name in ("neural-tangents", "jax", "jaxlib")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The compiled call, and what turns its result into an array of the case's shape."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    nt = _neural_tangents()
    tensors = load_file(folder / "problem.safetensors")
    batch = tensors.pop("inputs")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    statistics = {name: jnp.asarray(value) for name, value in tensors.items() if ".running_" in name}
    buffers = (".running_mean", ".running_var", ".num_batches_tracked", ".frozen")
    parameters = {
        name: jnp.asarray(_fast_layout(name, value)) for name, value in tensors.items() if not name.endswith(buffers)
    }
    if case.network == "transformer":
        batch = batch.astype(np.int32)
    elif case.network != "mlp":
        batch = batch.transpose(0, 2, 3, 1)
    x = jnp.asarray(np.ascontiguousarray(batch))
    network = partial(NETWORKS[case.network], statistics=statistics, **case.settings)
    if case.network == "transformer":
        network = partial(network, one_hot=TOOLS[tool] == "STRUCTURED_DERIVATIVES")
    kernel = nt.empirical_ntk_fn(
        network,
        trace_axes=(-1,) if case.reduce == "trace" else (),
        vmap_axes=0,
        implementation=nt.NtkImplementation[TOOLS[tool]],
    )
    # It divides the trace by the number of outputs.
    factor = OUTPUTS if case.reduce == "trace" else 1
    compiled = jax.jit(lambda p, inputs: kernel(inputs, None, p) * factor).lower(parameters, x).compile()
    return lambda: compiled(parameters, x).block_until_ready(), np.asarray


def _fast_layout(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2 and not name.startswith(("token", "position")):
        value = value.T
    return np.ascontiguousarray(value)


def _act(p: dict[str, Any], name: str, h: Any) -> Any:
    import jax.numpy as jnp

    for slope in SLOPE_NAMES:
        if f"{name}.{slope}" in p:
            return jnp.maximum(h, 0) + p[f"{name}.{slope}"] * jnp.minimum(h, 0)
    return jnp.maximum(h, 0)


def _linear(p: dict[str, Any], name: str, h: Any) -> Any:
    return h @ p[f"{name}.weight"] + p[f"{name}.bias"]


def _convolution(p: dict[str, Any], name: str, h: Any, stride: int = 1) -> Any:
    from jax import lax

    dimensions = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(
        h, p[f"{name}.weight"], (stride, stride), ((1, 1), (1, 1)), dimension_numbers=dimensions
    )
    return h + p[f"{name}.bias"] if f"{name}.bias" in p else h


def _batch_norm(p: dict[str, Any], statistics: dict[str, Any], name: str, h: Any) -> Any:
    import jax.numpy as jnp

    h = (h - statistics[f"{name}.running_mean"]) / jnp.sqrt(statistics[f"{name}.running_var"] + 1e-5)
    return h * p[f"{name}.weight"] + p[f"{name}.bias"]


def _layer_norm(p: dict[str, Any], name: str, h: Any) -> Any:
    import jax.numpy as jnp

    h = h - h.mean(-1, keepdims=True)
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
    return h * p[f"{name}.weight"] + p[f"{name}.bias"]


def _mlp(p: dict[str, Any], x: Any, *, statistics: dict[str, Any], width: int, depth: int) -> Any:
    for number in range(1, depth + 1):
        x = _act(p, f"act{number}", _linear(p, f"linear{number}", x))
    return _linear(p, "readout", x)


def _cnn(p: dict[str, Any], x: Any, *, statistics: dict[str, Any]) -> Any:
    for number, stride in enumerate([1, 1, 1, 2, 1, 2, 1], 1):
        x = _act(p, f"act{number}", _convolution(p, f"conv{number}", x, stride))
    return _linear(p, "readout", x.mean((1, 2)))


def _resnet20(p: dict[str, Any], x: Any, *, statistics: dict[str, Any]) -> Any:
    import jax.numpy as jnp
    from jax import lax

    x = _act(p, "act", _batch_norm(p, statistics, "norm", _convolution(p, "conv", x)))
    for number in range(1, 10):
        block, stride = f"block{number}", 2 if number in (4, 7) else 1
        y = _batch_norm(p, statistics, f"{block}.norm1", _convolution(p, f"{block}.conv1", x, stride))
        y = _convolution(p, f"{block}.conv2", _act(p, f"{block}.act1", y))
        y = _batch_norm(p, statistics, f"{block}.norm2", y)
        if stride == 2:
            x = lax.slice(x, (0, 0, 0, 0), x.shape, (1, 2, 2, 1))
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        x = _act(p, f"{block}.act2", x + y)
    return _linear(p, "readout", x.mean((1, 2)))


def _transformer(p: dict[str, Any], tokens: Any, *, statistics: dict[str, Any], one_hot: bool, heads: int = 4) -> Any:
    import jax

    table = p["token.weight"]
    x = (jax.nn.one_hot(tokens, len(table)) @ table if one_hot else table[tokens]) + p["position.weight"]
    h = _layer_norm(p, "norm1", x)
    q, k, v = (
        _linear(p, f"attention.{part}", h).reshape(*h.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        for part in ("query", "key", "value")
    )
    weights = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5, axis=-1)
    h = (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + _linear(p, "attention.out", h)
    h = _act(p, "act", _linear(p, "up", _layer_norm(p, "norm2", x)))
    x = x + _linear(p, "down", h)
    return _linear(p, "readout", _layer_norm(p, "norm3", x).mean(1))


NETWORKS: dict[str, Callable[..., Any]] = {
    "mlp": _mlp, "cnn": _cnn, "resnet20": _resnet20, "transformer": _transformer,
}  # fmt: skip
