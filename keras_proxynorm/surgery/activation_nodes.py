"""Which operations of a graph are activations that a normalization layer can contain."""

import keras

from keras_proxynorm.moments import resolve_activation

__all__ = ["activation_of", "describe_activation", "same_activation"]

# What keras.ops and keras.activations leave in a graph when they are called as functions, by class name, as functions
# of the operation's arguments. Softmax and its kin are missing on purpose: they do not act on each element alone.
_OPERATIONS = {
    "Celu": lambda config: keras.activations.celu if config["alpha"] == 1 else None,
    "Elu": lambda config: keras.activations.elu if config["alpha"] == 1 else keras.layers.ELU(config["alpha"]),
    # The approximate one has no name of its own: Keras would save it as "gelu" and load the exact one.
    "Gelu": lambda config: None if config["approximate"] else keras.activations.gelu,
    "HardShrink": lambda config: keras.activations.hard_shrink if config["threshold"] == 0.5 else None,
    "LeakyRelu": lambda config: keras.layers.LeakyReLU(config["negative_slope"]),
    "ReLU": lambda config: _relu(config["negative_slope"], config["max_value"], config["threshold"]),
    "SoftShrink": lambda config: keras.activations.soft_shrink if config["threshold"] == 0.5 else None,
    "Squareplus": lambda config: keras.activations.squareplus if config["b"] == 4 else None,
    "HardSigmoid": lambda config: keras.activations.hard_sigmoid,
    "HardSilu": lambda config: keras.activations.hard_silu,
    "HardTanh": lambda config: keras.activations.hard_tanh,
    "LogSigmoid": lambda config: keras.activations.log_sigmoid,
    "Relu": lambda config: keras.activations.relu,
    "Relu6": lambda config: keras.activations.relu6,
    "Selu": lambda config: keras.activations.selu,
    "Sigmoid": lambda config: keras.activations.sigmoid,
    "Silu": lambda config: keras.activations.silu,
    "Softplus": lambda config: keras.activations.softplus,
    "Softsign": lambda config: keras.activations.softsign,
    "SparsePlus": lambda config: keras.activations.sparse_plus,
    "SparseSigmoid": lambda config: keras.activations.sparse_sigmoid,
    "Tanh": lambda config: keras.activations.tanh,
    "TanhShrink": lambda config: keras.activations.tanh_shrink,
}


def activation_of(operation: keras.Operation):
    """The activation that `operation` applies and nothing else, as a layer can contain it; None if there is none."""
    activation = _activation(operation)
    if activation is None:
        return None
    try:
        identity = resolve_activation(activation).is_identity
    except ValueError:  # softmax and other functions that do not act on each element alone
        return None
    return None if identity else activation


def _activation(operation):
    if isinstance(operation, keras.layers.Activation):
        return operation.activation
    if isinstance(operation, keras.layers.ReLU):
        return _relu(operation.negative_slope, operation.max_value, operation.threshold)
    if isinstance(operation, keras.layers.LeakyReLU):
        return keras.layers.LeakyReLU(operation.negative_slope)
    if isinstance(operation, keras.layers.ELU):
        return keras.activations.elu if operation.alpha == 1 else keras.layers.ELU(operation.alpha)
    if isinstance(operation, keras.layers.Layer) or not type(operation).__module__.startswith("keras."):
        return None
    make = _OPERATIONS.get(type(operation).__name__)
    return make and make(operation.get_config())


def _relu(negative_slope, max_value, threshold):
    if negative_slope == 0 and threshold == 0 and max_value in (None, 6):
        return keras.activations.relu if max_value is None else keras.activations.relu6
    return keras.layers.ReLU(max_value=max_value, negative_slope=negative_slope, threshold=threshold)


def same_activation(first, second) -> bool:
    """Whether two activations from `activation_of` are one function."""
    return first is second or (
        isinstance(first, keras.layers.Layer)
        and type(first) is type(second)
        and _arguments(first) == _arguments(second)
    )


def describe_activation(activation) -> str | None:
    """A short name such as `"relu"` or `"LeakyReLU(negative_slope=0.1)"`; None for None."""
    if isinstance(activation, keras.layers.Layer):
        arguments = ", ".join(f"{key}={value}" for key, value in _arguments(activation).items())
        return f"{type(activation).__name__}({arguments})"
    return activation and getattr(activation, "__name__", type(activation).__name__)


def _arguments(activation):
    config = activation.get_config()
    return {key: config[key] for key in ("alpha", "negative_slope", "max_value", "threshold") if config.get(key)}
