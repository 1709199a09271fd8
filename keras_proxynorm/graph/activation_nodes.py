"""Which operations of a graph are activations that a normalization layer can absorb."""

from typing import Any

import keras

from keras_proxynorm.moments import resolve_activation

__all__ = ["activation_of", "describe_activation", "looks_like_activation", "same_activation"]

_LAYERS = (
    keras.layers.Activation,
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ReLU,
    keras.layers.Softmax,
)

# What functions of keras.ops and keras.activations leave in a graph, by the names of their classes: those that have no
# arguments, with the names of the activations,
_OPERATIONS = {
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "HardTanh": "hard_tanh",
    "LogSigmoid": "log_sigmoid",
    "Relu": "relu",
    "Relu6": "relu6",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "SparsePlus": "sparse_plus",
    "SparseSigmoid": "sparse_sigmoid",
    "Tanh": "tanh",
    "TanhShrink": "tanh_shrink",
}
# those that are activations only with these arguments, because with others Keras would save them under the same name,
_OPERATIONS_WITH_DEFAULTS = {
    "Celu": ("celu", {"alpha": 1.0}),
    "Gelu": ("gelu", {"approximate": False}),
    "HardShrink": ("hard_shrink", {"threshold": 0.5}),
    "SoftShrink": ("soft_shrink", {"threshold": 0.5}),
    "Squareplus": ("squareplus", {"b": 4}),
}
# and those that are layers, too.
_OPERATIONS_WITH_LAYERS = {
    "Elu": lambda alpha: _elu(alpha),
    "LeakyRelu": keras.layers.LeakyReLU,
    "ReLU": lambda **arguments: _relu(**arguments),
}
_OTHER_OPERATIONS = ("Glu", "LogSoftmax", "Mish", "Softmax", "Sparsemax", "Threshold")


def activation_of(operation: keras.Operation) -> Any:
    """The activation that `operation` applies and nothing else, as an argument of a layer; None if there is none."""
    activation = _activation(operation)
    if activation is None:
        return None
    try:
        identity = resolve_activation(activation).is_identity
    except ValueError:  # softmax and other functions that do not act on each element alone
        return None
    return None if identity else activation


def looks_like_activation(operation: keras.Operation) -> bool:
    """Whether it is an activation, one that a normalization layer can absorb or not."""
    if isinstance(operation, _LAYERS):
        return getattr(operation, "activation", None) is not keras.activations.linear
    known = (*_OPERATIONS, *_OPERATIONS_WITH_DEFAULTS, *_OPERATIONS_WITH_LAYERS, *_OTHER_OPERATIONS)
    return _is_function(operation) and type(operation).__name__ in known


def _is_function(operation):
    return not isinstance(operation, keras.layers.Layer) and type(operation).__module__.startswith("keras.")


def _activation(operation):
    # The classes themselves: a subclass may do more.
    if type(operation) is keras.layers.Activation:
        return operation.activation
    if type(operation) is keras.layers.ReLU:
        return _relu(operation.negative_slope, operation.max_value, operation.threshold)
    if type(operation) is keras.layers.LeakyReLU:
        return keras.layers.LeakyReLU(operation.negative_slope)
    if type(operation) is keras.layers.ELU:
        return _elu(operation.alpha)
    if not _is_function(operation):
        return None
    name, arguments = type(operation).__name__, operation.get_config()
    arguments.pop("name")
    if name in _OPERATIONS:
        return getattr(keras.activations, _OPERATIONS[name])
    if name in _OPERATIONS_WITH_DEFAULTS:
        activation, defaults = _OPERATIONS_WITH_DEFAULTS[name]
        return getattr(keras.activations, activation) if arguments == defaults else None
    return _OPERATIONS_WITH_LAYERS[name](**arguments) if name in _OPERATIONS_WITH_LAYERS else None


def _elu(alpha):
    return keras.activations.elu if alpha == 1 else keras.layers.ELU(alpha)


def _relu(negative_slope, max_value, threshold):
    if negative_slope == 0 and threshold == 0 and max_value in (None, 6):
        return keras.activations.relu if max_value is None else keras.activations.relu6
    return keras.layers.ReLU(max_value=max_value, negative_slope=negative_slope, threshold=threshold)


def same_activation(first: Any, second: Any) -> bool:
    """Whether two activations from `activation_of` are one function."""
    return first is second or (
        isinstance(first, keras.layers.Layer)
        and type(first) is type(second)
        and _arguments(first) == _arguments(second)
    )


def describe_activation(activation: Any) -> str | None:
    """A short name such as `"relu"` or `"LeakyReLU(negative_slope=0.1)"`; None for None."""
    if isinstance(activation, keras.layers.Layer):
        arguments = ", ".join(f"{key}={value}" for key, value in _arguments(activation).items() if value is not None)
        return f"{type(activation).__name__}({arguments})"
    return activation and getattr(activation, "__name__", type(activation).__name__)


def _arguments(activation):
    config = activation.get_config()
    return {key: value for key, value in config.items() if key not in ("name", "trainable", "dtype")}
