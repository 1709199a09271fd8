"""The step with a gradient by hand against automatic differentiation of its formula."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import MODES, compiled, tensorflow_only

import keras_proxynorm
from keras_proxynorm.kernels.tensorflow import normalize_and_activate as step
from keras_proxynorm.moments import resolve_activation

ACTIVATIONS = {
    "relu": "relu",
    "leaky_relu": keras.layers.LeakyReLU(0.1),
    "silu": "silu",
    "tanh": "tanh",
    "relu6": "relu6",
    "linear": None,
}


def sample(shape, axis, seed=0):
    """An input and the four vectors."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype("float32")
    scale, offset, output_scale, output_offset = rng.standard_normal((4, shape[axis])).astype("float32")
    scale[0] = offset[0] = 0.0  # the kink itself, for every element
    return x, scale, offset, np.exp(output_scale), output_offset


@tensorflow_only
@pytest.mark.parametrize(
    "name, method, mode",
    [
        # XLA compiles for long: both methods with two activations, and one with all.
        pytest.param(name, method, mode, marks=pytest.mark.slow if mode == "xla" and few else ())
        for name in ACTIVATIONS
        for method, few in (("matmul", name not in ("relu", "silu")), ("sum", False))
        for mode in MODES
    ],
)
def test_step_is_its_formula(name, method, mode):
    import tensorflow as tf

    from keras_proxynorm import reduction

    activation = resolve_activation(ACTIVATIONS[name])
    shape, axis = ((3, 4, 5, 6), 3) if method == "sum" else ((3, 6, 4, 5), 1)
    inputs = [tf.constant(value) for value in sample(shape, axis)]
    upstream = tf.random.stateless_normal(shape, (1, 2))

    def hand(*inputs):
        return step.normalize_and_activate(*inputs, activation, 2, axis, 1e-3)

    def formula(x, scale, offset, output_scale, output_offset):
        # Where the output scale is absorbed, the kinks are where rounding puts them.
        if activation.slopes is not None:
            scale, offset, output_scale = scale * output_scale, offset * output_scale, tf.ones_like(output_scale)
        return step._Step(activation, 2, axis, 1e-3).formula(x, scale, offset, output_offset, output_scale)

    def run(function, *inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)
        return output, *tape.gradient(output, inputs, upstream)

    with reduction(method):
        found = compiled(lambda *inputs: run(hand, *inputs), mode)(*inputs)
    expected = run(formula, *inputs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@tensorflow_only
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_gradient_penalty(name, mode):
    """Compiled code nests the custom gradients in other ways than eager code does."""
    import tensorflow as tf

    activation = resolve_activation(name)
    inputs = [tf.constant(value) for value in sample((3, 4, 5, 6), 3)]

    def hand(*inputs):
        return step.normalize_and_activate(*inputs, activation, 2, 3, 1e-3)

    def formula(x, scale, offset, output_scale, output_offset):
        y = step._Step(activation, 2, 3, 1e-3).formula(x, scale, offset, output_offset)
        return (y - output_offset) * output_scale + output_offset

    def penalty(function, *inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                loss = tf.reduce_sum(tf.square(function(*inputs)))
            gradients = inner.gradient(loss, inputs)
            value = sum(tf.reduce_sum(tf.square(gradient)) for gradient in gradients)
        return value, *outer.gradient(value, inputs)

    found = compiled(lambda *inputs: penalty(hand, *inputs), mode)(*inputs)
    for a, b in zip(found, penalty(formula, *inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@tensorflow_only
def test_materialized_values_are_the_values():
    import tensorflow as tf

    from keras_proxynorm.kernels.tensorflow.normalize_and_activate import _materialize

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 1, 1, 8)) * 10.0 ** rng.uniform(-30, 30, (4, 1, 1, 8))).astype("float32")
    y = rng.standard_normal((8,)).astype("float32")
    found = tf.function(lambda *values: _materialize(*values), jit_compile=True)(x, y)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_array_equal(found[1], y)


@tensorflow_only
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_no_pass_over_the_input_is_wasted(mode):
    """The operations on whole tensors, counted, in the order of the steps: a refactoring must not add any."""
    import tensorflow as tf

    import keras_proxynorm

    layer = keras_proxynorm.GroupNormProxy(groups=2)
    layer.build((2, 8, 8, 4))

    def step(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, tape.gradient(y, [x, *(v.value for v in layer.trainable_variables)], upstream)

    spec = tf.TensorSpec((2, 8, 8, 4))
    graph = tf.function(step, jit_compile=mode == "xla").get_concrete_function(spec, spec).graph
    moves = ("Const", "Identity", "IdentityN", "Placeholder", "Reshape", "NoOp")
    types = [
        operation.type
        for operation in graph.get_operations()
        if operation.type not in moves and any(y.shape.num_elements() == 512 for y in operation.outputs)
    ]
    # Centered, squared; affine, maximum; mask of relu, products for one sum; three terms of the gradient.
    expected = ["Sub", "Square", "Mul", "AddV2", "Maximum", "Sub", "ReluGrad", "Mul", "Mul", "Mul", "AddV2", "AddV2"]
    assert types == expected


@tensorflow_only
def test_activations_keep_their_own_gradients():
    """What is no function of Keras or TensorFlow may have any gradient, and hold variables."""
    import tensorflow as tf

    @tf.custom_gradient
    def steep(x):
        return tf.nn.relu(x), lambda upstream: 7.0 * upstream

    slope = tf.Variable(1.5)
    wrapped = keras.layers.Activation(steep), keras.layers.Lambda(steep), tf.function(steep)
    for activation in (steep, *wrapped, lambda x: x * tf.sigmoid(slope * x)):
        layer = keras_proxynorm.GroupNormProxy(2, activation=activation)
        x = tf.constant(np.random.default_rng(0).standard_normal((2, 3, 4)).astype("float32"))
        layer.build(x.shape)

        def gradients(mask, layer=layer, x=x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(layer(x, mask=mask) ** 3)
            return tape.gradient(loss, [x, slope, *(v.value for v in layer.trainable_variables)])

        # With a mask, the gradient is that of automatic differentiation.
        for found, expected in zip(gradients(None), gradients(tf.ones((2, 3), bool)), strict=True):
            if expected is not None:
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@tensorflow_only
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_functions_of_tensorflow_have_the_gradient_by_hand(activation):
    import tensorflow as tf

    assert resolve_activation(getattr(tf.nn, activation)).is_standard
    assert resolve_activation(getattr(keras.ops, activation)).is_standard
    assert resolve_activation(activation).is_standard
    assert not resolve_activation(lambda x: keras.ops.relu(x)).is_standard


@tensorflow_only
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_training_takes_no_more_memory_than_with_batch_norm(activation):
    script = pathlib.Path(__file__).with_name("peak_memory.py")

    def start(normalization):
        return subprocess.Popen([sys.executable, script, normalization, activation], stdout=subprocess.PIPE, text=True)

    processes = [start("proxy_norm"), start("batch_norm")]
    proxy_norm, batch_norm = (float(process.communicate()[0]) for process in processes)
    # Each of the twelve blocks keeps two or three tensors. One more or less depends on when what is computed.
    assert 20 < proxy_norm <= batch_norm + 1
