"""Looks at calls of layers, and at what a normalization computes before its scale and offset."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator

import keras
from keras import ops

from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = ["normalized_input", "observed"]


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
