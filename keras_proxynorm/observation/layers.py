"""Looks at what the layers of a model compute, while it runs as it is."""

import collections
import contextlib
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import TypeAlias

import keras
from keras import layers as keras_layers
from keras import ops

from keras_proxynorm.layers.proxy_normalization import ProxyNormalizationLayer

__all__ = [
    "LayerChoice",
    "channel_axis",
    "channel_statistics",
    "check_all_seen",
    "choose",
    "distinct",
    "has_activation",
    "is_normalization",
    "is_visible",
    "left_unchanged",
]

LayerChoice: TypeAlias = str | type | keras.layers.Layer | Iterable | Callable[[keras.layers.Layer], bool] | None

_NORMALIZATIONS = (
    keras_layers.BatchNormalization,
    keras_layers.GroupNormalization,
    keras_layers.LayerNormalization,
    keras_layers.RMSNormalization,
    ProxyNormalizationLayer,
)
_ACTIVATIONS = (
    keras_layers.Activation,
    keras_layers.ELU,
    keras_layers.LeakyReLU,
    keras_layers.PReLU,
    keras_layers.ReLU,
)


def is_normalization(layer: keras.layers.Layer) -> bool:
    """Whether it is a normalization whose normalized input can be looked at."""
    return isinstance(layer, _NORMALIZATIONS)


def has_activation(layer: keras.layers.Layer) -> bool:
    """Whether its output is an activation: it is an activation layer, or has one at its end that is not linear."""
    if isinstance(layer, _ACTIVATIONS) and not hasattr(layer, "activation"):
        return True
    # Recurrent layers have one inside.
    if isinstance(layer, keras_layers.RNN) or hasattr(layer, "state_size"):
        return False
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    return activation is not None and name.lower() not in ("linear", "softmax", "log_softmax", "logsoftmax")


def choose(
    model: keras.Model, layers: LayerChoice, default: Callable[[keras.layers.Layer], bool], kind: str
) -> dict[str, keras.layers.Layer]:
    """The layers of a model that a user asks for, wherever in it they are.

    Args:
        model: A built model.
        layers: A name or a path of a layer, a class, a layer, or a list of these; a function of a layer that says
            whether; or None for the default.
        default: Such a function.
        kind: What the default is, in words.

    Returns:
        Dict from names to layers, in the order of the model. Where two layers have the same name it is their path.

    Raises:
        ValueError: If there is no such layer.
    """
    every = [layer for layer in model._flatten_layers(include_self=False) if not isinstance(layer, keras.Model)]
    every = list({id(layer): layer for layer in every}.values())
    if layers is None:
        chosen = [layer for layer in every if default(layer)]
        missing = f"The model has no {kind}; name the layers in question with the argument `layers`."
    elif callable(layers) and not isinstance(layers, (type, keras.layers.Layer)):
        chosen = [layer for layer in every if layers(layer)]
        missing = "Argument `layers` must choose at least one layer of the model."
    else:
        asked = [*layers] if isinstance(layers, Iterable) and not isinstance(layers, (str, type)) else [layers]
        chosen = []
        for choice in asked:
            found = [layer for layer in every if _is_meant(layer, choice)]
            if not found:
                raise ValueError(
                    "Argument `layers` must be names, classes or instances of layers of the model, or a function of a "
                    f"layer. Received: layers={layers!r}, and the model has no layer {choice!r}"
                )
            chosen += found
        chosen = [layer for layer in every if any(layer is other for other in chosen)]
        missing = "Argument `layers` must not be empty."
    if not chosen:
        raise ValueError(f"{missing} Received: layers={layers!r} and the model '{model.name}'")
    names = [layer.name for layer in chosen]
    names = [layer.path if names.count(layer.name) > 1 else layer.name for layer in chosen]
    return {
        name if names.count(name) == 1 else f"{name}#{i}": layer
        for i, (name, layer) in enumerate(zip(names, chosen, strict=True))
    }


def _is_meant(layer, choice):
    if isinstance(choice, str):
        return choice in (layer.name, layer.path)
    return isinstance(layer, choice) if isinstance(choice, type) else layer is choice


@contextlib.contextmanager
def left_unchanged(variables: Iterable, values: Iterable | None = None) -> Iterator[None]:
    """Undoes what is done to variables and random states in the block, which may see other values of some variables.

    Args:
        variables: Those that have other values, or that losses are added for.
        values: Their values. Defaults to those that they have.
    """
    values = [variable.value for variable in variables] if values is None else values
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            # The random numbers of dropout without a seed. The same for all blocks, as those with a seed are.
            stack.enter_context(torch.random.fork_rng())
        # Without a value here, Keras finds none for the regularization of a variable.
        stack.enter_context(keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))))
        yield


def distinct(keys: Iterable[tuple[str, int]]) -> list[str]:
    """Names for the outputs of layers, of which one may have outputs with different numbers of channels.

    >>> from keras_proxynorm.observation.layers import distinct
    >>> distinct([("relu", 8), ("norm", 8), ("relu", 16)])
    ['relu', 'norm', 'relu#2']
    """
    counts: collections.Counter[str] = collections.Counter()
    names = []
    for name, _ in keys:
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names


def is_visible(x) -> bool:
    """Whether a value is one tensor of rank 2 or more that holds numbers, not the symbol of one that is traced."""
    if not keras.ops.is_tensor(x) or len(x.shape) < 2:
        return False
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return isinstance(x, tf.Tensor) and hasattr(x, "numpy")
    if backend == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer)
    return not isinstance(x, keras.KerasTensor)


def channel_axis(layer: keras.layers.Layer, rank: int) -> int:
    """The channel axis of the output of a layer."""
    axis = getattr(layer, "axis", None) if is_normalization(layer) else None
    if isinstance(axis, (list, tuple)):
        axis = axis[-1] if len(axis) == 1 else None
    if axis is not None:
        return axis % rank
    default = keras.config.image_data_format() if rank > 3 else "channels_last"
    return 1 if getattr(layer, "data_format", default) == "channels_first" and rank > 2 else rank - 1


def channel_statistics(x, axis: int):
    """Mean and standard deviation over the positions, for each sample and channel.

    Args:
        x: Tensor of rank 2 or more; axis 0 is the batch.
        axis: Index of the channel axis, positive.

    Returns:
        NumPy array of shape ``(2, batch, channels)``, float64; without positions the standard deviations are 0.
    """
    if keras.backend.standardize_dtype(x.dtype) != "float64":
        x = ops.cast(x, "float32")
    positions = [i for i in range(1, len(x.shape)) if i != axis]
    mean = ops.mean(x, positions, keepdims=True) if positions else x
    stddev = ops.sqrt(ops.mean(ops.square(x - mean), positions)) if positions else ops.zeros_like(x)
    return ops.convert_to_numpy(ops.stack([ops.reshape(mean, stddev.shape), stddev])).astype("float64")


def check_all_seen(chosen: Iterable[str], seen: Iterable[str]) -> None:
    """Warns of layers without a value that could be looked at, and raises a ValueError if that is all of them."""
    hidden = [name for name in chosen if name not in seen]
    if len(hidden) == len([*chosen]):
        raise ValueError(
            "Argument `layers` must have layers with one output each, that are called, and not in a loop or a compiled "
            f"function. Received: {', '.join(hidden)}"
        )
    if hidden:
        warnings.warn(
            "Left out, because they were not called, have several outputs, or run in a loop or a compiled function: "
            f"{', '.join(hidden)}",
            stacklevel=4,
        )
