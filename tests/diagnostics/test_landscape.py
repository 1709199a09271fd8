"""The loss along the gradient, where the answers are known."""

import keras
import numpy as np
import pytest
from backends import numpy
from diagnostics.samples import SPARSE, L, images, normal, small, unchanged

from keras_proxynorm.diagnostics import LossLandscape, loss_landscape

MSE = keras.losses.MeanSquaredError()
STEPS = np.geomspace(1e-2, 3, 8)


def linear(use_bias=False, **options):
    return keras.Sequential([keras.Input((4,)), L.Dense(1, use_bias=use_bias, name="line", **options)])


def least_squares(x, y, w, l2=0.0):
    """Loss, gradient and Hessian of mean((x w - y)^2) + l2 |w|^2, in float64."""
    x, y, w = (np.asarray(v, "float64") for v in (x, y, w))
    residual = x @ w - y
    loss = np.mean(residual**2) + l2 * np.sum(w**2)
    gradient = 2 * x.T @ residual / len(x) + 2 * l2 * w
    return loss, gradient, 2 * x.T @ x / len(x) + 2 * l2 * np.eye(len(w))


def check_parabola(found, loss, g, hessian):
    """Everything about a landscape that is a parabola."""
    steps, length, change = found.step_sizes, np.linalg.norm(g), np.linalg.norm(hessian @ g)
    curvature = (g.T @ hessian @ g).item()
    np.testing.assert_allclose([found.loss, found.gradient_norm], [loss, length], rtol=1e-5)
    expected = loss - steps * length**2 + steps**2 * curvature / 2
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.relative_losses, expected / loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gradient_changes, steps * change, rtol=1e-3)
    np.testing.assert_allclose(found.smoothness, change / length, rtol=1e-3)
    np.testing.assert_allclose(found.effective_smoothness, change / length, rtol=1e-3)
    np.testing.assert_allclose(found.loss_range, (expected.min(), expected.max()), rtol=1e-4)
    np.testing.assert_allclose(found.gradient_predictiveness, (steps[0] * change, steps[-1] * change), rtol=1e-3)
    return 2 * length**2 / curvature


def check_largest_step(found, exact):
    """Not beyond where the loss returns to its start, and less than a 64th of an interval, on a log scale, below it."""
    ratio = (found.step_sizes[1] / found.step_sizes[0]) ** (1 / 64)
    assert exact / ratio * 0.999 <= found.largest_stable_step <= exact * 1.001


def test_least_squares():
    model, x, y = linear(), normal(16, 4), normal(16, 1, seed=1)
    with unchanged(model, x):
        found = loss_landscape(model, (x, y), loss=MSE, step_sizes=STEPS)
    exact = check_parabola(found, *least_squares(x, y, numpy(model.layers[0].kernel)))
    assert STEPS[0] < exact < STEPS[-1]
    check_largest_step(found, exact)


@pytest.mark.parametrize("l2", [0.05, 0.5])
def test_regularization_in_the_compiled_loss(l2):
    model, x, y = linear(kernel_regularizer=keras.regularizers.L2(l2)), normal(16, 4), normal(16, 1, seed=1)
    model.compile("adam", MSE)
    w = numpy(model.layers[0].kernel)
    with unchanged(model, x):
        found = loss_landscape(model, (x, y), step_sizes=STEPS)
        check_largest_step(found, check_parabola(found, *least_squares(x, y, w, l2)))
        # A loss that is given has none.
        check_parabola(loss_landscape(model, (x, y), loss="mse", step_sizes=STEPS), *least_squares(x, y, w))


def test_sample_weights():
    model, x, y = linear(), normal(16, 4), normal(16, 1, seed=1)
    weights = np.abs(normal(16, seed=2))
    root = np.sqrt(weights)[:, None]
    expected = least_squares(root * x, root * y, numpy(model.layers[0].kernel))
    for shape in ((16,), (16, 1)):
        for loss in (MSE, "mse"):
            check_parabola(
                loss_landscape(model, (x, y, weights.reshape(shape)), loss=loss, step_sizes=STEPS), *expected
            )
    check_parabola(
        loss_landscape(model, (x, y, None), loss=MSE, step_sizes=STEPS),
        *least_squares(x, y, numpy(model.layers[0].kernel)),
    )


def test_more_samples_than_a_batch_of_arrays_has():
    model, x, y = linear(), normal(100, 4), normal(100, 1, seed=1)
    found = loss_landscape(model, (x, y), loss=MSE, step_sizes=STEPS)
    check_parabola(found, *least_squares(x, y, numpy(model.layers[0].kernel)))


@pytest.mark.parametrize("divergence", [1, 4.0])
def test_divergence(divergence):
    model, x, y = linear(), normal(16, 4), normal(16, 1, seed=1)
    found = loss_landscape(model, (x, y), loss=MSE, step_sizes=STEPS, divergence=divergence)
    loss, g, hessian = least_squares(x, y, numpy(model.layers[0].kernel))
    a, b, c = (g.T @ hessian @ g).item() / 2, -(g.T @ g).item(), loss * (1 - divergence)
    check_largest_step(found, (-b + np.sqrt(b**2 - 4 * a * c)) / (2 * a))


def test_all_stable_and_none_stable():
    model, x, y = linear(), normal(16, 4), normal(16, 1, seed=1)
    small_steps, large = [1e-3, 2e-3], [1e3, 1e4]
    assert loss_landscape(model, (x, y), loss=MSE, step_sizes=small_steps).largest_stable_step == 2e-3
    assert loss_landscape(model, (x, y), loss=MSE, step_sizes=large).largest_stable_step == 0
    found = loss_landscape(model, (x, y), loss=MSE, step_sizes=[0.01])
    assert found.losses.shape == (1,) and found.largest_stable_step == 0.01


def test_rounding_is_no_divergence():
    """Near the optimum, small steps change the loss by less than float32 can tell."""
    model, x, y = linear(), normal(64, 4), normal(64, 1, seed=1)
    best = np.linalg.lstsq(x.astype("float64"), y, rcond=None)[0]
    for seed in range(6):
        model.layers[0].kernel.assign(best + 1e-3 * normal(4, 1, seed=seed))
        found = loss_landscape(model, (x, y), loss=MSE)
        _, g, hessian = least_squares(x, y, numpy(model.layers[0].kernel))
        exact = 2 * (g.T @ g).item() / (g.T @ hessian @ g).item()
        assert 0.7 * exact < found.largest_stable_step < 1.4 * exact


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_rounding_in_mixed_precision_is_no_divergence(policy):
    x, y = images(32)

    def found(seed):
        keras.utils.set_random_seed(seed)
        model = small(L.LayerNormalization(name="norm"))
        return loss_landscape(model, (x, y), loss=SPARSE)

    plain = [found(seed) for seed in range(3)]
    keras.config.set_dtype_policy(policy)
    for seed, expected in enumerate(plain):
        mixed = found(seed)
        np.testing.assert_allclose([mixed.loss, mixed.gradient_norm], [expected.loss, expected.gradient_norm], rtol=0.1)
        assert mixed.largest_stable_step > expected.largest_stable_step / 4


def test_embeddings():
    """Beside a dense layer of one-hot inputs; tokens occur several times."""
    rng = np.random.default_rng(0)
    tokens, y = rng.integers(6, size=(8, 5)), normal(8, 1)
    inputs = keras.Input((5,), dtype="int32")
    sparse = keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling1D()(L.Embedding(6, 4)(inputs))))
    one_hot = keras.Input((5, 6))
    plain = keras.Model(one_hot, L.Dense(1)(L.GlobalAveragePooling1D()(L.Dense(4, use_bias=False)(one_hot))))
    plain.set_weights(sparse.get_weights())
    expected = loss_landscape(plain, (np.eye(6, dtype="float32")[tokens], y), loss=MSE, step_sizes=STEPS)
    with unchanged(sparse, tokens):
        found = loss_landscape(sparse, (tokens, y), loss=MSE, step_sizes=STEPS)
    for name in ("loss", "gradient_norm", "losses", "gradient_changes"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-3, err_msg=name)


def test_frozen_weights_do_not_move():
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(4, name="frozen", trainable=False), L.Dense(1, use_bias=False)]
    )
    x, y = normal(16, 4), normal(16, 1, seed=1)
    hidden = numpy(model.layers[0](x))
    found = loss_landscape(model, (x, y), loss=MSE, step_sizes=STEPS)
    check_parabola(found, *least_squares(hidden, y, numpy(model.layers[1].kernel)))


def test_weights_without_a_gradient():
    inputs = keras.Input((4,))
    used, unused = L.Dense(1, use_bias=False, name="used"), L.Dense(3, name="unused")
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    model.compile("sgd", [MSE, None])
    x, y = normal(16, 4), normal(16, 1, seed=1)

    class First(keras.losses.Loss):
        def __call__(self, y, p, sample_weight=None):
            return MSE(y, p[0])

    found = loss_landscape(model, (x, y), loss=First(), step_sizes=STEPS)
    check_parabola(found, *least_squares(x, y, numpy(used.kernel)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_is_unchanged_and_uses_its_statistics(training):
    model = small()
    model.compile("adam", SPARSE)
    x, y = images(16)
    model.fit(x, y, epochs=2, verbose=0)
    with unchanged(model, x):
        found = loss_landscape(model, (x, y), training=training, step_sizes=STEPS)
    np.testing.assert_allclose(found.loss, float(SPARSE(y, model(x, training=training))), rtol=1e-4)


def test_one_step_is_that_of_sgd():
    x, y = images(16)
    model = small()
    model.compile(keras.optimizers.SGD(0.3), SPARSE)
    found = loss_landscape(model, (x, y), step_sizes=[0.3])
    model.train_on_batch(x, y)
    np.testing.assert_allclose(float(SPARSE(y, model(x, training=True))), found.losses[0], rtol=1e-4)


def test_an_exception_leaves_the_model_as_it_was():
    model = small()
    calls = iter(range(100))

    def loss(y, p):
        if next(calls) == 0:
            raise RuntimeError("stop")
        return keras.ops.sparse_categorical_crossentropy(y, p, from_logits=True)

    x, y = images(8)
    with unchanged(model, x), pytest.raises(RuntimeError, match="stop"):
        loss_landscape(model, (x, y), loss=loss)


@pytest.mark.filterwarnings("error", "ignore:__array__ implementation:DeprecationWarning")
def test_no_warnings():
    model, x, y = linear(), normal(16, 4), normal(16, 1, seed=1)
    loss_landscape(model, (keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)), loss=MSE)


def test_numbers_that_are_not_finite():
    found = LossLandscape(1.0, 2.0, np.array([0.1, 1.0]), np.array([0.5, np.nan]), np.array([0.3, np.inf]), 0.1)
    assert found.loss_range == (0.5, np.inf) and found.gradient_predictiveness == (0.3, np.inf)
    assert found.effective_smoothness == np.inf
    assert list(found.to_dict()) == [
        "loss",
        "gradient_norm",
        "loss_min",
        "loss_max",
        "gradient_change_min",
        "gradient_change_max",
        "effective_smoothness",
        "largest_stable_step",
    ]
    assert all(type(value) is float for value in found.to_dict().values())
    lines = str(found).split("\n")
    assert len(lines) == 8 and lines[-1].split() == ["largest", "stable", "step", "0.1"]


@pytest.mark.parametrize(
    "sizes", [0.1, [], [[0.1]], [0.0, 1], [-1, 1], [1, 0.1], [0.1, 0.1], [np.nan], [0.1, np.inf], "abc", [1, "x"]]
)
def test_bad_step_sizes(sizes):
    with pytest.raises(
        ValueError, match="Argument `step_sizes` must be positive numbers in increasing order. Received"
    ):
        loss_landscape(linear(), (normal(8, 4), normal(8, 1)), loss=MSE, step_sizes=sizes)


@pytest.mark.parametrize("divergence", [0, -1.0, True, None, "1", np.nan])
def test_bad_divergence(divergence):
    with pytest.raises(ValueError, match="Argument `divergence` must be a number from 1 on. Received: divergence="):
        loss_landscape(linear(), (normal(8, 4), normal(8, 1)), loss=MSE, divergence=divergence)


def test_numbers_of_numpy_are_numbers():
    loss_landscape(linear(), (normal(8, 4), normal(8, 1)), loss=MSE, step_sizes=[0.1], divergence=np.float32(2))


def test_a_loss_that_is_not_finite():
    broken = linear()
    broken.layers[0].kernel.assign(np.full((4, 1), np.nan))
    landscape = loss_landscape(broken, (normal(8, 4), normal(8, 1)), loss=MSE)
    assert np.isnan(landscape.loss) and np.isnan(landscape.losses).all() and landscape.largest_stable_step == 0
    assert np.isnan(landscape.effective_smoothness)


def test_no_gradient():
    model = linear()
    x = normal(8, 4)
    landscape = loss_landscape(
        model, (x, np.asarray(keras.ops.convert_to_numpy(model(x)))), loss=MSE, step_sizes=[0.1, 1]
    )
    assert landscape.gradient_norm == 0 and landscape.largest_stable_step == 1 and (landscape.losses == 0).all()
    assert np.isnan(landscape.smoothness).all() and np.isnan(landscape.relative_losses).all()


def test_bad_input():
    x, y = normal(8, 4), normal(8, 1)
    for batch in (x, [x, y], (x,), iter([(x, y)])):
        with pytest.raises(ValueError, match="Argument `batch` must be a tuple.*Received: batch of the type"):
            loss_landscape(linear(), batch, loss=MSE)
    with pytest.raises(ValueError, match="Argument `loss` must be given.*not compiled"):
        loss_landscape(linear(), (x, y))
    frozen = linear()
    frozen.trainable = False
    with pytest.raises(ValueError, match="Argument `model` must be a model that has trainable weights"):
        loss_landscape(frozen, (x, y), loss=MSE)
