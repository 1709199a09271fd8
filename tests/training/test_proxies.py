"""Proxies that are set to the data, once and during `fit`."""

import keras
import numpy as np
import pytest
from backends import numpy

import keras_proxynorm as kp
from keras_proxynorm.training import CalibrateProxies, calibrate_proxies

layers = keras.layers


def build(normalizations=None):
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for i, layer in enumerate(normalizations or [kp.LayerNormProxy(), kp.GroupNormProxy(groups=2, activation="silu")]):
        model.add(layers.Conv2D(8, 3, name=f"conv{i}"))
        model.add(layer)
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(3))
    return model


def data(count=16, seed=0):
    return np.random.default_rng(seed).normal(1.0, 2.0, (count, 8, 8, 3)).astype("float32")


def proxied(model):
    return [layer for layer in model._flatten_layers() if getattr(layer, "proxy", None) is not None]


def moments_of_inputs(model, layer, x):
    """Of the normalized input of a layer of a sequential model, found by running the layers before it."""
    for other in model.layers:
        if other is layer:
            y = numpy(layer.normalize_inputs(x)).astype("float64")
            return y.mean((0, 1, 2)), y.std((0, 1, 2))
        x = other(x)


def assert_at_the_data(model, x):
    for layer in proxied(model):
        mean, stddev = moments_of_inputs(model, layer, x)
        np.testing.assert_allclose(numpy(layer.proxy_mean), mean, atol=1e-5)
        np.testing.assert_allclose(numpy(layer.proxy_stddev), stddev, atol=1e-5)


def test_proxies_are_those_of_the_data():
    """Also of later layers, whose data are those behind the proxies that were set."""
    model = build()
    assert calibrate_proxies(model, data()) == 2
    assert_at_the_data(model, data())
    assert all(np.abs(numpy(layer.proxy)).max() > 0.05 for layer in proxied(model))


def test_activations_are_centered_and_scaled():
    """What proxy normalization is for, up to the Gaussian that the data are not."""
    model = build([kp.LayerNormProxy()])
    features = keras.Model(model.inputs, model.layers[1].output)

    def worst(model):
        z = numpy(model(data()))
        return np.abs(z.mean((0, 1, 2))).max()

    before = worst(features)
    calibrate_proxies(model, data())
    assert worst(features) < 0.3 * before


def test_other_weights_stay():
    model = build()
    others = [weight for weight in model.weights if weight.name != "proxy"]
    before = [numpy(weight).copy() for weight in others]
    calibrate_proxies(model, data())
    for old, weight in zip(before, others, strict=True):
        np.testing.assert_array_equal(old, numpy(weight))


def test_proxy_activation_and_nested_models():
    inner = build([kp.ProxyActivation(activation="silu")])
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, inner(inputs))
    assert calibrate_proxies(model, data()) == 1
    assert_at_the_data(inner, data())


def test_frozen_layers_stay():
    model = build()
    first, second = proxied(model)
    first.trainable = False
    assert calibrate_proxies(model, data()) == 1
    assert not numpy(first.proxy).any() and numpy(second.proxy).any()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = build()
    finally:
        keras.config.set_dtype_policy("float32")
    calibrate_proxies(model, data())
    for layer in proxied(model):
        assert keras.backend.standardize_dtype(layer.proxy.dtype) == "float32"
        assert np.isfinite(numpy(layer.proxy)).all() and numpy(layer.proxy).any()


def fit(model, x, every, epochs=2, batch_size=8, learning_rate=0.1, **kwargs):
    model.compile(keras.optimizers.SGD(learning_rate), "mse", **kwargs)
    callback = CalibrateProxies(x, every=every)
    model.fit(data(64, seed=1), np.ones((64, 3)), epochs=epochs, batch_size=batch_size, callbacks=[callback], verbose=0)


def test_at_the_last_step_they_are_at_the_data():
    model = build()
    fit(model, data(), every=4)
    assert_at_the_data(model, data())


def test_and_learned_in_between():
    model = build()
    fit(model, data(), every=3, epochs=1)  # 8 steps, of which the sixth calibrates
    distances = [
        np.abs(numpy(layer.proxy_mean) - moments_of_inputs(model, layer, data())[0]).max() for layer in proxied(model)
    ]
    assert max(distances) > 1e-4
    # They would be further away had the callback never been called.
    other = build()
    fit(other, data(), every=100, epochs=1)
    assert not np.allclose(numpy(proxied(model)[0].proxy), numpy(proxied(other)[0].proxy), atol=1e-3)


def test_other_weights_are_learned_as_ever():
    """On JAX `fit` holds the weights elsewhere: what it has learned must not be lost, nor what is set here."""
    model = build()
    kernel = numpy(model.get_layer("conv0").kernel).copy()
    fit(model, data(), every=1, epochs=1, learning_rate=0.05)
    assert np.abs(numpy(model.get_layer("conv0").kernel) - kernel).max() > 1e-3
    assert_at_the_data(model, data())


@pytest.mark.parametrize(("every", "steps_per_execution", "times"), [(1, 1, 16), (4, 1, 4), (5, 1, 3), (4, 8, 2)])
def test_how_often(every, steps_per_execution, times, monkeypatch):
    if keras.backend.backend() == "torch" and steps_per_execution > 1:
        pytest.skip("Keras has no steps_per_execution on PyTorch")
    calls = []
    monkeypatch.setattr("keras_proxynorm.training.proxies._set_proxies", lambda *args: calls.append(args))
    fit(build(), data(), every, steps_per_execution=steps_per_execution)
    assert len(calls) == times


def test_with_xla():
    model = build()
    fit(model, data(), every=8, jit_compile=keras.backend.backend() != "torch")
    assert_at_the_data(model, data())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate_proxies("model", data()), "`model` must be a keras.Model.*'model'"),
        (lambda: calibrate_proxies(keras.Sequential([layers.Dense(1)]), data()), "`model` must be built"),
        (
            lambda: calibrate_proxies(build([layers.ReLU()]), data()),
            "`model` must be a model that has layers",
        ),
        (lambda: calibrate_proxies(build(), data()[:0]), "`data` must be a batch of inputs"),
        (lambda: calibrate_proxies(build(), data()[..., :2]), "`data` must be.*shape \\(16, 8, 8, 2\\)"),
        (lambda: CalibrateProxies(data(), every=0), "`every` must be a positive integer.*every=0"),
        (lambda: CalibrateProxies(data(), every=1.5), "`every` must be a positive integer.*every=1.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_interrupt_leaves_the_proxies_as_they_were(monkeypatch):
    layers = [kp.LayerNormProxy(name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((4, 4, 3)), *layers])
    images = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype("float32") ** 3

    def interrupted(layer, *arguments, **kwargs):
        if np.any(keras.ops.convert_to_numpy(layers[0].proxy)):
            raise KeyboardInterrupt
        return images

    monkeypatch.setattr(type(layers[1]), "normalize_inputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_proxies(model, images)
    assert not any(np.any(keras.ops.convert_to_numpy(layer.proxy)) for layer in layers)
