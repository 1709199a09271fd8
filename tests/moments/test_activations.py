"""The registry: what is recognized, refused, examined and warned about."""

import dataclasses
import functools
import importlib
import operator
import warnings

import keras
import numpy as np
import pytest
from backends import MODES, compiled, numpy, tensorflow_only, tensors
from keras import ops

from keras_proxynorm import activation_moments, register_activation
from keras_proxynorm.moments import resolve_activation

POINTS = np.float32([-7, -3, -1.5, -0.7, -0.2, 0, 0.3, 0.9, 2, 5.5, 6.5])


def values(function):
    return numpy(function(*tensors(POINTS)))


ELEMENTWISE = [
    name
    for name in sorted(dir(keras.activations))
    if name not in ("deserialize", "get", "serialize", "glu", "log_softmax", "softmax", "sparsemax", "threshold")
    and not name.startswith("_")
]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_function_of_keras_is_known(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        by_name = resolve_activation(name)
        by_function = resolve_activation(getattr(keras.activations, name))
    assert by_name == by_function
    np.testing.assert_array_equal(values(by_name.function), values(getattr(keras.activations, name)))


class Twice(keras.layers.Activation):
    def call(self, inputs):
        return 2 * super().call(inputs)


@dataclasses.dataclass
class Scaled:
    """A callable that has no hash."""

    factor: float

    def __call__(self, x):
        return self.factor * ops.tanh(x)


@pytest.mark.parametrize(
    "activation, expected, kinks",
    [
        (keras.layers.ReLU(), lambda x: ops.relu(x), (0,)),
        (keras.layers.ReLU(max_value=2), lambda x: ops.clip(x, 0, 2), (0, 2)),
        (keras.layers.LeakyReLU(0.1), lambda x: ops.leaky_relu(x, 0.1), (0,)),
        (keras.layers.ELU(2.0), lambda x: ops.elu(x, 2.0), (0,)),
        (keras.layers.Activation("hard_silu"), lambda x: ops.hard_silu(x), (-3, 3)),
        (Twice("silu"), lambda x: 2 * ops.silu(x), ()),
        (functools.partial(keras.activations.leaky_relu, negative_slope=0.3), lambda x: ops.leaky_relu(x, 0.3), (0,)),
        (functools.partial(keras.activations.soft_shrink, threshold=1.0), lambda x: ops.soft_shrink(x, 1.0), (-1, 1)),
        (functools.partial(keras.activations.squareplus, b=0), lambda x: ops.relu(x), (0,)),
        (ops.relu, ops.relu, (0,)),
        (lambda x: ops.maximum(x, ops.zeros_like(x)), ops.relu, (0,)),
        (lambda x: ops.clip(x, 0, 6), ops.relu6, (0, 6)),
        (Scaled(0.5), lambda x: 0.5 * ops.tanh(x), ()),
        ({"class_name": "ReLU", "module": "keras.layers", "config": {"max_value": 6.0}}, ops.relu6, (0, 6)),
        (None, lambda x: x, ()),
    ],
)
def test_what_an_activation_stands_for(activation, expected, kinks):
    resolved = resolve_activation(activation)
    assert resolved.kinks == kinks
    np.testing.assert_allclose(values(resolved.function), values(expected), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The moments of the activation")
def test_what_looks_like_a_function_of_keras_is_not_taken_for_it():
    for activation in (
        lambda x: ops.relu(x),
        lambda x: ops.clip(x, 0, 20),
        lambda x: ops.maximum(x, 0.2 * x),
        functools.partial(ops.leaky_relu, negative_slope=0.2),
        lambda x: x,
        lambda x: ops.silu(x),
    ):
        resolved = resolve_activation(activation)
        assert not (resolved.is_standard or resolved.is_identity or resolved.is_homogeneous or resolved.exponential)
        assert resolved.nodes > 129


LIBRARY = {
    "tensorflow": ("tensorflow.nn", ["relu", "relu6", "silu", "gelu", "tanh", "leaky_relu", "elu"]),
    "jax": ("jax.nn", ["relu", "relu6", "silu", "gelu", "tanh", "hard_swish", "leaky_relu"]),
    "torch": ("torch.nn.functional", ["relu", "silu", "tanh", "elu", "hardtanh", "hardswish", "leaky_relu"]),
}[keras.backend.backend()]


def library_function(name):
    module, attribute = LIBRARY[0].split(".", 1)
    return operator.attrgetter(f"{attribute}.{name}")(importlib.import_module(module))


@pytest.mark.parametrize("name", LIBRARY[1])
def test_functions_of_the_backend_are_known_by_identity(name):
    function = library_function(name)
    resolved = resolve_activation(function)
    assert resolved.function is function and resolved.is_standard
    by_name = resolve_activation({"hardtanh": "hard_tanh", "hardswish": "hard_silu"}.get(name, name))
    if name == "leaky_relu":
        by_name = dataclasses.replace(by_name, slopes=(0.2 if LIBRARY[0] == "tensorflow.nn" else 0.01, 1.0))
    assert dataclasses.replace(by_name, function=function) == resolved
    assert resolve_activation(keras.layers.Activation(function)) == resolved
    with pytest.raises(ValueError, match="`fn` must be an activation of your own"):
        register_activation(function)


@tensorflow_only
def test_the_identity_of_tensorflow_is_linear():
    import tensorflow as tf

    assert resolve_activation(tf.identity).is_identity


@pytest.mark.filterwarnings("ignore:The moments of the activation")
def test_kinks_are_found_by_looking():
    def crooked(x):
        steps = ops.where(x > 2.5, 2.0, 0.0) + ops.sign(x + 4)
        return ops.maximum(x + 1, 0.9 * (x + 1)) + steps + ops.abs(x - 7.875)

    assert resolve_activation(crooked).kinks == (-4, -1, 2.5, 7.875)
    assert resolve_activation(lambda x: ops.round(16 * x) / 16).kinks == ()
    assert resolve_activation(ops.round).kinks == tuple(np.arange(-7.5, 8))
    for smooth in (
        ops.sin,
        lambda x: x**3,
        lambda x: ops.tanh(3 * x),
        lambda x: ops.exp(x),
        lambda x: 1e4 * ops.silu(x),
    ):
        assert resolve_activation(smooth).kinks == ()


def test_jumps_that_are_not_found_are_warned_about():
    with pytest.warns(UserWarning, match="moments of the activation"):
        resolve_activation(lambda x: ops.where(x > 0.3, 1.0, 0.0))


@pytest.mark.parametrize(
    "activation",
    [
        "softmax",
        "log_softmax",
        "glu",
        "sparsemax",
        keras.activations.softmax,
        keras.layers.Softmax(),
        keras.layers.Activation("softmax"),
        functools.partial(keras.activations.softmax, axis=1),
        lambda x: ops.softmax(x),
        lambda x: x / ops.max(ops.abs(x)),
        lambda x: ops.cumsum(x, axis=-1),
        lambda x: ops.flip(x, axis=0),
        lambda x: ops.sum(x),
        lambda x: x[:1],
    ],
)
def test_what_mixes_elements_is_refused(activation):
    with pytest.raises(ValueError, match="`activation` must be .* of each element alone.*Received: activation="):
        resolve_activation(activation)


def layer_with_weights():
    layer = keras.layers.Dense(3)
    layer.build((None, 3))
    return layer


@pytest.mark.parametrize(
    "activation, message",
    [
        ("rellu", "must be the name of an activation"),
        (3, "must be the name of an activation"),
        (keras.layers.ReLU, "an instance of a"),
        ("threshold", "needs other arguments"),
        (keras.layers.PReLU(), "without weights"),
        (layer_with_weights(), "without weights"),
        (lambda x, y: x + y, "callable with one float tensor.*fails with TypeError"),
    ],
)
def test_what_cannot_be_used_is_refused(activation, message):
    with pytest.raises(ValueError, match=rf"`activation`.*{message}"):
        resolve_activation(activation)


def hinge(x, slope=0.25):
    return ops.maximum(x - 1, slope * (x - 1))


class Hinge(keras.layers.Layer):
    def call(self, inputs):
        return hinge(inputs)


def test_registration():
    assert resolve_activation(hinge).nodes > 129
    mean, variance = (float(numpy(x)) for x in activation_moments(keras.layers.LeakyReLU(0.25), -0.7, 1.0))
    for fn, activation in ((hinge, hinge), (Hinge, Hinge())):
        assert register_activation(fn, kinks=[1]) is fn
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = [float(numpy(x)) for x in activation_moments(activation, 0.3, 1.0)]
        np.testing.assert_allclose(found, [mean, variance], rtol=1e-5)
    # A partial is another function, with its own arguments.
    steeper = functools.partial(hinge, slope=0.5)
    assert resolve_activation(steeper).nodes > 129
    register_activation(steeper, kinks=(1,))
    assert resolve_activation(steeper) == dataclasses.replace(resolve_activation(hinge), function=steeper)
    np.testing.assert_allclose(values(resolve_activation(steeper).function), values(steeper))


@pytest.mark.parametrize(
    "fn, kinks, named",
    [
        ("relu", (0,), "fn"),
        (keras.layers.ReLU(), (0,), "fn"),
        (Scaled(1.0), (0,), "fn"),
        (keras.activations.relu, (0,), "fn"),
        (keras.activations.softmax, (), "fn"),
        (ops.relu, (0,), "fn"),
        (ops.exp, (), "fn"),
        (keras.layers.ReLU, (0,), "fn"),
        (keras.layers.Dense, (), "fn"),
        (functools.partial(keras.activations.relu, max_value=3), (0,), "fn"),
        (functools.partial(functools.partial(ops.leaky_relu, negative_slope=3)), (0,), "fn"),
        (hinge, 0, "kinks"),
        (hinge, ("zero",), "kinks"),
        (hinge, (0, float("nan")), "kinks"),
    ],
)
def test_bad_registration(fn, kinks, named):
    before = [float(numpy(x)) for x in activation_moments("relu", 0.3, 1.0)]
    with pytest.raises(ValueError, match=rf"`{named}`.*Received: {named}="):
        register_activation(fn, kinks=kinks)
    assert [float(numpy(x)) for x in activation_moments("relu", 0.3, 1.0)] == before


def test_a_function_that_is_registered_again_has_the_new_kinks():
    def bent(x):
        return ops.abs(x - 0.3)

    register_activation(bent, kinks=(0.3,))
    resolved = resolve_activation(bent)
    register_activation(bent, kinks=(0.3, 1))
    assert resolved.kinks == (0.3,) and resolve_activation(bent).kinks == (0.3, 1)


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_examined_while_tracing_too(mode):
    def relu(x):
        return ops.maximum(x, ops.zeros_like(x))

    mean, variance = compiled(lambda m, s: activation_moments(relu, m, s), mode)(*tensors(0.3, 1.0))
    expected = activation_moments("relu", 0.3, 1.0)
    np.testing.assert_allclose([numpy(mean), numpy(variance)], [numpy(x) for x in expected], rtol=1e-5)
    with pytest.raises(ValueError, match="each element alone"):
        compiled(lambda m: activation_moments(lambda x: ops.softmax(x), m, 1.0), mode)(*tensors(np.zeros(3, "float32")))


@pytest.mark.parametrize("mode", MODES)
def test_activations_may_read_what_is_traced(mode):
    def moments(m, s, slope):
        return activation_moments(lambda x: ops.maximum(x, slope * x), m, s)

    found = compiled(moments, mode)(*tensors(0.3, 1.0, 0.25))
    expected = activation_moments(keras.layers.LeakyReLU(0.25), 0.3, 1.0)
    np.testing.assert_allclose([numpy(x) for x in found], [numpy(x) for x in expected], rtol=1e-4)
