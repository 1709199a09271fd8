"""The weight of the example at inference is the best on validation data, and nothing else of the model changes."""

import keras
import numpy as np
import pytest
from backends import numpy
from baselines.samples import normal

from keras_proxynorm.baselines import GhostBatchNormalization, choose_inference_example_weight


def make_model(layers=2, metrics=("mae",)):
    inside = [layer for _ in range(layers) for layer in (keras.layers.Conv2D(4, 3), GhostBatchNormalization(2))]
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), *inside, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)]
    )
    model.compile(loss="mse", metrics=list(metrics))
    return model


def validation():
    # Each example has a scale of its own, which the moving averages know nothing of.
    x = normal(16, 8, 8, 2) * np.linspace(1, 9, 16)[:, None, None, None]
    return x.astype("float32"), np.zeros((16, 1), "float32")


def test_the_best_is_set():
    model, (x, y) = make_model(), validation()
    before = [numpy(weight.value).copy() for weight in model.weights]
    model.predict(x, verbose=0)  # so that there is a function with the old weight in it
    values = choose_inference_example_weight(model, x, y, verbose=0)
    best = min(values, key=values.get)
    assert best > 0 and len(set(values.values())) == len(values)
    layers = [layer for layer in model.layers if isinstance(layer, GhostBatchNormalization)]
    assert [layer.inference_example_weight for layer in layers] == [best] * 2
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], values[best], rtol=1e-5)
    np.testing.assert_allclose(np.mean(np.square(model.predict(x, verbose=0) - y)), values[best], rtol=1e-5)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight.value), value)


def test_values_are_those_of_the_model_with_that_weight():
    model, (x, y) = make_model(layers=1), validation()
    values = choose_inference_example_weight(model, x, y, candidates=(0, 0.3), verbose=0)
    for weight, value in values.items():
        model.layers[1].inference_example_weight = weight
        error = np.mean(np.square(numpy(model(x)) - y))
        np.testing.assert_allclose(value, error, rtol=1e-5)


def test_models_inside_and_outside_see_the_new_weight():
    inner, (x, y) = make_model(layers=1), validation()
    inner.predict(x, verbose=0)
    outer = keras.Sequential([keras.Input((8, 8, 2)), inner])
    outer.compile(loss="mse")
    choose_inference_example_weight(outer, x, y, candidates=(0.7,), verbose=0)
    expected = numpy(inner(x))
    np.testing.assert_allclose(inner.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outer.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


def test_monitor_and_mode():
    model, (x, y) = make_model(), validation()
    values = choose_inference_example_weight(model, x, y, monitor="mae", mode="max", candidates=[0, 1], verbose=0)
    worst = max(values, key=values.get)
    assert model.layers[1].inference_example_weight == worst
    assert values == choose_inference_example_weight(model, x, y, monitor="mae", candidates=[0, 1], verbose=0)
    assert model.layers[1].inference_example_weight != worst


def test_an_error_leaves_the_model_as_it_was():
    model, (x, y) = make_model(), validation()
    model.layers[1].inference_example_weight = 0.125
    with pytest.raises(ValueError, match="`monitor` must be one of .*'loss', 'mae'.*Received: monitor='accuracy'"):
        choose_inference_example_weight(model, x, y, monitor="accuracy", verbose=0)
    with pytest.raises(ValueError, match="Received: inference_example_weight=3"):
        choose_inference_example_weight(model, x, y, candidates=(0.5, 3), verbose=0)
    with pytest.raises(ValueError, match="none gives a loss that is a number"):
        choose_inference_example_weight(model, x * np.nan, y, candidates=(0.5,), verbose=0)
    assert [layer.inference_example_weight for layer in model.layers[1:4:2]] == [0.125, 0.0]


def test_bad_arguments():
    x, y = validation()
    with pytest.raises(ValueError, match="`x` must be data that can be read again.*Received: x=<generator"):
        choose_inference_example_weight(make_model(), ((x, y) for _ in range(2)))
    with pytest.raises(ValueError, match="`mode` must be one of 'min', 'max'. Received: mode='auto'"):
        choose_inference_example_weight(make_model(), x, y, mode="auto")
    with pytest.raises(ValueError, match="`model` must be a model with GhostBatchNormalization layers in it"):
        choose_inference_example_weight(make_model(layers=0), x, y)
