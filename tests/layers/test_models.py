"""The layers inside models: every way to build one, fit, compilation, retracing, tf.keras."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import gradients, numpy, tensorflow_only
from layers.samples import normal

import keras_proxynorm as kp


def images(n=32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    return (rng.standard_normal((n, 8, 8, 3)) + labels[:, None, None, None] * [1, 0, -1]).astype("float32"), labels


def sequential():
    model = keras.Sequential([keras.layers.Conv2D(8, 3, use_bias=False)])
    model.add(kp.LayerNormProxy())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(2))
    return model


def functional(size=None):
    inputs = keras.Input((size, size, 3))
    x = kp.GroupNormProxy(4, activation="silu")(keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs))
    y = kp.GroupNormProxy(4, activation=None, center=False)(keras.layers.Conv2D(8, 3, padding="same")(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()([x, y]))
    return keras.Model(inputs, keras.layers.Dense(2)(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.convolution = keras.layers.Conv2D(8, 3, use_bias=False)
        self.normalization = keras.layers.GroupNormalization(4, center=False, scale=False)
        self.activation = kp.ProxyActivation(activation="gelu")
        self.head = keras.layers.Dense(2)

    def call(self, inputs):
        x = self.activation(self.normalization(self.convolution(inputs)))
        return self.head(keras.ops.mean(x, axis=(1, 2)))


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    "make, jit_compile",
    [
        (sequential, False),
        pytest.param(functional, True, marks=tensorflow_only),
        (Subclassed, "auto"),
        *(pytest.param(make, "auto", marks=pytest.mark.slow) for make in (sequential, functional)),
        *(pytest.param(make, False, marks=pytest.mark.slow) for make in (functional, Subclassed)),
        *(pytest.param(make, True, marks=[pytest.mark.slow, tensorflow_only]) for make in (sequential, Subclassed)),
    ],
)
def test_fit(make, jit_compile):
    model = make()
    model.compile(keras.optimizers.Adam(0.01), LOSS, metrics=["accuracy"], jit_compile=jit_compile)
    x, y = images()
    history = model.fit(x, y, batch_size=8, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    np.testing.assert_allclose(
        model.predict(x, batch_size=32, verbose=0), model.predict(x, batch_size=1, verbose=0), atol=1e-5
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = functional(8)
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    x, y = images()
    history = model.fit(x, y, batch_size=8, epochs=8, verbose=0).history
    assert np.all(np.isfinite(history["loss"])) and history["loss"][-1] < 0.8 * history["loss"][0]
    assert {w.dtype for w in model.trainable_weights} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fifty_layers_in_mixed_precision(policy):
    """Forward and backward through 50 normalized convolutions: nothing overflows, and nothing vanishes."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    x = inputs = keras.Input((8, 8, 3))
    for i in range(50):
        norm = kp.LayerNormProxy() if i % 2 else kp.GroupNormProxy(4, activation="silu")
        x = norm(keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(x))
    x = keras.layers.Dense(2, dtype="float32")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    x, y = images(8)

    def loss(*weights):
        outputs, _ = model.stateless_call(list(weights), [], x)
        return LOSS(y, outputs)

    found = [numpy(g) for g in gradients(loss, *(v.value for v in model.trainable_variables))]
    assert all(np.all(np.isfinite(g)) for g in found)
    assert min(np.abs(g.astype("float32")).max() for g in found) > 1e-4
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), LOSS)
    history = model.fit(x, y, batch_size=4, epochs=4, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert all(np.all(np.isfinite(numpy(w.value).astype("float32"))) for w in model.weights)


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [False, True])
def test_no_retracing_from_step_to_step(jit_compile, monkeypatch):
    model = functional(8)
    model.compile("sgd", LOSS, jit_compile=jit_compile)
    x, y = images(32)
    calls = []
    call = kp.GroupNormProxy.call
    monkeypatch.setattr(kp.GroupNormProxy, "call", lambda self, *args, **kw: calls.append(1) or call(self, *args, **kw))
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    assert calls  # Python runs while tracing, and only then
    calls.clear()
    model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    assert not calls


@tensorflow_only
def test_xla_compiles_the_whole_step():
    """``jit_compile=True`` has no fallback: what XLA cannot compile is an error. Look at the module, too."""
    import tensorflow as tf

    model = functional(8)
    model.compile("sgd", LOSS)
    model.optimizer.build(model.trainable_variables)
    x, y = (tf.constant(v) for v in images(8))

    @tf.function(jit_compile=True)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    hlo = step.experimental_get_compiler_ir(x, y)(stage="optimized_hlo")
    assert "ENTRY" in hlo and "tf_custom_call" not in hlo and "TFXLA" not in hlo


@pytest.mark.parametrize("shape", [(4, 4), (7, 5)])
def test_unknown_sizes(shape):
    model = functional(None)
    x = normal(3, *shape, 3)
    fixed = keras.models.clone_model(model, input_tensors=keras.Input((*shape, 3)))
    fixed.set_weights(model.get_weights())
    np.testing.assert_allclose(numpy(model(x)), numpy(fixed(x)), atol=1e-6)
    np.testing.assert_allclose(model.predict(x, verbose=0), numpy(fixed(x)), atol=1e-5)


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [False, True])
def test_unknown_sizes_in_a_graph_with_a_mask(jit_compile):
    import tensorflow as tf

    layer = kp.GroupNormProxy(4)
    layer.build((None, None, None, 8))
    x, mask = normal(2, 5, 3, 8), np.random.default_rng(0).random((2, 5, 3)) < 0.6
    signature = [tf.TensorSpec([None, None, None, 8]), tf.TensorSpec([None, None, None], tf.bool)]
    masked = tf.function(lambda x, m: layer(x, mask=m), input_signature=signature, jit_compile=jit_compile)
    np.testing.assert_allclose(numpy(masked(x, mask)), numpy(layer(x, mask=tf.constant(mask))), atol=1e-6)
    plain = tf.function(layer, input_signature=signature[:1], jit_compile=jit_compile)
    np.testing.assert_allclose(numpy(plain(x)), numpy(layer(x)), atol=1e-6)


@tensorflow_only
def test_in_tf_keras_models():
    import tensorflow as tf

    model = tf.keras.Sequential([tf.keras.Input((8, 8, 3)), tf.keras.layers.Conv2D(8, 3)])
    model.add(kp.LayerNormProxy(activation=tf.nn.relu))
    model.add(tf.keras.layers.GlobalAveragePooling2D())
    model.compile("sgd", "mse")
    x = images()[0]
    model.fit(x, np.zeros((32, 8)), verbose=0)
    assert model.layers[1]._elementwise.kinks == (0.0,)  # tf.nn.relu is recognized
    assert model(x).shape == (32, 8)


def test_legacy_keras_is_named():
    code = (
        "import importlib, os, warnings\n"
        "def warned(function, argument):\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        warnings.simplefilter('always')\n"
        "        module = function(argument)\n"
        "    messages = [str(w.message) for w in caught if 'TF_USE_LEGACY_KERAS' in str(w.message)]\n"
        "    print(any('import keras' in message for message in messages))\n"
        "    return module\n"
        "module = warned(importlib.import_module, 'keras_proxynorm')\n"
        "for value in ('true', '0'):\n"
        "    os.environ['TF_USE_LEGACY_KERAS'] = value\n"
        "    warned(importlib.reload, module)"
    )
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "False"]
