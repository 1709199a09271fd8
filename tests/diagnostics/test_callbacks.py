"""The callbacks, in `fit`."""

import csv
import glob
import os
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from diagnostics.samples import SPARSE, L, images, normal, single, small

from keras_proxynorm.diagnostics import (
    LogLossLandscape,
    LogPowerDecomposition,
    LogSignalPropagation,
    loss_landscape,
    power_decomposition,
    signal_propagation,
)

X, Y = images(16)
STEPS = [0.01, 0.1, 1.0]
POWERS = [f"power_decomposition/P{i}/norm" for i in range(1, 5)]
SIGNALS = [f"signal_propagation/{name}/relu" for name in ("mean", "std", "cosine", "stable_rank", "gradient_norm")]
LANDSCAPE = [
    f"loss_landscape/{name}"
    for name in (
        "loss",
        "gradient_norm",
        "loss_min",
        "loss_max",
        "gradient_change_min",
        "gradient_change_max",
        "effective_smoothness",
        "largest_stable_step",
    )
]


def model_and(jit_compile="auto", dropout=False):
    keras.utils.set_random_seed(1)
    model = small()
    if dropout:
        layers = [*model.layers[:-1], L.Dropout(0.5), model.layers[-1]]
        model = keras.Sequential([keras.Input((6, 6, 3)), *layers])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), SPARSE, metrics=["accuracy"], jit_compile=jit_compile)
    return model


def fit(model, *callbacks, epochs=2, **options):
    # Of the order of the samples.
    keras.utils.set_random_seed(2)
    return model.fit(X, Y, batch_size=8, epochs=epochs, callbacks=list(callbacks), **{"verbose": 0, **options}).history


def every_callback(**options):
    return [
        LogPowerDecomposition(X, **options),
        LogSignalPropagation((X, Y), **options),
        LogLossLandscape((X, Y), step_sizes=STEPS, **options),
    ]


@pytest.mark.parametrize("every, epochs, measured", [(1, 3, [0, 1, 2]), (2, 5, [1, 3]), (3, 2, [])])
def test_history_has_the_names_and_an_entry_for_each_measurement(every, epochs, measured):
    callbacks = every_callback(every=every)
    history = fit(model_and(), *callbacks, epochs=epochs)
    added = {name: values for name, values in history.items() if "/" in name}
    assert sorted(added) == (sorted(POWERS + SIGNALS + LANDSCAPE) if measured else [])
    assert all(len(values) == len(measured) and np.isfinite(values).all() for values in added.values())
    assert sorted(set(history) - set(added)) == ["accuracy", "loss"] and len(history["loss"]) == epochs
    for callback in callbacks:
        assert sorted(callback.results) == measured


def test_the_last_numbers_are_those_of_the_model():
    model = model_and()
    callbacks = every_callback()
    history = fit(model, *callbacks)
    power = power_decomposition(model, X, verbose=0)
    np.testing.assert_allclose([history[name][-1] for name in POWERS], power.fractions[0], rtol=1e-5, atol=1e-8)
    signal = signal_propagation(model, (X, Y), verbose=0)
    np.testing.assert_allclose([history[n][-1] for n in SIGNALS], [v[0] for v in signal.columns().values()], rtol=1e-5)
    landscape = loss_landscape(model, (X, Y), step_sizes=STEPS).to_dict()
    np.testing.assert_allclose([history[name][-1] for name in LANDSCAPE], list(landscape.values()), rtol=1e-4)
    np.testing.assert_allclose(callbacks[0].results[1].powers, power.powers, rtol=1e-5)
    assert history[POWERS[0]][0] != history[POWERS[0]][1]


def test_options_arrive():
    model = model_and()
    callbacks = [
        LogPowerDecomposition(X, "conv", training=True, batch_size=4, steps=1),
        LogSignalPropagation(X, L.Conv2D, training=False, batch_size=4, steps=1),
        LogLossLandscape((X, Y), step_sizes=[0.5], divergence=3.0, training=False),
    ]
    fit(model, *callbacks, epochs=1)
    (power,), (signal,), (landscape,) = (list(callback.results.values()) for callback in callbacks)
    np.testing.assert_allclose(power.powers, power_decomposition(model, X[:4], "conv", verbose=0).powers, rtol=1e-5)
    np.testing.assert_allclose(signal.std, signal_propagation(model, X[:4], "conv", verbose=0).std, rtol=1e-5)
    expected = loss_landscape(model, (X, Y), step_sizes=[0.5], divergence=3.0, training=False)
    np.testing.assert_allclose(landscape.losses, expected.losses, rtol=1e-4)


@pytest.mark.parametrize("jit_compile", [False] if keras.backend.backend() == "torch" else [True, False])
def test_training_is_the_same_with_and_without(jit_compile):
    plain, logged = model_and(jit_compile, dropout=True), model_and(jit_compile, dropout=True)
    expected = fit(plain, validation_data=(X, Y))
    found = fit(logged, *every_callback(), validation_data=(X, Y))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    for a, b in zip(plain.variables, logged.variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b), err_msg=a.path)
    for a, b in zip(plain.optimizer.variables, logged.optimizer.variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))


def test_fit_again():
    model = model_and()
    callback = LogPowerDecomposition(X)
    fit(model, callback)
    history = fit(model, callback, epochs=5, initial_epoch=4)
    assert sorted(callback.results) == [4]
    assert len(history[POWERS[0]]) == 1


def test_targets_are_needed_for_gradients_only():
    history = fit(model_and(), LogSignalPropagation(X))
    assert sorted(name for name in history if "/" in name) == sorted(SIGNALS[:-1])


def test_they_print_nothing(capsys):
    fit(model_and(), *every_callback())
    assert not capsys.readouterr().out
    fit(model_and(), *every_callback(), verbose=2)
    assert "/P1" not in capsys.readouterr().out


def test_a_history_of_the_user():
    mine = keras.callbacks.History()
    fit(model_and(), mine, LogPowerDecomposition(X))
    assert len(mine.history[POWERS[0]]) == len(mine.history["loss"]) == 2


def test_beside_other_callbacks(tmp_path):
    log = tmp_path / "log.csv"
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=100, restore_best_weights=True)
    history = fit(model_and(), stop, *every_callback(), keras.callbacks.CSVLogger(str(log)), epochs=5)
    assert len(history["loss"]) == 2 and len(history[POWERS[0]]) == 2
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and {"epoch", "accuracy", "loss"} <= set(rows[0]) and not any("/" in name for name in rows[0])


def scalars(directory):
    """What TensorBoard reads: names to lists of (step, value)."""
    tf = pytest.importorskip("tensorflow")
    found = {}
    for path in sorted(glob.glob(os.path.join(directory, "**", "events.*"), recursive=True)):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_event_files(tmp_path):
    pytest.importorskip("tensorflow")
    model = model_and()
    history = fit(model, *every_callback(log_dir=tmp_path, every=2), epochs=4)
    found = scalars(tmp_path / "diagnostics")
    assert sorted(found) == sorted(POWERS + SIGNALS + LANDSCAPE)
    for name, values in found.items():
        assert [step for step, _ in values] == [1, 3]
        np.testing.assert_allclose([value for _, value in values], history[name], rtol=1e-5)


@tensorflow_only
def test_beside_the_callback_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    directory = str(tmp_path)
    fit(model_and(), keras.callbacks.TensorBoard(directory), LogPowerDecomposition(X, log_dir=directory))
    found = scalars(directory)
    assert sorted(name for name in found if name.startswith("power")) == POWERS
    assert len(found["epoch_loss"]) == 2


def test_the_event_files_of_a_second_fit(tmp_path):
    pytest.importorskip("tensorflow")
    model, callback = model_and(), LogPowerDecomposition(X, log_dir=str(tmp_path))
    fit(model, callback, epochs=1)
    fit(model, callback, epochs=2, initial_epoch=1)
    assert sorted(step for step, _ in scalars(tmp_path)[POWERS[0]]) == [0, 1]


@tensorflow_only
def test_without_tensorboard(tmp_path, monkeypatch):
    """It does without, or says so before an epoch of training is lost."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    epochs = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    try:
        fit(model_and(), count, LogPowerDecomposition(X, log_dir=tmp_path), epochs=1)
    except ImportError as error:
        assert "pip install" in str(error) and "tensorboard" in str(error)
        assert not epochs


def test_a_generator_lasts_for_one_epoch_only():
    """Whatever happens, it is said in words, before or when it happens."""
    data = (X[i : i + 8] for i in (0, 8))
    with pytest.raises(ValueError, match="Argument `data`"):
        fit(model_and(), LogPowerDecomposition(data))


@pytest.mark.parametrize("kind", ["nan", "flat"])
def test_training_that_has_failed_is_not_interrupted(kind):
    """A loss that is not finite, or a gradient of zero, is something to log, not the end of `fit`."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, "relu", name="relu"), L.Dense(1, name="out")])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = normal(8, 4), np.zeros((8, 1), "float32")
    if kind == "nan":
        model.get_layer("out").bias.assign([np.nan])
    else:
        model.get_layer("out").kernel.assign(np.zeros((3, 1)))
    callbacks = [LogLossLandscape((x, y), step_sizes=STEPS), LogSignalPropagation((x, y))]
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    assert len(history["loss"]) == 2
    assert len(history["signal_propagation/gradient_norm/relu"]) == 2 or kind == "nan"


@pytest.mark.parametrize("kind", [LogPowerDecomposition, LogSignalPropagation, LogLossLandscape])
@pytest.mark.parametrize("every", [0, -1, 1.5, None, True, "2"])
def test_bad_every(kind, every):
    with pytest.raises(ValueError, match=f"Argument `every` must be a positive integer.*Received: every={every!r}"):
        kind(X, every=every)


def test_bad_arguments_are_named():
    for callback, name in (
        (LogPowerDecomposition(X, "nothing"), "layers"),
        (LogLossLandscape((X, Y), step_sizes=[0]), "step_sizes"),
        (LogLossLandscape(X), "batch"),
    ):
        with pytest.raises(ValueError, match=f"Argument `{name}`"):
            fit(model_and(), callback, epochs=1)
    # Those of the data before an epoch of training.
    with pytest.raises(ValueError, match="Argument `batch_size`"):
        LogPowerDecomposition(X, batch_size=0)


def test_a_slash_in_names():
    model = keras.Sequential(
        [keras.Input((4, 3)), single(L.LayerNormalization(name="n"), (4, 3)), L.LayerNormalization(name="n")]
    )
    model.compile("sgd", "mse")
    x = normal(6, 4, 3)
    history = model.fit(x, x, verbose=0, callbacks=[LogPowerDecomposition(x)]).history
    assert len([name for name in history if name.startswith("power_decomposition/P1/")]) == 2


def test_two_of_a_kind():
    both = [LogPowerDecomposition(X), LogPowerDecomposition(X[:8], name="validation")]
    history = fit(model_and(), *both)
    names = [key for key in history if key.startswith(("power_decomposition/P1", "validation/P1"))]
    assert len(names) == 2 * len({name.split("/")[-1] for name in names})
    assert len({len(history[name]) for name in names}) == 1


def test_a_loss_of_its_own():
    callback = LogLossLandscape((X, X[:, 0, 0, :1]), loss=lambda y, p: keras.ops.mean(p, axis=-1), step_sizes=[1e-3])
    history = fit(model_and(), callback)
    assert np.isfinite(history["loss_landscape/loss"]).all()
