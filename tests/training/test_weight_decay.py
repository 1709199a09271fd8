"""exclude_norm_from_weight_decay, seen in what `fit` does to weights whose gradient is zero."""

import keras
import numpy as np
import pytest
from backends import numpy

import keras_proxynorm as kp


def make_model():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, name="convolution")(inputs)
    x = kp.GroupNormProxy(4, name="ours")(x)
    x = keras.layers.BatchNormalization(name="batch")(x)
    block = keras.Sequential([keras.layers.Dense(8, name="dense"), kp.LayerNormProxy(name="nested")], name="block")
    x = keras.layers.GlobalAveragePooling2D()(block(x))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    for weight in model.trainable_weights:
        weight.assign(np.ones(weight.shape))
    return model


class Nothing(keras.losses.Loss):
    """A loss without gradient: what moves then moves by weight decay alone."""

    def call(self, y_true, y_pred):
        return keras.ops.sum(0.0 * y_pred, axis=-1)


def decayed(model, optimizer):
    model.compile(optimizer, Nothing())
    model.fit(np.ones((8, 8, 8, 3), "float32"), np.ones((8, 2)), batch_size=4, verbose=0)
    return {w.path.removeprefix(model.name + "/") for w in model.trainable_weights if np.any(numpy(w) < 0.999)}


def kernels_and_proxies(model, biases=True):
    names = ("kernel", "proxy", "bias") if biases else ("kernel", "proxy")
    return {w.path.removeprefix(model.name + "/") for w in model.trainable_weights if w.name in names}


OPTIMIZERS = {
    "adamw": lambda **kw: keras.optimizers.AdamW(0.1, weight_decay=0.1, **kw),
    "sgd": lambda **kw: keras.optimizers.SGD(0.1, weight_decay=0.1, **kw),
    "loss_scale": lambda **kw: keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.1, **kw)),
    "muon": lambda **kw: keras.optimizers.Muon(
        0.1, weight_decay=0.1, adam_weight_decay=0.1, exclude_layers=["proxy"], **kw
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernels_and_proxies_decay_and_nothing_else(optimizer):
    model = make_model()
    optimizer = OPTIMIZERS[optimizer]()
    assert kp.exclude_norm_from_weight_decay(optimizer, model) is optimizer
    assert decayed(model, optimizer) == kernels_and_proxies(model)


def test_without_it_everything_decays():
    model = make_model()
    assert len(decayed(model, OPTIMIZERS["adamw"]())) == len(model.trainable_weights)


def test_earlier_exclusions_stay():
    model = make_model()
    optimizer = OPTIMIZERS["adamw"]()
    optimizer.exclude_from_weight_decay(var_list=[model.get_layer("head").kernel], var_names=["bias"])
    kp.exclude_norm_from_weight_decay(optimizer, model)
    assert decayed(model, optimizer) == kernels_and_proxies(model, biases=False) - {"head/kernel"}


def excluded(optimizer, model):
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return {w.path.removeprefix(model.name + "/") for w in model.weights if not inner._use_weight_decay(w)}


def gammas_and_betas(model):
    names = ("gamma", "beta", "scale")
    return {w.path.removeprefix(model.name + "/") for w in model.weights if w.name in names}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exclusions_add_up_over_models_and_calls(optimizer):
    first, second, optimizer = make_model(), make_model(), OPTIMIZERS[optimizer]()
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    inner.exclude_from_weight_decay(var_list=[first.get_layer("head").kernel], var_names=["bias"])
    for model in (first, second, first):
        kp.exclude_norm_from_weight_decay(optimizer, model)
    biases = {"convolution/bias", "block/dense/bias", "head/bias"}
    assert excluded(optimizer, first) == gammas_and_betas(first) | biases | {"head/kernel"}
    assert excluded(optimizer, second) == gammas_and_betas(second) | biases


def test_exclusions_of_keras_afterwards_replace_ours_until_the_next_call():
    model, optimizer = make_model(), OPTIMIZERS["adamw"]()
    kp.exclude_norm_from_weight_decay(optimizer, model)
    optimizer.exclude_from_weight_decay(var_list=[model.get_layer("head").kernel])
    assert excluded(optimizer, model) == {"head/kernel"}
    kp.exclude_norm_from_weight_decay(optimizer, model)
    assert excluded(optimizer, model) == {"head/kernel"} | gammas_and_betas(model)


class LlamaLayerNorm(keras.layers.Layer):
    """As those of KerasHub, no subclass of a layer of Keras."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


class Temperature(LlamaLayerNorm):
    """A scale that belongs to no normalization, whatever it inherits."""


@keras.saving.register_keras_serializable("test_weight_decay")
class Rms(keras.layers.RMSNormalization):
    """A subclass with a name of its own."""


def test_every_normalization_in_every_wrapper():
    shared = keras.layers.LayerNormalization(name="shared")
    inputs = keras.Input((5, 8))
    x = keras.layers.TimeDistributed(keras.layers.RMSNormalization(name="rms"), name="time")(inputs)
    x = Rms(name="subclass")(LlamaLayerNorm(name="hub")(x))
    x = shared(keras.layers.GroupNormalization(2, name="group")(shared(x)))
    x = keras.layers.UnitNormalization()(x)
    x = keras.layers.SpectralNormalization(keras.layers.Dense(8, name="inner"), name="spectral")(x)
    cell = keras.layers.RNN(keras.layers.StackedRNNCells([keras.layers.GRUCell(4)]), return_sequences=True)
    x = keras.layers.Bidirectional(cell)(x)
    x = keras.Sequential([keras.layers.BatchNormalization(name="batch")], name="block")(x)
    model = keras.Model(inputs, Temperature(name="temperature")(x))
    optimizer = kp.exclude_norm_from_weight_decay(OPTIMIZERS["adamw"](), model)
    assert excluded(optimizer, model) == gammas_and_betas(model) - {"temperature/scale"}
    assert sum(path.endswith("scale") for path in excluded(optimizer, model)) == 3


def test_frozen_layers_stay_excluded_when_they_thaw():
    model = make_model()
    model.get_layer("ours").trainable = False
    optimizer = kp.exclude_norm_from_weight_decay(OPTIMIZERS["adamw"](), model)
    model.get_layer("ours").trainable = True
    assert decayed(model, optimizer) == kernels_and_proxies(model)


def test_muon_leaves_the_proxies_to_adam():
    model = make_model()
    optimizer = kp.exclude_norm_from_weight_decay(OPTIMIZERS["muon"](), model)
    optimizer.build(model.trainable_variables)
    by_adam = {
        w.name
        for w, velocity in zip(model.trainable_variables, optimizer.adam_velocities, strict=True)
        if velocity is not None
    }
    by_muon = {w.path for w, v in zip(model.trainable_variables, optimizer.adam_velocities, strict=True) if v is None}
    assert {"gamma", "beta", "proxy"} <= by_adam
    assert by_muon and all(path.endswith("kernel") for path in by_muon)


def test_muon_that_takes_the_proxies_is_warned_about():
    with pytest.warns(UserWarning, match=r'Muon\(exclude_layers=\["proxy"\]\)'):
        kp.exclude_norm_from_weight_decay(keras.optimizers.Muon(0.1), make_model())


def test_muon_trains():
    model = make_model()
    model.compile(kp.exclude_norm_from_weight_decay(OPTIMIZERS["muon"](), model), "mse")
    x, y = np.random.default_rng(0).standard_normal((16, 8, 8, 3)), np.zeros((16, 2))
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_errors():
    with pytest.raises(ValueError, match="`model` must be built"):
        kp.exclude_norm_from_weight_decay(OPTIMIZERS["adamw"](), keras.Sequential([kp.LayerNormProxy()]))
    with pytest.raises(ValueError, match="`optimizer`.*Received: optimizer='adam'"):
        kp.exclude_norm_from_weight_decay("adam", make_model())
    with pytest.raises(ValueError, match="`model`.*Received: model=None"):
        kp.exclude_norm_from_weight_decay(OPTIMIZERS["adamw"](), None)
    model = make_model()
    decayed(model, OPTIMIZERS["adamw"]())
    with pytest.raises(ValueError, match="`optimizer` is in use.*`model.compile` again"):
        kp.exclude_norm_from_weight_decay(model.optimizer, model)


def test_again_after_loading(tmp_path):
    model = make_model()
    model.compile(kp.exclude_norm_from_weight_decay(OPTIMIZERS["adamw"](), model), "mse")
    model.fit(np.ones((8, 8, 8, 3), "float32"), np.ones((8, 2)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    kp.exclude_norm_from_weight_decay(loaded.optimizer, loaded)
    for weight in loaded.trainable_weights:
        assert loaded.optimizer._use_weight_decay(weight) == (weight.name not in ("gamma", "beta"))
    loaded.fit(np.ones((8, 8, 8, 3), "float32"), np.ones((8, 2)), verbose=0)
