"""Which layers and functions count as activations that a normalization layer can contain."""

import keras
import numpy as np
import pytest
from backends import numpy
from keras import activations, layers, ops

from keras_proxynorm.graph.activation_nodes import activation_of, describe_activation, same_activation

LAYERS = {
    "relu": layers.ReLU(),
    "relu6": layers.ReLU(6),
    "ReLU(max_value=3.0, negative_slope=0.0, threshold=0.0)": layers.ReLU(3.0),
    "ReLU(negative_slope=0.1, threshold=1.0)": layers.ReLU(negative_slope=0.1, threshold=1.0),
    "LeakyReLU(negative_slope=0.3)": layers.LeakyReLU(),
    "elu": layers.ELU(),
    "ELU(alpha=0.5)": layers.ELU(0.5),
    "silu": layers.Activation("swish"),
    "tanh": layers.Activation("tanh"),
}

FUNCTIONS = {
    "celu": ops.celu,
    "elu": ops.elu,
    "ELU(alpha=0.5)": lambda x: ops.elu(x, 0.5),
    "gelu": activations.gelu,
    "hard_shrink": ops.hard_shrink,
    "hard_sigmoid": ops.hard_sigmoid,
    "hard_silu": ops.hard_silu,
    "hard_tanh": ops.hard_tanh,
    "LeakyReLU(negative_slope=0.2)": activations.leaky_relu,
    "log_sigmoid": ops.log_sigmoid,
    "relu": ops.relu,
    "relu6": ops.relu6,
    "ReLU(max_value=3.0, negative_slope=0.0, threshold=0.0)": lambda x: activations.relu(x, max_value=3.0),
    "selu": ops.selu,
    "sigmoid": activations.sigmoid,
    "silu": ops.silu,
    "soft_shrink": ops.soft_shrink,
    "softplus": ops.softplus,
    "softsign": ops.softsign,
    "sparse_plus": ops.sparse_plus,
    "sparse_sigmoid": ops.sparse_sigmoid,
    "squareplus": ops.squareplus,
    "tanh": activations.tanh,
    "tanh_shrink": ops.tanh_shrink,
}

NONE = {
    "linear": layers.Activation("linear"),
    "softmax": layers.Softmax(),
    "Activation softmax": layers.Activation("softmax"),
    "prelu": layers.PReLU(),
    "dropout": layers.Dropout(0.5),
    "dense": layers.Dense(3, activation="relu"),
}


def operation(function):
    """The operation that a function leaves in a graph."""
    inputs = keras.Input((4,))
    return next(x for x in keras.Model(inputs, function(inputs)).operations if not isinstance(x, layers.InputLayer))


def check(applied, expected):
    activation = activation_of(applied)
    assert describe_activation(activation) == expected
    x = ops.convert_to_tensor(np.linspace(-8, 8, 101).astype("float32"))
    np.testing.assert_allclose(numpy(activation(x)), numpy(applied(x)), atol=1e-6)
    # It survives a file.
    copy = activations.get(activations.serialize(activation))
    np.testing.assert_allclose(numpy(copy(x)), numpy(applied(x)), atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check(LAYERS[name], name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check(operation(FUNCTIONS[name]), name)


@pytest.mark.parametrize("name", NONE)
def test_what_is_none(name):
    assert activation_of(NONE[name]) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.softmax(x),
        lambda x: ops.mean(x, axis=1, keepdims=True),
        lambda x: x + x,
        # Keras would save these under the names of other functions, or of none.
        lambda x: ops.gelu(x, approximate=True),
        lambda x: ops.celu(x, 0.5),
        lambda x: ops.soft_shrink(x, 1.0),
    ],
)
def test_functions_that_are_none(function):
    assert activation_of(operation(function)) is None


def test_same():
    relus = [activation_of(x) for x in (layers.ReLU(), layers.Activation("relu"), operation(ops.relu))]
    assert all(same_activation(relus[0], relu) for relu in relus)
    leaky = [activation_of(layers.LeakyReLU(slope)) for slope in (0.1, 0.1, 0.2)]
    assert same_activation(leaky[0], leaky[1]) and not same_activation(leaky[0], leaky[2])
    assert not same_activation(leaky[0], relus[0])
