"""Signal propagation, beside NumPy, a model cut in two, and finite differences."""

import keras
import numpy as np
import pytest
from backends import gradients, numpy, tensors
from diagnostics.samples import SPARSE, L, images, normal, randomize, single, small, unchanged

import keras_proxynorm as kp
from keras_proxynorm.diagnostics import signal_propagation

MSE = keras.losses.MeanSquaredError()


def measure(model, data, *args, **options):
    return signal_propagation(model, data, *args, **{"verbose": 0, **options})


def cosine_and_rank(y):
    """Over pairs, one after the other; rows of zeros have no direction."""
    y = np.asarray(y, "float64").reshape(len(y), -1)
    lengths = np.linalg.norm(y, axis=1)
    gram = np.array(
        [
            [a @ b / (i * j) if i and j else 0 for b, j in zip(y, lengths, strict=True)]
            for a, i in zip(y, lengths, strict=True)
        ]
    )
    pairs = [gram[i, j] for i in range(len(y)) for j in range(len(y)) if i != j]
    return np.mean(pairs), np.trace(gram) / np.linalg.norm(gram, 2)


def dense(*, activation="relu", units=2):
    """Two layers that can be cut apart."""
    layers = [
        keras.Input((5,)),
        L.Dense(7, activation, name="first"),
        L.Dense(6, "tanh", name="second"),
        L.Dense(units),
    ]
    return keras.Sequential(layers, name="dense")


def test_activations_beside_numpy():
    model = randomize(small())
    x = images(9)[0]
    result = measure(model, x, "relu", training=False)
    y = numpy(keras.Model(model.inputs, model.get_layer("relu").output)(x)).astype("float64")
    np.testing.assert_allclose(result.mean, [y.mean()], rtol=1e-5)
    np.testing.assert_allclose(result.std, [np.sqrt(y.var((0, 1, 2)).mean())], rtol=1e-5)
    cosine, rank = cosine_and_rank(y)
    np.testing.assert_allclose(result.cosine, [cosine], rtol=1e-5)
    np.testing.assert_allclose(result.stable_rank, [rank], rtol=1e-5)
    assert np.isnan(result.gradient_norm).all()


def test_average_over_batches():
    model = dense()
    x, y = normal(8, 5), normal(8, 2)
    halves = [measure(model, (x[i : i + 4], y[i : i + 4]), loss=MSE) for i in (0, 4)]
    whole = measure(model, (x, y), loss=MSE, batch_size=4)
    for name in ("mean", "cosine", "stable_rank", "gradient_norm"):
        np.testing.assert_allclose(getattr(whole, name), np.mean([getattr(h, name) for h in halves], 0), rtol=1e-5)
    # Moments are those of all samples.
    np.testing.assert_allclose(whole.std, measure(model, x, batch_size=8).std, rtol=1e-5)


@pytest.mark.parametrize("identical", [True, False])
def test_stable_rank_of_known_samples(identical):
    model = single(L.ReLU(name="relu"), (4,))
    x = np.ones((4, 4), "float32") if identical else np.eye(4, dtype="float32")
    result = measure(model, x)
    np.testing.assert_allclose(result.stable_rank, [1 if identical else 4], rtol=1e-6)
    np.testing.assert_allclose(result.cosine, [1 if identical else 0], atol=1e-6)


def test_one_sample_and_a_dead_layer():
    model = single(L.ReLU(name="relu"), (4,))
    result = measure(model, np.ones((1, 4), "float32"))
    assert np.isnan(result.cosine).all() and result.stable_rank[0] == 1
    result = measure(model, -np.ones((3, 4), "float32"))
    assert result.mean[0] == result.std[0] == result.cosine[0] == result.stable_rank[0] == 0


def tail_gradient(model, name, x, loss):
    """The gradient by the output of a layer, of the rest of a sequential model as a model of its own."""
    layer = model.get_layer(name)
    head = keras.Model(model.inputs, layer.output)
    rest = model.layers[model.layers.index(layer) + 1 :]

    def tail(h):
        for other in rest:
            h = other(h, training=True) if isinstance(other, L.BatchNormalization) else other(h)
        return loss(h)

    h = numpy(head(x))
    (gradient,) = gradients(tail, *tensors(h))
    return numpy(gradient), tail, h


@pytest.mark.parametrize("name", ["first", "second"])
def test_gradient_norm_beside_a_model_cut_in_two(name):
    model = dense()
    x, y = normal(6, 5), normal(6, 2)
    with unchanged(model, x):
        result = measure(model, (x, y), name, loss=MSE)
    expected, tail, h = tail_gradient(model, name, x, lambda out: MSE(y, out))
    np.testing.assert_allclose(result.gradient_norm, [np.linalg.norm(expected)], rtol=1e-5)
    # Along the gradient, by finite differences.
    step = 1e-2 / np.linalg.norm(expected)
    up, down = (float(numpy(tail(tensors((h + s * expected).astype("float32"))[0]))) for s in (step, -step))
    np.testing.assert_allclose((up - down) / (2 * step), result.gradient_norm[0] ** 2, rtol=1e-2)


def test_gradients_through_batch_normalization():
    """By the outputs of convolutions, as in "Beyond BatchNorm"."""
    model = randomize(small())
    x, y = images(8)
    with unchanged(model, x):
        result = measure(model, (x, y), L.Conv2D, loss=SPARSE)
    expected, *_ = tail_gradient(model, "conv", x, lambda out: SPARSE(y, out))
    np.testing.assert_allclose(result.gradient_norm, [np.linalg.norm(expected)], rtol=1e-4)


def test_training_or_not_for_batch_normalization():
    model = randomize(small())
    x = images(16)[0]
    y = numpy(keras.Model(model.inputs, model.get_layer("norm").output)(x, training=False))
    inference = measure(model, x, "norm", training=False)
    training = measure(model, x, "norm")
    np.testing.assert_allclose(inference.mean, [y.mean()], rtol=1e-4)
    np.testing.assert_allclose(training.mean, [numpy(model.get_layer("norm").beta).mean()], rtol=1e-3, atol=1e-5)


def test_dropout_is_the_same_for_activations_and_gradients():
    """Linear behind the layer: the gradient follows from the mask."""
    inputs = keras.Input((40,))
    h = L.Activation("relu", name="relu")(inputs)
    h = L.Dropout(0.5, seed=1, name="drop")(h)
    model = keras.Model(inputs, L.Dense(1, use_bias=False)(h))
    model.layers[-1].kernel.assign(np.ones((40, 1)))
    x, y = np.ones((6, 40), "float32"), np.zeros((6, 1), "float32")
    with unchanged(model):
        result = measure(model, (x, y), ["relu", "drop"], loss=MSE)
    assert result.mean[0] == 1 and 0.7 < result.mean[1] < 1.3
    # By the input of dropout it is that by its output times the mask, which is 0 or 2.
    assert result.gradient_norm[0] > 0
    off = measure(model, (x, y), ["relu", "drop"], loss=MSE, training=False)
    np.testing.assert_allclose(off.gradient_norm, 2 * 40 / 6 * np.sqrt(6 * 40), rtol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "mean_squared_error", keras.losses.mean_squared_error, MSE])
def test_names_functions_and_instances_of_losses(loss):
    model = dense()
    data = normal(6, 5), normal(6, 2)
    np.testing.assert_allclose(
        measure(model, data, loss=loss).gradient_norm, measure(model, data, loss=MSE).gradient_norm, rtol=1e-6
    )


def test_a_loss_function_of_the_user():
    """It gets tensors, as in `fit`."""

    def loss(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

    model = dense()
    for data in ((normal(6, 5), normal(6, 2)), (normal(6, 5), normal(6, 2).astype("float64"))):
        np.testing.assert_allclose(
            measure(model, data, loss=loss).gradient_norm, measure(model, data, loss=MSE).gradient_norm, rtol=1e-5
        )


@pytest.mark.parametrize("loss", [None, MSE, "mse"])
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_sample_weights(loss, shape):
    model = dense()
    model.compile("sgd", MSE)
    x, y, w = normal(6, 5), normal(6, 2), np.abs(normal(6, seed=5))
    expected, *_ = tail_gradient(model, "second", x, lambda out: MSE(y, out, sample_weight=w))
    result = measure(model, (x, y, w.reshape(shape)), "second", loss=loss)
    np.testing.assert_allclose(result.gradient_norm, [np.linalg.norm(expected)], rtol=1e-5)


def test_the_compiled_loss():
    model = dense()
    x, y = normal(6, 5), normal(6, 2)
    given = measure(model, (x, y), loss="mae").gradient_norm
    assert np.isnan(measure(model, (x, y)).gradient_norm).all()
    model.compile("adam", "mae")
    with unchanged(model, x):
        np.testing.assert_allclose(measure(model, (x, y)).gradient_norm, given, rtol=1e-5)
    assert np.isnan(measure(model, x).gradient_norm).all()
    # The loss that is given counts.
    np.testing.assert_allclose(
        measure(model, (x, y), loss=MSE).gradient_norm,
        measure(dense_like(model), (x, y), loss=MSE).gradient_norm,
        rtol=1e-6,
    )


def dense_like(model):
    other = dense()
    other.set_weights(model.get_weights())
    return other


def test_a_compiled_model_with_regularized_weights():
    """What regularizes the weights has no gradient by activations."""
    layers = [keras.Input((5,)), L.Dense(7, "relu", kernel_regularizer="l2", name="first"), L.Dense(2)]
    model = keras.Sequential(layers)
    data = normal(6, 5), normal(6, 2)
    expected = measure(model, data, loss=MSE).gradient_norm
    model.compile("sgd", MSE)
    with unchanged(model, data[0]):
        np.testing.assert_allclose(measure(model, data).gradient_norm, expected, rtol=1e-5)
    model.fit(*data, verbose=0)


def test_a_compiled_model_with_regularized_activities():
    layers = [keras.Input((5,)), L.Dense(7, "relu", activity_regularizer="l2", name="first"), L.Dense(2)]
    model = keras.Sequential(layers)
    model.compile("sgd", MSE)
    data = normal(6, 5), normal(6, 2)
    model(data[0])
    before = len(model.losses)
    measure(model, data)
    # No symbols of a tracing are left.
    assert len(model.losses) in (0, before) and all(np.isfinite(float(numpy(x))) for x in model.losses)
    model.fit(*data, verbose=0)


def test_several_outputs_and_losses():
    inputs = keras.Input((5,))
    h = L.Dense(7, "relu", name="first")(inputs)
    model = keras.Model(inputs, {"a": L.Dense(2, name="a")(h), "b": L.Dense(1, name="b")(h)})
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5})
    x, y = normal(6, 5), {"a": normal(6, 2), "b": normal(6, 1)}
    result = measure(model, (x, y))
    head = numpy(keras.Model(inputs, h)(x))

    def tail(h):
        a, b = (model.get_layer(name)(h) for name in "ab")
        return MSE(y["a"], a) + 0.5 * keras.losses.MeanAbsoluteError()(y["b"], b)

    (gradient,) = gradients(tail, *tensors(head))
    np.testing.assert_allclose(result.gradient_norm, [np.linalg.norm(numpy(gradient))], rtol=1e-5)
    # What Keras makes of the compiled losses at their first call is of use to it.
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5})
    assert model.evaluate(x, y, verbose=0, return_dict=True) == evaluated
    with unchanged(model, x):
        measure(model, (x, y))


def test_a_shared_activation_of_different_widths():
    """One ReLU behind every layer, as many models have it."""
    relu = L.ReLU(name="relu")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, relu(L.Dense(16)(relu(L.Dense(8)(inputs)))))
    result = measure(model, (normal(9, 4), normal(9, 16)), loss=MSE)
    assert np.isfinite(result.gradient_norm).all()


def test_a_shared_layer_sums_over_its_calls():
    relu = L.Activation("tanh", name="act")
    first, second = L.Dense(6), L.Dense(6)
    inputs = keras.Input((4,))
    a = relu(first(inputs))
    b = relu(second(a))
    model = keras.Model(inputs, L.Dense(1)(b))
    x, y = normal(9, 4), normal(9, 1)
    result = measure(model, (x, y), loss=MSE)

    def loss(h, g):
        left = relu(first(x)) + h
        return MSE(y, model.layers[-1](relu(second(left)) + g))

    parts = gradients(loss, *tensors(np.zeros((9, 6), "float32"), np.zeros((9, 6), "float32")))
    expected = np.sqrt(sum(np.square(numpy(p)).sum() for p in parts))
    np.testing.assert_allclose(result.gradient_norm, [expected], rtol=1e-4)


def test_a_layer_without_influence_on_the_loss_has_gradient_zero():
    inputs = keras.Input((5,))
    h = L.Dense(3, "relu", name="used")(inputs)
    model = keras.Model(inputs, [L.Dense(1)(h), L.Dense(3, "relu", name="unused")(inputs)])

    def loss(y, p):
        return keras.ops.mean(keras.ops.square(p[0]))

    class First(keras.losses.Loss):
        def __call__(self, y, p, sample_weight=None):
            return loss(y, p)

    result = measure(model, (normal(6, 5), normal(6, 1)), loss=First())
    found = dict(zip(result.names, result.gradient_norm, strict=True))
    assert found["used"] > 0 and found["unused"] == 0


@pytest.mark.parametrize("policy, tolerance", [("mixed_bfloat16", 0.1), ("mixed_float16", 0.05)])
def test_mixed_precision(policy, tolerance):
    """Gradients by many activations are small, but not to be lost."""

    def make():
        layers = [keras.Input((16, 16, 4)), L.Conv2D(8, 3, activation="relu", name="conv")]
        return keras.Sequential([*layers, L.GlobalAveragePooling2D(), L.Dense(1, dtype="float32")])

    plain = make()
    keras.config.set_dtype_policy(policy)
    mixed = make()
    mixed.set_weights(plain.get_weights())
    data = normal(32, 16, 16, 4), normal(32, 1, scale=0.1)
    expected, found = (measure(model, data, loss=MSE) for model in (plain, mixed))
    np.testing.assert_allclose(found.std, expected.std, rtol=tolerance)
    np.testing.assert_allclose(found.gradient_norm, expected.gradient_norm, rtol=tolerance)


def test_small_gradients_in_float16_are_not_lost():
    def make():
        inputs = keras.Input((64, 64, 4))
        h = L.Conv2D(4, 3, activation="relu", name="conv")(inputs)
        return keras.Model(inputs, L.Dense(1, dtype="float32")(L.GlobalAveragePooling2D()(h)))

    plain = make()
    keras.config.set_dtype_policy("mixed_float16")
    mixed = make()
    mixed.set_weights(plain.get_weights())
    x = normal(8, 64, 64, 4)

    def loss(y, p):
        return 1e-3 * keras.ops.mean(keras.ops.square(p - 1.0), axis=-1)

    expected, found = (measure(model, (x, np.zeros((8, 1))), loss=loss).gradient_norm for model in (plain, mixed))
    np.testing.assert_allclose(found, expected, rtol=0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_hidden(value):
    model = dense()
    model.get_layer("first").bias.assign(np.full(7, value))
    result = measure(model, (normal(6, 5), normal(6, 2)), loss=MSE)
    assert not np.isfinite(result.mean[0])
    assert not np.isfinite(result.cosine[0]) and not np.isfinite(result.stable_rank[0])


def test_layers_of_this_package_by_default():
    inputs = keras.Input((6, 6, 3))
    h = kp.GroupNormProxy(2, name="ours")(L.Conv2D(8, 3, name="conv")(inputs))
    h = L.Conv2D(8, 3, activation="relu", name="with_activation")(h)
    model = keras.Model(inputs, L.Dense(3, "softmax")(L.GlobalAveragePooling2D()(h)))
    assert measure(model, images()[0]).names == ("ours", "with_activation")


def test_masks_reach_the_layers_behind():
    inputs = keras.Input((6,), dtype="int32")
    h = L.Embedding(9, 4, mask_zero=True)(inputs)
    h = L.Activation("relu", name="relu")(h)
    model = keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling1D()(h)))
    tokens = np.array([[1, 2, 0, 0, 0, 0]] * 4)
    result = measure(model, (tokens, np.ones((4, 1))), loss=MSE)
    kernel, out = numpy(model.layers[-1].kernel)[:, 0], numpy(model(tokens))[:, 0]
    # By each of two positions that count, of each sample.
    expected = np.sqrt(np.sum(np.square(2 * (out - 1) / 4)[:, None] * np.square(kernel / 2) * 2))
    np.testing.assert_allclose(result.gradient_norm, [expected], rtol=1e-4)


def test_hidden_layers_alone_are_an_error():
    class Pair(L.Layer):
        def call(self, x):
            return x, x

    inputs = keras.Input((4,))
    a, _ = Pair(name="pair")(inputs)
    model = keras.Model(inputs, L.Dense(1)(a))
    with pytest.raises(ValueError, match="Argument `layers` must have layers with one output each.*pair"):
        measure(model, (normal(5, 4), normal(5, 1)), "pair", loss=MSE)


def test_str_and_to_dict():
    result = measure(dense(), normal(6, 5))
    assert list(result.to_dict()) == ["layer", "mean", "std", "cosine", "stable_rank", "gradient_norm"]
    assert str(result).split("\n")[1].split()[0] == "first" and "nan" in str(result)


def test_bad_input():
    model = dense()
    x, y = normal(6, 5), normal(6, 2)
    with pytest.raises(ValueError, match="Argument `data` must have targets for `loss`"):
        measure(model, x, loss="mse")
    with pytest.raises(ValueError, match="not_a_loss"):
        measure(model, (x, y), loss="not_a_loss")
    with pytest.raises(ValueError, match="Argument `model` must be"):
        measure(None, (x, y))
    with pytest.raises(ValueError, match="layer whose output is an activation"):
        measure(keras.Sequential([keras.Input((3,)), L.Dense(3)]), normal(3, 3))


def test_a_short_last_batch_counts_by_its_samples():
    model = dense()
    x = normal(9, 5)
    whole = measure(model, x[:8], batch_size=8)
    both = measure(model, x, batch_size=8)
    np.testing.assert_allclose(both.stable_rank, (8 * whole.stable_rank + 1) / 9, rtol=1e-5)
    # One sample has no pairs.
    np.testing.assert_allclose(both.cosine, whole.cosine, rtol=1e-5)
