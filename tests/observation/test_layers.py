"""Which layers are chosen, and what is seen of them."""

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from diagnostics.samples import L, images, normal, single, small, unchanged

import keras_proxynorm as kp
from keras_proxynorm.diagnostics import power_decomposition, signal_propagation
from keras_proxynorm.observation import channels
from keras_proxynorm.observation import layers as observed_layers


def chosen(model, layers, default=observed_layers.is_normalization):
    return observed_layers.choose(model, layers, default, "normalization layer")


def chain():
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            L.Conv2D(8, 3, name="conv"),
            L.BatchNormalization(name="a"),
            L.ReLU(name="relu"),
            keras.Sequential([L.Conv2D(8, 3, name="conv"), L.LayerNormalization(name="b")], name="inner"),
        ]
    )


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda m: None, ["a", "b"]),
        (lambda m: "a", ["a"]),
        (lambda m: ["b", "a"], ["a", "b"]),
        (lambda m: ("b", "b"), ["b"]),
        (lambda m: L.LayerNormalization, ["b"]),
        (lambda m: [L.LayerNormalization, "relu"], ["relu", "b"]),
        (lambda m: m.get_layer("a"), ["a"]),
        (lambda m: [m.get_layer("a"), m.get_layer("relu")], ["a", "relu"]),
        (lambda m: (layer for layer in m.layers[:2]), ["conv", "a"]),
        (lambda m: lambda layer: "norm" in type(layer).__name__.lower(), ["a", "b"]),
        (lambda m: m.get_layer("inner").get_layer("b").path, ["b"]),
    ],
)
def test_choices(make, names):
    model = chain()
    found = chosen(model, make(model))
    assert list(found) == names
    assert [layer.name for layer in found.values()] == names


def test_the_same_name_twice():
    model = chain()
    found = chosen(model, L.Conv2D)
    assert len(found) == 2 and {layer.name for layer in found.values()} == {"conv"}
    assert list(found) == [layer.path for layer in found.values()] or all("conv" in name for name in found)
    result = power_decomposition(model, images()[0], "conv", verbose=0)
    assert len(set(result.names)) == 2
    # A name in a result chooses the layer.
    for name, layer in found.items():
        if "#" not in name:
            assert list(chosen(model, name).values()) == [layer]


def test_the_same_path_twice():
    def backbone():
        inputs = keras.Input((4, 3))
        return keras.Model(inputs, L.LayerNormalization(name="norm")(inputs), name="backbone")

    a, b = backbone(), backbone()
    b.name = "other"
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, b(a(inputs)))
    result = power_decomposition(model, normal(5, 4, 3), verbose=0)
    assert len(result.names) == len(set(result.names)) == 2


@pytest.mark.parametrize("layers", ["nothing", L.Conv3D, ["a", "nothing"], 42, L.Dense(3)])
def test_no_such_layer(layers):
    with pytest.raises(ValueError, match="Argument `layers` must be names, paths, classes or instances.*has no layer"):
        chosen(chain(), layers)


def test_nothing_chosen():
    with pytest.raises(ValueError, match="Argument `layers` must be such that.*Received: layers=\\[\\]"):
        chosen(chain(), [])
    with pytest.raises(ValueError, match="Argument `layers` must be such that it chooses at least one"):
        chosen(chain(), lambda layer: False)
    with pytest.raises(ValueError, match="The model 'plain' has no normalization layer; name"):
        chosen(keras.Sequential([keras.Input((3,)), L.Dense(3)], name="plain"), None)


A, B = L.BatchNormalization(name="bn"), L.LayerNormalization(name="ln")
CANDIDATES = [("bn", A), ("inner/ln", B), ("other/bn", L.BatchNormalization(name="bn"))]


@pytest.mark.parametrize(
    "layers, paths",
    [
        ("bn", ["bn", "other/bn"]),
        ("other/bn", ["other/bn"]),
        (L.LayerNormalization, ["inner/ln"]),
        (L.Layer, ["bn", "inner/ln", "other/bn"]),
        (A, ["bn"]),
        ({"ln", "other/bn"}, ["inner/ln", "other/bn"]),
        ((x for x in ["ln", A]), ["bn", "inner/ln"]),
        (lambda layer: layer is B, ["inner/ln"]),
        ([lambda layer: layer is B, "other/bn"], ["inner/ln", "other/bn"]),
        (lambda layer: False, []),
        ([], []),
        # Not in the model, but a class that may be asked for.
        ([L.GroupNormalization, "ln"], ["inner/ln"]),
    ],
)
def test_choices_among_pairs_of_paths_and_layers(layers, paths):
    is_chosen = observed_layers.chooses(layers, iter(CANDIDATES), classes=(L.GroupNormalization,))
    assert [path for path, layer in CANDIDATES if is_chosen(path, layer)] == paths


@pytest.mark.parametrize("layers", ["inner", L.Dense, L.BatchNormalization(name="bn"), ["bn", "none"], None, 3])
def test_a_choice_that_is_no_candidate_is_named(layers):
    with pytest.raises(ValueError, match="Argument `layers` must be names.*of norms.*Received.*the model has no norm"):
        observed_layers.chooses(layers, CANDIDATES, "norm")


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: L.ReLU(), True),
        (lambda: L.LeakyReLU(), True),
        (lambda: L.PReLU(), True),
        (lambda: L.ELU(), True),
        (lambda: L.Activation("gelu"), True),
        (lambda: L.Activation(L.ReLU()), True),
        (lambda: L.Activation("linear"), False),
        (lambda: L.Activation("softmax"), False),
        (lambda: L.Softmax(), False),
        (lambda: L.Dense(3), False),
        (lambda: L.Dense(3, "sigmoid"), True),
        (lambda: L.Dense(3, "softmax"), False),
        (lambda: L.Dense(3, L.Softmax()), False),
        (lambda: L.Conv2D(3, 3, activation="relu"), True),
        (lambda: L.Dropout(0.5), False),
        (lambda: L.LSTM(3), False),
        (lambda: L.LSTMCell(3), False),
        (lambda: L.GRUCell(3), False),
        (lambda: L.SimpleRNNCell(3), False),
        (lambda: kp.LayerNormProxy(), True),
        (lambda: kp.ProxyActivation(), True),
    ],
)
def test_has_activation(make, expected):
    assert observed_layers.has_activation(make()) is expected


@pytest.mark.filterwarnings("error:Left out")
def test_recurrent_layers_give_no_warning():
    """Their cells, which are called in a loop, are not asked for."""
    model = keras.Sequential([keras.Input((5, 4)), L.LSTM(6), L.Dense(3, "relu", name="d")])
    assert signal_propagation(model, normal(8, 5, 4), verbose=0).names == ("d",)


def test_layers_that_are_not_called_are_left_out_with_a_warning():
    class Skipping(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = L.LayerNormalization(name="used"), L.LayerNormalization(name="unused")

        def build(self, shape):
            self.used.build(shape)
            self.unused.build(shape)

        def call(self, x):
            return self.used(x)

    model = Skipping()
    model.build((None, 4, 3))
    with pytest.warns(UserWarning, match="Left out.*unused"):
        assert power_decomposition(model, normal(5, 4, 3), verbose=0).names == ("used",)
    with pytest.raises(ValueError, match="Argument `layers` must have layers with one output each.*unused"):
        power_decomposition(model, normal(5, 4, 3), "unused", verbose=0)


@tensorflow_only
def test_compiled_functions_are_left_out_and_not_spoilt():
    import tensorflow as tf

    class Compiled(L.Layer):
        def __init__(self):
            super().__init__()
            self.norm = L.LayerNormalization(name="inside")
            self.function = tf.function(lambda x: self.norm(x))

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x):
            return self.function(x)

    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, Compiled()(L.LayerNormalization(name="outside")(inputs)))
    x = normal(5, 4, 3)
    with unchanged(model, x), pytest.warns(UserWarning, match="inside"):
        assert power_decomposition(model, x, verbose=0).names == ("outside",)


@pytest.mark.parametrize("steps", [3, None])
def test_in_a_loop_or_vectorized(steps):
    """TimeDistributed loops over time, or over samples where the batch is static."""
    inputs = keras.Input((steps, 4, 3))
    model = keras.Model(inputs, L.TimeDistributed(L.LayerNormalization(name="norm"))(inputs))
    x = normal(5, 3, 4, 3)
    with unchanged(model, x):
        result = power_decomposition(model, x, verbose=0)
    y = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(result.powers.sum(), np.mean(np.square(y, dtype="float64")), rtol=1e-5)


def test_the_call_of_a_layer_that_has_its_own_stays():
    model = single(L.LayerNormalization(name="norm"), (4, 3))
    layer = model.get_layer("norm")
    call, calls = layer.call, []

    def own(*args, **kwargs):
        calls.append(args)
        return call(*args, **kwargs)

    object.__setattr__(layer, "call", own)
    power_decomposition(model, normal(5, 4, 3), verbose=0)
    assert layer.call is own and calls


@pytest.mark.parametrize("where", ["data", "model", "observer"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(where, monkeypatch):
    model = small(L.BatchNormalization(name="norm"))
    model.compile("adam", "mse")
    x = images()[0]

    def data():
        yield x
        if where == "data":
            raise RuntimeError("stop")
        yield x if where == "observer" else x[:, :, :, :2]

    if where == "observer":
        count = iter(range(10))

        def moments(*args, original=channels.channel_moments, **kwargs):
            if next(count):
                raise RuntimeError("stop")
            return original(*args, **kwargs)

        monkeypatch.setattr("keras_proxynorm.diagnostics.power.channel_moments", moments)
    with unchanged(model, x), pytest.raises(Exception) as error:
        power_decomposition(model, data(), training=True, verbose=0)
    assert where == "model" or "stop" in str(error.value)
