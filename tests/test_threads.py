"""Threads may replace, fold, export, observe and predict at once, and each gets what it would get alone."""

import concurrent.futures
import threading
import warnings

import keras
import numpy as np
import pytest
from backends import numpy, tensorflow_only
from folding.test_folding import gated_model
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm.diagnostics import power_decomposition
from keras_proxynorm.export import export_onnx, export_saved_model, fold

L = keras.layers


def network(activation="silu", groups=4):
    inputs = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = kp.GroupNormProxy(groups, activation=activation, name="norm")(x)
    x = L.Conv2D(8, 3, groups=2, use_bias=False)(x)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(x))
    return randomize(keras.Model(inputs, L.Dense(4, name="logits")(L.GlobalAveragePooling2D()(x))))


def at_once(*tasks, rounds=1):
    """Runs tasks in threads of their own that start together; returns their results, or raises what they raise."""
    barrier = threading.Barrier(len(tasks))

    def run(task):
        barrier.wait()
        return [task() for _ in range(rounds)]

    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def test_replace_fold_observe_and_predict():
    models = [network(), network("relu", 2)]
    x = normal(4, 8, 8, 3)

    def tasks(model):
        return [
            lambda: numpy(model(x, training=False)),
            lambda: numpy(fold(model)(x)),
            lambda: numpy(kp.replace_normalization(model, to="group_norm", calibrate=x)(x)),
            lambda: power_decomposition(model, x, verbose=0).fractions,
        ]

    alone = [task() for model in models for task in tasks(model)]
    for results, expected in zip(
        at_once(*(task for model in models for task in tasks(model)), rounds=2), alone, strict=True
    ):
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert not any("call" in vars(layer) for model in models for layer in model.layers)


@tensorflow_only
def test_a_folded_model_predicts_while_others_are_exported(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    import tensorflow as tf

    models = {"a": network(), "b": network("relu", 2), "c": gated_model(lambda layer, x: layer(x))}
    x = {name: normal(1, *model.input_shape[1:]) for name, model in models.items()}
    folded = fold(models["a"])
    expected = {name: numpy(model(x[name], training=False)) for name, model in models.items()}
    done = threading.Event()

    def predict():
        outputs = []
        while not done.is_set() or not outputs:
            outputs.append(numpy(folded(x["a"])))
            outputs.append(tf.function(folded, autograph=False)(x["a"]).numpy())
        assert not tf.config.functions_run_eagerly()
        return np.stack(outputs)

    def onnx(name):
        path = export_onnx(models[name], tmp_path / f"{name}.onnx", verify=False)
        return ort.InferenceSession(path).run(None, {"image": x[name]})[0]

    def saved_model(name):
        path = export_saved_model(models[name], tmp_path / name, verify=False)
        (output,) = tf.saved_model.load(str(path)).signatures["serving_default"](image=x[name]).values()
        return output.numpy()

    tasks = {(kind, name): lambda kind=kind, name=name: kind(name) for kind in (onnx, saved_model) for name in models}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        predictions = pool.submit(predict)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # such as about a model that could not be folded
                results = at_once(*tasks.values())
        finally:
            done.set()
        np.testing.assert_allclose(predictions.result() - expected["a"], 0, atol=1e-5)
    for (_, name), (result,) in zip(tasks, results, strict=True):
        np.testing.assert_allclose(result, expected[name], rtol=1e-4, atol=1e-4)
