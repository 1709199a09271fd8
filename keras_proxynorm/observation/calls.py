"""Looks at calls of layers, and at what a normalization computes before its scale and offset."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = ["channel_moments", "check_batch", "normalized_input", "observed", "visit_normalized_inputs"]


@contextlib.contextmanager
def observed(layers: dict[str, keras.layers.Layer], observe: Callable) -> Iterator[None]:
    """Has a function called in place of each call of some layers.

    Args:
        layers: Names and layers.
        observe: Function of a name, the layer, its own `call`, and the arguments and keyword arguments of the call;
            returns what the call returns.
    """

    def replace(name, layer):
        call = layer.call

        def observed_call(*args, **kwargs):
            return observe(name, layer, call, args, kwargs)

        # Past Keras and PyTorch, which keep account of attributes.
        object.__setattr__(layer, "call", observed_call)

    own = {name: vars(layer).get("call") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            replace(name, layer)
        yield
    finally:
        for name, layer in layers.items():
            if own[name] is not None:
                object.__setattr__(layer, "call", own[name])
            elif "call" in vars(layer):
                object.__delattr__(layer, "call")


def normalized_input(layer: keras.layers.Layer, call: Callable, args: tuple, kwargs: dict):
    """What a normalization layer computes in one call, before its scale and offset and what follows them."""
    if isinstance(layer, ProxyNormalizationLayer):
        return layer.normalize_inputs(*args, **{key: kwargs[key] for key in ("inputs", "mask") if key in kwargs})
    neutral = {"gamma": ops.ones, "scale": ops.ones, "beta": ops.zeros}
    weights = [(getattr(layer, name, None), make) for name, make in neutral.items()]
    mapping = [(x, make(x.shape, x.dtype)) for x, make in weights if isinstance(x, keras.Variable)]
    # The layer itself computes it, with another scale and offset, which are not left in it.
    with keras.StatelessScope(state_mapping=mapping):
        return call(*args, **kwargs)


def channel_moments(x, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, over samples and positions.

    Args:
        x: Tensor of rank 2 or more.
        axis: The channel axis.

    Returns:
        Two NumPy vectors.
    """
    axis %= len(x.shape)
    x = ops.cast(x, "float64" if keras.backend.standardize_dtype(x.dtype) == "float64" else "float32")
    axes = [i for i in range(len(x.shape)) if i != axis]
    mean, stddev = ops.mean(x, axes), ops.std(x, axes)
    return ops.convert_to_numpy(mean), ops.convert_to_numpy(stddev)


def visit_normalized_inputs(model: keras.Model, layers: Iterable[keras.layers.Layer], data, visit: Callable) -> None:
    """Runs a model, and has normalization layers changed one after the other, each before it computes its output.

    Args:
        model: A model.
        layers: Normalization layers in it.
        data: A batch of inputs, as for a call of the model.
        visit: Function of a layer and of mean and standard deviation of its normalized input, as `channel_moments`
            returns them. It is called in the first call of each layer, so that it sees what the layers before it, as
            they have been changed, make of the data.
    """
    layers = {str(id(layer)): layer for layer in layers}
    waiting = set(layers)

    def observe(name, layer, call, args, kwargs):
        if name in waiting:
            waiting.remove(name)
            visit(layer, *channel_moments(normalized_input(layer, call, args, kwargs), layer.axis))
        return call(*args, **kwargs)

    with observed(layers, observe):
        model(data, training=False)


@contextlib.contextmanager
def check_batch(name: str, model: keras.Model, data) -> Iterator[None]:
    """Turns errors of a run of a model with an argument of a user's, which is to be a batch of inputs, into its error.

    Args:
        name: Of the argument.
        model: The model.
        data: The value of the argument.

    Raises:
        ValueError: In place of any exception in the block, and if there are no samples.
    """
    try:
        if {len(x) for x in keras.tree.flatten(data)} <= {0}:
            raise ValueError("there are no samples in it")
        yield
    except Exception as error:  # whatever the layers of the model raise
        described = keras.tree.map_structure(lambda x: f"shape {tuple(x.shape)}" if hasattr(x, "shape") else x, data)
        raise ValueError(
            f"Argument `{name}` must be a batch of inputs of the model, as for a call of it. Received: {described}, "
            f"with which the model '{model.name}' does not run: {error}"
        ) from error
