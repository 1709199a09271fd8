"""The power decomposition, beside its definition written out in NumPy."""

import itertools
import sys

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from backends import BACKEND, tensorflow_only
from diagnostics.samples import (
    SPARSE,
    L,
    Numbers,
    batch_normalized,
    group_normalized,
    images,
    normal,
    powers_of,
    randomize,
    single,
    small,
    unchanged,
)

import keras_proxynorm as kp
from keras_proxynorm.diagnostics import PowerDecomposition, power_decomposition
from keras_proxynorm.diagnostics.streaming import ChannelPowers, StreamingMoments

numpy = keras.ops.convert_to_numpy


def measure(model, data, *args, **options):
    return power_decomposition(model, data, *args, **{"verbose": 0, **options})


def layer_normalized(x, axes, epsilon):
    x = np.asarray(x, "float64")
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def moving(x, layer, axis=-1):
    shape = [1] * x.ndim
    shape[axis] = -1
    mean, variance = (numpy(v).astype("float64").reshape(shape) for v in (layer.moving_mean, layer.moving_variance))
    return (x - mean) / np.sqrt(variance + layer.epsilon)


# Layer, what it computes before its scale and offset, and its channel axis.
CASES = {
    "batch_inference": (lambda: L.BatchNormalization(), lambda x, layer: moving(x, layer), -1, False),
    "batch_training": (lambda: L.BatchNormalization(), lambda x, _: batch_normalized(x), -1, True),
    "batch_frozen": (lambda: L.BatchNormalization(trainable=False), lambda x, layer: moving(x, layer), -1, True),
    "batch_no_affine": (lambda: L.BatchNormalization(center=False, scale=False), moving, -1, False),
    "batch_first": (lambda: L.BatchNormalization(axis=1), lambda x, _: batch_normalized(x, 1), 1, True),
    "group": (lambda: L.GroupNormalization(2), lambda x, _: group_normalized(x, 2), -1, False),
    "group_first": (lambda: L.GroupNormalization(3, axis=1), lambda x, _: group_normalized(x, 3, 1), 1, False),
    "instance": (lambda: L.GroupNormalization(-1), lambda x, _: group_normalized(x, 4), -1, True),
    "layer": (lambda: L.LayerNormalization(), lambda x, _: layer_normalized(x, (-1,), 1e-3), -1, False),
    "layer_axes": (
        lambda: L.LayerNormalization(axis=(1, 2, 3)),
        lambda x, _: layer_normalized(x, (1, 2, 3), 1e-3),
        -1,
        False,
    ),
    "layer_first": (lambda: L.LayerNormalization(axis=1), lambda x, _: layer_normalized(x, (1,), 1e-3), 1, False),
    "rms": (
        lambda: L.RMSNormalization(),
        lambda x, layer: x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + layer.epsilon),
        -1,
        False,
    ),
    "group_proxy": (lambda: kp.GroupNormProxy(2), lambda x, _: group_normalized(x, 2), -1, False),
    "group_proxy_first": (
        lambda: kp.GroupNormProxy(3, axis=1, activation="silu"),
        lambda x, _: group_normalized(x, 3, 1),
        1,
        True,
    ),
    "layer_proxy": (lambda: kp.LayerNormProxy(activation="gelu"), lambda x, _: group_normalized(x, 1), -1, False),
    "layer_proxy_leaky": (
        lambda: kp.LayerNormProxy(activation=L.LeakyReLU(0.1)),
        lambda x, _: group_normalized(x, 1),
        -1,
        True,
    ),
    "layer_proxy_plain": (lambda: kp.LayerNormProxy(activation=None), lambda x, _: group_normalized(x, 1), -1, True),
    "proxy_activation": (lambda: kp.ProxyActivation(), lambda x, _: x, -1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_beside_the_definition(case):
    if case == "layer_first" and BACKEND == "torch":
        pytest.skip("LayerNormalization(axis=1) of Keras fails on PyTorch")
    make, reference, axis, training = CASES[case]
    layer = make()
    # (3, 5, 4) is all different, so that an axis cannot be taken for another.
    model = randomize(single(layer, (3, 5, 4)))
    x = normal(6, 3, 5, 4, scale=2.0) + normal(1, 3, 1, 4, seed=1) + normal(6, 1, 1, 1, seed=2)
    y = reference(x.astype("float64"), layer)
    with unchanged(model, x):
        result = measure(model, x, training=training)
    assert result.names == (layer.name,) and result.powers.shape == (1, 4)
    np.testing.assert_allclose(result.powers[0], powers_of(y, axis), rtol=2e-5, atol=2e-7)
    np.testing.assert_allclose(result.powers.sum(), np.mean(np.square(y)), rtol=1e-5)
    np.testing.assert_allclose(result.fractions.sum(), 1)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (4, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("make", [L.BatchNormalization, lambda: kp.LayerNormProxy(), lambda: kp.GroupNormProxy(5)])
def test_ranks_and_the_sum(shape, make):
    layer = make()
    model = randomize(single(layer, shape))
    x = normal(9, *shape, offset=0.3)
    groups = getattr(layer, "groups", None)
    y = moving(x, layer) if groups is None else group_normalized(x, groups)
    result = measure(model, x, batch_size=4)
    np.testing.assert_allclose(result.powers[0], powers_of(y), rtol=5e-5, atol=1e-7)
    if len(shape) == 1:
        np.testing.assert_array_equal(result.powers[0, 2:], 0)


def test_powers_sum_to_the_mean_square_to_1e_6():
    x = normal(11, 6, 5, 4, offset=3.0)
    model = single(L.Activation("linear", name="values"), (6, 5, 4))
    result = measure(model, x, "values", batch_size=4)
    np.testing.assert_allclose(result.powers.sum(), np.mean(np.square(x, dtype="float64")), rtol=1e-6)
    np.testing.assert_allclose(result.powers[0], powers_of(x), rtol=1e-5)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_large_offsets_do_not_lose_the_variance(offset):
    x = normal(8, 6, 5, 4) + np.float32(offset)
    model = single(L.Activation("linear", name="values"), (6, 5, 4))
    np.testing.assert_allclose(
        measure(model, x, "values", batch_size=3).powers[0],
        powers_of(x.astype("float64")),
        rtol=1e-3 if offset < 1e4 else 1e-2,
    )


@pytest.mark.parametrize("training", [False, True])
def test_unequal_batches_are_the_same_as_one(training):
    # Without statistics of the batch.
    model = randomize(small(L.GroupNormalization(2, name="norm")))
    x = images(11)[0]
    whole = measure(model, x, batch_size=11, training=training)
    for size in (1, 2, 4):
        np.testing.assert_allclose(
            measure(model, x, batch_size=size, training=training).powers, whole.powers, rtol=1e-5
        )
    parts = [x[:1], x[1:8], x[8:]]
    np.testing.assert_allclose(measure(model, iter(parts), training=training).powers, whole.powers, rtol=1e-5)


def test_every_kind_of_data_gives_the_same():
    model = randomize(small())
    x, y = images(10)
    expected = measure(model, x).powers
    kinds = {
        "tuple": (x, y),
        "weights": (x, y, np.ones(10)),
        "float64": x.astype("float64"),
        "tensor": keras.ops.convert_to_tensor(x),
        "py": Numbers([(x[:3], y[:3]), (x[3:], y[3:])]),
        "py_inputs": Numbers([x[:3], x[3:]]),
        "generator": ((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)),
        "infinite": (itertools.cycle([x[:5], x[5:]]), 2),
        "py_unknown": (Numbers([x[:5], x[5:]], unknown=True), 2),
    }
    for name, data in kinds.items():
        steps = None
        if name in ("infinite", "py_unknown"):
            data, steps = data
        np.testing.assert_allclose(measure(model, data, steps=steps).powers, expected, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(measure(model, x, batch_size=4, steps=1).powers, measure(model, x[:4]).powers, rtol=1e-5)


def test_datasets_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    model = randomize(small())
    x, y = images(10)
    expected = measure(model, x).powers
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    for kind in (data, data.map(lambda x, y: x), data.filter(lambda x, y: True), data.prefetch(1)):
        np.testing.assert_allclose(measure(model, kind).powers, expected, rtol=1e-5)


def two_inputs(names=("a", "b")):
    a, b = (keras.Input((4,), name=name) for name in names)
    return a, b, L.LayerNormalization(name="norm")(L.Concatenate()([a, b]))


def test_dict_and_list_inputs():
    x, y = normal(9, 4), normal(9, 4, seed=1)
    expected = powers_of(layer_normalized(np.concatenate([x, y], -1), (-1,), 1e-3))
    a, b, out = two_inputs()
    dictionary, listed = keras.Model({"a": a, "b": b}, out), keras.Model([a, b], out)
    for model, data in (
        (dictionary, {"a": x, "b": y}),
        (dictionary, ({"a": x, "b": y}, np.ones(9))),
        (listed, ([x, y], np.ones(9))),
        (listed, [x, y]),
    ):
        np.testing.assert_allclose(measure(model, data, batch_size=4).powers[0], expected, rtol=1e-5)


class Hidden(L.Layer):
    """A custom layer, with a norm in a list in it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [L.Dense(4, name="d"), L.LayerNormalization(name="hidden_norm")]

    def build(self, shape):
        self.parts[0].build(shape)
        self.parts[1].build((*shape[:-1], 4))

    def call(self, x):
        return self.parts[1](self.parts[0](x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.norm = Hidden(name="hidden"), L.BatchNormalization(name="norm")

    def build(self, shape):
        self.hidden.build(shape)
        self.norm.build((*shape[:-1], 4))

    def call(self, x, training=None):
        return self.norm(self.hidden(x), training=training)


def test_subclassed_models_and_norms_in_custom_layers():
    model = Subclassed()
    model.build((None, 6, 3))
    randomize(model)
    x = normal(7, 6, 3)
    with unchanged(model, x):
        result = measure(model, x, training=True)
    assert result.names == ("hidden_norm", "norm")
    dense, norm = model.hidden.parts
    h = layer_normalized(numpy(dense(x)), (-1,), 1e-3)
    np.testing.assert_allclose(result.powers[0], powers_of(h), rtol=1e-4, atol=1e-7)
    h = h * numpy(norm.gamma) + numpy(norm.beta)
    np.testing.assert_allclose(result.powers[1], powers_of(batch_normalized(h)), rtol=1e-4, atol=1e-6)


def test_inputs_by_keyword():
    """Calls such as `norm(inputs=x)`."""

    class Keyword(L.Layer):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x):
            return self.norm(inputs=x)

    x = normal(7, 6, 3)
    for norm in (L.LayerNormalization(), kp.LayerNormProxy()):
        y = layer_normalized(x, (-1,) if isinstance(norm, L.LayerNormalization) else (1, 2), 1e-3)
        np.testing.assert_allclose(measure(single(Keyword(norm), (6, 3)), x).powers[0], powers_of(y), rtol=1e-4)


def test_siamese_calls_count_as_samples():
    backbone = randomize(single(L.BatchNormalization(name="norm"), (6, 3)))
    left, right = keras.Input((6, 3)), keras.Input((6, 3))
    model = keras.Model([left, right], L.Subtract()([backbone(left), backbone(right)]))
    x, y = normal(5, 6, 3), normal(5, 6, 3, seed=1, offset=1.0)
    result = measure(model, ([x, y], np.zeros(5)))
    expected = powers_of(moving(np.concatenate([x, y]).astype("float64"), backbone.get_layer("norm")))
    np.testing.assert_allclose(result.powers[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["Dense", "Conv2D", "ReLU"])
def test_outputs_of_other_layers(name):
    model = randomize(small())
    x = images()[0]
    kind = getattr(L, name)
    layer = next(layer for layer in model.layers if isinstance(layer, kind))
    y = numpy(keras.Model(model.inputs, layer.output)(x))
    for choice in (kind, layer.name, layer, [layer], lambda other: other is layer):
        result = measure(model, x, choice)
        assert result.names == (layer.name,)
        np.testing.assert_allclose(result.powers[0], powers_of(y), rtol=1e-5, atol=1e-9)


def test_a_shared_activation_of_different_widths():
    """One ReLU behind every layer, as many models have it."""
    relu = L.ReLU(name="relu")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, relu(L.Dense(16)(relu(L.Dense(8)(inputs)))))
    result = measure(model, normal(9, 4), "relu")
    assert np.isfinite(result.powers).all()


def test_outputs_channels_first():
    x = normal(5, 3, 6, 4)
    model = single(L.AveragePooling2D(1, data_format="channels_first", name="pool"), (3, 6, 4))
    np.testing.assert_allclose(measure(model, x, "pool").powers[0], powers_of(x, 1), rtol=1e-5)


@pytest.mark.parametrize("policy, tolerance", [("mixed_float16", 5e-3), ("mixed_bfloat16", 3e-2), ("float64", 1e-5)])
@pytest.mark.parametrize("make", [L.BatchNormalization, L.LayerNormalization, lambda: kp.LayerNormProxy()])
def test_precisions(policy, tolerance, make):
    keras.config.set_dtype_policy(policy)
    layer = make()
    model = randomize(single(layer, (6, 5, 4)))
    x = normal(8, 6, 5, 4, scale=0.5)
    y = {
        "BatchNormalization": lambda: moving(x.astype("float64"), layer),
        "LayerNormalization": lambda: layer_normalized(x, (-1,), 1e-3),
        "LayerNormProxy": lambda: group_normalized(x, 1),
    }[type(layer).__name__]()
    with unchanged(model, x):
        result = measure(model, x)
    np.testing.assert_allclose(result.powers[0], powers_of(y), rtol=tolerance, atol=tolerance / 10)


def test_dropout_drops_in_training_and_its_seeds_stay():
    inputs = keras.Input((50, 4))
    model = keras.Model(inputs, L.Activation("linear", name="out")(L.Dropout(0.5, seed=3)(inputs)))
    x = np.ones((20, 50, 4), "float32")
    with unchanged(model):
        first, again = measure(model, x, "out", training=True), measure(model, x, "out", training=True)
        np.testing.assert_array_equal(first.powers, again.powers)
        np.testing.assert_allclose(measure(model, x, "out").powers[0], [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(first.powers.sum(), 2, rtol=0.1)


def test_the_optimizer_and_the_metrics_stay():
    model = small()
    model.compile("adam", SPARSE, metrics=["accuracy"])
    x, y = images(32)
    model.fit(x, y, epochs=1, verbose=0)
    with unchanged(model, x):
        measure(model, (x, y), training=True)
    before = model.evaluate(x, y, verbose=0)
    measure(model, (x, y), training=True)
    assert model.evaluate(x, y, verbose=0) == before


@tensorflow_only
def test_a_compiled_function_is_not_traced_anew_with_the_observer():
    model = small()
    x = images()[0]
    before = model.predict(x, verbose=0)
    function = model.predict_function
    measure(model, x)
    assert model.predict_function is function
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


def test_values_that_are_not_finite_are_not_hidden():
    model = small(L.LayerNormalization(name="norm"))
    model.get_layer("conv").bias.assign(np.full(8, np.nan))
    result = measure(model, images()[0])
    assert np.isnan(result.powers).all()
    assert np.isnan(result.fractions).all() and "nan" in str(result)


def test_fractions_where_there_is_no_power():
    result = measure(single(L.LayerNormalization(), (6, 4)), np.ones((5, 6, 4), "float32"))
    np.testing.assert_allclose(result.powers, 0, atol=1e-12)
    assert np.isfinite(result.fractions).all()


def example():
    return PowerDecomposition(("a", "long_name/b"), np.array([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.5, 0.5]]))


def test_to_dict_and_str():
    result = example()
    assert len(result) == 2
    assert result.to_dict() == {
        "layer": ["a", "long_name/b"],
        "P1": [0.25, 0.0],
        "P2": [0.25, 0.0],
        "P3": [0.5, 0.5],
        "P4": [0.0, 0.5],
        "power": [4.0, 1.0],
    }
    lines = str(result).split("\n")
    assert lines[0].split() == ["layer", "P1", "P2", "P3", "P4", "power"]
    assert lines[2].split() == ["long_name/b", "0.0000", "0.0000", "0.5000", "0.5000", "1.0000"]
    assert len({len(line) for line in lines}) == 1


def test_to_frame():
    pandas = pytest.importorskip("pandas")
    frame = example().to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame.index.name == "layer"
    assert list(frame.columns) == ["P1", "P2", "P3", "P4", "power"]
    assert frame.loc["a", "P3"] == 0.5 and frame.loc["long_name/b", "power"] == 1


def test_to_frame_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        example().to_frame()
    assert example().to_dict()["P1"] == [0.25, 0.0]


def test_bad_input():
    with pytest.raises(ValueError, match="Argument `model` must be a keras.Model"):
        power_decomposition(L.Dense(3), normal(3, 3))
    with pytest.raises(ValueError, match="Argument `model` must be built"):
        power_decomposition(keras.Sequential([L.BatchNormalization()]), normal(3, 3))
    with pytest.raises(ValueError, match="Argument `data` must be"):
        power_decomposition(small(), "images")
    with pytest.raises(ValueError, match="Argument `batch_size` must be.*Received: batch_size=0"):
        power_decomposition(small(), images()[0], batch_size=0)


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(sizes=sizes, seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 1.0, -1e6]))
def test_streaming_moments_are_those_of_all(sizes, seed, offset):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, rng.uniform(0.1, 10), (size, 3)) for size in sizes]
    moments = StreamingMoments()
    for part in parts:
        moments.update(part)
    whole = np.concatenate(parts)
    assert moments.count == len(whole)
    np.testing.assert_allclose(moments.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.variance, whole.var(0), rtol=1e-6, atol=1e-9)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    data=arrays.arrays("float64", (2, 6, 3), elements=st.floats(-1e3, 1e3, allow_nan=False)), cut=st.integers(1, 5)
)
def test_channel_powers_do_not_depend_on_the_batches(data, cut):
    whole, parts = ChannelPowers(), ChannelPowers()
    whole.update(*data)
    parts.update(*data[:, :cut])
    parts.update(*data[:, cut:])
    np.testing.assert_allclose(parts.terms, whole.terms, rtol=1e-9, atol=1e-9)
    means, stddevs = data
    np.testing.assert_allclose(whole.terms.sum(), np.mean(means**2 + stddevs**2), rtol=1e-9, atol=1e-9)
    assert (parts.terms >= 0).all()


def test_memory_does_not_grow_with_the_data():
    moments = ChannelPowers()
    for i in range(20):
        moments.update(*np.random.default_rng(i).normal(size=(2, 50, 3)))
    kept = [np.size(v) for part in vars(moments).values() for v in vars(part).values()]
    assert max(kept) <= 3
