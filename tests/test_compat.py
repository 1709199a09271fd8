"""What breaks if a new version of Keras or TensorFlow moves a private name that the package uses."""

import keras
import numpy as np
from backends import tensorflow_only

from keras_proxynorm import compat


@tensorflow_only
def test_xla_is_recognized():
    """Without it, what is compiled by XLA on a CPU sums over positions several times slower."""
    import tensorflow as tf

    found = {}

    def function(name, x):
        found[name] = compat.is_compiled_by_xla()
        return x

    x = tf.zeros(())
    function("eager", x)
    tf.function(lambda x: function("graph", x))(x)
    tf.function(lambda x: function("xla", x), jit_compile=True)(x)
    inner = tf.function(lambda x: function("inside", x))
    tf.function(lambda x: inner(x), jit_compile=True)(x)
    assert found == {"eager": False, "graph": False, "xla": True, "inside": True}


@tensorflow_only
def test_xla_sees_the_barrier():
    """Without it, XLA merges sums, and copies whole inputs on a TPU."""
    import tensorflow as tf

    function = tf.function(lambda x: compat.xla_optimization_barrier(x + 1) + 1, jit_compile=True)
    np.testing.assert_array_equal(function(tf.zeros((2,))), [2, 2])
    assert "opt-barrier" in function.experimental_get_compiler_ir(tf.zeros((2,)))(stage="hlo")


def test_layers_inside_are_those_at_any_depth():
    """Without it, layers in models in a model are not found."""
    dense = keras.layers.Dense(2)
    inner = keras.Sequential([keras.layers.TimeDistributed(dense)])
    model = keras.Sequential([inner])
    inside = compat.layers_inside(model)
    assert inside[0] is model and any(layer is dense for layer in inside)
    assert all(layer is not model for layer in compat.layers_inside(model, include_self=False))


def test_own_variables_are_in_the_order_of_files():
    """Without it, weights of other kinds of layers would load into ours by position."""

    class Wrapping(keras.layers.Layer):
        def build(self, input_shape):
            self.counter = self.add_weight(name="counter", shape=(), trainable=False, initializer="zeros")
            self.gain = self.add_weight(name="gain", shape=())
            self.dense = keras.layers.Dense(2)
            self.dense.build(input_shape)

        def call(self, inputs):
            return inputs

    layer = Wrapping()
    layer.build((None, 3))
    assert [variable.name for variable in compat.own_variables(layer)] == ["gain", "counter"]
    store = {}
    keras.layers.Layer.save_own_variables(layer, store)
    for stored, variable in zip(store.values(), compat.own_variables(layer), strict=True):
        assert stored is variable
